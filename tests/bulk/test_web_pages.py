"""Images in the folders of web servers, whose pages write their links in many ways."""

import http.server
from collections import Counter

import pytest

from server.bulk.inputs.folders import Files
from tests.support.web_servers import served

PAGES = {
    "/photos/": """<a href="..">Up</a> <a href="?C=N;O=D">Name</a> <a href="#top">Top</a>
        <A HREF='a.png'>a</A> <a class=x href="http-logo.png">l</a> <a href="it's.png">i</a>
        <a href="./b.png">b</a> <a href="x&amp;y.png">x</a> <a href=/photos/c.png>c</a>
        <a href="deep/er/d.png">d</a> <a href=".hidden.png">h</a> <a href="notes.txt">n</a>
        <a href="https://elsewhere.example/e.png">e</a> <a href="https://[">broken</a>
        <a href="http/">sub</a> <a href="./closed/">closed</a> <a href="deep/">deep</a>
        <a href="odd/">odd</a>
        <img src="thumbnail.png">""",
    "/photos/http/": '<a href="/photos/">Up</a> <a href="HTTP://{host}/photos/http/f%20g.png">f</a>',
    "/photos/deep/": '<a href="er/">er</a>',
    "/photos/deep/er/": '<a href="d.png">d</a>',
    "/photos/odd/": "<![x y]>",
}


asked: Counter[str] = Counter()


@pytest.fixture
def site():
    asked.clear()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            found = PAGES.get(self.path)
            moved = found is None and f"{self.path}/" in PAGES
            self.send_response(200 if found else 301 if moved else 403)
            if moved:
                self.send_header("Location", f"{self.path}/")
            if self.path == "/photos/":
                self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((found or "").replace("{host}", self.headers["Host"]).encode())

    with served(Handler) as url:
        yield url


def test_links_of_all_forms_below_the_folder_are_taken(site):
    files = Files(f"{site}/photos")
    found = list(files.items())
    items = {item.id.removeprefix(f"{site}/photos/"): item for item in found}
    assert len(items) == len(found), "each once"
    closed, odd = items.pop("closed"), items.pop("odd")
    assert closed.wrong == "the server answered 403"
    assert "can't be taken apart" in odd.wrong
    assert sorted(items) == [
        "a.png", "b.png", "c.png", "deep/er/d.png", "http-logo.png", "http/f%20g.png", "it's.png",
        "x&y.png",
    ]  # fmt: skip
    assert all(item.wrong is None for item in items.values())
    assert items["deep/er/d.png"].name == "deep/er/d"
    assert files.skipped == {".txt": 1}
    assert asked["/photos"] == asked["/photos/"] == 1


def test_a_pattern_chooses_among_links(site):
    found = [item.id for item in Files(f"{site}/photos/**/[d-f]*.png").items()]
    assert {url.removeprefix(f"{site}/photos/") for url in found} == {
        "closed", "odd", "deep/er/d.png", "http/f%20g.png",
    }  # fmt: skip


@pytest.mark.parametrize("way", ["/photos//http", "/photos/./http", "/elsewhere/../photos/http"])
def test_a_folder_may_be_spelled_in_other_ways(way, site, monkeypatch):
    monkeypatch.setitem(PAGES, "/photos//http/", PAGES["/photos/http/"])
    [item] = Files(f"{site}{way}/").items()
    assert item.id == f"{site}{way}/f%20g.png"


def test_what_is_no_page_is_named_itself(site):
    [item] = Files(f"{site}/nowhere").items()
    assert item.image == f"{site}/nowhere"
