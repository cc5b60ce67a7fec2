"""The PyTorch side of every comparison: the same weights, Hugging Face's own code."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, GenerationConfig

from bench.common.settings import SHAPE, TOKENS
from export.checkpoint import Checkpoint
from export.random_weights import random_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchCaptioner:
    """Hugging Face's `generate` over a batch of images, always TOKENS new tokens."""

    def __init__(
        self, precision: str = "fp32", device: str = "cpu", compiled: bool = False
    ) -> None:
        """compiled: apply `torch.compile` to the model's forward pass."""
        self._checkpoint: Checkpoint = random_weights(SHAPE)
        self._dtype, self._device = DTYPES[precision], device
        self._model = self._checkpoint.model.to(device, self._dtype)
        if compiled:
            self._model.forward = torch.compile(self._model.forward, dynamic=True)
        how, normalisation = self._checkpoint.preprocessing, self._checkpoint.normalisation
        self._processor = CLIPImageProcessor(
            size={"shortest_edge": how.shortest_edge},
            crop_size={"height": how.crop, "width": how.crop},
            resample=how.resample,
            rescale_factor=normalisation.rescale,
            image_mean=normalisation.mean,
            image_std=normalisation.std,
        )
        # Without an end token, so that both sides do the same work.
        self._config = GenerationConfig(
            max_new_tokens=TOKENS,
            do_sample=False,
            num_beams=1,
            bos_token_id=self._checkpoint.tokens.bos,
            pad_token_id=self._checkpoint.tokens.pad,
            eos_token_id=None,
        )
        self._model.generation_config = self._config  # else `generate` takes its end token

    def prepare(self, data: bytes) -> torch.Tensor:
        """Encoded image -> `[3, S, S]` in the model's dtype."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        pixels = self._processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels.to(self._dtype)

    def normalise(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 `[3, S, S]`, as Vignette's encoder takes it -> normalised, for `generate`."""
        how = self._checkpoint.normalisation
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))
        values = (torch.from_numpy(pixels).float() * how.rescale - mean) / std
        return values.to(self._device, self._dtype)

    @torch.inference_mode()
    def generate(self, images: list[torch.Tensor], beams: int = 1) -> list[list[int]]:
        """New token ids of each image; greedy with one beam."""
        start = torch.full((len(images), 1), self._checkpoint.tokens.bos, device=self._device)
        config: Any = self._config
        ids = self._model.generate(
            pixel_values=torch.stack(images),
            input_ids=start,
            attention_mask=torch.ones_like(start),
            generation_config=config,
            num_beams=beams,
        )
        return ids[:, 1:].tolist()

    @staticmethod
    def text(ids: list[int]) -> str:
        """Decode ids as the random weights' tokenizer does: a numbered word per token."""
        return " ".join(f"w{i}" for i in ids)
