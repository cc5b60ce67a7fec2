"""When to encode the next images: how long running sequences decode first.

An encoder call stalls every running sequence, and decoding stalls every waiting image. So before
the next encoder call the running sequences decode for
`patience * last encoder call's duration * running / waiting`. With few waiting, running captions
finish soon. With many, the turn shrinks to a single step and the batch fills up, where a step
costs least per row.
`bench/sections/scheduling.py` compares the policies.
"""


class Pacing:
    """Tracks the seconds spent in both graphs. `patience` 0 encodes at every step."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._encode_s = 0.0
        self._decode_s = 0.0

    def encoding(self) -> None:
        """Record the start of an encoder call."""
        self._decode_s = 0.0

    def encoded(self, seconds: float) -> None:
        """Record how long the encoder call took."""
        self._encode_s = seconds

    def decoded(self, seconds: float) -> None:
        """Record a decode step."""
        self._decode_s += seconds

    def may_encode(self, waiting: int, running: int) -> bool:
        """Whether the running sequences have had their turn, given `waiting` sequences."""
        return self._decode_s * waiting >= self._patience * self._encode_s * running
