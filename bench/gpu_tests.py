"""Which operators' tests pass on this machine: a speed is reported only beside a passing test.

An operator's tests are tests/test_<operator>*.py; of these, the ones marked triton or gpu count.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent.parent / "tests"
PASSED = "passed"
NO_TESTS = 5  # pytest's exit status where none was collected


class Verdict(NamedTuple):
    """What became of an operator's tests."""

    operator: str
    status: str  # passed, failed, skipped, none, out of time
    passed: int = 0
    failed: int = 0  # and errors
    skipped: int = 0
    seconds: float = 0.0


def files_of(operator: str, folder: Path = TESTS) -> list[Path]:
    return sorted(folder.glob(f"test_{operator.rstrip('_')}*.py"))


def counted(operator: str, report: Path) -> Verdict:
    """The verdict by pytest's junit report."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    tests, bad, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites for key in keys)
        for keys in (("tests",), ("failures", "errors"), ("skipped",))
    )
    passed = tests - bad - skipped
    status = "failed" if bad else PASSED if passed else "skipped" if skipped else "none"
    return Verdict(operator, status, passed, bad, skipped, sum(float(suite.get("time", 0)) for suite in suites))


def run(operator: str, limit: float) -> tuple[Verdict, str]:
    """Run an operator's tests in a process of their own. Returns what it printed, too."""
    files = files_of(operator)
    if not files:
        return Verdict(operator, "none"), ""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "triton or gpu"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        try:
            process = subprocess.run(
                [*command, f"--junitxml={report}", *map(str, files)],
                cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            return Verdict(operator, "out of time", seconds=limit), str(error.output or "")
        verdict = counted(operator, report) if report.exists() else Verdict(operator, "failed")
    if process.returncode not in (0, NO_TESTS) and verdict.status == PASSED:
        verdict = verdict._replace(status="failed")
    return verdict, process.stdout


def run_all(operators: Sequence[str], out: Path, limit: float) -> dict[str, Verdict]:
    """Every operator's tests, several processes at once; OUT/tests.csv, with what they print in OUT/log.txt."""
    with ThreadPoolExecutor(max(2, min(8, (os.cpu_count() or 1) // 2))) as pool:
        runs = list(pool.map(run, operators, [limit] * len(operators)))
    with (out / "log.txt").open("a") as file:
        file.writelines(f"\n--- tests: {verdict.operator}\n{text}" for verdict, text in runs)
    verdicts = [verdict for verdict, _ in runs]
    with (out / "tests.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Verdict._fields)
        writer.writerows(verdict._replace(seconds=round(verdict.seconds, 1)) for verdict in verdicts)
    return {verdict.operator: verdict for verdict in verdicts}


def read(out: Path) -> dict[str, str]:
    """Operator -> status, from OUT/tests.csv."""
    with (out / "tests.csv").open(newline="") as file:
        return {row["operator"]: row["status"] for row in csv.DictReader(file)}
