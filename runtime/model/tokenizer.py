"""Text to ids and back, by the `tokenizer.json` that travels with the engine."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from runtime.errors import EngineFolderError, InvalidRequest
from runtime.model.manifest import TOKENIZER, Manifest

_PROMPT_CHARACTERS = 4096  # far beyond any slot; more would only keep the tokenizer busy


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
        self._bos = manifest.tokens.bos
        unknown = getattr(self._tokenizer.model, "unk_token", None)  # a model of bytes has none
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
        ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        if ids and set(ids) == {self._unknown}:
            raise InvalidRequest("the model knows no word of the prompt: ask in its own language")
        return (self._bos, *ids)

    def text(self, ids: Sequence[int]) -> str:
        """Generated ids as text, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()
