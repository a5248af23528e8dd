r"""Named sets of settings: what a method switches on, and each dataset's schedule.

Plain dicts over the fields of `config.Config`, whose defaults are the preset `shapes`.

Sources: GD = Guided Distillation (arXiv 2308.02668), S4M (arXiv 2504.05301), PL-DC
(arXiv 2505.11075).

Chain: 24 of 24. Read next: back to `train.py`.
"""

# The parts that a method switches on or off. Guided Distillation has none of them; what
# the built-in data add to `arp` is below (PASTED).
PLAIN = dict(
    filter="score",
    correction="none",
    uncertainty=False,
    structure_weight=0.0,
    structure_boundary=0.0,
    refine="none",
    refine_calibrate=False,
    arp="none",
)
# PL-DC: its three levels. S4M, as published: distillation, refinement by the candidate
# of the highest predicted IoU without a gate, copy-paste. Each has a switch of its own.
PL_DC = dict(filter="adaptive", correction="prototypes", uncertainty=True)
S4M = dict(structure_weight=1.0, refine="iou", refine_gate=0.0, arp="unlabeled")
# This project's parts, in neither paper: thresholds, gate and trust that are measured,
# instance-level matching of SAM's candidates with the teacher's mask, a gate,
# calibration by their agreement, boundary-aware distillation.
OWN = dict(
    filter="calibrated",
    refine="agreement",
    refine_gate=0.5,
    refine_calibrate=True,
    structure_boundary=0.5,
)

# `supervised` is pretraining for all the steps, `full` both papers in one loop, and
# this project's parts.
METHODS = {
    "supervised": PLAIN,
    "guided-distillation": PLAIN,
    "pl-dc": {**PLAIN, **PL_DC},
    "s4m": {**PLAIN, **S4M},
    "full": {**PLAIN, **PL_DC, **S4M, **OWN},
}

# ResNet-50 on photographs: what all three real presets share.
REAL = dict(
    model="resnet50",
    backbone_weights="imagenet",
    workers=4,
    amp="bf16",
    # A recipe for Mask R-CNN, not Mask2Former's: published Mask R-CNNs with AdamW have
    # the backbone at the full rate, its stem and first stage frozen, and no clipping,
    # or MMDetection's limit of 35 (docs/differences.md names them). Mask2Former's own
    # limit of 0.01 is far below the gradient norms of a Mask R-CNN, and would scale
    # the gradients of every step down.
    lr=1e-4,
    weight_decay=0.05,
    backbone_lr_factor=1.0,
    trained_stages=3,
    clip_norm=35.0,
    warmup_steps=1000,
    # Guided Distillation's and S4M's: the student starts afresh, labeled images have
    # the weak view, are drawn by repeat factors, and are among the unlabeled ones.
    burnin_init="fresh",
    ema_decay=0.9996,
    unsup_weight=2.0,
    labeled_view="weak",
    repeat_threshold=10.0,
    unlabeled_includes_labeled=True,
    # "No object" at a tenth, also in images without pseudo-labels: all of Mask2Former.
    no_object_labeled=0.1,
    no_object_unlabeled=0.1,
    empty_images="background",
    # SAM, where the method asks it: the largest, as S4M; 128 query points.
    sam="vit_h",
    structure_queries=128,
    # PL-DC's, where its filter is switched on alone; its class threshold is below.
    tau_mask=0.9,
    threshold_decay=0.9996,
    labeled_batch=16,
    unlabeled_batch=16,
    eval_every=5000,
    audit_images=500,
    checkpoint_every=1000,
)

# Photographs on a CPU: a light backbone with ImageNet weights, whose norms are frozen.
PHOTOS = dict(
    data="",
    labeled="annotated",
    model="timm",
    backbone_weights="imagenet",
    backbone_lr_factor=0.2,
    short_side_min=128,
    short_side=160,
    long_side=240,
    pretrain_steps=500,
    burnin_steps=50,
    mutual_steps=400,
    lr_after=0.6,
    sam="vit_b",
    eval_every=100,
)

# COCO's views: large-scale jitter, and crops of 1024 pixels. Evaluation has a short
# side of 800. The learning rate falls to a tenth at about step 327,800 and again at
# about 355,100 of 368,750 (327,778 and 355,092 in the paper's code).
LSJ = dict(
    short_side=800,
    long_side=1333,
    crop_height=1024,
    crop_width=1024,
    scale_min=0.1,
    scale_max=2.0,
    lr_schedule="step",
    decay_at=0.889,
    decay_again_at=0.963,
)

# Cityscapes' schedule: 90k iterations for the first teacher and as many after it,
# burn-in 50k in GD.
STEPS_90K = dict(pretrain_steps=90_000, burnin_steps=50_000, mutual_steps=40_000)

PRESETS = {
    # The defaults of `config.Config`: 10 minutes on two CPU cores.
    "shapes": {},
    # The second built-in dataset, on which no setting was chosen: those of the shapes.
    "signs": dict(data="data/signs", short_side_min=84, short_side=112),
    # Your own data: the small model and the short schedule, until you choose otherwise.
    "custom": dict(
        data="",
        labeled="10%",
        short_side_min=192,
        short_side=256,
        long_side=448,
        sam="vit_b",
    ),
    # A few dozen labeled photographs, two CPU cores, half an hour.
    "photos": PHOTOS,
    # GD, section 4: 368,750 iterations for the first teacher and as many after it,
    # burn-in 50k.
    "coco": dict(
        REAL,
        **LSJ,
        data="data/coco",
        labeled="1%",
        pretrain_steps=368_750,
        burnin_steps=50_000,
        mutual_steps=318_750,
        # Of 5,000 images: at most 4 % of a run, also on eight GPUs (docs/reproduce.md).
        eval_every=20_000,
    ),
    # Crops of 512 x 1024 of images whose short side is 512 to 2048, which is 1 to 4
    # times what fits into the crop, with distorted colors.
    "cityscapes": dict(
        REAL,
        **STEPS_90K,
        data="data/cityscapes",
        labeled="5%",
        short_side=1024,
        long_side=2048,
        crop_height=512,
        crop_width=1024,
        scale_min=1.0,
        scale_max=4.0,
        weak_color=True,
        lr_schedule="poly",
    ),
    # No paper of the three reports VOC; Cityscapes' number of steps, COCO's views.
    "voc": dict(REAL, **STEPS_90K, **LSJ, data="data/voc", labeled="10%"),
}


