r"""Segment Anything: official checkpoints, the tiny built-in one, the embedding cache.

SAM (Kirillov et al., arXiv 2304.02643) turns a point into a mask: it knows where things
end, and not what they are. It comes in two halves of very different cost. The *image
encoder* sees the image once and takes seconds on a CPU (a tenth of a second on a large
GPU); the *prompt encoder* and *mask decoder* take a small part of that. Hence the rule
of this file:

*One encoding per image.* SAM always sees the original image, never a view of it. So
there is one embedding per image, which `Embeddings` keeps: in memory, then on disk. On
disk (`--sam-cache`) it is there for all processes and all runs; in memory each process
has its own, of the images that came to it.
It is rounded to 16 bits in either place, and also where there is no room and it is
computed anew each time, so what is trained does not depend on the cache.

*Frames.* Prompts are given in the original frame, continuous coordinates: the center
of the first pixel is 0.5. SAM's own frame is a square of `side` pixels (1024; the tiny
one 96) into which the image is resized by its long side, and padded below and to the
right.

The models (`--sam`): `vit_b`, `vit_l`, `vit_h`, from Meta's files (`CHECKPOINTS`), by
`segment_anything` itself; and `tiny`, which belongs to the built-in dataset
(`ssis/tools/train_tiny_sam.py`) and comes with the project. S4M's released code has SAM 2.

    python -m ssis sam --out FILE        trains another tiny one (--help says more)

Read next: `ssis/sam_distill.py` and `ssis/refine.py`, the two uses.
"""

import hashlib
import io
from functools import partial
from pathlib import Path

import numpy as np
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn

from ssis import UserError
from ssis.io.embedding_file import read_entry, write_entry

