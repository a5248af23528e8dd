"""S4M's structural distillation: the loss by hand, its invariances, its frames."""

import pytest
import torch
from torch.nn import functional as F

from ssis import augment, sam, sam_distill
from ssis.io.embeddings import Embeddings

pytestmark = pytest.mark.fast
# Query points, fraction of them on the edges, seed.
SETTINGS = (16, 0.0, 0)


class Scene:
    """A dataset of one image, 64 high and 96 wide: one object, left of the middle."""

    def __init__(self, height: int = 64, width: int = 96):
        self.masks = torch.zeros(1, height, width, dtype=torch.uint8)
        self.masks[0, height // 4 : height // 2, 4 : width // 3] = 1
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 30, (3, height, width), generator=generator)
        self.pixels = (20 + 180 * self.masks + noise).to(torch.uint8)

    def image(self, index: int) -> torch.Tensor:
        return self.pixels

    def target(self, index: int) -> dict:
        return dict(masks=self.masks)


@pytest.fixture(scope="module")
def structure():
    tiny = sam.SegmentAnything("tiny", "", "cpu")
    return sam_distill.Structure(Embeddings(tiny, Scene()), *SETTINGS)


def item(flip: bool = False, view=(64, 96)) -> dict:
    return dict(index=0, geometry=augment.Geometry((64, 96), view, (0, 0), view, flip))


def test_similarity_by_hand():
    """Three places: the second is at 60 degrees to the first, the third opposite."""
    features = torch.tensor([[2.0, 0.0], [0.5, 0.75**0.5], [-3.0, 0.0]])
    rows = sam_distill.similarity(features, torch.tensor([0, 2]))
    wanted = torch.tensor([[1.0, 0.5, -1.0], [-1.0, -0.5, 1.0]])
    assert torch.allclose(rows, wanted, atol=1e-6)


def test_the_loss_by_hand(structure):
    """Constant features are alike everywhere, so every difference is 1 - SAM's row.

    Two images; of the first SAM's rows are 0.6 and -1, of the second 1: Huber with delta 1 is
    quadratic up to 1, linear beyond, and the mean is over queries, places and images.
    """
    rows, columns = sam_distill.centers(structure.sam, (64, 96))
    places = len(rows) * len(columns)
    by_hand = sam_distill.Structure(structure.embeddings, *SETTINGS)
    wanted = torch.tensor([0.6, -1.0])[:, None].expand(2, places).half()
    by_hand.memory[0] = (torch.tensor([0, 5]), wanted)
    by_hand.memory[1] = (torch.tensor([3]), torch.ones(1, places).half())
    features = torch.ones(2, 4, 16, 24) * torch.tensor([2.0, 0.1])[:, None, None, None]
    items = [item(), dict(item(flip=True), index=1)]
    expected = ((0.5 * 0.4**2 + (2 - 0.5)) / 2 + 0) / 2
    assert sam_distill.loss(features, items, by_hand).item() == pytest.approx(expected, abs=1e-3)


def test_rotations_change_nothing(structure):
    queries, wanted = structure[0]
    rows, columns = sam_distill.centers(structure.sam, (64, 96))
    count = len(rows) * len(columns)
    features = torch.randn(count, 12, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    plain = sam_distill.similarity(features, queries)
    # Neither space's orientation counts, nor the length of any feature.
    turned = sam_distill.similarity(features @ turn * (1 + torch.rand(count, 1)), queries)
    assert torch.allclose(turned, plain, atol=1e-9)
    # SAM's rows are similarities: 1 at the query itself, within [-1, 1].
    assert wanted.shape == (16, count) and wanted.abs().max() <= 1.001
    assert torch.allclose(wanted[range(16), queries].float(), torch.ones(16), atol=2e-3)


def test_a_student_with_sams_own_features_has_no_loss():
    """One query, so that one map says it all; a view in which cells are whole blocks."""
    tiny = sam.SegmentAnything("tiny", "", "cpu")
    structure = sam_distill.Structure(Embeddings(tiny, Scene()), 1, 0.0, 0)
    generator = torch.Generator().manual_seed(0)
    point = sam_distill.query_points(Scene().masks, 1, 0.0, generator)
    theirs = tiny.features(structure.embeddings[0], point, (64, 96))[0]  # (P, D)
    grid = theirs.T.reshape(1, -1, tiny.cells, tiny.cells)
    cell = tiny.side // tiny.cells
    blocks = F.interpolate(grid, scale_factor=cell)[..., :64, :]
    view = item(view=(4 * 64, 4 * 96))
    assert sam_distill.loss(blocks, [view], structure).item() < 1e-6
    assert sam_distill.loss(torch.randn_like(blocks), [view], structure).item() > 1e-2
    # Mirrored by mistake it would not be zero.
    assert sam_distill.loss(blocks.flip(-1), [view], structure).item() > 1e-4


def test_the_gradient_reaches_only_the_student(structure):
    features = torch.randn(1, 8, 16, 24, requires_grad=True)
    loss = sam_distill.loss(features, [item()], structure)
    loss.backward()
    assert loss > 0 and features.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in structure.sam.net.parameters())
    assert not structure[0][1].requires_grad
    # Following it makes the layouts more alike.
    after = sam_distill.loss(features.detach() - 50 * features.grad, [item()], structure)
    assert after < loss


