"""Tasks of one request, side by side or left to themselves."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

_Result = TypeVar("_Result")


async def gather_or_cancel(parts: Iterable[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """What they return, in their order. The first error takes the others back, and is raised once
    they have ended. The event loop turns between their beginnings: reading a prompt takes a while.
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
        while tasks:  # a name of one would hold its error, the error this frame, and that an image
            note_error(tasks.pop())


def _cancel(tasks: "Iterable[asyncio.Task[Any]]") -> None:
    for task in tasks:
        task.cancel()


def note_error(task: "asyncio.Future[Any]") -> None:
    """Ask for the error of a task that has ended, or asyncio logs that nobody did."""
    if not task.cancelled():
        task.exception()
