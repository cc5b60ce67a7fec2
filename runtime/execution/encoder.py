"""The encoder graph on a processor: all threads on one image, or an image for each thread.

Threads that share an image wait for one another after every operator, and so for whatever else the
machine does on one of their cores: decoding images, answering requests. With as many images as
threads nobody has to wait: each image is a stream of its own, which computes a fifth faster.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime.providers.session import Placement, open_session

_Row = tuple[int, np.ndarray]  # index of an image among those to encode, its pixels
Put = Callable[[int, list[np.ndarray]], None]


class Encoder:
    """Runs the graph on images and hands over what comes out of each. One thread uses it."""

    def __init__(self, path: Path, how: Placement, streams: int, outputs: Sequence[str]) -> None:
        """streams: images that may be encoded side by side, each on one thread.

        Raises ProviderError or EngineFolderError, as `open_session`.
        """
        self._outputs, self._streams = list(outputs), streams
        probe = {"pixels": np.zeros((1, *how.row), np.uint8)}
        self._wide = open_session(path, how, probe)
        if streams > 1:
            # One session for all: with a single thread it computes on the one that calls it.
            self._narrow = open_session(path, replace(how, threads=1), probe)
            self._pool = ThreadPoolExecutor(streams, "encode")

    def encode(self, pixels: Sequence[np.ndarray], put: Put) -> None:
        """Encode images (uint8, `how.row` each): `put(i, outputs)` gets those of image i.

        `put` is called from several threads, each time for another image. What it or ONNX Runtime
        raises is raised once no thread is at work any more.
        """
        rows = list(enumerate(pixels))
        shared = self._shared(len(rows))
        apart, together = rows[: len(rows) - shared], rows[len(rows) - shared :]
        running = [self._pool.submit(self._run, self._narrow, [row], put) for row in apart]
        wait(running)
        for each in running:
            each.result()
        if together:
            self._run(self._wide, together, put)

    def _shared(self, images: int) -> int:
        """How many of them all threads work on together, after those that get one each."""
        if self._streams == 1:
            return images
        rest = images % self._streams
        return 0 if rest > self._streams // 2 else rest  # else half of the cores would rest

    def _run(self, session: ort.InferenceSession, rows: list[_Row], put: Put) -> None:
        outputs = session.run(self._outputs, {"pixels": np.stack([pixels for _, pixels in rows])})
        for row, (index, _) in enumerate(rows):
            put(index, [output[row] for output in outputs])
