"""Write the README's map of the files, from the first line of each file's docstring.

    python docs/scripts/make_file_map.py            rewrite it
    python docs/scripts/make_file_map.py --check    status 1 when it is not up to date

The method comes first, in the numbered order of the docstrings' "Chain: N of M"; then the
command and the rooms.
"""

import ast
import re
from pathlib import Path

from generated import write_or_check

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
ROOMS = {
    "datasets": "reading and making data",
    "engine": "what keeps a run alive",
    "report": "what people look at",
    "tools": "the commands of `python -m ssis`",
    "io": "the ground floor: image files, files written whole, bytes of checkpoints and SAM",
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


def readme() -> str:
    """The README with the map as it should be."""
    method = chain()
    parts = [f"The method, in reading order, 1 to {len(method)}:", table(method)]
    parts += ["What serves it:", table([ROOT / "evaluate.py"])]
    for room, words in ROOMS.items():
        paths = sorted((ROOT / "ssis" / room).glob("[!_]*.py"))
        parts += [f"`ssis/{room}/`: {words}.", table(paths)]
    text = README.read_text(encoding="utf-8")
    before, rest = text.split("<!-- files -->\n")
    after = rest.split("<!-- end -->", 1)[1]
    return f"{before}<!-- files -->\n" + "\n\n".join(parts) + f"\n<!-- end -->{after}"


if __name__ == "__main__":
    write_or_check(README, readme())
