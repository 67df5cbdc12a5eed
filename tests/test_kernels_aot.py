"""Every kernel compiled for GPUs that are not here: registers, spills, shared memory, and no atomics.

An own process from the interpreter's: TRITON_INTERPRET=1 replaces the compiler.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)


class Case(NamedTuple):
    """A kernel as it is launched, and what it may use on any target."""

    kernel: str  # file.function
    signature: dict[str, str]  # runtime arguments in Triton's spelling; ":16" = a multiple of 16 (torch's pointers are)
    constexprs: dict[str, Any]
    registers: int
    shared: int  # bytes
    num_warps: int = 4


CASES = [
    Case(
        "philox_normal.philox_normal_kernel",
        {"row_ids_ptr": "*i64:16", "step_ptr": "*i64:16", "out_ptr": f"*{dtype}:16"}
        | {"seed": "u64", "tag": "u32", "B": "i32", "dim": dim},
        {"ROWS": 8, "BLOCKS": 16},
        registers=registers,
        shared=shared,
    )
    for dtype, dim, registers, shared in [
        ("fp32", "i32:16", 64, 2048),
        ("fp32", "i32", 64, 2048),
        ("fp64", "i32:16", 88, 4096),
    ]
]


def compiled(case: Case, target: GPUTarget) -> Any:
    file, function = case.kernel.split(".")
    kernel = getattr(importlib.import_module(f"rvi_fast.kernels.{file}"), function)
    types = {name: spelled.removesuffix(":16") for name, spelled in case.signature.items()}
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, spelled in case.signature.items()
        if spelled.endswith(":16")
    }
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=case.constexprs, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": case.num_warps, "enable_fp_fusion": True})


def nvidia_usage(ptx: str, arch: int, folder: Path) -> dict[str, int]:
    """Registers a thread and bytes spilled a thread, by ptxas."""
    (folder / "kernel.ptx").write_text(ptx)
    assembler = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}"]
    told = subprocess.run(
        [*assembler, folder / "kernel.ptx", "-o", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", told)[1]),
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill", told)),
    }


def amd_usage(amdgcn: str) -> dict[str, int]:
    """The same from the metadata of AMD's assembly; spills are counted in registers."""
    used = {key: int(n) for key, n in re.findall(r"\.(\w+_(?:spill_)?count):\s*(\d+)", amdgcn)}
    return {"registers": used["vgpr_count"], "spilled": used["vgpr_spill_count"] + used["sgpr_spill_count"]}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel)
def test_fits_its_budget(case, target, tmp_path):
    binary = compiled(case, TARGETS[target])
    if "ptx" in binary.asm:
        used = nvidia_usage(binary.asm["ptx"], TARGETS[target].arch, tmp_path)
        atomics = re.findall(r"\b(?:atom|red)\.\S+", binary.asm["ptx"])
    else:
        used = amd_usage(binary.asm["amdgcn"])
        atomics = re.findall(r"\w+_atomic_\w+", binary.asm["amdgcn"])
    assert not atomics  # their order would change the bits
    assert used["spilled"] == 0
    assert used["registers"] <= case.registers
    assert binary.metadata.shared <= case.shared


def test_every_kernel_is_in_the_table():
    folder = Path(importlib.import_module("rvi_fast.kernels.philox").__file__).parent
    kernels = {
        f"{file.stem}.{node.name}"
        for file in folder.glob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert kernels == {case.kernel for case in CASES}
