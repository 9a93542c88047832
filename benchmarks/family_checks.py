"""What a model family must do with every system: the logits and tokens of transformers' own cache, or a clear refusal.

`check` runs one family; the outcome is plain data. `benchmarks.families` runs all, tests/test_families.py a few.
"""

import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache

import hillinfer
from benchmarks.tiny_models import SPECIAL, build
from hillinfer import UsageError
from hillinfer.systems.planning import plan
from hillinfer.systems.registry import find_system

TOLERANCE = 1e-4
COLD = dict(recent=1, sinks=0, host_budget="4KiB")  # nearly all records come from the drive
EXACT = {  # at alpha 1
    "full": {},
    "flexgen": dict(drive=True, host_budget=0),
    "dualblade": dict(drive=True),
    "hillinfer": dict(drive=True, lookahead=True) | COLD,
}
SELECTIVE = {  # at alpha 0.2
    **{name: dict(drive=True) for name in ("hillinfer", "leoam", "quest", "lru")},
    **{name: {} for name in ("snapkv", "h2o", "streaming", "topk", "infinigen")},
}
PADDED = ("hillinfer", "h2o")  # selective systems that see the padded batch, too: one on the drive, one in memory
KINDS = {
    "DynamicLayer": "F",
    "DynamicSlidingWindowLayer": "S",
    "LinearAttentionLayer": "L",
    "DynamicIndexedLayer": "I",
    "DummyLayer": "_",
    "LinearAttentionAndFullAttentionLayer": "H",
    "LinearAttentionAndSlidingWindowAttentionLayer": "h",
}


@dataclass(frozen=True)
class Script:
    """Lengths of a conversation: a prompt, steps of one token, a second turn, `more` steps, a crop, `more` steps."""

    prompt: int = 200
    steps: int = 24
    turn: int = 16
    more: int = 4
    crop: int = 18
    padding: int = 60  # of the second prompt in the batch

    @property
    def tokens(self) -> int:
        return self.prompt + self.steps + self.turn + 2 * self.more


class Forced(LogitsProcessor):
    """Makes `generate` answer with these tokens (B, N), so that logits stay comparable after a near tie."""

    def __init__(self, tokens: torch.Tensor, prompt: int):
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt
        return torch.full_like(scores, -1e30).scatter(1, self.tokens[:, step : step + 1], 0.0)


