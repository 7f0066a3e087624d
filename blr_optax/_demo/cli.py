"""The command line: `blr-optax demo`, `blr-optax table`.

Arguments are checked here and nowhere else; a wrong one ends with exit code 2 and one line.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Parser(argparse.ArgumentParser):
    """Answers a wrong argument with one line instead of two usages."""

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argument type: values of `kind` separated by commas."""

    def parse(text: str) -> list[Any]:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]

    return parse


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """An argument type: a whole number in a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {least} to {most}"
            )
        return value

    return parse


def known(names: Sequence[str]) -> Callable[[str], str]:
    """An argument type: one of `names`."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; known: {', '.join(names)}")
        return text

    return parse


def build() -> Parser:
    """The parser of all commands; each sets `command`, a function of the parsed arguments."""
    from blr_optax import __version__
    from blr_optax._demo import run
    from blr_optax._demo.tasks import PARTS

    parser = Parser(prog="blr-optax", description="The Bayesian learning rule as optax parts.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="AdamW and IVON on scikit-learn's diabetes and digits: tables, results.json, figures",
        description="Trains the same small networks with AdamW and with IVON's recipe, both "
        "untuned: intervals of a regression, digits with noisy labels, shifted digits. Prints a "
        "table for every part, and writes results.json and figures.",
    )
    several = {"action": "extend", "nargs": "+"}
    demo.add_argument(
        "--part",
        type=listed(known(tuple(PARTS))),
        metavar="PART",
        **several,
        help=f"any of {', '.join(PARTS)} (default: all): "
        + "; ".join(f"{name} is {part.title}" for name, part in PARTS.items()).replace("%", "%%"),
    )
    demo.add_argument(
        "--seed",
        type=listed(whole(0)),
        metavar="N",
        **several,
        help=f"seeds (default: {' '.join(map(str, run.SEEDS))})",
    )
    demo.add_argument(
        "--steps",
        type=whole(2),
        metavar="N",
        help="steps of every run (default: "
        + ", ".join(f"{part.steps} in {name}" for name, part in PARTS.items())
        + ")",
    )
    demo.add_argument(
        "--samples",
        type=whole(1),
        default=run.SAMPLES,
        metavar="N",
        help="posterior samples of IVON's prediction (default: %(default)s)",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo_out"),
        metavar="DIR",
        help="output folder (default: %(default)s); results there are replaced",
    )
    demo.add_argument(
        "--resume", action="store_true", help="go on from the checkpoints in the output folder"
    )
    demo.set_defaults(command=run_demo, parser=demo)

    rows = commands.add_parser(
        "table",
        help="the algorithms that the rule yields: family, approximation, function",
        description="Prints every algorithm of this library as a special case of the rule.",
    )
    rows.set_defaults(command=run_table, parser=rows)
    return parser


def run_table(arguments: argparse.Namespace) -> None:
    """`blr-optax table`."""
    from blr_optax import table

    print(table())


def run_demo(arguments: argparse.Namespace) -> None:
    """`blr-optax demo`."""
    from blr_optax._demo import report, run
    from blr_optax._demo.tasks import PARTS

    def chosen(
        values: list[list[Any]] | None, default: Sequence[Any], name: str
    ) -> tuple[Any, ...]:
        flat = tuple(dict.fromkeys(v for group in values or () for v in group))
        if values is not None and not flat:
            raise run.DemoError(f"argument --{name}: names nothing")
        return flat or tuple(default)

    settings = run.Settings(
        parts=chosen(arguments.part, tuple(PARTS), "part"),
        seeds=chosen(arguments.seed, run.SEEDS, "seed"),
        steps=arguments.steps,
        samples=arguments.samples,
    )
    report.demo(settings, arguments.out, arguments.resume)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `blr-optax`; returns 0, exits with 2 on errors, 130 if interrupted."""
    try:
        from blr_optax._demo.folder import DemoError

        arguments = build().parse_args(argv)
        try:
            arguments.command(arguments)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, such as `head`, has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # as a program that the signal ends
        except (DemoError, OSError) as error:
            arguments.parser.error(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; --resume goes on from the last checkpoint\n")
        sys.exit(130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
