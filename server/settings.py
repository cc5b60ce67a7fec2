"""Every setting of the server, once: a flag, a `VIGNETTE_*` variable, its default, its reason."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from runtime.config import EngineConfig
from runtime.errors import VignetteError
from runtime.preprocess import MAX_PIXELS
from runtime.providers import NAMES


class InvalidSettings(VignetteError):
    """A flag or variable that can't be used."""


class Settings(BaseSettings):
    """Serve captions over HTTP. Each flag can be given as a variable: --port is VIGNETTE_PORT."""

    model_config = SettingsConfigDict(
        env_prefix="VIGNETTE_",
        cli_prog_name="python -m server",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        extra="ignore",
        frozen=True,
    )

    engine: Annotated[Path, Field(description="engine folder, as `make export` writes it")] = Path(
        "engines/demo"
    )
    host: Annotated[
        str,
        Field(description="address to listen on; 0.0.0.0 lets other machines in"),
    ] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="TCP port; 0 takes a free one")] = 8000
    provider: Annotated[
        str,
        Field(description=f"execution provider of the encoder: {', '.join(NAMES)}; auto takes the "
              "best that works here and logs which, any other fails if it can't run"),
    ] = "auto"  # fmt: skip
    precision: Annotated[
        str,
        Field(description="encoder/decoder/cache, such as fp32/int8/int8, one of the combinations "
              "in the engine's manifest.json; auto takes plan.json, or without one what suits this "
              "processor; fp32/fp32/float32 computes all in fp32 and was compared to the token"),
    ] = "auto"  # fmt: skip
    slots: Annotated[
        int | None,
        Field(ge=1, description="sequences that decode together: more raise throughput, and each "
              "takes one piece of the K/V arena (the start-up line says how much); left out, 16, "
              "or on a GPU what fits its memory, at most 64"),
    ] = None  # fmt: skip
    encode_batch: Annotated[
        int | None,
        Field(ge=1, description="most images to encode between two decode steps: more may be "
              "encoded faster together, but running captions wait for them; left out, the plan's"),
    ] = None  # fmt: skip
    cuda_graphs: Annotated[
        bool,
        Field(description="on a GPU, capture each decode step once and launch it as a whole; "
              "--no-cuda-graphs runs it node by node, to find out what is wrong"),
    ] = True  # fmt: skip
    threads: Annotated[
        int, Field(ge=0, description="operator threads of each graph; 0 takes all cores")
    ] = 0
    decode_threads: Annotated[
        int,
        Field(ge=1, description="threads that decode and resize images, beside the event loop"),
    ] = os.cpu_count() or 1
    max_queue: Annotated[
        int,
        Field(ge=1, description="requests that may wait for a slot; the next is answered 429 at "
              "once, which is kinder than a time-out"),
    ] = 256  # fmt: skip
    max_body_bytes: Annotated[
        int, Field(ge=1024, description="largest request body; a larger one is answered 413")
    ] = 10_000_000
    max_pixels: Annotated[
        int,
        Field(ge=1, description="most pixels of an image, checked before decoding because a "
              "small file can unpack to gigabytes"),
    ] = MAX_PIXELS  # fmt: skip
    drain_seconds: Annotated[
        float,
        Field(ge=0, description="on SIGTERM, how long accepted requests may take to finish"),
    ] = 30.0
    log_level: Annotated[
        str, Field(pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="what to log, from here up")
    ] = "INFO"

    @property
    def engine_config(self) -> EngineConfig:
        """The part that the engine reads."""
        return EngineConfig(
            slots=self.slots,
            encode_batch=self.encode_batch,
            provider=self.provider,
            precision=self.precision,
            threads=self.threads,
            cuda_graphs=self.cuda_graphs,
        )


def from_command_line(arguments: list[str] | None = None) -> Settings:
    """Settings from flags, then variables, then defaults; InvalidSettings names the wrong ones."""
    try:
        return Settings(_cli_parse_args=True if arguments is None else arguments)  # type: ignore[call-arg]
    except ValidationError as cause:
        problems = "; ".join(
            f"--{'-'.join(map(str, e['loc'])).replace('_', '-')}: {e['msg']} (got {e['input']!r})"
            for e in cause.errors()
        )
        raise InvalidSettings(f"{problems}. See python -m server --help") from cause
