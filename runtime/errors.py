"""Exceptions of the runtime, one type per kind of refusal.

Each message tells the sender of the input what was wrong and what to do.
"""


class VignetteError(Exception):
    """Base of all errors that Vignette raises on purpose."""


class EngineFolderError(VignetteError):
    """The engine folder is missing, incomplete or damaged."""


class ProviderError(VignetteError):
    """The requested execution provider can't run here."""


class GraphsFailed(ProviderError):
    """The provider runs here, but its runs can't be captured as CUDA graphs."""


class DeviceFailed(Exception):
    """A call of CUDA failed, perhaps by an earlier kernel's fault; all later ones will. As no
    request is to blame, it is no VignetteError.
    """


class InvalidRequest(VignetteError):
    """A request, or engine setting, that can never be served: out of range, or too large."""


class WrongThread(VignetteError):
    """The calling thread, or process, may not use the engine: another does."""


class ComputationFailed(VignetteError):
    """Captioning one image failed, by NaN or an internal error; other images are not affected."""


class InvalidImage(VignetteError):
    """The bytes are not an image in a supported format, or the image is damaged."""


class TooManyPixels(VignetteError):
    """An image whose header states more pixels than the limit; it was not decoded."""
