"""`python -m ssis`: the list of commands, each command's help, and one line for a wrong name."""

import subprocess
import sys

import pytest
from conftest import ROOT

from ssis import __main__ as cli

pytestmark = pytest.mark.fast


def test_without_a_command_there_is_a_line_for_each():
    done = subprocess.run([sys.executable, "-m", "ssis"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for name, (_, words) in cli.COMMANDS.items():
        assert f"  {name:<8} {words}\n" in done.stdout
    assert "python train.py --help" in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_says_what_it_is_called(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m ssis {name} ")


def test_a_command_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["pedict"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: no command 'pedict'; there is predict, ")
