"""Servers of images, and a fetcher that takes them for ok.example."""

import asyncio
import contextlib
import gzip
import socket
import threading

import tornado.httpserver
import tornado.netutil
import tornado.web

from server.images.fetch import Fetcher
from server.images.hosts import PublicHosts


class Local(PublicHosts):
    """Checks its answers, one at each look-up and the last one forever, then leads to this host."""

    def __init__(self, *answers):
        super().__init__()
        self._answers = list(answers)

    def _addresses(self, host):
        return [self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]]

    async def look_up(self, host, client, seconds):
        self._known.clear()
        await super().look_up(host, client, seconds)
        return ["127.0.0.1"]


MOVED = {
    "away": "https://evil.example/x",
    "on": "/image",
    "around": "/around",
    "inward": "https://127.0.0.1/secret",
}


class Site(tornado.web.RequestHandler):
    async def get(self, what):
        if what == "image":
            self.write(b"the image")
        elif what == "large":
            self.write(b"x" * 5000)
        elif what == "streamed":
            for _ in range(2):
                self.write(b"x" * 600)
                await self.flush()
        elif what == "packed":
            self.set_header("Content-Encoding", "gzip")
            self.write(gzip.compress(b"the image" * int(self.get_argument("times", "1"))))
        elif what == "nowhere":
            self.set_status(302)
        elif what == "lines":
            for number in range(300):
                self.set_header(f"X-{number}", "y")
        elif what == "slow":
            await self.settings["over"].wait()
        elif what in MOVED:
            self.redirect(MOVED[what])
        else:
            raise tornado.web.HTTPError(404)


@contextlib.contextmanager
def site(context):
    """Port of a server of `Site`, and the event after which its slow answers come."""
    over = asyncio.Event()
    app = tornado.web.Application([(r"/(\w+)", Site)], over=over)
    server = tornado.httpserver.HTTPServer(app, ssl_options=context)
    sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    try:
        yield sockets[0].getsockname()[1], over
    finally:
        over.set()
        server.stop()


def fetcher_of(port, *answers, limit=1000):
    return Fetcher(("ok.example", ".ok.example"), limit, Local(*answers or ["93.184.216.34"]), port)


@contextlib.contextmanager
def answering(serve):
    """Port of a server that calls `serve` with its only connection, on a thread."""

    def accept():
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):  # it may be hung up on
            serve(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=accept)
        thread.start()
        yield listening.getsockname()[1]
        thread.join(10)
