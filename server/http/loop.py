"""An event loop that is as quick to answer with thousands of busy connections as with few."""

import asyncio
import math
import select
import selectors

_EVENTS = 8  # connections of a turn: each may have sent what takes a millisecond or two


def few_at_a_time() -> asyncio.AbstractEventLoop:
    """An event loop that takes up a few connections a turn.

    asyncio's own takes up all that have something, and comes to its timers, and to anybody else,
    only then: with thousands of connections seconds later. Elsewhere than on Linux it is that one.
    """
    selector = _FewAtATime() if hasattr(select, "epoll") else None
    return asyncio.SelectorEventLoop(selector)


if hasattr(select, "epoll"):

    class _FewAtATime(selectors.EpollSelector):
        """The system tells of the others the next time: those that waited longest come first."""

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            wait = -1.0 if timeout is None else max(0.0, math.ceil(timeout * 1e3) / 1e3)
            try:
                found = self._selector.poll(wait, _EVENTS)  # type: ignore[attr-defined]
            except InterruptedError:
                return []
            ready, keys = [], self.get_map()
            for file, event in found:
                # An error or a hang-up wakes both who reads and who writes.
                reads = selectors.EVENT_READ if event & ~select.EPOLLOUT else 0
                writes = selectors.EVENT_WRITE if event & ~select.EPOLLIN else 0
                if (key := keys.get(file)) is not None:
                    ready.append((key, (reads | writes) & key.events))
            return ready
