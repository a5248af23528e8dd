"""Bad days: kills at any moment, damaged checkpoints, full disks, dead processes, two machines.

Runs are those of test_train, started as programs. What must hold: at no moment is there no
checkpoint that can be loaded (once there was one), and in the end there is what an
uninterrupted run has, bit for bit (one process) or complete (several). SSIS_KILLS=25 kills
more often than the default.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import TINY, TWO, assert_same_end, command, dataset_of, launch

from ssis import UserError
from ssis.engine import loader
from ssis.io import checkpoint

KILLS = int(os.environ.get("SSIS_KILLS", 3))


@pytest.fixture(scope="module")
def whole(shapes_folder, tmp_path_factory):
    """An uninterrupted run: its folder, and its arguments without the folder."""
    folder = tmp_path_factory.mktemp("calm")
    arguments = [*dataset_of(shapes_folder), *TINY, "--checkpoint-every", "1"]
    # Two of them for each of two processes, or there is nobody to paste from.
    arguments += ["--labeled-batch", "4"]
    launch("train.py", *arguments, "--output", folder)
    return folder, arguments


def begin(*arguments, **more) -> subprocess.Popen:
    return subprocess.Popen(
        command("train.py", *arguments), cwd=ROOT, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, **more,
    )  # fmt: skip


def saved(folder) -> bool:
    return any(folder.glob("checkpoint*.pt"))


def test_killed_again_and_again_at_random_moments(whole, tmp_path, tmp_path_factory):
    folder, arguments = whole
    if KILLS > 3:
        # Longer, or it would be over before it has been killed so often.
        arguments = [*arguments, "--mutual-steps", 5 + 2 * KILLS]
        folder = tmp_path_factory.mktemp("long")
        launch("train.py", *arguments, "--output", folder)
    arguments = [*arguments, "--output", tmp_path]
    path, rng, kills, whole_runs = tmp_path / "checkpoint.pt", random.Random(0), 0, 0
    while kills < KILLS:
        process = begin(*arguments)
        # At any time while it starts; while it writes a checkpoint; in between.
        how, deadline = kills % 3, time.monotonic() + 120
        if how == 0:
            time.sleep(rng.uniform(0, 6))
        else:
            while process.poll() is None and not any(tmp_path.glob("checkpoint*.tmp")):
                assert time.monotonic() < deadline
        if how == 2:
            time.sleep(rng.uniform(0, 0.5))
        had = saved(tmp_path)
        process.kill()
        process.communicate()
        if process.returncode == 0:
            # The file that is being written lasts milliseconds, and a busy machine may look
            # too late, until the run is over. It must be right then; the next starts afresh.
            assert_same_end(folder, tmp_path)
            shutil.rmtree(tmp_path)
            whole_runs += 1
            assert whole_runs < 10
            continue
        kills += 1
        assert process.returncode == -signal.SIGKILL
        assert not had or checkpoint.latest(path) is not None
    launch("train.py", *arguments)
    assert_same_end(folder, tmp_path)
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == checkpoint.load(path)["step"] >= 12
    # What a kill left half written is replaced by the next write.
    assert not list(tmp_path.glob("checkpoint*.tmp"))


def test_a_loader_worker_that_dies(whole, tmp_path):
    """As the kernel kills it when memory is short: one line, and the run goes on after."""
    folder, arguments = whole
    process = begin(*arguments, "--output", tmp_path, "--workers", "1")
    while not (tmp_path / "checkpoint.previous.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "a loader worker died (DataLoader worker" in line and "fewer --workers" in line
    assert "Traceback" not in said
    launch("train.py", *arguments, "--output", tmp_path)
    assert_same_end(folder, tmp_path)


@pytest.mark.fast
def test_a_worker_killed_while_it_hands_over_a_batch_is_one_line_too():
    """Then PyTorch meets a connection that is reset before it hears of the worker's end."""
    with pytest.raises(
        UserError, match=r"a loader worker died .DataLoader worker: .*reset by peer"
    ):
        with loader.dead_workers():
            raise ConnectionResetError(104, "Connection reset by peer")
    with pytest.raises(
        UserError, match=r"a loader worker died .DataLoader worker: end of its data"
    ):
        with loader.dead_workers():
            raise EOFError
    with pytest.raises(RuntimeError, match=r"^another thing$"), loader.dead_workers():
        raise RuntimeError("another thing")


LIVELY = """
import torch
from ssis import UserError
from ssis.engine import loader
from ssis.io import program

kept = []


def run(argv):
    more = dict(num_workers=2, worker_init_fn=loader.ignore_signals)
    with loader.dead_workers():
        kept.append(iter(torch.utils.data.DataLoader(range(10**6), **more)))
        next(kept[0])
        raise UserError("something is wrong")


program.run(run, None)
"""


@pytest.mark.fast
def test_an_error_while_workers_are_alive_ends_the_program():
    """They ignore SIGTERM, with which Python would end them: it waited for them for ever."""
    process = subprocess.Popen(
        [sys.executable, "-c", LIVELY], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2 and said == "error: something is wrong\n"


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, k):
        return torch.zeros(2) @ torch.zeros(3)


