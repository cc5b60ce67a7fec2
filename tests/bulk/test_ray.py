"""Bulk runs on a cluster: each image one row, whatever dies there."""

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import EngineFolderError
from runtime.model.manifest import read
from runtime.model.preprocess import MAX_PIXELS
from server.bulk.captioners.engine import EngineSetup
from server.bulk.inputs.items import Item, ResultRow
from server.bulk.inputs.keys import of_item
from server.bulk.inputs.lists import Columns
from server.bulk.inputs.parts import parts
from server.bulk.outputs.index import Index
from server.processes.supervisor import CannotStart
from tests.support.fakes import fake_engine, fake_folder
from tests.support.live import small_images
from tests.support.paths import ROOT

pytest.importorskip("ray", reason="needs the extra ray")


def setup_of(engine, **fields):
    from server.bulk.captioners import ray  # needs the extra `ray`

    return ray.TaskSetup(EngineSetup(engine), None, {}, 10**7, MAX_PIXELS, False, **fields)


def test_a_process_keeps_its_decoder_from_task_to_task(tmp_path):
    from server.bulk.captioners import ray

    [file] = small_images(tmp_path, 1)
    folder = fake_folder(tmp_path / "engine")
    work = setup_of(folder, identity={"engine": read(folder).fingerprint})
    batch = {"item": [pickle.dumps(Item(str(file), image=str(file)))]}
    made = []
    for limit in (MAX_PIXELS, MAX_PIXELS, 1):
        copy = pickle.loads(pickle.dumps(replace(work, max_pixels=limit)))  # as Ray passes tasks
        found = ray._Decoder.decode(batch, copy)
        made.append(ray._Decoder.made)
    assert made[0] is made[1] is not made[2]
    assert not made[0]._decoding._loop._thread.is_alive()
    assert "too many pixels" in pickle.loads(found["outcome"][0]).error
    made[2]._close()
    ray._Decoder.made = None
    manifest = read(folder)
    other = replace(manifest.preprocessing, shortest_edge=manifest.preprocessing.shortest_edge + 1)
    replace(manifest, preprocessing=other).save(folder)
    with pytest.raises(EngineFolderError, match="another engine than"):
        ray._Decoder.decode(batch, work)


def test_relative_inputs_are_those_of_the_command_wherever_nodes_started(tmp_path, monkeypatch):
    from server.bulk.captioners import ray

    monkeypatch.setattr(ray.ray, "get", lambda known: known)
    for place, count in (("here", 2), ("there", 1)):
        (tmp_path / place / "photos").mkdir(parents=True)
        small_images(tmp_path / place / "photos", count)
    monkeypatch.chdir(tmp_path / "there")
    batch = {"part": np.array([pickle.dumps(parts(["photos"], Columns(), 9)[0])], object)}
    here = setup_of(tmp_path, folder=tmp_path / "here")
    [block] = ray._read(batch, Index().keys(), here, False)
    assert len(block["item"]) == 2
    lost = setup_of(tmp_path, folder=tmp_path / "nowhere")
    with pytest.raises(CannotStart, match="nowhere, which a node lacks"):
        next(ray._read(batch, Index().keys(), lost, False))


def test_a_table_without_row_groups_has_no_items(tmp_path):
    from server.bulk.captioners import ray

    parquet = pytest.importorskip("pyarrow.parquet")
    schema = pytest.importorskip("pyarrow").schema([("image", "string")])
    parquet.ParquetWriter(tmp_path / "none.parquet", schema).close()
    given = parts([f"{tmp_path}/none.parquet"], Columns(), 9)
    captioner = object.__new__(ray.RayCaptioning)
    captioner._setup = setup_of(tmp_path)
    assert list(captioner.run(given, Index())) == []


def test_nodes_tell_of_items_that_have_rows_where_others_may_take_their_ids(tmp_path, monkeypatch):
    from server.bulk.captioners import ray

    monkeypatch.setattr(ray.ray, "get", lambda known: known)
    files = small_images(tmp_path, 20)
    index, name = Index(), str(files[3])
    index.add(ResultRow(name, caption=""), done=True)
    batch = {"part": np.array([pickle.dumps(parts([str(tmp_path)], Columns(), 9)[0])], object)}
    for tell in (False, True):
        read = ray._read(batch, index.keys(), setup_of(tmp_path), tell)
        found = [pickle.loads(packed) for block in read for packed in block["item"]]
        told = [each for each in found if not isinstance(each, Item)]
        assert len(found) - len(told) == 19
        assert told == ([[(name, of_item(Item(name, name)))]] if tell else [])


def test_a_node_that_dies_costs_no_row_and_one_that_comes_is_used(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    files = small_images(photos, 200)
    (photos / "broken.png").write_bytes(b"GIF")
    (photos / "notes.txt").write_text("no image")
    output = tmp_path / "rows.jsonl"
    output.write_text(
        json.dumps({"id": "photos/" + files[3].name, "caption": "before", "model": "fake"}) + "\n"
    )
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.support.ray_job",
        str(output),
        str(photos),
    ]
    there = os.environ | {"PYTHONPATH": str(ROOT)}  # not that of the folder that nodes work in
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, env=there
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()[-2:]
    assert told == ["198 captioned, 2 failed, 1 skipped", "1 nodes left"]
    found = map(json.loads, output.read_text().splitlines())
    rows = {str(tmp_path / row["id"]): row for row in found}
    assert Counter(map(Path, rows)) == Counter([*files, photos / "broken.png"])
    assert len(output.read_text().splitlines()) == 201
    assert "not an image" in rows.pop(str(photos / "broken.png"))["error"]
    assert rows.pop(str(files[3]))["caption"] == "before"
    assert "the engine failed on it twice" in rows.pop(str(files[7]))["error"]
    left = [file for number, file in enumerate(files) if number not in (3, 7)]
    expected = fake_engine().generate([file.read_bytes() for file in left])
    assert {name: row["caption"] for name, row in rows.items()} == {
        str(file): caption.text for file, caption in zip(left, expected, strict=True)
    }
