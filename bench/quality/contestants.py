"""What captions the pictures: an engine in a precision, with or without beams, or PyTorch."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from bench.quality.data import Picture
from runtime.engine import Engine
from runtime.model.images import pixels_of
from runtime.planning.config import AUTO, EngineConfig

_AT_ONCE = 64  # pictures decoded, then captioned, at a time


class Contestant(Protocol):
    """Captions pictures."""

    @property
    def name(self) -> str:
        """The label in tables."""

    def captions(self, pictures: list[Picture]) -> list[str]:
        """A caption for each picture, in order."""


@dataclass(frozen=True, slots=True)
class OnEngine:
    """An engine folder in one precision."""

    folder: Path
    precision: str
    beams: int
    provider: str

    @property
    def name(self) -> str:
        """The label in tables."""
        chosen = "this machine's choice" if self.precision == AUTO else self.precision
        return chosen + (f", {self.beams} beams" if self.beams > 1 else "")

    def captions(self, pictures: list[Picture]) -> list[str]:
        """Raises what opening the engine raises, and InvalidImage."""
        config = EngineConfig(provider=self.provider, precision=self.precision)
        engine = Engine.open(self.folder, config)
        manifest = engine.manifest
        found: list[str] = []
        with ThreadPoolExecutor() as pool, tqdm(total=len(pictures), desc=self.name) as progress:
            for some in _batches(pictures):
                pixels = list(pool.map(lambda each: pixels_of(each.file, manifest, 1), some))
                prompts = [each.prompt for each in some]
                said = engine.generate(pixels, prompts, num_beams=self.beams)
                found += [caption.text for caption in said]
                progress.update(len(some))
        return found


@dataclass(frozen=True, slots=True)
class OnTorch:
    """Hugging Face's `generate` in fp32: a checkpoint's folder, or its name on the hub."""

    checkpoint: str
    beams: int

    @property
    def name(self) -> str:
        """The label in tables."""
        return "PyTorch" + (f", {self.beams} beams" if self.beams > 1 else "")

    def captions(self, pictures: list[Picture]) -> list[str]:
        """Raises ExportError if `checkpoint` is not a checkpoint."""
        import torch
        from transformers import AutoProcessor

        from export.checkpoint import load
        from runtime.limits import DEFAULT_MAX_NEW_TOKENS
        from runtime.model.preprocess import decode

        model = load(self.checkpoint).model
        processor = AutoProcessor.from_pretrained(self.checkpoint)
        tokenizer, found = processor.tokenizer, []
        for picture in tqdm(pictures, desc=self.name):
            pixels = processor(images=decode(picture.file.read_bytes()), return_tensors="pt")
            prompt = [tokenizer.cls_token_id]
            if picture.prompt:
                prompt += tokenizer(picture.prompt, add_special_tokens=False).input_ids
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                said = model.generate(
                    pixel_values=pixels.pixel_values, input_ids=ids,
                    attention_mask=torch.ones_like(ids), max_new_tokens=DEFAULT_MAX_NEW_TOKENS,
                    do_sample=False, num_beams=self.beams,
                )  # fmt: skip
            text = tokenizer.decode(said[0, len(prompt) :], skip_special_tokens=True)
            found.append(text.strip())
        return found


def _batches(pictures: list[Picture]) -> Iterator[list[Picture]]:
    left = iter(pictures)
    while some := list(islice(left, _AT_ONCE)):
        yield some
