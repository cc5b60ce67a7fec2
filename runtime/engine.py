"""One model, ready to caption: `generate` does so for any thread.

`submit`, `cancel` and `step` are for one thread alone: that of `runtime.stepper`, which calls them
for `generate` and for `runtime.async_engine`.
"""

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from runtime.decoding.beams import Beams
from runtime.decoding.candidates import Move, RowCandidates
from runtime.decoding.continuation import Continuation
from runtime.errors import InvalidRequest, WrongThread
from runtime.execution.base import ModelRunner
from runtime.limits import Limits
from runtime.model.images import AnyImage, pixels_of
from runtime.model.manifest import Manifest
from runtime.model.tokenizer import CaptionTokenizer
from runtime.pacing import Pacing
from runtime.planning.config import SLOTS, EngineConfig
from runtime.request import (
    Caption,
    FinishReason,
    GenerationRequest,
    RequestOutput,
    captioned,
    joined,
)
from runtime.scheduler import Scheduler
from runtime.sequence import Sequence
from runtime.stepper import Stepper

if TYPE_CHECKING:
    from runtime.execution.loader import Prepared

log = logging.getLogger(__name__)

_ENCODE_BATCH = 4  # of an engine that was put together without a plan


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step worked on (images encoded, rows fed a token); who runs and waits after it."""

    encoded: int
    rows: int
    running: int
    waiting: int


class Observer:
    """Told of the engine's steps, on the thread that steps it."""

    def admitted(self, requests: list[GenerationRequest]) -> None:
        """They are about to be encoded."""

    def stepped(self, report: StepReport) -> None:
        """A step is over."""


