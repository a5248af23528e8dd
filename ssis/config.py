r"""Every setting once: a dataclass with a reason per field; the command line.

There is one `Config`. Its fields are the command line (`--tau-class 0.7` sets
`tau_class`), its defaults are the default run, that of a bare `python train.py`. The
order of precedence: a flag, then what preset and method set (`ssis/presets.py`), then
the default. So `--method pl-dc --correction none` is PL-DC without that level.
Nothing else steers a training run.

What is known of a field stands with it: its reason, its choices or range, and

    scope    what depends on it: the whole run; only what comes after pretraining
             (LATER); pretraining too, but only with S4M's distillation (STRUCTURE);
             no result at all, for it says where and how fast (PLACE)
    part     it switches a part of a method, and belongs in the run's name
    absent   the value to assume for a config.json that was written before the field was
             there; when you change a default, put the old one here

Sources: GD = Guided Distillation (arXiv 2308.02668), S4M (arXiv 2504.05301), PL-DC
(arXiv 2505.11075).

Chain: 23 of 24. Read next: `ssis/presets.py`, the settings of papers and datasets.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

from ssis import UserError, filters, sam
from ssis.augment import ViewSize
from ssis.io.files import write_text
from ssis.presets import METHODS, OF_BOTH, PRESETS, WITHOUT_SAM, switches

# See the module's text.
ALWAYS, LATER, STRUCTURE, PLACE = "always", "later", "structure", "place"
# A range in words -> whether a value is in it.
VALID = {
    "at least 1": lambda value: value >= 1,
    ">= 0": lambda value: value >= 0,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "from 0 to below 1": lambda value: 0 <= value < 1,
    "from 0 to 5": lambda value: 0 <= value <= 5,
    "> 0 and finite": lambda value: 0 < value < float("inf"),
}
# Fields that are gone, with the value that the present code stands for.
GONE = {"structure_channels": 1.0, "ignore_uncertain": False}
# `absent` where a field's default is what an older record without it stands for.
SAME = object()


def setting(
    default,
    reason: str,
    choices: tuple[str, ...] = (),
    group: str = "",
    valid: str = "",
    scope: str = ALWAYS,
    part: bool = False,
    absent=SAME,
):
    """A dataclass field with all that is known of it.

    Args:
        default: of the default run.
        reason: the sentence that says why it exists, shown by --help.
        choices: the values it may have; empty: any.
        group: title of the section of --help that begins with it.
        valid: its range, a key of `VALID`.
        scope, part, absent: see the module's text.
    """
    metadata = dict(
        reason=reason,
        choices=choices,
        group=group,
        valid=valid,
        scope=scope,
        part=part,
        absent=default if absent is SAME else absent,
    )
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Config:
    """All settings, with their reasons. Sizes in pixels, steps in optimizer steps."""

    preset: str = setting(
        "shapes",
        "a named set of defaults: a built-in dataset, or a paper's schedule",
        choices=tuple(PRESETS),
        group="What is trained, and where it goes",
    )
    method: str = setting(
        "full", "which parts are switched on", choices=tuple(METHODS), scope=LATER
    )
    seed: int = setting(
        0, "every random choice follows from it, the split included", valid=">= 0"
    )
    output: str = setting(
        "",
        "the run's folder; empty: runs/<preset>-<method>-<labeled>-s<seed>",
        scope=PLACE,
    )
    resume: str = setting(
        "auto",
        "auto goes on where the run in the folder stopped; never starts it anew",
        choices=("auto", "never"),
        scope=PLACE,
    )
    pretrained: str = setting(
        "",
        "pretrained.pt of a run whose settings differ only after pretraining; "
        "pretraining is then skipped, and the result is the same",
        scope=PLACE,
    )
    data: str = setting(
        "data/shapes",
        "folder of the preset's dataset; shapes is drawn there",
        group="Data",
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
        "labeled part of train_json: a fraction (5%), a number (64), annotated (all "
        "that have an annotation), or a split's JSON",
    )
    unlabeled_includes_labeled: bool = setting(
        False,
        "GD also uses the labeled images as unlabeled ones; leaving them out keeps "
        "the audit honest",
        scope=LATER,
    )
    repeat_threshold: float = setting(
        0.0,
        "repeat-factor sampling of labeled images after pretraining: an image is drawn "
        "in proportion to the largest max(1, sqrt(threshold / f)) of its classes, with "
        "f the fraction of images that have the class (GD, S4M 10); 0: all alike",
        valid=">= 0",
        scope=LATER,
    )
    workers: int = setting(
        0,
        "loader processes; 0 is fastest for tiny images, try 4 for real ones",
        valid=">= 0",
        scope=PLACE,
    )
    model: str = setting(
        "small",
        "small learns from scratch on a CPU; timm has the small one's heads on a light "
        "pretrained backbone; resnet50 is torchvision's, for real data on a GPU",
        choices=("small", "timm", "resnet50"),
        group="Model",
    )
    backbone: str = setting(
        "tf_efficientnet_lite0", "timm's name of its backbone (needs timm)"
    )
    backbone_weights: str = setting(
        "none",
        "where timm or resnet50 starts: none, imagenet, coco (resnet50), or the PATH "
        "of a state dict",
    )
    trained_stages: int = setting(
        3,
        "stages of a pretrained backbone that learn, from the top; 0: none (PL-DC)",
        valid="from 0 to 5",
    )
    max_detections: int = setting(
        0,
        "most instances per image, in pseudo-labels, predictions and AP; 0: COCO's "
        "100, or more if a labeled image has more",
        valid=">= 0",
    )
    short_side_min: int = setting(
        72,
        "smallest short side that a training image is resized to (scale jitter)",
        valid="at least 1",
    )
    short_side: int = setting(
        96,
        "largest short side in training, and the one in evaluation",
        valid="at least 1",
    )
    long_side: int = setting(
        160, "limit of the long side, which bounds the memory", valid="at least 1"
    )
    crop_height: int = setting(
        0,
        "training views are random crops of this size, of images resized to scale_min "
        "to scale_max times what fits into it (large-scale jitter); 0: no crops",
        group="Views of training images, beside the sides above",
        valid=">= 0",
    )
    crop_width: int = setting(0, "width of the crops", valid=">= 0")
    scale_min: float = setting(
        1.0, "smallest scale before a crop (COCO 0.1)", valid="> 0 and finite"
    )
    scale_max: float = setting(
        1.0, "largest scale before a crop (COCO 2)", valid="> 0 and finite"
    )
    weak_color: bool = setting(
        False, "distort the colors of every view, the teacher's too (Cityscapes)"
    )
    flip: bool = setting(
        True,
        "mirror views left to right, one in two; not where left and right are classes",
    )
    strong_erasing: bool = setting(
        False, "erase up to three boxes of a strong view (PL-DC)"
    )
    labeled_view: str = setting(
        "strong",
        "view of a labeled image that is trained on: weak (GD, S4M), strong, or both "
        "(PL-DC)",
        choices=("weak", "strong", "both"),
    )
    pretrain_steps: int = setting(
        700,
        "labeled images only; makes the first teacher",
        group="Schedule (optimizer steps, all in one run)",
        valid=">= 0",
    )
    burnin_steps: int = setting(
        100,
        "teacher frozen, student learns from its pseudo-labels (GD)",
        valid=">= 0",
        scope=LATER,
    )
    mutual_steps: int = setting(
        400,
        "teacher := EMA of the student, in every step (GD)",
        valid=">= 0",
        scope=LATER,
    )
    burnin_init: str = setting(
        "teacher",
        "the student's first weights: the teacher's (quick), or fresh (as GD)",
        choices=("teacher", "fresh"),
    )
    pretrain_batch: int = setting(
        0,
        "labeled images per step of pretraining (S4M: 16, then 12); 0: labeled_batch",
        valid=">= 0",
    )
    labeled_batch: int = setting(
        8, "labeled images per step, over all processes together", valid="at least 1"
    )
    unlabeled_batch: int = setting(
        8,
        "unlabeled images per step, over all processes together",
        valid="at least 1",
        scope=LATER,
    )
    lr: float = setting(
        0.001,
        "AdamW step size; from scratch 1e-3, from pretrained weights 1e-4",
        group="Optimizer",
        valid="> 0 and finite",
    )
    backbone_lr_factor: float = setting(
        1.0,
        "the backbone's step size against the others' (GD 0.1; Mask R-CNNs 1)",
        valid=">= 0",
    )
    weight_decay: float = setting(
        0.05, "AdamW's, as in GD; not on biases and norms", valid=">= 0"
    )
    clip_norm: float = setting(
        1.0,
        "limit of the gradient norm; the papers have 0.01, which is Mask2Former's",
        valid="> 0 and finite",
    )
    warmup_steps: int = setting(
        50, "linear warm-up: AdamW's second moments are noise at first", valid=">= 0"
    )
    lr_schedule: str = setting(
        "linear",
        "how lr falls: linear to 0 from decay_at on, step to a tenth at decay_at and "
        "again at decay_again_at, or poly from the start (Cityscapes)",
        choices=("linear", "step", "poly"),
    )
    decay_at: float = setting(
        0.7,
        "fraction of a part of the run after which lr falls",
        valid="from 0 to below 1",
    )
    decay_again_at: float = setting(
        1.0, "with step: fraction after which lr falls again", valid="from 0 to 1"
    )
    lr_restart: bool = setting(
        True,
        "pretraining and what follows are two parts, each with its own fall of lr "
        "(GD); without: the run is one (PL-DC)",
    )
    lr_after: float = setting(
        1.0,
        "lr after pretraining, as a factor: a student that goes on from pretrained "
        "weights needs smaller steps (this project's)",
        valid="> 0 and finite",
        scope=LATER,
    )
    ema_decay: float = setting(
        0.99,
        "GD 0.9996 for 100k steps and more; short runs need less",
        group="Teacher and pseudo-labels",
        valid="from 0 to 1",
        scope=LATER,
    )
    filter: str = setting(
        "calibrated",
        "what keeps a pseudo-label. score: class score (GD); coupled: class score "
        "times mask quality; dual: a threshold for each of the two (PL-DC); adaptive: "
        "thresholds of each class (PL-DC); three-way: as adaptive, but the correction "
        "decides between T_min and the threshold (this project's reading); "
        "calibrated: thresholds of foreground and mask, SAM's gate and the weight of "
        "the correction are measured on the validation images (this project's)",
        choices=("score", "coupled", "dual", "adaptive", "three-way", "calibrated"),
        scope=LATER,
        part=True,
        absent="score",
    )
    tau_class: float = setting(
        0.7,
        "required class quality (GD 0.7, PL-DC 0.85); with coupled, the required "
        "product; adaptive has thresholds of its own",
        valid="from 0 to 1",
        scope=LATER,
    )
    tau_mask: float = setting(
        0.8,
        "mask quality that dual requires (PL-DC 0.9)",
        valid="from 0 to 1",
        scope=LATER,
    )
    tau_min: float = setting(
        0.5,
        "lowest adaptive threshold of the class quality (PL-DC's code: 0.85)",
        valid="from 0 to 1",
        scope=LATER,
    )
    tau_max: float = setting(
        0.9,
        "highest adaptive threshold of the class quality (PL-DC's code: 0.85)",
        valid="from 0 to 1",
        scope=LATER,
    )
    tau_mask_min: float = setting(
        0.5,
        "lowest of the mask quality, which is above 0.5 (PL-DC's code: 0.9)",
        valid="from 0 to 1",
        scope=LATER,
    )
    tau_mask_max: float = setting(
        0.9,
        "highest of the mask quality (PL-DC's code: 0.9)",
        valid="from 0 to 1",
        scope=LATER,
    )
    threshold_decay: float = setting(
        0.99,
        "how slowly adaptive thresholds follow (PL-DC 0.9996)",
        valid="from 0 to 1",
        scope=LATER,
    )
    min_area: int = setting(
        5,
        "a pseudo-label needs more mask pixels than this (PL-DC 5; GD and S4M: a mass "
        "of 5 at stride 4)",
        valid=">= 0",
        scope=LATER,
    )
    correction: str = setting(
        "prototypes",
        "category classifier that corrects the class of a pseudo-label (PL-DC): "
        "prototypes of the labeled instances, class means of ImageNet features (this "
        "project's; with --model timm), or CLIP (needs open_clip_torch)",
        choices=("none", "prototypes", "imagenet", "clip"),
        scope=LATER,
        part=True,
        absent="none",
    )
    prototypes: int = setting(
        64,
        "labeled instances remembered of each class",
        valid="at least 1",
        scope=LATER,
    )
    clip_model: str = setting(
        "convnext_large_d_320:laion2b_s29b_b131k_ft_soup",
        "open_clip's architecture:weights; the weights may be a PATH (PL-DC: this one)",
        scope=LATER,
    )
    descriptions: str = setting(
        "",
        "JSON for clip: class name -> list of prompts; empty: a photo of a <name>",
        scope=LATER,
    )
    align: bool = setting(
        False,
        "pull the class shares of the pseudo-labels to those of the annotated images "
        "(this project's)",
        scope=LATER,
        part=True,
        absent=False,
    )
    uncertainty: bool = setting(
        True,
        "weight pseudo-labeled mask pixels by the teacher's certainty (PL-DC)",
        scope=LATER,
        part=True,
        absent=False,
    )
    oracle: str = setting(
        "none",
        "headroom, not a method: the ground truth replaces class, mask or both of the "
        "pseudo-labels",
        choices=("none", "class", "mask", "both"),
        scope=LATER,
        part=True,
    )
    unsup_weight: float = setting(
        1.0,
        "weight of the pseudo-labeled loss (GD 2, PL-DC 1)",
        valid=">= 0",
        scope=LATER,
    )
    no_object_labeled: float = setting(
        1.0,
        "weight of background anchors and proposals of labeled images in the two "
        "classification losses (all three papers 0.1)",
        valid="from 0 to 1",
    )
    no_object_unlabeled: float = setting(
        1.0,
        "the same for unlabeled images, whose background may be a missed object",
        valid="from 0 to 1",
        scope=LATER,
    )
    empty_images: str = setting(
        "skip",
        "unlabeled images without any pseudo-label: skip them, or train them "
        "as background (GD, S4M; PL-DC skips where a whole GPU has none)",
        choices=("skip", "background"),
        scope=LATER,
    )
    structure_weight: float = setting(
        0.0,
        "weight of structural distillation from SAM while pretraining (S4M 1)",
        group="S4M's parts, and SAM, which two of them ask",
        valid=">= 0",
        part=True,
    )
    structure_queries: int = setting(
        64,
        "query points of a labeled image (S4M 128)",
        valid="at least 1",
        scope=STRUCTURE,
    )
    structure_boundary: float = setting(
        0.5,
        "fraction of those on the objects that is drawn from the band at their edges "
        "(this project's; S4M 0)",
        valid="from 0 to 1",
        scope=STRUCTURE,
        absent=0.0,
    )
    refine: str = setting(
        "agreement",
        "SAM redraws the masks of pseudo-labels (S4M). iou: its candidate with the "
        "highest predicted IoU (S4M); agreement: the one that agrees best with the "
        "teacher's mask (this project's)",
        choices=("none", "iou", "agreement"),
        scope=LATER,
        part=True,
        absent="none",
    )
    refine_points: int = setting(
        3,
        "points that each mask is prompted with (S4M 3)",
        valid="at least 1",
        scope=LATER,
    )
    refine_sampling: str = setting(
        "paper",
        "probability of a point: the mask's probability inside it, or a softmax over "
        "the logits of the whole map (S4M's released code)",
        choices=("paper", "code"),
        scope=LATER,
        part=True,
    )
    refine_gate: float = setting(
        0.5,
        "SAM's mask is taken if its IoU with the teacher's is at least this (this "
        "project's); 0: always (S4M); --filter calibrated measures it instead",
        valid="from 0 to 1",
        scope=LATER,
        part=True,
    )
    refine_calibrate: bool = setting(
        True,
        "weight the mask loss by mask quality times agreement of the two masks (this "
        "project's)",
        scope=LATER,
        part=True,
        absent=False,
    )
    arp: str = setting(
        "both",
        "paste instances between images: pseudo-labeled ones (S4M), labeled ones "
        "(only after pretraining, if S4M's distillation is on; on the built-in data by "
        "every method), or both",
        choices=("none", "unlabeled", "labeled", "both"),
        scope=LATER,
        part=True,
        absent="none",
    )
    arp_min_area: float = setting(
        0.00286,
        "smallest mask pasted, fraction of the image (S4M: 3000 of 1024 x 1024)",
        valid="from 0 to 1",
        scope=LATER,
    )
    arp_jitter: float = setting(
        0.0,
        "each pasted instance at a random place, its scale 1 plus or minus this (S4M "
        "on COCO 0.2); 0: at its own place and scale",
        valid="from 0 to below 1",
        scope=LATER,
    )
    sam: str = setting(
        "tiny",
        "tiny, for drawn shapes, comes along; the others, for photographs, are Meta's",
        choices=("tiny", "vit_b", "vit_l", "vit_h"),
        scope=STRUCTURE,
    )
    sam_checkpoint: str = setting(
        "", "PATH of SAM's weights; empty: tiny's own", scope=PLACE
    )
    sam_cache: str = setting(
        "", "folder that keeps SAM's embeddings, for all runs", scope=PLACE
    )
    sam_cache_gb: float = setting(
        50.0, "limit of that folder; COCO would need 250", valid=">= 0", scope=PLACE
    )
    sam_memory_gb: float = setting(
        2.0,
        "embeddings kept in memory by all processes; official SAM: 2 MB each "
        "(calibrated: up to 200 validation images' beside them)",
        valid=">= 0",
        scope=PLACE,
    )
    device: str = setting(
        "auto",
        "auto takes a GPU where there is one; Apple's (mps) is refused: this code has "
        "never run on one",
        choices=("auto", "cpu", "cuda", "mps"),
        group="Machine",
        scope=PLACE,
    )
    amp: str = setting(
        "off",
        "mixed precision: bf16 where the GPU has it, fp16 (scaled losses) elsewhere",
        choices=("off", "bf16", "fp16"),
    )
    deterministic: bool = setting(
        False,
        "refuse GPU operations whose result varies from call to call (a CPU has none)",
    )
    # 400: the second one, and its picture of the pseudo-labels, is at the end of the
    # default run's burn-in, where PL-DC's correction counts most.
    eval_every: int = setting(
        400,
        "steps between evaluations on the validation images",
        group="Bookkeeping",
        valid="at least 1",
        scope=LATER,
    )
    audit_images: int = setting(
        96,
        "unlabeled images on which each evaluation audits the teacher",
        valid=">= 0",
        scope=LATER,
    )
    checkpoint_every: int = setting(
        100, "steps lost at most when the machine dies", valid="at least 1", scope=PLACE
    )
    tensorboard: bool = setting(
        False,
        "write event files too (needs tensorboard), into the run's folder",
        scope=PLACE,
    )

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
    def lowest_score(self) -> float:
        """Class score under which a prediction is of no use to the training."""
        if self.filter == "calibrated":
            return filters.LOWEST
        return self.tau_min if self.filter in filters.ADAPTIVE else self.tau_class

    @property
    def idle_thresholds(self) -> list[str]:
        """Flags of thresholds and gate that were given, where these are measured."""
        if self.filter != "calibrated":
            return []
        names = ["tau_class", "tau_mask", "tau_min", "tau_max", "tau_mask_min"]
        names += ["tau_mask_max", "threshold_decay", "refine_gate"]
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        usual |= PRESETS[self.preset] | switches(self.preset, self.method, self.model)
        return [flag(name) for name in names if getattr(self, name) != usual[name]]

    @property
    def pastes_labeled(self) -> bool:
        """Whether instances are pasted between labeled images."""
        return self.arp in ("labeled", "both")

    @property
    def without_sam(self) -> bool:
        """Whether parts of the method are left out because SAM's weights are."""
        return (
            self.preset == "photos"
            and self.method in ("s4m", "full")
            and self.refine == "none"
            and not self.sam_checkpoint
        )

    def pasting(self, seed: int) -> dict:
        """How `copy_paste.arp` pastes: its keyword arguments."""
        size = dict(min_area=self.arp_min_area, jitter=self.arp_jitter)
        return dict(size, seed=seed, crop=(self.crop_height, self.crop_width))

    @property
    def view_size(self) -> ViewSize:
        """The limits of a training view's sides."""
        return ViewSize(
            self.short_side_min,
            self.short_side,
            self.long_side,
            (self.crop_height, self.crop_width),
            (self.scale_min, self.scale_max),
            self.weak_color,
            self.flip,
        )

    @property
    def run_folder(self) -> Path:
        """`output`, or a name that says what the run is."""
        if self.output:
            return Path(self.output)
        share = Path(self.labeled).name.replace("%", "pct").replace(".json", "")
        # A part switched otherwise than the method has it is in the name, and so is an
        # oracle, which comes last: its result must not be taken for a method's.
        usual = {
            f.name: f.default for f in dataclasses.fields(self) if f.metadata["part"]
        }
        usual["oracle"] = usual.pop("oracle")
        own = switches(self.preset, self.method, self.model)
        usual |= {name: value for name, value in own.items() if name in usual}
        names = [self.preset, self.method]
        for name, value in usual.items():
            now = getattr(self, name)
            if now != value:
                label = name.replace("_", "-")
                names.append(f"{label}-{now}" if now else f"no-{label}")
        return Path("runs") / "-".join([*names, share, f"s{self.seed}"])

    def check(self) -> None:
        """Raise UserError for values that no run could use; choices are argparse's."""
        self.check_numbers()
        self.check_ranges()
        self.check_combinations()

    def check_numbers(self) -> None:
        """Each number on its own."""
        for field in dataclasses.fields(self):
            words, value = field.metadata["valid"], getattr(self, field.name)
            # A comparison with NaN is false, so that NaN is refused everywhere.
            if words and not VALID[words](value):
                raise UserError(f"{flag(field.name)} {value}: must be {words}")

    def check_ranges(self) -> None:
        """Ends of ranges the wrong way round; half of a crop."""
        if not self.short_side_min <= self.short_side <= self.long_side:
            raise UserError(
                "--short-side-min <= --short-side <= --long-side does not hold"
            )
        for low, high in (
            ("tau_min", "tau_max"),
            ("tau_mask_min", "tau_mask_max"),
            ("scale_min", "scale_max"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise UserError(f"{flag(low)} <= {flag(high)} does not hold")
        if bool(self.crop_height) != bool(self.crop_width):
            raise UserError("--crop-height and --crop-width: give both, or none")
        if not self.crop_height and (self.scale_min, self.scale_max) != (1.0, 1.0):
            raise UserError(
                "--scale-min, --scale-max: scale a view before it is cropped; give "
                "--crop-height and --crop-width too"
            )

    def check_combinations(self) -> None:
        """Settings that contradict each other, or ask for what is not there."""
        if self.stage_ends[-1] < 1:
            raise UserError(
                "--pretrain-steps, --burnin-steps, --mutual-steps: all are 0"
            )
        if self.filter == "three-way" and self.correction == "none":
            raise UserError(
                "--filter three-way: the correction decides on what is in between; add "
                "--correction prototypes, or take --filter adaptive"
            )
        semi = self.method != "supervised"
        if semi and self.burnin_init == "fresh" and not self.burnin_steps:
            raise UserError(
                "--burnin-steps 0 --burnin-init fresh: the teacher would become a copy "
                "of an untrained student; give burn-in steps, or --burnin-init teacher"
            )
        if self.labeled == "annotated" and self.oracle != "none":
            raise UserError(
                f"--labeled annotated --oracle {self.oracle}: the other images have no "
                "ground truth; give --labeled a fraction of annotated images"
            )
        if self.descriptions and self.correction != "clip":
            raise UserError(
                f"--descriptions {self.descriptions}: are for --correction clip alone"
            )
        if self.correction == "imagenet" and (
            self.model != "timm" or self.backbone_weights == "none"
        ):
            raise UserError(
                "--correction imagenet: asks the pretrained backbone; give --model "
                "timm and --backbone-weights imagenet or a PATH, or take "
                "--correction prototypes"
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
                "none; give --backbone-weights none, or --model timm or resnet50"
            )
        if self.backbone != Config.backbone and self.model != "timm":
            raise UserError(
                f"--backbone {self.backbone}: add --model timm, which has it"
            )
        if self.backbone_weights == "coco" and self.model == "timm":
            raise UserError(
                "--backbone-weights coco: is a whole resnet50; give imagenet, or add "
                "--model resnet50"
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
    given = vars(make_parser().parse_args(argv))
    preset, method = (
        given.get("preset", Config.preset),
        given.get("method", Config.method),
    )
    model = given.get("model", PRESETS[preset].get("model", Config.model))
    own = switches(preset, method, model)
    asked = given.get("refine", "none") != "none"
    if (
        preset == "photos"
        and not asked
        and not {"sam", "sam_checkpoint"} & given.keys()
    ):
        # Meta's weights are not there for everyone: without them, without SAM's parts.
        own |= WITHOUT_SAM
    config = Config(**{**PRESETS[preset], **own, **given})
    if config.refine == "none" and "refine_calibrate" not in given:
        # Nothing to calibrate: `--method full --refine none` need not say so.
        config.refine_calibrate = False
    config.check()
    return config


def make_parser() -> Parser:
    """The parser: a flag for each field, in groups, with its reason and its default."""
    parser = Parser(
        prog="train.py",
        usage="%(prog)s [--flag VALUE ...]",
        description="Semi-supervised instance segmentation. Without arguments: S4M and "
        "PL-DC together on the built-in dataset, 5% labeled, in about 10 minutes on "
        "two cores. In brackets: what a run without arguments uses, and whether "
        "--method or --preset can set it to something else.",
        # A flag that is not given must not hide the preset's value.
        argument_default=argparse.SUPPRESS,
        # `--label` for `--labeled` would change its meaning when a field is added.
        allow_abbrev=False,
    )
    sets = {
        "--method": {
            name for own in (METHODS, OF_BOTH) for d in own.values() for name in d
        },
        "--preset": {
            name for d in (*PRESETS.values(), *OF_BOTH.values()) for name in d
        },
    }
    group = parser
    for field in dataclasses.fields(Config):
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        by = [name for name, fields in sets.items() if field.name in fields]
        value = "none" if field.default == "" else str(field.default)
        note = f"{value}; set by {' and '.join(by)}" if by else value
        text = f"{field.metadata['reason']} [{note}]".replace("%", "%%")
        kind, choices = type(field.default), field.metadata["choices"]
        if kind is bool:
            group.add_argument(
                flag(field.name), action=argparse.BooleanOptionalAction, help=text
            )
        elif choices:
            group.add_argument(flag(field.name), choices=choices, help=text)
        else:
            word = "TEXT" if kind is str else "NUMBER"
            group.add_argument(flag(field.name), type=kind, help=text, metavar=word)
    return parser


def not_in_result() -> set[str]:
    """Fields that may differ between a run and its resumption."""
    return {f.name for f in dataclasses.fields(Config) if f.metadata["scope"] == PLACE}


def after_pretraining(config: Config) -> set[str]:
    """Fields that the first teacher of a run with these settings does not depend on.

    Runs that differ in these alone have the same first teacher, bit for bit, and can
    share one (`--pretrained`).
    """
    scopes = (
        {PLACE, LATER} if config.structure_weight > 0 else {PLACE, LATER, STRUCTURE}
    )
    names = {
        f.name for f in dataclasses.fields(Config) if f.metadata["scope"] in scopes
    }
    # In a run of one part the learning rate of pretraining depends on the steps in all.
    return names if config.lr_restart else names - {"burnin_steps", "mutual_steps"}


def save(config: Config, path: Path) -> None:
    """Write `config.json`, whole or not at all."""
    write_text(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def completed(saved: dict) -> dict:
    """A stored record with every field there is or was, as it meant them."""
    absent = {f.name: f.metadata["absent"] for f in dataclasses.fields(Config)}
    # Until the mask quality got a range of its own, it had that of the class quality.
    for end in ("min", "max"):
        absent[f"tau_mask_{end}"] = saved.get(f"tau_{end}", absent[f"tau_{end}"])
    return GONE | absent | saved


def from_saved(saved: dict) -> Config:
    """The `Config` of a stored record, also of an older one."""
    known = {field.name for field in dataclasses.fields(Config)}
    return Config(**{k: v for k, v in completed(saved).items() if k in known})


def differences(
    config: Config, saved: dict, ignored: set[str] | None = None
) -> list[str]:
    """Fields in which a run's stored record differs from these settings, in words.

    Args:
        config: the settings now.
        saved: the record.
        ignored: fields that may differ; None: those that change no result.
    """
    ignored = not_in_result() if ignored is None else ignored
    now, before = completed(dataclasses.asdict(config)), completed(saved)
    # Of `arp` a first teacher depends on this alone; where it pastes, also on how.
    pasted = {
        r["arp"] in ("labeled", "both") and not r["structure_weight"]
        for r in (now, before)
    }
    if len(pasted) > 1:
        ignored = ignored - {"arp"}
    elif True in pasted:
        ignored = ignored - {"arp_jitter", "arp_min_area"}
    return [
        f"{flag(name)} was {before[name]}, is {value}"
        for name, value in now.items()
        if name not in ignored and before[name] != value
    ]
