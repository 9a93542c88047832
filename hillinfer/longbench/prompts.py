"""From a row to token ids: the template, official truncation in the middle, the chat template."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hillinfer.errors import UsageError
from hillinfer.longbench.tasks import Task


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and where its question begins."""

    ids: list[int]
    document: int  # ids before this are prefilled exactly; the rest is fed token by token
    original: int  # tokens before truncation
    truncated: bool
    again: bool = False  # cut once more, by tokens


def official_max_length(window: int) -> int:
    """LongBench's prompt limit for a model's window: 3500 for 4K, 7500 for 8K, 15500 for 16K, 31500 for 32K tokens."""
    if window < 2048:
        raise UsageError(f"a window of {window} tokens is below what LongBench's rule covers; give --max-length")
    return window // 1024 * 1000 - 500


def truncate(tokenizer: PreTrainedTokenizerBase, ids: list[int], max_length: int) -> str:
    """The text of the first and the last half of max_length tokens, as LongBench's pred.py cuts it."""
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
    """The prompt of one row.

    max_length  longer prompts are cut in the middle; the chat template comes after the cut, as in LongBench
    chat        ask through the tokenizer's chat template, but for tasks that do without
    stepwise    the question, which follows the context, is fed token by token, so that a system that drops tokens has
                to find the answer with its own selection. Otherwise all but the prompt's last token is prefilled
    room        tokens that the model has for a prompt. The official cut can miss it: the chat template adds tokens, and
                a tokenizer with byte fallback reads a character that was cut in two, and its neighbours, as up to
                three tokens for each byte. What is too long is then cut once more, by tokens
    """
    context, question = task.parts(record)
    text = context + question
    raw = tokenizer(text).input_ids
    truncated = len(raw) > max_length
    if truncated:
        text = truncate(tokenizer, raw, max_length)
    if chat and task.chat:
        asked, after = _chat(tokenizer, text)
        ids = tokenizer(asked, add_special_tokens=False).input_ids  # the template has them
        question += after
    else:
        ids = tokenizer(text).input_ids if truncated else raw
    if again := room is not None and len(ids) > room:
        ids = ids[: room // 2] + ids[-(room // 2) :]
    held = len(tokenizer(question, add_special_tokens=False).input_ids) if stepwise else 1
    if len(ids) < 3:
        raise UsageError(f"{task.name}, row {record['_id']}: a prompt of {len(ids)} tokens is too short")
    return Prompt(ids, len(ids) - min(max(held, 1), len(ids) - 2), len(raw), truncated, again)


def _chat(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, str]:
    """The text as a user's turn, and what the template puts after it. Models that can think first are told not to: they
    would spend a short answer's tokens on it.
    """
    turn = [{"role": "user", "content": text}]
    asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    core = text.strip()  # some templates strip what they are given
    return asked, asked[asked.rindex(core) + len(core) :]
