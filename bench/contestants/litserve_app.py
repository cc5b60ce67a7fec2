"""LitServe around `generate`, with its own batching.

`python -m bench.contestants.litserve_app PORT PRECISION`
"""

import base64
import sys
from typing import Any

import litserve
import torch

from bench.contestants.model import TorchCaptioner


class GitApi(litserve.LitAPI):
    """One image per request, base64 in JSON as in LitServe's examples."""

    def __init__(self, precision: str) -> None:
        super().__init__(max_batch_size=64, batch_timeout=0.001, api_path="/caption")
        self._precision = precision

    def setup(self, device: str) -> None:
        """Load the model in LitServe's worker process."""
        self._model = TorchCaptioner(self._precision)

    def decode_request(self, request: dict[str, str], **_: Any) -> torch.Tensor:
        """JSON -> prepared image."""
        return self._model.prepare(base64.b64decode(request["image"]))

    def batch(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Leave stacking to `generate`."""
        return list(inputs)

    def predict(self, x: list[torch.Tensor], **_: Any) -> list[list[int]]:
        """A batch of images -> token ids of each."""
        return self._model.generate(x)

    def unbatch(self, output: list[list[int]]) -> list[list[int]]:
        """One answer per request."""
        return output

    def encode_response(self, output: list[int], **_: Any) -> dict[str, Any]:
        """Token ids -> JSON."""
        return {"caption": self._model.text(output), "tokens": output}


if __name__ == "__main__":
    server = litserve.LitServer(GitApi(sys.argv[2]), accelerator="cpu", timeout=600)
    server.run(port=int(sys.argv[1]), host="127.0.0.1", generate_client_file=False)
