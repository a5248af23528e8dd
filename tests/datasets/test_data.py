"""Datasets, the split and the streams.

Oracles: pycocotools reads the same JSON; permutations and shares are counted by hand;
images are written in the odd formats that people have.
"""

import json
import pickle

import numpy as np
import pytest
import torch
from torchvision.ops import masks_to_boxes
from conftest import real, write_coco
from PIL import Image
from pycocotools.coco import COCO

from ssis import UserError, augment, data
from ssis.datasets import coco_json, split
from ssis.io import images
from ssis.datasets.dataset import Dataset
from ssis.targets import boxes_of, sanitize

pytestmark = pytest.mark.fast
SIZE = augment.ViewSize(short_min=20, short_max=40, long_max=60)


def load(folder) -> Dataset:
    return coco_json.load_coco(str(folder / "coco.json"), str(folder / "images"))


def compare_with_pycocotools(dataset: Dataset, path) -> int:
    """Every mask, label and crowd flag against pycocotools; returns how many."""
    oracle, count = COCO(str(path)), 0
    for index, image_id in enumerate(dataset.image_ids):
        theirs = oracle.imgToAnns[image_id]
        singles = [a for a in theirs if not a.get("iscrowd")]
        target = dataset.target(index)
        names = [oracle.cats[a["category_id"]]["name"] for a in singles]
        assert [dataset.names[label - 1] for label in target["labels"].tolist()] == names
        for mask, annotation in zip(target["masks"], singles, strict=True):
            assert (mask.numpy() == oracle.annToMask(annotation)).all()
            count += 1
    return count


def test_masks_and_labels_are_pycocotools_own(coco_folder):
    dataset = load(coco_folder)
    assert dataset.names == ["cat", "dog", "unused"] and dataset.category_ids == [0, 7, 9]
    assert compare_with_pycocotools(dataset, coco_folder / "coco.json") == 4


def test_real_coco_masks_are_pycocotools_own():
    folder = real("coco_mini")
    path = folder / "instances_train.json"
    dataset = coco_json.load_coco(str(path), str(folder / "train"))
    assert len(dataset.names) == 80
    assert compare_with_pycocotools(dataset, path) > 500


def test_boxes_are_those_of_the_masks_and_never_degenerate():
    masks = torch.zeros(4, 10, 12, dtype=torch.uint8)
    masks[0, 2:5, 3:9] = 1
    masks[1, 7, 4] = 1
    masks[3, 0, :] = 1
    target = sanitize(dict(masks=masks, labels=torch.arange(4)))
    assert target["boxes"].tolist() == [[3, 2, 9, 5], [4, 7, 5, 8], [0, 0, 12, 1]]
    assert target["labels"].tolist() == [0, 1, 3]
    empty = sanitize(dict(masks=masks[2:3], labels=torch.arange(1)))
    assert empty["boxes"].shape == (0, 4) and empty["boxes"].dtype == torch.float32


def test_ground_truth_for_evaluation_has_recomputed_areas_and_crowds(coco_folder):
    truth = load(coco_folder).coco(range(4))
    annotations = truth.dataset["annotations"]
    assert all(a["area"] > 0 and min(a["bbox"][2:]) > 0 for a in annotations)
    assert sum(a["iscrowd"] for a in annotations) == 1
    assert min(a["id"] for a in annotations) == 1


def test_masks_without_pixels_are_nothing_to_find(tmp_path):
    def spoil(raw):
        # Of a class that nothing else has: an RLE of background, a line's end, a sliver.
        for k, segmentation in enumerate(
            (
                dict(size=[32, 48], counts=[32 * 48]),
                [[3, 3]],
                [[10.1, 10.1, 10.2, 10.1, 10.2, 30.1]],
            )
        ):
            raw["annotations"].append(
                dict(id=90 + k, image_id=0, category_id=9, iscrowd=0, segmentation=segmentation)
            )

    write_coco(tmp_path, spoil)
    dataset = load(tmp_path)
    assert any("2 annotations without a mask are left out" in line for line in dataset.warnings)
    assert len(dataset.target(0)["labels"]) == 2
    # The sliver is a polygon like others until it is drawn; an evaluation does not ask for it.
    assert dataset.rles(0)[-1]["size"] == [32, 48] and len(dataset.rles(0)) == 3
    found = dataset.coco(range(4)).dataset["annotations"]
    assert [a["category_id"] for a in found if a["image_id"] == 0] == [1, 2]
    assert [a["id"] for a in found] == list(range(1, len(found) + 1))


