"""`python -m demo train | evaluate | samples | pictures`: make the demo model, score it, draw."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from demo.sprites import SpritesMissing
from runtime.errors import VignetteError
from runtime.planning.config import demo_engine


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args) or 0)
    except (SpritesMissing, VignetteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="train the model; resumes where it was stopped")
    train.add_argument("--scenes", type=int, help="training scenes in all")
    train.add_argument("--initial", type=Path, help="checkpoint folder to go on from")
    train.add_argument("--learning-rate", type=float, help="highest; a trained model wants 3e-4")
    train.add_argument("--pairs", type=float, help="share of scenes with two nouns")
    train.add_argument("--device", default="cpu", help="cpu or cuda")
    train.set_defaults(run=_train)
    evaluate = commands.add_parser("evaluate", help="score an engine on held-out scenes")
    evaluate.add_argument("--engine", type=Path, default=demo_engine())
    evaluate.add_argument("--scenes", type=int, default=1000, help="of each kind")
    evaluate.add_argument("--provider", default="auto", help="execution provider of the encoder")
    evaluate.add_argument("--beams", type=int, default=1, help="to search with (1: greedy)")
    evaluate.add_argument("--json", type=Path, help="write each answer's outcome and score there")
    evaluate.set_defaults(run=_evaluate)
    samples = commands.add_parser("samples", help="draw the committed sample scenes anew")
    samples.set_defaults(run=_samples)
    pictures = commands.add_parser("pictures", help="draw scenes in bulk, to judge exports by")
    pictures.add_argument("folder", type=Path)
    pictures.add_argument("--count", type=int, default=400)
    pictures.set_defaults(run=_pictures)
    return parser


def _train(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from demo.train import Settings, train

    chosen = {"scenes": args.scenes, "learning_rate": args.learning_rate, "pairs": args.pairs}
    settings = Settings(device=args.device, initial=args.initial)
    train(replace(settings, **{name: value for name, value in chosen.items() if value is not None}))


def _evaluate(args: argparse.Namespace) -> int:
    """Exit status 1 if accuracy on the trained styles is below the model card's."""
    from demo.evaluate import PROMISED, evaluate

    scores = evaluate(args.engine, args.scenes, args.provider, args.beams)
    if args.json:
        args.json.write_text(json.dumps({name: asdict(score) for name, score in scores.items()}))
    for name, score in scores.items():
        print(f"{name}: {score}")
    return int(any(scores[name].share < least for name, least in PROMISED.items()))


def _samples(args: argparse.Namespace) -> None:
    from demo.samples import draw

    draw()


def _pictures(args: argparse.Namespace) -> None:
    from demo.samples import draw_many

    draw_many(args.folder, args.count)


if __name__ == "__main__":
    sys.exit(main())
