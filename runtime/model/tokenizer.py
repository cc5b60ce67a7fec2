"""Text to ids and back, by the `tokenizer.json` that travels with the engine."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from runtime.errors import EngineFolderError, InvalidRequest
from runtime.model.manifest import TOKENIZER, Manifest

_REMEMBERED = 256  # prompts
_PROMPT_CHARACTERS = 1024  # far beyond any slot; more would only keep the tokenizer busy


class CaptionTokenizer:
    """The model's tokenizer, in the two directions that captioning needs."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        path = folder / TOKENIZER
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as cause:  # the library raises bare Exception for all that can be wrong
            raise EngineFolderError(f"{path} can't be read: export the engine again") from cause
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A question may be asked of many images.
        self._encode = lru_cache(_REMEMBERED)(self._encoded)
        self._bos = manifest.tokens.bos
        unknown = getattr(self._tokenizer.model, "unk_token", None)  # a model of bytes has none
        # What marks a token that goes on with a word; a model of bytes has none.
        self._mark = getattr(self._tokenizer.model, "continuing_subword_prefix", None) or ""
        self._unknown = self._tokenizer.token_to_id(unknown) if unknown else None

    def prompt_ids(self, prompt: str | None) -> tuple[int, ...]:
        """What a sequence starts with: the start token, then the prompt without an end token.

        This is how GIT was trained to answer questions: the answer goes on where the prompt stops.
        Raises InvalidRequest for a prompt that is no text, much too long, or in words of which the
        model knows none: it would answer as if it had not been asked.
        """
        if not prompt:
            return (self._bos,)
        if len(prompt) > _PROMPT_CHARACTERS:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} characters: shorten it to {_PROMPT_CHARACTERS}"
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as cause:
            raise InvalidRequest("the prompt holds half a surrogate pair: send text") from cause
        ids = self._encode(prompt)
        if ids and set(ids) == {self._unknown}:
            raise InvalidRequest("the model knows no word of the prompt: ask in its own language")
        return (self._bos, *ids)

    def _encoded(self, prompt: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(prompt, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> str:
        """Generated ids as text, without special tokens."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()
        return text.removeprefix(
            self._mark
        )  # of a caption that goes on with the prompt's last word

    def whole_words(self, ids: Sequence[int]) -> str:
        """Text as above, but for a last word that the next token may go on with."""
        begins = (at for at in reversed(range(len(ids))) if not self._goes_on(ids[at]))
        return self.text(ids[: next(begins, 0)] if self._mark else ids)

    def _goes_on(self, token: int) -> bool:
        return self.token(token).startswith(self._mark)

    def token(self, token: int) -> str:
        """A single one as the vocabulary has it."""
        return self._tokenizer.id_to_token(token) or ""
