"""What becomes of requests when workers come, die, hang or break."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from runtime.errors import ComputationFailed
from runtime.request import (
    Completion,
    FinishReason,
    GenerationRequest,
    RequestOutput,
    SamplingParams,
    SchedulingParams,
)
from runtime.results import join_outputs
from server.ipc.deadline import Expired
from server.ipc.dispatcher import Dispatcher
from server.ipc.failures import EngineFailed, EngineLost
from server.ipc.messages import TO_WORKER, Cancel, Generate, Hello, Output, StepFailed
from tests.support.live import requests_in

HELLO = Hello("store", 100, (3, 4, 4))
TOKENS = (3, 1)


class Pipe:
    """Records what is sent to a worker."""

    def __init__(self) -> None:
        self.sent: list = []
        self.closed = False

    def send(self, data: bytes) -> None:
        self.sent.append(TO_WORKER.decode(data))

    def close(self, linger: int = 0) -> None:
        self.closed = True

    @property
    def asked(self) -> list[Generate]:
        return [message for message in self.sent if isinstance(message, Generate)]

    @property
    def captions(self) -> list[int]:
        """Pixel slots of the requests that were sent, in order."""
        return [message.slot for message in self.asked]

    def ids(self, slot: int) -> list[int]:
        return [message.request.id for message in self.asked if message.slot == slot]


class World:
    """A dispatcher, with a task per request that reads its outputs; `slot` names a request."""

    def __init__(self) -> None:
        self.started = [0] * 100
        self.dispatcher = Dispatcher(HELLO, self.started)
        self.tasks: dict[int, asyncio.Task] = {}
        self.read: dict[int, list[RequestOutput]] = {}
        self.epoch = 0

    def worker(self, index: int = 0, runs: str = "") -> tuple[tuple[int, int], Pipe]:
        self.epoch += 1
        key, pipe = (index, self.epoch), Pipe()
        self.dispatcher.connected(key, pipe, runs)
        return key, pipe

    async def ask(
        self, *slots: int, seconds: float = 30, digest: str | None = None, stream: bool = False
    ) -> None:
        for slot in slots:
            when = SchedulingParams(deadline=time.perf_counter() + seconds)
            request = GenerationRequest(None, (0,), SamplingParams(20), when, stream)
            self.begin(request, slot, digest)
        await settle()

    def begin(self, request: GenerationRequest, slot: int, digest: str | None = None) -> None:
        self.read[slot] = []
        self.tasks[slot] = asyncio.create_task(self._read(request, slot, digest or f"image {slot}"))

    async def _read(self, request: GenerationRequest, slot: int, digest: str) -> tuple[int, ...]:
        async for output in self.dispatcher.generate(request, slot, digest):
            self.read[slot].append(output)
        return join_outputs(self.read[slot]).token_ids

    async def say(self, key, message) -> None:
        self.dispatcher.received(key, message)
        await settle()

    async def fail(self, key, number: int) -> None:
        await self.say(key, StepFailed(number))

    async def answer(
        self, key, pipe: Pipe, slot: int, tokens=TOKENS, reason=FinishReason.STOP
    ) -> None:
        await self.say(
            key, Output(RequestOutput(pipe.ids(slot)[-1], Completion(tokens, finish_reason=reason)))
        )

    async def start(self, key, pipe: Pipe, *slots: int) -> None:
        for slot in slots:
            self.started[slot] = pipe.ids(slot)[-1]

    async def kill(self, slot: int, times: int) -> None:
        """Kill workers that have begun with a request, from outside."""
        for _ in range(times):
            key, pipe = self.worker()
            await self.start(key, pipe, slot)
            await self.lose(key, blamed=False)

    async def lose(self, key, blamed: bool = True) -> None:
        self.dispatcher.lost(key, blamed)
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def scenario(test: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test(World()))

    run.__name__ = test.__name__
    return run


@scenario
async def test_requests_wait_for_the_first_worker(world):
    await world.ask(1, 2)
    key, pipe = world.worker()
    assert pipe.sent[0] == HELLO
    assert pipe.captions == [1, 2]
    await world.answer(key, pipe, 2)
    assert world.tasks[2].result() == TOKENS
    assert not world.tasks[1].done()


@scenario
async def test_the_worker_with_fewest_in_flight_gets_the_next(world):
    a, first = world.worker(0)
    _, second = world.worker(1)
    await world.ask(1, 2, 3)
    assert (first.captions, second.captions) == ([1, 3], [2])
    await world.answer(a, first, 1)
    await world.answer(a, first, 3)
    await world.ask(4)
    assert first.captions[-1] == 4


@scenario
async def test_what_a_dead_worker_had_is_sent_again_and_suspects_alone(world):
    key, pipe = world.worker()
    await world.ask(1, 2, 3)
    await world.start(key, pipe, 1, 2)
    await world.lose(key)
    assert pipe.closed
    again, fresh = world.worker()
    assert fresh.captions == [1], "a suspect has the worker to itself"
    await world.answer(again, fresh, 1)
    assert fresh.captions == [1, 2]
    await world.answer(again, fresh, 2)
    assert fresh.captions == [1, 2, 3], "what had not begun goes last, and is no suspect"
    await world.answer(again, fresh, 3)
    assert all(task.done() and not task.exception() for task in world.tasks.values())


@scenario
async def test_what_had_not_begun_goes_in_the_order_in_which_it_came(world):
    """Which is that of decoding, and not of the requests' numbers."""
    key, _ = world.worker()
    made = [GenerationRequest(None, (0,), SamplingParams(20)) for _ in range(3)]
    for slot, request in enumerate(reversed(made), 1):
        world.begin(request, slot)
    await settle()
    await world.lose(key)
    await world.ask(4)
    assert world.worker()[1].captions == [1, 2, 3, 4]


