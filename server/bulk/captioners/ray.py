"""Bulk captioning on a Ray cluster: Ray Data reads, decodes and captions, and each item's outcome
comes back to this process, which writes the output. A dead node's work is repeated elsewhere.

The engine folder, the package and local inputs must be on every node, under the same paths.
"""

import logging
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from msgspec import structs

from runtime.errors import VignetteError
from runtime.model import manifest as manifests
from server.bulk.captioners.captioning import (
    RunFailed,
    begun,
    image_of,
    message_of,
)
from server.bulk.captioners.decoding import BulkDecoders
from server.bulk.captioners.engine import BulkEngine, EngineSetup
from server.bulk.inputs.fetching import is_relative
from server.bulk.inputs.folders import Files
from server.bulk.inputs.items import Item, Outcome
from server.bulk.inputs.keys import of_item
from server.bulk.inputs.parts import Part, items, split
from server.bulk.outputs.index import FinishedItems, Index
from server.processes.supervisor import CannotStart
from server.system import check_listens

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray sends usage statistics

import ray
import ray.data

_ROWS = 16  # per block: what a task decodes, and an engine is given, at a time
_AT_ONCE = 2  # blocks that an engine works on
_READING = 0.25  # of a core: reading is mostly waiting
_DECODING = 0.99  # of a core: with 1 Ray would fuse decoding with an engine of one core
_LEFT = 0.75  # of the cluster's cores, at most, for engines; the others decode
# In the text of Ray's error, which has the tracebacks of all that it went through.
_OUR_ERROR = re.compile(r"^\s*(?:runtime|server)\.[\w.]+: (.+)$", re.MULTILINE)
Batch = Mapping[str, np.ndarray]
Done = list[tuple[str, bytes]]  # ids of items that have rows, and their keys (`of_item`)
Told = Files | Done


@dataclass(frozen=True, slots=True)
class TaskSetup:
    """Parameters of all tasks. prompt: of items that have none. limit: bytes of an image, at most.
    with_images: outcomes include them, and the other members of their samples. folder: to which
    paths of inputs are relative, if any is.
    """

    engine: EngineSetup
    prompt: str | None
    sampling: dict[str, Any]
    limit: int
    max_pixels: int
    with_images: bool
    identity: dict[str, str] = field(default_factory=dict)  # of the engine that was tried first
    folder: Path | None = None

    def enter_folder(self) -> None:
        """Work in `folder`: nodes start their tasks elsewhere. Raises CannotStart."""
        if self.folder is None:
            return
        try:
            os.chdir(self.folder)
        except OSError as cause:
            raise CannotStart(
                f"inputs are named relative to {self.folder}, which a node lacks: name them by "
                "paths, or URLs, that are right on all nodes"
            ) from cause


