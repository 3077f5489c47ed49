"""Compile every kernel at GPT shapes for GPUs that need not be there, and hold what comes out to its budget.

    python -m kernels.targets [--target 90] [--kernel NAME] [--json FILE]

Triton's own compiler makes what a launch on each target would run (plans.py says of what, and what it must keep);
registers, spills, shared memory, access widths and tensor-core instructions are read from the machine code. The clocks
are estimates (estimate.py).
"""

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

from kernels.launch import INTERPRETED, Device, Launch
from kernels.targets.architectures import ARCHITECTURES
from kernels.targets.budgets import Plan, broken_budgets
from kernels.targets.compiled import Compiled, compile_launch
from kernels.targets.estimate import Estimate, estimate

Job = tuple[str, int, int]  # the module of PLANS, which of them, the target


@dataclass(frozen=True)
class Row:
    """One kernel on one target."""

    name: str
    kernel: str
    target: int
    registers: int = 0
    spills: int = 0  # instructions
    shared: int = 0  # bytes a block
    warps: int = 0  # a block
    resident_warps: int = 0  # a multiprocessor
    waves: float | None = None  # blocks of the grid, over those that the card holds at once
    loads: dict[str, int] = field(default_factory=dict)  # "128" (bits) or "tile" -> instructions
    stores: dict[str, int] = field(default_factory=dict)
    mma: str = ""
    estimate: Estimate | None = None
    broken: tuple[str, ...] = ()  # the budgets that are not kept


class UsageError(Exception):
    """One line: what came, what was expected."""


def names(plan: Plan, launches: list[Launch]) -> list[str]:
    """What each launch of the plan is called in the table."""
    if len(launches) == 1:
        return [plan.name]
    return [f"{plan.name}: {launch.kernel.fn.__name__.removesuffix('_kernel')}" for launch in launches]


def inspect(job: Job) -> list[Row]:
    """The rows of a job; what does not compile breaks its budget."""
    module, index, target = job
    plan = importlib.import_module(module).PLANS[index]
    launches = plan.launches(Device(target, ARCHITECTURES[target].multiprocessors))
    rows = []
    for launch, name in zip(launches, names(plan, launches), strict=True):
        kernel = launch.kernel.fn.__name__
        try:
            compiled = compile_launch(launch, target)
        except Exception as error:  # the compiler's, of many kinds
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            rows.append(
                Row(plan.name, name, target, broken=(f"does not compile: {type(error).__name__}: {lines[-1]}",))
            )
            continue
        rows.append(
            Row(
                name=name,
                kernel=kernel,
                target=target,
                registers=compiled.registers,
                spills=compiled.spills,
                shared=compiled.shared,
                warps=compiled.warps,
                resident_warps=compiled.resident_warps,
                waves=compiled.waves,
                loads=_widths(compiled, store=False),
                stores=_widths(compiled, store=True),
                mma=compiled.mma,
                estimate=estimate(plan, compiled),
                broken=tuple(broken_budgets(plan.budget.on(target), compiled)),
            )
        )
    return rows


def _widths(compiled: Compiled, store: bool) -> dict[str, int]:
    counts = Counter(access.width for access in compiled.accesses if access.store == store)
    return {str(8 * width) if width else "tile": counts[width] for width in sorted(counts, reverse=True)}


COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (  # heading, alignment and width, text
    ("regs", ">4", lambda row: str(row.registers)),
    ("spill", ">5", lambda row: str(row.spills)),
    ("shared", ">6", lambda row: str(row.shared)),
    ("warps", ">5", lambda row: str(row.resident_warps)),
    ("waves", ">6", lambda row: "-" if row.waves is None else f"{row.waves:.1f}"),
    ("loads", "<16", lambda row: _counts(row.loads)),
    ("stores", "<14", lambda row: _counts(row.stores)),
    ("mma", "<7", lambda row: row.mma or "-"),
    ("fma", ">5", lambda row: _instructions(row, "fma")),
    ("alu", ">5", lambda row: _instructions(row, "alu")),
    ("sfu", ">5", lambda row: _instructions(row, "sfu")),
    ("lsu", ">5", lambda row: _instructions(row, "lsu")),
    ("all", ">6", lambda row: _instructions(row)),
    ("busy", ">6", lambda row: _clocks(row, lambda e: max(e.busy.values()))),
    ("with", "<6", lambda row: "-" if row.estimate is None else max(row.estimate.busy, key=row.estimate.busy.get)),
    ("dram", ">6", lambda row: _clocks(row, lambda e: e.dram)),
    ("reach", "<12", lambda row: _reach(row)),
    ("flight", ">6", lambda row: "-" if row.estimate is None or row.mma else f"{row.estimate.in_flight:.1f}"),
)
LEGEND = """\
warps: on a multiprocessor at once; waves: the grid, over what the card holds at once. loads, stores: instructions x
bits; tile: by the tensor memory accelerator.
Estimates, of the main loop: fma ... all: instructions a thread for one element; busy: clocks of a multiprocessor that
the busiest pipe (with) takes for one element, dram: that the memory takes; reach: the share of bandwidth that leaves;
flight: bytes that all resident warps can have under way, over those that hide the memory's latency. With tensor cores:
a warp's instructions and a multiprocessor's clocks for one tile; reach: the share of the tensor cores' rate."""


