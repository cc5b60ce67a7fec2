"""ONNX against PyTorch: same tokens as `generate`, and how far the logits are apart.

The loop here is as plain as can be and shares nothing with runtime/, so that what it proves is the
graphs alone. Rows of one batch start at different steps and with prompts of different lengths, so
they are of unequal age throughout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from tqdm import tqdm

from export.checkpoint import Checkpoint
from export.errors import ExportError, Mismatch
from export.pictures import rows

_ROWS = 8  # of one ONNX batch
_STAGGER = 4  # rows start at this many different steps
_LONGEST_PROMPT = 5  # tokens, without the start token


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared and found; goes into the manifest as it stands."""

    images: int
    prompts: int  # how many of them had a prompt
    new_tokens: int  # most for each image
    distinct_captions: int
    tokens_equal: bool
    max_logits_difference: float  # over all steps of all images


@dataclass(frozen=True, slots=True)
class _Case:
    pixels: np.ndarray  # uint8, one encoder row
    prompt: list[int]  # start token first


@dataclass(frozen=True, slots=True)
class _Answer:
    tokens: list[int]
    logits: np.ndarray  # float32 [tokens, V]: what each token was chosen from


def verify(
    checkpoint: Checkpoint,
    folder: Path,
    images: int = 8,
    new_tokens: int = 20,
    pixels: list[np.ndarray] | None = None,
) -> Verification:
    """Compare `folder`'s fp32 graphs with the checkpoint on `images` images, a third prompted.

    pixels: uint8 encoder rows to take first; generated pictures fill up. Raises Mismatch naming the
    first token that differs, and for random weights when most images say the same: such a
    comparison proves nothing.
    """
    room = checkpoint.sizes.text - _LONGEST_PROMPT
    if images < 1 or not 1 <= new_tokens <= room:
        raise ExportError(f"compare at least 1 image, and 1 to {room} tokens of each")
    cases = list(_cases(checkpoint, images, pixels or []))
    answers = _onnx_answers(checkpoint, folder, cases, new_tokens)
    distinct = len({tuple(answer.tokens) for answer in answers})
    if not checkpoint.trained and 2 * distinct <= images:
        raise Mismatch(f"{images} images have only {distinct} different captions: try another seed")
    differences: list[float] = []
    for index, case in enumerate(tqdm(cases, desc="verifying", unit="image")):
        expected = _torch_answer(checkpoint, case, new_tokens)
        answer = answers[index]
        _compare_tokens(index, case, expected, answer)
        differences.append(float(np.abs(expected.logits - answer.logits).max()))
    if not np.isfinite(differences).all():
        raise Mismatch("the graphs' logits are not finite. The engine was not written.")
    return Verification(
        images=len(cases),
        prompts=sum(len(case.prompt) > 1 for case in cases),
        new_tokens=new_tokens,
        distinct_captions=distinct,
        tokens_equal=True,
        max_logits_difference=max(differences),
    )


def _cases(checkpoint: Checkpoint, images: int, given: list[np.ndarray]) -> Iterator[_Case]:
    rng = np.random.default_rng(0)
    sizes, bos = checkpoint.sizes, checkpoint.tokens.bos
    for index, pixels in enumerate(islice(rows(rng, sizes, given), images)):
        length = rng.integers(1, _LONGEST_PROMPT + 1) if index % 3 == 2 else 0
        yield _Case(pixels, [bos, *rng.integers(0, sizes.vocabulary, length).tolist()])


@torch.inference_mode()
def _torch_answer(checkpoint: Checkpoint, case: _Case, new_tokens: int) -> _Answer:
    """`generate` for the tokens, then one pass over the whole text for the logits behind them."""
    model, how = checkpoint.model, checkpoint.normalisation
    pixels = torch.from_numpy(case.pixels)[None].float() * how.rescale
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))
    pixels = (pixels - mean) / std
    prompt = torch.tensor([case.prompt])
    ids = model.generate(
        pixel_values=pixels,
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=checkpoint.tokens.pad,
    )
    text = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[0, -ids.shape[1] :]
    start = len(case.prompt)
    return _Answer(ids[0, start:].tolist(), text[start - 1 : -1].numpy())


