"""Training sequences: one document, followed by as many of its questions, with answers, as fit."""

import random

import torch

import hillinfer.longbench.synthetic as syn


def block(rng: random.Random, tokenizer, task: str, length: int) -> tuple[list[int], list[bool]]:
    """A document and its questions in random order, about `length` tokens in total."""
    group = rng.choice((1, 2, 3, 4, 4, 5, 6)) if task in ("lines", "chain", "passage") else rng.choice((2, 3, 4))
    if length < 512:
        group = min(group, 2 if task == "two_hop" else 3)
    share = rng.uniform(0.35, 0.65) if length <= 1024 else rng.uniform(0.6, 0.85)
    tokens = int(length * (rng.uniform(0.4, 0.85) if task in ("majority", "tally") else share))
    facts = {"needle": 13, "two_hop": 28}.get(task, 0) * group * group
    size = max(0 if facts else 4, int((tokens - facts) / syn.TOKENS_PER_UNIT[task]))
    document = syn.TASKS[task](rng, "train", size, group)
    head, tail = syn.PROMPTS[task].split("{context}")
    if length < 512 and rng.random() < 0.5:
        head = ""
    texts = [head + document.context + tail.replace("{input} ", "")]
    for question, answer in rng.sample(document.pairs, len(document.pairs)):
        texts += [question + " ", answer]
    coded = tokenizer(texts, add_special_tokens=False).input_ids
    ids, answers = coded[0], [False] * len(coded[0])
    for question, answer in zip(coded[1::2], coded[2::2], strict=True):
        answer = [*answer, tokenizer.eos_token_id]
        ids += question + answer
        answers += [False] * len(question) + [True] * len(answer)
    return ids, answers


def sequence(rng: random.Random, tokenizer, task: str, length: int) -> tuple[list[int], list[bool]]:
    """`length + 1` token ids and a mask of answer tokens. Concatenates documents if one is too short."""
    ids, answers = [tokenizer.bos_token_id], [False]
    while len(ids) <= length:
        more = block(rng, tokenizer, task, length)
        ids, answers = ids + more[0], answers + more[1]
    return ids[: length + 1], answers[: length + 1]


def positions(rng: random.Random, ids: torch.Tensor, window: int, share: float, newline: set[int]) -> torch.Tensor:
    """Position ids that skip ahead at some line ends, so short training texts cover the whole context window."""
    n = len(ids)
    steps = torch.ones(n, dtype=torch.long)
    steps[0] = 0
    if rng.random() < share and n < window:
        ends = [i for i in range(1, n - 1) if int(ids[i]) in newline] or [1]
        budget = rng.randint(0, window - n)
        for place in rng.choices(ends, k=rng.randint(1, 8)):
            jump = int(budget * rng.random() ** 2)
            steps[place + 1] += jump
            budget -= jump
    return steps.cumsum(0)


class Corpus:
    """Batches that depend only on their seed, so a resumed run sees the same data as an uninterrupted one."""

    def __init__(self, tokenizer, window: int, jump_share: float):
        self.tokenizer, self.window, self.jump_share = tokenizer, window, jump_share
        vocabulary = tokenizer.get_vocab()
        self.newline = {i for token, i in vocabulary.items() if token.endswith("\n")} | {tokenizer.eos_token_id}

    def batch(self, tasks: dict[str, float], length: int, rows: int, seed: str):
        """ids (B, n+1), answer mask (B, n+1), positions (B, n), and the task of each row."""
        rng = random.Random(seed)
        ids, answers, places, names = [], [], [], []
        for _ in range(rows):
            task = rng.choices(list(tasks), list(tasks.values()))[0]
            names.append(task)
            i, a = sequence(rng, self.tokenizer, task, length)
            ids.append(torch.tensor(i))
            answers.append(torch.tensor(a))
            places.append(positions(rng, ids[-1][:-1], self.window, self.jump_share, self.newline))
        return torch.stack(ids), torch.stack(answers), torch.stack(places), names
