"""CLIP as the second classifier: a real open_clip model, small and with random weights.

It is saved to a file, loaded as a user's would be, and held against open_clip's own image and
text embeddings, and against PL-DC Eq. (CLIP) in plain Python: one instance, one cell, one prompt
after the other.
"""

import dataclasses
import json
import math
import sys

import pytest
import torch
from conftest import made_labels
from torch.nn import functional as F

from ssis import UserError, correction
from ssis.clip import class_logits
from ssis.engine.build import make_classifier


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A small random ConvNeXt CLIP, in open_clip's own form: `name:path of its weights`."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    folder = tmp_path_factory.mktemp("clip")
    made = dict(
        embed_dim=32,
        vision_cfg=dict(
            timm_model_name="convnext_atto", timm_model_pretrained=False, timm_pool="",
            timm_proj="linear", image_size=64,
        ),
        text_cfg=dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=1),
    )  # fmt: skip
    (folder / "tiny-convnext.json").write_text(json.dumps(made))
    open_clip.add_model_config(folder / "tiny-convnext.json")
    torch.manual_seed(0)
    reference = open_clip.create_model("tiny-convnext").eval().requires_grad_(False)
    # Fresh weights have biases of 0 and blocks that do next to nothing; trained ones do not.
    for parameter in reference.visual.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(reference.state_dict(), folder / "weights.pt")
    return f"tiny-convnext:{folder / 'weights.pt'}", reference


def clip_of(source: str, names: list[str], descriptions: str = ""):
    return make_classifier("clip", names, 64, 8, source, descriptions, "cpu")


def test_a_classifier_without_memory_has_nothing_to_learn_or_to_save(tiny_clip):
    classifier = clip_of(tiny_clip[0], ["cat", "dog"])
    assert classifier.state_dict() == {} and classifier.learn(None, []) is None
    # No labeled view is asked for, which would be the work of a hundred forward passes.
    correction.fill(classifier, None, None, 0, 1)
    with pytest.raises(ValueError, match="no category classifier 'clap'"):
        make_classifier("clap", ["cat"], 64, 8, "", "", "cpu")


def normalized(reference, image):
    """An image as CLIP was trained with it: minus its mean, over its deviation."""
    mean, std = (torch.tensor(v)[:, None, None] for v in
                 (reference.visual.image_mean, reference.visual.image_std))  # fmt: skip
    return ((image - mean) / std)[None]


def pseudo_of(mask_probs):
    """Pseudo-labels with given masks; three classes."""
    n = len(mask_probs)
    made = made_labels([1] * n, [0.9] * n, [0.9] * n)
    return dataclasses.replace(made, mask_probs=mask_probs, masks=mask_probs > 0.5)


def at(mask, y, x, h, w) -> float:
    """The value of a mask at the center of cell (y, x) of h x w cells, between four pixels."""
    parts = []
    for cell, cells, pixels in ((y, h, mask.shape[0]), (x, w, mask.shape[1])):
        place = (cell + 0.5) * pixels / cells - 0.5
        first = math.floor(place)
        parts.append([(first, first + 1 - place), (min(first + 1, pixels - 1), place - first)])
    return sum(float(mask[i, j]) * a * b for i, a in parts[0] for j, b in parts[1])


def softmax_loop(logits: list[float]) -> list[float]:
    exponentials = [math.exp(z) for z in logits]
    return [e / sum(exponentials) for e in exponentials]


def class_logit_loop(logits: list[float]) -> float:
    """z_k of the z_kt of one class."""
    return sum(p * z for p, z in zip(softmax_loop(logits), logits, strict=True))


def opinion_loop(
    reference, scale, image, mask_probs, prompts
) -> tuple[list[list[float]], list[int]]:
    """PL-DC Eq. (CLIP): the opinion on each instance, and on how many cells it stands."""
    open_clip = pytest.importorskip("open_clip")
    tokenizer, trunk = open_clip.get_tokenizer("tiny-convnext"), reference.visual.trunk
    features = trunk.norm_pre(trunk.stages(trunk.stem(normalized(reference, image))))[0]
    _, h, w = features.shape
    rows, counts = [], []
    for mask in mask_probs:
        inside = [
            features[:, y, x] for y in range(h) for x in range(w) if at(mask, y, x, h, w) > 0.5
        ]
        counts.append(len(inside))
        if not inside:
            rows.append([0.0] * len(prompts))
            continue
        v = reference.visual.head(trunk.head((sum(inside) / len(inside))[None, :, None, None]))[0]
        z = []
        for texts in prompts:
            of_class = []
            for text in texts:
                e = reference.encode_text(tokenizer([text]))[0]
                cosine = float(v @ e) / (float(v.norm()) * float(e.norm()))
                of_class.append(min(scale, 100) * cosine)
            z.append(class_logit_loop(of_class))
        rows.append(softmax_loop(z))
    return rows, counts


DESCRIBED = dict(
    cat=["a photo of a cat.", "a photo of whiskers. they are long.", "fur"],
    dog=["a photo of a dog."],
    cow=["a cow on a meadow", "a photo of a cow, which is large and has horns."],
)


@pytest.fixture
def described(tmp_path) -> str:
    path = tmp_path / "described.json"
    path.write_text(json.dumps(DESCRIBED))
    return str(path)


