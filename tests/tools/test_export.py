"""An exported model gives the same detections, without this project.

Claims: the file beside the weights needs torch and torchvision alone, and gives the boxes,
classes and scores of the model that was trained, for both models, with frozen and with
trainable norms; so does the ONNX file, run by another program, at sizes that it was not traced
with; a missing package is one line, and a file of somebody else is not overwritten.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch

from ssis import UserError, config, model, networks
from ssis.engine import resume
from ssis.io import checkpoint
from ssis.tools import export


def trained(settings, names):
    """A model with random weights and norms that do something."""
    torch.manual_seed(1)
    sides, weights = (settings.short_side, settings.long_side), settings.backbone_weights
    net = networks.build(settings.model, len(names) + 1, *sides, weights, fetch=False)
    with torch.no_grad():
        for part in net.modules():
            if hasattr(part, "running_var"):
                # As small as epsilon: with a wrong one every layer is off by a third.
                part.running_var.uniform_(1e-5, 2e-5)
                part.running_mean.normal_(0, 0.1)
                part.weight.copy_(part.running_var.sqrt() * torch.rand_like(part.weight) * 2)
    # Random scores are all near 1 / C, and some must pass.
    net.roi_heads.score_thresh = 0.0
    return net.eval()


def same(ours, other) -> None:
    assert len(ours["boxes"]) == len(other["boxes"]) > 5
    # Rounding grows through 50 random layers; a wrong norm is another picture.
    torch.testing.assert_close(ours["boxes"], other["boxes"], rtol=1e-3, atol=0.1)
    torch.testing.assert_close(ours["scores"], other["scores"], rtol=1e-3, atol=1e-4)
    assert torch.equal(ours["labels"], other["labels"])


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--model", "resnet50"],
        ["--model", "resnet50", "--backbone-weights", "imagenet"],
        ["--model", "resnet50", "--backbone-weights", "coco"],
    ],
    ids=["small", "from scratch", "frozen norms", "norms without epsilon"],
)
def test_the_plain_model_gives_the_same_detections(tmp_path, flags):
    settings = config.parse(
        [*flags, "--method", "pl-dc"]
        + ["--short-side-min", "64", "--short-side", "64", "--long-side", "96"]
    )
    names = ["cat", "a 'dog' with \"quotes\""]
    net = trained(settings, names)
    torch.save(export.weights(net), tmp_path / "weights.pt")
    no_epsilon = "coco" in flags
    text = export.model_text(settings, names, "A test.", no_epsilon)
    (tmp_path / "model.py").write_text(text)
    plain = export.load_plain(tmp_path)
    assert not isinstance(plain, model.MaskRCNN)
    plain.roi_heads.score_thresh = 0.0
    # Of the size that it would be resized to: the resizing is not the same.
    image = torch.rand(3, 64, 80)
    with torch.no_grad():
        for ours, other in zip(
            net.backbone(image[None]).values(), plain.backbone(image[None]).values(), strict=True
        ):
            assert (ours - other).norm() < 1e-3 * ours.norm()
        if not no_epsilon:  # whose random features are too large for different boxes
            same(net([image])[0], plain([image])[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint of the small model, exported by the command."""
    folder = tmp_path_factory.mktemp("export")
    settings = config.parse(["--method", "supervised", "--short-side-min", "64"])
    settings.short_side = 64
    net = trained(settings, ["cat", "dog"])
    torch.manual_seed(0)
    state = dict(
        config={**vars(settings)},
        names=["cat", "dog"],
        student=net.state_dict(),
        teacher=None,
    )
    checkpoint.save(folder / "checkpoint.pt", state)
    export.run([str(folder / "checkpoint.pt"), "--out", str(folder / "out"), "--onnx"])
    return folder / "out", net


