"""`python -m bench.reliability`: run scenarios, print and keep the table."""

import argparse
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

from bench.common.machine import about
from bench.reliability import beside
from bench.reliability.running import Verdict
from bench.reliability.scenarios import SCENARIOS
from bench.reliability.table import Row, keep


def main() -> int:
    """Run scenarios, print and keep the table; status 1 if one is not as promised."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, help="of scenarios (default: all)")
    parser.add_argument("--without", type=int, nargs="*", default=[], help="numbers to leave out")
    parser.add_argument("--short", action="store_true", help="short forms, kept nowhere")
    parser.add_argument("--minutes", type=float, default=120, help="of the siege (120)")
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    facts, failed = about(), False
    for name, (number, scenario) in SCENARIOS.items():
        if number in args.without or (args.numbers and number not in args.numbers):
            continue
        started = time.perf_counter()
        try:
            siege = {"minutes": args.minutes} if scenario is beside.siege else {}
            verdict = scenario(not args.short, **siege)
        except Exception as error:  # any exception: the other scenarios are still worth running
            traceback.print_exc()
            verdict = Verdict(f"{type(error).__name__}: {error}", False)
        row = Row(
            number,
            name,
            verdict.figure,
            verdict.passed and (verdict.in_time or args.short),
            f"{datetime.now(UTC):%Y-%m-%d}",
            facts["commit"],
            f"{facts['machine']}; {verdict.engine.name}",
        )
        failed |= row.as_promised is False
        took = time.perf_counter() - started
        print(f"{number:2} {name}: {row.figure} ({row.word}; {took:.0f} s)", flush=True)
        if not args.short:
            keep(args.output, [row])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
