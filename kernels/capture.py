"""One CUDA graph: what it takes to record it, and to say why it could not be recorded."""

from collections.abc import Callable

import torch


def capture_graph(run: Callable[[], object], stream: torch.cuda.Stream, pool: tuple[int, int]) -> Callable[[], None]:
    """Record what `run` launches on `stream`, its memory out of `pool`; returns the graph's replay.

    Raises what `run` raises. A capture that fails leaves its stream the current one: the caller enters it before.
    """
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
        if failed is not None:  # ending the capture has failed too, and says less about why
            raise failed from None
        raise
    return graph.replay
