"""Saving: atomic under a real failure of writing, refusing what is not a checkpoint, going
back to the one before a damaged one."""

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from ssis import UserError, config, networks
from ssis.engine import resume
from ssis.io import checkpoint


STATE = dict(config={}, names=["a"], student={}, teacher={}, weights=torch.arange(1000.0))

# The operating system refuses to write more than 20,000 bytes: a full disk.
FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from ssis import UserError
from ssis.io import checkpoint
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


def test_a_failed_write_leaves_the_old_one_and_no_rubbish(tmp_path, monkeypatch):
    """The write breaks off in the middle, as a full disk makes it."""
    path = tmp_path / "c.pt"

    def broken(state, path):
        path.write_bytes(b"half of it")
        raise RuntimeError("unexpected pos 64 vs 0\nmore of the writer's text")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(UserError, match=r"cannot be written .unexpected pos 64.*none yet"):
        checkpoint.save(path, STATE)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    checkpoint.save(path, STATE)
    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(UserError, match="the one before is kept"):
        checkpoint.save(path, dict(STATE, names=["b"]))
    assert checkpoint.load(path)["names"] == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_the_data_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    """A power cut between the two must not leave a complete name on an empty file."""
    path, sync = tmp_path / "c.pt", os.fsync
    checkpoint.save(path, STATE)
    seen = []

    def spy(file):
        # What is forced to disk is the whole of the new file; the name is still the old one's.
        seen.append((os.fstat(file).st_size, checkpoint.load(path)["names"]))
        sync(file)

    monkeypatch.setattr(os, "fsync", spy)
    checkpoint.save(path, dict(STATE, names=["b"]))
    assert (path.stat().st_size, ["a"]) in seen
    assert checkpoint.load(path)["names"] == ["b"]


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


def test_any_changed_bit_is_found(tmp_path):
    """PyTorch's own reader notices none of them."""
    path = tmp_path / "c.pt"
    checkpoint.save(path, dict(STATE, weights=torch.randn(50_000)))
    data, rng = path.read_bytes(), np.random.RandomState(0)
    for _ in range(60):
        wrong = bytearray(data)
        # The middle half of the file is the tensor.
        place = rng.randint(len(data) // 4, 3 * len(data) // 4)
        wrong[place] ^= 1 << rng.randint(8)
        path.write_bytes(wrong)
        torch.load(path, weights_only=True)
        with pytest.raises(UserError, match=r"c.pt: damaged .checksum of "):
            checkpoint.load(path)


def test_the_one_before_is_kept_and_gone_back_to(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    assert checkpoint.latest(path) is None
    for step in range(3):
        checkpoint.save(path, dict(STATE, step=step))
        assert checkpoint.latest(path) == path
    before = checkpoint.previous(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [before.name, path.name]
    assert (checkpoint.load(path)["step"], checkpoint.load(before)["step"]) == (2, 1)
    assert capsys.readouterr().err == ""

    # Killed between the two renames; damaged; cut off.
    whole = path.read_bytes()
    for content, said in ((None, "missing"), (whole[:900] + b"?" + whole[901:], ""), (b"PK", "")):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        assert checkpoint.latest(path) == before
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: {path}: ") and said in line
        assert f"the one before it is {before}; going on from it" in line
    # Neither: never from the beginning without a word.
    before.write_bytes(b"")
    with pytest.raises(UserError, match="none to go on from; give --resume never") as caught:
        checkpoint.latest(path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path):
    net = networks.build_small(4, 64, 64)
    other = networks.build_small(5, 64, 64)
    with pytest.raises(UserError, match=r"checkpoint of another model: 'roi_heads"):
        checkpoint.load_weights(net, other.state_dict(), tmp_path / "c.pt")


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    state = dict(format=1, config={}, names=["a"], step=9, student={}, teacher={})
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(UserError, match="format 1, this version reads 2; use the version that"):
        checkpoint.load(tmp_path / "c.pt")


def test_half_of_a_supervised_run_is_no_first_teacher():
    """Its learning rate would have fallen later, although the number of steps is the same."""
    supervised = dataclasses.asdict(config.parse(["--method", "supervised"]))
    now = config.parse([])
    saved = dict(format=2, random=[], step=now.pretrain_steps, config=supervised)
    with pytest.raises(UserError, match=r"saved after step \d+, not at the end of pretraining"):
        resume.check_same_run(Path("a.pt"), saved, {}, now, ["thing"], True)
