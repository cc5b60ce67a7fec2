"""Minimal greedy decoding, over ONNX graphs or the PyTorch modules they were exported from.

It shares only the choice among beams and the sessions' options with runtime/, so that it tests the
graphs alone. Rows of a batch start at different steps and with prompts of different lengths, so
their lengths differ throughout.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
import torch

from export.checkpoint import Checkpoint
from export.errors import ExportError
from export.modeling import ImagePrefix, TextDecoder
from runtime.decoding.beams import Beams
from runtime.decoding.candidates import RowCandidates
from runtime.model.manifest import Sizes, SpecialTokens
from runtime.providers.session import Placement, session_options
from runtime.request import SamplingParams

Arrays = dict[str, np.ndarray]

_ROWS = 8  # per batch


@dataclass(frozen=True, slots=True)
class Case:
    """An input: uint8 `pixels` of one encoder row, `prompt` ids including the start token."""

    pixels: np.ndarray
    prompt: list[int]


@dataclass(frozen=True, slots=True)
class Answer:
    """Generated `tokens`, including the end token; the float32 `logits` `[tokens, V]` they were
    chosen from, and their `logprobs` `[tokens]`.
    """

    tokens: list[int]
    logits: np.ndarray
    logprobs: np.ndarray


class Graphs(Protocol):
    """Both graphs, with inputs and outputs by name (ARCHITECTURE.md, "Graphs")."""

    def encode(self, pixels: np.ndarray) -> Arrays:
        """`pixels` of all rows -> `image.{i}.key/value`, `[B, H, P, D]` or `[B, P, H, D]`."""

    def decode(self, feeds: Arrays) -> Arrays:
        """All decoder inputs -> all decoder outputs."""


class OnnxGraphs:
    """Two graph files on ONNX Runtime's CPU or CUDA provider."""

    def __init__(self, encoder: Path, decoder: Path, *, cuda: bool = False) -> None:
        """Raises ExportError if CUDA can't be used."""
        options = session_options(Placement("cuda" if cuda else "cpu"))
        provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
        self._encoder, self._decoder = (
            ort.InferenceSession(path, options, providers=[provider], enable_fallback=False)
            for path in (encoder, decoder)
        )
        if provider not in self._encoder.get_providers():  # it goes on with the CPU's
            raise ExportError("ONNX Runtime can't use the GPU that is here: see its messages above")

    @property
    def for_bursts(self) -> bool:
        """Whether the decoder outputs only the next token (`export.graphs.for_bursts`)."""
        return any(output.name == "next_ids" for output in self._decoder.get_outputs())

    def encode(self, pixels: np.ndarray) -> Arrays:
        """See Graphs."""
        return _run(self._encoder, {"pixels": pixels})

    def decode(self, feeds: Arrays) -> Arrays:
        """See Graphs; a burst decoder's next tokens are returned as candidates."""
        inputs = {value.name for value in self._decoder.get_inputs()}
        made = _run(self._decoder, {name: feeds[name] for name in feeds.keys() & inputs})
        if self.for_bursts:
            made["candidate_ids"] = made["next_ids"][:, None]
            made["candidate_logprobs"] = made["next_logprobs"]
        return made


