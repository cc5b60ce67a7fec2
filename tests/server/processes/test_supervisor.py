"""What the supervisor accepts of its processes."""

import asyncio
import dataclasses
import multiprocessing
import os
import shutil
import socket
import sys
import threading
import time
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq
from msgspec.structs import replace

from runtime.engine import Engine
from server.ipc.messages import (
    FROM_SUPERVISOR,
    TO_SUPERVISOR,
    Drain,
    Drained,
    EngineVerified,
    FrontEndReady,
    FrontEndServes,
    Serving,
    WorkerFacts,
    control_address,
    notify_supervisor,
    packed,
    process_name,
)
from server.ipc.shared import RunFolder
from server.models import ServedModel
from server.processes import frontend
from server.processes.child import Child
from server.processes.children import workers
from server.processes.ports import Ports
from server.processes.supervisor import CannotStart, Supervisor
from server.service import keys
from server.settings import Settings
from tests.support.fakes import fake_engine, fake_worker
from tests.support.paths import DEMO


def engine_of(precision: str) -> Engine:
    engine = fake_engine()
    engine.runner.plan = dataclasses.replace(engine.runner.plan, combination=precision)
    return engine


def unequal_worker(
    settings: Settings, model: ServedModel, folder: Path, index: int, epoch: int
) -> None:
    """As where one of two GPUs has failed, and `auto` takes the processor instead."""
    open_engine = partial(engine_of, ("fp16", "int8")[index])
    fake_worker(open_engine, settings, model, folder, index, epoch)


def test_workers_of_a_model_must_give_the_same_captions(tmp_path):
    settings = Settings.model_construct(log_level="ERROR")
    run = RunFolder()
    model = ServedModel("m", tmp_path, 1.0)
    children = workers(settings, [model], run.path, unequal_worker, ["0", "1"])

    async def serve() -> None:
        await Supervisor(settings, ["m"], run, children, []).run(asyncio.Event())

    with pytest.raises(CannotStart, match=r"would run .* name --provider and --precision"):
        asyncio.run(asyncio.wait_for(serve(), 60))
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert [child.worker_state().device for child in children] == ["0", "1"]


def test_a_front_end_that_fails_as_it_starts_ends_with_its_decoders():
    """They ignore SIGTERM, and Python waits for daemons at its exit."""
    run = RunFolder()
    supervisor = zmq.Context.instance().socket(zmq.ROUTER)
    supervisor.bind(control_address(run.path))
    with supervisor, socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(host="127.0.0.1", port=0, grpc_port=taken.getsockname()[1], decoders=1)
        ports = Ports(settings)
        process = multiprocessing.get_context("spawn").Process(
            target=frontend.main,
            args=(settings, (ServedModel("demo", DEMO, 1.0),), run.path, ports,
                  settings.front_ends, 1),
        )  # fmt: skip
        process.start()
        process.join(60)
        ended = process.exitcode
        process.kill()
        _, told = supervisor.recv_multipart()
    ports.close()
    run.remove()
    assert ended == 1
    assert "--grpc-port" in TO_SUPERVISOR.decode(told).reason  # known once its decoders run


def test_a_process_that_can_not_be_started_for_now_is_started_later(tmp_path, monkeypatch):
    monkeypatch.setattr("server.processes.supervisor._FIRST_PAUSE", 0.05)
    run, model = RunFolder(), ServedModel("m", tmp_path, 1.0)
    settings = Settings.model_construct(log_level="ERROR", step_seconds=60.0, drain_seconds=1.0)
    main = partial(fake_worker, fake_engine)
    [child] = children = workers(settings, [model], run.path, main, [""])
    start, refused = Child.start, [OSError(24, "Too many open files")] * 2

    def scarce(each: Child) -> None:
        if each.epoch and refused:
            raise refused.pop()
        start(each)

    monkeypatch.setattr(Child, "start", scarce)

    async def serve() -> None:
        ready = asyncio.Event()
        supervisor = Supervisor(settings, ["m"], run, children, [])
        supervisor.on_ready = ready.set
        stop = asyncio.Event()
        running = asyncio.create_task(supervisor.run(stop))
        await asyncio.wait_for(ready.wait(), 60)
        child.kill()
        while child.state != "ready" or child.epoch == 1:
            assert not running.done()
            await asyncio.sleep(0.01)
        stop.set()
        await running

    asyncio.run(asyncio.wait_for(serve(), 60))
    assert not refused


def verified_worker(
    settings: Settings, model: ServedModel, folder: Path, index: int, epoch: int
) -> None:
    notify_supervisor(folder, process_name("worker", index, epoch), EngineVerified(model.name))
    fake_worker(fake_engine, settings, model, folder, index, epoch)


