"""A thread that lasts as long as its owner: GPU libraries keep state for each thread using them.

ONNX Runtime's CUDA provider has a context for each thread, with the CUDA graphs that it captured.
"""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_Calls = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class OwnThread:
    """Runs functions one after the other on a daemon thread, until this object is collected."""

    def __init__(self, name: str) -> None:
        self._name, self._calls = name, _Calls()
        self._started = False

    def start(self, function: Callable[[], _Result]) -> "Future[_Result]":
        """Call a function there, after those before it."""
        if not self._started:
            self._started = True
            weakref.finalize(self, self._calls.put, None)
            arguments = (self._calls,)
            threading.Thread(target=_serve, args=arguments, name=self._name, daemon=True).start()
        future = Future[_Result]()
        self._calls.put((future, function))
        return future

    def call(self, function: Callable[[], _Result]) -> _Result:
        """The function's result, or its error. Must not be called on that very thread."""
        return self.start(function).result()


def _serve(calls: _Calls) -> None:
    while (call := calls.get()) is not None:
        future, function = call
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        del call, future, function  # else the owner would not be collected while nothing is to do
