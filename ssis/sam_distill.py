r"""S4M: structural distillation (SD) from SAM into the teacher.

While the first teacher is trained, on the labeled images, its feature map is made to
have SAM's *layout*: places that are alike to SAM (because they lie on one object) shall
be alike to the teacher. Of each map F only the self-similarity is compared,

$$C(i, j) = \cos(F_i, F_j)$$ S4M Eq. (similarity)

$$L_{SD} = \mathrm{mean}_{i, j} \; \mathrm{Huber}(C_{SAM}(i, j) - C_T(i, j))$$
S4M Eq. (SD)

$$L_T = L_{\mathrm{labeled}} + \lambda_{SD} \, L_{SD}$$ S4M Eq. (teacher)

with $\lambda_{SD}$ = `structure_weight`; i are query points, j all places of the image.
Not the features themselves: SAM's know no classes, and a teacher made to have them
would lose its own (S4M's ablation).

An example: i lies on a zebra. To SAM all places of the zebra are alike, and unlike the
grass, whatever stripe they lie on; to a young teacher a black stripe is like any other
black thing. L_SD asks for the first pattern, and leaves open which numbers make it.

*SAM's side.* Each query point i is one prompt, and F is the image feature map after the
mask decoder's two-way transformer, which has been told of that point: the decoder's
features, not the encoder's (the ablation again). So each row C(i, .) comes from a map
of its own.

*The teacher's side.* The FPN's stride-4 level, in the part that Mask2Former's pixel
decoder plays in the paper; sampled at the centers of SAM's cells, so that flip,
resizing and padding of the view are undone in one step. Only cells whose center lies in
the image count, not SAM's padding.

*Query points.* Half of them in the union of the true masks, half anywhere (released
code: 64 + 64). `structure_boundary` draws that share of the first half from a band
around the masks' edges, where the layout is decided.

*Cost.* A row is a pass of 64 x 64 x 256 numbers through the transformer, but depends on
the image and the point alone. So each image gets its query points once, and its rows
(128 x 4096 at 16 bits: 1 MB) are kept in memory while there is room beside the
embeddings; the others are computed again. The released code draws new points in every
step (docs/differences.md).

Chain: 12 of 16. Read next: `ssis/optimizer.py`, which follows the gradient of it all.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ssis.augment import Geometry
from ssis.sam import CHUNK, Embeddings, SegmentAnything

# Half the width of the boundary band, as a share of the image's longer side.
BAND = 0.01


def query_points(
    masks: Tensor, count: int, boundary: float, generator: torch.Generator
) -> Tensor:
    """Query points of an original image.

    Args:
        masks: (N, H, W) uint8, the true ones; N may be 0.
        count: Q; the first half on the objects, the others anywhere.
        boundary: share of the first half that is drawn from the band around the edges.
        generator: of the draw, on the CPU.

    Returns:
        (Q, 2) float, x and y; the first pixel's center is 0.5.
    """
    # Three places to draw from, as maps of chances: anywhere, on some object, on an
    # edge.
    height, width = masks.shape[-2:]
    anywhere = torch.ones(height, width)
    inside = masks.bool().any(dim=0).float()
    band = torch.zeros(height, width)
    if len(masks) and boundary:
        # The largest value nearby of the mask and of its negative: their sum is 1 where
        # both inside and outside are near, and 0 elsewhere.
        reach = max(1, round(BAND * max(height, width)))
        soft = masks.float()[:, None]
        band = (spread(soft, reach) + spread(-soft, reach))[:, 0].amax(dim=0)
    on_edge = round(count // 2 * boundary)
    # multinomial takes 2^24 places at most: every other pixel of a large photograph.
    step = math.ceil(math.sqrt(height * width / 2**24))
    parts = []
    for where, number in (
        (band, on_edge),
        (inside, count // 2 - on_edge),
        (anywhere, count - count // 2),
    ):
        # An image without an object, or without an edge, has all points anywhere.
        chance = (where if where.any() else anywhere)[::step, ::step]
        if number:
            place = torch.multinomial(
                chance.flatten(), number, True, generator=generator
            )
            across = chance.shape[1]
            parts.append(torch.stack([place % across, place // across], dim=1) * step)
    return torch.cat(parts).float() + 0.5


def spread(maps: Tensor, reach: int) -> Tensor:
    """The largest value within `reach` pixels across and down, of maps (N, 1, H, W)."""
    # One direction after the other: a square window of 41 pixels takes 40 times longer.
    across = F.max_pool2d(maps, (1, 2 * reach + 1), 1, (0, reach))
    return F.max_pool2d(across, (2 * reach + 1, 1), 1, (reach, 0))


def similarity(features: Tensor, queries: Tensor) -> Tensor:
    """S4M Eq. (similarity): rows of the self-similarity of one map.

    Args:
        features: (P, D), a feature for each place.
        queries: (Q,) int64, places.

    Returns:
        (Q, P) in [-1, 1].
    """
    # The cosine is the dot product of vectors of length 1: how strong a feature is does
    # not count, only where it points.
    unit = F.normalize(features, dim=1)
    return unit[queries] @ unit.T


def centers(sam: SegmentAnything, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which of SAM's cells lie in an image, and where.

    Args:
        sam: whose cells.
        size: height and width of the original.

    Returns:
        rows and columns: the centers (R,), (K,) of the cells whose center is in the
        image, as shares of its height and width, in (0, 1). The other cells are
        padding. There is at least one of each.
    """
    # SAM scales the long side to its frame and pads below and to the right; its cells
    # divide the frame evenly.
    height, width = sam.resized(size)
    shares = (torch.arange(sam.cells) + 0.5) * sam.side / sam.cells
    # Centers beyond the image are padding: SAM has features there, of nothing.
    rows, columns = shares[shares < height], shares[shares < width]
    # A strip thinner than half a cell still has its first row.
    rows = rows if len(rows) else torch.tensor([height / 2])
    columns = columns if len(columns) else torch.tensor([width / 2])
    return rows / height, columns / width


