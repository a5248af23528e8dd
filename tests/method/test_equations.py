"""The equations as loops: each is written down from the formula, in plain Python, and must agree.

With random numbers and the cases at the edge: classes that nobody has, logits of 30, empty masks,
images without instances. Loops that need more around them stand with what they test: DICC and the
three-way filter (test_correction, test_filters), CLIP (test_clip), SD with crops and padding
(test_sam_distill), PR's points (test_refine), ARP (test_copy_paste), "no object" (test_losses,
test_model).
"""

import math

import pytest
import torch
from conftest import made_labels

from ssis import distributed, filters, losses, teacher

pytestmark = pytest.mark.fast


def test_mask_quality_is_the_mean_of_p_over_its_foreground():
    """PL-DC Eq. (quality); an empty mask, one of a single pixel, one that is all sure."""
    probs = torch.rand(6, 9, 11)
    probs[0], probs[1] = 0.5, 0.3
    probs[2] = 0.2
    probs[2, 4, 4] = 0.7
    probs[3] = 1.0
    for mask, found in zip(probs, teacher.mask_quality(probs).tolist(), strict=True):
        inside = [p for p in mask.flatten().tolist() if p > 0.5]
        assert found == pytest.approx(sum(inside) / len(inside) if inside else 0.0, abs=1e-6)


@pytest.mark.parametrize("rule", ["score", "coupled", "dual", "adaptive"])
def test_the_rules_of_keeping_instance_by_instance(rule):
    """GD Eq. (filter), PL-DC Eq. (coupled), (dual), (adaptive)."""
    n, classes = 200, 3
    c, m = torch.rand(n).tolist(), (0.5 + torch.rand(n) / 2).tolist()
    labels = torch.randint(1, classes + 1, (n,)).tolist()
    thresholds = filters.Thresholds(classes, (0.3, 0.9), (0.55, 0.95), 0.9)
    thresholds.start(torch.tensor([0.7, 0.3, 0.0]))
    own_class, own_mask = thresholds.values.tolist()
    good = {
        "score": lambda k: c[k] > 0.6,
        "coupled": lambda k: c[k] * m[k] >= 0.6,
        "dual": lambda k: c[k] >= 0.6 and m[k] >= 0.8,
        "adaptive": lambda k: c[k] >= own_class[labels[k] - 1] and m[k] >= own_mask[labels[k] - 1],
    }[rule]
    found = filters.keep(made_labels(labels, c, m), rule, 0.6, 0.8, 5, thresholds)
    wanted = [c[k] for k in range(n) if good(k)]
    assert 0 < len(wanted) < n
    assert found.class_quality.tolist() == pytest.approx(wanted)


def test_thresholds_follow_step_by_step():
    """PL-DC Eq. (init) and (adapt): five steps of three images, one class that nobody predicts."""
    low, high, a = (0.4, 0.6), (0.9, 0.8), 0.8
    thresholds = filters.Thresholds(4, (low[0], high[0]), (low[1], high[1]), a)
    frequency = [0.5, 0.3, 0.2, 0.0]
    thresholds.start(torch.tensor(frequency))
    table = [[low[q] + (high[q] - low[q]) * f for f in frequency] for q in (0, 1)]
    for _ in range(5):
        images = []
        for n in (4, 0, 7):
            labels = torch.randint(1, 4, (n,)).tolist()
            images.append(made_labels(labels, torch.rand(n).tolist(), torch.rand(n).tolist()))
        thresholds.update(images)
        for k in range(4):
            seen = [
                (c, m)
                for image in images
                for label, c, m in zip(
                    image.labels.tolist(), image.class_quality.tolist(),
                    image.mask_quality.tolist(), strict=True,
                )
                if label == k + 1 and c >= low[0]
            ]  # fmt: skip
            for q in (0, 1) if seen else ():
                moved = a * table[q][k] + (1 - a) * sum(s[q] for s in seen) / len(seen)
                table[q][k] = min(max(moved, low[q]), high[q])
        torch.testing.assert_close(thresholds.values, torch.tensor(table))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_weighted_mask_loss_pixel_by_pixel(scale):
    """PL-DC Eq. (PMUA) and (uncertainty), with logits of 30 as well."""
    logits = scale * torch.randn(5, 4, 3, 3)
    labels = torch.tensor([1, 3, 2, 1, 3])
    targets, probs = torch.rand(5, 3, 3), torch.rand(5, 3, 3)
    probs[0, 0, 0], probs[0, 0, 1] = 0.5, 1.0
    found = losses.mask_loss(logits, labels, targets, losses.certainty(probs)).item()
    terms = []
    for n in range(5):
        for y in range(3):
            for x in range(3):
                z, t = logits[n, labels[n], y, x].item(), targets[n, y, x].item()
                u = 1 - 2 * abs(probs[n, y, x].item() - 0.5)
                # -t log p - (1 - t) log(1 - p) with p = 1 / (1 + exp(-z)), without overflow.
                bce = max(z, 0) - z * t + math.log1p(math.exp(-abs(z)))
                terms.append((1 - u) * bce)
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_the_ema_weight_by_weight():
    """GD Eq. (EMA) over parameters and float buffers; a count of batches is copied."""
    first = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    second = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    second(torch.randn(8, 3))
    before = {name: value.clone() for name, value in first.state_dict().items()}
    teacher.ema_update(first, second, 0.9)
    for name, value in first.state_dict().items():
        for old, new, now in zip(
            before[name].flatten().tolist(), second.state_dict()[name].flatten().tolist(),
            value.flatten().tolist(), strict=True,
        ):  # fmt: skip
            wanted = new if "num_batches" in name else 0.9 * old + 0.1 * new
            assert now == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("world", [1, 3])
def test_the_loss_of_the_global_batch_sample_by_sample(world):
    """GD Eq. (total): means over all processes' samples; one process has none, one has one."""
    sizes = {1: [4], 3: [5, 0, 1]}[world]
    samples = {name: [torch.rand(n) for n in sizes] for name in losses.COUNT_OF}
    everywhere = torch.tensor([float(sum(sizes))] * losses.COUNTS)
    found = 0.0
    for rank, n in enumerate(sizes):
        own = {name: part[rank].mean() if n else torch.zeros(()) for name, part in samples.items()}
        counts = torch.tensor([float(n)] * losses.COUNTS)
        found += losses.total(own, counts, everywhere, world).item() / world
    wanted = sum(torch.cat(parts).mean().item() for parts in samples.values())
    assert found == pytest.approx(wanted, rel=1e-5)
    # A batch without any sample anywhere is no 0 / 0.
    none = torch.zeros(losses.COUNTS)
    zeros = {name: torch.zeros(()) for name in samples}
    assert losses.total(zeros, none, none, distributed.world_size()) == 0
