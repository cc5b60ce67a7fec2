"""Beams, scores and penalties: token for token those of Hugging Face's `generate`."""

import numpy as np
import pytest
import torch

from export.checkpoint import Checkpoint
from export.pictures import generated
from export.reference import up_to_end
from runtime.engine import Engine
from runtime.errors import InvalidRequest
from runtime.planning.config import EngineConfig
from runtime.request import Caption

EXACT = EngineConfig(provider="cpu", precision="fp32/fp32/float32", slots=12)
_LARGE = 20  # positions of an image
WAYS = [
    {"num_beams": 4},
    {"num_beams": 4, "n": 3},
    {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never"},
    {"num_beams": 2, "early_stopping": True, "length_penalty": 2.0, "n": 2},
    {"num_beams": 8, "length_penalty": -1.0},
    {"num_beams": 4, "no_repeat_ngram_size": 2, "repetition_penalty": 1.4},
    {"num_beams": 3, "min_new_tokens": 5},
    {"repetition_penalty": 1.3, "min_new_tokens": 6},
    {"no_repeat_ngram_size": 2},
]


def said_by_torch(
    checkpoint: Checkpoint, pixels: np.ndarray, prompt: list[int], most: int, **asked
) -> list[list[int]]:
    """Tokens of `generate`, without prompt and padding."""
    how, given = checkpoint.normalisation, torch.tensor([prompt])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))
    asked["num_return_sequences"] = asked.pop("n", 1)
    ids = checkpoint.model.generate(
        pixel_values=(torch.from_numpy(pixels)[None].float() * how.rescale - mean) / std,
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=most,
        do_sample=False, pad_token_id=checkpoint.tokens.pad, **asked,
    )  # fmt: skip
    return [up_to_end(row[len(prompt) :], checkpoint.tokens.eos) for row in ids.tolist()]


def tokens_of(caption: Caption) -> list[list[int]]:
    return [list(each.token_ids) for each in (caption, *caption.others)]


def test_beams_say_what_pytorch_says_in_a_batch_of_all_ages(exported):
    checkpoint, folder = exported
    engine, rng = Engine.open(folder, EXACT), np.random.default_rng(5)
    requests, expected = [], {}
    large = checkpoint.sizes.prefix > _LARGE  # PyTorch encodes an image for every beam and token
    for number, asked in enumerate(WAYS[3:5] if large else WAYS * 2):
        pixels = generated(rng, checkpoint.sizes)
        words = " ".join(["w7", "w9"][: number % 3])
        most = (3 if large else 6) + number % 5
        requests.append(engine.request(pixels, words, max_new_tokens=most, **asked))
        prompt = list(requests[-1].prompt_ids)
        expected[requests[-1].id] = said_by_torch(checkpoint, pixels, prompt, most, **asked)
    found, waiting = {}, list(requests)
    while waiting or not engine.idle:
        if waiting:
            engine.submit(waiting.pop())
        found |= {output.id: output for output in engine.step()}
    for request in requests:
        caption = engine.caption(request, found[request.id])
        assert tokens_of(caption) == expected[request.id], request.sampling


def test_scores_are_those_of_pytorch(exported):
    checkpoint, folder = exported
    engine, rng = Engine.open(folder, EXACT), np.random.default_rng(6)
    pixels = generated(rng, checkpoint.sizes)
    for asked in ({}, {"num_beams": 3}):
        [caption] = engine.generate([pixels], max_new_tokens=8, logprobs=5, **asked)
        text = torch.tensor([[checkpoint.tokens.bos, *caption.token_ids]])
        how = checkpoint.normalisation
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))
        images = (torch.from_numpy(pixels)[None].float() * how.rescale - mean) / std
        with torch.inference_mode():
            logits = checkpoint.model(input_ids=text, pixel_values=images).logits
        expected = logits[0, -text.shape[1] : -1].log_softmax(-1)
        own = expected.gather(1, text[0, 1:, None])[:, 0]
        assert np.allclose(caption.logprobs, own, atol=1e-4)
        assert caption.score == pytest.approx(float(own.mean()), abs=1e-4)
        for place, top in enumerate(caption.top_logprobs):
            best = expected[place].topk(5)
            assert [token for token, _ in top] == best.indices.tolist()
            assert np.allclose([logprob for _, logprob in top], best.values, atol=1e-4)


def test_more_beams_than_slots_are_refused_with_a_remedy(small):
    _, folder = small
    engine = Engine.open(folder, EngineConfig(provider="cpu", slots=2))
    with pytest.raises(InvalidRequest, match="num_beams is 4, and there are 2 slots"):
        engine.request(generated(np.random.default_rng(0), engine.manifest.sizes), num_beams=4)
