"""Settings: true defaults, what old records mean, and what a first teacher depends on."""

import dataclasses
import json

import pytest
from conftest import ROOT

from ssis import UserError, config
from ssis.tools import study

pytestmark = pytest.mark.fast


def test_the_defaults_are_those_of_a_bare_call():
    """And no method is described by what it leaves out: each sets every part's switch."""
    assert config.parse([]) == config.Config()
    parts = {f.name for f in dataclasses.fields(config.Config) if f.metadata["part"]}
    for method, own in config.METHODS.items():
        assert set(own) - {"structure_boundary"} <= parts, method
        assert set(own) >= set(config.METHODS["guided-distillation"]), method
        given = ["--method", method, "--model", "resnet50", "--sam", "tiny"]
        made = config.parse(["--preset", "custom", *given])
        assert {name: getattr(made, name) for name in own} == own
        # On the built-in data each pastes labeled images too, and is else the same.
        drawn = config.parse(given)
        pasted = dict(own, arp="both" if own["arp"] == "unlabeled" else "labeled")
        assert {name: getattr(drawn, name) for name in own} == pasted


def test_help_says_what_a_bare_call_uses(capsys, monkeypatch):
    """Every field with its reason, choices and default, and what sets it to something else."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        config.parse(["--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(config.Config):
        assert config.flag(field.name) in said and field.metadata["reason"] in said, field.name
    for words in (
        "--filter {score,coupled,dual,adaptive,three-way,calibrated}",
        "[calibrated; set by --method and --preset]",
        "--method {supervised,guided-distillation,pl-dc,s4m,full}",
        "[0.99; set by --preset]",
        "a fraction (5%)",
        "5% labeled",
        "Teacher and pseudo-labels:",
    ):
        assert words in said, words
    assert "%%" not in said


# Every number of the three papers' presets, as their released configurations have it, but for
# what suits Mask R-CNN (`recipe`); the design of each is in docs/papers.md.
RECIPE = dict(
    model="resnet50", backbone_weights="imagenet", amp="bf16", lr=1e-4,
    backbone_lr_factor=1.0, clip_norm=35.0, warmup_steps=1000,
)  # fmt: skip
COCO_VIEWS = dict(
    crop_height=1024, crop_width=1024, scale_min=0.1, scale_max=2.0, weak_color=False,
    short_side=800, long_side=1333,
)  # fmt: skip
CITYSCAPES_VIEWS = dict(
    crop_height=512, crop_width=1024, scale_min=1.0, scale_max=4.0, weak_color=True,
    short_side=1024, long_side=2048,
)  # fmt: skip
# Guided Distillation's, and S4M's, which stands on it.
GD = RECIPE | dict(
    filter="score", tau_class=0.7, min_area=5, correction="none", uncertainty=False,
    unsup_weight=2.0, ema_decay=0.9996, burnin_init="fresh", trained_stages=3,
    weight_decay=0.05, labeled_view="weak", strong_erasing=False, repeat_threshold=10.0,
    unlabeled_includes_labeled=True, no_object_labeled=0.1, no_object_unlabeled=0.1,
    empty_images="background", lr_restart=True,
)  # fmt: skip
GD_COCO = GD | COCO_VIEWS | dict(
    pretrain_steps=368_750, burnin_steps=50_000, mutual_steps=318_750, pretrain_batch=0,
    labeled_batch=16, unlabeled_batch=16, lr_schedule="step", decay_at=0.889,
    decay_again_at=0.963,
)  # fmt: skip
GD_CITYSCAPES = GD | CITYSCAPES_VIEWS | dict(
    pretrain_steps=90_000, burnin_steps=50_000, mutual_steps=40_000, pretrain_batch=0,
    labeled_batch=16, unlabeled_batch=16, lr_schedule="poly",
)  # fmt: skip
NO_SAM = dict(structure_weight=0.0, refine="none", arp="none")
S4M = dict(
    structure_weight=1.0, structure_queries=128, structure_boundary=0.0, refine="iou",
    refine_points=3, refine_sampling="code", refine_gate=0.0, refine_calibrate=False,
    arp="unlabeled",
)  # fmt: skip
S4M_COCO = dict(
    pretrain_batch=16, labeled_batch=12, unlabeled_batch=12, burnin_steps=25_000,
    mutual_steps=343_750, arp_jitter=0.2, arp_min_area=0.00286,
)  # fmt: skip
S4M_CITYSCAPES = dict(
    pretrain_batch=4, labeled_batch=16, unlabeled_batch=16, burnin_steps=15_000,
    mutual_steps=75_000, arp_jitter=0.0, arp_min_area=0.00572,
)  # fmt: skip
FILTER = dict(filter="dual", tau_class=0.85, tau_mask=0.9)
PL_DC = RECIPE | NO_SAM | FILTER | dict(
    min_area=5, correction="prototypes", uncertainty=True, unsup_weight=1.0, ema_decay=0.9996,
    threshold_decay=0.9996, pretrain_steps=20_000, burnin_steps=0, burnin_init="teacher",
    trained_stages=0, weight_decay=1e-4, labeled_view="both", strong_erasing=True,
    repeat_threshold=0.0, unlabeled_includes_labeled=False, no_object_labeled=0.1,
    no_object_unlabeled=0.1, empty_images="skip", labeled_batch=8, unlabeled_batch=8,
    pretrain_batch=0, lr_schedule="step", decay_again_at=1.0, lr_restart=False,
)  # fmt: skip
OWN = dict(
    refine="agreement", refine_gate=0.5, refine_calibrate=True, structure_boundary=0.5,
    correction="prototypes", uncertainty=True, empty_images="skip",
)  # fmt: skip
PAPERS = {
    ("coco", "guided-distillation"): GD_COCO | NO_SAM,
    ("cityscapes", "guided-distillation"): GD_CITYSCAPES | NO_SAM,
    ("coco", "s4m"): GD_COCO | S4M | S4M_COCO,
    ("cityscapes", "s4m"): GD_CITYSCAPES | S4M | S4M_CITYSCAPES,
    ("coco", "pl-dc"): PL_DC | COCO_VIEWS | dict(mutual_steps=348_750, decay_at=0.58),
    ("cityscapes", "pl-dc"): PL_DC | CITYSCAPES_VIEWS | dict(mutual_steps=160_000, decay_at=0.923),
    # Both together: S4M's stages, PL-DC's filter, this project's parts.
    ("coco", "full"): GD_COCO | S4M | S4M_COCO | FILTER | OWN,
    ("cityscapes", "full"): GD_CITYSCAPES | S4M | S4M_CITYSCAPES | FILTER | OWN,
}


@pytest.mark.parametrize("preset, method", PAPERS)
def test_every_number_of_a_papers_preset(preset, method):
    made = config.parse(["--preset", preset, "--method", method, "--sam", "tiny"])
    for name, value in PAPERS[preset, method].items():
        found = getattr(made, name)
        wanted = pytest.approx(value, abs=1e-5) if isinstance(value, float) else value
        assert found == wanted, (name, found, value)
    # And nothing that a preset sets is left out here.
    own = config.PRESETS[preset] | config.switches(preset, method, "resnet50")
    unnamed = set(own) - set(PAPERS[preset, method])
    assert unnamed <= {
        "data", "labeled", "workers", "sam", "short_side_min", "eval_every", "audit_images",
        "checkpoint_every", "structure_boundary", "structure_queries", "refine_calibrate",
        "refine_sampling", "refine_gate", "tau_mask", "threshold_decay",
        "decay_at", "decay_again_at",
    }  # fmt: skip


def test_presets_are_valid_and_a_flag_beats_them():
    for name in config.PRESETS:
        for method in config.METHODS:
            config.parse(["--preset", name, "--method", method, "--sam", "tiny"])
    coco = ["--preset", "coco", "--method", "guided-distillation"]
    assert config.parse([*coco, "--lr", "1"]).lr == 1.0 and config.parse(coco).lr == 1e-4


def test_a_run_is_named_by_what_differs_from_its_method():
    """Runs that were begun by an older version are found again under these names."""
    oracle = "--method guided-distillation --oracle class --arp both"
    for flags, name in (
        ("", "shapes-full-5pct-s0"),
        (oracle, "shapes-guided-distillation-arp-both-oracle-class-5pct-s0"),
        ("--method pl-dc --no-uncertainty", "shapes-pl-dc-no-uncertainty-5pct-s0"),
        ("--method s4m --structure-weight 0", "shapes-s4m-no-structure-weight-5pct-s0"),
        ("--structure-weight 1", "shapes-full-structure-weight-1.0-5pct-s0"),
        ("--preset coco --method pl-dc --filter adaptive", "coco-pl-dc-filter-adaptive-1pct-s0"),
    ):
        assert str(config.parse(flags.split()).run_folder) == f"runs/{name}"


def test_a_first_teacher_without_sam_serves_methods_with_it():
    """What SAM is and where it lies does not matter to a pretraining that never asks it."""
    plain = config.METHODS["guided-distillation"]
    saved = dataclasses.asdict(config.Config(method="guided-distillation", labeled="8", **plain))
    there = dict(sam="vit_b", sam_checkpoint="there.pth", structure_boundary=0.0)
    there["arp"] = "unlabeled"
    later = config.Config(method="full", labeled="8", **there)
    assert config.differences(later, saved, config.after_pretraining(later)) == []
    distilled = dataclasses.replace(later, structure_weight=1.0)
    assert config.differences(distilled, saved, config.after_pretraining(distilled)) == [
        "--structure-weight was 0.0, is 1.0",
        "--sam was tiny, is vit_b",
    ]
    # A config of before those fields were there.
    del saved["refine"], saved["sam"]
    assert config.differences(later, saved, config.after_pretraining(later)) == []


def test_a_first_teacher_of_a_run_in_one_part_depends_on_the_steps_in_all():
    """Without a restart the learning rate of pretraining is that of the whole run."""
    one_part = config.parse(["--preset", "coco", "--method", "pl-dc"])
    assert not {"mutual_steps", "burnin_steps"} & config.after_pretraining(one_part)
    assert {"mutual_steps", "burnin_steps"} <= config.after_pretraining(config.Config())


def test_thresholds_that_are_not_used_are_named():
    """The default measures its own; a flag without effect must not pass in silence."""
    given = ["--tau-min", "0.8", "--tau-mask-max", "0.95"]
    assert config.parse(given).idle_thresholds == ["--tau-min", "--tau-mask-max"]
    assert config.parse([*given, "--filter", "adaptive"]).idle_thresholds == []
    for preset in ("shapes", "coco"):
        assert config.parse(["--preset", preset, "--sam", "tiny"]).idle_thresholds == []
    assert config.parse(["--preset", "photos"]).idle_thresholds == []
    given = ["--refine-gate", "0.9", "--tau-class", "0.95"]
    assert config.parse(given).idle_thresholds == ["--tau-class", "--refine-gate"]
    # What a preset or a method sets was not given.
    flags = ["--preset", "coco", "--sam", "tiny", "--filter", "calibrated"]
    assert config.parse(flags).idle_thresholds == []


def test_pl_dc_on_photographs_is_full_without_sam():
    """As docs/results.md says, which has one row for both."""
    one, two = (config.parse(["--preset", "photos", "--method", m]) for m in ("pl-dc", "full"))
    changed = {
        f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(two, f.name)
    }
    # The share of boundary points is of structural distillation, which neither has.
    assert changed == {"method", "structure_boundary"} and not two.structure_weight


def test_without_sam_may_be_asked_for():
    """`--refine none` asks for less of SAM, not for SAM."""
    asked = config.parse(["--preset", "photos", "--method", "s4m", "--refine", "none"])
    silent = config.parse(["--preset", "photos", "--method", "s4m"])
    assert asked == silent and not asked.uses_sam


def test_an_old_record_means_what_it_meant():
    """A part that was not there yet was not used; an option that is gone may have been."""
    plain = config.METHODS["guided-distillation"]
    now = config.Config(method="guided-distillation", **plain)
    saved = dataclasses.asdict(now)
    for name in plain:
        del saved[name]
    assert config.from_saved(saved) == now and config.differences(now, saved) == []
    assert config.differences(config.Config(), saved)[:2] == [
        "--method was guided-distillation, is full",
        "--filter was score, is calibrated",
    ]
    assert config.differences(now, saved | dict(structure_channels=1.0)) == []
    assert config.differences(now, saved | dict(structure_channels=0.5)) == [
        "--structure-channels was 0.5, is 1.0"
    ]


def test_the_stored_results_are_still_those_of_the_studies():
    """Every raw result in docs/results, but for its dataset's folder, is what would be run now."""
    off = dict(filter="score", correction="none", uncertainty=False, refine="none", arp="none")
    for name, spec in study.STUDIES.items():
        if not spec.data:
            records = study.load(name)
            made = study.jobs(name)
            assert len(study.current(name)) == len(records)
            # A study may be unfinished, or not begun; what there is must be of one of its runs.
            for record in records:
                (job,) = (j for j in made if study.matches(j, record))
                assert (job.row, job.seed) == (record["row"], record["seed"])
                # Without the parts' switches, as of before they were there: all are off.
                older = {k: v for k, v in record["settings"].items() if k not in off}
                unused = vars(job.settings).items() >= off.items()
                assert study.matches(job, dict(settings=older)) == unused, job.row
    # A switch that is set otherwise is another run.
    record = json.loads((ROOT / "docs" / "results" / "ladder.json").read_text())[0]
    assert study.comparable(record["settings"]) != study.comparable(
        record["settings"] | dict(refine="iou")
    )


