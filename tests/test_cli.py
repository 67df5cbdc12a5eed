import subprocess
import sys

import numpy as np
import pytest
import torch

import rvi_fast
from rvi_fast import RVI, cli, data


def test_demo_trains_compares_and_writes(tmp_path, capsys):
    assert cli.main(["demo", "-o", str(tmp_path / "out"), "--quiet"]) == 0
    lines = {line[:22].strip(): line[22:].split() for line in capsys.readouterr().out.splitlines()}
    errors = {name: float(lines[name][0]) for name in ("column means", "5 nearest neighbours", "low-rank EM", "RVI")}
    assert 0.9 < errors["column means"] < 1.1
    assert errors["RVI"] < errors["low-rank EM"] < errors["column means"]
    assert (tmp_path / "out" / "digits.png").read_bytes()[:4] == b"\x89PNG"
    model = RVI.load(tmp_path / "out" / "model")
    assert model.embed().shape[0] == len(data.digits()[0]) and np.isfinite(model.embed()).all()


def test_info_names_versions_backend_and_devices(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert rvi_fast.__version__ in out and "cpu" in out and "backend" in out and "torch" in out


@pytest.mark.parametrize("value", ["triton", "cuda"])
def test_info_works_where_the_chosen_backend_does_not(monkeypatch, capsys, value):
    monkeypatch.setenv("RVI_FAST_BACKEND", value)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["info"]) == 0
    assert "backend      unusable: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seed", "-1"], "argument --seed: must be at least 0; got -1"),
        (["--epochs", "0"], "argument --epochs: must be at least 1; got 0"),
        (["--epochs", "many"], "argument --epochs: must be a whole number; got 'many'"),
    ],
)
def test_bad_numbers_are_named(capsys, arguments, sentence):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", *arguments])
    assert sentence in capsys.readouterr().err


def test_help_and_errors_are_for_people(tmp_path, capsys):
    for arguments in (["--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main(arguments)
    assert "digits" in capsys.readouterr().out
    for arguments in ([], ["dance"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "-o", str(tmp_path / "file" / "x"), "--quiet"]) == 1
    assert "rvi-fast demo: " in capsys.readouterr().err


def test_the_module_runs_as_a_command():
    out = subprocess.run(
        [sys.executable, "-m", "rvi_fast.cli", "info"], capture_output=True, text=True, check=True
    ).stdout
    assert rvi_fast.__version__ in out


def test_importing_is_lazy_about_extras():
    code = "import sys, rvi_fast; print([m for m in ('triton', 'sklearn', 'pandas', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
