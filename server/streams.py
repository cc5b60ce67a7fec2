"""Generated tokens as text that grows, for those who read along."""

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from runtime.model.tokenizer import CaptionTokenizer
from runtime.request import Completion, RequestOutput, joined


@dataclass(frozen=True, slots=True)
class News:
    """What is new. text: all so far, but for a word that may go on. whole: at the end, everything
    that was generated, which `text` holds by then.
    """

    completion: Completion
    text: str
    tokens: int
    whole: RequestOutput | None = None


async def growing(
    outputs: AsyncIterator[RequestOutput], tokenizer: CaptionTokenizer
) -> AsyncGenerator[News, None]:
    """News for each output; the last one is the end. Raises ComputationFailed in place of that."""
    told: list[RequestOutput] = []
    tokens: list[int] = []
    async for output in outputs:
        told.append(output)
        tokens += output.token_ids
        if output.finish_reason is None:
            yield News(output.completion, tokenizer.whole_words(tokens), len(tokens))
        else:
            whole = joined(told)
            yield News(output.completion, tokenizer.text(tokens), len(tokens), whole)
