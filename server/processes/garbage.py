"""Garbage collection in a process that has loaded all that it keeps."""

import gc

_COLLECTIONS = 5_000, 20, 50  # objects per young one, young per middle, middle per full


def settle_garbage() -> None:
    """Exclude present objects from garbage collection and make full ones rare: they visit every
    object while all else waits, a quarter of a second with thousands of connections.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTIONS)
