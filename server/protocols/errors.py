"""The table of errors and their responses."""

from dataclasses import dataclass

from runtime.errors import (
    ComputationFailed,
    InvalidImage,
    InvalidRequest,
    TooManyPixels,
    VignetteError,
)
from server.images.clips import NoVideo
from server.images.cost import TooHard
from server.images.hosts import FetchFailed, ForbiddenUrl
from server.images.lane import NoDecoder
from server.ipc.deadline import Expired
from server.ipc.failures import EngineFailed, EngineLost
from server.refusals import QueueFull, TooFast
from server.service.admission import NotServing
from server.service.keys import Unauthorised
from server.service.service import UnknownModel


class BodyTooLarge(VignetteError):
    """The request's body exceeds the limit."""


class UnsupportedMediaType(VignetteError):
    """A Content-Type or Content-Encoding that is not taken there."""


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    """Response to an error. `message` replaces the text of errors that other libraries raise."""

    status: int
    code: str
    message: str | None = None


# The first match counts, so subclasses come before their base classes.
ERRORS: dict[type[Exception], ErrorStatus] = {
    ForbiddenUrl: ErrorStatus(400, "forbidden_url"),
    InvalidImage: ErrorStatus(400, "invalid_image"),
    InvalidRequest: ErrorStatus(400, "invalid_request"),
    Unauthorised: ErrorStatus(401, "unauthorised"),
    BodyTooLarge: ErrorStatus(413, "body_too_large"),
    UnknownModel: ErrorStatus(404, "unknown_model"),
    UnsupportedMediaType: ErrorStatus(415, "unsupported_media_type"),
    NoVideo: ErrorStatus(415, "unsupported_media_type"),
    TooManyPixels: ErrorStatus(422, "too_many_pixels"),
    TooHard: ErrorStatus(422, "too_hard_to_decode"),
    FetchFailed: ErrorStatus(422, "fetch_failed"),
    TooFast: ErrorStatus(429, "too_fast"),
    QueueFull: ErrorStatus(429, "queue_full"),
    NotServing: ErrorStatus(503, "not_serving"),
    NoDecoder: ErrorStatus(503, "not_serving"),
    ComputationFailed: ErrorStatus(500, "engine_failed"),
    EngineLost: ErrorStatus(503, "not_serving"),
    EngineFailed: ErrorStatus(500, "engine_failed"),
    Expired: ErrorStatus(504, "deadline_exceeded"),
}
INTERNAL = ErrorStatus(500, "internal", "an error of ours; it was logged")
SERVER_FAULTS = {answer.code for answer in (*ERRORS.values(), INTERNAL) if answer.status == 500}


def answer_to(error: BaseException) -> ErrorStatus:
    """The table's entry for an error; INTERNAL for an error without one."""
    found = (answer for kind, answer in ERRORS.items() if isinstance(error, kind))
    return next(found, INTERNAL)
