"""The models that a server serves: their names and engine folders."""

from dataclasses import dataclass
from pathlib import Path

from runtime.model import manifest as manifests
from server.settings import InvalidSettings


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model under the name that requests use.

    engine: a folder, for front-ends with `ModelFiles` only. memory_share: fraction of its device's
    memory. fingerprint: of the engine that workers must find in the folder; None: any.
    """

    name: str
    engine: Path
    memory_share: float
    fingerprint: str | None = None


def served(engine: str, workers: int = 1) -> tuple[ServedModel, ...]:
    """The models to serve; the first is the default.

    engine: a folder; several, separated by blanks; or a folder of engine folders, taken in
        alphabetical order. A model has the name in its engine's manifest, or NAME in NAME=FOLDER.
    workers: workers of a model that share a device.

    Raises EngineFolderError for a folder without an engine, and InvalidSettings if two have
    the same name.
    """
    found: dict[str, tuple[Path, str]] = {}
    for part in [engine] if Path(engine).is_dir() else engine.split() or [engine]:
        given, named, folder = part.rpartition("=")
        if Path(part).is_dir():
            given, named, folder = "", "", part
        for each in [Path(folder)] if named else _engines(Path(folder)):
            manifest = manifests.read(each)
            name = given if named else manifest.model
            if name in found:
                other, _ = found[name]
                raise InvalidSettings(
                    f"{other} and {each} are both called {name}: give one another name, "
                    f"such as --engine '{other} other={each}'"
                )
            found[name] = each, manifest.fingerprint
    share = 1 / (len(found) * workers)
    return tuple(ServedModel(name, each, share, made) for name, (each, made) in found.items())


def _engines(folder: Path) -> list[Path]:
    """The folder itself if it is an engine, else the engines in it."""
    if (folder / manifests.FILE).exists():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{manifests.FILE}")) or [folder]
