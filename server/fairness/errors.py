"""How a client hears that it may have no more."""

from runtime.errors import VignetteError


class QueueFull(VignetteError):
    """No room for another request; `retry_after` says in how many seconds there may be."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after