def test_views_and_padding_do_not_change_the_loss(structure):
    """A smooth map, seen plain, flipped, at twice the size, and in a padded batch."""
    y, x = torch.meshgrid(torch.linspace(0, 3, 16), torch.linspace(0, 4, 24), indexing="ij")
    plain = torch.stack([x.sin(), y.cos(), (x * y).sin(), x - y])[None]
    loss = sam_distill.loss(plain, [item()], structure)
    flipped = sam_distill.loss(plain.flip(-1), [item(flip=True)], structure)
    assert torch.allclose(flipped, loss, atol=1e-6)
    # Padding below and to the right, with numbers that would count if they were read.
    padded = F.pad(plain, (0, 8, 0, 8), value=100.0)
    inside = sam_distill.sampled(padded[0], item()["geometry"], *inner(structure))
    assert torch.allclose(
        inside, sam_distill.sampled(plain[0], item()["geometry"], *inner(structure)), atol=1e-5
    )
    double = F.interpolate(plain, scale_factor=2, mode="bilinear")
    large = sam_distill.loss(double, [item(view=(128, 192))], structure)
    assert torch.allclose(large, loss, rtol=0.05)


def loss_by_loop(features, geometry, structure) -> float:
    """S4M Eq. (SD) for one image: query by query, cell by cell, those in the view alone."""
    rows, columns = sam_distill.centers(structure.sam, geometry.original)
    queries, wanted = structure[0]
    own = {}
    for i, row in enumerate(rows.tolist()):
        for j, column in enumerate(columns.tolist()):
            y = row * geometry.scaled[0] - geometry.offset[0]
            x = column * geometry.scaled[1] - geometry.offset[1]
            if not (0 <= y < geometry.view[0] and 0 <= x < geometry.view[1]):
                continue
            x = geometry.view[1] - x if geometry.flip else x
            # The map's features lie at the centers of cells of 4 pixels.
            point = torch.tensor([[[[x / 2 / features.shape[2], y / 2 / features.shape[1]]]]]) - 1
            value = F.grid_sample(features[None], point, padding_mode="border", align_corners=False)
            own[i * len(columns) + j] = F.normalize(value.flatten(), dim=0)
    terms = []
    for query, row in zip(queries.tolist(), wanted.float(), strict=True):
        for place, feature in own.items() if query in own else ():
            difference = abs((own[query] @ feature - row[place]).item())
            terms.append(0.5 * difference**2 if difference < 1 else difference - 0.5)
    return sum(terms) / len(terms) if terms else 0.0


