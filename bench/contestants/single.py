"""The original's first version: PyTorch behind Tornado, one request at a time.

`python -m bench.contestants.single PORT PRECISION`
"""

import asyncio
import sys

import tornado.web

from bench.contestants.model import TorchCaptioner


class Caption(tornado.web.RequestHandler):
    """Computes on the event loop, so requests queue up behind each other."""

    def initialize(self, model: TorchCaptioner) -> None:
        """Take the model."""
        self._model = model

    def post(self) -> None:
        """Image in the body, caption as JSON."""
        [ids] = self._model.generate([self._model.prepare(self.request.body)])
        self.write({"caption": self._model.text(ids), "tokens": ids})


async def main(port: int, precision: str) -> None:
    """Serve until killed."""
    tornado.web.Application([("/caption", Caption, {"model": TorchCaptioner(precision)})]).listen(
        port, "127.0.0.1"
    )
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
