"""The parts of a front-end, put together once, and the way of a request through them."""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tornado.iostream import IOStream

from runtime.errors import InvalidRequest, VignetteError
from runtime.limits import Limits, Prompts
from runtime.model.manifest import Manifest
from runtime.request import Caption
from server.http.bodies import Parts
from server.http.forms import CaptionRequest
from server.http.origins import Network, networks
from server.images.decoder import Setup
from server.images.fetch import Fetcher
from server.images.pool import Decoders, Job, Origin, Queueing
from server.ipc.dispatcher import Expired, Work
from server.ipc.messages import Message, process_name
from server.ipc.shared import PixelStore
from server.ipc.transport import Workers
from server.metrics import Metrics
from server.processes.system import NICENESS
from server.service.admission import ASIDE, Admission
from server.service.cache import CaptionCache
from server.service.credit import Credit
from server.service.keys import Keys
from server.settings import Settings
from server.tracing import Tracer

log = logging.getLogger(__name__)

_LARGE = 256 * 1024  # bytes that are not hashed on the event loop: a third of a millisecond
_BYTES = 100e6, 64e6  # of large bodies, a second and at once: a quarter of a slow core
_REFUSALS = 50.0, 100.0
_VISITS = 200.0, 400.0  # of what is no caption and is answered
SLOTS = 64  # most that a worker chooses by itself: pixels are kept for as many beside the queue


@dataclass(slots=True)
class Service:
    """What handlers work with. `workers` is what the supervisor last said of each."""

    settings: Settings
    manifest: Manifest
    limits: Limits
    admission: Admission
    metrics: Metrics
    store: PixelStore
    decoders: Decoders
    links: Workers
    keys: Keys | None
    cache: CaptionCache | None
    fetcher: Fetcher | None
    tracer: Tracer | None
    index: int
    keys_read: int = field(default=0, init=False)  # how often the file was read again
    keys_reader: asyncio.Task[None] | None = field(default=None, init=False)
    proxies: list[Network]
    intake: Credit = field(default_factory=lambda: Credit(*_BYTES))
    refusals: Credit = field(default_factory=lambda: Credit(*_REFUSALS))
    visits: Credit = field(default_factory=lambda: Credit(*_VISITS))
    late: dict[IOStream, None] = field(default_factory=dict)  # connections that wait for no caption
    unread: dict[IOStream, None] = field(default_factory=dict)  # that don't take their answers
    workers: list[Message] = field(default_factory=list)
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

    async def parts(self, body: bytes, client: str) -> Parts:
        """A large JSON body taken apart, in another process.

        Raises InvalidRequest or TooHard, and Expired after the usual deadline: the request's own
        may stand in the body.
        """
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                return await self.decoders.parts(body, client)
        except TimeoutError:
            raise Expired("the deadline passed before the body was read") from None

    async def caption(self, asked: CaptionRequest, client: str) -> tuple[Caption, float]:
        """A request's caption, and the seconds that decoding its images took.

        client: with whose other requests this one waits for a decoder.

        Raises what `limits`, the decoders and the dispatcher raise, and Expired.
        """
        wait = (asked.timeout_ms or self.settings.timeout_seconds * 1e3) / 1e3
        deadline = time.perf_counter() + wait
        self.limits.check(asked.prompt, asked.max_new_tokens)
        self.admission.check_in_time(wait)
        try:
            async with asyncio.timeout(wait), self._images(asked, deadline, client) as images:
                large = sum(map(len, images)) > _LARGE
                digest = await asyncio.to_thread(_digest, images) if large else _digest(images)
                self.links.dispatcher.check(digest)
                return await self._known_or_run(asked, images, Origin(client, digest, deadline))
        except TimeoutError:
            raise Expired("the deadline passed before the caption was there") from None

    async def _known_or_run(
        self, asked: CaptionRequest, images: list[bytes], origin: Origin
    ) -> tuple[Caption, float]:
        if self.cache is None:
            return await self._run(asked, images, origin)
        made: list[bool] = []

        async def make() -> tuple[Caption, float]:
            made.append(True)
            self.links.dispatcher.check(origin.digest)  # another's flight may have found it deadly
            return await self._run(asked, images, origin)

        found = await self.cache.get((origin.digest, asked.prompt, asked.max_new_tokens), make)
        if not made:
            self.metrics.cache_hits.inc()
        return found

    @asynccontextmanager
    async def _images(
        self, asked: CaptionRequest, deadline: float, client: str
    ) -> AsyncIterator[list[bytes]]:
        """The images, sent or fetched; what is fetched counts among the bytes that are inside."""
        if asked.image_url is None:
            yield asked.images
            return
        if self.fetcher is None:
            raise InvalidRequest("image_url is switched off here: send the image itself")
        held = self.settings.max_body_bytes  # it may become as large
        self.admission.hold(held, client)
        try:
            left = deadline - time.perf_counter()
            image = await self.fetcher.fetch(asked.image_url, left, client)
            self.admission.let_go(held - len(image), client)
            held = len(image)
            yield [image]
        finally:
            self.admission.let_go(held, client)

    async def _run(
        self, asked: CaptionRequest, images: list[bytes], origin: Origin
    ) -> tuple[Caption, float]:
        frames = self.manifest.sizes.frames
        if len(images) != (frames or 1):
            raise InvalidRequest(
                f"{len(images)} images were sent: this model takes {frames or 1} for each request"
            )
        slot = await self._slot()
        jobs = [
            asyncio.create_task(self.decoders.decode(Job(image, slot, n if frames else -1, origin)))
            for n, image in enumerate(images)
        ]
        try:
            started = time.perf_counter()
            await asyncio.wait(jobs)
            _raise_first(jobs)
            decoded = time.perf_counter()
            work = Work(
                slot, asked.prompt, asked.max_new_tokens, origin.digest, origin.deadline,
                asked.urgent, queued_at=decoded,
            )  # fmt: skip
            with self.admission.engine(origin.client):
                return await self.links.dispatcher.caption(work), decoded - started
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
    settings: Settings, manifest: Manifest, tokenizer: Prompts, folder: Path, index: int, epoch: int
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
        cache=CaptionCache(settings.cache_mb * 2**20) if settings.cache_mb else None,
        fetcher=Fetcher(domains, settings.max_body_bytes) if domains else None,
        tracer=Tracer(settings.traces) if settings.traces else None,
        index=index,
        proxies=networks(settings.trusted_proxies),
    )
