"""Image files of every odd kind: read rightly, or refused with one line.

`PASS`: what real folders hold. The same picture (dark left, bright right, 48 x 32) in every
disguise must come out upright, RGB and with these pixels, and a dataset of it must train.
`REFUSED`: what is broken or hostile. A whole call of train.py ends with one line and status 2,
and the folder of images is what it was. The JSONs of the kind are in test_errors.py.
"""

import io
import os
import struct
import time
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from conftest import write_coco
from PIL import Image, PngImagePlugin
from helpers import arguments, error_of, set_record

import train
from ssis.datasets import coco_json

fast = pytest.mark.fast
RAMP = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1))
PICTURE = Image.fromarray(np.stack([RAMP] * 3, -1))
ODD_NAMES = [
    "é ü 图像 🐱.png", " leading and trailing .png ", "-rf.png", "100%25.png", "quote'\".png",
    "new\nline.png", "deep/er/sub folder/a.png", "no_suffix", "x" * 251 + ".png", "a;b|c&d$(e).png",
]  # fmt: skip


def save(kind, mode="RGB", **options):
    """A writer of the picture in one format, whatever the file is called."""

    def write(path):
        picture = PICTURE.convert(mode) if mode != "I;16" else sixteen()
        picture.save(path, format=kind, **options)

    return write


def sixteen():
    return Image.fromarray(RAMP.astype(np.uint16) * 257)


def frames(kind, **options):
    """Several pictures in one file; the first is ours."""
    others = [Image.new("RGB", (48, 32), color) for color in ("white", "black")]
    return save(kind, save_all=True, append_images=others, **options)


def turned(orientation, undo):
    """Stored sideways or mirrored, with the tag that tells a viewer how to turn it."""

    def write(path):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = PICTURE if undo is None else PICTURE.transpose(undo)
        stored.save(path, format="JPEG", quality=95, exif=exif)

    return write


def linked(path):
    """Somewhere else, under another name: a dataset made of links is a usual thing."""
    real = path.parent.parent / "elsewhere.png"
    PICTURE.save(real)
    path.symlink_to(real)


FLIP = Image.Transpose
PASS = {
    "a JPEG called PNG": save("JPEG", quality=95),
    "a progressive JPEG": save("JPEG", quality=95, progressive=True),
    "a CMYK JPEG": save("JPEG", "CMYK", quality=95),
    "a gray JPEG": save("JPEG", "L", quality=95),
    "a WebP called PNG": save("WEBP", lossless=True),
    "a BMP called PNG": save("BMP"),
    "a TIFF, compressed": save("TIFF", compression="tiff_lzw"),
    "a CMYK TIFF": save("TIFF", "CMYK"),
    "16 bits": save("PNG", "I;16"),
    "16 bits in a TIFF": save("TIFF", "I;16"),
    "floats in a TIFF": save("TIFF", "F"),
    "a palette": save("PNG", "P"),
    "a palette with a transparent color": save("PNG", "P", transparency=0),
    "gray with alpha": save("PNG", "LA"),
    "alpha": save("PNG", "RGBA"),
    "an animated PNG": frames("PNG"),
    "an animated WebP": frames("WEBP", lossless=True),
    "an animated GIF": frames("GIF"),
    "a TIFF of several pages": frames("TIFF"),
    "EXIF 2, mirrored": turned(2, FLIP.FLIP_LEFT_RIGHT),
    "EXIF 3, upside down": turned(3, FLIP.ROTATE_180),
    "EXIF 5, transposed": turned(5, FLIP.TRANSPOSE),
    "EXIF 6, on its side": turned(6, FLIP.ROTATE_90),
    "EXIF 8, on its other side": turned(8, FLIP.ROTATE_270),
    "EXIF 77, no such thing": turned(77, None),
    "a link to somewhere else": linked,
}


def chunk(name: bytes, content: bytes) -> bytes:
    """A part of a PNG."""
    check = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)


def png(width, height, more=b"") -> bytes:
    """A valid black PNG of one bit a pixel: 900 million pixels are 110 kB."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    parts = chunk(b"IHDR", header) + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def write(content: bytes):
    return lambda path: path.write_bytes(content)


def cut(kind, share):
    """A file of which the end is missing; its header says nothing of it."""

    def make(path):
        noise = np.random.RandomState(0).randint(0, 256, (32, 48, 3), np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, format=kind)
        path.write_bytes(stream.getvalue()[: int(len(stream.getvalue()) * share)])

    return make


def pipe(path):
    """Whoever opens it waits for ever."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(path)


def link(path, target):
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("links cannot be made on this system")


def loop(path):
    link(path, path.name)


def nowhere(path):
    link(path, path.parent / "was_here_once.png")


