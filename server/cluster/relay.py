"""Forwards requests of an ingress's front-ends to the replicas of a model.

To the front-ends a relay is a worker. A request that is lost with its replica is sent again, and
tokens already delivered are left out.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import zmq.asyncio
from msgspec import msgpack
from msgspec.structs import replace
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from server.cluster.replica import OUTPUT_DECODER, ReplicaOutput, ReplicaRequest
from server.ipc.messages import FailureReason, Output, Unserved
from server.ipc.receiver import Receiver, RequestTask
from server.ipc.replay_filter import ReplayFilter

log = logging.getLogger(__name__)

_LOSSES = 4  # of replicas with a request inside, before the request is given up
# An argument of up to 100 kB travels with its call, a larger one through the object store: with
# images of 150 kB that took the cluster 50 % more time.
_PIECE = 96_000
_PAUSE_SECONDS = 0.05  # after the first loss, doubled after each further one


class Relay(Receiver):
    """A worker that stands for all replicas of a model."""

    def __init__(self, socket: zmq.asyncio.Socket, replicas: DeploymentHandle, kind: str) -> None:
        """kind: of the model that requests are made for (`ModelFiles.kind`)."""
        super().__init__(socket)
        self._replicas, self._kind = replicas, kind

    async def serve(self, job: RequestTask) -> None:
        """Have a replica serve a request; try again if the replica is lost."""
        number = job.message.request.id
        replayed, engine, reason = ReplayFilter(), None, FailureReason.LOST
        for losses in range(_LOSSES):
            try:
                replayed.again()
                async with aclosing(self._asked(job)) as news:
                    async for answer in news:
                        if answer.output is None or (replayed.tokens and answer.engine != engine):
                            failure = answer.failure or FailureReason.REPLACED
                            self.send(job.owner, Unserved(number, failure))
                            return
                        engine = answer.engine
                        fresh = replace(replayed.fresh(answer.output), id=number)
                        self.send(job.owner, Output(fresh))
                return
            except BackPressureError:
                reason = FailureReason.FULL
                break
            except (RayError, RayServeException) as error:
                log.warning("a request is sent again: its replica is gone (%r)", error)
                await asyncio.sleep(_PAUSE_SECONDS * 2**losses)
        self.send(job.owner, Unserved(number, reason))

    async def _asked(self, job: RequestTask) -> AsyncGenerator[ReplicaOutput, None]:
        """Outputs of a request from a replica; closing cancels the request."""
        request = job.message.request
        deadline = request.scheduling.deadline
        left = None if deadline is None else max(0.0, deadline - time.perf_counter())
        call = msgpack.encode(ReplicaRequest(request, job.message.digest, left, self._kind))
        pixels = self.pixels(job).tobytes()  # the slot is reused as soon as nobody waits
        pieces = [pixels[at : at + _PIECE] for at in range(0, len(pixels), _PIECE)]
        response: Any
        if request.stream:
            response = self._replicas.options(stream=True).stream.remote(call, *pieces)
        else:
            response = self._replicas.caption.remote(call, *pieces)
        ended = False
        try:
            if request.stream:
                async for message in response:
                    yield OUTPUT_DECODER.decode(message)
            else:
                yield OUTPUT_DECODER.decode(await response)
            ended = True
        finally:
            if not ended:
                response.cancel()
