"""A few semi-supervised steps on a fixed global batch; the body of test_distributed.

    python tests/method/gloo_step.py OUT SHAPES             one process
    torchrun --nproc_per_node 2 tests/method/gloo_step.py OUT SHAPES

Random choices that would differ with the number of processes are taken out, so that the
rest must agree: norms are frozen, all anchors and proposals are used. The threshold is
such that the first two unlabeled images have pseudo-labels and the last two have none:
with two processes, one of them skips the unlabeled pass in every step. SGD stands in for
AdamW, whose first steps are the sign of the gradient, be it 1 or a rounding error.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import train
from ssis import alignment, augment, correction, data, distributed, filters, imagenet, model
from ssis import networks, prototypes, teacher
from ssis.config import Config
from ssis.datasets import coco_json
from ssis.engine.build import build
from ssis.engine.guard import Guard


class Colors(nn.Module):
    """The smallest encoder: its only feature map is the image."""

    def forward(self, crops):
        return [crops]


def freeze_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features))
        else:
            freeze_norms(child)


def frozen(net: model.MaskRCNN) -> model.MaskRCNN:
    """The model without anything random in its training step."""
    freeze_norms(net)
    net.rpn.fg_bg_sampler.batch_size_per_image = 10**6
    net.roi_heads.fg_bg_sampler.batch_size_per_image = 10**6
    return net


def pasted_images(net, labeler, items: list, config: Config, scaler) -> int:
    """In how many of this process's images copy-paste changes pixels in an unlabeled pass."""
    changed, views = [], augment.strong_views

    def spy(images, items, erasing):
        pairs = zip(images, items, strict=True)
        changed.extend(not torch.equal(image, item["image"]) for image, item in pairs)
        return views(images, items, erasing)

    augment.strong_views = spy
    # A threshold under which every image has pseudo-labels.
    config.arp, config.tau_class, config.refine = "unlabeled", 0.0, "none"
    train.unlabeled_pass(net, labeler, items, 3, config, scaler)
    augment.strong_views = views
    return sum(changed)


def main(out: str, folder: str) -> None:
    config = Config(
        # No clipping: it would hide a gradient that is too large by a factor.
        clip_norm=1e9,
        method="pl-dc",
        filter="dual",
        tau_mask=0.0,
        correction="prototypes",
        uncertainty=True,
        # S4M: distilled in the first step, redrawn in the others. Not pasted: pairs are
        # those of one process.
        structure_weight=1.0,
        structure_queries=8,
        refine="agreement",
        refine_gate=0.0,
        arp="none",
        # Background weighs less than an instance, and in another way in the two passes.
        no_object_labeled=0.4,
        no_object_unlabeled=0.2,
        short_side_min=64,
        short_side=64,
        long_side=64,
        device="cpu",
        labeled_batch=4,
        unlabeled_batch=4,
    )
    torch.set_num_threads(1)
    rank, world_size, device = distributed.start("cpu")
    # Before the model is wrapped in DDP: it cannot be wrapped twice.
    build_model = networks.build
    networks.build = lambda *args: frozen(build_model(*args))
    dataset = coco_json.load_coco(f"{folder}/instances_train.json", f"{folder}/train")
    student, labeler, structure, _, _, scaler = build(config, dataset, rank, world_size, device)
    net = distributed.unwrap(student)
    optimizer = torch.optim.SGD(net.parameters(), lr=2e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    guard = Guard(net, dataset.files, Path(out).parent, False, rank)

    labeled = data.Stream(dataset, list(range(8)), config.view_size, 0, True)
    unlabeled = data.Stream(dataset, list(range(8, 40)), config.view_size, 1, False)
    # Of eight unlabeled images take the two with the best and the two with the worst
    # detection, and put the threshold between them.
    items = [unlabeled[k] for k in range(8)]
    best = [
        teacher.predict(labeler.teacher, [item["image"]], 0.05)[0].class_quality.max().item()
        for item in items
    ]
    order = sorted(range(8), key=lambda k: -best[k])
    config.tau_class = (best[order[1]] + best[order[-2]]) / 2
    chosen = [items[k] for k in (*order[:2], *order[-2:])]

    # PL-DC's category classifier, refreshed in the second of the three steps.
    correction.REFRESH_EVERY = 2
    correction.fill(labeler.classifier, labeler.teacher, labeled, rank, world_size)

    share = 4 // world_size
    mine = slice(rank * share, (rank + 1) * share)
    parts = (structure, optimizer, schedule, scaler, guard)
    counts = []
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batch = [labeled[12 + k] for k in range(4)][mine]
    row, _ = train.train_step(student, labeler, batch, None, 0, config, *parts)
    assert row["labeled/loss_structure"][0] > 0
    for step in range(1, 4):
        batch = [labeled[4 * (step - 1) + k] for k in range(4)][mine]
        # In the last step images without pseudo-labels are trained as background.
        config.empty_images = "background" if step == 3 else "skip"
        row, _ = train.train_step(student, labeler, batch, chosen[mine], step, config, *parts)
        if step > 1:
            teacher.ema_update(labeler.teacher, net, 0.9)
        counts.append(row["pseudo_per_image"][0].item())
    counts = distributed.gather(counts)
    pasted = distributed.gather(pasted_images(net, labeler, chosen[mine], config, scaler))
    # PL-DC: what its levels remember must come out the same on every process. Each one has
    # its share of the predictions and of the labeled images.
    thresholds = filters.Thresholds(6, (0.05, 0.9), (0.05, 0.9), 0.99)
    thresholds.start(torch.full((6,), 1 / 6))
    views = [item["image"] for item in chosen][mine]
    predicted = teacher.predict(labeler.teacher, views, 0.05)
    thresholds.update(predicted)
    # This project's class shares.
    shares = alignment.Alignment(torch.ones(6))
    shares.update(predicted)
    classifier = prototypes.Prototypes(6, net.backbone.out_channels, 64)
    classifier.learn(labeler.teacher, [labeled[k] for k in range(4)][mine])
    # This project's class means, of the colors themselves.
    means = imagenet.ClassMeans(Colors(), [0.0] * 3, [1.0] * 3, 6, "cpu")
    means.learn(labeler.teacher, [labeled[k] for k in range(4)][mine])
    known = (thresholds.values, classifier.bank, classifier.seen, means.sums, means.seen)
    known += (shares.named,)
    remembered = distributed.gather(known)
    if rank == 0:
        torch.save(
            dict(
                found=counts,
                pasted=pasted,
                remembered=remembered,
                student=net.state_dict(),
                teacher=labeler.teacher.state_dict(),
                before=before,
            ),
            out,
        )
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
