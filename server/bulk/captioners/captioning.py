"""Captions items on threads, as many at a time as keep the captioner busy."""

import threading
from collections import OrderedDict
from collections.abc import Container, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import msgspec
from msgspec.structs import replace

from runtime.errors import VignetteError
from server.bulk.inputs.fetching import fetch, is_url
from server.bulk.inputs.items import Item, Outcome, ScoredCaption, UnfitItem
from server.bulk.inputs.kept import Kept
from server.bulk.inputs.keys import state
from server.bulk.inputs.reading import ItemReader

_FETCHES = 64  # images fetched ahead, beyond those being captioned
_AHEAD = 8  # times as many as run may wait for an earlier one, if ordered
_HELD = 2**30  # bytes of items and images, above which no more are taken


class RunFailed(Exception):
    """No image can be captioned any more."""


class Captioner(Protocol):
    """Captions images for any number of threads; more than `at_once` gain nothing."""

    at_once: int

    def caption(self, image: bytes, prompt: str | None) -> tuple[ScoredCaption, ...]:
        """An image's captions, the best first. Raises VignetteError if this image can't be
        captioned, and RunFailed, which ends the run.
        """

    def stop(self) -> None:
        """Stop retrying: the run is over."""


@dataclass(frozen=True, slots=True)
class CaptioningOptions:
    """How items are captioned. limit: bytes of an image. once: caption equal images once."""

    limit: int
    ordered: bool = False
    once: bool = False


class Captioning:
    """Turns items into outcomes, as they end or in input order."""

    def __init__(self, captioner: Captioner, options: CaptioningOptions, kept: Kept) -> None:
        self._captioner, self._options, self._kept = captioner, options, kept
        self._asking = threading.Semaphore(captioner.at_once)
        self._same: dict[str, Future[tuple[ScoredCaption, ...]]] = {}
        self._lock, self._over = threading.Lock(), threading.Event()

    def run(self, items: Iterable[Item]) -> Generator[Outcome, None, None]:
        """Yield outcomes; closing drops items not begun. Raises the error that ended the run."""
        most = self._captioner.at_once + _FETCHES
        held = most * _AHEAD if self._options.ordered else most
        pool, reader = ThreadPoolExecutor(most, "item"), ItemReader(items)
        running = OrderedDict[Future[Outcome], int]()  # those not yielded, and the bytes of each
        over = set[Future[Outcome]]()  # of these, those that have ended
        size = 0
        events = SimpleQueue[Future[Any]]()  # what has ended, the reading of an item, too
        coming, arrived = reader.next(events.put), False
        try:
            while running or not (arrived and coming.result() is None):
                event = events.get()
                if event is coming:
                    arrived = True
                else:
                    over.add(event)
                    size += _grown(event, running)
                for future in self._to_yield(event, running, over):
                    over.remove(future)
                    size -= running.pop(future)
                    yield future.result()
                room = len(running) - len(over) < most and len(running) < held and size <= _HELD
                if arrived and room and (item := coming.result()) is not None:
                    future = pool.submit(self._outcome, item)
                    running[future] = _bytes(item, self._options.limit)
                    size += running[future]
                    future.add_done_callback(events.put)
                    coming, arrived = reader.next(events.put), False
        finally:
            self._over.set()
            self._captioner.stop()
            reader.close()
            pool.shutdown(cancel_futures=True)

    def _to_yield(
        self,
        event: Future[Any],
        running: Iterable[Future[Outcome]],
        over: Container[Future[Outcome]],
    ) -> list[Future[Outcome]]:
        """Items that have ended; if ordered, up to one that has not."""
        if self._options.ordered:
            return list(takewhile(over.__contains__, running))
        return [event] if event in over else []

    def _outcome(self, item: Item) -> Outcome:
        outcome = begun(item)
        try:
            image = image_of(item, self._options.limit, self._over)
            outcome = replace(outcome, image=image)
            if not self._options.once:
                return replace(outcome, captions=self._ask(image, item.prompt))
            digest = outcome.sha256 or sha256(image).hexdigest()
            outcome = replace(outcome, sha256=digest)
            captions = self._once(same(digest, item.prompt), image, item.prompt)
            return replace(outcome, captions=captions)
        except (VignetteError, OSError) as error:
            return replace(outcome, error=message_of(error))

    def _ask(self, image: bytes, prompt: str | None) -> tuple[ScoredCaption, ...]:
        with self._asking:
            return self._captioner.caption(image, prompt)

    def _once(self, key: str, image: bytes, prompt: str | None) -> tuple[ScoredCaption, ...]:
        """Captions for a key: kept ones, those of a thread already captioning it, or new ones."""
        with self._lock:
            if (kept := self._kept.get(key)) is not None:
                return msgspec.msgpack.decode(kept, type=tuple[ScoredCaption, ...])
            leader = key not in self._same
            future = self._same.setdefault(key, Future())
        if not leader:
            return future.result()
        try:
            captions = self._ask(image, prompt)
            self._kept.keep(key, msgspec.msgpack.encode(captions))
            future.set_result(captions)
            return captions
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._same[key]


def begun(item: Item) -> Outcome:
    """An item's outcome before its image is read."""
    size, modified = state(item.image)
    held = isinstance(item.image, bytes) and item.wrong is None
    digest = sha256(item.image).hexdigest() if held else None  # type: ignore[arg-type]
    return Outcome(item, sha256=digest, size=size, modified=modified)


def _grown(future: Future[Outcome], running: dict[Future[Outcome], int]) -> int:
    """Note the bytes that an ended item holds; return how many more these are than expected: an
    image at a URL counts only from here, until it is yielded.
    """
    before = running[future]
    image = None if future.exception() else future.result().image
    running[future] = max(before, len(image or b""))
    return running[future] - before


def _bytes(item: Item, limit: int) -> int:
    """Bytes that an item holds, or will once its file is read; `limit` of that at most."""
    if isinstance(item.image, bytes):
        return max(len(item.image), sum(map(len, item.members.values())))
    try:
        return 0 if is_url(item.image) else min(limit, Path(item.image).stat().st_size)
    except (OSError, ValueError):  # its row will say so
        return 0


def same(digest: str, prompt: str | None) -> str:
    """The key under which captions of equal images are kept."""
    return f"{digest} {prompt or ''}"


def image_of(item: Item, limit: int, over: threading.Event | None = None) -> bytes:
    """The bytes of an item's image, `limit` at most. Raises VignetteError and OSError.

    over: once it is set, the image is not wanted any more.
    """
    if item.wrong is not None:
        raise UnfitItem(item.wrong)
    if isinstance(item.image, bytes):
        if len(item.image) > limit:
            raise UnfitItem(f"it has more than {limit / 1e6:g} MB (--max-image-mb)")
        return item.image
    try:
        return fetch(item.image, limit, over)
    except (VignetteError, OSError):
        raise
    except ValueError as error:  # not a valid file name
        raise UnfitItem(str(error)) from error
    except Exception as error:  # each file system of fsspec has its own errors
        if not is_url(item.image):
            raise
        raise UnfitItem(f"{type(error).__name__}: {error}") from error


def message_of(error: Exception) -> str:
    """An error's message for an output row; characters that are not UTF-8 are escaped."""
    message = str(error) or type(error).__name__
    return message.encode("utf-8", "backslashreplace").decode()
