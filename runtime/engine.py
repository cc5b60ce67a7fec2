"""One loaded model. Any thread may call `generate`.

`submit`, `cancel` and `step` belong to a single thread: that of `runtime.stepper`, which calls
them for `generate` and for `runtime.async_engine`.
"""

import itertools
import logging
import threading
import time
from collections import abc
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL.Image import Image

from runtime.burst import Burst, can_burst
from runtime.decoding.beams import Beams
from runtime.decoding.continuation import Continuation
from runtime.errors import InvalidRequest, WrongThread
from runtime.execution.base import ModelRunner
from runtime.limits import Limits
from runtime.model.images import AnyImage, pixels_of
from runtime.model.manifest import Manifest
from runtime.model.tokenizer import CaptionTokenizer
from runtime.observer import Observer, StepReport
from runtime.own_thread import OwnThread
from runtime.pacing import Pacing
from runtime.planning.config import EngineConfig
from runtime.request import Caption, GenerationRequest, RequestOutput
from runtime.results import join_outputs, make_caption
from runtime.scheduler import Scheduler
from runtime.sequence import Sequence
from runtime.stepper import Stepper

if TYPE_CHECKING:
    from runtime.execution.loader import Prepared

log = logging.getLogger(__name__)

_BATCH_AXES = 4  # of an array of images