class RayCaptioning:
    """Captions inputs on the cluster; outcomes come as they end."""

    def __init__(self, address: str, cores: int, setup: TaskSetup) -> None:
        """Join the cluster and open an engine there once. Raises CannotStart if the cluster
        has no room for one, and RunFailed if none opens.

        address: "local" starts a cluster of this machine alone. cores: of each engine, on a cluster
        without GPUs.
        """
        try:
            check_listens(address)  # Ray itself would try without end
        except (OSError, ValueError) as cause:
            raise CannotStart(f"no Ray cluster answers at {address} ({cause})") from cause
        try:
            ray.init(address=address, log_to_driver=False, logging_level="warning")
        except (ValueError, ConnectionError) as cause:
            raise CannotStart(f"{address} names no Ray cluster: {cause}") from cause
        there = ray.cluster_resources()
        self._gpus = int(there.get("GPU", 0))
        total = int(there.get("CPU", 0))
        self._each = {"num_gpus": 1} if self._gpus else {"num_cpus": cores}
        self._most = self._gpus or max(1, int(total * _LEFT) // cores)
        if not self._gpus and cores >= total:
            raise CannotStart(
                f"an engine takes {cores} cores (--ray-cores), decoding another, and the cluster "
                f"has {total}"
            )
        threads = 0 if self._gpus else cores
        self._setup = replace(setup, engine=replace(setup.engine, threads=threads))
        tried = ray.remote(**self._each)(_tried).remote(self._setup)
        with _ending_the_run():
            self.identity, runs_on = ray.get(tried)
        self._setup = replace(self._setup, identity=self.identity)
        self.where = f"up to {self._most} engines on Ray, {runs_on}"

    def run(self, parts: list[Part], index: Index, again: bool = False) -> Iterator[Outcome]:
        """Outcomes of items not done in `index`; an item may come twice if a node dies.

        again: other images may take the ids of those that are done, which are claimed therefore.
        Files that were skipped are counted in `parts`.
        Raises SameId if one took the id of another input.
        """
        if not (apart := split(parts)):
            return
        setup = self._setup
        if any(is_relative(part.path) for part in parts):
            setup = replace(setup, folder=Path.cwd())
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        outcomes = (
            ray.data.from_items(
                [{"part": pickle.dumps(part)} for part in apart], override_num_blocks=len(apart)
            )
            .map_batches(
                _read,
                batch_size=1,
                num_cpus=_READING,
                fn_kwargs={
                    "known": ray.put(index.keys()),
                    "setup": setup,
                    "tell": again,
                },
            )
            .repartition(target_num_rows_per_block=_ROWS)
            .map_batches(
                _Decoder.decode,
                batch_size=_ROWS,
                num_cpus=_DECODING,
                fn_args=(setup,),
            )
            .map_batches(
                _Engine,
                fn_constructor_args=(setup,),
                batch_size=_ROWS,
                compute=ray.data.ActorPoolStrategy(
                    min_size=1,
                    max_size=self._most,
                    max_concurrent_calls_per_actor=_AT_ONCE,
                    enable_true_multi_threading=True,
                ),
                **self._each,
            )
        )
        with _ending_the_run():
            for batch in outcomes.iter_batches(batch_size=None, batch_format="numpy"):
                for packed in batch["outcome"]:
                    match pickle.loads(packed):
                        case Outcome() as outcome:
                            yield outcome
                        case Files() as listed:
                            [known] = [p for p in parts if isinstance(p, Files) and p == listed]
                            known.skipped.clear()  # a node that died may have told it, too
                            known.skipped.update(listed.skipped)
                        case done:
                            for item_id, asked in done:
                                index.claim(item_id, asked, again)

    def close(self) -> None:
        """Leave the cluster."""
        ray.shutdown()


@contextmanager
def _ending_the_run() -> Iterator[None]:
    """Raise RunFailed with the error behind one of Ray's, which holds a whole traceback."""
    try:
        yield
    except ray.exceptions.RayError as error:
        ours = _OUR_ERROR.search(str(error))
        raise RunFailed(f"the cluster could not go on: {ours[1] if ours else error}") from error


def _tried(setup: TaskSetup) -> tuple[dict[str, str], str]:
    """Identity of an engine, and what it runs on."""
    with closing(BulkEngine(setup.engine, setup.prompt, setup.sampling)) as engine:
        return engine.identity, engine.facts.runs_on


def _read(
    batch: Batch, known: "ray.ObjectRef[FinishedItems]", setup: TaskSetup, tell: bool
) -> Iterator[Batch]:
    """The items of parts that are still to be captioned, and folders in which files were skipped.
    tell: and, of items that are not, lists of ids and keys (`of_item`).
    """
    setup.enter_folder()
    given = [pickle.loads(part) for part in batch["part"]]
    done, found = ray.get(known), items(given, prompt=setup.prompt)
    while some := list(islice(found, _ROWS)):
        left = [item for item in some if item not in done]
        told = [(item.id, of_item(item)) for item in some if tell and item in done]
        yield {"item": _packed([*left, told] if told else left)}
    if listed := [part for part in given if isinstance(part, Files) and part.skipped]:
        yield {"item": _packed(listed)}


class _Decoder:
    """Fetches and decodes for the tasks of one process, which Ray reuses."""

    made: "ClassVar[_Decoder | None]" = None

    def __init__(self, setup: TaskSetup) -> None:
        setup.enter_folder()
        self._setup = setup
        manifest = manifests.read(setup.engine.folder)
        manifest.check_fingerprint(setup.engine.folder, setup.identity["engine"])
        self._decoding = BulkDecoders(manifest, 1, setup.max_pixels)
        self._threads = ThreadPoolExecutor(_ROWS, "fetch")

    @classmethod
    def decode(cls, batch: Batch, setup: TaskSetup) -> Batch:
        """Decode a batch into pixels, or errors."""
        if cls.made is not None and cls.made._setup != setup:
            cls.made._close()
            cls.made = None
        cls.made = cls.made or cls(setup)
        found = list(cls.made._threads.map(cls.made._decoded, batch["item"]))
        return {
            "outcome": _packed(outcome for outcome, _ in found),
            "pixels": np.array([pixels for _, pixels in found], object),
        }

    def _close(self) -> None:
        self._threads.shutdown()
        self._decoding.close()

    def _decoded(self, packed: bytes) -> tuple[Outcome | Told, bytes]:
        item, pixels = pickle.loads(packed), b""
        if not isinstance(item, Item):
            return item, pixels
        outcome = begun(item)
        try:
            image = image_of(item, self._setup.limit)
            outcome = structs.replace(outcome, image=image)
            pixels = self._decoding.pixels(image).tobytes()
        except (VignetteError, OSError) as cause:
            outcome = structs.replace(outcome, error=message_of(cause))
        if not self._setup.with_images:
            there = item.image if isinstance(item.image, str) else b""
            item = structs.replace(item, image=there, members={})
            outcome = structs.replace(outcome, item=item, image=None)
        return outcome, pixels


class _Engine:
    """An actor with an engine."""

    def __init__(self, setup: TaskSetup) -> None:
        self._setup = setup
        self._engine = BulkEngine(setup.engine, setup.prompt, setup.sampling)
        _check_same(self._engine.identity, setup.identity)
        self._threads = ThreadPoolExecutor(_AT_ONCE * _ROWS, "caption")

    def __call__(self, batch: Batch) -> Batch:
        """Caption the images of a batch that could be decoded."""
        return {
            "outcome": _packed(self._threads.map(self._said, batch["outcome"], batch["pixels"]))
        }

    def _said(self, packed: bytes, pixels: bytes) -> Outcome | Told:
        outcome = pickle.loads(packed)
        if not isinstance(outcome, Outcome) or outcome.error is not None:
            return outcome
        image = np.frombuffer(pixels, np.uint8)
        try:
            captions = self._engine.caption(image, outcome.item.prompt)
            return structs.replace(outcome, captions=captions)
        except VignetteError as cause:
            return structs.replace(outcome, error=message_of(cause))


def _check_same(found: object, expected: object) -> None:
    """Raise CannotStart for another engine than that whose name the rows have."""
    if found != expected:
        raise CannotStart(f"this node's engine is {found}, and that of the run {expected}")


def _packed(values: Iterable[Item | Outcome | Told]) -> np.ndarray:
    return np.array([pickle.dumps(value) for value in values], object)
