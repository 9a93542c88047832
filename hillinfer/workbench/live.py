"""A run in a background thread, which can be observed live and stopped within one token. Independent of widgets."""

import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from hillinfer.cache import TieredCache, chunk_ends
from hillinfer.longbench.runner import decode, feed, measured
from hillinfer.prefix_store.blocks import PrefixStore
from hillinfer.prefix_store.keeper import check_stored
from hillinfer.session import check_keeps, open_session, save_session, session_ids
from hillinfer.speculative import check_draft, describe_rounds, exact
from hillinfer.systems.planning import plan
from hillinfer.systems.registry import find_system, make_cache
from hillinfer.systems.shapes import shape_of
from hillinfer.timeline import Counters, Timeline
from hillinfer.whatif.recording import describe
from hillinfer.workbench.background import Background
from hillinfer.workbench.cases import Case
from hillinfer.workbench.observe import AttentionRecord

CHUNK = 1024  # tokens per prefill chunk; the stop event is checked in between


class Token(NamedTuple):
    """A token of the question or the answer, with its decode step."""

    text: str
    step: int  # the decode step that consumed it (question) or produced it (answer)
    ms: float  # since the start of the first decode step
    asked: bool  # True for tokens of the question


@dataclass
class LiveRun(Background):
    """A run in the background: a stop ends it after the current token or chunk; `result` is the answer.

    Other threads may read phase, tokens, timeline, counters, record and status() during the run.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    case: Case
    system: str
    options: dict
    record: AttentionRecord | None = None
    session: Path | None = None  # session file with the document's KV: opened if it exists, else created
    store: Path | None = None  # folder of prompts' KV: the known prefix is opened, and what is prefilled is kept
    exact: bool = False  # verify drafts with all KV
    phase: str = "waiting"  # prefill, decode, done, stopped, failed
    tokens: list[Token] = field(default_factory=list)
    timeline: Timeline = field(default_factory=Timeline)
    counters: Counters = field(default_factory=Counters)
    memory: dict[str, int] = field(default_factory=dict)
    figures: dict | None = None  # `runner.measured`, once the run has ended
    score: float | None = None  # of the answer by the task's metric, 0 to 1
    prefilled: int = 0
    error: BaseException | None = None
    split_reason: str = ""
    opened: str = ""  # what came from the store, and why the rest was prefilled

    def __post_init__(self):
        super().__init__()
        self._decoding = self._ended = 0.0

    def check(self) -> None:
        """Raise UsageError for a run that cannot work, before it starts."""
        system, settings = find_system(self.system, self.options)
        total = len(self.case.context) + len(self.case.question) + self.case.max_new_tokens
        plan(self.model.config, settings, total, self.model.dtype, policy=system.policy, device=self.model.device)
        if self.exact:
            check_draft(system.policy)
        if self.session is not None:
            check_keeps(self.model.config, self.system, self.options)
            session_ids(self.session, self.case.context)
        if self.store is not None:
            check_stored(self.model.config)
            PrefixStore(self.store)

    def start(self) -> "LiveRun":
        self.check()
        return super().start()

    @property
    def right(self) -> bool | None:
        """Whether the answer is right; None before the end, and for a metric that gives parts of a point."""
        graded = self.score is None or self.case.judge.metric not in ("exact", "last_number")
        return None if graded else self.score == 1

    @property
    def answer(self) -> str:
        return "".join(token.text for token in self.tokens[:] if not token.asked).strip()

    def text_of(self, first: int, last: int) -> list[str]:
        """The texts of the tokens [first, last): document, question and answer."""
        known = self.case.context + self.case.question
        new = [token.text for token in self.tokens[:] if not token.asked]
        after = slice(max(0, first - len(known)), max(0, last - len(known)))
        return self.tokenizer.batch_decode([[one] for one in known[first:last]]) + new[after]

    def step_at(self, character: int) -> int | None:
        """The step whose token holds this character of the answer, or the last one's; None before the first."""
        end, step = 0, None
        for token in self.tokens[:]:
            if not token.asked and end <= character:
                end, step = end + len(token.text), token.step
        return step

    def status(self) -> dict:
        """Progress: decode steps done and expected, and measured tokens per second and seconds left."""
        done, foreseen = len(self.tokens), len(self.case.question) + self.case.max_new_tokens - 1
        elapsed = (self._ended or time.perf_counter()) - self._decoding if self._decoding else 0.0
        speed = done / elapsed if elapsed else 0.0
        return dict(
            phase=self.phase,
            prefilled=self.prefilled,
            context=len(self.case.context),
            done=done,
            foreseen=foreseen,
            speed=speed,
            left_s=(foreseen - done) / speed if speed and self.phase == "decode" else 0.0,
            notes="; ".join(filter(None, (self.opened, describe_rounds(self.counters.rounds)))),
            error=str(self.error or ""),
        )

    def _outcome(self) -> str:
        return self.answer

    def _work(self) -> None:
        try:
            with torch.inference_mode(), self._cache() as cache:
                self._run(cache)
            self.phase = "stopped" if self._stop.is_set() else "done"
        except BaseException as error:
            self.error, self.phase = error, "failed"
        finally:
            self._ended = self._ended or time.perf_counter()

    def _cache(self) -> TieredCache:
        self.phase = "prefill"
        if self.session is None or not self.session.exists():
            return make_cache(self.model, self.system, self.store, **self.options)
        cache, ids = open_session(self.session, self.model, self.system, **self.options)
        self.prefilled = len(ids)
        return cache

    def _run(self, cache: TieredCache) -> None:
        context, start, opened, keeper = self.case.context, time.perf_counter(), self.prefilled > 0, cache.run.keeper
        if keeper is not None:
            self.prefilled, self.opened = keeper.open(context), str(keeper.report)
        known = self.prefilled
        for first, last in pairwise(() if opened else chunk_ends(len(context) - known, CHUNK)):
            if self._stop.is_set():
                return
            feed(self.model, cache, context[known + first : known + last])
            self.prefilled = known + last
        prefill_s = time.perf_counter() - start
        if self.session is not None and not opened:
            save_session(cache, self.session, self.model, context)
        cache.timeline.clear()  # the figures cover decode steps only
        cache.counters.clear()
        self.timeline, self.counters = cache.timeline, cache.counters
        self.split_reason = cache.why_split()
        if self.record is not None:
            self.record.watch(cache)
        self._decoding, self.phase = time.perf_counter(), "decode"
        self._decode(cache)
        self._ended = time.perf_counter()
        self.figures = measured(cache, prefill_s, self._ended - self._decoding)
        self.memory = self.figures["memory"]
        shape = shape_of(self.model.config.get_text_config(), self.model.dtype.itemsize)
        self.timeline.about = describe(cache.run, shape, self.system)  # makes a saved trace replayable
        if not self._stop.is_set():
            self.score = self.case.score(self.answer)

    def _decode(self, cache: TieredCache) -> None:
        context, question = self.case.context, self.case.question
        asked = _Growing(self.tokenizer, special=True)
        for token in question[:-1]:
            if self._stop.is_set():
                return
            if not self.exact:  # else the first pass over all KV takes in the question
                feed(self.model, cache, [token])
            self._add_token(cache, asked.add(token), True)
        if self._stop.is_set():
            return
        ids, new = context + question, self.case.max_new_tokens
        watch = StoppingCriteriaList([_EachToken(self, cache)])
        rules = self.case.rules(self.tokenizer) | ({"custom_generate": exact} if self.exact else {})
        decode(self.model, cache, ids, new, stopping_criteria=watch, **rules)

    def _add_token(self, cache: TieredCache, text: str, asked: bool) -> None:
        now = time.perf_counter()
        self.tokens.append(Token(text, cache.timeline.step, (now - self._decoding) * 1e3, asked))
        if len(self.tokens) % 8 == 1:
            self.memory = cache.memory()


