"""A checkpoint's tokenizer as one tokenizer.json that gives the same text as Hugging Face's."""

from pathlib import Path

from tokenizers import Tokenizer, decoders
from transformers import AutoTokenizer

from export.errors import ExportError, first_line

# What `clean_up_tokenization` of transformers replaces in decoded text, in its order.
_CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def tokenizer_json(model: str, revision: str | None, vocabulary: int) -> str:
    """tokenizer.json of a checkpoint. Raises ExportError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        written = tokenizer.backend_tokenizer.to_str()
    # transformers raises exceptions of any type for missing or broken files; tokenizers panics
    except BaseException as cause:
        broken = isinstance(cause, Exception) or type(cause).__name__ == "PanicException"
        if not (broken and Path(model).is_dir()):
            raise
        raise ExportError(
            f"{model} has no tokenizer that can be read: put tokenizer.json and "
            f"tokenizer_config.json beside its weights ({first_line(cause)})"
        ) from cause
    if len(tokenizer) > vocabulary:
        raise ExportError(
            f"{model}: its tokenizer knows {len(tokenizer)} tokens, and the model {vocabulary}: "
            "take both from the same checkpoint"
        )
    return _cleaning(model, written) if tokenizer.clean_up_tokenization_spaces else written


def _cleaning(model: str, written: str) -> str:
    """The tokenizer with a decoder that cleans text up, which transformers does after decoding and
    tokenizer.json knows nothing of. Raises ExportError.
    """
    tokenizer = Tokenizer.from_str(written)
    if tokenizer.decoder is None:
        raise ExportError(f"{model}: its tokenizer has no decoder: add WordPiece to tokenizer.json")
    cleaned = (decoders.Replace(old, new) for old, new in _CLEANED)
    tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Fuse(), *cleaned])
    return str(tokenizer.to_str())
