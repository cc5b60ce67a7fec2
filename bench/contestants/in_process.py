"""Vignette's engine and an HTTP server in one process: the reference for the split service.

`python -m bench.contestants.in_process PORT ENGINE`: raw images on /caption, decoded in threads. No
limits, no validation, no crash recovery.
"""

import asyncio
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import tornado.web

from bench.common.settings import TOKENS
from runtime.async_engine import AsyncEngine
from runtime.engine import Engine
from runtime.model.preprocess import preprocess


class CaptionHandler(tornado.web.RequestHandler):
    """POST /caption."""

    def initialize(self, engine: AsyncEngine, pool: ThreadPoolExecutor) -> None:
        """Take engine and thread pool."""
        self._engine, self._pool = engine, pool

    async def post(self) -> None:
        """Decode, caption, answer."""
        loop, engine = asyncio.get_running_loop(), self._engine.engine
        how = engine.manifest.preprocessing
        pixels = await loop.run_in_executor(self._pool, preprocess, self.request.body, how)
        caption = await self._engine.caption(engine.request(pixels, max_new_tokens=TOKENS))
        self.finish(json.dumps({"caption": caption.text}))


async def main(port: int, folder: str) -> None:
    """Serve until killed."""
    engine = AsyncEngine(Engine.open(folder))
    parts = {"engine": engine, "pool": ThreadPoolExecutor(os.cpu_count())}
    tornado.web.Application([("/caption", CaptionHandler, parts)]).listen(port, "127.0.0.1")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
