"""Routes."""

import tornado.web

from server.handlers import caption, health, metrics, page
from server.service import Service


def make_app(service: Service) -> tornado.web.Application:
    """The application for one service; tests make theirs with the same function."""
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