class LabelledRun:
    """A run with the title and settings that its board displays."""

    def __init__(self, run: LiveRun, title: str, setting: str):
        self.run, self.title, self.setting = run, title, setting

    def __getattr__(self, name: str):
        return getattr(self.run, name)

    def status(self) -> dict:
        run = self.run
        extra = dict(title=self.title, setting=self.setting, right=run.right, score=run.score, memory=run.memory)
        extra["metric"] = run.case.judge.metric if run.case.judge else None
        return run.status() | extra | dict(observed=run.record is not None)


class _Growing:
    """Text of tokens that come one by one, as decoding them together gives it.

    A character of several tokens (CJK, emoji) appears with the last of them; a special token completes any text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: bool):
        self.tokenizer, self.special, self.ends = tokenizer, special, set(tokenizer.all_special_ids)
        self.ids: list[int] = []
        self.context = self.shown = 0  # the text of ids up to `shown` is out; decoding begins at `context`

    def add(self, token: int, last: bool = False) -> str:
        """The text that this token completes; with `last`, also of a character without its end."""
        self.ids.append(token)
        before, text = self._text(self.shown), self._text(len(self.ids))
        if text.endswith("\ufffd") and not last and token not in self.ends:
            return ""
        self.context, self.shown = self.shown, len(self.ids)
        return text[len(before) :]

    def _text(self, end: int) -> str:
        return self.tokenizer.decode(self.ids[self.context : end], skip_special_tokens=not self.special)


class _EachToken(StoppingCriteria):
    """Adds each generated token to the run, and stops the generation on request."""

    def __init__(self, run: LiveRun, cache: TieredCache):
        self.run, self.cache, self.text = run, cache, _Growing(run.tokenizer, special=False)

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        stop = self.run._stop.is_set()
        last = stop or len(self.text.ids) + 1 == self.run.case.max_new_tokens
        self.run._add_token(self.cache, self.text.add(int(input_ids[0, -1]), last), False)
        return torch.full((len(input_ids),), stop, device=input_ids.device)
