"""Turns of the event loop."""

import asyncio
from collections import OrderedDict, deque


class Turns:
    """Each turn of the event loop is for one caller, and clients take them round robin: one with
    many requests at once delays another by one of them. Used on the event loop's thread only.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._taken = False

    async def take(self, client: str) -> None:
        """Wait for a turn, which lasts until the caller awaits something else."""
        loop = asyncio.get_running_loop()
        if not self._taken:
            self._taken = True
            loop.call_soon(self._pass_on)
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        await turn

    def _pass_on(self) -> None:
        while self._waiting:
            client, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns  # at the end
            if not turn.done():  # done: it was cancelled
                turn.set_result(None)
                asyncio.get_running_loop().call_soon(self._pass_on)
                return
        self._taken = False
