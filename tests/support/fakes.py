"""A runner without graphs, whose every token depends on what its slot's cache holds."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from runtime.engine import Engine
from runtime.execution.base import Candidates, Search
from runtime.model.manifest import (
    TOKENIZER,
    UNFORCED,
    WEIGHTS,
    Manifest,
    Preprocessing,
    Sizes,
    SpecialTokens,
)
from runtime.planning.config import EngineConfig
from runtime.planning.plan import Plan
from server.models import ServedModel
from server.processes.worker import serve
from server.settings import Settings
from server.system import follow_parent
from server.telemetry.logs import configure
from server.telemetry.metrics import count_as

EOS, VOCABULARY = 1, 50
SIZES = Sizes(4, frames=None, prefix=5, layers=1, heads=1, head=1, vocabulary=VOCABULARY, text=32)
MANIFEST = Manifest(
    "fake", None, SIZES, SpecialTokens(0, EOS, 2), Preprocessing(4, 4, 3),
    files={TOKENIZER: "", WEIGHTS: ""}, variants=(), combinations=(),
)  # fmt: skip


class FakeTokenizer:
    """Prompts are numbers; captions are the generated ids."""

    def prompt_ids(self, prompt: str | None) -> tuple[int, ...]:
        return (0, *(int(word) for word in (prompt or "").split()))

    def token(self, token: int) -> str:
        return str(token)

    def whole_words(self, ids: Sequence[int]) -> str:
        return self.text(ids)

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(str(i) for i in ids if i != EOS)


class FakeRunner:
    """Keeps (image, tokens fed) for each slot, as a cache does, and predicts a hash of them."""

    text_tokens = SIZES.text
    runs_on = "fake"
    on_gpu = graphs = overlaps = searches = False
    move_cost = 1

    def __init__(self, burst: int = 1, slots: int = 16, encode_batch: int = 4) -> None:
        self.burst = burst
        text = self.text_tokens
        self.plan = Plan("fake", "fake", encode_batch=encode_batch, slots=slots, text_tokens=text)
        self.cache: dict[int, tuple[int, list[int]]] = {}
        self.steps: list[int] = []  # rows of each decode step
        self.encoded: list[int] = []  # images of each encoder call
        self.seen: list[int] = []  # sums of the images, in the order they were encoded
        self.moves = 0
        self.fail_next: Exception | None = None

    def encode(self, pixels: Sequence[np.ndarray], slots: Sequence[Sequence[int]]) -> None:
        self.encoded.append(len(pixels))
        for image, targets in zip(pixels, slots, strict=True):
            for slot in targets:
                self.cache[slot] = (int(image.sum()), [])
            self.seen.append(int(image.sum()))

    def wait_encoded(self) -> None:
        pass

    def decode(
        self,
        tokens: Sequence[int],
        fed: Sequence[int],
        forced: Sequence[Sequence[int]] = (),
        candidates: int = 1,
        searches: Sequence[Search] = (),
    ) -> Candidates:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self.steps.append(len(tokens))
        assert max(fed) + 1 + len(forced) <= self.text_tokens, "a cache has no more room"
        self.last_fed = [n + 1 + len(forced) for n in fed]
        ids: list[list[list[int]]] = []
        for step, chosen in enumerate([*forced, [UNFORCED] * len(tokens)]):
            given = zip(tokens, fed, strict=True)
            said = [self._next(slot, t, n + step) for slot, (t, n) in enumerate(given)]
            tokens = [s if c == UNFORCED else c for s, c in zip(said, chosen, strict=True)]
            ids.append([[(t + k) % VOCABULARY for k in range(candidates)] for t in tokens])
        self.last = tokens
        found = np.array(ids)
        logprobs = np.broadcast_to(-0.5 - np.arange(candidates, dtype=np.float32), found.shape)
        return Candidates(found, logprobs.copy(), np.ones(found.shape[:2], np.float32))

    def proceed(self, steps: int) -> Candidates:
        going_on = [[UNFORCED] * len(self.last)] * (steps - 1)
        # Of a row whose sequence has left, the slot may be another's by now.
        there = [len(self.cache[slot][1]) >= n for slot, n in enumerate(self.last_fed)]
        fed = [n if is_there else 0 for n, is_there in zip(self.last_fed, there, strict=True)]
        return self.decode(self.last, fed, going_on)

    def reorder(self, moves: Sequence[tuple[int, int]], fed: int) -> None:
        texts = {target: list(self.cache[source][1][:fed]) for source, target in moves}
        for target, text in texts.items():
            self.cache[target] = (self.cache[target][0], text)

    def _next(self, slot: int, token: int, fed: int) -> int:
        image, texts = self.cache[slot]
        assert fed <= len(texts), "a row was fed at the wrong age"
        del texts[fed:]  # as in a cache, positions beyond a row's length do not count
        texts.append(token)
        return hash((image, *texts)) % 12  # EOS about every twelfth token

    def bucket(self, rows: int) -> int:
        return rows

    def move(self, source: int, target: int) -> None:
        self.moves += 1
        self.cache[target] = (self.cache[source][0], list(self.cache[source][1]))


class Gate(FakeRunner):
    """Decodes only while `open` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()

    def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
        assert self.open.wait(30)
        return super().decode(tokens, fed, forced, candidates)