def test_an_old_record_had_one_range_for_class_and_mask():
    saved = dataclasses.asdict(config.Config(tau_min=0.4, tau_max=0.7))
    del saved["tau_mask_min"], saved["tau_mask_max"]
    made = config.from_saved(saved)
    assert (made.tau_mask_min, made.tau_mask_max) == (0.4, 0.7)


def test_settings_that_contradict_each_other_are_refused_in_one_line():
    for flags, words in (
        ("--tau-mask-min 0.9 --tau-mask-max 0.8", "--tau-mask-min <= --tau-mask-max"),
        ("--scale-min 2", "--scale-min <= --scale-max"),
        ("--crop-height 64", "--crop-height and --crop-width: give both"),
        ("--scale-max 2", "--scale-min, --scale-max: scale a view before it is cropped"),
        ("--filter three-way --correction none", "--filter three-way: the correction decides"),
        ("--burnin-steps 0 --burnin-init fresh", "copy of an untrained student"),
        ("--method guided-distillation --refine-calibrate", "--refine-calibrate: needs SAM"),
    ):
        with pytest.raises(UserError, match=words) as error:
            config.parse(flags.split())
        assert "\n" not in str(error.value)
    # Where nothing is refined, there is nothing to calibrate, and no need to say so.
    assert not config.parse(["--refine", "none"]).refine_calibrate
    # Supervised training has no burn-in.
    config.parse("--method supervised --burnin-steps 0 --burnin-init fresh".split())