class Family:
    """A tiny model, and what it says with transformers' own cache. Raises what transformers raises."""

    def __init__(self, name: str, script: Script):
        self.script, self.model = script, build(name)
        chosen = dict(eos_token_id=None, pad_token_id=0, cache_implementation=None, max_new_tokens=script.steps)
        chosen |= dict(do_sample=False, num_beams=1, return_dict_in_generate=True, output_logits=True)
        self.model.generation_config.update(**chosen)
        generator = torch.Generator().manual_seed(11)
        self.ids = torch.randint(10, SPECIAL - 40, (1, script.tokens), generator=generator)
        self.one = self.ids[:, : script.prompt]
        self.two = torch.cat((self.one, self.one.flip(1)))
        self.two[1, : script.padding] = 0
        self.unable: dict[str, str] = {}  # parts of the script that transformers itself cannot run
        self.own_cache = False
        try:
            next(self.conversation(self.cache()))
        except Exception:
            self.own_cache = True  # a model that insists on a cache class of its own, or an error once more
        self.logits: dict[str, torch.Tensor] = {}
        try:
            for stage, logits in self.conversation(self.cache()):
                self.logits[stage] = logits
        except Exception as error:
            if not self.logits:
                raise
            self.unable[f"conversation after {stage}"] = _one_line(error)
        self.answer = self._able("generate", self.one)
        self.batch = self._able("padded", self.two)

    def _able(self, part: str, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        try:
            return self.generate(prompt, self.cache())
        except Exception as error:
            self.unable[part] = _one_line(error)
            return None

    def cache(self) -> Cache | None:
        return None if self.own_cache else DynamicCache(config=self.model.config)

    @torch.no_grad()
    def conversation(self, cache: Cache | None) -> Iterator[tuple[str, torch.Tensor]]:
        """The script's stages, each with its logits (1, n, V)."""
        _forget_positions(self.model)
        script, at = self.script, 0

        def read(count: int, times: int = 1) -> torch.Tensor:
            nonlocal cache, at
            found = []
            for _ in range(times):
                ids = self.ids[:, at : at + count]
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache, at = getattr(out, "past_key_values", None), at + count
                if cache is None:
                    raise ValueError("the model returns no cache of keys and values")
                found.append(out.logits.float())
            return torch.cat(found, 1)

        yield "prefill", read(script.prompt)
        yield "steps", read(1, script.steps)
        if hasattr(cache, "activate_past_recording"):  # without, only full attention can be cropped
            cache.activate_past_recording()
        yield "turn", read(script.turn)
        yield "more", read(1, script.more)
        cache.crop(-script.crop)
        yield "crop", read(1, script.more)  # other tokens than those cropped

    def generate(self, prompt: torch.Tensor, cache: Cache | None, forced: torch.Tensor | None = None):
        """The new tokens (B, N) and their logits (B, N, V)."""
        _forget_positions(self.model)
        given = {} if cache is None else {"past_key_values": cache}
        if forced is not None:
            given["logits_processor"] = LogitsProcessorList([Forced(forced, prompt.shape[1])])
        out = self.model.generate(prompt, attention_mask=(prompt != 0).long(), **given)
        return out.sequences[:, prompt.shape[1] :], torch.stack(out.logits, 1).float()


def _forget_positions(model: torch.nn.Module) -> None:
    """Models with images keep the last batch's position offsets."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


def check(name: str, script: Script = Script(), save: Callable[[dict], None] = lambda outcome: None) -> dict:
    """A family's outcome with every system; `save` gets it each time that it has grown.

    exact, selective  by system: `refused` and `planned`, the reasons that `make_cache` and `plan` gave for a refusal;
                      `difference` of the logits by stage, `tokens`, whether greedy answers are the same, `drive`, the
                      share of the records read from it, `said`, the warnings; and `faults`, empty if all is well
    untested          why transformers itself cannot run this family
    unable            the parts of the script that transformers cannot run
    """
    started, outcome = time.monotonic(), {"family": name, "stage": "reference", "exact": {}, "selective": {}}
    save(outcome)
    try:
        family = Family(name, script)
    except Exception as error:
        return outcome | {"untested": _one_line(error), "stage": "done"}
    config = family.model.config
    layers = DynamicCache(config=config).layers
    outcome["kinds"] = "".join(KINDS.get(type(layer).__name__, "?") for layer in layers)
    outcome["attention"] = config.get_text_config(decoder=True)._attn_implementation
    outcome["unable"] = family.unable
    for group, alpha, systems in (("exact", 1.0, EXACT), ("selective", 0.2, SELECTIVE)):
        for system, options in systems.items():
            outcome["stage"] = f"{system} at alpha {alpha:g}"
            save(outcome)
            outcome[group][system] = SystemCheck(family, system, alpha, options).run()
    outcome |= {"stage": "done", "seconds": round(time.monotonic() - started, 1)}
    save(outcome)
    return outcome


class SystemCheck:
    """One system on one family."""

    def __init__(self, family: Family, system: str, alpha: float, options: dict):
        self.family, self.system, self.options = family, system, options | {"alpha": alpha}
        self.exact, self.stage, self.said = alpha == 1, "", set()
        self.difference: dict[str, float] = {}
        self.faults: list[str] = []
        self.outcome: dict = {"difference": self.difference, "faults": self.faults}

    def run(self) -> dict:
        """The system's outcome, as in `check`. Stops at the first part that is refused or fails."""
        family, parts = self.family, {"conversation": self._converse}
        if self.exact and family.answer:
            parts["generate"] = self._generate
        if family.batch and (self.exact or self.system in PADDED):
            parts["padded"] = self._padded
        with tempfile.TemporaryDirectory(prefix="families-") as folder:
            if self.options.get("drive"):
                self.options["drive"] = folder
            self._plan()
            for stage, part in parts.items():
                self.stage = stage
                if not self._try(part):
                    break
            if left := [path.name for path in Path(folder).iterdir()]:
                self.faults.append(f"left behind: {', '.join(left)}")
        planned, run = self.outcome.get("planned"), self.outcome.get("refused")
        if not self.faults and bool(planned) != bool(run):
            said = f"plan refuses ({planned})" if planned else f"the run refuses ({run})"
            self.faults.append(f"plan and run disagree: only {said}")
        return self.outcome | {"said": sorted(self.said)}

    def _plan(self) -> None:
        """What `plan` says, from the config alone."""
        try:
            system, settings = find_system(self.system, self.options)
            config, tokens = self.family.model.config, self.family.script.tokens
            plan(config, settings, tokens, torch.float32, policy=system.policy)
        except UsageError as error:
            self.outcome["planned"] = str(error)
        except Exception as error:
            self.faults.append(f"plan: {describe(error)}")

    def _try(self, part: Callable[[Cache], None]) -> bool:
        """Run a part on a new cache. False if it was refused or failed."""
        cache, said = None, []
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                cache = hillinfer.make_cache(self.family.model, self.system, **self.options)
                part(cache)
            return True
        except UsageError as error:
            if cache is None:
                self.outcome["refused"] = str(error)
            else:
                self.faults.append(f"refused late, in {self.stage}: {describe(error)}")
        except Exception as error:
            self.faults.append(f"{self.stage if cache is not None else 'make_cache'}: {describe(error)}")
        finally:
            self.said |= {str(warning.message) for warning in said}
            if cache is not None:
                cache.close()
        return False

    def _converse(self, cache: Cache) -> None:
        stages = self.family.conversation(cache)
        for stage, want in self.family.logits.items():  # no further than transformers
            self.stage = stage
            self._compare(next(stages)[1], want)
        if self.exact and self.options.get("drive") and cache.counters.rows:
            self.outcome["drive"] = round(cache.counters.rates()["drive"], 3)

    def _generate(self, cache: Cache) -> None:
        tokens, _ = self.family.generate(self.family.one, cache)
        self.outcome["tokens"] = torch.equal(tokens, self.family.answer[0])
        if not self.outcome["tokens"]:
            self.faults.append("WRONG tokens")

    def _padded(self, cache: Cache) -> None:
        tokens, logits = self.family.batch
        self._compare(self.family.generate(self.family.two, cache, forced=tokens)[1], logits)

    def _compare(self, got: torch.Tensor, want: torch.Tensor) -> None:
        """Logits of this stage: equal to transformers', or those of a selection, which are only finite."""
        if not self.exact:
            if not got.isfinite().all() and want.isfinite().all():
                self.faults.append(f"WRONG {self.stage}: not finite")
            return
        worst = float((got - want).abs().nan_to_num(nan=1e9).max())
        self.difference[self.stage] = float(f"{worst:.2g}")
        if worst > TOLERANCE:
            self.faults.append(f"WRONG {self.stage}: off by {worst:.1e}")


def describe(error: BaseException) -> str:
    """Type, message and the innermost frames of hillinfer and of transformers, in one line."""
    frames = traceback.extract_tb(error.__traceback__)[::-1]
    places = []
    for package in ("hillinfer/", "transformers/"):
        for frame in frames:
            if f"/{package}" in frame.filename:
                places.append(f"{frame.filename.rpartition(f'/{package}')[2]}:{frame.lineno} {frame.name}")
                break
    return f"{_one_line(error)} [{' < '.join(places)}]"


def _one_line(error: BaseException, width: int = 300) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:width]
