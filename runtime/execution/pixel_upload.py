"""Pixels on their way to a device, in a stream of their own while graphs run in another."""

from collections.abc import Sequence

import numpy as np

from runtime.execution.buckets import bucket
from runtime.execution.device_buffer import DeviceBuffer, pinned
from runtime.execution.stream import Stream, open_stream


class PixelUpload:
    """Uploads one batch of images while the one before it is encoded.

    Batches come in sizes, each of which has a buffer at an address of its own.
    """

    def __init__(self, stream: Stream, sizes: Sequence[int], image: tuple[int, ...]) -> None:
        """stream: of the encoder. image: shape, of uint8."""
        self._stream, self._sizes = stream, sizes
        most, device = sizes[-1], stream.device
        self._uploads = open_stream(device)
        self._staged, self._taken = self._uploads.mark(), stream.mark()
        self._staging = pinned(device, (most, *image), np.uint8)
        self._staging_rows = [row.data for row in self._staging.reshape(most, -1)]
        self._arrived = DeviceBuffer(device, (most, *image), np.uint8)
        self.buffers = {rows: DeviceBuffer(device, (rows, *image), np.uint8) for rows in sizes}

    def put(self, images: Sequence[np.ndarray]) -> int:
        """Queue the upload of images; returns the size whose buffer has them, behind that."""
        rows = bucket(len(images), self._sizes)
        self._staged.wait()
        for row, image in zip(self._staging_rows, images, strict=False):
            row[:] = image.reshape(-1).data  # unlike NumPy's copy, it keeps Python's lock
        self._uploads.after(self._taken)
        self._arrived.upload(self._staging[:rows], self._uploads)
        self._staged.set()
        self._stream.after(self._staged)
        self.buffers[rows].take(self._arrived, self._stream)
        self._taken.set()
        return rows

    def wait(self) -> None:
        """Wait until the last batch is in its buffer."""
        self._taken.wait()
