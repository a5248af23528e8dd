"""How S4M's refinement is best set: candidates, gate, points; and what it does to PL-DC.

    python docs/bench/refine_trial.py runs/<name>/pretrained.pt --images 150 [--sam-checkpoint F]

Of a first teacher's pseudo-labels (class score > 0.7) that lie on an instance: the mean
mask IoU with the ground truth, and how often the class is right by PL-DC's category classifier
alone, and mixed with the teacher at w = 0.5.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from category_classifiers import first_teacher

from ssis import correction, data, filters, prototypes, refine, sam, teacher
from ssis.io.embeddings import Embeddings
from ssis.targets import mask_iou, match

TRIALS = {
    f"{rule}, gate {gate}, {count} points, {sampling}": (rule, count, sampling, gate, False, 5)
    for rule, gate, count, sampling in (
        ("iou", 0.0, 3, "paper"),
        ("iou", 0.5, 3, "paper"),
        ("agreement", 0.0, 3, "paper"),
        ("agreement", 0.5, 3, "paper"),
        ("agreement", 0.7, 3, "paper"),
        ("agreement", 0.8, 3, "paper"),
        ("agreement", 0.5, 3, "code"),
        ("agreement", 0.5, 1, "paper"),
        ("agreement", 0.5, 6, "paper"),
    )
}


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--sam-checkpoint", default="", help="of a tiny SAM; empty: its own")
    args = parser.parse_args()
    net, dataset, settings, labeled, rest, names = first_teacher(args.checkpoint)
    known = data.Stream(dataset, labeled, settings.view_size, 0, True)
    asked = data.Stream(dataset, rest, settings.view_size, 1, True)
    classifier = prototypes.Prototypes(len(names), net.backbone.out_channels, 64)
    for k in range(0, correction.START_VIEWS, 8):
        classifier.learn(net, [known[i] for i in range(k, k + 8)])
    tiny = sam.SegmentAnything("tiny", args.sam_checkpoint, "cpu")
    embeddings = Embeddings(tiny, dataset)
    sums: Counter = Counter()
    for k in range(args.images):
        item = asked[k]
        pseudo = filters.keep(teacher.predict(net, [item["image"]], 0.7)[0], "score", 0.7, 0.0, 5)
        partner = match(pseudo.boxes, item["target"]["boxes"])
        pseudo, partner = pseudo[partner >= 0], partner[partner >= 0]
        masks = item["target"]["masks"][partner].bool()
        true = item["target"]["labels"][partner] - 1
        sums["number"] += len(pseudo)
        sums["class"] += (pseudo.distribution.argmax(1) == true).sum().item() if len(pseudo) else 0
        for name, trial in {"the teacher's masks": None, **TRIALS}.items():
            refined = refine.refine(pseudo, embeddings, item, *trial) if trial else pseudo
            if not len(pseudo):
                continue
            sums[name, "iou"] += mask_iou(refined.masks, masks).sum().item()
            said = classifier(item["image"], refined)
            mixed = correction.fuse(refined, said, 0.5).labels - 1
            sums[name, "category"] += (said.argmax(1) == true).sum().item()
            sums[name, "mixed"] += (mixed == true).sum().item()
    number = sums["number"]
    print(f"{number} pseudo-labels; the teacher's class is right in {sums['class'] / number:.3f}\n")
    print(f"{'':42}mask IoU  category  mixed")
    for name in ["the teacher's masks", *TRIALS]:
        cells = [sums[name, key] / number for key in ("iou", "category", "mixed")]
        print(f"{name:42}   {cells[0]:.3f}     {cells[1]:.3f}  {cells[2]:.3f}")


if __name__ == "__main__":
    main()
