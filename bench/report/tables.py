"""The page's sections: title, introduction, and how a section's results become tables."""

import html
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

_Rows = Iterable[Iterable[Any]]


def _table(head: Iterable[str], rows: _Rows) -> str:
    def cells(tag: str, row: Iterable[Any]) -> str:
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<div class='wide'><table><tr>{cells('th', head)}</tr>{body}</table></div>"


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _offline(section: dict[str, Any]) -> str:
    rows = [
        (
            f"Hugging Face {t['precision']}, batch {b['batch']}",
            _number(b["ms_per_image"]),
            "",
            "",
            "",
        )
        for t in section["torch"]
        for b in t["batches"]
    ]
    rows += [
        (f"Hugging Face {precision}, best of all batches measured", _number(best), "", "", "")
        for precision, best in section["best_ms"].items()
    ]
    rows += [
        (f"Vignette {v['name']}", _number(v["ms_per_image"], 1), _number(v["one_ms"], 1),
         _number(v["resident_mib"]), _number(v["ready_s"], 1))
        for v in section["vignette"]
    ]  # fmt: skip
    head = ("", "ms an image", "one image alone, ms", "resident MiB", "ready after s")
    ratios = _table(
        ("Vignette", "against Hugging Face", "throughput", "latency"),
        (
            (r["vignette"], r["torch"], f"{r['throughput']:.1f} x", f"{r['latency']:.1f} x")
            for r in section["ratios"]
        ),
    )
    same = {True: "the same", False: "NOT the same", None: "not compared"}[section["tokens_equal"]]
    failed = "".join(f"<p class='failed'>{html.escape(f)}</p>" for f in section["failed"])
    said = f"<p>Tokens of both sides in fp32: {same}.</p>"
    return _table(head, rows) + ratios + said + failed


def _shares(of: str, section: dict[str, Any]) -> str:
    rows = [
        (name, _number(rate, 2), f"{section['shares'][name]:.1%}")
        for name, rate in section["rates"].items()
    ]
    return _table(("", "captions a second", of), rows)


def _bulk(section: dict[str, Any]) -> str:
    rows = [
        ("the engine alone, images decoded" if name == "engine" else name,
         _number(rate, 2), f"{section['shares'][name]:.1%}")
        for name, rate in section["rates"].items()
    ]  # fmt: skip
    return _table(("", "images a second", "of the engine's"), rows)


def _rival(section: dict[str, Any]) -> str:
    rows = [
        (f"PyTorch {form['name']}", form.get("failed")
         or ", ".join(f"{batch}: {ms:,.0f} ms" for batch, ms in form["batches"]))
        for form in section["forms"]
    ]  # fmt: skip
    rows.append(("Vignette", f"{section['ours_ms']:,.0f} ms"))
    said = (
        section["ratio"] and f"<p>Vignette against the best of them: {section['ratio']:.1f} x.</p>"
    )
    return _table(("", "images at once: ms an image"), rows) + (said or "")


def _beams(section: dict[str, Any]) -> str:
    ours = section["vignette"]
    rows: list[tuple[str, ...]] = [
        (f"Hugging Face {precision}, {batch} at once", "", _number(s * 1e3))
        for precision, batches in section["torch_s"].items()
        for batch, s in batches
    ]
    for name, kind in (("many images", ""), ("one image alone", "one_")):
        ms = [_number(ours[f"{way}_{kind}s"] * 1e3) for way in ("greedy", "beams")]
        rows.append((f"Vignette, {name}", *ms))
    head = ("", "greedy, ms an image", f"{section['beams']} beams")
    against = "; ".join(
        f"{precision}: {section['ratios'][precision]:.0f} x, one image against one "
        f"{section['ratios_of_one'][precision]:.0f} x"
        for precision in section["torch_s"]
    )
    return _table(head, rows) + (
        f"<p>Many images against Hugging Face's faster batch, {against}.</p>"
        f"<p>{section['beams']} beams take {section['against_greedy']:.2f} times as long as greedy "
        f"here. {html.escape(ours['runs_on'])}.</p>"
    )


def _scores(section: dict[str, Any]) -> str:
    rows = [
        (name, *(f"{share:.1%}" for share in kind["shares"].values()), f"{kind['told_apart']:.0%}")
        for name, kind in section["kinds"].items()
    ]
    ways = next(iter(section["kinds"].values()))["shares"]
    return _table(("right word for word", *ways, "right ones score higher"), rows)


def _http(section: dict[str, Any]) -> str:
    rows = [
        (r["contestant"], r.get("clients", ""), r.get("requests", ""),
         _number(r.get("rate"), 2), _number(r.get("mean_ms")), _number(r.get("p99_ms")),
         r.get("errors", ""), r.get("note") or r.get("failed", ""))
        for r in section["runs"]
    ]  # fmt: skip
    head = ("", "clients", "requests", "captions/s", "mean ms", "p99 ms", "errors", "")
    return _table(head, rows)


