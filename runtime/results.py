"""What a request came to: its outputs joined, and the caption that they make."""

import itertools
from collections.abc import Iterable

from msgspec.structs import replace

from runtime.errors import ComputationFailed
from runtime.model.tokenizer import CaptionTokenizer
from runtime.request import Caption, Completion, FinishReason, GenerationRequest, RequestOutput


def join_outputs(outputs: Iterable[RequestOutput]) -> RequestOutput:
    """Join the outputs of an ended request into one. Raises ComputationFailed if the finish reason
    is FAILED or ERROR.
    """
    news = []
    for output in outputs:
        news.append(output.completion)
    if output.finish_reason is FinishReason.FAILED:
        raise ComputationFailed(
            "the model's numbers broke down (NaN) on this image: caption it with an engine of "
            "another precision, such as fp32"
        )
    if output.finish_reason is FinishReason.ERROR:
        raise ComputationFailed("captioning this image met an error: the service's log tells which")
    whole = Completion(
        tuple(itertools.chain.from_iterable(each.token_ids for each in news)),
        tuple(itertools.chain.from_iterable(each.logprobs for each in news)),
        tuple(itertools.chain.from_iterable(each.top_logprobs for each in news)),
        output.finish_reason,
    )
    return replace(output, completion=whole)


def make_caption(
    request: GenerationRequest, output: RequestOutput, tokenizer: CaptionTokenizer
) -> Caption:
    """The caption of an ended request, from its joined output."""
    timing = output.timing
    assert timing is not None

    def caption(completion: Completion, others: tuple[Caption, ...] = ()) -> Caption:
        reason, count = completion.finish_reason, len(completion.token_ids)
        assert reason is not None
        return Caption(
            text=tokenizer.text(completion.token_ids),
            token_ids=completion.token_ids,
            finish_reason=reason,
            prompt_tokens=len(request.prompt_ids) - 1,
            completion_tokens=count - (reason is FinishReason.STOP),
            timing=timing,
            score=sum(completion.logprobs) / count if count else None,
            logprobs=completion.logprobs,
            top_logprobs=completion.top_logprobs,
            others=others,
        )

    return caption(output.completion, tuple(caption(other) for other in output.others))
