"""Captions of images that were sent before, off by default, bounded in bytes.

Requests for an image that is being captioned already wait for that caption (single flight).
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import replace

from runtime.request import Caption

Key = tuple[str, str | None, int | None]  # digest of the images, prompt, most new tokens
Found = tuple[Caption, float]
_PATIENCE_SECONDS = 2.0  # with another's flight, before one starts one's own
_ENTRY_BYTES = 600  # of an entry without its texts: measured as tuples, ints and the dict's share


class CaptionCache:
    """The captions that were asked for last. One model serves, so it is not part of the key."""

    def __init__(self, limit: int) -> None:
        """Keep at most `limit` bytes."""
        self._limit, self.size = limit, 0
        self._entries: OrderedDict[Key, Caption] = OrderedDict()
        self._flights: dict[Key, asyncio.Future[Found]] = {}

    async def get(self, key: Key, make: Callable[[], Awaitable[Found]]) -> Found:
        """The caption for `key`, made if it is not known: then it took no time in any stage.

        What `make` raises is not kept.

        Who waits for another's flight and sees it cancelled or expired starts one of their own.
        """
        while True:
            if key in self._entries:
                self._entries.move_to_end(key)
                known = self._entries[key]
                return replace(known, queue_s=0.0, encode_s=0.0, decode_s=0.0), 0.0
            if key not in self._flights:
                return await self._fly(key, make)
            landed, _ = await asyncio.wait([self._flights[key]], timeout=_PATIENCE_SECONDS)
            if not landed:  # it waits for its own client's turn, or has less of a hurry
                return await make()

    async def _fly(self, key: Key, make: Callable[[], Awaitable[Found]]) -> Found:
        landed: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        self._flights[key] = landed
        try:
            found = await make()
        finally:
            del self._flights[key]
            landed.cancel()
        self._keep(key, found[0])
        return found

    def _keep(self, key: Key, caption: Caption) -> None:
        self._entries[key] = caption
        self.size += _bytes(key, caption)
        while self.size > self._limit:
            old, gone = self._entries.popitem(last=False)
            self.size -= _bytes(old, gone)


def _bytes(key: Key, caption: Caption) -> int:
    texts = len(key[0]) + 4 * len(key[1] or "") + 4 * len(caption.text)
    return _ENTRY_BYTES + texts + 36 * len(caption.token_ids)
