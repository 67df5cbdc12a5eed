"""The command `rvi-fast bench`: which measurements are made, each in a process of its own, and where they go."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

KEY = ("workload", "threads", "contestant")
CURVES_KEY = ("data", "missing", "contestant")
QUALITY_KEY = ("data", "rows", "missing", "implementation", "threads")
COSTED = ("paper", "rows-", "dry")  # workloads of which first calls and memory are measured
DESCRIPTION = """\
Time a training step of rvi_fast and of its peers, in turns, and print and keep what was measured. A
contestant that claims dense Adam must first show the loss curve of dense Adam in float64. With no option
that says otherwise every workload is run, which takes about an hour on two cores."""


class Task(NamedTuple):
    """What a process of its own is asked to do."""

    kind: str  # "race", "cost", "curves" or "quality"
    workload: str = ""
    contestant: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    def words(text: str) -> tuple[str, ...]:
        return tuple(word for word in text.split(",") if word)

    parser.description = DESCRIPTION
    parser.add_argument("-o", "--out", metavar="FOLDER", help="where the files go (default: bench/results/<device>)")
    parser.add_argument("--quick", action="store_true", help="the paper's setting alone: two to three minutes")
    parser.add_argument("--dry", action="store_true", help="tiny sizes: every step in seconds; times mean nothing")
    parser.add_argument("--workloads", type=words, default=(), metavar="A,B", help="those whose names begin so")
    parser.add_argument("--only", type=words, default=(), metavar="A,B", help="contestants whose names contain this")
    parser.add_argument("--curves", action="store_true", help="200 steps against eager float64, instead of times")
    parser.add_argument("--quality", action="store_true", help="seconds to an error that VAD ends at, instead of steps")
    parser.add_argument("--plot", action="store_true", help="draw the files' times (needs matplotlib); nothing is run")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores, and the paper's setting at 1 too")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="S", help="seconds, after which it ends")
    parser.add_argument("--allow-load", action="store_true", help="run on a busy machine; rows are marked `loaded`")
    parser.add_argument("--task", type=words, help=argparse.SUPPRESS)
    parser.add_argument("--given", help=argparse.SUPPRESS)  # a file: what is known already
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 0, or 2 where the machine is too busy."""
    from . import load, results

    if arguments.task:
        return _do(Task(*arguments.task), arguments)
    device, dry = arguments.device, arguments.dry
    if dry and not arguments.out:
        arguments.out = tempfile.mkdtemp(prefix="rvi_fast-")
    folder = Path(arguments.out) if arguments.out else results.default_folder(device)
    if arguments.plot:
        from .plots import plot

        print("\n".join(str(path) for path in plot(folder)))
        return 0
    if not (dry or arguments.allow_load):
        reason = load.objection(load.look(), load.average())
        if reason:
            return _refuse(reason)
    plan = [Plan(task, threads) for task, threads in _plan(arguments)]
    return _run_all(plan, folder, arguments)


class Plan(NamedTuple):
    task: Task
    threads: int


def _refuse(reason: str) -> int:
    print(f"bench: {reason}; wait until it is quiet, or give --allow-load", file=sys.stderr)
    return 2


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plan(arguments: argparse.Namespace) -> list[tuple[Task, int]]:
    """Tasks and their threads, in order."""
    from . import settings

    threads = arguments.threads or _cores()
    if arguments.curves or arguments.quality:
        return [(Task("curves" if arguments.curves else "quality"), threads)]
    if arguments.dry:
        return [(Task("race", settings.DRY.name), 1)]
    words = arguments.workloads or (("paper",) if arguments.quick else ())
    plan = []
    for setting in settings.chosen(words, arguments.device):
        both = setting.name == "paper" and not arguments.threads and arguments.device == "cpu" and threads > 1
        plan += [(Task("race", setting.name), n) for n in ((threads, 1) if both else (threads,))]
    return plan


def _run_all(plans: Sequence[Plan], folder: Path, arguments: argparse.Namespace) -> int:
    from . import load

    start, failed = time.monotonic(), 0
    for number, (task, threads) in enumerate(plans):
        left = arguments.limit - (time.monotonic() - start)
        if left < 10:
            print(f"bench: the time limit is reached; {len(plans) - number} workloads were not run", file=sys.stderr)
            break
        if number and not (arguments.dry or arguments.allow_load):
            reason = load.objection(load.look())
            if reason:
                return _refuse(f"{reason}; what was measured before is kept")
        try:
            _measure(task, threads, folder, arguments, left)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            how = f"was stopped after {left:.0f} s" if isinstance(error, subprocess.TimeoutExpired) else "failed"
            print(f"bench: {task.workload or task.kind} {how}", file=sys.stderr)
            failed = 1
    return failed


