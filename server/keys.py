"""API keys: who may come in, how often, and how many at once.

The file has a line for each key: name, SHA-256 of the key, requests a second, requests at once,
apart by spaces; 0 means no limit. `python -m server.keys NAME` makes one. Keys are compared in
constant time and appear in no log.
"""

import hashlib
import hmac
import math
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import VignetteError

_BURST_SECONDS = 2  # a key may send so many seconds' worth of its rate at once


class InvalidKeys(VignetteError):
    """The key file can't be used."""


class Unauthorised(VignetteError):
    """No key, or one that is not in the file."""


class TooFast(VignetteError):
    """A key's rate or concurrency is used up; `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(slots=True)
class _Client:
    """`tokens` is a bucket that fills at `rate` a second. A limit of 0 is none."""

    name: str
    digest: bytes
    rate: float
    at_once: int
    inside: int = 0
    tokens: float = 0.0
    filled_at: float = 0.0

    def admit(self, now: float) -> None:
        """Count a request in; raises TooFast."""
        if self.at_once and self.inside >= self.at_once:
            raise TooFast(f"this key may have {self.at_once} requests at once", 1)
        if self.rate:
            most = max(1.0, self.rate * _BURST_SECONDS)
            gained = (now - self.filled_at) * self.rate if self.filled_at else most
            self.tokens, self.filled_at = min(most, self.tokens + gained), now
            if self.tokens < 1:
                wait = math.ceil((1 - self.tokens) / self.rate)
                raise TooFast(f"this key may send {self.rate:g} requests a second", wait)
            self.tokens -= 1
        self.inside += 1


class Keys:
    """The keys of one front-end. With several, each counts its own share of the requests."""

    def __init__(self, clients: list[_Client]) -> None:
        self._clients = clients

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """Raises InvalidKeys naming the line that is wrong."""
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as cause:
            raise InvalidKeys(f"{path} can't be read: {cause}") from cause
        clients = []
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            try:
                name, digest, rate, at_once = line.split()
                client = _Client(name, bytes.fromhex(digest), float(rate), int(at_once))
            except ValueError as cause:
                raise InvalidKeys(
                    f"{path}, line {number}: expected name, sha256, requests a second, requests at "
                    "once (make one with `python -m server.keys NAME`)"
                ) from cause
            if len(client.digest) != hashlib.sha256().digest_size:
                raise InvalidKeys(f"{path}, line {number}: the second word is no SHA-256")
            clients.append(client)
        if not clients:
            raise InvalidKeys(f"{path} has no keys: nobody could come in")
        return cls(clients)

    @contextmanager
    def enter(self, key: str | None) -> Iterator[str]:
        """Hold a place for the owner of `key`, whose name it gives.

        Raises Unauthorised, or TooFast.
        """
        client = self._find(key)
        client.admit(time.monotonic())
        try:
            yield client.name
        finally:
            client.inside -= 1

    def check(self, key: str | None) -> None:
        """Raise Unauthorised for a key that is not in the file; nothing is counted."""
        self._find(key)

    def _find(self, key: str | None) -> _Client:
        if not key:
            raise Unauthorised("send your key: Authorization: Bearer <key>, or X-API-Key: <key>")
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for client in self._clients:  # all of them: the time must not tell which
            if hmac.compare_digest(client.digest, digest):
                found = client
        if found is None:
            raise Unauthorised("this key is not known here")
        return found


def main() -> int:
    """`python -m server.keys NAME [RATE] [AT_ONCE]`: a new key, and the line for the file."""
    if not 1 < len(sys.argv) < 5 or sys.argv[1].startswith("-"):
        print(main.__doc__, file=sys.stderr)
        return 2
    name, rate, at_once = (*sys.argv[1:], *("0", "0")[len(sys.argv) - 2 :])[:3]
    key = secrets.token_urlsafe(32)
    print(f"key, for {name} alone: {key}", file=sys.stderr)
    print(name, hashlib.sha256(key.encode()).hexdigest(), rate, at_once)
    return 0


if __name__ == "__main__":
    sys.exit(main())
