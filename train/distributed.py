"""Ranks, which torchrun starts, and what they exchange."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from train.errors import RunError, UserError, shown


@dataclass
class World:
    """This process's place among the ranks. A single process is rank 0 of 1, and its exchanges do nothing."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    parent: int | None = field(default=None, compare=False, repr=False)  # torchrun's process id, None without it
    _exchange: tuple[dist.Work, Tensor] | None = field(default=None, repr=False)

    @property
    def master(self) -> bool:
        """Whether this rank prints and writes files."""
        return self.rank == 0

    @property
    def orphaned(self) -> bool:
        """Whether torchrun, which started this rank, has ended without ending it: another may take its place."""
        return self.parent is not None and os.getppid() != self.parent

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place. It has the same shape on each. Waits for the others."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_master(self, *values: float) -> list[float]:
        """Rank 0's values, on every rank. Waits for rank 0."""
        if self.size == 1:
            return [*values]
        return self.sum(torch.tensor([value if self.master else 0 for value in values], dtype=torch.float64)).tolist()

    def check_alike(self, got: str, *facts: object, remedy: str = "all machines must read the same files") -> None:
        """UserError on each rank whose `facts`, numbers and text about what it got, are not rank 0's. Waits for it."""
        digest = zlib.crc32(repr(facts).encode())
        if self.from_master(digest) != [digest]:
            raise UserError(f"rank {self.rank}: {got}, other than rank 0; {remedy}")

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum(torch.zeros(1))

    def agree(self, value: int) -> int:
        """Send `value` to the others. Returns the largest value sent in the *previous* call, 0 in the first.

        Every rank gets the same answer in the same iteration, so all stop together. The answer comes one call late:
        the exchange runs during a training step, and no rank waits for it. A single process gets `value` at once.
        """
        if self.size == 1:
            return value
        answer = self.finish_exchange()
        sent = torch.tensor(value)
        self._exchange = dist.all_reduce(sent, dist.ReduceOp.MAX, async_op=True), sent
        return answer

    def finish_exchange(self) -> int:
        """The result of the last `agree`; 0 if there is none under way."""
        if self._exchange is None:
            return 0
        (work, largest), self._exchange = self._exchange, None
        work.wait()
        return int(largest.item())


def world_from_environment() -> World:
    """The place that torchrun sets in RANK, LOCAL_RANK and WORLD_SIZE. Without them, a single process."""
    if "RANK" not in os.environ:
        return World()
    parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    given = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    numbers = [int(text) for text in given if text.isdecimal()]
    if len(numbers) < 3 or max(numbers[:2]) >= numbers[2]:
        came = shown(", ".join(given))
        raise UserError(f"RANK, LOCAL_RANK, WORLD_SIZE: got {came}, expected ranks from 0 to WORLD_SIZE - 1")
    return World(*numbers, parent)


def local_device(device: torch.device, world: World) -> torch.device:
    """The device of this rank. The ranks of a machine take its GPUs in order. UserError for more ranks than GPUs."""
    if world.size == 1 or device.type != "cuda":
        return device
    if world.local_rank >= torch.cuda.device_count():
        most = f"{torch.cuda.device_count()}, one a GPU; with --device=cpu any number runs"
        raise UserError(f"nproc_per_node: got more than {world.local_rank}, expected at most {most}")
    return torch.device("cuda", world.local_rank)


def _lost(error: RuntimeError) -> str:
    """What an exchange that failed says of the ranks. gloo's only fail where a rank has ended. NCCL has reasons of its
    own, which every rank meets and nobody else would tell: no shared memory in a container, an unsuitable network."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "NCCL" not in str(error) or len(lines) < 2:
        return "another rank has ended, which says why"
    return f"NCCL failed, or another rank has ended, which says why: {lines[0]} {lines[-1]}"


@contextmanager
def process_group(world: World, backend: str, device: torch.device) -> Iterator[None]:
    """Join the ranks; at the end, leave them. NCCL sends gradients between GPUs, gloo everything else.

    A rank that fails does not wait for the others: it exits, and torchrun stops them. RunError on those that lose it.
    """
    if world.size == 1:
        yield
        return
    if backend == "nccl" and device.type != "cuda":
        raise UserError(f"backend: got 'nccl', expected auto or gloo on {device.type}: NCCL works between GPUs alone")
    gpu = "nccl" if backend == "auto" else backend
    try:
        dist.init_process_group("gloo" if device.type != "cuda" else f"cpu:gloo,cuda:{gpu}")
    except (RuntimeError, ValueError) as error:
        # gloo listens where the host's name leads; torchrun's store keeps the addresses of ranks before a restart
        told = "on several machines, GLOO_SOCKET_IFNAME must name the network card that joins them; "
        told += "for --max-restarts, give torchrun TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        raise UserError(f"backend: {backend!r} could not join {world.size} ranks: {error}; {told}") from error
    try:
        yield
        world.finish_exchange()  # none is open when the ranks end
        world.barrier()
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RunError(f"rank {world.rank}: {_lost(error)}; --init_from=resume goes on from the last save") from None
    dist.destroy_process_group()