def test_values_out_of_range_are_refused():
    for flag, value, words in (
        ("--tau-class", "nan", "from 0 to 1"),
        ("--labeled-batch", "0", "at least 1"),
        ("--lr", "inf", "> 0 and finite"),
        ("--decay-at", "1", "from 0 to below 1"),
    ):
        with pytest.raises(UserError, match=f"{flag} .*must be {words}"):
            config.parse([flag, value])
    with pytest.raises(UserError, match=r"--method: invalid choice: 'x' .*pl-dc") as error:
        config.parse(["--method", "x"])
    assert "\n" not in str(error.value)


def test_photos_need_no_flag_and_no_sam():
    """Without SAM's weights its parts are off; a flag about SAM says that they are wanted."""
    made = config.parse(["--preset", "photos"])
    assert made.without_sam and not made.uses_sam and made.method == "full"
    assert made.filter == "calibrated" and made.model == "timm" and made.labeled == "annotated"
    tiny = config.parse(["--preset", "photos", "--sam", "tiny"])
    assert tiny.uses_sam and not tiny.without_sam
    with pytest.raises(UserError, match="sam_vit_b"):
        config.parse(["--preset", "photos", "--sam", "vit_b"])
    # Asked for by name, nothing is left out in silence.
    assert not config.parse(["--preset", "photos", "--method", "pl-dc"]).without_sam


