"""What tests of several rooms share: short runs, and how they are started."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from ssis.io import checkpoint


TINY = [
    "--method",
    "guided-distillation",
    "--pretrain-steps",
    "4",
    "--burnin-steps",
    "3",
    "--mutual-steps",
    "5",
    "--tau-class",
    "0.1",
    "--labeled",
    "8",
    "--labeled-batch",
    "2",
    "--unlabeled-batch",
    "2",
    "--short-side-min",
    "40",
    "--short-side",
    "48",
    "--long-side",
    "48",
    "--eval-every",
    "7",
    "--audit-images",
    "4",
    "--warmup-steps",
    "2",
    # After a few steps every one of a hundred detections is a guess, and masks take long.
    "--max-detections",
    "10",
]


def command(program: str, *arguments) -> list[str]:
    return [sys.executable, str(ROOT / program), *map(str, arguments)]


def launch(program: str, *arguments, status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(command(program, *arguments), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status, done.stderr[-2000:]
    return done


def dataset_of(folder) -> list[str]:
    return [
        flag
        for part in ("train", "val", "test")
        for flag in (
            f"--{part}-json",
            f"{folder}/instances_{part}.json",
            f"--{part}-images",
            f"{folder}/{part}",
        )
    ]


def same(a, b) -> bool:
    """Whether two nested containers of tensors and values are identical."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_end(folder, other) -> None:
    one, two = (checkpoint.load(f / "checkpoint.pt") for f in (folder, other))
    for key in ("step", "student", "teacher", "optimizer", "schedule", "random", "results"):
        assert same(one[key], two[key]), f"{key} differs"
    ends = [json.loads((f / "summary.json").read_text())["mask_ap"] for f in (folder, other)]
    # Not the best model: a run that is stopped at an evaluation goes on without it.
    for who in ("pretrained", "student", "teacher"):
        assert ends[0][who] == ends[1][who]


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def error_of(capsys, main, argv) -> str:
    """The line that a program ends with; it must be the only one, with status 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    assert stop.value.code == 2
    printed = capsys.readouterr().err.replace("\r", "\n").splitlines()
    # Less the warnings and the progress bar, which is left behind on a line of its own.
    lines = [line for line in printed if line and "warning:" not in line and "it/s" not in line]
    assert len(lines[-1]) < 1200
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def arguments(folder) -> list[str]:
    parts = ("train", "val")
    return [
        "--method",
        "guided-distillation",
        "--preset",
        "custom",
        "--output",
        f"{folder}/run",
        "--device",
        "cpu",
        "--labeled",
        "2",
        "--pretrain-steps",
        "1",
        "--burnin-steps",
        "1",
        "--mutual-steps",
        "0",
        "--short-side-min",
        "32",
        "--short-side",
        "32",
        "--long-side",
        "64",
        "--max-detections",
        "10",
        *(
            x
            for p in parts
            for x in (f"--{p}-json", f"{folder}/coco.json", f"--{p}-images", f"{folder}/images")
        ),
    ]


def set_record(key, k, **values):
    def change(raw):
        raw[key][k].update(values)

    return change


def batch(instances=(2, 1)):
    images, targets = [], []
    for n in instances:
        masks = torch.zeros(n, 64, 64, dtype=torch.uint8)
        for k in range(n):
            masks[k, 8 + 20 * k : 26 + 20 * k, 10:40] = 1
        boxes = torch.tensor([[10.0, 8 + 20 * k, 40, 26 + 20 * k] for k in range(n)])
        images.append(torch.rand(3, 64, 64))
        targets.append(
            dict(boxes=boxes.reshape(-1, 4), labels=torch.ones(n, dtype=torch.int64), masks=masks)
        )
    return images, targets
