"""A cache of outputs for images that were sent before; off by default, bounded in bytes.

A request that is identical to one in flight waits for that one's output (single flight).
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from runtime.request import RequestOutput, SamplingParams, Timing

# Model name, engine identity, digest of the images, prompt tokens, sampling parameters.
Key = tuple[str, str, str, tuple[int, ...], SamplingParams]
_PATIENCE_SECONDS = 2.0  # to wait for an identical request in flight before running our own
_TOKEN_BYTES, _TOP_BYTES = 120, 130  # per token with its log-probability; per top candidate
_ENTRY_BYTES = 600  # per text without its tokens: measured as tuples, ints and the dict's share


class OutputCache:
    """The most recently used outputs."""

    def __init__(self, limit: int) -> None:
        """Keep at most `limit` bytes."""
        self._limit, self.size = limit, 0
        self._entries: OrderedDict[Key, RequestOutput] = OrderedDict()
        self._flights: dict[Key, asyncio.Future[RequestOutput]] = {}

    async def get(self, key: Key, make: Callable[[], Awaitable[RequestOutput]]) -> RequestOutput:
        """The cached output for `key`, with no time in any stage, or else what `make` returns.

        Errors of `make` are not cached.

        A request starts its own flight if the one it waits for fails, is cancelled or expires.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + _PATIENCE_SECONDS
        while True:
            if key in self._entries:
                self._entries.move_to_end(key)
                return replace(self._entries[key], timing=Timing())
            if key not in self._flights or self._flights[key].done():
                return await self._fly(key, make)
            landed, _ = await asyncio.wait([self._flights[key]], timeout=end - loop.time())
            if not landed:  # the flight may wait for its client's turn, or for longer
                found = await make()
                self._keep(key, found)
                if (flight := self._flights.get(key)) is not None:
                    flight.cancel()  # its waiters find this output
                return found

    async def _fly(self, key: Key, make: Callable[[], Awaitable[RequestOutput]]) -> RequestOutput:
        landed: asyncio.Future[RequestOutput] = asyncio.get_running_loop().create_future()
        self._flights[key] = landed
        try:
            found = await make()
        finally:
            if self._flights.get(key) is landed:
                del self._flights[key]
            landed.cancel()
        self._keep(key, found)
        return found

    def _keep(self, key: Key, output: RequestOutput) -> None:
        if (before := self._entries.pop(key, None)) is not None:  # two were made side by side
            self.size -= _bytes(key, before)
        self._entries[key] = output
        self.size += _bytes(key, output)
        while self.size > self._limit:
            old, gone = self._entries.popitem(last=False)
            self.size -= _bytes(old, gone)


def _bytes(key: Key, output: RequestOutput) -> int:
    texts = (output.completion, *output.others)
    _, _, _, prompt_ids, _ = key
    tokens = len(prompt_ids) + sum(len(text.token_ids) for text in texts)
    tops = sum(len(top) for text in texts for top in text.top_logprobs)
    return _ENTRY_BYTES * len(texts) + _TOKEN_BYTES * tokens + _TOP_BYTES * tops