def _onnx_answers(
    checkpoint: Checkpoint, folder: Path, cases: list[_Case], new_tokens: int
) -> list[_Answer]:
    encoder, decoder = (
        ort.InferenceSession(folder / f"{graph}.onnx", providers=["CPUExecutionProvider"])
        for graph in ("encoder", "decoder")
    )
    answers: list[_Answer] = []
    for start in range(0, len(cases), _ROWS):
        batch = cases[start : start + _ROWS]
        answers += _onnx_batch(checkpoint, encoder, decoder, batch, new_tokens)
    return answers


def _onnx_batch(
    checkpoint: Checkpoint,
    encoder: ort.InferenceSession,
    decoder: ort.InferenceSession,
    batch: list[_Case],
    new_tokens: int,
) -> list[_Answer]:
    """Greedy decoding of all rows at once; rows that are over go on, their surplus is cut off."""
    prefix, eos = checkpoint.sizes.prefix, checkpoint.tokens.eos
    starts = np.arange(len(batch)) % _STAGGER
    steps = max(len(case.prompt) for case in batch) + new_tokens - 1 + int(starts.max())
    caches = _image_caches(encoder, batch, capacity=prefix + steps)
    texts = [list(case.prompt) for case in batch]
    chosen_from: list[list[np.ndarray]] = [[] for _ in batch]
    names = [output.name for output in decoder.get_outputs()]
    for step in range(steps):
        # A row that has not started is fed its first token again and again, in the same place.
        ages = np.maximum(step - starts, 0)
        lengths = (prefix + ages).astype(np.int32)
        tokens = [[text[age]] for text, age in zip(texts, ages, strict=True)]
        feeds = {
            "token_ids": np.array(tokens, np.int64),
            "lengths": lengths,
            "total_length": lengths.max(keepdims=True) + 1,
            **caches,
        }
        outputs = dict(zip(names, decoder.run(names, feeds), strict=True))
        caches = {name: outputs[name.replace("past_key_values", "present")] for name in caches}
        for row, text in enumerate(texts):
            if step >= starts[row] and ages[row] + 1 == len(text):
                text.append(int(outputs["next_ids"][row]))
                chosen_from[row].append(outputs["logits"][row])
    return [
        _cut(text[len(case.prompt) :], logits, eos, new_tokens)
        for case, text, logits in zip(batch, texts, chosen_from, strict=True)
    ]


def _image_caches(
    encoder: ort.InferenceSession, batch: list[_Case], capacity: int
) -> dict[str, np.ndarray]:
    names = [output.name for output in encoder.get_outputs()]
    outputs = encoder.run(names, {"pixels": np.stack([case.pixels for case in batch])})
    caches: dict[str, np.ndarray] = {}
    for name, image in zip(names, outputs, strict=True):
        rows, heads, prefix, head = image.shape
        # What lies beyond a row's length is undefined: fill it with what would show if it counted.
        cache = np.full((rows, heads, capacity, head), 1e4, image.dtype)
        cache[:, :, :prefix] = image
        caches[name.replace("image", "past_key_values")] = cache
    return caches


def _cut(tokens: list[int], logits: list[np.ndarray], eos: int, most: int) -> _Answer:
    tokens = tokens[:most]
    if eos in tokens:
        tokens = tokens[: tokens.index(eos) + 1]
    return _Answer(tokens, np.stack(logits[: len(tokens)]))


def _compare_tokens(index: int, case: _Case, expected: _Answer, answer: _Answer) -> None:
    if expected.tokens == answer.tokens:
        return
    same = 0
    for ours, theirs in zip(answer.tokens, expected.tokens, strict=False):
        if ours != theirs:
            break
        same += 1
    raise Mismatch(
        f"image {index} (prompt of {len(case.prompt) - 1} tokens): ONNX and PyTorch differ from "
        f"token {same} on: {answer.tokens[same:]} against {expected.tokens[same:]}. "
        "The engine was not written."
    )
