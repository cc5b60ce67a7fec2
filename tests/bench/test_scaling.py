"""The simulation of many hosts: cores that are shared, requests on their way, and its check."""

from dataclasses import replace
from statistics import median

import pytest
import simpy

from bench.common.settings import QUICK
from bench.load.costs import Costs
from bench.scaling.cores import Cores
from bench.scaling.hosts import Cluster, Kind
from bench.sections import scaling
from tests.support.paths import DEMO


def ended(count: int, *jobs: tuple[float, float, int]) -> tuple[list[float], float]:
    """End of each job (seconds with a core per thread, weight, threads), and the core seconds."""
    env = simpy.Environment()
    cores, ends = Cores(env, count), [0.0] * len(jobs)

    def job(number: int, seconds: float, weight: float, threads: int):
        yield cores.run(seconds, weight, threads)
        ends[number] = env.now

    for number, asked in enumerate(jobs):
        env.process(job(number, *asked))
    env.run()
    return ends, cores.busy


@pytest.mark.parametrize(
    ("count", "jobs", "ends"),
    [
        (1, [(2.0, 1, 1)], [2.0]),
        (2, [(2.0, 1, 1), (2.0, 1, 1)], [2.0, 2.0]),  # one core each
        (1, [(2.0, 1, 1), (2.0, 1, 1)], [4.0, 4.0]),
        (1, [(1.0, 3, 1), (1.0, 1, 1)], [4 / 3, 2.0]),  # three quarters until the first is done
        (2, [(2.0, 1, 2), (1.0, 3, 1)], [2.5, 1.0]),  # a heavy thread has no more than a core
        (2, [(1.0, 1, 4)], [2.0]),  # more threads than cores
    ],
)
def test_cores_are_shared_by_weight(count, jobs, ends):
    found, busy = ended(count, *jobs)
    assert found == pytest.approx(ends)
    assert busy == pytest.approx(sum(seconds * threads for seconds, _, threads in jobs))


def kind(**changes) -> Kind:
    costs = Costs([0.1, 0.2], [0.01] * 4)
    given = {"name": "test", "cores": 2, "engine": costs, "front_s": 0.002, "decode_s": 0.004,
             "on_cores": True, "dollars": 1.0}  # fmt: skip
    return Kind(**given | changes)


def test_one_request_takes_what_its_parts_take():
    cluster = Cluster(kind(), 1, DEMO)
    cluster.closed_loop(1, [5, 5])
    network = 100_000 * 8 / 10e9
    assert cluster.seconds == pytest.approx(
        [0.002 + 0.004 + 0.1 + 5 * 0.01 + network] * 2, rel=0.01
    )


def test_engines_slow_down_while_images_are_decoded():
    alone, beside = Cluster(kind(decode_s=1e-6), 1, DEMO), Cluster(kind(decode_s=0.05), 1, DEMO)
    for cluster in (alone, beside):
        cluster.closed_loop(4, [5] * 40)
    assert beside.rate < 0.9 * alone.rate


def test_an_engine_on_a_gpu_leaves_the_cores_alone():
    found = Cluster(kind(on_cores=False, decode_s=0.05), 1, DEMO)
    alone = Cluster(kind(on_cores=False, decode_s=1e-6), 1, DEMO)
    for cluster in (found, alone):
        cluster.closed_loop(8, [5] * 80)
    assert found.rate == pytest.approx(alone.rate, rel=0.1)
    assert found.used()["engine"] > 0.9


def test_what_bounds_a_host_is_not_an_engine_that_waits_for_images():
    found = Cluster(kind(on_cores=False, decode_s=0.5), 1, DEMO)
    found.closed_loop(8, [5] * 40)
    used = found.used()
    assert used["JPEG decoding"] > 0.9
    assert used["engine"] < 0.5


def test_twice_the_hosts_caption_twice_as_much():
    rates = []
    for hosts in (2, 4):
        cluster = Cluster(kind(), hosts, DEMO)
        cluster.closed_loop(12 * hosts, [5] * 60 * hosts)
        rates.append(cluster.rate)
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.1)


@pytest.mark.parametrize("off", [1.0, 1.3])
def test_nothing_is_said_of_many_hosts_unless_this_one_is_reproduced(monkeypatch, off):
    """off: times that this machine is measured to be faster than the simulation has it."""
    costs = Costs([0.1, 0.2], [0.01] * 4)
    loops = {}
    for clients in (1, 4):
        cluster = Cluster(kind(front_s=0.003), 1, DEMO)
        cluster.closed_loop(clients, [16] * scaling._requests(clients, QUICK))
        loops[clients] = scaling._Loop(off * cluster.rate, median(cluster.seconds) / off)
    turn = scaling._Turn(costs, loops)
    here = scaling._Here([turn], "fake", front_s=0.006, client_s=0.001)
    monkeypatch.setattr(scaling, "_measured", lambda settings: here)
    monkeypatch.setattr(scaling, "median_s", lambda action, repeats: 0.004)
    monkeypatch.setattr(scaling, "_GPU_HOSTS", (1,))
    found = scaling.measure(replace(QUICK, engine=DEMO))
    if off > 1:
        assert "nothing further is said" in found["failed"]
        assert "rows" not in found
    else:
        assert "failed" not in found
        few_hosts = {row["hosts"] for row in found["rows"] if row["bound"].startswith("engine")}
        assert few_hosts >= {1, 4}
        [few, *_] = [row for row in found["needed"] if row["a_day"] == 1e6]
        assert few["hosts"] >= 1
