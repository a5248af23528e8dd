"""Make the student's copy of the project: the tasks' functions without their bodies.

    python docs/assignments/make.py OUT [--assignment 1 2 ...]

OUT must not exist, or be empty. Signature, decorators and docstring of each task's function
stay; its body is one line that raises an error with the task's name. Left out is what gives the
answers away or is of no use to a student, and the pages' links to it; all else is the same.
"""

import argparse
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tasks import ROOT, Task, chosen, load, stub

# Not for students: the wrong solutions say what the right ones are, the walk through a step
# computes by hand what they are asked for, and the programs here need the reference.
LEFT_OUT = (
    "docs/assignments/check.py",
    "docs/assignments/grade.py",
    "docs/assignments/instructors.md",
    "docs/assignments/isolated.py",
    "docs/assignments/make.py",
    "docs/assignments/tasks.py",
    "docs/assignments/wrong.toml",
    "docs/scripts/make_walk.py",
    "docs/results/",
    "docs/bench/refine_trial.py",  # needs the next one
    "docs/bench/category_classifiers.py",  # computes what task 3_3 asks for
    "docs/walk",
    "runs/",
    "tests/docs/test_assignments.py",
    "tests/docs/test_walk.py",
)
# What belongs to the project where no git says so.
PATTERNS = (
    *("*.py", "*.md", "*.toml", "*.txt", "LICENSE", ".gitignore"),
    *("ssis/*", "ssis/*/*", "tests/*", "tests/*/*", "docs/*", "docs/*/*"),
)


def project_files() -> list[str]:
    """The project's files, relative to its root: what git tracks, where it tracks this file.

    So neither runs nor an instructor's notes, which lie beside the code, are handed out.
    """
    me = Path(__file__).resolve().relative_to(ROOT).as_posix()
    try:
        done = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        tracked = [name for name in done.stdout.split("\0") if (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        tracked = []
    if me in tracked:
        return sorted(tracked)
    found = {path for pattern in PATTERNS for path in ROOT.glob(pattern)}
    return sorted(
        path.relative_to(ROOT).as_posix()
        for path in found
        if path.is_file() and "__pycache__" not in path.parts
    )


def student_files() -> list[str]:
    """Those of them that the student's copy has."""
    return [name for name in project_files() if not name.startswith(LEFT_OUT)]


def stubs(tasks: list[Task]) -> dict[str, str]:
    """Module -> its text without the bodies of these tasks."""
    texts: dict[str, str] = {}
    for task in tasks:
        text = texts.get(task.module) or (ROOT / task.module).read_text(encoding="utf-8")
        texts[task.module] = stub(text, task)
    return texts


def without_dead_links(pages: list[str], given: list[str], changed: list[str]) -> dict[str, str]:
    """Pages as they are in the student's copy: name -> text.

    Args:
        pages: Markdown files; their links are relative.
        given: files of the copy; of a link to anything else only the words stay.
        changed: those with stubs, in which line numbers are others: `#L12` goes.
    """
    there = {folder.as_posix() for name in given for folder in [Path(name), *Path(name).parents]}

    def link(match: re.Match) -> str:
        words, (target, _, place) = match["words"], match["target"].partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if not target or "://" in target:
            return match[0]
        if path not in there:
            return f"{words} (not in this copy)"
        return f"[{words}]({target})" if path in changed and place else match[0]

    texts = {}
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        texts[page] = re.sub(r"!?\[(?P<words>[^][]*)\]\((?P<target>[^()\s]+)\)", link, text)
    return texts


def copy(out: Path, names: list[str], texts: dict[str, str]) -> None:
    """Copy files of the project; those in `texts` with that text instead of their own."""
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if name in texts:
            # As `grade.py` reads it: a student's file need not be UTF-8.
            (out / name).write_bytes(texts[name].encode("utf-8", "surrogateescape"))
        else:
            shutil.copyfile(ROOT / name, out / name)


def program(run: Callable[[], None]) -> None:
    """Run a program; what its user did wrong is one line and status 2."""
    try:
        run()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the copy: new, or empty")
    parser.add_argument("--assignment", nargs="+", type=int, metavar="N", help="only theirs")
    args = parser.parse_args()
    out, tasks = args.out, chosen(load(), None, args.assignment)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: is there and not an empty folder; give another")
    names, texts = student_files(), stubs(tasks)
    pages = [name for name in names if name.endswith(".md")]
    copy(out, names, without_dead_links(pages, names, list(texts)) | texts)
    print(f"{out}: {len(tasks)} functions to write; start with docs/assignments/README.md")


if __name__ == "__main__":
    program(main)
