"""What is installed: every package, nothing that shadows another, and no dependency that was not meant."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rvi_fast

ROOT = Path(rvi_fast.__file__).resolve().parents[1]
if not (ROOT / "pyproject.toml").exists():
    pytest.skip("rvi_fast is installed without its sources", allow_module_level=True)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def test_every_package_folder_is_listed():
    folders = {SETUPTOOLS["package-dir"].get(package, package.replace(".", "/")) for package in SETUPTOOLS["packages"]}
    holding_python = {
        file.parent.relative_to(ROOT).as_posix()
        for top in ("rvi_fast", "kernels", "bench")
        for file in (ROOT / top).rglob("*.py")
    }
    through_symlinks = {
        folder for folder in holding_python if folder.startswith(("rvi_fast/kernels", "rvi_fast/bench"))
    }
    assert holding_python - through_symlinks == folders


@pytest.mark.parametrize("name", ["kernels", "bench"])
def test_symlink_makes_a_bare_checkout_importable(name):
    link = ROOT / "rvi_fast" / name
    assert link.is_symlink() and link.resolve() == ROOT / name


def test_kernels_leaves_its_top_level_name_to_others():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    program = (
        "import importlib.util as u; spec = u.find_spec('kernels'); assert spec is None or spec.origin is None, spec"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_types_are_shipped():
    assert (ROOT / "rvi_fast" / "py.typed").exists()
    assert "py.typed" in SETUPTOOLS["package-data"]["rvi_fast"]


def test_core_dependencies_are_four():
    names = [re.split(r"[^\w-]", requirement)[0] for requirement in PYPROJECT["project"]["dependencies"]]
    assert names == ["torch", "numpy", "safetensors", "tqdm"]


def test_import_needs_nothing_but_the_core_dependencies():
    extras = ["triton", "numba", "sklearn", "pandas", "matplotlib", "pytest"]
    program = f"import sys; sys.modules.update(dict.fromkeys({extras})); import rvi_fast"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_version_is_that_of_the_package():
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "rvi_fast.__version__"}
    try:
        installed = importlib.metadata.version("rvi_fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("a bare checkout")
    assert installed == rvi_fast.__version__
