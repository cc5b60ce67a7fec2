"""What a body may hold, and what reading it costs others: bounded before it is parsed."""

import json
import os
import socket

import pytest

from runtime.errors import InvalidRequest
from server.requests.json_body import json_parts
from server.requests.multipart_body import media_type, read_form
from server.requests.parts import Parts
from tests.support.fakes import fake_engine
from tests.support.live import JSON, as_json, b64, png, serve, until


@pytest.mark.parametrize(
    "header",
    [
        "multipart/form-data; boundary=x" + "-" * 60_000,
        "multipart/form-data; boundary=" + "x" * 71,
        "multipart/form-data; boundary=",
        "multipart/form-data",
        'multipart/form-data; a="' + ";" * 65_000,
    ],
)
def test_a_content_type_is_bounded_before_it_is_parsed(header):
    with pytest.raises(InvalidRequest, match="Content-Type"):
        media_type(header)


def test_a_form_is_read_in_pieces_and_has_few_parts():
    part = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n%s\r\n'
    form = part % (b"\r\n-" * 200_000) + b"--b--\r\n"
    found = Parts()
    assert len(list(read_form(form, "b", found))) > 5
    assert found.images == [b"\r\n-" * 200_000]
    with pytest.raises(InvalidRequest, match="multipart"):
        list(read_form(part % b"x" * 100 + b"--b--\r\n", "b", Parts()))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{%s}" % b",".join(b'"%d":1' % n for n in range(100_000)), "too large without its image"),
        (b'{"image": [%s"x"]}' % (b'"x",' * 100_000), "too large without its image"),
        (b'{"a": %s1%s}' % (b"[" * 20, b"]" * 20), "nested"),
        (b'{"a": [%s[]]}' % (b"[]," * 600), "more than 512 values"),
        (b"{%s}" % b",".join(b'"%d":1' % n for n in range(600)), "more than 512 values"),
        (b'{"a": %s}' % (b" " * 20_000), "too large without its image"),
        (b'{"prompt": "%s"}' % (b"x" * 20_000), "more than 16 KiB"),
        (b'{"%s": 1}' % (b"x" * 20_000), "more than 16 KiB"),
        (b'{"image": "%s"}' % (b"\xf0\x9f\x98\x80" * 20_000), "not base64"),
        (b'{"image": "\\u0000 99"}', "zero character"),
        (b'{"image": "%s"}' % (b"\\u0041" * 20_000), "not base64"),
        (b'{"image": "%s"}' % (b'\\"' * 20_000), "too large without its image"),
        (b'{"prompt": "%s"}' % (b"\\\\" * 20_000), "more than 16 KiB"),
        (b'{"image": "%s' % (b"x" * 20_000), "too large without its image"),
        *(
            (b'{"a": "%s", %s}' % (b'\\"' * 1030, mark), "too large without its image")
            for mark in (
                b'"prompt": "\\u00005"',
                b'"prompt": "\\u0000abc"',
                b'"messages": [{"content": [{"image_url": {"url": "\\u00007"}}]}]',
            )
        ),
    ],
)
def test_json_is_bounded_before_it_is_built(body, message):
    with pytest.raises(InvalidRequest, match=message):
        json_parts(body)


def test_quotes_behind_any_number_of_backslashes_end_what_they_end():
    for count in range(40):
        prompt = "\\" * count + '"' + "x"
        assert json_parts(as_json(prompt=prompt, image="")) == Parts(
            {"prompt": prompt, "image": 1}, [b""]
        )


def test_a_field_of_a_form_is_given_once():
    part = b'--b\r\nContent-Disposition: form-data; name="n"\r\n\r\n3\r\n'
    with pytest.raises(InvalidRequest, match="given twice"):
        list(read_form(part * 2 + b"--b--\r\n", "b", Parts()))


def test_a_large_image_in_json_may_be_written_as_clients_do():
    image = os.urandom(60_000)
    written = b64(image)
    php = written.replace("/", r"\/")
    dotnet = written.replace("+", r"\u002B")
    for text in (written, php, dotnet, "data:image/png;base64," + written):
        parts = json_parts(b'{"prompt": "3 4", "image": "%s"}' % text.encode())
        assert parts == Parts({"prompt": "3 4", "image": 1}, [image])
    assert Parts.unpacked(Parts({"a": 1}, [image, b""]).packed()) == Parts({"a": 1}, [image, b""])


