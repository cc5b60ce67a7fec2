"""Every way in which the runtime refuses work, so that callers can tell them apart by type.

The text of each is written for the person who sent the input: what was wrong, and what to do.
"""


class VignetteError(Exception):
    """Base of all errors that Vignette raises on purpose."""


class EngineFolderError(VignetteError):
    """The engine folder is missing, incomplete or damaged."""


class ProviderError(VignetteError):
    """The execution provider that was asked for can't run here."""


class GraphsFailed(ProviderError):
    """It can run here, but its runs can't be captured as CUDA graphs."""


class InvalidRequest(VignetteError):
    """A request that can never be served: empty limits, or a prompt that doesn't fit."""


class WrongThread(VignetteError):
    """A thread that an engine does not belong to."""


class ComputationFailed(VignetteError):
    """Captioning one image failed, as the model's numbers broke down or by an error of ours; others
    are not affected.
    """


class InvalidImage(VignetteError):
    """Bytes that are not an image in one of the formats we read, or a damaged one."""


class TooManyPixels(VignetteError):
    """An image whose header promises more pixels than the limit; it was not decoded."""