class TorchGraphs:
    """The checkpoint in fp32 PyTorch, encoding each image only once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        how, self._layers = checkpoint.normalisation, checkpoint.sizes.layers
        self.encoder = ImagePrefix(checkpoint.model, how.rescale, how.mean, how.std)
        self.decoder = TextDecoder(checkpoint.model, checkpoint.sizes.prefix)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> Arrays:
        """See Graphs."""
        prefix = self.encoder(torch.from_numpy(pixels))
        return {name: value.numpy() for name, value in prefix.items()}

    @torch.inference_mode()
    def decode(self, feeds: Arrays) -> Arrays:
        """See Graphs."""
        given = {name: torch.from_numpy(value) for name, value in feeds.items()}
        past = [
            tuple(given.pop(f"past_key_values.{layer}.{kind}") for kind in ("key", "value"))
            for layer in range(self._layers)
        ]
        found = self.decoder(**given, past_key_values=past)
        for layer, pair in enumerate(found.pop("past_key_values")):
            for kind, cache in zip(("key", "value"), pair, strict=True):
                found[f"present.{layer}.{kind}"] = cache
        return {name: value.numpy() for name, value in found.items()}


def _run(session: ort.InferenceSession, feeds: Arrays) -> Arrays:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def caption(
    graphs: Graphs,
    sizes: Sizes,
    tokens: SpecialTokens,
    cases: list[Case],
    new_tokens: int,
    seen: Callable[[Arrays, list[int]], None] | None = None,
    stagger: int = 4,
) -> Iterator[Answer]:
    """Caption all cases greedily, with at most `new_tokens` each.

    seen: called after each batch with its caches and the number of valid positions per row.
    stagger: number of different steps at which rows of a batch start.
    """
    for start in range(0, len(cases), _ROWS):
        batch = cases[start : start + _ROWS]
        answers, caches = _batch(graphs, sizes, batch, new_tokens, tokens.eos, stagger)
        if seen is not None:
            fed = [len(c.prompt) + len(a.tokens) - 1 for c, a in zip(batch, answers, strict=True)]
            seen(caches, [sizes.prefix + count for count in fed])
        yield from answers


def _batch(
    graphs: Graphs, sizes: Sizes, batch: list[Case], new_tokens: int, eos: int, stagger: int
) -> tuple[list[Answer], Arrays]:
    """Decode all rows together; ended rows go on, and their surplus tokens are cut off."""
    starts = np.arange(len(batch)) % stagger
    steps = max(len(case.prompt) for case in batch) + new_tokens - 1 + int(starts.max())
    images = graphs.encode(np.stack([case.pixels for case in batch]))
    caches = _caches(images, sizes, capacity=sizes.prefix + steps)
    texts = [list(case.prompt) for case in batch]
    chosen_from: list[list[tuple[np.ndarray, np.float32]]] = [[] for _ in batch]
    for step in range(steps):
        # A row that has not started is fed its first token repeatedly, at the same position.
        # One that has ended stays at the last position there is.
        ages = np.clip(step - starts, 0, sizes.text - 1)
        lengths = (sizes.prefix + ages).astype(np.int32)
        fed = [[text[age]] for text, age in zip(texts, ages, strict=True)]
        outputs, caches = _step(graphs, fed, lengths, 1, caches)
        for row, text in enumerate(texts):
            if step >= starts[row] and ages[row] + 1 == len(text):
                text.append(int(outputs["candidate_ids"][row, 0]))
                logprob = outputs["candidate_logprobs"][row, 0]
                chosen_from[row].append((outputs["logits"][row], logprob))
    answers = [
        _answer(text[len(case.prompt) :], logits, eos, new_tokens)
        for case, text, logits in zip(batch, texts, chosen_from, strict=True)
    ]
    return answers, caches


def best_of_beams(
    graphs: Graphs, sizes: Sizes, eos: int, case: Case, new_tokens: int, beams: int
) -> list[int]:
    """Best tokens by the runtime's beam search; the caches are reordered here."""
    decoding = Beams(case.prompt, SamplingParams(new_tokens, num_beams=beams), eos)
    images = graphs.encode(case.pixels[None])
    caches = _caches(images, sizes, capacity=sizes.prefix + len(case.prompt) + new_tokens)
    caches = {name: np.repeat(cache, beams, axis=0) for name, cache in caches.items()}
    fed = 0
    while decoding.finish_reason is None:
        forced = case.prompt[fed : fed + 1] * beams
        tokens = [[token] for token in forced or decoding.tokens]
        lengths = np.full(beams, sizes.prefix + fed, np.int32)
        outputs, caches = _step(graphs, tokens, lengths, decoding.candidates, caches)
        fed += 1
        if fed < len(case.prompt):
            continue
        likeliest = (outputs[f"candidate_{part}"].tolist() for part in ("ids", "logprobs"))
        rows = [RowCandidates(ids, logprobs, 0.0) for ids, logprobs in zip(*likeliest, strict=True)]
        parents = list(range(beams))
        for source, target in decoding.advance(rows):
            parents[target] = source
        caches = {name: cache[parents] for name, cache in caches.items()}
    return list(decoding.completions()[0].token_ids)


def _step(
    graphs: Graphs, tokens: list[list[int]], lengths: np.ndarray, candidates: int, caches: Arrays
) -> tuple[Arrays, Arrays]:
    """The outputs of a decode step and the new caches. tokens: of shape (rows, 1)."""
    outputs = graphs.decode(
        {
            "token_ids": np.array(tokens, np.int64),
            "lengths": lengths,
            "total_length": lengths.max(keepdims=True) + 1,
            "candidates": np.array([candidates], np.int64),
            **caches,
        }
    )
    return outputs, {name: outputs[name.replace("past_key_values", "present")] for name in caches}


def _caches(images: Arrays, sizes: Sizes, capacity: int) -> Arrays:
    caches: Arrays = {}
    for name, given in images.items():
        image = given if given.shape[1] == sizes.heads else given.swapaxes(1, 2)
        rows, heads, prefix, head = image.shape
        # Positions beyond a row's length are undefined: the filler would show if it were used.
        filler = 127 if image.dtype == np.int8 else 1e4
        cache = np.full((rows, heads, capacity, head), filler, image.dtype)
        cache[:, :, :prefix] = image
        caches[name.replace("image", "past_key_values")] = cache
    return caches


def up_to_end(tokens: list[int], eos: int) -> list[int]:
    """Tokens up to the end token, without what follows it."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def _answer(
    tokens: list[int], chosen_from: list[tuple[np.ndarray, np.float32]], eos: int, most: int
) -> Answer:
    tokens = up_to_end(tokens[:most], eos)
    logits, logprobs = zip(*chosen_from[: len(tokens)], strict=True)
    return Answer(tokens, np.stack(logits), np.array(logprobs))
