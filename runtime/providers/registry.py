"""Execution providers by name: which this machine has, and the remedy for a missing one.

ONNX Runtime falls back to its CPU provider when another fails to load. Here that is an error;
fallbacks of `auto` are up to the loader.
"""

import logging
from dataclasses import dataclass

import onnxruntime as ort

from runtime.errors import ProviderError
from runtime.planning.config import NVIDIA, PROVIDERS
from runtime.providers import cuda, gpu, openvino, tensorrt

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Provider:
    """`ep` is ONNX Runtime's name; `remedy` says what to do if the provider is missing."""

    name: str
    ep: str
    remedy: str


_PROVIDERS = {
    p.name: p
    for p in (
        Provider("tensorrt", tensorrt.EP, tensorrt.REMEDY),
        Provider("cuda", cuda.EP, cuda.REMEDY),
        Provider("openvino", openvino.EP, openvino.REMEDY),
        Provider("cpu", "CPUExecutionProvider", "reinstall onnxruntime"),
    )
}


def available() -> tuple[str, ...]:
    """Names of this machine's providers, fastest first.

    A provider with a broken installation is skipped with a warning in the log.
    """
    found = []
    for provider in _PROVIDERS.values():
        try:
            if _is_installed(provider):
                require(provider.name)
                found.append(provider.name)
        except ProviderError as cause:
            log.warning("auto: %s was left out: %s", provider.name, cause)
    return tuple(found)


def require(name: str) -> None:
    """Raise ProviderError, with the remedy, unless the named provider can run here."""
    provider = by_name(name)
    if not _is_installed(provider):
        raise ProviderError(f"{provider.name} is not available here: {provider.remedy}")
    if name in NVIDIA:
        gpu.require_gpu(cuda.major())
        cuda.load()
    if name == "tensorrt":
        tensorrt.version()


def by_name(name: str) -> Provider:
    """The provider `name`. Raises ProviderError for an unknown name."""
    if name not in _PROVIDERS:
        raise ProviderError(f"unknown provider {name!r}: use one of {', '.join(PROVIDERS)}")
    return _PROVIDERS[name]


def _is_installed(provider: Provider) -> bool:
    if provider.name == "openvino":
        return bool(openvino.devices())
    return provider.ep in ort.get_available_providers()
