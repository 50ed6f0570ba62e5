"""data.py against torchvision's loader, PIL and figures worked out by hand."""

import ast
import hashlib
import math
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL_VOC, call, fake_cuda, read_scores, write_plain, write_voc
from PIL import Image
from PIL.PngImagePlugin import putchunk
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
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


# ------------------------------------------------------------------------------ VOC and plain folders


def labels_as_torchvision_reads_them(root, split, size):
    for _, mask in VOCSegmentation(root, year="2007", image_set=split):
        mask = TF.resize(mask, [size, size], InterpolationMode.NEAREST)
        yield torch.from_numpy(np.array(mask))


def test_voc_gives_the_labels_of_torchvision(voc):
    ours = data.VOC(voc, "train", size=48)
    assert ours.masks.dtype == torch.uint8 and ours.images.shape == (5, 3, 48, 48)
    for mask, theirs in zip(ours.masks, labels_as_torchvision_reads_them(voc, "train", 48)):
        assert torch.equal(mask, theirs)
    assert (ours.masks == data.VOID).any()


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


def test_the_root_is_absolute_and_must_exist(voc, monkeypatch):
    monkeypatch.chdir(voc.parent)
    assert data.VOC("voc", "val", 32).root == (voc / "VOCdevkit/VOC2007").resolve()
    with pytest.raises(data.DataError, match="/gone: .*; give --data a folder, or one of shapes, "):
        data.VOC("gone", "val", 32)


def test_of_two_vocs_the_one_that_is_taken_is_named(voc, capsys):
    write_voc(voc / "VOCdevkit" / "VOC2012", {"val": 2})
    assert len(data.VOC(voc, "val", 32)) == 3
    said = capsys.readouterr().out
    assert "VOC2007 is taken" in said and f"--data {voc / 'VOCdevkit/VOC2012'}" in said
    assert len(data.VOC(voc / "VOCdevkit/VOC2012", "val", 32)) == 2


def test_hidden_files_are_no_images_and_endings_may_be_capitals(tmp_path):
    write_plain(tmp_path, ["x.JPG", "y.jfif", "z.PNG"])
    for name in ("images/._x.JPG", "images/.DS_Store", "masks/._x.png"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "masks" / "x.png").rename(tmp_path / "masks" / "x.PNG")
    assert [p.name for p in data.image_files(tmp_path / "images")] == ["x.JPG", "y.jfif", "z.PNG"]
    assert data.VOC(tmp_path, "all", 32).names == ["x", "y", "z"]


@pytest.mark.parametrize("folder, file", [("images", "x.png"), ("masks", "x.PNG")])
def test_two_files_of_one_name_are_refused(tmp_path, folder, file):
    write_plain(tmp_path, ["x.jpg", "y.jpg"])
    Image.new("L", (42, 40)).save(tmp_path / folder / file)
    with pytest.raises(data.DataError, match=r"/x\.\w+: x\.\w+ has its name too; rename one"):
        data.VOC(tmp_path, "train", 32)


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


# ----------------------------------------------------------------------------------------- splits


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


def test_the_share_for_validation_ends_below_33(tmp_path):
    write_plain(tmp_path, ["y362.jpg", "y167.jpg", "y24.jpg"])  # sha256: 32..., 33..., f5...
    assert sides(tmp_path) == {"val": {"y362"}, "train": {"y167", "y24"}}


def test_neither_side_is_empty(tmp_path):
    # sha256: 03... for y1, 07... for y39, d5... for y27, f5... for y24; a fifth is 33...
    for names, val in ((("y1", "y39"), "y1"), (("y27", "y24"), "y27")):
        root = tmp_path / "".join(names)
        write_plain(root, [f"{name}.jpg" for name in names])
        assert sides(root) == {"val": {val}, "train": {*names} - {val}}


