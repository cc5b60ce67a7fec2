"""Threads that share an engine: one of them steps it for all, and the others wait."""

import threading
from collections.abc import Callable

from runtime.errors import WrongThread
from runtime.request import Request, Sequence


class Call:
    """What one caller wants captioned, and how that stands."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        self.sequences: list[Sequence] = []
        self.error: Exception | None = None

    @property
    def over(self) -> bool:
        """Whether nothing is left to do for it."""
        ended = bool(self.sequences) and all(s.finish_reason is not None for s in self.sequences)
        return ended or self.error is not None


class Callers:
    """Runs the requests of any number of threads together. A step is never run by two at a time."""

    def __init__(
        self,
        add: Callable[[Request], Sequence],
        step: Callable[[], object],
        abandon: Callable[[], None],
    ) -> None:
        """How to queue a request, to step, and to forget all that was queued."""
        self._add, self._step, self._abandon = add, step, abandon
        self._changed = threading.Condition()
        self._new: list[Call] = []
        self._running: list[Call] = []
        self._stepped_by: int | None = None  # a thread that steps for all callers
        self._owner: int | None = None  # a thread that steps by itself

    def claim(self) -> None:
        """This thread, and no other, steps by itself from now on. Raises WrongThread."""
        with self._changed:
            self._check(self._owner, self._stepped_by)
            self._owner = threading.get_ident()

    def release(self) -> None:
        """Any thread may step, or call, again."""
        self._owner = None

    @staticmethod
    def _check(*threads: int | None) -> None:
        """Raise WrongThread if one of these is another."""
        if {*threads} - {None, threading.get_ident()}:
            raise WrongThread(
                "another thread uses this engine: call `generate`, which any thread may, or "
                "`submit` and `step` always from the same one"
            )

    def run(self, requests: list[Request]) -> list[Sequence]:
        """The sequences of some requests, once all have ended.

        Raises what a step raised, and WrongThread if another thread steps by itself.
        """
        call = Call(requests)
        with self._changed:
            self._check(self._owner)
            self._new.append(call)
            self._changed.wait_for(lambda: call.over or self._stepped_by is None)
            steps = not call.over
            if steps:
                self._stepped_by = threading.get_ident()
        if steps:
            try:
                while not call.over:
                    self._advance(call)
            finally:
                with self._changed:  # another one steps from here on
                    self._stepped_by = None
                    self._changed.notify_all()
        if call.error is not None:
            raise call.error
        return call.sequences

    def _advance(self, mine: Call) -> None:
        """One step, with what has come since the last one."""
        with self._changed:
            new, self._new = self._new, []
        self._running += new
        try:
            for call in new:
                call.sequences = [self._add(request) for request in call.requests]
            self._step()
        except Exception as error:
            self._abandon()
            for call in self._running:
                call.error = error
        except BaseException:  # this thread is interrupted: the others begin again
            self._abandon()
            with self._changed:
                self._new[:0] = [call for call in self._running if call is not mine]
            self._running = []
            raise
        if any(call.over for call in self._running):
            self._running = [call for call in self._running if not call.over]
            with self._changed:
                self._changed.notify_all()
