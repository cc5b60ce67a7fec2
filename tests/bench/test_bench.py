"""The benchmark's own arithmetic, what it reads from its tools, and the page it makes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from bench.common.arithmetic import affordable, highest, knee, percentile, rate
from bench.common.isolated import Failed, isolated
from bench.common.settings import TOKENS, Settings
from bench.contestants import encoded_once
from bench.contestants import servers as contestants
from bench.cuda.verdicts import table, verdicts
from bench.load import apache
from bench.report.page import write
from bench.sections import http, offline, open_loop
from bench.sections.scores import tenths, told_apart
from export.pictures import generated
from export.random_weights import from_config
from export.reference import Case, TorchGraphs, caption
from tests.support.checkpoints import SHAPES
from tests.support.isolated_jobs import answer, die, fail
from tests.support.paths import DEMO, SAMPLES

AB = """
Concurrency Level:      8
Time taken for tests:   4.000 seconds
Complete requests:      32
Failed requests:        2
Non-2xx responses:      1
"""
LOADGEN = """
Scenario : Server
Completed samples per second    : 47.13
Result is : INVALID
  Performance constraints satisfied : Yes
99.00 percentile latency (ns)   : 120251283
"""


def test_percentiles_are_values_that_were_measured():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert percentile(values, 0.5) == 3
    assert percentile(values, 0.99) == 5
    assert percentile(values, 0.2) == 1
    assert percentile(list(range(1, 101)), 0.99) == 99
    for wrong in ([], 0.5), (values, 0), (values, 1.1):
        with pytest.raises(ValueError, match="percentile"):
            percentile(*wrong)


def test_rates_and_knees():
    assert rate(30, 2.0) == 15
    assert rate(0, 0.0) == 0
    assert knee([(1, 100.0), (2, 60.0), (4, 40.0), (8, 39.0), (16, 38.0)]) == 4
    assert knee([(1, 100.0), (2, 120.0), (8, 80.0)]) == 8
    assert knee([(1, 10.0)]) == 1


def test_the_search_for_a_rate_closes_in_and_ends():
    capacity, tried = 7.3, []
    while (next_rate := highest(0.0, 12.0, tried)) is not None:
        tried.append((next_rate, next_rate <= capacity))
    best = max(rate for rate, held in tried if held)
    assert best <= capacity <= best * 1.05
    assert len(tried) < 12


def test_slow_contestants_get_as_many_rounds_as_fit():
    assert affordable(256, 16, solo=0.06, budget=30) == 256
    assert affordable(32, 1, solo=6.0, budget=30) == 5
    assert affordable(32, 8, solo=1.6, budget=30) == 16  # two rounds of eight
    assert affordable(32, 8, solo=6.0, budget=30) == 8  # one round, for twice the budget
    assert affordable(256, 64, solo=6.0, budget=30) == 0


def test_ratios_are_to_the_best_batch_and_to_one_image():
    theirs = {"precision": "fp32", "tokens": [[1, 2]],
              "batches": [{"batch": 1, "ms_per_image": 6000.0},
                          {"batch": 4, "ms_per_image": 5000.0}]}  # fmt: skip
    ours = {"name": "x", "combination": "fp32/fp32/float32", "ms_per_image": 50.0, "one_ms": 80.0,
            "tokens": [[1, 2]]}  # fmt: skip
    found = offline._compared({"torch": [theirs], "vignette": [ours]}, {})
    assert found["ratios"] == [
        {"vignette": "x", "torch": "fp32", "throughput": 100.0, "latency": 75.0}
    ]
    curves = {"series": {"PyTorch fp32": {"points": [[2, 4000.0], [8, 7000.0]]}}}
    [best] = offline._compared({"torch": [theirs], "vignette": [ours]}, curves)["ratios"]
    assert (best["throughput"], best["latency"]) == (80.0, 75.0)
    assert found["tokens_equal"] is True
    other = ours | {"tokens": [[1, 3]]}
    assert offline._compared({"torch": [theirs], "vignette": [other]}, {})["tokens_equal"] is False
    assert offline._compared({"torch": [theirs], "vignette": []}, {})["tokens_equal"] is None


def test_scores_are_judged_by_how_well_they_tell_right_from_wrong():
    good = [(-2.0, False), (-1.0, False), (-0.5, True), (-0.1, True)]
    assert told_apart(good) == 1.0
    assert told_apart([(s, not right) for s, right in good]) == 0.0
    assert told_apart([(-2.0, False), (-1.0, True), (-0.5, False), (-0.1, True)]) == 0.75
    assert told_apart([(-1.0, False), (-1.0, True)]) == 0.5
    many = [(float(n), n >= 50) for n in range(100)]
    parts = tenths(many)
    assert [share for _, share in parts] == [0.0] * 5 + [1.0] * 5
    assert [score for score, _ in parts] == [4.5 + 10 * n for n in range(10)]


def test_failed_and_refused_requests_are_no_captions():
    found = apache.summary(AB, [10.0, 30.0, 20.0])
    assert found["answered"] == 32
    assert found["errors"] == 3
    assert found["rate"] == 29 / 4
    assert (found["mean_ms"], found["p50_ms"], found["p99_ms"]) == (20, 20, 30)
    with pytest.raises(contestants.ServerFailed, match="Time taken"):
        apache.summary("nonsense", [])


def test_loadgen_s_verdict_is_read_not_guessed():
    found = open_loop.parsed(LOADGEN)
    assert found == {
        "valid": False,
        "in_bound": True,
        "per_second": 47.13,
        "p99_ms": pytest.approx(120.25, abs=0.01),
    }
    found |= {"errors": 0, "rate": 48.0}
    assert open_loop.held(found)
    assert not open_loop.held(found | {"errors": 1})
    assert not open_loop.held(found | {"rate": 52.0}), "a backlog grows"


def test_what_fails_in_a_process_of_its_own_is_told():
    assert isolated(answer, 1) == 2
    with pytest.raises(Failed, match="ValueError: a reason"):
        isolated(fail)
    with pytest.raises(Failed, match=r"die died \(exit status 3\)"):
        isolated(die)


def test_a_contestant_that_does_not_start_is_reported_and_the_rest_goes_on(tmp_path, capfd):
    broken = contestants.Contestant("broken", ("-c", "raise SystemExit('no model')"))
    from tqdm import tqdm

    with tqdm(disable=True) as progress:
        [run] = http._contestant(broken, Settings(), tmp_path, b"", progress)
    assert run["contestant"] == "broken"
    assert "no model" in run["failed"]


@pytest.mark.skipif(shutil.which("ab") is None, reason="ab is not installed (apache2-utils)")
def test_apachebench_measures_a_running_server(tmp_path):
    ours = contestants.Contestant(
        "demo", ("-m", "server", "--engine", str(DEMO), "--port", "{port}"), tokens=None
    )
    image = (SAMPLES / "owl.png").read_bytes()
    with contestants.running(ours, image) as url:
        found = apache.run(ours, url, 2, 6, tmp_path, image)
    assert (found["answered"], found["errors"]) == (6, 0)
    assert len(found["times_ms"]) == 6
    assert found["times_ms"] == sorted(found["times_ms"])
    assert found["rate"] > 0


def test_results_become_one_page_with_everything_in_it(tmp_path):
    runs = [
        {"contestant": name, "clients": 1, "requests": 2, "answered": 2, "errors": 0,
         "seconds": 1.0, "rate": speed, "mean_ms": 3.0, "p50_ms": 3.0, "p99_ms": 4.0,
         "times_ms": [3.0, 4.0]}
        for name, speed in (("PyTorch <x>", 0.25), ("Vignette", 17.5))
    ]  # fmt: skip
    results = {
        "about": {"machine": "2 cores", "system": "Linux", "versions": {"torch": "1"},
                  "commit": "abc", "date": "2026-01-01", "command": "make benchmark",
                  "seconds": 60, "work": "w"},
        "sections": {"http": {"runs": [*runs, {"contestant": "LitServe", "failed": "no port"}]},
                     "offline": {"failed": "out of memory"}},
    }  # fmt: skip
    write(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    page = (tmp_path / "index.html").read_text()
    for expected in ("17.50", "PyTorch &lt;x&gt;", "no port", "out of memory", "make benchmark"):
        assert expected in page
    assert "data:image/png;base64," in page
    assert "http://" not in page
    assert "src='data" in page
    assert (tmp_path / "http.png").stat().st_size > 5000


GPU = {
    "front_ends": {"rows": [{"front_ends": 1, "per_second": 100.0}]},
    "peaks": {"fp16_ops": 800e12, "bandwidth": 3e12},
    "encoder": {"ops": 50e9, "best": 50e9 / 400e12, "seconds": {1: 1.0, 16: 0.1}},
    "decoder": {"rows": 256, "seconds": 0.5e-3, "bytes": 0.6e9},
    "offline": {
        "per_second": 4200.0,
        "one": 0.008,
        "uneven_per_second": 3600.0,
        "uneven_tokens": 11.4,
    },
    "torch": {
        "fp16": {64: 0.004, 256: 0.003},
        "fp16 encoded-once compiled": {64: 0.0008},
        "bf16": {64: 0.0001},
    },
    "beams": {"greedy": 4000.0, "searched": 2580.0},
    "two_workers": {"one": 3000.0, "two": 3900.0},
    "memory": {"batches": 10_000, "grown": 0},
    "samples": {"right": 12, "of": 12},
}


def test_the_bars_of_a_gpu_are_held_against_what_was_measured():
    lines = verdicts(GPU)
    assert [line.measured for line in lines] == [
        "50%", "2.5 x (0.50 ms)", "4,200", "3,600", "12.6 x", "3,900 against 3,000", "3.4 x",
        "1.6 x (2,580 images a second)", "8.0 ms", "0 MiB", "1: 100", "12 of 12",
    ]  # fmt: skip
    assert [line.passed for line in lines].count(True) == 10
    text = table({"command": "c", "date": "d", "commit": "a", "gpu": "g", "machine": "m"}, lines)
    assert "| offline, images a second, 16 tokens each | >= 4,000 | 4,200 | pass |" in text
    assert "| the same, as uneven as COCO's (11.4 tokens) | >= 3,500 | 3,600 | pass |" in text


@pytest.mark.parametrize(
    ("part", "worse"),
    [
        ("encoder", {"best": 50e9 / 300e12}),
        ("decoder", {"seconds": 0.7e-3}),
        ("offline", {"per_second": 3900.0}),
        ("offline", {"uneven_per_second": 3400.0}),
        ("offline", {"one": 0.013}),
        ("beams", {"searched": 2400.0}),
        ("torch", {"fp16": {64: 0.002}}),
        ("torch", {"fp16 encoded-once": {64: 0.0006}}),
        ("memory", {"grown": 9 << 20}),
        ("samples", {"right": 11}),
    ],
)
def test_each_missed_bar_of_a_gpu_is_told(part, worse):
    lines = verdicts(GPU | {part: {**GPU[part], **worse}})
    assert sum(line.passed is False for line in lines) == 1


def test_the_best_pytorch_says_what_the_plain_loop_says(monkeypatch):
    checkpoint = from_config("base", SHAPES["base"], seed=3)
    monkeypatch.setattr(encoded_once, "random_weights", lambda shape: checkpoint)
    rng = np.random.default_rng(0)
    images = [generated(rng, checkpoint.sizes) for _ in range(3)]
    cases = [Case(image, [checkpoint.tokens.bos]) for image in images]
    endless = replace(checkpoint.tokens, eos=-1)
    graphs = TorchGraphs(checkpoint)
    expected = [a.tokens for a in caption(graphs, checkpoint.sizes, endless, cases, TOKENS)]
    assert encoded_once.EncodedOnce("fp32", compiled=False).generate(images) == expected
