"""Errors of requests that no engine captioned, and the reasons that messages give for them."""

from collections.abc import Callable

from runtime.errors import VignetteError
from server.ipc.deadline import Expired
from server.ipc.messages import FailureReason
from server.refusals import QueueFull

_RETRY_SECONDS = 1


class EngineFailed(VignetteError):
    """The engine failed on this request several times; other requests go on."""


class EngineLost(EngineFailed):
    """The engine went away several times, for reasons outside: the request may be sent again."""


class PoisonedImage(EngineFailed):
    """The engine failed twice because of this request's image."""

    def __init__(self) -> None:
        super().__init__(
            "the engine failed on this image twice: it is not tried again for ten minutes"
        )


_ERRORS: dict[FailureReason, Callable[[], VignetteError]] = {
    FailureReason.POISONED: PoisonedImage,
    FailureReason.LOST: lambda: EngineLost(
        "the engine was killed several times with this request: try again later"
    ),
    FailureReason.EXPIRED: lambda: Expired("the deadline passed while it was queued"),
    FailureReason.FULL: lambda: QueueFull(
        "the queue of the cluster is full: try again later", _RETRY_SECONDS
    ),
    FailureReason.REPLACED: lambda: EngineLost(
        "the model was replaced by another meanwhile: try again"
    ),
    FailureReason.NO_PIXELS: lambda: EngineFailed(
        "the engine's process can't open the shared memory that images are in: see its log"
    ),
}


def error_for(reason: FailureReason) -> VignetteError:
    """A new error for the reason."""
    return _ERRORS[reason]()


def reason_of(error: EngineFailed | Expired) -> FailureReason:
    """The reason that tells another process of the error: whether to blame the image, and whether
    to try again.
    """
    match error:
        case PoisonedImage():
            return FailureReason.POISONED
        case Expired():
            return FailureReason.EXPIRED
        case _:
            return FailureReason.LOST
