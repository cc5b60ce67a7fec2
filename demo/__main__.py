"""`python -m demo train`: make the demo model from nothing but its sprites."""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the model; resumes where it was stopped")
    train.add_argument("--scenes", type=int, default=300_000, help="training scenes in all")
    train.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    if args.command == "train":
        from demo.train import Settings, train as run

        run(Settings(scenes=args.scenes, device=args.device))


main()
