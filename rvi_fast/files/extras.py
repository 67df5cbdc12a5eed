"""The packages that only some kinds of files need."""

from __future__ import annotations

import importlib
from typing import Any


def extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this kind of file needs {module}; run pip install 'rvi_fast[files]'") from error
