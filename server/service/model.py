"""One model of a front-end: its workers, queue and pixels, and a request's path through them."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from runtime.errors import InvalidRequest
from runtime.limits import Limits
from runtime.model.manifest import Manifest
from runtime.model.tokenizer import CaptionTokenizer
from runtime.request import GenerationRequest, Priority, RequestOutput, SchedulingParams
from server.fairness.slot_shares import SlotShares
from server.images.clips import Clip
from server.images.decoder import WHOLE, PixelSlot
from server.images.pool import ImageDecoders, ImageJob, Origin
from server.ipc.deadline import until
from server.ipc.messages import WorkerFacts, WorkerState
from server.ipc.shared import PixelStore
from server.ipc.transport import WorkerLinks
from server.service.admission import Admission, State
from server.tasks import retrieve_error


@dataclass(slots=True, eq=False)
class Model:
    """The parts of one model. number: its index among the server's models, for decoders."""

    number: int
    name: str
    manifest: Manifest
    tokenizer: CaptionTokenizer
    limits: Limits
    admission: Admission
    store: PixelStore
    links: WorkerLinks
    decoders: ImageDecoders
    timeout_seconds: float
    identity: str = ""  # of its engine, once a worker was ready (`WorkerFacts.identity`)
    facts: tuple[WorkerFacts, ...] = ()  # of the workers that are ready, or last were
    device: str = ""  # of its workers; the model's name if they are remote
    shares: SlotShares = field(default_factory=SlotShares)
    freed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def serves(self) -> bool:
        """Whether any worker can take a request now."""
        return self.links.dispatcher.serving

    @property
    def status(self) -> str:
        """The model's state, for people and load balancers."""
        recovering = self.admission.state is State.READY and not self.serves
        lost = "failing" if self.admission.failing else "recovering"
        return lost if recovering else self.admission.state

    def update(self, workers: Sequence[WorkerState], front_ends: int) -> None:
        """Apply the supervisor's report on the workers, which all front-ends share."""
        here = all(w.pid is not None for w in workers)
        self.device = " ".join(sorted({w.device for w in workers})) if here else self.name
        self.admission.failing = bool(workers) and all(w.state == "failing" for w in workers)
        before = self.links.dispatcher.keys
        self.links.update(workers)
        if self.serves and not before & self.links.dispatcher.keys:
            self.admission.served_again()
        if not (facts := tuple(w.runs for w in workers if w.runs is not None)):
            return
        self.facts = facts
        self.identity = facts[0].identity
        self.limits.slots = min(w.facts.slots for w in workers if w.facts is not None)
        slots, engines = sum(f.slots * f.engines for f in facts), sum(f.engines for f in facts)
        self.admission.slots = -(-slots // front_ends)
        if known := [f.self_test_seconds for f in facts if f.self_test_seconds]:
            self.admission.expect(front_ends * min(known) / engines)
        if self.admission.state is State.STARTING:
            self.admission.state = State.READY

    def request(
        self,
        prompt: str | None,
        sampling: dict[str, Any],
        priority: Priority = Priority.INTERACTIVE,
        timeout_ms: int | None = None,
        stream: bool = False,
    ) -> GenerationRequest:
        """A request without its pixels. sampling: fields of SamplingParams.

        Raises InvalidRequest if it can't be served.
        """
        prompt_ids, params = self.limits.check(prompt, sampling, stream)
        seconds = timeout_ms / 1e3 if timeout_ms else self.timeout_seconds
        scheduling = SchedulingParams(None, priority, time.perf_counter() + seconds)
        return GenerationRequest(None, prompt_ids, params, scheduling, stream)

    async def run(
        self, request: GenerationRequest, images: list[bytes], origin: Origin
    ) -> AsyncGenerator[RequestOutput, None]:
        """Decode the images and generate; closing the generator cancels the request.

        Raises what the decoders and the dispatcher raise, and Expired.
        """
        frames = self.manifest.sizes.frames
        if isinstance(images[0], Clip):
            frames = None  # one job fills the slot
        elif len(images) != (frames or 1):
            raise InvalidRequest(
                f"{len(images)} images were sent: this model takes {frames or 1} for each request"
            )
        async with until(origin.deadline):
            slot = await self._slot()
        jobs = [
            asyncio.create_task(self.decoders.decode(self._job(image, slot, frame, origin)))
            for frame, image in enumerate(images, 0 if frames else WHOLE)
        ]
        try:
            started = time.perf_counter()
            async with until(origin.deadline):
                await asyncio.wait(jobs, return_when=asyncio.FIRST_EXCEPTION)
            _raise_first([job for job in jobs if job.done()])
            decoded = time.perf_counter()
            scheduling = replace(request.scheduling, arrival_time=decoded)
            ready = replace(request, scheduling=scheduling)
            async with AsyncExitStack() as held:
                rows = request.sampling.rows
                priority = scheduling.priority
                share = self.shares.take(origin.client, rows, priority, self.name)
                async with until(origin.deadline):
                    await held.enter_async_context(share)
                held.enter_context(self.admission.engine(origin.client, rows))
                generated = self.links.dispatcher.generate(ready, slot, origin.digest)
                async with aclosing(generated) as news:
                    async for output in news:
                        if output.finish_reason is None:
                            yield output
            # Yield the last output outside the slot: closing the iterator here is no cancellation.
            yield _timed(output, decoded - started)
        finally:
            self._give_back(slot, jobs)
            jobs.clear()  # break the cycle of their errors and this frame, which holds the images

    def _job(self, image: bytes, slot: int, frame: int, origin: Origin) -> ImageJob:
        return ImageJob(image, PixelSlot(self.number, slot, frame), origin, self.admission.aside)

    async def _slot(self) -> int:
        """Take a slot, waiting for one while decodings outlast their requests."""
        while not self.store.has_room:
            self.freed.clear()
            await self.freed.wait()
        return self.store.take()

    def _free(self, slot: int) -> None:
        self.store.give_back(slot)
        self.freed.set()

    def _give_back(self, slot: int, jobs: "list[asyncio.Task[None]]") -> None:
        """Free the slot once no decoder writes to it, without making the caller wait for that."""
        running = [job for job in jobs if not job.done()]
        for job in jobs:
            if job.done():
                retrieve_error(job)
        if not running:
            self._free(slot)
            return
        left = len(running)

        def ended(job: "asyncio.Task[None]") -> None:
            nonlocal left
            left -= 1
            retrieve_error(job)
            if not left:
                self._free(slot)

        for job in running:
            job.add_done_callback(ended)
            job.cancel()


def _timed(output: RequestOutput, preprocess_s: float) -> RequestOutput:
    """A request's last output with the time of preprocessing its images."""
    assert output.timing is not None
    return replace(output, timing=replace(output.timing, preprocess_s=preprocess_s))


def _raise_first(jobs: "list[asyncio.Task[None]]") -> None:
    """Raise the error of the first task that failed. All tasks must have ended."""
    for job in jobs:
        retrieve_error(job)
    try:
        for job in jobs:
            job.result()
    finally:
        del job, jobs  # break the cycle of error and frame