@scenario
async def test_what_killed_for_another_front_end_is_refused_here_too(world):
    world.dispatcher.refuse("image 1")
    with pytest.raises(EngineFailed, match="not tried again"):
        world.dispatcher.check("image 1")


@scenario
async def test_what_kills_twice_is_answered_alone_and_refused_from_then_on(world):
    told = []
    world.dispatcher.on_refused = lambda digest, until: told.append(digest)
    key, pipe = world.worker()
    await world.ask(1, 2)
    await world.start(key, pipe, 1, 2)
    await world.lose(key)
    key, pipe = world.worker()
    await world.start(key, pipe, 1)
    await world.lose(key)
    with pytest.raises(EngineFailed, match="twice"):
        world.tasks[1].result()
    with pytest.raises(EngineFailed, match="not tried again"):
        world.dispatcher.check("image 1")
    world.dispatcher.check("image 2")
    assert told == ["image 1"]
    key, pipe = world.worker()
    assert pipe.captions == [2]
    await world.answer(key, pipe, 2)
    assert world.tasks[2].result() == TOKENS


@scenario
async def test_a_worker_that_somebody_kills_proves_nothing(world):
    await world.ask(1)
    await world.kill(1, times=3)
    key, pipe = world.worker()
    await world.start(key, pipe, 1)
    await world.answer(key, pipe, 1)
    assert world.tasks[1].result() == TOKENS


@scenario
async def test_a_request_is_given_up_and_not_refused_when_its_worker_is_killed_too_often(world):
    await world.ask(1)
    await world.kill(1, times=4)
    with pytest.raises(EngineLost, match="try again later"):
        world.tasks[1].result()
    world.dispatcher.check("image 1")


@scenario
async def test_after_some_minutes_an_image_that_was_refused_is_tried_again_alone(world):
    world.dispatcher.refuse("image 1", time.monotonic() - 1)
    key, pipe = world.worker()
    await world.ask(2, 1, 3)
    assert pipe.captions == [2], "the suspect waits until the worker is empty, the others for it"
    await world.answer(key, pipe, 2)
    assert pipe.captions == [2, 1]
    await world.start(key, pipe, 1)
    await world.lose(key)
    with pytest.raises(EngineFailed, match="twice"):
        world.tasks[1].result()
    with pytest.raises(EngineFailed):
        world.dispatcher.check("image 1")


@scenario
async def test_an_answer_that_came_just_before_the_end_counts(world):
    key, pipe = world.worker()
    await world.ask(1)
    await world.start(key, pipe, 1)
    number = pipe.ids(1)[0]
    world.dispatcher.received(
        key, Output(RequestOutput(number, Completion(TOKENS, finish_reason=FinishReason.STOP)))
    )
    world.dispatcher.lost(key, blamed=True)  # before the waiting task has run
    _, fresh = world.worker()
    await settle()
    assert world.tasks[1].result() == TOKENS
    assert fresh.captions == []


@scenario
async def test_copies_of_a_killer_do_not_kill_again(world):
    key, pipe = world.worker()
    await world.ask(1, 2, 3, digest="the same image")
    await world.ask(4)
    await world.start(key, pipe, 1, 2, 3, 4)
    await world.lose(key)
    key, pipe = world.worker()
    [first] = pipe.captions
    await world.start(key, pipe, first)
    await world.lose(key)
    key, pipe = world.worker()
    assert all(isinstance(world.tasks[n].exception(), EngineFailed) for n in (1, 2, 3))
    assert pipe.captions == [4]
    await world.answer(key, pipe, 4)
    assert world.tasks[4].result() == TOKENS


@scenario
async def test_order_is_kept_when_a_worker_dies(world):
    key, _ = world.worker()
    await world.ask(1, 2, 3)
    await world.lose(key)
    _, pipe = world.worker()
    assert pipe.captions == [1, 2, 3]


@scenario
async def test_order_is_kept_when_a_step_fails(world):
    key, pipe = world.worker()
    await world.ask(1, 2, 3, 4)
    await world.start(key, pipe, 1)
    ids = [pipe.ids(slot)[0] for slot in (1, 2, 3, 4)]
    for number in ids:
        await world.fail(key, number)
    await world.answer(key, pipe, 1)
    assert pipe.captions == [1, 2, 3, 4, 1, 2, 3, 4]


