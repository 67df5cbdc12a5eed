"""What the compiler makes of every kernel on GPUs that are not here: python -m rvi_fast.bench.static [--csv FILE].

A case names a call of a real launcher on CPU tensors that nobody fills. The launch is compiled, not run, so types,
specialisation, constants, warps and stages are those of that call on a GPU. To add one, put a line in CASES:

    Case("idea B=256", lambda: launcher("idea")(f32(256, 64), i64(256)), registers=64, shared=2048),

The budgets are upper bounds for every kernel that the call launches, on the targets in BUDGETED. Set
deterministic=False where atomics are meant, targets=(...) where only some can hold the tile. Leave out a budget and
`--only NAME` prints what it should be.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.runtime.jit import JITFunction

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
BUDGETED = ("sm_80", "sm_90")  # the others must compile


class Case(NamedTuple):
    """A call of a launcher, and what its kernels may use."""

    name: str
    launch: Callable[[], Any]
    registers: int = 0  # a thread
    shared: int = 0  # bytes a program
    spills: int = 0  # bytes a thread
    deterministic: bool = True  # no atomics: their order would change the bits
    targets: Sequence[str] = tuple(TARGETS)


class Row(NamedTuple):
    """A kernel as a target's compiler made it."""

    case: str
    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    occupancy: float | None  # share of a multiprocessor's warps, by registers and shared memory; 0: does not fit
    mma: int
    wgmma: int  # and tcgen05, Blackwell's
    load_bytes: int  # the widest global load of a thread
    atomics: int
    seconds: float
    narrow: str = ""  # 32-bit products of a program id that reach an address


def launcher(file: str, function: str = "") -> Callable[..., Any]:
    """kernels/`file`.py's host function, which carries the name of the file unless another is given."""
    return getattr(importlib.import_module(f"rvi_fast.kernels.{file}"), function or file)


