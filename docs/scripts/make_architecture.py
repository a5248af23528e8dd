"""Draw docs/img/architecture.svg: which file uses which, from their real imports.

    python docs/scripts/make_architecture.py            draw it
    python docs/scripts/make_architecture.py --check    status 1 when the picture is not up to date

Files stand in layers, each above all that it imports. What nearly every file uses (the
settings, DDP's few lines, the writing of files) is left out, and so are arrows to what is
also reached through another arrow: the picture is to be read, not to be complete.
"""

import ast
import itertools
from pathlib import Path

from generated import write_or_check

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "architecture.svg"
# Used by nearly all, or beside the loop.
LEFT_OUT = {"__init__", "config", "distributed", "files", "presets"}
# What a file is for, by color.
KINDS = {
    "the loop": ("#fff3c4", {"train", "evaluate"}),
    "Guided Distillation": ("#dbe9ff", {"teacher", "model", "split", "augment"}),
    "PL-DC": ("#d9f2dd", {"filters", "correction", "clip", "losses"}),
    "S4M": ("#fbdfe6", {"sam", "tiny_sam", "sam_distill", "refine"}),
    "all else": ("#eceff3", set()),
}
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 104, 30, 14, 46, 20


def imports() -> dict[str, set[str]]:
    """Module -> the modules of the project that it imports, also within functions."""
    paths = {path.stem: path for path in (*ROOT.glob("*.py"), *ROOT.glob("ssis/*.py"))}
    found = {}
    for name, path in paths.items():
        used: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ssis."):
                used.add(node.module.removeprefix("ssis."))
            elif isinstance(node, ast.ImportFrom) and node.module == "ssis":
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
        found[name] = {other for other in used if other in paths} - {name}
    return found


def shown(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """What train.py needs, without what is left out and without arrows by a detour."""
    reached, todo = set(), ["train"]
    while todo:
        name = todo.pop()
        if name not in reached and name not in LEFT_OUT:
            reached.add(name)
            todo += found[name]
    graph = {name: found[name] & reached for name in reached}

    def below(name: str) -> set[str]:
        return set().union(*({other} | below(other) for other in graph[name]))

    return {
        name: {o for o in used if not any(o in below(p) for p in used - {o})}
        for name, used in graph.items()
    }


def layers(graph: dict[str, set[str]]) -> list[list[str]]:
    """The modules from top to bottom, each above all that it imports."""
    depth: dict[str, int] = {}

    def place(name: str, level: int) -> None:
        if depth.get(name, -1) < level:
            depth[name] = level
            for other in graph[name]:
                place(other, level + 1)

    place("train", 0)
    rows = [[] for _ in range(max(depth.values()) + 1)]
    for name in sorted(depth):
        rows[depth[name]].append(name)
    # Each row in the order of those that use it, from the second on: fewer crossings.
    for above, row in itertools.pairwise(rows):
        order = {name: k for k, name in enumerate(above)}

        def middle(name, order=order):
            places = [order[user] for user in order if name in graph[user]]
            return (sum(places) / len(places) if places else len(order) / 2, name)

        row.sort(key=middle)
    return rows


def kind(name: str) -> str:
    return next((k for k, (_, names) in KINDS.items() if name in names), "all else")


def draw() -> str:
    """The picture, as SVG."""
    graph = shown(imports())
    rows = layers(graph)
    widest = max(map(len, rows))
    total = widest * (WIDTH + GAP_X) - GAP_X
    where = {}
    for level, row in enumerate(rows):
        left = (total - len(row) * (WIDTH + GAP_X) + GAP_X) / 2 + MARGIN
        for k, name in enumerate(row):
            where[name] = (left + k * (WIDTH + GAP_X), MARGIN + level * (HEIGHT + GAP_Y))
    height = 2 * MARGIN + len(rows) * (HEIGHT + GAP_Y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total + 2 * MARGIN:.0f} {height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for name in sorted(graph):
        x, y = where[name]
        for other in sorted(graph[name]):
            ox, oy = where[other]
            x1, y1, x2, y2 = x + WIDTH / 2, y + HEIGHT, ox + WIDTH / 2, oy
            bend = (y2 - y1) / 2
            parts.append(
                f'<path d="M{x1:.0f} {y1:.0f} C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} '
                f'{x2:.0f} {y2:.0f}" fill="none" stroke="#8a97a6" stroke-width="1"/>'
            )
    for name, (x, y) in sorted(where.items()):
        parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5" '
            f'fill="{KINDS[kind(name)][0]}" stroke="#6b7785"/>'
            f'<text x="{x + WIDTH / 2:.0f}" y="{y + 20:.0f}" text-anchor="middle" '
            f'fill="#1c2733">{name}</text>'
        )
    for k, (words, (color, _)) in enumerate(KINDS.items()):
        x, y = MARGIN + 150 * k, height - MARGIN - 6
        parts.append(
            f'<rect x="{x}" y="{y - 12}" width="16" height="16" fill="{color}" stroke="#6b7785"/>'
            f'<text x="{x + 22}" y="{y + 1}" fill="#1c2733">{words}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    write_or_check(PICTURE, draw())
