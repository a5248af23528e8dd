"""The learning rate of every schedule by hand, and who has which rate and decay."""

import pytest
import torch
from torch import nn

from ssis import networks, optimizer

pytestmark = pytest.mark.fast


def factors(*steps, schedule, decay_at=0.7, again=1.0, restart=True, rewarm=False, warmup=1):
    """Of a run of 100 steps of pretraining and 200 after it."""
    return [
        optimizer.lr_factor(t, 100, 300, warmup, schedule, decay_at, again, restart, rewarm)
        for t in steps
    ]


def test_linear_is_constant_and_then_falls_to_nothing_in_each_part():
    found = factors(0, 69, 70, 85, 99, 100, 240, 270, 299, schedule="linear")
    wanted = [1, 1, 1, 0.5, 1 / 30, 1, 1, 0.5, 1 / 60]
    assert found == pytest.approx(wanted)


def test_step_falls_to_a_tenth_and_a_hundredth():
    """COCO in GD and S4M: at 89 % and 96 % of each part; PL-DC: once, of the whole run."""
    found = factors(88, 89, 96, 97, 277, 278, 293, schedule="step", decay_at=0.889, again=0.963)
    assert found == pytest.approx([1, 0.1, 0.1, 0.01, 1, 0.1, 0.01])
    found = factors(99, 100, 173, 174, 299, schedule="step", decay_at=0.58, restart=False)
    assert found == pytest.approx([1, 1, 1, 0.1, 0.1])


def test_poly_falls_from_the_start():
    found = factors(0, 50, 100, 200, schedule="poly")
    assert found == pytest.approx([1, 0.5**0.9, 1, 0.5**0.9])


def test_a_student_that_starts_afresh_is_warmed_up_again():
    steps = (0, 1, 9, 10, 100, 104, 110)
    for rewarm, after in ((False, [1, 1, 1]), (True, [0.1, 0.5, 1])):
        found = factors(*steps, schedule="linear", warmup=10, rewarm=rewarm)
        assert found == pytest.approx([0.1, 0.2, 1, 1, *after])
    # A run of one part has one warm-up.
    one = factors(100, schedule="step", warmup=10, restart=False, rewarm=True)
    assert one == [1]


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="no schedule 'cosine'"):
        factors(0, schedule="cosine")


def test_biases_and_norms_do_not_decay_and_the_backbone_has_its_own_rate():
    net = networks.build_small(4, 64, 96)
    groups = optimizer.make(net, 0.1, 0.5, 0.05).param_groups
    of = {id(p): g for g in groups for p in g["params"]}
    for name, parameter in net.named_parameters():
        group = of[id(parameter)]
        assert group["lr"] == (0.05 if name.startswith("backbone.body") else 0.1)
        assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0)


def test_frozen_stages_of_the_backbone_are_in_no_group(tmp_path):
    """PL-DC: all of ResNet-50; else stem and first stage, as torchvision has it."""
    from torchvision.models import resnet50

    torch.save(resnet50(weights=None).state_dict(), tmp_path / "r50.pth")
    for trained, stages in ((0, set()), (3, {"layer2", "layer3", "layer4"})):
        net = networks.build("resnet50", 5, 96, 160, str(tmp_path / "r50.pth"), trained)
        body = {n for n, p in net.backbone.body.named_parameters() if p.requires_grad}
        assert {name.split(".")[0] for name in body} == stages
        listed = sum(len(g["params"]) for g in optimizer.make(net, 0.1, 1.0, 0.05).param_groups)
        assert listed == sum(p.requires_grad for p in net.parameters())
        assert isinstance(net.backbone.fpn, nn.Module) and listed > 10


def test_the_rate_after_pretraining_is_a_fraction_of_what_it_would_be():
    shape = (10, 30, 4, "linear", 0.5, 1.0, True, False)
    for step in range(30):
        usual, less = (optimizer.lr_factor(step, *shape, after) for after in (1.0, 0.3))
        assert less == pytest.approx(usual * (0.3 if step >= 10 else 1))
