"""`python -m bench.reliability`: run scenarios, print and keep the table."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from bench.common.machine import about
from bench.reliability.scenarios import SCENARIOS, try_long, try_short
from bench.reliability.table import Row, keep


def main() -> int:
    """Run scenarios, print and keep the table; status 1 if one is not as promised."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=__doc__)
    parser.add_argument(
        "scenarios", nargs="*", metavar="SCENARIO",
        help=f"{', '.join(SCENARIOS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--without", nargs="*", metavar="SCENARIO", default=[], help="what to leave out"
    )
    parser.add_argument("--short", action="store_true", help="short forms, kept nowhere")
    parser.add_argument("--minutes", type=float, default=120, help="of the siege (120)")
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    if unknown := [n for n in args.scenarios + args.without if n not in SCENARIOS]:
        parser.error(f"there is no scenario {unknown[0]}: name some of {', '.join(SCENARIOS)}")
    facts, failed = about(), []
    names = [name for name in args.scenarios or SCENARIOS if name not in args.without]
    for trial in try_short(names) if args.short else try_long(names, args.minutes):
        verdict = trial.verdict
        row = Row(
            trial.name,
            SCENARIOS[trial.name].title,
            verdict.figure,
            verdict.passed and (verdict.in_time or args.short),
            f"{datetime.now(UTC):%Y-%m-%d}",
            facts["commit"],
            f"{facts['machine']}; {verdict.engine.name}",
        )
        told = f"{row.figure} ({row.word}; {trial.seconds:.0f} s)"
        print(f"{trial.name}: {told}", flush=True)
        if row.as_promised is False:
            failed.append(f"{trial.name}: {told}")
        if not args.short:
            keep(args.output, [row])
    # Again, below all others: of a long log, the end is what is looked at.
    for line in failed:
        print(line, file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
