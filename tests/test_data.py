"""data.py against torchvision's loader, PIL and figures worked out by hand."""

import colorsys
import hashlib
import math
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from conftest import REAL_VOC, call, read_scores, state_of, write_plain, write_voc
from PIL import Image
from PIL.PngImagePlugin import putchunk
from torchvision.datasets import VOCSegmentation
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

import data
import evaluate
import train

PREPARE = "python tools/prepare.py"


def test_color_map_has_the_colors_of_the_voc_devkit():
    colors = data.color_map(256)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    for index, color in (known | {255: (224, 224, 192)}).items():
        assert tuple(colors[index]) == color


def labels_as_torchvision_reads_them(root, split, size):
    for _, mask in VOCSegmentation(root, year="2007", image_set=split):
        mask = TF.resize(mask, [size, size], InterpolationMode.NEAREST)
        yield torch.from_numpy(np.array(mask))


@pytest.mark.skipif(not REAL_VOC, reason="VOC_ROOT names no VOC 2007")
@pytest.mark.parametrize("split, count", [("train", 209), ("val", 213)])
def test_real_voc_gives_the_labels_of_torchvision(split, count):
    ours = data.VOC(REAL_VOC, split, size=224)
    theirs = list(labels_as_torchvision_reads_them(REAL_VOC, split, 224))
    assert len(ours) == len(theirs) == count
    assert all(torch.equal(a, b) for a, b in zip(ours.masks, theirs))


def test_voc_images_and_full_masks(voc):
    ours = data.VOC(voc, "val", size=40)
    folder = voc / "VOCdevkit" / "VOC2007"
    assert ours.names == ["val_0", "val_1", "val_2"]
    for index, name in enumerate(ours.names):
        image = Image.open(folder / f"JPEGImages/{name}.jpg")
        image = np.array(image.resize((40, 40), Image.Resampling.BILINEAR))
        assert torch.equal(ours[index][0].permute(1, 2, 0), torch.from_numpy(image))
        mask = np.array(Image.open(folder / f"SegmentationClass/{name}.png"))
        assert ours.full_mask(index).dtype == torch.uint8
        assert np.array_equal(ours.full_mask(index), mask)
        mask = Image.fromarray(mask).resize((40, 40), Image.Resampling.NEAREST)
        assert np.array_equal(ours[index][1], mask)
    images, masks = ours[[2, 0]]
    assert torch.equal(images[1], ours[0][0]) and torch.equal(masks[0], ours[2][1])


def test_a_plain_folder_gives_its_masks_and_classes(tmp_path):
    truth = write_plain(tmp_path)
    ours = data.VOC(tmp_path, "all", size=32)
    assert ours.classes == ["background", "cat", "dog"]
    assert ours.palette == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert ours.names == sorted(truth)
    for index, name in enumerate(ours.names):
        assert np.array_equal(ours.full_mask(index), truth[name])


def test_the_layout_folder_itself_and_named_classes(tmp_path, capsys):
    root = write_voc(tmp_path / "mine", num_classes=2)
    assert data.VOC(root, "train", size=32).classes == list(data.VOC_CLASSES)
    assert "has no classes.txt, so its classes are VOC's 21" in capsys.readouterr().out
    (root / "classes.txt").write_text("\ufeffbackground\r\n\r\ncat\r\n", encoding="utf-8")
    ours = data.VOC(root, "train", size=32)
    assert ours.classes == ["background", "cat"]
    assert ours.palette == [[0, 0, 0], [128, 0, 0]]


def test_hidden_files_are_no_images_and_endings_may_be_capitals(tmp_path):
    write_plain(tmp_path, ["x.JPG", "y.jfif", "z.PNG"])
    for name in ("images/._x.JPG", "images/.DS_Store", "masks/._x.png"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "masks" / "x.png").rename(tmp_path / "masks" / "x.PNG")
    assert [p.name for p in data.image_files(tmp_path / "images")] == ["x.JPG", "y.jfif", "z.PNG"]
    assert data.VOC(tmp_path, "all", 32).names == ["x", "y", "z"]


