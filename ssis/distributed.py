r"""The few lines that DDP needs.

One process per device, started by torchrun; without torchrun there is one process and
no process group, and every function here is a no-op. On CPUs the backend is gloo.

*Why the loop cannot hang.* Whatever is in its batch, every process makes the same
collective calls in the same order. A process without pseudo-labels skips the unlabeled
loss, so this loss is computed on the model itself, not on DDP's wrapper.

*Why two backward passes through different wrappers add up.* DDP wraps the model, it
does not copy it, so both passes have the same parameters, and `backward` *adds* to
`p.grad`. The first pass, through the model itself, leaves each process with the
gradient of its own unlabeled loss. The second, through the wrapper, adds the gradient
of the labeled loss. As soon as `p.grad` of a parameter is complete, DDP replaces it by
its mean over the processes, and so averages the sum of both. The processes wait for
each other here: in the backward pass of the labeled loss, which every process has
(`scaler.scale(objective).backward()` in `train.train_step`).
(The first pass could not go through the wrapper under `no_sync`: even then its second
forward pass waits for all processes, to rebuild its buckets.)

Chain: 22 of 24. Read next: `ssis/config.py`, where every number comes from.
"""

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssis import UserError


# How long a process waits for the others. When one dies, torchrun ends the others at
# once; this limit is for one that hangs. It must be longer than what rank 0 does alone:
# writing a checkpoint to a slow disk, evaluating thousands of images.
PATIENCE = timedelta(hours=1)


def start(device: str, amp: str = "off") -> tuple[int, int, torch.device]:
    """Join the process group, if torchrun made one.

    Args:
        device: "auto", "cpu" or "cuda"; "mps" is refused.
        amp: "off", "bf16" or "fp16".

    Returns:
        rank, number of processes, and this process's device.

    Raises:
        UserError: "cuda" where there is none, "mps", or bf16 on a GPU that has none.
    """
    if device == "mps":
        raise UserError(
            "--device mps: Apple's GPU is not supported, this code has never run on "
            "one; use --device cpu, or auto"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU; use --device cpu, or auto")
    use_gpu = device != "cpu" and torch.cuda.is_available()
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    # `rank` counts over all machines, `local` over the GPUs of this one.
    local = int(os.environ.get("LOCAL_RANK", 0))
    if use_gpu:
        if local >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node: process {local} has no GPU of its own, there are "
                f"{torch.cuda.device_count()}; start that many, or pass --device cpu"
            )
        torch.cuda.set_device(local)
        # PyTorch would imitate it, and be slower than without.
        if amp == "bf16" and torch.cuda.get_device_capability() < (8, 0):
            name = torch.cuda.get_device_name()
            raise UserError(f"--amp bf16: {name} has no bf16; give --amp fp16")
    # One process needs no group; every function below then does nothing.
    if size > 1:
        store = fresh_store(size)
        dist.init_process_group(
            "nccl" if use_gpu else "gloo",
            timeout=PATIENCE,
            **(dict(store=store, rank=rank, world_size=size) if store else {}),
        )
    return rank, size, torch.device("cuda", local) if use_gpu else torch.device("cpu")


def fresh_store(size: int):
    """Where the processes find each other after torchrun has restarted them.

    The store that torchrun shares with them still has the addresses of the dead ones,
    and the new ones would wait for those for ever (pytorch issue 135712). So each
    attempt gets keys of its own. The torchruns of several machines count attempts
    differently, so there the store must not be shared.

    Args:
        size: number of processes.

    Returns:
        A store; None where the usual one will do.

    Raises:
        UserError: several machines, and a shared store.
    """
    # torchrun sets both variables; attempt 0 is the first start.
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not attempt or not shared:
        return None
    # Fewer processes on this machine than in all: there are several machines.
    if size != int(os.environ["LOCAL_WORLD_SIZE"]):
        raise UserError(
            "restarted on several machines, where PyTorch's shared store cannot be "
            "used again (pytorch issue 135712); start each torchrun with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, the run then goes on by itself"
        )
    # The same server as torchrun's, but under a prefix that no dead process has used.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore(f"attempt {attempt}", dist.TCPStore(address, port))


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DDP, if there are several processes.

    Args:
        model: the student; the wrapper has the same parameters, it does not copy them.
        device: of this process.

    Returns:
        The wrapper, whose backward pass averages the gradients over all processes; or
        the model itself on one process.
    """
    if not dist.is_initialized():
        return model
    ids = [device.index] if device.type == "cuda" else None
    # By default DDP copies the buffers of rank 0 to all others, and the statistics of
    # their BatchNorms are lost. `average_statistics` takes the mean of all instead.
    with warnings.catch_warnings():
        # Newer versions of PyTorch have another name for the argument.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP's wrapper, or the model itself.

    The teacher follows it, evaluation and checkpoints need it (the wrapper puts
    "module." before every name), and the unlabeled pass must not synchronize.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_statistics(model: nn.Module) -> None:
    """Set BatchNorm's running statistics to their mean over all processes.

    Parameters are the same on every process, since DDP averages the gradients. The
    statistics are not: each process has seen its own images. After this every process
    has the same student, and so the same teacher.

    Args:
        model: the student, changed in place; without BatchNorm nothing happens.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if not dist.is_initialized() or not norms:
        return
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var)]
    # All in one long vector: one collective call, not one for each of many small ones.
    flat = all_sum(torch.cat(buffers)) / world_size()
    # Cut apart again and copied in place: the buffers stay the same tensors.
    means = flat.split([len(buffer) for buffer in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean)


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes.

    Args:
        tensor: of the same shape on every process; not changed.

    Returns:
        The sum, on every process.
    """
    if not dist.is_initialized():
        return tensor
    # `all_reduce` works in place, on a copy here.
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def gather(value) -> list:
    """The values of all processes, on every process.

    Args:
        value: of this process; can be pickled, and may differ in size between them.

    Returns:
        A list in the order of the ranks.
    """
    if not dist.is_initialized():
        return [value]
    # Pickled objects instead of tensors: each process may have another number of rows.
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(function, *args):
    """Run a function on rank 0 only and give its result to all.

    What must happen once, such as writing a file or drawing a split, happens here, and
    the others wait until it is done.

    Args:
        function, args: called on rank 0; the result can be pickled.

    Raises:
        UserError: on every rank if rank 0 raised one, so that all of them stop.
    """
    # One process alone: nobody to tell.
    if not dist.is_initialized():
        return function(*args)
    # The error is sent like a result. Raised on rank 0 alone, it would leave the others
    # waiting for a result that never comes.
    box = [None]
    if dist.get_rank() == 0:
        try:
            box = [("result", function(*args))]
        except UserError as error:
            box = [("error", str(error))]
    dist.broadcast_object_list(box)
    kind, value = box[0]
    if kind == "error":
        # Only rank 0 prints the message, not each of eight processes.
        raise UserError(value if dist.get_rank() == 0 else "")
    return value
