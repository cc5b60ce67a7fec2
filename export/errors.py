"""What can stop an export, told to the person who started it."""

from runtime.errors import VignetteError


class ExportError(VignetteError):
    """The export can't be made; the message says what to do."""


class Mismatch(ExportError):
    """The graphs don't say what PyTorch says. Nothing is left behind."""
