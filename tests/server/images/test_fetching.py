"""image_url leads to public addresses of allowed domains, or nowhere."""

import asyncio
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from tornado.netutil import Resolver

from server.images import fetch, under_way
from server.images.fetch import Fetcher
from server.images.hosts import ForbiddenUrl, PublicResolver, is_public
from server.images.under_way import FetchFailed, FetchUnderWay
from server.refusals import QueueFull
from tests.support.sites import Local, Names, fetcher_of, site


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("64:ff9b::5db8:d822", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False),
        ("255.255.255.255", False), ("::1", False), ("::", False), ("fe80::1%eth0", False),
        ("fc00::1", False), ("::ffff:127.0.0.1", False), ("::ffff:169.254.169.254", False),
        ("2002:7f00:1::", False), ("64:ff9b::7f00:1", False), ("ff02::1", False),
        ("64:ff9b:1::1", False), ("fec0::1", False), ("::a00:1", False),
        ("::ffff:0:127.0.0.1", False), ("::127.0.0.1", False),
    ],
)  # fmt: skip
def test_public_addresses_are_told_from_all_others(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    "url",
    [
        "http://ok.example/x", "ftp://ok.example/x", "file:///etc/passwd", "https://", "x",
        "https://evil.example/x", "https://ok.example@evil.example/x",
        "https://evil.example\\@ok.example/x", "https://user:pw@ok.example/x",
        "https://ok.example.evil.example/x", "https://ok.example:8443/x", "https://ok.example:x/",
        "https://ok.example:/x",
        "https://[::1]/x", "https://notok.example/x",
    ],
)  # fmt: skip
def test_urls_that_must_not_be_asked(url):
    with pytest.raises(ForbiddenUrl):
        Fetcher(("ok.example",), 1000).check(url)


def test_domains_are_whole_names_or_all_below_one():
    fetcher = Fetcher(("ok.example", ".wide.example"), 1000)
    for url in ("https://ok.example/x", "https://OK.example/x", "https://a.b.wide.example/",
                "https://wide.example/"):  # fmt: skip
        fetcher.check(url)
    for url in ("https://a.ok.example/", "https://awide.example/"):
        with pytest.raises(ForbiddenUrl):
            fetcher.check(url)


def test_an_allowed_name_that_leads_to_a_private_address_is_refused():
    async def run():
        fetcher = Fetcher(("ok.example",), 1000, PublicResolver(inner=Names(answers=["10.0.0.1"])))
        with pytest.raises(ForbiddenUrl, match="not a public address"):
            await fetcher.fetch("https://ok.example/x.png", 5, "somebody")
        fetcher.close()

    asyncio.run(run())


def test_a_real_server_is_asked_and_each_hop_checked(context):
    async def run():
        with site(context) as (port, _):

            async def fetch(path, *answers):
                with fetcher_of(port, *answers) as fetcher:
                    return await fetcher.fetch(f"https://ok.example/{path}", 5, "somebody")

            assert await fetch("image") == b"the image"
            assert await fetch("on") == b"the image"
            for path, error, message in (
                ("large", FetchFailed, "can't be fetched"),
                ("missing", FetchFailed, "answered 404"),
                ("bytes", FetchFailed, "single bytes"),
                ("lines", FetchFailed, "head of hundreds of lines"),
                ("around", FetchFailed, "too often"),
                ("away", ForbiddenUrl, "evil.example' is not among"),
                ("inward", ForbiddenUrl, r"127\.0\.0\.1' is not among"),
            ):
                with pytest.raises(error, match=message):
                    await fetch(path)
            with pytest.raises(ForbiddenUrl, match="not a public address"):
                await fetch(
                    "on", "93.184.216.34", "10.0.0.1"
                )  # the second query gets another answer

    asyncio.run(run())


@pytest.mark.parametrize("path", ["large", "padded"])
def test_a_client_that_fetched_much_waits_for_its_next_and_others_do_not(
    path, context, monkeypatch
):
    monkeypatch.setattr(fetch, "_BYTES", (2_000, 1_000))
    ended = []

    async def run():
        with site(context) as (port, _), fetcher_of(port, limit=10_000) as fetcher:

            async def ask(path, client):
                await fetcher.fetch(f"https://ok.example/{path}", 5, client)
                ended.append(client)

            await ask(path, "much")
            much = asyncio.create_task(ask("image", "much"))
            await asyncio.sleep(0)
            for _ in range(3):
                await ask("image", "little")
            await much

    asyncio.run(run())
    assert ended == ["much", "little", "little", "little", "much"]


