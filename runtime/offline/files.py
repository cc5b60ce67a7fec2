"""Captions of any number of image files, as they are finished, without a server.

Images are read and decoded on threads while the engine captions those before them. Only as many
are held in memory as keep it busy, so that a folder may be of any size.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from runtime.engine import Engine
from runtime.errors import ComputationFailed, InvalidImage, InvalidRequest, TooManyPixels
from runtime.model.manifest import Preprocessing
from runtime.model.preprocess import preprocess
from runtime.planning.machine import this_machine
from runtime.request import Caption, Sequence

log = logging.getLogger(__name__)

Outcome = tuple[Path, Caption | Exception]
_UNREADABLE = (InvalidImage, TooManyPixels, OSError)


def caption_files(
    engine: Engine,
    files: Iterable[Path | str],
    prompt: str | None = None,
    max_new_tokens: int | None = None,
) -> Iterator[Outcome]:
    """Each file with its caption, or with what was wrong with it, in the order they finish.

    Raises InvalidRequest before the first one when prompt, limit or model can't be served.
    """
    engine.limits.check(prompt, max_new_tokens)
    if engine.manifest.sizes.frames:
        raise InvalidRequest("a video model takes several frames a caption: send them to a server")
    how, slots = engine.manifest.preprocessing, engine.config.slots or 1
    remaining = map(Path, files)
    decoding: deque[tuple[Path, Future[np.ndarray]]] = deque()
    running: dict[Sequence, Path] = {}
    with ThreadPoolExecutor(this_machine().cores, "decode") as pool:
        try:
            while True:
                for file in islice(remaining, 2 * slots - len(decoding)):
                    decoding.append((file, pool.submit(_pixels, file, how)))
                if not decoding and not running:
                    return
                while decoding and _takes(engine, decoding[0][1], slots):
                    file, pixels = decoding.popleft()
                    try:
                        running[engine.submit(pixels.result(), prompt, max_new_tokens)] = file
                    except _UNREADABLE as error:
                        yield file, error
                yield from _step(engine, running)
        finally:  # also when the caller has had enough
            pool.shutdown(cancel_futures=True)
            engine.abandon()


def _pixels(file: Path, how: Preprocessing) -> np.ndarray:
    return preprocess(file.read_bytes(), how)


def _takes(engine: Engine, pixels: Future[np.ndarray], slots: int) -> bool:
    """Whether the engine takes the next image: once it is decoded, or waiting for nothing else."""
    scheduler = engine.scheduler
    return scheduler.idle or (pixels.done() and scheduler.waiting < slots)


def _step(engine: Engine, running: dict[Sequence, Path]) -> Iterator[Outcome]:
    """What a step ends; should it fail, each of those it was for is tried by itself."""
    try:
        ended = engine.step()
    except Exception:  # ONNX Runtime raises a class of its own for every status code
        log.warning("a step failed: its images are tried one by one", exc_info=True)
        engine.abandon()
        while running:
            sequence, file = running.popitem()
            yield file, _alone(engine, sequence)
        return
    for sequence in ended:
        yield running.pop(sequence), _outcome(engine, sequence)


def _alone(engine: Engine, failed: Sequence) -> Caption | Exception:
    again = engine.scheduler.add(failed.request)
    try:
        while again.finish_reason is None:
            engine.step()
    except Exception as error:
        engine.abandon()
        return error
    return _outcome(engine, again)


def _outcome(engine: Engine, sequence: Sequence) -> Caption | Exception:
    try:
        return engine.caption(sequence)
    except ComputationFailed as error:
        return error
