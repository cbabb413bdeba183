"""Gradients and their buckets through a backward pass, as each of DeepSpeed's optimizers holds them.

File names are those of DeepSpeed 0.19.8 under ``deepspeed/runtime/``. All sizes are rank 0's, which holds the token
embedding in stages 1 and 2 and with it the most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from codeparrot_ds.memory.model_memory import FP32, Moment, Parameter

NORM_WIDTH = 8  # utils.py, get_norm_dtype: gradient norms are taken in fp64
LEAN_SMALL = 2**16  # engine/lean_step.py, SMALL: gradients below it are put together before they are cast
# Elements that `engine.allreduce_gradients` flattens at once (engine.py, MEMORY_OPT_ALLREDUCE_SIZE).
STAGE0_BUCKET_ELEMENTS = 500_000_000


@dataclass(frozen=True)
class GradientMemory:
    """Bytes at one moment: finished gradients, buckets, and what lives for that moment only (a `Moment`'s included)."""

    gradients: int = 0
    buckets: int = 0
    temporary: int = 0


@dataclass(frozen=True)
class Partition:
    """Rank 0's share of one parameter group, which is cut into equal flat parts.

    Padding: to a multiple of twice the ranks (``nccl_start_alignment_factor`` in ``zero/stage_1_and_2.py`` and
    ``bf16_optimizer.py``).
    """

    members: tuple[Parameter, ...]
    world_size: int

    @cached_property
    def flat_numel(self) -> int:
        """Elements of the whole group with padding."""
        alignment = 2 * self.world_size
        return math.ceil(sum(member.numel for member in self.members) / alignment) * alignment

    @cached_property
    def numel(self) -> int:
        """Elements that this rank updates."""
        return self.flat_numel // self.world_size

    @cached_property
    def owned(self) -> list[Parameter]:
        """Parameters that lie wholly or partly in the share (``get_partition_info``)."""
        found, start = [], 0
        for member in self.members:
            if start < self.numel:
                found.append(member)
            start += member.numel
        return found

    @cached_property
    def slices(self) -> dict[str, int]:
        """Elements of each parameter that lie in the share (``grad_position``)."""
        found, left = {}, self.numel
        for member in self.owned:
            found[member.name] = min(member.numel, left)
            left -= found[member.name]
        return found

    @property
    def largest_slice(self) -> int:
        """Elements of the largest piece of a parameter in the share."""
        return max(self.slices.values(), default=0)

    @property
    def pieces(self) -> int:
        """Tensors that make up the share: its parameters, and padding."""
        return len(self.owned) + (self.world_size == 1 and self.flat_numel > sum(m.numel for m in self.members))

    def owners(self) -> dict[str, tuple[int, int]]:
        """First and last rank that own a part of each parameter."""
        found, start = {}, 0
        for member in self.members:
            found[member.name] = (start // self.numel, (start + member.numel - 1) // self.numel)
            start += member.numel
        return found


def partitions(members: Iterable[Parameter], world_size: int) -> list[Partition]:
    """The shares of the two groups that ``get_grouped_params`` makes: with weight decay and without."""
    members = list(members)
    groups = [tuple(m for m in members if m.decayed), tuple(m for m in members if not m.decayed)]
    return [Partition(group, world_size) for group in groups if group]


def partition_numel(parameter: Parameter, world_size: int) -> int:
    """Elements of a parameter that each rank holds in stage 3 (``zero/partition_parameters.py``, ``_padding_size``)."""
    return math.ceil(parameter.numel / world_size)


def whole_gradients(
    moments: Sequence[Moment], *, width: int, carried: bool, world_size: int, reduces_at_end: bool = True
) -> list[GradientMemory]:
    """Every rank keeps every gradient: stage 0, and stage 1 without ``overlap_comm``.

    Args:
        moments: of the backward pass.
        width: bytes of a gradient element.
        carried: whether earlier micro-batches left their gradients, which this one's are added to.
        world_size: ranks.
        reduces_at_end: whether the last moment flattens gradients to reduce them (``engine.py``,
            ``buffered_allreduce_fallback``, up to 5e8 elements and the parameter that exceeds them).
    """
    total = width * sum(parameter.numel for moment in moments for parameter in moment.arriving)
    held = total if carried else 0
    found = []
    for moment in moments:
        arriving = width * sum(parameter.numel for parameter in moment.arriving)
        if carried:
            found.append(GradientMemory(gradients=held, temporary=arriving + moment.temporary))
        else:
            held += arriving
            found.append(GradientMemory(gradients=held, temporary=moment.temporary))
    copy = min(total, STAGE0_BUCKET_ELEMENTS * width) if reduces_at_end and world_size > 1 else 0
    return [*found, GradientMemory(gradients=total, temporary=copy)]


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """How stages 1 and 2 gather gradients before they reduce them (``zero/stage_1_and_2.py``)."""

    elements: int
    """``reduce_bucket_size``; a bucket is allocated whole, whatever the model's size (``setup_buckets``)."""
    count: int
    """2 with ``overlap_comm``."""
    width: int
    """Bytes of an element: of the weights, or of the accumulation dtype at stage 1."""
    communication_width: int
    """Bytes of an element on the wire; another dtype costs a copy."""

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return self.elements * self.count * self.width


class PartitionedGradients:
    """Stages 1 and 2 on rank 0: gradients go into a bucket as they come, and a full bucket is reduced.

    Reducing flattens the bucket once more when it holds parts of several ranks (``allreduce_bucket``), then copies the
    parameters that this rank owns, whole, into a buffer of their own (``copy_grads_in_partition``); or, when gradients
    are accumulated in fp32 beside 16-bit weights, adds the owned slices to a flat fp32 partition
    (``_get_compact_grad_partition_slice``).
    """

    def __init__(self, shares: Sequence[Partition], buckets: Buckets, *, compact: bool, offloaded: bool) -> None:
        self.buckets, self.compact, self.offloaded = buckets, compact, offloaded
        self.owners = {name: ranks for share in shares for name, ranks in share.owners().items()}
        self.slices = {name: numel for share in shares for name, numel in share.slices.items()}
        self.shares = shares
        self.pending: list[Parameter] = []
        self.owned_bytes = self._owned_bytes()
        self.allocated = False

    def _owned_bytes(self) -> int:
        if self.compact:
            return sum(share.numel for share in self.shares) * FP32
        return sum(member.numel for share in self.shares for member in share.owned) * self.buckets.width

    def run(self, moments: Sequence[Moment], *, carried: int, whole: bool, gradient_width: int) -> list[GradientMemory]:
        """Memory at each moment of a backward pass that reduces, and after its last bucket.

        Args:
            moments: of the backward pass.
            carried: bytes of this rank's gradients from earlier micro-batches.
            whole: whether the earlier micro-batches left whole gradients on the parameters (stage 1), which are
                added to in place and go into the bucket from there.
            gradient_width: bytes of an element of those.
        """
        left = gradient_width * sum(p.numel for moment in moments for p in moment.arriving) if whole else 0
        # Stage 1 allocates its buckets in the first micro-batch and keeps them to the last.
        bucketed = whole
        found = []
        for moment in moments:
            before, copies = self._held(carried), 0
            bucketed = bucketed or bool(moment.arriving)
            for parameter in moment.arriving:
                copies = max(copies, self._add(parameter))
                left -= gradient_width * parameter.numel if whole else 0
            arriving = self.buckets.width * sum(parameter.numel for parameter in moment.arriving)
            # The copy is gone when the buffer of owned gradients is made; a hook runs when the gradient is complete.
            temporary = max(arriving + moment.temporary, copies - (self._held(carried) - before))
            found.append(GradientMemory(left + self._held(carried), self.buckets.bytes * bucketed, temporary))
        before, copies = self._held(carried), self._reduce()
        held = self._held(carried)
        return [*found, GradientMemory(held, self.buckets.bytes, max(0, copies - (held - before)))]

    def reduce_at_end(self, members: Iterable[Parameter], *, gradient_width: int) -> GradientMemory:
        """The peak of stage 1 without ``overlap_comm``: whole gradients, reduced one by one in the groups' order.

        Owned gradients come first on rank 0, so their buffer stands beside nearly all whole ones.
        """
        ordered = sorted(members, key=lambda member: not member.decayed)
        left, peak = gradient_width * sum(member.numel for member in ordered), 0
        for member in ordered:
            before, copies = self._held(0), self._add(member)
            held = self._held(0)
            peak = max(peak, left + max(before + copies, held))
            left -= gradient_width * member.numel
        return GradientMemory(gradients=peak, buckets=self.buckets.bytes)

    def _held(self, carried: int) -> int:
        return carried + (self.owned_bytes if self.allocated else 0)

    def _add(self, parameter: Parameter) -> int:
        """Takes one gradient; returns the bytes of the copy that a full bucket costs."""
        full = sum(waiting.numel for waiting in self.pending) + parameter.numel > self.buckets.elements
        temporary = self._reduce() if full else 0
        self.pending.append(parameter)
        return temporary

    def _reduce(self) -> int:
        waiting, self.pending = self.pending, []
        if not waiting:
            return 0
        numel = sum(parameter.numel for parameter in waiting)
        ranks = {rank for parameter in waiting for rank in self.owners[parameter.name]}
        mine = [parameter for parameter in waiting if self.owners[parameter.name][0] == 0]
        oversized = numel * self.buckets.width if numel > self.buckets.elements else 0
        slices = len(ranks) > 1 or (self.compact and len(mine) > 1)
        copy = numel * self.buckets.width if slices else 0
        if self.buckets.communication_width != self.buckets.width:
            copy += numel * self.buckets.communication_width
        if mine and not self.offloaded:
            self.allocated = True
        return copy + oversized + self._owned_copies(mine)

    def _owned_copies(self, mine: Sequence[Parameter]) -> int:
        """The widest copy of one owned parameter.

        On its way to the host the norm of what this rank owns is taken (``set_norm_for_param_grad_in_gpu``), which
        takes more than its conversion to fp32 after that. The compact partition adds whole gradients in fp32.
        """
        if self.offloaded:
            return NORM_WIDTH * max((self.slices[parameter.name] for parameter in mine), default=0)
        if self.compact:
            return FP32 * max((parameter.numel for parameter in mine), default=0)
        return 0


def lean_step(numels: Iterable[int], flat_numel: int, *, width: int) -> int:
    """What a step that waits for nothing adds for one group: its gradients in fp32, and copies of the small ones."""
    return FP32 * flat_numel + width * sum(numel for numel in numels if numel < LEAN_SMALL)


def sharded_gradients(
    moments: Sequence[Moment], *, bucket_elements: int, width: int, communication_width: int, world_size: int
) -> list[GradientMemory]:
    """Stage 3 (``zero/stage3.py``): one bucket, allocated for good, and partitions that are part of the model's state.

    A full bucket is laid out anew for the reduce-scatter (``reduce_scatter_coalesced`` in
    ``comm/coalesced_collectives.py``); a gradient that is larger than the bucket is reduced where it lies.
    """
    found, filled = [], 0
    for moment in moments:
        temporary = 0
        arriving = width * sum(parameter.numel for parameter in moment.arriving)
        for parameter in moment.arriving:
            if filled and filled + parameter.numel > bucket_elements:
                temporary = max(temporary, filled * communication_width)
                filled = 0
            oversized = parameter.numel > bucket_elements
            filled = 0 if oversized else filled + parameter.numel
            if oversized and parameter.numel % world_size:
                temporary = max(temporary, parameter.numel * communication_width)
        found.append(GradientMemory(temporary=max(arriving + moment.temporary, temporary)))
    return [*found, GradientMemory(temporary=filled * communication_width)]
