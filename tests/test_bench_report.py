"""README's section of measurements is what the results say."""

from __future__ import annotations

import pytest

from rvi_fast.bench import calibration, imputation, inference, plots, report, results, settings
from rvi_fast.bench.contestants import DECODER, EAGER, ENTRIES, JAX, OURS
from rvi_fast.bench.main import CURVES_KEY, KEY, QUALITY_KEY
from rvi_fast.bench.race import _line, conditions

README = f"# rvi_fast\n\n{report.BEGIN}\n{report.END}\n\nMIT licence.\n"
FLOOR = {"bytes": 1, "flops": 1, "floor_us": 400.0}


def measured(workload: str, contestant: str, us: float, note: str = "", state: str = "quiet"):
    setting = settings.setting(workload, "cpu")
    entry = next(e for e in ENTRIES if e.name == contestant)
    times = {"step_us": us, "times_ours": us / 2000, "times_decoder": us / 1600} if not note else {}
    line = _line(setting, entry, {**times, "graph_us": None}, 1e-7, note, FLOOR)
    return {**line, **conditions("cpu", False, False), "state": state, "threads": 2}


@pytest.fixture
def folder(tmp_path):
    lines = [measured("paper", name, us) for name, us in ((OURS, 2000.0), (DECODER, 1600.0), (EAGER, 90_000.0))]
    lines.append(measured("paper", JAX, 0.0, note="jax is not installed"))
    lines += [measured("rows-1e4", OURS, 2000.0), measured("rows-1e4", EAGER, 1500.0)]
    lines += [measured("rows-6e4", EAGER, 77.0, state="loaded"), measured("missing-0", OURS, 55.0, state="dry")]
    results.merge(tmp_path / "steps.csv", lines, KEY)
    curve = {"data": "digits", "missing": 0.5, "contestant": OURS, "difference": 1.5e-6, "steps": 200}
    results.merge(tmp_path / "curves.csv", [{**curve, **conditions("cpu", False, False)}], CURVES_KEY)
    quality = {"data": "digits", "rows": 1797, "missing": 0.5, "implementation": OURS, "target": 0.1, "seconds": 3.25}
    results.merge(tmp_path / "quality.csv", [{**quality, **conditions("cpu", False, False)}], QUALITY_KEY)
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def run(folder, *arguments):
    return report.main(["--readme", str(folder / "README.md"), "--results", str(folder), *arguments])


def test_the_repositorys_readme_says_what_its_results_say(capsys):
    if not (results.HERE.parent / "README.md").exists():
        pytest.skip("rvi_fast is installed without its sources")
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_a_written_section_passes_the_check(folder, capsys):
    assert run(folder, "--check") == 1
    assert run(folder) == 0 and run(folder, "--check") == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("# rvi_fast\n") and text.endswith("\n\nMIT licence.\n")
    assert "| eager, Adam(fused) | dense Adam | 90 | 45 |" in text
    assert "jax is not installed" in text and "3.25 s" in text and "1.5e-06" in text
    assert "Ours takes 1.25 times the step of the bare decoder" in text
    capsys.readouterr()


def test_a_race_that_we_lose_is_shown(folder):
    run(folder)
    (row,) = [x for x in (folder / "README.md").read_text().splitlines() if x.startswith("| rows-1e4 |")]
    assert "| 0.75 |" in row


def test_a_changed_number_fails_the_check(folder, capsys):
    run(folder)
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("| 90 | 45 |", "| 90 | 54 |"))
    assert run(folder, "--check") == 1
    sentence = capsys.readouterr().err
    assert "| 54 |" in sentence and "| 45 |" in sentence and sentence.count("\n") == 1


def test_a_changed_result_fails_the_check(folder):
    run(folder)
    results.merge(folder / "steps.csv", [measured("paper", EAGER, 91_000.0)], KEY)
    assert run(folder, "--check") == 1


def test_loaded_and_dry_rows_are_not_reported(folder):
    run(folder)
    text = (folder / "README.md").read_text()
    assert "rows-6e4" not in text and "missing-0" not in text


def test_without_results_the_section_says_so(tmp_path):
    (tmp_path / "README.md").write_text(README)
    assert run(tmp_path) == 0 and run(tmp_path, "--check") == 0
    assert "No measurement" in (tmp_path / "README.md").read_text()


