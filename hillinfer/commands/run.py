"""`hillinfer run`: continue a long text with any supported model."""

from pathlib import Path
from typing import Annotated

import typer

from hillinfer.commands.console import err, say
from hillinfer.commands.options import Alpha, DriveKind, Dtype, HostBudget, Precision, PrefillChunk
from hillinfer.config import Settings, check_folder
from hillinfer.documents import read_document
from hillinfer.errors import UsageError
from hillinfer.pipeline.memory import check_libraries


def run(
    model: Annotated[str, typer.Option(help="Folder, .gguf file, hub id or hub-id:file.gguf; 'embedded' ships.")],
    prompt_file: Annotated[Path | None, typer.Option(help="Text file or PDF to continue.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue, instead of --prompt-file.")] = None,
    document: Annotated[Path | None, typer.Option(help="Text file or PDF that precedes the prompt.")] = None,
    question: Annotated[str | None, typer.Option(help="On the document, asked as the model's chat has it.")] = None,
    session: Annotated[Path | None, typer.Option(help="File for the document's KV, created if missing.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of prompts' KV: known prefixes are not prefilled.")] = None,
    system: Annotated[str, typer.Option(help="System, as listed by `hillinfer systems`.")] = "hillinfer",
    alpha: Alpha = 0.2,
    host_budget: HostBudget = None,
    drive: Annotated[Path | None, typer.Option(help="Folder on the drive for the cold KV.")] = None,
    drive_kind: DriveKind = "ssd",
    xclbin: Annotated[Path | None, typer.Option(help="The SmartSSD's kernel, for --drive-kind xrt.")] = None,
    precision: Precision = "int8",
    profile: Annotated[Path | None, typer.Option(help="From `hillinfer profile`, to balance host and drive.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    prefill_chunk: PrefillChunk = None,
    device: Annotated[Path | None, typer.Option(help="Raw device for dualblade's and flexgen's direct path.")] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams; more than one needs all KV in memory.")] = 1,
    exact: Annotated[bool, typer.Option(help="Verify drafts with all KV: the full cache's tokens.")] = False,
    dtype: Dtype = "auto",
    trace: Annotated[Path | None, typer.Option(help="Write the timeline here, for ui.perfetto.dev.")] = None,
):
    """Continue a long text with a model whose KV cache is spread over the tiers."""
    options = dict(alpha=alpha, host_budget=host_budget, drive=drive)
    options |= dict(drive_kind=drive_kind, xclbin=xclbin, precision=precision, profile=profile)
    check_folder(Settings(**options).drive)  # refuse bad input before torch loads
    options |= {} if device is None else {"device": device}
    if num_beams > 1 and drive is not None:
        raise UsageError("beam search would copy whole caches on the drive: use --num-beams 1, or leave out --drive")
    if [prompt, prompt_file, question].count(None) != 2 or (question and document is None):
        raise UsageError("give either --prompt-file FILE, --prompt TEXT, or --document FILE with a --question TEXT")
    if num_beams > 1 and (document or session or store or exact):
        raise UsageError("these hold one sequence: use --num-beams 1 with --exact, --document, --session and --store")
    if session and store:
        raise UsageError("a session keeps its document and a store all prompts: give --session or --store")
    text = question or prompt if prompt_file is None else read_document(prompt_file)
    if not (text or "").strip():
        raise UsageError("the prompt is empty; give the text to continue")
    job = dict(session=session, store=store, max_new_tokens=max_new_tokens, num_beams=num_beams, dtype=dtype)
    job |= dict(exact=exact, chunk=prefill_chunk, document=document and read_document(document), chat=bool(question))
    check_libraries()
    from hillinfer.commands.continuation import continue_text

    generated, facts, timeline = continue_text(model, text, system, options, **job)
    say(generated)
    say(*facts, to=err)
    if trace is not None:
        say(f"timeline (open in ui.perfetto.dev): {timeline.save(trace)}", to=err)