def fake_engine(config: EngineConfig | None = None, burst: int = 1) -> Engine:
    config = config or EngineConfig(slots=3, patience=0)
    runner = FakeRunner(burst, config.slots or 16, config.encode_batch or 4)
    return Engine(MANIFEST, FakeTokenizer(), runner, config)  # type: ignore[arg-type]


def gated(slots: int = 2) -> Engine:
    """An engine that decodes only while `runner.open` is set."""
    engine = fake_engine(EngineConfig(slots=slots))
    engine.runner = Gate()
    return engine


def image(number: int) -> np.ndarray:
    """Pixels that all equal `number`, so that their sum identifies the image."""
    pixels = np.zeros((3, 4, 4), np.uint8)
    pixels.flat[:] = number
    return pixels


def drained(engine: Engine) -> dict[int, tuple[int, ...]]:
    """Step until the engine is idle; generated ids by request id."""
    found: dict[int, tuple[int, ...]] = {}
    while not engine.idle:
        for output in engine.step():
            found[output.id] = found.get(output.id, ()) + output.token_ids
    return found


class Allergic(FakeRunner):
    """Fails on images of one colour: raises, or crashes the process."""

    def __init__(self, crashes: bool, seconds: float) -> None:
        super().__init__()
        self.crashes, self.seconds = crashes, seconds

    def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
        time.sleep(self.seconds)
        if any(self.cache[row][0] == 3 * 16 * 7 for row in range(len(tokens))):
            if self.crashes:
                os.kill(os.getpid(), signal.SIGSEGV)
                time.sleep(60)  # the signal may end the process on another thread, a moment later
            raise RuntimeError("no kernel")
        return super().decode(tokens, fed, forced, candidates)


def allergic_engine(crashes: bool, seconds: float = 0) -> Engine:
    engine = fake_engine(EngineConfig(slots=4))
    engine.runner = Allergic(crashes, seconds)
    return engine


def video_engine(frames: int = 6) -> Engine:
    engine = fake_engine()
    engine.manifest = replace(MANIFEST, sizes=replace(SIZES, frames=frames))
    return engine


def fake_folder(path: Path, manifest: Manifest = MANIFEST) -> Path:
    """A folder of a manifest, and of a tokenizer that says what FakeTokenizer says."""
    path.mkdir()
    pieces = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}))
    pieces.pre_tokenizer = WhitespaceSplit()
    pieces.add_special_tokens([str(EOS)])
    pieces.save(str(path / TOKENIZER))
    manifest.save(path)
    return path


def fake_worker(
    open_engine: Callable[[], Engine],
    settings: Settings,
    model: ServedModel,
    folder: Path,
    index: int,
    epoch: int,
) -> None:
    """Entry point of a worker process around `open_engine()`."""
    follow_parent()
    configure(settings)
    count_as(folder, f"worker-{index}")
    sys.exit(serve(open_engine, model.name, folder, index, epoch))


allergic_worker = partial(fake_worker, partial(allergic_engine, crashes=True, seconds=0.02))
