"""Frames of a clip, evenly over its whole length, as GIT's video checkpoints were trained.

Animations are read by Pillow, videos by PyAV (an extra). Runs in an image decoder process, under
its limits: a long video is decoded frame by frame up to the last one needed.
"""

import io
from collections import deque
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from PIL import Image

from runtime.errors import InvalidImage, TooManyPixels, VignetteError
from runtime.model.preprocess import DAMAGE, opened, to_rgb
from server.images.cost import scans_of

_ANIMATIONS = (b"GIF8", b"RIFF", b"\x89PNG")  # GIF, WebP, PNG
# Containers that hold their frames, by how they begin. FFmpeg's other formats are not tried: some
# name files, or addresses to listen at.
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # at 4; the last: old QuickTime
_MATROSKA = b"\x1aE\xdf\xa3"
_NO_CLIP = "not a clip that can be decoded: send mp4, webm, mov, GIF, or animated WebP or PNG"
_QUARTERS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180,
             270: Image.Transpose.ROTATE_270}  # fmt: skip


class Clip(bytes):
    """An encoded clip, in place of an image."""


class NoVideo(VignetteError):
    """Videos can't be decoded here."""


def check(data: bytes) -> None:
    """Raise NoVideo for a video if PyAV is missing."""
    if not data.startswith(_ANIMATIONS) and find_spec("av") is None:
        raise NoVideo(
            "videos are not taken here, for want of the package av (pip install av, or the extra "
            "video): send frames as images, or an animation"
        )


def frames_of(data: bytes, count: int, max_pixels: int) -> Iterator[Image.Image]:
    """Yield `count` frames, one held at a time; a shorter clip repeats some.

    Raises InvalidImage or TooManyPixels.
    """
    if data.startswith(_ANIMATIONS):
        return _animation(opened(data, max_pixels), count)
    return _video(data, count, max_pixels)


def places(length: int, count: int) -> list[int]:
    """Indices of the `count` frames taken from `length`."""
    if count == 1:
        return [0]
    return [round(place * (length - 1) / (count - 1)) for place in range(count)]


def _animation(image: Image.Image, count: int) -> Iterator[Image.Image]:
    try:
        # To count them, Pillow visits all.
        length = getattr(image, "n_frames", 1) if count > 1 else 1
        for place in places(length, count):
            image.seek(place)
            yield to_rgb(image)
    except DAMAGE as cause:
        raise InvalidImage(_NO_CLIP) from cause


def _video(data: bytes, count: int, max_pixels: int) -> Iterator[Image.Image]:
    import av

    try:
        with _container(data) as container:
            stream = _stream(container, max_pixels)
            length = sum(_counts(packet, stream) for packet in container.demux(stream))
        wanted, frame = deque(places(length, count)), None
        with _container(data) as container:
            for place, frame in enumerate(container.decode(_stream(container, max_pixels))):
                while wanted and wanted[0] == place:
                    wanted.popleft()
                    yield _upright(frame, max_pixels)
                if not wanted:
                    return
    except (av.error.FFmpegError, IndexError, ValueError) as cause:
        raise InvalidImage(_NO_CLIP) from cause
    if frame is None:
        raise InvalidImage(_NO_CLIP)
    for _ in wanted:  # a container may have more packets than frames
        yield _upright(frame, max_pixels)


def _counts(packet: Any, stream: Any) -> bool:
    """Whether a packet holds a frame that is shown: a trimmed clip has others, outside of its edit
    list. Raises InvalidImage for a JPEG of too many scans.
    """
    if packet.size and stream.codec_context.name == "mjpeg":
        scans_of(bytes(packet))
    return packet.size > 0 and not packet.is_discard


def _container(data: bytes) -> Any:
    import av

    if data.startswith(_MATROSKA):
        name = "matroska"
    elif data[4:8] in _MP4_BOXES:
        name = "mov"
    else:
        raise InvalidImage(_NO_CLIP)
    return av.open(io.BytesIO(data), format=name, io_open=_nothing_else)


def _nothing_else(*_: object) -> None:
    raise ValueError("a clip names another file")


def _stream(container: Any, max_pixels: int) -> Any:
    """The first video stream, on one thread."""
    stream = container.streams.video[0]
    if stream.codec_context is None:  # of an unknown codec
        raise InvalidImage(_NO_CLIP)
    stream.codec_context.thread_count = 1
    _check_size(stream.codec_context, max_pixels)
    return stream


def _check_size(sized: Any, max_pixels: int) -> None:
    if sized.width * sized.height > max_pixels:
        raise TooManyPixels(f"the clip has more than {max_pixels / 1e6:g} megapixels a frame")


def _upright(frame: Any, max_pixels: int) -> Image.Image:
    """A frame with its display rotation applied. Raises TooManyPixels: frames may grow."""
    _check_size(frame, max_pixels)
    image: Image.Image = frame.to_image()
    turn = _QUARTERS.get(round(getattr(frame, "rotation", 0)) % 360)
    return image if turn is None else image.transpose(turn)
