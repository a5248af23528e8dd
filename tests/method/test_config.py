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
        assert set(own) <= parts and len(own) == 6, method
        made = config.parse(["--method", method, "--model", "resnet50"])
        assert {name: getattr(made, name) for name in own} == own


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
        "--filter {score,coupled,dual,adaptive}",
        "[adaptive; set by --method and --preset]",
        "--method {supervised,guided-distillation,pl-dc,s4m,full}",
        "[0.99; set by --preset]",
        "a fraction (5%)",
        "5% labeled",
        "Teacher and pseudo-labels:",
    ):
        assert words in said, words
    assert "%%" not in said


def test_presets_are_valid_and_the_papers_numbers_are_there():
    for name in config.PRESETS:
        for method in config.METHODS:
            config.parse(["--preset", name, "--method", method, "--sam", "tiny"])
    # PL-DC's own numbers, at Guided Distillation's number of steps.
    pl_dc = config.parse(["--preset", "coco", "--method", "pl-dc"])
    assert (pl_dc.tau_class, pl_dc.tau_mask, pl_dc.unsup_weight) == (0.85, 0.9, 1.0)
    assert (pl_dc.burnin_steps, pl_dc.burnin_steps + pl_dc.mutual_steps) == (20_000, 368_750)
    assert pl_dc.uncertainty and pl_dc.filter == "dual" and pl_dc.correction == "prototypes"
    gd = ["--method", "guided-distillation"]
    coco = config.parse(["--preset", "coco", *gd])
    assert (coco.burnin_steps, coco.burnin_steps + coco.mutual_steps) == (50_000, 368_750)
    cityscapes = config.parse(["--preset", "cityscapes", *gd])
    assert (cityscapes.burnin_steps, cityscapes.mutual_steps) == (50_000, 40_000)
    # PL-DC's filter alone has its thresholds, and they move as slowly as the teacher.
    assert (coco.tau_mask, coco.threshold_decay) == (0.9, 0.9996)
    assert (coco.ema_decay, coco.unsup_weight, coco.tau_class) == (0.9996, 2.0, 0.7)
    # S4M's, and both together.
    s4m = config.parse(["--preset", "coco", "--method", "s4m", "--sam", "tiny"])
    assert (s4m.burnin_steps, s4m.burnin_steps + s4m.mutual_steps) == (25_000, 368_750)
    assert (s4m.structure_weight, s4m.refine_points, s4m.structure_queries) == (1.0, 3, 128)
    s4m = config.parse(["--preset", "cityscapes", "--method", "s4m", "--sam", "tiny"])
    assert (s4m.burnin_steps, s4m.mutual_steps) == (15_000, 75_000)
    full = config.parse(["--preset", "cityscapes", "--sam", "tiny"])
    assert (full.burnin_steps, full.mutual_steps) == (20_000, 70_000)
    assert full.method == "full" and full.refine != "none" and full.correction == "prototypes"
    # A flag beats the preset, and the preset the default.
    assert config.parse(["--preset", "coco", *gd, "--lr", "1"]).lr == 1.0 and coco.lr == 1e-4


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
    later = config.Config(method="full", labeled="8", sam="vit_b", sam_checkpoint="there.pth")
    assert config.differences(later, saved, config.after_pretraining(later)) == []
    distilled = dataclasses.replace(later, structure_weight=1.0)
    assert config.differences(distilled, saved, config.after_pretraining(distilled)) == [
        "--structure-weight was 0.0, is 1.0",
        "--sam was tiny, is vit_b",
    ]
    # A config of before those fields were there.
    del saved["refine"], saved["sam"]
    assert config.differences(later, saved, config.after_pretraining(later)) == []


def test_an_old_record_means_what_it_meant():
    """A part that was not there yet was not used; an option that is gone may have been."""
    plain = config.METHODS["guided-distillation"]
    now = config.Config(method="guided-distillation", **plain)
    saved = dataclasses.asdict(now)
    for name in (*plain, "structure_boundary"):
        del saved[name]
    assert config.from_saved(saved) == now and config.differences(now, saved) == []
    assert config.differences(config.Config(), saved)[:2] == [
        "--method was guided-distillation, is full",
        "--filter was score, is adaptive",
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
            assert len(made) == len(study.current(name)) == len(records) > 0
            for job in made:
                (record,) = (r for r in records if study.matches(job, r))
                # Without the parts' switches, as of before they were there: all are off.
                older = {k: v for k, v in record["settings"].items() if k not in off}
                unused = vars(job.settings).items() >= off.items()
                assert study.matches(job, dict(settings=older)) == unused, job.row
            # Nor is a run that was under way when an option went begun anew.
            if name == "ladder":
                assert str(made[0].folder) == "runs/ladder/supervised-s0-5228a4"
    # A switch that is set otherwise is another run.
    record = json.loads((ROOT / "docs" / "results" / "ladder.json").read_text())[0]
    assert study.comparable(record["settings"]) != study.comparable(
        record["settings"] | dict(refine="iou")
    )


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
