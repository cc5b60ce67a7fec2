"""Senders of attacks, in a process of their own."""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event

from bench.reliability.attacks import prepare, send

_NICENESS = 10  # real attackers do not share the server's cores
_READY_SECONDS = 120


def _assault(
    names: list[str], port: int, count: int, ready: Event, over: Event, sent: Synchronized
) -> None:
    """The attackers' process: `count` senders, each taking the attacks in turn. sent: counts."""
    os.nice(_NICENESS)
    threading.excepthook = _end_with_a_failure
    prepare(names)

    def attack(first: int) -> None:
        number = first
        while not over.is_set():
            with contextlib.suppress(OSError):  # no connection
                send(names[number % len(names)], port)
                with sent.get_lock():
                    sent.value += 1
            number += 1

    for first in range(count):
        threading.Thread(target=attack, args=(first,), daemon=True).start()
    ready.set()
    over.wait()
    os._exit(0)  # drop what is still being sent


def _end_with_a_failure(raised: threading.ExceptHookArgs) -> None:
    traceback.print_exception(raised.exc_value)
    os._exit(1)


@contextmanager
def assault(
    names: list[str], port: int, count: int
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Run attackers in another process until the block ends; yields a context that pauses them.

    Raises RuntimeError if they failed, or no attack reached the server.
    """
    context = multiprocessing.get_context("spawn")
    ready, over, sent = context.Event(), context.Event(), context.Value("q", 0)
    arguments = names, port, count, ready, over, sent
    process = context.Process(target=_assault, args=arguments, daemon=True)
    process.start()
    assert ready.wait(_READY_SECONDS), "the attackers did not start"

    @contextmanager
    def still() -> Iterator[None]:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(process.pid, signal.SIGCONT)

    try:
        yield still
    finally:
        over.set()
        process.join(10)
        process.kill()
    if process.exitcode or not sent.value:
        raise RuntimeError(f"{sent.value} attacks were sent, exit status {process.exitcode}")
