r"""Which category classifier? The measurement behind `prototypes` and `imagenet`.

    python docs/bench/category_classifiers.py runs/<name>/pretrained.pt [--images 300]

On unlabeled images whose ground truth is known, the first teacher's pseudo-labels that lie on an
instance get a class again, from each candidate for a category classifier:

* views      the teacher's own box head on other views of the image (agreement of views);
* mean       cosine to the mean of each class of the labeled instances' descriptions;
* nearest    cosine to the three nearest labeled instances of each class;

with descriptions: features averaged over a region (mask, band around its edge, box), the box
head's 256 numbers, the 7 x 7 feature map in the box without and with the mask, the
silhouette, and the last two together, which is `prototypes.Prototypes`; of a run with
`--model timm` also the pretrained backbone's features of the crop: `imagenet.ClassMeans`.

Printed: fraction of right classes of the candidate alone, and mixed with the teacher at
w = 0.5 and 0.4 (PL-DC Eq. (DICC)).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.nn import functional as F

from ssis import config, data, filters, imagenet, inference, networks, prototypes, teacher
from ssis.datasets import parts, split
from ssis.engine import build
from ssis.io import checkpoint
from ssis.targets import match

NEAREST = prototypes.NEAREST
IMAGENET = "ImageNet features of the crop"


def region_mean(features: Tensor, region: Tensor) -> Tensor:
    """The mean of a feature map (1, D, h, w) over regions (N, H, W): (N, D)."""
    cover = F.interpolate(region[None], features.shape[-2:], mode="area")[0]
    total = torch.einsum("dhw,nhw->nd", features[0], cover)
    return total / cover.flatten(1).sum(1).clamp(min=1e-4)[:, None]


def descriptions(net, encoder, image: Tensor, boxes: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Every description of some instances of one image: name -> (N, length)."""
    padded = net.transform.batch_images([net.transform.normalize(image)])
    size = tuple(image.shape[-2:])
    maps = net.backbone(padded)
    # Regions in the padded frame.
    grown = (0, padded.shape[-1] - size[1], 0, padded.shape[-2] - size[0])
    inside = F.pad(masks, grown)
    band = F.max_pool2d(inside[None], 7, 1, 3)[0] + F.max_pool2d(-inside[None], 5, 1, 2)[0]
    box = torch.zeros_like(inside)
    for k, (x1, y1, x2, y2) in enumerate(boxes.round().long().tolist()):
        box[k, y1:y2, x1:x2] = 1
    described = {}
    for name, region in dict(mask=inside, band=band, box=box).items():
        levels = [F.normalize(region_mean(maps[key], region)) for key in ("0", "1", "2")]
        described[f"FPN, stride 4, over the {name}"] = levels[0]
        described[f"FPN, three levels, over the {name}"] = torch.cat(levels, dim=1)
    roi = net.roi_heads
    described["box head"] = roi.box_head(roi.box_roi_pool(maps, [boxes], [size]))
    cells = inference.features_in(net, [image], [boxes])[0]
    described["7 x 7 map in the box"] = cells.flatten(1)
    both = prototypes.Prototypes.describe(cells, masks, boxes)
    shape = prototypes.SILHOUETTE**2
    described["7 x 7 map, masked"] = both[:, :-shape]
    described["silhouette"] = both[:, -shape:]
    described["7 x 7 map, masked + silhouette"] = both
    if encoder:
        described[IMAGENET] = encoder.embed(image, boxes)
    return described


