"""Runs the project's programs on the simulated GPU; each call is a process of its own.

    python tests/gpu/drive.py train FLAGS ...        a run, then `evaluate.py` and `predict` on it
    python tests/gpu/drive.py count [METHOD]         one step with ResNet-50: what the GPU is sent

The last line of the output is JSON: the number of operations, and how often the host waited.
"""

import argparse
import json
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

ROOT = Path(train.__file__).parent


def run(flags: list[str]) -> SimulatedGPU:
    """A whole run in a process group of one, stopped and resumed by a second call."""
    folder = Path(flags[flags.index("--output") + 1])
    data = Path(flags[flags.index("--data") + 1])
    # DDP's reducer cannot be simulated; with a group, everything else is as with NCCL.
    distributed.wrap = lambda model, device: model
    with SimulatedGPU(ROOT) as gpu:
        for _ in range(2):
            # Finished, the second call resumes from the last checkpoint and evaluates again.
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            train.main([*flags, "--device", "cuda"])
        gpu.nccl = False
        checkpoint = str(folder / "checkpoint.pt")
        evaluate.main([checkpoint, "--data", str(data), "--device", "cuda"])
        out = ["--out", str(folder / "seen"), "--device", "cuda"]
        predict.main([checkpoint, str(data / "test"), *out])
    return gpu


def count(method: str) -> SimulatedGPU:
    """One step of `docs/bench/bench_gpu.py`: ResNet-50, 4 + 4 images of the built-in shapes."""
    import bench_gpu
    from ssis.datasets import shapes

    with tempfile.TemporaryDirectory() as name, SimulatedGPU(ROOT) as gpu:
        shapes.make(Path(name) / "shapes", parts=dict(train=40, val=6, test=6))
        bench_gpu.make_weights(Path(name), "tiny")
        args = argparse.Namespace(data=f"{name}/shapes", labeled="16", size=128, sam="tiny")
        side = bench_gpu.Side(method, "bf16", args, Path(name))
        for k in range(3):  # the images' embeddings are in memory afterwards
            side.make_step(k)
        gpu.operations.clear()
        gpu.waits.clear()
        side.make_step(1)
    return gpu


if __name__ == "__main__":
    program, rest = sys.argv[1], sys.argv[2:]
    seen = run(rest) if program == "train" else count(*rest or ["full"])
    print(seen.table(80))
    print(json.dumps(dict(operations=seen.operations.total(), waits=seen.waits.total())))
