"""Errors that stop an export; their messages address the person who started it."""

from runtime.errors import VignetteError


class ExportError(VignetteError):
    """The export failed; the message says what to do."""


class Mismatch(ExportError):
    """The graphs' results differ from PyTorch's. No files are left behind."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message."""
    return str(error).strip().partition("\n")[0]
