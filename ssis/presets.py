r"""Named sets of settings: what a method switches on, and each dataset's schedule.

Plain dicts over the fields of `config.Config`, whose defaults are the preset `shapes`.

Sources: GD = Guided Distillation (arXiv 2308.02668), S4M (arXiv 2504.05301), PL-DC
(arXiv 2505.11075).

Chain: 16 of 16. Read next: back to `train.py`.
"""

# The parts that a method switches on or off. Guided Distillation has none of them.
PLAIN = dict(
    filter="score",
    correction="none",
    uncertainty=False,
    structure_weight=0.0,
    refine="none",
    arp="none",
)
# PL-DC: its three levels; S4M: its three parts. Each has a switch of its own.
PL_DC = dict(filter="adaptive", correction="prototypes", uncertainty=True)
S4M = dict(structure_weight=1.0, refine="agreement", arp="unlabeled")

# `supervised` is pretraining for all the steps, `full` both papers in one loop.
METHODS = {
    "supervised": PLAIN,
    "guided-distillation": PLAIN,
    "pl-dc": {**PLAIN, **PL_DC},
    "s4m": {**PLAIN, **S4M},
    "full": {**PLAIN, **PL_DC, **S4M},
}

# ResNet-50 on photographs: what all three real presets share. The view sizes are
# torchvision's (short side 640 to 800), the optimizer GD's.
REAL = dict(
    model="resnet50",
    backbone_weights="imagenet",
    workers=4,
    amp="bf16",
    short_side_min=640,
    short_side=800,
    long_side=1333,
    lr=1e-4,
    backbone_lr_factor=0.1,
    clip_norm=0.01,
    warmup_steps=1000,
    ema_decay=0.9996,
    unsup_weight=2.0,
    # SAM, where the method asks it: the largest, as S4M; 128 query points.
    sam="vit_h",
    structure_queries=128,
    # PL-DC's, where its filter is switched on alone; its class threshold is below.
    tau_mask=0.9,
    threshold_decay=0.9996,
    burnin_init="fresh",
    labeled_batch=16,
    unlabeled_batch=16,
    eval_every=5000,
    audit_images=500,
    checkpoint_every=1000,
)

# Cityscapes' schedule: GD's 90k iterations after pretraining, burn-in 50k.
STEPS_90K = dict(pretrain_steps=20_000, burnin_steps=50_000, mutual_steps=40_000)

PRESETS = {
    # The defaults of `config.Config`: 10 minutes on two CPU cores.
    "shapes": {},
    # The second built-in dataset, on which nothing was ever chosen: the same settings.
    "signs": dict(data="data/signs", short_side_min=112, short_side=112),
    # Your own data: the small model and the short schedule, until you choose otherwise.
    "custom": dict(
        data="",
        labeled="10%",
        short_side_min=192,
        short_side=256,
        long_side=448,
        sam="vit_b",
    ),
    # GD, section 4: 368,750 iterations after pretraining, burn-in 50k.
    "coco": dict(
        REAL,
        data="data/coco",
        labeled="1%",
        pretrain_steps=60_000,
        burnin_steps=50_000,
        mutual_steps=318_750,
    ),
    "cityscapes": dict(
        REAL,
        **STEPS_90K,
        data="data/cityscapes",
        labeled="5%",
        short_side_min=800,
        short_side=1024,
        long_side=2048,
    ),
    # No paper of the three reports VOC; Cityscapes' schedule, COCO's image sizes.
    "voc": dict(REAL, **STEPS_90K, data="data/voc", labeled="10%"),
}


# PL-DC's own numbers on real data, where they differ from GD's. Its published
# thresholds are those of the dual filter; the range of the adaptive ones is not.
PL_DC_REAL = dict(
    filter="dual",
    tau_class=0.85,
    unsup_weight=1.0,
    burnin_steps=20_000,
    labeled_batch=8,
    unlabeled_batch=8,
)

# S4M's: a shorter burn-in; pasted instances at 0.8 to 1.2 of their size on COCO.
S4M_COCO = dict(burnin_steps=25_000, arp_jitter=0.2)
S4M_90K = dict(burnin_steps=15_000, mutual_steps=75_000)

# What belongs to a preset and a method together. The numbers of steps are GD's, so that
# methods are compared at equal numbers of updates; the batches are each paper's own.
# `full` has the filter, the thresholds and the batches of PL-DC.
OF_BOTH = {
    ("coco", "pl-dc"): dict(PL_DC_REAL, mutual_steps=348_750),
    ("cityscapes", "pl-dc"): dict(PL_DC_REAL, mutual_steps=70_000),
    ("voc", "pl-dc"): dict(PL_DC_REAL, mutual_steps=70_000),
    ("coco", "s4m"): dict(S4M_COCO, mutual_steps=343_750),
    ("cityscapes", "s4m"): S4M_90K,
    ("voc", "s4m"): S4M_90K,
    ("coco", "full"): dict(PL_DC_REAL, arp_jitter=0.2, mutual_steps=348_750),
    ("cityscapes", "full"): dict(PL_DC_REAL, mutual_steps=70_000),
    ("voc", "full"): dict(PL_DC_REAL, mutual_steps=70_000),
}


def switches(preset: str, method: str, model: str) -> dict:
    """What a method sets, with this preset and this model; {} for an unknown method."""
    settings = {**METHODS.get(method, {}), **OF_BOTH.get((preset, method), {})}
    if (method, model) == ("full", "small"):
        # Its stride-4 map also feeds the classifier, and with SAM's class-free layout
        # the first teacher is no better, or worse (docs/differences.md). `s4m` has it,
        # as the paper does.
        settings["structure_weight"] = 0.0
    return settings