def test_an_image_without_annotations_is_a_legal_negative(coco_folder):
    target = load(coco_folder).target(3)
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 32, 48)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_metadata_is_one_line_or_no_matter(tmp_path):
    """2,000 photos with wrong bytes in their EXIF; Pillow raises what it likes."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769], exif[0x011A] = 6, "maker", {0x9003: "2020"}, 72.0
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (9, 9)).save(path, "JPEG", exif=exif)
    whole = path.read_bytes()
    start, rng, refused = whole.find(b"Exif"), np.random.RandomState(0), 0
    # Two that older versions answered with struct.error and AttributeError.
    for places in [{41: 25, 97: 39}, {43: 11, 123: 111}] + 2000 * [None]:
        content = bytearray(whole)
        end = start + len(exif.tobytes())
        places = places or {rng.randint(start, end): rng.randint(256) for _ in range(2)}
        for place, value in places.items():
            content[place] = value
        path.write_bytes(content)
        for look in (images.read_image, lambda p: images.check_header(p, (9, 9))):
            try:
                look(str(path))
            except UserError as error:
                refused += 1
                assert str(path) in str(error)
    assert refused < 400


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "I;16"])
def test_images_of_all_modes_become_rgb(tmp_path, mode):
    gray = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))
    if mode == "I;16":
        Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "a.tiff")
        path = tmp_path / "a.tiff"
    else:
        kind = "tiff" if mode == "CMYK" else "png"
        path = tmp_path / f"a.{kind}"
        Image.fromarray(gray).convert("RGB").convert(mode).save(path)
    image = images.read_image(str(path), (30, 40))
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8
    # Dark on the left, bright on the right, in each mode; 16 bits must not clip to white.
    assert image[:, :, :8].float().mean() < 60 and image[:, :, -8:].float().mean() > 190


def test_exif_rotation_follows_the_size_that_the_annotations_speak_of(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    path = str(tmp_path / "a.jpg")
    upright = images.read_image(path, (30, 20))
    assert upright[:, :8].float().mean() > 200 > 50 > upright[:, 12:].float().mean()
    stored = images.read_image(path, (20, 30))
    assert stored[:, :, :8].float().mean() > 200 > 50 > stored[:, :, 12:].float().mean()
    with pytest.raises(UserError, match="is 20 x 30 pixels, the JSON says 33 x 44"):
        images.read_image(path, (44, 33))


def test_the_split_is_seeded_covers_classes_and_can_be_given_back(coco_folder, tmp_path):
    dataset = load(coco_folder)
    first, warnings = split.draw_split(dataset, "2", 0)
    assert split.draw_split(dataset, "50%", 0)[0] == first
    covered = set().union(*(dataset.present_labels(i) for i in first))
    assert covered == {1, 2} and "unused" in warnings[0]
    split.write_split(dataset, first, tmp_path / "split.json", 0)
    assert split.draw_split(dataset, str(tmp_path / "split.json"), 1)[0] == first
    (tmp_path / "list.json").write_text(json.dumps(["3.png", "1.png"]))
    assert split.draw_split(dataset, str(tmp_path / "list.json"), 0)[0] == [1, 3]
    seeds = {tuple(split.draw_split(dataset, "1", seed)[0]) for seed in range(20)}
    assert len(seeds) > 1


class Labels:
    """Of a dataset what the split asks of it: 40 annotated images and two bare ones; 6 classes."""

    annotated, names, source = 40, [*"abcdef"], "labels"
    files = tuple(map(str, range(42)))

    def present_labels(self, index: int) -> set:
        # Classes 1 to 4 are everywhere, 5 in one of ten, 6 in two images.
        return {index % 4 + 1} | ({5} if index % 10 == 0 else set()) | ({6} & {6 * (index < 2)})

    def __len__(self) -> int:
        return 42


def test_a_split_is_of_the_asked_size_and_the_rest_of_it_is_uniform():
    """10 of 40 images, drawn 60 times: the seed's alone, each class in it, none favored."""
    times = torch.zeros(40)
    for seed in range(60):
        torch.manual_seed(seed + 1)
        chosen, warnings = split.draw_split(Labels(), "10", seed)
        assert chosen == sorted(set(chosen)) and len(chosen) == 10 and not warnings
        # The split is the seed's, whatever was drawn before it.
        torch.manual_seed(0)
        assert split.draw_split(Labels(), "25%", seed)[0] == chosen
        covered = set().union(*(Labels().present_labels(index) for index in chosen))
        assert covered == set(range(1, 7))
        times[chosen] += 1
    # One of the two images of the rare class in each; of the others 13 to 16 times each, with
    # a standard deviation of 3.5.
    assert times[:2].sum() >= 60 and times[2:].min() >= 3 and times[2:].max() <= 35


