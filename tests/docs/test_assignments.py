"""The graded assignments: the list of tasks, the student's copy, the grader, and the proof.

The proof (docs/assignments/check.py) runs in whole: for every task the reference passes, the
stub fails with its own error, and each wrong solution fails. The grader meets students whose
code hangs, leaves, crashes, prints without end, or is no Python.
"""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

HERE = ROOT / "docs" / "assignments"
# Its programs are started as a user starts them; only the reading of the list is borrowed.
sys.path.insert(0, str(HERE))
import tasks as task_list  # noqa: E402

sys.path.remove(str(HERE))

TASKS = task_list.load()
RAW = task_list.tomllib.loads((HERE / "tasks.toml").read_text("utf-8"))
CONCEPTS = "model teacher inference filters correction prototypes losses augment copy_paste"
CONCEPTS += " refine sam_distill targets datasets/split io/checkpoint distributed"


def program(name: str, *arguments, status: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1800)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The student's copy."""
    out = tmp_path_factory.mktemp("course") / "copy"
    assert f"{len(TASKS)} functions to write" in program("make.py", out).stdout
    return out


def solve(copy: Path, *ids: str) -> None:
    """Put the reference's functions into a copy."""
    for task in TASKS:
        if task.id in ids:
            path = copy / task.module
            reference = (ROOT / task.module).read_text("utf-8")
            path.write_text(task_list.swap(path.read_text("utf-8"), task.function, reference))


@pytest.mark.fast
def test_the_list_of_tasks_is_whole():
    assert len(TASKS) >= 12 and len(RAW["open"]) == 3
    assert {f"ssis/{name}.py" for name in CONCEPTS.split()} == {task.module for task in TASKS}
    ids = [task.id for task in TASKS]
    expected = [
        f"{entry['id']}_{k}"
        for entry in RAW["assignment"]
        for k in range(1, sum(t.assignment == entry["id"] for t in TASKS) + 1)
    ]
    assert ids == expected
    for task in TASKS:
        assert task.points == dict(easy=2, medium=4, hard=8)[task.level]
        # What a task needs comes before it.
        assert all(ids.index(need) < ids.index(task.id) for need in task.needs)
        # The equation is spelled as the module spells it.
        assert task.equation in (ROOT / task.module).read_text("utf-8"), task.id
        assert task_list.find((ROOT / task.module).read_text("utf-8"), task.function)


@pytest.mark.fast
def test_every_listed_test_exists_and_nothing_is_marked_elsewhere():
    for task in TASKS:
        assert task.tests
        for test in task.tests:
            path, name = test.split("::")
            text = (ROOT / path).read_text("utf-8")
            assert task_list.find(text, name), f"tasks.toml, {task.id}: {test} does not exist"
    for path in (*ROOT.glob("ssis/**/*.py"), *ROOT.glob("tests/*/test_*.py")):
        assert "mark.task" not in path.read_text("utf-8").replace('"mark.task" not', "")


@pytest.mark.fast
def test_each_task_has_three_or_four_wrong_solutions():
    wrongs = task_list.tomllib.loads((HERE / "wrong.toml").read_text("utf-8"))["wrong"]
    names = [(wrong["task"], wrong["name"]) for wrong in wrongs]
    assert len(set(names)) == len(names)
    for task in TASKS:
        assert 3 <= sum(wrong["task"] == task.id for wrong in wrongs) <= 4, task.id


