"""The parts of a running server, put together once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from runtime.engine import Engine
from server.admission import Admission
from server.metrics import Metrics
from server.settings import Settings
from server.worker import EngineWorker


@dataclass(slots=True)
class Service:
    """What handlers work with; `engine` is None until it is warm."""

    settings: Settings
    admission: Admission
    worker: EngineWorker
    metrics: Metrics
    decoders: ThreadPoolExecutor
    engine: Engine | None = None


def make_service(settings: Settings, open_engine: Callable[[], Engine]) -> Service:
    """The parts of a server, not yet started."""
    metrics = Metrics()
    admission = Admission(settings.max_queue)
    worker = EngineWorker(open_engine, metrics)
    # Whatever is inside and has no slot waits, wherever it stands on its way there.
    metrics.waiting.set_function(lambda: max(0, admission.inside - worker.running))
    metrics.running.set_function(lambda: worker.running)
    return Service(
        settings=settings,
        admission=admission,
        worker=worker,
        metrics=metrics,
        decoders=ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode"),
    )