MANY = [str(i) for i in range(256)]


@pytest.mark.parametrize("classes", [["a", "a"], ["a"], ["__ignore__", "_background_", "a"], MANY])
def test_class_lists_that_cannot_be_meant_are_refused(tmp_path, classes):
    write_plain(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(classes))
    said = f"classes.txt: should list 2 to 255 different classes.*; .*{PREPARE}"
    with pytest.raises(data.DataError, match=said):
        data.VOC(tmp_path, "train", 32)
    (tmp_path / "classes.txt").write_text("\n".join(f"# {i}" for i in range(255)))
    assert data.read_classes(tmp_path) == [f"# {i}" for i in range(255)]  # no line is a comment


def sides(root):
    return {split: set(data.VOC(root, split, 32).names) for split in ("train", "val")}


def test_a_fifth_is_for_validation_by_the_names_alone(tmp_path, capsys):
    write_plain(tmp_path, [f"b{i}.jpg" for i in range(60)])
    before = sides(tmp_path)
    by_hash = {f"b{i}" for i in range(60) if hashlib.sha256(b"b%d" % i).digest()[0] < 0x33}
    assert before["val"] == by_hash and len(by_hash) == 13
    assert before["train"] == {f"b{i}" for i in range(60)} - by_hash
    assert "val is 13 images, by their names" in capsys.readouterr().out
    # An image stays on its side when others are added.
    write_plain(tmp_path, [f"a{i}.jpg" for i in range(10)])
    after = sides(tmp_path)
    assert before["val"] < after["val"] and before["train"] < after["train"]


@pytest.mark.parametrize("folder", ["", "ImageSets/Segmentation/"])
def test_every_list_is_a_split(tmp_path, folder):
    write_plain(tmp_path, [f"{name}.jpg" for name in "abcdefgh"])
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    for name, listed in {"train": "dab", "val": "c", "at night": "eca"}.items():
        (tmp_path / folder / f"{name}.txt").write_text("\n".join(listed))
        assert data.VOC(tmp_path, name, 32).names == list(listed)  # in the list's order
    with pytest.raises(data.DataError, match="no vla.txt; .* take at night, train, val.* all$"):
        data.VOC(tmp_path, "vla", 32)
    (tmp_path / folder / "val.txt").unlink()  # val is not made up where there is a train.txt
    with pytest.raises(data.DataError, match="has no val.txt; write it"):
        data.VOC(tmp_path, "val", 32)


@pytest.mark.parametrize("folder", ["", "ImageSets/Segmentation/"])
def test_what_a_test_list_names_is_on_neither_side(tmp_path, folder):
    write_plain(tmp_path, [f"{name}.jpg" for name in "abcdefg"])
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / folder / "test.txt").write_text("d\ne\nf\ng\n")
    found = sides(tmp_path)
    assert found["train"] | found["val"] == set("abc") and not found["train"] & found["val"]
    assert found["train"] and found["val"] and data.VOC(tmp_path, "test", 32).names == list("defg")


