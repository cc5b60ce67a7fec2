"""Which models a server has, and what they are called."""

import shutil

import pytest

from runtime.errors import EngineFolderError
from server.models import served
from server.settings import InvalidSettings
from tests.support.paths import DEMO

MODEL = "vignette-demo"


@pytest.fixture
def engines(tmp_path):
    """Two engines in a folder with a blank in its name."""
    for name in ("b", "a"):
        folder = tmp_path / "my engines" / name
        folder.mkdir(parents=True)
        shutil.copy(DEMO / "manifest.json", folder)
    return tmp_path / "my engines"


def test_one_engine_has_the_name_in_its_manifest(engines):
    [model] = served(str(engines / "a"))
    assert (model.name, model.engine, model.memory_share) == (MODEL, engines / "a", 1.0)


def test_several_share_the_memory_and_the_first_is_the_default(engines, monkeypatch):
    monkeypatch.chdir(engines)
    first, second = served("x=b a")
    assert (first.name, str(first.engine), first.memory_share) == ("x", "b", 0.5)
    assert (second.name, str(second.engine)) == (MODEL, "a")


def test_a_folder_of_engines_is_all_of_them(engines):
    manifest = engines / "a" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(MODEL, "renamed"))
    assert [model.name for model in served(str(engines))] == ["renamed", MODEL]


def test_two_of_one_name_are_refused_with_a_remedy(engines):
    with pytest.raises(InvalidSettings, match=r"both called vignette-demo.*other="):
        served(str(engines))


def test_what_is_no_engine_is_named(tmp_path):
    with pytest.raises(EngineFolderError, match="nowhere is not an engine"):
        served(f"{DEMO} nowhere")
