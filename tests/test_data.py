"""data.py against torchvision's loader, PIL and figures worked out by hand."""

import functools
import hashlib
import http.server
import math
import socket
import struct
import tarfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL_VOC, write_voc
from PIL import Image
from PIL.PngImagePlugin import putchunk
from torchvision.datasets import VOCSegmentation
from torchvision.datasets import utils as torchvision_datasets_utils
from torchvision.datasets import voc as torchvision_voc
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

import data


def test_color_map_has_the_colors_of_the_voc_devkit():
    colors = data.color_map(256)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    for index, color in (known | {255: (224, 224, 192)}).items():
        assert tuple(colors[index]) == color


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
    for index in range(3):
        image = Image.open(ours.image_paths[index]).resize((40, 40), Image.Resampling.BILINEAR)
        assert torch.equal(ours[index][0].permute(1, 2, 0), torch.from_numpy(np.array(image)))
        assert np.array_equal(ours.full_mask(index), np.array(Image.open(ours.mask_paths[index])))
    images, masks = ours[[2, 0]]
    assert torch.equal(images[1], ours[0][0]) and torch.equal(masks[0], ours[2][1])


def test_the_layout_folder_itself_and_named_classes(tmp_path):
    root = write_voc(tmp_path / "mine", num_classes=2)
    (root / "classes.txt").write_text("\ufeffbackground\r\n\r\ncat\r\n", encoding="utf-8")
    ours = data.VOC(root, "train", size=32)
    assert ours.classes == ["background", "cat"]
    assert ours.palette == [[0, 0, 0], [128, 0, 0]]


def jpeg_with_orientation(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated 90 degrees clockwise
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40] = 255  # white on the left, so on top once upright
    Image.fromarray(pixels).save(path, exif=exif, quality=100)


def test_images_become_upright_rgb(tmp_path):
    jpeg_with_orientation(tmp_path / "turned.jpg")
    upright = np.array(data.load_image(tmp_path / "turned.jpg"))
    assert upright.shape == (80, 40, 3)
    assert upright[:30].min() > 200 and upright[50:].max() < 50

    red = Image.new("RGB", (8, 8), (250, 10, 20))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    red.convert("RGBA").save(tmp_path / "alpha.png")
    red.convert("L").save(tmp_path / "gray.jpg", quality=100)
    red.quantize(4).save(tmp_path / "palette.png")
    gray = round(0.299 * 250 + 0.587 * 10 + 0.114 * 20)
    expected = {"gray.jpg": (gray,) * 3}
    for name in ("cmyk.jpg", "alpha.png", "gray.jpg", "palette.png"):
        image = data.load_image(tmp_path / name)
        assert image.mode == "RGB"
        color = np.array(expected.get(name, (250, 10, 20)))
        assert np.abs(np.array(image).astype(int) - color).max() <= 6, name


def test_masks_are_never_read_through_their_colors(tmp_path):
    values = np.array([[0, 3, 255], [7, 0, 20]], np.uint8)
    gray = Image.fromarray(values)
    gray.save(tmp_path / "gray.png")
    gray.putpalette([0, 0, 0] * 256)  # all colours black: only the indices tell
    gray.save(tmp_path / "palette.png")
    for name in ("gray.png", "palette.png"):
        assert np.array_equal(np.array(data.load_mask(tmp_path / name, 21)), values)
    with pytest.raises(
        data.DataError, match=r"palette.png: has the values 7, 20 .*column 0, row 1"
    ):
        data.load_mask(tmp_path / "palette.png", 5)
    gray.convert("RGB").save(tmp_path / "rgb.png")
    with pytest.raises(data.DataError, match="rgb.png: is a mask of kind RGB PNG"):
        data.load_mask(tmp_path / "rgb.png", 21)


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_few_bits_are_refused_where_pillow_would_stretch_their_labels(tmp_path, bits):
    with open(tmp_path / "few.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        putchunk(file, b"IHDR", struct.pack(">IIBBBBB", 8 // bits, 1, bits, 0, 0, 0, 0))
        putchunk(file, b"IDAT", zlib.compress(b"\0" + bytes([1])))  # the last pixel is label 1
        putchunk(file, b"IEND", b"")
    assert np.array(Image.open(tmp_path / "few.png")).max() == 255 // (2**bits - 1)
    with pytest.raises(data.DataError, match="few.png: is a mask of kind 2- or 4-bit grayscale"):
        data.load_mask(tmp_path / "few.png", 21)


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


# --------------------------------------------------------------------------------- class weights


class TwoMasks:
    """Class 0: 5 of 10 pixels, class 1: 4 (one image alone), class 2: 1, class 3: none; 2 void."""

    classes = ("a", "b", "c", "d")
    masks = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 2, 255, 255]], dtype=torch.uint8)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return None, self.masks[index]


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


