"""The original's last version: PyTorch behind Tornado with a micro-batch queue.

Requests that arrive within 1 ms are captioned together, at most 64 images.

`python -m bench.contestants.batched PORT PRECISION`
"""

import asyncio
import sys

import tornado.web

from bench.contestants.model import TorchCaptioner

_WINDOW = 0.001  # seconds
_MOST = 64  # images per batch

Job = tuple[bytes, asyncio.Future[list[int]]]


class Caption(tornado.web.RequestHandler):
    """Queues the request and waits for its batch."""

    def initialize(self, model: TorchCaptioner, queue: asyncio.Queue[Job]) -> None:
        """Take model and queue."""
        self._model, self._queue = model, queue

    async def post(self) -> None:
        """Image in the body, caption as JSON."""
        done: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        await self._queue.put((self.request.body, done))
        ids = await done
        self.write({"caption": self._model.text(ids), "tokens": ids})


async def _batches(model: TorchCaptioner, queue: asyncio.Queue[Job]) -> None:
    while True:
        batch = [await queue.get()]
        await asyncio.sleep(_WINDOW)
        while len(batch) < _MOST and not queue.empty():
            batch.append(queue.get_nowait())
        captions = await asyncio.to_thread(_caption, model, [data for data, _ in batch])
        for (_, done), ids in zip(batch, captions, strict=True):
            done.set_result(ids)


def _caption(model: TorchCaptioner, images: list[bytes]) -> list[list[int]]:
    return model.generate([model.prepare(data) for data in images])


async def main(port: int, precision: str) -> None:
    """Serve until killed."""
    model, queue = TorchCaptioner(precision), asyncio.Queue[Job]()
    handlers = [("/caption", Caption, {"model": model, "queue": queue})]
    tornado.web.Application(handlers).listen(port, "127.0.0.1")
    await _batches(model, queue)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