# PL-DC's filter on real data, as in its code's configurations: fixed thresholds.
PL_DC_FILTER = dict(filter="dual", tau_class=0.85)
# PL-DC's procedure: 20k supervised steps on both views of the labeled images, then
# teacher := student, and the student goes on. Nothing of the backbone learns. The
# learning rate falls once, to a tenth.
PL_DC_REAL = dict(
    PL_DC_FILTER,
    pretrain_steps=20_000,
    burnin_steps=0,
    burnin_init="teacher",
    labeled_view="both",
    strong_erasing=True,
    trained_stages=0,
    weight_decay=1e-4,
    unsup_weight=1.0,
    repeat_threshold=0.0,
    unlabeled_includes_labeled=False,
    empty_images="skip",
    labeled_batch=8,
    unlabeled_batch=8,
    lr_restart=False,
    lr_schedule="step",
    decay_again_at=1.0,
)
# Its milestones are [145000, 250000] for 1 % of COCO, [327778, 355092] for more, and
# [160000, 173333] for Cityscapes. The scheduler takes the last one for the length of
# the schedule, not for a second fall, so that the only fall is at these fractions of
# the run.
PL_DC_COCO = dict(PL_DC_REAL, mutual_steps=348_750, decay_at=0.58)
PL_DC_90K = dict(PL_DC_REAL, mutual_steps=160_000, decay_at=0.923)

# S4M's: its batches, a shorter burn-in, its code's points; on COCO each pasted instance
# at 0.8 to 1.2 of its size and at a random place. (3,000 pixels of a crop of 512 x 1024
# are a larger part of it.)
S4M_COCO = dict(
    pretrain_batch=16,
    labeled_batch=12,
    unlabeled_batch=12,
    burnin_steps=25_000,
    mutual_steps=343_750,
    refine_sampling="code",
    arp_jitter=0.2,
)
S4M_90K = dict(
    pretrain_batch=4,
    burnin_steps=15_000,
    mutual_steps=75_000,
    refine_sampling="code",
    arp_min_area=0.00572,
)

# `full` on real data: S4M's three stages and batches, with PL-DC's filter. As in PL-DC,
# an image without pseudo-labels is left out.
FULL = dict(PL_DC_FILTER, empty_images="skip")

# Smaller steps, and half of the weight, for what the teacher may have wrong.
PHOTOS_CAREFUL = dict(tau_class=0.9, lr_after=0.3, unsup_weight=0.5)
# What is pasted covers what was there, where one animal fills a photograph.
PHOTOS_CALIBRATED = dict(
    filter="calibrated", correction="imagenet", align=True, arp="none"
)

# On the built-in data all methods also paste labeled instances: supervised training
# gains 7 to 9 AP by it, which must not look like a gain of the unlabeled images. On the
# photographs and blood cells of docs/results.md it does harm, on nuclei nothing.
DRAWN = ("shapes", "signs")
PASTED = {"none": "labeled", "unlabeled": "both"}

# What `--preset photos` switches off where SAM's weights are not given.
WITHOUT_SAM = dict(structure_weight=0.0, refine="none", refine_calibrate=False)

# What belongs to a preset and a method together.
OF_BOTH = {
    ("photos", "guided-distillation"): PHOTOS_CAREFUL,
    ("photos", "pl-dc"): PHOTOS_CALIBRATED,
    ("photos", "s4m"): PHOTOS_CAREFUL,
    ("photos", "full"): PHOTOS_CALIBRATED,
    ("coco", "pl-dc"): PL_DC_COCO,
    ("cityscapes", "pl-dc"): PL_DC_90K,
    ("voc", "pl-dc"): PL_DC_90K,
    ("coco", "s4m"): S4M_COCO,
    ("cityscapes", "s4m"): S4M_90K,
    ("voc", "s4m"): dict(S4M_90K, arp_min_area=0.00286),
    ("coco", "full"): dict(S4M_COCO, **FULL),
    ("cityscapes", "full"): dict(S4M_90K, **FULL),
    ("voc", "full"): dict(S4M_90K, **FULL, arp_min_area=0.00286),
}


def switches(preset: str, method: str, model: str) -> dict:
    """What a method sets, with this preset and this model; {} for an unknown method."""
    settings = {**METHODS.get(method, {}), **OF_BOTH.get((preset, method), {})}
    if preset in DRAWN and method in METHODS:
        settings["arp"] = PASTED[settings["arp"]]
    if model != "timm" and settings.get("correction") == "imagenet":
        settings["correction"] = "prototypes"
    if method == "full" and model != "resnet50":
        # Its stride-4 map also feeds the classifier, and with SAM's class-free layout
        # the first teacher is no better, or worse (docs/differences.md). `s4m` has it,
        # as the paper does.
        settings["structure_weight"] = 0.0
    return settings
