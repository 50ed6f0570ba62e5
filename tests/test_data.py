"""data.py against torchvision's loader, PIL and figures worked out by hand."""

import ast
import functools
import hashlib
import http.server
import math
import os
import shutil
import socket
import struct
import tarfile
import threading
import unicodedata
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REAL_VOC, call, fake_cuda, write_voc
from PIL import Image
from PIL.PngImagePlugin import putchunk
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets import VOCSegmentation
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
    gray.putpalette(data.color_map(256)[3] * 256)
    gray.convert("RGB").save(tmp_path / "rgb.png")
    with pytest.raises(data.DataError, match="rgb.png: is a mask of kind RGB PNG"):
        data.load_mask(tmp_path / "rgb.png", 21)


def test_masks_of_other_kinds_are_read_where_only_one_thing_can_be_meant(tmp_path):
    values = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    gray = Image.fromarray(values)
    kinds = {mode: gray.convert(mode) for mode in ("RGB", "RGBA", "LA")}
    kinds |= {"1": Image.fromarray(values > 0), "I;16": Image.fromarray(values.astype(np.uint16))}
    clear = kinds["RGBA"].copy()
    clear.putalpha(0)
    for name, mask in (kinds | {"clear": clear}).items():
        mask.save(tmp_path / "mask.png")
        if name in ("RGB", "RGBA", "1"):
            assert np.array_equal(data.load_mask(tmp_path / "mask.png", 2), values)
        else:
            with pytest.raises(data.DataError, match="mask.png: is a mask of kind .*; save masks"):
                data.load_mask(tmp_path / "mask.png", 2)


def load_one_row(path):
    """Return the pixels of an image file one pixel high, as a list."""
    return np.array(data.load_image(path))[0].tolist()


