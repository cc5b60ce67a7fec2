"""Trains the demo model. Resumes from its last checkpoint when it is started again.

Four things reduce the number of scenes that training needs:

* one image serves three texts (its caption and two questions). Image tokens never attend to text in
  GIT, so the texts are packed behind one image prefix, each masked from the others;
* a linear head on the vision tower predicts the noun of every patch; it is dropped at the end;
* another predicts each patch's row and column, or the first would teach the tower to forget
  positions, on which "to the left of" depends;
* each batch has mosaics of nine nouns, which only these heads' losses use: telling so many nouns
  apart takes longest to learn, and a scene shows two of them at most.
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import GitForCausalLM, GitProcessor

from demo import grammar, model, sprites
from demo.nouns import NOUNS
from demo.render import Renderer
from runtime.errors import InvalidRequest

CHECKPOINT = sprites.CACHE / "checkpoint.pt"
_GRID = model.IMAGE_SIZE // model.PATCH_SIZE
_CAPTION, _QUESTION = 18, 16  # token positions of each text of an image
_SEGMENTS = (_CAPTION, _QUESTION, _QUESTION)
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class Settings:
    """Hyperparameters. `scenes` sets the length; the learning rate is 0 at its end."""

    scenes: int = 550_000
    batch: int = 32
    learning_rate: float = 8e-4
    pairs: float = 0.7  # share of scenes with two nouns: relations take longest to learn
    mosaics: int = 4  # per batch, beside its scenes
    warmup_steps: int = 500
    initial: Path | None = None  # checkpoint folder to start from instead of fresh weights
    patch_loss: float = 0.3  # weight of the loss on each patch's noun
    place_loss: float = 0.3  # weight of the loss on each patch's row and column
    save_every: int = 500  # steps
    seed: int = 1
    device: str = "cpu"

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.scenes // self.batch


class Batches(IterableDataset):
    """Endless training batches; a resumed run's `start` step seeds other ones."""

    def __init__(self, processor: GitProcessor, settings: Settings, start: int) -> None:
        self._tokenizer = processor.tokenizer
        self._settings, self._start = settings, start

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield `tokens`, `labels` for scenes; `pixels`, `patches` for these and mosaics."""
        worker = get_worker_info()
        rng = random.Random(f"{self._settings.seed}/{self._start}/{worker.id if worker else 0}")
        renderer = Renderer(sprites.TRAINED, model.IMAGE_SIZE)
        while True:
            scenes = [
                grammar.sample(rng, held_out=False, pairs=self._settings.pairs)
                for _ in range(self._settings.batch)
            ]
            pictures = [renderer.draw(scene, rng) for scene in scenes]
            pictures += [renderer.mosaic(rng) for _ in range(self._settings.mosaics)]
            tokens, labels = zip(*(self._texts(scene, rng) for scene in scenes), strict=True)
            yield {
                "pixels": np.stack([np.asarray(p.image).transpose(2, 0, 1) for p in pictures]),
                "tokens": np.stack(tokens),
                "labels": np.stack(labels),
                "patches": np.stack([_patch_labels(p.cover) for p in pictures]),
            }

    def _texts(self, scene: grammar.Scene, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        questions = rng.sample(scene.questions, 2)
        texts = [("", scene.caption), *questions]
        rows = [self._row(*text, width) for text, width in zip(texts, _SEGMENTS, strict=True)]
        tokens, labels = zip(*rows, strict=True)
        return np.concatenate(tokens), np.concatenate(labels)

    def _row(self, prompt: str, answer: str, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and the label at each position; prompts and padding have none."""
        asked = self._tokenizer.encode(prompt, add_special_tokens=False)
        said = self._tokenizer.encode(answer, add_special_tokens=False)
        ids = [self._tokenizer.cls_token_id, *asked, *said, self._tokenizer.sep_token_id]
        tokens = np.zeros(width, np.int64)
        labels = np.full(width, _IGNORED, np.int64)
        tokens[: len(ids)] = ids
        labels[len(asked) : len(ids) - 1] = ids[1 + len(asked) :]
        return tokens, labels


def _patch_labels(cover: np.ndarray) -> np.ndarray:
    """`cover` [S, S] -> int64 [patches]: the noun if a quarter of the patch is covered, or 0."""
    cells = cover[2::4, 2::4].reshape(_GRID, 4, _GRID, 4).transpose(0, 2, 1, 3).reshape(-1, 16)
    covered = (cells > 0).sum(axis=1) >= 4
    return np.where(covered, cells.max(axis=1), 0).astype(np.int64)


