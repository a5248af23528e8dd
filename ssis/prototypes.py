r"""The default category classifier: labeled instances as the teacher sees them.

*This project's; the paper has CLIP* (`ssis/clip.py`).

A memory holds the teacher's features of up to 64 labeled instances of each class. A
pseudo-label is compared with all of them; a class is as likely as its three nearest
instances are near. Two things are compared: the feature map in the box, set to 0
outside of the mask, and the silhouette, which is the soft mask in a 16 x 16 grid. So
this classifier sees what the teacher's own cannot: where the object ends, and what is
only next to it. (Class means, pooled features and other views were measured too, and
are no better than the teacher: docs/log.md.)

During the run the oldest instances are replaced by newer ones, as the EMA teacher sees
the labeled images. If the student started afresh (`--burnin-init fresh`), the first
teacher's instances are thrown away with it: the features of two networks cannot be
compared.

Chain: 14 of 24. Read next: `ssis/clip.py`, the paper's own category classifier.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from ssis import data, distributed, inference
from ssis.correction import CategoryClassifier, among_seen
from ssis.targets import boxes_of
from ssis.teacher import PseudoLabels

# Cells on a side of a silhouette, and nearest instances of each class.
SILHOUETTE = 16
NEAREST = 3
# Divides the cosines before the softmax. It is so small that a cosine that is higher by
# 0.02 takes nearly all: with w = 0.5 the category classifier mostly decides alone.
TEMPERATURE = 0.005


class Prototypes(nn.Module, CategoryClassifier):
    """Labeled instances as the teacher sees them; a module for its state dict.

    Args:
        classes: C.
        channels: D, of the feature pyramid.
        size: K, instances kept of each class.
    """

    def __init__(self, classes: int, channels: int, size: int):
        super().__init__()
        # A ring of K slots for each class: the newest instance replaces the oldest.
        # Buffers are saved in the checkpoint, so a resumed run remembers the same.
        length = channels * inference.CELLS**2 + SILHOUETTE**2
        self.register_buffer("bank", torch.zeros(classes, size, length))
        # How many instances of each class were ever put in; number k is in slot k mod
        # K.
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.int64))

    @staticmethod
    def describe(features: Tensor, masks: Tensor, boxes: Tensor) -> Tensor:
        """The vectors that are compared, for some instances of one image.

        Args:
            features: (N, D, 7, 7), the feature maps in their boxes.
            masks: (N, H, W), soft or hard, in [0, 1]; none of them empty.
            boxes: (N, 4) of the features.

        Returns:
            (N, 49 D + 256), each row of length 1.
        """
        # One mask for each instance, and one box in each mask: box n belongs to mask n,
        # which `roi_align` wants to be told in its first column.
        masks = masks.float()
        number = torch.arange(len(boxes), device=boxes.device)[:, None]
        # The mask at the resolution of the feature map. Times it, cells in the box that
        # are not on the object become 0.
        rois = torch.cat([number.to(boxes), boxes], dim=1)
        inside = roi_align(masks[:, None], rois, inference.CELLS, aligned=True)
        # All 49 cells, not their average: where in the box a part lies (the points of
        # a star, the hole of a ring) says what the object is.
        appearance = F.normalize((features * inside).flatten(1))
        # The silhouette, in the mask's own box: a loose predicted box would move it.
        tight = boxes_of(masks > 0.5) if len(masks) else boxes
        rois = torch.cat([number.to(boxes), tight], dim=1)
        cells = roi_align(masks[:, None], rois, SILHOUETTE, 1.0, 2, aligned=True)
        # Minus one half: inside positive, outside negative. Then the outside says as
        # much about a shape as the inside.
        shape = F.normalize((cells - 0.5).flatten(1))
        # Each part has length 1, both together the square root of 2. Divided by it, the
        # cosine of two instances is the mean of the cosines of their two parts.
        return torch.cat([appearance, shape], dim=1) / math.sqrt(2)

    def forget(self) -> None:
        """Empty the memory."""
        # With `seen` at 0 no slot counts; what is in it will be overwritten.
        self.seen.zero_()

    @torch.no_grad()
    def learn(self, teacher: nn.Module, items: list[dict]) -> None:
        """Put labeled instances into the memory; see `CategoryClassifier.learn`."""
        # In the ground-truth box, under the ground-truth mask: no mistake of the
        # teacher gets into the memory.
        device = self.bank.device
        views, targets = data.to_device(items, device)
        pooled = inference.features_in(teacher, views, [t["boxes"] for t in targets])
        described = [
            self.describe(features.float(), target["masks"], target["boxes"])
            for features, target in zip(pooled, targets, strict=True)
        ]
        # From here on it does not matter which image an instance comes from.
        labels = torch.cat([target["labels"] for target in targets])
        # Every process stores the instances of all, so all have the same memory. They
        # are exchanged on the CPU: gathered GPU tensors would stay on the sender's GPU.
        mine = (torch.cat(described).cpu(), labels.cpu())
        for rows, classes in distributed.gather(mine):
            # Slot by slot on the CPU, then all rows at once; of two rows for one slot
            # the later one stays.
            seen, rows_of = self.seen.tolist(), {}
            for n, k in enumerate((classes - 1).tolist()):
                rows_of[k, seen[k] % self.bank.shape[1]] = n
                seen[k] += 1
            if rows_of:
                which, slots = map(list, zip(*rows_of, strict=True))
                self.bank[which, slots] = rows[list(rows_of.values())].to(device)
                self.seen.copy_(torch.tensor(seen))

    @torch.no_grad()
    def forward(self, image: Tensor, pseudo: PseudoLabels) -> Tensor:
        """Class distributions (N, C); see `CategoryClassifier.__call__`."""
        if not len(pseudo):
            return torch.zeros_like(pseudo.distribution)
        # The features belong to the box that the teacher predicted; the mask may be
        # SAM's.
        query = self.describe(pseudo.features, pseudo.mask_probs, pseudo.feature_boxes)
        # Cosine with every instance in the memory; all vectors have length 1.
        similar = torch.einsum("nf,ckf->nck", query, self.bank)
        # An empty slot has cosine 0, which is more than that of an unlike instance. At
        # -1 it is nobody's neighbor.
        slots = torch.arange(self.bank.shape[1], device=query.device)
        similar[:, slots >= self.seen[:, None]] = -1
        # The mean of the nearest three of each class: a single one may be an odd case,
        # and the mean of all resembles no instance. A class with fewer instances is
        # judged by those that it has.
        count = min(NEAREST, similar.shape[2])
        nearest = similar.topk(count, dim=2).values  # (N, C, 3)
        present = torch.arange(nearest.shape[2], device=query.device)
        present = (present < self.seen[:, None].clamp(min=1)).to(nearest)
        mean = (nearest * present).sum(dim=2) / present.sum(dim=1)  # (N, C)
        return among_seen(mean / TEMPERATURE, self.seen, pseudo.distribution)
