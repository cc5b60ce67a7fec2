"""The HTTP applications: routes and access log."""

import logging
from typing import cast

import tornado.web

from server.addresses import networks
from server.fairness.token_buckets import TokenBuckets
from server.http import caption, health, hub, kserve, metrics, openai, pages
from server.http.connections import Connections
from server.http.handler import Handler
from server.service.client_rates import pages as page_rates
from server.service.service import Service
from server.telemetry.logs import plain

_MODEL = "(.+?)(?:/versions/([^/]+))?"  # names may contain slashes
_PATH, _METHOD = 200, 20  # characters logged
log = logging.getLogger(__name__)

_OPS: list[tuple[str, type[Handler]]] = [
    (r"/health/live", health.LiveHandler),
    (r"/health/ready", health.ReadyHandler),
    (r"/metrics", metrics.MetricsHandler),
]


class Application(tornado.web.Application):
    """Handlers of one port. connections: what they tell the server of theirs."""

    def __init__(
        self, service: Service, routes: list[tuple[str, type[Handler]]], rates: TokenBuckets
    ) -> None:
        """rates: of clients, for requests that are no captions."""
        networks(service.settings.trusted_proxies)  # fail on an invalid network before serving
        self.connections = Connections(rates)
        parts = {"service": service, "connections": self.connections}
        super().__init__(
            [(path, handler, parts) for path, handler in routes],
            default_handler_class=pages.NotFoundHandler,
            default_handler_args=parts,
            log_function=_log if service.settings.access_log else lambda handler: None,
        )


def make_app(service: Service) -> Application:
    """The public application for one service; tests use it, too."""
    routes: list[tuple[str, type[Handler]]] = [
        (r"/", hub.HubHandler),
        (r"/openapi.json", pages.OpenApiHandler),
        (r"/docs", pages.DocsHandler),
        (r"/static/([a-z./-]+)", pages.StaticHandler),
        (r"/samples/([a-z-]+\.png)", pages.SampleHandler),
        (r"/caption", caption.CaptionHandler),
        (r"/v2", kserve.ServerHandler),
        (r"/v2/health/(live|ready)", kserve.ServerLiveHandler),
        (r"/v2/repository/index", kserve.RepositoryHandler),
        (rf"/v2/models/{_MODEL}/infer", kserve.InferHandler),
        (rf"/v2/models/{_MODEL}(?:/(ready|config|stats))?", kserve.ModelHandler),
        (r"/v1/models", openai.ModelsHandler),
        (r"/v1/models/(.+)", openai.ModelHandler),
        (r"/v1/chat/completions", openai.ChatHandler),
    ]
    routes += [] if service.settings.ops_port is not None else _OPS
    return Application(service, routes, service.rates.pages)


def make_ops_app(service: Service) -> Application:
    """The application of a separate ops port: health and metrics only. What comes to the public
    port does not count there.
    """
    return Application(service, _OPS, page_rates(service.settings.front_end_share))


def _log(handler: tornado.web.RequestHandler) -> None:
    """Log a line for a request, with the same values as fields for JSON logs."""
    ours, request = cast(Handler, handler), handler.request
    fields = {
        "method": plain(request.method or "", _METHOD),
        "path": plain((request.path or "")[:_PATH], _PATH),
        "status": handler.get_status(),
        "duration_ms": round(request.request_time() * 1e3, 1),
        "client": ours.address,
        "key": ours.key,
        "code": ours.code,
        "model": ours.model_name or None,
        "request_id": ours.request_id,
    }
    log.info(
        "%(method)s %(path)s %(status)d %(duration_ms).1f ms, %(code)s, from %(client)s, key "
        "%(key)s, request %(request_id)s",
        fields,
        extra={"fields": fields},
    )
