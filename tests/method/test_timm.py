"""Backbones of timm: real ones, with weights from files; what does not fit is refused."""

import os
import sys

import pytest
import torch
from conftest import ROOT
from helpers import batch

from ssis import UserError, config, networks, teacher
from ssis.io import timm_backbone

timm = pytest.importorskip("timm")
# The smallest of each kind: timm's own features of EfficientNets, and its wrapper of others.
SMALL = ("tf_efficientnet_lite0", "resnet10t")
WEIGHTS = ROOT.parent / "shared" / "weights" / "tf_efficientnet_lite0.pth"


@pytest.mark.parametrize("name", SMALL)
def test_a_backbone_starts_from_a_file_and_its_norms_are_frozen(name, tmp_path):
    whole = timm.create_model(name)
    torch.save(whole.state_dict(), tmp_path / "own.pth")
    net = networks.build("timm", 4, 64, 96, str(tmp_path / "own.pth"), backbone=name).train()
    path = "blocks.2.0.conv_dw" if "efficientnet" in name else "layer2.0.conv1"
    ours = net.backbone.body.get_submodule(path)
    assert torch.equal(ours.weight, whole.get_submodule(path).weight)
    assert ours.weight.requires_grad
    # The stages up to stride 4 do not learn, those above do; without frozen ones all do.
    frozen = [n for n, p in net.backbone.body.named_parameters() if not p.requires_grad]
    learns = "blocks.2.0" if "efficientnet" in name else "layer2.0"
    assert frozen and not any(n.startswith(learns) for n in frozen)
    below = "blocks.1." if "efficientnet" in name else "layer1."
    assert {n for n, _ in net.backbone.body.named_parameters() if n.startswith(below)} <= {*frozen}
    loose = timm_backbone.freeze(timm_backbone.load(name, "none")[0], 5)
    assert all(p.requires_grad for p in loose.parameters())
    # Four of five: the stem alone is constant.
    most = timm_backbone.freeze(timm_backbone.load(name, "none")[0], 4)
    learn = {n for n, p in most.named_parameters() if p.requires_grad}
    stem = "conv_stem" if "efficientnet" in name else "conv1"
    assert any(n.startswith(below) for n in learn)
    assert not any(n.startswith(stem) for n in learn)
    fixed = timm_backbone.freeze(timm_backbone.load(name, "none")[0], 0)
    assert not any(p.requires_grad for p in fixed.parameters())
    # No norm of the backbone learns or follows the batch; the heads have none.
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    before = {k: v.clone() for k, v in net.named_buffers()}
    images, targets = batch()
    losses, _, features = net(images, targets)
    sum(losses.values()).backward()
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())
    assert features.shape[1] == 64 and ours.weight.grad is not None
    # As many anchors as the pyramid has levels, and what timm normalizes with.
    found = teacher.predict(net.eval(), images, 0.0)
    assert len(found[0]) > 0 and list(net.transform.image_mean) == list(
        timm.get_pretrained_cfg(name).mean
    )


def test_without_weights_the_norms_learn():
    net = networks.build("timm", 4, 64, 96, backbone=SMALL[0])
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(m.weight.requires_grad for m in norms)


def test_a_teacher_of_a_checkpoint_is_the_same_network(tmp_path):
    """Built without its file, which may be gone: frozen norms all the same."""
    whole = timm.create_model(SMALL[0])
    torch.save(whole.state_dict(), tmp_path / "own.pth")
    net = networks.build("timm", 4, 64, 96, str(tmp_path / "own.pth"), backbone=SMALL[0])
    again = networks.build("timm", 4, 64, 96, "gone.pth", backbone=SMALL[0], fetch=False)
    again.load_state_dict(net.state_dict())
    assert net.state_dict().keys() == again.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "weights", "line"),
    [
        ("tf_efficientnet_lite", "none", "timm has no such model.*such as"),
        ("", "none", r"--backbone \(none\): timm has no such model"),
        ("vit_tiny_patch16_224", "none", r"has maps of stride \[16"),
        (SMALL[0], "absent.pth", "readable state dict"),
        (SMALL[0], "other.pth", "not of this model, lacks"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name, weights, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv_stem.weight": torch.zeros(1)}, "other.pth")
    with pytest.raises(UserError, match=line) as error:
        timm_backbone.load(name, weights)
    assert "\n" not in str(error.value)


def test_weights_that_cannot_be_fetched(monkeypatch):
    """No network: timm's own complaint, and what to do."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(os.environ, "HTTPS_PROXY", "http://127.0.0.1:9")

    def refuse(*arguments, **more):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    with pytest.raises(UserError, match="timm says: no route to host; fetch the weights"):
        timm_backbone.load(SMALL[0], "imagenet")


def test_without_timm_a_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        timm_backbone.load(SMALL[0], "none")


def test_the_published_weights_load():
    if not WEIGHTS.is_file():
        pytest.skip(f"no weights: {WEIGHTS} is absent")
    body, mean, deviation = timm_backbone.load(SMALL[0], str(WEIGHTS))
    state = torch.load(WEIGHTS, weights_only=True)
    assert torch.equal(body.blocks[2][0].conv_dw.weight, state["blocks.2.0.conv_dw.weight"])
    assert mean == deviation == [0.5] * 3


def test_flags_that_contradict_each_other():
    with pytest.raises(UserError, match="--backbone-weights coco: is a whole resnet50"):
        config.parse(["--model", "timm", "--backbone-weights", "coco"])


def test_weights_as_they_are_published_load(tmp_path):
    """A .safetensors file, and one that is not."""
    from safetensors.torch import save_file

    whole = timm.create_model("resnet10t")
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    body, *_ = timm_backbone.load("resnet10t", str(tmp_path / "model.safetensors"))
    assert torch.equal(body.layer1[0].conv1.weight, whole.layer1[0].conv1.weight)
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="readable state dict"):
        timm_backbone.load("resnet10t", str(tmp_path / "broken.safetensors"))