def _measure(task: Task, threads: int, folder: Path, arguments: argparse.Namespace, limit: float) -> None:
    """One task in fresh processes; its lines go to a file of the folder, and to the terminal."""
    from . import results

    deadline = time.monotonic() + limit
    with tempfile.TemporaryDirectory(prefix="rvi_fast-") as caches:
        given: dict[str, Any] = {}
        if task.kind == "race" and task.workload.startswith(COSTED) and arguments.device == "cpu":
            given = _costs(task.workload, threads, arguments, caches, deadline)
        lines = _in_process(task, threads, arguments, caches, deadline, given)
    if task.kind == "race":
        results.merge(folder / "steps.csv", lines, KEY)
        show(lines)
    else:
        results.merge(folder / f"{task.kind}.csv", lines, CURVES_KEY if task.kind == "curves" else QUALITY_KEY)
        columns = list(dict.fromkeys(name for line in lines for name in line if name not in results.COMMON))
        print(results.table([columns, *([results.text(line.get(name)) for name in columns] for line in lines)]))
    print(f"-> {folder / ('steps' if task.kind == 'race' else task.kind)}.csv\n", flush=True)


def _costs(workload: str, threads: int, arguments: argparse.Namespace, caches: str, deadline: float) -> dict[str, Any]:
    """First call and peak memory of each contestant, alone in a process; a dry run measures one."""
    import torch

    from . import contestants, settings
    from .race import too_large

    found: dict[str, Any] = {}
    setting = settings.setting(workload, arguments.device)
    for entry in contestants.chosen(arguments.only)[: 1 if arguments.dry else None]:
        if entry.absent() or too_large(entry, setting, torch.device(arguments.device)):
            continue
        cache = Path(caches) / "cold" / str(len(found))
        cache.mkdir(parents=True)
        try:
            task = Task("cost", workload, entry.name.replace(",", ";"))
            found[entry.name] = _in_process(task, threads, arguments, str(cache), deadline, {})
        except subprocess.CalledProcessError:
            found[entry.name] = {"note": "failed by itself, in the process that measures its first call"}
    return found


def _in_process(
    task: Task, threads: int, arguments: argparse.Namespace, caches: str, deadline: float, given: dict[str, Any]
) -> Any:
    """What a task finds, from a process that has `threads` cores and empty compiler caches."""
    package = (__package__ or "rvi_fast.bench").partition(".__main__")[0]
    known, found = Path(caches) / "given.json", Path(caches) / "found.json"
    known.write_text(json.dumps(given))
    command = [sys.executable, "-m", package, "--task", ",".join(task), "--threads", str(threads)]
    command += ["--device", arguments.device, "--given", str(known), "--out", str(found)]
    command += ["--only", ",".join(arguments.only)] if arguments.only else []
    command += [f"--{name.replace('_', '-')}" for name in ("dry", "allow_load") if getattr(arguments, name)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        "TRITON_CACHE_DIR": f"{caches}/triton",
        "NUMBA_CACHE_DIR": f"{caches}/numba",
        "JAX_COMPILATION_CACHE_DIR": "",
    }
    if arguments.device == "cpu":
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # its pool would look like other processes' load
    limit = deadline - time.monotonic()
    subprocess.run(command, check=True, env=environment, timeout=None if limit == float("inf") else max(1.0, limit))
    return json.loads(found.read_text())


def _do(task: Task, arguments: argparse.Namespace) -> int:
    """What `_in_process` asked for, here."""
    import torch

    from . import contestants, race, results, settings

    _use_cores(arguments.threads)
    torch.set_num_threads(arguments.threads)
    device, dry = arguments.device, arguments.dry
    found: Any
    if task.kind == "race":
        setting, entries = settings.setting(task.workload, device), contestants.chosen(arguments.only)
        given = json.loads(Path(arguments.given).read_text())
        found = race.run(setting, entries, device, dry, arguments.allow_load, given)
    elif task.kind == "cost":
        entry = contestants.entry(task.contestant.replace(";", ","))
        found = race.cost(settings.setting(task.workload, device), entry, device, dry)
    else:
        from . import curves, quality

        torch.set_flush_denormal(True)
        with tempfile.TemporaryDirectory() as folder:
            work = curves.long_curves if task.kind == "curves" else quality.measure
            found = work(torch.device(device), Path(folder), dry)
        found = [{**line, **race.conditions(device, dry, arguments.allow_load)} for line in found]
    Path(arguments.out).write_text(json.dumps(found, default=results.text))
    return 0


def _use_cores(threads: int) -> None:
    """Keep this process to so many cores: what counts threads by cores (JAX) then has no more, either."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))


SHOWN = (
    *("contestant", "algorithm", "step_us", "graph_us", "times_ours", "times_decoder", "first_call_s", "peak_mb"),
    *("percent_of_floor", "curve_difference", "note"),
)


def show(lines: Sequence[dict[str, Any]]) -> None:
    """The table a person reads."""
    from . import results

    line = lines[0]
    print(
        f"\n{line['workload']}: N={line['num_rows']} D={line['columns']} groups={line['groups']} "
        f"active={line['active']} batch={line['batch']} missing={line['missing']} x={line['dtype']}, "
        f"{line['threads']} threads on {line['device']}; load {line['load1_before']:.2f}, others took "
        f"{line['busy_by_others']:.0%}: {line['state']}"
    )
    shown = [name for name in SHOWN if any(line.get(name) not in (None, "") for line in lines)]
    rows = [[_short(line.get(name)) for name in shown] for line in lines]
    print(results.table([shown, *rows]))


def _short(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value if value is not None else "")
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rvi_fast.bench")
    add_options(parser)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, ImportError, OSError) as error:
        parser.exit(1, f"bench: {error}\n")
