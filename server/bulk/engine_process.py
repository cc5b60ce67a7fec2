"""An engine in a process of its own, for any number of threads.

An image that crashes the engine ends only that process; the next image gets a new one.
"""

import itertools
import logging
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np
from msgspec import Struct

from runtime.engine import Engine
from runtime.errors import InvalidRequest, VignetteError
from runtime.model.manifest import Preprocessing
from server.bulk.items import ScoredCaption, scored
from server.system import follow_parent

log = logging.getLogger(__name__)

_CONTEXT = multiprocessing.get_context("spawn")


class NoEngine(VignetteError):
    """The engine can't be opened, or reopened after it died."""


class EngineDied(Exception):
    """The process ended while it had this image, and perhaps others."""


class Facts(Struct, frozen=True):
    """Properties of an engine. shape: of an image's pixels, uint8."""

    identity: dict[str, str]
    runs_on: str
    slots: int
    shape: tuple[int, ...]
    preprocessing: Preprocessing


class _CaptionCall(Struct, frozen=True):
    pixels: np.ndarray
    prompt: str | None


class EngineProcess:
    """An engine in a process, restarted after a crash; any thread may call `generate`."""

    def __init__(
        self, open_engine: Callable[[], Engine], prompt: str | None, sampling: dict[str, Any]
    ) -> None:
        """sampling: fields of SamplingParams. Raises NoEngine, with the reason, also if the engine
        can't serve this prompt or sampling.
        """
        self._open = open_engine, prompt, sampling
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._running: dict[int, Future[tuple[ScoredCaption, ...]]] = {}
        self._closed = False
        self._process: SpawnProcess | None = None
        self._ready: Future[Facts] = Future()
        self._keeper = threading.Thread(target=self._keep, name="engine", daemon=True)
        self._keeper.start()
        try:
            self.facts = self._ready.result()
        except BaseException:  # an interrupt, too: else we wait for the process for ever
            self.close()
            raise

    def generate(self, pixels: np.ndarray, prompt: str | None) -> tuple[ScoredCaption, ...]:
        """An image's captions. Raises VignetteError if the engine can't serve it, EngineDied, and
        RuntimeError for an error of a step.
        """
        while True:
            self._ready.result()
            future: Future[tuple[ScoredCaption, ...]] = Future()
            with self._lock:
                number = next(self._numbers)
                self._running[number] = future
                try:
                    self._connection.send((number, _CaptionCall(pixels, prompt)))
                    break
                except OSError:  # the process is being replaced; it never got this image
                    del self._running[number]
        return future.result()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
        self._keeper.join()

    def _keep(self) -> None:
        """Start processes one after the other, on one thread, as they die with it."""
        while self._start():
            try:
                self._listen()
            except (EOFError, OSError):
                self._died()
        with self._lock:
            left, self._running = self._running, {}
            if not self._ready.done():
                self._ready.set_exception(NoEngine("it was closed"))
        for future in left.values():
            future.set_exception(EngineDied("the engine's process has ended for good"))

    def _start(self) -> bool:
        """Start the next process; returns False if this is closed or it can't be started."""
        with self._lock:
            if self._closed:
                return False
            try:
                self._connection, theirs = _CONTEXT.Pipe()
                process = _CONTEXT.Process(target=_serve, args=(theirs, *self._open), daemon=True)
                process.start()
            except Exception as error:  # no room for it, or `open_engine` can't be pickled
                self._closed = True
                self._ready.set_exception(NoEngine(f"its process can't be started: {error}"))
                return False
            self._process = process
            theirs.close()
            return True

    def _listen(self) -> None:
        facts = self._connection.recv()
        if isinstance(facts, Exception):
            self._closed = True
            self._ready.set_exception(facts)
            return
        self._ready.set_result(facts)
        while True:
            number, answer = self._connection.recv()
            with self._lock:
                future = self._running.pop(number)
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _died(self) -> None:
        process = self._process
        assert process is not None
        with self._lock:
            self._connection.close()
            ended, self._running = self._running, {}
            starting, self._ready = self._ready, Future()
        process.join()
        if not self._closed:
            log.warning("the engine's process ended (exit code %s)", process.exitcode)
        if not starting.done():
            self._closed = True
            code = process.exitcode
            self._ready.set_exception(NoEngine(f"it ended while it was opened (exit code {code})"))
            starting.set_exception(self._ready.exception())
        for future in ended.values():
            future.set_exception(EngineDied("the engine's process ended"))


def _serve(
    connection: Connection,
    open_engine: Callable[[], Engine],
    prompt: str | None,
    sampling: dict[str, Any],
) -> None:
    """The process: captions what arrives until its parent has gone."""
    follow_parent()
    try:
        engine = open_engine()
        if engine.manifest.sizes.frames:
            raise InvalidRequest(
                "a video model takes several frames a caption: send them to a server"
            )
        engine.limits.check(prompt, sampling)
    except VignetteError as error:
        connection.send(NoEngine(str(error)))
        return
    sizes, how = engine.manifest.sizes, engine.manifest.preprocessing
    connection.send(Facts(engine.identity, engine.runs_on, engine.slots, sizes.pixels, how))
    sending = threading.Lock()

    def answer(number: int, job: _CaptionCall) -> None:
        answer: tuple[ScoredCaption, ...] | Exception
        try:
            answer = scored(engine.generate([job.pixels], [job.prompt], **sampling)[0])
        except VignetteError as error:
            answer = error
        except Exception as error:  # ONNX Runtime raises a class of its own for every status code
            answer = RuntimeError(str(error))
        with sending:
            connection.send((number, answer))

    with ThreadPoolExecutor(2 * engine.slots, "caption") as pool:
        while True:
            pool.submit(answer, *connection.recv())
