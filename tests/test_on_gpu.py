"""bench/on_gpu.sh goes through all its steps without a GPU; what may be reported, and how it is computed."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest
import torch

from rvi_fast.bench import gpu_tests, operators, timing, workloads
from rvi_fast.bench.timing import Contestant, Spread
from rvi_fast.dispatch import KERNELS

SCRIPT = Path(operators.__file__).resolve().parent / "on_gpu.sh"


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    run = subprocess.run([SCRIPT, "--dry", out], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return out, run.stdout


def test_a_dry_run_writes_all_files(dry_run):
    out, printed = dry_run
    operator_files = ("environment.json", "tests.csv", "operators.csv", "log.txt")
    assert {path.name for path in out.iterdir()} == {*operator_files, "steps.csv"}
    assert json.loads((out / "environment.json").read_text())["copy_gb_per_s"] > 0
    assert set(rows(out / "tests.csv")[0]) == set(gpu_tests.Verdict._fields)
    lines = rows(out / "operators.csv")
    assert set(lines[0]) == set(operators.Line._fields)
    assert all(operator in printed for operator in KERNELS)


def test_a_dry_run_times_every_operator_against_its_peers(dry_run):
    lines = rows(dry_run[0] / "operators.csv")
    assert {line["operator"] for line in lines} == KERNELS
    notes = {line["note"] for line in lines if not line["note"].startswith(("tests: ", "over 100 %"))}
    assert notes <= {"", "absent", "no workload"}, (dry_run[0] / "log.txt").read_text()
    for operator in {line["operator"] for line in lines if line["bytes"]}:
        contestants = {line["contestant"] for line in lines if line["operator"] == operator}
        assert {"rvi_fast", "eager"} < contestants and len(contestants) > 2
    assert all(float(line["cold_us"]) > 0 for line in lines if line["bytes"])


def test_a_dry_run_reports_no_ratio(dry_run):
    """Its tests were skipped, and speeds of the twins mean nothing."""
    assert not any(line["times_ours"] or line["cold_times_ours"] for line in rows(dry_run[0] / "operators.csv"))


@pytest.mark.parametrize("tests", ["failed", "skipped", "none", "out of time", "not run"])
def test_no_ratio_without_passing_tests(tests):
    theirs, ours = Spread(10.0, 9.0, 11.0), Spread(4.0, 4.0, 4.0)
    assert operators.ratio(theirs, ours, tests) is None
    assert operators.ratio(theirs, ours, "passed") == 2.5
    assert operators.ratio(None, ours, "passed") is operators.ratio(theirs, None, "passed") is None


@pytest.mark.parametrize(
    "counts, status",
    [
        ("tests='5' failures='0' errors='0' skipped='2'", "passed"),
        ("tests='5' failures='1' errors='0' skipped='2'", "failed"),
        ("tests='5' failures='0' errors='1' skipped='2'", "failed"),
        ("tests='5' failures='0' errors='0' skipped='5'", "skipped"),
        ("tests='0' failures='0' errors='0' skipped='0'", "none"),
    ],
)
def test_verdicts(tmp_path, counts, status):
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite {counts} time='1.5'/></testsuites>")
    verdict = gpu_tests.counted("idea", tmp_path / "report.xml")
    assert verdict.status == status and verdict.seconds == 1.5


def test_marked_tests_count(tmp_path, monkeypatch):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = triton\n")
    (tmp_path / "test_good.py").write_text(
        "import pytest\n@pytest.mark.triton\ndef test_it():\n    pass\ndef test_on_cpu():\n    assert False\n"
    )
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    monkeypatch.setattr(gpu_tests, "TESTS", tmp_path / "tests")
    monkeypatch.setattr(gpu_tests, "files_of", lambda operator: sorted(tmp_path.glob(f"test_{operator}.py")))
    verdicts = gpu_tests.run_all(["good", "broken", "missing"], tmp_path, limit=60)
    assert verdicts["good"][1:3] == ("passed", 1)
    assert gpu_tests.read(tmp_path) == {"good": "passed", "broken": "failed", "missing": "none"}
    assert "nothing_of_this_name" in (tmp_path / "log.txt").read_text()


def test_tests_that_hang_are_stopped(tmp_path, monkeypatch):
    (tmp_path / "test_idea.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(gpu_tests, "files_of", lambda operator: [tmp_path / "test_idea.py"])
    assert gpu_tests.run("idea", limit=0.5)[0].status == "out of time"


def test_tests_of_an_operator_carry_its_name():
    assert "test_philox_normal.py" in [path.name for path in gpu_tests.files_of("philox_normal")]
    assert "test_row_adam.py" in [path.name for path in gpu_tests.files_of("row_adam_")]


def test_line_counts_rates_and_flags_the_impossible():
    workload = workloads.philox_normal(64)._replace(bytes=1_000_000, flops=2_000_000)
    ours, theirs = Contestant("rvi_fast", []), Contestant("eager", [])
    ours.cold_us, ours.graph_us, theirs.cold_us = [30.0], [9.0, 10.0, 11.0], [60.0]
    line = operators.line(workload, ours, ours, copy_gb_per_s=200.0, tests="passed")
    assert (line.graph_us, line.graph_low, line.graph_high) == (10.0, 9.5, 10.5)
    assert line.gb_per_s == 100.0 and line.percent_of_copy == 50.0 and line.tflop_per_s == 0.2 and line.note == ""
    assert "over 100 %" in operators.line(workload, ours, ours, copy_gb_per_s=50.0, tests="passed").note
    peer = operators.line(workload, theirs, ours, copy_gb_per_s=200.0, tests="passed")
    assert peer.times_ours is None and peer.cold_times_ours == 2.0


def test_a_contestant_that_fails_leaves_the_others_timed():
    def fails() -> None:
        raise ValueError("no such thing\nand more")

    good, bad = Contestant("good", [lambda: None]), Contestant("bad", [fails])
    timing.compare(timing.Cpu(), [bad, good], call_bytes=1, seconds=0.0)
    assert bad.note == "ValueError: no such thing" and not bad.cold_us
    assert len(good.cold_us) == timing.ROUNDS[0]


def test_a_call_has_forward_and_backward():
    weight, x = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0])
    call = workloads.differentiated(lambda weight, x: weight * x, {"weight": weight, "x": x}, ["weight"])
    (first,), (second,) = call(), call()
    assert torch.equal(first, second) and first.shape == (2,)
    assert not weight.requires_grad


def test_a_process_that_ends_early_is_a_line(tmp_path):
    (tmp_path / "environment.json").write_text("{")
    operators.time_apart(["philox_normal"], tmp_path, dry=True, limit=60)
    (line,) = rows(tmp_path / "operators.csv")
    assert line["operator"] == "philox_normal" and "exit status 1" in line["note"]
