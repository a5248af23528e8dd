"""Two processes with gloo are one process on the same global batch.

Also: a process without any pseudo-label neither hangs the other nor changes the result,
a whole run under torchrun ends like any other, and errors stop all processes.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import TWO
from PIL import Image
from ssis import UserError, config, distributed
from ssis.engine.session import check_batches
from helpers import TINY, dataset_of


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
    launch([sys.executable], ROOT / "tests" / "method" / "gloo_step.py", path, shapes_folder)
    return torch.load(path)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_without_pseudo_labels_among_them_agree_with_one(
    one, tmp_path, shapes_folder, world
):
    script = ROOT / "tests" / "method" / "gloo_step.py"
    launch([*TWO[:-1], str(world)], script, tmp_path / "two.pt", shapes_folder)
    two = torch.load(tmp_path / "two.pt")
    # The case is the one we mean: half of the processes had pseudo-labels in each step,
    # the others never.
    for rank in range(world):
        assert all(two["found"][rank]) if rank < world // 2 else not any(two["found"][rank])
    assert [sum(step) for step in zip(*two["found"], strict=True)] == one["found"][0]
    # Copy-paste: a pair in each process that has two images, which are both changed.
    assert one["pasted"] == [2] and two["pasted"] == {2: [2, 2], 4: [0] * 4}[world]
    # What three steps changed, not the weights themselves, whose size would hide it.
    for name, start in one["before"].items():
        assert torch.equal(start, two["before"][name])
        for who in ("student", "teacher"):
            moved, moved_too = one[who][name] - start, two[who][name] - start
            tolerance = 1e-7 + 0.01 * moved.abs().max().item()
            assert (moved - moved_too).abs().max() <= min(tolerance, 1e-5), (who, name)
    # PL-DC's memory: the same on both processes, and what one process has.
    start = 0.05 + (config.Config().tau_max - 0.05) / 6
    for rank in range(world):
        for ours, single in zip(two["remembered"][rank], one["remembered"][0], strict=True):
            torch.testing.assert_close(ours, single, atol=1e-5, rtol=1e-5)
    assert one["remembered"][0][2].sum() > 4 and (one["remembered"][0][0] != start).any()
    assert one["remembered"][0][4].sum() > 4 and one["remembered"][0][3].any()
    assert (one["remembered"][0][5] - 1 / 6).abs().max() > 1e-4
    # And training did something: a teacher that lags is not the student.
    name = "roi_heads.mask_predictor.mask_fcn_logits.weight"
    lag = (one["student"][name] - one["teacher"][name]).abs().max()
    assert lag > 5e-6 and (one["student"][name] - one["before"][name]).abs().max() > 2e-5


def test_a_whole_run_under_torchrun_with_two_processes(tmp_path, shapes_folder):
    arguments = [*dataset_of(shapes_folder), *TINY, "--labeled-batch", "4", "--output", tmp_path]
    done = launch(TWO, "train.py", *arguments)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 12 and done.stdout.count("AP in percent") == 1
    # Goes on from the end, evaluates with two processes again, and finds the same.
    launch(TWO, "train.py", *arguments)
    again = json.loads((tmp_path / "summary.json").read_text())
    assert again["details"] == summary["details"] and again["audit"] == summary["audit"]


@pytest.mark.fast
def test_batches_that_cannot_be_shared_are_refused_before_anything_is_read():
    """Also that of pretraining alone, which would be met first, or last."""
    for flag in ("--pretrain-batch", "--labeled-batch", "--unlabeled-batch"):
        with pytest.raises(UserError, match=f"^{flag} 9: cannot be shared equally by 2 processes"):
            check_batches(config.parse([flag, "9"]), 2)
    check_batches(config.parse(["--pretrain-batch", "10"]), 2)


@pytest.mark.fast
def test_copy_paste_without_a_second_image_in_a_process_is_refused():
    """`--preset coco --method full` has 12 unlabeled images: not over 8 processes."""
    coco = ["--preset", "coco", "--method", "full", "--sam", "tiny"]
    coco += ["--pretrain-batch", "12"]
    check_batches(config.parse(coco), 4)
    check_batches(config.parse([*coco, "--arp", "none"]), 12)
    check_batches(config.parse(["--method", "supervised"]), 4)
    with pytest.raises(UserError) as error:
        check_batches(config.parse(coco), 12)
    said = str(error.value)
    assert said.startswith("--arp unlabeled: --unlabeled-batch 12 over 12 process(es) is 1 image")
    assert "\n" not in said and "--arp none" in said
    # Supervised training has no unlabeled batch, and one labeled one.
    check_batches(config.parse(["--method", "supervised", "--arp", "unlabeled"]), 8)
    one = ["--method", "supervised", "--arp", "labeled", "--labeled-batch", "8"]
    check_batches(config.parse([*one, "--pretrain-batch", "16"]), 8)
    with pytest.raises(UserError, match="--labeled-batch 8 over 8"):
        check_batches(config.parse(one), 8)
    with pytest.raises(UserError, match="--labeled-batch 8 over 8"):
        check_batches(config.parse(["--arp", "both", "--unlabeled-batch", "16"]), 8)


@pytest.mark.fast
def test_statistics_are_the_mean_over_the_processes(monkeypatch):
    """Three processes; the sums of the other two are given. One call for all the norms."""
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.BatchNorm2d(2))
    for k, norm in enumerate(net):
        norm.running_mean.fill_(1.0 + k)
        norm.running_var.fill_(4.0 + k)
    before, calls = [buffer.data_ptr() for buffer in net.buffers()], []

    def all_sum(tensor):
        calls.append(tensor.numel())
        return tensor + 5.0

    # Alone, without a process group, nothing changes.
    distributed.average_statistics(net)
    assert net[0].running_mean.item() == 1.0
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(distributed, "all_sum", all_sum)
    distributed.average_statistics(net)
    # (1 + 5) / 3, (4 + 5) / 3, (2 + 5) / 3, (5 + 5) / 3
    assert net[0].running_mean.tolist() == [2.0] and net[0].running_var.tolist() == [3.0]
    torch.testing.assert_close(net[1].running_mean, torch.full((2,), 7 / 3))
    torch.testing.assert_close(net[1].running_var, torch.full((2,), 10 / 3))
    assert calls == [6] and [buffer.data_ptr() for buffer in net.buffers()] == before


def test_an_error_stops_all_processes_with_its_line(tmp_path, shapes_folder):
    arguments = [*dataset_of(shapes_folder), *TINY, "--output", tmp_path, "--labeled", "99"]
    arguments += ["--labeled-batch", "4"]
    done = launch(TWO, "train.py", *arguments, status=1)
    assert "error: --labeled 99: that is 99 of 40 images" in done.stderr
    assert "UserError" not in done.stderr


def uneven_folder(folder, count, with_instances):
    """`count` images, no two of one shape; the first few have an instance, the others none."""
    rng = np.random.RandomState(count)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for k in range(count):
        height, width = 24 + 7 * (k % 5), 80 - 9 * (k % 7)
        pixels = rng.randint(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{k}.png")
        images.append(dict(id=k, file_name=f"{k}.png", height=height, width=width))
        if k < with_instances:
            square = [3, 3, 19, 3, 19, 20, 3, 20]
            annotations.append(dict(id=k + 1, image_id=k, category_id=1, segmentation=[square]))
    names = [dict(id=1, name="square")]
    raw = dict(images=images, annotations=annotations, categories=names)
    (folder / "coco.json").write_text(json.dumps(raw))


def test_uneven_shapes_and_images_without_instances_hang_nobody(tmp_path):
    uneven_folder(tmp_path / "train", 11, with_instances=2)
    uneven_folder(tmp_path / "val", 5, with_instances=3)
    parts = [
        f"--{part}-{kind}={tmp_path}/{part}/{name}"
        for part in ("train", "val")
        for kind, name in (("json", "coco.json"), ("images", "images"))
    ]
    sizes = ["--short-side-min", 32, "--short-side", 48, "--long-side", 96, "--arp", "both"]
    # Of the five labeled images three are empty: batches without any instance come.
    arguments = [*parts, *TINY, *sizes, "--preset", "custom", "--labeled", 5]
    arguments += ["--output", tmp_path / "run", "--tau-class", 0.01]
    # Two of each in a process, as copy-paste asks.
    arguments += ["--labeled-batch", 4, "--unlabeled-batch", 4]
    done = launch(TWO, "train.py", *arguments)
    assert done.stdout.count("AP in percent") == 1


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_evaluate_to_what_one_finds(tmp_path, world):
    """Bit for bit, on 19 images of all shapes: who is in a batch with whom stays the same."""
    uneven_folder(tmp_path / "data", 19, with_instances=9)
    for name, command in (("one", [sys.executable]), ("many", [*TWO[:-1], str(world)])):
        script = ROOT / "tests" / "report" / "gloo_evaluate.py"
        launch(command, script, tmp_path / f"{name}.json", tmp_path / "data")
    one, many = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "many"))
    assert len(one["results"]) > 50 and {r["image_id"] for r in one["results"]} == set(range(19))
    assert many == one
