"""Chooses the kind of output by its name."""

from collections.abc import Callable, Iterable
from pathlib import Path

from server.bulk.inputs.fetching import as_path, is_url
from server.bulk.outputs.base import Output, OutputConflict
from server.bulk.outputs.lines import Lines, Printed
from server.bulk.outputs.tables import ROWS, Csv, Parquet
from server.bulk.outputs.tar import PARTIAL, Tar
from server.bulk.outputs.texts import HIDDEN_ROWS, Texts


def open_output(name: str, overwrite: bool, inputs: Iterable[str] = ()) -> Output:
    """Open an output: "-" prints; a folder, or a name ending in "/", gets a .txt for each image.

    inputs: paths, URLs or "-" that are read. Raises OutputConflict for an unknown suffix, for an
    output that is also an input, or if another run writes there.
    """
    if name == "-":
        return Printed()
    path = Path(name)
    try:
        path.resolve()
    except (OSError, RuntimeError, ValueError) as cause:  # a link to itself, for one
        raise OutputConflict(f"{name} can't be written to: {cause}") from cause
    if not name:
        raise OutputConflict("the output has no name")
    if name.endswith("/") or path.is_dir():
        _check_apart(inputs, path / HIDDEN_ROWS)
        return Texts(path, overwrite)
    kinds: dict[str, Callable[[Path], Output]] = {
        ".jsonl": lambda path: Lines(path.resolve()),  # replace the file, not a link to it
        ".csv": Csv, ".parquet": Parquet, ".tar": Tar,
    }  # fmt: skip
    if path.suffix.lower() not in kinds:
        raise OutputConflict(
            f"{name}: name an output that ends in {', '.join(kinds)}, or in / for a folder of .txt"
        )
    _check_apart(inputs, path, Path(name + ROWS), Path(name + PARTIAL))
    return kinds[path.suffix.lower()](path)


def _check_apart(inputs: Iterable[str], *written: Path) -> None:
    """Raise OutputConflict if a file that an output writes to is one of the inputs."""
    for given in inputs:
        path = as_path(given)
        file = Path("/dev/stdin" if given == "-" else path)
        for ours in written:
            if not is_url(path) and ours.is_file() and file.exists() and file.samefile(ours):
                raise OutputConflict(f"{ours} is read as input ({given}): name another output")
