"""Writes the section of README.md between its markers from the results, or checks that it says what they say.

python -m rvi_fast.bench.report [--check]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import results
from .contestants import APART, DECODER, EAGER, ENTRIES, JAX, KEPT, OURS, SPARSE
from .curves import ROUNDING, TOLERANCE
from .settings import settings

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COMMAND = "python -m rvi_fast.bench"
RATIOS = {
    EAGER: "eager dense Adam (fused)",
    KEPT: "the same, gradients kept",
    JAX: "JAX dense Adam",
    SPARSE: "SparseAdam (lazy)",
    APART: "ours, step apart",
}
Rows = Sequence[dict[str, str]]


def section(folder: Path) -> str:
    """What stands between the markers."""
    steps, curves, quality = (_quiet(results.read(folder / f"{name}.csv")) for name in ("steps", "curves", "quality"))
    if not steps:
        return f"No measurement from a quiet machine is kept yet; `{COMMAND}` makes one.\n"
    parts = [_machine(steps), *_paper(steps), *_workloads(steps), *_curves(curves), *_quality(quality), _made()]
    return "\n".join(parts)


def _quiet(lines: Rows) -> Rows:
    """Without what was measured under load; workloads and contestants in their own order."""
    order = [*(s.name for s in settings("cuda")), *(e.name for e in ENTRIES)]
    places = {name: place for place, name in enumerate(order)}

    def place(line: dict[str, str]) -> tuple[int, ...]:
        return tuple(places.get(line.get(key, ""), len(order)) for key in ("workload", "contestant"))

    return sorted((line for line in lines if line["state"] == "quiet"), key=place)


def grouped(lines: Rows, *keys: str) -> list[tuple[tuple[str, ...], list[dict[str, str]]]]:
    """Lines that agree in the keys, together."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in lines:
        found.setdefault(tuple(line[key] for key in keys), []).append(line)
    return list(found.items())


def _machine(steps: Rows) -> str:
    machines = sorted({f"{line['machine']}; {line['versions']}" for line in steps})
    return (
        f"Measured on {' and on '.join(machines)}. All contestants of a workload take turns in one process and see the "
        f"same data; times are medians. One that claims dense Adam is timed only if its loss differs from that of "
        f"eager dense Adam in float64 by at most {TOLERANCE:g}, or by {ROUNDING:g} times as much as eager float32. "
        f"rvi_fast's step is one call (fused), or forward, backward and the optimiser's step (apart). A first call "
        f"includes compilation; rvi_fast keeps what it has compiled on disk, so that only the first process waits for "
        f"it.\n"
    )


def _paper(steps: Rows) -> Iterator[str]:
    """Every contestant in the paper's setting."""
    for threads in sorted({int(line["threads"]) for line in steps if line["workload"] == "paper"}, reverse=True):
        lines = [line for line in steps if line["workload"] == "paper" and int(line["threads"]) == threads]
        yield (
            f"A training step in the paper's setting (N = {int(lines[0]['num_rows']):,}, {lines[0]['columns']} "
            f"columns, batch {lines[0]['batch']}, half of the cells missing), {_threads(threads)}:\n"
        )
        yield "| | algorithm | ms a step | its time / ours | first call | memory beside the data |"
        yield "|---|---|---|---|---|---|"
        for line in lines:
            name = f"**{line['contestant']}**" if line["contestant"] == OURS else line["contestant"]
            cells = _ms(line), _ratio(line), _unit(line["first_call_s"], "s"), _unit(line["peak_mb"], "MB")
            yield f"| {name} | {line['algorithm']} | {' | '.join(cells)} |"
        yield _against_decoder(lines)


def _against_decoder(lines: Rows) -> str:
    ours = next((line for line in lines if line["contestant"] == OURS and line["times_decoder"]), None)
    if ours is None:
        return ""
    floor = float(ours["percent_of_floor"])
    return (
        f"\nOurs takes {float(ours['times_decoder']):.2f} times the step of the bare decoder (forward, loss, backward, "
        f"Adam). At this machine's rates of copies and matrix products, what a step must move and multiply would take "
        f"{floor:.0f} % of its time.\n"
    )


