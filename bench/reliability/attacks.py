"""Attack traffic: one function for each kind of attack."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from bench.reliability.crafted import (
    broken_giant,
    late_clip,
    scans,
    strips,
    tags,
    unpacking,
)

_IMAGE_HEAD = b"Content-Type: image/jpeg"
_JSON_HEAD = b"Content-Type: application/json"
_SAMPLES = Path("demo/samples")
_LARGE = 9_800_000  # bytes, just below the limit
_LONG = 15_000  # characters of a header, as a whole head may have
_LEFT_SECONDS = 0.25
_ELSEWHERE = "127.0.0.2", 0  # clients that leave have to wait, and all others of the same address
_BURSTING = "127.0.0.3", 0
PROXY = "127.0.0.9"  # that the service trusts


def post(port: int, head: bytes, body: bytes, read: bool = True, wait: float = 60) -> bytes:
    """Send one request by hand; the start of its answer, or nothing if it was cut off.

    read: take the answer; if not, leave it unread for five seconds and close. Raises OSError if
    there is no connection.
    """
    client = socket.create_connection(("127.0.0.1", port))
    with contextlib.suppress(OSError), client:
        client.settimeout(wait)
        with contextlib.suppress(OSError):
            client.sendall(
                b"POST /caption HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n"
                b"Content-Length: %d\r\n\r\n" % (head, len(body)) + body
            )
        if not read:
            time.sleep(5)
            return b""
        answer = client.recv(2**16)
        while client.recv(2**20):
            pass
        return answer
    return b""


def _boundary(port: int) -> None:
    post(port, b"Content-Type: multipart/form-data; boundary=x" + b"-" * _LONG, b"-" * 250_000)


def _parameters(port: int) -> None:
    post(port, b'Content-Type: multipart/form-data; a="' + b";" * _LONG, b"x")


def _form(port: int) -> None:
    kind = b"Content-Type: multipart/form-data; boundary=" + b"-" * 70
    post(port, kind, (b"\r\n--" + b"-" * 69) * (_LARGE // 73))


def _tiny_chunks(port: int) -> None:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(60)
        head = b"POST /caption HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.sendall(head + b"1\r\nx\r\n" * 200_000)
        client.recv(1000)


def _accept(port: int) -> None:
    image = (_SAMPLES / "owl.png").read_bytes()
    post(port, b"Content-Type: image/png\r\nAccept: " + b"," * _LONG, image)


def _slow_heads(port: int) -> None:
    """Paths and hosts that take long to match with regular expressions."""
    for line in (b"/v2/models/" + b"%C3%A9" * 9_000, b"/ HTTP/1.1\r\nHost: " + b":" * 56_000):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(60)
            client.sendall(b"GET " + line + b"\r\nX: y\r\n\r\n")
            client.recv(1000)


def _left(port: int) -> None:
    """Ask for a caption and leave before the answer."""
    image = (_SAMPLES / "owl.png").read_bytes()
    head = b"POST /caption?min_new_tokens=20 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), source_address=_ELSEWHERE) as client,
    ):
        client.sendall(head % len(image) + image)
        time.sleep(_LEFT_SECONDS)


def _resets(port: int) -> None:
    """Leave with answers unread, which resets the connections."""
    with contextlib.ExitStack() as clients:
        for _ in range(40):
            client = socket.create_connection(("127.0.0.1", port), source_address=_ELSEWHERE)
            clients.enter_context(client).sendall(
                b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\nGET /nope HTTP/1.1\r\nHost: x\r\n\r\n"
            )
        time.sleep(_LEFT_SECONDS)


def _crowd(port: int) -> None:
    """Ask for many captions at once, from two addresses."""
    image = (_SAMPLES / "owl.png").read_bytes()
    head = b"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(image)
    with contextlib.ExitStack() as clients:
        asking = []
        for number in range(40):
            source = f"127.0.1.{1 + number % 2}", 0
            client = socket.create_connection(("127.0.0.1", port), source_address=source)
            asking.append(clients.enter_context(client))
            client.settimeout(60)
            client.sendall(head + image)
        for client in asking:
            client.recv(2**16)


def _trickled(port: int) -> None:
    """Send much of a body, then a few bytes a second."""
    with socket.create_connection(("127.0.0.1", port), source_address=_ELSEWHERE) as client:
        client.sendall(b"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Length: 400000\r\n\r\n")
        client.sendall(bytes(262_200))
        for _ in range(10):
            time.sleep(0.3)
            client.sendall(b"x")


def _dripped(port: int, sender: tuple[str, int] = _ELSEWHERE, told: bytes = b"") -> None:
    """A hundred bodies, a byte of each every 20 ms. told: more lines of their heads."""
    head = b"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Length: 400000\r\n" + told + b"\r\n"
    with contextlib.ExitStack() as clients:
        sending = [
            clients.enter_context(
                socket.create_connection(("127.0.0.1", port), source_address=sender)
            )
            for _ in range(100)
        ]
        for client in sending:
            client.sendall(head)
        for _ in range(100):
            time.sleep(0.02)
            for client in sending:
                client.sendall(b"x")


def _queries(port: int) -> None:
    """Pages that there are not, with long queries."""
    with socket.create_connection(("127.0.0.1", port), source_address=_ELSEWHERE) as client:
        client.settimeout(60)
        client.sendall(b"GET /nope?a=" + b"%41" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        client.recv(2**16)


def _heads(port: int) -> None:
    """Send heads of many lines, of no host, and with a long query, and leave at once."""
    heads = (
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"X-Y: z\r\n" * 190,
        b"GET / HTTP/1.1\r\nX-Y: z\r\n",
        b"POST /caption?prompt=" + b"%41" * 5000 + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n",
    )
    for head in heads * 16:
        with socket.create_connection(("127.0.0.1", port), source_address=_ELSEWHERE) as client:
            client.sendall(head + b"\r\n")


def _clips(port: int) -> None:
    """A clip that is a list of addresses to listen at."""
    listen = b"v=0\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 50004 RTP/AVP 26\r\n"
    _captioned_elsewhere(port, b"video/mp4", listen)


def _captioned_elsewhere(port: int, kind: bytes, body: bytes) -> None:
    """Post an image or clip from an address of its own; read the start of the answer."""
    head = b"POST /caption?first_frame=true HTTP/1.1\r\nHost: x\r\nContent-Type: " + kind
    with socket.create_connection(("127.0.0.1", port), source_address=_ELSEWHERE) as client:
        client.settimeout(60)
        client.sendall(head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        client.recv(2**16)


def _slow_clip(port: int) -> None:
    """A clip of seconds of a core; one that is a little different each time."""
    mark = os.urandom(8)
    _captioned_elsewhere(port, b"video/mp4", late_clip() + b"\0\0\0\x10free" + mark)


def _broken_giant(port: int) -> None:
    """An image of 25 megapixels that turns out to be damaged, a second after the last."""
    _captioned_elsewhere(port, b"image/png", broken_giant())
    time.sleep(0.8)


def _pages(port: int) -> None:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(60)
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        client.shutdown(socket.SHUT_WR)
        while client.recv(2**20):
            pass


def _bursts(port: int) -> None:
    """A page on each of a hundred open connections at the same moment, three times."""
    with contextlib.ExitStack() as clients:
        asking = [
            clients.enter_context(
                socket.create_connection(("127.0.0.1", port), source_address=_BURSTING)
            )
            for _ in range(100)
        ]
        for _ in range(3):
            for client in asking:
                client.settimeout(60)
                with contextlib.suppress(OSError):  # it was closed for others
                    client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            for client in asking:
                with contextlib.suppress(OSError):
                    client.recv(2**16)
            time.sleep(1)


def _ahead(port: int) -> None:
    """Refused requests by the thousand, from a client that leaves after the first answer."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(60)
        client.sendall(b"PROPFIND / HTTP/1.1\r\nHost: x\r\n\r\n" * 3000)
        client.recv(100)


