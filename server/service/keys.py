"""API keys: who may send requests, how often, and how many at once.

The file has a line for each key: name, SHA-256 of the key, requests a second, requests at once,
separated by spaces; 0 means no limit. `vignette keys NAME` makes one. Only digests of keys are
stored, and no log contains a key.
"""

import argparse
import hashlib
import math
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InvalidRequest, VignetteError
from server.refusals import TooFast
from server.service.usage import KeyUsage

CHECKED = "keys"  # in the run's folder: the last valid content of the key file
_COMMENT, _SLOWEST = "#", 1e-6  # of a line; requests a second of a key
_BURST_SECONDS = 2  # seconds' worth of its rate that a key may send at once


class InvalidKeys(VignetteError):
    """The key file can't be used."""


class Unauthorised(VignetteError):
    """No key, or one that is not in the file."""


@dataclass(frozen=True, slots=True)
class Client:
    """A line of the key file. A limit of 0 means none."""

    name: str
    digest: bytes
    rate: float
    at_once: int

    @property
    def burst(self) -> float:
        """Requests that may come at once after a pause."""
        return max(1.0, self.rate * _BURST_SECONDS) if self.rate else math.inf

    @property
    def most_together(self) -> float:
        """Images that one request may have."""
        return min(self.burst, self.at_once or math.inf)


class Keys:
    """The keys that a front-end accepts. Limits hold for all front-ends together."""

    def __init__(self, clients: list[Client], usage: KeyUsage) -> None:
        self._clients, self._usage = clients, usage
        self._indices = {client.digest: n for n, client in enumerate(clients)}

    @classmethod
    def open(
        cls, path: Path, folder: Path, front_ends: int = 1, index: int = 0, reading: int = 0
    ) -> "Keys":
        """Read the keys for front-end `index`, counting in `folder`. Raises InvalidKeys.

        reading: how often the file was read again. Each reading has counts of its own, and so has
        each content: a restarted front-end may find a newer file than the others have read.
        """
        clients = read(path)
        digest = hashlib.sha256(b"".join(client.digest for client in clients)).hexdigest()
        usage = KeyUsage(folder / f"usage-{reading}-{digest}", len(clients), front_ends, index)
        return cls(clients, usage)

    def close(self) -> None:
        """Retire these counts; requests inside still leave normally."""
        self._usage.remove()

    @contextmanager
    def enter(self, key: str | None, count: int = 1, held: int = 0) -> Iterator[str]:
        """Hold places for the owner of `key`, all or none; yields the owner's name.

        held: places that the same request has already. Raises Unauthorised, TooFast, or
        InvalidRequest if so many in one request are never allowed.
        """
        index = self._find(key)
        with self._usage.held():
            self._admit(index, count, held, time.monotonic())
        try:
            yield self._clients[index].name
        finally:
            with self._usage.held():
                self._usage.count(index, -count)

    def _admit(self, index: int, count: int, held: int, now: float) -> None:
        client, usage, together = self._clients[index], self._usage, count + held
        most = client.most_together
        if together > most:
            raise InvalidRequest(
                f"{together} images are as many requests, of which this key may send "
                f"{math.floor(most)} at once: send at most so many images together"
            )
        if client.at_once and usage.inside(index) + count > client.at_once:
            raise TooFast(f"this key may have {client.at_once} requests at once", 1)
        if client.rate:
            tokens = usage.refill(index, client.rate, client.burst, now)
            if tokens < count:  # the whole request comes again
                wait = math.ceil((together - tokens) / client.rate)
                raise TooFast(f"this key may send {client.rate:g} requests a second", wait)
            usage.spend(index, count)
        usage.count(index, count)

    def _find(self, key: str | None) -> int:
        if not key:
            raise Unauthorised("send your key: Authorization: Bearer <key>, or X-API-Key: <key>")
        # The lookup's timing reveals at most digests, from which no key can be derived.
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = self._indices.get(digest)
        if found is None:
            raise Unauthorised("this key is not known here")
        return found


def sent(headers: Mapping[str, str]) -> str | None:
    """The key of a request: a bearer token, or x-api-key. Header names are in lower case."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else None
    return bearer or headers.get("x-api-key")


def copy(path: Path, folder: Path) -> int:
    """Copy a key file that is valid to CHECKED in the run's folder; returns the number of keys.

    Raises InvalidKeys, and OSError if there is no room for the copy.
    """
    text = _text(path)
    clients = _parsed(path, text)
    new = folder / f"{CHECKED}.new"
    new.touch(0o600)
    new.write_text(text, "utf-8")
    new.replace(folder / CHECKED)
    return len(clients)


def read(path: Path) -> list[Client]:
    """Parse a key file; raises InvalidKeys naming the line that is wrong."""
    return _parsed(path, _text(path))


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise InvalidKeys(f"{path} is no file")
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as cause:
        raise InvalidKeys(f"{path} can't be read: {cause}") from cause


def _parsed(path: Path, text: str) -> list[Client]:
    clients, known = [], set[bytes]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith(_COMMENT):
            continue
        try:
            client = _client(line)
        except ValueError as cause:
            raise InvalidKeys(
                f"{path}, line {number}: expected name, sha256, requests a second, requests at "
                "once (make one with `vignette keys NAME`)"
            ) from cause
        if client.digest in known:
            raise InvalidKeys(f"{path}, line {number}: an earlier line has this key: make another")
        known.add(client.digest)
        clients.append(client)
    if not clients:
        raise InvalidKeys(f"{path} has no keys: nobody could come in")
    return clients


def _client(line: str) -> Client:
    """Parse a line of the file. Raises ValueError if it is malformed."""
    name, digest, rate, at_once = line.split()
    client = Client(name, bytes.fromhex(digest), float(rate), int(at_once))
    whole = len(client.digest) == hashlib.sha256().digest_size
    slowest = client.rate and client.rate < _SLOWEST
    if not whole or slowest or not 0 <= client.rate < math.inf or client.at_once < 0:
        raise ValueError("not a SHA-256, or a limit out of range")
    if name.startswith(_COMMENT):
        raise ValueError("a comment")
    return client


def main(arguments: list[str] | None = None) -> int:
    """Make a key: show it on standard error, and its line for the file on standard output."""
    parser = argparse.ArgumentParser(prog="vignette keys", description=main.__doc__)
    parser.add_argument("name", help="of the client, one word")
    parser.add_argument("rate", nargs="?", default="0", help="requests a second (no limit)")
    parser.add_argument("at_once", nargs="?", default="0", help="requests at once (no limit)")
    args = parser.parse_args(arguments)
    name, rate, at_once = args.name, args.rate, args.at_once
    key = secrets.token_urlsafe(32)
    line = f"{name} {hashlib.sha256(key.encode()).hexdigest()} {rate} {at_once}"
    try:
        _client(line)
    except ValueError:
        print(
            f"NAME is one word and begins with no {_COMMENT}; RATE and AT_ONCE are numbers, 0 for "
            f"no limit, and RATE not below {_SLOWEST:g}",
            file=sys.stderr,
        )
        return 2
    print(f"key, for {name} alone: {key}", file=sys.stderr)
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
