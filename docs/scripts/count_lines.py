"""Count lines of code, of comments (docstrings too) and blank ones, part by part.

    python docs/scripts/count_lines.py [--root DIR]

With `--root` another checkout is counted, for a before and after. An older house may have all its
modules flat in ssis/, so the parts go by the names of the files, not by their folders.
"""

import argparse
import ast
from pathlib import Path

# The loop and the papers' parts. With the rest of what lies flat in ssis/: the method.
TEN = ["train", "model", "teacher", "filters", "correction", "losses", "augment", "refine"]
TEN += ["sam_distill", "copy_paste"]
METHOD = [*TEN, "data", "sam", "clip", "optimizer", "distributed", "config", "presets"]


def count(path: Path) -> tuple[int, int, int]:
    """Lines of code, of comments and docstrings, and blank ones outside of docstrings."""
    text = path.read_text(encoding="utf-8")
    lines, words = text.splitlines(), set()
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            words |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    blank = sum(not line.strip() and n not in words for n, line in enumerate(lines, 1))
    words |= {n for n, line in enumerate(lines, 1) if line.strip().startswith("#")}
    return len(lines) - len(words) - blank, len(words), blank


def parts(root: Path) -> dict[str, list[Path]]:
    """The name of each line of the table -> its files."""
    top = [root / "train.py", root / "evaluate.py", *sorted(root.glob("ssis/**/*.py"))]
    # A room may have a file of the same name as a part of the method: that is not it.
    flat = {path.stem: path for path in top if path.parent in (root, root / "ssis")}
    method = [flat[name] for name in METHOD]
    ten = [flat[name] for name in TEN]
    return {path.relative_to(root).as_posix(): [path] for path in ten} | {
        "these ten": ten,
        "method": method,
        "support": [path for path in top if path not in method],
        "tests": [*root.glob("tests/**/*.py")],
        "docs": [*root.glob("docs/**/*.py")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2])
    print(f"{'':20}{'code':>7}{'comment':>9}{'blank':>7}   comment lines a code line")
    for name, paths in parts(parser.parse_args().root).items():
        code, words, blank = (sum(column) for column in zip(*map(count, paths), strict=True))
        print(f"{name:20}{code:7}{words:9}{blank:7}   {words / code:.2f}")


if __name__ == "__main__":
    main()