def test_nothing_that_a_client_sends_comes_back_in_full():
    with serve(fake_engine, max_body_bytes=2_000_000) as live:
        name = "\x7f" * 4_000
        replies = [
            live.caption(as_json(image=b64(png()), **{name: 1}), **JSON),
            live.caption(png(), f"?{name}=1".replace("\x7f", "%7F")),
            live.caption(png(), Content_Type="text/" + "x" * 400),
            live.caption(as_json(image=b64(png()), max_new_tokens=10**4000), **JSON),
        ]
    assert all(400 <= r.status < 500 and len(r.body) < 1000 for r in replies)


@pytest.mark.parametrize(("size", "count"), [(300, 64), (4_000, 16), (9_000, 64), (30_000, 8)])
def test_many_images_of_any_size_fit_a_json_body(size, count):
    images, prompt, url = (
        [bytes([n]) * size for n in range(count)],
        "é" * 400,
        "http://x/" + "y" * 300,
    )
    urls = ["data:image/png;base64," + b64(image) for image in images]
    parts = [{"type": "image_url", "image_url": {"url": each}} for each in [*urls, url]]
    for body, at in (
        ({"images": [{"image": b64(image)} for image in images]}, "images"),
        ({"image": [b64(image) for image in images]}, "image"),
        ({"messages": [{"role": "user", "content": parts}]}, "messages"),
        ({"inputs": [{"name": "IMAGE", "data": [b64(image) for image in images]}]}, "inputs"),
    ):
        found = json_parts(as_json(prompt=prompt, **body))
        assert found.images == images
        assert found.fields["prompt"] == prompt
        if at == "messages":
            assert found.fields["messages"][0]["content"][-1]["image_url"]["url"] == url


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-32"])
def test_json_in_another_coding_than_utf_8_is_refused(coding):
    for text in ("\0", "\0x", "\0" + "9" * 40, "é"):
        for fields in ({text: 1}, {"image": text}, {"prompt": text}, {"images": [{"image": text}]}):
            with pytest.raises(InvalidRequest, match="UTF-8"):
                json_parts(json.dumps(fields, ensure_ascii=False).encode(coding))
    assert json_parts(b"\xef\xbb\xbf" + as_json(prompt="x")).fields == {"prompt": "x"}


def test_texts_of_a_json_body_are_bounded_beside_many_images():
    images = [b64(bytes(7_000))] * 8
    with pytest.raises(InvalidRequest, match="too large without its image"):
        json_parts(as_json(image=images, texts=["x" * 8_000] * 9))
    with pytest.raises(InvalidRequest, match="too large without its image"):
        json_parts(as_json(image=images, **{"x" * 300: 1}))
    with pytest.raises(InvalidRequest, match="more than 16 KiB"):
        json_parts(as_json(image=images, prompt="x" * 17_000))


def test_a_large_json_body_is_taken_apart_elsewhere_and_captioned():
    with serve(fake_engine) as live:
        padded = png() + bytes(200_000)
        reply = live.caption(as_json(image=b64(padded), prompt="3"), **JSON)
        assert reply.json["caption"] == live.caption(png(), "?prompt=3").json["caption"]
        until(lambda: live.service.budget.held == 0)


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "x"])
def test_a_content_length_that_is_none_is_the_clients_fault(length):
    with serve(fake_engine) as live:
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            client.sendall(
                f"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\nx".encode()
            )
            assert client.recv(100).split()[1].startswith(b"4")
        assert live.caption(png()).status == 200


def test_bodies_are_not_parsed_where_none_is_wanted():
    kind = "multipart/form-data; boundary=x" + "-" * 10_000
    with serve(fake_engine) as live:
        assert (
            live.request("POST", "/samples/owl.png", b"-" * 60_000, Content_Type=kind).status == 405
        )
        assert live.request("POST", "/nope", b"-" * 60_000, Content_Type=kind).status == 404


def test_short_strings_of_json_are_bounded_together():
    pair = b'"%s":"%s"' % (b"\x7f" * 15_900, b"\x7f" * 15_900)
    with pytest.raises(InvalidRequest, match="too large without its image"):
        json_parts(b"{%s}" % b",".join([pair] * 3))


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/", {"inputs": b64(png())}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(png())}"}}
        ]}]}),
        ("/v2/models/fake/infer", {"inputs": [
            {"name": "IMAGE", "datatype": "BYTES", "shape": [1], "data": [b64(png())]}
        ]}),
    ],
)  # fmt: skip
def test_an_image_where_a_protocol_has_none_is_not_dropped_in_silence(path, fields):
    with serve(fake_engine) as live:
        assert live.request("POST", path, as_json(**fields), **JSON).status == 200
        for name, wrong in (("video", "unknown field 'video'"), ("image", "image")):
            reply = live.request("POST", path, as_json(**fields, **{name: b64(png(1))}), **JSON)
            assert reply.status == 400
            assert wrong in reply.body.decode()
