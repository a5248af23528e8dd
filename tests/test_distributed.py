"""Two processes with gloo are one process on the same global batch.

Also: a process without any pseudo-label neither hangs the other nor changes the result,
a whole run under torchrun ends like any other, and errors stop all processes.
"""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from ssis import config
from test_train import TINY, dataset_of

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launch(command, *arguments, status=0):
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=240
    )
    assert (done.returncode == 0) == (status == 0), done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def one(tmp_path_factory, shapes_folder):
    """What one process makes of the batch."""
    path = tmp_path_factory.mktemp("one") / "one.pt"
    launch([sys.executable], ROOT / "tests" / "gloo_step.py", path, shapes_folder)
    return torch.load(path)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_without_pseudo_labels_among_them_agree_with_one(
    one, tmp_path, shapes_folder, world
):
    script = ROOT / "tests" / "gloo_step.py"
    launch([*TWO[:-1], str(world)], script, tmp_path / "two.pt", shapes_folder)
    two = torch.load(tmp_path / "two.pt")
    # The case is the one we mean: half of the processes had pseudo-labels in each step,
    # the others never.
    for rank in range(world):
        assert all(two["found"][rank]) if rank < world // 2 else not any(two["found"][rank])
    assert [sum(step) for step in zip(*two["found"], strict=True)] == one["found"][0]
    # What three steps changed, not the weights themselves, whose size would hide it.
    for name, start in one["before"].items():
        assert torch.equal(start, two["before"][name])
        for who, prefix in (("student", ""), ("teacher", "module.")):
            moved, moved_too = one[who][prefix + name] - start, two[who][prefix + name] - start
            tolerance = 1e-7 + 0.01 * moved.abs().max().item()
            assert (moved - moved_too).abs().max() <= min(tolerance, 1e-5), (who, name)
    # PL-DC's memory: the same on both processes, and what one process has.
    start = 0.05 + (config.Config().tau_max - 0.05) / 6
    for rank in range(world):
        for ours, single in zip(two["remembered"][rank], one["remembered"][0], strict=True):
            torch.testing.assert_close(ours, single, atol=1e-4, rtol=1e-4)
    assert one["remembered"][0][2].sum() > 4 and (one["remembered"][0][0] != start).any()
    # And training did something: a teacher that lags is not the student.
    name = "roi_heads.mask_predictor.mask_fcn_logits.weight"
    lag = (one["student"][name] - one["teacher"]["module." + name]).abs().max()
    assert lag > 5e-6 and (one["student"][name] - one["before"][name]).abs().max() > 2e-5


def test_a_whole_run_under_torchrun_with_two_processes(tmp_path, shapes_folder):
    arguments = [*dataset_of(shapes_folder), *TINY, "--output", tmp_path]
    done = launch(TWO, "train.py", *arguments)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 12 and done.stdout.count("AP in percent") == 1
    # Goes on from the end, evaluates with two processes again, and finds the same.
    launch(TWO, "train.py", *arguments)
    again = json.loads((tmp_path / "summary.json").read_text())
    assert again["details"] == summary["details"] and again["audit"] == summary["audit"]


def test_an_error_stops_all_processes_with_its_line(tmp_path, shapes_folder):
    arguments = [*dataset_of(shapes_folder), *TINY, "--output", tmp_path, "--labeled", "99"]
    done = launch(TWO, "train.py", *arguments, status=1)
    assert "error: --labeled 99: that is 99 of 40 images" in done.stderr
    assert "UserError" not in done.stderr
