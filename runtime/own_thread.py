"""A thread that lasts as long as its owner: GPU libraries keep state for each thread using them.

ONNX Runtime's CUDA provider has a context for each thread, with the CUDA graphs that it captured.
"""

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

from runtime.errors import WrongThread

_Result = TypeVar("_Result")
_EXIT_SECONDS = 30.0  # most that a program's end waits for a step
_Calls = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class OwnThread:
    """Runs functions one after the other on a daemon thread, until this object is collected."""

    def __init__(self, name: str) -> None:
        self._name, self._calls = name, _Calls()
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        self._inside, self._ended = threading.Lock(), False
        _threads.add(self)

    @property
    def is_current(self) -> bool:
        """Whether the caller is on this thread: it must not wait for it then."""
        return self._thread is threading.current_thread()

    def check(self) -> None:
        """Raise WrongThread at the program's end, and in a fork of the process that this was made
        in: it has no threads.
        """
        if os.getpid() != self._process:
            raise WrongThread("this engine was opened before a fork: open one after it")
        if self._ended:
            raise WrongThread("the program ends")

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Call a library that would abort the process if that ended meanwhile. Raises WrongThread
        at the program's end.
        """
        with self._inside:
            self.check()
            yield

    def keep_out(self) -> None:
        """Let nobody be inside any more; waits for a present call."""
        if os.getpid() == self._process:
            waited = self._inside.acquire(timeout=_EXIT_SECONDS)
            self._ended = True
            if waited:
                self._inside.release()

    def start(self, function: Callable[[], _Result]) -> "Future[_Result]":
        """Call a function there, after those before it."""
        if self._thread is None:
            # Not at exit: a step may still need the encoder's threads then (`keep_out`).
            weakref.finalize(self, self._calls.put, None).atexit = False
            self._thread = threading.Thread(
                target=_serve, args=(self._calls,), name=self._name, daemon=True
            )
            self._thread.start()
        future = Future[_Result]()
        self._calls.put((future, function))
        return future

    def call(self, function: Callable[[], _Result]) -> _Result:
        """The function's result, or its error. Must not be called on that very thread."""
        inside = self.inside()  # refers to this, until it is called

        def call() -> _Result:
            with inside:
                return function()

        return self.start(call).result()


def _serve(calls: _Calls) -> None:
    while (call := calls.get()) is not None:
        future, function = call
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        del call, future, function  # else the owner would not be collected while nothing is to do


_threads: "weakref.WeakSet[OwnThread]" = weakref.WeakSet()


@atexit.register
def _keep_out() -> None:
    """Let no thread be inside a library as the program ends."""
    for thread in list(_threads):
        thread.keep_out()
