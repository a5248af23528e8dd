r"""PL-DC, category level: CLIP as the category classifier (optional, needs open_clip).

CLIP was trained on some billion images with captions, so it can name things that a
teacher trained on a few hundred images cannot. But it was never trained to find or
outline anything. So the teacher's mask says where, and CLIP says what:

1. CLIP's convolutional image tower turns the view, at the size that it has, into a
   feature map of stride 32;
2. the mask is brought to the size of the map, and is again foreground or background
   in every cell; the features of its cells are averaged (mask pooling), and the
   average goes through the tower's own head, as that of the whole image would:
   $v = \mathrm{head}(\mathrm{mean}_{xy \in M} F_{xy})$;
3. a class k is described by several prompts t, each with an embedding $e_{kt}$;
4. the opinion follows from their similarity, with $e^s$ CLIP's own logit scale: a logit
   for each prompt, their mean for each class, and a softmax over the classes:

$$z_{kt} = \min(e^s, 100) \cos(v, e_{kt}), \quad
  z_k = \sum_t \mathrm{softmax}_t(z_{kt}) \, z_{kt}, \quad
  p_{\mathrm{category}} = \mathrm{softmax}_k(z_k)$$ PL-DC Eq. (CLIP)

Why not the mean of the prompts' embeddings? A description fits some of a class's
instances: "with its wings spread" says nothing about a bird that sits. In $z_k$ each
prompt has the weight of its own softmax, so those that fit decide, and the others are
not held against the class.

The paper has ConvNeXt-L trained on LAION-2B and five prompts with descriptions for each
class. Here the prompts are made of the dataset's class names, or come from a JSON file:
{"class name": ["a prompt", "another", ...], ...}.

CLIP stays frozen. It learns nothing in a run, so it has no memory and is in no
checkpoint: of the interface `correction.CategoryClassifier` it overrides the call
alone.

Differences from the released code:

* there, images go to CLIP as numbers from 0 to 255. Here they are normalized with the
  mean and deviation that belong to the weights;
* a small mask may cover the center of no cell, and then nothing of it is left on the
  map. There, CLIP classifies a vector of zeros. Here it has no opinion;
* a cell is foreground where the mask probability is above 0.5, not where the logit is
  above 0. This is the same for a pixel, but the map's cells lie between pixels, and the
  mean of the probabilities and that of the logits may lie on different sides of it.
  SAM's masks and the teacher's come as probabilities;
* there, descriptions are put into a template: "a photo of {description}" for a sentence
  that ends with a period, otherwise "a photo of a {description}.". Here the JSON file
  has whole prompts, and `TEMPLATES` are for bare class names.

Chain: 15 of 24. Read next: `ssis/imagenet.py`, where CLIP's weights cannot be had.
"""

import json

import torch
from torch import Tensor
from torch.nn import functional as F

from ssis import UserError
from ssis.io.checkpoint import short
from ssis.correction import CategoryClassifier
from ssis.teacher import PseudoLabels

# Without descriptions, a class gets these prompts. Captions are sentences, so a bare
# name would be unlike anything that CLIP was trained on. (The released code has the
# first one alone for a name, and descriptions of the classes of COCO and Cityscapes.)
TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "there is a {} in the scene.")
# CLIP was trained with its logit scale held below this; weights from elsewhere may have
# a higher one, which would make every opinion a certainty.
MAX_SCALE = 100
# Pixels of the image on a side of one cell of the feature map.
STRIDE = 32
INSTALL = (
    "--correction clip: open_clip is not installed; pip install open_clip_torch, or "
    "choose --correction prototypes"
)


def prompts_of(names: list[str], descriptions: str) -> list[list[str]]:
    """The prompts of each class.

    Args:
        names: class names.
        descriptions: path of a JSON file {name: [prompt, ...]}; empty: `TEMPLATES`.

    Returns:
        C lists of texts.

    Raises:
        UserError: no such file, not of that form, or a class is missing.
    """
    if not descriptions:
        return [[template.format(name) for template in TEMPLATES] for name in names]
    try:
        with open(descriptions, encoding="utf-8") as file:
            given = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--descriptions {descriptions}: cannot be read as JSON ({short(error)})"
        ) from error
    # Every class needs a list of texts. Names in the file that are no class are
    # ignored, so one file can serve several datasets.
    for name in names:
        prompts = given.get(name) if isinstance(given, dict) else None
        if not (prompts and isinstance(prompts, list)) or not all(
            isinstance(prompt, str) for prompt in prompts
        ):
            raise UserError(
                f"--descriptions {descriptions}: no list of prompts for class "
                f'{name!r}; must be {{"{name}": ["a prompt", ...], ...}}'
            )
    return [given[name] for name in names]


def class_logits(logits: Tensor, counts: list[int]) -> Tensor:
    """Logits of the classes from those of their prompts, PL-DC Eq. (CLIP).

    Args:
        logits: (N, T) float, z_kt; the prompts of the first class come first.
        counts: the number of prompts of each of the C classes; their sum is T.

    Returns:
        (N, C), z_k: between the mean and the maximum of a class's prompts.
    """
    # One class at a time, because the classes may have different numbers of prompts. A
    # mean, not a sum: a class with more prompts must not be more likely for that.
    each = [
        (part.softmax(dim=1) * part).sum(dim=1) for part in logits.split(counts, dim=1)
    ]
    return torch.stack(each, dim=1)


