r"""The few lines that DDP needs.

One process per device, started by torchrun; without torchrun there is one process and
no process group, and every function here is a no-op. On CPUs the backend is gloo.

Why the loop cannot hang: whatever a process finds in its batch, it makes the same
collective calls in the same order as all others. The unlabeled loss, which a process
without pseudo-labels must skip, is computed on the model itself, not on DDP's wrapper.

*Why two backward passes through different wrappers add up.* DDP wraps the model, it
does
not copy it: both passes have the same parameters, and `backward` adds to `p.grad`
whatever is there. The first pass, through the model itself, leaves its gradients on
each process, unsynchronized. The second, through the wrapper, adds the labeled ones,
and as each parameter's gradient becomes complete DDP takes the mean of `p.grad` over
the
processes: of the sum of both. So the point where the processes wait for each other is
the backward pass of the labeled loss, which every process always has. (`no_sync` would
not do: even there the wrapper's second forward pass waits for all processes to rebuild
its buckets.)

Chain: 14 of 16. Read next: `ssis/config.py`, where every number comes from.
"""

import os
import sys
import warnings
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
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if use_gpu:
        if local >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node: process {local} has no GPU of its own, there are "
                f"{torch.cuda.device_count()}; start that many, or pass --device cpu"
            )
        torch.cuda.set_device(local)
    if world > 1:
        store = fresh_store(world)
        dist.init_process_group(
            "nccl" if use_gpu else "gloo",
            # A process that waits ten minutes for another waits for a dead one.
            timeout=timedelta(minutes=10),
            **(dict(store=store, rank=rank, world_size=world) if store else {}),
        )
    place = torch.device("cuda", local) if use_gpu else torch.device("cpu")
    return rank, world, place


def fresh_store(world: int):
    """Where the processes find each other after torchrun has restarted them.

    The store that torchrun shares with them still has the addresses of the dead ones,
    and the new ones would wait for those for ever (pytorch issue 135712). So each
    attempt has keys of its own. Which attempt it is, the torchruns of several machines
    count differently; there the store must not be shared.

    Returns:
        A store; None where the usual one will do.

    Raises:
        UserError: several machines, and a shared store.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not attempt or not shared:
        return None
    if world != int(os.environ["LOCAL_WORLD_SIZE"]):
        raise UserError(
            "restarted on several machines, where PyTorch's shared store cannot be "
            "used again (pytorch issue 135712); start each torchrun with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, the run then goes on by itself"
        )
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore(f"attempt {attempt}", dist.TCPStore(address, port))


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DDP, where there are several processes."""
    if not dist.is_initialized():
        return model
    ids = [device.index] if device.type == "cuda" else None
    # The wrapper must not broadcast buffers: it would throw away what the other
    # processes' BatchNorm saw. `average_statistics` takes the mean of all instead.
    with warnings.catch_warnings():
        # Newer versions of PyTorch have another name for it, older ones only this.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP's wrapper, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_statistics(model: nn.Module) -> None:
    """Set BatchNorm's running statistics to their mean over all processes.

    Every process has then the same student, and so the same teacher.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if not dist.is_initialized() or not norms:
        return
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var)]
    # One collective call for all of them.
    flat = all_sum(torch.cat(buffers)) / world_size()
    means = flat.split([len(buffer) for buffer in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean)


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
        # Rank 0 says it; a line from each of eight processes would hide it.
        raise UserError(value if dist.get_rank() == 0 else "")
    return value


def program(run, argv: list[str] | None) -> None:
    """`run(argv)`; one line and status 2 for what the user did wrong.

    Ctrl-C is one line too, and status 130; a training run handles it itself while it
    makes steps (`ssis/engine/signals.py`).
    """
    try:
        run(argv)
    except UserError as error:
        give_up(error)
    except KeyboardInterrupt:
        said = "stopped; what was saved stays, the same command goes on"
        print(said, file=sys.stderr)
        sys.exit(130)


def give_up(error: UserError) -> None:
    """Print the one line and end this process with status 2.

    Raised in a loader worker, the line comes wrapped in the worker's traceback; its
    last line is ours.
    """
    if str(error):
        line = str(error).strip().splitlines()[-1].removeprefix("ssis.UserError: ")
        if len(line) > 1000:  # it quotes a value that is a book
            line = f"{line[:600]} … {line[-300:]}"
        print(f"error: {line}", file=sys.stderr, flush=True)
    # With several processes, not sys.exit: leaving the process group in order means
    # waiting for the others, who may wait for this one. torchrun stops them.
    if dist.is_initialized():
        os._exit(2)
    sys.exit(2)
