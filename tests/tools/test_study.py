"""Studies: what is missing is run, what is there is not, a kill loses nothing.

The runs are real, a few steps of the small model on small shapes. Checked are the number of
runs that were started, shared first teachers, results after a kill against results without,
and that a result belongs to its settings.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from ssis.io import checkpoint
from ssis.tools import study

SHORT = (
    "--preset custom --method guided-distillation --pretrain-steps 4 --burnin-steps 2 "
    "--mutual-steps 2 --labeled-batch 2 --unlabeled-batch 2 --tau-class 0.05 --labeled 8 "
    "--short-side-min 48 --short-side 48 --eval-every 100 --audit-images 4 --checkpoint-every 1 "
    "--max-detections 10"
)
SMALL = study.Study(
    "A title", "A text.", {"plain": "", "+ uncertainty": "--uncertainty"}, (0,), SHORT, data=True
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shapes_folder):
    """The study run at one go, two processes: its folder."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        in_folder(patch, folder)
        assert study.run("small", 2, 1, str(shapes_folder))
    return folder


def in_folder(patch, folder) -> None:
    """Studies of this file alone, two names for one, with all their files in a folder."""
    patch.setattr(study, "STUDIES", dict(small=SMALL, same=SMALL))
    patch.setattr(study, "RESULTS", folder / "results")
    patch.chdir(folder)


@pytest.fixture
def small(monkeypatch, tmp_path, shapes_folder):
    """What starts the study in a new folder."""
    in_folder(monkeypatch, tmp_path)
    return lambda name="small": study.run(name, 2, 1, str(shapes_folder))


def results(folder) -> list[dict]:
    """Raw results without their times."""
    records = json.loads((folder / "results" / "small.json").read_text())
    for record in records:
        record["summary"].pop("seconds")
    return records


def test_a_study_runs_what_is_missing_and_shares_the_first_teacher(
    whole, monkeypatch, shapes_folder
):
    first, second = results(whole)
    assert (first["row"], second["row"]) == ("plain", "+ uncertainty")
    # Where the data and the run lay is left out.
    assert first["summary"]["evaluated_on"] == f"{shapes_folder.name}/instances_test.json"
    assert str(shapes_folder.parent) not in json.dumps([first, second])
    assert first["machine"].split("), ")[1].startswith("1 thread(s) a run, 2 run(s)")
    # The second one began after pretraining: it never logged a step of it.
    (metrics,) = whole.glob("runs/small/uncertainty-s0-*/metrics.jsonl")
    logged = metrics.read_text().splitlines()
    assert all(json.loads(line)["stage"] != "pretrain" for line in logged)
    # All is there now: nothing is started, neither here nor in a study of the same runs.
    in_folder(monkeypatch, whole)
    monkeypatch.setattr(study, "start", None)
    for name in ("small", "same"):
        assert study.run(name, 2, 1, str(shapes_folder))
    made = [(whole / "results" / f"{name}.json").read_text() for name in ("small", "same")]
    assert made[0] == made[1]


def test_a_stopped_study_ends_with_the_same_results(whole, small, tmp_path, shapes_folder):
    code = (
        "import pathlib, test_study\nfrom ssis.tools import study\n"
        "study.STUDIES = dict(small=test_study.SMALL)\n"
        "study.RESULTS = pathlib.Path('results')\n"
        f"study.main(['small', '--data', {str(shapes_folder)!r}])"
    )
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "tools")))
    began = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # Wait until it has saved something.
    while not (saved := list(tmp_path.glob("runs/small/plain-s0-*/checkpoint.pt"))):
        assert began.poll() is None
        time.sleep(0.1)
    began.send_signal(signal.SIGTERM)
    _, said = began.communicate(timeout=60)
    assert began.returncode == 130 and "the same command goes on" in said
    assert not list(tmp_path.glob("runs/small/uncertainty-s0-*"))
    folder = saved[0].parent
    assert not (folder / "summary.json").exists()
    done = checkpoint.load(saved[0])["step"]
    assert 0 < done < 8
    # The rest, in this process: each goes on where it was, and ends where it would have.
    assert small()
    assert results(tmp_path) == results(whole)
    ends = [
        checkpoint.load(next(f.glob("runs/small/plain-s0-*/checkpoint.pt")))
        for f in (tmp_path, whole)
    ]
    for name, value in ends[0]["student"].items():
        assert torch.equal(value, ends[1]["student"][name]), name
    said = (folder.parent / f"{folder.name}.log").read_text()
    assert f"| {done}/8 [" in said.replace("\r", "\n").split("stopped after")[1]