def _workloads(steps: Rows) -> Iterator[str]:
    """Ours in every workload, and what the others need of it. A ratio below 1 is a race that we lose."""
    threads = max(int(line["threads"]) for line in steps)
    rows = [line for line in steps if int(line["threads"]) == threads]
    yield f"One thing changed at a time, {_threads(threads)}: our milliseconds, and the time of others over ours.\n"
    yield f"| workload | N | batch | ours | {' | '.join(RATIOS.values())} | ours / bare decoder |"
    yield f"|---|---|---|---|{'---|' * len(RATIOS)}---|"
    for (workload,), group in grouped(rows, "workload"):
        lines = {line["contestant"]: line for line in group}
        ours = lines.get(OURS)
        if ours is None or not ours["step_us"]:
            continue
        ratios = [_ratio(lines[name]) if name in lines else "-" for name in RATIOS]
        decoder = f"{float(ours['times_decoder']):.2f}" if DECODER in lines and ours["times_decoder"] else "-"
        size = f"{int(ours['num_rows']):,} | {int(ours['batch']):,}"
        yield f"| {workload} | {size} | {_ms(ours)} | {' | '.join(ratios)} | {decoder} |"
    yield ""
    yield from _left_out(rows)


def _left_out(rows: Rows) -> Iterator[str]:
    """Who has no time, and why."""
    reasons = sorted({(line["workload"], line["contestant"], line["note"]) for line in rows if not line["step_us"]})
    if reasons:
        yield "Left out: " + "; ".join(f"{who} in {workload} ({why})" for workload, who, why in reasons) + ".\n"


def _curves(curves: Rows) -> Iterator[str]:
    for (data, missing), lines in grouped(curves, "data", "missing"):
        found = ", ".join(f"{x['contestant']} {float(x['difference']):.1e}" for x in lines if x["difference"])
        yield (
            f"Largest relative difference of the loss from eager dense Adam in float64, {lines[0]['steps']} steps, "
            f"{data}, {float(missing):.0%} missing: {found}.\n"
        )


def _quality(quality: Rows) -> Iterator[str]:
    for _, lines in grouped(quality, "data", "rows", "threads"):
        q = lines[0]
        found = ", ".join(f"{x['implementation']} {_unit(x['seconds'], 's') or 'not reached'}" for x in lines)
        yield (
            f"Seconds of training until RVI has the elastic error on missing cells with which a tuned VAD ends "
            f"({float(q['target']):.4f}; {q['data']}, {int(q['rows']):,} rows, {float(q['missing']):.0%} missing, "
            f"{_threads(int(q['threads']))}): {found}.\n"
        )


def _made() -> str:
    return (
        f"`{COMMAND}` measures (`--curves`, `--quality`), `{COMMAND}.report` writes this section; every number is in "
        "[bench/results](bench/results/README.md).\n"
    )


def _ms(line: dict[str, str]) -> str:
    us = line.get("graph_us") or line["step_us"]
    return f"{float(us) / 1e3:.3g}" if us else line["note"]


def _ratio(line: dict[str, str]) -> str:
    return f"{float(line['times_ours']):.3g}" if line["times_ours"] else "-"


def _unit(number: str, unit: str) -> str:
    return f"{float(number):.3g} {unit}" if number else ""


def _threads(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def split(readme: str) -> tuple[str, str, str]:
    """What stands before, between and behind the markers."""
    before, begin, rest = readme.partition(BEGIN + "\n")
    inside, end, behind = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}, in this order")
    return before + begin, inside, end + behind


def check(readme: str, folder: Path) -> str:
    """One sentence where they disagree, or nothing."""
    _, inside, _ = split(readme)
    for found, expected in itertools.zip_longest(inside.splitlines(), section(folder).splitlines()):
        if found != expected:
            return (
                f"README.md and {folder} disagree: README has {found or 'nothing'!r} where the results say "
                f"{expected or 'nothing'!r}; run {COMMAND}.report"
            )
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="README.md's section of measurements, from the results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where they disagree")
    parser.add_argument("--readme", type=Path, default=results.HERE.parent / "README.md")
    parser.add_argument("--results", type=Path, default=results.HERE / "results" / "cpu", metavar="FOLDER")
    arguments = parser.parse_args(argv)
    try:
        readme = arguments.readme.read_text(encoding="utf-8")
        if not arguments.check:
            before, _, behind = split(readme)
            arguments.readme.write_text(before + section(arguments.results) + behind, encoding="utf-8")
            return 0
        disagreement = check(readme, arguments.results)
    except (OSError, ValueError) as error:
        disagreement = str(error)
    if disagreement:
        print(f"bench.report: {disagreement}", file=sys.stderr)
    return 1 if disagreement else 0


if __name__ == "__main__":
    sys.exit(main())
