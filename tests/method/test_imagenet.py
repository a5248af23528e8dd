"""Class means of a frozen encoder: ssis Eq. (means) by hand, with a real timm network."""

import pytest
import torch
from conftest import made_labels
from torch import nn
from torch.nn import functional as F

from ssis import UserError, config, presets
from ssis.engine.build import make_classifier
from ssis.imagenet import CROP, TEMPERATURE, ClassMeans

pytestmark = pytest.mark.fast
ZERO, ONE = [0.0] * 3, [1.0] * 3


class Colors(nn.Module):
    """The mean color of each crop: the smallest encoder that tells things apart."""

    def forward(self, crops):
        assert crops.shape[1:] == (3, CROP, CROP)
        return [crops]


def painted(*patches) -> torch.Tensor:
    """A gray image of 40 x 60 with patches (x1, y1, x2, y2, color)."""
    image = torch.full((3, 40, 60), 0.5)
    for x1, y1, x2, y2, color in patches:
        image[:, y1:y2, x1:x2] = torch.tensor(color)[:, None, None]
    return image


RED, GREEN = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]


def item(image, boxes, labels) -> dict:
    target = dict(boxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.tensor(labels).long())
    return dict(image=image, target=target)


def pseudo_at(boxes) -> object:
    n = len(boxes)
    pseudo = made_labels([1] * n, [0.6] * n, [1.0] * n, [[0.6, 0.2, 0.1]] * n)
    pseudo.boxes = torch.tensor(boxes)
    return pseudo


def test_an_instance_has_the_class_whose_mean_it_resembles():
    classifier = ClassMeans(Colors(), ZERO, ONE, 3, "cpu")
    left, right = [2.0, 2.0, 18.0, 18.0], [30.0, 10.0, 55.0, 30.0]
    image = painted((0, 0, 20, 20, RED), (27, 7, 58, 33, GREEN))
    # Nothing was remembered: no opinion.
    assert not classifier(image, pseudo_at([left])).any()
    classifier.learn(None, [item(image, [left, right], [1, 3]), item(image, [], [])])
    opinion = classifier(image, pseudo_at([right, left]))
    assert torch.allclose(opinion.sum(dim=1), torch.ones(2))
    # Class 2 was never seen and keeps the teacher's probability, which is 0.2 of 0.9 without
    # background; the others share the rest.
    assert opinion[:, 1].tolist() == pytest.approx([2 / 9, 2 / 9])
    assert opinion[:, 2].tolist() == pytest.approx([7 / 9, 0.0], abs=1e-4)
    # A yellow one is as near to red as to green: half of the rest each.
    yellow = painted((0, 0, 40, 40, [0.7, 0.7, 0.0]))
    assert classifier(yellow, pseudo_at([left])).tolist()[0] == pytest.approx(
        [3.5 / 9, 2 / 9, 3.5 / 9], abs=0.01
    )
    classifier.forget()
    assert not classifier(image, pseudo_at([left])).any()


def test_the_opinion_is_the_equation_and_the_crop_has_its_surroundings():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    encoder = timm.create_model("tf_efficientnet_lite0", features_only=True)
    mean, std = [0.4, 0.5, 0.6], [0.3, 0.2, 0.1]
    classifier = ClassMeans(encoder, mean, std, 2, "cpu")
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(3, 2 * CROP, 2 * CROP, generator=generator)
    # A box of 106.67 pixels with a tenth on each side is 128: the crop is a cut-out.
    side = CROP / 1.2
    inner = [40.0 + side * 0.1, 50.0 + side * 0.1, 40.0 + side * 1.1, 50.0 + side * 1.1]
    normal = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        maps = encoder(normal[None, :, 50 : 50 + CROP, 40 : 40 + CROP])
        by_hand = F.normalize(maps[-1].mean(dim=(2, 3)), dim=1)
    # roi_align takes a pixel's value between centers: the same image, but for rounding.
    assert F.cosine_similarity(classifier.embed(image, torch.tensor([inner])), by_hand) > 0.999
    # At the border there is no more to see, and no error.
    corner = torch.tensor([[0.0, 0.0, 2.0 * CROP, 2.0 * CROP]])
    assert classifier.embed(image, corner).norm().item() == pytest.approx(1)
    boxes = [[10.0, 10.0, 90.0, 90.0], [100.0, 20.0, 200.0, 220.0], [0.0, 90.0, 60.0, 250.0]]
    classifier.learn(None, [item(image, boxes, [1, 2, 2])])
    pseudo = pseudo_at([inner])
    pseudo.distribution = pseudo.distribution[:, :2]
    v = classifier.embed(image, torch.tensor(boxes))
    mu = torch.stack([v[0], (v[1] + v[2]) / (v[1] + v[2]).norm()])
    expected = (by_hand @ mu.T / TEMPERATURE).softmax(dim=1)
    assert torch.allclose(classifier(image, pseudo), expected, atol=0.02)


def test_the_memory_is_in_the_checkpoint_and_the_encoder_is_not():
    one, two = (ClassMeans(Colors(), ZERO, ONE, 2, "cpu") for _ in range(2))
    image = painted((0, 0, 20, 20, RED), (27, 7, 58, 33, GREEN))
    one.learn(None, [item(image, [[2.0, 2.0, 18.0, 18.0]], [2])])
    assert set(one.state_dict()) == {"sums", "seen"} and one.seen.tolist() == [0, 1]
    two.load_state_dict(one.state_dict())
    one.forget()
    assert two.seen.tolist() == [0, 1] and two.sums[1].tolist() == pytest.approx(RED, abs=1e-3)


def test_it_asks_the_backbone_that_the_run_starts_from(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(3)
    whole = timm.create_model("tf_efficientnet_lite0")
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    where = ("tf_efficientnet_lite0", str(tmp_path / "weights.pth"))
    made = make_classifier("imagenet", ["cat", "dog"], 64, 8, "", "", "cpu", where)
    (name,) = (n for n in made.encoder.state_dict() if n.endswith("6.0.conv_pw.weight"))
    theirs = whole.state_dict()["blocks.6.0.conv_pw.weight"]
    assert torch.equal(made.encoder.state_dict()[name], theirs)
    assert made.mean.flatten().tolist() == [0.5] * 3 and made.sums.shape == (2, 320)


def test_only_a_pretrained_timm_backbone_can_be_asked():
    for flags in ("--model small", "--model timm --backbone-weights none"):
        with pytest.raises(UserError, match="asks the pretrained backbone; give --model timm"):
            config.parse(["--correction", "imagenet", *flags.split()])
    assert presets.switches("photos", "full", "timm")["correction"] == "imagenet"
    assert presets.switches("photos", "full", "small")["correction"] == "prototypes"
