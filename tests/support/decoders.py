"""Decoder processes for tests, over a small store of pixels."""

import asyncio
import hashlib
import io
import time

from PIL import Image

from runtime.model.manifest import Preprocessing
from server.images.decoder import PixelSlot, Setup, Target
from server.images.pool import ImageDecoders, ImageJob, Origin
from server.ipc.shared import PixelStore

HOW = Preprocessing(32, 32, 3)


def new_store(folder):
    return PixelStore(folder / "pixels", 4, (3, 32, 32), create=True)


def pool(store, seconds=20.0, memory=2048, count=1, pixels=1_000_000):
    setup = Setup((Target((store.path, store.slots, store.shape), HOW),), pixels, memory * 2**20, 0)
    return ImageDecoders(count, setup, seconds)


def job(image, slot=0, client="somebody", seconds=30.0, digest=""):
    origin = Origin(
        client, digest or hashlib.sha256(image).hexdigest(), time.perf_counter() + seconds
    )
    return ImageJob(image, PixelSlot(0, slot), origin)


def decode(decoders, image, slot=0, **options):
    asyncio.run(decoders.decode(job(image, slot, **options)))


def expensive(side=1500):
    """A WebP of a few bytes that is expensive to decode."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "WEBP", lossless=True, method=0)
    return buffer.getvalue()
