"""What the supervisor accepts of its processes."""

import asyncio
import os
from functools import partial
from pathlib import Path

import pytest

from runtime.engine import Engine
from runtime.planning.plan import Plan
from server.ipc.shared import RunFolder
from server.models import ServedModel
from server.processes.crew import workers
from server.processes.supervisor import CannotStart, Supervisor
from server.settings import Settings
from tests.fakes import FakeRunner, fake_engine, fake_worker


def engine_of(precision: str) -> Engine:
    engine = fake_engine()
    runner = FakeRunner()
    runner.plan = Plan(combination=precision, encoder_provider="fake")
    engine.runner = runner
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
