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


def test_help_says_what_a_bare_call_uses(capsys):
    with pytest.raises(SystemExit):
        config.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "--filter {score,coupled,dual,adaptive}",
        "[adaptive; --method and --preset set it]",
        "--method {supervised,guided-distillation,pl-dc,s4m,full}",
        "[0.99; --preset set it]",
        "a fraction (5%)",
        "5% labeled",
        "Teacher and pseudo-labels:",
    ):
        assert words in said, words
    assert "%%" not in said


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
    for name, spec in study.STUDIES.items():
        if not spec.data:
            records = study.load(name)
            made = study.jobs(name)
            assert len(made) == len(study.current(name)) == len(records) > 0
            for job in made:
                assert sum(study.matches(job, record) for record in records) == 1, job.row
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
