"""The parts of a front-end, put together once, and the way of a request through them."""

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace
from tornado.iostream import IOStream

from runtime.errors import InvalidRequest, VignetteError
from runtime.limits import Limits
from runtime.model.manifest import Manifest
from runtime.model.tokenizer import CaptionTokenizer
from runtime.request import (
    GenerationRequest,
    Priority,
    RequestOutput,
    SamplingParams,
    SchedulingParams,
    joined,
)
from server.images.decoder import Setup
from server.images.fetch import Fetcher
from server.images.pool import Decoders, Job, Origin, Queueing
from server.ipc.dispatcher import Expired
from server.ipc.messages import WorkerState, process_name
from server.ipc.shared import PixelStore
from server.ipc.transport import Workers
from server.metrics import Metrics
from server.processes.system import NICENESS
from server.service.admission import ASIDE, Admission
from server.service.cache import OutputCache
from server.service.credit import Credit
from server.service.keys import Keys
from server.settings import Settings
from server.tracing import Tracer

log = logging.getLogger(__name__)

_LARGE = 256 * 1024  # bytes that are not hashed on the event loop: a third of a millisecond
_BYTES = 100e6, 64e6  # of large bodies, a second and at once: a quarter of a slow core
_REFUSALS = 50.0, 100.0
_VISITS = 200.0, 400.0  # of what is no caption and is answered
Images = list[bytes] | str  # as they were sent, one or one a frame; or where one is to be fetched
SLOTS = 64  # most that a worker chooses by itself: pixels are kept for as many beside the queue


