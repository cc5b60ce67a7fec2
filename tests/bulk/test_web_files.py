"""Lists, tables and shards of web servers: whole and of one version, or an error that says why."""

import base64
import contextlib
import gzip
import http.server
import io
import re
import tarfile
import threading

import pytest

from server.bulk.inputs import web, web_files
from server.bulk.inputs.items import UnfitItem
from server.bulk.inputs.lists import Columns
from server.bulk.inputs.parts import items, parts
from tests.support.web_servers import served

ROWS = 3000
LIST = b"image,id\n" + b"".join(b"https://x/%05d.png,row %d\n" % (n, n) for n in range(ROWS))


class Site:
    """Files of a web server, and how it gives parts of them.

    most: bytes of a part, at most. ranges: whether it gives any. failures: answers of 503 before
    the next right one. change: called before each answer.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/list.csv": LIST}
        self.most, self.ranges, self.failures = 10**9, True, 0
        self.headers: dict[str, str] = {}
        self.asked: list[str | None] = []
        self.change = lambda: None

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.asked.append(wanted)
        self.change()
        file = self.files[handler.path]
        if self.failures:
            self.failures -= 1
            self._send(handler, 503, b"later", {})
            return
        if not self.ranges or wanted is None:
            self._send(handler, 200, file, {})
            return
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
        if first >= len(file):
            self._send(handler, 416, b"", {"Content-Range": f"bytes */{len(file)}"})
            return
        part = file[first : min(last + 1, first + self.most)]
        told = f"bytes {first}-{first + len(part) - 1}/{len(file)}"
        self._send(handler, 206, part, {"Content-Range": told})

    def _send(self, handler, status, body, headers) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers, **self.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(web, "_LONGEST_WAIT", 0.01)
    monkeypatch.setattr(web_files, "_AHEAD", 10_000)
    made = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            with contextlib.suppress(OSError):  # a client that has read enough hangs up
                made.answer(self)

    with served(Handler) as made.url:
        yield made


def read(site: Site, path: str = "/list.csv"):
    """Ids of the items of a file there, and why it could not be read to its end."""
    found = list(items(parts([site.url + path], Columns(id="id"), 10**7)))
    wrong = [item.wrong for item in found if item.wrong]
    return [item.id for item in found if not item.wrong], wrong[0] if wrong else None


def named(count: int = ROWS) -> list[str]:
    return [f"row {n}" for n in range(count)]


@pytest.mark.parametrize("most", [10**9, 5_000, 777])
def test_parts_may_be_shorter_than_was_asked_for(site, most):
    site.most = most
    assert read(site) == (named(), None)
    assert len(site.asked) >= len(LIST) // most


def test_a_server_that_gives_no_parts_is_read_from_start_to_end(site):
    site.ranges = False
    assert read(site) == (named(), None)
    assert len(site.asked) == 1


def test_a_part_that_may_come_later_is_asked_for_again(site):
    def fail_now_and_then():
        site.failures = len(site.asked) % 3 == 0

    site.change = fail_now_and_then
    assert read(site) == (named(), None)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda site: site.headers.update({"ETag": '"b"'}), "it changed while it was read"),
        (lambda site: site.headers.update({"Last-Modified": "now"}), "changed while"),
        (lambda site: site.files.update({"/list.csv": LIST[:40_000]}), "changed while"),
        (lambda site: site.files.update({"/list.csv": LIST + LIST}), "changed while"),
        (lambda site: site.files.update({"/list.csv": b""}), "changed while"),
        (lambda site: site.headers.update({"Content-Range": "bytes 0-9/10"}), "gives other parts"),
        (lambda site: site.headers.update({"Content-Range": "bytes 0-9/*"}), "download the file"),
        (lambda site: setattr(site, "ranges", False), "all of it in place of a part"),
        (lambda site: setattr(site, "failures", 9), "answered 503"),
        (
            lambda site: site.headers.update({"Content-Length": "0", "Connection": "close"}),
            "more or less than it said",
        ),
    ],
)
def test_what_is_not_what_was_begun_is_no_part_of_it(site, after, message):
    site.headers |= {"ETag": '"a"', "Last-Modified": "then"}
    site.change = lambda: len(site.asked) > 3 and after(site)
    found, wrong = read(site)
    assert found == named(len(found)) and 0 < len(found) < ROWS
    assert message in wrong


@pytest.mark.parametrize("ranges", [True, False])
def test_an_empty_file_is_empty(site, ranges):
    site.files["/empty.jsonl"], site.ranges = b"", ranges
    assert read(site, "/empty.jsonl") == ([], None)


@pytest.mark.parametrize("most", [10**9, 999])
def test_a_table_is_whole(site, most):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"image": [b"x" * 100] * 400, "id": named(400)})
    file = io.BytesIO()
    parquet.write_table(table, file, row_group_size=50, compression=None, use_dictionary=False)
    site.files["/table.parquet"], site.most = file.getvalue(), most
    assert read(site, "/table.parquet") == (named(400), None)
    site.ranges = False
    assert "gives no parts of it: download" in read(site, "/table.parquet")[1]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_shard_is_whole(site, ranges):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for number in range(200):
            member = tarfile.TarInfo(f"{number:03}.png")
            member.size = 700
            archive.addfile(member, io.BytesIO(number.to_bytes(2, "big") * 350))
    site.files["/shard.tar.gz"], site.most, site.ranges = file.getvalue(), 900, ranges
    found = list(items(parts([f"{site.url}/shard.tar.gz"], Columns(), 10**7)))
    assert [item.image for item in found] == [n.to_bytes(2, "big") * 350 for n in range(200)]


@pytest.mark.parametrize(
    ("given", "sent"),
    [("a%40b:c%3Ad", "a@b:c:d"), ("token", "token:"), ("%C3%A9:%E2%82%AC", "é:€")],
)
def test_a_name_and_password_in_a_url_are_told_to_its_server_alone(site, given, sent):
    told = []

    def answer(handler):
        told.append((handler.path, handler.headers.get("Authorization")))
        onward = {"/list.txt": f"{site.url}/there", "/there": f"{elsewhere}/other"}
        if handler.path in onward:
            site._send(handler, 302, b"", {"Location": onward[handler.path]})
        else:
            site._send(handler, 200, b"a.png\n", {})

    site.answer, elsewhere = answer, site.url.replace("127.0.0.1", "localhost")
    url = site.url.replace("http://", f"http://{given}@")
    [_] = items(parts([f"{url}/list.txt"], Columns(), 10**7))
    basic = "Basic " + base64.b64encode(sent.encode()).decode()
    assert told == [("/list.txt", basic), ("/there", basic), ("/other", None)]


def test_a_file_behind_a_name_and_password_is_read_where_it_led(site):
    site.files["/there.csv"], plain = LIST, site.answer

    def answer(handler):
        if handler.headers.get("Authorization") is None:
            site._send(handler, 401, b"", {})
        elif handler.path == "/list.csv":
            site._send(handler, 302, b"", {"Location": f"{site.url}/there.csv"})
        else:
            plain(handler)

    site.answer = answer
    given = site.url.replace("http://", "http://a:b@")
    found = list(items(parts([f"{given}/list.csv"], Columns(id="id"), 10**7)))
    assert [item.id for item in found] == named()
    assert len(site.asked) == -(-len(LIST) // 10_000)


def test_parts_come_from_where_the_first_led_until_that_expires(site):
    site.files["/signed"] = LIST
    plain, led = site.answer, []

    def answer(handler):
        led.append(handler.path)
        if handler.path == "/list.csv":
            site._send(handler, 302, b"", {"Location": "/signed"})
        elif len(led) % 5 == 0:
            site._send(handler, 403, b"", {})
        else:
            plain(handler)

    site.answer = answer
    assert read(site) == (named(), None)
    assert 1 < led.count("/list.csv") < led.count("/signed") / 2


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_its_server_packs_is_unpacked_to_its_end(site, ranges):
    site.files["/list.csv"], site.ranges = gzip.compress(LIST), ranges
    site.headers["Content-Encoding"] = "gzip"
    assert read(site) == (named(), None)
    site.files["/list.csv"] = site.files["/list.csv"][:5_000]
    found, wrong = read(site)
    assert found == named(len(found)) and "gave no whole answer" in wrong


@pytest.mark.parametrize("status", [400, 416, 501])
def test_a_server_that_refuses_a_range_is_asked_for_all(site, status):
    plain = site.answer

    def answer(handler):
        if "Range" in handler.headers:
            site._send(handler, status, b"", {})
        else:
            plain(handler)

    site.answer = answer
    assert read(site) == (named(), None)


def test_a_file_that_breaks_off_is_not_whole(site):
    site.ranges = False
    site.headers |= {"Content-Length": str(len(LIST) + 9), "Connection": "close"}
    found, wrong = read(site)
    assert found == named() and "gave no whole answer" in wrong


def test_rows_come_as_their_server_makes_them(site):
    made, waited = threading.Event(), []

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(b"image\na.png\nb.png\n")
        waited.append(made.wait(20))
        handler.wfile.write(b"c.png\n")

    site.answer = answer
    found = items(parts([f"{site.url}/list.txt"], Columns(), 10**7))
    first = next(found).image
    made.set()
    assert [first.rpartition("/")[2], *(i.image.rpartition("/")[2] for i in found)] == [
        "image", "a.png", "b.png", "c.png",
    ]  # fmt: skip
    assert waited == [True]


@pytest.mark.parametrize("encoding", ["aws-chunked", "Identity", ""])
def test_encodings_that_pack_nothing_leave_the_parts(site, encoding):
    site.headers["Content-Encoding"] = encoding
    assert read(site) == (named(), None)
    assert len(site.asked) > 1


def test_a_part_that_tells_nothing_of_a_version_does_not_hide_another(site):
    tags = iter([{"ETag": '"a"'}, {}, *[{"ETag": '"b"'}] * 99])
    site.change = lambda: setattr(site, "headers", next(tags))
    assert "it changed while" in read(site)[1]


def test_servers_may_tell_less_of_a_version_now_and_then(site):
    def change():
        site.headers = {"ETag": 'W/"a"' if len(site.asked) % 2 else '"a"'}
        if len(site.asked) % 3 == 0:
            site.headers = {"Last-Modified": "Sat, 28 Nov 2026 12:00:00 GMT"}

    site.change = change
    assert read(site) == (named(), None)


def test_a_file_that_is_not_there_is_told(site):
    site.answer = lambda handler: site._send(handler, 404, b"", {})
    assert "the server answered 404" in read(site)[1]
    with pytest.raises(UnfitItem), web_files.opened(f"{site.url}/x") as stream:
        stream.read()