@pytest.mark.parametrize("on_disk, in_list", [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")])
def test_accents_are_the_same_however_they_are_written(tmp_path, on_disk, in_list):
    name = "Gläser é 写真 7"
    write_plain(tmp_path, [unicodedata.normalize(on_disk, f"{name}.jpg"), "b.jpg"])
    listed = unicodedata.normalize(in_list, f"\n {name} \n\nb\nb\n")
    (tmp_path / "train.txt").write_text(listed, encoding="utf-8-sig")
    assert data.VOC(tmp_path, "train", 32).names == [name, "b"]  # each once


def load_one_row(path):
    """Return the pixels of an image file one pixel high, as a list."""
    return np.array(data.load_image(path))[0].tolist()


def test_images_become_upright_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated 90 degrees clockwise
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40] = 255  # white on the left, so on top once upright
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    upright = np.array(data.load_image(tmp_path / "turned.jpg"))
    assert upright.shape == (80, 40, 3)
    assert upright[:30].min() > 200 and upright[50:].max() < 50

    red = Image.new("RGB", (8, 8), (250, 10, 20))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    red.convert("RGBA").save(tmp_path / "alpha.png")
    red.convert("L").save(tmp_path / "gray.jpg", quality=100)
    red.quantize(4).save(tmp_path / "palette.png")
    gray = [round(0.299 * 250 + 0.587 * 10 + 0.114 * 20)] * 3
    for name in ("cmyk.jpg", "alpha.png", "gray.jpg", "palette.png"):
        pixels = np.array(data.load_image(tmp_path / name)).astype(int)
        color = gray if name == "gray.jpg" else [250, 10, 20]
        assert pixels.shape == (8, 8, 3) and np.abs(pixels - color).max() <= 6, name


TRANSPARENT = [[10, 20, 30, 255], [200, 0, 0, 0], [0, 0, 0, 128]]


@pytest.mark.filterwarnings("error")
def test_transparent_pixels_of_png_and_webp_show_white(tmp_path):
    image = Image.fromarray(np.array([TRANSPARENT], np.uint8))
    image.save(tmp_path / "alpha.png")
    image.save(tmp_path / "alpha.webp", lossless=True, exact=True)
    expected = [[10, 20, 30], [255, 255, 255], [127, 127, 127]]  # 255 * (1 - 128 / 255)
    assert load_one_row(tmp_path / "alpha.png") == expected
    assert load_one_row(tmp_path / "alpha.webp") == expected
    Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8)).save(tmp_path / "la.png")
    assert load_one_row(tmp_path / "la.png") == [[9, 9, 9], [255, 255, 255]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette.png", transparency=bytes([255, 0]))
    assert load_one_row(tmp_path / "palette.png") == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "CMYK"])
def test_the_last_band_of_a_tiff_is_left_out_and_that_is_said_once(tmp_path, capsys, mode):
    """It may be near infrared; those of CMYK are colours."""
    pixels = np.array([TRANSPARENT], np.uint8)
    image = Image.fromarray(pixels[..., 1:3].copy() if mode == "LA" else pixels)
    if mode == "CMYK":
        image = Image.fromarray(pixels[..., :3].copy()).convert("CMYK")
    expected = {"LA": [[20] * 3, [0] * 3, [0] * 3]}.get(mode, [p[:3] for p in TRANSPARENT])
    for name in ("a.tif", "b.tiff"):
        image.save(tmp_path / name)
        assert Image.open(tmp_path / name).mode == mode
        assert load_one_row(tmp_path / name) == expected
    said = f"{tmp_path}: the last of the bands of TIFFs, {mode}, is left out\n"
    assert capsys.readouterr().out == ("" if mode == "CMYK" else said)


def test_a_bmp_of_16_bits_a_pixel_is_read(tmp_path):
    """Five bits of red, six of green, five of blue; Pillow writes no such file."""
    head = struct.pack("<2sIHHI", b"BM", 70, 0, 0, 66)
    head += struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    head += struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    (tmp_path / "a.bmp").write_bytes(head + struct.pack("<HH", 0xF800, 0x001F))
    assert load_one_row(tmp_path / "a.bmp") == [[255, 0, 0], [0, 0, 255]]


def write_png(path, width, bits, color, row):
    """Write a PNG of one row; color: 0 for grey, 2 for RGB. Pillow writes no such depths."""
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        putchunk(file, b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0))
        putchunk(file, b"IDAT", zlib.compress(b"\0" + row))
        putchunk(file, b"IEND", b"")


