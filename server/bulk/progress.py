"""Progress of a run: one line on a terminal, else a line a minute."""

import sys
import threading
import time
from collections.abc import Sequence

from tqdm import tqdm

from server.bulk.inputs.parts import Part
from server.bulk.run import Counts

_MINUTE = 60.0


class Progress:
    """Shows a run's counts. The input is counted in the background, where that is cheap."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts, self._over = parts, threading.Event()
        self._bar = tqdm(unit="image", disable=not sys.stderr.isatty(), smoothing=0.1)
        self._total: int | None = None
        self._started = self._said = time.monotonic()

    def __enter__(self) -> "Progress":
        threading.Thread(target=self._count, name="count", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._bar.close()

    def show(self, counts: Counts) -> None:
        """Show the counts of the run so far."""
        now = time.monotonic()
        left = None if self._total is None else max(counts.ended, self._total - counts.before)
        if not self._bar.disable:
            self._bar.total = left
            self._bar.set_postfix(failed=counts.failed, refresh=False)
            self._bar.update(counts.ended - self._bar.n)
        elif now - self._said >= _MINUTE:
            self._said = now
            meter = tqdm.format_meter(
                counts.ended, left or 0, now - self._started, unit="image", ncols=0,
                postfix=f"failed={counts.failed}",
            )  # fmt: skip
            print(meter, file=sys.stderr, flush=True)

    def _count(self) -> None:
        try:
            counts = [part.count(self._over) for part in self._parts]
        except Exception:  # the run reads the same input, and reports what is wrong
            return
        self._total = None if None in counts else sum(count or 0 for count in counts)
