"""Servers of images, and a fetcher that takes them for ok.example."""

import asyncio
import contextlib
import socket
import ssl
import threading

import tornado.httpserver
import tornado.netutil
import tornado.web
from tornado.netutil import Resolver

from server.images.fetch import Fetcher
from server.images.hosts import PublicResolver


class Names(Resolver):
    """A resolver that gives its next answer at each query, the last one forever."""

    def initialize(self, answers):
        self.answers = list(answers)
        self.asked = []

    async def resolve(self, host, port, family=0):
        self.asked.append(host)
        address = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [(socket.AF_INET, (address, port))]


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
        elif what == "padded":
            self.set_status(302)
            self.set_header("Location", "/image")
            self.write(b"x" * 5000)
        elif what == "bytes":
            for _ in range(600):
                self.write(b"x")
                await self.flush()
        elif what == "lines":
            for number in range(300):
                self.set_header(f"X-{number}", "y")
        elif what == "slow":
            await self.settings["over"].wait()
        elif what in MOVED:
            self.redirect(MOVED[what])
        else:
            raise tornado.web.HTTPError(404)


class Local(PublicResolver):
    """Checks addresses as always, then connects to the test's own server."""

    def initialize(self, inner, port):
        super().initialize(inner=inner)
        self._port = port

    async def resolve(self, host, port, family=0):
        await super().resolve(host, port, family)
        return [(socket.AF_INET, ("127.0.0.1", self._port))]


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


@contextlib.contextmanager
def fetcher_of(port, *answers, limit=1000):
    names = Names(answers=answers or ["93.184.216.34"])
    fetcher = Fetcher(("ok.example",), limit, Local(names, port))
    tls = fetcher._client["ssl_options"]  # the site's certificate is its own
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    with contextlib.closing(fetcher):
        yield fetcher


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