@pytest.mark.fast
def test_handouts_name_their_tasks_with_points_and_commands():
    for entry in RAW["assignment"]:
        text = (HERE / entry["handout"]).read_text("utf-8")
        assert text.startswith(f"# Assignment {entry['id']}: {entry['title']}\n")
        assert re.search(r"^\*Time\*: \d to \d hours.* \*You need\*: ", text, re.M | re.S)
        for heading in ("## You will learn", "## Read", "## Tasks", "## Questions"):
            assert heading in text, (entry["handout"], heading)
        for task in (task for task in TASKS if task.assignment == entry["id"]):
            head = f"### {task.id} {task.title[0].upper()}{task.title[1:]} ({task.points} points)"
            assert head in text, head
            section = text.split(head)[1].split("\n### ")[0].split("\n## ")[0]
            assert f"`{task.function}`" in section and f"`{task.module}`" in section, task.id
            assert task.equation in section, task.id
            assert f"python -m pytest -m task{task.id}`" in section, task.id
            needs = re.findall(r"Needs ([\d_,\sand]+)\.", section)
            assert sorted(re.findall(r"\d_\d", " ".join(needs))) == sorted(task.needs), task.id
        for work in (work for work in RAW["open"] if work["assignment"] == entry["id"]):
            assert f"### Open: {work['title']} ({work['points']} points)" in text
    for path in HERE.glob("*.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text("utf-8")):
            assert (path.parent / link).exists(), (path.name, link)
    index = (HERE / "README.md").read_text("utf-8")
    assert f"{len(TASKS)} graded tasks, {sum(task.points for task in TASKS)} points" in index


@pytest.mark.fast
def test_the_copy_lacks_the_bodies_and_nothing_else(made):
    """Without the tasks' functions, and links, both are the same; and docstrings stay."""
    by_module: dict = {}
    for task in TASKS:
        by_module.setdefault(task.module, []).append(task)
    for path in sorted(made.rglob("*")):
        name = path.relative_to(made).as_posix()
        if path.is_dir() or name in by_module:
            continue
        texts = [(folder / name).read_bytes() for folder in (ROOT, made)]
        if path.suffix == ".md":
            # All words of it; what became of the links is tested below.
            plain = rb"!?\[([^][]*)\]\([^()\s]+\)| \(not in this copy\)"
            texts = [re.sub(plain, rb"\1", text) for text in texts]
        assert texts[0] == texts[1], name
    for module, tasks in by_module.items():
        texts = [(folder / module).read_bytes().decode() for folder in (ROOT, made)]
        for task in tasks:
            ours, theirs = (task_list.find(text, task.function) for text in texts)
            assert ast.get_docstring(ours) == ast.get_docstring(theirs)
            assert ast.unparse(ours.args) == ast.unparse(theirs.args)
            assert list(map(ast.dump, ours.decorator_list)) == list(
                map(ast.dump, theirs.decorator_list)
            )
            body = theirs.body[ast.get_docstring(theirs) is not None :]
            assert [ast.unparse(line) for line in body] == [
                f"raise NotImplementedError({task.error!r})"
            ]
            # No comment of the solution is left either.
            last = task_list.lines_of(theirs).stop
            assert "raise NotImplementedError" in texts[1].splitlines()[last - 1]
            assert "#" not in texts[1].splitlines()[last - 2]
        for task in tasks:
            texts[1] = task_list.swap(texts[1], task.function, texts[0])
        assert texts[0] == texts[1], module
    for name in ("wrong.toml", "instructors.md", "check.py", "grade.py", "make.py", "tasks.py"):
        assert not (made / "docs" / "assignments" / name).exists()
    for name in (
        "docs/results",
        "docs/walk.md",
        "docs/walk",
        "runs",
        "tests/docs/test_assignments.py",
    ):
        assert not (made / name).exists()
    assert (made / "docs" / "assignments" / "02_filters.md").exists()


@pytest.mark.fast
def test_the_copys_pages_have_no_dead_links(made):
    stubs = {str((made / task.module).resolve()) for task in TASKS}
    for page in made.rglob("*.md"):
        for target in re.findall(r"\]\(([^()\s]+)\)", page.read_text("utf-8")):
            name, _, place = target.partition("#")
            if name and "://" not in name:
                path = (page.parent / name).resolve()
                assert path.exists(), (page, target)
                # A line of a file with stubs is not the line that is meant.
                assert not (place and str(path) in stubs), (page, target)
    assert "docs/walk.md (not in this copy)" in (made / "README.md").read_text("utf-8")


@pytest.mark.fast
def test_a_function_that_was_deleted_comes_back_for_the_other_tasks():
    other = "class A:\n    def f(self):\n        return 1\n\n\ndef g():\n    return 2\n"
    text = "class A:\n    x = 1\n\n\nh = lambda: 3\n"
    for name in ("A.f", "g"):
        text = task_list.swap(text, name, other)
    space: dict = {}
    exec(compile(text, "module", "exec"), space)
    assert space["A"]().f() == 1 and space["g"]() == 2 and space["A"].x == 1
    assert task_list.swap("x = 1\n", "A.f", other) == "x = 1\n"
    assert task_list.assigned(text, "h") and not task_list.assigned(text, "g")


@pytest.mark.fast
def test_a_copy_can_be_of_some_assignments_alone(tmp_path):
    out = tmp_path / "copy"
    assert "6 functions to write" in program("make.py", out, "--assignment", 2, 4).stdout
    for task in TASKS:
        text = (out / task.module).read_text("utf-8")
        assert (f'("{task.error}")' in text) == (task.assignment in (2, 4))


@pytest.mark.fast
def test_a_folder_with_something_in_it_is_not_written_to(tmp_path):
    (tmp_path / "mine").write_text("mine")
    done = program("make.py", tmp_path, status=2)
    assert done.stderr == f"error: {tmp_path}: is there and not an empty folder; give another\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_marker_turns_from_red_to_green(made, tmp_path):
    """The student's own command, in the copy."""
    mine = shutil.copytree(made, tmp_path / "copy")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider"]

    def run(*arguments) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *arguments], cwd=mine, capture_output=True, text=True, timeout=300
        )

    red = run("-m", "task2_2")
    assert red.returncode == 1 and re.search(r"^1 failed, \d+ deselected", red.stdout, re.M)
    assert (
        "NotImplementedError: task 2_2: PL-DC Eq. (init), "
        "see docs/assignments/02_filters.md" in red.stdout
    )
    solve(mine, "2_2")
    green = run("-m", "task2_2", "tests/method/test_filters.py")
    assert green.returncode == 0 and "1 passed" in green.stdout, green.stdout


