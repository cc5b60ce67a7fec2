"""Concurrent asyncio tasks of one request."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_Error = TypeVar("_Error", bound=BaseException)


async def gather_or_cancel(parts: Iterable[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """Run coroutines concurrently; return their results in order. The first error cancels the
    others, and is raised once they have ended. The event loop turns between their starts, because
    reading a prompt takes a while.
    """
    tasks: list[asyncio.Task[_Result]] = []
    try:
        for part in parts:
            tasks.append(asyncio.create_task(part))
            await asyncio.sleep(0)
        return list(await asyncio.gather(*tasks))
    finally:
        _cancel(tasks)
        if tasks:
            await asyncio.wait(tasks)
        while tasks:  # unnamed: a task holds its error, which holds this frame and an image
            retrieve_error(tasks.pop())


def _cancel(tasks: "Iterable[asyncio.Task[Any]]") -> None:
    for task in tasks:
        task.cancel()


def strip_error(error: _Error) -> _Error:
    """The error without its traceback, cause and context, whose frames hold what it was about."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def strip_future_error(future: "asyncio.Future[Any]") -> None:
    """Strip the error of a finished future that its frames refer to: the cycle would hold them
    until a full garbage collection.
    """
    if not future.cancelled() and (error := future.exception()) is not None:
        strip_error(error)


def retrieve_error(task: "asyncio.Future[Any]") -> None:
    """Retrieve the exception of a finished task, or asyncio logs that it was never retrieved."""
    if not task.cancelled():
        task.exception()
