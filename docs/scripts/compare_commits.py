"""Does a refactoring change a number? Short runs of two commits, compared bit for bit.

    python docs/scripts/compare_commits.py [--base COMMIT] [--keep FOLDER]

Checks the base commit out beside the project (git worktree), trains both on the built-in shapes
with the same flags (every method, every part switched on somewhere, one run stopped by a signal
and resumed), and compares what they leave: every line of `metrics.jsonl`, the summary, and every
tensor of the checkpoints, through a table of renamed keys. Prints a Markdown table; status 1 if
anything differs. One thread a run, or the order of the sums would be another.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ssis.datasets import shapes  # noqa: E402

# The first commit of the new house, still with the old walls: its numbers are to be kept.
BASE = "15375f3"
# Key of the base commit's checkpoint -> key of the present one's.
RENAMED = {"second": "classifier"}
COMMON = (
    "--device cpu --labeled 12 --labeled-batch 4 --unlabeled-batch 4 --warmup-steps 10 "
    "--pretrain-steps 40 --burnin-steps 3 --mutual-steps 5 --eval-every 45 --audit-images 4 "
    "--short-side-min 56 --short-side 64 --long-side 64"
)
# A teacher of forty steps is sure of nothing: with the usual thresholds it would keep nothing.
LOW = "--tau-class 0.15 --tau-mask 0.3 --tau-min 0.1 --tau-max 0.2 --refine-gate 0.1"
RUNS = {
    "supervised": "--method supervised",
    "guided-distillation": f"--method guided-distillation {LOW}",
    "gd, coupled, fresh student": f"--method guided-distillation {LOW} --filter coupled "
    "--tau-class 0.1 --burnin-init fresh",
    "pl-dc": f"--method pl-dc {LOW}",
    "pl-dc, dual, fresh student": f"--method pl-dc {LOW} --filter dual --burnin-init fresh",
    "s4m": f"--method s4m {LOW} --structure-queries 8",
    "s4m, as published": f"--method s4m {LOW} --refine iou --refine-gate 0 "
    "--refine-sampling code --arp-jitter 0.2 --structure-queries 8 --structure-boundary 0.5",
    "full": f"--method full {LOW}",
    "full, all parts, resumed": f"--method full {LOW} --structure-weight 1 --refine-calibrate "
    "--structure-queries 8 --arp both --arp-jitter 0.2 --unlabeled-includes-labeled",
    "full, bf16": f"--method full {LOW} --amp bf16",
    "oracle": f"--method guided-distillation {LOW} --oracle both",
}


def train(tree: Path, flags: list[str], folder: Path, interrupt: bool) -> None:
    """Train in a tree; with `interrupt`, stop it once in each stage and go on."""
    command = [sys.executable, "train.py", *flags, "--output", str(folder)]
    # To be stopped at a step that is the same in both, they save after every one.
    command += ["--checkpoint-every", "1"] if interrupt else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = dict(cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    for step in (20, 42, 45) if interrupt else ():
        with subprocess.Popen(command, **quiet) as process:
            while steps_done(folder) < step and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
    done = subprocess.run(command, **quiet)
    if done.returncode:
        sys.exit(f"error: {tree}: {done.stderr.decode()[-2000:]}")


def steps_done(folder: Path) -> int:
    path = folder / "checkpoint.pt"
    try:
        return torch.load(path, weights_only=True)["step"]
    except (OSError, RuntimeError, EOFError):
        return 0


def same(a, b) -> bool:
    """Whether two nested containers of tensors and values are identical."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(old: Path, new: Path) -> list[str]:
    """The names of what differs between two folders of runs."""
    found = []
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (old, new)]
    keys = "student teacher thresholds second optimizer schedule scaler random results step"
    for key in keys.split():
        one, two = states[0][key], states[1].get(RENAMED.get(key, key), {})
        if not same(one, two):
            found.append(key)
    lines = [(f / "metrics.jsonl").read_text().splitlines() for f in (old, new)]
    if lines[0] != lines[1]:
        found.append("metrics.jsonl")
    summaries = [json.loads((f / "summary.json").read_text()) for f in (old, new)]
    for name in summaries[0].keys() - {"seconds"}:
        if summaries[0][name] != summaries[1].get(name):
            found.append(f"summary.json: {name}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=BASE, help="commit whose numbers are to be kept")
    parser.add_argument("--keep", type=Path, help="folder for the runs; default: none is kept")
    args = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="ssis-compare-") as temporary:
        tree, out = Path(temporary) / "base", args.keep or Path(temporary) / "runs"
        # Few images to be evaluated on: that is where most of the time would go.
        shapes.make(out / "shapes", parts=dict(train=48, val=4, test=4))
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(tree), args.base], check=True)
        try:
            print("| run | steps | mask AP, student | pseudo-labels | differs |")
            print("|---|---|---|---|---|")
            for k, (name, flags) in enumerate(RUNS.items()):
                folders = [out / f"{side}-{k}" for side in ("base", "now")]
                given = [*COMMON.split(), *flags.split(), "--data", str(out / "shapes")]
                given += ["--preset", "custom", "--sam", "tiny"]
                for side, folder in zip((tree, ROOT), folders, strict=True):
                    train(side, given, folder, "resumed" in name)
                wrong = differences(*folders)
                bad += bool(wrong)
                summary = json.loads((folders[1] / "summary.json").read_text())
                audit = summary["audit"] or {}
                print(
                    f"| {name} | {summary['steps']} | {summary['mask_ap']['student']} | "
                    f"{audit.get('pseudo_per_image', '-')} | {', '.join(wrong) or 'nothing'} |",
                    flush=True,
                )
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
