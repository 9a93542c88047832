"""Kernel side of `show_workbench`: runs of a given length, while the benchmark observes the page."""

import os
import statistics
import time
from collections import defaultdict
from dataclasses import replace

import numpy as np
import psutil
from transformers import LlamaConfig, LlamaForCausalLM

from hillinfer.longbench.synthetic import make_records, prompt_of
from hillinfer.workbench import AttentionMap, dashboard, live, show_attention
from hillinfer.workbench.cases import TEXT


def own_text(workbench, system: str, new: int) -> None:
    """Set the controls to a custom text of 1,500 tokens and an answer of exactly `new` tokens."""
    workbench.model.generation_config.eos_token_id = None
    workbench.text.value = prompt_of(make_records("lines", 1500, 1, 5)[0])
    workbench.system.value, workbench.origin.value, workbench.new_tokens.value = system, TEXT, new


def keep_busy(workbench) -> None:
    """Use a random model of 130 M parameters, large enough to keep both cores busy."""
    size = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16)
    more = dict(num_key_value_heads=4, vocab_size=len(workbench.tokenizer), max_position_embeddings=8192)
    model = LlamaForCausalLM(LlamaConfig(**size, **more)).eval()
    workbench.chosen.use(model, workbench.tokenizer, "130 M random weights")


def spent() -> tuple[float, ...]:
    """CPU seconds of the kernel, the Jupyter server and the browser."""
    browser = [p for p in psutil.process_iter(["name"]) if "chrom" in (p.info["name"] or "")]
    return tuple(
        sum(sum(process.cpu_times()[:2]) for process in processes)
        for processes in ([psutil.Process()], [psutil.Process(os.getppid())], browser)
    )


def windows(workbench, pairs: int, seconds: float) -> None:
    """Alternate windows with and without observation within one run.

    Prints the quartiles and the number of the ms/token ratios, and CPU seconds per second by process, with and without.
    """
    run, board, on = workbench.start(), workbench._boards[-1], [True]
    flush, observes = board.flush, run.record.should_observe
    board.flush = lambda: on[0] and flush()
    run.record.should_observe = lambda *where: on[0] and observes(*where)
    while len(run.tokens) < 20:
        time.sleep(0.1)
    ratios, cpu = [], {True: [], False: []}
    for pair in range(pairs):
        took = {}
        for watched in (True, False) if pair % 2 else (False, True):
            on[0] = watched
            time.sleep(0.3)  # the token in progress at the switch counts for neither
            first, before, began = run.tokens[-1], spent(), time.perf_counter()
            at = len(run.tokens)
            time.sleep(seconds)
            lasted, after = time.perf_counter() - began, spent()
            took[watched] = (run.tokens[-1].ms - first.ms) / max(1, len(run.tokens) - at)
            cpu[watched].append([(b - a) / lasted for a, b in zip(before, after, strict=True)])
        if not run.alive:
            break
        ratios.append(took[True] / took[False])
    del board.flush
    workbench.close()
    means = [statistics.mean(column) for on in (True, False) for column in zip(*cpu[on], strict=True)]
    print(*statistics.quantiles(ratios, n=4), len(ratios), *means)


def held(workbench) -> None:
    """Print the number of tokens, spans and hits of the last run."""
    run = workbench.runs[-1]
    print(len(run.tokens), len(run.timeline.spans), len(run.counters.rows))


def again(workbench, minutes: float, faster: float) -> None:
    """Repeat the last run's rows, `faster` times as fast, up to the rows of `minutes` minutes."""
    once = workbench.runs[-1]
    lap_ms = once.tokens[-1].ms
    spans, rows = defaultdict(list), defaultdict(list)
    for span in once.timeline.spans:
        spans[span.step].append(span)
    for row in once.counters.rows:
        rows[row.step].append(row)

    class Again(live.LiveRun):
        def _work(self):
            self.phase, self._decoding = "decode", time.perf_counter()
            for new in range(round(minutes * 60e3 / lap_ms * len(once.tokens))):
                lap, at = divmod(new, len(once.tokens))
                token = once.tokens[at]
                due = lap * lap_ms + token.ms
                time.sleep(max(0, self._decoding + due / 1e3 / faster - time.perf_counter()))
                shift = round(lap * lap_ms * 1e6)
                self.timeline.spans += [
                    replace(span, step=new, start_ns=span.start_ns + shift, end_ns=span.end_ns + shift)
                    for span in spans[token.step]
                ]
                self.counters.rows += [replace(row, step=new) for row in rows[token.step]]
                if token.step in once.record.steps:
                    self.record.steps[new] = once.record.steps[token.step]
                self.tokens.append(token._replace(step=new, ms=due))
            self.phase, self._ended = "done", time.perf_counter()
            self._finished.set()

    dashboard.LiveRun = Again
    try:
        workbench.start().join()
        workbench.close()
    finally:
        dashboard.LiveRun = live.LiveRun
    held(workbench)


def for_minutes(workbench, minutes: float) -> None:
    """Runs with the current settings, one after another."""
    until = time.time() + 60 * minutes
    while time.time() < until:
        run = workbench.start()
        while run.alive and time.time() < until:
            time.sleep(0.5)
        workbench.close()
    held(workbench)


def long_map(tokens: int, layers: int, heads: int):
    """A made-up attention map and its view: sinks, the newest tokens, passages; a tenth selected, of three tiers."""
    rng, map = np.random.default_rng(0), AttentionMap()
    recent = np.exp(-np.arange(tokens, dtype=np.float32)[::-1] / 300)
    for layer in range(layers):
        weights = rng.exponential(size=(heads, tokens)).astype(np.float32) ** 3 * 0.01
        weights += recent * rng.exponential(size=(heads, 1)).astype(np.float32)
        weights[:, :4] += tokens / 400
        for start in rng.integers(4, tokens - 200, 8):
            weights[:, start : start + rng.integers(4, 200)] += rng.exponential(size=(heads, 1))
        weights /= weights.sum(1, keepdims=True)
        picked = np.sort(np.argsort(-weights.sum(0))[: tokens // 10])
        tiers = np.where(picked >= tokens - 256, 0, 1 + (picked // 97 % 3 == 0)).astype(np.uint8)
        map.add(layer, weights, None, picked, tiers)
    return map, show_attention(map, lambda first, last: [f"w{i} " for i in range(first, last)], "made up")
