"""Errors raised when a client may have no more for now."""

from runtime.errors import VignetteError


class RetryLater(VignetteError):
    """What was asked for may be possible in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(RetryLater):
    """No room for another request."""


class TooFast(RetryLater):
    """A client's rate or concurrency is used up."""