# Where the official files are, their sizes in bytes, and their SHA-256.
SOURCE = "https://dl.fbaipublicfiles.com/segment_anything/"
CHECKPOINTS = {
    "vit_b": (
        "sam_vit_b_01ec64.pth",
        375_042_383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": (
        "sam_vit_l_0b3195.pth",
        1_249_524_607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": (
        "sam_vit_h_4b8939.pth",
        2_564_550_879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}
TINY = Path(__file__).with_name("tiny_sam.pt")
# Prompts decoded together: 16 at 64 x 64 x 256 are 64 MB a tensor.
CHUNK = 16


class SegmentAnything:
    """A frozen SAM.

    Not a module: its weights belong neither into a checkpoint nor to an optimizer.

    Args:
        kind: "tiny", "vit_b", "vit_l" or "vit_h".
        checkpoint: path of its weights; empty: the built-in ones, of "tiny" only.
        device: where it runs.

    Attributes:
        net: `segment_anything.modeling.Sam`, in evaluation mode.
        side: of its frame, pixels.
        cells: of its feature map, on a side.
        fingerprint: of its weights.

    Raises:
        UserError: no checkpoint, or one that is of another model.
    """

    def __init__(self, kind: str, checkpoint: str, device):
        path, state = weights(kind, checkpoint)
        self.net = (
            build_tiny(state["side"], state["patch"])
            if kind == "tiny"
            else sam_model_registry[kind]()
        )
        own, given = self.net.state_dict(), state["model"]
        misfit = sorted(own.keys() ^ given.keys()) or [
            name for name in own if own[name].shape != given[name].shape
        ]
        if misfit:
            raise UserError(
                f"--sam-checkpoint {path}: not of --sam {kind}: {misfit[0]!r} does "
                "not fit"
            )
        self.net.load_state_dict(given)
        self.net.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.side = self.net.image_encoder.img_size
        self.cells = self.net.prompt_encoder.image_embedding_size[0]
        self.fingerprint = state["fingerprint"]

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """The embedding of an original image.

        Args:
            image: (3, H, W) uint8, on the CPU.

        Returns:
            (D, cells, cells) float16, on the CPU.
        """
        # The library's own resizing, by Pillow: what the weights were trained for.
        pixels = ResizeLongestSide(self.side).apply_image(
            image.permute(1, 2, 0).numpy()
        )
        pixels = torch.as_tensor(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        frame = self.net.preprocess(pixels.to(self.device).float())
        return self.net.image_encoder(frame[None])[0].half().cpu()

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in SAM's frame of an original of this size."""
        return ResizeLongestSide.get_preprocess_shape(*size, self.side)

    def prompt(self, points: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What the prompt encoder makes of points: sparse (N, K + 1, D), dense maps.

        Args:
            points: (N, K, 2) float, x and y in the original frame; all on the object.
            size: of the original, height and width.
        """
        height, width = self.resized(size)
        scale = torch.tensor([width / size[1], height / size[0]], device=points.device)
        # The prompt encoder counts from pixel centers and adds the half pixel itself.
        coordinates = (points * scale - 0.5).to(self.device)
        positive = torch.ones(points.shape[:2], dtype=torch.int64, device=self.device)
        return self.net.prompt_encoder((coordinates, positive), None, None)

    @torch.no_grad()
    def candidates(
        self,
        embedding: Tensor,
        points: Tensor,
        size: tuple[int, int],
        out: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """SAM's three answers to each prompt.

        Args:
            embedding: of `encode`.
            points: (N, K, 2), K points of each of N objects, original frame.
            size: of the original.
            out: size in which the masks are wanted: the original's, or that of a view
                (not flipped), so that they are resized only once.

        Returns:
            logits (N, 3, H, W) float32, above 0 on the object; predicted IoU (N, 3).
        """
        sparse, dense = self.prompt(points, size)
        low, iou = self.net.mask_decoder(
            embedding.to(self.device).float()[None],
            self.net.prompt_encoder.get_dense_pe(),
            sparse,
            dense,
            multimask_output=True,
        )
        return self.net.postprocess_masks(low, self.resized(size), out), iou

    @torch.no_grad()
    def features(
        self, embedding: Tensor, points: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """The image as the mask decoder sees it after a prompt.

        The output of the decoder's two-way transformer on the image's side: the
        embedding, after it has attended to the prompt.

        Args:
            embedding: as for `candidates`.
            points: (Q, 2), one a prompt.
            size: as for `candidates`.

        Returns:
            (Q, cells * cells, D) float32.
        """
        sparse, dense = self.prompt(points[:, None], size)
        decoder = self.net.mask_decoder
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(points), -1, -1), sparse], dim=1)
        image = embedding.to(self.device).float()[None] + dense
        place = self.net.prompt_encoder.get_dense_pe().expand(len(points), -1, -1, -1)
        return decoder.transformer(image, place, tokens)[1]


def find(kind: str, checkpoint: str) -> Path:
    """Path of a SAM's checkpoint; UserError, with what to fetch, if there is none."""
    path = Path(checkpoint or TINY)
    if (checkpoint or kind == "tiny") and path.is_file():
        return path
    advice = "leave --sam-checkpoint out"
    if kind != "tiny":
        name, size, checksum = CHECKPOINTS[kind]
        advice = (
            f"fetch {SOURCE}{name} ({size / 1e6:.0f} MB, SHA-256 {checksum[:8]}...), "
            "or give --method pl-dc, which needs no SAM"
        )
    wrong = f"{checkpoint}: not found" if checkpoint else "PATH: needed"
    raise UserError(f"--sam {kind} --sam-checkpoint {wrong}; {advice}")


def weights(kind: str, checkpoint: str) -> tuple[Path, dict]:
    """Path of a SAM's checkpoint, and `model`, `fingerprint` (`side`, `patch`)."""
    path = find(kind, checkpoint)
    try:
        content = path.read_bytes()
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # Every exception: a damaged file can make the reader fail in any way.
    except Exception as error:
        raise UserError(
            f"--sam-checkpoint {path}: cannot be read as a state dict "
            f"({(str(error) or type(error).__name__).splitlines()[0][:100]})"
        ) from error
    if kind != "tiny":
        # Meta's files are the bare state dict.
        state = dict(model=state)
    wanted = {"model", "side", "patch"} if kind == "tiny" else {"model"}
    if not isinstance(state, dict) or not wanted <= state.keys():
        raise UserError(f"--sam-checkpoint {path}: not of --sam {kind}")
    if not isinstance(state["model"], dict) or not all(
        isinstance(value, Tensor) for value in state["model"].values()
    ):
        raise UserError(f"--sam-checkpoint {path}: not a dict of tensors")
    return path, dict(state, fingerprint=hashlib.blake2b(content).hexdigest())


class Embeddings:
    """The embeddings of a dataset's images, each computed once.

    An entry on disk is named after the content of the image's file and of SAM's
    weights, so it cannot be stale: another image, or another SAM, has another name. A
    damaged entry is noticed by its checksum and made again.

    Args:
        sam: `SegmentAnything`.
        dataset: `data.Dataset`.
        config: `sam_cache`, `sam_cache_gb`, `sam_memory_gb`.
        world: number of processes, which share the limits equally.

    Attributes:
        encoded: how many images were encoded so far.
    """

    def __init__(self, sam: SegmentAnything, dataset, config, world: int = 1):
        self.sam, self.dataset = sam, dataset
        self.memory: dict[int, Tensor] = {}
        self.folder = Path(config.sam_cache) if config.sam_cache else None
        self.room_in_memory = config.sam_memory_gb * 1e9 / world
        self.room_on_disk = config.sam_cache_gb * 1e9 / world
        self.encoded = 0
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                used = sum(f.stat().st_size for f in self.folder.glob("*.sam"))
            except OSError as error:
                raise UserError(
                    f"--sam-cache {self.folder}: cannot be used ({error.strerror})"
                ) from error
            self.room_on_disk -= used / world

    def __getitem__(self, index: int) -> Tensor:
        """The embedding of image `index`: (D, cells, cells) float16, on the CPU."""
        if index in self.memory:
            return self.memory[index]
        embedding = self.load(index)
        if self.takes(embedding.numel() * embedding.element_size()):
            self.memory[index] = embedding
        return embedding

    def takes(self, size: int) -> bool:
        """Whether there is room in memory for so many bytes, which are then taken.

        No entry ever makes room for another: images come in random order, so the next
        one needed is any, and throwing out only costs.
        """
        fits = size <= self.room_in_memory
        self.room_in_memory -= size if fits else 0
        return fits

    def load(self, index: int) -> Tensor:
        """From disk, or else from the encoder."""
        path = self.entry(index)
        embedding = read_entry(path, self.sam.cells) if path else None
        if embedding is None:
            embedding = self.sam.encode(self.dataset.image(index))
            self.encoded += 1
            if path:
                self.room_on_disk -= write_entry(path, embedding, self.room_on_disk)
        return embedding

    def entry(self, index: int) -> Path | None:
        """The file of an entry, there or not."""
        if self.folder is None:
            return None
        name = hashlib.blake2b(self.sam.fingerprint.encode(), digest_size=16)
        name.update(Path(self.dataset.path(index)).read_bytes())
        return self.folder / f"{name.hexdigest()}.sam"


def build_tiny(side: int, patch: int) -> Sam:
    """The untrained tiny SAM, 1.3 M parameters.

    Args:
        side: of the square frame that images are resized into, pixels.
        patch: side of a patch, pixels; masks have side / patch * 4 pixels on a side.
    """
    width, cells = 96, side // patch
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=side,
            patch_size=patch,
            embed_dim=128,
            depth=5,
            num_heads=2,
            mlp_ratio=3,
            out_chans=width,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            # Relative positions take half of the encoder's time on a CPU.
            use_rel_pos=False,
            # Edges are local: three of the five blocks look at 8 x 8 patches only.
            window_size=8,
            global_attn_indexes=(1, 4),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=width,
            image_embedding_size=(cells, cells),
            input_image_size=(side, side),
            mask_in_chans=8,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=width, mlp_dim=256, num_heads=4
            ),
            transformer_dim=width,
            iou_head_depth=2,
            iou_head_hidden_dim=96,
        ),
    )
