"""Which models a server has: their names, and where their engines are."""

from dataclasses import dataclass
from pathlib import Path

from runtime.errors import VignetteError
from runtime.model import manifest as manifests


class AmbiguousModel(VignetteError):
    """Two engines that are to be served have one name."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model by the name that requests call it by. memory_share: of its device's memory."""

    name: str
    engine: Path
    memory_share: float


def served(engine: str) -> tuple[ServedModel, ...]:
    """The models that a server is to have; the first is the default.

    engine: a folder; several, between blanks; or a folder of such folders, which are taken in the
        order of the alphabet. A model is called by the name in its engine's manifest, or as
        NAME=FOLDER says.

    Raises EngineFolderError for a folder that has no engine, AmbiguousModel.
    """
    found: dict[str, Path] = {}
    for part in [engine] if Path(engine).is_dir() else engine.split() or [engine]:
        given, named, folder = part.rpartition("=")
        if Path(part).is_dir():
            given, named, folder = "", "", part
        for each in [Path(folder)] if named else _engines(Path(folder)):
            name = given if named else manifests.read(each).model
            if name in found:
                raise AmbiguousModel(
                    f"{found[name]} and {each} are both called {name}: give one another name, "
                    f"such as --engine '{found[name]} other={each}'"
                )
            found[name] = each
    return tuple(ServedModel(name, each, 1 / len(found)) for name, each in found.items())


def _engines(folder: Path) -> list[Path]:
    """The folder itself, or the engines in it."""
    if (folder / manifests.FILE).exists():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{manifests.FILE}")) or [folder]
