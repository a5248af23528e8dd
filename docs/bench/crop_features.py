r"""What can be made of ImageNet's features of crops? The measurement behind `imagenet.ClassMeans`.

    python docs/bench/crop_features.py runs/<name>/pretrained.pt

Of a run with `--model timm`: each instance of the ground truth is cut out and described as
`ClassMeans` does it; the labeled images are known, the instances of all others are named. Printed
is the fraction of right names, by

* class means (`ClassMeans`), the three nearest labeled instances of each class, a linear classifier
  (logistic regression, each class of the same weight), and soft k-means: class means that follow
  the unlabeled crops as well, after 1 and after 10 rounds;
* and for class means at some temperatures: the mean confidence, which should be that fraction, and
  how many are named with a confidence above 0.9, and how many of those rightly.
"""

import argparse

import torch
from category_classifiers import NEAREST, first_teacher
from torch import Tensor
from torch.nn import functional as F

from ssis import data, imagenet

VIEWS = 128


def described(encoder, stream, count: int) -> tuple[Tensor, Tensor]:
    """Vectors (N, D) and classes (N,), 0..C-1, of the instances of some views."""
    vectors, classes = [], []
    for k in range(count):
        target = stream[k]["target"]
        if len(target["labels"]):
            vectors.append(encoder.embed(stream[k]["image"], target["boxes"]))
            classes.append(target["labels"] - 1)
    return torch.cat(vectors), torch.cat(classes)


def linear(known: Tensor, classes: Tensor, count: int) -> Tensor:
    """Weights (C, D + 1) of a logistic regression; all classes count the same."""
    rows = F.pad(known, (0, 1), value=1.0)
    share = 1 / torch.bincount(classes, minlength=count)[classes]
    weights = torch.zeros(count, rows.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        each = F.cross_entropy(rows @ weights.T, classes, reduction="none")
        value = (each * share).sum() / share.sum() + 1e-4 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    args = parser.parse_args()
    _, dataset, settings, labeled, rest, encoder, names = first_teacher(args.checkpoint)
    view = settings.view_size
    known, of = described(encoder, data.Stream(dataset, labeled, view, 0, True), VIEWS)
    asked, true = described(encoder, data.Stream(dataset, rest, view, 1, True), len(rest))
    seen = torch.bincount(of, minlength=len(names)) > 0

    def right(scores: Tensor) -> float:
        return (scores.masked_fill(~seen, -torch.inf).argmax(1) == true).float().mean().item()

    sums = F.one_hot(of, len(names)).float().T @ known
    means = F.normalize(sums, dim=1)
    cosine = asked @ means.T
    print(f"{len(known)} labeled instances in {VIEWS} views, {len(true)} to be named")
    print(f"class means         {right(cosine):.3f}")
    near = torch.full_like(cosine, -1)
    for k in seen.nonzero().flatten():
        members = known[of == k]
        near[:, k] = (asked @ members.T).topk(min(NEAREST, len(members))).values.mean(1)
    print(f"nearest instances   {right(near):.3f}")
    weights = linear(known, of, len(names))
    print(f"linear classifier   {right(F.pad(asked, (0, 1), value=1.0) @ weights.T):.3f}")
    moving, rounds = means, []
    for _ in range(10):
        opinion = (
            (asked @ moving.T / imagenet.TEMPERATURE).masked_fill(~seen, -torch.inf).softmax(1)
        )
        moving = F.normalize(sums + opinion.T @ asked, dim=1)
        rounds.append(right(asked @ moving.T))
    print(f"soft k-means        {rounds[0]:.3f}, {rounds[-1]:.3f}")
    print("temperature  confidence  above 0.9  right of those")
    for temperature in (0.02, 0.03, 0.04, 0.06, 0.08, 0.1):
        opinion = (cosine / temperature).masked_fill(~seen, -torch.inf).softmax(1)
        sure, label = opinion.max(1)
        above = sure > 0.9
        share = (label == true)[above].float().mean().item()
        print(
            f"{temperature:.2f}         {sure.mean():.3f}       {above.float().mean():.3f}", end=""
        )
        print(f"      {share:.3f}")


if __name__ == "__main__":
    main()
