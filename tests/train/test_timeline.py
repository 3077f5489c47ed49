"""Whose time it is: traces made up by hand, and every instant of them accounted for."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.kernel_names import COPIES, IDLE, OTHER
from train.timeline import WINDOW, Span, attribute, read


def event(name: str, ts: float, dur: float, cat: str = "kernel", tid: int = 7) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": tid, "ts": ts, "dur": dur}


def trace(*events: dict) -> dict:
    """From 100 to 200 counts, on thread 1."""
    window = event(WINDOW, 100, 100, cat="user_annotation", tid=1)
    return {"traceEvents": [{"ph": "M", "name": "process_name"}, window, *events]}


def test_kernels_copies_and_memsets_one_after_another() -> None:
    timeline = read(
        trace(
            event("nvjet_tst_256x128_64x4", 110, 30),
            event("Memset (Device)", 140, 5, cat="gpu_memset"),
            event("Memcpy DtoD (Device -> Device)", 145, 5, cat="gpu_memcpy"),
            event("nvjet_tst_256x128_64x4", 160, 10),
            # none of the device's own time
            event("aten::mm", 100, 90, cat="cpu_op", tid=1),
            event("cudaLaunchKernel", 105, 3, cat="cuda_runtime", tid=1),
            event(WINDOW, 110, 60, cat="gpu_user_annotation"),
            event("iteration 5", 110, 60, cat="gpu_user_annotation"),
        ),
        cuda=True,
    )
    assert timeline.wall == 100
    assert timeline.rows == {"matmuls": 40, COPIES: 10, IDLE: 50}
    assert timeline.names["matmuls", "nvjet_tst_256x128_64x4"] == 40


def test_what_lies_outside_is_cut_off() -> None:
    timeline = read(trace(event("nvjet", 90, 20), event("gemm", 195, 20), event("gemm", 210, 20)), cuda=True)
    assert timeline.rows == {"matmuls": 15, IDLE: 85}


def test_communication_counts_where_nothing_hides_it() -> None:
    nccl = event("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 120, 60, tid=20)
    timeline = read(trace(event("nvjet", 110, 30), nccl, event("nvjet", 150, 10)), cuda=True)
    assert timeline.rows == {"matmuls": 40, "communication": 10 + 20, IDLE: 10 + 20}


def test_two_streams_share_no_instant() -> None:
    timeline = read(trace(event("nvjet", 110, 40), event("gelu_fwd_kernel", 120, 10, tid=8)), cuda=True)
    assert timeline.rows == {"matmuls": 30, "GELU forward": 10, IDLE: 60}


def test_on_a_cpu_each_operation_has_its_own_time() -> None:
    timeline = read(
        trace(
            event("aten::native_layer_norm", 110, 50, cat="cpu_op", tid=1),
            event("aten::empty", 120, 10, cat="cpu_op", tid=1),  # a part of it
            event("aten::mm", 140, 10, cat="cpu_op", tid=1),  # says itself what it is
            event("aten::zeros", 170, 10, cat="cpu_op", tid=1),
            event("some::op", 172, 2, cat="cpu_op", tid=1),
            event("aten::mm", 100, 100, cat="cpu_op", tid=2),  # another thread's
        ),
        cuda=False,
    )
    assert timeline.rows == {"LayerNorm forward": 40, "matmuls": 10, COPIES: 8, OTHER: 2, IDLE: 40}
    assert timeline.names["LayerNorm forward", "aten::empty"] == 10


def test_a_trace_without_its_window_is_refused() -> None:
    with pytest.raises(ValueError, match="trace: got 0 events named"):
        read({"traceEvents": []}, cuda=False)
    with pytest.raises(ValueError, match="trace: got 2 events named"):
        read(trace(event(WINDOW, 0, 1, cat="user_annotation")), cuda=True)


SPANS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "communication"]), st.integers(0, 40), st.integers(0, 40)), max_size=12
)


@given(SPANS)
def test_every_instant_is_somebodys(drawn: list[tuple[str, int, int]]) -> None:
    """Against the rule, asked at every instant."""
    spans = [Span(f"{row} {i}", row, min(ends), max(ends)) for i, (row, *ends) in enumerate(drawn)]
    timeline = attribute(spans, 5, 35)
    assert sum(timeline.rows.values()) == timeline.wall == 30
    rows = Counter()
    for instant in range(5, 35):
        running = [span for span in spans if span.start <= instant < span.end]
        rows[_owner(running)] += 1
    assert rows == +timeline.rows


def _owner(running: list[Span]) -> str:
    """The one that began last; of several the one that ends first, or stands last. All are cut off at 5 and at 35."""
    if not running:
        return IDLE
    computing = [span for span in running if span.row != "communication"] or running
    return max(reversed(computing), key=lambda span: (max(span.start, 5), -min(span.end, 35))).row