def test_it_needs_nothing_of_this_project(exported):
    folder, net = exported
    torch.manual_seed(2)
    image = torch.rand(3, 64, 64)
    np.save(folder / "image.npy", image.numpy())
    program = (
        "import sys, numpy, torch, model; net = model.load(); net.roi_heads.score_thresh = 0.0; "
        "output = net([torch.from_numpy(numpy.load('image.npy'))])[0]; "
        "assert 'ssis' not in sys.modules and model.CLASSES == ['cat', 'dog']; "
        "torch.save({k: v.detach() for k, v in output.items()}, 'output.pt')"
    )
    subprocess.run([sys.executable, "-I", "-c", "import sys; sys.path.insert(0, '.'); " + program],
                   cwd=folder, check=True)  # fmt: skip
    with torch.no_grad():
        same(net([image])[0], torch.load(folder / "output.pt"))


@pytest.mark.parametrize("size", [(64, 64), (64, 90)])
def test_onnx_gives_the_same_detections_at_any_size(exported, size):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder, _ = exported
    plain = export.load_plain(folder)
    torch.manual_seed(3)
    image = torch.rand(3, *size)
    session = runtime.InferenceSession(str(folder / "model.onnx"))
    values = map(torch.from_numpy, session.run(None, {"image": image.numpy()}))
    theirs = dict(zip((o.name for o in session.get_outputs()), values, strict=True))
    with torch.no_grad():
        ours = plain([image])[0]
    same(ours, theirs)
    torch.testing.assert_close(ours["masks"], theirs["masks"], rtol=1e-3, atol=1e-3)


def test_onnx_goes_on_after_an_image_with_nothing_in_it(exported, tmp_path):
    """One session: something, nothing, another size, something again; no batch of two."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    plain = export.load_plain(exported[0])
    generator = torch.Generator().manual_seed(4)
    images = [torch.rand(3, 64, 64, generator=generator), torch.zeros(3, 64, 64)]
    images.append(torch.rand(3, 80, 56, generator=generator))
    with torch.no_grad():
        best = [plain([image])[0]["scores"].max().item() for image in images]
        # A threshold between the lowest and the next: one image has nothing.
        plain.roi_heads.score_thresh = sum(sorted(best)[:2]) / 2
        counts = [len(plain([image])[0]["scores"]) for image in images]
        assert counts.count(0) == 1
        export.write_onnx(plain, tmp_path / "model.onnx")
        session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
        for k in (0, 1, 2, 1, 0, 2):
            values = map(torch.from_numpy, session.run(None, {"image": images[k].numpy()}))
            found = dict(zip((o.name for o in session.get_outputs()), values, strict=True))
            assert len(found["boxes"]) == len(found["masks"]) == counts[k]
            if counts[k]:
                same(plain([images[k]])[0], found)
    with pytest.raises(Exception, match="Invalid rank for input: image Got: 4 Expected: 3"):
        session.run(None, {"image": np.zeros((2, 3, 64, 64), np.float32)})


def test_a_missing_package_is_one_line(monkeypatch, exported):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--onnx: needs a further package; pip install onnx"):
        export.run(["checkpoint.pt", "--out", str(exported[0]), "--onnx"])


def test_a_file_of_somebody_else_is_not_overwritten(exported, tmp_path):
    (tmp_path / "model.py").write_text("# mine")
    with pytest.raises(UserError, match="is there and was not exported"):
        export.run([str(exported[0].parent / "checkpoint.pt"), "--out", str(tmp_path)])
    assert (tmp_path / "model.py").read_text() == "# mine"
    export.run([str(exported[0].parent / "checkpoint.pt"), "--out", str(exported[0])])


def test_a_backbone_of_timm_is_refused_in_one_line(tmp_path):
    pytest.importorskip("timm")
    settings = config.parse(["--model", "timm", "--method", "supervised"])
    sides = (settings.short_side, settings.long_side)
    net = networks.build("timm", 3, *sides, backbone=settings.backbone)
    state = resume.model_alone(net, settings, ["cat", "dog"], 0)
    checkpoint.save(tmp_path / "best.pt", state)
    with pytest.raises(UserError, match="has a backbone of timm, which torchvision does not"):
        export.run([str(tmp_path / "best.pt"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
