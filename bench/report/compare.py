"""Two commits on one device, row by row of their results files: faster, slower, or no difference to be seen."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp

import numpy as np

from bench.report.digest import Run, is_ours
from bench.report.tables import NONE, milliseconds, shape
from bench.report.verdict import LEAST, LEVEL, QUIET, Row, Samples, quiet_rounds, verdicts
from bench.schema import Kernel, Step
from bench.tables import aligned, key
from train.errors import UserError


def report(runs: Sequence[Run]) -> str:
    """What to print of two files, or of the files of two commits. UserError for what cannot be compared."""
    a, b = sides(runs)
    lines = [f"{name}: {'; '.join(run.source for run in side)}" for name, side in (("A", a), ("B", b))]
    differing = _differing(runs)
    if differing:
        lines.append(f"They differ in {differing}: their references too, which tell nothing of the machine's pace then")
    within = 0.1 if runs[0].results.device.type == "cpu" else 0.5  # what else runs on a CPU can only add to a time
    for title, gather in (("Steps", _steps), ("Kernels", _kernels)):
        rows_a, rows_b = gather(a), gather(b)
        both = [names for names in rows_a if names in rows_b]
        ours = [names for names in both if rows_a[names].ours]
        rows = [Row(names, *_joined(rows_a, rows_b, names, [] if differing else both)) for names in ours]
        if rows:
            lines += ["", *_tell(title, rows, within)]
        for name, here, there in (("A", rows_a, rows_b), ("B", rows_b, rows_a)):
            if alone := [" ".join(names) for names in here if names not in there]:
                lines += ["", f"{title} only in {name}: {'; '.join(alone)}"]
    return "\n".join(lines)


def sides(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs as A and B: two files as they are named, more by their commits, the one named first being A.

    UserError unless all are of one device and have something of ours in common, of one shape.
    """
    a, b = list(runs[:1]), list(runs[1:])
    if len(runs) != 2:
        commits = list(dict.fromkeys(run.commit for run in runs))
        if len(commits) != 2:
            raise UserError(
                f"compare: got {len(runs)} results file{'s' * (len(runs) != 1)} of {len(commits)} "
                f"commit{'s' * (len(commits) != 1)}, expected two files, or files of two commits"
            )
        a, b = ([run for run in runs if run.commit == commit] for commit in commits)
    devices = list(dict.fromkeys(run.device for run in runs))
    if len(devices) > 1:
        raise UserError(f"compare: got results of {' and '.join(devices)}, expected one device")
    shapes_a, shapes_b = _shapes(a), _shapes(b)
    common = shapes_a.keys() & shapes_b.keys()
    if not common and not any(_kernels(a)[names].ours for names in _kernels(a).keys() & _kernels(b).keys()):
        found = " and ".join(", ".join(shapes) or "no training step" for shapes in (shapes_a, shapes_b))
        raise UserError(f"compare: got {found}, expected a workload that both have measured")
    for name in sorted(common):
        if shapes_a[name] != shapes_b[name]:
            raise UserError(f"compare: {name} is of another shape or another number of tokens in each, expected one")
    return a, b


def _shapes(runs: Sequence[Run]) -> dict[str, set]:
    """Of each workload with samples: its shapes, which should be one."""
    found: dict[str, set] = {}
    for step in (step for run in runs for step in run.results.steps if step.seconds):
        found.setdefault(step.workload, set()).add((step.tokens, *sorted(step.shape.items())))
    return found


def _differing(runs: Sequence[Run]) -> str:
    """Software that is not the same in all."""
    versions = [asdict(run.results.software) for run in runs]
    return ", ".join(name for name in versions[0] if len({version[name] for version in versions}) > 1)


@dataclass
class Gathered:
    """A row of one side."""

    group: Hashable  # what it took turns with
    ours: bool
    runs: dict[str, np.ndarray]  # by file: logarithms of seconds, (rounds, samples of a turn)


Names = tuple[str, ...]


def _steps(runs: Sequence[Run]) -> dict[Names, Gathered]:
    return _gather(
        (run, step, (step.workload, step.variant, step.dtype), step.workload, is_ours(step), step.turn)
        for run in runs
        for step in run.results.steps
    )


def _kernels(runs: Sequence[Run]) -> dict[Names, Gathered]:
    return _gather(
        (run, k, (k.case, shape(k), k.dtype, k.direction, k.variant), key(k), k.variant == "fused", 1)
        for run in runs
        for k in run.results.kernels
    )


def _gather(found: Iterable[tuple[Run, Step | Kernel, Names, Hashable, bool, int]]) -> dict[Names, Gathered]:
    gathered: dict[Names, Gathered] = {}
    for run, record, names, group, ours, turn in found:
        if record.seconds:
            rounds = np.log(record.seconds[: len(record.seconds) // turn * turn]).reshape(-1, turn)
            gathered.setdefault(names, Gathered(group, ours, {})).runs[str(run.path)] = rounds
    return gathered


def _joined(
    a: Mapping[Names, Gathered], b: Mapping[Names, Gathered], names: Names, both: Sequence[Names]
) -> tuple[list[Samples], list[Samples]]:
    """A row's samples on both sides, with the controls out of `both` that all its runs have."""
    files = [*((a, name) for name in a[names].runs), *((b, name) for name in b[names].runs)]
    others = [other for other in both if a[other].group == a[names].group and not a[other].ours]
    controls = [other for other in others if all(name in side[other].runs for side, name in files)]
    samples = [Samples(side[names].runs[name], [side[c].runs[name] for c in controls]) for side, name in files]
    return samples[: len(a[names].runs)], samples[len(a[names].runs) :]


def _tell(title: str, rows: Sequence[Row], within: float) -> list[str]:
    cells = [[title, "A, ms", "B, ms", "quiet rounds", "B/A", f"{100 * LEVEL:.0f} % interval", "verdict"]]
    found = [quiet_rounds(row, within) for row in rows]
    for row, quiet, verdict in zip(rows, found, verdicts(found), strict=True):
        times = [milliseconds(exp(np.median(np.concatenate([s.own.ravel() for s in side])))) for side in (row.a, row.b)]
        many = [sum(map(len, side)) for side in quiet]
        counts = f"{many[0]} and {many[1]} of {sum(s.rounds for s in row.a)} and {sum(s.rounds for s in row.b)}"
        rest = [NONE, NONE, f"too few quiet rounds, expected {LEAST} in each run"]
        if verdict:
            rest = [f"{verdict.ratio:.3f}", f"{verdict.low:.3f}–{verdict.high:.3f}", verdict.words]
        cells.append([" ".join(row.names), *times, counts, *rest])
    return [
        aligned(cells),
        "ms are medians. B/A is of the times over the references' in the same round. Quiet rounds: those in which the "
        f"references took at most {100 * QUIET:.0f} % more than in either run's best; longer runs have more of them.",
    ]
