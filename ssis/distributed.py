r"""The few lines that DDP needs.

One process per device, started by torchrun; without torchrun there is one process and
no process group, and every function here is a no-op. On CPUs the backend is gloo.

Why the loop cannot hang: whatever a process finds in its batch, it makes the same
collective calls in the same order as all others. The unlabelled loss, which a process
without pseudo-labels must skip, runs in `no_sync`; only the labelled loss
synchronises gradients, and every process always has labelled images.

Read next: `train.py`, whose step is built on this.
"""

import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssis import UserError


def start(device: str) -> tuple[int, int, torch.device]:
    """Join the process group, if torchrun made one.

    Args:
        device: "auto", "cpu" or "cuda".

    Returns:
        rank, number of processes, and this process's device.

    Raises:
        UserError: "cuda" where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU; use --device cpu, or auto")
    use_gpu = device != "cpu" and torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if use_gpu:
        torch.cuda.set_device(local)
    if world > 1:
        dist.init_process_group(
            "nccl" if use_gpu else "gloo",
            # A process that waits ten minutes for another waits for a dead one.
            timeout=timedelta(minutes=10),
        )
    place = torch.device("cuda", local) if use_gpu else torch.device("cpu")
    return int(os.environ.get("RANK", 0)), world, place


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DDP, where there are several processes."""
    if not dist.is_initialized():
        return model
    ids = [device.index] if device.type == "cuda" else None
    # Buffers are not broadcast: the only ones that change are BatchNorm's statistics,
    # of which rank 0's are saved.
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself: the only place that knows of DDP's `.module`."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """Gradients of this block stay on this process until the next synchronised ones."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes; a new tensor."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def gather(value) -> list:
    """`value` of every process, in rank order, on every process (picklable objects)."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(function, *args):
    """Run `function` on rank 0 only and give its (picklable) result to all.

    A UserError on rank 0 is raised on every rank, so that all of them stop.
    """
    if not dist.is_initialized():
        return function(*args)
    box = [None]
    if dist.get_rank() == 0:
        try:
            box = [("result", function(*args))]
        except UserError as error:
            box = [("error", str(error))]
    dist.broadcast_object_list(box)
    kind, value = box[0]
    if kind == "error":
        raise UserError(value)
    return value


def give_up(error: UserError) -> None:
    """Print the one line and end this process with status 2.

    Raised in a loader worker, the line comes wrapped in the worker's traceback; its
    last line is ours.
    """
    line = str(error).strip().splitlines()[-1].removeprefix("ssis.UserError: ")
    print(f"error: {line}", file=sys.stderr, flush=True)
    # With several processes, not sys.exit: leaving the process group in order means
    # waiting for the others, who may wait for this one. torchrun stops them.
    if dist.is_initialized():
        os._exit(2)
    sys.exit(2)