def test_a_bare_folder_gives_unlabeled_images_that_are_not_listed_yet(coco_folder):
    dataset = load(coco_folder)
    (coco_folder / "images" / "sub").mkdir()
    Image.new("L", (50, 40)).save(coco_folder / "images" / "sub" / "new.png")
    assert coco_json.add_folder(dataset, str(coco_folder / "images")) == [4]
    assert dataset.image(4).shape == (3, 40, 50)
    assert dataset.annotated == 4 and dataset.instances_per_image([0, 3]) == 1.0
    with pytest.raises(UserError, match="is 5 of 4 images"):
        split.draw_split(dataset, "5", 0)


def test_the_stream_is_a_function_of_seed_and_position(coco_folder):
    dataset = load(coco_folder)
    stream = data.Stream(dataset, [0, 1, 2, 3], SIZE, 7, True)
    epochs = [[stream[k]["index"] for k in range(4 * e, 4 * e + 4)] for e in range(6)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    state = torch.get_rng_state()
    again = data.Stream(dataset, [0, 1, 2, 3], SIZE, 7, True)
    for k in (21, 3, 4):
        assert torch.equal(stream[k]["image"], again[k]["image"])
        assert stream[k]["seed"] == again[k]["seed"]
    # Reading data must not touch the generator that the model draws from.
    assert torch.equal(state, torch.get_rng_state())


class Classes:
    """Images of which only the classes are known."""

    def __init__(self, *present):
        self.present = present

    def present_labels(self, index: int) -> set:
        return self.present[index]


def test_a_large_photo_is_decoded_once_and_keeps_its_frame(tmp_path):
    """Its mask follows its pixels, and its geometry speaks of the file's own size."""
    pixels = np.zeros((300, 400, 3), np.uint8)
    pixels[60:200, 40:160] = 255
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    square = [40, 60, 160, 60, 160, 200, 40, 200]
    one = dict(id=1, image_id=1, category_id=1, segmentation=[square], iscrowd=0, area=1)
    whole = dict(
        images=[dict(id=1, file_name="a.png", height=300, width=400)],
        annotations=[dict(one, bbox=[40, 60, 120, 140])],
        categories=[dict(id=1, name="square")],
    )
    (tmp_path / "coco.json").write_text(json.dumps(whole))
    stream = data.Stream(load(tmp_path), [0], SIZE, 3, True)
    first = stream[0]
    (tmp_path / "images" / "a.png").unlink()
    for item in (first, stream[1], stream[2]):
        assert item["geometry"].original == (300, 400)
        shown, mask = item["image"][0] > 0.5, item["target"]["masks"][0].bool()
        assert (shown & mask).sum() / (shown | mask).sum() > 0.9
        # The middle of the view's mask, in the photo, is the middle of the square.
        rows, columns = torch.where(mask)
        middle = torch.tensor([columns.float().mean() + 0.5, rows.float().mean() + 0.5])
        there = item["geometry"].to_original(middle[None])[0]
        assert (there - torch.tensor([100.0, 130.0])).abs().max() < 6
    # With a crop, whose scale may be anything, the file is read as before.
    cropped = SIZE._replace(crop=(30, 30))
    with pytest.raises(UserError, match="image not found"):
        data.Stream(load(tmp_path), [0], cropped, 3, True)[0]


def test_repeat_factors_by_hand():
    """Class 1 in all of four images, class 2 in one: sqrt(10 / 1), sqrt(10 / 0.25)."""
    images = Classes({1}, {1, 2}, {1}, {1}, set(), {3})
    found = data.repeat_factors(images, [0, 1, 2, 3], 10.0)
    assert found == pytest.approx([10**0.5, 40**0.5, 10**0.5, 10**0.5])
    # With a threshold that all frequencies reach nothing is repeated.
    assert data.repeat_factors(images, [0, 1, 2, 3], 0.25) == [1.0] * 4
    assert data.repeat_factors(images, [0, 1], 0.75) == pytest.approx([1.0, 1.5**0.5])
    # Without any instance nothing is rare; fractions are of the given images.
    assert data.repeat_factors(images, [4, 5], 1.0) == pytest.approx([1.0, 2**0.5])


def test_a_stream_draws_by_factor_and_is_still_a_function_of_its_position(coco_folder):
    """Factors 1, 2, 1, 4: of 2,000 draws 250, 500, 250 and 1,000."""
    dataset = load(coco_folder)
    factors = [1.0, 2.0, 1.0, 4.0]
    stream = data.Stream(dataset, [3, 1, 0, 2], SIZE, 7, True, factors)
    dataset.image = lambda index: torch.zeros(3, 16, 16, dtype=torch.uint8)
    stream.with_target = False
    drawn = [stream[k]["index"] for k in range(2000)]
    counts = [drawn.count(index) for index in (3, 1, 0, 2)]
    for count, factor in zip(counts, factors, strict=True):
        assert count == pytest.approx(2000 * factor / 8, rel=0.05)
    # In each epoch of four the last image appears twice: no epoch is far from its share.
    assert all(drawn[e : e + 4].count(2) == 2 for e in range(0, 2000, 4))
    again = data.Stream(dataset, [3, 1, 0, 2], SIZE, 7, False, factors)
    assert [again[k]["index"] for k in (1999, 5, 1000)] == [drawn[k] for k in (1999, 5, 1000)]
    # Equal factors change nothing.
    alike = data.Stream(dataset, [3, 1, 0, 2], SIZE, 7, False, [2.5] * 4)
    plain = data.Stream(dataset, [3, 1, 0, 2], SIZE, 7, False)
    assert [alike[k]["index"] for k in range(40)] == [plain[k]["index"] for k in range(40)]


def test_in_each_epoch_an_image_comes_its_share_of_times_rounded_down_or_up():
    factors = (1 + 9 * torch.rand(30, generator=torch.Generator().manual_seed(0))).tolist()
    stream = data.Stream(None, list(range(30)), SIZE, 3, False, factors)
    stream.dataset = Blank()
    total = np.zeros(30)
    for epoch in range(50):
        drawn = [stream[k]["index"] for k in range(30 * epoch, 30 * epoch + 30)]
        counts, share = np.bincount(drawn, minlength=30), 30 * np.array(factors) / sum(factors)
        assert (counts >= np.floor(share)).all() and (counts <= np.ceil(share)).all()
        # Shuffled: the draws do not come in ascending order.
        assert drawn != sorted(drawn)
        total += counts
    assert np.abs(total / 50 - share).max() < 0.2


class Blank:
    """Images without content, of which only the numbers matter."""

    def image(self, index: int) -> torch.Tensor:
        return torch.zeros(3, 16, 16, dtype=torch.uint8)


def test_only_labeled_images_after_pretraining_are_repeated(coco_folder):
    dataset = load(coco_folder)
    streams = data.make_streams(dataset, [0, 1], [2, 3], SIZE, 0, "none", 10.0)
    assert streams.repeated.factors.tolist() == data.repeat_factors(dataset, [0, 1], 10.0)
    others = (streams.labeled, streams.unlabeled, streams.audit)
    assert all(stream.factors is None for stream in others)
    plain = data.make_streams(dataset, [0, 1], [2, 3], SIZE, 0, "none")
    assert plain.repeated is plain.labeled


def test_a_cropped_item_has_its_target_in_the_frame_of_the_view(coco_folder):
    """Crops of 16 x 24: the masks are those that the geometry gives, the boxes theirs."""
    dataset, size = load(coco_folder), SIZE._replace(crop=(16, 24), scale=(1.0, 3.0))
    stream = data.Stream(dataset, [0, 1, 2, 3], size, 7, True)
    cut = 0
    for item in (stream[k] for k in range(24)):
        image, target, geometry = item["image"], item["target"], item["geometry"]
        assert image.shape[1:] == target["masks"].shape[1:] == geometry.view
        assert geometry.view[0] <= 16 and geometry.view[1] <= 24
        truth = dataset.target(item["index"])
        whole = truth["masks"].new_zeros(1, *geometry.scaled)
        masks = geometry.to_view(augment.resize_masks(truth["masks"], whole))
        kept = masks.bool().flatten(1).any(dim=1)
        assert torch.equal(target["masks"], masks[kept])
        assert torch.equal(target["labels"], truth["labels"][kept])
        assert torch.equal(target["boxes"], boxes_of(masks[kept]))
        cut += not kept.all()
    # Some instances lie outside of their crops, and are gone.
    assert cut


def test_unlabeled_items_carry_no_truth(coco_folder):
    stream = data.Stream(load(coco_folder), [0, 1], SIZE, 7, False)
    assert set(stream[0]) == {"image", "index", "seed", "geometry"}


def test_processes_share_the_same_global_batches():
    whole = list(data.Shard(8, 3, 6, rank=0, world_size=1))
    parts = [list(data.Shard(8, 3, 6, rank=r, world_size=4)) for r in range(4)]
    assert [[k for part in parts for k in part[s]] for s in range(3)] == whole
    assert whole[0] == list(range(24, 32)) and len(data.Shard(8, 3, 6, 0, 1)) == 3


def test_after_a_larger_batch_the_items_are_numbered_on():
    """S4M: 16 images a step for 3 steps, then 12: no item twice, none left out."""
    before = [k for batch in data.Shard(16, 0, 3, 0, 1) for k in batch]
    ahead = 3 * (16 - 12)
    parts = [list(data.Shard(12, 3, 5, r, 2, ahead)) for r in range(2)]
    after = [k for step in range(2) for part in parts for k in part[step]]
    assert before + after == list(range(3 * 16 + 2 * 12))
    # A run that is resumed in its second stage goes on at the same item.
    assert list(data.Shard(12, 4, 5, 0, 1, ahead)) == [list(range(60, 72))]


def test_annotations_are_packed_into_few_arrays(shapes_folder):
    dataset = coco_json.load_coco(f"{shapes_folder}/instances_train.json", f"{shapes_folder}/train")
    for name, value in vars(dataset).items():
        # Lists of names at most; nothing that holds an object for each annotation.
        if isinstance(value, list):
            assert len(value) <= len(dataset), name
            assert all(isinstance(v, (str, int, type(None))) for v in value), name
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy.target(5)["masks"], dataset.target(5)["masks"])


