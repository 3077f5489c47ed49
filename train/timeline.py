"""A trace of torch.profiler, read: to which operation each instant of the profiled steps belongs.

On a CUDA device those are kernels, copies and memsets, whichever stream they run on, the replays of graphs included; on
a CPU torch's operations, as the training thread runs them. At any instant the one that began last owns the time: of
nested operations the innermost, so that each gets its own time; communication only what nothing else runs beside. What
nobody owns is idle, so the times add up to the wall's.
"""

import heapq
from collections import Counter
from typing import Any, NamedTuple

from train.kernel_names import IDLE, UNSPECIFIC, row_of

WINDOW = "nanofuse: profiled steps"  # the annotation that spans what counts
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a trace's events


class Span(NamedTuple):
    name: str
    row: str
    start: float  # microseconds, as all times here
    end: float


class Timeline(NamedTuple):
    wall: float
    rows: Counter[str]  # row -> its time; with idle, they add up to `wall`
    names: Counter[tuple[str, str]]  # (row, name) -> its time


def read(trace: dict[str, Any], *, cuda: bool) -> Timeline:
    """The timeline of a parsed Chrome trace. ValueError where it has no event named WINDOW, or not just one."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    windows = [e for e in events if e.get("name") == WINDOW and e.get("cat") == "user_annotation"]
    if len(windows) != 1:
        raise ValueError(f"trace: got {len(windows)} events named {WINDOW!r}, expected 1")
    (window,) = windows
    begin, end = window["ts"], window["ts"] + window["dur"]
    if cuda:
        spans = [_span(e, row_of(e["name"])) for e in events if e.get("cat") in ON_DEVICE]
    else:
        ops = [e for e in events if e.get("cat") == "cpu_op" and e["tid"] == window["tid"]]
        spans = _nested([_span(e, row_of(e["name"])) for e in ops])
    return attribute(spans, begin, end)


def _span(event: dict[str, Any], row: str) -> Span:
    return Span(event["name"], row, event["ts"], event["ts"] + event["dur"])


def _nested(spans: list[Span]) -> list[Span]:
    """Spans of one thread; what its name does not tell about is its parent's: a copy within AdamW belongs to AdamW."""
    result: list[Span] = []
    parents: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while parents and parents[-1].end <= span.start:
            parents.pop()
        if parents and span.row in UNSPECIFIC and parents[-1].row not in UNSPECIFIC:
            span = span._replace(row=parents[-1].row)
        parents.append(span)
        result.append(span)
    return result


def attribute(spans: list[Span], begin: float, end: float) -> Timeline:
    """Every instant from `begin` to `end` to one span, or to IDLE."""
    clipped = [s._replace(start=max(s.start, begin), end=min(s.end, end)) for s in spans]
    order = sorted((s for s in clipped if s.start < s.end), key=lambda s: (s.start, -s.end))
    rows, names = Counter[str](), Counter[tuple[str, str]]()
    running: list[tuple[bool, int]] = []  # a heap: whether it communicates, and the last to start first
    now, following = begin, 0
    while running or following < len(order):
        while running and order[-running[0][1]].end <= now:
            heapq.heappop(running)
        starts = order[following].start if following < len(order) else end
        if running:
            owner = order[-running[0][1]]
            until = min(owner.end, starts)
            rows[owner.row] += until - now
            names[owner.row, owner.name] += until - now
        elif following == len(order):
            break
        else:
            until = starts
            rows[IDLE] += until - now
        now = until
        while following < len(order) and order[following].start <= now:
            heapq.heappush(running, (order[following].row == "communication", -following))
            following += 1
    rows[IDLE] += end - now
    return Timeline(end - begin, rows, names)
