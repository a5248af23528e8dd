"""Run an assignment's tests and pack the hand-in.

    python docs/assignments/submit.py 2            -> assignment2.zip
    python docs/assignments/submit.py 2 3 --out ME.zip

Prints a line for each task, passed or not, as the tests of this copy say; the grade is made with
the reference's own tests. The zip holds the modules of the assignments' tasks and nothing else,
with their paths, and can be handed in whether all tests pass or not.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# pytest's status where every selected test has passed.
PASSED = 0
# Seconds that the tests of one task may take; a loop without end is "not yet".
LIMIT = 300


def tasks(numbers: list[int]) -> list[dict]:
    """The tasks of some assignments.

    Raises:
        ValueError: there is no such assignment.
    """
    raw = tomllib.loads((HERE / "tasks.toml").read_text(encoding="utf-8"))
    known = {entry["id"] for entry in raw["assignment"]}
    if unknown := sorted(set(numbers) - known):
        raise ValueError(f"no assignment {unknown[0]}; there are {min(known)} to {max(known)}")
    return [task for task in raw["task"] if task["assignment"] in numbers]


def passes(task: dict) -> bool:
    """Whether a task's tests pass in this copy."""
    files = sorted({test.split("::")[0] for test in task["tests"]})
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", f"task{task['id']}", *files]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == PASSED


def stop(message: str) -> None:
    """One line, and the status of what the user can mend."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assignments", nargs="+", type=int, metavar="N")
    parser.add_argument("--out", type=Path, help="default: assignment<N>.zip")
    args = parser.parse_args()
    try:
        chosen = tasks(args.assignments)
    except ValueError as error:
        stop(str(error))
    modules = sorted({task["module"] for task in chosen})
    if lost := [name for name in modules if not (ROOT / name).is_file()]:
        stop(f"{lost[0]}: not there; take it from your copy of the assignments again")
    out = args.out or Path(f"assignment{'_'.join(map(str, args.assignments))}.zip")
    if not out.parent.is_dir():
        stop(f"--out {out}: no such folder")
    right = 0
    for task in chosen:
        passed = passes(task)
        right += task["points"] * passed
        word = "passed" if passed else "not yet"
        print(f"{task['id']}  {task['title']:<44} {task['points']:>2} points  {word}")
    total = sum(task["points"] for task in chosen)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in modules:
            packed.write(ROOT / name, name)
    print(f"{right} of {total} points; to hand in: {out} ({', '.join(modules)})")


if __name__ == "__main__":
    main()
