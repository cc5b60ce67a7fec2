"""Turns results.json into plots and one self-contained page."""

import base64
import html
import json
from pathlib import Path
from string import Template
from typing import Any

from bench.report import plots
from bench.report.tables import SECTIONS

RESULTS, PAGE = "results.json", "index.html"
_TEMPLATE = Path(__file__).with_name("page.html")


def write(results: dict[str, Any], folder: Path) -> None:
    """Save results, plots and page in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    drawn = plots.save(results, folder)
    parts = [
        _section(name, results["sections"][name], folder if f"{name}.png" in drawn else None)
        for name in SECTIONS
        if name in results["sections"]
    ]
    page = Template(_TEMPLATE.read_text()).substitute(
        about=_about(results["about"]), sections="\n".join(parts)
    )
    (folder / PAGE).write_text(page)


def _about(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = (about["machine"], about["system"], versions,
             f"commit {about['commit']}, {about['date']}, "
             f"made by <code>{html.escape(about['command'])}</code> in "
             f"{about['seconds'] / 60:.0f} minutes", about["work"])  # fmt: skip
    return "<br>".join(lines)


def _section(name: str, section: dict[str, Any], folder: Path | None) -> str:
    title, says, table = SECTIONS[name]
    if isinstance(section.get("failed"), str):
        body = f"<p class='failed'>This part failed: {html.escape(section['failed'])}</p>"
    else:
        body = table(section)
    if folder is not None:
        data = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        body = f"<img alt='{title}' src='data:image/png;base64,{data}'>{body}"
    return f"<section><h2>{title}</h2><p>{says}</p>{body}</section>"
