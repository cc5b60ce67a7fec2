"""The table of results: kept as JSON, a row for each scenario, and rendered as Markdown.

A run replaces only the rows of its own scenarios, so that one scenario can be repeated alone.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

_JSON, _MARKDOWN = "reliability.json", "reliability.md"


@dataclass(frozen=True, slots=True)
class Row:
    """Result of a scenario, with day, commit and machine of the run.

    as_promised: None if it could not be tried.
    """

    name: str
    title: str
    figure: str
    as_promised: bool | None
    day: str
    commit: str
    machine: str

    @property
    def word(self) -> str:
        """The verdict, for people."""
        words = {True: "as promised", False: "NOT as promised", None: "not tried"}
        return words[self.as_promised]


def keep(folder: Path, rows: list[Row]) -> None:
    """Put rows into the folder's table, in place of older ones of the same scenarios."""
    path = folder / _JSON
    before = [Row(**row) for row in json.loads(path.read_text())] if path.is_file() else []
    both = list({row.name: row for row in (*before, *rows)}.values())
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in both], indent=1) + "\n")
    (folder / _MARKDOWN).write_text(markdown(both))


def markdown(rows: list[Row]) -> str:
    """The table as Markdown, with the machines listed below."""
    machines = list(dict.fromkeys(row.machine for row in rows))
    lines = [
        "# What the service promises, tried",
        "",
        "By `make chaos`, `make soak` and `make siege`, each row by its newest run.",
        "",
        "| scenario | | came out | | run | machine |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row.name} | {row.title} | {row.figure} | {row.word} "
            f"| {row.day}, {row.commit} | {chr(ord('A') + machines.index(row.machine))} |"
            for row in rows
        ),
        "",
        *(f"* {chr(ord('A') + n)}: {machine}" for n, machine in enumerate(machines)),
    ]
    return "\n".join(lines) + "\n"
