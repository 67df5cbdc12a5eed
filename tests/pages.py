"""The python blocks of the README and of docs/: they run as they stand, one after the other."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from rvi_fast import data

ROOT = Path(__file__).parent.parent
PACKAGES = ("accelerate", "anndata", "lightning", "polars")  # that a block may import and a user may not have


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text(page), flags=re.DOTALL)


def needs(block: str) -> list[str]:
    """What a block asks for beyond the test extra."""
    packages = [p for p in PACKAGES if f"import {p}" in block or f"from {p}" in block]
    return packages + [need for need in ("fashion_mnist", "torch.compile") if need in block]


def skip_without(need: str) -> None:
    if need == "torch.compile":
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            pytest.skip("torch.compile needs a C++ compiler")
    elif need == "fashion_mnist":
        try:
            data.fashion_mnist("train")
        except FileNotFoundError as error:
            pytest.skip(str(error))
    else:
        pytest.importorskip(need)


def run(page: str, need: str | None = None, names: dict[str, object] | None = None) -> dict[str, object]:
    """The names that the page's blocks leave behind: those that need nothing more, or the ones with this need."""
    names = {} if names is None else dict(names)
    for block in blocks(page):
        if needs(block) == ([] if need is None else [need]):
            exec(compile(block, page, "exec"), names)
    return names
