"""One model, ready to caption: `submit` requests, `step` until they finish. `generate` does both.

Any thread may call `generate`, and what several want at a time is captioned together. `submit`,
`cancel` and `step` are for one thread alone, such as a server's.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime.callers import Callers
from runtime.errors import ComputationFailed, InvalidRequest
from runtime.execution.base import ModelRunner
from runtime.limits import Limits
from runtime.model.images import AnyImage, pixels_of
from runtime.model.manifest import Manifest
from runtime.model.tokenizer import CaptionTokenizer
from runtime.pacing import Pacing
from runtime.planning.config import EngineConfig
from runtime.request import Caption, FinishReason, Request, Sequence, Terms
from runtime.scheduler import Scheduler

if TYPE_CHECKING:
    from runtime.execution.loader import Prepared

_ENCODE_BATCH = 4  # of an engine that was put together without a plan


@dataclass(frozen=True, slots=True)
class StepReport:
    """What the last step worked on: images that were encoded, rows that were fed a token."""

    encoded: int = 0
    rows: int = 0


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
        self.limits = Limits(tokenizer, runner.text_tokens)
        self._encode_batch = config.encode_batch or _ENCODE_BATCH
        self._pacing = Pacing(config.patience)
        self.scheduler = self._new_scheduler()
        self.last_step = StepReport()
        self._callers = Callers(self._add, self._step, self.abandon)

    @classmethod
    def open(cls, folder: Path | str, config: EngineConfig | None = None) -> "Engine":
        """Load and warm up an exported engine.

        Raises EngineFolderError for a missing or damaged folder, ProviderError for a provider that
        does not work here.
        """
        from runtime.execution.loader import (
            prepare,  # here, so that tests of the loop need no ONNX Runtime
        )

        return cls.start(prepare(Path(folder), config or EngineConfig()))

    @classmethod
    def start(cls, prepared: "Prepared") -> "Engine":
        """Load and warm up what the loader's `prepare` found whole; raises ProviderError."""
        from runtime.execution.loader import open_runner

        opened = open_runner(prepared)
        runner, slots = opened.runner, opened.slots
        config = replace(
            prepared.config, encode_batch=min(runner.plan.encode_batch, slots), slots=slots
        )
        tokenizer = CaptionTokenizer(prepared.folder, prepared.manifest)
        return cls(prepared.manifest, tokenizer, runner, config, seconds=opened.seconds)

    @property
    def identity(self) -> dict[str, str]:
        """What decides its captions: the model, its export, and the precision it runs in."""
        return {
            "model": self.manifest.model,
            "engine": self.manifest.fingerprint,
            "precision": self.runner.precision,
        }

    @property
    def runs_on(self) -> str:
        """For people: providers and precisions, what the slots take, and the self-test."""
        return f"{self.runner.runs_on}; self-test {self.self_test}"

    @property
    def self_test(self) -> str:
        """For people: whether it says what PyTorch said; an engine that doesn't is never opened."""
        return "passed" if self.manifest.self_test else "none in this export"

    def submit(
        self,
        pixels: np.ndarray,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        ignore_eos: bool = False,
        terms: Terms = Terms(),  # noqa: B008 - it is frozen
    ) -> Sequence:
        """Queue one image: uint8 pixels as `preprocess` makes them, stacked for video checkpoints.

        terms: when it may be admitted; `step` hands out too what expired before.
        Raises InvalidRequest when shape, prompt or limit can never be served, WrongThread when
        another thread uses the engine.
        """
        self._callers.claim()
        return self._add(self._request(pixels, prompt, max_new_tokens, ignore_eos, terms))

    def _add(self, request: Request) -> Sequence:
        return self.scheduler.add(request)

    def _request(
        self,
        pixels: np.ndarray,
        prompt: str | None,
        max_new_tokens: int | None,
        ignore_eos: bool,
        terms: Terms,
    ) -> Request:
        if pixels.dtype != np.uint8 or pixels.shape != self.runner.pixels_shape:
            raise InvalidRequest(
                f"pixels must be uint8 of shape {list(self.runner.pixels_shape)}, "
                f"not {pixels.dtype} of {list(pixels.shape)}"
            )
        prompt_ids, most = self.limits.check(prompt, max_new_tokens)
        return Request(pixels, prompt_ids, most, ignore_eos, terms)

    def cancel(self, sequence: Sequence) -> bool:
        """Take a sequence back and free its slot at once; False if it had ended already."""
        self._callers.claim()
        return self.scheduler.cancel(sequence)

    def abandon(self) -> None:
        """Forget all sequences, after a step that raised: what it left in the slots is unknown.

        Any thread may use the engine then.
        """
        self._callers.release()
        self.scheduler = self._new_scheduler()

    def _new_scheduler(self) -> Scheduler:
        assert self.config.slots is not None
        return Scheduler(self.config.slots, self._encode_batch, self.config.refill, self._clock)

    def step(self, starting: Callable[[list[Sequence]], None] | None = None) -> list[Sequence]:
        """Admit and encode what fits, feed every running row, return what ended.

        A row is fed one token, or on a device as many as can follow one another there.
        starting: told which sequences are about to be encoded. Raises WrongThread.
        """
        self._callers.claim()
        return self._step(starting)

    def _step(self, starting: Callable[[list[Sequence]], None] | None = None) -> list[Sequence]:
        expired = self.scheduler.expire(self._clock())
        admitted = self._admit()
        if starting is not None and admitted:
            starting(admitted)
        self._encode(admitted)
        for move in self.scheduler.compact(self.runner.bucket):
            self.runner.move(move.source, move.target)
        running = self.scheduler.running
        if running:
            self._decode(running)
        self.last_step = StepReport(len(admitted), len(running))
        return expired + self.scheduler.release_finished()

    def _decode(self, running: list[Sequence]) -> None:
        """Feed every running row; what is computed in holes between them is nobody's."""
        slots = [s.slot for s in running if s.slot is not None]
        steps, rows = self._burst(running), slots[-1] + 1
        tokens, fed = [[0] * rows for _ in range(steps)], [0] * rows
        for slot, sequence in zip(slots, running, strict=True):
            fed[slot] = sequence.fed
            for step, token in enumerate(sequence.tokens(steps)):
                tokens[step][slot] = token
        started = self._clock()
        predicted = self.runner.decode(tokens[0], fed, tokens[1:])
        self._pacing.decoded(self._clock() - started)
        for step in predicted.tolist():
            for slot, sequence in zip(slots, running, strict=True):
                if sequence.finish_reason is None:  # else it ended earlier in this burst
                    sequence.advance(step[slot], self.manifest.tokens.eos)

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
        for start in range(0, len(admitted), self._encode_batch):
            batch = admitted[start : start + self._encode_batch]
            slots = [s.slot for s in batch if s.slot is not None]
            started = self._clock()
            self.runner.encode([s.request.pixels for s in batch], slots)
            now = self._clock()
            self._pacing.encoded(now - started)
            for sequence in batch:
                sequence.encoded_at = now

    def generate(
        self,
        images: ListLike[AnyImage],
        prompts: ListLike[str | None] | None = None,
        max_new_tokens: int | None = None,
        ignore_eos: bool = False,
    ) -> list[Caption]:
        """Caption all images (see `runtime.model.images.pixels_of`), in their order, on any thread.

        Raises what `pixels_of`, `submit` and `caption` raise for the first one that can't be
        captioned; none is then.
        """
        prompts = prompts or [None] * len(images)
        requests = [
            self._request(
                pixels_of(image, self.manifest, place), prompt, max_new_tokens, ignore_eos, Terms()
            )
            for place, (image, prompt) in enumerate(zip(images, prompts, strict=True), 1)
        ]
        sequences = self._callers.run(requests) if requests else []
        return [self.caption(sequence) for sequence in sequences]

    def caption(self, sequence: Sequence) -> Caption:
        """What a finished sequence says. Raises ComputationFailed if its numbers broke down."""
        times = (sequence.admitted_at, sequence.encoded_at, sequence.finished_at)
        admitted, encoded, finished = (t if t is not None else sequence.submitted_at for t in times)
        if sequence.finish_reason is None:
            raise InvalidRequest("the sequence has not finished: call step() until it is returned")
        if sequence.finish_reason is FinishReason.FAILED:
            raise ComputationFailed(
                "the model's numbers broke down (NaN) on this image: caption it with an engine of "
                "another precision, such as fp32"
            )
        ids = tuple(sequence.generated)
        stopped = sequence.finish_reason is FinishReason.STOP
        return Caption(
            text=self.tokenizer.text(ids),
            token_ids=ids,
            finish_reason=sequence.finish_reason,
            prompt_tokens=len(sequence.request.prompt_ids) - 1,
            completion_tokens=len(ids) - stopped,
            queue_s=admitted - sequence.submitted_at,
            encode_s=encoded - admitted,
            decode_s=finished - encoded,
        )
