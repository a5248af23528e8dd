"""One step of each stage with the presets of the papers, on a CPU: do they go through?

    python docs/scripts/full_size.py --data COCO_MINI

Two processes with two labeled and two unlabeled images each, ResNet-50 and a `vit_b`, both with
random weights that are made here, on a folder with `instances_train.json`, `instances_val.json`,
`train/` and `val/` in COCO's format. `full` with the preset coco and `pl-dc` with cityscapes have
the presets' own views and sizes; the other methods' views are of 256 pixels. Thresholds of 0 let
what a network after one step predicts through, at most eight instances an image, so that SAM
redraws masks, and there is something to paste. Weights are random, so no AP is looked at.

Prints, for each run, its wall time, the largest resident memory of a process, and the mean number
of pseudo-labels. Its output is `docs/results/full-size.txt`; `docs/reproduce.md` shows it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from segment_anything import sam_model_registry  # noqa: E402
from torchvision.models import resnet50  # noqa: E402

import train  # noqa: E402
from ssis import networks  # noqa: E402

SMALL = "--crop-height 256 --crop-width 256 --short-side-min 256 --short-side 256 --long-side 448"
# Name -> flags; the first two at full size.
RUNS = {
    "coco full": "",
    "cityscapes pl-dc": "--burnin-steps 0",
    "coco guided-distillation": SMALL,
    "coco s4m": SMALL,
    "coco pl-dc": f"{SMALL} --burnin-steps 0",
    "cityscapes guided-distillation": SMALL,
    "cityscapes s4m": SMALL,
    "cityscapes full": SMALL,
    "voc full": SMALL,
}
COMMON = (
    "--labeled 16 --labeled-batch 4 --unlabeled-batch 4 --pretrain-batch 0 --pretrain-steps 1 "
    "--burnin-steps 1 --mutual-steps 1 --tau-class 0 --tau-mask 0 --audit-images 2 --workers 0 "
    "--sam vit_b --device cpu --eval-every 100 --resume never"
)


def make_files(folder: Path, data: Path) -> list[str]:
    """Random weights, and four images to evaluate on; the flags that name them."""
    torch.manual_seed(0)
    # The last norm of each block at 0: with frozen norms random blocks would add up.
    torch.save(resnet50(weights=None, zero_init_residual=True).state_dict(), folder / "r50.pth")
    torch.save(sam_model_registry["vit_b"]().state_dict(), folder / "vit_b.pth")
    known = json.loads((data / "instances_val.json").read_text(encoding="utf-8"))
    known["images"] = known["images"][:4]
    ids = {image["id"] for image in known["images"]}
    known["annotations"] = [a for a in known["annotations"] if a["image_id"] in ids]
    (folder / "val.json").write_text(json.dumps(known), encoding="utf-8")
    return [
        *("--backbone-weights", str(folder / "r50.pth")),
        *("--sam-cache", str(folder / "sam")),
        *("--data", str(data), "--val-json", str(folder / "val.json")),
        *("--val-images", str(data / "val")),
    ]


def run(name: str, own: str, files: list[str], folder: Path) -> str:
    """Train with one preset; the line on how it went."""
    preset, method = name.split()
    flags = ["--preset", preset, "--method", method, *COMMON.split(), *own.split(), *files]
    if method in ("s4m", "full"):
        flags += ["--sam-checkpoint", str(folder / "vit_b.pth")]
    output = folder / name.replace(" ", "-")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += [__file__, "--worker", *flags, "--output", str(output)]
    began = time.monotonic()
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    minutes = (time.monotonic() - began) / 60
    if done.returncode:
        raise SystemExit(f"{name}: status {done.returncode}\n{done.stdout[-3000:]}")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    labels = [row["pseudo_per_image"] for row in rows if "pseudo_per_image" in row]
    peak = max(int(line.split()[1]) for line in done.stdout.splitlines() if "peak_kb" in line)
    size = "256 px" if own.startswith("--crop") else "full size"
    return (
        f"{name:32} {size:9}  {minutes:5.1f} min  {peak / 1e6:5.1f} GB a process  "
        f"{labels[-1]:4.1f} pseudo-labels an image"
    )


def work(flags: list[str]) -> None:
    """One process of a run: `train.py`, but at most eight instances an image."""
    build = networks.build

    def few(*args, **settings):
        net = build(*args, **settings)
        net.roi_heads.detections_per_img = 8
        return net

    networks.build = few
    train.main(flags)
    print("peak_kb", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


def main() -> None:
    """All runs, a line each."""
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder in COCO's format")
    parser.add_argument("--only", default="", help="runs whose name has these letters")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder), args.data)
        for name, own in RUNS.items():
            if args.only in name:
                print(run(name, own, files, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