def _batches(section: dict[str, Any]) -> str:
    rows = [
        (name, s.get("failed") or ", ".join(f"{b}: {ms:,.0f} ms" for b, ms in s["points"]),
         s.get("knee", ""))
        for name, s in section["series"].items()
    ]  # fmt: skip
    return _table(("", "images at once: ms an image", "knee"), rows)


def _ablation(section: dict[str, Any]) -> str:
    rows, before = [], None
    for row in section["steps"]:
        ms = row.get("ms_per_image")
        gain = f"{before / ms:.2f} x" if before and ms else ""
        said = row.get("note") or row.get("failed")
        rows.append((row["step"], said or _number(ms, 1), gain))
        before = ms or before
    batching = (
        (name, _number(row["rate"], 1), _number(row["mean_ms"]), _number(row["p99_ms"]))
        for name, row in section["batching"].items()
    )
    return _table(("step", "ms an image", "gain"), rows) + _table(
        ("batching, captions of 4 to 28 tokens", "captions/s", "mean ms at 80 % load", "p99 ms"),
        batching,
    )


def _scheduling(section: dict[str, Any]) -> str:
    rows = (
        (r["load"], r["encode_batch"], r["patience"], _number(r["rate"], 1),
         _number(r["mean_ms"]), _number(r["p99_ms"]))
        for r in section["rows"]
    )  # fmt: skip
    head = ("load", "images in one go", "patience", "captions/s", "mean ms", "p99 ms")
    check = section["check"]
    return _table(head, rows) + (
        f"<p>The engine itself, {check['clients']} clients: {check['measured']:.1f} captions/s; "
        f"replayed {check['replayed']:.1f}. {html.escape(section['runs_on'])}.</p>"
    )


def _open_loop(section: dict[str, Any]) -> str:
    rows = [
        (r["contestant"], f"{r['bound_s']} s",
         "none of those tried" if r["highest_rate"] is None else _number(r["highest_rate"], 2),
         "yes" if r["certain"] else "no: fewer than 460 requests",
         ", ".join(f"{t['rate']:.2f} {'held' if t['held'] else 'missed'}"
                   for t in r["tried"]))
        if "failed" not in r else (r["contestant"], "", "failed", "", r["failed"])
        for r in section["server"]
    ]  # fmt: skip
    offline = (
        (r["contestant"], _number(r["per_second"], 2), r["errors"]) for r in section["offline"]
    )
    return _table(
        ("", "p99 under", "highest rate a second", "certain to LoadGen", "rates tried"), rows
    ) + _table(("LoadGen Offline", "captions/s", "errors"), offline)


def _roofline(section: dict[str, Any]) -> str:
    peaks = ((name, _number(value)) for name, value in section["peaks"].items())
    encoder, decoder = section["encoder"], section["decoder"]
    rows = (
        (f"encoder {encoder['name']}", f"{encoder['work'] / 1e9:.1f} Gop an image",
         *_against_floor(encoder)),
        (f"step of {decoder['rows']} rows, decoder {decoder['name']}",
         f"{decoder['work'] / 1e6:.0f} MB of weights and cache", *_against_floor(decoder)),
    )  # fmt: skip
    head = ("", "work", "took", "floor", "reached")
    return _table(("peak", "measured"), peaks) + _table(head, rows)


def _against_floor(part: dict[str, Any]) -> tuple[str, str, str]:
    took, floor = part["seconds"] * 1e3, part["floor"] * 1e3
    return f"{took:.1f} ms", f"{floor:.1f} ms", f"{floor / took:.0%}"


def _profile(section: dict[str, Any]) -> str:
    return "".join(
        _table((graph, "share of the time"), ((name, f"{share:.1%}") for name, share in shares))
        for graph, shares in section["graphs"].items()
    )


def _service(section: dict[str, Any]) -> str:
    first, second = section["start_s"]
    return _table(
        ("", "measured"),
        (
            (
                "16 clients over HTTP, of the engine's own rate, taking turns",
                f"{section['share_of_engine']:.0%}",
            ),
            ("one client: all but encode and decode", f"{section['http_cost_ms']:.1f} ms"),
            ("from the command to ready", f"{first:.1f} s"),
            ("the same again", f"{second:.1f} s"),
            (
                "resident memory of all processes after 64 requests of 16 clients",
                f"{section['resident_mib']:.0f} MiB",
            ),
            (
                "16 clients, of the rate of the same engine in one process, taking turns",
                f"{section['share_of_one_process']:.0%}",
            ),
        ),
    )


