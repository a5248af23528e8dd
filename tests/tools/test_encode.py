"""`python -m ssis sam encode`: all embeddings once, on all processes, before the runs."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers import dataset_of

from ssis import UserError, sam
from ssis.datasets import coco_json
from ssis.io.embeddings import Embeddings
from ssis.tools import encode

FLAGS = ["--method", "s4m", "--sam", "tiny", "--device", "cpu"]


def test_two_processes_encode_each_image_once_and_go_on(shapes_folder, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["-m", "ssis", "sam", "encode", *FLAGS, *dataset_of(shapes_folder)]
    command += ["--sam-cache", str(tmp_path)]

    def call() -> str:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    said = call()
    assert "40 images, 0.049 MB each, 0.0 GB" in said
    assert all(f"process {k}: 20 encoded, the others were there" in said for k in (0, 1))
    entries = sorted(tmp_path.glob("*.sam"))
    assert len(entries) == 40
    # Stopped before its end: what is there stays.
    for entry in entries[:3]:
        entry.unlink()
    again = call()
    assert sum(int(k) for k in re.findall(r": (\d+) encoded", again)) == 3
    train_set = coco_json.load_coco(
        f"{shapes_folder}/instances_train.json", f"{shapes_folder}/train"
    )
    cache = Embeddings(sam.SegmentAnything("tiny", "", "cpu"), train_set, str(tmp_path))
    assert cache[0].shape == cache[39].shape and cache.encoded == 0
    assert entries[0].stat().st_size == cache.sam.entry_bytes


def test_what_cannot_be_kept_is_refused(shapes_folder, tmp_path):
    flags = [*FLAGS, *dataset_of(shapes_folder)]
    with pytest.raises(UserError, match="sam encode: give the flags of the run"):
        encode.run(flags)
    flags += ["--sam-cache", str(tmp_path)]
    with pytest.raises(UserError, match="a --method that asks SAM"):
        encode.run([*flags, "--method", "pl-dc"])
    with pytest.raises(UserError, match=r"--sam-cache-gb 0\.001: too small; give 1"):
        encode.run([*flags, "--sam-cache-gb", "0.001"])
    assert not list(tmp_path.iterdir())
    # Another dataset's embeddings take the room: what fits is kept, and the user told.
    (tmp_path / "other.sam").write_bytes(bytes(2_000_000))
    with pytest.raises(UserError, match="full, what there is stays; give another"):
        encode.run([*flags, "--sam-cache-gb", "0.0025"])
    assert 5 < len(list(tmp_path.glob("*.sam"))) < 15


def test_a_run_says_when_not_all_embeddings_can_be_kept(tmp_path):
    tiny = sam.SegmentAnything("tiny", "", "cpu")
    many = range(117_266)
    line = Embeddings(tiny, many, memory_gb=1000 * tiny.entry_bytes / 1e9).shortage()
    assert line.startswith(
        "SAM's embeddings of 1,000 of 117,266 images can be kept (0.049 MB each)"
    )
    enough = 117_266 * tiny.entry_bytes / 1e9
    assert f"--sam-cache-gb {int(enough) + 1}" in line and "ssis sam encode" in line
    assert not Embeddings(tiny, many, str(tmp_path), cache_gb=enough + 1).shortage()
