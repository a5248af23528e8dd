r"""What a step costs on a GPU: images/s, memory, and how busy the GPU is, for each method.

    python docs/bench/bench_gpu.py --data FOLDER --labeled 38 [--amp bf16 fp16] [--size 800]

ResNet-50 at a short side of 800 pixels and 4 + 4 images, from random weights, which take as long as
others; SAM is `vit_b`, from random weights too. An untrained teacher is sure of nothing, so it
keeps its best detections, as many as COCO has instances in an image, and it stays as it is. Beside
each other:

    floor          torchvision's own model looks at the unlabeled images, as the teacher must, then
                   one plain training step on all of them
    supervised     a step on the labeled images alone
    the methods    a whole step on labeled and unlabeled images, SAM's embeddings in memory

For each the median time of a step, images per second, ratio to the floor, peak memory, and of two
further steps, as PyTorch's profiler saw them: the time in which the GPU computed, as a fraction of
the time of a step; operations that it was sent; and how often the host waited for it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from bench_step import plain_net
from segment_anything import sam_model_registry
from torch.profiler import ProfilerActivity, profile
from torchvision.models import resnet50
from torchvision.models.detection.mask_rcnn import MaskRCNN as TorchvisionMaskRCNN

import train
from ssis import augment, config, correction, data, model, teacher
from ssis.datasets import parts, split
from ssis.engine import loader
from ssis.engine.build import build
from ssis.engine.guard import Guard

BATCH = 4
# Instances in an image of COCO.
KEPT = 7
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
GPU = torch.device("cuda")


class Side:
    """A method's parts and batches, as in the middle of a run.

    Args:
        method, amp: as the flags of train.py.
        args: with `data`, `labeled`, `size`, and `sam`.
        folder: with `make_weights`.
    """

    def __init__(self, method: str, amp: str, args, folder: Path):
        flags = f"--preset custom --model resnet50 --method {method} --amp {amp} --arp none"
        if method in ("s4m", "full"):
            flags += f" --arp unlabeled --sam {args.sam}"
            if args.sam != "tiny":
                flags += f" --sam-checkpoint {folder}/{args.sam}.pth"
        flags += f" --backbone-weights {folder}/r50.pth --data {args.data} --filter score"
        flags += f" --labeled {args.labeled} --short-side-min {args.size} --short-side {args.size}"
        flags += f" --long-side {args.size * 5 // 3} --device {GPU.type}"
        self.amp, self.config = amp, config.parse(flags.split())
        self.train_set, _, _ = parts.open_parts(self.config)
        made = build(self.config, self.train_set, 0, 1, GPU)
        self.net, self.labeler, self.structure, self.optimizer, self.schedule, self.scaler = made
        self.guard = Guard(self.net, self.train_set.files, folder, amp == "fp16", 0)
        labeled, _ = split.draw_split(self.train_set, self.config.labeled, 0)
        rest = sorted(set(range(len(self.train_set))) - set(labeled))
        size = self.config.view_size
        streams = data.make_streams(self.train_set, labeled, rest, size, 0, "none")
        shard, pin = data.Shard(BATCH, 0, 3, 0, 1), GPU.type == "cuda"
        self.labeled, self.unlabeled = (
            list(loader.batches(stream, shard, 0, pin))
            for stream in (streams.labeled, streams.unlabeled)
        )
        self.supervised = method == "supervised"
        correction.fill(self.labeler.classifier, self.labeler.teacher, streams.labeled, 0, 1)
        # Sure of nothing, it keeps its best few in each image.
        self.config.tau_class = 0.0
        self.labeler.teacher.roi_heads.detections_per_img = KEPT
        # The average costs its time, but the teacher that is asked stays as it is: this student
        # would lead it to keep nothing, or a hundred instances an image.
        self.average = teacher.make_teacher(self.net)
        self.step = self.config.stage_ends[1]

    def make_step(self, k: int) -> dict:
        """One step of `train.train`, with the teacher's average; its row of the loss table."""
        unlabeled = None if self.supervised else self.unlabeled[k % 3]
        row, _ = train.train_step(
            self.net, self.labeler, self.labeled[k % 3], unlabeled, self.step, self.config,
            None, self.optimizer, self.schedule, self.scaler, self.guard,
        )  # fmt: skip
        teacher.ema_update(self.average, self.net, self.config.ema_decay)
        self.step += 1
        return row


