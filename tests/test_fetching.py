"""image_url leads to public addresses of allowed domains, or nowhere."""

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from types import SimpleNamespace

import pytest
import tornado.httpserver
import tornado.netutil
import tornado.web
from tornado.netutil import Resolver

from server.images import fetch
from server.images.fetch import Fetcher, FetchFailed
from server.images.hosts import ForbiddenUrl, PublicResolver, is_public
from server.refusals import QueueFull


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


class Names(Resolver):
    """A resolver that gives its next answer at each query, the last one forever."""

    def initialize(self, answers):
        self.answers = list(answers)
        self.asked = []

    async def resolve(self, host, port, family=0):
        self.asked.append(host)
        address = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [(socket.AF_INET, (address, port))]


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


class Site(tornado.web.RequestHandler):
    async def get(self, what):
        if what == "image":
            self.write(b"the image")
        elif what == "large":
            self.write(b"x" * 5000)
        elif what == "away":
            self.redirect("https://evil.example/x")
        elif what == "on":
            self.redirect("/image")
        elif what == "padded":
            self.set_status(302)
            self.set_header("Location", "/image")
            self.write(b"x" * 5000)
        elif what == "bytes":
            for _ in range(600):
                self.write(b"x")
                await self.flush()
        elif what == "slow":
            await self.settings["over"].wait()
        elif what == "around":
            self.redirect("/around")
        elif what == "inward":
            self.redirect("https://127.0.0.1/secret")
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


@pytest.fixture
def context(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
         "/CN=ok.example", "-keyout", tmp_path / "key", "-out", tmp_path / "certificate"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    return context


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
    monkeypatch.setattr(fetch, "_SECOND_COST", 0)
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
    monkeypatch.setattr(fetch, "_TURN_SECONDS", 0.0)

    async def read(*_):
        return b"x"

    stream = SimpleNamespace(read_bytes=read, read_until=read, read_from_fd=len)
    fetch._Fetch("somebody").opened(stream)
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


@pytest.mark.parametrize(
    ("head", "single", "end"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1388\r\n", 5000, b"\r\n0\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", 5000, b""),
        (b"HTTP/1.0 200 OK\r\n\r\n", 5000, b""),  # what has come looks like all
        (b"HTTP/1.1 200 OK\r\nX-Long: ", 5000, b"\r\nContent-Length: 0\r\n\r\n"),
    ],
)
def test_answers_that_come_in_single_bytes_are_hung_up_on(head, single, end, context):
    """However they are framed: a TLS record takes as long to read with a byte as with many."""

    def serve(listening):
        connection, _ = listening.accept()
        with context.wrap_socket(connection, server_side=True) as site:
            site.recv(4096)
            site.sendall(head)
            with contextlib.suppress(OSError):  # it is hung up on
                for _ in range(single):
                    site.send(b"x")
                site.sendall(end)

    async def run():
        with (
            socket.create_server(("127.0.0.1", 0)) as listening,
            fetcher_of(listening.getsockname()[1], limit=10_000) as fetcher,
        ):
            site = threading.Thread(target=serve, args=[listening])
            site.start()
            with pytest.raises(FetchFailed, match="single bytes"):
                await fetcher.fetch("https://ok.example/image", 10, "somebody")
            site.join(10)

    asyncio.run(run())


def test_what_is_no_answer_does_not_hold_the_fetches_up(context):
    """Session tickets, of which OpenSSL reads any number on a socket of its own."""

    async def run():
        with site(context) as (port, _), fetcher_of(port) as fetcher:
            assert await fetcher.fetch("https://ok.example/image", 15, "honest") == b"the image"
            context.num_tickets = 1000
            with pytest.raises(FetchFailed, match="no answer"):
                await fetcher.fetch("https://ok.example/image", 15, "hostile")

    asyncio.run(run())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("size", [16_300, 16_384, 18_000, 100_000])
def test_an_answer_has_come_once_its_last_record_has(size, version, context):
    """Of a site that does not hang up; TLS is given a record in pieces."""
    context.minimum_version = context.maximum_version = version

    def serve(listening):
        connection, _ = listening.accept()
        with context.wrap_socket(connection, server_side=True) as site:
            site.recv(4096)
            site.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
            over.wait(20)

    async def run():
        with (
            socket.create_server(("127.0.0.1", 0)) as listening,
            fetcher_of(listening.getsockname()[1], limit=200_000) as fetcher,
        ):
            site = threading.Thread(target=serve, args=[listening])
            site.start()
            try:
                found = await fetcher.fetch("https://ok.example/image", 8, "somebody")
            finally:
                over.set()
            assert found == bytes(size)
            site.join(10)

    over = threading.Event()
    asyncio.run(run())


@pytest.mark.parametrize(
    "piece", [bytes.fromhex("160303000400000000"), bytes.fromhex("16030300010b")],
    ids=["requests to begin", "single bytes"],
)  # fmt: skip
def test_a_handshake_without_end_is_ended(piece, context):
    def serve(listening):
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):  # it is hung up on
            while True:
                connection.sendall(piece * 100)

    async def run():
        with (
            socket.create_server(("127.0.0.1", 0)) as listening,
            site(context) as (port, _),
            fetcher_of(listening.getsockname()[1]) as fetcher,
        ):
            site_ = threading.Thread(target=serve, args=[listening])
            site_.start()
            with pytest.raises(FetchFailed, match="can't be fetched"):
                await fetcher.fetch("https://ok.example/image", 10, "hostile")
            site_.join(10)
            fetcher._resolver._port = port
            assert await fetcher.fetch("https://ok.example/image", 5, "honest") == b"the image"

    asyncio.run(run())


