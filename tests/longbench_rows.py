"""Generated rows and a small model, to test every LongBench task without its data."""

import json
import random
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from hillinfer.assets import data_folder
from hillinfer.longbench.tasks import longbench

CLASSES = ["Sport", "Sport event", "Food", "Date"]
WORDS = "the river village found a letter near old mill and captain watched winter market with great care".split()


def rows(task: str, n: int = 3, words: int = 300) -> list[dict]:
    """Rows of one v1 task in the eight official fields; seeded."""
    rng = random.Random(task)
    chinese = longbench()[task].language == "zh"
    answers = {"retrieval": "Paragraph 3", "retrieval_zh": "段落3", "classification": "Sport event", "count": "7"}
    answer = answers.get(longbench()[task].metric, "河边的村庄" if chinese else "the old mill")
    return [
        {
            "input": f"Question {i}: {{braces}} stay?",
            "context": " ".join(rng.choices(["河边", "的", "村庄"] if chinese else WORDS, k=words)),
            "answers": [answer, f"{answer} 2"] if task == "triviaqa" else [answer],
            "length": (1000, 5000, 9000)[i % 3],
            "dataset": task,
            "language": "zh" if chinese else "en",
            "all_classes": CLASSES if longbench()[task].metric == "classification" else None,
            "_id": f"{task}-{i}",
        }
        for i in range(n)
    ]


def write_rows(folder: Path, tasks: list[str], **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows(task.removesuffix("_e"), **options)]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_model(folder: Path, window: int = 4096, chat_template: str | None = None, ends: int = 1 << 20) -> Path:
    """A Qwen3 with random weights and the embedded model's tokenizer, as a Hugging Face folder.

    ends  one in so many tokens ends an answer
    """
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(data_folder("model"))
    tokenizer.chat_template = chat_template
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=window,
        bos_token_id=0,
        eos_token_id=list(range(1, len(tokenizer), ends)),
        pad_token_id=2,
    )
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