@dataclass(slots=True)
class Service:
    """What handlers work with. `workers` is what the supervisor last said of each."""

    settings: Settings
    manifest: Manifest
    limits: Limits
    tokenizer: CaptionTokenizer
    admission: Admission
    metrics: Metrics
    store: PixelStore
    decoders: Decoders
    links: Workers
    keys: Keys | None
    cache: OutputCache | None
    fetcher: Fetcher | None
    tracer: Tracer | None
    index: int
    keys_read: int = field(default=0, init=False)  # how often the file was read again
    keys_reader: asyncio.Task[None] | None = field(default=None, init=False)
    intake: Credit = field(default_factory=lambda: Credit(*_BYTES))
    refusals: Credit = field(default_factory=lambda: Credit(*_REFUSALS))
    visits: Credit = field(default_factory=lambda: Credit(*_VISITS))
    late: dict[IOStream, None] = field(default_factory=dict)  # connections that wait for no caption
    unread: dict[IOStream, None] = field(default_factory=dict)  # that don't take their answers
    workers: tuple[WorkerState, ...] = ()
    freed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def serves(self) -> bool:
        """Whether any worker can take a request now."""
        return self.links.dispatcher.serving

    def read_keys(self, reading: int) -> None:
        """Take the keys that the file has now; a wrong file is logged. Who was let in goes on."""
        if self.keys is not None and self.keys_read != reading:
            self.keys_read = reading
            self.keys_reader = asyncio.create_task(self._read_keys(self.keys, reading))

    async def _read_keys(self, old: Keys, reading: int) -> None:
        """On a thread: many keys take long."""
        path, folder = self.settings.api_keys, self.store.path.parent
        assert path is not None
        ours = self.settings.front_ends, self.index, reading
        try:
            self.keys = await asyncio.to_thread(Keys.open, path, folder, *ours)
        except VignetteError as error:
            log.error("the API keys stay as they were: %s", error)
        else:
            old.close()

    def request(
        self,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        timeout_ms: int | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> GenerationRequest:
        """A request whose image is still to come. Raises InvalidRequest if it can't be served."""
        prompt_ids, most = self.limits.check(prompt, max_new_tokens)
        seconds = timeout_ms / 1e3 if timeout_ms else self.settings.timeout_seconds
        deadline = time.perf_counter() + seconds
        return GenerationRequest(
            None, prompt_ids, SamplingParams(most), SchedulingParams(None, priority, deadline)
        )

    async def generate(
        self, request: GenerationRequest, images: Images, client: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """What is generated for a request, as it comes; closing takes the request back.

        client: with whose other requests this one waits for a decoder.

        Raises what the fetcher, the decoders and the dispatcher raise, and Expired.
        """
        deadline = request.scheduling.deadline or math.inf
        self.admission.check_in_time(deadline - time.perf_counter())
        async with AsyncExitStack() as held:
            async with _until(deadline):
                encoded = await held.enter_async_context(self._images(images, deadline, client))
                large = sum(map(len, encoded)) > _LARGE
                digest = await asyncio.to_thread(_digest, encoded) if large else _digest(encoded)
            self.links.dispatcher.check(digest)
            origin = Origin(client, digest, deadline)
            found = self._run(request, encoded, origin)
            if self.cache is not None and not request.stream:
                found = self._known_or_run(self.cache, request, encoded, origin)
            async with aclosing(found) as outputs:
                async for output in outputs:
                    yield output

    async def _known_or_run(
        self, cache: OutputCache, request: GenerationRequest, images: list[bytes], origin: Origin
    ) -> AsyncGenerator[RequestOutput, None]:
        made: list[bool] = []

        async def make() -> RequestOutput:
            made.append(True)
            self.links.dispatcher.check(origin.digest)  # another's flight may have found it deadly
            async with aclosing(self._run(request, images, origin)) as outputs:
                return joined([output async for output in outputs])

        key = origin.digest, request.prompt_ids, request.sampling
        async with _until(origin.deadline):
            found = await cache.get(key, make)
        if not made:
            self.metrics.cache_hits.inc()
        yield found

    @asynccontextmanager
    async def _images(
        self, images: Images, deadline: float, client: str
    ) -> AsyncIterator[list[bytes]]:
        """The images, sent or fetched; what is fetched counts among the bytes that are inside."""
        if not isinstance(images, str):
            yield images
            return
        if self.fetcher is None:
            raise InvalidRequest("image_url is switched off here: send the image itself")
        held = self.settings.max_body_bytes  # it may become as large
        self.admission.hold(held, client)
        try:
            left = deadline - time.perf_counter()
            image = await self.fetcher.fetch(images, left, client)
            self.admission.let_go(held - len(image), client)
            held = len(image)
            yield [image]
        finally:
            self.admission.let_go(held, client)

    async def _run(
        self, request: GenerationRequest, images: list[bytes], origin: Origin
    ) -> AsyncGenerator[RequestOutput, None]:
        frames = self.manifest.sizes.frames
        if len(images) != (frames or 1):
            raise InvalidRequest(
                f"{len(images)} images were sent: this model takes {frames or 1} for each request"
            )
        async with _until(origin.deadline):
            slot = await self._slot()
        jobs = [
            asyncio.create_task(self.decoders.decode(Job(image, slot, n if frames else -1, origin)))
            for n, image in enumerate(images)
        ]
        try:
            started = time.perf_counter()
            async with _until(origin.deadline):
                await asyncio.wait(jobs)
            _raise_first(jobs)
            decoded = time.perf_counter()
            scheduling = replace(request.scheduling, arrival_time=decoded)
            ready = replace(request, pixels=slot, scheduling=scheduling)
            with self.admission.engine(origin.client):
                async with aclosing(self.links.dispatcher.generate(ready, origin.digest)) as news:
                    async for output in news:
                        yield _timed(output, decoded - started)
        finally:
            self._give_back(slot, jobs)
            jobs.clear()  # their errors would hold this frame, and this frame them, with the images

    async def _slot(self) -> int:
        """A free slot; there may be none for a moment, while decodings outlast their requests."""
        while not self.store.has_room:
            self.freed.clear()
            await self.freed.wait()
        return self.store.take()

    def _free(self, slot: int) -> None:
        self.store.give_back(slot)
        self.freed.set()

    def _give_back(self, slot: int, jobs: "list[asyncio.Task[None]]") -> None:
        """Free the slot once nothing writes to it any more; who gave up need not wait for that."""
        running = [job for job in jobs if not job.done()]
        if not running:
            self._free(slot)
            return
        left = len(running)

        def ended(job: "asyncio.Task[None]") -> None:
            nonlocal left
            left -= 1
            if not job.cancelled():
                job.exception()  # asked for, or asyncio logs it
            if not left:
                self._free(slot)

        for job in running:
            job.add_done_callback(ended)
            job.cancel()


@asynccontextmanager
async def _until(deadline: float) -> AsyncIterator[None]:
    """Raise Expired if this takes longer. deadline: `time.perf_counter()`."""
    left = None if deadline == math.inf else max(0.0, deadline - time.perf_counter())
    try:
        async with asyncio.timeout(left):
            yield
    except TimeoutError:
        raise Expired("the deadline passed before the caption was there") from None


def _timed(output: RequestOutput, preprocess_s: float) -> RequestOutput:
    """The last of a request's outputs with what its image took."""
    if output.timing is None:
        return output
    return replace(output, timing=replace(output.timing, preprocess_s=preprocess_s))


def _raise_first(jobs: "list[asyncio.Task[None]]") -> None:
    """Raise what the first of some tasks raised, all of which have ended."""
    for job in jobs:
        job.exception()  # asked for, or asyncio logs it
    try:
        for job in jobs:
            job.result()
    finally:
        del job, jobs  # as above


def _digest(images: list[bytes]) -> str:
    digest = hashlib.sha256()
    for image in images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()


def make_service(
    settings: Settings,
    manifest: Manifest,
    tokenizer: CaptionTokenizer,
    folder: Path,
    index: int,
    epoch: int,
) -> Service:
    """The parts of one front-end. `folder` is the run's."""
    name = process_name("front", index, epoch)
    keys = settings.api_keys
    sizes = manifest.sizes
    share = -(-settings.max_queue // settings.front_ends)
    # Decodings may outlast requests that gave up.
    places = (settings.slots or SLOTS) * (settings.workers or 1) + share + settings.decoders + ASIDE
    store = PixelStore(folder / f"{name}.pixels", places, sizes.pixels, create=True)
    metrics = Metrics()
    admission = Admission(
        share, settings.max_queue_bytes // settings.front_ends, settings.timeout_seconds
    )
    links = Workers(folder, store, name)
    domains = settings.image_url_domains
    return Service(
        settings=settings,
        manifest=manifest,
        tokenizer=tokenizer,
        limits=Limits(tokenizer, settings.engine_config.text_positions(sizes.text)),
        admission=admission,
        metrics=metrics,
        store=store,
        decoders=Decoders(
            settings.decoders,
            Setup(
                (store.path, store.slots, store.shape),
                manifest.preprocessing,
                settings.max_pixels,
                settings.decode_memory_mb * 2**20,
                NICENESS,
            ),
            settings.decode_seconds,
            Queueing(admission.aside, settings.timeout_seconds),
        ),
        links=links,
        keys=Keys.open(keys, folder, settings.front_ends, index) if keys else None,
        cache=OutputCache(settings.cache_mb * 2**20) if settings.cache_mb else None,
        fetcher=Fetcher(domains, settings.max_body_bytes) if domains else None,
        tracer=Tracer(settings.traces) if settings.traces else None,
        index=index,
    )
