"""Scenarios: replicas and nodes of a Ray cluster on this machine die."""

import asyncio
import contextlib
import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from bench.contestants.servers import free_port
from bench.reliability.faulty import GREEN, RED
from bench.reliability.images import solid
from bench.reliability.load import Clients
from bench.reliability.protocols import stream
from bench.reliability.running import DEMO, Verdict, command, get, said, sample, wait_for

_CLIENTS = 8  # half of them read streams
_SLOTS = 2  # of a replica, so that the clients need four replicas
_CRASHES = 40  # blue value of an image that crashes the engine (`faulty.FAULTS`)
_OTHER = "fp32/fp32/float32"  # precision that the model is updated to
_REPLICA = "ray::ServeReplica:vignette-vignette-demo:"  # title that Ray gives replica processes
_SECONDS = 120.0  # time-out of each operation on the cluster


class Fleet:
    """A cluster that starts with one node, which has the service and its ingress."""

    def __init__(self, folder: Path, most: int) -> None:
        """most: replicas, at most."""
        from ray.cluster_utils import Cluster

        self.folder, self.most = folder, most
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        self.nodes: list[Any] = []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            self._command("--engine", str(DEMO)), stdout=self._log, stderr=self._log
        )

    def _command(self, *flags: str) -> list[str]:
        flags = (
            "--provider", "cpu", "--slots", str(_SLOTS), "--ray", self.cluster.address,
            "--ray-replicas", f"1-{self.most}", "--ray-cores", "1", "--ray-ingresses", "1", *flags,
        )  # fmt: skip
        return command(self.port, *flags, program="bench.reliability.faulty")

    def log(self) -> str:
        """The service's output so far."""
        return (self.folder / "log").read_text()

    def update(self, *flags: str) -> None:
        """Redeploy the model with other flags. Raises RuntimeError."""
        done = subprocess.run(
            self._command(*flags, "--ray-detach"),
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
        if done.returncode:
            raise RuntimeError(f"the update failed: {done.stderr[-1000:]}")

    def facts(self) -> dict[str, Any]:
        """The engines, as /health/ready shows them; empty while there are none."""
        status, body = get(self.port, "/health/ready")
        return json.loads(body)["workers"][0] if status == 200 else {}

    def replicas(self) -> list[psutil.Process]:
        """Replica processes whose parent is a node of this cluster."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if "".join(process.info["cmdline"] or []).startswith(_REPLICA):
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                    node = process.parent()
                    if node is not None and self.cluster.address in " ".join(node.cmdline()):
                        found.append(process)
        return found

    def add_node(self) -> None:
        """Add a node with room for one engine."""
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def kill_node(self) -> None:
        """Kill the oldest node but the first, which has the ingress."""
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)

    def close(self) -> None:
        """Stop service and cluster."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.cluster.shutdown()
            self._log.close()


@contextlib.contextmanager
def fleet(most: int) -> Iterator[Fleet]:
    """A ready fleet of up to `most` replicas."""
    folder = Path(tempfile.mkdtemp(prefix="vignette-fleet-"))
    started = Fleet(folder, most)
    try:
        wait_for(started.facts, _SECONDS, started.log)
        yield started
    finally:
        started.close()
        shutil.rmtree(folder)


def dying_cluster(long: bool) -> Verdict:
    """Under load: scale out, SIGKILL replicas, kill nodes, crash engines with an image, update
    the engine; then scale in.
    """
    kills, nodes, most = (20, 3, 3) if long else (1, 1, 2)
    with fleet(most) as it, ThreadPoolExecutor(1) as pool:
        over = False
        load = pool.submit(lambda: asyncio.run(_asked_until(lambda: over, it.url)))
        try:
            steps = [_out(it), _kills(it, kills), _nodes(it, nodes), _crash(it), _update(it)]
            time.sleep(2.0)
        finally:
            over = True
        answers = load.result()
        if long:
            wait_for(lambda: it.facts().get("engines") == 1, 2 * _SECONDS, it.log)
            steps.append("back to one replica")
    wrong = Counter(answer for answer in answers if answer != "right")
    first = f" ({next(iter(wrong))})" if wrong else ""
    return Verdict(
        f"{', '.join(steps)}: {wrong.total()} of {len(answers)} wrong or failed{first}", not wrong
    )


def _out(it: Fleet) -> str:
    for _ in range(it.most - 1):
        it.add_node()
    wait_for(lambda: it.facts().get("engines") == it.most, _SECONDS, it.log)
    return f"out to {it.most} replicas"


def _kills(it: Fleet, times: int) -> str:
    rng = random.Random(1)
    for _ in range(times):
        rng.choice(wait_for(it.replicas, _SECONDS, it.log)).kill()
        time.sleep(2.0)
    return f"{times} kills"


def _nodes(it: Fleet, times: int) -> str:
    """Kill nodes that have a replica."""
    for _ in range(times):
        wait_for(lambda: it.facts().get("engines") == it.most, _SECONDS, it.log)
        it.kill_node()
        time.sleep(2.0)
        it.add_node()
    return f"{times} nodes"


def _crash(it: Fleet) -> str:
    async def ask() -> list[int]:
        clients, image = Clients(it.url), solid((RED, GREEN, _CRASHES), 32)
        return [(await clients.caption(image)).status for _ in range(3)]

    statuses = asyncio.run(ask())
    if statuses != [500] * 3:
        raise RuntimeError(f"an image that crashes engines was answered {statuses}")
    return "an image that crashes engines refused"


def _update(it: Fleet) -> str:
    copy = shutil.copytree(DEMO, it.folder / "engine")
    it.update("--engine", str(copy), "--precision", _OTHER)
    wait_for(lambda: it.facts().get("precision") == _OTHER, _SECONDS, it.log)
    return "updated"


async def _asked_until(over: Callable[[], bool], url: str) -> list[str]:
    """Ask from all clients until `over`; each answer is "right", or what was wrong."""
    found: list[str] = []
    async with aiohttp.ClientSession() as http:

        async def client(number: int) -> None:
            ask = stream if number % 2 else _caption
            while not over():
                try:
                    found.append(await ask(http, url))
                except (aiohttp.ClientError, TimeoutError) as error:
                    found.append(f"{type(error).__name__}: {error}")

        await asyncio.gather(*(client(number) for number in range(_CLIENTS)))
    return found


async def _caption(http: aiohttp.ClientSession, url: str) -> str:
    async with http.post(f"{url}/caption", data=sample()) as answer:
        body = await answer.json()
    return "right" if body.get("caption") == said() else f"{answer.status} {body}"
