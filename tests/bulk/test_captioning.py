"""How much of the input is in memory while it is captioned."""

import pytest

from server.bulk.captioners import captioning
from server.bulk.captioners.captioning import Captioning, CaptioningOptions
from server.bulk.inputs.items import Item, ResultRow, ScoredCaption
from server.bulk.inputs.kept import Kept
from server.bulk.outputs.index import Index


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
    options = CaptioningOptions(10**6, ordered)
    for ended, _ in enumerate(Captioning(Silent(), options, Kept()).run(given), 1):
        # The third is the first above the bound, and one is read ahead.
        assert len(taken) - ended <= 4
    assert len(taken) == 50


def test_what_is_done_is_known_to_other_processes_whatever_its_digest():
    index, names = (
        Index(),
        [f"{n}.png" for n in range(1000)],
    )  # some digests end in 0
    for name in names:
        index.add(ResultRow(name, caption=""), done=True)
    done = index.keys()
    assert all(Item(name, name) in done for name in names)
    assert Item("another.png", "another.png") not in done
    assert Item("1.png", "elsewhere/1.png") not in done, "another image of the name"
    assert Item("1.png", "1.png", prompt="how many") not in done
