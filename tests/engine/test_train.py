"""Whole runs: the three stages, the files, resuming bit for bit, signals, evaluate.py.

Runs are a few steps of the small model on 48-pixel shapes, started as a user starts
them: as programs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, real
from helpers import TINY, assert_same_end, command, dataset_of, error_of, launch, same

import evaluate
import train
from ssis import UserError, config, correction
from ssis.datasets import parts
from ssis.engine import resume
from ssis.io import checkpoint
from ssis.report import ap


def inside(capsys, main, *arguments) -> str:
    """What a program prints, run in this process: it saves the seconds of its start."""
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def whole(shapes_folder, tmp_path_factory):
    """A run that nothing interrupts; its folder, its arguments and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = [*dataset_of(shapes_folder), *TINY]
    done = launch("train.py", *arguments, "--output", folder)
    return folder, arguments, done


def test_a_run_leaves_the_files_and_numbers_it_promises(whole):
    folder, _, done = whole
    for name in (
        "config.json",
        "labeled.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "best.pt",
        "summary.json",
        "curves.png",
        "predictions.png",
        "best.png",
        "worst.png",
        "report.html",
        "pseudo_000007.png",
    ):
        assert (folder / name).stat().st_size > 0, name
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["labeled"], summary["unlabeled"], summary["steps"]) == (8, 32, 12)
    for kind in ("mask_ap", "box_ap"):
        assert all(0 <= value <= 100 for value in summary[kind].values())
        assert set(summary[kind]) == {"pretrained", "student", "teacher", "best"}
    assert set(summary["audit"]) == {
        "pseudo_per_image",
        "labeled_per_image",
        "box_precision",
        "class_accuracy",
        "mask_iou",
        "recall",
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 7, 10, 12]
    assert lines[2]["pseudo_per_image"] > 0 and lines[2]["unlabeled/loss_mask"] > 0
    assert "first teacher" in done.stdout and f"{folder}/report.html" in done.stdout
    assert not summary["first_teacher_given"] and "included" not in done.stdout


def test_the_teacher_is_what_the_stages_make_of_it(whole):
    """A copy of the student at the end of the burn-in, then 5 averages: not the student."""
    state = checkpoint.load(whole[0] / "checkpoint.pt")
    name = "roi_heads.mask_predictor.mask_fcn_logits.weight"
    assert not torch.equal(state["teacher"][name], state["student"][name])
    assert checkpoint.load(whole[0] / "pretrained.pt")["teacher"] is None


def test_the_best_model_is_kept_and_the_verdict_says_what_was_gained(whole):
    """By validation AP, the first teacher among the candidates; the sentence is everywhere."""
    folder, _, done = whole
    summary = json.loads((folder / "summary.json").read_text())
    best, lines = summary["best"], (folder / "metrics.jsonl").read_text().splitlines()
    net, config, _, _ = resume.load_model(folder / "best.pt", "student")
    val = parts.open_parts(config)[1]
    found = [v for line in lines for k, v in json.loads(line).items() if k.startswith("val_mask")]
    found += summary["val_mask_ap"].values()
    # The first teacher is one of the candidates.
    first, *_ = resume.load_model(folder / "pretrained.pt", "student")
    found.append(ap.evaluate(first, val, torch.device("cpu"))[0]["mask"]["AP"])
    assert best["val_mask_ap"] >= max(found) and best["who"] in ("pretrained", "student", "teacher")
    again = ap.evaluate(net, val, torch.device("cpu"))[0]["mask"]["AP"]
    assert again == pytest.approx(best["val_mask_ap"], abs=1e-3)
    said = summary["verdict"]["sentence"]
    assert "than the first teacher" in said and "95 % interval" in said
    assert f"verdict: {said}" in done.stdout and said in (folder / "report.html").read_text()
    assert not summary["test_is_validation"]


