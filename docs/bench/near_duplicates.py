r"""Are training and test images the same pictures? Asked before a study is believed.

    python docs/bench/near_duplicates.py FOLDER [--parts train test]

Prints the pairs that look most alike: each image as 32 x 32 gray pixels, its mean taken away,
divided by its length; also mirrored. A copy, resized or compressed anew, has a cosine of 0.98 and
more. FOLDER holds `images/` and `instances_<part>.json`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, SHOWN = 32, 5


def thumbnails(folder: Path, part: str) -> tuple[list[str], np.ndarray]:
    """File names and their (N, 32, 32) thumbnails."""
    records = json.loads((folder / f"instances_{part}.json").read_text())["images"]
    files = [record["file_name"] for record in records]
    rows = []
    for file in files:
        with Image.open(folder / "images" / file) as image:
            gray = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.BOX), np.float32)
        gray = gray - gray.mean()
        rows.append(gray / max(np.linalg.norm(gray), 1e-6))
    return files, np.stack(rows)


def main() -> None:
    """Print the most similar pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs=2, default=["train", "test"])
    args = parser.parse_args()
    (names, one), (others, two) = (thumbnails(args.folder, part) for part in args.parts)
    straight = one.reshape(len(one), -1) @ two.reshape(len(two), -1).T
    mirrored = one[:, :, ::-1].reshape(len(one), -1) @ two.reshape(len(two), -1).T
    cosine = np.maximum(straight, mirrored)
    print(f"{len(one)} and {len(two)} images; {(cosine > 0.98).sum()} pairs above 0.98")
    for flat in np.argsort(-cosine, axis=None)[:SHOWN]:
        i, j = np.unravel_index(flat, cosine.shape)
        print(f"{cosine[i, j]:.3f}  {names[i]}  {others[j]}")


if __name__ == "__main__":
    main()
