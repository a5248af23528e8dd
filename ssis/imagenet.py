r"""Category level: class means of ImageNet features as the category classifier.

*This project's; PL-DC has CLIP.* A teacher that is trained on few images finds objects
better than it names them. PL-DC asks CLIP for the name: an encoder that was trained on
something else, and so makes other mistakes. The ImageNet backbone from which a run
starts is such an encoder too, and needs no further download. It has seen a million
photographs, and training on a few dozen has made it forget none: the copy used here
stays as it was downloaded.

1. Each instance is cut out of the view, its box with a tenth of its sides around it, at
   128 x 128 pixels;
2. the encoder's last feature map, averaged, is one vector v, brought to length 1;
3. a class is the mean of the vectors of its labeled instances (also called a nearest
   class mean classifier, or a prototypical network's prototypes), brought to length 1;
4. the opinion is a softmax over the cosines:

$$\mu_k = \sum_{n : y_n = k} v_n, \qquad
  p_{\mathrm{category}} = \mathrm{softmax}_k
  \left(\frac{\cos(v, \mu_k)}{\tau}\right), \qquad \tau = 0.04$$ ssis Eq. (means)

Two labeled instances of a class are enough for a mean, and means do not care how often
a class occurs. (A linear classifier on the same features is right for 3 more instances
in 100, but it would have to be trained; docs/log.md.)

The memory is filled when the first teacher is ready, and grows with the labeled views
that the run sees. It never grows old: the encoder does not change.

Chain: 16 of 24. Read next: `ssis/alignment.py`, a last word on the classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from ssis import distributed
from ssis.correction import CategoryClassifier, among_seen
from ssis.teacher import PseudoLabels

# Pixels on a side of a crop, and what is added on each side of the box, as a fraction.
CROP = 128
AROUND = 0.1
# tau. Photographs of animals: on average the classifier is sure of 0.87 and right in
# 0.83; 63 % of the crops are named with more than 0.9, and 97 % of those rightly
# (docs/results/log-crop-features.txt).
TEMPERATURE = 0.04


class ClassMeans(CategoryClassifier):
    """Class means of a frozen encoder's features.

    Not a module: of the encoder's weights none belongs into a checkpoint.

    Args:
        encoder: (N, 3, H, W), normalized, -> feature maps, the last one (N, D, h, w).
        mean, std: of R, G, B, that the encoder's images are normalized with.
        classes: C.
        device: where it is to be.
    """

    def __init__(
        self,
        encoder: nn.Module,
        mean: list[float],
        std: list[float],
        classes: int,
        device,
    ):
        self.encoder = encoder.eval().requires_grad_(False).to(device)
        self.mean, self.std = (
            torch.tensor(value, device=device)[:, None, None] for value in (mean, std)
        )
        # Sums, not means: instances are added, and only the direction matters.
        image, box = torch.zeros(3, 8, 8, device=device), torch.tensor([[0, 0, 8, 8]])
        size = self.embed(image, box).shape[1]
        self.sums = torch.zeros(classes, size, device=device)
        self.seen = torch.zeros(classes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def embed(self, image: Tensor, boxes: Tensor) -> Tensor:
        """The vectors v of some boxes.

        Args:
            image: (3, H, W) float in [0, 1].
            boxes: (N, 4) xyxy, in pixels of the image.

        Returns:
            (N, D), each of length 1.
        """
        height, width = image.shape[-2:]
        boxes = boxes.to(image)
        margin = AROUND * (boxes[:, 2:] - boxes[:, :2])
        wide = torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], dim=1)
        wide = wide.clamp(min=0).minimum(wide.new_tensor([width, height] * 2))
        view = ((image - self.mean) / self.std)[None]
        # Every pixel of a large box counts: as many samples per cell as it has pixels.
        crops = roi_align(view, [wide], CROP, aligned=True)
        return F.normalize(self.encoder(crops)[-1].mean(dim=(2, 3)), dim=1)

    def forget(self) -> None:
        """Empty the memory."""
        self.sums.zero_()
        self.seen.zero_()

    @torch.no_grad()
    def learn(self, teacher: nn.Module, items: list[dict]) -> None:
        """Add labeled instances to the sums; see `CategoryClassifier.learn`."""
        device = self.sums.device
        vectors, labels = [], []
        for item in items:
            if len(item["target"]["labels"]):
                image = item["image"].to(device)
                vectors.append(self.embed(image, item["target"]["boxes"]).cpu())
                labels.append(item["target"]["labels"])
        # Every process adds the instances of all, so all have the same means.
        for rows, classes in distributed.gather((vectors, labels)):
            for row, label in zip(rows, classes, strict=True):
                index = label.to(device) - 1
                self.sums.index_add_(0, index, row.to(device))
                self.seen += torch.bincount(index, minlength=len(self.seen))

    @torch.no_grad()
    def __call__(self, image: Tensor, pseudo: PseudoLabels) -> Tensor:
        """Class distributions (N, C); see `CategoryClassifier.__call__`."""
        if not len(pseudo):
            return torch.zeros_like(pseudo.distribution)
        # ssis Eq. (means)
        cosine = self.embed(image, pseudo.boxes) @ F.normalize(self.sums, dim=1).T
        return among_seen(cosine / TEMPERATURE, self.seen, pseudo.distribution)

    def state_dict(self) -> dict:
        """What a checkpoint must keep."""
        return dict(sums=self.sums, seen=self.seen)

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave."""
        self.sums.copy_(state["sums"])
        self.seen.copy_(state["seen"])