@pytest.mark.parametrize("folder", ["", "ImageSets/Segmentation/"])
def test_every_list_is_a_split(tmp_path, folder):
    write_plain(tmp_path, [f"{name}.jpg" for name in "abcdefgh"])
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    for name, listed in {"train": "dab", "val": "c", "at night": "eca"}.items():
        (tmp_path / folder / f"{name}.txt").write_text("\n".join(listed))
        assert data.VOC(tmp_path, name, 32).names == list(listed)  # in the list's order
    with pytest.raises(data.DataError, match="no vla.txt; .* or take at night, train, val, all$"):
        data.VOC(tmp_path, "vla", 32)
    (tmp_path / folder / "val.txt").unlink()  # val is not made up where there is a train.txt
    with pytest.raises(data.DataError, match="has no val.txt; write it"):
        data.VOC(tmp_path, "val", 32)


def test_all_is_every_image_with_a_mask_whatever_the_lists_say(tmp_path):
    write_plain(tmp_path, [f"{name}.jpg" for name in "abcdef"])
    (tmp_path / "masks/c.png").unlink()
    (tmp_path / "images/e.jpg").unlink()
    for split, listed in {"train": "a", "val": "b", "test": "d"}.items():
        (tmp_path / f"{split}.txt").write_text(listed)
    assert data.VOC(tmp_path, "all", 32).names == ["a", "b", "d", "f"]


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


def test_names_that_are_not_utf_8_are_names(tmp_path):
    write_plain(tmp_path, ["a0.jpg", "a1.jpg", "a2.jpg", "a3.jpg"])
    for folder, ending in (("images", ".jpg"), ("masks", ".png")):
        path = tmp_path / folder / f"a1{ending}"
        path.rename(tmp_path / folder / os.fsdecode(b"caf\xe9" + ending.encode()))
    assert sum(map(len, sides(tmp_path).values())) == 4


@pytest.mark.parametrize("line", ["{0}.jpg", "/images/{0}.jpg /masksAug/{0}.png", "./{0}", "{0} 1"])
def test_lists_with_endings_or_columns_are_refused(tmp_path, line):
    """The second column may name masks of another folder, which would not be read."""
    write_plain(tmp_path, ["x.jpg", "y.jpg"])
    (tmp_path / "train.txt").write_text(line.format("x") + "\n" + line.format("y"))
    with pytest.raises(data.DataError, match=f"train.txt: there is no image called .*{PREPARE}"):
        data.VOC(tmp_path, "train", 32)


@pytest.mark.parametrize("listed", [True, False])
def test_a_missing_mask_is_named_and_so_are_the_masks_that_are_there(tmp_path, listed):
    write_plain(tmp_path, ["x.jpg", "y.jpg"])
    for name in "xy":
        (tmp_path / f"masks/{name}.png").rename(tmp_path / f"masks/{name}_mask.png")
    if listed:
        (tmp_path / "train.txt").write_text("y\nx\n")
    with pytest.raises(data.DataError) as error:
        data.VOC(tmp_path, "train", 32)
    said = ["x.jpg", "x_mask.png", PREPARE]
    said += [f"{tmp_path}/train.txt: ", "no mask called 'y'"] if listed else [f"{tmp_path}: "]
    assert [part for part in said if part not in str(error.value)] == []


EXPORTS = {  # the files that other tools write; pictures are RGB here, which no mask may be
    "labelme": "a.jpg a.json",
    "labelme2voc": "JPEGImages/a.jpg SegmentationClass/a.npy SegmentationClassPNG/a.png names.txt",
    "CVAT": "JPEGImages/a.jpg SegmentationClass/a.png labelmap.txt",
    "Roboflow": "train/a.jpg train/a_mask.png train/_classes.csv",
    "COCO": "images/a.jpg annotations/instances_train.json",
    "YOLO": "images/train/a.jpg labels/train/a.txt data.yaml",
    "Supervisely": "ds/img/a.jpg ds/ann/a.jpg.json meta.json",
    "Cityscapes": "leftImg8bit/train/x/a.png gtFine/train/x/a_labelIds.png",
    "Oxford-IIIT Pet": "images/a.jpg annotations/trimaps/a.png",
    "arrays": "images/a.jpg masks/a.npy classes.txt",
    "colours": "images/a.jpg masks/a.png classes.txt",
    "folders": "images/train/a.jpg masks/train/a.png classes.txt",
    "no classes": "images/a.jpg masks/a.png",
}


