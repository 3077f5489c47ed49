"""Work captured in CUDA graphs: what a capture needs, and why one fails."""

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

WARM_UP = 3  # calls before a capture, in which kernels compile and libraries allocate memory
_FAILED: list[torch.cuda.CUDAGraph] = []  # torch's allocator of pinned memory may still ask them which stream they had


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device. cuBLAS keeps a workspace for every stream on which it was ever called,
    and for every thread that called it there: 32 MiB each on an H100, as long as the process lives."""
    return torch.cuda.Stream(device)


def capture_graphs(
    warm_ups: Sequence[Callable[[], object]],
    runs: Sequence[Callable[[], object]],
    stream: torch.cuda.Stream,
    pool: tuple[int, int],
) -> list[Callable[[], None]]:
    """Capture what each of `runs` launches in a graph, its memory out of `pool`. Returns the graphs' replays.

    Every warm-up is called WARM_UP times, before the first capture: a capture keeps its memory, and a later warm-up
    would need more memory beside it. Warm-ups and captures share `stream`, a side stream. So cuBLAS allocates its
    workspace for that stream before the captures and outside the pool, and no autograd node remembers another stream.
    Raises what warm-ups and runs raise. Then `pool` must not be used again.
    """
    stream.wait_stream(torch.cuda.current_stream())
    # entered here too, because a capture that fails does not restore the current stream
    try:
        with torch.cuda.stream(stream):
            for warm_up in warm_ups:
                for _ in range(WARM_UP):
                    warm_up()
            return [_captured(run, stream, pool) for run in runs]
    finally:  # also where it fails: the caller clears what the warm-ups wrote, and they may still run
        torch.cuda.current_stream().wait_stream(stream)


def _captured(run: Callable[[], object], stream: torch.cuda.Stream, pool: tuple[int, int]) -> Callable[[], None]:
    graph, failed = torch.cuda.CUDAGraph(), None
    try:
        # thread_local: the loader's thread may allocate pinned memory meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                run()
            except Exception as error:
                failed = error
                raise
    except Exception:
        _clean_up(graph, stream, pool)
        if failed is not None:  # ending the capture has failed too, and says less about why
            raise failed from None
        raise
    return graph.replay


def _clean_up(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: tuple[int, int]) -> None:
    """End what a failed capture began. If CUDA invalidated it, as it does when work waits for the device, torch's
    `capture_end` raises before it ends anything. Then the allocator still records to the pool: it frees no cached
    memory any more, and refuses other captures with this pool. In torch 2.11 the generator still captures, and refuses
    to draw random numbers, until another capture succeeds."""
    with suppress(RuntimeError):  # only the work had failed: all has ended
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
        _FAILED.append(graph)  # it owns no memory
    with suppress(RuntimeError), warnings.catch_warnings():  # the first error is raised, and says why
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")
        empty, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        with torch.cuda.graph(empty, pool=pool, stream=stream, capture_error_mode="thread_local"):
            pass