class Engine:
    """Continuous batching over one model. `Engine.open` builds it from an engine folder."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: CaptionTokenizer,
        runner: ModelRunner,
        config: EngineConfig,
        clock: Callable[[], float] = time.perf_counter,
        seconds: float | None = None,
    ) -> None:
        """clock: seconds, of whatever time the runner's calls take.

        seconds: that a caption of the self-test took, if there was any.
        """
        self._clock, self.seconds = clock, seconds
        self.manifest = manifest
        self.config = config
        self.tokenizer = tokenizer
        self.runner = runner
        self.slots = config.slots or SLOTS
        self.encode_batch = config.encode_batch or _ENCODE_BATCH
        self.limits = Limits(tokenizer, runner.text_tokens, self.slots)
        self._pacing = Pacing(config.patience)
        self.scheduler = self._new_scheduler()
        self.observer = Observer()
        self.stepper = Stepper(self)
        self._sequences: dict[int, Sequence] = {}  # by the ids of their requests
        self._owner: int | None = None  # the thread that steps

    @classmethod
    def open(cls, folder: Path | str, config: EngineConfig | None = None) -> "Engine":
        """Load and warm up an exported engine.

        Raises EngineFolderError for a missing or damaged folder, ProviderError for a provider that
        does not work here.
        """
        from runtime.execution.loader import prepare  # tests of the loop need no ONNX Runtime

        return cls.start(prepare(Path(folder), config or EngineConfig()))

    @classmethod
    def start(cls, prepared: "Prepared") -> "Engine":
        """Load and warm up what the loader's `prepare` found whole; raises ProviderError."""
        from runtime.execution.loader import open_runner

        runner, seconds = open_runner(prepared)
        slots = runner.plan.slots
        batch = min(runner.plan.encode_batch, slots)
        config = replace(prepared.config, encode_batch=batch, slots=slots)
        tokenizer = CaptionTokenizer(prepared.folder, prepared.manifest)
        return cls(prepared.manifest, tokenizer, runner, config, seconds=seconds)

    @property
    def identity(self) -> dict[str, str]:
        """What decides its captions: the model, its export, and the precision it runs in."""
        return {
            "model": self.manifest.model,
            "engine": self.manifest.fingerprint,
            "precision": self.runner.plan.combination,
        }

    @property
    def runs_on(self) -> str:
        """For people: providers and precisions, what the slots take, and the self-test."""
        return f"{self.runner.runs_on}; self-test {self.self_test}"

    @property
    def self_test(self) -> str:
        """For people: whether it says what PyTorch said; an engine that doesn't is never opened."""
        return "passed" if self.manifest.self_test else "none in this export"

    def request(
        self,
        image: AnyImage,
        prompt: str | None = None,
        stream: bool = False,
        place: int = 1,
        **sampling: Any,
    ) -> GenerationRequest:
        """A request that this engine can serve. image: see `runtime.model.images.pixels_of`; video
        checkpoints take stacked pixels. place: of the image among others, for messages. sampling:
        fields of SamplingParams.

        Raises what `pixels_of` raises, and InvalidRequest when shape, prompt or sampling can never
        be served.
        """
        pixels = pixels_of(image, self.manifest, place)
        if pixels.shape != self.manifest.sizes.pixels:
            raise InvalidRequest(
                f"a video model takes pixels of shape {list(self.manifest.sizes.pixels)}, "
                f"not {list(pixels.shape)}"
            )
        prompt_ids, params = self.limits.check(prompt, sampling, stream)
        return GenerationRequest(pixels, prompt_ids, params, stream=stream)

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises InvalidRequest for one that takes more slots than there are, and
        WrongThread while another thread uses the engine.
        """
        rows = request.sampling.rows
        if rows > self.slots:
            raise InvalidRequest(f"it takes {rows} slots, and there are {self.slots}")
        self._claim()
        kind = Beams if request.sampling.num_beams > 1 else Continuation
        decoding = kind(request.prompt_ids, request.sampling, self.manifest.tokens.eos)
        self._sequences[request.id] = self.scheduler.add(request, decoding)

    def cancel(self, request_id: int) -> bool:
        """Take a request back and free its slot at once; False if it had ended already."""
        self._claim()
        sequence = self._sequences.pop(request_id, None)
        found = sequence is not None and self.scheduler.cancel(sequence)
        self._let_go()
        return found

    def abandon(self) -> None:
        """Forget all requests, after a step that raised: what it left in the slots is unknown."""
        self._owner = None
        self._sequences.clear()
        self.scheduler = self._new_scheduler()

    def _claim(self) -> None:
        me = threading.get_ident()
        if self._owner not in (None, me):
            raise WrongThread(
                "another thread uses this engine: call `generate`, which any thread may, or "
                "`submit` and `step` always from the same one"
            )
        self._owner = me

    def _let_go(self) -> None:
        """Once nothing is left to do, any thread may use the engine."""
        if self.idle:
            self._owner = None

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return self.scheduler.idle

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self.slots, self.encode_batch, self.config.refill, self._clock)

    def step(self) -> list[RequestOutput]:
        """Admit and encode what fits, feed every running row; news of what moved, or ended.

        A row is fed one token, or on a device as many as can follow one another there.
        Raises WrongThread.
        """
        self._claim()
        expired = self.scheduler.expire(self._clock())
        admitted = self._admit()
        if admitted:
            self.observer.admitted([s.request for s in admitted])
        self._encode(admitted)
        for source, target in self.scheduler.compact(self.runner.bucket):
            self.runner.move(source, target)
        running = self.scheduler.running
        if running:
            self._decode(running)
        ended = expired + self.scheduler.release_finished()
        for sequence in ended:
            del self._sequences[sequence.request.id]
        self._let_go()
        left, waiting = self.scheduler.running, self.scheduler.waiting
        self.observer.stepped(StepReport(len(admitted), len(running), len(left), waiting))
        news = (sequence.output() for sequence in (*ended, *left))
        return [output for output in news if output is not None]

    def _decode(self, running: list[Sequence]) -> None:
        """Feed every running row; what is computed in holes between them is nobody's."""
        steps, rows = self._burst(running), self.scheduler.rows
        tokens, fed = [[0] * rows for _ in range(steps)], [0] * rows
        for sequence in running:
            for slot in sequence.slots:
                fed[slot] = sequence.fed
            for step, fed_next in enumerate(sequence.tokens(steps)):
                for slot, token in zip(sequence.slots, fed_next, strict=True):
                    tokens[step][slot] = token
        started = self._clock()
        found = self.runner.decode(tokens[0], fed, tokens[1:], self._candidates(running))
        self._pacing.decoded(self._clock() - started)
        moves: list[Move] = []
        for by_slot in found.rows():
            for sequence in running:
                if sequence.finish_reason is None:  # else it ended earlier in this burst
                    moves += self._advanced(sequence, [by_slot[s] for s in sequence.slots])
        if moves:  # of beams, with which there are no bursts
            self.runner.reorder(moves, max(fed) + 1)

    def _advanced(self, sequence: Sequence, rows: list[RowCandidates]) -> list[Move]:
        """What its decoding makes of candidates; an error of ours there is its own alone."""
        try:
            return sequence.advance(rows)
        except Exception:
            log.exception("request %d failed as its next tokens were chosen", sequence.request.id)
            sequence.finish_reason = FinishReason.ERROR
            return []

    def _candidates(self, running: list[Sequence]) -> int:
        """A power of two, so that a runner meets few different numbers."""
        wanted = max(sequence.candidates for sequence in running)
        return min(1 << (wanted - 1).bit_length(), self.manifest.sizes.vocabulary)

    def _burst(self, running: list[Sequence]) -> int:
        """Steps that need nothing from here: none for a row that is sure to be over."""
        return min(self.runner.burst, *(s.most_left for s in running))

    def _admit(self) -> list[Sequence]:
        """Those to encode now: none while the running ones have their turn."""
        scheduler = self.scheduler
        running = len(scheduler.running)
        if running and not self._pacing.may_encode(scheduler.waiting, running):
            return []
        return scheduler.admit()

    def _encode(self, admitted: list[Sequence]) -> None:
        for start in range(0, len(admitted), self.encode_batch):
            batch = admitted[start : start + self.encode_batch]
            started = self._clock()
            self.runner.encode([s.request.pixels for s in batch], [s.slots for s in batch])
            now = self._clock()
            self._pacing.encoded(now - started)
            for sequence in batch:
                sequence.encoded = now

    def generate(
        self,
        images: ListLike[AnyImage],
        prompts: ListLike[str | None] | None = None,
        **sampling: Any,
    ) -> list[Caption]:
        """Caption all images (see `runtime.model.images.pixels_of`), in their order, on any thread.

        sampling: fields of SamplingParams, for all of them.

        Raises what `pixels_of`, `submit` and `caption` raise for the first one that can't be
        captioned; none is then.
        """
        prompts = prompts or [None] * len(images)
        requests = [
            self.request(image, prompt, place=place, **sampling)
            for place, (image, prompt) in enumerate(zip(images, prompts, strict=True), 1)
        ]
        outputs = self._run(requests)
        return [self.caption(request, outputs[request.id]) for request in requests]

    def _run(self, requests: list[GenerationRequest]) -> dict[int, RequestOutput]:
        """Their outputs by id, once all have ended. Raises what a step raised."""
        news: SimpleQueue[RequestOutput | Exception] = SimpleQueue()
        ended: dict[int, RequestOutput] = {}
        try:
            for request in requests:
                self.stepper.submit(request, news.put)
            while len(ended) < len(requests):
                output = news.get()
                if isinstance(output, Exception):
                    raise output
                ended[output.id] = output
        finally:
            for request in requests:
                if request.id not in ended:
                    self.stepper.cancel(request.id)
        return ended

    def caption(self, request: GenerationRequest, *outputs: RequestOutput) -> Caption:
        """What a request that has ended got. Raises ComputationFailed if it failed."""
        return captioned(request, joined(outputs), self.tokenizer)
