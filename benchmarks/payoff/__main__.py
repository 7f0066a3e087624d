"""`python -m benchmarks.payoff [options]`: run what has no record yet, and write the page."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from benchmarks.measure import environment
from benchmarks.payoff import claims, figures, page, plan
from benchmarks.payoff.beyond.parts import PARTS
from benchmarks.payoff.methods import METHODS
from benchmarks.payoff.records import Records, run_jobs
from benchmarks.payoff.tasks import CORE, OPTIONAL, TASKS

ROOT = Path(__file__).parent.parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "payoff.jsonl"
TABLES = "tables"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.payoff",
        description="Where a posterior pays. Finished runs are kept: a second call goes on.",
    )
    parser.add_argument("--parts", nargs="+", choices=[TABLES, *PARTS], default=[TABLES, *PARTS])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="of the tables")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--all-data", action="store_true", help="data of the extra bench-data too")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--records", type=Path, default=RECORDS, help="a file of JSON lines")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page goes")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page")
    parser.add_argument("--fresh", action="store_true", help="forget the chosen runs first")
    return parser.parse_args(argv)


def forget(records: Records, args: argparse.Namespace, tasks: list[str]) -> None:
    """Remove the records of the chosen tasks and methods, and of the chosen parts."""
    gone = [
        key for key, r in records.found.items()
        if (TABLES in args.parts and r["task"] in tasks and r["method"] in args.methods)
        or r["task"].split(":")[0] in args.parts
    ]  # fmt: skip
    for key in gone:
        del records.found[key]
    records.compact()
    for name in args.parts:  # a figure that is drawn once is drawn again
        (args.docs / "figures" / f"payoff_{name}.png").unlink(missing_ok=True)


def measure(args: argparse.Namespace, records: Records, tasks: list[str]) -> list[str]:
    """Run everything that was asked for; lines about missing packages."""
    missing = []
    if TABLES in args.parts:
        search = plan.search_jobs(tasks, args.methods)
        missing += run_jobs(search, records, args.workers, "search on split 100")
        final = plan.final_jobs(tasks, args.methods, records)
        missing += run_jobs(final, records, args.workers, "fresh splits")
    for name, part in PARTS.items():
        if name in args.parts:
            missing += run_jobs(part.jobs(records, args.all_data), records, args.workers, name)
    return list(dict.fromkeys(missing))


def report(args: argparse.Namespace, records: Records) -> list[claims.Claim]:
    """Write the summary, the figures and the page from the records; return the claims."""
    tasks = [t for t in TASKS if records.of(t)]
    found = claims.of_tables(records, tasks)
    beyond = [claim for part in PARTS.values() for claim in part.claims(records)]
    drawn = figures.draw(records, tasks, args.docs / "figures")
    for part in PARTS.values():
        part.draw(records, args.docs / "figures")
    path = args.records.with_suffix(".json")
    stamp = environment()
    if args.report and path.exists():  # the machine that writes need not be the one that measured
        stamp = json.loads(path.read_text())["environment"]
    summary = {"environment": stamp, "claims": [dataclasses.asdict(c) for c in found + beyond]}
    path.write_text(json.dumps(summary, indent=1) + "\n")
    sections = [part.section(records) for part in PARTS.values()]
    text = page.page(records, tasks, found, beyond, drawn, sections, stamp)
    (args.docs / "payoff.md").write_text(text)
    return found + beyond


def main(argv: list[str] | None = None) -> None:
    """Run, report, and say on the terminal which claims hold."""
    args = parse(argv)
    tasks = args.tasks or [*CORE, *(OPTIONAL if args.all_data else ())]
    records = Records(args.records)
    if args.fresh:
        forget(records, args, tasks)
    missing = [] if args.report else measure(args, records, tasks)
    records.compact()
    for claim in report(args, records):
        says = {True: "met    ", False: "NOT MET", None: "       "}[claim.met]
        print(f"{says} {claim.text}: {claim.measured} (demand: {claim.demand})")
    for line in missing:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
