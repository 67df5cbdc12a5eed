"""The README's examples run as they stand, one after the other."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    assert len(EXAMPLES) == 3
    names: dict[str, object] = {}
    for example in EXAMPLES:
        exec(compile(example, str(README), "exec"), names)
    error = float(re.search(r"hidden cells: (\d+\.\d+)", capsys.readouterr().out)[1])
    assert error < 0.3
    assert names["draws"].shape == (20, 5, 30)
    assert names["again"].get_params() == names["model"].get_params()


def test_the_test_command_is_what_ci_runs():
    command = next(line for line in README.read_text(encoding="utf-8").splitlines() if line.endswith("&& pytest"))
    ci = (README.parent / ".ci" / "run").read_text(encoding="utf-8")
    install = command.split(" && ")[2]
    assert install.removeprefix("pip install ") in ci and "\npytest" in ci
