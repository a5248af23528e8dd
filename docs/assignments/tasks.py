"""The tasks of tasks.toml, and the surgery on source code that the other programs here share.

A task is one function of the reference. Its body is taken out for the student's copy
(`stub`), put back for the proof that its tests then pass (`swap`), and spoiled for the proof
that they find mistakes (`spoil`). All of it works on lines, at positions that the `ast`
module gives, so that every other line of a file stays byte for byte what it was.
"""

import ast
import io
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Task:
    """One `[[task]]` of tasks.toml.

    Attributes:
        id: "2_3", the third task of assignment 2; its marker is `task2_3`.
        assignment: the number of the assignment.
        title: a few words.
        module: file of the reference, "ssis/filters.py".
        function: name in it, "keep" or "Thresholds.update".
        points: for all of its tests passed; there is nothing in between.
        level: "easy", "medium" or "hard".
        equation: as it is spelled in the module's docstring, or "".
        needs: ids of the tasks that its tests lean on, in the student's copy.
        tests: node ids, without the brackets of parameters.
        handout: file of the assignment's page.
    """

    id: str
    assignment: int
    title: str
    module: str
    function: str
    points: int
    level: str
    equation: str
    needs: tuple[str, ...]
    tests: tuple[str, ...]
    handout: str

    @property
    def error(self) -> str:
        """What the student's copy says in place of the function."""
        what = self.equation or self.title
        return f"task {self.id}: {what}, see docs/assignments/{self.handout}"


def load() -> list[Task]:
    """All graded tasks, in their order."""
    raw = tomllib.loads((HERE / "tasks.toml").read_text(encoding="utf-8"))
    handouts = {entry["id"]: entry["handout"] for entry in raw["assignment"]}
    return [
        Task(
            **{"equation": "", "handout": handouts[entry["assignment"]], **entry}
            | dict(tests=tuple(entry["tests"]), needs=tuple(entry.get("needs", ())))
        )
        for entry in raw["task"]
    ]


def chosen(tasks: list[Task], ids: list[str] | None, assignments=None) -> list[Task]:
    """Those of some ids or of some assignments; all tasks where neither is given.

    Raises:
        ValueError: there is no such task or assignment.
    """
    for names, known, flag in (
        (ids, {task.id for task in tasks}, "--task"),
        (assignments, {task.assignment for task in tasks}, "--assignment"),
    ):
        for name in names or ():
            if name not in known:
                raise ValueError(f"{flag} {name}: there is none; see docs/assignments/tasks.toml")
    if not ids and not assignments:
        return tasks
    return [t for t in tasks if t.id in (ids or ()) or t.assignment in (assignments or ())]


def with_needs(task: Task, tasks: list[Task]) -> set[str]:
    """The ids that must be solved for a task's tests to pass: its own and all it needs."""
    by_id, found, todo = {t.id: t for t in tasks}, set(), [task.id]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += by_id[name].needs
    return found


def find(text: str, name: str):
    """The node of a function or method, "keep" or "Thresholds.update"; None without one.

    Of several definitions the last counts, as it does for Python.

    Raises:
        SyntaxError: the text is not Python.
    """
    scope = ast.parse(text).body
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [node for node in scope if isinstance(node, kinds) and node.name == part]
        if not found:
            return None
        scope = found[-1].body
    return found[-1]


def assigned(text: str, name: str) -> bool:
    """Whether a module makes a function in another way: `keep = lambda ...`."""
    targets = [t for node in ast.parse(text).body for t in getattr(node, "targets", [])]
    return name in [getattr(target, "id", None) for target in targets]


def lines_of(node) -> slice:
    """Its lines, from the first decorator to the last line of the body."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return slice(first - 1, node.end_lineno)


def split(text: str) -> list[str]:
    """The lines of a text as Python counts them, with their ends."""
    # `splitlines` would also split at form feeds and Unicode's separators.
    return io.StringIO(text, newline="").readlines()


def stub(text: str, task: Task) -> str:
    """The module with one line in place of the function's body; the docstring stays."""
    node, lines = find(text, task.function), split(text)
    if ast.get_docstring(node) is not None:
        first = node.body[0].end_lineno
    else:
        first = node.body[0].lineno - 1
        # The comment above the first statement goes with it.
        while lines[first - 1].strip().startswith("#") or not lines[first - 1].strip():
            first -= 1
    space = " " * node.body[0].col_offset
    lines[first : node.end_lineno] = [f'{space}raise NotImplementedError("{task.error}")\n']
    return "".join(lines)


def swap(text: str, name: str, other: str) -> str:
    """The module with a function as it is in another text, which it gets if it lacks it.

    A method of a class that is not there is left out.
    """
    node, new = find(text, name), find(other, name)
    lines = split(text)
    inserted = split(other)[lines_of(new)]
    if node is None:
        home = find(text, name.rpartition(".")[0]) if "." in name else None
        if home or "." not in name:
            place = home.end_lineno if home else len(lines)
            lines[place:place] = ["\n", *inserted]
        return "".join(lines)
    # A file's last line may lack its end.
    if lines[lines_of(node)][-1].endswith("\n") and not inserted[-1].endswith("\n"):
        inserted[-1] += "\n"
    lines[lines_of(node)] = inserted
    return "".join(lines)


def spoil(text: str, name: str, old: str, new: str) -> str:
    """The module with a wrong solution.

    Raises:
        ValueError: `old` is not in the function, or more than once.
    """
    lines = split(text)
    place = lines_of(find(text, name))
    function = "".join(lines[place])
    if function.count(old) != 1:
        raise ValueError(f"{name}: {function.count(old)} places, not one, have {old!r}")
    lines[place] = [function.replace(old, new)]
    return "".join(lines)
