"""A front-end's sockets to the workers."""

import asyncio

import zmq
import zmq.asyncio

from server.ipc.messages import StepFailed, WorkerFacts, WorkerState, packed, worker_address
from server.ipc.shared import PixelStore, RunFolder
from server.ipc.transport import WorkerLinks


def test_a_message_that_can_not_be_taken_stops_no_other(caplog):
    run, taken = RunFolder(), []

    def received(key: tuple[int, int], message: StepFailed) -> None:
        if message.id == 2:
            raise ValueError("a bug")
        taken.append(message.id)

    async def told() -> None:
        worker = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        worker.bind(worker_address(run.path, 0, 1))
        store = PixelStore(run.path / "pixels", 1, (3, 2, 2), create=True)
        links = WorkerLinks(run.path, store, "front-0-1")
        links.dispatcher.received = received
        facts = WorkerFacts("engine", "fp32", "cpu", "cpu", "passed", None, 1)
        links.update([WorkerState("m", "cpu", 0, 1, "ready", 1, 0, None, facts)])
        front_end, _ = await worker.recv_multipart()
        together = packed([StepFailed(number) for number in (1, 2, 3)])
        for data in (together, b"\xc1", packed([StepFailed(4)])):
            await worker.send_multipart([front_end, data])
        while len(taken) < 3:
            await asyncio.sleep(0.01)
        await links.close()
        worker.close(linger=0)

    asyncio.run(asyncio.wait_for(told(), 20))
    run.remove()
    assert taken == [1, 3, 4]
    assert [record.message for record in caplog.records] == 2 * [
        "a message of worker 0 could not be taken"
    ]
