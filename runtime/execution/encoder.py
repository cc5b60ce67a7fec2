"""The encoder graph on a CPU: all threads on one image, or one image per thread.

Threads that share an image wait for one another after every operator, and so for any other work on
one of their cores: decoding images, answering requests. With as many images as threads, each image
is a stream on its own thread without such waits, which computes a fifth faster.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime.own_thread import OwnThread
from runtime.providers.session import Placement, open_session

_Row = tuple[int, np.ndarray]  # index of an image in the call, its pixels
Put = Callable[[int, list[np.ndarray]], None]


class Encoder:
    """Runs the encoder graph and passes on the outputs of each image. One thread uses it."""

    def __init__(self, path: Path, how: Placement, streams: int, outputs: Sequence[str]) -> None:
        """streams: images that may be encoded in parallel, each on one thread.

        Raises ProviderError or EngineFolderError, as `open_session`.
        """
        self._outputs, self._streams = list(outputs), streams
        probe = {"pixels": np.zeros((1, *how.row), np.uint8)}
        self._wide = open_session(path, how, probe)
        if streams > 1:
            # All streams share one session: with a single thread it computes on the calling thread.
            self._narrow = open_session(path, replace(how, threads=1), probe)
        # Not an executor: those end before threads of the program that still caption.
        self._threads = [OwnThread(f"encode_{number}") for number in range(streams)]

    def encode(self, pixels: Sequence[np.ndarray], put: Put) -> None:
        """Encode images (uint8, `how.row` each); call `put(i, outputs)` for each image i.

        `put` is called from several threads, once per image. Exceptions of `put` or ONNX Runtime
        are re-raised once all streams have ended.
        """
        rows = list(enumerate(pixels))
        shared = self._shared(len(rows))
        apart, together = rows[: len(rows) - shared], rows[len(rows) - shared :]
        left = iter(apart)

        def stream() -> None:
            for row in left:
                self._run(self._narrow, [row], put)

        running = [thread.start(stream) for _, thread in zip(apart, self._threads, strict=False)]
        wait(running)
        for each in running:
            each.result()
        if together:
            self._run(self._wide, together, put)

    def _shared(self, images: int) -> int:
        """Number of images that all threads encode together, after those on one thread each."""
        if self._streams == 1:
            return images
        rest = images % self._streams
        return 0 if rest > self._streams // 2 else rest  # streams would idle half of the cores

    def _run(self, session: ort.InferenceSession, rows: list[_Row], put: Put) -> None:
        outputs = session.run(self._outputs, {"pixels": np.stack([pixels for _, pixels in rows])})
        for row, (index, _) in enumerate(rows):
            put(index, [output[row] for output in outputs])