def test_ctrl_c_under_torchrun_names_the_traceback_that_is_not_ours(whole, tmp_path):
    arguments = [*whole[1], "--output", str(tmp_path), "--checkpoint-every", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "train.py", *map(str, arguments)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while steps_done(tmp_path) <= 0:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    last = out.strip().splitlines()[-1]
    assert "nothing is lost, the same command goes on" in last
    assert last.endswith("(the traceback that follows is torchrun's own)")
    assert 0 < steps_done(tmp_path) < 12


def test_a_run_stopped_and_killed_goes_on_and_ends_bit_identical(whole, tmp_path):
    """Ctrl-C, then SIGTERM, then SIGKILL (at any moment, also while saving), then the end."""
    folder, arguments, _ = whole
    arguments = [*arguments, "--output", str(tmp_path), "--checkpoint-every", "1"]
    before = 0
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(
            command("train.py", *arguments),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        # One step further than the last time.
        while steps_done(tmp_path) <= before:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(sign)
        out, _ = process.communicate()
        if sign != signal.SIGKILL:
            assert process.returncode == 0 and "the same command goes on" in out
        before = steps_done(tmp_path)
        assert 0 < before < 12
    launch("train.py", *arguments, "--workers", "2")
    assert_same_end(folder, tmp_path)
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps.count(12) == 1


def test_a_shared_first_teacher_leads_to_the_same_end(whole, tmp_path, capsys):
    folder, arguments, _ = whole
    first = folder / "pretrained.pt"
    given = [*arguments, "--pretrained", str(first), "--output", str(tmp_path / "a")]
    assert "minutes, the first teacher's included\n" in inside(capsys, train.main, *given)
    assert_same_end(folder, tmp_path / "a")
    assert "minutes, the first teacher's included." in (tmp_path / "a" / "report.html").read_text()
    steps = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(steps[0])["step"] > 4


def test_a_shared_first_teacher_has_the_next_runs_learning_rate(whole, tmp_path):
    """`lr_after` is of what comes later: shared or made anew, the first step has it."""
    folder, arguments, _ = whole
    ends = []
    for name, more in (("alone", []), ("shared", ["--pretrained", str(folder / "pretrained.pt")])):
        given = [*arguments, "--lr-after", "0.5", *more, "--output", str(tmp_path / name)]
        train.main(given)
        ends.append(tmp_path / name)
    assert_same_end(*ends)


def test_a_model_alone_is_no_first_teacher(whole, tmp_path, capsys):
    folder, arguments, _ = whole
    alone = checkpoint.load(folder / "best.pt")
    checkpoint.save(tmp_path / "best.pt", dict(alone, step=4))
    given = [*arguments, "--pretrained", tmp_path / "best.pt", "--output", tmp_path / "a"]
    assert "holds a model alone" in error_of(capsys, train.main, given)


def test_a_damaged_neighbor_is_no_error_of_this_run(whole, tmp_path):
    """And a sound one of the same labeled images is in the verdict."""
    folder, arguments, _ = whole
    run = ["--pretrained", str(folder / "pretrained.pt"), "--mutual-steps", "1"]
    plain = [*arguments, "--method", "supervised", "--output", str(tmp_path / "beside")]
    train.main(plain)
    for k in range(2):
        train.main([*arguments, *run, "--output", str(tmp_path / str(k))])
        verdict = json.loads((tmp_path / str(k) / "summary.json").read_text())["verdict"]
        names = [one["name"] for one in verdict["compared"]]
        assert names[0] == "the first teacher" and len(names) == 2 - k
        (tmp_path / "beside" / "checkpoint.pt").write_bytes(b"damaged")
    assert (
        str(tmp_path / "beside")
        in json.loads((tmp_path / "0" / "summary.json").read_text())["verdict"]["sentence"]
    )


def test_distillation_sees_the_images_that_sam_saw(whole, few, tmp_path, monkeypatch):
    """Pasted into, they would have another layout: while pretraining nothing is pasted."""
    _, arguments, _ = whole
    arp, seen = train.copy_paste.arp, []

    def spy(images, *rest, **more):
        seen.append(len(seen))
        return arp(images, *rest, **more)

    monkeypatch.setattr(train.copy_paste, "arp", spy)
    monkeypatch.setattr(correction, "START_VIEWS", 16)
    short = [*arguments, "--mutual-steps", "0", "--burnin-steps", "1", "--eval-every", "99"]
    short += ["--audit-images", "0", "--arp", "labeled", "--structure-queries", "8"]
    for weight, pasted in (("1", 1), ("0", 5)):
        seen.clear()
        output = str(tmp_path / weight)
        train.main([*short, "--structure-weight", weight, "--output", output])
        assert len(seen) == pasted


# Both papers, every switch on, and a teacher that finds a few things after four steps.
FULL = [
    "--method",
    "full",
    "--filter",
    "adaptive",
    "--tau-min",
    "0.02",
    "--tau-max",
    "0.1",
    "--refine-gate",
    "0",
]
FULL += ["--tau-mask-min", "0.02", "--tau-mask-max", "0.1"]
FULL += ["--refine-calibrate", "--arp", "both", "--structure-queries", "8"]
FULL += ["--structure-weight", "1", "--align"]
# And the papers' views, batches and weights.
FULL += "--crop-height 64 --crop-width 80 --scale-min 0.8 --scale-max 1.5 --weak-color".split()
FULL += "--labeled-view both --strong-erasing --pretrain-batch 3 --repeat-threshold 10".split()
FULL += "--arp-jitter 0.2 --no-object-unlabeled 0.3 --empty-images background".split()


def test_both_papers_resume_bit_identical(whole, few, tmp_path, monkeypatch):
    """Stopped while pretraining, in the burn-in and in mutual learning; all goes on.

    Both with `--deterministic`, one with loader workers, one without.
    """
    _, arguments, _ = whole
    train_step, stops = train.train_step, []

    def step_and_stop(*arguments):
        result, step = train_step(*arguments), arguments[4]
        if step + 1 in stops:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(train, "train_step", step_and_stop)
    monkeypatch.setattr(correction, "START_VIEWS", 16)
    for name, when, workers in (("once", [], "0"), ("often", [2, 6, 9], "2")):
        given = [*arguments, *FULL, "--output", str(tmp_path / name), "--workers", workers]
        given += ["--deterministic"]
        # One fills the cache of embeddings, the other finds it.
        given += ["--sam-cache", str(tmp_path / "sam")]
        stops[:] = when
        for _ in range(len(when) + 1):
            train.main(given)
            assert torch.are_deterministic_algorithms_enabled()
            # What a GPU's matrix products need for it.
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    torch.use_deterministic_algorithms(False)
    assert_same_end(tmp_path / "once", tmp_path / "often")
    one, two = (checkpoint.load(tmp_path / n / "checkpoint.pt") for n in ("once", "often"))
    assert same(one["thresholds"], two["thresholds"]) and same(one["classifier"], two["classifier"])
    # Class and mask thresholds start alike, and part as soon as they follow the teacher.
    assert (one["thresholds"]["values"][0] != one["thresholds"]["values"][1]).any()
    assert one["classifier"]["seen"].sum() > 0
    # With this filter the shares are those of the labeled images alone.
    assert same(one["alignment"], two["alignment"])
    labeled = json.loads((tmp_path / "once" / "labeled.json").read_text())["labeled"]
    truth = json.loads(Path(arguments[arguments.index("--train-json") + 1]).read_text())
    ids = {image["id"] for image in truth["images"] if image["file_name"] in labeled}
    shown = [a["category_id"] for a in truth["annotations"] if a["image_id"] in ids]
    order = sorted(category["id"] for category in truth["categories"])
    counts = torch.tensor([shown.count(k) + 1 / 6 for k in order])
    torch.testing.assert_close(one["alignment"]["shares"], counts / counts.sum())
    summary = json.loads((tmp_path / "once" / "summary.json").read_text())
    stages = summary["audit_stages"]["end of burn-in"]
    assert list(stages) == ["predicted", "kept", "refined", "corrected", "aligned", "final"]
    assert stages["predicted"]["pseudo_per_image"] >= stages["kept"]["pseudo_per_image"] > 0
    assert summary["audit_stages"]["end"]["final"] == summary["audit"]
    metrics = (tmp_path / "once" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in metrics]
    # S4M's distillation, while pretraining only.
    assert lines[0]["labeled/loss_structure"] > 0 and "labeled/loss_structure" not in lines[2]


def spied(monkeypatch, run_folder, arguments) -> list:
    """Train; before each step: steps done, a weight of student and teacher, sizes, indices."""
    train_step, seen = train.train_step, []

    def look(student, labeler, labeled, unlabeled, step, config, *rest):
        one, two = (
            net.state_dict()["backbone.body.conv1.weight"].clone()
            for net in (student, labeler.teacher)
        )
        _, optimizer, schedule, *_ = rest
        lr = schedule.get_last_lr()[-1]
        shown = [item["index"] for item in unlabeled or ()]
        seen.append((step, one, two, len(optimizer.state), lr, shown))
        return train_step(student, labeler, labeled, unlabeled, step, config, *rest)

    monkeypatch.setattr(train, "train_step", look)
    train.main([*arguments, "--output", str(run_folder)])
    return seen


def test_a_fresh_student_is_one(whole, few, tmp_path, monkeypatch):
    """GD's way, and the real presets': the teacher stays, the student starts anew."""
    few = ["--tau-min", "0.02", "--tau-max", "0.1", "--burnin-init", "fresh"]
    filled, fill = [], correction.fill

    def remember(classifier, teacher, *rest):
        filled.append(teacher.state_dict()["backbone.body.conv1.weight"].clone())
        fill(classifier, teacher, *rest)

    monkeypatch.setattr(correction, "fill", remember)
    # The first four steps are the pretraining.
    seen = spied(monkeypatch, tmp_path, [*whole[1], "--method", "pl-dc", *few])[4:]
    pretrained = checkpoint.load(tmp_path / "pretrained.pt")["student"]
    done, student, teacher, moments, lr, _ = seen[0]
    # Before the first step of the burn-in: the student forgot all, its optimizer too.
    assert done == 4 and moments == 0
    assert torch.equal(teacher, pretrained["backbone.body.conv1.weight"])
    assert not torch.equal(student, teacher) and student.std() > 0
    # It warms up once more, and the teacher waits for it, frozen.
    assert lr == pytest.approx(0.5 * seen[1][4]) and torch.equal(seen[2][2], teacher)
    # PL-DC's memory is filled anew when the teacher becomes another network.
    assert len(filled) == 2 and torch.equal(filled[0], teacher)
    assert torch.equal(filled[1], seen[3][2])
    # The first step of mutual learning begins with teacher := student, and ends with an EMA.
    assert torch.equal(seen[3][2], seen[3][1]) and not torch.equal(seen[4][2], seen[4][1])


def test_labeled_images_can_be_among_the_unlabeled(whole, few, tmp_path, monkeypatch):
    folder, arguments, _ = whole
    # The shapes' files are named by their numbers.
    labeled = {
        int(name[:5]) for name in json.loads((folder / "labeled.json").read_text())["labeled"]
    }
    few = ["--pretrained", str(folder / "pretrained.pt"), "--mutual-steps", "17"]
    few += ["--unlabeled-batch", "4", "--eval-every", "99"]
    for flag, expected in (("--unlabeled-includes-labeled", labeled), (None, set())):
        with monkeypatch.context() as patch:
            given = [*arguments, *few, *([flag] if flag else [])]
            seen = spied(patch, tmp_path / str(flag), given)
        shown = {index for *_, indices in seen for index in indices}
        # 20 steps of four: two rounds of the 40 images, or more of the other 32.
        assert shown & labeled == expected and len(shown) == (40 if flag else 32)


def test_the_teacher_is_watched_until_the_end(whole, few, tmp_path, monkeypatch, capsys):
    folder, arguments, _ = whole
    given = [*arguments, "--pretrained", str(folder / "pretrained.pt")]
    given += ["--eval-every", "99", "--output", str(tmp_path)]
    # Every third step, after 6 in the burn-in and 9 and 12 in mutual learning; and where a
    # run is shorter than that, at its end.
    for threshold, every, often in (("0.9999", 3, 3), ("0.9999", 100, 1), ("0.1", 3, 0)):
        monkeypatch.setattr(train.audit, "WATCH_EVERY", every)
        capsys.readouterr()
        train.main([*given, "--tau-class", threshold, "--resume", "never"])
        said = capsys.readouterr()
        assert (said.out + said.err).count("warning: the teacher has collapsed") == often
        assert not often or "0.00 pseudo-labels per image" in said.out + said.err


def test_the_teacher_pastes_nothing_that_no_rule_would_keep(whole, few, tmp_path, monkeypatch):
    folder, arguments, _ = whole
    predict, lowest, asked = train.predict, [], []

    def remember(model, images, min_score):
        found = predict(model, images, min_score)
        asked.append(min_score)
        lowest.extend(each.class_quality.min().item() for each in found if len(each))
        return found

    monkeypatch.setattr(train, "predict", remember)
    short = ["--pretrained", str(folder / "pretrained.pt"), "--mutual-steps", "1"]
    short += ["--audit-images", "0"]
    for k, (flags, least) in enumerate(
        (
            (["--tau-class", "0.12"], 0.12),
            (["--tau-class", "0.12", "--filter", "dual"], 0.12),
            (["--filter", "adaptive", "--tau-min", "0.1", "--tau-max", "0.3"], 0.1),
        )
    ):
        asked.clear()
        lowest.clear()
        train.main([*arguments, *short, *flags, "--output", str(tmp_path / str(k))])
        assert set(asked) == {least} and min(lowest) > least


def test_an_oracle_says_that_it_is_one(whole, tmp_path, capsys):
    folder, arguments, _ = whole
    # From the shared first teacher: what comes after pretraining may differ.
    short = ["--pretrained", str(folder / "pretrained.pt"), "--mutual-steps", "1"]
    given = [*arguments, *short, "--oracle", "both", "--output", str(tmp_path)]
    out = inside(capsys, train.main, *given)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "NOT A SEMI-SUPERVISED RESULT" in summary["warning"] and summary["warning"] in out
    # At a threshold of 0.1 the teacher predicts so much that something lies on an instance.
    assert summary["audit"]["class_accuracy"] == summary["audit"]["mask_iou"] == 1.0


def test_a_first_teacher_of_another_pretraining_is_refused(whole, tmp_path, capsys):
    folder, arguments, _ = whole
    for name, more, says in (
        ("pretrained.pt", ["--lr", "0.1"], "--lr was 0.001, is 0.1"),
        ("checkpoint.pt", [], "was saved after step 12, not at the end of pretraining"),
        ("pretrained.pt", ["--method", "supervised"], "is pretraining alone"),
        ("pretraned.pt", [], "pretraned.pt: no such file; give the pretrained.pt"),
    ):
        given = ["--pretrained", str(folder / name), "--output", str(tmp_path / "a"), *more]
        with pytest.raises(SystemExit) as stop:
            train.main([*arguments, *given])
        assert stop.value.code == 2 and says in capsys.readouterr().err
    # A wrong name is seen before anything is made; a run that has begun needs it no more.
    with pytest.raises(UserError, match="no such file"):
        config.parse(["--pretrained", "nothing.pt", "--output", str(tmp_path / "b")])
    assert not (tmp_path / "b").exists()
    begun = ["--pretrained", "nothing.pt", "--output", str(folder)]
    assert config.parse(begun)
    with pytest.raises(UserError, match="no such file"):
        config.parse([*begun, "--resume", "never"])


def steps_done(folder) -> int:
    path = folder / "checkpoint.pt"
    return checkpoint.load(path)["step"] if path.exists() else 0


def test_torchrun_starts_it_and_supervised_fills_the_student_alone(shapes_folder, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "train.py",
            *dataset_of(shapes_folder),
            *TINY,
            "--method",
            "supervised",
            "--output",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["mask_ap"]["pretrained"] is summary["mask_ap"]["teacher"] is None
    assert summary["mask_ap"]["student"] is not None and summary["steps"] == 12


def test_evaluate_repeats_the_runs_numbers_and_saves_predictions(whole, tmp_path, capsys):
    folder = whole[0]
    summary = json.loads((folder / "summary.json").read_text())
    for who in ("teacher", "student"):
        saved = tmp_path / f"{who}.json"
        out = inside(capsys, evaluate.main, folder / "checkpoint.pt", "--who", who,
                     "--save-predictions", saved)  # fmt: skip
        row = next(line for line in out.splitlines() if line.startswith("mask  "))
        assert float(row.split()[1]) == pytest.approx(summary["mask_ap"][who], abs=0.051)
        assert "triangle" in out
        found = json.loads(saved.read_text())
        assert set(found[0]) == {"image_id", "category_id", "score", "segmentation"}


def test_bf16_trains(shapes_folder, few, tmp_path):
    short = ["--burnin-steps", "1", "--mutual-steps", "1", "--amp", "bf16"]
    train.main([*dataset_of(shapes_folder), *TINY, *FULL, *short, "--output", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["labeled/loss_mask"] < 2


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_fp16_trains_and_its_scaler_finds_a_scale(shapes_folder, few, tmp_path):
    """The first scale, 65,536, is too high for any gradient: those steps are not taken."""
    short = ["--burnin-steps", "1", "--mutual-steps", "1", "--amp", "fp16"]
    train.main([*dataset_of(shapes_folder), *TINY, *short, "--output", str(tmp_path)])
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert 1 < state["scaler"]["scale"] < 65_536 and state["scaler"]["_growth_tracker"] > 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # The guard does not take them for steps gone wrong.
    assert 0 < lines[-1]["labeled/loss_mask"] < 2 and lines[-1]["skipped"] == 0
    before = checkpoint.load(tmp_path / "pretrained.pt")["student"]
    assert any((state["student"][name] != value).any() for name, value in before.items())


@pytest.mark.parametrize("name", ["nuclei", "coco_mini"])
def test_real_images_train_evaluate_and_resume(name, few, tmp_path, capsys):
    folder = real(name)
    arguments = [
        "--preset",
        "custom",
        "--sam",
        "tiny",
        "--refine-gate",
        "0",
        "--labeled",
        "10%",
        "--short-side-min",
        "64",
        "--short-side",
        "64",
        "--long-side",
        "96",
        "--tau-min",
        "0.02",
        "--tau-max",
        "0.1",
        "--pretrain-steps",
        "2",
        "--burnin-steps",
        "1",
        "--mutual-steps",
        "1",
        "--labeled-batch",
        "2",
        "--unlabeled-batch",
        "2",
        "--audit-images",
        "2",
        "--output",
        str(tmp_path),
    ]
    small_val = tmp_path / "val.json"
    raw = json.loads((folder / "instances_val.json").read_text())
    raw["images"] = raw["images"][:2]
    ids = {image["id"] for image in raw["images"]}
    raw["annotations"] = [a for a in raw["annotations"] if a["image_id"] in ids]
    small_val.write_text(json.dumps(raw))
    arguments += [
        "--train-json",
        str(folder / "instances_train.json"),
        "--train-images",
        str(folder / "train"),
        "--val-json",
        str(small_val),
        "--val-images",
        str(folder / "val"),
    ]
    train.main(arguments)
    before = os.stat(tmp_path / "checkpoint.pt").st_mtime_ns
    # Finished: the same command repeats the evaluation and trains no further.
    train.main(arguments)
    assert os.stat(tmp_path / "checkpoint.pt").st_mtime_ns == before
    out = inside(capsys, evaluate.main, tmp_path / "checkpoint.pt")
    assert "AP per class             mask    box" in out


def test_without_a_burn_in_there_is_no_audit_of_its_end(shapes_folder, tmp_path):
    """Nothing is taught before; the thresholds are measured one step later."""
    flags = [*dataset_of(shapes_folder), *TINY, "--filter", "calibrated", "--burnin-steps", "0"]
    train.main([*flags, "--output", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["audit_stages"]["end of burn-in"] is None and summary["audit_stages"]["end"]


def test_the_split_of_a_run_that_is_made_anew_stays(whole, tmp_path):
    """`--labeled` may name the file of the very folder that is written."""
    folder, arguments, _ = whole
    split = (folder / "labeled.json").read_bytes()
    run = tmp_path / "run"
    run.mkdir()
    (run / "labeled.json").write_bytes(split)
    few = ["--method", "supervised", "--burnin-steps", "1", "--mutual-steps", "0"]
    given = ["--labeled", str(run / "labeled.json"), "--output", str(run)]
    train.main([*arguments, *few, *given, "--resume", "never"])
    assert json.loads((run / "labeled.json").read_text())["labeled"] == json.loads(split)["labeled"]
