"""What a request may ask for, so that it fits a slot. Needs the tokenizer, and no engine."""

from typing import Protocol

from runtime.errors import InvalidRequest

DEFAULT_MAX_NEW_TOKENS = 20  # what `generate` of Hugging Face's GIT says by default


class Prompts(Protocol):
    """The part of a tokenizer that reads prompts."""

    def prompt_ids(self, prompt: str | None) -> tuple[int, ...]:
        """What a sequence starts with."""


class Limits:
    """Prompt and caption share the text positions of a slot."""

    def __init__(self, tokenizer: Prompts, text_tokens: int) -> None:
        self._tokenizer, self.text_tokens = tokenizer, text_tokens

    def check(self, prompt: str | None, max_new_tokens: int | None) -> tuple[tuple[int, ...], int]:
        """A prompt's tokens and a limit of new ones; InvalidRequest if they don't fit a slot.

        Without a limit the default is used, or what the prompt leaves of the slot if that is less.
        """
        prompt_ids = self._tokenizer.prompt_ids(prompt)
        room = self.text_tokens - len(prompt_ids) + 1  # the last token is never fed
        if room < 1:
            raise InvalidRequest(
                f"the prompt has {len(prompt_ids) - 1} tokens: shorten it to "
                f"{self.text_tokens - 1} or fewer"
            )
        if max_new_tokens is None:
            return prompt_ids, min(DEFAULT_MAX_NEW_TOKENS, room)
        if not 1 <= max_new_tokens <= room:
            raise InvalidRequest(
                f"max_new_tokens is {max_new_tokens}: with this prompt use 1 to {room}"
            )
        return prompt_ids, max_new_tokens
