"""Which combinations of variants give PyTorch's captions often enough to be served.

Encoder, decoder and cache are judged together, as they will run, because errors add up.
"""

from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from export.checkpoint import Checkpoint
from export.reference import Case, OnnxGraphs, TorchGraphs, best_of_beams, caption
from export.variants import files_of
from export.verify import BEAMS
from runtime.model.manifest import EXACT, Combination, Variant

LEAST_AGREEMENT = 0.99  # for 8-bit decoder weights and K/V cache, and for fp16 throughout
_TRIED = 2  # cases to run with random weights
_SEARCHED = 40  # cases also captioned with beams
_PROMPT = 2  # tokens of each prompt: the beginning of the next picture's caption
LEAST_WITH_INT8_ENCODER = 0.97  # for 8-bit activations in the image encoder


def exact(images: int) -> Combination:
    """The combination of the fp32 graphs, proven by `verify`."""
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
    """All combinations that pass, without the exact one; prints each result.

    cases: captioned with at most `tokens` new tokens each, as given and again with a prompt.
    Random weights always pass if they run: small changes alter their captions, which mean nothing.
    cuda: judge fp16 on this machine's GPU; the CPU provider computes most of it in fp32.
    """
    cases = cases if checkpoint.trained else cases[:_TRIED]
    sizes, special = checkpoint.sizes, checkpoint.tokens
    expected = _torch_captions(checkpoint, cases, tokens)
    prompted = [
        Case(case.pixels, [*case.prompt, *beginning[:_PROMPT]])
        for case, beginning in zip(cases, [*expected[1:], *expected[:1]], strict=True)
    ]
    expected += _torch_captions(checkpoint, prompted, tokens)
    cases = [*cases, *prompted]
    by_torch = TorchGraphs(checkpoint)
    with_beams = [
        best_of_beams(by_torch, sizes, special.eos, case, tokens, BEAMS)
        for case in cases[: _SEARCHED if checkpoint.trained else 0]
    ]
    passed = []
    for candidate in _combinations(variants):
        on_gpu = cuda and candidate.cache == "float16"
        graphs = OnnxGraphs(*files_of(candidate, folder), cuda=on_gpu)
        answers = caption(graphs, sizes, special, cases, tokens)
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
            searched = _beam_agreement(checkpoint, graphs, cases, tokens, with_beams)
            proven = agreement if checkpoint.trained else None
            passed.append(replace(candidate, images=len(cases), agreement=proven, beams=searched))
    return passed


def _beam_agreement(
    checkpoint: Checkpoint,
    graphs: OnnxGraphs,
    cases: list[Case],
    tokens: int,
    expected: list[list[int]],
) -> float | None:
    """Share of beam search captions equal to PyTorch's; printed, but no reason to reject.

    None for random weights, and for burst decoders, whose candidates come from another graph.
    """
    if not expected or graphs.for_bursts:
        return None
    sizes, eos = checkpoint.sizes, checkpoint.tokens.eos
    found = [
        best_of_beams(graphs, sizes, eos, case, tokens, BEAMS) for case in cases[: len(expected)]
    ]
    share = sum(f == e for f, e in zip(found, expected, strict=True)) / len(expected)
    print(f"  with {BEAMS} beams {share:.1%} of {len(expected)}", flush=True)
    return share


def _torch_captions(checkpoint: Checkpoint, cases: list[Case], tokens: int) -> list[list[int]]:
    graphs = TorchGraphs(checkpoint)
    answers = caption(graphs, checkpoint.sizes, checkpoint.tokens, cases, tokens)
    progress = tqdm(answers, desc="PyTorch", total=len(cases), unit="image")
    return [answer.tokens for answer in progress]


def least_agreement(encoder: str) -> float:
    """Share of captions that must equal PyTorch's, for combinations with this encoder."""
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
