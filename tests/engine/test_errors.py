"""Bad input: one clear line that names the thing and the mend, exit status 2.

Each case is a whole call of train.py's or evaluate.py's `main`, in this process. What the
data traps do is provoked for real: the files are written broken.
"""

import json

import pytest
import torch
from conftest import write_coco
from helpers import arguments, error_of, set_record
from PIL import Image

import evaluate
import train
from ssis import config, networks
from ssis.engine import run_folder
from ssis.io import checkpoint
from ssis.io import program


def drop(key):
    def change(raw):
        del raw[key]

    return change


def polygon(*numbers):
    return set_record("annotations", 0, segmentation=[list(numbers)])


JSON_TRAPS = {
    "no categories": (drop("categories"), "not COCO format"),
    "not a dict": (lambda raw: [raw], "not COCO format"),
    "no image": (lambda raw: dict(raw, images=[]), "lists no image|which is not listed"),
    "image without id": (lambda raw: raw["images"][0].pop("id") and None, "not COCO|image"),
    "duplicate image id": (set_record("images", 1, id=0), "two images have the id 0"),
    "duplicate class": (set_record("categories", 1, name="dog"), "ids and names given only once"),
    "annotation of no image": (set_record("annotations", 0, image_id=77), "not listed"),
    "annotation of no class": (set_record("annotations", 0, category_id=5), "not listed"),
    "file name climbs out": (set_record("images", 0, file_name="../0.png"), "leaves the image"),
    "file name is absolute": (set_record("images", 0, file_name="/etc/a.png"), "leaves the image"),
    "file name is a number": (set_record("images", 0, file_name=5), "must be a name"),
    "image absent": (set_record("images", 0, file_name="no.png"), "no.png: image not found"),
    "size mismatch": (set_record("images", 0, width=50), "is 48 x 32 pixels, the JSON says 50 x"),
    "size missing": (set_record("images", 0, width=None), "must be whole numbers"),
    "rle of another size": (
        set_record("annotations", 4, segmentation=dict(size=[5, 5], counts=[25])),
        "RLE of size",
    ),
    "duplicate file name": (set_record("images", 1, file_name="0.png"), "two images have the file"),
    "rle too short": (
        set_record("annotations", 4, segmentation=dict(size=[32, 48], counts=[5, 5])),
        "do not add up",
    ),
    "rle negative": (
        set_record("annotations", 4, segmentation=dict(size=[32, 48], counts=[-1, 1537])),
        "do not add up",
    ),
    "odd polygon": (polygon(1, 2, 3, 4, 5, 6, 7), "odd number"),
    "polygon of words": (polygon(*"abcdef"), "not a list of numbers"),
    "polygon to infinity": (polygon(*6 * [1e308]), "far outside of its image"),
    "polygon over nan": (polygon(1, 2, 3, 4, 5, float("nan")), "a coordinate that is no number"),
    "polygon far away": (polygon(-1e6, 0, 1e6, 0, 5, 9), "far outside of its image"),
    "size beyond all bounds": (set_record("images", 0, width=10**30), "must be whole numbers"),
    "size of many letters": (set_record("images", 0, width="x" * 10**5), " … "),
    "rle that is no text": (
        set_record("annotations", 4, segmentation=dict(size=[32, 48], counts="\ud800")),
        "has an RLE that is garbled",
    ),
    "file name with nul": (set_record("images", 0, file_name="a\0.png"), "image not found"),
    "no instance anywhere": (lambda raw: dict(raw, annotations=[]), "no instance at all"),
}


@pytest.mark.parametrize("name", JSON_TRAPS)
def test_a_broken_json(tmp_path, capsys, name):
    change, expected = JSON_TRAPS[name]
    write_coco(tmp_path, change)
    line = error_of(capsys, train.main, arguments(tmp_path))
    assert any(part in line for part in expected.split("|")), line


@pytest.mark.parametrize("text", ["", "{", "[" * 10**7, '{"images": {"a":' * 10**5, "\x00\x01"])
def test_a_json_that_is_none(tmp_path, capsys, text):
    write_coco(tmp_path)
    (tmp_path / "coco.json").write_text(text)
    assert "coco.json" in error_of(capsys, train.main, arguments(tmp_path))


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n half"])
def test_an_unreadable_image(tmp_path, capsys, data):
    write_coco(tmp_path)
    (tmp_path / "images" / "1.png").write_bytes(data)
    line = error_of(capsys, train.main, arguments(tmp_path))
    assert "1.png: cannot be read as an image" in line


