"""Runs and saves that are killed lose nothing; `python -m rvi_fast.bench.kills --kills 50` does it at length."""

import shutil
import signal

import pytest

from rvi_fast.bench import kills

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


def test_random_kills_lose_nothing(tmp_path):
    tally = kills.run(tmp_path, kills=6, seed=0)
    assert tally.kills.total() == 6 and tally.kills["save"] == 2 and tally.fits >= 1
    assert {path.suffix for path in (tmp_path / "fit-0").iterdir()} == {".json", ".safetensors"}


def test_a_kill_at_any_point_of_a_write_loses_nothing(tmp_path):
    """Before every second use of the folder, from the start of a resumed fit until its first checkpoint is done."""
    whole, first = tmp_path / "whole", tmp_path / "first"
    kills.finish(kills.fit, whole)
    kills.finish(kills.fit, first, None, 90)
    steps = []
    while steps.count(93) < 7:
        folder = tmp_path / f"killed-{len(steps)}"
        shutil.copytree(first, folder)
        process = kills.start(kills.fit, folder, None, None, 2 * len(steps) + 1)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kills.check_files(folder)
        steps.append(kills.step_of(folder))
        if len(steps) % 5 == 0:
            kills.finish(kills.fit, folder)
            assert kills.same_end(folder, whole)
            assert len(list(folder.iterdir())) == 4
    assert steps == sorted(steps) and set(steps) == {90, 93} and steps.count(90) > 15
