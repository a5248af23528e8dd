r"""Segment Anything: official checkpoints, the tiny built-in one, the embedding cache.

SAM (Kirillov et al., arXiv 2304.02643) turns a point into a mask: it knows where things
end, but not what they are. It has three parts:

    image encoder      the image into an embedding of 64 x 64 cells; seconds on a CPU, a
                       tenth of a second on a large GPU
    prompt encoder     points into tokens; next to nothing
    mask decoder       embedding and tokens into three masks; milliseconds

Only the first one is slow, and it sees no prompt. Hence the rule of this file:

*One encoding per image.* SAM always sees the original image, never a view of it. So
there is one embedding per image, which `Embeddings` keeps, in memory and on disk. The
cache on disk (`--sam-cache`) serves all processes and all runs; in memory each process
keeps those of the images that came to it. An embedding is rounded to 16 bits, even if
it is kept nowhere and computed again each time, so on the same kind of device the cache
does not change what is trained.

*Frames.* Prompts are given in the original frame, in continuous coordinates: the center
of the first pixel is 0.5. SAM's own frame is a square of `side` pixels (1024; the tiny
one 96). The image is resized to it by its long side, and padded below or to the right.

*What the method takes from SAM.* Refinement (`ssis/refine.py`) uses the masks
(`candidates`). Structural distillation (`ssis/sam_distill.py`) uses the image features
inside of the mask decoder (`features`).

The models (`--sam`): `vit_b`, `vit_l`, `vit_h`, from Meta's files, by
`segment_anything` itself; and `tiny`, which belongs to the built-in dataset
(`ssis/tools/train_tiny_sam.py`) and comes with the project. Their files are read in
`ssis/io/sam_weights.py`. S4M's released code has SAM 2.

    python -m ssis sam --out FILE        trains another tiny one (--help says more)

Chain: 10 of 23. Read next: `ssis/refine.py`, the first of its two uses.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from segment_anything import sam_model_registry
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from ssis import UserError
from ssis.io.checkpoint import check_fits
from ssis.io.embedding_file import read_entry, write_entry
from ssis.io.sam_weights import build_tiny, find, read

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
        entry_bytes: size of an embedding, in 16 bits, and of its checksum.

    Raises:
        UserError: no checkpoint, or one that is of another model.
    """

    def __init__(self, kind: str, checkpoint: str, device):
        path = find(kind, checkpoint)
        state = read(kind, path)
        # The tiny one says in its file how large it is; the official ones have names.
        self.net = (
            build_tiny(state["side"], state["patch"])
            if kind == "tiny"
            else sam_model_registry[kind]()
        )
        # vit_b's weights in vit_l would be a wall of missing keys; one line says it.
        message = f"--sam-checkpoint {path}: not of --sam {kind}"
        check_fits(self.net.state_dict(), state["model"], message)
        # The file's tensors become the weights, instead of a second copy of them.
        self.net.load_state_dict(state["model"], assign=True)
        # Frozen: S4M asks SAM, and never trains it. (The tiny one's file has 16 bits.)
        self.net.to(device).float().eval().requires_grad_(False)
        self.device = torch.device(device)
        self.side = self.net.image_encoder.img_size
        self.cells = self.net.prompt_encoder.image_embedding_size[0]
        self.fingerprint = state["fingerprint"]
        self.entry_bytes = 2 * self.net.prompt_encoder.embed_dim * self.cells**2 + 16

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
        # Normalized, and padded with 0 to the square.
        frame = self.net.preprocess(pixels.to(self.device).float())
        # On a GPU in TF32, as its tensor cores compute: it has 11 bits, as has float16,
        # which is kept. (In bf16, with 8, 3 % of the tiny SAM's mask pixels differ.)
        precision = torch.get_float32_matmul_precision()
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        try:
            embedding = self.net.image_encoder(frame[None])[0]
        finally:
            torch.set_float32_matmul_precision(precision)
        # 16 bits and the CPU: half the size, and no GPU memory for thousands of images.
        return embedding.half().cpu()

    def on_device(self, embedding: Tensor) -> Tensor:
        """An embedding of `encode` for the decoder: (1, D, cells, cells) float32."""
        # From pinned memory the GPU fetches it while the host goes on.
        if self.device.type == "cuda":
            embedding = embedding.pin_memory()
        return embedding.to(self.device, non_blocking=True).float()[None]

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in SAM's frame of an original of this size."""
        return ResizeLongestSide.get_preprocess_shape(*size, self.side)

    def prompt(self, points: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What the prompt encoder makes of points.

        Args:
            points: (N, K, 2) float, x and y in the original frame; all on the object.
            size: of the original, height and width.

        Returns:
            sparse (N, K + 1, D): a token for each point, and one that says "no box".
            dense (N, D, cells, cells): what is added to the image, here "no mask".
        """
        # The two sides are scaled separately: each is rounded to whole pixels.
        height, width = self.resized(size)
        x, y = points.to(self.device).unbind(dim=-1)
        points = torch.stack([x * (width / size[1]), y * (height / size[0])], dim=-1)
        # The library's prompt encoder, written out for points alone: it looks for every
        # kind of prompt, also for those that are not there, and waits for a GPU each
        # time. A token says where a point is, and that it is on the object (embedding 0
        # would say beside it; S4M has only points on it).
        encoder, count = self.net.prompt_encoder, len(points)
        where = encoder.pe_layer.forward_with_coords(points, encoder.input_image_size)
        on_object = where + encoder.point_embeddings[1].weight
        no_box = encoder.not_a_point_embed.weight.expand(count, 1, -1)
        no_mask = encoder.no_mask_embed.weight[:, :, None, None]
        no_mask = no_mask.expand(count, -1, *encoder.image_embedding_size)
        return torch.cat([on_object, no_box], dim=1), no_mask

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
        # One embedding for all N prompts: the decoder repeats it, not the encoder.
        # `multimask_output`: three masks, since a point on a wheel may mean the wheel,
        # the car or the row of cars.
        low, iou = self.net.mask_decoder(
            self.on_device(embedding),
            self.net.prompt_encoder.get_dense_pe(),
            sparse,
            dense,
            multimask_output=True,
        )
        # The decoder's masks have a quarter of the frame's side. Enlarged to the frame,
        # cut to the image (the rest is padding), resized to `out`.
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
        # The core of structural distillation. `MaskDecoder.forward` returns masks only,
        # so its first half, up to the transformer, is written out here.
        sparse, dense = self.prompt(points[:, None], size)
        decoder = self.net.mask_decoder
        # The tokens of one prompt, in the order that the weights were trained with:
        #   1 learned token, from which SAM predicts the IoUs of its masks;
        #   4 learned tokens, one for each mask that it can give: one for a prompt that
        #     is clear, three for one that is not;
        #   2 from the prompt encoder: where the point is, and "no box".
        # The first five are the same for every prompt; the point is what differs.
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(points), -1, -1), sparse], dim=1)
        # The image's side: the embedding plus the dense part of the prompt, a learned
        # vector that says "no mask was given"; and where each cell is.
        image = self.on_device(embedding) + dense
        position = self.net.prompt_encoder.get_dense_pe()
        position = position.expand(len(points), -1, -1, -1)
        # Two-way: the tokens attend to the image, and the image to the tokens. So the
        # transformer has two outputs: first the tokens, from which the masks and IoUs
        # would be made, then the image. The second one is S4M's feature: in it, the
        # cells know which object was meant.
        return decoder.transformer(image, position, tokens)[1]


class Embeddings:
    """The embeddings of a dataset's images, each computed once.

    An entry on disk is named after the content of the image's file and of SAM's
    weights, so it cannot be stale: another image, or another SAM, has another name. A
    damaged entry is noticed by its checksum and made again.

    Args:
        sam: `SegmentAnything`.
        dataset: `datasets.dataset.Dataset`.
        cache: folder for the embeddings; empty: none are kept on disk.
        cache_gb, memory_gb: limits of the folder and of the memory, 10^9 bytes.
        world_size: number of processes; each may use its part of the limits.

    Attributes:
        encoded: how many images were encoded so far.
        limit: of memory or folder, the larger one, in bytes.

    Raises:
        UserError: the folder cannot be used.
    """

    def __init__(
        self,
        sam: SegmentAnything,
        dataset,
        cache: str = "",
        cache_gb: float = 50.0,
        memory_gb: float = 2.0,
        world_size: int = 1,
    ):
        self.sam, self.dataset = sam, dataset
        self.memory: dict[int, Tensor] = {}
        self.folder = Path(cache) if cache else None
        # Processes do not tell each other what they keep, so each has a part.
        self.room_in_memory = memory_gb * 1e9 / world_size
        self.room_on_disk = cache_gb * 1e9 / world_size
        self.limit = 1e9 * max(memory_gb, cache_gb if cache else 0)
        self.encoded = 0
        if self.folder:
            # What earlier runs have left in the folder counts towards its limit.
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                used = sum(f.stat().st_size for f in self.folder.glob("*.sam"))
            except OSError as error:
                raise UserError(
                    f"--sam-cache {self.folder}: cannot be used ({error.strerror})"
                ) from error
            self.room_on_disk -= used / world_size

    def shortage(self) -> str:
        """A line where the embeddings cannot all be kept; empty where they can."""
        images, entry = len(self.dataset), self.sam.entry_bytes
        kept = int(self.limit // entry)
        if kept >= images:
            return ""
        return (
            f"SAM's embeddings of {kept:,} of {images:,} images can be kept "
            f"({entry / 1e6:.2g} MB each), the others are made again whenever they are "
            "needed; give --sam-cache FOLDER --sam-cache-gb "
            f"{math.ceil(images * entry / 1e9)}, and fill it ahead: python -m ssis sam "
            "encode, with the flags of this run"
        )

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

        No entry ever makes room for another: images come in random order, so any other
        one may be needed next, and replacing entries would only cost time.
        """
        fits = size <= self.room_in_memory
        self.room_in_memory -= size if fits else 0
        return fits

    def load(self, index: int) -> Tensor:
        """The embedding from disk, or else from the encoder."""
        path = self.entry(index)
        embedding = read_entry(path, self.sam.cells) if path else None
        if embedding is None:
            embedding = self.sam.encode(self.dataset.image(index))
            self.encoded += 1
            # Where the folder is full, nothing is written and 0 bytes are taken.
            if path:
                self.room_on_disk -= write_entry(path, embedding, self.room_on_disk)
        return embedding

    def entry(self, index: int) -> Path | None:
        """The file of an entry, there or not; None without a cache on disk."""
        if self.folder is None:
            return None
        # Both contents go into the name, so no entry is ever out of date.
        name = hashlib.blake2b(self.sam.fingerprint.encode(), digest_size=16)
        name.update(Path(self.dataset.path(index)).read_bytes())
        return self.folder / f"{name.hexdigest()}.sam"
