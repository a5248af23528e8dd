r"""Your photos: from 30 annotated ones to a verdict.

The one source of `docs/your_photos.ipynb`, which `python docs/scripts/make_walk.py --notebook`
writes. Environment variables, all optional, for a run without an editor:

    PHOTOS, ANNOTATIONS   the folder of photos, and the COCO JSON of the annotated ones
    PHOTOS_OUT            folder for what is written; runs/photos if not given
    PHOTOS_FLAGS          further flags of train.py, for both trainings
"""
# The path to the project comes before the project.
# ruff: noqa: E402

# %% [markdown]
# # Your photos: from 30 annotated ones to a verdict
#
# You have some hundreds of photographs, and some thirty of them are annotated: every object of your
# classes has a polygon or a mask. This notebook trains twice, once with the annotated photos alone
# and once with all the others beside them, and tells you whether the others helped. On two CPU
# cores it takes half an hour to an hour, but only ten minutes of your own time. All details and
# flags are in [your_data.md](your_data.md).
#
# ## 1. What you have
#
# Fill in two paths: `PHOTOS` is a folder with the annotated photos and all the others,
# `ANNOTATIONS` the COCO JSON that CVAT, Label Studio, Roboflow or labelme exports. In Colab, upload
# a zip file (the folder symbol on the left) and unpack it with `!unzip -q photos.zip`.
#
# While they are empty, the notebook makes an example: 300 drawings, 30 of them annotated. It shows
# how everything works, but features that were learned from photographs are of little use for
# drawings, so do not expect much of its numbers.

# %%
import os

PHOTOS = os.environ.get("PHOTOS", "")
ANNOTATIONS = os.environ.get("ANNOTATIONS", "")

# %%
import json
import shlex
import sys
from pathlib import Path

# Started in the project's folder: the project.
sys.path.insert(0, os.getcwd())

from PIL import Image

import train
from ssis.datasets import coco_json, shapes
from ssis.report import pictures
from ssis.tools import predict, prepare

OUT = Path(os.environ.get("PHOTOS_OUT", "runs/photos"))
FLAGS = ["--preset", "photos", "--data", str(OUT / "data")]
FLAGS += shlex.split(os.environ.get("PHOTOS_FLAGS", ""))

if not PHOTOS:
    PHOTOS, ANNOTATIONS = OUT / "example" / "train", OUT / "example" / "thirty.json"
    shapes.make(OUT / "example", parts=dict(train=300))
    drawn = json.loads((OUT / "example" / "instances_train.json").read_text())
    drawn["images"] = drawn["images"][:30]
    ids = {image["id"] for image in drawn["images"]}
    drawn["annotations"] = [a for a in drawn["annotations"] if a["image_id"] in ids]
    ANNOTATIONS.write_text(json.dumps(drawn))

# %% [markdown]
# ## 2. Check and split
#
# Every image and every annotation is read as training will read it, and what is wrong is said in
# one line with the file and the record. Then a third of the annotated photos is set aside to judge
# by: no model is trained on them, but they decide how sure a pseudo-label must be. (Ten say little;
# with sixty annotated photos there are twenty.) Copies of one photo, such as the augmented versions
# in a Roboflow export, stay on one side.

# %%
prepare.main(
    ["own", "--json", str(ANNOTATIONS), "--root", str(PHOTOS)]
    + ["--out", str(OUT / "data"), "--val", "33%", "--match-names"]
)

# %% [markdown]
# ## 3. Look at your masks
#
# Are all objects of your classes there, and are the outlines right? An object that you left out is
# taught as background.

# %%
labeled = coco_json.load_coco(str(OUT / "data" / "instances_train.json"), str(PHOTOS))
tiles = []
for index in range(min(4, len(labeled))):
    target = labeled.target(index)
    masks, labels = target["masks"].bool(), target["labels"]
    tiles.append((pictures.overlay(labeled.image(index), masks, labels, labeled.names), ""))
pictures.grid([tiles], [""] * len(tiles), OUT / "annotated.png")
Image.open(OUT / "annotated.png")

# %% [markdown]
# ## 4. The line to beat: the annotated photos alone

# %%
train.main([*FLAGS, "--method", "supervised", "--output", str(OUT / "supervised")])

# %% [markdown]
# ## 5. With all the other photos
#
# A teacher, trained on the annotated photos, labels the others. A filter keeps what is probably
# right, and a student learns from both. Progress is shown below; a line "calibrated" says how much
# of what is kept lies on an object, measured on the photos that you judge by.

# %%
train.main([*FLAGS, "--unlabeled-images", str(PHOTOS), "--output", str(OUT / "with_others")])

# %% [markdown]
# ## 6. The verdict
#
# AP runs from 0 to 100, higher is better: it combines finding, naming and outlining the objects.
# The interval shows how much the difference could vary by chance; if it contains 0, the other
# photos have not been shown to help. With ten photos to judge by it is wide.

# %%
runs = ("supervised", "with_others")
alone, both = (json.loads((OUT / run / "summary.json").read_text()) for run in runs)
print(f"mask AP, the annotated photos alone: {alone['mask_ap']['student']}")
print(f"mask AP, with all the others:        {both['mask_ap']['teacher']}")
print(both["verdict"]["sentence"])
for line in both["verdict"]["advice"]:
    print("To change:", line)

# %% [markdown]
# ## 7. Look at it
#
# The photos that the model was judged by: what it found, and your masks beside it. The whole
# report, with curves, classes and pseudo-labels, is `report.html` in the run's folder.

# %%
Image.open(OUT / "with_others" / "predictions.png")

# %% [markdown]
# ## 8. Use it, and go on
#
# The best model on photos that it has not been taught. `found/coco.json` can be loaded into an
# annotation tool: correcting ten of the worst photos takes less time than drawing them, and a
# second round with these is usually worth more than any setting.

# %%
annotated = json.loads(Path(ANNOTATIONS).read_text())["images"]
annotated = {Path(image["file_name"]).name for image in annotated}
new = [path for path in sorted(Path(PHOTOS).rglob("*.*")) if path.name not in annotated][:4]
model = OUT / "with_others" / "best.pt"
predict.main([str(model), *map(str, new), "--out", str(OUT / "found")])
tiles = [Image.open(path) for path in sorted((OUT / "found" / "overlays").iterdir())]
for tile in tiles:
    tile.thumbnail((pictures.TILE, pictures.TILE))
pictures.grid([[(tile, "") for tile in tiles]], [""] * len(tiles), OUT / "found.png")
Image.open(OUT / "found.png")
