"""Write docs/files.md's map of the files and README's map of the method, from the sources.

    python docs/scripts/make_file_map.py            rewrite them
    python docs/scripts/make_file_map.py --check    status 1 when one is not up to date

The first line of each file's docstring says what it is. The method comes first, in the numbered
order of the docstrings' "Chain: N of M"; then the command and the rooms. README names the part of
the paper that a file is, the equations that are computed in it, and its lines.
"""

import ast
import re
import sys
from pathlib import Path

import count_lines
import make_equations
from generated import reflow

ROOT = Path(__file__).resolve().parents[2]
# The parts of the papers, in the order of a step; the other files of the chain serve them.
PARTS = {
    "GD: the loop in three stages": "train.py",
    "GD: the EMA teacher and its pseudo-labels": "ssis/teacher.py",
    "GD: weak and strong views": "ssis/augment.py",
    "PL-DC: dual-threshold filtering": "ssis/filters.py",
    "S4M: refinement by SAM": "ssis/refine.py",
    "PL-DC: dynamic category correction": "ssis/correction.py",
    "ours: prototypes as the category classifier": "ssis/prototypes.py",
    "PL-DC: CLIP as the category classifier": "ssis/clip.py",
    "S4M: copy-paste": "ssis/copy_paste.py",
    "PL-DC: pixel uncertainty; all losses": "ssis/losses.py",
    "S4M: structural distillation": "ssis/sam_distill.py",
    "ours: calibration on validation images": "ssis/calibration.py",
    "ours: ImageNet's class means": "ssis/imagenet.py",
    "ours: alignment of class shares": "ssis/alignment.py",
}
ROOMS = {
    "datasets": "reading and making data",
    "engine": "checkpoints, resuming, what goes wrong",
    "report": "AP, verdict, pictures, the page of a run",
    "tools": "the commands of `python -m ssis`",
    "io": "images, checkpoints, SAM's weights; crash-safe writing",
}
CHAIN = re.compile(r"^Chain: (\d+) of (\d+)\. Read next: (?:back to )?`([\w/]+\.py)`", re.MULTILINE)


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def chain() -> list[Path]:
    """The files of the method, each leading to the next; train.py first.

    Raises:
        ValueError: a file is missing in the chain, or numbered wrongly.
    """
    path, found = ROOT / "train.py", []
    while path not in found:
        found.append(path)
        step = CHAIN.search(docstring(path))
        if not step or int(step[1]) != len(found):
            raise ValueError(f"{path.name}: is not number {len(found)} of the chain")
        path = ROOT / step[3]
    flat = {p for p in (ROOT / "ssis").glob("*.py") if not p.name.startswith("__")}
    if path != found[0] or set(found[1:]) != flat or int(step[2]) != len(found):
        raise ValueError(f"the chain does not lead through each file of ssis/ once: {path.name}")
    return found


def files() -> list[Path]:
    """All files in the order of the map."""
    rooms = [p for room in ROOMS for p in sorted((ROOT / "ssis" / room).glob("[!_]*.py"))]
    return [*chain(), ROOT / "evaluate.py", *rooms]


def table(paths: list[Path]) -> str:
    rows = [
        f"| `{path.relative_to(ROOT).as_posix()}` | {docstring(path).splitlines()[0]} |"
        for path in paths
    ]
    return "\n".join(["| file | what |", "|---|---|", *rows])


def method() -> str:
    """The parts of the papers: file, equations, lines; and a line for each other room."""
    defined: dict[str, list[str]] = {}
    for name, entry in sorted(make_equations.collect().items()):
        path = entry["file"].relative_to(ROOT).as_posix()
        # "PL-DC Eq. (adapt)" -> (adapt)
        defined.setdefault(path, []).append(name.split("Eq. ")[1])
    rows = [
        "| part of the paper | file | [equations](docs/equations.md) | lines of code + comments |",
        "|---|---|---|---|",
    ]
    for part, name in PARTS.items():
        code, words, _ = count_lines.count(ROOT / name)
        equations = ", ".join(each.strip("()") for each in defined.get(name, []))
        rows.append(f"| {part} | [`{Path(name).name}`]({name}) | {equations} | {code} + {words} |")
    rest = [p for p in chain() if p.relative_to(ROOT).as_posix() not in PARTS.values()]
    serving = ", ".join(f"`{p.name}`" for p in rest)
    lines = [f"In `ssis/` beside them: {serving}. Its folders:", ""]
    for room, words in ROOMS.items():
        count = len(list((ROOT / "ssis" / room).glob("[!_]*.py")))
        lines.append(f"* `ssis/{room}/`, {count} files: {words}")
    return "\n".join(rows) + "\n\n" + reflow("\n".join(lines)).strip()


def files_page() -> str:
    """The map of all files."""
    found = chain()
    parts = [f"The method, in reading order, 1 to {len(found)}:", table(found)]
    parts += ["What serves it:", table([ROOT / "evaluate.py"])]
    for room, words in ROOMS.items():
        paths = sorted((ROOT / "ssis" / room).glob("[!_]*.py"))
        parts += [f"`ssis/{room}/`: {words}.", table(paths)]
    return "\n\n".join(parts)


def filled(path: Path, name: str, content: str) -> str:
    """A page with new content in one of its blocks."""
    before, rest = path.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")
    after = rest.split("<!-- end -->", 1)[1]
    return f"{before}<!-- {name} -->\n{content}\n<!-- end -->{after}"


if __name__ == "__main__":
    pages = {
        ROOT / "README.md": ("method", method()),
        ROOT / "docs/files.md": ("files", files_page()),
    }
    made = {path: filled(path, *block) for path, block in pages.items()}
    if "--check" in sys.argv[1:]:
        sys.exit(any(path.read_text(encoding="utf-8") != text for path, text in made.items()))
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