@scenario
async def test_suspects_get_a_worker_while_others_keep_all_of_them_busy(world):
    key, pipe = world.worker()
    await world.ask(1)
    await world.start(key, pipe, 1)
    healthy = [world.worker(1), world.worker(2)]
    await world.ask(*range(10, 30))
    await world.lose(key)
    for slot in range(30, 98, 2):
        for key, pipe in healthy:
            if inside := [s for s in pipe.captions if not world.tasks[s].done()]:
                await world.answer(key, pipe, inside[0])
        await world.ask(slot, slot + 1)
    assert world.tasks[1].done(), "it was tried alone, and answered"


@scenario
async def test_a_request_that_was_never_started_is_never_blamed(world):
    await world.ask(1)
    for _ in range(5):
        key, pipe = world.worker()
        assert pipe.captions == [1]
        await world.lose(key)
    key, pipe = world.worker()
    await world.answer(key, pipe, 1)
    assert world.tasks[1].result() == TOKENS


@scenario
async def test_a_step_that_raised_is_tried_again_one_by_one(world):
    key, pipe = world.worker()
    await world.ask(1, 2)
    await world.start(key, pipe, 1, 2)
    for slot in (1, 2):
        await world.fail(key, pipe.ids(slot)[0])
    assert pipe.captions == [1, 2, 1]
    await world.start(key, pipe, 1)
    await world.fail(key, pipe.ids(1)[-1])
    assert pipe.captions == [1, 2, 1, 2]
    await world.answer(key, pipe, 2)
    assert isinstance(world.tasks[1].exception(), EngineFailed)
    assert world.tasks[2].result() == TOKENS


@scenario
async def test_a_caller_that_gives_up_is_taken_back_from_the_worker(world):
    key, pipe = world.worker()
    await world.ask(1)
    world.tasks[1].cancel()
    await settle()
    assert pipe.sent[-1] == Cancel(pipe.ids(1)[0])
    assert not requests_in(world.dispatcher)
    await world.answer(key, pipe, 1)  # too late, and harmless


@scenario
async def test_a_deadline_ends_the_wait_wherever_the_request_stands(world):
    await world.ask(1, seconds=0.01)  # there is no worker at all
    key, pipe = world.worker()
    await world.ask(2, seconds=0.01)
    await asyncio.sleep(0.05)
    assert isinstance(world.tasks[1].exception(), Expired)
    assert isinstance(world.tasks[2].exception(), Expired)
    assert isinstance(pipe.sent[-1], Cancel)
    await world.ask(3)
    await world.answer(key, pipe, 3, (), FinishReason.EXPIRED)
    assert isinstance(world.tasks[3].exception(), Expired)
    assert not requests_in(world.dispatcher)


@scenario
async def test_numbers_that_broke_down_are_told(world):
    key, pipe = world.worker()
    await world.ask(1)
    await world.answer(key, pipe, 1, (), FinishReason.FAILED)
    assert isinstance(world.tasks[1].exception(), ComputationFailed)


@scenario
async def test_a_stream_goes_on_when_its_worker_dies_without_a_gap_or_a_repeat(world):
    """What was handed on before is generated again, and left out."""
    key, pipe = world.worker()
    await world.ask(1, stream=True)
    await world.start(key, pipe, 1)
    await world.answer(key, pipe, 1, (3,), None)
    await world.answer(key, pipe, 1, (4, 5), None)
    assert [output.token_ids for output in world.read[1]] == [(3,), (4, 5)]
    await world.lose(key, blamed=False)
    key, pipe = world.worker()
    await world.answer(key, pipe, 1, (3, 4), None)  # in other steps than the worker before
    assert len(world.read[1]) == 2
    await world.answer(key, pipe, 1, (5, 6), None)
    await world.fail(key, pipe.ids(1)[-1])
    await world.answer(key, pipe, 1, (3, 4, 5, 6, 7), None)
    await world.answer(key, pipe, 1, (1,), FinishReason.STOP)
    assert [output.token_ids for output in world.read[1]] == [(3,), (4, 5), (6,), (7,), (1,)]
    assert world.tasks[1].result() == (3, 4, 5, 6, 7, 1)


@scenario
async def test_a_stream_does_not_go_on_with_the_tokens_of_another_precision(world):
    key, pipe = world.worker(runs="fp16")
    await world.ask(1, stream=True)
    await world.ask(2)
    number = pipe.ids(1)[-1]
    await world.say(key, Output(RequestOutput(number, Completion((11, 12)))))
    await world.lose(key, blamed=False)
    key, pipe = world.worker(runs="fp32")
    await settle()
    assert pipe.captions == [2], "of which nothing was told yet"
    with pytest.raises(EngineLost, match="replaced by another"):
        world.tasks[1].result()
