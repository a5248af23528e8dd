r"""Every setting once: a dataclass with a reason per field; the command line.

There is one `Config`. Its fields are the command line (`--tau-class 0.7` sets
`tau_class`), its defaults are the preset `shapes`, and the other presets are the same
fields with other values. The order of precedence: a flag, then the preset, then the
default. A method sets the switches of its own parts (`METHODS`), which come between
preset and flag, so that `--method pl-dc --correction none` is PL-DC without that level.
Nothing else steers a training run.

Sources: GD = Guided Distillation (arXiv 2308.02668), S4M (arXiv 2504.05301), PL-DC
(arXiv 2505.11075).

Read next: `train.py`, which uses every field.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

from ssis import UserError, sam
from ssis.io.files import write_text
from ssis.presets import METHODS, PRESETS, switches

# Fields that may differ between a run and its resumption: they say where and how fast,
# never what is computed.
NOT_IN_RESULT = (
    "output",
    "resume",
    "pretrained",
    "workers",
    "checkpoint_every",
    "device",
    "tensorboard",
    # Its weights count, not where they lie: see `resume.restore`.
    "sam_checkpoint",
    "sam_cache",
    "sam_cache_gb",
    "sam_memory_gb",
)
# Fields that pretraining does not depend on. Runs that differ in these alone have the
# same first teacher, bit for bit, and can share one (`--pretrained`).
# fmt: off
AFTER_PRETRAINING = (
    *NOT_IN_RESULT, "method", "burnin_steps", "mutual_steps", "unlabeled_batch",
    "ema_decay", "filter", "tau_class", "tau_mask", "tau_min", "tau_max",
    "threshold_decay", "min_area", "correction", "clip_model", "descriptions",
    "prototypes", "uncertainty", "refine", "refine_points", "refine_sampling",
    "refine_gate", "refine_calibrate", "arp", "arp_min_area", "arp_jitter",
    "oracle", "unsup_weight", "unlabeled_includes_labeled", "eval_every",
    "audit_images",
)
# fmt: on
# And these, where nothing is distilled from SAM.
OF_STRUCTURE = (
    "sam",
    "structure_queries",
    "structure_channels",
    "structure_boundary",
)
# Switches of the methods' parts.
# fmt: off
LEVELS = (
    "filter", "correction", "uncertainty", "structure_weight", "refine",
    "refine_sampling", "refine_gate", "refine_calibrate", "arp", "oracle",
)
# fmt: on


def setting(default, reason: str, choices: tuple[str, ...] = ()):
    """A dataclass field with the sentence that says why it exists (shown by --help)."""
    metadata = {"reason": reason, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Config:
    """All settings, with their reasons. Sizes in pixels, steps in optimizer steps."""

    # fmt: off
    # What is trained, and where it goes.
    preset: str = setting(
        "shapes",
        "a named set of defaults: a built-in dataset, or a paper's schedule",
        ("shapes", "signs", "custom", "coco", "cityscapes", "voc"),
    )
    method: str = setting(
        "full", f"what is compared: {', '.join(METHODS)}"
    )
    seed: int = setting(0, "every random choice follows from it, the split included")
    output: str = setting(
        "", "the run's folder; empty: runs/<preset>-<method>-<labeled>-s<seed>"
    )
    resume: str = setting(
        "auto",
        "auto goes on where the run in the folder stopped; never starts it anew",
        ("auto", "never"),
    )
    pretrained: str = setting(
        "",
        "pretrained.pt of a run that differs only in what comes after pretraining: "
        "skips it, with the same result",
    )

    # Data.
    data: str = setting(
        "data/shapes", "folder of the preset's dataset; shapes is drawn there"
    )
    train_json: str = setting("", "COCO-format annotations of the training images")
    train_images: str = setting("", "folder of the training images")
    val_json: str = setting(
        "", "annotations used for the curves, and to choose settings on"
    )
    val_images: str = setting("", "folder of the validation images")
    test_json: str = setting(
        "", "annotations for the final table; empty: the validation ones"
    )
    test_images: str = setting("", "folder of the test images")
    unlabeled_images: str = setting(
        "", "a bare folder of further images without annotations"
    )
    labeled: str = setting(
        "5%",
        "labeled part of train_json: a share (5%%), a number (64), or a split's JSON",
    )
    unlabeled_includes_labeled: bool = setting(
        False,
        "GD also uses the labeled images as unlabeled ones; leaving them out keeps "
        "the audit honest",
    )
    workers: int = setting(
        0, "loader processes; 0 is fastest for tiny images, try 4 for real ones"
    )

    # Model.
    model: str = setting(
        "small",
        "small learns from scratch on a CPU; resnet50 is torchvision's, for real data",
        ("small", "resnet50"),
    )
    backbone_weights: str = setting(
        "none",
        "where resnet50 starts: none, imagenet, coco, or the PATH of a state dict",
    )
    short_side_min: int = setting(
        96, "smallest short side that a training image is resized to"
    )
    short_side: int = setting(
        96, "largest short side in training, and the one in evaluation"
    )
    long_side: int = setting(160, "limit of the long side, which bounds the memory")

    # Schedule. Step counts are optimizer steps, all in one run.
    pretrain_steps: int = setting(700, "labeled images only; makes the first teacher")
    burnin_steps: int = setting(
        100, "teacher frozen, student learns from its pseudo-labels (GD)"
    )
    mutual_steps: int = setting(
        400, "teacher := EMA of the student, in every step (GD)"
    )
    burnin_init: str = setting(
        "teacher",
        "the student's first weights: the teacher's (quick), or fresh (as GD)",
        ("teacher", "fresh"),
    )
    labeled_batch: int = setting(
        8, "labeled images per step, over all processes together"
    )
    unlabeled_batch: int = setting(
        8, "unlabeled images per step, over all processes together"
    )

    # Optimizer.
    lr: float = setting(
        1e-3, "AdamW step size; from scratch 1e-3, from pretrained weights 1e-4"
    )
    backbone_lr_factor: float = setting(
        1.0, "pretrained features need smaller steps: GD has 0.1"
    )
    weight_decay: float = setting(0.05, "AdamW's, as in GD; not on biases and norms")
    clip_norm: float = setting(
        1.0, "limit of the gradient norm; GD has 0.01 (Mask2Former's)"
    )
    warmup_steps: int = setting(
        50, "linear warm-up: AdamW's second moments are noise at first"
    )

    decay_at: float = setting(
        0.7, "share of pretraining, and of what follows it, after which lr falls to 0"
    )

    # Teacher and pseudo-labels.
    ema_decay: float = setting(
        0.99, "GD 0.9996 for 100k steps and more; short runs need less"
    )
    filter: str = setting(
        "score",
        "what keeps a pseudo-label: class score (GD), score times mask quality, both "
        "apart, or both with a threshold for each class (PL-DC)",
        ("score", "coupled", "dual", "adaptive"),
    )
    tau_class: float = setting(
        0.7,
        "class quality asked for (GD 0.7, PL-DC 0.85); of coupled, the product; "
        "adaptive has its own",
    )
    tau_mask: float = setting(0.8, "mask quality asked for by dual (PL-DC 0.9)")
    tau_min: float = setting(0.5, "lowest adaptive threshold (PL-DC: not published)")
    tau_max: float = setting(0.9, "highest adaptive threshold (PL-DC: not published)")
    threshold_decay: float = setting(
        0.99, "how slowly adaptive thresholds follow (PL-DC 0.9996)"
    )
    min_area: int = setting(5, "a pseudo-label needs more mask pixels than this (GD 5)")
    correction: str = setting(
        "none",
        "second opinion on the class of a pseudo-label (PL-DC): prototypes of the "
        "labeled instances, or CLIP (needs open_clip_torch)",
        ("none", "prototypes", "clip"),
    )
    prototypes: int = setting(64, "labeled instances remembered of each class")
    clip_model: str = setting(
        "convnext_large_d_320:laion2b_s29b_b131k_ft_soup",
        "open_clip's architecture:weights; the weights may be a PATH (PL-DC: this one)",
    )
    descriptions: str = setting(
        "", "JSON for clip: class name -> list of prompts; empty: a photo of a <name>"
    )
    uncertainty: bool = setting(
        False, "weight pseudo-labeled mask pixels by the teacher's certainty (PL-DC)"
    )
    oracle: str = setting(
        "none",
        "headroom, not a method: the truth replaces class, mask or both of the "
        "pseudo-labels",
        ("none", "class", "mask", "both"),
    )
    unsup_weight: float = setting(
        1.0, "weight of the pseudo-labeled loss (GD 2, PL-DC 1)"
    )

    # S4M's three parts, and SAM, which two of them ask.
    structure_weight: float = setting(
        0.0, "weight of structural distillation from SAM while pretraining (S4M 1)"
    )
    structure_queries: int = setting(64, "query points of a labeled image (S4M 128)")
    structure_channels: float = setting(
        1.0, "share of the feature map's channels that is compared (S4M 1)"
    )
    structure_boundary: float = setting(
        0.0, "share of those on the objects that is drawn from the band at their edges"
    )
    refine: str = setting(
        "none",
        "SAM redraws the masks of pseudo-labels (S4M); of its candidates the one of "
        "which it expects most (paper), or which agrees best with the teacher's mask",
        ("none", "iou", "agreement"),
    )
    refine_points: int = setting(3, "points that each mask is prompted with (S4M 3)")
    refine_sampling: str = setting(
        "paper",
        "chance of a point: the mask's probability inside it, or a softmax over the "
        "logits of the whole map (S4M's released code)",
        ("paper", "code"),
    )
    refine_gate: float = setting(
        0.5,
        "IoU with the teacher's mask under which SAM's is not taken; 0: always (S4M)",
    )
    refine_calibrate: bool = setting(
        False, "weight the mask loss by mask quality times agreement of the two masks"
    )
    arp: str = setting(
        "none",
        "paste instances between images (S4M): of pseudo-labeled ones, or of both",
        ("none", "unlabeled", "both"),
    )
    arp_min_area: float = setting(
        0.00286, "smallest mask pasted, share of the image (S4M: 3000 of 1024 x 1024)"
    )
    arp_jitter: float = setting(0.0, "scale of what is pasted: 1 plus or minus")
    sam: str = setting(
        "tiny",
        "tiny, for drawn shapes, comes along; the others, for photographs, are Meta's",
        ("tiny", "vit_b", "vit_l", "vit_h"),
    )
    sam_checkpoint: str = setting("", "PATH of SAM's weights; empty: tiny's own")
    sam_cache: str = setting("", "folder that keeps SAM's embeddings, for all runs")
    sam_cache_gb: float = setting(50.0, "limit of that folder; COCO would need 250")
    sam_memory_gb: float = setting(
        2.0, "embeddings kept in memory by all processes; official SAM: 2 MB each"
    )

    # Machine.
    device: str = setting(
        "auto", "auto takes a GPU where there is one", ("auto", "cpu", "cuda")
    )
    amp: str = setting(
        "off",
        "mixed precision: bf16 where the GPU has it, fp16 (scaled losses) elsewhere",
        ("off", "bf16", "fp16"),
    )
    deterministic: bool = setting(
        False,
        "refuse GPU operations whose result varies from call to call (a CPU has none)",
    )

    # Bookkeeping.
    # 400: the second one, and its picture of the pseudo-labels, is at the end of the
    # default run's burn-in, where PL-DC's correction counts most.
    eval_every: int = setting(400, "steps between evaluations on the validation images")
    audit_images: int = setting(
        96, "unlabeled images on which each evaluation audits the teacher"
    )
    checkpoint_every: int = setting(100, "steps lost at most when the machine dies")
    tensorboard: bool = setting(
        False, "write event files too (needs tensorboard), into the run's folder"
    )

    # fmt: on

    @property
    def stage_ends(self) -> tuple[int, int, int]:
        """Steps at which pretraining, burn-in and mutual learning end.

        Supervised training is pretraining for the same number of steps in all, so that
        methods are compared at equal numbers of updates.
        """
        pretrain, burnin, mutual = (
            self.pretrain_steps,
            self.burnin_steps,
            self.mutual_steps,
        )
        total = pretrain + burnin + mutual
        if self.method == "supervised":
            return total, total, total
        return pretrain, pretrain + burnin, total

    @property
    def uses_sam(self) -> bool:
        """Whether anything asks SAM."""
        return self.structure_weight > 0 or self.refine != "none"

    @property
    def run_folder(self) -> Path:
        """`output`, or a name that says what the run is."""
        if self.output:
            return Path(self.output)
        share = Path(self.labeled).name.replace("%", "pct").replace(".json", "")
        # A level switched otherwise than the method has it is part of the name, and so
        # is an oracle: its result must not be taken for a method's.
        usual = {name: getattr(Config, name) for name in LEVELS}
        own = switches(self.preset, self.method, self.model)
        usual |= {name: value for name, value in own.items() if name in LEVELS}
        names = [self.preset, self.method]
        for name, value in usual.items():
            now = getattr(self, name)
            if now != value:
                label = name.replace("_", "-")
                names.append(f"{label}-{now}" if now else f"no-{label}")
        return Path("runs") / "-".join([*names, share, f"s{self.seed}"])

    def check(self) -> None:
        """Raise UserError for values that no run could use."""
        if self.method not in METHODS:
            raise UserError(
                f"--method {self.method}: not there; there is {', '.join(METHODS)}"
            )
        self.check_numbers()
        self.check_combinations()

    def check_numbers(self) -> None:
        """Each number on its own."""
        for names, right, words in RANGES:
            for name in names.split():
                value = getattr(self, name)
                if not right(value):
                    raise UserError(f"{flag(name)} {value}: must be {words}")

    def check_combinations(self) -> None:
        """Settings that contradict each other, or ask for what is not there."""
        if self.stage_ends[-1] < 1:
            raise UserError(
                "--pretrain-steps, --burnin-steps, --mutual-steps: all are 0"
            )
        if not self.short_side_min <= self.short_side <= self.long_side:
            raise UserError(
                "--short-side-min <= --short-side <= --long-side does not hold"
            )
        if self.tau_min > self.tau_max:
            raise UserError("--tau-min <= --tau-max does not hold")
        if self.descriptions and self.correction != "clip":
            raise UserError(
                f"--descriptions {self.descriptions}: are for --correction clip alone"
            )
        if self.refine_calibrate and self.refine == "none":
            raise UserError(
                "--refine-calibrate: needs SAM's masks; add --refine agreement"
            )
        if self.tensorboard and not importlib.util.find_spec("tensorboard"):
            raise UserError(
                "--tensorboard: needs a further package; pip install tensorboard, or "
                "leave the flag out (metrics.jsonl has the same numbers)"
            )
        if self.uses_sam:
            # Now, not after all images have been checked.
            sam.find(self.sam, self.sam_checkpoint)
        elif self.sam_checkpoint:
            raise UserError(
                f"--sam-checkpoint {self.sam_checkpoint}: nothing uses SAM; give "
                "--method s4m or full, or leave it out"
            )
        if self.pretrained and self.method == "supervised":
            raise UserError(
                f"--pretrained {self.pretrained}: --method supervised is pretraining "
                "alone, with a schedule of its own; leave the flag out"
            )
        # A run that is going on has its own checkpoint: the file may be gone by then.
        # With `--resume never` it is begun anew; the old run must not be lost first.
        saved = any(self.run_folder.glob("checkpoint*.pt"))
        begun = saved and self.resume == "auto"
        if self.pretrained and not begun and not Path(self.pretrained).is_file():
            raise UserError(
                f"--pretrained {self.pretrained}: no such file; give the pretrained.pt "
                "in the folder of a run with the same pretraining"
            )
        if self.backbone_weights != "none" and self.model == "small":
            raise UserError(
                f"--backbone-weights {self.backbone_weights}: the small model has "
                "none; add --model resnet50"
            )


# Fields, what their values must fulfil, and that in words. A comparison with NaN is
# false, so that NaN is refused everywhere.
RANGES = (
    (
        "labeled_batch unlabeled_batch prototypes structure_queries refine_points "
        "eval_every checkpoint_every short_side_min short_side long_side",
        lambda value: value >= 1,
        "at least 1",
    ),
    (
        "pretrain_steps burnin_steps mutual_steps seed workers min_area warmup_steps "
        "audit_images weight_decay unsup_weight structure_weight sam_cache_gb "
        "sam_memory_gb",
        lambda value: value >= 0,
        ">= 0",
    ),
    (
        "ema_decay threshold_decay tau_class tau_mask tau_min tau_max "
        "structure_boundary structure_channels refine_gate arp_min_area",
        lambda value: 0 <= value <= 1,
        "from 0 to 1",
    ),
    ("decay_at arp_jitter", lambda value: 0 <= value < 1, "from 0 to below 1"),
    ("lr clip_norm", lambda value: 0 < value < float("inf"), "> 0 and finite"),
)


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are one line here, not the list of all flags."""

    def error(self, message: str):
        wrong = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
        known = [flag(field.name) for field in dataclasses.fields(Config)]
        near = difflib.get_close_matches(wrong[0], known, 1) if wrong else []
        advice = f"did you mean {near[0]}?" if near else "see --help"
        raise UserError(f"{message}; {advice}")