def test_a_truncated_image_seen_only_in_training_in_a_loader_worker(tmp_path, capsys):
    """The header is fine, so it is found by a worker; the line is still one line."""
    write_coco(tmp_path)
    for k in range(4):
        path = tmp_path / "images" / f"{k}.png"
        path.write_bytes(path.read_bytes()[:2000])
    line = error_of(capsys, train.main, [*arguments(tmp_path), "--workers", "1"])
    assert "cannot be read as an image" in line


OPTIONS = {
    "a typo": (["--tau-mim", 0.8], "arguments: --tau-mim 0.8; did you mean --tau-min?"),
    "a flag of another program": (["--xyzzy"], "unrecognized arguments: --xyzzy; see --help"),
    "a word for a number": (["--seed", "one"], "argument --seed: invalid int value: 'one'"),
    "SAM without weights": (["--method", "s4m"], "fetch https://dl.fbaipublicfiles.com"),
    "SAM's weights absent": (["--method", "s4m", "--sam-checkpoint", "x.pth"], "x.pth: not found"),
    "SAM for nothing": (["--sam-checkpoint", "x.pth"], "nothing uses SAM"),
    "jitter of all": (["--arp-jitter", 1], "--arp-jitter 1.0: must be from 0 to below 1"),
    "no points": (["--refine-points", 0], "--refine-points 0: must be at least 1"),
    "gate above one": (["--refine-gate", 1.1], "--refine-gate 1.1: must be from 0 to 1"),
    "unknown method": (["--method", "magic"], "invalid choice: 'magic' (choose from"),
    "no steps": (["--pretrain-steps", 0, "--burnin-steps", 0], "all are 0"),
    "negative steps": (["--pretrain-steps", -1], "must be >= 0"),
    "share above one": (["--ema-decay", 1.5], "--ema-decay 1.5: must be from 0 to 1"),
    "no prototypes": (["--prototypes", 0], "--prototypes 0: must be at least 1"),
    "thresholds crossed": (["--tau-min", 0.9, "--tau-max", 0.5], "--tau-min <= --tau-max"),
    "threshold above one": (["--tau-mask", 1.5], "--tau-mask 1.5: must be from 0 to 1"),
    "prompts for nobody": (["--descriptions", "x.json"], "are for --correction clip alone"),
    "prompts absent": (
        ["--correction", "clip", "--descriptions", "x.json"],
        "x.json: cannot be read as JSON",
    ),
    "no such CLIP": (
        ["--correction", "clip", "--clip-model", "magic:weights"],
        "--clip-model magic:weights: cannot be loaded",
    ),
    "first teacher absent": (["--pretrained", "x.pt"], "--pretrained x.pt: no such file"),
    "no step size": (["--lr", 0], "--lr 0.0: must be"),
    "weights of the other model": (["--backbone-weights", "imagenet"], "the small model has none"),
    "infinite share": (["--labeled", "inf%"], "must be a share (5%)"),
    "sides": (["--short-side", 16], "does not hold"),
    "labeled is no number": (["--labeled", "many"], "must be a share (5%)"),
    "no labeled image": (["--labeled", "0"], "choose from 1 to 4"),
    "too small a share": (["--labeled", "1%"], "that is 0 of 4 images"),
    "too many labeled": (["--labeled", "5"], "that is 5 of 4 images"),
    "nothing unlabeled": (["--labeled", "100%"], "no unlabeled image is left"),
    "split absent": (["--labeled", "absent.json"], "absent.json: split not found"),
    "json without images": (["--test-json", "x.json"], "go together"),
    "train json absent": (["--train-json", "x.json"], "x.json: COCO JSON not found"),
    "image folder absent": (["--train-images", "nowhere"], "nowhere: image folder not found"),
    "unlabeled folder absent": (["--unlabeled-images", "nowhere"], "nowhere: folder of unlabeled"),
    "backbone weights absent": (
        ["--model", "resnet50", "--backbone-weights", "x.pth"],
        "not imagenet, coco, none or",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_bad_option(tmp_path, capsys, name):
    options, expected = OPTIONS[name]
    write_coco(tmp_path)
    assert expected in error_of(capsys, train.main, [*arguments(tmp_path), *options])


def test_downloads_that_fail_say_what_to_pass_instead(tmp_path, capsys, monkeypatch):
    """The cache is empty and the host cannot be resolved: the download fails at once."""
    write_coco(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    options = ["--model", "resnet50", "--backbone-weights", "imagenet"]
    line = error_of(capsys, train.main, [*arguments(tmp_path), *options])
    assert "resnet50" in line and "pass its path, or pass none" in line


def test_an_unlabeled_folder_without_images(tmp_path, capsys):
    write_coco(tmp_path)
    (tmp_path / "empty").mkdir()
    options = ["--unlabeled-images", tmp_path / "empty"]
    assert "no new image in it" in error_of(capsys, train.main, [*arguments(tmp_path), *options])


@pytest.mark.parametrize(
    "content, expected",
    [(["9.png"], "names 1 images"), ([], "not a split"), ({"labeled": 3}, "not a split")],
)
def test_a_split_that_does_not_fit(tmp_path, capsys, content, expected):
    write_coco(tmp_path)
    (tmp_path / "split.json").write_text(json.dumps(content))
    options = ["--labeled", tmp_path / "split.json"]
    assert expected in error_of(capsys, train.main, [*arguments(tmp_path), *options])


def test_an_oracle_needs_the_truth_of_every_unlabeled_image(tmp_path, capsys):
    write_coco(tmp_path)
    write_coco(tmp_path / "more")
    # Copies of the images that are listed already would be passed over.
    Image.new("RGB", (48, 32), "red").save(tmp_path / "more" / "images" / "new.png")
    more = ["--unlabeled-images", tmp_path / "more" / "images", "--oracle", "class"]
    line = error_of(capsys, train.main, [*arguments(tmp_path), *more])
    assert "--oracle class: needs the ground truth" in line


def test_a_class_that_training_does_not_know(tmp_path, capsys):
    write_coco(tmp_path)
    write_coco(tmp_path / "v", set_record("categories", 2, name="zebra"))
    options = ["--val-json", tmp_path / "v/coco.json", "--val-images", tmp_path / "v/images"]
    line = error_of(capsys, train.main, [*arguments(tmp_path), *options])
    assert "unknown class 'zebra'" in line


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    write_coco(tmp_path)
    (tmp_path / "file").write_text("")
    options = ["--output", tmp_path / "file" / "run"]
    assert "choose another --output" in error_of(
        capsys, train.main, [*arguments(tmp_path), *options]
    )


def test_a_run_of_other_settings_is_not_overwritten(tmp_path, capsys):
    write_coco(tmp_path)
    (tmp_path / "run").mkdir()
    config.save(config.Config(seed=3), tmp_path / "run" / "config.json")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"")
    line = error_of(capsys, train.main, arguments(tmp_path))
    assert "holds a run with other settings" in line and "--resume never" in line
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 3


def test_a_folder_in_which_another_process_trains(tmp_path, capsys):
    write_coco(tmp_path)
    (tmp_path / "run").mkdir()
    with run_folder.lock(tmp_path / "run"):
        line = error_of(capsys, train.main, arguments(tmp_path))
        assert "another process trains in it now" in line and "give another --output" in line
        assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
    # When that one has ended, however, it is free.
    train.main([*arguments(tmp_path), "--method", "supervised"])


def test_evaluating_what_is_no_checkpoint_or_another_models(tmp_path, capsys):
    write_coco(tmp_path)
    data = ["--json", tmp_path / "coco.json", "--images", tmp_path / "images"]
    path = tmp_path / "c.pt"
    assert "checkpoint not found" in error_of(capsys, evaluate.main, [path, *data])
    # Weights of a model with other classes than the checkpoint says it has.
    settings = config.Config(short_side=32)
    weights = networks.build("small", 9, 32, 160).state_dict()
    teacher = None
    names = ["cat", "dog", "unused"]
    state = dict(config=vars(settings), names=names, student=weights, teacher=teacher)
    checkpoint.save(path, state)
    line = error_of(capsys, evaluate.main, [path, *data, "--who", "student"])
    assert "checkpoint of another model" in line
    # A supervised run has no teacher: without --who it is the student's turn.
    assert "has no teacher" in error_of(capsys, evaluate.main, [path, *data, "--who", "teacher"])
    assert "checkpoint of another model" in error_of(capsys, evaluate.main, [path, *data])
    assert "go together" in error_of(capsys, evaluate.main, [path, "--json", "x"])


def test_a_garbled_rle_is_told_when_its_image_is_read(tmp_path, capsys):
    garbled = set_record("annotations", 4, segmentation=dict(size=[32, 48], counts="garbage!"))
    write_coco(tmp_path, garbled)
    line = error_of(
        capsys, train.main, [*arguments(tmp_path), "--method", "supervised", "--labeled", "100%"]
    )
    assert "'2.png' has an RLE that cannot be read" in line


def test_a_corrected_command_is_not_blocked_by_the_failed_one(tmp_path, capsys):
    write_coco(tmp_path)
    error_of(capsys, train.main, [*arguments(tmp_path), "--labeled", "5"])
    train.main([*arguments(tmp_path), "--method", "supervised", "--lr", "1e-4"])
    # And a finished run is not wiped out because its checkpoint was thrown away.
    for path in (tmp_path / "run").glob("checkpoint*.pt"):
        path.unlink()
    capsys.readouterr()
    line = error_of(capsys, train.main, [*arguments(tmp_path), "--method", "supervised"])
    assert "finished run without its checkpoint" in line


def test_a_picture_that_would_fill_the_memory(tmp_path, capsys, monkeypatch):
    """Pillow's own limit on pixels, lowered so that the file need not be large."""
    write_coco(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert "cannot be read as an image" in error_of(capsys, train.main, arguments(tmp_path))


def test_what_is_unusual_but_right_passes(tmp_path, capsys):
    """No `info`, gray and palette images, an unused class, a crowd: no error."""
    write_coco(tmp_path)
    for k, mode in enumerate(("L", "P")):
        path = tmp_path / "images" / f"{k}.png"
        Image.open(path).convert(mode).save(path)
    train.main([*arguments(tmp_path), "--method", "supervised"])
    assert "mask" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\n..."),
         ["the GPU's memory is full", "--pretrain-batch, --labeled-batch", "--amp"]),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
         ["the GPU's memory is full"]),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate "
                      "memory: you tried to allocate 4000000000000 bytes. Error code 12"),
         ["the computer's memory is full", "--labeled-batch"]),
        (RuntimeError("histc_cuda does not have a deterministic implementation, but you set 'to"),
         ["--deterministic", "(histc_cuda); leave the flag out"]),
    ],
)  # fmt: skip
def test_what_the_machine_cannot_do_is_one_line(error, said, tmp_path, capsys, monkeypatch):
    """PyTorch's own errors, where a step meets them; there is no GPU to fill here."""
    write_coco(tmp_path)

    def fail(*arguments):
        raise error

    monkeypatch.setattr(train, "train_step", fail)
    line = error_of(capsys, train.main, arguments(tmp_path))
    assert all(words in line for words in said)


def test_a_mistake_of_this_code_keeps_its_traceback(tmp_path, monkeypatch):
    """A RuntimeError that says nothing of the machine."""
    write_coco(tmp_path)

    def fail(*arguments):
        raise RuntimeError("shape '[2]' is invalid for input of size 3")

    monkeypatch.setattr(train, "train_step", fail)
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        program.run(train.main, arguments(tmp_path))


def test_apples_gpu_is_refused_with_a_reason(tmp_path, capsys):
    write_coco(tmp_path)
    line = error_of(capsys, train.main, [*arguments(tmp_path), "--device", "mps"])
    assert "never run on one; use --device cpu" in line


def test_bf16_on_a_gpu_without_it(tmp_path, capsys, monkeypatch):
    write_coco(tmp_path)
    seen = dict(is_available=True, device_count=1, set_device=None)
    seen |= dict(get_device_capability=(7, 5), get_device_name="Tesla T4")
    for name, value in seen.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, value=value: value)
    line = error_of(capsys, train.main, [*arguments(tmp_path), "--device", "cuda", "--amp", "bf16"])
    assert "Tesla T4 has no bf16; give --amp fp16" in line
