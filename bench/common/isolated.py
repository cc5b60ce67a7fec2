"""Runs functions in a fresh process, so that no contestant inherits another's threads or memory."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_SECONDS = 900  # time-out: a function that takes longer hangs


class Failed(RuntimeError):
    """The function raised or timed out, or its process died; the message says why."""


def isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, called in a fresh process. Raises Failed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        if not ours.poll(_SECONDS):
            process.kill()
            raise Failed(f"{function.__name__} took more than {_SECONDS} s")
        worked, result = ours.recv()
    except EOFError:
        process.join()
        raise Failed(f"{function.__name__} died (exit status {process.exitcode})") from None
    process.join()
    if not worked:
        raise Failed(result)
    return result


def _run(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send((True, function(*arguments)))
    except Exception as error:  # any exception is reported to the parent
        pipe.send((False, f"{type(error).__name__}: {error}"))
