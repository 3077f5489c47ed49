"""Ranks: what torchrun starts, and the few things that they tell each other besides gradients."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from train.errors import UserError
from train.flat import FlatState


@dataclass
class World:
    """This process's place among the ranks; a lone process is rank 0 of 1 and every exchange is free."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    _asked: tuple[dist.Work, Tensor] | None = field(default=None, repr=False)

    @property
    def master(self) -> bool:
        """Whether this rank talks to the console and writes files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor of the same shape on each, in place; waits for the others."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_master(self, value: int) -> int:
        """Rank 0's value, on every rank; waits for it."""
        return int(self.sum(torch.tensor(value if self.master else 0)))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            self.sum(torch.zeros(1))

    def agree(self, value: int) -> int:
        """Tell the others `value`; returns the largest that any rank told in the *previous* call (0 in the first).

        Every rank gets the same answer in the same iteration, so that all stop together. One call late, so that the
        exchange runs during a whole training step and no rank waits for it.
        """
        if self.size == 1:
            return value
        answer = self._answer()
        told = torch.tensor(value)
        self._asked = dist.all_reduce(told, dist.ReduceOp.MAX, async_op=True), told
        return answer

    def part(self) -> None:
        """Finish the last exchange and wait for the others: nothing is under way when the ranks end."""
        self._answer()
        self.barrier()

    def _answer(self) -> int:
        if self._asked is None:
            return 0
        (work, told), self._asked = self._asked, None
        work.wait()
        return int(told.item())


class Reducer:
    """Sums flat gradients over the ranks, in few large pieces, while the backward pass still makes the others.

    `start_with_backward` before the last micro-step of a step, `finish` after it. Then each piece is gathered here, as
    it is sent. Without the first, as where micro-steps are captured, they have gathered all themselves, and all is
    summed in `finish`. Every rank's backward pass goes the same way, so all sum the same piece at the same time.
    """

    def __init__(self, world: World, flat: FlatState, piece: int = 2**23) -> None:
        """piece: elements, at least, of one exchange."""
        self.world, self.flat = world, flat
        self._pieces, self._piece_of = [], {}
        begin, members = 0, []
        for leaf, place in flat.leaves.items():
            members.append(leaf)
            if place.stop - begin >= piece:
                begin = self._cut(begin, place.stop, members)
        if members:
            self._cut(begin, len(flat.total), members)
        for leaf in flat.leaves:
            leaf.register_post_accumulate_grad_hook(self._arrived)
        self._missing: list[int] | None = None  # by piece: gradients still to come; None: not watching
        self._sent: dict[int, dist.Work] = {}

    def _cut(self, begin: int, end: int, members: list[Tensor]) -> int:
        self._piece_of |= dict.fromkeys(members, len(self._pieces))
        self._pieces.append((slice(begin, end), len(members)))
        members.clear()
        return end

    @property
    def sizes(self) -> list[int]:
        """Elements of each exchange. The backward pass completes the last one's gradients first."""
        return [part.stop - part.start for part, _ in self._pieces]

    @property
    def overlapping(self) -> bool:
        """Whether pieces are sent, and gathered, as they come."""
        return self._missing is not None

    def start_with_backward(self) -> None:
        """Send each piece as soon as its gradients are there."""
        self._missing = [count for _, count in self._pieces]

    def _arrived(self, leaf: Tensor) -> None:
        if self._missing is not None:
            piece = self._piece_of[leaf]
            self._missing[piece] -= 1
            if self._missing[piece] == 0:
                self._send(piece)

    def _send(self, piece: int) -> None:
        part, _ = self._pieces[piece]
        total = self.flat.gather(part) if self.overlapping else self.flat.total[part]
        self._sent[piece] = dist.all_reduce(total, async_op=True)

    def finish(self) -> None:
        """Send what is left and wait for all."""
        for piece in range(len(self._pieces)):
            if piece not in self._sent:
                self._send(piece)
        for work in self._sent.values():
            work.wait()
        self._sent.clear()
        self._missing = None


def world_from_environment() -> World:
    """The place that torchrun gave this process by RANK, LOCAL_RANK and WORLD_SIZE; alone without them."""
    if "RANK" not in os.environ:
        return World()
    try:
        return World(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"RANK, LOCAL_RANK, WORLD_SIZE: expected three integers as torchrun sets them ({error})"
        ) from error


def local_device(device: torch.device, world: World) -> torch.device:
    """The device of this rank: ranks on a machine take its GPUs in order. UserError for more ranks than GPUs."""
    if world.size == 1 or device.type != "cuda":
        return device
    if world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"nproc_per_node: got more than {world.local_rank}, expected at most {torch.cuda.device_count()}, one a "
            f"GPU; with --device=cpu any number runs"
        )
    return torch.device("cuda", world.local_rank)


@contextmanager
def process_group(world: World, backend: str, device: torch.device) -> Iterator[None]:
    """Join the ranks, and part again. Gradients on GPUs travel by NCCL, all else by gloo.

    A rank that fails does not wait for the others, which may never come: it ends, and torchrun ends them.
    """
    if world.size == 1:
        yield
        return
    gpu = "nccl" if backend == "auto" else backend
    try:
        dist.init_process_group("gloo" if device.type != "cuda" else f"cpu:gloo,cuda:{gpu}")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"backend: {backend!r} could not join {world.size} ranks: {error}") from error
    yield
    world.part()
    dist.destroy_process_group()
