"""The rooms of ssis/: imports point one way, from the commands down to the files.

Read from the sources, imports within functions too. The checker itself is tried on imports that
it must refuse, one by one and in a made tree.
"""

import ast

import pytest
from conftest import ROOT

from ssis import __main__ as cli

pytestmark = pytest.mark.fast
# Room -> the rooms that it may import; "" is the method, flat in ssis/. Nobody imports the
# programs `train` and `evaluate`; `ssis.UserError` is everybody's.
ALLOWED = {
    "io": {"io"},
    "": {"", "io"},
    "datasets": {"", "io", "datasets"},
    "report": {"", "io", "datasets", "report"},
    "engine": {"", "io", "datasets", "report", "engine"},
    "tools": {"", "io", "datasets", "report", "engine", "tools"},
}


def imports_of(source: str) -> set[str]:
    """The names that a text imports, with dots: "ssis.losses.total", "train"."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(name: str) -> str:
    """ "engine" of "ssis.engine.session.open_session", "" of "ssis.losses.total"."""
    parts = name.split(".")
    return parts[1] if parts[1] in ALLOWED else ""


def refused(room: str, source: str) -> list[str]:
    """The imports of a file that its room may not have."""
    names = sorted(imports_of(source) - {"ssis.UserError"})
    programs = [name for name in names if name.split(".")[0] in ("train", "evaluate")]
    ours = [name for name in names if name.startswith("ssis.")]
    return programs + [name for name in ours if room_of(name) not in ALLOWED[room]]


def refused_in(folder) -> dict[str, list[str]]:
    """Path -> refused imports, of every file of a tree that has some."""
    result = {}
    for path in sorted(folder.rglob("*.py")):
        place = path.relative_to(folder)
        # The command line may import what its commands may.
        room = "tools" if path.name == "__main__.py" else str(place.parent).removeprefix(".")
        if names := refused(room, path.read_text(encoding="utf-8")):
            result[place.as_posix()] = names
    return result


@pytest.mark.parametrize(
    ("room", "source", "names"),
    [
        ("io", "from ssis import UserError\nimport torch", []),
        ("io", "from ssis import UserError, losses", ["ssis.losses"]),
        ("io", "import ssis.datasets.rle as r", ["ssis.datasets.rle"]),
        ("", "from ssis.io.files import whole\nfrom ssis import losses", []),
        ("", "from ssis import datasets", ["ssis.datasets"]),
        ("", "def f():\n    from ssis.engine.guard import Guard", ["ssis.engine.guard.Guard"]),
        ("datasets", "from ssis import data\nfrom ssis.datasets import rle", []),
        ("datasets", "from ssis.report import ap", ["ssis.report.ap"]),
        ("report", "import ssis.engine.guard", ["ssis.engine.guard"]),
        ("engine", "from ssis.report import ap\nfrom ssis.engine import guard", []),
        ("engine", "if True:\n    from ssis.tools import study", ["ssis.tools.study"]),
        ("tools", "from ssis.engine import build\nfrom ssis.tools import study", []),
        ("tools", "import evaluate\nfrom train import step", ["evaluate", "train.step"]),
    ],
)
def test_the_checker_refuses_what_it_must(room, source, names):
    assert refused(room, source) == names


def test_the_checker_reads_a_whole_tree(tmp_path):
    for name, source in {
        "losses.py": "from ssis.tools import study",
        "filters.py": "from ssis import losses",
        "__main__.py": "from ssis.tools import study\nimport train",
        "io/files.py": "from ssis import losses",
        "io/images.py": "from ssis import UserError",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    assert refused_in(tmp_path) == {
        "__main__.py": ["train"],
        "io/files.py": ["ssis.losses"],
        "losses.py": ["ssis.tools.study"],
    }


def test_imports_point_one_way():
    assert refused_in(ROOT / "ssis") == {}


def test_only_the_command_line_imports_by_name():
    """Such an import could not be read from the source."""
    users = {
        path.name
        for path in (ROOT / "ssis").rglob("*.py")
        if "import_module" in path.read_text(encoding="utf-8")
    }
    assert users == {"__main__.py"}
    for module, _ in cli.COMMANDS.values():
        assert (ROOT / "ssis" / f"{module.replace('.', '/')}.py").is_file()


def test_the_method_lies_flat_and_nothing_else_does():
    flat = {path.stem for path in (ROOT / "ssis").glob("*.py")} - {"__init__", "__main__"}
    assert flat == set(
        "alignment augment calibration clip config copy_paste correction data distributed filters "
        "imagenet inference losses model networks optimizer presets prototypes refine sam "
        "sam_distill targets teacher".split()
    )
    folders = {path.name for path in (ROOT / "ssis").iterdir() if path.is_dir()}
    assert folders - {"__pycache__", ".ruff_cache"} == set(ALLOWED) - {""}