def _counts(counts: dict[str, int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in counts.items()) or "-"


def _instructions(row: Row, pipe: str | None = None) -> str:
    if row.estimate is None:
        return "-"
    count = sum(row.estimate.instructions.values()) if pipe is None else row.estimate.instructions.get(pipe, 0.0)
    return f"{count:.0f}" if row.mma else f"{count:.1f}"


def _clocks(row: Row, of: Callable[[Estimate], float]) -> str:
    if row.estimate is None:
        return "-"
    return f"{of(row.estimate):.0f}" if row.mma else f"{of(row.estimate):.2f}"


def _reach(row: Row) -> str:
    if row.estimate is None:
        return "-"
    return f"{row.estimate.tensor:.0%} tensor" if row.mma else f"{row.estimate.bandwidth:.0%} dram"


def table(rows: Iterator[list[Row]], width: int) -> Iterator[str]:
    """The table's lines, as the rows come; a line whose budget is broken begins with "!"."""
    yield " ".join([" ", f"{'kernel':<{width}}", " sm"] + [f"{head:{style}}" for head, style, _ in COLUMNS]).rstrip()
    for group in rows:
        for row in group:
            cells = [f"{text(row):{style}}" for _, style, text in COLUMNS]
            mark = "!" if row.broken else " "
            yield " ".join([mark, f"{row.name:<{width}}", f"{row.target:3}", *cells]).rstrip()


def compile_all(jobs: list[Job]) -> Iterator[list[Row]]:
    """`inspect` of each job, in order, on all cores that this process may use."""
    pool = _processes(min(len(os.sched_getaffinity(0)), len(jobs)))
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # processes inherit that: Ctrl-C is for this one alone
        futures = [pool.submit(inspect, job) for job in jobs]
        signal.signal(signal.SIGINT, before)
        for job, future in zip(jobs, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:  # a compiler crashed, and took what was under way and to come with it
                yield _inspect_alone(job)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # in the midst of compiling, if this one was interrupted
            process.terminate()


def _inspect_alone(job: Job) -> list[Row]:
    module, index, target = job
    with _processes(1) as pool:
        try:
            return pool.submit(inspect, job).result()
        except BrokenProcessPool:
            name = importlib.import_module(module).PLANS[index].name
            return [Row(name, "", target, broken=("does not compile: the compiler crashed",))]


def _processes(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))  # a fork would leave torch's threads behind


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m kernels.targets", description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", type=int, action="append", help="compute capability, such as 90; default: all")
    parser.add_argument("--kernel", metavar="NAME", help="only kernels whose name contains this")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows there too")
    options = parser.parse_args(argv)
    for target in options.target or ():
        if target not in ARCHITECTURES:
            raise UsageError(f"--target: got {target}, expected one of {', '.join(map(str, ARCHITECTURES))}")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise UsageError(f"--json: got {options.json}, expected a file in a folder that exists")
    return options


def main(argv: list[str] | None = None, module: str = "kernels.targets.plans") -> int:
    """The command; returns its exit status: 0, or 1 where a budget is broken. UsageError where it cannot do as told."""
    options = _options(argv)
    if INTERPRETED:
        got = os.environ.get("TRITON_INTERPRET")
        raise UsageError(f"TRITON_INTERPRET: got {got}, expected it unset: the interpreter takes the compiler's place")
    targets = options.target or list(ARCHITECTURES)
    plans = importlib.import_module(module).PLANS
    device = Device(targets[0], ARCHITECTURES[targets[0]].multiprocessors)
    labels = {index: names(plan, plan.launches(device)) for index, plan in enumerate(plans)}
    chosen = [i for i in labels if options.kernel is None or any(options.kernel in label for label in labels[i])]
    if not chosen:
        raise UsageError(f"--kernel: got {options.kernel!r}, expected part of a kernel's name, such as 'gelu'")

    rows: list[Row] = []

    def collected() -> Iterator[list[Row]]:
        for group in compile_all([(module, index, target) for index in chosen for target in targets]):
            rows.extend(group)
            yield group

    for line in table(collected(), max(len(label) for index in chosen for label in labels[index])):
        print(line, flush=True)
    print(f"\n{LEGEND}\n" + "; ".join(f"sm_{t}: {ARCHITECTURES[t].card}" for t in targets))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    broken = [f"{row.name}, sm_{row.target}: {line}" for row in rows for line in row.broken]
    print("\n".join(["", f"{len(broken)} broken budgets:", *broken] if broken else ["", "All budgets are kept."]))
    return 1 if broken else 0


def run() -> NoReturn:
    """`main` as a process: what cannot be done is one line on stderr and exit status 2."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # `| head` has read enough; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (UsageError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
