"""docs/walk.md and docs/walk.ipynb: made from docs/scripts/walk.py, the page by running it.
And docs/your_photos.ipynb, made from docs/scripts/your_photos.py.

python docs/scripts/make_walk.py             write the notebooks, run the walk, write its page
python docs/scripts/make_walk.py --notebook  write the notebooks alone, which runs nothing
python docs/scripts/make_walk.py --check     are all of the present sources? status 1 if not

A run needs what tests/requirements.txt lists for notebooks. WALK_PRETRAINED=FILE spares it the
training of a first teacher (docs/scripts/walk.py). `--check` runs nothing: it compares the
notebook, and the page's text and code, but not its outputs.
"""

import argparse
import ast
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parents[1]
SOURCE, PAGE, NOTEBOOK = HERE / "scripts" / "walk.py", HERE / "walk.md", HERE / "walk.ipynb"
PICTURES = HERE / "walk"
PHOTOS = HERE / "scripts" / "your_photos.py"

# Where the notebook is opened by itself (Colab): the project comes first.
FETCH = """\
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# Colab, or a notebook that was opened by itself: where the project can be cloned from, for
# instance "https://github.com/NAME/ssis.git". Inside the project's folder this is not used.
REPOSITORY = ""

places = [Path.cwd(), *Path.cwd().parents, Path.cwd() / "ssis-project"]
root = next((p for p in places if (p / "train.py").exists() and (p / "ssis").is_dir()), None)
install = [sys.executable, "-m", "pip", "install", "-q"]
if root is None:
    if not REPOSITORY:
        raise SystemExit("not inside the project: fill in REPOSITORY above, and run this again")
    subprocess.run(["git", "clone", REPOSITORY, "ssis-project"], check=True)
    root = places[-1]
needed = ["torchvision", "pycocotools", "segment_anything", "matplotlib", "tqdm", "PIL"]
if not all(map(importlib.util.find_spec, needed)):
    subprocess.run([*install, "-r", str(root / "requirements.txt")], check=True)
os.chdir(root)"""
# What `--preset photos` needs beside it.
FETCH_MORE = """
if not all(map(importlib.util.find_spec, ("timm", "imagehash"))):
    subprocess.run([*install, "timm", "imagehash"], check=True)"""

NOTE = (
    "<!-- Made by python docs/scripts/make_walk.py from docs/scripts/walk.py; "
    "as a notebook: walk.ipynb -->"
)


class Cell(NamedTuple):
    """A cell of the percent format: text (Markdown), or code."""

    is_text: bool
    content: str


def cells(source: str) -> list[Cell]:
    """The cells of a script; what comes before the first one belongs to the script alone."""
    parts = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)[1:]
    found = []
    for mark, content in zip(parts[::2], parts[1::2], strict=True):
        is_text = mark.strip() == "[markdown]"
        if is_text:
            content = re.sub(r"^# ?", "", content, flags=re.MULTILINE)
        found.append(Cell(is_text, content.strip("\n")))
    return found


def notebook(parts: list[Cell], name: str = "walk", fetch: str = FETCH) -> str:
    """The notebook, without outputs: the same bytes from the same cells.

    Args:
        parts: its cells.
        name: in the ids of the cells.
        fetch: the code of the cell before them.
    """
    made = []
    for number, cell in enumerate([Cell(False, fetch), *parts]):
        kind = "markdown" if cell.is_text else "code"
        entry = dict(cell_type=kind, id=f"{name}-{number:02}", metadata={})
        entry |= {} if cell.is_text else dict(execution_count=None, outputs=[])
        made.append(entry | dict(source=cell.content.splitlines(keepends=True)))
    kernel = dict(display_name="Python 3", language="python", name="python3")
    metadata = dict(kernelspec=kernel, language_info=dict(name="python"))
    whole = dict(cells=made, metadata=metadata, nbformat=4, nbformat_minor=5)
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def shown(code: str) -> list[tuple[str, str]]:
    """Name and description of each picture that a cell shows."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [
        (call.args[1].value, call.args[2].value)
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "show"
    ]


def of_photos() -> str:
    """The notebook docs/your_photos.ipynb."""
    parts = cells(PHOTOS.read_text(encoding="utf-8"))
    return notebook(parts, "photos", FETCH + FETCH_MORE)


def page(parts: list[Cell], outputs: list[str]) -> str:
    """The page; `outputs` has what each cell printed, and nothing for texts."""
    blocks = [NOTE]
    for cell, output in zip(parts, outputs, strict=True):
        if cell.is_text:
            blocks.append(cell.content)
            continue
        code, drawn = f"```python\n{cell.content}\n```", shown(cell.content)
        # How a picture is drawn is not what the page is about.
        head = "<details><summary>the picture's code</summary>"
        blocks.append(f"{head}\n\n{code}\n\n</details>" if drawn else code)
        if output:
            blocks.append(f"```text\n{output.rstrip()}\n```")
        blocks += [f"![{text}]({PICTURES.name}/{name}.png)" for name, text in drawn]
    return "\n\n".join(blocks) + "\n"


def run(text: str) -> list[str]:
    """Run a notebook in the project's folder; what each cell but the first printed."""
    # Here, not above: the check does without.
    import nbclient
    import nbformat

    made = nbformat.reads(text, as_version=4)
    here = {"metadata": {"path": str(HERE.parent)}}
    nbclient.NotebookClient(made, timeout=None, kernel_name="python3", resources=here).execute()
    return [
        "".join(part.text for part in cell.get("outputs", []) if part.get("name") == "stdout")
        for cell in made.cells[1:]
    ]


def check(parts: list[Cell]) -> bool:
    """Whether notebooks and page are of their sources, outputs aside, and all pictures there."""
    text = PAGE.read_text(encoding="utf-8")
    without = re.sub(r"^```text\n.*?^```\n\n", "", text, flags=re.MULTILINE | re.DOTALL)
    pictures = [name for cell in parts if not cell.is_text for name, _ in shown(cell.content)]
    return (
        NOTEBOOK.read_text(encoding="utf-8") == notebook(parts)
        and (HERE / "your_photos.ipynb").read_text(encoding="utf-8") == of_photos()
        and without == page(parts, [""] * len(parts))
        and sorted(pictures) == sorted(path.stem for path in PICTURES.iterdir())
    )


def main() -> None:
    """As the module's text says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--notebook", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    parts = cells(SOURCE.read_text(encoding="utf-8"))
    if given.check:
        sys.exit(not check(parts))
    NOTEBOOK.write_text(notebook(parts), encoding="utf-8")
    (HERE / "your_photos.ipynb").write_text(of_photos(), encoding="utf-8")
    if given.notebook:
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WALK_OUT"] = folder
        outputs = run(notebook(parts))
        shutil.rmtree(PICTURES, ignore_errors=True)
        PICTURES.mkdir()
        for path in sorted(Path(folder).glob("*.png")):
            shutil.copy(path, PICTURES)
    PAGE.write_text(page(parts, outputs), encoding="utf-8")


if __name__ == "__main__":
    main()