class PackedGit(nn.Module):
    """GIT over one image prefix and several packed texts, with the training losses."""

    mask: torch.Tensor
    positions: torch.Tensor
    image_mean: torch.Tensor
    image_std: torch.Tensor

    def __init__(self, git: GitForCausalLM) -> None:
        super().__init__()
        self.git = git
        self.patch_head = nn.Linear(git.config.vision_config.hidden_size, 1 + len(NOUNS))
        self.place_head = nn.Linear(git.config.vision_config.hidden_size, 2 * _GRID)
        mask, positions = _layout(1 + _GRID**2)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("positions", positions, persistent=False)
        statistics = model.build_processor().image_processor
        for name in ("image_mean", "image_std"):
            value = torch.tensor(getattr(statistics, name)).view(1, 3, 1, 1) * 255
            self.register_buffer(name, value, persistent=False)

    def forward(
        self,
        pixels: torch.Tensor,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        patches: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """uint8 [B + M, 3, S, S], int64 [B, T] twice, [B + M, patches] -> text, patch, place."""
        git = self.git.git
        seen = git.image_encoder((pixels.float() - self.image_mean) / self.image_std)
        seen = seen.last_hidden_state
        scenes = seen[: len(tokens)]
        text = git.embeddings(input_ids=tokens, position_ids=self.positions)
        hidden = torch.cat([git.visual_projection(scenes), text], dim=1)
        hidden = git.encoder(hidden, attention_mask=self.mask, use_cache=False).last_hidden_state
        logits = self.git.output(hidden[:, seen.shape[1] :])
        named = self.patch_head(seen[:, 1:])
        return (
            F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=_IGNORED),
            F.cross_entropy(named.float().flatten(0, 1), patches.flatten()),
            self._place_loss(seen[:, 1:]),
        )

    def _place_loss(self, seen: torch.Tensor) -> torch.Tensor:
        """Loss of each patch's row and column, from its features [images, patches, width]."""
        guesses = self.place_head(seen).float().unflatten(-1, (2, _GRID))
        index = torch.arange(_GRID**2, device=seen.device)
        places = torch.stack([index // _GRID, index % _GRID], dim=-1).expand(guesses.shape[:3])
        return F.cross_entropy(guesses.flatten(0, 2), places.flatten())


def _layout(prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Additive mask [1, 1, T, T] and text positions [1, T - prefix] of the packed sequence."""
    total = prefix + sum(_SEGMENTS)
    allowed = torch.zeros(total, total, dtype=torch.bool)
    allowed[:, :prefix] = True
    start = prefix
    for width in _SEGMENTS:
        end = start + width
        allowed[start:end, start:end] = torch.ones(width, width).tril().bool()
        start = end
    mask = torch.zeros(1, 1, total, total).masked_fill(~allowed, float("-inf"))
    return mask, torch.cat([torch.arange(width) for width in _SEGMENTS])[None]


def train(settings: Settings, output: Path = model.FOLDER) -> None:
    """Train to the end of the schedule and write the checkpoint folder `output` (fp16 weights)."""
    torch.manual_seed(settings.seed)
    processor = model.build_processor()
    git = (
        GitForCausalLM.from_pretrained(settings.initial, dtype=torch.float32)
        if settings.initial
        else model.build_model(len(processor.tokenizer))
    )
    packed = PackedGit(git).to(settings.device)
    optimizer = torch.optim.AdamW(
        packed.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    step = _resume(settings, packed, optimizer)
    loader = DataLoader(Batches(processor, settings, step), batch_size=None, num_workers=1)
    losses = torch.compile(packed)
    with tqdm(total=settings.steps, initial=step, unit="step") as progress:
        for batch in loader:
            if step >= settings.steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            inputs = {name: value.to(settings.device) for name, value in batch.items()}
            with torch.autocast(settings.device, torch.bfloat16):
                text, patch, place = losses(**inputs)
            (text + settings.patch_loss * patch + settings.place_loss * place).backward()
            nn.utils.clip_grad_norm_(packed.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            progress.update()
            if step % 50 == 0:
                progress.write(
                    f"step {step} text {text.item():.4f} patch {patch.item():.4f} "
                    f"place {place.item():.4f}"
                )
            if step % settings.save_every == 0:
                _save(step, settings, packed, optimizer)
    packed.git.half().save_pretrained(output)
    processor.save_pretrained(output)
    CHECKPOINT.unlink(missing_ok=True)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    return settings.learning_rate * (1 + math.cos(math.pi * done)) / 2


def _save(step: int, settings: Settings, *parts: nn.Module | torch.optim.Optimizer) -> None:
    state = {
        "step": step,
        "settings": _work(settings),
        "parts": [part.state_dict() for part in parts],
    }
    partial = CHECKPOINT.with_suffix(f".{time.time_ns()}")
    torch.save(state, partial)
    partial.rename(CHECKPOINT)


def _work(settings: Settings) -> str:
    """The settings that a resumed run must share: all but the device."""
    return repr(replace(settings, device="cpu"))


def _resume(settings: Settings, *parts: nn.Module | torch.optim.Optimizer) -> int:
    """Load the last checkpoint into `parts`; returns its step, 0 without one.

    Raises InvalidRequest if it is of a training with other settings.
    """
    if not CHECKPOINT.exists():
        return 0
    state = torch.load(CHECKPOINT, weights_only=True)
    if state["settings"] != _work(settings):
        raise InvalidRequest(
            f"{CHECKPOINT} is of a training with other settings, {state['settings']}: go on with "
            "those, or delete it to begin anew"
        )
    for part, saved in zip(parts, state["parts"], strict=True):
        part.load_state_dict(saved)
    print(f"resuming at step {state['step']}", flush=True)
    return state["step"]