@pytest.mark.parametrize("tool", EXPORTS)
def test_what_other_tools_export_is_refused_and_the_converter_named(tmp_path, tool):
    for file in EXPORTS[tool].split():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jpg", ".png"):
            Image.new("RGB", (6, 4)).save(path)
        else:
            path.write_text("background\ncat\n")
    with pytest.raises(data.DataError, match=PREPARE) as error:
        data.VOC(tmp_path, "all", 32)
    assert len(str(error.value).replace(str(tmp_path), "/home/me")) <= 300


# ------------------------------------------------------------------------------- images and masks


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


def test_the_fourth_band_of_a_tiff_is_left_out_and_that_is_said_once(tmp_path, capsys):
    """It may be near infrared: red, green and blue stay as they are, whatever is in it."""
    for name in ("a.tif", "b.tiff"):
        Image.fromarray(np.array([TRANSPARENT], np.uint8)).save(tmp_path / name)
        assert load_one_row(tmp_path / name) == [pixel[:3] for pixel in TRANSPARENT]
    said = f"{tmp_path}: of TIFFs with four bands the fourth is left out"
    assert capsys.readouterr().out == said + "\n"


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


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I;16", "JPEG"])
def test_masks_of_other_kinds_are_refused(tmp_path, mode):
    values = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    mask = Image.fromarray(values.astype(np.uint16) if mode == "I;16" else values)
    mask = mask.convert(mode) if mode in ("RGB", "RGBA", "LA", "1") else mask
    mask.save(tmp_path / "mask.png", "JPEG" if mode == "JPEG" else "PNG")
    with pytest.raises(data.DataError, match=f"mask.png: is a .* 8-bit grayscale PNG.*{PREPARE}"):
        data.load_mask(tmp_path / "mask.png", 2)


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_few_bits_are_refused_where_pillow_would_stretch_their_labels(tmp_path, bits):
    write_png(tmp_path / "few.png", 8 // bits, bits, 0, bytes([1]))  # the last pixel is label 1
    assert np.array(Image.open(tmp_path / "few.png")).max() == 255 // (2**bits - 1)
    with pytest.raises(data.DataError, match="few.png: is a .*; python tools/prepare.py"):
        data.load_mask(tmp_path / "few.png", 21)


def test_a_mask_is_turned_as_its_own_exif_data_say(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = np.array([[0, 1], [2, 255]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.array(data.load_mask(tmp_path / "turned.png", 3)), pixels[::-1, ::-1])


# --------------------------------------------------------------------------------- decoding a split


def test_progress_is_called_and_its_label_says_how_much_memory_is_taken(voc):
    calls = []

    def progress(items, label):
        calls.append((list(items), label))
        yield from items

    data.load_dataset(voc, "train", 32, progress=progress)
    data.load_dataset(voc, "val", 4096, progress=progress)  # 3 * 4 * 4096 ** 2 = 3 * 2 ** 26
    labels = ["reading train, 0.0 GiB", "reading val, 0.2 GiB"]
    assert calls == list(zip([[0, 1, 2, 3, 4], [0, 1, 2]], labels))


def test_a_split_that_memory_cannot_hold_is_refused_with_what_helps(voc):
    with pytest.raises(data.DataError, match="VOC2007: split train: .*; give a smaller --size"):
        data.VOC(voc, "train", size=2**22)  # 240 TiB, more than 64-bit processors can address


def test_decoding_takes_the_threads_that_pytorch_has(voc, monkeypatch):
    """PyTorch knows how many cores a job or a container has; os.cpu_count does not."""
    asked = []

    class Pool(data.ThreadPoolExecutor):
        def __init__(self, count):
            asked.append(count)
            super().__init__(count)

    monkeypatch.setattr(data, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    data.VOC(voc, "val", 32)
    assert asked == [3]


def test_a_mistake_of_our_own_is_not_blamed_on_a_file(voc, monkeypatch):
    def wrong(image, size):
        raise KeyError("a bug")

    monkeypatch.setattr(data, "to_tensor", wrong)
    with pytest.raises(KeyError, match="a bug"):
        data.VOC(voc, "train", 32)


def test_a_long_message_of_pillow_hides_neither_file_nor_remedy(tmp_path, monkeypatch):
    def broken(path):
        raise SyntaxError("broken\n" + 40 * "very long " + "end")

    monkeypatch.setattr(Image, "open", broken)
    for read, remedy in ((data.load_image, "give another file"), (data.load_mask, "DIR NEW")):
        with pytest.raises(data.DataError) as error:
            read("a/folder/of/mine/picture.png", *([2] if read == data.load_mask else []))
        said = str(error.value)
        assert said.startswith("a/folder/of/mine/picture.png: broken very long very long")
        assert said.endswith(remedy) and len(said) <= 300 and "\n" not in said


def test_remarks_are_printed_once(capsys):
    for line in ("one", "two", "one"):
        data.say(line)
    assert capsys.readouterr() == ("one\ntwo\n", "")


# --------------------------------------------------------------------------------- a set of one's own


class Halves:
    """All that scripts need of a data set: the right half of each picture is white, and a class."""

    def __init__(self, size):
        self.names = ["a", "b", "c", "d"]
        self.classes = ["background", "white"]
        self.palette = [[0, 0, 0], [9, 9, 9]]
        self.masks = torch.zeros(4, size, size, dtype=torch.uint8)
        self.masks[:, :, size // 2 :] = 1
        self.images = self.masks[:, None].repeat(1, 3, 1, 1) * 255

    def full_mask(self, index):
        return self.masks[index]


def test_a_class_of_ones_own_trains_and_is_scored(tmp_path, monkeypatch, no_pictures, small):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "NAMES", (*data.NAMES, "halves"))
    monkeypatch.setattr(data, "load_dataset", lambda name, split, size, *more, **how: Halves(size))
    flags = ("--size", 32, "--batch-size", 2, "--epochs", 20, "--lr", 0.01, "--device", "cpu")
    call(train, "--model", "small", "--data", "halves", "--out", "run", *flags)
    call(evaluate, "run", "--out", "scores")
    metrics = read_scores("scores")
    assert metrics["images"] == 4 and list(metrics["iou"]) == ["background", "white"]
    assert metrics["pixel_accuracy"] > 0.9


def test_data_can_be_copied_out_alone():
    nodes = ast.parse(Path(data.__file__).read_text()).body
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert "torch" in names and not names & {"utils", "models", "matplotlib", "torchvision"}


# --------------------------------------------------------------------------------- what masks show


def with_masks(*masks, background="background"):
    """Return a set whose masks have these values, for `data.check_labels`."""
    dataset = Halves(2)
    dataset.classes = [background, "white"]
    dataset.masks = torch.tensor(masks, dtype=torch.uint8).view(-1, 2, 2)
    return dataset


def test_labels_that_nothing_can_be_learned_from_are_refused():
    for learns in (True, False):
        with pytest.raises(data.DataError, match=r"^own: has no pixel with a label; .*\(255\)"):
            data.check_labels(with_masks([255] * 4, [255] * 4), "own", learns)
        said = f"own: the masks have nothing but background .*; .* 255 should be 1; {PREPARE}"
        with pytest.raises(data.DataError, match=said):
            data.check_labels(with_masks([0, 255, 0, 255], [0] * 4), "own", learns)
        data.check_labels(with_masks([0, 1, 255, 255], [0] * 4), "own", learns)
    with pytest.raises(data.DataError, match="nothing but background"):
        data.check_labels(with_masks([0] * 4), "own")
    data.check_labels(with_masks([0] * 4), "own", learns=False)  # background alone can be scored


def test_masks_that_may_have_void_for_the_object_are_said_in_training(capsys):
    masks = ([0, 0, 1, 1], [0] * 4, [0, 0, 255, 255], [0, 255, 255, 255])
    data.check_labels(with_masks(*masks), "own", learns=False)
    assert capsys.readouterr().out == ""
    data.check_labels(with_masks(*masks), "own")
    said = "own: 2 masks, such as that of c, have 0 and 255 alone: void, or an object that should"
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("name", ["void", "unlabeled", "_Unlabelled_", "Ignore", "sky"])
def test_a_first_class_that_seems_to_be_void_is_said_to_be_learned(capsys, name):
    data.check_labels(with_masks([0, 0, 1, 1], background=name), "own")
    said = f"own: class 0 is called {name}, but is learned and counts in scores; {PREPARE} DIR NEW"
    assert capsys.readouterr().out == (
        "" if name == "sky" else f"{said} --void 0 has it left out\n"
    )


# ---------------------------------------------------------------------------------- augmentation


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
@pytest.mark.parametrize("height, width", [(96, 96), (64, 128)])
def test_augmented_images_stay_painted_with_their_labels(mode, height, width, monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(data, "jitter_colors", lambda images: images)
    images, masks = painted_batch(height=height, width=width)
    new_images, new_masks = data.augment(images, masks, mode)
    assert new_images.dtype == new_masks.dtype == torch.uint8
    assert not torch.equal(new_masks, masks)
    assert share_of_wrong_paint(new_images, new_masks) == 0
    # The same check sees an image that lies five pixels beside its mask.
    misaligned = data.augment(images.roll(5, -1), masks, mode)
    assert share_of_wrong_paint(*misaligned) > 0.05


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
    assert torch.allclose(colors, 255 * torch.tensor(data.MEAN), atol=0.51)
    assert len({mask.numpy().tobytes() for mask in masks}) > 40


def test_affine_zooms_into_a_larger_image_and_gives_the_size_that_is_asked_for():
    torch.manual_seed(0)
    columns = torch.arange(200, dtype=torch.uint8).expand(64, 200, 200)
    images, masks = data.augment(torch.zeros(64, 3, 200, 200, dtype=torch.uint8), columns, size=100)
    assert images.shape == (64, 3, 100, 100) and masks.shape == (64, 100, 100)
    # Along a row of the result the source's columns go by at 2 / zoom a pixel, and up to 1.2 times
    # that: from 2 / 2.6 / 1.2 to 2 / 0.8 * 1.2, a little less where it is turned or sheared.
    steps = masks.float().diff(dim=2).abs()
    inside = (masks != data.VOID)[:, :, 1:] & (masks != data.VOID)[:, :, :-1]
    means = [step[ok].mean().item() for step, ok in zip(steps, inside) if ok.sum() > 2000]
    assert len(means) > 40 and 0.5 < min(means) < 1.1 and 1.8 < max(means) < 3.1


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


def test_saturation_changes_by_itself():
    torch.manual_seed(0)
    colors = torch.tensor([[100, 100, 100], [100, 100, 100], [50, 50, 50], [150, 150, 150.0]]).T
    colors[:2, 0] += torch.tensor([40, -40])  # red and green, in which these two are opposites
    colors[:2, 1] -= torch.tensor([40, -40])
    changed = data.jitter_colors(colors.view(1, 3, 2, 2).expand(500, 3, 2, 2)).flatten(2)
    contrast = (changed[:, :, 3] - changed[:, :, 2]).mean(1) / 100
    opposites = (changed[:, 0] - changed[:, 1]) @ torch.tensor([1, -1, 0, 0.0]) / 160
    saturation = opposites / contrast  # but for the tint's part, below 0.12
    assert 0.6 < saturation.min() < 0.8 and 1.2 < saturation.max() < 1.46


def test_images_that_are_no_bytes_are_refused():
    images, masks = torch.rand(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)
    said = "should be uint8, from 0 to 255, and are torch.float32"
    with pytest.raises(TypeError, match=said):
        data.normalize(images)
    with pytest.raises(TypeError, match=said):
        data.augment(images, masks)


def test_an_epochs_order_is_one_of_all_images_in_whole_batches():
    class Ten:
        names = tuple("abcdefghij")
        images = torch.zeros(10)

    orders = [data.epoch_order(Ten(), 3, seed, epoch) for seed, epoch in ((0, 1), (0, 2), (1, 1))]
    for order in orders:
        assert order.shape == (3, 3) and len(order.unique()) == 9
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[1], data.epoch_order(Ten(), 3, 0, 2))
    whole = data.epoch_order(Ten(), 16, 0, 1)  # a set smaller than a batch
    assert whole.shape == (1, 10) and sorted(whole[0].tolist()) == list(range(10))


def test_colors_change_by_no_more_than_said_and_differ_between_images():
    torch.manual_seed(0)
    gray = torch.full((256, 3, 4, 4), 100.0)
    changed = data.jitter_colors(gray)[:, :, 0, 0]
    brightness = changed.mean(1)
    assert 55 < brightness.min() < 75 and 125 < brightness.max() < 155
    tint = changed / brightness[:, None]
    assert 0.05 < (tint - 1).abs().max() < 0.4 and len(brightness.unique()) > 250
    ramp = torch.linspace(0, 200, 16).view(1, 1, 4, 4).expand(256, 3, 4, 4)
    contrast = data.jitter_colors(ramp).mean(1).flatten(1).std(1) / ramp[0, 0].std()
    assert 0.45 < contrast.min() < 0.8 and 1.25 < contrast.max() < 2


def test_normalize_is_torchvisions():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    expected = TF.normalize(images / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.allclose(data.normalize(images), expected, atol=1e-6)
    assert torch.allclose(data.normalize(images[0]), expected[0], atol=1e-6)


class CopiesToTheGpu(TorchDispatchMode):
    """Counts the operations that take a tensor of the CPU and give one on the GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {each.device.type for each in args if isinstance(each, torch.Tensor)}
        self.count += "cpu" in devices and getattr(result, "is_cuda", False)
        return result


@pytest.mark.skipif(not fake_cuda(), reason="this PyTorch makes no fake CUDA tensors here")
def test_a_step_copies_nothing_from_the_host_to_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with FakeTensorMode(), CopiesToTheGpu() as copies:
        torch.tensor([1.0, 2.0], device="cuda")
        assert copies.count == 1  # it sees one
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="cuda")
        masks = torch.zeros(2, 32, 32, dtype=torch.uint8, device="cuda")
        for mode in ("affine", "flip"):
            data.normalize(data.augment(images, masks, mode)[0])
    assert copies.count == 1
    test_normalize_is_torchvisions()  # nothing fake is left behind


# --------------------------------------------------------------------------------- class weights


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


# ----------------------------------------------------------------------------------- shapes


def test_shapes_are_the_same_every_time_and_show_every_class():
    one, two = data.Shapes("val", size=32), data.Shapes("val", size=32)
    assert torch.equal(one.images, two.images) and torch.equal(one.masks, two.masks)
    assert not torch.equal(one.images, data.Shapes("test", size=32).images)
    assert not torch.equal(one.images, data.Shapes("val", size=32, seed=1).images)
    shares = torch.bincount(one.masks.flatten()).double() / one.masks.numel()
    assert len(shares) == len(one.classes) == 5 and (shares > 0.03).all()


def test_shapes_masks_lie_on_the_drawn_shapes():
    rng = np.random.default_rng(0)
    for _ in range(20):
        image, mask = data.draw_shapes(rng, 64)
        pixels, labels = np.asarray(image).astype(float), np.asarray(mask)
        saturation = pixels.max(2) - pixels.min(2)
        if 0.05 < (labels > 0).mean() < 0.95:
            assert saturation[labels > 0].mean() > 1.3 * saturation[labels == 0].mean()


def test_shapes_are_drawn_at_one_size_and_resized():
    """Drawing pictures of 448 pixels would take minutes."""
    large, small = data.Shapes("val", 96), data.Shapes("val", 40)
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
