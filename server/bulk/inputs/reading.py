"""Reads items on a thread, so that rows are written while standard input is silent."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from queue import SimpleQueue

from server.bulk.inputs.items import Item

_END_SECONDS = 0.5  # to end in; a thread that waits for input can't, and ends with the program


class ItemReader:
    """Takes items from an iterable, one for each call of `next`, on a thread."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self._wanted = SimpleQueue[Future[Item | None] | None]()
        self._thread = threading.Thread(target=self._read, name="input", daemon=True)
        self._thread.start()

    def next(self, read: Callable[[Future[Item | None]], object]) -> Future[Item | None]:
        """The next item, once it is read: None after the last. Its error is the iterable's.

        read: called then, on the thread.
        """
        future = Future[Item | None]()
        future.add_done_callback(read)
        self._wanted.put(future)
        return future

    def close(self) -> None:
        """End the thread, unless it waits for input."""
        self._wanted.put(None)
        self._thread.join(_END_SECONDS)

    def _read(self) -> None:
        while (future := self._wanted.get()) is not None:
            try:
                future.set_result(next(self._items, None))
            except BaseException as error:  # raised where the item is waited for
                future.set_exception(error)
