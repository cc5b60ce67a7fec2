"""Plots of results.json, one PNG per section."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

OURS, THEIRS = "#d9480f", ("#1864ab", "#4dabf7", "#2b8a3e", "#8ce99a", "#5f3dc4", "#b197fc")
plt.rcParams |= {
    "figure.dpi": 120, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e9ecef", "axes.axisbelow": True, "savefig.bbox": "tight",
}  # fmt: skip


def save(results: dict[str, Any], folder: Path) -> list[str]:
    """Plot every section that has results; returns the file names."""
    drawn = []
    for name, draw in _DRAWINGS.items():
        section = results["sections"].get(name)
        if section is None or ("failed" in section and isinstance(section["failed"], str)):
            continue
        figure, axes = plt.subplots(figsize=(7.5, 4.2))
        draw(axes, section)
        file = f"{name}.png"
        figure.savefig(folder / file)
        plt.close(figure)
        drawn.append(file)
    return drawn


def colours(names: list[str]) -> dict[str, str]:
    """One colour for Vignette; the other contestants' colours follow their order in `names`."""
    others = [name for name in names if not name.startswith("Vignette")]
    found = dict(zip(others, THEIRS * 3, strict=False))
    return found | {name: OURS for name in names if name.startswith("Vignette")}


def _scores(axes: Axes, section: dict[str, Any]) -> None:
    """Accuracy against mean score, by tenths of the answers."""
    for (name, kind), colour in zip(section["kinds"].items(), (OURS, *THEIRS), strict=False):
        scores, shares = zip(*kind["tenths"], strict=True)
        axes.plot(scores, [100 * share for share in shares], "o-", label=name, color=colour)
    axes.set_xlabel("mean score of a tenth of the answers")
    axes.set_ylabel("% right word for word")
    axes.set_ylim(0, 102)
    axes.legend(fontsize=8, frameon=False)


def _http(axes: Axes, section: dict[str, Any]) -> None:
    """Latencies of single requests, sorted, at the most clients that every contestant served."""
    runs = [r for r in section["runs"] if r.get("times_ms")]
    clients = _shared_clients(runs)
    shown: dict[str, dict[str, Any]] = {}
    for run in (r for r in runs if r["clients"] == clients):
        shown.setdefault(run["contestant"], run)
    palette = colours(list(shown))
    for name, run in shown.items():
        times = [t / 1e3 for t in run["times_ms"]]
        axes.plot(range(1, len(times) + 1), times, ".-", label=name, color=palette[name])
    axes.set_yscale("log")
    axes.set_xlabel(f"request, sorted by time ({clients} clients)")
    axes.set_ylabel("seconds")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _shared_clients(runs: list[dict[str, Any]]) -> int:
    names = {r["contestant"] for r in runs}
    levels = sorted({r["clients"] for r in runs})
    shared = [c for c in levels if {r["contestant"] for r in runs if r["clients"] == c} == names]
    return max(shared, default=levels[0] if levels else 0)


def _offline(axes: Axes, section: dict[str, Any]) -> None:
    bars = [(f"Hugging Face {precision}", best) for precision, best in section["best_ms"].items()]
    bars += [(f"Vignette {v['name']}", v["ms_per_image"]) for v in section["vignette"]]
    _bars(axes, bars, "milliseconds an image")


def _ablation(axes: Axes, section: dict[str, Any]) -> None:
    bars = [(row["step"], row["ms_per_image"]) for row in section["steps"] if "ms_per_image" in row]
    _bars(axes, bars, "milliseconds an image, some at once")


def _bars(axes: Axes, bars: list[tuple[str, float]], unit: str) -> None:
    names, values = zip(*bars, strict=True)
    places = range(len(bars))
    ours = [not name.startswith(("Hugging", "image encoded")) for name in names]
    axes.barh(places, values, color=[OURS if mine else THEIRS[0] for mine in ours])
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(unit + ", logarithmic")
    axes.grid(axis="y", visible=False)
    for place, value in zip(places, values, strict=True):
        axes.annotate(f" {value:,.0f}", (value, place), va="center", fontsize=9)
    axes.margins(x=0.15)


def _batches(axes: Axes, section: dict[str, Any]) -> None:
    palette = colours(list(section["series"]))
    for name, series in section["series"].items():
        if "failed" in series:
            continue
        batches, times = zip(*series["points"], strict=True)
        axes.plot(
            batches, times, "o-", label=f"{name} (knee: {series['knee']})", color=palette[name]
        )
    axes.set(xscale="log", yscale="log", xlabel="images at once", ylabel="milliseconds an image")
    axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axes.minorticks_off()
    axes.legend(fontsize=8, frameon=False)


def _scheduling(axes: Axes, section: dict[str, Any]) -> None:
    names = list(dict.fromkeys(_policy(r) for r in section["rows"]))
    for load in dict.fromkeys(r["load"] for r in section["rows"]):
        rows = {_policy(r): r for r in section["rows"] if r["load"] == load}
        first = rows[names[0]]["mean_ms"]
        axes.plot(names, [rows[n]["mean_ms"] / first for n in names], "o-", label=load)
    axes.set_xlabel("images encoded in one go, patience")
    axes.set_ylabel(f"mean latency against {names[0]}")
    axes.legend(fontsize=8, frameon=False)


def _policy(row: dict[str, Any]) -> str:
    return f"{row['encode_batch']}, {row['patience']:g}"


def _scaling(axes: Axes, section: dict[str, Any]) -> None:
    """Throughput, p99 and price by the number of hosts."""
    figure = axes.figure
    axes.remove()
    figure.set_size_inches(10, 3.6)  # type: ignore[union-attr]
    shown = {"rate": "captions a second", "p99_s": "p99 at 80 % load, seconds",
             "dollars_per_million": "dollars for a million captions"}  # fmt: skip
    panels = figure.subplots(1, len(shown))
    kinds = dict.fromkeys(row["kind"] for row in section["rows"])
    for panel, (field, label) in zip(panels, shown.items(), strict=True):
        for kind, colour in zip(kinds, (OURS, *THEIRS), strict=False):
            rows = [row for row in section["rows"] if row["kind"] == kind]
            hosts, values = [row["hosts"] for row in rows], [row[field] for row in rows]
            panel.plot(hosts, values, "o-", label=kind, color=colour)
        panel.set(xscale="log", yscale="log", xlabel="hosts", ylabel=label)
    figure.tight_layout()  # type: ignore[union-attr]
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper left", fontsize=8,
                  bbox_to_anchor=(0.04, 0.0), frameon=False)  # fmt: skip


_DRAWINGS: dict[str, Callable[[Axes, dict[str, Any]], None]] = {
    "http": _http,
    "offline": _offline,
    "scores": _scores,
    "ablation": _ablation,
    "batches": _batches,
    "scheduling": _scheduling,
    "scaling": _scaling,
}
