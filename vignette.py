"""`vignette COMMAND`: one entry point for all commands, each with its own --help."""

import importlib
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from runtime import __version__

_NOT_RUN, _INTERRUPTED = 2, 130  # exit statuses


@dataclass(frozen=True, slots=True)
class Command:
    """module: its `main` takes the arguments. needs: modules, which `extras` bring."""

    does: str
    module: str
    needs: tuple[str, ...] = ("onnxruntime",)
    extras: str = "cpu"
    target: str | None = None  # of the Makefile, where it has another name


COMMANDS = {
    "serve": Command("serve captions over HTTP", "server.__main__"),
    "caption": Command("caption images in bulk, here or by a service", "server.bulk.command"),
    "export": Command(
        "export a GIT checkpoint to an engine folder", "export.__main__",
        ("onnxruntime", "torch", "optimum"), "export,cpu",
    ),
    "tune": Command("find what is fastest for an engine on this machine", "runtime.tune"),
    "evaluate": Command(
        "score captions against those that people wrote", "bench.quality.command",
        ("onnxruntime", "pycocoevalcap", "nltk"), "quality,cpu",
    ),
    "bench": Command(
        "measure Vignette against PyTorch, side by side", "bench.__main__",
        ("onnxruntime", "torch", "matplotlib", "grpc"), "bench,export,grpc,cpu", "benchmark",
    ),
    "keys": Command("make an API key", "server.service.keys", ()),
}  # fmt: skip


def main() -> int:
    """Run a command; returns its exit status."""
    _open_what_is_closed()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        print(f"vignette: there is no command {name!r}\n\n{_usage()}", file=sys.stderr)
        return _NOT_RUN
    command = COMMANDS[name]
    missing = [module for module in command.needs if find_spec(module) is None]
    if missing:
        print(
            f"vignette {name} needs {', '.join(missing)}: install vignette with the extras "
            f"[{command.extras}] (on a GPU gpu in place of cpu), or use `make "
            f"{command.target or name}`",
            file=sys.stderr,
        )
        return _NOT_RUN
    try:
        run = importlib.import_module(command.module).main
        return int(run(arguments) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _open_what_is_closed() -> None:
    """Open closed standard streams to nowhere: files that are opened later would take their places,
    and messages end up in them. `sys.stdin` and `sys.stdout` stay None.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            os.set_inheritable(opened, True)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.does}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: vignette COMMAND [--help] ...", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
