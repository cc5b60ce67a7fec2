"""Text to token ids and back, by the engine's `tokenizer.json`."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from runtime.errors import EngineFolderError, InvalidRequest
from runtime.model.manifest import TOKENIZER, Manifest

_REMEMBERED = 256  # prompts
_CONTRACTED = re.compile("( n)?( ')?$")  # "man ' s" may become "man's", "is n ' t" "isn't"
_PROMPT_CHARACTERS = 1024  # far beyond any slot; longer prompts would only cost tokenizer time


class CaptionTokenizer:
    """The model's tokenizer: prompts to ids, generated ids to text."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        path = folder / TOKENIZER
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as cause:  # the library raises bare Exception
            raise EngineFolderError(f"{path} can't be read: export the engine again") from cause
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Cached, because one question may be asked about many images.
        self._encode = lru_cache(_REMEMBERED)(self._encoded)
        self._bos = manifest.tokens.bos
        unknown = getattr(self._tokenizer.model, "unk_token", None)  # byte-level models have none
        # Prefix of a token that continues a word; byte-level models have none.
        self._mark = getattr(self._tokenizer.model, "continuing_subword_prefix", None) or ""
        self._unknown = self._tokenizer.token_to_id(unknown) if unknown else None

    def prompt_ids(self, prompt: str | None) -> tuple[int, ...]:
        """The start token, then the prompt's tokens without an end token.

        GIT was trained to answer questions this way: the answer continues the prompt. Raises
        InvalidRequest for a prompt that is not valid text, is far too long, or has only unknown
        words: the model would answer as if without a prompt.
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
        # The mark is left if the caption continues the prompt's last word.
        return text.removeprefix(self._mark)

    def whole_words(self, ids: Sequence[int]) -> str:
        """Text as above without the last word, which the next token may continue, and without what
        decoders contract with the word behind it. The text of more tokens begins with it.
        """
        begins = (at for at in reversed(range(len(ids))) if not self._goes_on(ids[at]))
        return _CONTRACTED.sub("", self.text(ids[: next(begins, 0)] if self._mark else ids))

    def _goes_on(self, token: int) -> bool:
        return self.token(token).startswith(self._mark)

    def token(self, token: int) -> str:
        """One token as the vocabulary spells it; empty for an unknown id."""
        return self._tokenizer.id_to_token(token) or ""
