"""Routes."""

import logging
from typing import cast

import tornado.web

from server.handlers import caption, health, metrics, page
from server.handlers.base import Handler
from server.service import Service

log = logging.getLogger(__name__)

_OPS: list[tuple[str, type[Handler]]] = [
    (r"/health/live", health.LiveHandler),
    (r"/health/ready", health.ReadyHandler),
    (r"/metrics", metrics.MetricsHandler),
]


def make_app(service: Service) -> tornado.web.Application:
    """The public application for one service; tests make theirs with the same function."""
    routes: list[tuple[str, type[Handler]]] = [
        (r"/", page.PageHandler),
        (r"/openapi.json", page.OpenApiHandler),
        (r"/caption", caption.CaptionHandler),
    ]
    return _app(service, routes if service.settings.ops_port is not None else routes + _OPS)


def make_ops_app(service: Service) -> tornado.web.Application:
    """Health and metrics alone, for a port of their own."""
    return _app(service, _OPS)


def _app(service: Service, routes: list[tuple[str, type[Handler]]]) -> tornado.web.Application:
    parts = {"service": service}
    return tornado.web.Application(
        [(path, handler, parts) for path, handler in routes],
        default_handler_class=page.NotFoundHandler,
        default_handler_args=parts,
        log_function=_log if service.settings.access_log else lambda handler: None,
    )


def _log(handler: tornado.web.RequestHandler) -> None:
    request = handler.request
    log.info(
        "%s %s %d %.1f ms, from %s, request %s",
        request.method, request.path, handler.get_status(), request.request_time() * 1e3,
        request.remote_ip, cast(Handler, handler).name,
    )  # fmt: skip
