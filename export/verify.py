"""ONNX against PyTorch: same tokens as `generate`, and how far the logits are apart."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from export.checkpoint import Checkpoint
from export.errors import ExportError, Mismatch
from export.pictures import rows
from export.reference import Answer, Case, OnnxGraphs, caption

_LONGEST_PROMPT = 5  # tokens, without the start token


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared and found; goes into the manifest as it stands."""

    images: int
    prompts: int  # how many of them had a prompt
    new_tokens: int  # most for each image
    distinct_captions: int
    max_logits_difference: float  # over all steps of all images


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
    graphs = OnnxGraphs(folder / "encoder.onnx", folder / "decoder.onnx")
    sizes, tokens = checkpoint.sizes, checkpoint.tokens
    answers = list(caption(graphs, sizes, tokens, cases, new_tokens))
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
        max_logits_difference=max(differences),
    )


def _cases(checkpoint: Checkpoint, images: int, given: list[np.ndarray]) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    sizes, bos = checkpoint.sizes, checkpoint.tokens.bos
    for index, pixels in enumerate(islice(rows(rng, sizes, given), images)):
        length = rng.integers(1, _LONGEST_PROMPT + 1) if index % 3 == 2 else 0
        yield Case(pixels, [bos, *rng.integers(0, sizes.vocabulary, length).tolist()])


@torch.inference_mode()
def _torch_answer(checkpoint: Checkpoint, case: Case, new_tokens: int) -> Answer:
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
    return Answer(ids[0, start:].tolist(), text[start - 1 : -1].numpy())


def _compare_tokens(index: int, case: Case, expected: Answer, answer: Answer) -> None:
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