# Name -> the file, its size in the JSON, and what the line must say.
REFUSED = {
    "zero bytes": (write(b""), None, "cannot be read as an image"),
    "zeros": (write(bytes(10_000)), None, "cannot be read as an image"),
    "text": (write(b"<html>404 not found</html>"), None, "cannot be read as an image"),
    "a header alone": (write(png(48, 32)[:33]), None, "cannot be read as an image"),
    "half a PNG": (cut("PNG", 0.5), None, "cannot be read as an image"),
    "half a JPEG": (cut("JPEG", 0.5), None, "cannot be read as an image"),
    "half a WebP": (cut("WEBP", 0.5), None, "cannot be read as an image"),
    "half a TIFF": (cut("TIFF", 0.5), None, "cannot be read as an image"),
    "a bomb": (write(png(30_000, 30_000)), (30_000, 30_000), "exceeds limit"),
    "a bomb in disguise": (write(png(30_000, 30_000)), None, "1.png: "),
    "a bomb in a comment": (
        write(png(48, 32, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))))),
        None,
        "cannot be read as an image",
    ),
    "of another size": (save("PNG"), (31, 48), "is 48 x 32 pixels, the JSON says 48 x 31"),
    "a folder": (lambda path: path.mkdir(), None, "1.png: image not found"),
    "a pipe": (pipe, None, "1.png: image not found"),
    "a link to itself": (loop, None, "1.png: image not found"),
    "a link to nowhere": (nowhere, None, "1.png: image not found"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), None, "1.png: image not found"),
}


def dataset_with(folder, make, name="1.png", size=None):
    """A valid dataset, but for one of its four images."""
    height, width = size or (32, 48)
    write_coco(folder, set_record("images", 1, file_name=name, height=height, width=width))
    (folder / "images" / "1.png").unlink()
    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)


def read(folder):
    """Image 1, after the check that comes before every run."""
    dataset = coco_json.load_coco(str(folder / "coco.json"), str(folder / "images"))
    dataset.check_files()
    return dataset.image(1).float().mean(dim=(0, 1))


@fast
@pytest.mark.parametrize("name", PASS)
def test_an_unusual_image_is_read_as_it_looks(tmp_path, name):
    dataset_with(tmp_path, PASS[name])
    columns = read(tmp_path)
    # A palette has few colors, a JPEG some noise; what is on which side must be right.
    wrong = (columns - torch.from_numpy(RAMP[0])).abs().mean()
    assert wrong < 12 and columns[:6].mean() < 30, columns


@fast
@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_name_is_a_name(tmp_path, name):
    forbidden = set('<>:"|?*\n') & set(name) or name != name.strip() or len(name) > 200
    if os.name == "nt" and forbidden:
        pytest.skip("no file name on Windows")
    dataset_with(tmp_path, save("PNG"), name)
    assert abs(read(tmp_path).mean().item() - RAMP.mean()) < 1


@fast
def test_a_name_that_looks_the_same_but_is_not(tmp_path, capsys):
    """Two ways to write an e with an accent: file systems, unlike eyes, tell them apart."""
    dataset_with(tmp_path, save("PNG"), unicodedata.normalize("NFC", "é.png"))
    composed = tmp_path / "images" / unicodedata.normalize("NFC", "é.png")
    composed.rename(composed.with_name(unicodedata.normalize("NFD", "é.png")))
    if composed.exists():
        pytest.skip("for this file system both are one name")
    assert "image not found" in error_of(capsys, train.main, arguments(tmp_path))


def test_odd_images_train(tmp_path, capsys):
    """One pixel wide, CMYK, animated, sideways: from the file to the last evaluation."""
    dataset_with(tmp_path, save("PNG"), "wide.png", (1, 48))
    raw_row = Image.fromarray(np.stack([RAMP[:1]] * 3, -1))
    raw_row.save(tmp_path / "images" / "wide.png")
    for k, kind in ((0, "a CMYK JPEG"), (2, "an animated WebP"), (3, "EXIF 6, on its side")):
        PASS[kind](tmp_path / "images" / f"{k}.png")
    train.main([*arguments(tmp_path), "--method", "supervised", "--labeled", "100%"])
    assert "mask" in capsys.readouterr().out


@fast
@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_or_hostile_image(tmp_path, capsys, name):
    make, size, words = REFUSED[name]
    dataset_with(tmp_path, make, size=size)
    before = sorted(os.listdir(tmp_path / "images"))
    began = time.monotonic()
    # All labeled, or the broken one might never be looked at.
    given = [*arguments(tmp_path), "--method", "supervised", "--labeled", "100%"]
    line = error_of(capsys, train.main, given)
    assert words in line and "1.png" in line
    assert sorted(os.listdir(tmp_path / "images")) == before
    # Not a time of anything: a bomb that goes off takes minutes and all memory.
    assert time.monotonic() - began < 60


@fast
def test_among_the_unlabeled_images_too(tmp_path, capsys):
    """Here no JSON says how large an image should be."""
    write_coco(tmp_path)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "bomb.png").write_bytes(png(30_000, 30_000))
    more = ["--unlabeled-images", tmp_path / "more"]
    line = error_of(capsys, train.main, [*arguments(tmp_path), *more])
    assert "bomb.png: cannot be read as an image" in line


@fast
def test_a_comment_is_no_image():
    """The limit that the comment above goes over is Pillow's own."""
    assert 10**8 > PngImagePlugin.MAX_TEXT_CHUNK