# Below the clamp, at it, above it.
@pytest.mark.parametrize("scale", [14.0, 100.0, 400.0])
def test_the_opinion_is_that_of_the_loops(tiny_clip, described, scale):
    """Sides that are no multiples of 32, different numbers of prompts, masks of every kind."""
    source, reference = tiny_clip
    second = clip_of(source, list(DESCRIBED), described)
    second.model.logit_scale.fill_(math.log(scale))
    torch.manual_seed(1)
    image = torch.rand(3, 5, 6).repeat_interleave(20, 1).repeat_interleave(22, 2)
    masks = F.interpolate(torch.rand(1, 5, 3, 4), (100, 132), mode="bilinear")[0]
    # On a cell's center and nowhere else; larger, but between the centers; nowhere.
    masks = torch.cat([masks, torch.zeros(3, 100, 132)])
    masks[5, 14:20, 14:20] = 0.9
    masks[6, 22:44, 22:44] = 1.0
    expected, cells = opinion_loop(reference, scale, image, masks, DESCRIBED.values())
    assert cells[5:] == [1, 0, 0] and len(set(cells)) > 3, cells
    opinion = second(image, pseudo_of(masks))
    # Logarithms, so that the small probabilities of a high scale count too.
    ours, theirs = opinion[:6].log(), torch.tensor(expected)[:6].log()
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-4)
    # The instances are not all alike, or the test would say little.
    assert (ours.max(0).values - ours.min(0).values).max() > 0.3
    # Nothing left on the map: no opinion, which keeps the teacher's distribution.
    assert not opinion[6:].any()
    assert second(image, pseudo_of(masks[:0])).shape == (0, 3)


def test_a_class_is_the_mean_of_its_prompts_with_the_weights_of_their_softmax():
    """Logits of 30, which CLIP has for what fits (100 times a cosine of 0.3), and extreme ones."""
    torch.manual_seed(0)
    counts = [1, 4, 2, 3]
    logits = torch.cat([30 + torch.randn(6, 10), 100 * torch.rand(6, 10) * 2 - 100])
    expected = [
        [class_logit_loop(part.tolist()) for part in row.split(counts)] for row in logits.double()
    ]
    torch.testing.assert_close(class_logits(logits, counts), torch.tensor(expected))
    # By hand: weights of 3/4 and 1/4. The prompt of a class that has but one is its logit.
    by_hand = class_logits(torch.tensor([[30.0, 30 - math.log(3), 29.0]]), [2, 1])
    torch.testing.assert_close(by_hand, torch.tensor([[30 - math.log(3) / 4, 29.0]]))
    # Equal prompts are as one: their number makes no class more likely.
    torch.testing.assert_close(
        class_logits(torch.full((1, 5), 30.0), [4, 1]), torch.full((1, 2), 30.0)
    )
    assert class_logits(torch.zeros(0, 5), [4, 1]).shape == (0, 2)


def test_mask_pooling_over_everything_is_clips_own_embedding(tiny_clip):
    """With its own normalization, of a view of its size, of another and of a very small one."""
    source, reference = tiny_clip
    second = clip_of(source, ["cat", "dog"])
    for view, shown in [((64, 64), (64, 64)), ((96, 130), (96, 130)), ((20, 40), (32, 64))]:
        image = torch.rand(3, *view)
        seen = F.interpolate(normalized(reference, image), shown, mode="bilinear")
        expected = F.normalize(reference.encode_image(seen), dim=1)
        ours = second.embed(image, torch.ones(1, *view))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        # And a mask makes a difference.
        half = torch.zeros(1, *view)
        half[:, :, : view[1] // 2] = 1
        assert (second.embed(image, half) - ours).abs().max() > 1e-3


def test_the_prompts_are_kept_one_by_one_in_the_order_of_the_classes(tiny_clip, described):
    source, reference = tiny_clip
    open_clip = pytest.importorskip("open_clip")
    second = clip_of(source, ["dog", "cat"], described)
    tokens = open_clip.get_tokenizer("tiny-convnext")([*DESCRIBED["dog"], *DESCRIBED["cat"]])
    assert second.counts == [1, 3]
    torch.testing.assert_close(second.prompts, F.normalize(reference.encode_text(tokens), dim=1))
    # Without descriptions: the templates, with the names of the classes.
    second = clip_of(source, ["dog", "cat", "cow"])
    assert second.counts == [3, 3, 3] and second.prompts.shape == (9, 32)
    opinion = second(torch.rand(3, 20, 20), made_labels([1, 2], [0.9, 0.8], [0.9, 0.9]))
    assert opinion.shape == (2, 3)
    torch.testing.assert_close(opinion.sum(1), torch.ones(2))


def tiny_vit(folder) -> str:
    """A CLIP whose image tower is a transformer."""
    open_clip = pytest.importorskip("open_clip")
    made = dict(
        embed_dim=32,
        vision_cfg=dict(image_size=32, patch_size=16, width=32, layers=1, head_width=16),
        text_cfg=dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=1),
    )
    (folder / "tiny-vit.json").write_text(json.dumps(made))
    open_clip.add_model_config(folder / "tiny-vit.json")
    torch.save(open_clip.create_model("tiny-vit").state_dict(), folder / "vit.pt")
    return f"tiny-vit:{folder / 'vit.pt'}"


def test_clips_errors_say_what_to_do(tiny_clip, tmp_path, monkeypatch):
    def error(clip_model: str, descriptions: str = "") -> str:
        with pytest.raises(UserError) as caught:
            clip_of(clip_model, ["cat", "dog"], descriptions)
        return str(caught.value)

    source, _ = tiny_clip
    assert "cannot be loaded" in error(clip_model="tiny-convnext:/no/such/file.pt")
    assert "cannot be loaded" in error(clip_model="no-such-tower:x")
    assert "names no weights" in error(clip_model="tiny-convnext")
    assert "no ConvNeXt image tower" in error(clip_model=tiny_vit(tmp_path))
    path = tmp_path / "d.json"
    assert "cannot be read" in error(clip_model=source, descriptions=str(path))
    path.write_text('{"cat": ["a cat"]}')
    assert "no list of prompts for class 'dog'" in error(clip_model=source, descriptions=str(path))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "pip install open_clip_torch" in error(clip_model=source)