def test_images_of_more_than_8_bits_are_refused_with_what_helps(tmp_path):
    for name in ("gray.png", "gray.tif"):
        Image.fromarray(np.array([[0, 257, 65535]], np.uint16)).save(tmp_path / name)
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.array([[0, 300]], np.int32)).save(tmp_path / "wide.tif")
    # Pillow would read the upper half of these without a word.
    write_png(tmp_path / "rgb.png", 2, 16, 2, struct.pack(">6H", 0, 0, 0, 65535, 0, 32896))
    assert Image.open(tmp_path / "rgb.png").mode == "RGB"
    for name in ("gray.png", "gray.tif", "float.tif", "wide.tif", "rgb.png"):
        with pytest.raises(data.DataError, match=f"{name}: has more than 8 bits.* --white NUMBER"):
            data.load_image(tmp_path / name)


def test_masks_are_never_read_through_their_colors(tmp_path):
    values = np.array([[0, 3, 255], [7, 0, 20]], np.uint8)
    gray = Image.fromarray(values)
    gray.save(tmp_path / "gray.png")
    gray.putpalette([0, 0, 0] * 256)  # all colours black: only the indices tell
    gray.save(tmp_path / "palette.png")
    for name in ("gray.png", "palette.png"):
        assert np.array_equal(np.array(data.load_mask(tmp_path / name, 21)), values)
    said = r"palette.png: has the values \[7, 20\]; classes are 0 to 4, void is 255"
    with pytest.raises(data.DataError, match=said):
        data.load_mask(tmp_path / "palette.png", 5)
    few = Image.fromarray(np.array([[0, 3, 1]], np.uint8))
    few.putpalette([0, 0, 0, 9, 9, 9, 99, 99, 99, 200, 0, 0])
    few.save(tmp_path / "few.png", bits=2)  # of a palette's few bits nothing is stretched
    assert np.array(data.load_mask(tmp_path / "few.png", 4)).tolist() == [[0, 3, 1]]


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_few_bits_are_refused_where_pillow_would_stretch_their_labels(tmp_path, bits):
    write_png(tmp_path / "few.png", 8 // bits, bits, 0, bytes([1]))  # the last pixel is label 1
    assert np.array(Image.open(tmp_path / "few.png")).max() == 255 // (2**bits - 1)
    with pytest.raises(data.DataError, match="few.png: is a .*; python tools/prepare.py"):
        data.load_mask(tmp_path / "few.png", 21)


class Halves:
    """All that scripts need of a data set: the right half of each picture is white, and a class."""

    def __init__(self, size):
        self.names = list(np.array(["a", "b", "c", "d"]))  # numpy's strings, as np.loadtxt gives
        self.classes = ["background", "white"]
        self.palette = np.array([[0, 0, 0], [9, 9, 9]])
        self.masks = torch.zeros(4, size, size, dtype=torch.uint8)
        self.masks[:, :, size // 2 :] = 1
        self.images = self.masks[:, None].repeat(1, 3, 1, 1) * 255

    def full_mask(self, index):
        return self.masks[index]


def test_a_class_of_ones_own_trains_and_is_scored(monkeypatch, no_pictures, small):
    monkeypatch.setattr(data, "NAMES", (*data.NAMES, "halves"))
    monkeypatch.setattr(data, "load_dataset", lambda name, split, size, *more, **how: Halves(size))
    flags = ("--size", 32, "--batch-size", 2, "--epochs", 20, "--lr", 0.01, "--device", "cpu")
    call(train, "--model", "small", "--data", "halves", "--out", "run", *flags)
    call(evaluate, "run", "--out", "scores")
    state = state_of("run/best.pt")
    assert state["data"] == "halves" and state["images"]["val"] == ["a", "b", "c", "d"]
    assert state["palette"] == [[0, 0, 0], [9, 9, 9]]
    metrics = read_scores("scores")
    assert metrics["images"] == 4 and list(metrics["iou"]) == ["background", "white"]
    assert metrics["pixel_accuracy"] > 0.9


def with_masks(*masks, background="background"):
    """Return a set whose masks have these values, for `data.check_labels`."""
    dataset = Halves(2)
    dataset.classes = [background, "white"]
    dataset.masks = torch.tensor(masks, dtype=torch.uint8).view(-1, 2, 2)
    return dataset


def test_labels_that_nothing_can_be_learned_from_are_refused():
    for learns in (True, False):
        with pytest.raises(
            data.DataError, match=r"^own: at this --size, masks have nothing but .* void \(255\)"
        ):
            data.check_labels(with_masks([255] * 4, [255] * 4), "own", learns)
        said = f"own: at this --size, masks have nothing but background .*; .* 255 should be 1; {PREPARE}"
        with pytest.raises(data.DataError, match=said):
            data.check_labels(with_masks([0, 255, 0, 255], [0] * 4), "own", learns)
        data.check_labels(with_masks([0, 1, 255, 255], [0] * 4), "own", learns)
    with pytest.raises(data.DataError, match="nothing but background"):
        data.check_labels(with_masks([0] * 4), "own")
    data.check_labels(with_masks([0] * 4), "own", learns=False)  # background alone can be scored


def test_floats_of_other_libraries_are_refused():  # torchvision's ToTensor divides masks, too
    images, masks = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8).byte()
    for batch in ((images / 255, masks), (images, masks / 255)):
        with pytest.raises(TypeError, match="should be torch.uint8, 0 to 255, not torch.float32"):
            data.augment(*batch)
    with pytest.raises(TypeError, match="should be torch.uint8"):
        data.normalize(images / 255)


def painted_batch(n=8, height=96, width=96):
    """Return images painted with their own labels, 12 grey levels a class, and the masks."""
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 21, (n, 4, 4))
    masks = blocks.repeat(height // 4, axis=1).repeat(width // 4, axis=2).astype(np.uint8)
    masks = torch.from_numpy(masks)
    return (masks * 12)[:, None].expand(n, 3, height, width).contiguous(), masks


def share_of_wrong_paint(images, masks):
    """Return the share of pixels, away from seams, whose grey is not that of their label."""
    padded = np.pad(masks.numpy(), ((0, 0), (2, 2), (2, 2)), constant_values=data.VOID)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    inside = (windows.max((3, 4)) == windows.min((3, 4))) & (masks.numpy() != data.VOID)
    assert inside.mean() > 0.4  # enough is left to judge by
    paint = masks.numpy().astype(int)[:, None] * 12
    wrong = np.abs(images.numpy().astype(int) - paint).max(1) > 1
    return wrong[inside].mean()


@pytest.mark.parametrize("mode", ["flip", "affine"])
@pytest.mark.parametrize("height, width, size", [(96, 96, None), (64, 128, None), (96, 96, 64)])
def test_augmented_images_stay_painted_with_their_labels(mode, height, width, size, monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(data, "jitter_colors", lambda images: images)
    images, masks = painted_batch(height=height, width=width)
    new_images, new_masks = data.augment(images, masks, mode, size)
    assert new_images.dtype == new_masks.dtype == torch.uint8
    assert new_masks.shape == (len(masks), size or height, size or width)
    assert new_images.shape[-2:] == new_masks.shape[-2:] and not torch.equal(new_masks, masks)
    assert share_of_wrong_paint(new_images, new_masks) == 0
    # Turned images are blended at the seams between classes, masks are not.
    greys = new_images.permute(0, 2, 3, 1)[new_masks != data.VOID]
    assert (greys % 12 != 0).any() == (mode == "affine")
    # The same check sees an image that lies five pixels beside its mask.
    misaligned = data.augment(images.roll(5, -1), masks, mode, size)
    assert share_of_wrong_paint(*misaligned) > 0.05


def test_colors_change_by_what_is_said():
    torch.manual_seed(0)
    images = 200 * torch.rand(500, 3, 8, 8)
    assert torch.allclose(data.jitter_colors(images, 0), images, atol=1e-4)
    gray = torch.full((500, 3, 8, 8), 100.0)
    shares = data.jitter_colors(gray)[:, :, 0, 0].mean(1) / 100
    # Brightness by up to 30 %, tint by 15; contrast and saturation keep the mean.
    assert 0.7 * 0.85 <= shares.min() < 0.75 and 1.25 < shares.max() <= 1.3 * 1.15
    spread = data.jitter_colors(images).std((1, 2, 3)) / images.std((1, 2, 3))
    assert spread.min() < 0.6 and spread.max() > 1.4
    channels = data.jitter_colors(gray)[:, :, 0, 0]
    assert (channels[:, 0] / channels[:, 1]).max() > 1.15  # tint alone makes grey coloured
    # How colourful a plain red is: contrast alone stays within 0.7 and 1.3.
    red = torch.zeros(500, 3, 8, 8)
    red[:, 0] = 100
    channels = data.jitter_colors(red)[:, :, 0, 0]
    chroma = (channels[:, 0] - channels[:, 1]) / channels.sum(1)
    assert 0.7**2 <= chroma.min() < 0.65 and 1.35 < chroma.max() <= 1.3**2


def test_flip_is_exact_and_differs_between_samples():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 33, 40), dtype=torch.uint8).repeat(32, 1, 1, 1)
    masks = torch.randint(0, 21, (1, 33, 40), dtype=torch.uint8).repeat(32, 1, 1)
    seen = set()
    for image, mask in zip(*data.augment(images, masks, "flip")):
        for dims in ((), (-1,), (-2,), (-1, -2)):
            if torch.equal(image, images[0].flip(dims)):
                assert torch.equal(mask, masks[0].flip(dims))
                seen.add(dims)
                break
        else:
            pytest.fail("a sample is no mirror image")
    assert len(seen) == 4


