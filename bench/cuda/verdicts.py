"""The bars, and the table that says which of them were met."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bench.common.settings import SHAPE, TOKENS
from bench.cuda.extent import BEAMS, ONCE


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table: a bar, what was measured, whether that is enough (None: not judged)."""

    what: str
    bar: str
    measured: str
    passed: bool | None


def verdicts(found: dict[str, Any]) -> list[Line]:
    """Compare each bar with the measurements."""
    peaks_, encode, decode = found["peaks"], found["encoder"], found["decoder"]
    share = encode["ops"] / encode["best"] / peaks_["fp16_ops"]
    times = decode["seconds"] / (decode["bytes"] / peaks_["bandwidth"])
    offline_ = found["offline"]
    rate, one, uneven = (offline_[k] for k in ("per_second", "one", "uneven_per_second"))
    theirs, once = (
        min((s for mode in modes for s in found["torch"][mode].values()), default=None)
        for modes in _half_modes(found["torch"])
    )
    memory, said, pair = found["memory"], found["samples"], found["two_workers"]
    slower = found["beams"]["greedy"] / found["beams"]["searched"]
    mib, taken_in = memory["grown"] / 2**20, found["front_ends"]
    return [
        Line("encoder, share of the measured fp16 product rate", ">= 45 %", f"{share:.0%}",
             share >= 0.45),
        Line(f"decode step of {decode['rows']} rows over its bytes at the measured bandwidth",
             "<= 3 x", f"{times:.1f} x ({decode['seconds'] * 1e3:.2f} ms)", times <= 3),
        Line(f"offline, images a second, {TOKENS} tokens each", ">= 4,000", f"{rate:,.0f}",
             rate >= 4000),
        Line(f"the same, as uneven as COCO's ({offline_['uneven_tokens']:.1f} tokens)", ">= 3,500",
             f"{uneven:,.0f}", uneven >= 3500),
        Line("offline, against HF fp16 `generate` at its best batch", ">= 10 x",
             *_ratio(rate, theirs, 10)),
        Line("captions of uneven length, --workers 2 against 1, images a second", "-",
             f"{pair['two']:,.0f} against {pair['one']:,.0f}", None),
        Line("offline, against PyTorch fp16 that encodes once, compiled, at its best batch",
             ">= 3 x", *_ratio(rate, once, 3)),
        Line(f"{BEAMS} beams, time against greedy", "<= 1.6 x",
             f"{slower:.1f} x ({found['beams']['searched']:,.0f} images a second)", slower <= 1.6),
        Line("one image alone", "<= 12 ms", f"{one * 1e3:.1f} ms", one <= 0.012),
        Line(f"memory grown over {memory['batches']:,} batches of mixed sizes", "none (< 8 MiB)",
             f"{mib:.0f} MiB", mib < 8),
        Line("640x480 JPEGs a second over HTTP, by number of front-ends", "-",
             ", ".join(f"{r['front_ends']}: {r['per_second']:.0f}" for r in taken_in["rows"])
             or taken_in["left_out"], None),
        Line("demo samples captioned word for word in fp16", "all",
             f"{said['right']} of {said['of']}", said["right"] == said["of"]),
    ]  # fmt: skip


def _half_modes(modes: Iterable[str]) -> tuple[list[str], list[str]]:
    """Of the modes in fp16: Hugging Face's, and those that encode once."""
    half = [mode for mode in modes if mode.startswith("fp16")]
    once = [mode for mode in half if mode.startswith(ONCE)]
    return [mode for mode in half if mode not in once], once


def _ratio(rate: float, seconds: float | None, least: float) -> tuple[str, bool | None]:
    if seconds is None:
        return "not measured", None
    return f"{rate * seconds:.1f} x", rate * seconds >= least


def table(facts: dict[str, Any], lines: list[Line]) -> str:
    """The lines as a Markdown table, headed by command, date, commit, GPU and machine."""
    words = {True: "pass", False: "FAIL", None: "-"}
    rows = [f"| {x.what} | {x.bar} | {x.measured} | {words[x.passed]} |" for x in lines]
    return "\n".join(
        [
            "# On a GPU",
            "",
            f"`{facts['command']}` on {facts['date']}, commit {facts['commit']}: {facts['gpu']}, "
            f"{facts['machine']}. {SHAPE} with random weights, {TOKENS} tokens.",
            "",
            "| what | bar | measured | |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )
