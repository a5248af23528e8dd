"""SAM: against the library's own predictor; the cache; wrong files; the official size."""

import json

import pytest
import torch
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.utils.transforms import ResizeLongestSide

import train
from ssis.engine.build import build
from ssis.engine.guard import Guard
from ssis import UserError, config, data, distributed, refine, sam
from ssis.datasets import coco_json, shapes
from ssis.io import sam_weights
from ssis.io.embeddings import Embeddings
from ssis.targets import boxes_of
from ssis.tools import train_tiny_sam

fast = pytest.mark.fast


class Pictures:
    """A dataset of image files on disk, as far as the cache needs one."""

    def __init__(self, folder, count: int = 3, size=(60, 90)):
        from PIL import Image

        self.paths = [folder / f"{k}.png" for k in range(count)]
        for k, path in enumerate(self.paths):
            generator = torch.Generator().manual_seed(k)
            pixels = torch.randint(0, 255, (*size, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path)

    def path(self, index: int) -> str:
        return str(self.paths[index])

    def image(self, index: int) -> torch.Tensor:
        from ssis.io.images import read_image

        return read_image(self.path(index))

    def target(self, index: int) -> dict:
        masks = torch.zeros(1, *self.image(index).shape[1:], dtype=torch.uint8)
        masks[0, 10:40, 20:60] = 1
        return dict(masks=masks)


@pytest.fixture(scope="module")
def tiny():
    return sam.SegmentAnything("tiny", "", "cpu")


@fast
def test_the_same_masks_as_the_librarys_predictor(tiny, tmp_path):
    """An original of another size and shape than SAM's frame; two prompts of two points."""
    image = Pictures(tmp_path, 1, (130, 200)).image(0)
    points = torch.tensor([[[20.5, 30.5], [25.0, 40.0]], [[150.0, 99.5], [140.5, 90.0]]])
    logits, iou = tiny.candidates(tiny.encode(image), points, (130, 200), (130, 200))
    predictor = SamPredictor(tiny.net)
    predictor.set_image(image.permute(1, 2, 0).numpy())
    # The cache's precision.
    predictor.features = predictor.features.half().float()
    # Its points are numbers of pixels, from 0, in SAM's frame; ours are coordinates.
    theirs = ResizeLongestSide(tiny.side).apply_coords_torch(points, (130, 200)) - 0.5
    ones = torch.ones(2, 2, dtype=torch.int64)
    wanted = predictor.predict_torch(theirs, ones, return_logits=True)
    assert torch.allclose(logits, wanted[0], atol=1e-4)
    assert torch.allclose(iou, wanted[1], atol=1e-5)
    # Straight into a view's size, instead of by way of the original's.
    small, _ = tiny.candidates(tiny.encode(image), points, (130, 200), (65, 100))
    again = torch.nn.functional.interpolate(logits, (65, 100), mode="bilinear")
    assert ((small > 0) == (again > 0)).float().mean() > 0.99


@fast
def test_features_are_what_the_decoder_makes_masks_of(tiny, tmp_path):
    image = Pictures(tmp_path, 1).image(0)
    embedding, points = tiny.encode(image), torch.tensor([[20.5, 30.5], [70.0, 10.0]])
    seen = []
    decoder = tiny.net.mask_decoder.transformer
    hook = decoder.register_forward_hook(lambda module, given, made: seen.append(made[1]))
    tiny.candidates(embedding, points[:, None], (60, 90), (60, 90))
    hook.remove()
    assert torch.allclose(tiny.features(embedding, points, (60, 90)), seen[0], atol=1e-5)


@fast
def test_a_prompt_is_what_the_librarys_encoder_makes_of_it(tiny):
    points = torch.rand(4, 3, 2) * torch.tensor([90.0, 60.0])
    sparse, dense = tiny.prompt(points, (60, 90))
    height, width = tiny.resized((60, 90))
    inside = points * torch.tensor([width / 90, height / 60])
    # The library counts from pixel centers, and adds the half pixel itself.
    given = (inside - 0.5, torch.ones(4, 3, dtype=torch.int64))
    expected = tiny.net.prompt_encoder(given, None, None)
    torch.testing.assert_close(sparse, expected[0])
    assert torch.equal(dense, expected[1])


@fast
def test_each_image_is_encoded_once_and_the_cache_changes_nothing(tiny, tmp_path):
    pictures, folder = Pictures(tmp_path), tmp_path / "cache"
    first = Embeddings(tiny, pictures, str(folder))
    values = [first[k] for k in (0, 1, 2, 1, 0)]
    assert first.encoded == 3 and torch.equal(values[0], values[4])
    # Another run: from disk. And a third, without room anywhere: anew each time.
    second = Embeddings(tiny, pictures, str(folder))
    assert all(torch.equal(second[k], first[k]) for k in range(3)) and second.encoded == 0
    third = Embeddings(tiny, pictures, memory_gb=0.0)
    assert all(torch.equal(third[k], first[k]) for k in (0, 0, 1)) and third.encoded == 3
    points = torch.tensor([[[30.0, 30.0]]])
    masks = [
        tiny.candidates(part[0], points, (60, 90), (60, 90))[0] for part in (first, second, third)
    ]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    # The limits hold: room for one on disk, for none in memory.
    size = values[0].numel() * 2
    small = (str(tmp_path / "small"), (1.5 * size) / 1e9, 0.0)
    fourth = Embeddings(tiny, pictures, *small)
    assert [fourth[k] is not None for k in (0, 1, 0, 1)] and fourth.encoded == 3
    assert len(list((tmp_path / "small").iterdir())) == 1 and not fourth.memory
    # A limit that the folder has reached already holds for the next run too.
    fifth = Embeddings(tiny, pictures, *small)
    assert fifth[2] is not None and len(list((tmp_path / "small").iterdir())) == 1


@fast
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_entry_is_noticed_and_made_again(tiny, tmp_path, damage, capsys):
    pictures, folder = Pictures(tmp_path, 1), tmp_path / "cache"
    wanted = Embeddings(tiny, pictures, str(folder))[0]
    (entry,) = folder.iterdir()
    content = bytearray(entry.read_bytes())
    if damage == "flipped":
        content[500] ^= 4
    entry.write_bytes(dict(cut=content[:-10], flipped=content, empty=b"")[damage])
    again = Embeddings(tiny, pictures, str(folder))
    assert torch.equal(again[0], wanted) and again.encoded == 1
    assert "damaged" in capsys.readouterr().err
    last = Embeddings(tiny, pictures, str(folder))
    assert torch.equal(last[0], wanted) and last.encoded == 0


@fast
def test_another_image_or_another_sam_is_not_served_the_old_entry(tiny, tmp_path):
    pictures, folder = Pictures(tmp_path, 2), tmp_path / "cache"
    first = Embeddings(tiny, pictures, str(folder))
    old, other = first[0], first[1]
    # The same name, another content.
    pictures.paths[0].write_bytes(pictures.paths[1].read_bytes())
    again = Embeddings(tiny, pictures, str(folder))
    assert torch.equal(again[0], other) and not torch.equal(again[0], old)
    path = tmp_path / "tiny.pt"
    weights = {k: v.half() for k, v in sam.build_tiny(96, 6).state_dict().items()}
    torch.save(dict(side=96, patch=6, model=weights), path)
    third = Embeddings(sam.SegmentAnything("tiny", str(path), "cpu"), pictures, str(folder))
    assert not torch.equal(third[1], other) and third.encoded == 1


@fast
def test_wrong_checkpoints_are_refused_in_one_line(tmp_path):
    junk, weights, other = tmp_path / "junk.pth", tmp_path / "w.pth", tmp_path / "o.pth"
    junk.write_bytes(b"not a checkpoint")
    torch.save(dict(a=torch.zeros(1)), weights)
    torch.save([1, 2], other)
    for kind, path, words in (
        ("vit_b", "", "sam_vit_b_01ec64"),
        ("vit_h", tmp_path / "none.pth", "not found"),
        ("vit_b", junk, "cannot be read"),
        ("tiny", junk, "cannot be read"),
        ("tiny", weights, "not of --sam tiny"),
        ("vit_b", other, "not a dict of tensors"),
    ):
        with pytest.raises(UserError, match=words) as error:
            sam.SegmentAnything(kind, str(path) if path else "", "cpu")
        assert "\n" not in str(error.value)
    # Before anything is read or trained; and nothing is asked of who does not use it.
    with pytest.raises(UserError, match="sam_vit_b_01ec64"):
        config.parse(["--sam", "vit_b"])
    with pytest.raises(UserError, match="nothing uses SAM"):
        config.parse(["--method", "pl-dc", "--sam-checkpoint", "x"])
    assert not config.parse(["--preset", "coco", "--method", "pl-dc"]).uses_sam


def measured(tiny, images: int, count: int) -> float:
    """Mean IoU of the candidate chosen by predicted IoU, on shapes never seen."""
    found = []
    for k in range(images):
        image, masks, _ = shapes.draw_scene(seed=77, part=1, index=k)
        pixels = torch.as_tensor(image).permute(2, 0, 1)
        masks = torch.as_tensor(masks)
        points = train_tiny_sam.draw_points(masks, count, blurred=False) + 0.5
        logits, iou = tiny.candidates(tiny.encode(pixels), points, (96, 96), (96, 96))
        chosen, agreement = refine.choose(logits, iou, masks, "iou")
        assert chosen.shape == masks.shape
        found += agreement.tolist()
    return sum(found) / len(found)


@fast
def test_the_shipped_tiny_sam_knows_shapes_it_has_never_seen(tiny):
    """docs/sam.md has the measured values, over more images (docs/bench/bench_sam.py iou)."""
    assert sam_weights.TINY.stat().st_size < 5_000_000
    one, three = measured(tiny, 40, 1), measured(tiny, 40, 3)
    assert three > 0.87 and one > 0.85


@fast
def test_scenes_of_the_tiny_sam_have_disjoint_masks():
    import numpy as np

    rng = np.random.RandomState(0)
    for _ in range(5):
        image, masks = train_tiny_sam.scene(rng, 96)
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        assert masks.sum(0).max() <= 1 and 1 <= len(masks) <= 5


@fast
def test_a_tiny_sam_goes_on_in_another_frame():
    """All weights are taken over; positions are spread over the new cells."""
    shipped = torch.load(sam_weights.TINY, weights_only=True)["model"]
    same, larger = sam.build_tiny(96, 6), sam.build_tiny(192, 6)
    train_tiny_sam.start_from(same, sam_weights.TINY)
    train_tiny_sam.start_from(larger, sam_weights.TINY)
    place = "image_encoder.pos_embed"
    for name, value in shipped.items():
        torch.testing.assert_close(same.state_dict()[name], value.float())
        if name != place:
            torch.testing.assert_close(larger.state_dict()[name], value.float())
    # 2 x 2 new cells lie where one was: their mean is about its vector.
    spread = larger.state_dict()[place]
    assert spread.shape == (1, 32, 32, 128)
    means = spread.unflatten(1, (16, 2)).unflatten(3, (16, 2)).mean(dim=(2, 4))
    old = shipped[place].float()
    assert (means - old).abs().mean() < 0.3 * old.abs().mean()
    with pytest.raises(UserError, match="add --patch 6"):
        train_tiny_sam.start_from(sam.build_tiny(96, 8), sam_weights.TINY)
    with pytest.raises(UserError, match="not a tiny SAM"):
        train_tiny_sam.start_from(same, sam_weights.TINY.with_name("sam.py"))


def test_training_the_tiny_sam_lowers_its_loss(tmp_path):
    """A few steps, on the command line; the file that it writes is one that is read."""
    import subprocess
    import sys

    path = tmp_path / "tiny.pt"
    done = subprocess.run(
        [sys.executable, "-m", "ssis", "sam", "--out", str(path), "--minutes", "0.05"],
        cwd=sam_weights.TINY.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = sam.SegmentAnything("tiny", str(path), "cpu")
    assert made.cells == 16 and path.stat().st_size < 5_000_000
    # The loss falls when one scene is shown again and again.
    net = sam.build_tiny(96, 6)
    import numpy as np

    image, masks = train_tiny_sam.scene(np.random.RandomState(3), 96)
    pixels = torch.as_tensor(image).permute(2, 0, 1)[None]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    seen = []
    for _ in range(30):
        embedding = net.image_encoder(net.preprocess(pixels))[0]
        loss, _ = train_tiny_sam.image_loss(net, embedding, torch.as_tensor(masks))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert sum(seen[-5:]) < 0.7 * sum(seen[:5])


def test_the_whole_of_s4m_with_the_official_vit_b(tmp_path):
    """Random weights in Meta's format, an image of 1024 pixels, a step of each stage.

    One image, labeled and unlabeled, in several views: it is encoded once.
    """
    weights = tmp_path / "sam_vit_b.pth"
    torch.save(sam_model_registry["vit_b"]().state_dict(), weights)
    Pictures(tmp_path, 1, (640, 1024))
    square = [[100, 100, 400, 100, 400, 500, 100, 500]]
    images = [dict(id=0, file_name="0.png", width=1024, height=640)]
    marks = [dict(id=0, image_id=0, category_id=1, segmentation=square)]
    raw = dict(images=images, annotations=marks, categories=[dict(id=1, name="thing")])
    (tmp_path / "train.json").write_text(json.dumps(raw))
    given = f"--preset custom --method s4m --sam vit_b --sam-checkpoint {weights} --arp both "
    given += f"--sam-cache {tmp_path / 'cache'} --structure-queries 8 --refine-gate 0 "
    given += "--refine iou --tau-class 0 --short-side 160 --short-side-min 160"
    settings = config.parse(given.split())
    train_set = coco_json.load_coco(str(tmp_path / "train.json"), str(tmp_path))
    student, labeler, structure, *rest = build(settings, train_set, *distributed.start("cpu"))
    guard = Guard(student, train_set.files, tmp_path, False, 0)
    sam_ = labeler.embeddings.sam
    assert (sam_.side, sam_.cells, settings.structure_weight) == (1024, 64, 1.0)
    # An untrained teacher finds something everywhere.
    labeler.teacher.roi_heads.detections_per_img = 2
    labeled = data.Stream(train_set, [0], settings.view_size, 0, True)
    unlabeled = data.Stream(train_set, [0], settings.view_size, 1, False)
    more = (settings, structure, *rest, guard)
    row, _ = train.train_step(student, labeler, [labeled[0]], None, 0, *more)
    # 640 of 1024 rows are image: 40 of 64 cells.
    assert row["labeled/loss_structure"][0] > 0 and structure[0][1].shape == (8, 40 * 64)
    items = [unlabeled[0], unlabeled[1]]
    weak = [item["image"] for item in items]
    stages = train.pseudo_labels(labeler, weak, items, settings, 1)
    for found in stages["final"]:
        assert found.masks.shape[1:] == (160, 256) and found.masks.flatten(1).any(1).all()
        assert torch.equal(found.boxes, boxes_of(found.masks))
    row, kept = train.train_step(student, labeler, [labeled[1]], items, 1, *more)
    assert [len(labels) for labels in kept] == [2, 2]
    assert row["unlabeled/loss_mask"][0] > 0 and row["pseudo_per_image"][0] == 4
    # One encoding, ever; after the distillation it came back from the disk.
    assert labeler.embeddings.encoded == 1 and len(list((tmp_path / "cache").iterdir())) == 1
    # Another model's weights, in the same format.
    torch.save(sam.build_tiny(96, 6).state_dict(), weights)
    with pytest.raises(UserError, match="not of --sam vit_b"):
        sam.SegmentAnything("vit_b", str(weights), "cpu")
