"""What a site's TLS may not do to the fetches of others, nor to its own."""

import asyncio
import ssl
import subprocess
import threading

import pytest

from server.images import fetch
from server.images.under_way import FetchFailed
from tests.support.sites import answering, fetcher_of, site


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

    def serve(connection):
        with context.wrap_socket(connection, server_side=True) as site:
            site.recv(4096)
            site.sendall(head)
            for _ in range(single):
                site.send(b"x")
            site.sendall(end)

    async def run():
        with (
            answering(serve) as port,
            fetcher_of(port, limit=10_000) as fetcher,
            pytest.raises(FetchFailed, match="single bytes"),
        ):
            await fetcher.fetch("https://ok.example/image", 10, "somebody")

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

    over = threading.Event()

    def serve(connection):
        with context.wrap_socket(connection, server_side=True) as site:
            site.recv(4096)
            site.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
            over.wait(20)

    async def run():
        with answering(serve) as port, fetcher_of(port, limit=200_000) as fetcher:
            try:
                found = await fetcher.fetch("https://ok.example/image", 8, "somebody")
            finally:
                over.set()
            assert found == bytes(size)

    asyncio.run(run())


@pytest.mark.parametrize(
    "piece", [bytes.fromhex("160303000400000000"), bytes.fromhex("16030300010b")],
    ids=["requests to begin", "single bytes"],
)  # fmt: skip
def test_a_handshake_without_end_is_ended(piece, context):
    def serve(connection):
        while True:
            connection.sendall(piece * 100)

    async def run():
        with (
            answering(serve) as hostile,
            site(context) as (honest, _),
            fetcher_of(hostile) as fetcher,
        ):
            with pytest.raises(FetchFailed, match="can't be fetched"):
                await fetcher.fetch("https://ok.example/image", 10, "hostile")
            fetcher._resolver._port = honest
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
