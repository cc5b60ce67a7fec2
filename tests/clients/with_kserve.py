"""KServe's own client, unmodified. Arguments: HTTP and gRPC port, model, image, its caption."""

import asyncio
import sys
from pathlib import Path

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig


async def main(http: str, grpc: str, model: str, image: str, caption: str) -> None:
    data = Path(image).read_bytes()
    rest = InferenceRESTClient(RESTConfig(protocol="v2"))
    base = f"http://127.0.0.1:{http}"
    assert await rest.is_server_ready(base)
    assert await rest.is_model_ready(base, model)
    answer = await rest.infer(base, InferRequest(model, [tensor(data)]), model_name=model)
    assert said(answer) == caption, said(answer)
    async with InferenceGRPCClient(f"127.0.0.1:{grpc}") as client:
        assert await client.is_server_live()
        assert await client.is_model_ready(model)
        answer = await client.infer(InferRequest(model, [tensor(data)]))
        assert said(answer) == caption, said(answer)
        try:
            await client.infer(InferRequest(model, [tensor(b"x")]))
        except Exception as error:
            assert "not an image" in str(error), error
        else:
            raise AssertionError("an image that is none was captioned")
    print("kserve: REST and gRPC as expected")


def tensor(image: bytes) -> InferInput:
    made = InferInput("IMAGE", [1], "BYTES")
    made.set_data_from_numpy(np.array([image], np.object_), binary_data=True)
    return made


def said(answer) -> str:
    [output] = [output for output in answer.outputs if output.name == "CAPTION"]
    text = output.as_numpy().flat[0]
    return text.decode() if isinstance(text, bytes) else str(text)


asyncio.run(main(*sys.argv[1:]))