def test_connections_have_a_thread_of_their_own(context, monkeypatch):
    """A site decides how long a call of TLS takes: requests must not wait for it."""
    threads = set()

    async def resolve(self, host, port, family=0):
        threads.add(threading.get_ident())
        return [(socket.AF_INET, ("127.0.0.1", self._port))]

    monkeypatch.setattr(Local, "resolve", resolve)

    async def run():
        with site(context) as (port, _), fetcher_of(port) as fetcher:
            await fetcher.fetch("https://ok.example/image", 5, "somebody")

    asyncio.run(run())
    assert threads and threading.get_ident() not in threads


def test_a_connection_with_always_something_to_read_lets_others_run(monkeypatch):
    """Reads that need not wait return at once, and nothing else would run between them."""
    monkeypatch.setattr(under_way, "_TURN_SECONDS", 0.0)

    async def read(*_):
        return b"x"

    stream = SimpleNamespace(
        read_bytes=read,
        read_until=read,
        read_until_regex=read,
        read_from_fd=len,
        close=print,
        _find_read_pos=print,
    )
    FetchUnderWay("somebody", lambda *_: 0.0).opened(stream)
    turns = []

    async def others():
        while True:
            turns.append(None)
            await asyncio.sleep(0)

    async def run():
        other = asyncio.create_task(others())
        for each in (stream.read_bytes, stream.read_until):
            before = len(turns)
            for _ in range(20):
                await each(1)
            assert len(turns) >= before + 19
        other.cancel()

    asyncio.run(run())


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\n", b"\n\r\n"])
def test_a_head_in_pieces_is_searched_once(end):
    """Tornado would look through all of it each time that some of it has come."""
    looked, head = [], b"HTTP/1.1 200 OK" + b"\r\nX: y" * 100 + end

    async def nothing(*_):
        return b""

    async def run():
        names = "read_bytes", "read_until", "read_until_regex", "close", "read_from_fd"
        stream = SimpleNamespace(
            **dict.fromkeys(names, nothing), _read_regex=end, _read_max_bytes=2000
        )
        stream._find_read_pos = lambda: looked.append(len(stream._read_buffer))
        FetchUnderWay("somebody", lambda *_: 0.0).opened(stream)
        for begins in (head, bytes(3000)):
            stream._read_buffer = bytearray()
            await stream.read_until_regex(end)
            for byte in begins:
                stream._read_buffer.append(byte)
                stream._find_read_pos()

    asyncio.run(run())
    assert looked == [len(head), *range(2001, 3001)]


def test_what_an_answer_takes_to_read_is_charged_as_it_comes(monkeypatch):
    """A site decides how much that is: by small records, or small chunks."""
    charged, pauses, passed = [], [], asyncio.sleep

    def charge(client, seconds):
        charged.append((client, seconds))
        return 0.2 if len(charged) == 1 else 9.0

    async def sleep(seconds):
        pauses.append(seconds)
        await passed(0)

    async def read(*_):
        stream.read_from_fd(b"")
        return b"x"

    async def nothing(*_):
        await passed(0)
        return b""

    def work(_):
        began = time.thread_time()
        while time.thread_time() < began + 0.01:
            pass
        return 1

    reads = ("read_bytes", "read_until", "read_until_regex")
    stream = SimpleNamespace(
        **dict.fromkeys(reads, read),
        _read_regex=None,
        read_from_fd=work,
        close=lambda: None,
        _find_read_pos=lambda: work(b""),
    )

    async def run():
        fetching.opened(stream)
        for each in reads:
            await getattr(stream, each)(1)  # takes 10 ms
            work(b"")  # and so does what Tornado makes of it
        stream.close()
        stream._find_read_pos()  # and so does looking for the end of a head
        work(b"")  # of others
        await fetching.closed()
        charged.append("redirected")
        work(b"")  # of others
        vars(stream).update(
            dict.fromkeys(reads, nothing),
            read_from_fd=len,
            close=lambda: None,
            _find_read_pos=print,
        )
        fetching.opened(stream)
        await stream.read_until_regex(0)
        fetching.take(b"")
        before = fetching._computed
        work(b"")  # of others
        fetching.take(b"")
        assert fetching._computed == before

    fetching = FetchUnderWay("somebody", charge)
    monkeypatch.setattr(under_way.asyncio, "sleep", sleep)
    asyncio.run(run())
    ours = charged.index("redirected")
    assert {client for client, _ in charged[:ours]} == {"somebody"}
    assert 0.07 <= sum(seconds for _, seconds in charged[:ours]) < 0.078
    assert charged[ours + 1 :] == [("somebody", 0.0)]
    assert pauses == [0.2, 0.25, 0.25, 0.25]