def late_front_end(heard: Path, folder: Path, index: int, epoch: int) -> None:
    """It takes its time to hear what serves."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as control:
        control.identity = process_name("front", index, epoch).encode()
        control.connect(control_address(folder))
        control.send(packed(FrontEndReady()))
        while not isinstance(message := FROM_SUPERVISOR.decode(control.recv()), Drain):
            if isinstance(message, Serving) and message.workers[0].state == "ready":
                time.sleep(0.5)
                heard.touch()
                control.send(packed(FrontEndServes()))
        control.send(packed(Drained()))


def test_a_service_is_ready_once_its_front_ends_know(tmp_path):
    run, model, heard = RunFolder(), ServedModel("m", tmp_path, 1.0), tmp_path / "heard"
    settings = Settings.model_construct(log_level="ERROR", step_seconds=60.0, drain_seconds=1.0)
    engines = workers(settings, [model], run.path, verified_worker, [""])
    front_end = Child("front", 0, partial(late_front_end, heard, run.path))

    async def serve() -> bool:
        stop, known = asyncio.Event(), []
        supervisor = Supervisor(settings, ["m"], run, engines, [front_end])
        supervisor.on_ready = lambda: (known.append(heard.exists()), stop.set())
        await supervisor.run(stop)
        return known == [True]

    assert asyncio.run(asyncio.wait_for(serve(), 60))


def lost_worker(
    settings: Settings, model: ServedModel, folder: Path, index: int, epoch: int
) -> None:
    """As where an engine was replaced: it starts once."""
    if epoch == 1:
        fake_worker(fake_engine, settings, model, folder, index, epoch)
    sys.exit(1)


def test_an_engine_that_does_not_start_again_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("server.processes.supervisor._FIRST_PAUSE", 0.05)
    run, model = RunFolder(), ServedModel("m", tmp_path, 1.0)
    settings = Settings.model_construct(log_level="ERROR", step_seconds=60.0, drain_seconds=1.0)
    [child] = children = workers(settings, [model], run.path, lost_worker, [""])
    told: list[str] = []

    async def serve() -> None:
        supervisor = Supervisor(settings, ["m"], run, children, [])
        supervisor.on_ready = child.kill
        supervisor.on_change = lambda serving: told.append(serving.workers[0].state)
        stop = asyncio.Event()
        running = asyncio.create_task(supervisor.run(stop))
        while "failing" not in told:
            assert not running.done()
            await asyncio.sleep(0.01)
        stop.set()
        await running

    asyncio.run(asyncio.wait_for(serve(), 60))
    assert told == ["ready", "recovering", "recovering", "failing"]


def test_key_files_are_read_one_after_the_other_and_the_newest_counts(tmp_path, monkeypatch):
    """Two SIGHUPs at once: what was read first, and slowly, must not come last."""
    path, run, begun = tmp_path / "keys", RunFolder(), threading.Event()
    old, new = (f"{name} {sha256(name.encode()).hexdigest()} 0 0\n" for name in ("eve", "adam"))
    path.write_text(old)
    real, delays = keys.copy, [0.5, 0.0]

    def copy(*given):
        text = path.read_text()
        begun.set()
        time.sleep(delays.pop(0))
        (tmp_path / "as it was").write_text(text)
        return real(tmp_path / "as it was", given[1])

    monkeypatch.setattr(keys, "copy", copy)
    settings = Settings.model_construct(log_level="ERROR", api_keys=path)

    async def hang_up_twice() -> None:
        supervisor = Supervisor(settings, ["m"], run, [], [])
        first = asyncio.create_task(supervisor.read_keys())
        await asyncio.to_thread(begun.wait, 20)
        path.write_text(new)
        await asyncio.gather(first, supervisor.read_keys())
        supervisor._control.close(linger=0)

    asyncio.run(hang_up_twice())
    assert (run.path / keys.CHECKED).read_text() == new
    run.remove()


def test_a_run_whose_folder_is_deleted_ends_and_says_why(tmp_path):
    run, model = RunFolder(), ServedModel("m", tmp_path, 1.0)
    settings = Settings.model_construct(log_level="ERROR", step_seconds=60.0, drain_seconds=1.0)
    children = workers(settings, [model], run.path, partial(fake_worker, fake_engine), [""])

    async def serve() -> None:
        supervisor = Supervisor(settings, ["m"], run, children, [])
        supervisor.on_ready = lambda: shutil.rmtree(run.path)
        await supervisor.run(asyncio.Event())

    with pytest.raises(CannotStart, match=r"was deleted while it was in use.*RemoveIPC"):
        asyncio.run(asyncio.wait_for(serve(), 60))


def test_a_process_that_hangs_as_it_starts_is_replaced_in_the_end():
    child = Child("worker", 0, print)
    child.process = SimpleNamespace(is_alive=lambda: True)
    assert child.health_problem(500.0, 60.0) is None
    assert child.health_problem(700.0, 60.0) == "hung"
    child.state = "ready"
    assert child.health_problem(5.0, 60.0) == "hung"


def test_a_step_is_as_long_as_the_engine_was_measured_to_take():
    """A large model's step of several images is no hang."""
    child = Child("worker", 0, print, state="ready", step_since=0.0)
    child.process = SimpleNamespace(is_alive=lambda: True)
    child.facts = WorkerFacts("e", "fp32", "cpu", "cpu", "passed", 6.0, 16, encode_batch=4)
    for now, problem in ((90.0, None), (100.0, "stuck")):
        child.heard_at = now
        assert child.health_problem(now, step_seconds=25.0) == problem
    child.facts = replace(child.facts, self_test_seconds=0.1)
    assert child.health_problem(100.0, step_seconds=99.0) == "stuck"
    assert child.health_problem(100.0, step_seconds=101.0) is None
