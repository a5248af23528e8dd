"""`python -m ssis`: the list of commands, each command's help, and one line for a wrong name.

In this process, as `python -m` would run it; only the list is asked of a new one, which must not
load torch for it.
"""

import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

from ssis import __main__ as cli

pytestmark = pytest.mark.fast


def status_of(monkeypatch, *argv) -> int:
    """The exit status of `python -m ssis ARGV`."""
    monkeypatch.setattr(sys, "argv", ["ssis", *argv])
    # Imported above; `python -m` starts without it.
    monkeypatch.delitem(sys.modules, "ssis.__main__")
    try:
        runpy.run_module("ssis", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_without_a_command_there_is_a_line_for_each(monkeypatch, capsys, argv):
    assert status_of(monkeypatch, *argv) == 0
    said = capsys.readouterr().out
    for name, (_, words) in cli.COMMANDS.items():
        assert f"  {name:<10} {words}\n" in said
    assert "python train.py --help" in said


def test_the_list_needs_no_torch():
    script = "import runpy, sys; runpy.run_module('ssis', run_name='__main__')\n"
    script += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m ssis COMMAND")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_says_what_it_is_called(monkeypatch, capsys, name):
    assert status_of(monkeypatch, *name.split(), "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m ssis {name} ")


def test_a_command_that_is_not_there_is_one_line(monkeypatch, capsys):
    assert status_of(monkeypatch, "nonsense") == 2
    printed = capsys.readouterr()
    names = ", ".join(cli.COMMANDS)
    assert printed.err == f"error: no command 'nonsense'; there is {names}\n"
    assert printed.out == ""
