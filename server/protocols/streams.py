"""Generated tokens as growing text, for streamed responses."""

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from runtime.model.tokenizer import CaptionTokenizer
from runtime.request import Completion, RequestOutput
from runtime.results import join_outputs


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Progress of a request. text: all so far, without a last word that may continue. whole: the
    complete output, set only at the end, when `text` is complete, too.
    """

    completion: Completion
    text: str
    tokens: int
    whole: RequestOutput | None = None


async def text_deltas(
    outputs: AsyncIterator[RequestOutput], tokenizer: CaptionTokenizer
) -> AsyncGenerator[TextDelta, None]:
    """Yield a TextDelta for each output, the last with `whole`; or raise ComputationFailed."""
    told: list[RequestOutput] = []
    tokens: list[int] = []
    async for output in outputs:
        told.append(output)
        tokens += output.token_ids
        if output.finish_reason is None:
            yield TextDelta(output.completion, tokenizer.whole_words(tokens), len(tokens))
        else:
            whole = join_outputs(told)
            yield TextDelta(output.completion, tokenizer.text(tokens), len(tokens), whole)
