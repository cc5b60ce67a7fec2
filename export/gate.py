"""Which combinations of variants say what PyTorch says, often enough to be served.

They are judged as they will run, encoder with decoder and cache, because errors add up.
"""

from pathlib import Path

from tqdm import tqdm

from export.checkpoint import Checkpoint
from export.reference import Case, OnnxGraphs, TorchGraphs, caption
from export.variants import file_name
from runtime.model.manifest import EXACT, Combination, Variant

LEAST_AGREEMENT = 0.99  # 8-bit decoder weights and K/V cache, and fp16 throughout
_TRIED = 2  # cases of random weights
LEAST_WITH_INT8_ENCODER = 0.97  # 8-bit activations in the image encoder


def exact(images: int) -> Combination:
    """The fp32 graphs, which `verify` has proven."""
    encoder, decoder, cache = EXACT.split("/")
    return Combination(encoder, decoder, cache, images, 1.0)


def judge(
    checkpoint: Checkpoint,
    folder: Path,
    variants: list[Variant],
    cases: list[Case],
    tokens: int,
    cuda: bool = False,
) -> list[Combination]:
    """Every combination but the exact one that passes; all figures are told on the way.

    cases: what to caption, with at most `tokens` new tokens each. Random weights pass unjudged,
    after a look at whether they run: small changes sway what they say, and nobody reads it.
    cuda: judge fp16 by the arithmetic of the GPU that is here; the CPU provider computes most of
    it in fp32.
    """
    cases = cases if checkpoint.trained else cases[:_TRIED]
    sizes, special = checkpoint.sizes, checkpoint.tokens
    expected = [
        answer.tokens
        for answer in tqdm(
            caption(TorchGraphs(checkpoint), sizes, special, cases, tokens),
            desc="PyTorch", total=len(cases), unit="image",
        )
    ]  # fmt: skip
    passed = []
    for candidate in _combinations(variants):
        files = (
            folder / file_name(graph, precision, candidate.cache)
            for graph, precision in (("encoder", candidate.encoder), ("decoder", candidate.decoder))
        )
        on_gpu = cuda and candidate.cache == "float16"
        answers = caption(OnnxGraphs(*files, cuda=on_gpu), sizes, special, cases, tokens)
        progress = tqdm(answers, desc=candidate.name, total=len(cases), unit="image", leave=False)
        equal = sum(a.tokens == e for a, e in zip(progress, expected, strict=True))
        agreement = equal / len(cases)
        least = least_agreement(candidate.encoder)
        kept = agreement >= least or not checkpoint.trained
        print(
            f"{candidate.name}: {equal} of {len(cases)} captions as PyTorch's ({agreement:.1%}"
            + (", on the GPU), " if on_gpu else "), ")
            + ("kept" if kept else f"left out, for it takes {least:.0%}"),
            flush=True,
        )
        if kept:
            proven = agreement if checkpoint.trained else None
            passed.append(
                Combination(
                    candidate.encoder, candidate.decoder, candidate.cache, len(cases), proven
                )
            )
    return passed


def least_agreement(encoder: str) -> float:
    """The share of captions that a combination with this encoder has to get as PyTorch does."""
    return LEAST_WITH_INT8_ENCODER if encoder.startswith("int8") else LEAST_AGREEMENT


def _combinations(variants: list[Variant]) -> list[Combination]:
    return [
        Combination(encoder.precision, decoder.precision, encoder.cache, 0, None)
        for encoder in variants
        for decoder in variants
        if (encoder.graph, decoder.graph) == ("encoder", "decoder")
        and encoder.cache == decoder.cache
        and (encoder.precision, decoder.precision, encoder.cache) != tuple(EXACT.split("/"))
    ]
