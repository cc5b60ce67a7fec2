"""An engine for asyncio: any number of tasks iterate over the outputs of their requests."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from weakref import WeakKeyDictionary, ref

from runtime.engine import Engine
from runtime.errors import WrongThread
from runtime.request import Caption, GenerationRequest, RequestOutput

_News = RequestOutput | Exception


class AsyncEngine:
    """Runs requests of tasks from one or several event loops in one batch."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox]
        self._mailboxes = WeakKeyDictionary()
        self._lock = threading.Lock()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's outputs as they come; the last one has a finish reason.

        Cancelling the task, or closing the iterator, cancels the request. Re-raises step errors,
        and raises WrongThread in a callback of the engine.
        """
        if self.engine.stepper.thread.is_current:
            raise WrongThread("a callback of the engine can't wait for it: use another thread")
        mailbox = self._mailbox(asyncio.get_running_loop())
        news: asyncio.Queue[_News] = asyncio.Queue()
        stepper, ended = self.engine.stepper, False
        sink = partial(mailbox.put, news)
        stepper.submit(request, sink)
        try:
            while not ended:
                output = await news.get()
                ended = isinstance(output, Exception) or output.finish_reason is not None
                if isinstance(output, Exception):
                    raise output
                yield output
        finally:
            if not ended:
                stepper.cancel(request.id, sink)

    def _mailbox(self, loop: asyncio.AbstractEventLoop) -> "_Mailbox":
        with self._lock:
            # News that found its loop closed holds it, by the queue of whom it was for.
            for closed in [each for each in self._mailboxes if each.is_closed()]:
                del self._mailboxes[closed]
            return self._mailboxes.setdefault(loop, _Mailbox(loop))

    async def caption(self, request: GenerationRequest) -> Caption:
        """Caption a request to its end. Raises ComputationFailed, and re-raises step errors."""
        outputs = [output async for output in self.generate(request)]
        return self.engine.caption(request, *outputs)


class _Mailbox:
    """Carries outputs to an event loop, those of one step in one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)  # weak, because the loop is the key of a WeakKeyDictionary
        self._news: deque[tuple[asyncio.Queue[_News], _News]] = deque()
        self._called = False

    def put(self, queue: "asyncio.Queue[_News]", news: _News) -> None:
        """Called on the stepping thread."""
        self._news.append((queue, news))
        if self._called:
            return
        self._called = True
        with suppress(RuntimeError):  # the loop is closed
            if (loop := self._loop()) is not None:
                loop.call_soon_threadsafe(self._deliver)
                return
        self._called = False
        self._news.clear()  # no task waits

    def _deliver(self) -> None:
        self._called = False
        while self._news:
            queue, news = self._news.popleft()
            queue.put_nowait(news)