class Structure:
    """SAM's self-similarity of the labeled images, each row computed once.

    Args:
        embeddings: of the training images; their memory is shared.
        queries: Q, query points of an image.
        boundary: fraction of those on the objects that is drawn from the boundary band.
        seed: of the run.
    """

    def __init__(
        self, embeddings: Embeddings, queries: int, boundary: float, seed: int
    ):
        self.embeddings, self.sam = embeddings, embeddings.sam
        self.count, self.boundary, self.seed = queries, boundary, seed
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Query cells (Q,) int64 and their rows (Q, P) float16 of an image, on the CPU.

        Places are numbered row by row over the cells of `centers`.
        """
        # What finds no room is computed again next time, with the same points.
        if index not in self.memory:
            found = self.compute(index)
            if not self.embeddings.takes(found[1].numel() * 2):
                return found
            self.memory[index] = found
        return self.memory[index]

    @torch.no_grad()
    def compute(self, index: int) -> tuple[Tensor, Tensor]:
        """The same, from SAM."""
        dataset, sam = self.embeddings.dataset, self.sam
        # In the original frame, which is SAM's; views of the image differ, this does
        # not.
        masks = dataset.target(index)["masks"]
        size = tuple(dataset.image(index).shape[-2:])
        # A seed of the image: a row that was not kept comes out the same again.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        points = query_points(
            masks.reshape(-1, *size), self.count, self.boundary, generator
        )
        rows, columns = centers(sam, size)
        height, width = sam.resized(size)
        cell = sam.side / sam.cells
        # The cell that a point falls into; one that is mostly padding stands back.
        y = (points[:, 1] / size[0] * height / cell).long().clamp(max=len(rows) - 1)
        x = (points[:, 0] / size[1] * width / cell).long().clamp(max=len(columns) - 1)
        # Not to be kept in memory: its rows are, and nothing else asks for it again
        # (refinement does, once, with `--unlabeled-includes-labeled` and no cache).
        embedding, table = self.embeddings.load(index), []
        # In chunks: 128 prompts at 64 x 64 x 256 together would be 0.5 GB a tensor.
        for some, i, j in zip(
            points.split(CHUNK), y.split(CHUNK), x.split(CHUNK), strict=True
        ):
            # One map for each prompt, cut to the cells that lie in the image.
            maps = sam.features(embedding, some.to(sam.device), size)
            maps = maps.unflatten(1, (sam.cells, sam.cells))  # (q, cells, cells, D)
            maps = maps[:, : len(rows), : len(columns)].flatten(1, 2)  # (q, P, D)
            place = (i * len(columns) + j).to(sam.device)
            # Of each map one row only: the point's own place against all others.
            table += [
                similarity(m, p[None])[0] for m, p in zip(maps, place, strict=True)
            ]
        return y * len(columns) + x, torch.stack(table).half().cpu()


def sampled(
    features: Tensor, geometry: Geometry, rows: Tensor, columns: Tensor
) -> Tensor:
    """The student's features at some places of the original image.

    Args:
        features: (D, H / 4, W / 4), stride 4, of one padded view.
        geometry: of the view.
        rows, columns: (R,), (K,) places as shares of the height and the width.

    Returns:
        (R * K, D).
    """
    # Where a share of the original lies in the view: mirrored with it, scaled with it.
    height, width = geometry.view
    # In the view, in the padded batch, and as grid_sample counts: from -1 to 1.
    across = 1 - columns if geometry.flip else columns
    x = 2 * across * width / (4 * features.shape[2]) - 1
    y = 2 * rows * height / (4 * features.shape[1]) - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)  # (R, K, 2)
    # Bilinear: the center of a SAM cell seldom falls on a cell of the student's map.
    found = F.grid_sample(
        features[None],
        grid[None].to(features),
        padding_mode="border",
        align_corners=False,
    )
    return found[0].flatten(1).T


def loss(features: Tensor, items: list[dict], structure: Structure) -> Tensor:
    """S4M Eq. (SD) over a labeled batch: a scalar.

    Args:
        features: (B, D, H / 4, W / 4), the student's stride-4 level, with gradient.
        items: B items of `data.Stream`.
        structure: SAM's side, without gradient.
    """
    total = features.new_zeros(())
    for own, item in zip(features.float(), items, strict=True):
        # Both sides at the same places of the original image; the student's in float32.
        geometry = item["geometry"]
        queries, wanted = structure[item["index"]]
        # A gradient flows into the features at query and other places alike; SAM's rows
        # are numbers, and cannot be taught.
        places = sampled(own, geometry, *centers(structure.sam, geometry.original))
        found = similarity(places, queries.to(own.device))
        # S4M Eq. (SD); smooth L1 with beta 1 is the Huber loss with delta 1.
        total = total + F.smooth_l1_loss(found, wanted.to(found), beta=1.0)
    return total / len(items)
