"""The rooms of ssis/: imports point one way, from the commands down to the files.

Read from the sources, imports within functions too. The checker itself is tried on imports that
it must refuse.
"""

import ast

import pytest
from conftest import ROOT

pytestmark = pytest.mark.fast
# Room -> the rooms that it may import; "" is the method, flat in ssis/.
ALLOWED = {
    "io": {"io"},
    "": {"", "io"},
    "datasets": {"", "io", "datasets"},
    "report": {"", "io", "datasets", "report"},
    "engine": {"", "io", "datasets", "report", "engine"},
    "tools": {"", "io", "datasets", "report", "engine", "tools"},
}


def imported(source: str) -> set[str]:
    """The modules that a text imports, with dots: "ssis.engine.session", "train"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str:
    """ "engine" of "ssis.engine.session.open_session", "" of "ssis.losses.total"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else ""


def wrong(room: str, source: str) -> list[str]:
    """Imports of a file that its room may not have."""
    bad = []
    for module in sorted(imported(source)):
        if module.split(".")[0] in ("train", "evaluate"):
            bad.append(module)
        elif module.startswith("ssis.") and module != "ssis.UserError":
            bad += [module] if room_of(module) not in ALLOWED[room] else []
    return bad


def test_the_checker_refuses_what_it_must():
    assert wrong("io", "from ssis import UserError") == []
    assert wrong("io", "from ssis import losses") == ["ssis.losses"]
    assert wrong("", "def f():\n    from ssis.engine.session import Session")
    assert wrong("", "from ssis.io.files import whole\nfrom ssis import losses") == []
    assert wrong("report", "import ssis.engine.guard") == ["ssis.engine.guard"]
    assert wrong("tools", "import evaluate") == ["evaluate"]
    assert wrong("tools", "from train import build") == ["train.build"]


def test_imports_point_one_way():
    for path in (ROOT / "ssis").rglob("*.py"):
        room = path.parent.name if path.parent.name != "ssis" else ""
        # The command line, which loads a command when it is asked for.
        if path.name != "__main__.py":
            assert wrong(room, path.read_text(encoding="utf-8")) == [], path


def test_the_method_lies_flat_and_nothing_else_does():
    flat = {path.stem for path in (ROOT / "ssis").glob("*.py")} - {"__init__", "__main__"}
    assert flat == set(
        "augment clip config correction data distributed filters losses model optimizer presets "
        "refine sam sam_distill teacher".split()
    )
    folders = {path.name for path in (ROOT / "ssis").iterdir() if path.is_dir()}
    assert folders - {"__pycache__", ".ruff_cache"} == set(ALLOWED) - {""}
