"""Every method on a simulated GPU, which refuses what a real one would; what a step sends to it.

Each run is a process of its own (`drive.py`).
"""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers import TINY, dataset_of
from torch.utils import backend_registration

HERE = ROOT / "tests" / "gpu"

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no Python backend for PrivateUse1, which simulates the GPU",
)

SHORT = [*TINY, "--pretrain-steps", "2", "--burnin-steps", "1", "--mutual-steps", "2"]
SHORT += ["--tau-min", "0.05", "--tau-max", "0.1", "--tau-mask-min", "0.1"]
SHORT += ["--tau-mask-max", "0.2", "--eval-every", "5", "--audit-images", "2"]
FULL = ["--method", "full", "--structure-weight", "1", "--correction", "prototypes"]
FULL += ["--filter", "adaptive"]


def drive(*arguments, root=ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, root / "tests" / "gpu" / "drive.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=root)


@pytest.mark.parametrize(
    "program, flags",
    [
        ("train", "--method supervised --amp bf16"),
        ("train", "--method guided-distillation --burnin-init fresh"),
        ("train", "--method pl-dc --deterministic"),
        ("train", "--method s4m --deterministic"),
        ("all", "--method full --filter adaptive --structure-weight 1 --amp fp16 --deterministic"),
    ],
)
def test_every_method_runs(program, flags, shapes_folder, tmp_path):
    given = [*SHORT, *flags.split(), *dataset_of(shapes_folder), "--output", tmp_path / "run"]
    done = drive(program, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    if "supervised" not in flags:
        assert summary["audit_stages"]["end"]["final"]["pseudo_per_image"] > 0
    if program == "all":
        assert "stopped after step 3 of 5" in done.stdout
        assert (tmp_path / "run" / "seen" / "results.json").exists()


def test_a_step_sends_and_waits_as_seldom_as_it_did():
    """`full`, ResNet-50, 4 + 4 images, 7 pseudo-labels each; a few more than were reached."""
    done = drive("count")
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert 5000 < seen["operations"] <= 10_500
    assert 100 < seen["waits"] <= 185


# How a GPU refuses.
REFUSED = (
    "Expected all tensors to be on the same device",
    "indices should be either on cpu or on the same device",
    "device type for generator",
    "No backend type associated with device type cpu",
    "can't convert cuda:0",
    "deterministic only with CUBLAS_WORKSPACE_CONFIG",
)

# What is forgotten easily, and unseen on a CPU: file, the right line, the wrong one.
MISTAKES = [
    ("train.py", '.to(device, non_blocking=True) for item in un', " for item in un"),
    ("train.py", "total_counts = distributed.all_sum(counts)", "distributed.all_sum(counts.cpu())"),
    ("ssis/data.py", '{k: v.to(device, non_blocking=True) for k, v', "{k: v for k, v"),
    ("ssis/inference.py", "torch.arange(width, device=boxes.device)", "torch.arange(width)"),
    ("ssis/refine.py", "torch.Generator(device)", "torch.Generator()"),
    ("ssis/sam.py", "embedding.to(self.device, non_blocking=True).float()[None]",
     "embedding.float()[None]"),
    ("ssis/sam_distill.py", "torch.arange(cells, device=places.device)", "torch.arange(cells)"),
    ("ssis/prototypes.py", "[list(rows_of.values())].to(device)", "[list(rows_of.values())]"),
    ("ssis/filters.py", "frequency = frequency.to(self.values)", "pass"),
    ("ssis/copy_paste.py", "torch.arange(len(weights), device=weights.device)",
     "torch.arange(len(weights))"),
    ("ssis/report/ap.py", "output.boxes.cpu() *", "output.boxes *"),
    ("ssis/engine/session.py", 'os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")',
     "pass"),
]  # fmt: skip


@pytest.mark.parametrize("file, right, wrong", MISTAKES, ids=[m[1][:30] for m in MISTAKES])
def test_a_mistake_is_found(file, right, wrong, shapes_folder, tmp_path):
    root = tmp_path / "project"
    for part in ("ssis", "train.py", "evaluate.py", "tests/gpu"):
        (root / part).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, root / part)
    text = (root / file).read_text()
    assert text.count(right) == 1
    (root / file).write_text(text.replace(right, wrong))
    given = [*SHORT, *FULL, "--deterministic", *dataset_of(shapes_folder), "--output", tmp_path]
    done = drive("train", *given, root=root)
    assert done.returncode == 1, done.stderr[-3000:]
    assert any(reason in done.stderr for reason in REFUSED), done.stderr[-3000:]
    # The traceback leads there, but where what was forgotten is missed elsewhere.
    assert file in done.stderr or file in ("ssis/data.py", "ssis/engine/session.py")
