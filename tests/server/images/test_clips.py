"""Clips: frames evenly over their length, under the decoders' limits."""

import base64
import io
import json
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from fractions import Fraction
from functools import partial

import av
import numpy as np
import pytest
from PIL import Image

from bench.reliability.crafted import scans
from runtime.errors import InvalidImage, TooManyPixels
from server.images import clips
from server.images.clips import Clip, NoVideo, frames_of, places
from tests.support.fakes import fake_engine, video_engine
from tests.support.live import serve
from tests.support.paths import SAMPLES

LENGTH, FRAMES = 21, 6
GREYS = [10 * place for place in range(LENGTH)]
KINDS = {"mp4": "libx264", "mov": "mpeg4", "webm": "libvpx", "gif": "", "webp": "", "png": ""}


def clip(kind: str, size: tuple[int, int] = (64, 48)) -> bytes:
    """A clip of uniformly grey frames, each lighter than the one before."""
    images = [Image.new("RGB", size, (grey, grey, grey)) for grey in GREYS]
    content = io.BytesIO()
    if not KINDS[kind]:
        options = {"lossless": True} if kind == "webp" else {}
        first, *others = images
        first.save(content, kind, save_all=True, append_images=others, duration=40, **options)
        return content.getvalue()
    with av.open(content, "w", format=kind) as container:
        stream = container.add_stream(KINDS[kind], rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))
    return content.getvalue()


def greys(frames: Iterable[Image.Image]) -> list[float]:
    return [float(np.asarray(frame).mean()) for frame in frames]


def test_frames_are_spread_over_the_whole_clip():
    assert places(LENGTH, FRAMES) == [0, 4, 8, 12, 16, 20]
    assert places(3, FRAMES) == [0, 0, 1, 1, 2, 2]
    assert places(1, FRAMES) == [0] * FRAMES
    assert places(LENGTH, 1) == [0]


@pytest.mark.parametrize("content", [
    "ffconcat version 1.0\nfile {path}\n", "ffconcat version 1.0\nfile owl.png\n",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video 50004 RTP/AVP 26\n",
    "#EXTM3U\n#EXTINF:1,\n{path}\n", "{path}", "xxxxftyp",
])  # fmt: skip
def test_what_names_files_or_addresses_is_no_clip(content, monkeypatch):
    """FFmpeg has formats that lead it to other files of this machine, or make it listen."""
    monkeypatch.chdir(SAMPLES)
    data = content.format(path=SAMPLES / "owl.png").encode()
    with pytest.raises(InvalidImage, match="send mp4, webm, mov"):
        list(frames_of(data, 1, 10**6))


