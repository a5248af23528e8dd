"""CLIP as the second classifier: a real open_clip model, small and with random weights.

It is saved to a file, loaded as a user's would be, and held against open_clip's own image and
text embeddings.
"""

import json
import sys

import pytest
import torch
from conftest import made_labels
from torch.nn import functional as F

from ssis import UserError, correction
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
    reference = open_clip.create_model("tiny-convnext").eval()
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


def test_mask_pooling_over_everything_is_clips_own_embedding(tiny_clip):
    """With its own normalization, and of an image that needs no resizing."""
    source, reference = tiny_clip
    second = clip_of(source, ["cat", "dog"])
    image = torch.rand(3, 64, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in
                 (reference.visual.image_mean, reference.visual.image_std))  # fmt: skip
    with torch.no_grad():
        expected = F.normalize(reference.encode_image(((image - mean) / std)[None]), dim=1)
    ours = second.embed(image, torch.ones(1, 64, 64))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    # And a mask makes a difference.
    half = torch.zeros(1, 64, 64)
    half[:, :, :32] = 1
    assert (second.embed(image, half) - ours).abs().max() > 1e-3


def test_clip_gives_a_distribution_and_takes_descriptions(tiny_clip, tmp_path):
    source, reference = tiny_clip
    path = tmp_path / "d.json"
    path.write_text(json.dumps(dict(cat=["a cat", "whiskers"], dog=["a dog"], cow=["a cow"])))
    second = clip_of(source, ["cat", "dog", "cow"], str(path))
    found = made_labels([1, 2], [0.9, 0.8], [0.9, 0.9])
    opinion = second(torch.rand(3, 20, 20), found)
    assert opinion.shape == (2, 3)
    torch.testing.assert_close(opinion.sum(1), torch.ones(2))
    # The mean of the prompts' embeddings, in the order of the class names.
    open_clip = pytest.importorskip("open_clip")
    tokens = open_clip.get_tokenizer("tiny-convnext")(["a cat", "whiskers"])
    with torch.no_grad():
        cat = F.normalize(F.normalize(reference.encode_text(tokens), dim=1).mean(0), dim=0)
    torch.testing.assert_close(second.classes[0], cat)
    assert second(torch.rand(3, 20, 20), found[torch.zeros(2, dtype=torch.bool)]).shape == (0, 3)


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
