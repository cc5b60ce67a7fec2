"""Check requests against an engine's limits. Needs only the tokenizer."""

import math
import secrets

import numpy as np
from msgspec.structs import fields, replace

from runtime.errors import InvalidRequest
from runtime.model.manifest import Sizes
from runtime.model.tokenizer import CaptionTokenizer
from runtime.request import RANGES, GenerationRequest, SamplingParams

DEFAULT_MAX_NEW_TOKENS = 20  # the default of `generate` for Hugging Face's GIT
_MOST_LOGPROBS = 40  # per position, over all captions: sending them outweighs computing them
_DRAWING = ("top_k", "top_p", "seed")  # of no effect without a temperature
_RANKING = ("length_penalty", "early_stopping")  # of no effect without beams
_KINDS = {"max_new_tokens": int} | {
    each.name: type(each.default)
    for each in fields(SamplingParams)
    if each.name not in ("max_new_tokens", "early_stopping")  # it may be text
}


class Limits:
    """Request limits: prompt and caption share a slot's text positions; `rows` must fit `slots`."""

    def __init__(
        self, tokenizer: CaptionTokenizer, text_tokens: int, slots: int | None = None
    ) -> None:
        """slots: None until the number is known; set it then."""
        self._tokenizer, self.text_tokens, self.slots = tokenizer, text_tokens, slots

    def most_new_tokens(self, prompt_ids: tuple[int, ...]) -> int:
        """Tokens that a slot has room for after the prompt; below 1 if that is too long."""
        return self.text_tokens - len(prompt_ids) + 1  # the last token is never fed

    def check(
        self, prompt: str | None, asked: dict[str, object], stream: bool = False
    ) -> tuple[tuple[int, ...], SamplingParams]:
        """Return the prompt's token ids and the sampling parameters.

        asked: fields of SamplingParams; a missing or None field takes its default. The default
        of `max_new_tokens` is that of `generate`, or the text positions left in the slot if fewer.
        A sampled request without a seed gets one here, so that a retry draws the same tokens.
        Raises InvalidRequest, naming the field that can't be served.
        """
        asked = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in asked.items()
            if value is not None
        }
        prompt_ids = self._tokenizer.prompt_ids(prompt)
        room = self.most_new_tokens(prompt_ids)
        if room < 1:
            raise InvalidRequest(
                f"the prompt has {len(prompt_ids) - 1} tokens: shorten it to "
                f"{self.text_tokens - 1} or fewer"
            )
        default = {"max_new_tokens": min(DEFAULT_MAX_NEW_TOKENS, room)}
        sampling = SamplingParams(**(default | asked))  # type: ignore[arg-type]
        _check_values(sampling)
        if not 1 <= sampling.max_new_tokens <= room:
            raise InvalidRequest(
                f"max_new_tokens is {sampling.max_new_tokens}: with this prompt use 1 to {room}"
            )
        _check(sampling, asked)
        if sampling.min_new_tokens > sampling.max_new_tokens:
            raise InvalidRequest(
                f"min_new_tokens is {sampling.min_new_tokens}, above max_new_tokens "
                f"{sampling.max_new_tokens}"
            )
        if stream and sampling.rows > 1:
            raise InvalidRequest(
                "stream goes with num_beams and n of 1: which text is the best is known at the end"
            )
        if sampling.temperature and "seed" not in asked:
            sampling = replace(sampling, seed=secrets.randbits(63))
        if self.slots is not None and sampling.rows > self.slots:
            raise InvalidRequest(
                f"{'num_beams' if sampling.num_beams > 1 else 'n'} is {sampling.rows}, and there "
                f"are {self.slots} slots: ask for fewer, or start with more (--slots)"
            )
        return prompt_ids, sampling

    def check_made(self, request: GenerationRequest, sizes: Sizes) -> None:
        """Raise InvalidRequest for a request, perhaps made by hand, that would disturb others.

        `slots` must be known.
        """
        prompt, sampling, pixels = request.prompt_ids, request.sampling, request.pixels
        room = self.most_new_tokens(prompt)
        _check_values(sampling)
        for name, moment in (
            ("arrival_time", request.scheduling.arrival_time),
            ("deadline", request.scheduling.deadline),
        ):
            if not (moment is None or (isinstance(moment, int | float) and math.isfinite(moment))):
                raise InvalidRequest(f"{name} is {moment!r}: it takes seconds or None")
        assert self.slots is not None
        if sampling.rows > self.slots:
            raise InvalidRequest(f"it takes {sampling.rows} slots, and there are {self.slots}")
        if not prompt or not 0 <= min(prompt) <= max(prompt) < sizes.vocabulary:
            raise InvalidRequest("prompt_ids must be ids of tokens, at least one")
        if not 1 <= sampling.max_new_tokens <= room:
            raise InvalidRequest(f"max_new_tokens must be 1 to {room} with this prompt")
        whole = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
        if not whole or pixels.shape != sizes.pixels:
            raise InvalidRequest(f"pixels must be uint8 of shape {list(sizes.pixels)}")


def _check_values(sampling: SamplingParams) -> None:
    """Raise InvalidRequest, naming the field, for a value of another type or out of range."""
    for name, kind in _KINDS.items():
        value = getattr(sampling, name)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise InvalidRequest(f"{name} is {value!r}: it takes a value of type {kind.__name__}")
    for name, (least, most) in RANGES.items():
        if not least <= getattr(sampling, name) <= most:
            raise InvalidRequest(f"{name} must be between {least} and {most}")
    if not isinstance(sampling.early_stopping, bool) and sampling.early_stopping != "never":
        raise InvalidRequest("early_stopping must be true, false or never")


def _check(sampling: SamplingParams, asked: dict[str, object]) -> None:
    """Raise InvalidRequest for fields that don't go together."""
    if sampling.num_beams > 1 and sampling.temperature:
        raise InvalidRequest("temperature goes with num_beams 1: beams are searched, not drawn")
    if not sampling.temperature and (drawing := [name for name in _DRAWING if name in asked]):
        raise InvalidRequest(f"{drawing[0]} has no effect without a temperature above 0")
    if sampling.num_beams == 1 and (ranking := [name for name in _RANKING if name in asked]):
        raise InvalidRequest(f"{ranking[0]} has no effect without num_beams of 2 or more")
    if sampling.n * sampling.logprobs > _MOST_LOGPROBS:
        raise InvalidRequest(
            f"logprobs of {sampling.logprobs} for each of {sampling.n} captions are too many: n "
            f"times logprobs must be {_MOST_LOGPROBS} or less"
        )
    if sampling.n > 1 and not sampling.temperature and sampling.n > sampling.num_beams:
        raise InvalidRequest(
            f"n is {sampling.n}: give num_beams of as many or more, or a temperature, or all of "
            "them would be the same"
        )
