"""Beam search within a burst: a device chooses the beams after each decode step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.decoding.candidates import BeamStep
from runtime.execution.arena import Arena
from runtime.execution.base import Search
from runtime.execution.buckets import bucket, buckets
from runtime.execution.device_buffer import DeviceBuffer
from runtime.execution.launch import Launch
from runtime.execution.rings import Rings
from runtime.execution.stream import Stream

_POSITIONS = 4  # of text are copied at once: fewer bindings
_MOST_BINDINGS = 1024


class BeamSearch:
    """Queues the search behind the steps of a burst; one burst after another."""

    def __init__(
        self,
        stream: Stream,
        session: ort.InferenceSession,
        arena: Arena,
        rings: Rings,
        logits: DeviceBuffer,
    ) -> None:
        """logits: `[slots, ...]`, of the last step."""
        self._stream, self._session, self._arena, self._rings = stream, session, arena, rings
        self._logits, self._slots = logits, len(logits)
        slots = self._slots

        def buffer(kind: Any, *shape: int) -> DeviceBuffer:
            return DeviceBuffer(stream.device, shape, kind)

        # A group of images is rounded up to a bucket, which at most doubles it.
        self._rows, self._targets = (buffer(np.int64, 2 * slots) for _ in range(2))
        self._ends = buffer(np.int64, 2 * slots)
        self._scores = buffer(np.float32, 2 * slots)
        self._step = 4 * slots  # values of each result in a step
        self.shape = rings.burst, self._step
        self.best = {
            name: buffer(kind, rings.burst * self._step)
            for name, kind in (
                ("best_ids", np.int64), ("best_parents", np.int64),
                ("best_logprobs", np.float32), ("best_scores", np.float32), ("kept", np.int64),
            )
        }  # fmt: skip
        self._launches: dict[tuple[int, ...], Launch] = {}

    def groups(self, searches: Sequence[Search]) -> list["Group"]:
        """Upload the searches of a burst."""
        groups: list[Group] = []
        if not searches:
            return groups
        size = self._rows.shape[0]
        rows, ends = np.zeros(size, np.int64), np.zeros(size, np.int64)
        targets = np.full(size, self._arena.sink)  # of padding
        scores, first = np.zeros(size, np.float32), 0
        for search in searches:
            count, beams = search.scores.shape
            images = bucket(count, buckets(self._slots // beams))
            groups.append(Group(search, images, first, search.forced, search.fed))
            of_group = slice(first, first + count * beams)
            rows[of_group] = targets[of_group] = np.ravel(search.slots)
            scores[of_group] = search.scores.reshape(-1)
            ends[first : first + count] = search.stops
            first += images * beams
        for buffer, values in (
            (self._rows, rows), (self._targets, targets), (self._ends, ends),
            (self._scores, scores),
        ):  # fmt: skip
            buffer.upload(values, self._stream)
        return groups

    def step(self, step: int, groups: Sequence["Group"]) -> None:
        """Queue the choice of beams behind decode step `step` of the burst."""
        for group in groups:
            if step >= group.forced:
                positions = group.fed + step + 1
                positions = -(-positions // _POSITIONS) * _POSITIONS
                positions = min(positions, self._arena.text_tokens)
                key = step, group.images, group.beams, group.first, positions
                if key not in self._launches:
                    if len(self._launches) >= _MOST_BINDINGS:
                        del self._launches[next(iter(self._launches))]  # the oldest
                    self._launches[key] = self._bind(*key)
                self._launches[key].run()

    def _bind(self, step: int, images: int, beams: int, first: int, positions: int) -> Launch:
        rings, binding = self._rings, self._session.io_binding()
        members, twice = images * beams, 2 * beams
        self._logits.rows(self._slots).shaped(self._slots, -1).as_input(binding, "logits")
        rings.row(rings.logprobs, step + 1, self._slots).as_input(binding, "logprobs")
        binding.bind_cpu_input("candidates", np.array([twice], np.int64))
        binding.bind_cpu_input("beams", np.array([beams], np.int64))
        for name, buffer in (("rows", self._rows), ("slots", self._targets)):
            buffer.rows(members, first).shaped(images, beams).as_input(binding, name)
        self._ends.rows(images, first).shaped(images, 1).as_input(binding, "ends")
        scores = self._scores.rows(members, first).shaped(images, beams)
        tokens = rings.row(rings.tokens, step + 1)
        for view, name in ((scores, "scores"), (tokens, "tokens")):
            view.as_input(binding, name)
            view.as_output(binding, f"next_{name}")
        for name, buffer in self.best.items():
            wide = beams if name == "kept" else twice
            found = buffer.rows(images * wide, step * self._step + 2 * first)
            found.shaped(images, wide).as_output(binding, name)
        self._arena.bind_text(binding, positions)
        return Launch(self._session, binding)


@dataclass(frozen=True, slots=True)
class Group:
    """A search with its padding to `images`; `first`: its place among the rows of all searches.
    forced, fed: as in Search, of the present burst.
    """

    search: Search
    images: int
    first: int
    forced: int
    fed: int

    def after(self, steps: int) -> "Group":
        """The search in a burst that follows on so many steps."""
        return replace(self, forced=0, fed=self.fed + steps)

    @property
    def beams(self) -> int:
        """Of each image."""
        return self.search.scores.shape[1]

    def results(self, found: dict[str, np.ndarray], steps: int) -> list[list[BeamStep]]:
        """Of each image, its steps."""
        count, of_image = len(self.search.slots), []
        for name, values in found.items():
            wide = self.beams if name == "kept" else 2 * self.beams
            first = 2 * self.first
            of_group = values[self.forced : steps, first : first + count * wide]
            of_image.append(of_group.reshape(-1, count, wide).swapaxes(0, 1).tolist())
        return [
            [*map(BeamStep._make, zip(*image, strict=True))]
            for image in zip(*of_image, strict=True)
        ]