def f32(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def f64(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64)


def i32(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32)


def i64(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64)


def u8(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)


def bits(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bool)


def _noise(dim: int, dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: launcher("philox_normal")(0, 0, i64(), i64(256), dim, 0, dtype)


def _masked_nll(likelihood: str, B: int, D: int, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
    """The launch of the loss of bytes x, and of its gradient in the same pass."""

    def launch() -> None:
        scale = (torch.empty(D, dtype=torch.promote_types(dtype, torch.float32)),) if likelihood == "gaussian" else ()
        cells = torch.empty(B, D, dtype=dtype), u8(B, D), bits(B, D)
        launcher(f"masked_{likelihood}_nll")(*cells, *scale, 1 / 255, True)

    return launch


def _scale_gradient(B: int, D: int) -> None:
    by_scale = launcher("masked_gaussian_nll", "masked_gaussian_nll_by_scale")
    by_scale(f32(B), f32(B, D), f32(B, D), None, f32(D), 1.0)


def _linear_nll(B: int, D: int, H: int, backward: str = "") -> Callable[[], Any]:
    """The launch of the loss, or of its gradients: "by_h", "by_layer"."""
    name = "linear_masked_gaussian_nll"

    def launch() -> None:
        layer = f32(B, H), f32(D, H), f32(D), f32(B, D), bits(B, D), f32(D), 1.0
        wanted = (True, True, True) if backward == "by_layer" else ()
        if backward:
            launcher(name, f"{name}_{backward}")(f32(B), *layer, *wanted)
        else:
            launcher(name)(*layer)

    return launch


def clock(*, rates: bool = True) -> tuple[Tensor, ...]:
    """History, counters, constants and (unless not wanted) rates, as kernels/catch_up.py lays them out."""
    return f64(6, 1024), i64(4), f64(5), *((f64(2),) if rates else ())


def _row_adam(B: int, C: int, dtype: torch.dtype = torch.float32, by_row: bool = False) -> Callable[[], Any]:
    table = torch.empty(70_000, 3, C, dtype=dtype), i32(70_000)
    return lambda: launcher("row_adam_")(
        *table, i64(B), torch.empty(B, C, dtype=dtype), *clock(), True, by_row, touch=True
    )


def _read_rows(B: int, C: int, slots: int, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
    table = torch.empty(70_000, 3, C, dtype=dtype), i32(70_000)
    return lambda: launcher("read_rows")(
        *table, i64(B), *clock(rates=False), True, torch.empty(slots, B, C, dtype=dtype)
    )


PAPER = (25, 50, 100), (13, 25, 50)
WIDE = (128, 256, 640), (64, 128, 320)


def _relay_sample(
    B: int, groups: Sequence[int], active: Sequence[int], T: int, dtype: torch.dtype = torch.float32
) -> Callable[[], Any]:
    """Forward and backward, every gradient."""
    K, new = sum(groups), functools.partial(torch.empty, dtype=dtype)

    def launch() -> None:
        coef, mean, log_std, relays, noise = new(B, K), new(B, T), new(B, T), new(K, T), new(B, T)
        _, _, _, mask = launcher("relay_sample")(coef, mean, log_std, relays, groups, active, noise)
        backward = launcher("relay_sample", "relay_sample_backward")
        backward(new(B, T), new(B), coef, mean, log_std, relays, noise, mask, groups, active, (True,) * 5)

    return launch


def _relay_sample_rows(
    B: int, groups: Sequence[int], active: Sequence[int], T: int, dtype: torch.dtype = torch.float32
) -> Callable[[], Any]:
    """The same from a table."""
    K, new = sum(groups), functools.partial(torch.empty, dtype=dtype)

    def launch() -> None:
        rows, relays = i64(B), new(K, T)
        table = launcher("relay_sample", "Table")(new(1000, 3, K + 2 * T), i32(1000), rows, *clock(rates=False), True)
        drawn = launcher("relay_sample", "Drawn")(rows, i64(), 0, 0)
        _, _, state, mask, _ = launcher("relay_sample", "relay_sample_rows")(table, relays, groups, active, drawn)
        backward = launcher("relay_sample", "relay_sample_rows_backward")
        backward(new(B, T), new(B), state, relays, mask, groups, active, drawn, (True, True))

    return launch


def _relay_step(B: int, groups: tuple[int, ...], T: int, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
    def launch() -> None:
        K, active = sum(groups), tuple(-(-k // 2) for k in groups)
        table = torch.empty(70_000, 3, K + 2 * T, dtype=dtype), i32(70_000), i64(B), *clock(), True
        sampled = torch.empty(B, K + 2 * T, dtype=dtype), u8(B, sum(-(-k // 8) for k in groups))
        by = torch.empty(B, T, dtype=dtype), torch.empty(B, dtype=dtype)
        drawn = importlib.import_module("rvi_fast.kernels.relay_sample").Drawn(table[2], i64(), 0, 0)
        launcher("relay_step", "relay_step_")(
            *table, *by, *sampled, torch.empty(K, T, dtype=dtype), groups, active, drawn
        )

    return launch


def _elbo_step(hidden: Sequence[int] = (64, 64), learned: bool = False) -> Callable[[], Any]:
    """Both launches of a step of the paper's model; learned: with a linear path and a learned scale too."""
    (groups, active), T, D = PAPER, 64, 784
    path = T if learned else 0
    widths = [T, *hidden]
    layers = sum(n_out * (n_in + 1) for n_in, n_out in itertools.pairwise(widths)) + D * (widths[-1] + path + 1)
    weights = f32(3, sum(groups) * T + layers + (D if learned else 0))
    form = groups, active, hidden, learned, "silu" if learned else "relu", "gaussian", 0.1, learned, 1.0

    def launch() -> None:
        table = f32(1000, 3, sum(groups) + 2 * T), i32(1000)
        when = clock(), True, i64()
        mask = torch.empty(1000, D // 8, dtype=torch.uint8) if learned else bits(1000, D)
        batch = i64(256), i64(), f32(1000, D), mask, 1.0, False
        found = launcher("elbo_step", "elbo_rows")(*table, *when, 0, *batch, weights, f32(7), *form)
        launcher("elbo_step", "elbo_finish")(*found, *when, i64(), weights, f64(5), f64(2, 2), f32(7), 0, f64(2, 3))

    return launch


def _fit_rows(precision: str, learned: bool = False, groups: Sequence[int] = PAPER[0]) -> Callable[[], Any]:
    """Inference with the paper's model; learned: with a linear path, a scale a column and a mask of bits too."""
    active, T, D = PAPER[1][: len(groups)], 64, 784
    hidden = [f32(64, 64), f32(64), f32(64, 64), f32(64)]
    layers = [*hidden, f32(D, 128 if learned else 64), f32(D)]
    form = groups, active, "silu" if learned else "relu", learned, "gaussian", 1.0

    def launch() -> None:
        cells = f32(256, D), u8(256, D // 8) if learned else bits(256, D)
        frozen = f32(sum(groups), T), layers, f32(D) if learned else f32()
        given = f32(256, sum(groups) + 2 * T), i64(256), *cells, 1.0, *frozen
        launcher("fit_rows")(*given, *form, 0, f64(250, 2), (0.9, 0.999, 1e-8), 8, precision)

    return launch


CASES = [
    Case("philox_normal T=64", _noise(64, torch.float32), registers=64, shared=2048),
    Case("philox_normal T=65", _noise(65, torch.float32), registers=64, shared=2048),
    Case("philox_normal T=64 float64", _noise(64, torch.float64), registers=88, shared=4096, spills=8),
    Case("masked_gaussian_nll D=784", _masked_nll("gaussian", 256, 784), registers=64, shared=4096),
    Case("masked_gaussian_nll D=784 bfloat16", _masked_nll("gaussian", 256, 784, torch.bfloat16), 64, shared=64),
    Case("masked_gaussian_nll D=20000 float64", _masked_nll("gaussian", 1, 20_000, torch.float64), 128, shared=8192),
    Case("masked_gaussian_nll D=10", _masked_nll("gaussian", 65_536, 10), registers=80, shared=512),
    Case("masked_gaussian_nll by scale", lambda: _scale_gradient(65_536, 784), registers=64, shared=2048),
    Case("masked_bernoulli_nll D=784", _masked_nll("bernoulli", 256, 784), registers=64, shared=4096),
    Case("masked_bernoulli_nll D=784 float64", _masked_nll("bernoulli", 256, 784, torch.float64), 184, shared=8192),
    Case("linear_masked_gaussian_nll H=64", _linear_nll(256, 784, 64), registers=224, shared=32768),
    Case("linear_masked_gaussian_nll H=128 D=20000", _linear_nll(256, 20_000, 128), registers=224, shared=32768),
    Case("linear_masked_gaussian_nll by h H=64", _linear_nll(256, 784, 64, "by_h"), registers=255, shared=32768),
    Case("linear_masked_gaussian_nll by h H=128", _linear_nll(256, 20_000, 128, "by_h"), registers=255, shared=49152),
    Case("linear_masked_gaussian_nll by h H=256", _linear_nll(256, 784, 256, "by_h"), registers=255, shared=65536),
    Case("linear_masked_gaussian_nll by layer H=64", _linear_nll(65_536, 784, 64, "by_layer"), 255, shared=24576),
    Case("linear_masked_gaussian_nll by layer H=128", _linear_nll(256, 20_000, 128, "by_layer"), 255, shared=32768),
    Case("advance", lambda: launcher("advance")(*clock(), True), registers=64),
    Case("advance, no closed form", lambda: launcher("advance")(*clock(), False), registers=64),
    Case("read_rows C=303", _read_rows(256, 303, 1), registers=96),
    Case("read_rows C=303 moments", _read_rows(65_536, 303, 3), registers=112),
    Case("read_rows C=303 float64", _read_rows(256, 303, 1, torch.float64), registers=128),
    Case("row_adam_ C=303", _row_adam(256, 303), registers=128),
    Case("row_adam_ C=304", _row_adam(65_536, 304), registers=128),
    Case("row_adam_ C=303 float64", _row_adam(256, 303, torch.float64), registers=168),
    Case("row_adam_ C=303 lazy", _row_adam(256, 303, by_row=True), registers=128),
    Case("relay_step B=256", _relay_step(256, (25, 50, 100), 64), registers=136, shared=24576, spills=24),
    Case("relay_step B=65536", _relay_step(65_536, (25, 50, 100), 64), registers=168, shared=24576, spills=16),
    Case("relay_step K=1024 T=256", _relay_step(65_536, (1024,), 256), registers=224, shared=32768, spills=8),
    Case("relay_step float64", _relay_step(256, (25, 50, 100), 64, torch.float64), registers=128, shared=8192),
    Case("linear_masked_gaussian_nll by layer H=256", _linear_nll(256, 784, 256, "by_layer"), 255, shared=24576),
    Case("relay_sample B=256", _relay_sample(256, *PAPER, 64), registers=168, shared=24576),
    Case("relay_sample B=65536", _relay_sample(65_536, *PAPER, 64), registers=144, shared=24576),
    Case("relay_sample float64", _relay_sample(256, *PAPER, 64, torch.float64), registers=128, shared=4096),
    Case("relay_sample clusters", _relay_sample(65_536, (1024,), (1,), 256), registers=255, shared=28672),
    Case("relay_sample K=4096 T=512", _relay_sample(65_536, (4096,), (2048,), 512), registers=255, shared=28672),
    Case("relay_sample_rows B=256", _relay_sample_rows(256, *PAPER, 64), registers=168, shared=24576),
    Case("relay_sample_rows B=65536", _relay_sample_rows(65_536, *PAPER, 64), registers=176, shared=24576),
    Case("relay_sample_rows K=1024 T=256", _relay_sample_rows(65_536, *WIDE, 256), registers=255, shared=28672),
    Case("elbo_step", _elbo_step(), registers=255, shared=40960),
    Case("elbo_step, learned scale", _elbo_step(learned=True), registers=255, shared=32768, spills=128),
    Case("fit_rows float32", _fit_rows("float32"), registers=255, shared=40960),
    Case("fit_rows tf32", _fit_rows("tf32"), registers=255, shared=40960),
    Case("fit_rows bfloat16", _fit_rows("bfloat16"), registers=255, shared=16384),
    Case("fit_rows tf32, learned scale", _fit_rows("tf32", learned=True), registers=255, shared=40960),
    Case("fit_rows tf32, no relays", _fit_rows("tf32", groups=()), registers=240, shared=40960),
]


class _Absent:
    """A driver for a GPU that is not here: enough of one to compile a launch."""

    def __init__(self, name: str):
        self.get_current_device = lambda: name
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: TARGETS[name]


@contextmanager
def compiled_for(target: str) -> Iterator[list[tuple[str, Any, float]]]:
    """Within, a launch is compiled for `target`, not run: (kernel's name, binary, seconds) go to the list."""
    found = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        start = time.perf_counter()
        binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__, binary, time.perf_counter() - start))
        return binary

    hip = "7.0" if TARGETS[target].backend == "hip" else None  # launchers ask torch which vendor's GPU it drives
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(torch.version, "hip", hip),
        mock.patch.object(triton.runtime.driver, "_active", _Absent(target)),
    ):
        yield found


def measure(name: str, target: str, fresh: bool = False) -> list[Row]:
    """The kernels of a case on a target, each once. fresh: whatever the compiler remembers."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("nothing is compiled under TRITON_INTERPRET=1; unset it")
    triton.knobs.compilation.always_compile = fresh
    case = next(case for case in CASES if case.name == name)
    try:
        with compiled_for(target) as found:
            case.launch()
    except Exception as error:  # some of the compiler's cannot be sent between processes
        raise RuntimeError(f"{name} for {target}: {type(error).__name__}: {error}") from None
    rows: dict[str, Row] = {}
    for kernel, binary, seconds in found:
        rows.setdefault(binary.hash, Row(name, kernel, target, *_usage(binary, target), round(seconds, 2),
                                         "; ".join(narrow_addresses(binary.asm["ttir"]))))  # fmt: skip
    return list(rows.values())


def _usage(binary: Any, target: str) -> tuple[int, int, int, float | None, int, int, int, int]:
    """Registers, spills, shared, occupancy, mma, wgmma, load_bytes, atomics."""
    shared, warps = binary.metadata.shared, binary.metadata.num_warps
    if "amdgcn" in binary.asm:
        text = binary.asm["amdgcn"]
        used = {key: int(n) for key, n in re.findall(r"\.(\w+_(?:spill_)?count):\s*(\d+)", text)}
        words = re.findall(r"\b(?:global|buffer)_load_dword(?:x(\d))?\b", text)
        spilled = 4 * used["vgpr_spill_count"]  # a spilled scalar register goes to a vector register
        width = max((4 * int(n or 1) for n in words), default=0)
        atomics = len(re.findall(r"\b(?:global|buffer|flat)_atomic_\w+", text))
        return used["vgpr_count"], spilled, shared, None, len(re.findall(r"\bv_mfma_", text)), 0, width, atomics
    text = binary.asm["ptx"]
    registers, spilled = _resources(binary, TARGETS[target].arch)
    return (
        registers, spilled, shared, occupancy(target, registers, warps, shared),
        len(re.findall(r"\bmma\.sync\b", text)), len(re.findall(r"\b(?:wgmma\.mma_async|tcgen05\.mma)\b", text)),
        max(map(_width, re.findall(r"\bld\.global[\w:.]*|\bcp\.async[\w:.]* .*", text)), default=0),
        len(re.findall(r"\b(?:atom|red)\.\S+", text)),
    )  # fmt: skip


def _width(load: str) -> int:
    """Bytes of one load in PTX: ld.global.L1::evict_last.v4.b32, cp.async.cg.shared.global [..], [..], 0x10, ..."""
    if load.startswith("cp.async"):
        size = re.search(r"\],\s*(0x[0-9a-f]+|\d+)", load.split("[", 2)[-1])
        return int(size[1], 0) if size else 0
    vector, word = re.search(r"\.v(\d)\b", load), re.search(r"\.[bfsu](\d+)$", load)
    return (int(vector[1]) if vector else 1) * (int(word[1]) if word else 0) // 8


def _resources(binary: Any, arch: int) -> tuple[int, int]:
    """Registers and bytes spilled of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(binary.asm["ptx"])
        cubin.write_bytes(binary.asm["cubin"])
        told = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)).stdout
        registers, stack = (int(n) for n in re.findall(r"\b(?:REG|STACK):(\d+)", told))
        if not stack:  # where spills would lie, and arrays
            return registers, 0
        gpu = f"--gpu-name={sm_arch_from_capability(arch)}"
        told = _run(get_ptxas(arch).path, "-v", gpu, str(ptx), "-o", os.devnull).stderr
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill", told))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


#           warps and programs of a multiprocessor; its shared memory and that of a program, bytes
LIMITS = {
    "sm_80": (64, 32, 164 << 10, 163 << 10),
    "sm_90": (64, 32, 228 << 10, 227 << 10),
    "sm_100": (64, 32, 228 << 10, 227 << 10),
}
REGISTERS, REGISTER_UNIT, SHARED_UNIT, SHARED_RESERVED = 65536, 256, 128, 1024


def occupancy(target: str, registers: int, warps: int, shared: int) -> float:
    """The share of a multiprocessor's warps that can be resident at once."""
    most_warps, most_programs, all_shared, most_shared = LIMITS[target]
    if shared > most_shared:
        return 0.0
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    of_program = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    by_registers = REGISTERS // of_warp // 4 * 4 // warps  # warps are given registers in fours
    return min(most_programs, most_warps // warps, by_registers, all_shared // of_program) * warps / most_warps


TILE = 4096  # a program id times a tile's rows counts rows, which int32 holds; times more, it addresses memory


def narrow_addresses(ttir: str) -> list[str]:
    """Pointers whose offset is a 32-bit product of a program id: it wraps where a table has more than 2^31 elements.

    One product by a tile's size is allowed, since it counts rows; a second one, or one by a runtime size, is not.
    """
    constants: dict[str, int] = {}
    products: dict[str, int] = {}  # integers that come from a program id -> 32-bit products on the way, sizes count 2
    wrong = []
    for line in ttir.splitlines():
        line = line.split(" loc(")[0].rstrip()
        if loop := re.search(r"scf.for (%\w+) = (%\w+) to (%\w+)", line):
            starts = [(loop[1], loop[2]), (loop[1], loop[3]), *re.findall(r"(%\w+) = (%\w+)", line[loop.end() :])]
            products |= {inner: products[start] for inner, start in starts if start in products}
        made = re.match(r'\s*(%\w+)[^=]*= "?([\w.]+)', line)
        if not made:
            continue
        name, op = made.groups()
        inputs = re.findall(r"%\w+", line[made.end() :])
        known = [products[x] for x in inputs if x in products]
        if op == "tt.get_program_id":
            products[name] = 0
        elif value := re.search(r"arith.constant (?:dense<)?(-?\d+)>? :", line):
            constants[name] = abs(int(value[1]))
        elif op in ("tt.splat", "tt.expand_dims", "tt.broadcast") and inputs[0] in constants:
            constants[name] = constants[inputs[0]]
        elif op == "tt.addptr":
            if products.get(inputs[1], 0) > 1:
                wrong.append(line.strip())
        elif known and op == "arith.muli" and line.endswith(("i32", "i32>")):
            sizes = [constants.get(x, TILE + 1) for x in inputs if x not in products]
            products[name] = max(known) + (1 if sizes and sizes[0] <= TILE else 2)
        elif known and op == "arith.extsi" and max(known) < 2:
            continue  # widened in time
        elif known and op != "arith.cmpi" and line.endswith(("i32", "i32>", "i64", "i64>")):
            products[name] = max(known)
    return wrong


def problems(case: Case, row: Row) -> list[str]:
    """What of a row breaks the rules."""
    found = []
    if row.atomics and case.deterministic:
        found.append(f"{row.atomics} atomics")
    if row.narrow:
        found.append(f"32-bit addresses: {row.narrow}")
    if row.target in BUDGETED:
        for key in ("registers", "spills", "shared"):
            if getattr(row, key) > getattr(case, key):
                found.append(f"{key} {getattr(row, key)} > {getattr(case, key)}")
        if not row.occupancy:
            found.append("a program does not fit")
    return found


def report(names: Sequence[str] = (), fresh: bool = False) -> list[Row]:
    """The rows of the named cases (of all), compiled in as many processes as there are cores."""
    jobs = [(case.name, target, fresh) for case in CASES if not names or case.name in names for target in case.targets]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(jobs)), mp_context=spawn) as pool:
        return [row for rows in pool.map(measure, *zip(*jobs, strict=True)) for row in rows]


def _spelled(cell: Any) -> str:
    return "" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--csv", metavar="FILE", type=Path)
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name holds TEXT")
    parser.add_argument("--fresh", action="store_true", help="compile even what is cached, so that seconds are right")
    args = parser.parse_args()
    cases = {case.name: case for case in CASES if args.only in case.name}
    rows = report(list(cases), args.fresh)
    columns = Row._fields[:-1]
    print(f"triton {triton.__version__}")
    table = [columns, *(tuple(map(_spelled, row[:-1])) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    broken = ["", *("; ".join(problems(cases[row.case], row)) for row in rows)]
    for line, wrong in zip(table, broken, strict=True):
        cells = (x.ljust(w) if i < 3 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(cells) + (f"   <- {wrong}" if wrong else ""))
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [("triton", *columns), *((triton.__version__, *line) for line in table[1:])]
            )
    return int(any(broken))


if __name__ == "__main__":
    sys.exit(main())
