"""The command rvi-fast."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"rvi-fast {arguments.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rvi-fast", description="Relay Variational Inference, fast.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser("demo", help="train on handwritten digits with half of the pixels hidden, and compare")
    demo.add_argument(
        "-o", "--out", default="rvi-fast-demo", help="folder for the model and the picture (default: %(default)s)"
    )
    demo.add_argument(
        "--seed", type=_at_least(0), default=0, help="of the holes and of the model (default: %(default)s)"
    )
    demo.add_argument("--epochs", type=_at_least(1), default=None, help="training epochs (default: the library's)")
    demo.add_argument("--quiet", action="store_true", help="no progress bar")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="versions, backend and devices")
    info.set_defaults(run=_info)
    return parser


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}; got {value}")
        return value

    return parse


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run

    run(arguments.out, seed=arguments.seed, epochs=arguments.epochs, progress=not arguments.quiet)
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from .info import describe

    for name, value in describe().items():
        print(f"{name:<12} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