@pytest.mark.fast
def test_a_result_belongs_to_its_settings(small, shapes_folder):
    job = study.jobs("small", str(shapes_folder))[0]
    settings = study.comparable(vars(job.settings))
    assert study.matches(job, dict(settings=settings))
    # Any setting that counts, and a default that has changed since.
    assert not study.matches(job, dict(settings=settings | {"tau_class": 0.06}))
    assert not study.matches(job, dict(settings=settings | {"data": "others"}))
    # A field that came later was off then; a run that has it on is another.
    older = {k: v for k, v in settings.items() if k != "arp"}
    assert study.matches(job, dict(settings=older))
    job.settings.arp = "both"
    assert not study.matches(job, dict(settings=older))
    # Where it ran does not count.
    assert not {"output", "device", "workers"} & settings.keys()


@pytest.mark.fast
def test_the_list_counts_what_was_made_with_the_settings_of_today(small):
    job = study.jobs("small", "small")[0]
    settings = study.comparable(vars(job.settings))
    record = dict(row=job.row, seed=0, flags=study.flags_of(SMALL, job.row))
    for value, done in ((job.settings.unsup_weight, 1), (0.1, 0)):
        # Flags are the same; a default is another one since then.
        study.store("small", record | dict(settings=settings | {"unsup_weight": value}))
        line = study.overview().splitlines()[0]
        assert line.split() == f"small {done} of 2 runs A title".split()


def test_a_failing_run_is_named_and_the_others_go_on(small, shapes_folder, tmp_path, capfd):
    # Bad only when it runs: a folder that holds another run.
    folder = study.jobs("small", str(shapes_folder))[0].folder
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("half of a")
    (folder / "config.json").write_text("{}")
    assert not small()
    said = capfd.readouterr().out
    assert "plain, seed 0: FAILED with status 2" in said and "another --output" in said
    assert [r["row"] for r in results(tmp_path)] == ["+ uncertainty"]


@pytest.mark.fast
def test_the_command_line(capsys):
    study.main([])
    listed = capsys.readouterr().out
    assert all(name in listed for name in study.STUDIES)
    with pytest.raises(SystemExit) as stop:
        study.main(["nonsense"])
    assert stop.value.code == 2 and "not there" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        study.main(["nuclei"])
    assert stop.value.code == 2 and "--data FOLDER" in capsys.readouterr().err
    # Every row of every study is a legal command.
    for name, spec in study.STUDIES.items():
        jobs = study.jobs(name, "folder" if spec.data else "")
        assert len(spec.runs) == len({job.folder for job in jobs})
        assert {(job.row, job.seed) for job in jobs} >= {(row, spec.seeds[0]) for row in spec.rows}


def test_other_settings_are_due_again_and_leave_the_old_results_alone(
    whole, monkeypatch, tmp_path, shapes_folder
):
    """A changed flag: new folder, first teacher not shared, old results kept until then."""
    shutil.copytree(whole / "results", tmp_path / "results")
    in_folder(monkeypatch, tmp_path)
    old = study.jobs("small", str(shapes_folder))
    before = (tmp_path / "results" / "small.json").read_text()
    changed = dataclasses.replace(SMALL, common=SHORT + " --lr 1e-4")
    monkeypatch.setattr(study, "STUDIES", dict(small=changed))
    new = study.jobs("small", str(shapes_folder))
    assert not {job.folder for job in old} & {job.folder for job in new}
    assert not study.same_pretraining(new[0], dataclasses.asdict(old[0].settings))
    assert study.same_pretraining(new[0], dataclasses.asdict(new[1].settings))
    # The page shows nothing that was made with other flags.
    assert len(study.load("small")) == 2 and study.current("small") == []

    class Stopped(Exception):
        pass

    def stop(job, threads):
        raise Stopped

    monkeypatch.setattr(study, "start", stop)
    with pytest.raises(Stopped):
        study.run("small", 1, 1, str(shapes_folder))
    assert (tmp_path / "results" / "small.json").read_text() == before
    # One result of two is replaced, the other stays.
    record = study.relabel(new[0], json.loads(before)[0])
    study.store("small", record)
    assert [r["flags"] for r in study.load("small")] == [
        record["flags"], json.loads(before)[1]["flags"]
    ]  # fmt: skip
