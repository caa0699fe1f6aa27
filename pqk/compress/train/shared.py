"""Shares one training among processes, such as one per GPU: `Shared`, `equalize`, `average_gradients`, `wait`.

Every process draws the whole batch of a step, so that its samples are the same whatever the number of processes; runs
the network on its share of them; and computes the loss of the whole batch from the outputs of all. So a loss that is no
mean over samples (of valid pixels, of matched boxes, with a quantile) is that of one process with the whole batch, and
so are the gradients, but for the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pqk.compress.train.loop import world
from pqk.errors import PqkError
from pqk.families.contract import Family, LearningPart
from pqk.settings.training import Training

_PATIENCE = timedelta(days=30)
"""Others wait while the first process cuts or validates; one that dies ends all of them (`pqk.store.ranks`)."""


def is_first() -> bool:
    """Returns whether this process validates, writes and reports; true without other processes."""
    return world()[0] == 0


def connect() -> None:
    """Joins the processes that torchrun started, over gloo, and NCCL for tensors on CUDA; nothing for one process."""
    rank, processes = world()
    if processes == 1 or dist.is_initialized():
        return
    cuda = torch.cuda.is_available() and rank < torch.cuda.device_count()
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)


def wait() -> None:
    """Returns when all processes have called it: what the first one wrote before is there."""
    connect()
    if world()[1] > 1:
        dist.all_reduce(torch.zeros(1))


def equalize(model: nn.Module) -> None:
    """Gives the weights of the first process to all; nothing for one process."""
    if world()[1] == 1:
        return
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, 0)
            tensor.copy_(sent)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces every gradient by its mean over all processes; a weight that no process has a gradient of keeps none."""
    processes = world()[1]
    if processes == 1:
        return
    trained = [one for one in parameters if one.requires_grad]
    used = torch.tensor([one.grad is not None for one in trained], dtype=torch.int32, device=trained[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    grads = []
    for one, anywhere in zip(trained, used.tolist(), strict=True):
        if anywhere:
            one.grad = torch.zeros_like(one) if one.grad is None else one.grad
            grads.append(one.grad)
    if not grads:
        return
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    flat /= processes
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def check_processes(family: Family, asked: Training, processes: int, section: str) -> None:
    """Raises PqkError where the processes cannot share a batch of this training, or the family none.

    section: of the settings, such as 'distill.train'.
    """
    learning = family.learning_part()
    if processes > 1 and not hasattr(learning, "joined"):
        raise PqkError(f"the family {family.name} trains in one process; leave --processes out")
    smallest = min(stage.batch for stage in asked.stages)
    if smallest < processes:
        raise PqkError(
            f"{section}.stages: a batch of {smallest} {learning.UNIT} cannot be shared by the {processes} processes "
            "of --processes"
        )


class _Sum(torch.autograd.Function):
    """Sum over all processes. Each computes the same loss of it, so a gradient is its own times their number: averaged
    with those of the others, the weights' gradients are those of one process.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * world()[1]


class Shared(nn.Module):
    """The forward pass of a family (`Forward`): this process's share of a batch in, outputs for the whole batch out."""

    def __init__(self, whole: nn.Module, learning: LearningPart) -> None:
        super().__init__()
        self.whole, self._learning = whole, learning

    def forward(self, batch: Any) -> dict[str, Any]:
        """Raises PqkError for a batch with fewer samples than processes."""
        rank, processes = world()
        part: Any = self._learning
        samples = part.samples(batch)
        if samples < processes:
            raise PqkError(
                f"a batch of {samples} {part.UNIT} cannot be shared by the {processes} processes of --processes; "
                "raise batch in train.stages"
            )
        first, last = (samples * number // processes for number in (rank, rank + 1))

        def join(values: Tensor, axis: int = 0, orders: int = 1) -> Tensor:
            own = values.movedim(axis, 0)
            own = own.reshape(orders, last - first, *own.shape[1:])
            places = own.new_zeros(orders, samples, *own.shape[2:])
            places[:, first:last] = own
            found: Tensor = _Sum.apply(places)
            return found.flatten(0, 1).movedim(0, axis)

        found: dict[str, Any] = part.joined(self.whole(part.share(batch, first, last)), join)
        return found