def test_a_clip_of_jpegs_of_hundreds_of_scans_is_refused():
    content = io.BytesIO()
    with av.open(content, "w", format="mov") as container:
        stream = container.add_stream("mjpeg", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for count in (90, 101):
            packet = av.Packet(scans(count, 64))
            packet.stream, packet.pts, packet.dts = stream, count, count
            packet.time_base = Fraction(1, 25)
            container.mux(packet)
    with pytest.raises(InvalidImage, match="101 scans"):
        list(frames_of(content.getvalue(), 1, 10**6))


@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_each_kind(kind):
    found = greys(frames_of(clip(kind), FRAMES, 10**6))
    assert found == pytest.approx([GREYS[place] for place in places(LENGTH, FRAMES)], abs=4)


def trimmed(data: bytes, first: int, count: int) -> bytes:
    """An mp4 of 25 frames a second whose edit list shows `count` frames from `first` on, as
    programs write it that cut without encoding again.
    """
    whole, place, media = data.index(b"elst") + 12, data.index(b"mvhd"), data.index(b"mdhd")
    scales = (int.from_bytes(data[box + 16 : box + 20], "big") for box in (place, media))
    shown, skipped = (n * scale // 25 for n, scale in zip((count, first), scales, strict=True))
    skipped += int.from_bytes(data[whole + 4 : whole + 8], "big")  # of frames out of order
    return data[:whole] + struct.pack(">II", shown, skipped) + data[whole + 8 :]


def test_frames_that_were_trimmed_away_do_not_count():
    for first, count in ((0, 11), (10, 11), (0, LENGTH)):
        found = greys(frames_of(trimmed(clip("mp4"), first, count), FRAMES, 10**6))
        expected = [GREYS[first + place] for place in places(count, FRAMES)]
        assert found == pytest.approx(expected, abs=4)


def test_frames_that_grow_beyond_the_limit_are_refused():
    content, options = io.BytesIO(), {"x264-params": "repeat-headers=1:annexb=1"}
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 48, "yuv420p", options
        for place, size in enumerate([(64, 48), (800, 600)]):
            codec = av.CodecContext.create("libx264", "w")
            codec.width, codec.height = size
            codec.pix_fmt, codec.time_base, codec.options = "yuv420p", Fraction(1, 25), options
            frame = av.VideoFrame.from_image(Image.new("RGB", size)).reformat(format="yuv420p")
            for coded in [*codec.encode(frame), *codec.encode(None)]:
                packet = av.Packet(bytes(coded))
                packet.stream, packet.time_base = stream, Fraction(1, 25)
                packet.pts = packet.dts = place
                container.mux(packet)
    assert len(list(frames_of(content.getvalue(), 2, 10**6))) == 2
    with pytest.raises(TooManyPixels, match=r"more than 0\.1 megapixels a frame"):
        list(frames_of(content.getvalue(), 2, 10**5))


def test_an_animation_that_is_damaged_anywhere_is_no_clip():
    whole, rng = clip("gif"), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole[: rng.integers(20, len(whole))])
        damaged[rng.integers(13, len(damaged))] = rng.integers(256)
        with suppress(InvalidImage, TooManyPixels):
            list(frames_of(bytes(damaged), FRAMES, 10**6))


def test_what_is_no_clip_and_what_is_too_large_is_told():
    with pytest.raises(InvalidImage, match="not a clip"):
        next(frames_of(b"\0\0\0\x20ftypisom" + bytes(200), FRAMES, 10**6))
    with pytest.raises(InvalidImage, match=r"not an image|not a clip"):
        next(frames_of(b"GIF89a" + bytes(20), FRAMES, 10**6))
    for kind in ("mp4", "gif"):
        with pytest.raises(TooManyPixels):
            next(frames_of(clip(kind), FRAMES, 1000))


MANY = video_engine(3).manifest


@pytest.fixture(scope="module")
def live():
    with serve(partial(video_engine, 3), manifest=MANY) as live:
        yield live


def said_of(data: bytes) -> str:
    """The caption of the clip's frames, sent one by one."""
    pictures = []
    for frame in frames_of(data, 3, 10**6):
        content = io.BytesIO()
        frame.save(content, "PNG")
        pictures.append(base64.b64encode(content.getvalue()).decode())
    with serve(partial(video_engine, 3), manifest=MANY) as live:
        body = json.dumps({"image": pictures}).encode()
        return live.caption(body, **{"Content-Type": "application/json"}).json["caption"]


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_a_clip_says_what_its_frames_say(live, kind):
    data = clip(kind)
    expected = said_of(data)
    raw = live.caption(data, **{"Content-Type": f"video/{kind}"})
    assert raw.json["caption"] == expected
    in_json = json.dumps({"video": base64.b64encode(data).decode()}).encode()
    assert live.caption(in_json, **{"Content-Type": "application/json"}).json["caption"] == expected
    head = b'--b\r\nContent-Disposition: form-data; name="video"; filename="x"\r\n\r\n'
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    assert live.caption(head + data + b"\r\n--b--\r\n", **form).json["caption"] == expected


def test_a_model_of_one_image_takes_a_clips_first_frame_if_asked():
    kind = {"Content-Type": "video/mp4"}
    data = clip("mp4")
    with serve(fake_engine) as live:
        reply = live.caption(data, **kind)
        assert (reply.status, reply.error) == (400, "invalid_request")
        assert "first_frame=true" in reply.body.decode()
        content = io.BytesIO()
        next(frames_of(data, 1, 10**6)).save(content, "PNG")
        first = live.caption(content.getvalue()).json["caption"]
        assert live.caption(data, "?first_frame=true", **kind).json["caption"] == first


def test_what_is_wrong_with_a_clip_is_told(live):
    kind = {"Content-Type": "video/mp4"}
    reply = live.caption(b"\0\0\0\x20ftypisom" + bytes(200), **kind)
    assert (reply.status, reply.error) == (400, "invalid_image")
    body = json.dumps({"video": "AA==", "image": "AA=="}).encode()
    reply = live.caption(body, **{"Content-Type": "application/json"})
    assert "either video or images" in reply.body.decode()


def test_without_the_package_videos_are_refused_and_animations_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(clips, "find_spec", lambda name: None)
    with pytest.raises(NoVideo, match="pip install av"):
        clips.check(Clip(clip_head()))
    clips.check(Clip(b"GIF89a"))


def clip_head() -> bytes:
    return b"\0\0\0\x20ftypisom"
