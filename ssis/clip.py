r"""PL-DC, category level: CLIP as the category classifier (optional, needs open_clip).

CLIP has seen a billion images with captions, so it can name things that a teacher
trained on a few hundred images cannot. But it was never trained to find or outline
anything. So the teacher's mask says where, and CLIP says what:

1. CLIP's convolutional image tower turns the image into a feature map of stride 32;
2. the features under the instance's mask are averaged (mask pooling), and the average
   goes through the tower's own head, as the average over the whole image would:
   $v = \mathrm{head}(\mathrm{mean}_{xy \in M} F_{xy})$;
3. a class is represented by the mean of the embeddings of its prompts, $e_k$;
4. the opinion follows from their similarity, with s CLIP's own logit scale:

$$p_{\mathrm{category}} = \mathrm{softmax}_k(s \cdot \cos(v, e_k))$$ PL-DC Eq. (CLIP)

The paper has ConvNeXt-L trained on LAION-2B and five prompts with descriptions for each
class. Here the prompts are made of the dataset's class names, or come from a JSON file:
{"class name": ["a prompt", "another", ...], ...}.

CLIP stays frozen. It learns nothing in a run, so it has no memory and is in no
checkpoint: of the interface `correction.CategoryClassifier` it overrides the call
alone.

Difference from the released code: there, images go to CLIP without CLIP's own
normalization. Here they are normalized with the mean and deviation that belong to the
weights.

Chain: 10 of 16. Read next: `ssis/losses.py`, which teaches the result to the student.
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
# name would be unlike anything that CLIP was trained on.
TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "there is a {} in the scene.")
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


class Clip(CategoryClassifier):
    """CLIP's opinion on the class of an instance; it never learns.

    Not a module: its gigabyte of frozen weights belongs into no checkpoint.

    Attributes:
        model: open_clip's, in evaluation mode.
        classes: (C, E), the embedding of each class, of length 1.

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
        # The class names never change, so their embeddings are computed once.
        self.classes = torch.stack(
            [self._text(tokenizer(texts).to(device)) for texts in prompts]
        )  # (C, E)

    @torch.no_grad()
    def _text(self, tokens: Tensor) -> Tensor:
        """The embedding of a class.

        Args:
            tokens: (T, L) int64, its prompts.

        Returns:
            (E,), of length 1: the mean over the prompts.
        """
        # Length 1 before the mean, so that every prompt counts the same.
        each = F.normalize(self.model.encode_text(tokens), dim=1)
        return F.normalize(each.mean(dim=0), dim=0)

    @torch.no_grad()
    def embed(self, image: Tensor, masks: Tensor) -> Tensor:
        """Mask-pooled embeddings.

        Args:
            image: (3, H, W) float in [0, 1].
            masks: (N, H, W), soft or hard, in [0, 1].

        Returns:
            (N, E), each of length 1.
        """
        # `visual` is the image tower: a trunk that makes the feature map, and a head
        # that maps its mean into the space of images and texts.
        visual = self.model.visual
        # CLIP was trained at one size. The short side gets that size, the other one
        # keeps the shape of the image; both become multiples of the stride, 32.
        size = visual.image_size
        short = min(size) if isinstance(size, (tuple, list)) else size
        scale = short / min(image.shape[-2:])
        sides = [max(32, round(side * scale / 32) * 32) for side in image.shape[-2:]]
        # CLIP's own normalization; the views are in [0, 1].
        mean, std = (
            torch.tensor(value, device=image.device)[:, None, None]
            for value in (visual.image_mean, visual.image_std)
        )
        resized = F.interpolate(image[None], sides, mode="bilinear", antialias=True)
        # The whole image goes through the tower once, not a crop for each instance: the
        # surroundings help to recognize an object, and one pass is cheaper than N.
        maps = visual.trunk.forward_features((resized - mean) / std)  # (1, D, h, w)
        # The fraction of each cell that the mask covers ("area" averages the pixels of
        # the cell). A small instance may be a part of a single cell; a threshold would
        # leave nothing of it.
        cover = F.interpolate(masks[None].float(), maps.shape[-2:], mode="area")[0]
        cover = cover / cover.flatten(1).sum(dim=1).clamp(min=1e-6)[:, None, None]
        # For each mask the weighted mean of the map's features.
        pooled = torch.einsum("dhw,nhw->nd", maps[0].float(), cover)  # (N, D)
        # The head begins with an average over the map. Of a map of one cell that is the
        # cell itself, so the pooled features go on unchanged.
        return F.normalize(
            visual.head(visual.trunk.forward_head(pooled[:, :, None, None])), dim=1
        )

    @torch.no_grad()
    def __call__(self, image: Tensor, pseudo: PseudoLabels) -> Tensor:
        """Class distributions (N, C); see `CategoryClassifier.__call__`."""
        if not len(pseudo):
            return torch.zeros_like(pseudo.distribution)
        # PL-DC Eq. (CLIP). Both sides have length 1, so the product is the cosine. CLIP
        # was trained with its logit scale; without it all classes would look alike.
        cosine = self.embed(image, pseudo.masks) @ self.classes.T
        return (self.model.logit_scale.exp() * cosine).softmax(dim=1)