def test_affine_fills_with_void_and_the_mean_color(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(data, "jitter_colors", lambda images: images)
    white = torch.full((64, 3, 60, 90), 255, dtype=torch.uint8)
    images, masks = data.augment(white, torch.ones(64, 60, 90, dtype=torch.uint8))
    assert set(masks.unique().tolist()) == {1, data.VOID}
    outside = masks == data.VOID
    deep = torch.nn.functional.max_pool2d((~outside).float()[:, None], 5, 1, 2)[:, 0] == 0
    colors = images.permute(0, 2, 3, 1)[deep].float()
    assert len(colors) and torch.allclose(colors, 255 * torch.tensor(data.MEAN), atol=0.51)
    assert len({mask.numpy().tobytes() for mask in masks}) > 40
    # What becomes too bright stays white: a byte would go on from 0.
    monkeypatch.setattr(data, "jitter_colors", lambda images: images * 1.3)
    images, masks = data.augment(white, torch.ones(64, 60, 90, dtype=torch.uint8))
    # Away from the picture's edges, which may lie just outside, too.
    void = torch.nn.functional.pad(masks == data.VOID, (4, 4, 4, 4), value=True).float()
    inside = torch.nn.functional.max_pool2d(void[:, None], 9, 1)[:, 0] == 0
    assert inside.any() and (images.permute(0, 2, 3, 1)[inside] == 255).all()


def test_affine_turns_shears_stretches_and_zooms_by_what_is_said_in_pixels():
    torch.manual_seed(0)
    width, height = 128, 64
    matrices = data.random_matrices(4000, "affine", width / height, "cpu")[:, :, :2].double()
    half = torch.tensor([width / 2, height / 2])
    x, y = (half[:, None] * matrices / half).unbind(2)  # where a step right, and down, leads to
    turned = x * x[:, :1].sign() / x.norm(dim=1, keepdim=True)  # the direction of the first
    along = (turned * y).sum(1)
    across = turned[:, 0] * y[:, 1] - turned[:, 1] * y[:, 0]
    angle = torch.atan2(turned[:, 1], turned[:, 0]).rad2deg()
    for values, low, high in (
        (angle, -15, 15),
        (along / across, -0.1, 0.1),
        (x.norm(dim=1) / across, 1 / 1.2, 1.2),
        (1 / across, 0.8, 2.6),
    ):
        few = 0.02 * (high - low)
        assert low - 1e-4 < values.min() < low + few and high - few < values.max() < high + 1e-4
    assert 1800 < (x[:, 0] < 0).sum() < 2200  # half are mirrored


def test_an_epochs_order_is_one_of_all_images_in_whole_batches():
    class Ten:
        names = tuple("abcdefghij")
        images = torch.zeros(10)

    orders = [data.epoch_order(Ten(), 3, seed, epoch) for seed, epoch in ((0, 1), (0, 2), (1, 1))]
    for order in orders:
        assert order.shape == (3, 3) and len(order.unique()) == 9
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[1], data.epoch_order(Ten(), 3, 0, 2))
    assert data.epoch_order(Ten(), 3, 0, 10**9).shape == (3, 3)  # at once
    whole = data.epoch_order(Ten(), 16, 0, 1)  # a set smaller than a batch
    assert whole.shape == (1, 10) and sorted(whole[0].tolist()) == list(range(10))