@pytest.mark.fast
def test_a_mistake_in_a_worker_is_not_a_dead_worker():
    """It stays a traceback, for it is ours; a dead one is found behind another error, too."""
    with pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker"):
        with loader.dead_workers():
            next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    with pytest.raises(UserError, match="a loader worker died"), loader.dead_workers():
        # As when PyTorch's signal handler strikes while a checkpoint is written.
        try:
            raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. ")
        except RuntimeError as error:
            raise UserError("the checkpoint cannot be written") from error
    with pytest.raises(UserError, match="something else"), loader.dead_workers():
        raise UserError("something else")


def stopped_in_the_middle(arguments, folder) -> None:
    process = begin(*arguments, "--output", folder)
    while not (folder / "checkpoint.previous.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(whole, tmp_path):
    folder, arguments = whole
    stopped_in_the_middle(arguments, tmp_path)
    path = tmp_path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    # Killed while it saved, the run may have left one file with two names.
    path.unlink()
    path.write_bytes(content)
    done = launch("train.py", *arguments, "--output", tmp_path)
    assert f"warning: {path}: damaged" in done.stderr and "going on from it" in done.stderr
    assert_same_end(folder, tmp_path)


def test_two_damaged_checkpoints_are_no_new_beginning(whole, tmp_path):
    _, arguments = whole
    stopped_in_the_middle(arguments, tmp_path)
    for path in tmp_path.glob("checkpoint*.pt"):
        path.write_bytes(path.read_bytes()[:-1000])
    # But for what the kill left half written, which is cleared away.
    before = sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".tmp")
    done = launch("train.py", *arguments, "--output", tmp_path, status=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "none to go on from; give --resume never to start anew" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_disk_that_is_full_in_the_middle(whole, tmp_path):
    """Files of more than 20 MB cannot be written, so no checkpoint can; then they can."""
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    folder, arguments = whole
    stopped_in_the_middle(arguments, tmp_path)
    done = subprocess.run(
        command("train.py", *arguments, "--output", tmp_path),
        cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000)),
        ),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot be written" in line and "the one before is kept" in line
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] >= 2
    launch("train.py", *arguments, "--output", tmp_path)
    assert_same_end(folder, tmp_path)


def test_signals_to_the_whole_process_group(whole, tmp_path):
    """As a cluster sends them: to the loader workers too, more than one, also while saving."""
    folder, arguments = whole
    arguments = [*arguments, "--output", tmp_path, "--workers", "2"]
    # When the workers begin; when a checkpoint is being written.
    for moment in ("workers", "saving"):
        before = checkpoint.load(tmp_path / "checkpoint.pt")["step"] if saved(tmp_path) else 0
        process = begin(*arguments, start_new_session=True)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (
            any(tmp_path.glob("checkpoint*.tmp"))
            if moment == "saving"
            else (tmp_path / "labeled.json").exists() and children.read_text().split()
        ):
            assert process.poll() is None
        for _ in range(5):
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.01)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert "Traceback" not in said and "error" not in said
        assert before < checkpoint.load(tmp_path / "checkpoint.pt")["step"] < 12
    launch("train.py", *arguments)
    assert_same_end(folder, tmp_path)


# ------------------------------------------------------------------- several processes


def worker_of(parent: int, rank: int) -> int:
    """The process of a rank among the descendants of a torchrun."""
    for folder in os.listdir("/proc"):
        try:
            with open(f"/proc/{folder}/stat") as file:
                father = int(file.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{folder}/environ", "rb") as file:
                if father == parent and f"\0RANK={rank}\0".encode() in b"\0" + file.read():
                    return int(folder)
        except (OSError, ValueError):
            continue
    raise ProcessLookupError


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_dead_process_ends_all_or_is_restarted(whole, tmp_path, restarts):
    _, arguments = whole
    process = subprocess.Popen(
        [*TWO, "--max-restarts", str(restarts), "train.py", *map(str, arguments)]
        + ["--output", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(worker_of(process.pid, 1), signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate(timeout=200)
    if restarts:
        assert process.returncode == 0, said[-3000:]
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["steps"] == 12
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == sorted(steps) and steps[-1] == 12
    else:
        assert process.returncode != 0 and time.monotonic() - began < 60
        assert checkpoint.latest(tmp_path / "checkpoint.pt") is not None


def test_a_disk_slower_than_the_others_wait(whole, tmp_path):
    """The run ends, as it must; the checkpoint under way is written, and it goes on from it."""
    _, arguments = whole
    program = [*map(str, arguments), "--output", str(tmp_path)]
    done = subprocess.run(
        [*TWO, "tests/engine/slow_disk.py", *program],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert done.returncode != 0 and "Timed out waiting" in done.stderr
    # The second one, which took so long.
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 2
    assert not list(tmp_path.glob("checkpoint*.tmp"))
    again = subprocess.run([*TWO, "train.py", *program], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 12


def test_two_machines(whole, tmp_path):
    """Two torchruns of one process each, which find each other at an address."""
    _, arguments = whole
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    node = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    node += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "1"]
    nodes = [
        subprocess.Popen(
            [*node, "train.py", *map(str, arguments), "--output", str(tmp_path)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=200) for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], said[0][1][-2000:]
    # One of them is the main process and prints the table; both trained on their half.
    assert sorted(out.count("AP in percent") for out, _ in said) == [0, 1]
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["step"] == 12 and len(state["random"]) == 2


def test_a_checkpoint_of_a_stranger_is_not_executed(tmp_path):
    """A pickle that would write a file is refused unread."""
    import pickle

    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harm",)

    (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "harm").exists()
