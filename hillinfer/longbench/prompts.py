"""Build prompts: task template, official truncation in the middle, chat template."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hillinfer.errors import UsageError
from hillinfer.longbench.tasks import Task


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and the boundary between document and question."""

    ids: list[int]
    document: int  # tokens before the question: prefilled exactly, the rest is fed token by token
    original: int  # tokens before truncation
    truncated: bool
    recut: bool = False  # truncated a second time, by tokens


def official_max_length(window: int) -> int:
    """LongBench's prompt limit by context window: 3500 tokens for 4K, 7500 for 8K, 15500 for 16K, 31500 for 32K."""
    if window < 2048:
        raise UsageError(f"LongBench's rule does not cover a window of {window} tokens; set --max-length")
    return window // 1024 * 1000 - 500


def truncate(tokenizer: PreTrainedTokenizerBase, ids: list[int], max_length: int) -> str:
    """The text of the first and last max_length/2 tokens, as in LongBench's pred.py."""
    half = max_length // 2
    return tokenizer.decode(ids[:half], skip_special_tokens=True) + tokenizer.decode(
        ids[-half:], skip_special_tokens=True
    )


def build(
    task: Task,
    record: dict,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat: bool,
    stepwise: bool = True,
    room: int | None = None,
) -> Prompt:
    """The prompt of one record.

    max_length  longer prompts are truncated in the middle, before the chat template is applied, as in LongBench
    chat        apply the tokenizer's chat template, unless the task forbids it
    stepwise    feed the question token by token, so that a selective system has to find the answer with its own
                selection; otherwise prefill everything but the last token
    room        hard limit of the model, in tokens. The official truncation can exceed it: the chat template adds
                tokens, and byte fallback can encode a character split by the cut as up to three tokens per byte. Such
                prompts are truncated again, by tokens

    Raises UsageError if fewer than three tokens remain.
    """
    context, question = task.parts(record)
    text = context + question
    raw = tokenizer(text).input_ids
    truncated = len(raw) > max_length
    if truncated:
        text = truncate(tokenizer, raw, max_length)
    if chat and task.chat:
        rendered, suffix = _chat(tokenizer, text)
        ids = tokenizer(rendered, add_special_tokens=False).input_ids  # the template adds the special tokens
        question += suffix
    else:
        ids = tokenizer(text).input_ids if truncated else raw
    if recut := room is not None and len(ids) > room:
        ids = ids[: room // 2] + ids[-(room // 2) :]
    question_tokens = len(tokenizer(question, add_special_tokens=False).input_ids) if stepwise else 1
    if len(ids) < 3:
        raise UsageError(f"{task.name}, row {record['_id']}: a prompt of {len(ids)} tokens is too short")
    return Prompt(ids, len(ids) - min(max(question_tokens, 1), len(ids) - 2), len(raw), truncated, recut)


def turn(tokenizer: PreTrainedTokenizerBase, text: str, question: str) -> tuple[list[int], list[int]]:
    """A user's turn of a text and a question on it, cut in two before the question, in the model's chat format if it
    has one.
    """
    if not tokenizer.chat_template:
        return tokenizer(text).input_ids, tokenizer("\n" + question, add_special_tokens=False).input_ids
    head, _, tail = _chat(tokenizer, f"{text}\n\n{question}")[0].rpartition(question.strip())
    head, tail = (tokenizer(part, add_special_tokens=False).input_ids for part in (head, question.strip() + tail))
    return head, tail


def _chat(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, str]:
    """The text rendered as a user turn, and the template's suffix after it.

    Thinking is disabled: reasoning models would spend the short answer's token budget on it.
    """
    turn = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    core = text.strip()  # some templates strip the content
    return rendered, rendered[rendered.rindex(core) + len(core) :]
