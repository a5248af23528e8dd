"""The documents say what the code says: file map, commands, options, results, links."""

import dataclasses
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from ssis import config

pytestmark = pytest.mark.fast
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_file_map_is_made_of_the_docstrings():
    """And the numbered chain leads from train.py through every file of the method once."""
    done = subprocess.run([sys.executable, "docs/scripts/make_file_map.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run python docs/scripts/make_file_map.py"


def test_every_option_in_the_documents_exists():
    own = {config.flag(field.name) for field in dataclasses.fields(config.Config)}
    own |= {flag.replace("--", "--no-", 1) for flag in own}
    others = {
        "--root",
        "--max-restarts",
        "--nnodes",
        "--lists",
        "--val",
        "--boundary",
        "--onnx",
        "--who",
        "--json",
        "--images",
        "--save-predictions",
        "--nproc_per_node",
        "--help",
        "--check",
        "--steps",
        "--out",
        "--minutes",
        "--scenes",
        "--side",
        "--patch",
        "--weights",
        "--processes",
        "--masks",
        "--items",
        "--size",
        "--score",
        "--threads",
    }
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        found = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", path.read_text(encoding="utf-8")))
        assert found <= own | others, (path.name, found - own - others)


def test_help_shows_every_field_with_its_reason(capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(["--help"])
    assert stop.value.code == 0
    squeezed = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(config.Config):
        assert config.flag(field.name) in squeezed
        assert " ".join(field.metadata["reason"].replace("%%", "%").split()) in squeezed


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


def test_ci_runs_the_readmes_test_command():
    block = re.search(r"<!-- tests -->\n```\n(.+)\n```\n<!-- end -->", README)
    assert block and block.group(1).count("\n") == 0
    assert block.group(1).endswith(".venv/bin/python -m pytest")
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()


def test_the_results_page_is_generated_from_the_raw_results():
    done = subprocess.run([sys.executable, "docs/scripts/make_results.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run python docs/scripts/make_results.py"


def test_the_page_on_reproducing_is_generated_from_the_presets():
    done = subprocess.run([sys.executable, "docs/scripts/make_reproduce.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run python docs/scripts/make_reproduce.py"


def test_every_training_command_of_the_documents_would_start():
    """Each `train.py ...` is parsed; files of others that are not here are left out."""
    seen = 0
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            command = re.match(r"\s*(?:python|torchrun.*?) train\.py( --.+)", line)
            # What follows a row of spaces, or a bracket, explains the command.
            words = re.sub(r"\s{3,}.*|\s\(.*|\.\.\..*", "", command.group(1)) if command else ""
            words = re.sub(r"[\[\]]|--(sam-checkpoint|pretrained) \S+", "", words)
            if not words.strip() or "--help" in words:
                continue
            config.parse([*words.split(), "--sam", "tiny"])
            seen += 1
    assert seen > 35


def test_links_between_the_documents_lead_somewhere():
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), (path.name, link)


def test_the_loop_stays_readable_in_one_sitting():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 300
