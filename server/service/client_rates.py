"""Rates of clients for what can't be refused: it takes a front-end as long as refusing it.

Used on the event loop's thread only.
"""

from server.fairness.token_buckets import TokenBuckets

_BYTES = 100e6, 32e6  # bytes of all large bodies, a second and at once: half of a slow core
_MUCH = 64 * 1024  # bytes within a second, by which a client counts as one that sends large bodies
_REFUSALS, _ALL_REFUSALS = (50.0, 100.0), 200.0  # a second and at once; a second of all clients
# A restarted proxy abandons all its requests in flight: the burst is above that number.
_ABANDONED, _ALL_ABANDONED, _ABANDONED_SECONDS = (10.0, 200.0), 50.0, 2.0
_SERVED = 0.2  # of an abandoned request's cost, which a served request earns back
_PAGES, _ALL_PAGES = (200.0, 400.0), 500.0  # of requests that are no captions, likewise


def pages(share: float = 1.0) -> TokenBuckets:
    """Buckets for requests that are no captions. share: of the machine's rates, of this process."""
    rate, burst = _PAGES
    return TokenBuckets(rate * share, burst * share, total=_ALL_PAGES * share)


class ClientRates:
    """A token bucket for each client and kind. uploads: bytes of large bodies. refusals: errors.
    abandoned: requests for captions that their clients left. pages: all other requests.
    """

    def __init__(self, share: float = 1.0) -> None:
        """share: of the machine's rates, of this process, but of `uploads`: they take its core."""
        self.uploads = TokenBuckets(*_BYTES, total=_BYTES[0], least=_MUCH)
        rate, burst = _REFUSALS
        self.refusals = TokenBuckets(rate * share, burst * share, total=_ALL_REFUSALS * share)
        rate, burst = _ABANDONED
        self.abandoned = TokenBuckets(
            rate * share, burst * share, longest=_ABANDONED_SECONDS, total=_ALL_ABANDONED * share
        )
        self.pages = pages(share)

    def owed(self, client: str) -> float:
        """Seconds that a client has to wait for its earlier refused or abandoned requests."""
        return max(self.refusals.owed(client), self.abandoned.owed(client))

    def was_served(self, client: str) -> None:
        """Credit a client for a request that was answered with a caption."""
        self.refusals.earn(client, 1)
        self.abandoned.earn(client, _SERVED)

    def was_abandoned(self, client: str, requests: int = 1) -> None:
        """Charge a client for abandoned requests: decoders and engine worked for nothing."""
        self.abandoned.spend(client, requests)