def test_a_readme_without_markers_is_an_error(tmp_path, capsys):
    (tmp_path / "README.md").write_text("# rvi_fast\n")
    assert run(tmp_path, "--check") == 1 and report.BEGIN in capsys.readouterr().err


def test_plots_over_rows_and_batch(folder):
    pytest.importorskip("matplotlib")
    results.merge(folder / "steps.csv", [measured("rows-1e6", OURS, 2100.0), measured("batch-64", OURS, 900.0)], KEY)
    assert [path.name for path in plots.plot(folder)] == ["steps-rows.png", "steps-batch.png"]
    lines = [line for line in results.read(folder / "steps.csv") if line["state"] == "quiet" and line["step_us"]]
    assert plots.curves_of(lines, "batch") == {OURS: [(64.0, 0.9), (256.0, 2.0)]}
    with pytest.raises(ValueError, match="no times"):
        plots.plot(folder, states=("unknown",))


def test_a_loaded_line_takes_no_quiet_ones_place(tmp_path):
    path, key = tmp_path / "steps.csv", ("workload", "contestant")
    line = {"workload": "paper", "contestant": "ours", "state": "quiet", "step_us": 4000.0}
    results.merge(path, [line], key)
    results.merge(
        path, [line | {"state": "loaded", "step_us": 9000.0}, line | {"contestant": "JAX", "state": "loaded"}], key
    )
    assert [(kept["contestant"], kept["state"], kept["step_us"]) for kept in results.read(path)] == [
        ("ours", "quiet", "4000"),
        ("JAX", "loaded", "4000"),
    ]
    results.merge(path, [line | {"step_us": 3000.0}], key)
    assert {kept["step_us"] for kept in results.read(path)} == {"3000", "4000"}


def test_the_docs_say_what_the_parts_took():
    cpu_parts = pytest.importorskip("rvi_fast.bench.cpu_parts", reason="the loops are compiled by numba")
    root = results.HERE.parent
    parts = results.read(root / "bench" / "results" / "cpu" / "parts.csv")
    assert [part["part"] for part in parts] == [name for name, *_ in cpu_parts.parts()]
    docs = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    for part in parts:
        line = f"| {part['part']} | {float(part['equations_us']):.0f} | {float(part['step_us']):.0f} |"
        assert line in docs


def test_the_docs_say_how_new_rows_fare():
    """Rows a second, coverage of intervals, and errors beside PPCA."""
    folder = results.HERE / "results" / "cpu"
    docs = (results.HERE.parent / "docs" / "inference.md").read_text(encoding="utf-8").splitlines()
    covered = calibration.table(results.read(folder / "calibration.csv"))
    beside = inference.error_table(results.read(folder / "errors.csv"))
    speeds = inference.table(results.read(folder / "inference.csv"))
    assert len(covered) == 2 * (len(calibration.TABLES) + 1) and len(beside) == len(inference.PPCA) and len(speeds) > 9
    assert set(covered + beside + speeds) <= set(docs)


def test_the_docs_say_how_holes_are_filled():
    lines = results.read(results.HERE / "results" / "cpu" / "imputation.csv")
    docs = (results.HERE.parent / "docs" / "tables.md").read_text(encoding="utf-8").splitlines()
    for column in ("mse", "new_rows_mse", "seconds"):
        assert set(imputation.docs_table(lines, column)) <= set(docs)


def test_the_docs_say_how_many_launches_there_are():
    found: dict[str, int] = {}
    for line in results.read(results.HERE / "results" / "static" / "launches.csv"):
        if not line["operation"].startswith("in the graph"):
            found[line["step"]] = found.get(line["step"], 0) + int(line["launches"])
    docs = (results.HERE.parent / "docs" / "performance.md").read_text(encoding="utf-8").replace("\n", " ")
    foreach, fused, apart, ours, captured = found.values()
    assert f"{foreach} a step for eager PyTorch with foreach Adam ({fused} with fused)" in docs
    assert (
        f"{apart} for our own operators on the torch backend, {ours} for `ElboStep`, and {captured} for `fit`" in docs
    )
