"""Runs the project's programs on the simulated GPU; each call is a process of its own.

    python tests/gpu/drive.py train FLAGS ...     a run
    python tests/gpu/drive.py all FLAGS ...       a run, stopped and resumed, then evaluate, predict
    python tests/gpu/drive.py count [METHOD]      one step with ResNet-50: what the GPU is sent

The last line of the output is JSON: the number of operations, and how often the host waited.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs" / "bench"))

import torch.distributed as dist
from simulated_gpu import SimulatedGPU

import evaluate
import train
from ssis import distributed
from ssis.tools import predict


def run(flags: list[str]) -> None:
    """A run in a process group of one, as with NCCL; but DDP's reducer cannot be simulated."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    distributed.wrap = lambda model, device: model
    train.main([*flags, "--device", "cuda"])


def tools(flags: list[str]) -> None:
    """What a user does with a run: stop it, go on, evaluate it, look at it."""
    step = train.train_step

    def stopped(*arguments):
        if arguments[4] == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    train.train_step = stopped
    run(flags)
    train.train_step = step
    run(flags)
    folder, images = (flags[flags.index(name) + 1] for name in ("--output", "--test-images"))
    evaluate.main([f"{folder}/checkpoint.pt", "--device", "cuda"])
    out = ["--out", f"{folder}/seen", "--device", "cuda"]
    predict.main([f"{folder}/checkpoint.pt", images, *out])


def few(build):
    """A teacher that keeps five instances: an untrained one would keep a hundred."""

    def made(*arguments):
        parts = build(*arguments)
        parts[1].teacher.roi_heads.detections_per_img = 5
        return parts

    return made


def count(gpu: SimulatedGPU, method: str = "full") -> None:
    """One step of `docs/bench/bench_gpu.py`: ResNet-50, 4 + 4 images of the built-in shapes."""
    import bench_gpu
    from ssis import correction
    from ssis.datasets import shapes

    # How full the memory is changes no count.
    correction.START_VIEWS = 16
    with tempfile.TemporaryDirectory() as name:
        shapes.make(Path(name) / "shapes", parts=dict(train=40, val=6, test=6))
        bench_gpu.make_weights(Path(name), "tiny")
        args = argparse.Namespace(data=f"{name}/shapes", labeled="16", size=64, sam="tiny")
        side = bench_gpu.Side(method, "bf16", args, Path(name))
        side.make_step(1)  # SAM's embeddings are in memory afterwards
        gpu.operations.clear()
        gpu.waits.clear()
        side.make_step(1)


if __name__ == "__main__":
    program, rest = sys.argv[1], sys.argv[2:]
    with SimulatedGPU(Path(train.__file__).parent) as gpu:
        if program == "count":
            count(gpu, *rest)
        else:
            train.build = few(train.build)
            tools(rest) if program == "all" else run(rest)
    print(gpu.table(80))
    print(json.dumps(dict(operations=gpu.operations.total(), waits=gpu.waits.total())))