def test_classes_are_matched_by_name_not_by_id(coco_folder, tmp_path):
    def renumber(raw):
        raw["categories"] = [dict(id=1, name="dog"), dict(id=2, name="cat")]
        raw["annotations"] = [dict(raw["annotations"][0], category_id=2)]

    write_coco(tmp_path / "other", renumber)
    other = coco_json.load_coco(
        str(tmp_path / "other/coco.json"), str(tmp_path / "other/images"), ["cat", "dog", "unused"]
    )
    assert other.target(0)["labels"].tolist() == [1]
    assert other.category_ids == [2, 1, None]


def test_boxes_are_torchvisions_and_end_after_the_last_pixel():
    masks = torch.rand(20, 13, 17) < 0.02
    masks[torch.arange(20), torch.randint(13, (20,)), torch.randint(17, (20,))] = True
    expected = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
    for kind in (torch.bool, torch.uint8, torch.float32):
        found = boxes_of(masks.to(kind))
        assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert boxes_of(masks[:0]).shape == (0, 4)


def test_annotated_images_are_the_labeled_ones(coco_folder):
    """Image 3 has no annotation: unlabeled, and no image without instances for the audit."""
    dataset = load(coco_folder)
    assert split.draw_split(dataset, "annotated", 0)[0] == [0, 1, 2]
    size = augment.ViewSize(32, 32, 48)
    for audited in (True, False):
        streams = data.make_streams(dataset, [0, 1, 2], [3], size, 0, "none", audited=audited)
        assert (streams.audit is not None) == audited


