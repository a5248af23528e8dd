"""Any JSON at all is a dataset or one line: a COCO JSON with random places changed.

Each case replaces one to three random nodes of a valid JSON by junk of every kind, or
drops or doubles them, reads the result, and makes of every image what training and
evaluation would. Nothing but a UserError of one line may come out. SSIS_FUZZ=100000 tries
more than the default; a failing case is named by its seed.
"""

import copy
import json
import os
import random
import warnings

import pytest
from conftest import write_coco

from ssis import UserError
from ssis.datasets import coco_json

pytestmark = pytest.mark.fast
CASES = int(os.environ.get("SSIS_FUZZ", 2000))
JUNK = [
    None, True, False, 0, -1, 1, 7, 1.5, -0.5, 1e308, -1e308, 10**30, -(10**30), float("nan"),
    float("inf"), "", "7", "007", "a", "../a", "/etc/passwd", "0.png", "\x00", "\ud800", "é ü.png",
    [], {}, [[]], [{}], {"size": [32, 48]}, [1, 2, 3, 4, 5, 6], [[1, 2, 3, 4, 5, 6]],
    [["a"] * 6], [[None] * 6], [[1e308] * 8], [[float("nan")] * 6], [[-1e9, 5, 1e9, 5, 7, 1e9]],
    {"size": [32, 48], "counts": [1536]}, {"size": [32, 48], "counts": "Wl3"},
    {"size": [32, 48], "counts": [10**20, -(10**20), 1536]}, {"size": "ab", "counts": []},
    {"size": [32, 48], "counts": [1.5, 1534.5]}, {"size": [-1, 48], "counts": []},
    {"size": [32, 48], "counts": None}, {"counts": "0"}, [[1, 2, 3, 4, 5, 6], 7], "x" * 10_000,
]  # fmt: skip


def nodes(value, path=()):
    """Every place of a JSON."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in inner if isinstance(value, (dict, list)) else ():
        if isinstance(part, (dict, list)):
            yield from nodes(part, (*path, key))
        else:
            yield (*path, key)


def spoil(raw, rng):
    """A copy with one to three random places changed, and what was done."""
    # Faster than a deep copy.
    raw, done = json.loads(json.dumps(raw)), []
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(nodes(raw)))
        if not path:
            return rng.choice(JUNK), ["all"]
        parent = raw
        for key in path[:-1]:
            parent = parent[key]
        how = rng.choice(["junk", "junk", "junk", "drop", "double", "swap"])
        if how == "drop":
            del parent[path[-1]]
        elif how == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        elif how == "swap" and isinstance(parent, list):
            rng.shuffle(parent)
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(JUNK))
        done.append((how, path))
    return raw, done


def use(path, folder) -> None:
    """All that is ever done with a JSON."""
    dataset = coco_json.load_coco(str(path), str(folder))
    for index in range(len(dataset)):
        dataset.target(index)
        dataset.present_labels(index)
        dataset.annotations(index)
    dataset.coco(range(len(dataset)))
    dataset.class_shares(range(len(dataset)))
    dataset.check_files()


@pytest.mark.parametrize("block", range(4))
def test_a_json_with_random_places_changed(tmp_path, block):
    valid = write_coco(tmp_path)
    path, read = tmp_path / "spoiled.json", 0
    for case in range(block * CASES // 4, (block + 1) * CASES // 4):
        raw, done = spoil(valid, random.Random(case))
        path.write_text(json.dumps(raw), encoding="utf-8", errors="surrogatepass")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                use(path, tmp_path / "images")
            read += 1
        except UserError as error:
            said = str(error)
            assert said and "\n" not in said, (case, done, said)
        except Exception as error:
            raise AssertionError(f"case {case}: {done}") from error
    # Some of them do no harm: the reader is not simply refusing everything.
    assert read > CASES / 4 / 20
