"""Saving: atomic under a real failure of writing, refusing what is not a checkpoint."""

import pickle
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from ssis import UserError, checkpoint, model

pytestmark = pytest.mark.fast

STATE = dict(config={}, names=["a"], student={}, teacher={}, weights=torch.arange(1000.0))

# The operating system refuses to write more than 20,000 bytes: a full disk.
FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from ssis import UserError, checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoint.save(Path(sys.argv[1]), dict(config={}, names=["b"], weights=torch.zeros(100_000)))
except UserError as error:
    print(error)
"""


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path / "c.pt", STATE)
    assert torch.equal(checkpoint.load(tmp_path / "c.pt")["weights"], STATE["weights"])
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, STATE)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert "cannot be written" in done.stdout and "the one before is kept" in done.stdout
    assert len(done.stdout.splitlines()) == 1, done.stderr
    assert torch.equal(checkpoint.load(path)["weights"], STATE["weights"])
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def spoil(path, how):
    checkpoint.save(path, STATE)
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("hello")
    elif how == "another's":
        torch.save({"model": torch.zeros(2)}, path)
    elif how == "newer":
        torch.save(dict(STATE, format=99), path)
    elif how == "with code":
        with open(path, "wb") as file:
            pickle.dump(subprocess.Popen, file)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "another's", "newer", "with code"])
def test_what_is_no_checkpoint_is_one_line(tmp_path, how):
    spoil(tmp_path / "c.pt", how)
    with pytest.raises(UserError) as caught:
        checkpoint.load(tmp_path / "c.pt")
    assert str(tmp_path / "c.pt") in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path):
    net = model.build_small(4, 64, 64)
    other = model.build_small(5, 64, 64)
    with pytest.raises(UserError, match=r"checkpoint of another model: 'roi_heads"):
        checkpoint.load_weights(net, other.state_dict(), tmp_path / "c.pt")
