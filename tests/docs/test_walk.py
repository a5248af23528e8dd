"""The notebooks: walk and your_photos are of their sources, and run to their ends.

The run is the real one, small: the notebook in a kernel of its own, with a teacher of 25 steps on
20 images and thresholds so low that something is kept. Its `assert`s are the hand calculations.
"""

import json
import re
import runpy
import subprocess
import sys

import nbclient
import nbformat
import pytest
from conftest import ROOT

DOCS = ROOT / "docs"
WALK = DOCS / "scripts" / "walk.py"


@pytest.mark.fast
def test_page_and_notebook_are_made_of_the_script():
    done = subprocess.run([sys.executable, "docs/scripts/make_walk.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run python docs/scripts/make_walk.py"


@pytest.mark.fast
def test_equations_are_spelled_as_the_sources_define_them():
    text = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    defined = dict(re.findall(r"^## (.+)\n\n\$\$(.+)\$\$$", text, re.MULTILINE))
    walk = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
    name = r"(?:GD|PL-DC|S4M|ssis) Eq\. \([^)]+\)"
    found = re.findall(rf"\$\$(.+?)\$\$\s+({name})", walk, re.DOTALL)
    assert len(found) >= 10
    for formula, its_name in found:
        assert " ".join(formula.split()) == defined[its_name], its_name
    assert set(re.findall(name, walk)) <= set(defined)


@pytest.mark.fast
def test_the_pictures_are_small_enough_for_a_page():
    sizes = [path.stat().st_size for path in (ROOT / "docs" / "walk").glob("*.png")]
    assert len(sizes) >= 8 and sum(sizes) < 1_500_000


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> None:
    """A notebook's kernel writes into the test's folder only."""
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")


def executed(name: str) -> tuple[str, list]:
    """What all cells of a notebook in docs/ printed, and the pictures that they showed."""
    notebook = nbformat.read(DOCS / name, as_version=4)
    nbformat.validate(notebook)
    # Opened where it lies, as Jupyter does: it finds the project's folder by itself.
    where = {"metadata": {"path": str(DOCS)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [part for cell in notebook.cells for part in cell.get("outputs", [])]
    text = "".join(part.text for part in outputs if part.get("name") == "stdout")
    return text, [part for part in outputs if "image/png" in part.get("data", {})]


@pytest.fixture
def small(shapes_folder, tmp_path, monkeypatch, kernel) -> str:
    """Settings of a small walk."""
    flags = "--pretrain-steps 25 --warmup-steps 5 --labeled 20 --labeled-batch 4 --eval-every 99"
    # Views of half the size: points and masks must find their way to the original and back.
    flags += " --short-side-min 48 --short-side 48 --long-side 48 --max-detections 10"
    for part in ("train", "val", "test"):
        flags += f" --{part}-json {shapes_folder}/instances_{part}.json"
        flags += f" --{part}-images {shapes_folder}/{part}"
    monkeypatch.setenv("WALK_OUT", str(tmp_path / "out"))
    monkeypatch.delenv("WALK_PRETRAINED", raising=False)
    return flags


def everything() -> list[str]:
    """What there is in docs/, compiled files aside."""
    return sorted(str(p) for p in (ROOT / "docs").rglob("*") if "__pycache__" not in str(p))


def test_the_notebook_runs_to_its_end_and_draws_its_pictures(small, tmp_path, monkeypatch):
    before = everything()
    monkeypatch.setenv(
        "WALK_FLAGS", f"{small} --tau-min 0.1 --tau-max 0.2 --tau-mask-min 0.1 --tau-mask-max 0.2"
    )
    text, shown = executed("walk.ipynb")
    assert "IoU mask taught" in text
    # There was something to follow: pseudo-labels in the batch, and one of them with a mask.
    assert "pseudo-labels: 0 in" not in text and "pseudo-labels: " in text
    drawn = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert drawn == sorted(path.name for path in (ROOT / "docs" / "walk").glob("*.png"))
    assert len(shown) == len(drawn)
    assert everything() == before

    # The same first teacher with a filter that it cannot pass: one line, no traceback.
    monkeypatch.setenv("WALK_FLAGS", f"{small} --tau-min 1 --tau-max 1")
    monkeypatch.setenv("WALK_PRETRAINED", str(tmp_path / "out" / "first" / "checkpoint.pt"))
    # In this process, which has torch already; the script looks for modules and data from here.
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    # Python prints the text of this exit, and ends with status 1.
    with pytest.raises(SystemExit, match=r"^no pseudo-label in .*to follow"):
        runpy.run_path(str(WALK))


def test_your_photos_from_two_paths_to_a_verdict(tmp_path, monkeypatch, kernel):
    """The example that is drawn where no path is filled in; small, and of few steps."""
    before = everything()
    monkeypatch.setenv("PHOTOS_OUT", str(tmp_path / "out"))
    for name in ("PHOTOS", "ANNOTATIONS"):
        monkeypatch.delenv(name, raising=False)
    flags = "--model small --backbone-weights none --correction none --device cpu"
    flags += " --short-side-min 48 --short-side 48 --long-side 48 --warmup-steps 1"
    flags += " --max-detections 10"
    flags += " --pretrain-steps 4 --burnin-steps 1 --mutual-steps 2 --eval-every 99"
    monkeypatch.setenv("PHOTOS_FLAGS", flags + " --labeled-batch 2 --unlabeled-batch 2")
    text, shown = executed("your_photos.ipynb")
    assert "train: 20 images" in text and "val: 10 images" in text
    summary = json.loads((tmp_path / "out" / "with_others" / "summary.json").read_text())
    assert (summary["labeled"], summary["unlabeled"]) == (20, 270)
    assert f"\n{summary['verdict']['sentence']}\n" in text
    # The supervised run that lies beside it is the line to beat.
    assert "than supervised training in" in text
    assert len(list((tmp_path / "out" / "found" / "overlays").iterdir())) == 4
    assert len(shown) == 3 and everything() == before