def test_what_a_student_hands_in(made, tmp_path):
    """Packed by the copy's own program, solved or not, and graded as it comes."""
    mine = shutil.copytree(made, tmp_path / "copy")
    solve(mine, "2_1", "2_2")
    command = [sys.executable, "docs/assignments/submit.py"]
    done = subprocess.run([*command, "2"], cwd=mine, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    words = [line.split()[-2:] for line in done.stdout.splitlines()]
    assert [w[-1] for w in words[:3]] == ["passed", "passed", "yet"]
    assert "6 of 10 points; to hand in: assignment2.zip (ssis/filters.py)" in done.stdout
    with zipfile.ZipFile(mine / "assignment2.zip") as packed:
        assert packed.namelist() == ["ssis/filters.py"]
        packed.extractall(tmp_path / "handed-in")
    out = program("grade.py", tmp_path / "handed-in", "--assignment", 2).stdout
    assert "6/10" in out and "not attempted" in out
    wrong = subprocess.run([*command, "9"], cwd=mine, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr == "error: no assignment 9; there are 1 to 7\n"
    nowhere = subprocess.run(
        [*command, "2", "--out", "no/x.zip"], cwd=mine, capture_output=True, text=True
    )
    assert nowhere.returncode == 2 and nowhere.stderr == "error: --out no/x.zip: no such folder\n"
    (mine / "ssis" / "filters.py").unlink()
    lost = subprocess.run([*command, "2"], cwd=mine, capture_output=True, text=True)
    assert lost.returncode == 2 and lost.stderr.startswith("error: ssis/filters.py: not there")


@pytest.mark.fast
def test_a_loop_without_end_is_not_yet(monkeypatch):
    """Tests that are not done in time; here, any are."""
    spec = importlib.util.spec_from_file_location("submit", HERE / "submit.py")
    submit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(submit)
    monkeypatch.setattr(submit, "LIMIT", 0.1)
    assert not submit.passes(submit.tasks([2])[0])


MISHAPS = {
    # task -> what the student wrote in place of the body
    "1_3": "return boxes",
    "2_1": "while True: pass",
    "2_2": "import os; os._exit(0)",
    "2_3": "import sys; sys.exit()",
    "3_1": "import ctypes; ctypes.string_at(0)",
    "3_2": "raise KeyboardInterrupt",
    "4_1": "while True: print('x' * 1000, flush=True)",
    "4_2": "import pytest; pytest.exit('done', returncode=0)",
    "4_3": "import torch; return torch.zeros(10**12)",
    "6_1": "return ((",
}
EXPECTED = {
    "1_1": ("passed", ""),
    "1_2": ("not attempted", ""),
    "1_3": ("failed", "test_detections_are_torchvisions_with_the_whole_distribution: "),
    "2_1": ("timed out", "not ended after 4 seconds"),
    "2_2": ("crashed", "the process ended before its tests (exit status 0)"),
    "2_3": ("failed", "test_adaptive_thresholds_by_hand: SystemExit"),
    "3_1": ("crashed", "the process ended before its tests (SIGSEGV)"),
    "3_2": ("failed", "not all of the tests were run to their end"),
    "4_1": ("timed out", "not ended after 4 seconds"),
    "4_2": ("failed", "not all of the tests were run to their end"),
    "4_3": ("failed", "test_on_one_process_the_total_is_the_plain_sum: RuntimeError: "),
    "5_3": ("crashed", "the process ended before its tests (exit status 0)"),
    "6_1": ("cannot be imported", "SyntaxError: "),
    "6_2": ("not attempted", ""),
    "6_5": ("cannot be imported", "SyntaxError: "),
    "7_1": ("missing", "ssis/model.py has no CountingSampler.__call__"),
    "7_3": ("missing", "ssis/datasets/split.py is not in the copy"),
}


def test_no_student_stops_the_grader(made, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    solve(copy, "1_1")
    for task in TASKS:
        path = copy / task.module
        if task.id in MISHAPS:
            text, line = path.read_text("utf-8"), f'raise NotImplementedError("{task.error}")'
            assert text.count(line) == 1
            path.write_text(text.replace(line, MISHAPS[task.id]))
    (copy / "ssis" / "datasets" / "split.py").unlink()
    with open(copy / "ssis" / "sam_distill.py", "ab") as file:
        file.write(b"CAFE = 'caf\xe9'\n")
    model = copy / "ssis" / "model.py"
    model.write_text(model.read_text("utf-8").replace("def __call__", "def call"))
    paste = copy / "ssis" / "copy_paste.py"
    paste.write_text(paste.read_text("utf-8") + "\nimport os\nos._exit(0)\n")
    outputs = ["--json", tmp_path / "a.json", "--gradescope", tmp_path / "results.json"]
    done = program("grade.py", copy, "--timeout", 4, *outputs, "--task", *EXPECTED)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["earned"] == 2 and [row["task"] for row in found["tasks"]] == list(EXPECTED)
    for row in found["tasks"]:
        result, message = EXPECTED[row["task"]]
        assert (row["result"], row["message"][: len(message)]) == (result, message), row
        assert row["earned"] == (2 if row["task"] == "1_1" else 0) and "\n" not in row["message"]
        assert re.search(
            rf"^{row['task']} .+{row['earned']}/{row['points']} +{result}", done.stdout, re.M
        )
    points = sum(task.points for task in TASKS if task.id in EXPECTED)
    assert done.stdout.splitlines()[-1].split() == ["sum", f"2/{points}"]
    assert found["points"] == points
    sent = json.loads((tmp_path / "results.json").read_text())["tests"]
    assert [test["score"] for test in sent] == [2] + [0] * 16
    assert sum(test["max_score"] for test in sent) == points
    assert [test["status"] for test in sent] == ["passed"] + ["failed"] * 16
    assert sent[0]["name"] == "1_1 the quality of a mask (mask_quality)"
    assert sent[3]["output"] == "timed out: not ended after 4 seconds"


def test_without_fork_the_grades_are_the_same(made, tmp_path):
    """As on systems that have none: a new Python for each task."""
    mine = shutil.copytree(made, tmp_path / "copy")
    solve(mine, "4_1")
    program_ = "import sys, isolated, grade; isolated.FORK = False; sys.exit(grade.main())"
    command = [sys.executable, "-c", program_, str(mine), "--task", "4_1"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "a.json")], cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a.json").read_text())["earned"] == 2


@pytest.mark.fast
def test_what_an_instructor_did_wrong_is_one_line(tmp_path):
    for arguments, said in (
        ([tmp_path], "not a student's copy, there is no folder ssis in it"),
        ([ROOT, "--task", "9_9"], "--task 9_9: there is none; see docs/assignments/tasks.toml"),
        ([ROOT, "--timeout", "0"], "--timeout 0: must be above 0"),
    ):
        done = program("grade.py", *arguments, status=2)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and line.endswith(said)


def test_every_task_is_proved():
    """The reference passes, the stub fails with its error, each wrong solution fails."""
    said = program("check.py").stdout
    claims = len(TASKS) * 2 + (HERE / "wrong.toml").read_text("utf-8").count("[[wrong]]")
    assert said.splitlines()[-1] == f"{claims} claims, 0 of them not true"