class Floor(Side):
    """torchvision's model: the teacher looks, the student learns from all images."""

    def __init__(self, amp: str, args, folder: Path):
        super().__init__("guided-distillation", amp, args, folder)
        self.plain, self.adam = plain_net(self)
        self.plain.to(GPU)
        self.looking = self.labeler.teacher
        self.looking.roi_heads.score_thresh = self.config.tau_class

    def make_step(self, k: int) -> None:
        """The teacher's inference, then a training step as torchvision's tutorial writes it."""
        batch = self.labeled[k % 3] + self.unlabeled[k % 3]
        images = [item["image"].to(GPU) for item in batch]
        with torch.no_grad(), model.autocast(self.config, GPU):
            TorchvisionMaskRCNN.forward(self.looking, images[BATCH:])
        # The targets of the labeled images twice: as many instances as the methods have.
        targets = [
            {key: value.to(GPU) for key, value in item["target"].items()}
            for item in self.labeled[k % 3] * 2
        ]
        images = images[:BATCH] * 2
        images = [
            augment.strong_view(image, item["seed"])
            for image, item in zip(images, batch, strict=True)
        ]
        with model.autocast(self.config, GPU):
            losses = TorchvisionMaskRCNN.forward(self.plain, images, targets)
        self.adam.zero_grad()
        self.scaler.scale(sum(losses.values())).backward()
        self.scaler.unscale_(self.adam)
        torch.nn.utils.clip_grad_norm_(self.plain.parameters(), self.config.clip_norm)
        self.scaler.step(self.adam)
        self.scaler.update()


def make_weights(folder: Path, sam: str) -> None:
    """Random weights of ResNet-50 and SAM."""
    body = resnet50()
    for part in body.modules():
        # With constant norms, random residual blocks would double the activations each time.
        if hasattr(part, "bn3"):
            torch.nn.init.constant_(part.bn3.weight, 0.1)
    torch.save(body.state_dict(), folder / "r50.pth")
    if sam != "tiny":
        torch.save(sam_model_registry[sam]().state_dict(), folder / f"{sam}.pth")


def measure(side: Side, steps: int) -> dict:
    """Time, memory and what the profiler saw of a side's steps."""
    for k in range(3):
        side.make_step(k)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for k in range(steps):
        began = time.perf_counter()
        side.make_step(k)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for k in range(2):
            side.make_step(k)
        torch.cuda.synchronize()
    events = seen.events()
    on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.time_range.elapsed_us() for e in on_gpu) / 2e6
    return dict(
        seconds=statistics.median(times),
        gib=peak / 2**30,
        busy=busy / statistics.median(times),
        sent=len(on_gpu) // 2,
        waits=sum(e.name in WAITS for e in events) // 2,
    )


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--labeled", default="10%")
    parser.add_argument("--amp", nargs="+", default=["bf16", "fp16"])
    parser.add_argument("--size", type=int, default=800)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--sam", default="vit_b")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {args.size} pixels")
    methods = ("supervised", "guided-distillation", "pl-dc", "s4m", "full")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_weights(folder, args.sam)
        print("| | | ms a step | images/s | to the floor | GiB | GPU busy | operations | waits |")
        print("|---" * 9 + "|")
        for amp in args.amp:
            floor = None
            for method in ("floor", *methods):
                kind = (amp, args, folder)
                side = Floor(*kind) if method == "floor" else Side(method, *kind)
                found = measure(side, args.steps)
                floor = floor or found["seconds"]
                images = BATCH if side.supervised else 2 * BATCH
                print(
                    f"| {method} | {amp} | {1000 * found['seconds']:.0f} "
                    f"| {images / found['seconds']:.1f} | {found['seconds'] / floor:.2f} "
                    f"| {found['gib']:.1f} | {100 * found['busy']:.0f} % | {found['sent']} "
                    f"| {found['waits']} |",
                    flush=True,
                )
                del side
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
