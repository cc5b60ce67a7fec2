"""All settings of the server: flag, `VIGNETTE_*` variable, default and description of each."""

import difflib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from runtime.errors import VignetteError
from runtime.model.preprocess import MAX_PIXELS
from runtime.planning.config import LARGEST, NVIDIA, PROVIDERS, EngineConfig, demo_engine
from runtime.planning.machine import this_machine

_CORES = this_machine().cores
_LEAST_SHARE = 1 / 16  # of the rates: what browsers ask for at once must not wait
_PREFIX = "VIGNETTE_"
LOCAL = "local"  # makes Ray start a cluster here instead of joining one


class InvalidSettings(VignetteError):
    """A flag or variable that can't be used."""


def _listed(value: object) -> object:
    """A list as variables give it: between commas, or as JSON."""
    if not isinstance(value, str):
        return value
    if value.startswith("["):
        return json.loads(value)
    return [each.strip() for each in value.split(",") if each.strip()]


_Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)]


class Settings(BaseSettings):
    """Serve captions over HTTP. Each flag can be given as a variable: --port is VIGNETTE_PORT."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        cli_prog_name="vignette serve",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        extra="ignore",
        frozen=True,
    )

    engine: Annotated[
        str,
        Field(description="engine folder, as `make export` writes it; several between blanks, or "
              "a folder of them: each is a model, which requests name (model), the first if they "
              "name none; NAME=FOLDER gives it another name than its manifest does"),
    ] = str(demo_engine())  # fmt: skip
    host: Annotated[
        str,
        Field(description="address to listen on; 0.0.0.0 lets other machines in"),
    ] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="TCP port; 0 takes a free one")] = 8000
    provider: Annotated[
        str,
        Field(description=f"execution provider of the encoder: {', '.join(PROVIDERS)}; auto takes "
              "the best that works here and logs which, any other fails if it can't run"),
    ] = "auto"  # fmt: skip
    precision: Annotated[
        str,
        Field(description="encoder/decoder/cache, such as fp32/int8/int8, one of the combinations "
              "in the engine's manifest.json; auto takes plan.json, or without one what suits this "
              "processor; fp32/fp32/float32 computes all in fp32 and was compared to the token"),
    ] = "auto"  # fmt: skip
    slots: Annotated[
        int | None,
        Field(ge=1, le=LARGEST, description="sequences that decode together: more raise "
              "throughput, and each takes one piece of the K/V arena (the start-up line says how "
              "much); left out, 16, or on a GPU what fits its memory, at most 256"),
    ] = None  # fmt: skip
    text_tokens: Annotated[
        int | None,
        Field(ge=2, le=4096, description="positions of a slot for prompt and caption together; "
              "more make the K/V arena larger; left out, the model's own number, at most 64"),
    ] = None  # fmt: skip
    encode_batch: Annotated[
        int | None,
        Field(ge=1, le=LARGEST, description="most images to encode between two decode steps: more "
              "may be encoded faster together, but running captions wait; left out, the plan's"),
    ] = None  # fmt: skip
    cuda_graphs: Annotated[
        bool,
        Field(description="on a GPU, capture each decode step once and launch it as a whole; "
              "--no-cuda-graphs runs it node by node, to find out what is wrong"),
    ] = True  # fmt: skip
    threads: Annotated[
        int,
        Field(ge=0, le=1024, description="operator threads of each graph; 0 shares all cores among "
              "a model's workers; several models each take all"),
    ] = 0  # fmt: skip
    workers: Annotated[
        int | None,
        Field(ge=1, le=64, description="engine workers of each model; left out, one for each GPU; "
              "more share the GPUs; more than one on a processor is for tests"),
    ] = None  # fmt: skip
    front_ends: Annotated[
        int,
        Field(ge=1, le=64, description="processes that speak HTTP on the same port; one for every "
              "four cores, because they do little but wait"),
    ] = max(1, _CORES // 4)  # fmt: skip
    decoders: Annotated[
        int,
        Field(ge=1, le=256, description="processes of each front-end that decode and resize "
              "images; one more, of a lower priority, decodes those that take long"),
    ] = max(1, _CORES // max(1, _CORES // 4))  # fmt: skip
    decode_seconds: Annotated[
        float,
        Field(gt=0, le=3600, description="of a core, for decoding one image; what takes longer is "
              "refused"),
    ] = 10.0  # fmt: skip
    decode_memory_mb: Annotated[
        int,
        Field(ge=512, le=2**20, description="MiB that a decoder process may take; an image that is "
              "estimated to need more is refused; of those that are estimated to need more than "
              "256 each front-end decodes one at a time"),
    ] = 2048  # fmt: skip
    max_queue: Annotated[
        int,
        Field(ge=1, le=100_000, description="requests that may wait for a slot; the next is "
              "answered 429 at once, which is kinder than a time-out"),
    ] = 256  # fmt: skip
    max_queue_bytes: Annotated[
        int,
        Field(ge=1024, description="bytes of all bodies that are inside or coming in; the next "
              "one is answered 429; each of several front-ends takes at least five of the "
              "largest bodies"),
    ] = 512_000_000  # fmt: skip
    max_connections: Annotated[
        int,
        Field(ge=16, le=65536, description="connections of each front-end, fewer if the system "
              "allows it fewer files; the oldest idle ones are closed for new ones"),
    ] = 4096  # fmt: skip
    timeout_seconds: Annotated[
        float,
        Field(gt=0, description="deadline of a request that names none (timeout_ms): past it, it "
              "is answered 504, and not run if it still waits"),
    ] = 30.0  # fmt: skip
    header_seconds: Annotated[
        float,
        Field(gt=0, description="for the head of a request, and how long a connection may idle; "
              "longer than a proxy in front keeps one, which is a minute mostly"),
    ] = 75.0  # fmt: skip
    body_seconds: Annotated[
        float, Field(gt=0, description="for the body of a request, and for its answer to be taken")
    ] = 30.0
    step_seconds: Annotated[
        float,
        Field(gt=0, description="an engine worker that is in one step for longer is replaced, "
              "unless its self-test says that large steps take as long; best less than "
              "timeout_seconds, so that it is known which image was to blame"),
    ] = 25.0  # fmt: skip
    max_body_bytes: Annotated[
        int, Field(ge=1024, description="largest request body; a larger one is answered 413")
    ] = 10_000_000
    max_pixels: Annotated[
        int,
        Field(ge=1, description="most pixels of an image, checked before decoding because a "
              "small file can unpack to gigabytes"),
    ] = MAX_PIXELS  # fmt: skip
    api_keys: Annotated[
        Path | None,
        Field(description="file of API keys (`vignette keys` makes them); without it "
              "everybody may come in"),
    ] = None  # fmt: skip
    cache_mb: Annotated[
        int,
        Field(ge=0, description="MiB of captions to remember by the image's SHA-256; 0 keeps none"),
    ] = 0  # fmt: skip
    image_url_domains: Annotated[
        _Texts,
        Field(description="domains that image_url may name, .example.org for those below it too; "
              "none switches image_url off"),
    ] = ()  # fmt: skip
    cors_origins: Annotated[
        _Texts,
        Field(description="origins whose pages may use the service from a browser, such as "
              "https://example.org, or *; none keeps to its own page"),
    ] = ()  # fmt: skip
    trusted_proxies: Annotated[
        _Texts,
        Field(description="addresses or networks of proxies whose X-Forwarded-For is believed, "
              "such as 10.0.0.0/8"),
    ] = ()  # fmt: skip
    ops_port: Annotated[
        int | None,
        Field(ge=0, le=65535, description="serve health and metrics on this port instead, and not "
              "on the public one"),
    ] = None  # fmt: skip
    grpc_port: Annotated[
        int | None,
        Field(ge=1, le=65535, description="speak gRPC, too, on this port (the Open Inference "
              "Protocol, as Triton does), in a front-end of its own; needs the grpc extra, which "
              "`make serve` installs"),
    ] = None  # fmt: skip
    grpc_certificate: Annotated[
        Path | None, Field(description="PEM file of certificates for gRPC over TLS")
    ] = None
    grpc_key: Annotated[
        Path | None, Field(description="PEM file of the private key of --grpc-certificate")
    ] = None
    traces: Annotated[
        str | None,
        Field(pattern="^https?://[^/]", description="OTLP/HTTP endpoint of an OpenTelemetry "
              "collector, such as http://localhost:4318/v1/traces; needs the otel extra"),
    ] = None  # fmt: skip
    ray: Annotated[
        str | None,
        Field(description="serve over a Ray cluster: its address, or auto for the one that this "
              "machine is of; without an address over one that is started here; needs the ray "
              "extra, and engines under the same paths on all nodes"),
    ] = None  # fmt: skip
    ray_replicas: Annotated[
        str,
        Field(pattern=r"^[1-9]\d{0,3}(-[1-9]\d{0,3})?$", description="engines of each model on "
              "the cluster: a number, or the fewest and the most, such as 1-8, by the requests "
              "that are inside"),
    ] = "1"  # fmt: skip
    ray_cores: Annotated[
        int | None,
        Field(ge=1, le=1024, description="of each engine on a cluster without GPUs; left out, 4, "
              "or what its largest node has"),
    ] = None  # fmt: skip
    ray_ingresses: Annotated[
        int | None,
        Field(ge=1, le=1024, description="nodes that listen on the port; left out, all"),
    ] = None  # fmt: skip
    ray_detach: Annotated[
        bool,
        Field(description="deploy to the cluster, or update what is there, and return; `serve "
              "shutdown` ends it"),
    ] = False  # fmt: skip
    log_format: Annotated[
        str, Field(pattern="^(text|json)$", description="text for people, json for machines")
    ] = "text"
    access_log: Annotated[
        bool, Field(description="log a line for each request, with its id, status and time")
    ] = False
    drain_seconds: Annotated[
        float,
        Field(ge=0, description="on SIGTERM, how long accepted requests may take to finish"),
    ] = 30.0
    log_level: Annotated[
        str, Field(pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="what to log, from here up")
    ] = "INFO"

    @property
    def _shared_threads(self) -> int:
        """Threads of each worker if several share a processor; 0 gives a single one all cores."""
        several = (self.workers or 1) > 1 and self.provider not in NVIDIA
        return max(1, _CORES // (self.workers or 1)) if several else 0

    @property
    def replicas(self) -> tuple[int, int]:
        """Fewest and most engines of a model on a Ray cluster."""
        least, _, most = self.ray_replicas.partition("-")
        return int(least), int(most or least)

    @property
    def front_end_share(self) -> float:
        """Share of the machine's rates of clients (`ClientRates`) that a front-end has: those are
        for a front-end on four cores.
        """
        return max(_LEAST_SHARE, min(1.0, max(1, _CORES // 4) / self.front_ends))

    @property
    def front_end_processes(self) -> int:
        """Number of front-ends, including the one for gRPC; they share the queue."""
        return self.front_ends + (self.grpc_port is not None)

    @property
    def engine_config(self) -> EngineConfig:
        """The settings that the engine reads."""
        return EngineConfig(
            slots=self.slots,
            text_tokens=self.text_tokens,
            encode_batch=self.encode_batch,
            provider=self.provider,
            precision=self.precision,
            threads=self.threads or self._shared_threads,
            cuda_graphs=self.cuda_graphs,
        )


def _names() -> list[str]:
    """Environment variables of the settings, without the prefix."""
    return [field.upper() for field in Settings.model_fields]


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """A warning for each variable that has the prefix and names no setting."""
    known = _names()
    said = []
    for variable in sorted(environment):
        name = variable.removeprefix(_PREFIX)
        if name == variable or name in known:
            continue
        near = difflib.get_close_matches(name, known, 1)
        meant = f": did you mean {_PREFIX}{near[0]}?" if near else ""
        said.append(f"{variable} is no setting and has no effect{meant}")
    return said


def _with_address(arguments: list[str]) -> list[str]:
    """The arguments with `LOCAL` inserted after a --ray that has no value."""
    found = []
    for flag, after in zip(arguments, [*arguments[1:], "-"], strict=False):
        found += [flag, LOCAL] if flag == "--ray" and after.startswith("-") else [flag]
    return found


def from_command_line(arguments: list[str] | None = None) -> Settings:
    """Settings from flags, then variables, then defaults. Raises InvalidSettings naming errors."""
    for name, value in os.environ.items():
        if name.startswith(_PREFIX) and not value and name.removeprefix(_PREFIX) in _names():
            raise InvalidSettings(f"{name} is empty: give it a value, or unset it")
    arguments = _with_address(sys.argv[1:] if arguments is None else arguments)
    try:
        settings = Settings(_cli_parse_args=arguments)  # type: ignore[call-arg]
    except ValidationError as cause:
        problems = "; ".join(
            f"--{'-'.join(map(str, e['loc'])).replace('_', '-')}: {e['msg']} (got {e['input']!r})"
            for e in cause.errors()
        )
        raise InvalidSettings(f"{problems}. See vignette serve --help") from cause
    if (settings.grpc_certificate is None) != (settings.grpc_key is None):
        raise InvalidSettings("--grpc-certificate and --grpc-key go together: give both, or none")
    least, most = settings.replicas
    if least > most:
        raise InvalidSettings(f"--ray-replicas {settings.ray_replicas}: the fewest come first")
    if settings.ray_detach and settings.ray in (None, LOCAL):
        raise InvalidSettings("--ray-detach leaves a cluster alone: give its address with --ray")
    if settings.ops_port and settings.ops_port == settings.port:
        raise InvalidSettings(f"--ops-port {settings.ops_port} is the port itself: choose another")
    return settings
