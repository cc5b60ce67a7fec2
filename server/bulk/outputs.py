"""Which kind of output a name means."""

from pathlib import Path

from server.bulk.output import Lines, Output, OutputConflict, Printed
from server.bulk.tables import Csv, Parquet
from server.bulk.tar import Tar
from server.bulk.texts import Texts


def open_output(name: str, overwrite: bool) -> Output:
    """ "-" prints; a folder, or what ends in "/", gets a .txt for each image.

    Raises OutputConflict for a suffix that means nothing, or if another run writes there.
    """
    if name == "-":
        return Printed()
    path = Path(name)
    if name.endswith("/") or path.is_dir():
        return Texts(path, overwrite)
    kinds: dict[str, type[Lines | Csv | Parquet | Tar]] = {
        ".jsonl": Lines, ".csv": Csv, ".parquet": Parquet, ".tar": Tar,
    }  # fmt: skip
    if path.suffix.lower() not in kinds:
        raise OutputConflict(
            f"{name}: name an output that ends in {', '.join(kinds)}, or in / for a folder of .txt"
        )
    return kinds[path.suffix.lower()](path)
