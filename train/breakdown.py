"""The table of a profile: each part of a step with its time, its share, and the time that it takes at least."""

from collections import Counter
from dataclasses import dataclass

from model.config import GPTConfig
from model.work import MATMULS, Work, floor, step_work
from train.ceilings import Ceilings
from train.kernel_names import COMPILED, COPIES, ELEMENTWISE, GELU_BACKWARD, GELU_FORWARD, OTHER, ROWS
from train.timeline import Timeline

NAMED = 8  # operations whose names are listed, of those that no row knows
ROW_OF_PART = dict.fromkeys(MATMULS, "matmuls") | {
    "embedding forward": "embeddings",
    "embedding backward": "embeddings",
    "accumulation": ELEMENTWISE,
    "clearing": COPIES,
}


@dataclass(frozen=True)
class Row:
    name: str
    seconds: float  # a step
    floor: float = 0.0  # seconds a step, at least; 0: nothing that a step needs


class Bounds:
    """What the parts of a step take at least, on a device of these ceilings; settings are `step_work`'s."""

    def __init__(self, ceilings: Ceilings, config: GPTConfig, batch_size: int, **settings: int) -> None:
        self.ceilings = ceilings
        self._apart, self._fused = (
            step_work(config, batch_size, **settings, fused_gelu=fused) for fused in (False, True)
        )

    def seconds(self, work: Work) -> float:
        return floor(work, self.ceilings.flops, self.ceilings.bandwidth)

    def by_row(self, seen: set[str]) -> Counter[str]:
        """The floors of the rows that have any, in seconds. `seen`: the rows that took time.

        What a step must do and no row of its own did is torch.compile's work, or else some unknown operation's.
        """
        work, floors = dict(self._apart), Counter[str]()
        for row, linear, gelu in (
            (GELU_FORWARD, "mlp up", "GELU forward"),
            (GELU_BACKWARD, "mlp down", "GELU backward"),
        ):
            if row in seen:  # one of the linear layer's three products is not among the other matmuls
                product = Work(work[linear].flops // 3, work[linear].bytes // 3)
                work[linear] = product * 2
                floors[row] = self.seconds(product + self._fused[gelu])
                del work[gelu]
        elsewhere = COMPILED if COMPILED in seen else OTHER
        for part, least in work.items():
            row = ROW_OF_PART.get(part, part)
            floors[row if row in seen else elsewhere] += self.seconds(least)
        return floors


def breakdown(timeline: Timeline, steps: int, bounds: Bounds) -> list[Row]:
    """The rows that took time or must, in the order of ROWS. Their seconds add up to those of a step, by the wall."""
    floors = bounds.by_row({row for row, microseconds in timeline.rows.items() if microseconds > 0})
    rows = [Row(name, timeline.rows[name] / 1e6 / steps, floors[name]) for name in ROWS]
    return [row for row in rows if row.seconds > 0 or row.floor > 0]


def report(timeline: Timeline, steps: int, bounds: Bounds, host: float | None) -> str:
    """The profile for people. host: seconds that the host takes for a step; None: not worth a line."""
    rows, wall = breakdown(timeline, steps, bounds), timeline.wall / 1e6 / steps
    ceilings = (
        f"{bounds.ceilings.flops / 1e12:.4g} TFLOP/s in a matmul, {bounds.ceilings.bandwidth / 1e9:.4g} GB/s in a copy"
    )
    lines = [
        f"profile: {steps} steps of {1e3 * wall:.3f} ms; floors are for {ceilings}, as measured",
        f"{'':<24}{'ms':>10}{'share':>9}{'floor ms':>11}{'reached':>10}",
        *(_line(row, wall) for row in rows),
        _line(Row("total", sum(row.seconds for row in rows), sum(row.floor for row in rows)), wall),
    ]
    unknown = [(name, time) for (row, name), time in timeline.names.most_common() if row == OTHER][:NAMED]
    if unknown:
        lines.append("other: " + ", ".join(f"{name[:60]} {time / 1e3 / steps:.3f} ms" for name, time in unknown))
    if host is not None:
        lines.append(f"host: {1e3 * host:.2f} ms a step, {host / wall:.1%} of it")
    return "\n".join(lines)


def _line(row: Row, wall: float) -> str:
    line = f"{row.name:<24}{1e3 * row.seconds:>10.3f}{row.seconds / wall:>9.1%}"
    if row.floor:
        line += f"{1e3 * row.floor:>11.3f}" + (f"{row.floor / row.seconds:>10.0%}" if row.seconds else "")
    return line
