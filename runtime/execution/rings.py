"""Tokens, lengths and log-probabilities of the steps of a burst, on a device and on the host.

Step j of a burst reads row j of the tokens and lengths and writes row j + 1, so the steps run
without the host, which uploads the rows before the burst and fetches them after it.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from runtime.execution.device_buffer import DeviceBuffer, View
from runtime.execution.stream import Stream
from runtime.model.manifest import UNFORCED


class Rings:
    """Buffers of `burst + 1` rows of a value per slot, and one more for padding.

    tokens: int64; a forced one stands where a step writes its choice, UNFORCED elsewhere. lengths:
    int32, values in each slot's cache. logprobs: float32, of the tokens.
    """

    def __init__(self, stream: Stream, burst: int, slots: int) -> None:
        self._stream, self.burst, self._width = stream, burst, slots + 1
        self.shape = burst + 1, self._width
        size, device = prod(self.shape), stream.device
        self.tokens = DeviceBuffer(device, (size,), np.int64)
        self.lengths = DeviceBuffer(device, (size,), np.int32)
        self.logprobs = DeviceBuffer(device, (size, 1), np.float32)
        self._host_tokens = np.full(self.shape, UNFORCED, np.int64)
        self._host_lengths = np.zeros(self.shape, np.int32)

    def begin(self, tokens: Sequence[Sequence[int]], lengths: Any, padding: int) -> None:
        """Upload what a burst begins with: the tokens to feed at each step, and the lengths.

        padding: length in slots beyond these.
        """
        steps, rows = len(tokens), len(tokens[0])
        self._host_tokens[1:] = UNFORCED
        self._host_tokens[:steps, :rows] = tokens
        self._host_lengths[0, :rows] = lengths
        self._host_lengths[0, rows:] = padding
        self.tokens.upload(self._host_tokens.reshape(-1), self._stream)
        self.lengths.upload(self._host_lengths.reshape(-1), self._stream)

    def go_on(self, steps: int) -> None:
        """Begin a burst where the last one, of so many steps, has ended; nothing is forced."""
        for ring in (self.tokens, self.lengths):
            ring.repeat(steps * self._width, self._width, self._stream)
        self._host_tokens[1:] = UNFORCED
        self.tokens.upload(self._host_tokens[1:].reshape(-1), self._stream, self._width)

    def row(self, ring: DeviceBuffer, row: int, count: int | None = None) -> View:
        """A row of a ring, or its first `count` values."""
        return ring.rows(self._width if count is None else count, row * self._width)
