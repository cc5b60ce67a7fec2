"""GRPCInferenceService: what `server.kserve` says, in protobuf.

The stubs name their methods and messages, and say what each does.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from typing import Any

import grpc

from runtime.errors import InvalidRequest, VignetteError
from server import kserve
from server.grpc.stubs import grpc_service_pb2 as pb
from server.grpc.stubs import model_config_pb2
from server.grpc.stubs.grpc_service_pb2_grpc import GRPCInferenceServiceServicer
from server.http.errors import INTERNAL, answer_to
from server.http.origins import group_of
from server.kserve import Inputs
from server.service.keys import sent
from server.service.model import Model
from server.service.service import Service
from server.streams import growing

Context = Any  # grpc.aio.ServicerContext, which has no types
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_COPIES = 2  # of a message's images: its own, and those that are taken from it
_WAITING = 64  # calls whose refusal waits its turn; others are refused at once
_LEAST_MS = 100  # of a deadline: less is spent on the way


class _Call:
    """One call: who makes it, and how it ended."""

    waiting = 0  # of all calls

    def __init__(self, service: Service, context: Context) -> None:
        self.service, self._context = service, context
        self._metadata = {key.lower(): value for key, value in context.invocation_metadata() or ()}
        self.model = ""
        self.key: str | None = None
        peer = context.peer().split(":", 1)[-1].rpartition(":")[0]  # ipv4:1.2.3.4:5, ipv6:[::1]:5
        self._address = group_of(peer.strip("[]").removeprefix("%5B").removesuffix("%5D"))

    @property
    def client(self) -> str:
        """With whom it shares its turns."""
        return self.key or self._address

    @property
    def timeout_ms(self) -> int | None:
        """What is left of its deadline."""
        left = self._context.time_remaining()
        longest = self.service.settings.timeout_seconds
        if left is None or left > longest:
            return None
        return max(_LEAST_MS, math.floor(left * 1e3))

    def enter(self, held: ExitStack) -> None:
        """Count a caption among those of its key. Raises Unauthorised or TooFast."""
        if self.service.keys is not None:
            self.key = held.enter_context(self.service.keys.enter(sent(self._metadata)))

    @contextmanager
    def held(self, size: int) -> Iterator[ExitStack]:
        """Its place and its bytes, while it is served; raises what refuses it. Counts its end."""
        with ExitStack() as held:
            try:
                self.enter(held)
                self.service.check_room(self.client)
                client = self.client
                size *= _COPIES
                self.service.budget.hold(size, client)
                held.callback(self.service.budget.let_go, size, client)
                yield held
            except VignetteError as error:
                self.service.count(self.model, self.key, answer_to(error, 500).code)
                raise
            except (asyncio.CancelledError, GeneratorExit):
                self.service.count(self.model, self.key, "cancelled")
                raise
            except Exception:
                self.service.count(self.model, self.key, INTERNAL.code)
                raise
            self.service.count(self.model, self.key, "ok")

    async def wait_turn(self) -> None:
        """Wait until this client may be refused, unless too many wait."""
        wait = self.service.refusals.spend(self.client, 1)
        if wait and _Call.waiting < _WAITING:
            _Call.waiting += 1
            try:
                await asyncio.sleep(wait)
            finally:
                _Call.waiting -= 1

    async def refuse(self, error: VignetteError) -> None:
        """End the call with an error, at once or when it is this client's turn to be refused."""
        await self.wait_turn()
        answer = answer_to(error, 500)
        retry_after = getattr(error, "retry_after", None)
        trailing = (("retry-after", str(retry_after)),) if retry_after is not None else ()
        message = f"{answer.code}: {answer.message or error}"
        status = _STATUS.get(answer.status, grpc.StatusCode.UNKNOWN)
        await self._context.abort(status, message, trailing)