def test_what_a_handshake_computes_holds_only_its_own_fetch_up(context, monkeypatch):
    """The site decides how long that is. Its client's place is taken until then."""
    shake, over, computing = ssl.SSLObject.do_handshake, threading.Event(), threading.Event()

    def do_handshake(tls):
        if tls.server_hostname.startswith("slow"):
            computing.set()
            over.wait(20)
        shake(tls)

    monkeypatch.setattr(ssl.SSLObject, "do_handshake", do_handshake)
    monkeypatch.setattr(fetch, "_CONNECT_SECONDS", 0.5)

    async def run():
        with site(context) as (port, _), fetcher_of(port) as fetcher:
            fetcher._domains = (".ok.example", "ok.example")
            slow = asyncio.ensure_future(
                fetcher.fetch("https://slow.ok.example/image", 15, "hostile")
            )
            await asyncio.to_thread(computing.wait)
            for _ in range(5):
                image = fetcher.fetch("https://ok.example/image", 5, "honest")
                assert await asyncio.wait_for(image, 5) == b"the image"
            await asyncio.sleep(0.7)
            assert not slow.done()
            over.set()
            with pytest.raises(FetchFailed, match="in time"):
                await slow

    asyncio.run(run())


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
        under_way = fetch._Fetch("somebody", connection=ours)
        under_way.expire()
        assert theirs.recv(1) == b""
        under_way.give_way()  # it has ended already


def test_numbers_of_the_sites_own_length_are_not_computed_with(context, tmp_path):
    """A Diffie-Hellman key of 9,999 bits takes most of a second."""
    parameters = tmp_path / "dh.pem"
    subprocess.run(
        ["openssl", "genpkey", "-genparam", "-algorithm", "DH", "-pkeyopt", "group:ffdhe2048",
         "-out", parameters], check=True, capture_output=True,
    )  # fmt: skip
    context.load_dh_params(parameters)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    plain = ssl.create_default_context()
    plain.check_hostname, plain.verify_mode = False, ssl.CERT_NONE

    async def run():
        with site(context) as (port, _), fetcher_of(port) as fetcher:
            _, talk = await asyncio.open_connection("127.0.0.1", port, ssl=plain)
            assert talk.get_extra_info("cipher")[0].startswith("DHE"), "others take it"
            talk.close()
            with pytest.raises(FetchFailed, match="can't be fetched"):
                await fetcher.fetch("https://ok.example/image", 5, "somebody")

    context.set_ciphers("DHE+AESGCM")
    asyncio.run(run())


@pytest.mark.parametrize("clients", [2, 9], ids=lambda clients: f"of-{clients}-clients")
def test_slow_fetches_give_way_to_a_client_that_has_fewer(context, monkeypatch, clients):
    """Also those that are not slow yet when it comes."""
    monkeypatch.setattr(fetch, "_FETCHES", 8)
    monkeypatch.setattr(fetch, "_SLOW_SECONDS", 1.0)

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
