"""The one table that says which error is answered how."""

from dataclasses import dataclass

import tornado.web

from runtime.errors import InvalidImage, InvalidRequest, TooManyPixels
from server.admission import NotServing, QueueFull
from server.worker import EngineFailed


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


def answer_to(error: BaseException | None, status_code: int) -> Answer:
    """The table's line for an error; what the table doesn't know is an internal error."""
    for kind, answer in ERRORS.items():
        if isinstance(error, kind):
            return answer
    if error is None or isinstance(error, tornado.web.HTTPError):
        return HTTP_ERRORS.get(status_code, INTERNAL)
    return INTERNAL