def test_of_a_name_with_many_addresses_some_are_tried():
    addresses = [(socket.AF_INET6, (f"2606:2800::{n:x}", 443)) for n in range(1, 900)]
    addresses.append((socket.AF_INET, ("93.184.216.34", 443)))

    class Many(Resolver):
        async def resolve(self, host, port, family=0):
            return addresses

    found = asyncio.run(PublicResolver(inner=Many()).resolve("ok.example", 443))
    assert found == [*addresses[:4], addresses[-1]]
    addresses.append((socket.AF_INET6, ("::1", 443)))
    with pytest.raises(ForbiddenUrl):
        asyncio.run(PublicResolver(inner=Many()).resolve("ok.example", 443))


def test_a_fetch_is_ended_from_outside_whatever_its_thread_does():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fetching = FetchUnderWay("somebody", lambda *_: 0.0, ours)
        fetching.expire()
        assert theirs.recv(1) == b""
        fetching.give_way()  # it has ended already


@pytest.mark.parametrize("clients", [2, 9], ids=lambda clients: f"of-{clients}-clients")
def test_slow_fetches_give_way_to_a_client_that_has_fewer(context, monkeypatch, clients):
    """Also those that are not slow yet when it comes."""
    monkeypatch.setattr(fetch, "_FETCHES", 8)
    monkeypatch.setattr(fetch, "SLOW_SECONDS", 1.0)

    async def run():
        with site(context) as (port, over), fetcher_of(port) as fetcher:

            def ask(what, client):
                return asyncio.ensure_future(
                    fetcher.fetch(f"https://ok.example/{what}", 15, str(client))
                )

            slow = [ask("slow", n % clients) for n in range(36)]
            await asyncio.sleep(0.1)
            for _ in range(2):
                assert await asyncio.wait_for(ask("image", "honest"), 5) == b"the image"
                await asyncio.sleep(1.1 if clients == 9 else 0)
            ended = [each for each in slow if each.done()]
            assert ended or clients == 2, "two clients leave some free"
            for each in ended:
                assert isinstance(each.exception(), QueueFull)
            over.set()
            await asyncio.wait(slow, timeout=20)

    asyncio.run(run())


def test_slow_look_ups_of_one_client_hold_up_nobody_else(monkeypatch, caplog):
    over, asked = threading.Event(), []

    def getaddrinfo(host, *_):
        asked.append(host)
        if host.startswith("slow"):
            over.wait(20)
        raise socket.gaierror(f"no {host}")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(fetch, "_CONNECT_SECONDS", 1.5)

    async def run():
        fetcher = Fetcher((".ok.example",), 1000)

        async def failed(client, host):
            with pytest.raises(FetchFailed) as error:
                await fetcher.fetch(f"https://{host}.ok.example/x", 10, client)
            return str(error.value)

        slow = await asyncio.gather(*(failed("a", f"slow{n}") for n in range(12)))
        fast = await failed("b", "fast")
        over.set()
        await asyncio.sleep(0.1)  # the look-ups' threads end, and nobody waits for them
        fetcher.close()
        return slow, fast

    slow, fast = asyncio.run(run())
    assert all("in time" in each for each in slow)
    assert "no fast" in fast
    assert len(asked) == 5, "four of its look-ups, and none that was given up"
    assert not caplog.records
