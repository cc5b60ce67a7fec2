"""Routes, and the one table that says which error is answered how."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import tornado.web

from runtime.engine import Engine
from runtime.errors import InvalidImage, InvalidRequest, TooManyPixels
from server.admission import Admission, NotServing, QueueFull
from server.metrics import Metrics
from server.settings import Settings
from server.worker import EngineFailed, EngineWorker


class BodyTooLarge(Exception):
    """The request's body exceeds the limit."""


class UnsupportedMediaType(Exception):
    """The request's Content-Type is none that /caption takes."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How an error is answered. `message` replaces the error's own text, where that isn't ours."""

    status: int
    code: str
    message: str | None = None


ERRORS: dict[type[Exception], Answer] = {
    InvalidImage: Answer(400, "invalid_image"),
    InvalidRequest: Answer(400, "invalid_request"),
    BodyTooLarge: Answer(413, "body_too_large"),
    UnsupportedMediaType: Answer(415, "unsupported_media_type"),
    TooManyPixels: Answer(422, "too_many_pixels"),
    QueueFull: Answer(429, "queue_full"),
    NotServing: Answer(503, "not_serving"),
    EngineFailed: Answer(500, "engine_failed"),
}
HTTP_ERRORS: dict[int, Answer] = {
    400: Answer(400, "invalid_request", "not a valid HTTP request: check its headers and body"),
    404: Answer(404, "not_found", "no such page: POST an image to /caption, or see /"),
    405: Answer(405, "method_not_allowed", "this method is not served here: see /"),
}
INTERNAL = Answer(500, "internal", "an error of ours; it was logged")


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
    return Service(
        settings=settings,
        admission=Admission(limit=settings.slots + settings.max_queue),
        worker=EngineWorker(open_engine, metrics),
        metrics=metrics,
        decoders=ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode"),
    )


def make_app(service: Service) -> tornado.web.Application:
    """The application for one service; tests make theirs with the same function."""
    from server.handlers import caption, health, metrics, page

    parts = {"service": service}
    return tornado.web.Application(
        [
            (r"/", page.PageHandler, parts),
            (r"/caption", caption.CaptionHandler, parts),
            (r"/health/live", health.LiveHandler, parts),
            (r"/health/ready", health.ReadyHandler, parts),
            (r"/metrics", metrics.MetricsHandler, parts),
        ],
        default_handler_class=page.NotFoundHandler,
        default_handler_args=parts,
        log_function=lambda handler: None,  # counted in metrics; a line a request is too much
    )
