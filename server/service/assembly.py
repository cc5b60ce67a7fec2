"""Assembles the parts of one front-end."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.limits import Limits
from runtime.model.manifest import Manifest
from runtime.model.tokenizer import CaptionTokenizer
from runtime.planning.config import most_slots
from server.fairness.byte_budget import ByteBudget
from server.fairness.present_clients import shared
from server.images.decoder import Setup, Target
from server.images.pool import ImageDecoders
from server.ipc.messages import process_name
from server.ipc.shared import PixelStore
from server.ipc.transport import WorkerLinks
from server.service.admission import ASIDE, Admission
from server.service.cache import OutputCache
from server.service.client_rates import ClientRates
from server.service.key_reader import KeyReader
from server.service.keys import Keys
from server.service.model import Model
from server.service.service import Service
from server.settings import Settings
from server.system import NICENESS
from server.telemetry.metrics import Metrics
from server.telemetry.tracing import Tracer

if TYPE_CHECKING:
    from server.images.fetch import Fetcher

_LEAST_PLACES = 64  # for requests that run: the front-ends' shares are uneven
_BODIES = 5  # of the largest size, that fit each front-end
Known = Mapping[str, tuple[Manifest, CaptionTokenizer]]  # by model name


def make_service(settings: Settings, known: Known, folder: Path, index: int, epoch: int) -> Service:
    """The service of one front-end. folder: the run's folder."""
    name = process_name("front", index, epoch)
    running = most_slots(settings.slots) * (settings.workers or 1)
    ours, share = (-(-n // settings.front_end_processes) for n in (running, settings.max_queue))
    # More places than requests, as decodings may outlast cancelled ones.
    places = max(ours, min(running, _LEAST_PLACES)) + share + settings.decoders + ASIDE
    stores = [
        PixelStore(folder / f"{name}.{number}.pixels", places, manifest.sizes.pixels, create=True)
        for number, (manifest, _) in enumerate(known.values())
    ]
    targets = [
        Target((store.path, store.slots, store.shape), manifest.preprocessing)
        for store, (manifest, _) in zip(stores, known.values(), strict=True)
    ]
    decoders = ImageDecoders(
        settings.decoders,
        Setup(tuple(targets), settings.max_pixels, settings.decode_memory_mb * 2**20, NICENESS),
        settings.decode_seconds,
        settings.timeout_seconds,
    )
    models = {
        called: Model(
            number=number,
            name=called,
            manifest=manifest,
            tokenizer=tokenizer,
            limits=Limits(tokenizer, settings.engine_config.text_positions(manifest.sizes.text)),
            admission=Admission(share, settings.timeout_seconds),
            store=stores[number],
            links=WorkerLinks(folder, stores[number], name),
            decoders=decoders,
            timeout_seconds=settings.timeout_seconds,
        )
        for number, (called, (manifest, tokenizer)) in enumerate(known.items())
    }
    keys = settings.api_keys
    front_end = settings.front_end_processes, index
    return Service(
        settings=settings,
        models=models,
        budget=ByteBudget(_bytes_each(settings)),
        metrics=Metrics(),
        decoders=decoders,
        key_reader=KeyReader(partial(Keys.open, keys, folder, *front_end)) if keys else None,
        cache=OutputCache(settings.cache_mb * 2**20) if settings.cache_mb else None,
        fetcher=_fetcher(settings),
        tracer=Tracer(settings.traces) if settings.traces else None,
        index=index,
        rates=ClientRates(settings.front_end_share),
        present=shared(folder / "clients", settings.front_end_processes, len(models)),
    )


def _bytes_each(settings: Settings) -> int:
    """A front-end's share of the bytes that may be inside. Each of many takes one body at least,
    which counts twice while it is taken apart, by a client that may have half.
    """
    share = settings.max_queue_bytes // settings.front_end_processes
    return max(share, min(settings.max_queue_bytes, _BODIES * settings.max_body_bytes))


def _fetcher(settings: Settings) -> "Fetcher | None":
    if not settings.image_url_domains:
        return None
    from server.images.fetch import Fetcher  # libcurl takes a while to load

    return Fetcher(settings.image_url_domains, settings.max_body_bytes)
