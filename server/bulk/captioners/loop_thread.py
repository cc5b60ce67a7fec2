"""An event loop on a thread of its own, for programs made of threads."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class LoopThread:
    """Runs coroutines for any number of threads."""

    def __init__(self, name: str) -> None:
        self._loop, self._lock, self._closed = asyncio.new_event_loop(), threading.Lock(), False
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run a coroutine to its end; if the waiting thread is interrupted, cancel it.

        Raises CancelledError if the loop is closed meanwhile, RuntimeError if it was before.
        """
        with self._lock:
            if self._closed:
                work.close()
                raise RuntimeError("the loop is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the thread, and whatever runs there."""
        with self._lock:
            self._closed = True
            ending = asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop)
        ending.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    """Cancel all other tasks of this loop, and wait for their ends."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
