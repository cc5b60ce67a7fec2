"""image_url leads to public addresses of allowed domains, or nowhere."""

import asyncio
import gc
import socket
import threading

import pytest

from server.images import fetch, hosts
from server.images.download import Answer
from server.images.fetch import Fetcher
from server.images.hosts import FetchFailed, ForbiddenUrl, PublicHosts, is_public
from server.refusals import QueueFull
from tests.support.sites import answering, fetcher_of, site


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
        ("::ffff:0:127.0.0.1", False), ("::127.0.0.1", False), ("192.0.0.192", False),
        ("168.63.129.16", False), ("3fff::1", False), ("5f00::1", False),
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


@pytest.mark.parametrize(
    "host", ["", "a.", "-x", "%6f", "a\0", "a b", "ä", "a" * 64, "a." * 130 + "a"]
)
def test_names_that_there_can_not_be_are_not_looked_up(host):
    """Python raises other errors for some, or takes long; libcurl looks others up by itself."""
    with pytest.raises(ForbiddenUrl, match="ASCII"):
        Fetcher((".ok.example",), 1000).check(f"https://{host}.ok.example/x")


def test_domains_are_whole_names_or_all_below_one():
    fetcher = Fetcher(("ok.example", ".wide.example"), 1000)
    for url in ("https://ok.example/x", "https://OK.example/x", "https://a.b.wide.example/",
                "https://wide.example/"):  # fmt: skip
        fetcher.check(url)
    for url in ("https://a.ok.example/", "https://awide.example/"):
        with pytest.raises(ForbiddenUrl):
            fetcher.check(url)


def test_a_real_server_is_asked_and_each_hop_checked(context):
    async def run():
        with site(context) as (port, _):

            async def fetch(path, *answers):
                fetcher = fetcher_of(port, *answers)
                return await fetcher.fetch(f"https://ok.example/{path}", 5, "somebody")

            for path in ("image", "image\n", "image#part"):
                assert await fetch(path) == b"the image"
            assert await fetch("on") == b"the image"
            assert await fetch("packed") == b"the image"
            assert not [each for each in gc.get_objects() if type(each) is Answer]
            for path, error, message in (
                ("large", FetchFailed, "more than 1000 bytes|file size"),
                ("streamed", FetchFailed, "more than 1000 bytes"),
                ("packed?times=1000000", FetchFailed, "more than 1000 bytes"),
                ("missing", FetchFailed, "answered 404"),
                ("nowhere", FetchFailed, "answered 302"),
                ("\ud800", FetchFailed, "not a URL"),
                ("lines", FetchFailed, "too long a head"),
                ("around", FetchFailed, "too often"),
                ("away", ForbiddenUrl, "evil.example' is not among"),
                ("inward", ForbiddenUrl, r"127\.0\.0\.1' is not among"),
            ):
                with pytest.raises(error, match=message):
                    await fetch(path)
            for answers in (["10.0.0.1"], ["93.184.216.34", "10.0.0.1"]):  # at once, or on the way
                with pytest.raises(ForbiddenUrl, match="not a public address"):
                    await fetch("on", *answers)

    asyncio.run(run())


def test_a_connection_to_another_address_than_those_looked_up_is_not_made(context):
    """As happens if libcurl reads another host out of a URL than was checked."""

    class Elsewhere(PublicHosts):
        async def look_up(self, host, client, seconds):
            return ["93.184.216.34"]

    async def run():
        with site(context) as (port, _):
            fetcher = Fetcher(("127.0.0.1",), 1000, Elsewhere(), port)
            with pytest.raises(FetchFailed, match="can't be fetched"):
                await fetcher.fetch("https://127.0.0.1/image", 5, "somebody")

    asyncio.run(run())


