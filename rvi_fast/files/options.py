"""How to read a file, where its name and content do not say."""

from __future__ import annotations

import dataclasses
import re

# A whole number with a leading zero is a code, not a number.
NUMBER = r"[+-]?(?:0|[1-9][0-9]*|[0-9]+{mark}[0-9]*|{mark}[0-9]+)(?:[eE][+-]?[0-9]+)?"


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How to read a file, where its name and content do not say."""

    delimiter: str | None = None
    decimal: str | None = None
    missing: tuple[str, ...] = ()
    index: tuple[str, ...] = ()
    header: bool = True
    key: str | None = None
    mask: str | None = None

    @property
    def missing_numbers(self) -> list[float]:
        return [float(marker) for marker in self.missing if re.fullmatch(NUMBER.format(mark=r"\."), marker)]
