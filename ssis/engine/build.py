r"""What a run is made of: networks, thresholds, SAM, optimizer, precision.

Nothing is decided here: every choice is a setting, and what becomes of the parts is in
`train.py`.

Read next: `ssis/engine/session.py`, which keeps them alive.
"""

import sys
from typing import NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR

from ssis import (
    correction,
    distributed,
    filters,
    model,
    networks,
    optimizer,
    sam,
    sam_distill,
)
from ssis.alignment import Alignment
from ssis.calibration import Calibration
from ssis.clip import Clip
from ssis.config import Config
from ssis.imagenet import ClassMeans
from ssis.io import timm_backbone
from ssis.io.embeddings import Embeddings
from ssis.prototypes import Prototypes
from ssis.teacher import make_teacher


class Labeler(NamedTuple):
    """All that has a say in a pseudo-label.

    teacher: GD's; thresholds: PL-DC, instance level; classifier: PL-DC, category level,
    or None; embeddings: S4M, SAM's view of the training images, or None; calibration:
    what was measured on the validation images, and val_embeddings: SAM's view of those;
    alignment: of the class shares, or None.
    """

    teacher: model.MaskRCNN
    thresholds: filters.Thresholds
    classifier: correction.CategoryClassifier | None
    embeddings: Embeddings | None
    calibration: Calibration
    val_embeddings: Embeddings | None
    alignment: Alignment | None


def build(
    config: Config,
    train_set,
    rank: int,
    world_size: int,
    device: torch.device,
    val_set=None,
    detections: int = 100,
    annotated: torch.Tensor | None = None,
) -> tuple:
    """New student, `Labeler`, structure or None, optimizer, schedule and scaler.

    `annotated`: (C,) instances of each class, for the alignment; None: all alike.
    """
    names = train_set.names
    # The same seed on all processes: the same first weights.
    torch.manual_seed(config.seed)
    kind, *rest = model_of(config)
    net = networks.build(kind, len(names) + 1, *rest).to(device).train()
    networks.set_detections(net, detections)
    student, teacher = distributed.wrap(net, device), make_teacher(net)
    thresholds = filters.Thresholds(
        len(names),
        (config.tau_min, config.tau_max),
        (config.tau_mask_min, config.tau_mask_max),
        config.threshold_decay,
    ).to(device)
    classifier = make_classifier(
        config.correction, names, net.backbone.out_channels, config.prototypes,
        config.clip_model, config.descriptions, device,
        (config.backbone, config.backbone_weights),
    )  # fmt: skip
    alignment = None
    if config.align:
        counts = torch.zeros(len(names)) if annotated is None else annotated
        alignment = Alignment(counts).to(device)
    # S4M asks SAM about training images; the calibration about validation images too.
    embeddings = val_embeddings = structure = None
    if config.uses_sam:
        segmenter = sam.SegmentAnything(config.sam, config.sam_checkpoint, device)
        limits = (
            config.sam_cache,
            config.sam_cache_gb,
            config.sam_memory_gb,
            world_size,
        )
        embeddings = Embeddings(segmenter, train_set, *limits)
        if rank == 0 and (line := embeddings.shortage()):
            print(f"warning: {line}", file=sys.stderr)
        if config.filter == "calibrated":
            val_embeddings = Embeddings(segmenter, val_set, *limits)
    if config.structure_weight:
        structure = sam_distill.Structure(
            embeddings, config.structure_queries, config.structure_boundary, config.seed
        )
    # From here on each process draws its own numbers: they sample anchors and
    # proposals. It comes after all that draws weights: with and without a category
    # classifier, training draws the same.
    torch.manual_seed(config.seed * 1000 + 1 + rank)
    optim = optimizer.make(
        net, config.lr, config.backbone_lr_factor, config.weight_decay
    )
    pretrain_end, _, total = config.stage_ends
    shape = (pretrain_end, total, config.warmup_steps, config.lr_schedule)
    shape += (config.decay_at, config.decay_again_at, config.lr_restart)
    shape += (config.burnin_init == "fresh", config.lr_after)
    schedule = LambdaLR(optim, lambda step: optimizer.lr_factor(step, *shape))
    # fp16 loses gradients under 6e-8; the scaler lifts them by a factor that it finds.
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    # Until something is measured, the gate is the setting's, and the trust PL-DC's.
    measured = Calibration(config.refine_gate)
    labeler = Labeler(
        teacher,
        thresholds,
        classifier,
        embeddings,
        measured,
        val_embeddings,
        alignment,
    )
    return student, labeler, structure, optim, schedule, scaler


def make_classifier(
    kind: str,
    names: list[str],
    channels: int,
    size: int,
    clip_model: str,
    descriptions: str,
    device,
    encoder: tuple[str, str] = ("", "none"),
) -> correction.CategoryClassifier | None:
    """The category classifier of a kind, or None.

    Args:
        kind: "none", "prototypes", "imagenet" or "clip".
        names: class names.
        channels: D, of the feature pyramid.
        size: K, instances remembered of each class.
        clip_model, descriptions: of `clip.Clip`.
        device: where it is to be.
        encoder: name and weights of a timm network, for "imagenet".

    Raises:
        ValueError: another kind.
    """
    if kind == "none":
        return None
    if kind == "prototypes":
        return Prototypes(len(names), channels, size).to(device)
    if kind == "imagenet":
        return ClassMeans(*timm_backbone.load(*encoder), len(names), device)
    if kind == "clip":
        return Clip(clip_model, names, descriptions, device)
    raise ValueError(
        f"no category classifier {kind!r}: none, prototypes, imagenet or clip"
    )


def model_of(config: Config) -> tuple:
    """What says which model: kind, sizes, weights, what of them learns, backbone."""
    sides = (config.short_side, config.long_side)
    weights = (config.backbone_weights, config.trained_stages, config.backbone)
    return config.model, *sides, *weights
