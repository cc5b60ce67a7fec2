"""Images and clips that cost more than they look, for attacks."""

import io
import os
import struct
import zlib
from fractions import Fraction
from functools import cache

from PIL import Image


@cache
def scans(count: int, side: int) -> bytes:
    """A progressive JPEG of `count` scans, the last of them repeated."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 9).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    more = count - data.count(b"\xff\xda")
    return data[:-2] + data[last:-2] * more + data[-2:]


@cache
def unpacking(side: int = 7071) -> bytes:
    """A lossless WebP of 34 bytes that unpacks to a gigabyte."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "WEBP", lossless=True, quality=0, method=0)
    return buffer.getvalue()


@cache
def late_clip() -> bytes:
    """An mp4 of 1,600 large frames of which its edit list shows the last ones."""
    import av

    content, rate = io.BytesIO(), Fraction(25)
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 3840, 2160, "yuv420p"
        stream.options = {
            "preset": "ultrafast", "bf": "0", "x264-params": "keyint=100000:scenecut=0:ref=1",
        }  # fmt: skip
        frame = av.VideoFrame.from_image(Image.new("RGB", (3840, 2160), "gray"))
        coded = []
        for _ in range(34):
            frame.pts = None
            coded += [bytes(packet) for packet in stream.encode(frame)]
        coded += [bytes(packet) for packet in stream.encode(None)]
        coded += coded[1:17] * 98
        for place, data in enumerate(coded):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, place, place, 1 / rate
            packet.is_keyframe = place == 0
            container.mux(packet)
    data = content.getvalue()
    edit, movie, media = data.index(b"elst") + 12, data.index(b"mvhd"), data.index(b"mdhd")
    scales = (int.from_bytes(data[box + 16 : box + 20], "big") for box in (movie, media))
    shown, skipped = (n * scale // 25 for n, scale in zip((5, len(coded) - 5), scales, strict=True))
    return data[:edit] + struct.pack(">II", shown, skipped) + data[edit + 8 :]


@cache
def tags() -> bytes:
    """A TIFF of 65,535 unknown tags."""
    entry = b"\x60\xea\x02\x00\x09\x00\x00\x00\x08\x00\x00\x00"
    return b"II*\x00\x08\x00\x00\x00\xff\xff" + entry * 65_535 + bytes(4)


@cache
def strips(count: int = 500_000) -> bytes:
    """A TIFF of 300 x 200 and so many strips, all of the same bytes."""
    tags = ((256, 1, 300), (257, 1, 200), (262, 1, 1), (273, count, 86), (278, 1, 1))
    entries = b"".join(struct.pack("<HHII", tag, 4, length, value) for tag, length, value in tags)
    head = b"II*\x00" + struct.pack("<IH", 8, len(tags)) + entries
    return head.ljust(86, b"\0") + struct.pack("<I", 8) * count


def broken_giant() -> bytes:
    """A PNG of 25 megapixels by its head, and no more; another one each time."""
    size = struct.pack(">2I5B", 5000, 5000, 8, 2, 0, 0, 0)
    parts = (b"IHDR" + size, b"IDAT" + os.urandom(8), b"IEND")
    chunks = (
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