def test_normalize_is_torchvisions():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    expected = TF.normalize(images / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.allclose(data.normalize(images), expected, atol=1e-6)


class TwoMasks:
    """Class 0: 5 of 10 pixels, class 1: 4 (one image alone), class 2: 1, class 3: none; 2 void."""

    classes = ("a", "b", "c", "d")
    masks = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 2, 255, 255]], dtype=torch.uint8)


def test_class_weights_by_hand():
    inverse = data.class_weights(TwoMasks(), "inverse")
    assert torch.allclose(inverse, torch.tensor([1 / 1.5, 1 / 1.2, 1 / 0.3, 1.0]))
    # Shares of the images that show the class: 5/10, 4/6, 1/4; their median is 5/10.
    median = data.class_weights(TwoMasks(), "median")
    assert torch.allclose(median, torch.tensor([1.0, 0.75, 2.0, 1.0]))
    enet = data.class_weights(TwoMasks(), "enet")
    expected = [1 / math.log(1.02 + share) for share in (0.5, 0.4, 0.1, 0.0)]
    assert torch.allclose(enet, torch.tensor(expected))
    mild = data.class_weights(TwoMasks(), "mild")
    expected = [math.exp(-0.15 * math.log(share)) for share in (0.5, 0.4, 0.1, 1.0)]
    assert torch.allclose(mild, torch.tensor(expected))


