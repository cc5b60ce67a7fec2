"""Engines and certificates that several test files share."""

import os
import shutil
import signal
import ssl
import subprocess
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from export.build import Proof, build
from export.checkpoint import Checkpoint
from export.random_weights import from_config
from runtime.engine import Engine
from runtime.planning.config import EngineConfig
from tests.support.checkpoints import SHAPES, shaken
from tests.support.paths import DEMO

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

_LARGE = 100  # positions of an image


@pytest.fixture(scope="session", params=SHAPES)
def exported(request, tmp_path_factory) -> tuple[Checkpoint, Path]:
    """A small checkpoint of each shape and its engine, verified on 8 images."""
    checkpoint = from_config(request.param, SHAPES[request.param])
    folder = tmp_path_factory.mktemp("engines") / request.param
    # PyTorch encodes a large image for every token, and with beams as often as there are.
    tokens = 20 if checkpoint.sizes.prefix < _LARGE else 8
    build(checkpoint, folder, Proof(images=8, new_tokens=tokens, fast=False))
    return checkpoint, folder


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> tuple[Checkpoint, Path]:
    """The plain shape alone, for tests of a single engine folder."""
    checkpoint = from_config("small", SHAPES["base"], seed=1)
    folder = tmp_path_factory.mktemp("small") / "small"
    build(checkpoint, folder, Proof(images=2, new_tokens=4))
    return checkpoint, folder


@pytest.fixture(scope="session", params=["base", "heads", "video"])
def half(request, tmp_path_factory) -> Path:
    """A small engine with fp16 variants for CUDA and TensorRT."""
    folder = tmp_path_factory.mktemp("half") / request.param
    checkpoint = shaken(from_config(request.param, SHAPES[request.param], seed=2))
    build(checkpoint, folder, Proof(images=2, new_tokens=8, target="tensorrt"))
    return folder


@pytest.fixture(scope="session")
def demo() -> Engine:
    """The committed demo engine on the CPU provider."""
    return Engine.open(DEMO, EngineConfig(provider="cpu"))


@pytest.fixture
def context(tmp_path, monkeypatch):
    """TLS of a server, with a certificate of its own for ok.example, which is trusted."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
         "/CN=ok.example", "-addext", "subjectAltName=DNS:ok.example,DNS:*.ok.example",
         "-keyout", tmp_path / "key", "-out", tmp_path / "certificate"],
        check=True, capture_output=True,
    )  # fmt: skip
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    return context
