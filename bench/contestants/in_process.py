"""Vignette's engine in one process with its HTTP server: what splitting the service must not cost.

`python -m bench.baselines.in_process PORT ENGINE`: raw images on /caption, decoded in threads, the
engine in a thread of its own. No limits, no checks, nothing that survives a crash.
"""

import asyncio
import json
import os
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import tornado.web

from bench.common.settings import TOKENS
from runtime.engine import Engine
from runtime.model.preprocess import preprocess
from runtime.request import Sequence

Job = tuple[np.ndarray, "asyncio.Future[dict[str, Any]]"]


class Owner(threading.Thread):
    """The thread that owns the engine."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(daemon=True)
        self.inbox: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._engine, self._loop = engine, loop

    def run(self) -> None:
        """Take in, step, answer."""
        waiting: dict[Sequence, asyncio.Future[dict[str, Any]]] = {}
        while True:
            while self._engine.scheduler.idle or not self.inbox.empty():
                pixels, future = self.inbox.get()
                waiting[self._engine.submit(pixels, max_new_tokens=TOKENS)] = future
            for sequence in self._engine.step():
                answer = asdict(self._engine.caption(sequence))
                self._loop.call_soon_threadsafe(waiting.pop(sequence).set_result, answer)


class CaptionHandler(tornado.web.RequestHandler):
    """POST /caption."""

    def initialize(self, owner: Owner, engine: Engine, pool: ThreadPoolExecutor) -> None:
        """Keep the parts."""
        self._owner, self._engine, self._pool = owner, engine, pool

    async def post(self) -> None:
        """Decode, caption, answer."""
        loop = asyncio.get_running_loop()
        how = self._engine.manifest.preprocessing
        pixels = await loop.run_in_executor(self._pool, preprocess, self.request.body, how)
        future: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._owner.inbox.put((pixels, future))
        answer = await future
        self.finish(json.dumps({"caption": answer["text"]}))


async def main(port: int, folder: str) -> None:
    """Serve for good."""
    engine = Engine.open(folder)
    owner = Owner(engine, asyncio.get_running_loop())
    owner.start()
    parts = {
        "owner": owner,
        "engine": engine,
        "pool": ThreadPoolExecutor(os.cpu_count()),
    }
    tornado.web.Application([("/caption", CaptionHandler, parts)]).listen(port, "127.0.0.1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