def test_shapes_are_drawn_at_one_size_and_resized():
    """Drawing pictures of 448 pixels would take minutes."""
    large, small = data.Shapes("val", 96), data.Shapes("val", 40)
    assert len(large.masks.unique()) == len(large.classes) == 5
    for label in range(1, 5):  # a quarter of the circle of hues from class to class
        pixels = large.images.permute(0, 2, 3, 1)[large.masks == label].double()
        hue = colorsys.rgb_to_hsv(*pixels.median(0).values.tolist())[0]
        assert abs((hue - label / 4 + 0.5) % 1 - 0.5) < 0.07
    train, test = data.Shapes("train", 40), data.Shapes("test", 40)
    pictures = torch.cat([train.images, small.images, test.images])
    assert len({image.numpy().tobytes() for image in pictures}) == 600 + 100 + 100
    assert large.images.shape == (100, 3, 96, 96)
    for index in (0, 57):
        image = Image.fromarray(large.images[index].permute(1, 2, 0).numpy())
        image = np.array(image.resize((40, 40), Image.Resampling.BILINEAR))
        assert np.array_equal(small.images[index].permute(1, 2, 0), image)
        mask = Image.fromarray(large.masks[index].numpy())
        mask = np.array(mask.resize((40, 40), Image.Resampling.NEAREST))
        assert np.array_equal(small.full_mask(index), mask)
    with pytest.raises(data.DataError, match="shapes: has no split all; choose from train, val,"):
        data.load_dataset("shapes", "all", 32)
