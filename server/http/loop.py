"""An event loop that responds as fast with thousands of busy connections as with few."""

import asyncio
import math
import select
import selectors

_EVENTS = 8  # connections per turn: each may have sent a millisecond or two of work


def few_at_a_time() -> asyncio.AbstractEventLoop:
    """An event loop that handles a few ready connections a turn.

    asyncio's own loop handles all ready connections before its timers and everything else: with
    thousands of connections, seconds later. Where there is no epoll, asyncio's own is returned.
    """
    selector = _FewAtATime() if hasattr(select, "epoll") else None
    return asyncio.SelectorEventLoop(selector)


if hasattr(select, "epoll"):

    class _FewAtATime(selectors.EpollSelector):
        """Polls for a few events; epoll reports the others next time, longest waiting first."""

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            wait = -1.0 if timeout is None else max(0.0, math.ceil(timeout * 1e3) / 1e3)
            try:
                found = self._selector.poll(wait, _EVENTS)  # type: ignore[attr-defined]
            except InterruptedError:
                return []
            ready, keys = [], self.get_map()
            for file, event in found:
                # An error or a hang-up wakes both readers and writers.
                reads = selectors.EVENT_READ if event & ~select.EPOLLOUT else 0
                writes = selectors.EVENT_WRITE if event & ~select.EPOLLIN else 0
                if (key := keys.get(file)) is not None:
                    ready.append((key, (reads | writes) & key.events))
            return ready
