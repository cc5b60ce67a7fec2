"""Scenario: gRPC calls that hold places and memory without asking for anything useful."""

import asyncio
import statistics
from collections.abc import AsyncIterator

import grpc
from tritonclient.grpc import service_pb2 as pb

from bench.contestants.servers import free_port
from bench.reliability.load import Clients, after
from bench.reliability.protocols import MODEL, call, client, ready
from bench.reliability.running import Service, Verdict, said, sample, service

_HONEST, _SECONDS = 8, 2.0
_SILENT, _LEFT, _WRONG = 400, 60, 8  # calls of each kind, per round
_LEFT_SECONDS = 0.02
_GROWN = 150  # MiB, of all processes
_BODY_SECONDS = 2
_SERVICE = "/inference.GRPCInferenceService/"


def held_calls(long: bool) -> Verdict:
    """Calls whose message never comes, large images that are none, and calls that are left."""
    rounds, port = 20 if long else 1, free_port()
    flags = "--grpc-port", str(port), "--body-seconds", str(_BODY_SECONDS)
    with service(*flags, "--precision", "fp32/fp32/float32") as it:
        return asyncio.run(_beside(it, port, rounds))


async def _beside(it: Service, port: int, rounds: int) -> Verdict:
    during: list[float] = []
    quiet: list[float] = []
    wrong = 0
    async with client(port) as honest, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await ready(honest)
        await _round(channel)
        before = it.resident()
        for _ in range(rounds):
            for rates, attack in ((during, _round(channel)), (quiet, asyncio.sleep(0))):
                attacking = asyncio.ensure_future(attack)
                clients = Clients(it.url)
                answers = await clients.closed_loop(sample(), _HONEST, after(_SECONDS))
                wrong += sum(answer.caption != said() for answer in answers)
                rates.append(len(answers) / _SECONDS)
                await attacking
        afterwards = await call(honest)
    grown = (it.resident() - before) / 2**20
    replaced = sum("it is replaced" in line for line in it.log().splitlines())
    rate, usual = statistics.median(during), statistics.median(quiet)
    return Verdict(
        f"{rounds} rounds of {_SILENT} silent, {_LEFT} left and {_WRONG} wrong calls: over HTTP "
        f"{rate / usual:.0%} of {usual:.1f}/s, {wrong} wrong; afterwards a call is "
        f"{'answered' if afterwards == 'right' else afterwards}; {replaced} processes replaced, "
        f"{grown:+.0f} MiB",
        not wrong and not replaced and afterwards == "right" and grown < _GROWN,
        rate >= 0.5 * usual,
    )


async def _round(channel: grpc.aio.Channel) -> None:
    """All three kinds of calls, until the last of them has ended."""
    silent = [channel.stream_unary(f"{_SERVICE}ServerLive")(_never()) for _ in range(_SILENT)]
    infer = channel.unary_unary(f"{_SERVICE}ModelInfer")
    left = [asyncio.ensure_future(_leave(infer(_message(sample())))) for _ in range(_LEFT)]
    await asyncio.gather(*left)
    await asyncio.gather(*silent, return_exceptions=True)
    for _ in range(_WRONG):
        await asyncio.gather(infer(_message(bytes(9_000_000))), return_exceptions=True)


async def _never() -> AsyncIterator[bytes]:
    await asyncio.sleep(2 * _BODY_SECONDS)
    return
    yield b""


async def _leave(answer: grpc.aio.Call) -> None:
    await asyncio.sleep(_LEFT_SECONDS)
    answer.cancel()


def _message(image: bytes) -> bytes:
    message = pb.ModelInferRequest(model_name=MODEL)
    tensor = message.inputs.add(name="IMAGE", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(image)
    return bytes(message.SerializeToString())
