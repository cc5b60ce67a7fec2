"""Steps an engine, on a thread of its own, while there is work. Any thread may submit or cancel."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from runtime.errors import ComputationFailed, VignetteError
from runtime.own_thread import OwnThread
from runtime.request import GenerationRequest, RequestOutput

if TYPE_CHECKING:
    from runtime.engine import Engine

log = logging.getLogger(__name__)

Sink = Callable[[RequestOutput | Exception], object]
_LINGER_SECONDS = 1.0  # idle time before the thread lets go of the engine


class Stepper:
    """Passes requests to an engine, and their outputs to each caller's sink.

    step_since: start of the current step (`time.monotonic`), None between steps. failures:
    consecutive steps that raised.
    """

    def __init__(self, engine: "Engine", thread: OwnThread) -> None:
        """thread: on which the engine's runner was opened."""
        self._engine, self.thread = engine, thread
        self._changed = threading.Condition()
        self._commands: list[Callable[[], object]] = []
        self._sinks: dict[int, Sink] = {}
        self._running = False
        self.step_since: float | None = None
        self.failures = 0

    def submit(self, request: GenerationRequest, sink: Sink) -> None:
        """Run a request. sink: called on the stepping thread with each output (the last has a
        finish reason), or with the exception that a step or the engine raised. Raises WrongThread
        in a fork of the process, and once the program ends.
        """
        self._ask(lambda: self._submit(request, sink))

    def cancel(self, request_id: int, sink: Sink) -> None:
        """Cancel a request if it was submitted with this sink, which is not called again."""
        self._ask(lambda: self._cancel(request_id, sink))

    def _ask(self, command: Callable[[], object]) -> None:
        self.thread.check()
        with self._changed:
            self._commands.append(command)
            self._changed.notify()
            if not self._running:
                self._running = True
                self.thread.start(self._run)

    def _submit(self, request: GenerationRequest, sink: Sink) -> None:
        try:
            self._engine.submit(request)
        except VignetteError as error:
            _tell(sink, error)
        except BaseException as error:  # internal, and this request's only: no step has failed
            failed = ComputationFailed(f"the request could not be begun: {error!r}")
            failed.__cause__ = error
            _tell(sink, failed)
        else:
            self._sinks[request.id] = sink

    def _cancel(self, request_id: int, sink: Sink) -> None:
        if self._sinks.get(request_id) is sink:
            del self._sinks[request_id]
            self._engine.cancel(request_id)

    @property
    def busy(self) -> bool:
        """Whether somebody waits for a request that has been begun."""
        return bool(self._sinks)

    def _run(self) -> None:
        while self._take():
            if self._sinks:  # else the engine may run another thread's requests
                self._step()

    def _take(self) -> bool:
        """Run pending commands; if nothing runs, wait for some. False on a timeout."""
        with self._changed:
            if not self._sinks:
                self._changed.wait_for(lambda: self._commands, _LINGER_SECONDS)
                if not self._commands:
                    self._running = False
                    return False
            commands, self._commands = self._commands, []
        for command in commands:
            try:
                command()
            except BaseException as error:  # internal: who waits must not wait for ever
                log.exception("an error between two steps")
                self._fail(error)
        return True

    def _fail(self, cause: BaseException) -> None:
        """End all requests with an error."""
        error = cause if isinstance(cause, Exception) else ComputationFailed(f"{cause!r} in a step")
        sinks, self._sinks = self._sinks, {}
        self._engine.abandon()
        for sink in sinks.values():
            _tell(sink, error)

    def _step(self) -> None:
        self.step_since = time.monotonic()
        try:
            with self.thread.inside():
                outputs = self._engine.step()
        except BaseException as error:  # an observer's exit, too: the thread serves the others
            self.failures += 1
            self._fail(error)
            return
        finally:
            self.step_since = None
        self.failures = 0
        for output in outputs:
            ended = output.finish_reason is not None
            sink = self._sinks.pop(output.id) if ended else self._sinks[output.id]
            _tell(sink, output)


def _tell(sink: Sink, news: RequestOutput | Exception) -> None:
    """Call a sink; its error is its own, and must not end the thread that serves the others."""
    try:
        sink(news)
    except BaseException:
        log.exception("a request's output could not be handed on")
