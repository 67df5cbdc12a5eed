"""Every kernel compiled for GPUs that are not here (bench/static.py): registers, spills, shared memory, no atomics.

An own process from the interpreter's: TRITON_INTERPRET=1 replaces the compiler.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl  # noqa: E402

import rvi_fast.kernels.philox  # noqa: E402
from rvi_fast.bench import static  # noqa: E402


@pytest.fixture(scope="module")
def rows():
    return static.report()


@pytest.mark.parametrize("case", static.CASES, ids=lambda case: case.name)
def test_keeps_its_budget_on_every_target(rows, case):
    measured = [row for row in rows if row.case == case.name]
    assert {row.target for row in measured} == set(case.targets)
    assert [(row.kernel, row.target, wrong) for row in measured for wrong in static.problems(case, row)] == []


def test_names_of_cases_differ():
    names = [case.name for case in static.CASES]
    assert len(set(names)) == len(names)


def device_functions() -> Iterator[ast.FunctionDef]:
    for file in Path(rvi_fast.kernels.philox.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                yield node


def test_every_kernel_is_launched_by_a_case(rows):
    kernels = {f.name for f in device_functions() if f.name.endswith("_kernel")}
    assert kernels == {row.kernel for row in rows}


def test_no_kernel_unpacks_a_tuple_in_a_tuple():
    """Triton 3.6 knows no such targets."""
    targets = [
        (function.name, ast.unparse(node))
        for function in device_functions()
        for node in ast.walk(function)
        if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Store)
        if any(isinstance(inner, ast.Tuple) for inner in node.elts)
    ]
    assert targets == []


@triton.jit
def wide_kernel(ptr, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(ptr + row[:, None] * stride + tl.arange(0, BLOCK)[None, :], 1.0)


@triton.jit
def counted_kernel(ptr, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(ptr + row, 1.0)
    for at in range(tl.program_id(0), stride, BLOCK):
        tl.store(ptr + at * BLOCK, 2.0)


@triton.jit
def narrow_kernel(ptr, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(ptr + row[:, None] * stride + tl.arange(0, BLOCK)[None, :], 1.0)


@triton.jit
def widened_late_kernel(ptr, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    start = (tl.program_id(0) * stride).to(tl.int64) + tl.arange(0, BLOCK)
    tl.store(ptr + start, 1.0)


@triton.jit
def narrow_loop_kernel(ptr, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    for row in range(tl.program_id(0), ROWS, tl.num_programs(0)):
        tl.store(ptr + row * stride + tl.arange(0, BLOCK), 1.0)


@triton.jit
def atomic_kernel(ptr, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    tl.atomic_add(ptr + tl.arange(0, BLOCK), 1.0)


@pytest.mark.parametrize(
    "kernel, says",
    [
        (wide_kernel, []),
        (counted_kernel, []),
        (narrow_kernel, ["32-bit"]),
        (widened_late_kernel, ["32-bit"]),
        (narrow_loop_kernel, ["32-bit"]),
        (atomic_kernel, ["atomic"]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_finds_narrow_addresses_and_atomics(monkeypatch, kernel, says, target):
    def launch() -> None:
        kernel[(4,)](static.f32(64), 303, ROWS=8, BLOCK=16, enable_fp_fusion=True)

    case = static.Case("one", launch, registers=255, shared=1 << 16)
    monkeypatch.setattr(static, "CASES", [case])
    (row,) = static.measure("one", target)
    found = static.problems(case, row)
    assert len(found) == len(says) and all(word in text for word, text in zip(says, found, strict=True)), found


def test_a_launch_is_compiled_as_it_is_called(monkeypatch):
    """Types, specialisation, warps: of the call, on the CPU tensors given."""

    def launch() -> None:
        wide_kernel[(1,)](torch.empty(64, dtype=torch.bfloat16), 304, ROWS=4, BLOCK=16, num_warps=8)

    monkeypatch.setattr(static, "CASES", [static.Case("one", launch)])
    with static.compiled_for("sm_90") as found:
        launch()
    (name, binary, _seconds) = found[0]
    assert name == "wide_kernel" and binary.metadata.num_warps == 8
    assert "!tt.ptr<bf16> {tt.divisibility = 16 : i32}" in binary.asm["ttir"]
    assert "i32 {tt.divisibility = 16 : i32}" in binary.asm["ttir"].split("bf16>", 1)[1]


def test_budgets_speak(monkeypatch):
    (row,) = static.measure(static.CASES[0].name, "sm_90")
    case = static.CASES[0]._replace(registers=row.registers - 1)
    assert static.problems(case, row) == [f"registers {row.registers} > {row.registers - 1}"]
    assert static.problems(case, row._replace(occupancy=0.0))[-1] == "a program does not fit"


def test_occupancy():
    assert static.occupancy("sm_90", registers=32, warps=4, shared=0) == 1.0
    assert static.occupancy("sm_90", registers=255, warps=8, shared=0) == 0.125
    assert static.occupancy("sm_90", registers=32, warps=4, shared=227 << 10) == 0.0625
    assert static.occupancy("sm_80", registers=32, warps=4, shared=200 << 10) == 0.0
