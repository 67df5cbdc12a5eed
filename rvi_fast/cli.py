"""The command rvi-fast."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Text(NamedTuple):
    """What the help of a command says."""

    summary: str
    description: str
    example: str


FIT = Text(
    "train a model on a file and save it",
    """\
Train a model on the observed cells of DATA and save it in a folder, from which impute and
embed (or RVI.load in Python) take it. Columns of text and dates are not learned from.""",
    """\
rvi-fast fit patients.csv -o patients-model
rvi-fast impute new-patients.csv -o filled.csv --model patients-model""",
)
IMPUTE = Text(
    "fill the missing cells of a file",
    """\
Write DATA with its missing cells filled. All else stays as it is, to the byte in csv and tsv:
header, order of rows and columns, the text of observed cells, text and date columns. A report
says what was done with each column, and how large the error is on observed cells that were
hidden for the purpose.""",
    """\
rvi-fast impute patients.csv -o filled.csv
rvi-fast impute patients.csv -o drawn.csv --samples 5     # drawn.1.csv ... drawn.5.csv
rvi-fast impute images.npy -o filled.npy --mask observed.npy""",
)
EMBED = Text(
    "write a vector for every row of a file",
    """\
Write the embedding of every row of DATA, the mean of its posterior: columns z0, z1, ... of a
table that keeps the row labels, or an npy array.""",
    """\
rvi-fast embed patients.csv -o embedding.csv --index patient_id
rvi-fast embed train-images-idx3-ubyte.gz -o embedding.npy --latent-dim 32""",
)
DATA_KINDS = """\
DATA is a table (.csv, .tsv, .parquet: some columns of numbers, any others pass through) or an
array (.npy, .npz, or an idx file such as MNIST's: [rows, columns] or [images, height, width])."""
DEVICES = "auto, cpu, cuda, or one GPU such as cuda:1"
EXIT_CODES = "exit codes: 0 done, 1 an error (one sentence says which), 2 wrong usage, 130 interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser, commands = _parser()
    if given and given[0] in commands:
        _check_options(commands[given[0]], given[1:])
    arguments = parser.parse_args(given)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        in_parts = arguments.command in ("paper", "bench")
        kept = "the runs that ended are kept" if in_parts else "nothing was written"
        print(f"rvi-fast {arguments.command}: interrupted; {kept}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError, MemoryError) as error:
        print(f"rvi-fast {arguments.command}: {error or 'out of memory'}", file=sys.stderr)
        return 1


def _check_options(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Exit with the nearest option where one is misspelt: argparse would complain of what it lacks then, or of all."""
    known = [option for option in parser._option_string_actions if option.startswith("--")]  # no public list of them
    for argument in given:
        name = argument.partition("=")[0]
        if name == "--":
            return
        if not name.startswith("--") or " " in name or any(option.startswith(name) for option in known):
            continue
        close = difflib.get_close_matches(name, known, n=1)
        parser.error(f"there is no option {name}; " + (f"did you mean {close[0]}?" if close else "--help lists them"))


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands."""
    parser = argparse.ArgumentParser(prog="rvi-fast", description="Relay Variational Inference, fast.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser("demo", help="train on handwritten digits with half of the pixels hidden, and compare")
    _add_demo_options(demo)

    fit = _add_command(commands, "fit", FIT)
    fit.add_argument("-o", "--out", required=True, metavar="MODEL_DIR", help="folder that the model is written to")
    _add_fit_options(fit)
    _add_file_options(fit)

    impute = _add_command(commands, "impute", IMPUTE)
    impute.add_argument("-o", "--out", required=True, metavar="OUT", help="file to write, of the same kind as DATA")
    impute.add_argument(
        "--samples",
        type=_at_least(1),
        metavar="N",
        help="draw N filled versions instead of one best guess; their spread is the uncertainty. OUT gets a number "
        "before its suffix (out.1.csv, out.2.csv, ...), an npy or npz array an extra first axis",
    )
    impute.add_argument(
        "--no-estimate",
        action="store_true",
        help="do not estimate the error first (that hides a tenth of the observed cells, fills them and compares; it "
        "doubles the time)",
    )
    _add_model_option(impute)
    _add_fit_options(impute)
    _add_file_options(impute)

    embed = _add_command(commands, "embed", EMBED)
    embed.add_argument("-o", "--out", required=True, metavar="OUT", help="a .csv, .tsv, .parquet or .npy file to write")
    _add_model_option(embed)
    _add_fit_options(embed)
    _add_file_options(embed)

    paper = commands.add_parser(
        "paper",
        help="run the paper's experiments and write a page of claims and numbers",
        description="Run the experiments and write runs.csv, curves.csv, figures and a page to OUT. Runs that OUT "
        "holds already are not repeated, so a run that was interrupted goes on where it stopped.",
    )
    paper.add_argument("-o", "--out", help="folder of the results (default: rvi-fast-paper-quick or -full)")
    paper.add_argument("--quick", action="store_true", help="4,000 rows, 60 epochs, 3 seeds: 2 to 3 hours on 2 cores")
    paper.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=(),
        metavar="A,B",
        help="some of fig2, lr, scale, lazy, fig3, fig4, fig8, fig10, init, tables, images (default: all)",
    )
    paper.add_argument("--workers", type=_at_least(1), metavar="N", help="runs at once (default: one a core)")
    paper.set_defaults(run=_paper)

    from .bench.main import add_options

    add_options(commands.add_parser("bench", help="time a training step against other implementations"))

    info = commands.add_parser("info", help="versions, backend and devices")
    info.set_defaults(run=_info)
    return parser, commands.choices


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "-o", "--out", default="rvi-fast-demo", help="folder for the model and the picture (default: %(default)s)"
    )
    demo.add_argument(
        "--seed", type=_at_least(0), default=0, help="of the holes and of the model (default: %(default)s)"
    )
    demo.add_argument("--epochs", type=_at_least(1), default=None, help="training epochs (default: the library's)")
    demo.add_argument("--quiet", action="store_true", help="no progress bar")
    demo.set_defaults(run=_demo)


def _add_command(commands: Any, name: str, text: Text) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text.summary,
        description=f"{text.description}\n\n{DATA_KINDS}",
        epilog=f"example:\n{textwrap.indent(text.example, '  ')}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", help="the file to read: .csv, .tsv, .parquet, .npy, .npz or idx")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no report, errors only")
    parser.set_defaults(run=_run, parser=parser)
    return parser


def _add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="MODEL_DIR",
        help="a folder that `rvi-fast fit` wrote; columns are matched by name (default: fit a model on DATA itself)",
    )


