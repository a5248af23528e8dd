"""Prove the assignments: the reference passes, the stub and every wrong solution fail.

    python docs/assignments/check.py [--task 2_3 ...] [--seed N]

For each task, with its tests as tasks.toml lists them:

* in the student's copy, with this task and those that it needs solved as the reference does,
  they pass: what was red can become green, in the order of the assignments;
* with the function's body taken out they fail, all with exactly its error and nothing else;
* with each of the wrong solutions of wrong.toml at least one fails. So this also measures
  the project's tests: a mistake that survives is a test that is missing.

A test has to fail honestly: a module that cannot be imported, a crash or a time limit proves
nothing. Exit status 1 if anything is not so.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import isolated
from grade import TIMEOUT, submitted, tree_files, try_module
from make import copy, program, stubs
from tasks import HERE, ROOT, Task, chosen, load, spoil, stub, tomllib, with_needs


def solved(task: Task, tasks: list[Task], files: list[str], seed: int) -> str:
    """Nothing if the tests pass in a student's copy with this and its needs solved."""
    done = with_needs(task, tasks)
    with tempfile.TemporaryDirectory(prefix="ssis-copy-") as folder:
        copy(Path(folder), files, stubs([t for t in tasks if t.id not in done]))
        result = isolated.run(Path(folder), task.module, task.tests, TIMEOUT, seed)
    return "" if result.status == "passed" else f"{result.status}: {result.message}"


def unsolved(task: Task, tasks: list[Task], files: list[str]) -> str:
    """Nothing if without the function's body the tests fail with the task's error alone."""
    text = submitted(stub(reference(task), task), task, tasks)
    result = try_module(task, text, files, TIMEOUT, first=False)
    if result.status != "failed" or not result.failures:
        return f"{result.status}: {result.message}"
    other = [said for _, said in result.failures if said != f"NotImplementedError: {task.error}"]
    return f"failed otherwise: {other[0]}" if other else ""


def mistaken(task: Task, wrong: dict, files: list[str], seed: int) -> str:
    """Nothing if a wrong solution fails, else what happened instead."""
    text = spoil(reference(task), task.function, wrong["old"], wrong["new"])
    result = try_module(task, text, files, TIMEOUT, seed)
    return "" if result.status == "failed" else f"{result.status} {result.message}".strip()


def reference(task: Task) -> str:
    return (ROOT / task.module).read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", metavar="ID", help="only these")
    parser.add_argument("--seed", type=int, default=0, help="of what the tests draw")
    args = parser.parse_args()
    tasks, files, bad, counted = load(), tree_files(), 0, 0
    wrongs = tomllib.loads((HERE / "wrong.toml").read_text(encoding="utf-8"))["wrong"]
    for task in chosen(tasks, args.task):
        found = {
            "the reference passes": solved(task, tasks, files, args.seed),
            "the stub fails with its error": unsolved(task, tasks, files),
        }
        for wrong in wrongs:
            if wrong["task"] == task.id:
                found[f"fails: {wrong['name']}"] = mistaken(task, wrong, files, args.seed)
        print(f"{task.id}  {task.title} ({task.module}, {task.function})")
        for claim, said in found.items():
            print(f"     {'NO ' if said else 'yes'} {claim}{': ' + said if said else ''}")
        sys.stdout.flush()
        bad, counted = bad + sum(map(bool, found.values())), counted + len(found)
    print(f"{counted} claims, {bad} of them not true")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    program(main)