def other_views(net, image: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """The teacher's class distributions of given boxes in other views: name -> (N, C)."""

    def classify(view: Tensor, where: Tensor) -> Tensor:
        maps = net.backbone(net.transform.batch_images([net.transform.normalize(view)]))
        roi, size = net.roi_heads, tuple(view.shape[-2:])
        features = roi.box_head(roi.box_roi_pool(maps, [where], [size]))
        return roi.box_predictor(features)[0].softmax(1)[:, 1:]

    flipped = boxes.clone()
    flipped[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    opinions = {"the same view": classify(image, boxes), "flip": classify(image.flip(-1), flipped)}
    scaled = []
    for factor in (0.83, 1.17):
        size = [round(side * factor) for side in image.shape[-2:]]
        view = F.interpolate(image[None], size, mode="bilinear")[0]
        scale = torch.tensor([size[1] / image.shape[-1], size[0] / image.shape[-2]]).repeat(2)
        scaled.append(classify(view, boxes * scale))
    opinions["two scales"] = sum(scaled) / 2
    opinions["all views"] = sum(opinions.values()) / 3
    return opinions


def collect(net, encoder, stream, count: int, labeled: bool) -> tuple[dict, Tensor, Tensor]:
    """Descriptions (and views), true classes and teacher's distributions of instances.

    Args:
        net: the teacher.
        encoder: `imagenet.ClassMeans`, or None.
        stream: images with ground truth.
        count: of images.
        labeled: take the instances of the ground truth, else the teacher's pseudo-labels.
    """
    rows, classes, said = [], [], []
    for k in range(count):
        image, target = stream[k]["image"], stream[k]["target"]
        if labeled:
            boxes, masks, true = target["boxes"], target["masks"].float(), target["labels"]
            more, distribution = {}, torch.zeros(len(true), 0)
        else:
            pseudo = filters.keep(teacher.predict(net, [image], 0.7)[0], "score", 0.7, 0.0, 5)
            partner = match(pseudo.boxes, target["boxes"])
            pseudo, true = pseudo[partner >= 0], target["labels"][partner[partner >= 0]]
            boxes, masks, distribution = pseudo.boxes, pseudo.mask_probs, pseudo.distribution
            more = other_views(net, image, boxes) if len(true) else {}
        if len(true):
            rows.append(descriptions(net, encoder, image, boxes, masks) | more)
            classes.append(true - 1)
            said.append(distribution)
    together = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return together, torch.cat(classes), torch.cat(said)


def first_teacher(path: str) -> tuple:
    """The network of a `pretrained.pt`, its run's dataset, settings and split.

    Returns:
        network, dataset, settings, labeled and other indices, `imagenet.ClassMeans` of the
        backbone it started from (None without timm), class names.
    """
    state = checkpoint.load(path)
    settings = config.from_saved(state["config"])
    dataset, _, _ = parts.open_parts(settings)
    labeled, _ = split.draw_split(dataset, settings.labeled, settings.seed)
    kind, *rest = build.model_of(settings)
    net = networks.build(kind, len(state["names"]) + 1, *rest).eval()
    net.load_state_dict(state["student"])
    rest = sorted(set(range(dataset.annotated)) - set(labeled))
    encoder = None
    if settings.model == "timm":
        where = (settings.backbone, settings.backbone_weights)
        encoder = build.make_classifier("imagenet", state["names"], 0, 0, "", "", "cpu", where)
    return net, dataset, settings, labeled, rest, encoder, state["names"]


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=300)
    args = parser.parse_args()
    net, dataset, settings, labeled, rest, encoder, names = first_teacher(args.checkpoint)
    known, known_class, _ = collect(
        net,
        encoder,
        data.Stream(dataset, labeled, settings.view_size, 0, True),
        2 * len(labeled),
        True,
    )
    asked, true, said = collect(
        net, encoder, data.Stream(dataset, rest, settings.view_size, 1, True), args.images, False
    )
    classes = len(names)

    def right(scores: Tensor) -> str:
        return f"{(scores.argmax(1) == true).float().mean().item():.3f}"

    print(f"{len(true)} pseudo-labels on an instance; the teacher alone {right(said)}\n")
    print(f"{'category classifier':48} alone  w=0.5  w=0.4")

    def line(name: str, opinion: Tensor) -> None:
        # As `correction.fuse`: the teacher's distribution over the classes alone.
        alone = said / said.sum(dim=1, keepdim=True)
        mixed = [right(w * opinion + (1 - w) * alone) for w in (0.5, 0.4)]
        print(f"{name:48} {right(opinion)}  {mixed[0]}  {mixed[1]}")

    for name in asked:
        if name not in known:
            line(f"views: {name}", asked[name])
            continue
        query, bank = F.normalize(asked[name]), F.normalize(known[name])
        members = [bank[known_class == k] for k in range(classes)]
        means = F.normalize(torch.stack([rows.mean(0) for rows in members]))
        near = [(query @ rows.T).topk(min(NEAREST, len(rows))).values.mean(1) for rows in members]
        near = torch.stack(near, dim=1)
        for kind, score in (("mean", query @ means.T), ("nearest", near)):
            scale = imagenet.TEMPERATURE if name == IMAGENET else prototypes.TEMPERATURE
            line(f"{kind}: {name}", (score / scale).softmax(1))


if __name__ == "__main__":
    main()
