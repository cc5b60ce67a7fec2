"""Text to ids and back, by the `tokenizer.json` that travels with the engine."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from runtime.errors import EngineFolderError
from runtime.manifest import Manifest

FILE = "tokenizer.json"


class CaptionTokenizer:
    """The model's tokenizer, in the two directions that captioning needs."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        path = folder / FILE
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as cause:  # the library raises bare Exception for all that can be wrong
            raise EngineFolderError(f"{path} can't be read: export the engine again") from cause
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bos = manifest.tokens.bos

    def prompt_ids(self, prompt: str | None) -> tuple[int, ...]:
        """What a sequence starts with: the start token, then the prompt without an end token.

        This is how GIT was trained to answer questions: the answer goes on where the prompt stops.
        """
        if not prompt:
            return (self._bos,)
        return (self._bos, *self._tokenizer.encode(prompt, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> str:
        """Generated ids as text, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()
