"""The ranks of a run: who this process is, and how the ranks agree on what happened."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from codeparrot_ds.engine.private_parts import require
from codeparrot_ds.errors import UserError

T = TypeVar("T")


class SharedError(UserError):
    """A failure that every rank knows of, so that rank 0 alone speaks of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the others.

    Attributes:
        rank: 0 … world_size - 1 over all hosts.
        world_size: how many processes train together.
        local_rank: the rank on this host, which is also its device index.
        device: where this rank's tensors live.
        control: a gloo group for small messages between hosts, so that they never enter the device's queue.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: Any

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def with_own_group(self) -> Ranks:
        """The same ranks with a control group of their own, for a thread beside training; collective."""
        return dataclasses.replace(self, control=dist.new_group(backend="gloo"))

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank (any picklable object)."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in rank order."""
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self.control)
        return box

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks in place and returns it."""
        dist.all_reduce(tensor)
        return tensor

    def together(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on every rank; if it fails on any, every rank raises, so that nobody waits for a lost one.

        Raises:
            SharedError: the failure in one sentence, naming the rank. One that is not the user's keeps its traceback
            on the rank where it happened.
        """
        result: Any = None
        failure: Exception | None = None
        mistake = True
        try:
            result = work()
        except (UserError, OSError) as error:
            failure = error
        except Exception as error:
            failure, mistake = error, False
        reports = self.gather(None if failure is None else (str(failure) or type(failure).__name__, mistake))
        failed = [(rank, *report) for rank, report in enumerate(reports) if report is not None]
        if not failed:
            return result
        if failure is not None and not mistake:
            raise failure
        rank, sentence, _ = failed[0]
        where = "" if len(failed) == self.world_size or self.world_size == 1 else f"rank {rank}: "
        raise SharedError(where + sentence) from failure

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on rank 0 and hands its result, or its failure, to every rank."""

        def main() -> Any:
            return work() if self.is_main else None

        return self.broadcast(self.together(main))


def join_ranks() -> Ranks:
    """Joins the process group that the launcher's environment describes (``RANK``, ``WORLD_SIZE`` …)."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
    else:
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    build_no_shared_memory_operator()
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        device=device,
        control=dist.new_group(backend="gloo"),
    )


def build_no_shared_memory_operator() -> None:
    """Keeps DeepSpeed from building a C++ operator for inference's all-reduce when a rank joins, in all ranks at once.

    Training has no use for it.
    """
    import deepspeed

    require("build_shm_op.__compatible_ops__")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def leave_ranks() -> None:
    """Ends the process group; without it ZeRO-3 aborts at exit and the launcher reports a failure."""
    if dist.is_initialized():
        dist.destroy_process_group()
