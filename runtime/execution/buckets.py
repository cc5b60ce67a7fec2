"""Sizes that graphs are bound and captured for."""

from collections.abc import Sequence

_BETWEEN_FROM = 64  # rows: up to here a step takes as long for twice as many


def buckets(most: int) -> tuple[int, ...]:
    """Numbers of rows: 1, 2, 4, ... 64, 96, 128, 192, ... and `most`.

    A larger step takes longer, and half as many sizes again cost little to capture.
    """
    powers = [1 << n for n in range(most.bit_length())]
    between = [p + p // 2 for p in powers if p >= _BETWEEN_FROM]
    return (*(n for n in sorted(powers + between) if n < most), most)


def bucket(rows: int, sizes: Sequence[int]) -> int:
    """The smallest of `sizes` that holds `rows`."""
    return next(size for size in sizes if size >= rows)
