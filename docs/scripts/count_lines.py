"""Count lines of code, of words (comments and docstrings) and blank ones, part by part.

    python docs/scripts/count_lines.py [--root DIR]

With `--root` another checkout is counted, for a before and after. The nine files of the method
are those that implement the papers' parts and the loop.
"""

import argparse
import ast
from pathlib import Path

NINE = "teacher filters correction losses augment refine sam_distill model".split()


def count(path: Path) -> tuple[int, int, int]:
    """Lines of code, of comments and docstrings, and blank ones."""
    text = path.read_text(encoding="utf-8")
    lines, words = text.splitlines(), set()
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            words |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    blank = sum(not line.strip() and n not in words for n, line in enumerate(lines, 1))
    words |= {n for n, line in enumerate(lines, 1) if line.strip().startswith("#")}
    return len(lines) - len(words) - blank, len(words), blank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2])
    root = parser.parse_args().root
    nine = [root / "train.py", *(root / "ssis" / f"{name}.py" for name in NINE)]
    flat = [root / "train.py", *sorted((root / "ssis").glob("*.py"))]
    parts = {path.relative_to(root).as_posix(): [path] for path in nine}
    parts["these nine"] = nine
    parts["train.py and ssis/*.py"] = flat
    parts["the rooms, evaluate.py"] = [*root.glob("ssis/*/*.py"), root / "evaluate.py"]
    parts["tests"] = [*root.glob("tests/**/*.py")]
    parts["docs"] = [*root.glob("docs/**/*.py")]
    print(f"{'':24}{'code':>7}{'words':>7}{'blank':>7}   words a line of code")
    for name, paths in parts.items():
        code, words, blank = (sum(column) for column in zip(*map(count, paths), strict=True))
        print(f"{name:24}{code:7}{words:7}{blank:7}   {words / code:.2f}")


if __name__ == "__main__":
    main()
