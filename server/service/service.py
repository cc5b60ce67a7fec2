"""A front-end's service, used by all protocols and independent of them."""

import asyncio
import hashlib
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from runtime.errors import InvalidRequest, VignetteError
from runtime.request import Caption, GenerationRequest, RequestOutput, Timing
from runtime.results import join_outputs, make_caption
from server.fairness.byte_budget import ByteBudget
from server.fairness.present_clients import PresentClients
from server.fairness.slot_shares import SlotShares
from server.images.clips import Clip
from server.images.pool import ImageDecoders, Origin
from server.ipc.deadline import until
from server.ipc.messages import WorkerState
from server.service.admission import Admission, State
from server.service.cache import OutputCache
from server.service.client_rates import ClientRates
from server.service.key_reader import KeyReader
from server.service.keys import Keys
from server.service.model import Model
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.telemetry.tracing import Tracer

if TYPE_CHECKING:
    from server.images.fetch import Fetcher

_LARGE = 256 * 1024  # bytes above which images are hashed on a thread: a third of a millisecond
_HIT = 2  # pages that a cached caption counts as: its image was read, and hashed
Images = list[bytes] | str  # encoded, one or one per frame; or the URL of one


class UnknownModel(VignetteError):
    """A request names a model that is not served here."""


@dataclass(slots=True)
class Service:
    """What protocols call. workers: the supervisor's last report on each."""

    settings: Settings
    models: dict[str, Model]  # by name, the default first
    budget: ByteBudget
    metrics: Metrics
    decoders: ImageDecoders
    key_reader: KeyReader | None
    cache: OutputCache | None
    fetcher: "Fetcher | None"
    tracer: Tracer | None
    index: int
    rates: ClientRates = field(default_factory=ClientRates)
    workers: tuple[WorkerState, ...] = ()
    shares: dict[str, SlotShares] = field(default_factory=dict)  # by device
    present: np.ndarray | None = None  # clients of all front-ends, by model (`PresentClients`)

    @property
    def keys(self) -> Keys | None:
        """Those who may send requests; None: everybody."""
        return None if self.key_reader is None else self.key_reader.keys

    @property
    def state(self) -> State:
        """READY once each model has served, even if some have failed since."""
        states = {model.admission.state for model in self.models.values()}
        return next((s for s in (State.DRAINING, State.STARTING) if s in states), State.READY)

    @property
    def serves(self) -> bool:
        """Whether any model can take a request now."""
        return self.state is State.READY and any(m.serves for m in self.models.values())

    @property
    def inside(self) -> int:
        """Admitted requests that are not answered yet."""
        return sum(model.admission.accepted for model in self.models.values())

    def share_devices(self) -> None:
        """Let models on one device share clients' slot shares, as their engines use the same
        cores; unless each model has cores of its own. A model without a worker uses none.
        """
        slots, models = Counter[str](), Counter[str]()
        for model in self.models.values():
            apart = self.settings.threads and model.device == "cpu"
            device = model.name if apart else model.device
            if device not in self.shares:
                records = None if self.present is None else self.present[model.number]
                clients = PresentClients(records=records, index=self.index)
                self.shares[device] = SlotShares(clients)
            model.shares = self.shares[device]
            slots[device] = max(slots[device], model.admission.slots)
            models[device] += 1
        for device, most in slots.items():  # no wake-up: others' ends admit waiting requests
            self.shares[device].slots, self.shares[device].models = most, models[device]
        for shares in self.shares.values():
            for model in self.models.values():
                shares.serve(model.name, model.serves)

    def drain(self) -> None:
        """Stop admitting requests."""
        for model in self.models.values():
            model.admission.state = State.DRAINING

    def model(self, name: str | None = None) -> Model:
        """The model of that name, or the default. Raises UnknownModel."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise UnknownModel(f"there is no such model here: name one of {', '.join(self.models)}")
        return self.models[name]

    def check_room(self, client: str) -> None:
        """Raise NotServing or QueueFull if no model has room for a request of this client.

        The model's name may be in the body, which is not worth reading then.
        """
        refusals = []
        for model in self.models.values():
            try:
                return model.admission.check(client)
            except VignetteError as error:
                refusals.append(error)
        for model in self.models.values():
            model.admission.note(client)
        raise refusals[0]

    async def caption(
        self, model: Model, request: GenerationRequest, images: Images, client: str
    ) -> Caption:
        """The whole caption. Raises what `generate` raises, and ComputationFailed."""
        async with aclosing(self.generate(model, request, images, client)) as outputs:
            output = join_outputs([each async for each in outputs])
        return make_caption(request, output, model.tokenizer)

    def count(self, model: str, key: str | None, code: str) -> None:
        """Count how a request ended. model: "" if it was refused before the model was known. code:
        ok, cancelled, or the code of its error.
        """
        self.metrics.requests.labels(model, code).inc()
        if key is not None:
            self.metrics.by_key.labels(key, code).inc()

    async def generate(
        self, model: Model, request: GenerationRequest, images: Images, client: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield a request's outputs as they come; closing the generator cancels the request.

        client: whose turns and limits this request counts against.

        Raises what admission, the fetcher, the decoders and the dispatcher raise, and Expired.
        """
        started = time.perf_counter()
        deadline = request.scheduling.deadline or math.inf
        inside = self.metrics.inside.labels(model.name)
        with model.admission.enter(client), inside.track_inprogress():
            model.admission.check_in_time(deadline - started, client)
            async with (
                self._fetched(model.admission, images, deadline, client) as encoded,
                aclosing(await self._outputs(model, request, encoded, client)) as outputs,
            ):
                async for output in outputs:
                    if output.timing is not None:
                        self._measure(model, output.timing, time.perf_counter() - started)
                    yield output

    def _measure(self, model: Model, timing: Timing, total: float) -> None:
        for stage, value in {**timing.stages, "total": total}.items():
            if value:  # 0: the caption was cached, so no time was spent here
                self.metrics.stage.labels(model.name, stage).observe(value)

    async def _outputs(
        self, model: Model, request: GenerationRequest, encoded: list[bytes], client: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """Hash the images of an admitted request, refuse those that are known to crash engines, and
        run the request or find its caption in the cache.
        """
        deadline = request.scheduling.deadline or math.inf
        async with until(deadline):
            large = sum(map(len, encoded)) > _LARGE
            digest = await asyncio.to_thread(_digest, encoded) if large else _digest(encoded)
        model.links.dispatcher.check(digest)
        origin = Origin(client, digest, deadline)
        drawn = request.sampling.temperature > 0  # sampled outputs are not cached
        if self.cache is not None and not request.stream and not drawn:
            return self._known_or_run(self.cache, model, request, encoded, origin)
        return model.run(request, encoded, origin)

    async def _known_or_run(
        self,
        cache: OutputCache,
        model: Model,
        request: GenerationRequest,
        images: list[bytes],
        origin: Origin,
    ) -> AsyncGenerator[RequestOutput, None]:
        made: list[bool] = []

        async def make() -> RequestOutput:
            made.append(True)
            model.links.dispatcher.check(origin.digest)  # it may have crashed another flight
            async with aclosing(model.run(request, images, origin)) as outputs:
                return join_outputs([output async for output in outputs])

        key = model.name, model.identity, origin.digest, request.prompt_ids, request.sampling
        async with until(origin.deadline):
            found = await cache.get(key, make)
            if not made:
                self.metrics.cache_hits.labels(model.name).inc()
                wait = self.rates.pages.spend(origin.client, _HIT)
                if not model.admission.alone(origin.client):  # else it delays nobody's captions
                    await asyncio.sleep(wait)
        yield found

    @asynccontextmanager
    async def _fetched(
        self, admission: Admission, images: Images, deadline: float, client: str
    ) -> AsyncIterator[list[bytes]]:
        """The images, sent or fetched; fetched bytes count in the byte budget."""
        if not isinstance(images, str):
            yield images
            return
        if self.fetcher is None:
            raise InvalidRequest("image_url is switched off here: send the image itself")
        held, most = 0, self.settings.max_body_bytes  # the image may be as large

        def begin() -> None:
            nonlocal held
            self.budget.hold(most, client)
            held = most

        try:
            async with admission.fetching(client), until(deadline):
                left = deadline - time.perf_counter()
                image = await self.fetcher.fetch(images, left, client, begin)
            self.budget.release(held - len(image), client)
            held = len(image)
            yield [image]
        finally:
            self.budget.release(held, client)


def _digest(images: list[bytes]) -> str:
    digest = hashlib.sha256()
    for image in images:  # the same bytes read as a clip are another image
        digest.update(b"clip" if isinstance(image, Clip) else b"image")
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()