@cache
def _many_keys() -> bytes:
    return b"{%s}" % b",".join(b'"%d":1' % n for n in range(900_000))


@cache
def _many_strings() -> bytes:
    return b'{"image":[%s""]}' % (b'"abc",' * (_LARGE // 6 - 10))


@cache
def _escapes() -> bytes:
    return b'{"image":"%s"}' % (b"\\u0041" * (_LARGE // 6 - 10))


@cache
def _long_key() -> bytes:
    return json.dumps({"\x7f" * _LARGE: 1}, ensure_ascii=False).encode()


_BODIES: dict[str, tuple[bytes, Callable[[], bytes]]] = {
    "keys": (_JSON_HEAD, _many_keys),
    "strings": (_JSON_HEAD, _many_strings),
    "escapes": (_JSON_HEAD, _escapes),
    "unread": (_JSON_HEAD, _long_key),
    "700 scans": (_IMAGE_HEAD, partial(scans, 700, 2000)),
    "90 scans": (_IMAGE_HEAD, partial(scans, 90, 5000)),
    "unpacking": (_IMAGE_HEAD, unpacking),
    "tags": (_IMAGE_HEAD, tags),
    "strips": (_IMAGE_HEAD, strips),
}
_BY_HAND: dict[str, Callable[[int], object]] = {
    "boundary": _boundary,
    "parameters": _parameters,
    "form": _form,
    "tiny chunks": _tiny_chunks,
    "accept": _accept,
    "slow heads": _slow_heads,
    "left": _left,
    "heads": _heads,
    "clips": _clips,
    "slow clips": _slow_clip,
    "broken giants": _broken_giant,
    "pages": _pages,
    "bursts": _bursts,
    "ahead": _ahead,
    "resets": _resets,
    "crowd": _crowd,
    "trickled": _trickled,
    "dripped": _dripped,
    "dripped through a proxy": partial(
        _dripped, sender=(PROXY, 0), told=b"X-Forwarded-For: 203.0.113.7\r\n"
    ),
    "queries": _queries,
}
ATTACKS = (*_BY_HAND, *_BODIES)


def prepare(names: list[str]) -> None:
    """Build the bodies of these attacks, each once."""
    for name in names:
        if name in _BODIES:
            _BODIES[name][1]()


def send(name: str, port: int) -> None:
    """Send one request of an attack; read the answer, unless the attack is "unread"."""
    if name in _BY_HAND:
        _BY_HAND[name](port)
    else:
        head, body = _BODIES[name]
        post(port, head, body(), read=name != "unread")