def _scaling(section: dict[str, Any]) -> str:
    costs = _table(("measured", "ms"), ((k, _number(v, 2)) for k, v in section["costs_ms"].items()))
    check = _table(
        ("clients", "measured", "simulated", "off", "median measured", "median simulated", "off"),
        (
            (row["clients"], f"{row['measured']:.2f}/s", f"{row['rate']:.2f}/s",
             f"{row['rate_off']:+.1%}", f"{row['measured_median_s']:.3f} s",
             f"{row['median_s']:.3f} s", f"{row['median_off']:+.1%}")
            for row in section["check"]
        ),
    )  # fmt: skip
    rows = _table(
        ("host", "hosts", "captions/s", "p99 at 80 %", "dollars a million", "bound by"),
        (
            (row["kind"], row["hosts"], _number(row["rate"]), f"{row['p99_s']:.2f} s",
             _number(row["dollars_per_million"], 2), row["bound"])
            for row in section["rows"]
        ),
    )  # fmt: skip
    needed = _table(
        ("captions a day", "host", "hosts", "dollars a day", "images, Gbit/s"),
        (
            (f"{row['a_day']:,.0f}", row["kind"], row["hosts"], _number(row["dollars_a_day"], 2),
             _number(row["gigabits"], 2))
            for row in section["needed"]
        ),
    )  # fmt: skip
    return costs + check + rows + needed


def _front_ends(section: dict[str, Any]) -> str:
    rows = ((str(r["front_ends"]), _number(r["per_second"])) for r in section["rows"])
    return _table((f"front-ends on {section['cores']} cores", "images/s"), rows)


def _images(section: dict[str, Any]) -> str:
    rows = (
        (r["image"], _number(r["served_per_s"]), _number(r["exact_per_s"]),
         _number(r["mean_difference"], 2))
        for r in section["rows"]
    )  # fmt: skip
    head = ("image", "images/s on one core", "decoded in full", "mean difference of 255")
    return _table(head, rows)


SECTIONS: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "offline": ("Without a server", "All images at once, and one alone; medians. Hugging Face's "
                "batch is the best of those under 'Time against batch size'. Where PyTorch's fp32 "
                "products run far below the machine's peak (see 'Against the machine's limits'), "
                "bf16, where it was measured, is the fairer rival.", _offline),
    "bulk": ("Captions in bulk", "A folder of JPEGs of 640 x 480 through vignette caption, once "
             "for each kind of output, in turns with the engine alone.", _bulk),
    "rival": ("PyTorch at its best", "The same modules with the image encoded once, a static "
              "cache, bfloat16 where the processor has it, and compiled with frozen weights.",
              _rival),
    "beams": ("Beam search", "Hugging Face encodes the image again for every beam and token; "
              "Vignette encodes it once, and moves only text when beams change places.", _beams),
    "scores": ("What beams and scores buy", "The demo model on scenes that it never saw. The plot: "
               "answers sorted by their score, in tenths. 'Right ones score higher': how often a "
               "right answer of two, one right and one wrong, has the higher score.", _scores),
    "http": ("Over HTTP", "ApacheBench: each client sends its next request when the last is "
             "answered. Slow contestants get fewer requests; every run is finished.", _http),
    "protocols": ("Other protocols", "16 clients that each send the next image when one is "
                  "captioned; the protocols in turns, each as a share of /caption.",
                  partial(_shares, "of /caption's")),
    "cluster": ("Over a Ray cluster", "The service, and one replica of it on a cluster of this "
                "machine alone, 16 clients, in turns.", partial(_shares, "of those without Ray")),
    "service": ("The service itself", "Vignette as its processes.", _service),
    "scaling": ("Many machines, on paper", "A simulation with the engine's own loop and the times "
                "that were measured here. It is checked first: the same clients on this machine, "
                "measured and simulated in turns, of which the medians are told. GPUs are targets, "
                "which one H200 has met since (bench/results/h200). Prices are stated in "
                "bench/sections/scaling.py; 'bound by' is what works most, and how much of what it "
                "could.",
                _scaling),
    "front_ends": ("Taking images in", "JPEGs of 640x480 over HTTP, 64 clients, on the demo "
                   "engine, whose captions cost little.", _front_ends),
    "open_loop": ("At a given rate", "MLPerf LoadGen: Poisson arrivals, latency from the time a "
                  "request was due; errors and time-outs are misses.", _open_loop),
    "ablation": ("Where it comes from", "One step at a time, some images at once.", _ablation),
    "batches": ("Time against batch size", "The knee is the batch beyond which a larger one saves "
                "less than 10 % of the time per image.", _batches),
    "scheduling": ("Images encoded between two decode steps", "Captions of 8 to "
                   "24 tokens. Clients ask again when answered; Poisson arrivals do not wait. The "
                   "engine's own loop, replayed with the least times that the calls of both "
                   "graphs were measured to take.", _scheduling),
    "roofline": ("Against the machine's limits", "Peaks are measured in the same run: the best of "
                 "PyTorch and ONNX Runtime for a matrix product of 2048, and reading 512 MiB. "
                 "The floor is the work at that peak.", _roofline),
    "profile": ("Where the time goes", "ONNX Runtime's time by kind of node: int8/int8/int8 on the "
                "CPU provider, one image, and a step of 16 rows.", _profile),
    "images": ("Preprocessing", "JPEG bytes to pixels, on one core.", _images),
}  # fmt: skip