def test_classes_that_are_mirror_images_are_named():
    names = ["Left hand", "foot", "right hand", "left eye"]
    (line,) = split.mirrored(names)
    assert "Left hand / right hand" in line and "eye" not in line and "--no-flip" in line
    assert split.mirrored(["hand", "bright left"]) == []
    for pair in (
        ("hand_L", "hand_R"), ("R-hand", "L-hand"), ("left_hand", "right-hand"), ("lh", "rh"),
        ("turn (l)", "turn (r)"), ("links", "Rechts"), ("clockwise", "counterclockwise"),
    ):  # fmt: skip
        assert split.mirrored(["foot", *pair]), pair
    assert split.mirrored(["l", "b", "owl", "our"]) == []


def test_validation_images_that_cannot_judge_are_told(coco_folder):
    """None annotated, a class that is not there, and few."""
    dataset = coco_json.load_coco(str(coco_folder / "coco.json"), str(coco_folder / "images"))
    there = dataset.class_counts(range(len(dataset)))
    (few,) = split.judging(dataset, there)
    assert "4 validation images are few" in few
    dataset.names.append("heron")
    unseen, _ = split.judging(dataset, torch.cat([there, torch.tensor([3])]))
    assert "no validation image has heron: neither AP nor the choice" in unseen
    dataset.names.pop()
    dataset.crowd[:] = True
    with pytest.raises(UserError, match="no image has an annotated instance"):
        split.judging(dataset, there)