def test_every_row_on_photographs_has_the_same_augmentation():
    names = ("crop_height", "scale_min", "scale_max", "short_side_min", "labeled_view", "flip")
    made = [config.parse(["--preset", "photos", "--method", m]) for m in config.METHODS]
    for one in made:
        assert [getattr(one, n) for n in names] == [getattr(made[0], n) for n in names]
        assert not one.pastes_labeled


def test_a_first_teacher_depends_on_what_is_pasted_into_labeled_images():
    saved = dataclasses.asdict(config.parse(["--arp", "labeled", "--method", "pl-dc"]))
    for arp, same in (("both", True), ("labeled", True), ("unlabeled", False), ("none", False)):
        now = config.parse(["--arp", arp])
        found = config.differences(now, saved, config.after_pretraining(now))
        assert found == ([] if same else [f"--arp was labeled, is {arp}"])
    # And on how it is pasted.
    now = config.parse(["--arp", "both", "--arp-min-area", "0.00572"])
    said = ["--arp-min-area was 0.00286, is 0.00572"]
    assert config.differences(now, saved, config.after_pretraining(now)) == said
    now = config.parse(["--arp", "none", "--arp-min-area", "0.00572"])
    nothing = dict(saved, arp="unlabeled")
    assert config.differences(now, nothing, config.after_pretraining(now)) == []
    # With S4M's distillation nothing is pasted while pretraining.
    distilled = dict(saved, structure_weight=1.0)
    now = "--arp none --structure-weight 1 --structure-boundary 0"
    now = config.parse(now.split())
    assert config.differences(now, distilled, config.after_pretraining(now)) == []


def test_what_is_of_no_use_is_not_predicted():
    for flags, lowest in (
        ("--filter score --tau-class 0.7", 0.7),
        ("--filter adaptive --tau-min 0.5", 0.5),
        ("--filter calibrated", 0.3),
    ):
        assert config.parse(flags.split()).lowest_score == lowest, flags


def test_an_oracle_needs_annotated_images():
    with pytest.raises(UserError, match="--labeled annotated --oracle class: the other images"):
        config.parse(["--labeled", "annotated", "--oracle", "class"])
