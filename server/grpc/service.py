"""GRPCInferenceService: `server.protocols.kserve` in protobuf.

The stubs document its methods and messages.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from runtime.errors import InvalidRequest, VignetteError
from server.grpc.calls import Call, Context, Refusal
from server.grpc.stubs import grpc_service_pb2 as pb
from server.grpc.stubs import model_config_pb2
from server.grpc.wire import call_in
from server.protocols import kserve
from server.protocols.kserve import Inputs
from server.protocols.streams import text_deltas
from server.service.model import Model
from server.service.service import Service

_IDLE_SECONDS = 300.0  # that a stream stays open without a request
_METHODS = {  # methods that do not caption, and their requests
    "ServerLive": pb.ServerLiveRequest,
    "ServerReady": pb.ServerReadyRequest,
    "ModelReady": pb.ModelReadyRequest,
    "ServerMetadata": pb.ServerMetadataRequest,
    "ModelMetadata": pb.ModelMetadataRequest,
    "ModelConfig": pb.ModelConfigRequest,
    "ModelStatistics": pb.ModelStatisticsRequest,
    "RepositoryIndex": pb.RepositoryIndexRequest,
}
CAPTIONING = ("ModelInfer", "ModelStreamInfer")  # their requests are passed as bytes


def handlers(service: Service) -> dict[str, Any]:
    """A handler for each method that is served, by its name."""
    ours = InferenceService(service)
    return {
        **{
            name: grpc.unary_unary_rpc_method_handler(
                getattr(ours, name), request.FromString, _serialized
            )
            for name, request in _METHODS.items()
        },
        "ModelInfer": grpc.unary_unary_rpc_method_handler(ours.ModelInfer, None, _serialized),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
            ours.ModelStreamInfer, None, _serialized
        ),
    }


def _serialized(message: Any) -> bytes:
    return bytes(message.SerializeToString())


class InferenceService:
    """The service's methods in one front-end."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def ServerLive(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        return pb.ServerReadyResponse(ready=self._service.serves)

    async def ModelReady(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        model = await self._model(request, context)
        return pb.ModelReadyResponse(ready=model.serves)

    async def ServerMetadata(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        return pb.ServerMetadataResponse(**kserve.SERVER, extensions=kserve.EXTENSIONS)

    async def ModelMetadata(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        known = kserve.metadata(await self._model(request, context))
        return pb.ModelMetadataResponse(**known)

    async def ModelConfig(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        known = kserve.config(await self._model(request, context))
        return pb.ModelConfigResponse(config=model_config_pb2.ModelConfig(**known))

    async def ModelStatistics(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        model = await self._model(request, context)
        if self._service.settings.ops_port is not None:  # then statistics are not public
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "statistics are served by /metrics")
        done = await self._service.metrics.captioned(model.name)
        found = pb.ModelStatistics(name=model.name, version=kserve.VERSION, inference_count=done)
        return pb.ModelStatisticsResponse(model_stats=[found])

    async def RepositoryIndex(self, request: Any, context: Context) -> Any:  # noqa: D102, N802
        models = [
            pb.RepositoryIndexResponse.ModelIndex(**kserve.index_entry(model))
            for model in self._service.models.values()
        ]
        return pb.RepositoryIndexResponse(models=models)

    async def ModelInfer(self, data: bytes, context: Context) -> Any:  # noqa: D102, N802
        call = Call(self._service, context, "ModelInfer")
        try:
            return await self._infer(data, call)
        except VignetteError as error:
            refusal = Refusal(error)
        del data  # else the error raised next holds it
        return await call.refuse(refusal, call.images)

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[bytes], context: Context
    ) -> None:
        """Answer a stream's requests one after the other. Raises TimeoutError when no request
        comes, or an answer is not read.
        """
        while True:
            async with asyncio.timeout(_IDLE_SECONDS):
                data = await anext(requests, None)
            if data is None:
                return
            call = Call(self._service, context, "ModelStreamInfer")
            answers: asyncio.Queue[Any] = asyncio.Queue()
            answering = asyncio.create_task(self._answer(data, call, answers))
            del data
            try:
                while (answer := await answers.get()) is not None:
                    async with asyncio.timeout(self._service.settings.body_seconds):
                        await context.write(answer)
                await answering
            finally:
                answering.cancel()

    async def _answer(self, data: bytes, call: Call, answers: "asyncio.Queue[Any]") -> None:
        """Queue all answers to one request, whether they are read or not, then None."""
        try:
            async with aclosing(self._stream(data, call)) as responses:
                async for response in responses:
                    answers.put_nowait(pb.ModelStreamInferResponse(infer_response=response))
        except VignetteError as error:  # the stream goes on with the next request
            await call.wait_turn()
            failed = pb.ModelInferResponse(id=call.id, model_name=call.model)
            answers.put_nowait(
                pb.ModelStreamInferResponse(
                    error_message=Refusal(error).message, infer_response=failed
                )
            )
        finally:
            answers.put_nowait(None)

    async def _model(self, request: Any, context: Context) -> Model:
        try:
            return kserve.model_of(self._service, request.name, request.version)
        except VignetteError as error:
            await Call(self._service, context, "").refuse(Refusal(error))
            raise AssertionError("a refused call is over") from error

    async def _infer(self, data: bytes, call: Call) -> Any:
        with call.held(len(data)) as held:
            await call.wait_for(len(data))
            request = call_in(data)
            model = call.asks(request)
            inputs = _inputs(request, model)
            call.images = len(inputs.images)
            call.enter(held, call.images - 1, before=1)
            captions = await inputs.captions(self._service, model, call.client, call.timeout_ms)
            call.timing = captions[0].timing
            scores = [caption.score or 0.0 for caption in captions]
            return _response(request, model, [caption.text for caption in captions], scores)

    async def _stream(self, data: bytes, call: Call) -> AsyncGenerator[Any, None]:
        """A response for each token, with the text so far, and one with the caption."""
        with call.held(len(data)):
            await call.wait_for(len(data))
            request = call_in(data)
            model = call.asks(request)
            inputs = _inputs(request, model)
            if len(inputs.images) != 1:
                raise InvalidRequest("of a stream each request holds one image, or one clip's")
            asked = model.request(
                inputs.prompts[0], inputs.sampling, timeout_ms=call.timeout_ms, stream=True
            )
            logprobs: list[float] = []
            generated = self._service.generate(model, asked, inputs.images[0], call.client)
            async with aclosing(generated) as outputs:
                async for news in text_deltas(outputs, model.tokenizer):
                    logprobs += news.completion.logprobs
                    mean = sum(logprobs) / max(1, len(logprobs))
                    response = _response(request, model, [news.text], [mean])
                    last = news.whole is not None
                    response.parameters["triton_final_response"].bool_param = last
                    call.timing = news.whole.timing if news.whole else None
                    yield response


def _inputs(request: Any, model: Model) -> Inputs:
    """The inputs of a request. Raises InvalidRequest."""
    kserve.check_outputs([output.name for output in request.outputs])
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest("raw_input_contents must hold all inputs, or none")
    values: dict[str, list[Any]] = {}
    frames = model.manifest.sizes.frames
    for place, tensor in enumerate(request.inputs):
        kserve.check_input(tensor.name, tensor.datatype, values)
        if raw:
            values[tensor.name] = kserve.unpacked(tensor.name, tensor.datatype, raw[place])
        else:
            contents = tensor.contents
            texts, numbers = contents.bytes_contents, contents.int_contents
            values[tensor.name] = list(texts if tensor.datatype == "BYTES" else numbers)
        kserve.check_shape(tensor.name, tensor.shape, values[tensor.name], frames)
    return Inputs.of(values, frames)


def _response(request: Any, model: Model, texts: list[str], scores: list[float]) -> Any:
    """The requested outputs, or all, as raw bytes."""
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