def _add_fit_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--method", choices=("rvi", "vad", "vae"), help="rvi (default), vad (no relays), vae (encoder)")
    group.add_argument("--epochs", type=_at_least(1), metavar="N", help="training passes (default: by the data)")
    group.add_argument("--latent-dim", type=_at_least(1), metavar="N", help="numbers in a row's embedding")
    group.add_argument("--seed", type=_at_least(0), metavar="S", help="of everything random (default: 0)")
    group.add_argument(
        "--device", type=_device, default="auto", help=f"{DEVICES} (default: auto, a GPU if there is one)"
    )


def _add_file_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading DATA")
    group.add_argument(
        "--missing",
        action="append",
        default=[],
        metavar="MARKER",
        help="another mark of a missing cell, such as --missing=-999; may be repeated. Empty cells, NA, NaN, null, "
        "None, N/A and ? always are",
    )
    group.add_argument(
        "--index",
        action="append",
        default=[],
        metavar="COLUMN",
        help="a column of row labels or codes, which is kept and not learned from; may be repeated (default: the first "
        "column if its header is empty, and the index that pandas stores in parquet)",
    )
    group.add_argument("--delimiter", type=_delimiter, metavar="C", help="between cells of csv (default: found out)")
    group.add_argument(
        "--decimal", choices=(".", ","), metavar="MARK", help="decimal mark of csv and tsv, . or , (default: found out)"
    )
    group.add_argument("--no-header", action="store_true", help="the first line of csv or tsv is a row, too")
    group.add_argument("--key", metavar="NAME", help="the array of an npz file (default: its first)")
    group.add_argument(
        "--mask", metavar="MASK.npy", help="bool array of the shape of an npy, npz or idx array, True = observed"
    )


def _device(text: str) -> str:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"must be {DEVICES}; got {text!r}")
    return text


def _delimiter(text: str) -> str:
    character = {"tab": "\t", r"\t": "\t"}.get(text, text)
    if len(character) != 1 or character in '"\r\n':
        raise argparse.ArgumentTypeError(f"must be one character, or tab; got {text!r}")
    return character


def _run(arguments: argparse.Namespace) -> int:
    if getattr(arguments, "model", None) is not None:
        for name in ("method", "epochs", "latent_dim"):
            if getattr(arguments, name) is not None:
                arguments.parser.error(f"--{name.replace('_', '-')} has no effect beside --model; drop one of them")
    from . import commands

    return getattr(commands, arguments.command)(arguments)


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


def _paper(arguments: argparse.Namespace) -> int:
    from .bench.paper.main import run_paper

    size = "quick" if arguments.quick else "full"
    print(f"page: {run_paper(arguments.out, size, arguments.only, arguments.workers)}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from .info import describe

    for name, value in describe().items():
        print(f"{name:<12} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
