"""Captions of any number of image files, as they are finished, without a server.

Threads read and decode images while the engine captions those before them. Only as many are held
in memory as keep it busy, so that a folder may be of any size.
"""

import logging
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from runtime.engine import Engine
from runtime.errors import InvalidRequest, VignetteError
from runtime.model.preprocess import preprocess
from runtime.planning.machine import this_machine
from runtime.request import Caption

log = logging.getLogger(__name__)

Outcome = tuple[Path, Caption | Exception]


def caption_files(
    engine: Engine,
    files: Iterable[Path | str],
    prompt: str | None = None,
    **sampling: Any,
) -> Iterator[Outcome]:
    """Each file with its caption, or with what was wrong with it, in the order they finish.

    sampling: fields of SamplingParams. Raises InvalidRequest before the first one when prompt,
    sampling or model can't be served.
    """
    engine.limits.check(prompt, sampling)
    if engine.manifest.sizes.frames:
        raise InvalidRequest("a video model takes several frames a caption: send them to a server")
    captioner = _Captioner(engine, prompt, sampling)
    remaining, most = map(Path, files), 2 * (engine.config.slots or 1)
    running: set[Future[Outcome]] = set()
    with ThreadPoolExecutor(most, "file") as pool:
        try:
            while True:
                some = islice(remaining, most - len(running))
                running |= {pool.submit(captioner.caption, file) for file in some}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:  # also when the caller has had enough
            pool.shutdown(cancel_futures=True)


class _Captioner:
    """Captions files for many threads. Images are decoded on as many at a time as there are cores.

    A step that raises is repeated for each of its images alone.
    """

    def __init__(self, engine: Engine, prompt: str | None, sampling: dict[str, Any]) -> None:
        self._engine, self._prompt, self._sampling = engine, prompt, sampling
        self._decoding = threading.Semaphore(this_machine().cores)
        self._apart = _Apart()

    def caption(self, file: Path) -> Outcome:
        """A file's caption, or what was wrong with it."""
        try:
            with self._decoding:
                pixels = preprocess(file.read_bytes(), self._engine.manifest.preprocessing)
            return file, self._captioned(pixels)
        except (VignetteError, OSError) as error:
            return file, error

    def _captioned(self, pixels: np.ndarray) -> Caption | Exception:
        try:
            with self._apart.together():
                return self._generate(pixels)
        except VignetteError:
            raise
        except Exception:  # ONNX Runtime raises a class of its own for every status code
            log.warning("a step failed: its images are tried one by one", exc_info=True)
        try:
            with self._apart.alone():
                return self._generate(pixels)
        except Exception as error:
            return error

    def _generate(self, pixels: np.ndarray) -> Caption:
        return self._engine.generate([pixels], [self._prompt], **self._sampling)[0]


class _Apart:
    """Many together, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0
        self._alone = threading.Lock()

    @contextmanager
    def together(self) -> Iterator[None]:
        """With others that are; not while one wants to be alone."""
        with self._alone, self._changed:
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Once those that are together have ended."""
        with self._alone:
            with self._changed:
                self._changed.wait_for(lambda: not self._together)
            yield
