"""ONNX against PyTorch: tokens equal to `generate`, and the difference of the logits."""

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
from export.reference import Answer, Case, OnnxGraphs, best_of_beams, caption, up_to_end

BEAMS = 4
_SEARCHED = 8  # one image in 8: PyTorch encodes it again for each beam and token
_LONGEST_PROMPT = 5  # tokens, without the start token


@dataclass(frozen=True, slots=True)
class Verification:
    """Extent and results of a verification; stored in the manifest."""

    images: int
    prompts: int  # images with a prompt
    beams: int  # images also searched with BEAMS beams
    new_tokens: int  # most per image
    distinct_captions: int
    max_logits_difference: float  # over all steps of all images
    max_logprobs_difference: float  # of the chosen tokens


def check_extent(checkpoint: Checkpoint, images: int, new_tokens: int) -> None:
    """Raise ExportError for numbers of images or tokens that `verify` can't compare."""
    room = checkpoint.sizes.text - _LONGEST_PROMPT
    if images < 1 or not 1 <= new_tokens <= room:
        raise ExportError(f"compare at least 1 image, and 1 to {room} tokens of each")


def verify(
    checkpoint: Checkpoint,
    folder: Path,
    images: int = 8,
    new_tokens: int = 20,
    pixels: list[np.ndarray] | None = None,
) -> Verification:
    """Compare `folder`'s fp32 graphs with the checkpoint on `images` images, a third prompted.

    pixels: uint8 encoder rows to use first, before generated pictures. Raises Mismatch naming the
    first token that differs, for logits that are not finite, and for random weights if half of the
    captions or fewer are distinct, which proves nothing.
    """
    cases = list(_cases(checkpoint, images, pixels or []))
    graphs = OnnxGraphs(folder / "encoder.onnx", folder / "decoder.onnx")
    sizes, tokens = checkpoint.sizes, checkpoint.tokens
    answers = list(caption(graphs, sizes, tokens, cases, new_tokens))
    distinct = len({tuple(answer.tokens) for answer in answers})
    if not checkpoint.trained and 2 * distinct <= images:
        raise Mismatch(f"{images} images have only {distinct} different captions: try another seed")
    differences: list[float] = []
    of_logprobs: list[float] = []
    for index, case in enumerate(tqdm(cases, desc="verifying", unit="image")):
        expected = _torch_answer(checkpoint, case, new_tokens)
        answer = answers[index]
        _compare_tokens(index, case, expected.tokens, answer.tokens)
        differences.append(float(np.abs(expected.logits - answer.logits).max()))
        of_logprobs.append(float(np.abs(expected.logprobs - answer.logprobs).max()))
    searched = cases[: -(-images // _SEARCHED)]
    for index, case in enumerate(tqdm(searched, desc="with beams", unit="image")):
        tokens_of = _torch_tokens(checkpoint, case, new_tokens, num_beams=BEAMS)
        found = best_of_beams(graphs, sizes, tokens.eos, case, new_tokens, BEAMS)
        _compare_tokens(index, case, up_to_end(tokens_of, tokens.eos), found)
    if not np.isfinite(differences).all():
        raise Mismatch("the graphs' logits are not finite. The engine was not written.")
    return Verification(
        images=len(cases),
        prompts=sum(len(case.prompt) > 1 for case in cases),
        beams=len(searched),
        new_tokens=new_tokens,
        distinct_captions=distinct,
        max_logits_difference=max(differences),
        max_logprobs_difference=max(of_logprobs),
    )


def _cases(checkpoint: Checkpoint, images: int, given: list[np.ndarray]) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    sizes, bos = checkpoint.sizes, checkpoint.tokens.bos
    for index, pixels in enumerate(islice(rows(rng, sizes, given), images)):
        length = rng.integers(1, _LONGEST_PROMPT + 1) if index % 3 == 2 else 0
        yield Case(pixels, [bos, *rng.integers(0, sizes.vocabulary, length).tolist()])


@torch.inference_mode()
def _torch_answer(checkpoint: Checkpoint, case: Case, new_tokens: int) -> Answer:
    """Tokens from `generate`, then their logits from one pass over the whole text."""
    tokens = torch.tensor(_torch_tokens(checkpoint, case, new_tokens))
    ids = torch.cat([torch.tensor(case.prompt), tokens])[None]
    text = checkpoint.model(
        input_ids=ids, pixel_values=_normalised(checkpoint, case), use_cache=False
    ).logits[0, -ids.shape[1] :]
    logits = text[len(case.prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return Answer(tokens.tolist(), logits.numpy(), logprobs.numpy())


def _torch_tokens(
    checkpoint: Checkpoint, case: Case, new_tokens: int, num_beams: int = 1
) -> list[int]:
    """Tokens from `generate`, without the prompt."""
    prompt = torch.tensor([case.prompt])
    ids = checkpoint.model.generate(
        pixel_values=_normalised(checkpoint, case),
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=num_beams,
        pad_token_id=checkpoint.tokens.pad,
    )
    return ids[0, len(case.prompt) :].tolist()


def _normalised(checkpoint: Checkpoint, case: Case) -> torch.Tensor:
    """The case's pixels, normalised as Hugging Face's processor would, with a batch axis."""
    how = checkpoint.normalisation
    pixels = torch.from_numpy(case.pixels)[None].float() * how.rescale
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))
    return (pixels - mean) / std


def _compare_tokens(index: int, case: Case, expected: list[int], found: list[int]) -> None:
    if expected == found:
        return
    same = 0
    for ours, theirs in zip(found, expected, strict=False):
        if ours != theirs:
            break
        same += 1
    raise Mismatch(
        f"image {index} (prompt of {len(case.prompt) - 1} tokens): ONNX and PyTorch differ from "
        f"token {same} on: {found[same:]} against {expected[same:]}. "
        "The engine was not written."
    )
