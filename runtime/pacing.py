"""When to encode the next images: how long those that are being decoded may go first.

An encoder call stalls every running sequence for as long as it takes, and a turn of the running
ones stalls every image that waits. So before the next call the running ones get a turn of
`patience` times the last call's duration for each that runs, divided by the number that wait. With
few waiting, captions that have begun are finished soon. With many, the turn shrinks to a single
step, and rows pile up in the batch, where a step costs each of them least.
`bench/sections/scheduling.py` compares the policies.
"""


class Pacing:
    """Keeps the account of seconds spent on both graphs. `patience` 0 encodes at every step."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._encode_s = 0.0
        self._decode_s = 0.0

    def encoded(self, seconds: float) -> None:
        """The encoder has just run for so long."""
        self._encode_s, self._decode_s = seconds, 0.0

    def decoded(self, seconds: float) -> None:
        """A decode step has just run for so long."""
        self._decode_s += seconds

    def may_encode(self, waiting: int, running: int) -> bool:
        """Whether the running sequences have had their turn before `waiting` others."""
        return self._decode_s * waiting >= self._patience * self._encode_s * running