class Clip(CategoryClassifier):
    """CLIP's opinion on the class of an instance; it never learns.

    Not a module: its gigabyte of frozen weights belongs into no checkpoint.

    Attributes:
        model: open_clip's, in evaluation mode.
        prompts: (T, E), embeddings of all prompts, of length 1 each, class by class.
        counts: the number of prompts of each of the C classes; their sum is T.

    Args:
        source: "architecture:weights" of open_clip; weights are a tag or a path.
        names: class names.
        descriptions: of `prompts_of`.
        device: where it is to be.

    Raises:
        UserError: open_clip is missing, the weights cannot be had, or the image tower
            is not a ConvNeXt (a transformer has no feature map to pool).
    """

    def __init__(self, source: str, names: list[str], descriptions: str, device):
        # Optional: imported when it is asked for, and not before.
        try:
            import open_clip
        except ImportError as error:
            raise UserError(INSTALL) from error
        # Mistakes in the description file are reported before gigabytes are loaded.
        prompts = prompts_of(names, descriptions)
        architecture, _, weights = source.partition(":")
        if not weights:
            # open_clip would go on with random weights.
            raise UserError(
                f"--clip-model {source}: names no weights; give architecture:TAG or "
                "architecture:PATH"
            )
        try:
            model = open_clip.create_model(architecture, weights)
            tokenizer = open_clip.get_tokenizer(architecture)
        # Every exception: without network, file or architecture it raises one of many.
        except Exception as error:
            raise UserError(
                f"--clip-model {source}: cannot be loaded ({short(error)[:160]}); give "
                "architecture:PATH of weights fetched elsewhere"
            ) from error
        # Mask pooling needs a feature map with places. ConvNeXt has one; open_clip's
        # ConvNeXts come from timm, as a `trunk` with `stages` and a head of its own.
        trunk = getattr(model.visual, "trunk", None)
        if not hasattr(trunk, "stages") or not hasattr(trunk, "forward_head"):
            raise UserError(
                f"--clip-model {source}: has no ConvNeXt image tower, whose feature "
                "map could be pooled; give one of open_clip's convnext models"
            )
        # Frozen: it gives opinions, and is never trained.
        self.model = model.eval().requires_grad_(False).to(device)
        # The prompts never change, so their embeddings are computed once. One class at
        # a time: all prompts of a dataset with many classes may not fit into memory.
        self.counts = [len(texts) for texts in prompts]
        encode = self.model.encode_text
        each = [encode(tokenizer(texts).to(device)) for texts in prompts]
        # Length 1, for the cosine; each prompt stays on its own.
        self.prompts = F.normalize(torch.cat(each), dim=1)  # (T, E)

    @torch.no_grad()
    def embed(self, image: Tensor, mask_probs: Tensor) -> Tensor:
        """Mask-pooled embeddings.

        Args:
            image: (3, H, W) float in [0, 1].
            mask_probs: (N, H, W) float in [0, 1].

        Returns:
            (N, E), each of length 1; all-zero where nothing of the mask is left on the
            feature map.
        """
        # `visual` is the image tower: a trunk that makes the feature map, and a head
        # that maps its mean into the space of images and texts.
        visual = self.model.visual
        # CLIP's own normalization; the views are in [0, 1]. The released code does
        # without, but it is what the weights were trained with.
        mean, std = (
            torch.tensor(value, device=image.device)[:, None, None]
            for value in (visual.image_mean, visual.image_std)
        )
        view = ((image - mean) / std)[None]
        # Not resized to the size that CLIP was trained at: a convolutional tower takes
        # every size, and at a smaller one fewer instances would have a cell of their
        # own. Only a view that is smaller than one cell is enlarged, to get a map.
        short_side = min(image.shape[-2:])
        if short_side < STRIDE:
            sides = [round(side * STRIDE / short_side) for side in image.shape[-2:]]
            view = F.interpolate(view, sides, mode="bilinear")
        # The whole image goes through the tower once, not a crop for each instance: the
        # surroundings help to recognize an object, and one pass is cheaper than N.
        maps = visual.trunk.forward_features(view)  # (1, D, h, w)
        # Without antialiasing, a cell takes the mask at its center. Hard again after
        # that, so that each cell of the instance counts the same, and none beside it.
        cells = F.interpolate(mask_probs[None], maps.shape[-2:], mode="bilinear")[0]
        cells = (cells > 0.5).to(maps)  # (N, h, w)
        count = cells.sum(dim=(1, 2))[:, None]  # (N, 1)
        # For each mask the mean of the map's features over its cells.
        pooled = torch.einsum("dhw,nhw->nd", maps[0], cells) / count.clamp(min=1)
        # The head begins with an average over the map. Of a map of one cell that is the
        # cell itself, so the pooled features go on unchanged.
        out = visual.head(visual.trunk.forward_head(pooled[:, :, None, None]))
        # Without cells the pooled features are 0, but the head has biases and would
        # make some embedding of them. It would be the same for every such instance.
        return F.normalize(out, dim=1) * (count > 0)

    @torch.no_grad()
    def __call__(self, image: Tensor, pseudo: PseudoLabels) -> Tensor:
        """Class distributions (N, C); see `CategoryClassifier.__call__`."""
        if not len(pseudo):
            return torch.zeros_like(pseudo.distribution)
        embedded = self.embed(image, pseudo.mask_probs)  # (N, E)
        # PL-DC Eq. (CLIP). Both sides have length 1, so the product is the cosine. CLIP
        # was trained with its logit scale; without it all classes would look alike.
        scale = self.model.logit_scale.exp().clamp(max=MAX_SCALE)
        logits = scale * embedded @ self.prompts.T  # (N, T)
        opinion = class_logits(logits, self.counts).softmax(dim=1)  # (N, C)
        # No opinion on an instance that CLIP did not see: an all-zero row keeps the
        # teacher's distribution. (The released code would let chance decide.)
        return opinion * embedded.any(dim=1, keepdim=True)
