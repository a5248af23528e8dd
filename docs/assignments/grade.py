"""Grade a student's copy: each task by the reference's tests, in a process of its own.

    python docs/assignments/grade.py COPY [--task 2_3 ...] [--assignment 2 ...] [--json FILE]
                                     [--gradescope FILE] [--timeout SECONDS] [--seed N]

For each task a tree is built from the reference, its tests included; only the task's module is
the student's, and in that the functions of the *other* tasks are the reference's again. So a
student's helpers and imports stay, and what was not solved costs its own points and no others
(a module that cannot be imported costs those of all its tasks).
Whatever the student's code does, the exit status is 0 if there is a table; see isolated.py.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import isolated
from make import copy, program, project_files
from tasks import ROOT, Task, assigned, chosen, find, load, swap

TIMEOUT = 60.0  # seconds for a task; the slowest of the reference takes less than 2


@dataclass
class Grade:
    """A row of the table; `result` is a `Result.status`, "not attempted" or "missing"."""

    task: str
    title: str
    module: str
    function: str
    points: int
    earned: int
    result: str
    message: str
    seconds: float


def tree_files() -> list[str]:
    """What the tests need of the project."""
    kept = ("ssis/", "tests/", "train.py", "evaluate.py", "pyproject.toml")
    # The listed tests also where git does not know them: an instructor's hidden ones.
    extra = {test.split("::")[0] for task in load() for test in task.tests}
    extra |= {"docs/assignments/tasks.toml"}
    return sorted(extra | {name for name in project_files() if name.startswith(kept)})


def submitted(text: str, task: Task, tasks: list[Task]) -> str:
    """The student's module, with the reference's functions for all tasks but this one.

    A text that is not Python stays as it is; the import of it will say why.
    """
    reference = (ROOT / task.module).read_text(encoding="utf-8")
    try:
        for other in tasks:
            if other.module == task.module and other.id != task.id:
                text = swap(text, other.function, reference)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    return text


def try_module(
    task: Task, text: str, files: list[str], timeout: float, seed: int = 0, first: bool = True
) -> isolated.Result:
    """Run a task's tests on the reference with another text of the task's module."""
    with tempfile.TemporaryDirectory(prefix="ssis-task-") as folder:
        copy(Path(folder), files, {task.module: text})
        return isolated.run(Path(folder), task.module, task.tests, timeout, seed, first)


def grade(folder: Path, task: Task, tasks: list[Task], files, timeout: float, seed: int) -> Grade:
    """One task of a student's copy."""
    row = Grade(task.id, task.title, task.module, task.function, task.points, 0, "missing", "", 0)
    path = folder / task.module
    if not path.is_file():
        row.message = f"{task.module} is not in the copy"
        return row
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    try:
        if find(text, task.function) is None and not assigned(text, task.function):
            row.message = f"{task.module} has no {task.function}"
            return row
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    result = try_module(task, submitted(text, task, tasks), files, timeout, seed)
    row.result, row.message, row.seconds = result.status, result.message, round(result.seconds, 2)
    if row.result == "passed":
        row.earned = task.points
    if f"NotImplementedError: {task.error}" in row.message:
        row.result, row.message = "not attempted", ""
    return row


def table(rows: list[Grade]) -> str:
    """The rows as text, with their sum."""
    lines = [f"{'task':5} {'title':36} {'points':>7}  result"]
    for row in rows:
        said = row.result + (f": {row.message}" if row.message else "")
        lines.append(f"{row.task:5} {row.title:36} {row.earned:>3}/{row.points:<3}  {said}")
    return "\n".join([*lines, "{:5} {:36} {earned:>3}/{points:<3}".format("", "sum", **sums(rows))])


def sums(rows: list[Grade]) -> dict[str, int]:
    """The points earned, and how many there were to earn."""
    return dict(earned=sum(row.earned for row in rows), points=sum(row.points for row in rows))


def gradescope(rows: list[Grade]) -> dict:
    """Gradescope's `results.json` (https://gradescope-autograders.readthedocs.io, specs)."""
    tests = [
        dict(
            name=f"{row.task} {row.title} ({row.function})",
            number=row.task.replace("_", "."),
            score=row.earned,
            max_score=row.points,
            status="passed" if row.result == "passed" else "failed",
            output=row.result + (f": {row.message}" if row.message else ""),
        )
        for row in rows
    ]
    return dict(execution_time=round(sum(row.seconds for row in rows)), tests=tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("copy", type=Path, help="the student's copy, as make.py made it")
    parser.add_argument("--task", nargs="+", metavar="ID", help="only these")
    parser.add_argument("--assignment", nargs="+", type=int, metavar="N", help="only theirs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the table as JSON")
    parser.add_argument("--gradescope", type=Path, metavar="FILE", help="as its results.json")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for a task")
    parser.add_argument("--seed", type=int, default=0, help="of what the tests draw")
    args = parser.parse_args()
    if not (args.copy / "ssis").is_dir():
        raise ValueError(f"{args.copy}: not a student's copy, there is no folder ssis in it")
    if not args.timeout > 0:
        raise ValueError(f"--timeout {args.timeout:g}: must be above 0")
    tasks, files = load(), tree_files()
    rows = [
        grade(args.copy, task, tasks, files, args.timeout, args.seed)
        for task in chosen(tasks, args.task, args.assignment)
    ]
    print(table(rows))
    for path, content in (
        (args.json, sums(rows) | dict(tasks=[asdict(row) for row in rows])),
        (args.gradescope, gradescope(rows)),
    ):
        if path:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    program(main)
