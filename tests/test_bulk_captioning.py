"""How much of the input is in memory while it is captioned."""

import pytest

from server.bulk import captioning
from server.bulk.captioning import Captioning, CaptioningOptions
from server.bulk.index import Kept
from server.bulk.items import Item, ScoredCaption


class Silent:
    at_once = 4

    def caption(self, image: bytes, prompt: str | None) -> tuple[ScoredCaption, ...]:
        return (ScoredCaption("", "stop"),)

    def stop(self) -> None:
        pass


@pytest.mark.parametrize("ordered", [False, True])
def test_large_items_are_held_a_few_at_a_time(ordered, monkeypatch):
    monkeypatch.setattr(captioning, "_HELD", 1000)
    taken = []
    given = (
        taken.append(n) or Item(str(n), b"x", members={"png": b"x" * 300, "txt": b"y" * 100})
        for n in range(50)
    )
    options = CaptioningOptions(None, 10**6, ordered)
    for ended, _ in enumerate(Captioning(Silent(), options, Kept()).run(given), 1):
        assert len(taken) - ended <= 3  # the last of them is the first above the bound
    assert len(taken) == 50
