"""Compiled loops on disk: where they are kept, what reads them, and what is said while they are made."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="the loops are compiled by numba")
from rvi_fast.loops import jit

PROGRAM = """
import sys
import numba, numpy as np, torch
from rvi_fast.progress import progress_bar

with progress_bar(sys.argv[1] == "shown", torch.device("cpu")):
    from rvi_fast.loops.philox import uniforms
    word = np.uint64(1)
    for number in (np.float32, np.float64):
        uniforms(word, word, word, np.ones(1, np.uint64), np.ones((1, 2), number), np.ones((1, 2), number))
stats = uniforms.stats
print(stats.cache_path, sum(stats.cache_hits.values()), sum(stats.cache_misses.values()), numba.config.CACHE_DIR)
"""


@pytest.fixture
def run(tmp_path):
    """What a process prints that needs loops, and what it says on stderr."""

    def run(shown="shown", **variables):
        environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
        environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")} | variables
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, shown],
            cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.rstrip("\n").split(" "), done.stderr

    return run


def test_a_second_process_finds_what_the_first_compiled(run, tmp_path):
    (path, hits, misses, others), said = run()
    assert Path(path).is_relative_to(tmp_path / "cache" / "rvi_fast") and (hits, misses) == ("0", "2")
    assert others == ""  # libraries that are decorated next keep theirs where they did
    assert said.count("compiling loops") == 1 and str(tmp_path / "cache") in said
    (again, hits, misses, _), said = run()
    assert (again, hits, misses) == (path, "2", "0") and "compiling" not in said


def test_numbas_own_variable_says_where(run, tmp_path):
    mine = str(tmp_path / "mine")
    (path, *_, others), said = run("quiet", NUMBA_CACHE_DIR=mine)
    assert Path(path).is_relative_to(mine) and others == mine
    assert "compiling" not in said


def test_loops_run_where_nothing_can_be_written(run, tmp_path):
    (tmp_path / "cache").write_text("a file, in which no folder can be made")
    (path, *_), said = run()
    assert path == "None" and "no cache folder" in said


def test_a_change_of_any_source_leads_to_another_folder(tmp_path, monkeypatch):
    sources = tmp_path / "rvi_fast"
    shutil.copytree(Path(jit.__file__).parent, sources / "loops", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(jit.__file__).parents[1] / "reference.py", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "__file__", str(sources / "loops" / "jit.py"))
    before = jit.cache_folder()
    assert jit.cache_folder() == before
    with (sources / "loops" / "threads.py").open("a") as file:
        file.write("# changed\n")
    assert jit.cache_folder() != before