def test_numbers_of_more_than_8_bits_are_scaled_by_their_range_or_refused(tmp_path, monkeypatch):
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(np.array([[0, 257, 4095, 65535]], np.uint16)).save(tmp_path / name)
        expected = [[v] * 3 for v in (0, 1, 16, 255)]  # 4095 / 65535 * 255 = 15.93
        assert load_one_row(tmp_path / name) == expected
    Image.open(tmp_path / "deep.png").save(tmp_path / "keyed.png", transparency=7)
    assert Image.open(tmp_path / "keyed.png").has_transparency_data
    assert load_one_row(tmp_path / "keyed.png") == expected
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "float.tif")
    assert load_one_row(tmp_path / "float.tif") == [[0] * 3, [128] * 3, [255] * 3]
    for wrong in ([0, 1.5], [-0.1, 1], [0, np.nan]):
        Image.fromarray(np.array([wrong], np.float32)).save(tmp_path / "wrong.tif")
        with pytest.raises(data.DataError, match="wrong.tif: holds numbers .* save it with 8 bits"):
            data.load_image(tmp_path / "wrong.tif")
    Image.fromarray(np.array([[0, 300]], np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(data.DataError, match="wide.tif: holds numbers from 0 to 300"):
        data.load_image(tmp_path / "wide.tif")
    # Older versions of Pillow give a 16-bit PNG the mode I.
    real = Image.open

    def older(path):
        image = real(path)
        file = image.convert("I")
        file.format = image.format
        return file

    monkeypatch.setattr(Image, "open", older)
    assert load_one_row(tmp_path / "deep.png") == expected


@pytest.mark.filterwarnings("error")
def test_transparent_pixels_show_white(tmp_path):
    pixels = np.array([[[10, 20, 30, 255], [200, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "alpha.png")
    expected = [[10, 20, 30], [255, 255, 255], [127, 127, 127]]  # 255 * (1 - 128 / 255)
    assert load_one_row(tmp_path / "alpha.png") == expected
    Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8)).save(tmp_path / "la.png")
    assert load_one_row(tmp_path / "la.png") == [[9, 9, 9], [255, 255, 255]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette.png", transparency=bytes([255, 0]))
    assert load_one_row(tmp_path / "palette.png") == [[10, 20, 30], [255, 255, 255]]


def write_png(path, width, bits, color, row):
    """Write a PNG of one row; color: 0 for grey, 2 for RGB. Pillow writes no such depths."""
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        putchunk(file, b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0))
        putchunk(file, b"IDAT", zlib.compress(b"\0" + row))
        putchunk(file, b"IEND", b"")


def test_rgb_masks_of_16_bits_are_read_by_their_colours_alone(tmp_path):
    """Pillow keeps the higher byte: all of a colour, but nothing of a label, which it makes 0."""
    write_png(tmp_path / "labels.png", 2, 16, 2, struct.pack(">6H", 0, 0, 0, 1, 1, 1))
    assert np.array(Image.open(tmp_path / "labels.png")).max() == 0
    with pytest.raises(data.DataError, match="labels.png: is a mask of kind RGB PNG.*8-bit"):
        data.load_mask(tmp_path / "labels.png", 21)
    write_png(tmp_path / "colors.png", 2, 16, 2, struct.pack(">6H", 0, 0, 0, 65535, 0, 32896))
    colors = {(0, 0, 0): 0, (255, 0, 128): 1}
    assert np.array(data.load_mask(tmp_path / "colors.png", 2, colors)).tolist() == [[0, 1]]


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_few_bits_are_refused_where_pillow_would_stretch_their_labels(tmp_path, bits):
    write_png(tmp_path / "few.png", 8 // bits, bits, 0, bytes([1]))  # the last pixel is label 1
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
        images = torch.zeros(10)

        def __len__(self):
            return 10

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
    for_val = [name for name in truth if hashlib.sha256(name.encode()).digest()[0] < 51]
    said = capsys.readouterr().err
    assert f"val is {len(for_val)} of 10 images, by their names" in said
    assert sets["val"].names == for_val and len(sets["train"]) == 10 - len(for_val)
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
        ("background:0,0,0::\ncat:1,2,333::", "'cat:1,2,333::' is not .* of 0 to 255"),
        ("background:0,0,0::\ncat:0,0,0::", "'cat:0,0,0::' .* its colour is taken"),
        ("cat:1,2,3::", "names no class 'background'"),
        ("background:0,0,0::\ncat:1,2,3::\ncat:4,5,6::", "has 3 lines; it .* different"),
        (
            "background:0,0,0::\n" + "\n".join(f"c{i}:1,2,{i}::" for i in range(255)),
            "has 256 lines; it .* 2 to 255",
        ),
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
    with pytest.raises(
        data.DataError, match="classes.txt: has 2 lines; it should list 2 to 255 different classes"
    ):
        data.VOC(tmp_path, "train", 32)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(data.DataError, match="has no classes.txt; list the classes"):
        data.VOC(tmp_path, "train", 32)


def bare_folder(root, names, images="images", masks="masks", mask="{}.png", classes=True):
    """Write small images and masks of two classes; `mask` is the masks' names."""
    for i, name in enumerate(names):
        image_path, mask_path = root / images / name, root / masks / mask.format(Path(name).stem)
        for path in (image_path, mask_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if name.lower().endswith("png") else "JPEG"
        Image.new("RGB", (6, 4), (i, i, i)).save(image_path, kind)
        Image.fromarray(np.array([[0, 1, 1]], np.uint8).repeat(4, 0).repeat(2, 1)).save(
            mask_path, "PNG"
        )
    if classes:
        (root / "classes.txt").write_text("background\ncat\n")
    return root


def names_by_split(root):
    return {split: set(data.VOC(root, split, 32).names) for split in ("train", "val")}


def test_an_image_stays_on_its_side_when_others_are_added(tmp_path):
    bare_folder(tmp_path, [f"b{i}.jpg" for i in range(60)])
    before = names_by_split(tmp_path)
    assert len(before["val"]) == 13 and len(before["train"]) == 47  # sha256's first byte below 51
    bare_folder(tmp_path, [f"a{i}.jpg" for i in range(10)])
    after = names_by_split(tmp_path)
    assert before["val"] < after["val"] and before["train"] < after["train"]


def test_neither_side_is_empty(tmp_path):
    # sha256: 03... for y1, 07... for y39, d5... for y27, f5... for y24; a fifth is 33...
    for names, val in ((("y1", "y39"), "y1"), (("y27", "y24"), "y27")):
        root = bare_folder(tmp_path / "".join(names), [f"{name}.jpg" for name in names])
        assert names_by_split(root)["val"] == {val}


def test_names_are_taken_instead_of_lists_and_nothing_is_decoded_before_load(voc):
    chosen = ["val_2", "train_0"]
    dataset = data.load_dataset(voc, "train", 32, names=chosen)
    assert dataset.names == chosen == [path.stem for path in dataset.image_paths]
    later = data.VOC(voc, "train", 32, names=chosen, load=False)
    assert later.images is None and len(later) == 2
    later.load()
    assert torch.equal(later.masks, dataset.masks)
    with pytest.raises(data.DataError, match="gone.jpg: does not exist.*has 8 images, such as tra"):
        data.VOC(voc, "train", 32, names=["gone"])
    assert data.Shapes("val", 32).names[3] == "val_3" and data.Shapes("val", 32).root is None


def test_the_root_is_absolute_and_must_exist(voc, monkeypatch):
    monkeypatch.chdir(voc.parent)
    assert data.VOC("voc", "val", 32).root == (voc / "VOCdevkit/VOC2007").resolve()
    with pytest.raises(
        data.DataError, match=r"/gone: does not exist; give --data a folder, or one of voc2007"
    ):
        data.VOC("gone", "val", 32)


def test_what_a_folder_leaves_in_doubt_is_said(tmp_path, capsys):
    write_folder(tmp_path, "cvat")
    (tmp_path / "classes.txt").write_text("background\nb\na\n")
    (tmp_path / "train.txt").write_text("a1\na2\na1\n")
    (tmp_path / "val.txt").write_text("a3\n")
    assert data.VOC(tmp_path, "train", 32).names == ["a1", "a2"]
    said = capsys.readouterr().err
    assert "are those of labelmap.txt; classes.txt is not read" in said
    assert "train.txt: names images more than once, such as a1: each counts once" in said
    (tmp_path / "val.txt").unlink()
    with pytest.raises(data.DataError, match=rf"{tmp_path}/val.txt: does not exist"):
        data.VOC(tmp_path, "val", 32)


def test_masks_that_may_have_void_for_the_object_are_said_in_training(voc, capsys):
    dataset = data.VOC(voc, "train", 32)
    dataset.masks[3] = torch.where(torch.arange(32) < 5, 0, 255).byte()
    dataset.masks[1] = 0  # background alone is nothing to remark on
    data.remark_on_void(dataset, data.require_labels(dataset))
    said = "at 32x32 1 masks, such as that of train_3, have 0 and 255 alone: void, or an object"
    assert said in capsys.readouterr().err


def test_of_two_vocs_the_one_that_is_taken_is_named(voc, capsys):
    write_voc(voc / "VOCdevkit" / "VOC2012", {"val": 2})
    assert len(data.VOC(voc, "val", 32)) == 3
    said = capsys.readouterr().err
    assert "VOC2007 is taken" in said and f"--data {voc / 'VOCdevkit/VOC2012'}" in said
    assert len(data.VOC(voc / "VOCdevkit/VOC2012", "val", 32)) == 2


def test_a_split_too_large_for_memory_lies_in_a_file_without_a_name(
    voc, tmp_path, monkeypatch, capsys
):
    kept = data.VOC(voc, "train", 32)
    assert capsys.readouterr().err == ""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(data.tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(
        data, "memory_size", lambda: 2 * 4 * 5 * 4 * 32**2
    )  # twice as much as needed
    assert data.VOC(voc, "train", 32) and capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # three processes share it
    mapped = data.VOC(voc, "train", 32)
    assert "split train takes 0.00 GiB, too much for memory: it is kept" in capsys.readouterr().err
    assert torch.equal(mapped.images, kept.images) and torch.equal(mapped.masks, kept.masks)
    for a, b in zip(mapped[[0, 4, 2]], kept[[0, 4, 2]]):
        assert torch.equal(a, b)
    assert list((tmp_path / "temporary").iterdir()) == []
    monkeypatch.setattr(
        data.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 * 4 * 32**2)
    )
    with pytest.raises(data.DataError, match="and for .*temporary; give a smaller --size"):
        data.VOC(voc, "train", 32)


@pytest.mark.parametrize("processes, threads", [(1, 6), (2, 3), (8, 1)])
def test_processes_share_the_cores(voc, monkeypatch, processes, threads):
    asked = []

    class Pool(data.ThreadPoolExecutor):
        def __init__(self, count):
            asked.append(count)
            super().__init__(count)

    monkeypatch.setattr(data, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(data.os, "cpu_count", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    data.VOC(voc, "val", 32)
    assert asked == [threads]


@pytest.mark.parametrize(
    "images, masks, mask",
    [
        ("imgs", "masks", "{}_mask.png"),
        ("imgs", "masks", "{}.png"),
        ("img", "masks_machine", "{}.jpg.png"),
        ("images", "masks", "{}.PNG"),
        ("JPEGImages", "SegmentationClass", "{}.png"),
    ],
)
def test_layouts_of_other_tools(tmp_path, images, masks, mask):
    bare_folder(tmp_path, ["x.1.jpg", "y.2.jpg"], images, masks, mask)
    dataset = data.VOC(tmp_path, names=["y.2", "x.1"], size=32)
    assert [path.name for path in dataset.mask_paths] == [mask.format(n) for n in ("y.2", "x.1")]
    assert [path.name for path in dataset.image_paths] == ["y.2.jpg", "x.1.jpg"]
    assert names_by_split(tmp_path)["train"] | names_by_split(tmp_path)["val"] == {"x.1", "y.2"}


def test_roboflows_exports(tmp_path, capsys):
    for folder, names in (("train", "abcd"), ("valid", "ef"), ("test", "g")):
        files = [f"{name}_jpg.rf.0{name}.jpg" for name in names]
        bare_folder(tmp_path, files, folder, folder, "{}_mask.png", classes=False)
        lines = "Pixel Value, Class\n1, cat, black\n0, background\n"
        (tmp_path / folder / "_classes.csv").write_text(lines)
    (tmp_path / "train" / "b_jpg.rf.0b_mask.png").unlink()
    sets = {split: data.VOC(tmp_path, split, 32) for split in ("train", "val", "test")}
    assert [len(dataset) for dataset in sets.values()] == [4, 2, 1]
    assert sets["val"].names == ["e_jpg.rf.0e", "f_jpg.rf.0f"]
    assert sets["train"].classes == ["background", "cat, black"]
    said = capsys.readouterr().err
    assert "1 of 4 images, such as b_jpg.rf.0b, have no mask: they are all background" in said
    assert [mask.max().item() for mask in sets["train"].masks] == [1, 0, 1, 1]
    assert sets["train"].full_mask(1).shape == (4, 6) and not sets["train"].full_mask(1).any()
    one = names_by_split(tmp_path / "train")
    assert one["train"] | one["val"] == set(sets["train"].names) and not one["train"] & one["val"]
    (tmp_path / "train" / "_classes.csv").write_text("Pixel Value, Class\n0, background\n2, cat\n")
    with pytest.raises(data.DataError, match="_classes.csv: has 2 lines; it should list"):
        data.VOC(tmp_path, "train", 32)
    (tmp_path / "train" / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, dog\n")
    with pytest.raises(data.DataError, match="has other classes than .*export them together"):
        data.VOC(tmp_path, "train", 32)
    for path in (tmp_path / "valid").glob("*.*g"):
        path.unlink()
    (tmp_path / "train" / "_classes.csv").write_text(lines)
    with pytest.raises(data.DataError, match="valid: has no images; export the data set again"):
        data.VOC(tmp_path, "val", 32)


def test_a_roboflow_list_among_the_images_changes_no_split(tmp_path):
    bare_folder(tmp_path, [f"{name}.jpg" for name in "abcdef"])
    before = names_by_split(tmp_path)
    (tmp_path / "images" / "_classes.csv").write_text("Pixel Value, Class\n0, a\n1, b\n")
    assert names_by_split(tmp_path) == before


def test_cvat_writes_no_mask_for_an_image_that_shows_nothing(tmp_path, capsys):
    write_folder(tmp_path, "cvat")
    (tmp_path / "SegmentationClass" / "a3.png").unlink()
    names = [f"a{i}" for i in range(10)]
    masks = data.VOC(tmp_path, "train", 32, names).masks
    assert "1 of 10 images, such as a3, have no mask" in capsys.readouterr().err
    assert not masks[3].any() and masks.any(2).any(1).sum() == 9
    with pytest.raises(
        data.DataError, match="a3.png: does not exist, but is needed .*; nor does a3_m"
    ):
        data.VOC(tmp_path, "train", 32, ["a3"])  # where all lack theirs, something else is wrong


def test_masks_without_an_image_are_counted(tmp_path, capsys):
    bare_folder(tmp_path, ["x.jpg", "y.jpg", "z.jpg"])
    (tmp_path / "images" / "z.jpg").unlink()
    assert names_by_split(tmp_path)["train"] | names_by_split(tmp_path)["val"] == {"x", "y"}
    assert capsys.readouterr().err.count("1 masks have no image, such as z.png") == 1


def test_masks_that_are_no_png_are_named(tmp_path):
    bare_folder(tmp_path, ["x.jpg", "y.jpg"])
    for path in (tmp_path / "masks").iterdir():
        path.rename(path.with_suffix(".gif"))
    with pytest.raises(data.DataError, match=r"has .*masks/\*.gif, but .*save masks as PNG"):
        data.VOC(tmp_path, "train", 32)


@pytest.mark.parametrize(
    "line",
    [
        "{}.jpg",
        "images/{}.jpg masks/{}.png",
        "images\\{}.jpg",
        "/home/me/images/{}.jpg",
        "./{}",
        "{} 1",
    ],
)
def test_lists_as_people_write_them(tmp_path, line):
    decomposed = unicodedata.normalize("NFD", "day1/Gläser 7")
    names = ["day1/a.0", "day2/a.0", "day1/Gläser 7"]
    for name in ("day1/a.0", "day2/a.0", decomposed):
        mask = name.rpartition("/")[0] + "/{}.png"
        bare_folder(tmp_path, [f"{name}.jpg"], mask=mask)
    if " " in line:
        names = names[:2]  # a space in a name leaves open where the second column begins
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    text = "".join(line.format(name, name) + "\n" for name in names)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text(text, encoding="utf-8")
    dataset = data.VOC(tmp_path, "train", 32)
    assert dataset.names == names and len(dataset.images) == len(names)
    with pytest.raises(data.DataError, match="val.txt: does not exist.* beside it lie train"):
        data.VOC(tmp_path, "val", 32)


def test_hidden_files_are_no_images_and_endings_may_be_capitals(tmp_path):
    bare_folder(tmp_path, ["x.JPG", "y.jfif", "z.PNG"])
    for name in ("images/._x.JPG", "images/.DS_Store", "masks/._x.png"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "images" / ".thumbs").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / ".thumbs" / "x.png")
    assert [p.name for p in data.image_files(tmp_path / "images")] == ["x.JPG", "y.jfif", "z.PNG"]
    names = names_by_split(tmp_path)
    assert names["train"] | names["val"] == {"x", "y", "z"}


def test_two_images_of_one_name_are_refused_where_the_name_is_used(tmp_path):
    bare_folder(tmp_path, ["x.jpg", "y.jpg"])
    Image.new("RGB", (6, 4)).save(tmp_path / "images" / "x.png")
    assert len(data.VOC(tmp_path, names=["y"], size=32)) == 1
    with pytest.raises(data.DataError, match="images/x.jpg: x.png has its name too"):
        data.VOC(tmp_path, names=["x"], size=32)


def test_colors_decide_where_a_palette_was_put_in_another_order(tmp_path, capsys):
    truth = write_folder(tmp_path, "cvat")
    for path in (tmp_path / "SegmentationClass").iterdir():
        rgb = Image.open(path)
        palette = rgb.quantize(256)
        assert np.array_equal(np.array(palette.convert("RGB")), np.array(rgb))
        palette.save(path)
    names = list(truth)
    dataset = data.VOC(tmp_path, "train", 32, names)
    for index, name in enumerate(names):
        assert np.array_equal(dataset.full_mask(index), truth[name])
    assert capsys.readouterr().err.count("palettes are read by their colours") == 1


def test_a_palettes_color_without_a_name_is_refused_where_others_have_one(tmp_path):
    write_folder(tmp_path, "cvat")
    path = tmp_path / "SegmentationClass" / "a3.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0] = 9, 9, 9
    Image.fromarray(pixels).quantize(256).save(path)
    with pytest.raises(data.DataError, match=r"a3.png: has 1 pixels in 1 .* \(1 of \(9, 9, 9\)\)"):
        data.VOC(tmp_path, "train", 32, ["a3"])


def test_the_look_over_sees_palettes_that_disagree(tmp_path, capsys):
    bare_folder(tmp_path, [f"p{i}.jpg" for i in range(6)])
    for folder, mixed in ((tmp_path, False), (tmp_path, True)):
        for path in (folder / "masks").iterdir():
            mask = Image.fromarray(np.array(Image.open(path)))
            in_val = mixed and path.stem in data.VOC(folder, "val", 32).names
            mask.putpalette([0, 0, 0, *((0, 250, 0) if in_val else (250, 0, 0))])
            mask.save(path)
        assert call(data, "--data", folder, "--size", 32) == 0
        said = "the masks' palettes disagree on the colour of 1: mixed up?"
        assert (said in capsys.readouterr().out) == mixed


def test_class_lists_of_other_tools(tmp_path):
    bare_folder(tmp_path, ["x.jpg", "y.jpg"])
    (tmp_path / "classes.txt").write_text("# mine\n__ignore__\n_background_\n#cat\n")
    assert data.read_classes(tmp_path)[0] == ["_background_", "#cat"]
    (tmp_path / "labelmap.txt").write_text("background:0,0,0::\nhead:left:9,8,7:a,b:c\n")
    classes, palette, colors = data.read_classes(tmp_path)
    assert classes == ["background", "head:left"] and palette[1] == [9, 8, 7]
    assert colors == {(0, 0, 0): 0, (9, 8, 7): 1}


def test_labels_that_nothing_can_be_learned_from_are_refused(tmp_path):
    bare_folder(tmp_path, ["x.jpg", "y.jpg"])
    for values, said in (
        ([0, 255], r"void \(255\) at 32x32: no object, or one that is marked with 255"),
        ([255], "no pixel with a la"),
    ):
        for path in (tmp_path / "masks").iterdir():
            Image.fromarray(np.resize(np.array(values, np.uint8), (4, 6))).save(path)
        for split in ("train", "val"):
            with pytest.raises(data.DataError, match=said):
                data.require_labels(data.VOC(tmp_path, split, 32))
        assert data.main(["--data", str(tmp_path), "--size", "32"]) == 1
    data.require_labels(data.Shapes("val", 32))


# ---------------------------------------------------------------------------------- look-over


def look(root, capsys, *flags):
    """Return (exit status, what is printed) of the script."""
    status = data.main(["--data", str(root), "--size", "32", *flags])
    return status, capsys.readouterr().out


def test_the_look_over_names_an_image_whose_objects_may_be_void(tmp_path, capsys):
    bare_folder(tmp_path, [f"n{i}.jpg" for i in range(3)])
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("n0\nn1\nn2\n")
    Image.fromarray(np.array([[0, 255]], np.uint8).repeat(4, 0).repeat(3, 1)).save(
        tmp_path / "masks/n1.png"
    )
    status, printed = look(tmp_path, capsys)
    assert status == 0 and printed.count("1 masks, such as that of n1, have 0 and 255 alone") == 2


def test_the_look_over_names_classes_that_vanish_and_what_class_0_is(tmp_path, capsys):
    names = [f"n{i}.jpg" for i in range(3)]
    bare_folder(tmp_path, names)
    for name in names:
        mask = np.zeros((320, 320), np.uint8)
        mask[:160], mask[:32, :80] = 1, 255
        mask[200, 200:203] = 2 if name != "n0.jpg" else 0  # 32 of 320 rows are left: not this one
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name[:-4]}.png")
        Image.new("RGB", (320, 320)).save(tmp_path / "images" / name)
    (tmp_path / "classes.txt").write_text("road\ncat\nwire\ncar\n")
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("n0\nn1\nn2\n")
    status, printed = look(tmp_path, capsys, "--splits", "train")
    assert status == 0 and "nothing that training would refuse" in printed
    assert "split train, 3 images, at 32x32" in printed
    rows = {line.partition(" ")[0]: line.split()[1:] for line in printed.splitlines() if line}
    assert " ".join(rows["wire"]).startswith("0 0.000 vanishes from 2 of 2: a larger --size")
    # 16 of 32 rows each, cat's less 3 x 8 of void: 488 of 1000 labelled pixels, and 24 of 1024.
    assert rows["road"] == ["3", "51.200"] and rows["cat"] == ["3", "48.800"]
    assert rows["car"] == ["0", "0.000"]
    assert "void: 2.3% of all" in printed
    assert "class 0 is road; if 0 means background, list background first" in printed


def test_the_look_over_survives_data_of_which_nothing_can_be_read(tmp_path, capsys):
    bare_folder(tmp_path, ["x.jpg", "y.jpg"])
    for path in (tmp_path / "masks").iterdir():
        Image.new("LA", (6, 4)).save(path)
    status, printed = look(tmp_path, capsys)
    assert status == 1 and "to mend before training (2):" in printed
    assert "train: " in printed and printed.count("is a mask of kind LA PNG") == 2
    status, printed = look(tmp_path / "gone", capsys)
    assert status == 1 and "gone: does not exist" in printed


def test_the_look_over_sees_images_that_exif_data_turn(tmp_path, capsys):
    for root, size, orientation in (
        ("side", (6, 4), 6),
        ("head", (6, 4), 3),
        ("square", (4, 4), 6),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        bare_folder(tmp_path / root, ["x.jpg", "y.jpg"])
        for name in "xy":
            Image.new("RGB", size).save(tmp_path / root / f"images/{name}.jpg", exif=exif)
            mask = Image.fromarray(np.resize(np.array([0, 1], np.uint8), size[::-1]))
            mask.save(tmp_path / root / f"masks/{name}.png")
        status, printed = look(tmp_path / root, capsys)
        if root == "side":
            assert status == 1
            assert printed.count("is 6x4, but its image, turned upright, is 4x6") == 2
        else:
            assert status == 0 and printed.count("EXIF data turn or mirror 1 images, such as ") == 2


def test_data_can_be_copied_out_alone():
    nodes = ast.parse(Path(data.__file__).read_text()).body
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert "torch" in names and not names & {"utils", "models", "matplotlib", "torchvision"}


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
    assert len(val) == 3 and val.root == (archives / "data/VOCdevkit/VOC2012").resolve()
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
    copy = tarfile.copyfileobj
    for whole in range(6):  # 3 images and 3 masks; a list, the sign of the end, is written at once
        left = iter([copy] * whole)

        def interrupted(source, target, *args, left=left, **kwargs):
            if part := next(left, None):
                return part(source, target, *args, **kwargs)
            target.write(source.read(3))
            raise KeyboardInterrupt

        shutil.rmtree(archives / "data", ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(tarfile, "copyfileobj", interrupted)
            with pytest.raises(KeyboardInterrupt):
                data.download_voc("data", "2007", "train")
        assert len(data.load_dataset("voc2007", "train", 32)) == 2


def test_processes_that_ask_for_an_archive_in_turn_fetch_it_once(archives, monkeypatch, capsys):
    monkeypatch.chdir(archives)
    folders = {data.download_voc("data", "2007", split) for split in ("train", "val", "train")}
    assert folders == {Path("data/VOCdevkit/VOC2007")}
    assert capsys.readouterr().err.count("downloading") == 1


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


@pytest.mark.parametrize("python", ["today's", "Debian 12's"])
@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/outside-of-the-folder.txt"])
def test_an_archive_with_paths_outside_the_folder_is_refused(archives, monkeypatch, name, python):
    monkeypatch.chdir(archives)
    if python == "Debian 12's":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
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


def test_names_that_are_not_utf_8_are_names(tmp_path):
    write_folder(tmp_path, "plain", count=4)
    for folder, ending in (("images", ".jpg"), ("masks", ".png")):
        path = tmp_path / folder / f"a1{ending}"
        path.rename(tmp_path / folder / os.fsdecode(b"caf\xe9" + ending.encode()))
    sets = [data.VOC(tmp_path, split, size=32) for split in ("train", "val")]
    assert sum(len(dataset) for dataset in sets) == 4


def test_splits_that_lie_in_folders_or_in_lists_beside_them(tmp_path):
    names = {"train": ["a", "b", "c"], "val": ["d", "e"]}
    for part, stems in names.items():
        bare_folder(tmp_path / "lists", [f"{stem}.jpg" for stem in stems])
        (tmp_path / f"lists/{part}.txt").write_text("\n".join(stems))
        files = [f"{part}/{stem}.jpg" for stem in stems]
        bare_folder(tmp_path / "folders", files, mask=f"{part}/{{}}.png")
    for part, stems in names.items():
        assert data.VOC(tmp_path / "lists", part, 32).names == stems
        found = data.VOC(tmp_path / "folders", part, 32).names
        assert found == [f"{part}/{stem}" for stem in stems]
    with pytest.raises(data.DataError, match="trian.txt: does not exist"):
        data.VOC(tmp_path / "folders", "trian", 32)


@pytest.mark.parametrize(
    "folders",
    [
        ("training/", "validation/", "testing/"),
        ("Train/", "Valid/", "Test/"),
        ("train_set/", "validate/", "Test-Set/"),
        ("", "val/", "test/"),
        ("train/", None, "test/"),
        ("", None, "testing/"),
    ],
)
def test_folders_of_splits_are_never_mixed(tmp_path, folders):
    truth = {}
    for split, folder, stems in zip(("train", "val", "test"), folders, ("abcdef", "gh", "ijk")):
        truth[split] = {f"{folder}{stem}" for stem in stems} if folder is not None else set()
        files = [f"{name}.jpg" for name in truth[split]]
        bare_folder(tmp_path, files, mask=f"{folder or ''}{{}}.png")
    every = set.union(*truth.values())
    for listed in (False, True):  # CVAT lists a task's images, whatever folders they are in
        if listed and not truth["val"]:
            (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
            (tmp_path / "ImageSets/Segmentation/default.txt").write_text("\n".join(every))
        names = {split: set(data.VOC(tmp_path, split, 32).names) for split in truth}
        assert names["test"] == truth["test"]
        if truth["val"]:
            assert names == truth
        else:  # a part of the rest is for validation
            assert names["train"] | names["val"] == truth["train"] and names["train"]
            assert names["val"] and not names["train"] & names["val"]
    assert set(data.VOC(tmp_path, folders[2].strip("/"), 32).names) == truth["test"]


@pytest.mark.parametrize(
    ("folder", "lists"),
    [
        ("", {"test": "defg"}),
        ("ImageSets/Segmentation/", {"test": "defg"}),
        ("ImageSets/Segmentation/", {"trainval": "abc", "test": "defg"}),
        ("ImageSets/Segmentation/", {"Train": "ab", "Validation": "c", "Test": "defg"}),
    ],
)
def test_what_a_test_list_names_is_not_learned_from(tmp_path, folder, lists):
    bare_folder(tmp_path, [f"{name}.jpg" for name in "abcdefg"])
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    for name, images in lists.items():
        (tmp_path / folder / f"{name}.txt").write_text("\n".join(images))
    found = {split: data.VOC(tmp_path, split, 32).names for split in ("train", "val", "test")}
    assert found["test"] == list("defg") and sorted(found["train"] + found["val"]) == list("abc")
    assert found["train"] and found["val"]
    if "Train" in lists:
        assert found["train"] == ["a", "b"]


def test_a_test_list_beside_a_folder_for_val_is_not_learned_from(tmp_path):
    bare_folder(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    bare_folder(tmp_path, ["val/d.jpg"], mask="val/{}.png")
    (tmp_path / "test.txt").write_text("c\n")
    found = [data.VOC(tmp_path, split, 32).names for split in ("train", "val", "test")]
    assert found == [["a", "b"], ["val/d"], ["c"]]


def test_folders_that_are_no_splits_are_named_where_they_are_shared_out(tmp_path, capsys):
    for part in ("dev", "eval"):
        bare_folder(tmp_path, [f"{part}/{name}.jpg" for name in "abc"], mask=f"{part}/{{}}.png")
    sets = [data.VOC(tmp_path, split, 32) for split in ("train", "val")]
    assert sum(map(len, sets)) == 6 and "of 6 images in dev, eval, by" in capsys.readouterr().err


def test_folders_may_be_links(tmp_path):
    bare_folder(tmp_path / "own", ["a.jpg", "b.jpg"])
    bare_folder(tmp_path / "other", ["c.jpg", "d.jpg"])
    for part in ("images", "masks"):
        (tmp_path / "own" / part / "more").symlink_to(tmp_path / "other" / part)
    train, val = (data.VOC(tmp_path / "own", split, 32).names for split in ("train", "val"))
    assert sorted(train + val) == ["a", "b", "more/c", "more/d"]


def test_a_mask_is_turned_as_its_own_exif_data_say(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = np.array([[0, 1], [2, 255]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.array(data.load_mask(tmp_path / "turned.png", 3)), pixels[::-1, ::-1])


def test_photos_may_be_called_like_splits(tmp_path):
    bare_folder(tmp_path, [f"{name}.jpg" for name in ("train", "val", "a", "b", "c")])
    assert sum(len(data.VOC(tmp_path, split, 32)) for split in ("train", "val")) == 5


def test_the_look_over_counts_an_image_that_is_listed_twice_in_one_split_once(tmp_path, capsys):
    bare_folder(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "train.txt").write_text("a\na\n")
    (tmp_path / "val.txt").write_text("b\n")
    assert data.main(["--data", str(tmp_path), "--size", "32"]) == 0
    assert "0 images are in more than one of these splits" in capsys.readouterr().out
