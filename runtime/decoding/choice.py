"""Which way of decoding a request asks for."""

from runtime.decoding.base import Decoding
from runtime.decoding.beams import Beams
from runtime.decoding.continuation import Continuation
from runtime.request import GenerationRequest


def decoding_of(request: GenerationRequest, eos: int) -> Decoding:
    """At its beginning. eos: the model's end token."""
    kind = Beams if request.sampling.num_beams > 1 else Continuation
    return kind(request.prompt_ids, request.sampling, eos)