def test_of_a_cropped_view_only_what_it_shows_counts(structure):
    """Against the loop, with crop, scale, flip and padding; and a view without any query."""
    features = torch.randn(12, 14, 18)
    for geometry in (
        augment.Geometry((64, 96), (80, 120), (13, 30), (40, 60), False),
        augment.Geometry((64, 96), (80, 120), (13, 30), (40, 60), True),
        augment.Geometry((64, 96), (40, 60), (0, 0), (40, 60), True),
    ):
        items = [dict(index=0, geometry=geometry)]
        found = sam_distill.loss(features[None], items, structure).item()
        assert found == pytest.approx(loss_by_loop(features, geometry, structure), abs=1e-4)
    # A corner in which no query lies: nothing to learn, and no 0 / 0.
    few = sam_distill.Structure(structure.embeddings, *SETTINGS)
    few.memory[0] = (structure[0][0][:1] * 0, structure[0][1][:1])
    corner = augment.Geometry((64, 96), (128, 192), (60, 100), (40, 60), False)
    features = torch.randn(2, 12, 14, 18, requires_grad=True)
    assert sam_distill.loss(features[:1], [dict(index=0, geometry=corner)], few) == 0
    # Beside another image it counts as an image, without a loss.
    both = [dict(index=0, geometry=corner), item()]
    alone = sam_distill.loss(features[1:], [item()], few)
    torch.testing.assert_close(sam_distill.loss(features, both, few), alone / 2)


def inner(structure):
    """Places further than a feature from the border, which interpolation would mix."""
    rows, columns = sam_distill.centers(structure.sam, (64, 96))
    return rows[1:-1], columns[1:-1]


def test_only_cells_in_the_image_count():
    tiny = sam.SegmentAnything("tiny", "", "cpu")
    cell = tiny.side / tiny.cells
    rows, columns = sam_distill.centers(tiny, (48, 96))
    assert len(columns) == tiny.cells and len(rows) == round(48 / cell)
    assert 0 < rows.min() and rows.max() < 1 and 0 < columns.min() and columns.max() < 1
    # A strip still has one row, wherever the centers lie.
    rows, _ = sam_distill.centers(tiny, (1, 96))
    assert len(rows) == 1 and 0 < rows.item() < 1


def test_query_points_lie_where_they_should():
    masks = Scene().masks
    generator = torch.Generator().manual_seed(0)
    points = sam_distill.query_points(masks, 200, 0.0, generator)
    assert points.shape == (200, 2)
    x, y = (points - 0.5).long().unbind(1)
    assert masks[0, y[:100], x[:100]].all()
    assert 0 < masks[0, y[100:], x[100:]].float().mean() < 0.5
    # All of the first half in the band: within a pixel of an edge.
    points = sam_distill.query_points(masks, 200, 1.0, generator)
    x, y = (points[:100] - 0.5).long().unbind(1)
    grown = F.max_pool2d(masks.float()[None], 3, 1, 1)[0, 0]
    shrunk = -F.max_pool2d(-masks.float()[None], 3, 1, 1)[0, 0]
    assert (grown[y, x] == 1).all() and (shrunk[y, x] == 0).all()
    # A photograph of more than 2^24 pixels: every other one.
    large = torch.zeros(1, 4200, 4200, dtype=torch.uint8)
    large[0, 1000:2000, 500:900] = 1
    points = sam_distill.query_points(large, 40, 0.0, generator)
    x, y = (points - 0.5).long().unbind(1)
    assert large[0, y[:20], x[:20]].all() and x.max() > 2100
    # Of what is left of it nothing has an object any more: anywhere.
    large[:] = 0
    large[0, 1001, 501:900] = 1
    assert sam_distill.query_points(large, 40, 0.0, generator).shape == (40, 2)
    # No object: anywhere.
    assert sam_distill.query_points(masks[:0], 20, 0.5, generator).shape == (20, 2)


def test_rows_are_computed_once_and_come_out_the_same_when_not_kept():
    tiny = sam.SegmentAnything("tiny", "", "cpu")
    calls = []
    tiny.net.mask_decoder.transformer.register_forward_hook(lambda *args: calls.append(1))
    kept = sam_distill.Structure(Embeddings(tiny, Scene()), *SETTINGS)
    first, second = kept[0], kept[0]
    assert first[1] is second[1] and len(calls) == 1
    no_room = Embeddings(tiny, Scene(), memory_gb=0.0)
    fresh = sam_distill.Structure(no_room, *SETTINGS)
    assert torch.equal(fresh[0][1], first[1]) and torch.equal(fresh[0][0], first[0])
    assert fresh.embeddings.encoded == 2 and not fresh.memory
    # What the rows were made of is not kept besides.
    assert not kept.embeddings.memory