@pytest.mark.parametrize(("answer", "image"), [
    (b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nLocation: /y\r\n\r\n", b"x"),
    (b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;a=b\r\nx\r\n0\r\n\r\n", b"x"),
    (b"103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", b"x"),
    (b"101 Switching Protocols\r\nUpgrade: x\r\n\r\nx", None),
    (b"200 OK\r\nContent-Length: 2\r\n\r\nx", None),
], ids=["trailer", "chunk extension", "hints", "other protocol", "cut off"])  # fmt: skip
def test_what_counts_as_an_image(answer, image, context):
    def serve(connection):
        with context.wrap_socket(connection, server_side=True) as site:
            site.recv(4096)
            site.sendall(b"HTTP/1.1 " + answer)

    async def run():
        with answering(serve) as port:
            fetched = fetcher_of(port).fetch("https://ok.example/image", 5, "somebody")
            if image is not None:
                assert await fetched == image
                return
            with pytest.raises(FetchFailed):
                await fetched

    asyncio.run(run())


def test_a_site_whose_certificate_is_not_trusted_is_refused(context, monkeypatch):
    async def run():
        with site(context) as (port, _):
            fetcher = fetcher_of(port)
            fetcher._domains = ("other.example",)
            with pytest.raises(FetchFailed, match=r"(?i)certificate|subject name"):
                await fetcher.fetch("https://other.example/image", 5, "somebody")
            monkeypatch.delenv("SSL_CERT_FILE")
            with pytest.raises(FetchFailed, match="certificate"):
                await fetcher_of(port).fetch("https://ok.example/image", 5, "somebody")

    asyncio.run(run())


def test_a_client_that_fetched_much_waits_for_its_next_and_others_do_not(context, monkeypatch):
    monkeypatch.setattr(fetch, "_BYTES", (2_000, 1_000))
    ended = []

    async def run():
        with site(context) as (port, _):
            fetcher = fetcher_of(port, limit=10_000)

            async def ask(path, client):
                await fetcher.fetch(f"https://ok.example/{path}", 5, client)
                ended.append(client)

            await ask("large", "much")
            much = asyncio.create_task(ask("image", "much"))
            await asyncio.sleep(0)
            for _ in range(3):
                await ask("image", "little")
            await much

    asyncio.run(run())
    assert ended == ["much", "little", "little", "little", "much"]


def test_of_a_name_with_many_addresses_some_are_tried(monkeypatch):
    addresses = [f"2606:2800::{n:x}" for n in range(1, 900)] + ["93.184.216.34"]
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (each, 0)) for each in addresses]
    )
    found = asyncio.run(PublicHosts().look_up("ok.example", "somebody", 5))
    assert found == [*addresses[:4], addresses[-1]]
    addresses.insert(20, "::1")
    with pytest.raises(ForbiddenUrl):
        asyncio.run(PublicHosts().look_up("ok.example", "somebody", 5))


@pytest.mark.parametrize("clients", [2, 9], ids=lambda clients: f"of-{clients}-clients")
def test_slow_fetches_give_way_to_a_client_that_has_fewer(context, monkeypatch, clients):
    """Also those that are not slow yet when it comes."""
    monkeypatch.setattr(fetch, "_FETCHES", 8)
    monkeypatch.setattr(fetch, "_SLOW_SECONDS", 1.0)

    async def run():
        with site(context) as (port, over):
            fetcher = fetcher_of(port)

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

    def getaddrinfo(host, *_, **__):
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
        return slow, fast

    slow, fast = asyncio.run(run())
    assert all("in time" in each for each in slow)
    assert "no fast" in fast
    assert len(asked) == 5, "four of its look-ups, and none that was given up"
    assert not caplog.records


def test_a_host_that_was_looked_up_lately_is_known_while_look_ups_hang(monkeypatch):
    over, asked = threading.Event(), []

    def getaddrinfo(host, *_, **__):
        asked.append(host)
        if host.startswith("slow"):
            over.wait(20)
        return [(0, 0, 0, "", ("93.184.216.34", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def run():
        ours = PublicHosts()
        first = await ours.look_up("quick.example", "a", 5)
        slow = [asyncio.ensure_future(ours.look_up(f"slow{n}", f"c{n}", 20)) for n in range(9)]
        await asyncio.sleep(0.1)
        with pytest.raises(OSError, match="in time"):
            await ours.look_up("another.example", "a", 0.2)
        again = await ours.look_up("quick.example", "a", 0.2)
        monkeypatch.setattr(hosts, "_KNOWN_SECONDS", 0.0)
        over.set()
        await asyncio.gather(*slow)
        asked.clear()
        for _ in range(2):
            await ours.look_up("later.example", "a", 5)
        return first, again

    first, again = asyncio.run(run())
    assert first == again == ["93.184.216.34"]
    assert asked == ["later.example"] * 2
