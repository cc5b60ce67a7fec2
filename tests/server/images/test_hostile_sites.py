"""What a site may not do to the fetches of others, nor to its own."""

import asyncio
import os
import ssl
import subprocess
import sys
import threading
import time

import pytest

from server.fairness.token_buckets import TokenBuckets
from server.images import fetch
from server.images.download import Download
from server.images.hosts import FetchFailed
from server.refusals import QueueFull
from tests.support.sites import answering, fetcher_of, site


@pytest.mark.parametrize(
    "head", [b"Transfer-Encoding: chunked\r\n\r\nffffff\r\n", b"X-Long: ", b"\r\n"],
    ids=["chunk", "head", "until the end"],
)  # fmt: skip
@pytest.mark.parametrize(("limit", "burst", "error", "message"), [
    ("_MOST_COMPUTED", 1.0, FetchFailed, "takes too long to read"),
    ("_MOST_OF_DEBTOR", 0.01, QueueFull, "these images take too long to read"),
])  # fmt: skip
def test_an_answer_may_take_only_so_much_computation(
    limit, burst, error, message, head, context, monkeypatch
):
    """A TLS record takes as long to read with a byte as with many."""
    monkeypatch.setattr(fetch, limit, 0.02)

    def serve(connection):
        with context.wrap_socket(connection, server_side=True) as site:
            site.recv(4096)
            site.sendall(b"HTTP/1.1 200 OK\r\n" + head)
            while True:
                site.send(b"x")

    async def run():
        with answering(serve) as port:
            fetcher = fetcher_of(port, limit=1_000_000)
            fetcher._seconds = TokenBuckets(1e-9, burst)
            with pytest.raises(error, match=message):
                await fetcher.fetch("https://ok.example/image", 10, "somebody")
            [(client, (left, _))] = fetcher._seconds._left.items()
            assert client == "somebody"
            assert left <= max(burst - 0.02, 0.0)

    asyncio.run(run())


@pytest.mark.skipif(sys.platform != "linux", reason="needs the clocks of other threads")
def test_what_can_not_be_stopped_computes_after_all_else(context, monkeypatch):
    """In a handshake, the site decides how long that is. Its client's place is taken until then."""
    over, perform = threading.Event(), Download.ask
    priorities = []

    def ask(download, curl, url, *rest):
        if "slow" in url:
            download._thread = time.pthread_getcpuclockid(threading.get_ident()), gettid()
            while not over.is_set():
                pass
            priorities.append(os.getpriority(os.PRIO_PROCESS, gettid()))
        return perform(download, curl, url, *rest)

    gettid = threading.get_native_id
    monkeypatch.setattr(Download, "ask", ask)
    monkeypatch.setattr(fetch, "_MOST_COMPUTED", 0.05)

    async def run():
        with site(context) as (port, _):
            fetcher = fetcher_of(port)
            slow = asyncio.ensure_future(
                fetcher.fetch("https://slow.ok.example/image", 15, "hostile")
            )
            while fetcher._seconds.owed("hostile") == 0.0:
                image = fetcher.fetch("https://ok.example/image", 5, "honest")
                assert await asyncio.wait_for(image, 5) == b"the image"
            assert not slow.done()
            over.set()
            with pytest.raises(FetchFailed, match="too long to read"):
                await slow

    asyncio.run(run())
    assert priorities == [19]


def test_a_fetch_ends_with_its_request(context):
    """Its place is free again, and its site hung up on."""
    ended = threading.Event()

    def serve(connection):
        with context.wrap_socket(connection, server_side=True) as site:
            while site.recv(4096):
                pass
        ended.set()

    async def run():
        with answering(serve) as port:
            fetcher = fetcher_of(port)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await fetcher.fetch("https://ok.example/image", 15, "somebody")
            assert await asyncio.to_thread(ended.wait, 10)
            while fetcher._turns._free < fetch._FETCHES:
                await asyncio.sleep(0.01)

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
        with answering(serve) as port:
            fetcher = fetcher_of(port, limit=200_000)
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
        with answering(serve) as hostile, site(context) as (honest, _):
            fetcher = fetcher_of(hostile)
            with pytest.raises(FetchFailed, match=r"can't be fetched|too long to read"):
                await fetcher.fetch("https://ok.example/image", 10, "hostile")
            fetcher._port = honest
            assert await fetcher.fetch("https://ok.example/image", 5, "honest") == b"the image"

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
        with site(context) as (port, _):
            _, talk = await asyncio.open_connection("127.0.0.1", port, ssl=plain)
            assert talk.get_extra_info("cipher")[0].startswith("DHE"), "others take it"
            talk.close()
            with pytest.raises(FetchFailed, match="can't be fetched"):
                await fetcher_of(port).fetch("https://ok.example/image", 5, "somebody")

    context.set_ciphers("DHE+AESGCM")
    asyncio.run(run())
