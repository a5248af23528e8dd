"""The documents say what the code says: file map, commands, options, results, links."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from markdown_it import MarkdownIt

from ssis import config
from ssis.__main__ import COMMANDS

pytestmark = pytest.mark.fast
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def test_the_file_map_is_made_of_the_docstrings():
    """And the numbered chain leads from train.py through every file of the method once."""
    done = subprocess.run([sys.executable, "docs/scripts/make_file_map.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run python docs/scripts/make_file_map.py"


def test_every_option_in_the_documents_exists():
    own = {config.flag(field.name) for field in dataclasses.fields(config.Config)}
    own |= {flag.replace("--", "--no-", 1) for flag in own}
    others = {
        "--copies",
        "--export_dir",
        "--group-by",
        "--masks-from-boxes",
        "--match-names",
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
        "--side",
        "--patch",
        "--weights",
        "--processes",
        "--masks",
        "--items",
        "--size",
        "--score",
        "--threads",
        "--ways",
        "--neighbors",
    }
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        found = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", path.read_text(encoding="utf-8")))
        assert found <= own | others, (path.name, found - own - others)


def test_ci_runs_the_readmes_test_command():
    block = re.search(r"<!-- tests -->\n```\n(.+)\n```\n<!-- end -->", README)
    assert block and block.group(1).count("\n") == 0
    assert block.group(1).endswith(".venv/bin/python -m pytest")
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()


def test_the_results_page_is_generated_from_the_raw_results():
    done = subprocess.run([sys.executable, "docs/scripts/make_results.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run python docs/scripts/make_results.py"


def test_a_row_of_real_images_says_what_it_gained_and_which_sam(monkeypatch):
    """By runs that were made on a GPU, before labeled images were left unpasted."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "scripts"))
    import make_results

    path = ROOT / "docs" / "results" / "log-photos-pasting.json"
    runs = [r for r in json.loads(path.read_text()) if r["data"] == "wbc" and r["row"] == "full"]
    assert make_results.judgment(runs) == [
        "69.8 ± 2.3",
        "0: +4.8 (-3.6 to +15.1)  1: +5.6 (-0.7 to +11.5)",
        "none",
    ]
    # The supervised run that it would be compared with had not ended; SAM's masks were asked for.
    run = runs[0]
    run["summary"]["verdict"]["compared"].pop()
    run["summary"]["calibration"][-1]["taken"] = 0.254
    run["settings"] |= dict(refine="agreement", sam="tiny")
    assert make_results.judgment([run])[1:] == ["–", "tiny 25 %"]


def test_the_page_on_reproducing_is_generated_from_the_presets():
    done = subprocess.run([sys.executable, "docs/scripts/make_reproduce.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run python docs/scripts/make_reproduce.py"


def test_every_training_command_of_the_documents_would_start():
    """Each `train.py ...` is parsed; files of others that are not here are left out."""
    seen = 0
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            command = re.match(r"\s*\S*(?:python|torchrun.*?) train\.py( --.+)", line)
            # What follows a row of spaces, or a bracket, explains the command.
            words = re.sub(r"\s{3,}.*|\s\(.*|\.\.\..*", "", command.group(1)) if command else ""
            words = re.sub(r"[\[\]]|--(sam-checkpoint|pretrained) \S+", "", words)
            if not words.strip() or "--help" in words:
                continue
            config.parse([*words.split(), "--sam", "tiny"])
            seen += 1
    assert seen > 35


def test_links_between_the_documents_lead_somewhere():
    assert len(PAGES) > 20
    for path in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), (path.name, link)


def test_scripts_and_commands_in_the_documents_exist():
    """Paths of the repository's programs; `python -m ssis COMMAND`."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"(?<![\w/.])((?:docs|ssis|tests)/[\w/]+\.(?:py|toml|svg))", text):
            # The log tells of files that are gone, instructors of tests that they write.
            if path.name not in ("log.md", "instructors.md"):
                assert (ROOT / name).exists(), (path.name, name)
        for command in re.findall(r"python -m ssis (\w+)", text):
            assert command in COMMANDS, (path.name, command)


def too_long(text: str) -> list[int]:
    """Numbers of lines over 100 columns that could be shorter.

    Code, formulas, comments and single words stay as they are; a row of a table is one line, of
    at most 160.
    """
    free, tables = set(), set()
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in ("fence", "code_block", "html_block"):
            free |= set(range(*token.map))
        elif token.type == "table_open":
            tables |= set(range(*token.map))
    return [
        number + 1
        for number, line in enumerate(text.splitlines())
        if len(line) > (160 if number in tables else 100)
        and number not in free
        and not line.startswith("$$")
        and " " in line.strip(" *")
    ]


def test_the_documents_are_wrapped_at_100_columns():
    words = "word " * 21
    assert too_long(f"{words}\n\n* {words}\n") == [1, 3]
    assert too_long(f"```\n{words}\n```\n\n    {words}\n\n[{'x' * 120}](y)\n") == []
    assert too_long(f"| a |\n|---|\n| {words} |\n| {words}{words} |\n") == [4]
    for path in PAGES:
        wrong = too_long(path.read_text(encoding="utf-8"))
        assert not wrong, (path.name, wrong)


def test_the_loop_stays_readable_in_one_sitting():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 300
