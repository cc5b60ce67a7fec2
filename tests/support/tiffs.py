"""TIFF files that Pillow does not write."""

import struct


def tiff(*tags: tuple[int, int, int, bytes], data: bytes = b"") -> bytes:
    """A TIFF of 300 x 200. tags: number, type, count, values; data: behind them."""
    usual = ((256, 300), (257, 200), (259, 1), (262, 2), (277, 3), (278, 1))
    given = {tag: (tag, 4, 1, struct.pack("<I", value)) for tag, value in usual}
    given |= {tag[0]: tag for tag in tags}
    head = b"II*\0" + struct.pack("<IH", 8, len(given))
    place = len(head) + 12 * len(given) + 4
    values = b""
    for tag, kind, count, value in sorted(given.values()):
        head += struct.pack("<HHI", tag, kind, count)
        if len(value) <= 4:
            head += value.ljust(4, b"\0")
        else:
            head += struct.pack("<I", place + len(values))
            values += value
    return head + bytes(4) + values + data
