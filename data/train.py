"""Train hillinfer's tiny Llama from scratch: `python data/train.py [--workers 2]`.

Reads data/train.toml. Writes checkpoints to out/train/, from which an interrupted run resumes, and finally the model
and its tokenizer to data/model/. `--export` writes the last checkpoint there without training.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
import tomllib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import build_tokenizer  # noqa: E402
import start  # noqa: E402
from corpus import Corpus  # noqa: E402
from trunk import angles, trunk  # noqa: E402


def optimizers(model, train: dict) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embedding, norms and biases."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=train["matrix_rate"], weight_decay=train["weight_decay"], momentum=0.95),
        torch.optim.AdamW(others, lr=train["learning_rate"], weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def loss_of(model, forward, batch, theta: float, lm_weight: float) -> tuple[torch.Tensor, dict[str, float]]:
    """Weighted loss, share of correctly predicted answer tokens by task, and loss on sampled other tokens.

    Each answer token of a row is weighted by 1 / sqrt(number of answer tokens in the row).
    """
    ids, answers, positions, tasks = batch
    cos, sin = angles(positions, theta)
    hidden = forward(model, ids[:, :-1], cos, sin)
    target, answers = ids[:, 1:], answers[:, 1:]
    others = ~answers & (torch.rand(target.shape) < 0.1)
    head = model.model.embed_tokens.weight.bfloat16()
    logits = F.linear(hidden[answers].bfloat16(), head).float()
    right = torch.zeros(target.shape)
    right[answers] = (logits.argmax(-1) == target[answers]).float()
    count = answers.sum(1, keepdim=True)
    weight = count.clamp(min=1).rsqrt().expand(target.shape)[answers]
    loss = (F.cross_entropy(logits, target[answers], reduction="none") * weight).sum() / weight.sum()
    rest = F.cross_entropy(F.linear(hidden[others].bfloat16(), head).float(), target[others])
    shares = (right.sum(1) / count[:, 0]).tolist()
    seen = {task: share for task, share, n in zip(tasks, shares, count[:, 0], strict=True) if n}
    return loss + lm_weight * rest, {**seen, "text loss": rest.item(), "loss": loss.item()}


def average_gradients(model, workers: int) -> None:
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= workers
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def schedule(stages: list[dict], step: int) -> tuple[dict, float]:
    """Stage and learning-rate factor of a step: warm-up, then `rate[0]` to `rate[1]` within the stage."""
    for stage in stages:
        if step < stage["steps"]:
            first, last = stage.get("rate", (1.0, 1.0))
            factor = first + (last - first) * step / stage["steps"]
            return stage, factor * min(1.0, (step + 1) / stage.get("warmup", 1))
        step -= stage["steps"]
    raise ValueError("step is past the last stage")


def save(path: Path, state: dict) -> None:
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def export(model, tokenizer, folder: Path) -> None:
    """Write the model in bf16, atomically: to a temporary location first, so readers never see a partial model."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    twin = start.LlamaForCausalLM(model.config).to(torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    twin.generation_config.update(do_sample=False, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    twin.save_pretrained(new)
    tokenizer.save_pretrained(new)
    for file in new.iterdir():
        file.chmod(0o644)
    for page in folder.glob("*.md"):
        shutil.copy(page, new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def work(rank: int, args, settings: dict) -> None:
    torch.set_num_threads(1)
    if args.workers > 1:
        # torch sends it to workers of a dead parent; a script started with & inherits it as ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        meet = f"file://{args.out.resolve()}/meet"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=args.workers)
    shape, train, stages = settings["model"], settings["train"], settings["stage"]
    tokenizer = build_tokenizer.build()
    model = start.build(shape, tokenizer, train["seed"])
    tools = optimizers(model, train)
    rates = [tool.param_groups[0]["lr"] for tool in tools]
    corpus = Corpus(tokenizer, shape["window"], train["jump_share"])
    forward = torch.compile(trunk, dynamic=False) if args.compile else trunk
    step, seconds, tokens, last = 0, 0.0, 0, args.out / "last.pt"
    if last.exists():
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["model"])
        for tool, kept in zip(tools, state["optimizers"], strict=True):
            tool.load_state_dict(kept)
        step, seconds, tokens = state["step"], state["seconds"], state["tokens"]
    total = sum(stage["steps"] for stage in stages)
    mean: dict[str, float] = {}
    while step < total and not args.export:
        began = time.perf_counter()
        stage, factor = schedule(stages, step)
        rows = max(1, stage["batch"] // args.workers)
        micro = max(1, min(rows, 4096 // stage["length"]))  # rows per pass, small enough for the CPU cache
        torch.manual_seed(train["seed"] * 1_000_003 + step * 17 + rank)
        for part in range(rows // micro):
            seed = f"{train['seed']}-{step}-{rank}-{part}"
            batch = corpus.batch(stage["tasks"], stage["length"], micro, seed)
            loss, seen = loss_of(model, forward, batch, shape["rope_theta"], train["lm_weight"])
            (loss * (micro / rows)).backward()
        if args.workers > 1:
            average_gradients(model, args.workers)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tool, rate in zip(tools, rates, strict=True):
            for group in tool.param_groups:
                group["lr"] = rate * factor
            tool.step()
            tool.zero_grad()
        step, tokens = step + 1, tokens + rows * args.workers * stage["length"]
        seconds += time.perf_counter() - began
        for name, value in seen.items():
            mean[name] = 0.95 * mean.get(name, value) + 0.05 * value
        if rank == 0 and (step % 10 == 0 or step == total):
            figures = " ".join(f"{name} {value:.3f}" for name, value in sorted(mean.items()))
            print(f"[{'#' * (20 * step // total):20}] {step}/{total} n {stage['length']} {tokens / 1e6:.2f} M tokens "
                  f"{seconds:.0f} s  {figures}", flush=True)  # fmt: skip
            with (args.out / "curve.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "length": stage["length"], **mean}) + "\n")
        if rank == 0 and (step % train["checkpoint_steps"] == 0 or step == total):
            state = {"step": step, "seconds": seconds, "tokens": tokens, "model": model.state_dict()}
            save(last, state | {"optimizers": [tool.state_dict() for tool in tools]})
    if rank == 0:
        export(model, tokenizer, args.model)
    if args.workers > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", default=ROOT / "data" / "train.toml", type=Path)
    parser.add_argument("--out", default=ROOT / "out" / "train", type=Path)
    parser.add_argument("--model", default=ROOT / "data" / "model", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--compile", action="store_true", help="compile the forward pass")
    parser.add_argument("--export", action="store_true", help="only write the last checkpoint to --model")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "passive"}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "meet").unlink(missing_ok=True)
    settings = tomllib.loads(args.settings.read_text(encoding="utf-8"))
    if args.workers > 1:
        torch.multiprocessing.spawn(work, (args, settings), args.workers)
    else:
        work(0, args, settings)


if __name__ == "__main__":
    main()
