"""The error raised when a client may have no more."""

from runtime.errors import VignetteError


class QueueFull(VignetteError):
    """No room for another request; there may be in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after
