"""Steps that are not finite: skipped without a trace, counted, and the third ends the run.

The NaN is put where a real one appears, into the mask loss of one step; divergence is
provoked with a step size of 10^30. Runs are of the small model on four images.
"""

import json

import pytest
import torch
from conftest import write_coco
from helpers import arguments, error_of

import train
from ssis import UserError, losses
from ssis.engine import guard
from ssis.io import checkpoint

SUPERVISED = ["--method", "supervised", "--labeled", "100%", "--labeled-batch", "2"]


def spoiled(monkeypatch, steps, value):
    """The mask loss of some steps (1, 2, ..) becomes `value`; returns what was asked."""
    right, calls = losses.mask_loss, []

    def mask_loss(logits, *rest):
        calls.append(logits.shape)
        loss = right(logits, *rest)
        return loss * value if len(calls) in steps else loss

    monkeypatch.setattr(losses, "mask_loss", mask_loss)
    return calls


def state_after(folder) -> dict:
    return checkpoint.load(folder / "run" / "checkpoint.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_such_step_leaves_nothing_behind(tmp_path, monkeypatch, capsys, value):
    write_coco(tmp_path)
    flags = [*arguments(tmp_path), *SUPERVISED, "--checkpoint-every", "1"]
    spoiled(monkeypatch, {3}, value)
    saved = {}
    save = checkpoint.save

    def keep(path, state):
        saved[state["step"]] = {k: v.clone() for k, v in state["student"].items()}
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", keep)
    train.main([*flags, "--pretrain-steps", "5", "--burnin-steps", "0"])
    said = capsys.readouterr().err
    assert "warning: step 3: " in said and "labeled/loss_mask" in said and ".png" in said
    assert said.count("the step is skipped") == 1
    # The third step changed neither weights nor BatchNorm's statistics; its neighbors did.
    name = "backbone.body.layer1.0.conv1.weight"
    for a, b, same in ((1, 2, False), (2, 3, True), (3, 4, False), (4, 5, False)):
        assert torch.equal(saved[a][name], saved[b][name]) == same
        for key in saved[a]:
            assert not same or torch.equal(saved[a][key], saved[b][key]), key
    assert all(v.isfinite().all() for v in saved[5].values() if v.is_floating_point())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    skipped = {line["step"]: line["skipped"] for line in map(json.loads, lines)}
    assert skipped == {1: 0.0, 2: 0.0, 3: 1.0, 4: 0.0, 5: 0.0}
    assert not list((tmp_path / "run").glob("nonfinite*"))


def test_the_third_in_a_row_ends_the_run_and_says_why(tmp_path, monkeypatch, capsys):
    write_coco(tmp_path)
    flags = [*arguments(tmp_path), *SUPERVISED, "--checkpoint-every", "2"]
    # Two, a good one, and three.
    spoiled(monkeypatch, {1, 2, 4, 5, 6}, float("nan"))
    line = error_of(capsys, train.main, [*flags, "--pretrain-steps", "9"])
    assert line.startswith("error: step 6: labeled/loss_mask") and "third step in a row" in line
    assert ".png" in line and "nonfinite_*.pt" in line and "lower --lr" in line
    dump = torch.load(tmp_path / "run" / "nonfinite_0.pt", weights_only=True)
    assert dump["step"] == 6 and len(dump["batch"]) == len(dump["images"]) == 2
    assert dump["batch"][0]["image"].shape[0] == 3 and "masks" in dump["batch"][0]["target"]
    assert not torch.tensor(dump["table"]["labeled/loss_mask"]).isfinite().all()
    # The checkpoint before is whole, and the run goes on from it when the cause is gone.
    assert state_after(tmp_path)["step"] == 4
    monkeypatch.undo()
    train.main([*flags, "--pretrain-steps", "9"])
    assert state_after(tmp_path)["step"] == 9 + 1  # with the step of `arguments`' burn-in


def test_a_run_that_diverges_is_stopped(tmp_path, capsys):
    write_coco(tmp_path)
    flags = [*arguments(tmp_path), *SUPERVISED, "--lr", "1e30", "--clip-norm", "1e30"]
    line = error_of(capsys, train.main, [*flags, "--pretrain-steps", "20"])
    assert "third step in a row" in line and "lower --lr" in line


@pytest.mark.parametrize("scaled", [True, False])
def test_with_a_loss_scaler_the_gradient_is_its_business(tmp_path, scaled, capsys):
    """fp16: an infinite gradient of finite losses is a scale too high, which it lowers."""
    watch = guard.Guard(torch.nn.Linear(2, 2), ["a.png"], tmp_path, scaled, 0)
    finite = dict(loss=torch.tensor([1.0, 1.0]))
    wrong = dict(loss=torch.tensor([float("nan"), 1.0]))
    infinite, items = torch.tensor(float("inf")), [dict(index=0)]
    watch.begin()
    assert watch.allows(infinite, dict(finite), items, 1) == scaled
    # But a loss that is not finite is no matter of scale.
    assert not watch.allows(infinite, dict(wrong), items, 2)
    assert watch.allows(torch.tensor(1.0), dict(finite), items, 3)
    assert capsys.readouterr().err.count("the step is skipped") == 2 - scaled


def test_the_batch_is_kept_where_only_the_gradient_is_infinite(tmp_path, capsys):
    watch = guard.Guard(torch.nn.Linear(2, 2), ["a.png"], tmp_path, False, 0)
    row, items = dict(loss=torch.tensor([1.0, 1.0])), [dict(index=0, image=torch.ones(3, 4, 4))]
    watch.begin()
    for step in (1, 2):
        assert not watch.allows(torch.tensor(float("inf")), dict(row), items, step)
    with pytest.raises(UserError, match=r"the gradient is not finite.*nonfinite_"):
        watch.allows(torch.tensor(float("inf")), dict(row), items, 3)
    dump = torch.load(tmp_path / "nonfinite_0.pt", weights_only=True)
    assert dump["images"] == ["a.png"] and dump["batch"][0]["image"].shape == (3, 4, 4)