# ------------------------------------------------------------------------------ folders of one's own

LABELMAP = """# label:color_rgb:parts:actions
cat:250,50,10::
background:0,0,0::
dog:10,20,200::
"""
NAMES = {"classes.txt": "background\ncat\ndog\n", "class_names.txt": "_background_\ncat\ndog\n"}


def write_folder(root, kind, count=10):
    """Write a folder as a labelling tool exports it; return {name: its true mask, uint8 (H, W)}."""
    rng = np.random.default_rng(0)
    images, masks, names = {
        "plain": ("images", "masks", "classes.txt"),
        "labelme": ("JPEGImages", "SegmentationClassPNG", "class_names.txt"),
        "newer labelme": ("JPEGImages", "SegmentationClass", "class_names.txt"),
        "cvat": ("JPEGImages", "SegmentationClass", "labelmap.txt"),
        "cvat indices": ("JPEGImages", "SegmentationClass", "labelmap.txt"),
    }[kind]
    for folder in (images, masks):
        (root / folder).mkdir(parents=True)
    (root / names).write_text(NAMES.get(names, LABELMAP))
    if kind == "labelme":
        (root / "SegmentationClass").mkdir()
        np.save(root / "SegmentationClass" / "a0.npy", np.zeros(3))
    truth = {}
    for i in range(count):
        mask = rng.integers(0, 3, (5, 6)).astype(np.uint8).repeat(8, 0).repeat(7, 1)
        mask[:8, :7] = 255 if kind != "cvat indices" else 0
        truth[f"a{i}"] = mask
        ending = "png" if kind == "plain" and i == 0 else "jpg"
        noise = rng.integers(0, 256, (40, 42, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / images / f"a{i}.{ending}")
        if kind == "cvat":
            table = np.full((256, 3), (224, 224, 192), np.uint8)
            table[:3] = [(0, 0, 0), (250, 50, 10), (10, 20, 200)]
            picture = Image.fromarray(table[mask])
        elif kind == "cvat indices":
            picture = Image.fromarray(np.array([1, 0, 2], np.uint8)[mask])  # the lines' order
        else:
            picture = Image.fromarray(mask)
            if kind != "plain":
                picture.putpalette(bytes(range(256)) * 3)
        picture.save(root / masks / f"a{i}.png")
    if kind.startswith("cvat"):
        (root / "ImageSets" / "Segmentation").mkdir(parents=True)
        listed = "\n".join(truth) + "\n"
        (root / "ImageSets" / "Segmentation" / "default.txt").write_text(listed)
    return truth


KINDS = ["plain", "labelme", "newer labelme", "cvat", "cvat indices"]


@pytest.mark.parametrize("kind", KINDS)
def test_folders_as_the_tools_export_them(tmp_path, kind, capsys):
    truth = write_folder(tmp_path, kind)
    sets = {split: data.VOC(tmp_path, split, 32) for split in ("train", "val")}
    assert "val is 2 of its 10 images, drawn at random" in capsys.readouterr().err
    assert [len(dataset) for dataset in sets.values()] == [8, 2]
    names = {split: [p.stem for p in dataset.image_paths] for split, dataset in sets.items()}
    assert sorted(names["train"] + names["val"]) == sorted(truth)
    for split, dataset in sets.items():
        assert [name.strip("_") for name in dataset.classes] == ["background", "cat", "dog"]
        for index, name in enumerate(names[split]):
            assert np.array_equal(dataset.full_mask(index), truth[name])
    if kind.startswith("cvat"):
        assert sets["val"].palette == [[0, 0, 0], [250, 50, 10], [10, 20, 200]]
    assert [p.stem for p in data.VOC(tmp_path, "val", 32).image_paths] == names["val"]


def test_colors_that_the_label_map_does_not_name_are_counted(tmp_path):
    write_folder(tmp_path, "cvat")
    path = tmp_path / "SegmentationClass" / "a3.png"
    pixels = np.array(Image.open(path))
    pixels[2, :3], pixels[4, 1] = (1, 2, 3), (9, 9, 9)
    Image.fromarray(pixels).save(path)
    said = r"a3.png: has 4 pixels in 2 colours that labelmap.txt does not name \(3 of \(1, 2, 3\)"
    with pytest.raises(data.DataError, match=said):
        data.VOC(tmp_path, "train", 32)


@pytest.mark.parametrize(
    "labelmap, said",
    [
        ("cat;1,2,3", "'cat;1,2,3' is not name:red,green,blue"),
        ("background:0,0,0::\ncat:1,2::", "'cat:1,2::' is not name:red,green,blue"),
        ("background:0,0,0::\ncat:1,2,333::", "not from 0 to 255"),
        ("background:0,0,0::\ncat:0,0,0::", "is taken"),
        ("cat:1,2,3::", "names no class 'background'"),
    ],
)
def test_label_maps_that_cannot_be_meant_are_refused(tmp_path, labelmap, said):
    write_folder(tmp_path, "cvat")
    (tmp_path / "labelmap.txt").write_text(labelmap)
    with pytest.raises(data.DataError, match=said):
        data.VOC(tmp_path, "train", 32)


def test_a_plain_folder_needs_the_names_of_its_classes(tmp_path):
    write_folder(tmp_path, "plain")
    (tmp_path / "classes.txt").write_text("background\nbackground\n")
    with pytest.raises(data.DataError, match="classes.txt: should list 2 to 255 different classes"):
        data.VOC(tmp_path, "train", 32)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(data.DataError, match="has no classes.txt; list the classes"):
        data.VOC(tmp_path, "train", 32)


def test_data_that_is_not_kept_in_memory_is_the_same(voc, monkeypatch, capsys):
    kept = data.load_dataset(voc, "train", 32)
    monkeypatch.setattr(data, "memory_size", lambda: 4 * 5 * 4 * 32**2)  # four times what it needs
    assert data.load_dataset(voc, "train", 32, in_memory="yes").images is not None
    assert capsys.readouterr().err == ""
    streamed = data.load_dataset(voc, "train", 32)
    assert "its images are decoded each time they are needed" in capsys.readouterr().err
    assert streamed.images is None and kept.images is not None
    for index in (3, [0, 4, 2], torch.tensor([1, 1])):
        for a, b in zip(kept[index], streamed[index]):
            assert torch.equal(a, b)
    weights = [data.class_weights(dataset, "median") for dataset in (kept, streamed)]
    assert torch.equal(*weights)
    (voc / "VOCdevkit/VOC2007/JPEGImages/train_3.jpg").unlink()
    with pytest.raises(data.DataError, match="train_3.jpg: does not exist"):
        data.load_dataset(voc, "train", 32, in_memory="no")


# ---------------------------------------------------------------------------------- download


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Two small archives on a server of this machine in the place of VOC's own."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    given = {"2007": {"train": 2, "val": 1}, "2007-test": {"test": 2}, "2012": {"val": 3}}
    for key, splits in given.items():
        write_voc(tmp_path / key / "VOCdevkit" / f"VOC{key[:4]}", splits)
        archive = tmp_path / f"{key}.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(tmp_path / key / "VOCdevkit", "VOCdevkit")
        monkeypatch.setitem(
            torchvision_voc.DATASET_YEAR_DICT,
            key,
            torchvision_voc.DATASET_YEAR_DICT[key]
            | {
                "url": f"http://127.0.0.1:{server.server_port}/{archive.name}",
                "md5": hashlib.md5(archive.read_bytes()).hexdigest(),
            },
        )
    yield tmp_path
    server.shutdown()
    server.server_close()


def test_download_fetches_only_what_is_missing(archives, monkeypatch):
    monkeypatch.chdir(archives)
    assert len(data.load_dataset("voc2007", "train", 32)) == 2
    fetched = sorted(path.name for path in (archives / "data").glob("*.tar"))
    assert fetched == ["VOCtrainval_06-Nov-2007.tar"]
    (archives / "2007.tar").unlink()  # it is there already, so it is not asked for again
    (archives / "data" / "VOCtrainval_06-Nov-2007.tar").unlink()
    assert len(data.load_dataset("voc2007", "val", 32)) == 1
    assert len(data.load_dataset("voc2007", "test", 32)) == 2
    val = data.load_dataset("voc2012", "val", 32)
    assert len(val) == 3 and val.root == Path("data/VOCdevkit/VOC2012")
    with pytest.raises(data.DataError, match="VOC 2012 has no split 'test'; it has train, val, tr"):
        data.load_dataset("voc2012", "test", 32)


ERROR = r"http://\S+: cannot be downloaded.*save it as data/VOCtrainval\S+ \(md5 [0-9a-f]{32}\)"


def test_an_archive_that_is_cut_short_or_a_web_page_is_refused_and_then_repaired(
    archives, monkeypatch
):
    monkeypatch.chdir(archives)
    archive = archives / "2007.tar"
    whole = archive.read_bytes()
    for wrong in (whole[: len(whole) // 2], b"<html>this page has moved</html>"):
        archive.write_bytes(wrong)
        with pytest.raises(data.DataError, match=ERROR):
            data.load_dataset("voc2007", "train", 32)
        assert not (archives / "data" / "VOCdevkit").exists()
    archive.write_bytes(whole)
    assert len(data.load_dataset("voc2007", "train", 32)) == 2


def test_unpacking_that_was_interrupted_is_done_again(archives, monkeypatch):
    monkeypatch.chdir(archives)
    with monkeypatch.context() as patch:

        def interrupted(archive, folder, *args):
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            (archives / "data/VOCdevkit/VOC2007/JPEGImages/train_1.jpg").write_bytes(b"\xff\xd8")
            raise KeyboardInterrupt

        patch.setattr(torchvision_datasets_utils, "extract_archive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.load_dataset("voc2007", "train", 32)
    assert len(data.load_dataset("voc2007", "train", 32)) == 2
    assert [path.name for path in (archives / "data").glob("unfinished*")] == []


def test_an_archive_put_there_by_hand_needs_no_host(archives, monkeypatch):
    monkeypatch.chdir(archives)
    (archives / "data").mkdir()
    (archives / "2007.tar").rename(archives / "data" / "VOCtrainval_06-Nov-2007.tar")
    assert len(data.load_dataset("voc2007", "val", 32)) == 1


def test_hosts_that_are_down_silent_or_lack_the_file_are_one_clear_error(archives, monkeypatch):
    monkeypatch.chdir(archives)
    (archives / "2007.tar").unlink()
    with pytest.raises(data.DataError, match=ERROR):  # 404
        data.load_dataset("voc2007", "train", 32)
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/2007.tar"
        entry = torchvision_voc.DATASET_YEAR_DICT["2007"] | {"url": address}
        monkeypatch.setitem(torchvision_voc.DATASET_YEAR_DICT, "2007", entry)
        with pytest.raises(data.DataError, match=ERROR):
            data.load_dataset("voc2007", "train", 32)
    with pytest.raises(data.DataError, match=ERROR):  # now nobody listens there
        data.load_dataset("voc2007", "train", 32)
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/outside-of-the-folder.txt"])
def test_an_archive_with_paths_outside_the_folder_is_refused(archives, monkeypatch, name):
    monkeypatch.chdir(archives)
    archive = archives / "2007.tar"
    with tarfile.open(archive, "a") as tar:
        tar.addfile(tarfile.TarInfo(name))
    entry = torchvision_voc.DATASET_YEAR_DICT["2007"]
    entry |= {"md5": hashlib.md5(archive.read_bytes()).hexdigest()}
    monkeypatch.setitem(torchvision_voc.DATASET_YEAR_DICT, "2007", entry)
    if name.startswith("/"):  # made relative to the folder, as tar does
        data.load_dataset("voc2007", "train", 32)
        assert not Path(name).exists()
    else:
        with pytest.raises(data.DataError, match=ERROR):
            data.load_dataset("voc2007", "train", 32)
    assert not (archives / "outside.txt").exists()
