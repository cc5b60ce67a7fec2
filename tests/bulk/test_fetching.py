"""Images of web servers that give them slowly, or never, and of what is no file."""

import contextlib
import http.server
import itertools
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.bulk.inputs import fetching, web
from server.bulk.inputs.items import UnfitItem
from tests.support.paths import SAMPLES
from tests.support.web_servers import served

OWL = (SAMPLES / "owl.png").read_bytes()


@pytest.fixture
def slow():
    """A server that sends a byte, or a line, now and then; /redirected has a body without end."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            with contextlib.suppress(OSError):  # who has waited enough hangs up
                getattr(self, self.path.strip("/"))()

        def owl(self):
            self.answer(b"200 OK\r\nContent-Length: %d\r\n\r\n" % len(OWL), OWL)

        def body(self):
            self.answer(b"200 OK\r\nContent-Length: 100000\r\n\r\n", itertools.repeat(b"x"))

        def head(self):
            self.answer(b"200 OK\r\n", itertools.repeat(b"X: y\r\n"))

        def continues(self):
            self.answer(b"100 Continue\r\n\r\n", itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"))

        def broken(self):
            self.answer(b"503 Later\r\nContent-Length: 0\r\n\r\n")

        def redirected(self):
            self.answer(b"302 Found\r\nLocation: owl\r\nContent-Length: 10000000000\r\n\r\n",
                        itertools.repeat(bytes(2**20)), 0)  # fmt: skip

        def around(self):
            self.answer(b"302 Found\r\nLocation: /around\r\nContent-Length: 0\r\n\r\n")

        def answer(self, head, body=(), pause=0.02):
            self.wfile.write(b"HTTP/1.1 " + head)
            if isinstance(body, bytes):
                self.wfile.write(body)
                return
            for piece in body:
                self.wfile.write(piece)
                time.sleep(pause)

    with served(Handler) as url:
        yield url


@pytest.mark.parametrize("what", ["body", "head", "continues"])
def test_a_server_that_drips_has_so_long_and_no_longer(what, slow, monkeypatch):
    monkeypatch.setattr(fetching, "_SECONDS", 0.2)
    with pytest.raises(UnfitItem, match=r"not there after 0\.2 seconds"):
        fetching.fetch(f"{slow}/{what}", 10**6)


@pytest.mark.parametrize("what", ["body", "head", "broken"])
def test_what_is_not_wanted_any_more_is_not_waited_for(what, slow):
    over = threading.Event()
    threading.Timer(0.2, over.set).start()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(fetching.fetch, f"{slow}/{what}", 10**6, over)
        assert isinstance(asked.exception(5), UnfitItem)


def test_a_redirect_is_followed_without_its_body(slow):
    for _ in range(2):
        assert fetching.fetch(f"{slow}/redirected", 10**6) == OWL
    with pytest.raises(UnfitItem, match="led elsewhere more than 10 times"):
        fetching.fetch(f"{slow}/around", 10**6)


def test_a_connection_is_kept_for_the_next_image(slow):
    for _ in range(3):
        assert fetching.fetch(f"{slow}/owl", 10**6) == OWL
    assert web._pool().connection_from_url(slow).num_connections == 1


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("pipe.jpg")
    for name in ("pipe.jpg", "link.jpg", "."):
        with pytest.raises(UnfitItem, match="is no regular file"):
            fetching.fetch(str(tmp_path / name), 10**6)


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tenacity", None)
    with pytest.raises(fetching.NoWay, match=r"install the extra \[bulk\]"):
        fetching.fetch("https://example.org/a.png", 1000)