class Engine:
    """Continuous batching over one model. `Engine.open` builds it from an engine folder."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: CaptionTokenizer,
        runner: ModelRunner,
        config: EngineConfig,
        clock: Callable[[], float] = time.perf_counter,
        self_test_seconds: float | None = None,
        thread: OwnThread | None = None,
    ) -> None:
        """config: patience and refill; the runner's plan holds all else.

        clock: seconds, in the time base in which the runner's calls take time. self_test_seconds:
        for each caption; None if no self-test was run. thread: on which the runner was opened, if
        that matters to it.
        """
        self._clock, self.self_test_seconds = clock, self_test_seconds
        self.manifest = manifest
        self.config = config
        self.tokenizer = tokenizer
        self.runner = runner
        self.slots = runner.plan.slots
        self.encode_batch = min(runner.plan.encode_batch, self.slots)
        self.limits = Limits(tokenizer, runner.text_tokens, self.slots)
        self._pacing = Pacing(config.patience)
        self.scheduler = self._new_scheduler()
        self.observer = Observer()
        self.stepper = Stepper(self, thread or OwnThread("engine"))
        self._sequences: dict[int, Sequence] = {}  # by the ids of their requests
        self._owner: int | None = None  # the thread that steps
        self._stepping = False
        self._encoding: tuple[list[Sequence], float] | None = None  # since when
        self._begun: Burst | None = None  # what the next step finishes
        self._last_end = 0.0  # when the runner was last seen to end something

    @classmethod
    def open(cls, folder: Path | str, config: EngineConfig | None = None) -> "Engine":
        """Load and warm up an exported engine.

        Raises EngineFolderError for a missing or damaged folder, ProviderError for a provider that
        can't run here.
        """
        from runtime.execution.loader import prepare  # tests of the loop run without ONNX Runtime

        return cls.start(prepare(Path(folder), config or EngineConfig()))

    @classmethod
    def start(cls, prepared: "Prepared") -> "Engine":
        """Load and warm up an engine that the loader's `prepare` returned; raises ProviderError."""
        from runtime.execution.loader import open_runner

        thread = OwnThread("engine")
        runner, seconds = thread.call(lambda: open_runner(prepared))
        tokenizer = CaptionTokenizer(prepared.folder, prepared.manifest)
        return cls(
            prepared.manifest, tokenizer, runner, prepared.config,
            self_test_seconds=seconds, thread=thread,
        )  # fmt: skip

    @property
    def runs_on(self) -> str:
        """For people: providers, precisions, memory of the slots, and the self-test."""
        return f"{self.runner.runs_on}; self-test {self.self_test}"

    @property
    def self_test(self) -> str:
        """For people: whether a self-test was passed; an engine that fails it is never opened."""
        return "passed" if self.manifest.self_test else "none in this export"

    def request(
        self,
        image: AnyImage,
        prompt: str | None = None,
        stream: bool = False,
        place: int = 1,
        **sampling: Any,
    ) -> GenerationRequest:
        """Build a request that this engine can serve.

        image: see `runtime.model.images.pixels_of`; video checkpoints take stacked pixels. place:
        position of the image in its list, for messages. sampling: fields of SamplingParams.

        Raises the errors of `pixels_of`, and InvalidRequest if the shape, prompt or sampling
        parameters can never be served.
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
        """Queue a request, made by `request` or by hand. Raises InvalidRequest if it would disturb
        others, and WrongThread while another thread uses the engine.
        """
        self.limits.check_made(request, self.manifest.sizes)
        if request.id in self._sequences:
            raise InvalidRequest("this very request runs already: build another one")
        kind = Beams if request.sampling.num_beams > 1 else Continuation
        decoding = kind(request.prompt_ids, request.sampling, self.manifest.tokens.eos)
        self._claim()
        self._sequences[request.id] = self.scheduler.add(request, decoding)

    def cancel(self, request_id: int) -> bool:
        """Cancel a request and free its slots at once; False if it has already ended."""
        self._claim()
        sequence = self._sequences.pop(request_id, None)
        found = sequence is not None and self.scheduler.cancel(sequence)
        if self.idle:
            self._note_encoded()  # no step may follow
        self._let_go()
        self._report()  # a step may not follow
        return found

    def abandon(self) -> None:
        """Drop all requests after a step that raised: the state of the slots is unknown. Raises
        WrongThread within a step, and while callers wait for requests.
        """
        self._keep_out_observers()
        if self.stepper.busy:
            raise WrongThread("others wait for requests of this engine: cancel your own instead")
        self._owner = self._encoding = self._begun = None
        self._sequences.clear()
        self.scheduler = self._new_scheduler()

    def _keep_out_observers(self) -> None:
        if self._stepping:
            raise WrongThread("an observer must not use the engine within a step: it is told only")

    def _claim(self) -> None:
        self._keep_out_observers()
        me = threading.get_ident()
        if self._owner not in (None, me):
            raise WrongThread(
                "another thread uses this engine: call `generate`, which any thread may, or "
                "`submit` and `step` always from the same one"
            )
        self._owner = me

    def _let_go(self) -> None:
        """Release ownership once idle: any thread may use the engine then."""
        if self.idle:
            self._owner = None

    @property
    def idle(self) -> bool:
        """Whether no sequence waits or runs."""
        return self.scheduler.idle

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self.slots, self.encode_batch, self.config.refill, self._clock)

    def step(self) -> list[RequestOutput]:
        """Admit and encode waiting sequences, and feed all running rows one token, or on a device a
        burst of tokens.

        On a processor sequences are admitted first. On a device they are queued behind the burst,
        whose results the next step takes: so the device works on the next burst, or encodes, while
        the host works on those. Returns outputs of streams with new tokens and of sequences that
        ended. Raises WrongThread.
        """
        self._claim()
        self._stepping = True
        try:
            return self._step()
        finally:
            self._stepping = False

    def _step(self) -> list[RequestOutput]:
        ended = self.scheduler.expire(self._clock())
        work = self._queue_ahead if self.runner.overlaps else self._one_after_another
        encoded, rows = work(ended)
        for sequence in ended:
            del self._sequences[sequence.request.id]
        self._let_go()
        self._report(encoded, rows)
        news = (sequence.output() for sequence in (*ended, *self.scheduler.running))
        return [output for output in news if output is not None]

    def _one_after_another(self, ended: list[Sequence]) -> tuple[int, int]:
        """The step of a processor. Adds the sequences that ended to `ended`; returns the numbers of
        images encoded and of rows fed.
        """
        admitted = self._encode_next()
        self._note_encoded()
        self._compact()
        burst = self._start()
        rows = burst.slots if burst else 0
        if burst:
            ended += self._take(burst)
        return len(admitted), rows

    def _queue_ahead(self, ended: list[Sequence]) -> tuple[int, int]:
        """The step of a device, which works through a queue; see `_one_after_another`."""
        before, self._begun = self._begun, None
        burst = before and before.proceed(self.runner, self.scheduler.running, self._clock())
        if not burst:
            if before:
                ended += self._take(before)
            before = None
            self._compact()
            burst = self._start()
        rows = burst.slots if burst else 0
        self._note_encoded()
        admitted = self._encode_next()
        if burst and burst.bursting:
            self._begun = burst
        elif burst:  # the runner has waited
            ended += self._take(burst)
        if before:
            ended += self._take(before)
        return len(admitted), rows

    def _report(self, encoded: int = 0, rows: int = 0) -> None:
        report = StepReport(encoded, rows, self.scheduler.count, self.scheduler.waiting)
        self.observer.stepped(report)

    def _compact(self) -> None:
        # On a device, those that wait are not yet in the holes that they will probably fill.
        coming = self.scheduler.waiting if self.runner.overlaps else 0
        for source, target in self.scheduler.compact(
            lambda rows: self.runner.bucket(min(self.slots, rows + coming)), self.runner.move_cost
        ):
            self.runner.move(source, target)

    def _start(self) -> Burst | None:
        running, rows = self.scheduler.running, self.scheduler.rows
        if not running:
            return None
        bursting = can_burst(running, self.runner)
        if not bursting:  # the runner may wait for the step
            self._note_encoded()
        vocabulary = self.manifest.sizes.vocabulary
        return Burst.start(self.runner, running, rows, bursting, vocabulary, self._clock())

    def _take(self, burst: Burst) -> list[Sequence]:
        """Work on the results; returns the sequences that ended, whose slots are free again."""
        burst.finish(self.runner, lambda: self._pacing.decoded(self._took(burst.at)))
        return self.scheduler.release_finished()

    def _took(self, started: float) -> float:
        """Seconds that the runner, which does one thing after another, spent on what has ended: at
        most, if it ended before the host waited for it.
        """
        now = self._clock()
        seconds, self._last_end = now - max(started, self._last_end), now
        return seconds

    def _admit(self) -> list[Sequence]:
        """Sequences to encode now: none while running sequences still have their turn."""
        scheduler = self.scheduler
        running = scheduler.count
        if running and not self._pacing.may_encode(scheduler.waiting, running):
            return []
        return scheduler.admit()

    def _encode_next(self) -> list[Sequence]:
        """Admit sequences and start to encode their images."""
        admitted = self._admit()
        if admitted:
            self.observer.admitted([s.request for s in admitted])
        for start in range(0, len(admitted), self.encode_batch):
            self._note_encoded()
            batch = admitted[start : start + self.encode_batch]
            self._encoding = batch, self._clock()
            self._pacing.encoding()
            self.runner.encode([s.request.pixels for s in batch], [s.slots for s in batch])
        return admitted

    def _note_encoded(self) -> None:
        """Wait for the end of the encoder call that runs, if any."""
        if self._encoding is None:
            return
        (batch, started), self._encoding = self._encoding, None
        self.runner.wait_encoded()
        self._pacing.encoded(self._took(started))
        for sequence in batch:
            sequence.encoded = self._last_end

    def generate(
        self,
        images: abc.Sequence[AnyImage],
        prompts: abc.Sequence[str | None] | None = None,
        **sampling: Any,
    ) -> list[Caption]:
        """Caption images (see `runtime.model.images.pixels_of`), in order; callable on any thread.

        sampling: fields of SamplingParams, applied to all images.

        Raises InvalidRequest for one image or prompt in place of a list or for lists of different
        lengths, and the error of `request` or `run` for an image that can't be captioned; it
        returns no captions then.
        """
        one = isinstance(images, np.ndarray) and images.ndim < _BATCH_AXES
        if one or isinstance(images, str | bytes | PathLike | Image) or isinstance(prompts, str):
            raise InvalidRequest("images and prompts are lists: generate([image], [prompt])")
        prompts = [None] * len(images) if prompts is None else prompts
        if len(prompts) != len(images):
            raise InvalidRequest(f"there are {len(images)} images and {len(prompts)} prompts")
        return self.run(
            self.request(image, prompt, stream=False, place=place, **sampling)
            for place, (image, prompt) in enumerate(zip(images, prompts, strict=True), 1)
        )

    def run(self, requests: Iterable[GenerationRequest]) -> list[Caption]:
        """Captions of requests, in order; callable on any thread.

        Requests are taken from the iterable as the engine gets on, some more than twice as many as
        there are slots: it captions some while the next are made, and few images are in memory.

        Raises the error of the iterable, of `submit`, of a step or of `caption`, requests that
        have not ended are cancelled then; and WrongThread in a callback of the engine.
        """
        if self.stepper.thread.is_current:
            raise WrongThread("a callback of the engine can't wait for it: use another thread")
        news: SimpleQueue[RequestOutput | Exception] = SimpleQueue()
        put, coming = news.put, iter(requests)
        captions: dict[int, Caption] = {}  # by place in the iterable
        running: dict[int, tuple[int, GenerationRequest, list[RequestOutput]]] = {}
        taken = 0
        following = list(itertools.islice(coming, self.encode_batch))
        try:
            while following or running:
                if following and len(running) <= 2 * self.slots:
                    for request in following:
                        if request.id in running:
                            raise InvalidRequest("a request is there twice: build another one")
                        running[request.id] = taken, request, []
                        taken += 1
                        self.stepper.submit(request, put)
                    following = list(itertools.islice(coming, self.encode_batch))
                    continue
                output = news.get()
                if isinstance(output, Exception):
                    raise output
                place, request, outputs = running[output.id]
                outputs.append(output)
                if output.finish_reason is not None:
                    del running[output.id]
                    captions[place] = self.caption(request, *outputs)
        finally:
            for number in running:
                self.stepper.cancel(number, put)
        return [captions[place] for place in range(taken)]

    def caption(self, request: GenerationRequest, *outputs: RequestOutput) -> Caption:
        """The caption of an ended request. Raises ComputationFailed if the request failed."""
        return make_caption(request, join_outputs(outputs), self.tokenizer)