def parse(argv: list[str] | None = None) -> Config:
    """The command line into a checked `Config`; `--help` lists every field.

    Raises:
        UserError: a value that no run could use.
    """
    parser = Parser(
        prog="train.py",
        description="Semi-supervised instance segmentation. Without arguments: S4M and "
        "PL-DC together on the built-in dataset, 5%% labeled, in about 10 minutes on "
        "two cores.",
        formatter_class=argparse.RawTextHelpFormatter,
        # A flag that is not given must not hide the preset's value.
        argument_default=argparse.SUPPRESS,
        # `--label` for `--labeled` would change its meaning when a field is added.
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Config):
        kind = type(field.default)
        text = f"{field.metadata['reason']} [{str(field.default).replace('%', '%%')}]"
        if kind is bool:
            parser.add_argument(
                flag(field.name), action=argparse.BooleanOptionalAction, help=text
            )
        else:
            parser.add_argument(
                flag(field.name),
                type=kind,
                help=text,
                metavar=kind.__name__,
                choices=field.metadata["choices"] or None,
            )
    given = vars(parser.parse_args(argv))
    preset, method = given.get("preset", "shapes"), given.get("method", Config.method)
    model = given.get("model", PRESETS[preset].get("model", Config.model))
    own = switches(preset, method, model)
    config = Config(**{**PRESETS[preset], **own, **given})
    config.check()
    return config


def after_pretraining(config: Config) -> tuple[str, ...]:
    """Fields that the first teacher of a run with these settings does not depend on."""
    if config.structure_weight > 0:
        return AFTER_PRETRAINING
    return AFTER_PRETRAINING + OF_STRUCTURE


def save(config: Config, path: Path) -> None:
    """Write `config.json`, whole or not at all."""
    write_text(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def differences(
    config: Config, saved: dict, ignored: tuple[str, ...] = NOT_IN_RESULT
) -> list[str]:
    """Fields that change the result and differ from a run's saved config, in words."""
    now = dataclasses.asdict(config)
    # A field that came after the saved config was written: its default switches it off.
    saved = {**dataclasses.asdict(Config()), **saved}
    return [
        f"{flag(name)} was {saved[name]}, is {value}"
        for name, value in now.items()
        if name not in ignored and saved[name] != value
    ]
