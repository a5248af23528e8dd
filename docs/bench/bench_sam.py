"""What the tiny SAM can do, and what SAM costs; each table in one run.

SAM's share of a step on the shapes: `python docs/bench/bench_step.py levels`.

python docs/bench/bench_sam.py iou     the tiny SAM on shapes that it has never seen; with flags of
                                       train.py, any SAM on any data's validation part
python docs/bench/bench_sam.py cache   official vit_b (random weights): cached or not
python docs/bench/bench_sam.py memory  structural distillation's 128 queries with vit_b (Linux)
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from segment_anything import sam_model_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ssis import config, refine, sam, sam_distill
from ssis.datasets import parts
from ssis.io.embeddings import Embeddings, write_entry
from ssis.io.images import read_image
from ssis.targets import mask_iou
from ssis.tools import train_tiny_sam


def measure_iou(flags: list[str], count: int = 128) -> None:
    """Mean IoU on a validation part, points drawn in the ground truth."""
    made = config.parse(flags)
    parts.prepare(made)
    _, val_set, _ = parts.open_parts(made)
    tiny = sam.SegmentAnything(made.sam, made.sam_checkpoint, "cpu")
    torch.manual_seed(0)
    count = min(count, len(val_set))
    print(f"{count} images, IoU with the ground truth: mean (fraction of instances above 0.75)")
    for points in (1, 3, 5):
        ious: dict[str, list] = {"predicted IoU": [], "best of three": []}
        for index in range(count):
            image, masks = val_set.image(index), val_set.target(index)["masks"].bool()
            if not len(masks):
                continue
            size = tuple(image.shape[-2:])
            prompts = train_tiny_sam.draw_points(masks, points, blurred=False) + 0.5
            logits, predicted = tiny.candidates(tiny.encode(image), prompts, size, size)
            ious["predicted IoU"] += refine.choose(logits, predicted, masks, "iou")[1].tolist()
            every = mask_iou(logits > 0, masks[:, None])
            ious["best of three"] += every.amax(dim=1).tolist()
        for rule, values in ious.items():
            fraction = sum(v > 0.75 for v in values) / len(values)
            print(
                f"{points} points, {rule:14} {statistics.mean(values):.3f} ({fraction:.2f}),"
                f" {len(values)} instances"
            )


class Photographs:
    """Two images of a photograph's size; what is in them does not change the time."""

    def __init__(self, folder: Path):
        self.paths = [folder / f"{k}.jpg" for k in range(2)]
        for k, path in enumerate(self.paths):
            generator = torch.Generator().manual_seed(k)
            coarse = torch.rand(1, 3, 30, 40, generator=generator)
            pixels = torch.nn.functional.interpolate(coarse, (768, 1024), mode="bicubic")[0]
            pixels = (pixels.clamp(0, 1) * 255).to(torch.uint8)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)

    def path(self, index: int) -> str:
        return str(self.paths[index])

    def image(self, index: int) -> torch.Tensor:
        return read_image(self.path(index))

    def target(self, index: int) -> dict:
        masks = torch.zeros(1, 768, 1024, dtype=torch.uint8)
        masks[0, 200:500, 300:700] = 1
        return dict(masks=masks)


def measure_cache(prompts: int = 5) -> None:
    """Seconds in SAM per unlabeled image and step, three ways, and the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sam_vit_b.pth"
        torch.save(sam_model_registry["vit_b"]().state_dict(), path)
        official = sam.SegmentAnything("vit_b", str(path), "cpu")
        pictures = Photographs(Path(folder))
        size = (768, 1024)
        points = torch.rand(prompts, 3, 2) * torch.tensor([1024.0, 768.0])
        none = dict(memory_gb=0.0, cache_gb=0.0)
        disk = dict(memory_gb=0.0, cache=f"{folder}/cache")
        ways = {
            "encoded in every step": Embeddings(official, pictures, **none),
            "cached on disk": Embeddings(official, pictures, **disk),
            "cached in memory": Embeddings(official, pictures),
        }
        for name in ("cached on disk", "cached in memory"):
            for index in range(2):
                ways[name][index]
        means = {}
        for name, embeddings in ways.items():
            times = []
            for index in (0, 1):
                began = time.perf_counter()
                official.candidates(embeddings[index], points, size, size)
                times.append(time.perf_counter() - began)
            means[name] = statistics.mean(times)
            first = means["encoded in every step"]
            print(f"{name:22} {means[name]:7.3f} s per image, {first / means[name]:6.1f} x")
        print(f"({prompts} prompts of 3 points an image, {torch.get_num_threads()} threads)")


def kilobytes(name: str) -> int:
    """A line of /proc/self/status: VmRSS, the memory now, or VmHWM, the most since reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0])


def measure_memory() -> None:
    """Peak memory over the loaded model while an image's 128 query rows are computed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sam_vit_b.pth"
        torch.save(sam_model_registry["vit_b"]().state_dict(), path)
        official = sam.SegmentAnything("vit_b", str(path), "cpu")
        embeddings = Embeddings(official, Photographs(Path(folder)), f"{folder}/cache")
        # The rows alone: an embedding that is there already.
        write_entry(embeddings.entry(0), torch.randn(256, 64, 64).half(), 1e9)
        structure = sam_distill.Structure(embeddings, 128, 0.0, 0)
        Path("/proc/self/clear_refs").write_text("5")
        before, began = kilobytes("VmRSS"), time.perf_counter()
        rows = structure[0][1]
        grown = (kilobytes("VmHWM") - before) / 1024
        print(
            f"{tuple(rows.shape)} rows: {grown:.0f} MiB more, {time.perf_counter() - began:.1f} s "
            f"({torch.get_num_threads()} threads)"
        )


if __name__ == "__main__":
    what = dict(cache=measure_cache, memory=measure_memory)
    if sys.argv[1:2] == ["iou"]:
        measure_iou(sys.argv[2:])
    elif len(sys.argv) == 2 and sys.argv[1] in what:
        what[sys.argv[1]]()
    else:
        sys.exit(__doc__.strip())