class InferenceService(GRPCInferenceServiceServicer):
    """For one front-end."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def ServerLive(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        return pb.ServerReadyResponse(ready=self._service.serves)

    async def ModelReady(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        model = await self._model(request.name, context)
        return pb.ModelReadyResponse(ready=model.serves)

    async def ServerMetadata(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        return pb.ServerMetadataResponse(**kserve.SERVER, extensions=kserve.EXTENSIONS)

    async def ModelMetadata(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        known = kserve.metadata(await self._model(request.name, context))
        return pb.ModelMetadataResponse(**known)

    async def ModelConfig(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        known = kserve.config(await self._model(request.name, context))
        return pb.ModelConfigResponse(config=model_config_pb2.ModelConfig(**known))

    async def ModelStatistics(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        model = await self._model(request.name, context)
        if self._service.settings.ops_port is not None:  # then they are not public
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "statistics are served by /metrics")
        counted = (await self._service.metrics.rendered()).decode()
        done = kserve.captioned_so_far(counted, model.name)
        found = pb.ModelStatistics(name=model.name, version=kserve.VERSION, inference_count=done)
        return pb.ModelStatisticsResponse(model_stats=[found])

    async def RepositoryIndex(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        models = [
            pb.RepositoryIndexResponse.ModelIndex(**kserve.index_entry(model))
            for model in self._service.models.values()
        ]
        return pb.RepositoryIndexResponse(models=models)

    async def ModelInfer(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        call = _Call(self._service, context)
        try:
            return await self._infer(request, call)
        except VignetteError as error:
            return await call.refuse(error)

    async def ModelStreamInfer(  # noqa: D102, N802
        self, requests: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[Any]:
        async for request in requests:
            call = _Call(self._service, context)
            try:
                async with aclosing(self._stream(request, call)) as responses:
                    async for response in responses:
                        yield pb.ModelStreamInferResponse(infer_response=response)
            except VignetteError as error:  # the stream goes on with the next request
                await call.wait_turn()
                answer = answer_to(error, 500)
                failed = pb.ModelInferResponse(id=request.id, model_name=request.model_name)
                yield pb.ModelStreamInferResponse(
                    error_message=f"{answer.code}: {answer.message or error}", infer_response=failed
                )

    async def _model(self, name: str, context: Context) -> Model:
        call = _Call(self._service, context)
        await asyncio.sleep(self._service.visits.spend(call.client, 1))
        try:
            return self._service.model(name)
        except VignetteError as error:
            await call.refuse(error)
            raise AssertionError("a refused call is over") from error

    async def _infer(self, request: Any, call: _Call) -> Any:
        with call.held(request.ByteSize()) as held:
            model = self._service.model(request.model_name)
            call.model = model.name
            inputs = _inputs(request)
            for _ in inputs.images[1:]:
                call.enter(held)
            captions = await inputs.captions(self._service, model, call.client, call.timeout_ms)
            scores = [caption.score or 0.0 for caption in captions]
            return _response(request, model, [caption.text for caption in captions], scores)

    async def _stream(self, request: Any, call: _Call) -> AsyncGenerator[Any, None]:
        """A response for each token, with the text so far, and one with the caption."""
        with call.held(request.ByteSize()):
            model = self._service.model(request.model_name)
            call.model = model.name
            inputs = _inputs(request)
            if len(inputs.images) != 1:
                raise InvalidRequest("of a stream each request holds one image")
            asked = model.request(
                inputs.prompts[0], inputs.sampling, timeout_ms=call.timeout_ms, stream=True
            )
            logprobs: list[float] = []
            generated = self._service.generate(model, asked, inputs.images, call.client)
            async with aclosing(generated) as outputs:
                async for news in growing(outputs, model.tokenizer):
                    logprobs += news.completion.logprobs
                    mean = sum(logprobs) / max(1, len(logprobs))
                    response = _response(request, model, [news.text], [mean])
                    last = news.whole is not None
                    response.parameters["triton_final_response"].bool_param = last
                    yield response


def _inputs(request: Any) -> Inputs:
    """What a call asks for. Raises InvalidRequest."""
    kserve.check_outputs([output.name for output in request.outputs])
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest("raw_input_contents must hold all inputs, or none")
    values: dict[str, list[Any]] = {}
    for place, tensor in enumerate(request.inputs):
        kserve.check_datatype(tensor.name, tensor.datatype)
        if raw:
            values[tensor.name] = kserve.unpacked(tensor.name, tensor.datatype, raw[place])
        else:
            contents = tensor.contents
            texts, numbers = contents.bytes_contents, contents.int_contents
            values[tensor.name] = list(texts if tensor.datatype == "BYTES" else numbers)
    return Inputs.of(values)


def _response(request: Any, model: Model, texts: list[str], scores: list[float]) -> Any:
    """The outputs that are asked for, or all, as raw bytes."""
    values: dict[str, list[Any]] = {"CAPTION": texts, "SCORE": scores}
    names = [output.name for output in request.outputs] or list(values)
    response = pb.ModelInferResponse(
        model_name=model.name, model_version=kserve.VERSION, id=request.id
    )
    for name in names:
        datatype = kserve.OUTPUTS[name]
        response.outputs.add(name=name, datatype=datatype, shape=[len(values[name])])
        response.raw_output_contents.append(kserve.packed(values[name], datatype))
    return response
