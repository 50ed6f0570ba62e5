"""VOC-layout folders, a drawn data set, and what is done to a batch on its way to the network.

train = VOC("data", "train", size=224)       # decoded and resized once, kept as uint8
image, mask = train[0]                       # uint8 (3, 224, 224) and (224, 224)
images, masks = train[[0, 5, 7]]             # a list of indices gives a whole batch
images, masks = augment(images, masks)       # another random transform for each sample
logits = model(normalize(images))
"""

import colorsys
import contextlib
import math
import os
import socket
import struct
import sys
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.nn import functional as F
from torch.utils.data import Dataset

TIMEOUT = 30  # seconds for which a download waits for a silent host
VOID = 255  # the mask value that counts neither in the loss nor in a score
# fmt: off
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)
# fmt: on
# ImageNet's, which pretrained encoders expect; as good as any other for training from scratch.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file and the remedy."""


def color_map(n):
    """VOC's colours for the classes 0 to n - 1, as a list of [red, green, blue] from 0 to 255.

    The bits of the class index are dealt to red, green and blue in turn, from the highest bit of
    each colour down (the VOC development kit's VOClabelcolormap).
    """
    return [
        [sum((i >> (3 * j + c) & 1) << (7 - j) for j in range(3)) for c in range(3)]
        for i in range(n)
    ]


@contextlib.contextmanager
def _open(path, what):
    """Open a picture file; whatever Pillow raises on a broken one becomes a DataError."""
    try:
        with Image.open(path) as image:
            # A phone's MPO holds smaller versions of the same photograph behind the first.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise DataError(
                    f"{path}: has {image.n_frames} frames; save one of them as the {what}"
                )
            yield image
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise DataError(f"{path}: has more than {limit:,} pixels; shrink it first") from error
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as an {what} ({error}); replace it") from error


def load_image(path):
    """Return the image file as a PIL image in mode RGB, turned upright as its EXIF data says.

    Raises DataError where the file is not a readable image, or has several frames.
    """
    with _open(path, "image") as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def load_mask(path, num_classes):
    """Return the mask file as a PIL image of class indices, as they are stored in the file.

    A palette PNG gives its indices (its colours are only for looking at), a grayscale PNG its
    grey values. Raises DataError for any other kind of file, whose values are no class indices,
    and for a value that is neither a class (0 to num_classes - 1) nor void (255).
    """
    with _open(path, "image of labels") as file:
        kind = f"{file.mode} {file.format}"
        if kind == "L PNG" and file.tile[0][3] != "L":
            kind = "2- or 4-bit grayscale PNG"  # Pillow stretches its values to 0 to 255
        mask = file.copy()
    if kind not in ("P PNG", "L PNG"):
        raise DataError(
            f"{path}: is a mask of kind {kind}; save masks as palette or 8-bit grayscale PNG "
            "whose values are class indices"
        )
    labels = np.asarray(mask)
    found = np.bincount(labels.ravel(), minlength=256)
    wrong = [int(value) for value in np.flatnonzero(found) if num_classes <= value != VOID]
    if wrong:
        y, x = np.argwhere(labels == wrong[0])[0]
        raise DataError(
            f"{path}: has the values {', '.join(map(str, wrong))} (the first at column {x}, row "
            f"{y}), but the {num_classes} classes are 0 to {num_classes - 1} and void is {VOID}; "
            "mend the mask or list the classes in classes.txt"
        )
    return mask


def to_tensor(image, size):
    """Return a PIL image, squeezed to size x size, as a uint8 tensor: (3, S, S), or (S, S) for a mask.

    Images are resized with a bilinear filter that covers all pixels, masks by nearest neighbour.
    """
    is_image = image.mode == "RGB"
    resampling = Image.Resampling.BILINEAR if is_image else Image.Resampling.NEAREST
    array = np.array(image.resize((size, size), resampling))
    return torch.from_numpy(array.transpose(2, 0, 1) if is_image else array)


def _read_lines(path):
    # utf-8-sig drops the byte-order mark that Windows editors put in front.
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    return [line for line in lines if line]


class VOC(Dataset):
    """A split of a folder in the layout of PASCAL VOC, decoded and resized once, in memory.

    `root` holds `JPEGImages/`, `SegmentationClass/` and `ImageSets/Segmentation/SPLIT.txt`, or
    else `VOCdevkit/VOC2007/` with these three. A file `classes.txt` there names the classes, one
    a line, background first; without it they are VOC's 21. Images may be JPEG or PNG.

    Gives `(image, mask)`, uint8 (3, S, S) and (S, S); a list of indices gives a stacked batch.
    Mask values are class indices, or 255 for void. `workers` threads decode (default: all cores).
    Raises DataError, naming the file, for whatever is missing or unreadable.
    """

    def __init__(self, root, split="train", size=224, workers=None):
        self.root = Path(root)
        if (self.root / "VOCdevkit" / "VOC2007").is_dir():
            self.root = self.root / "VOCdevkit" / "VOC2007"
        self.split, self.size = split, size
        named = self.root / "classes.txt"
        self.classes = _read_lines(named) if named.exists() else list(VOC_CLASSES)
        self.palette = color_map(len(self.classes))
        self.image_paths, self.mask_paths = self._find_files()

        self.images = torch.empty(len(self.image_paths), 3, size, size, dtype=torch.uint8)
        self.masks = torch.empty(len(self.image_paths), size, size, dtype=torch.uint8)
        # Threads are enough: Pillow lets go of the interpreter while it decodes and resizes.
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            list(pool.map(self._load, range(len(self))))

    def _find_files(self):
        for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            if not (self.root / folder).is_dir():
                raise DataError(
                    f"{self.root}: has no folder {folder}; give --data a folder that holds "
                    "VOCdevkit/VOC2007, or JPEGImages, SegmentationClass and ImageSets/Segmentation"
                )
        split_file = self.root / "ImageSets" / "Segmentation" / f"{self.split}.txt"
        if not split_file.exists():
            raise DataError(f"{split_file}: does not exist; it should list the split's images")
        names = _read_lines(split_file)
        if not names:
            raise DataError(f"{split_file}: lists no images")
        images = {path.stem: path for path in sorted((self.root / "JPEGImages").iterdir())}
        masks = {name: self.root / "SegmentationClass" / f"{name}.png" for name in names}
        for name in names:
            if name not in images:
                raise DataError(f"{self.root / 'JPEGImages'}: has no image '{name}' ({split_file})")
            if not masks[name].exists():
                raise DataError(f"{masks[name]}: does not exist, but {split_file} lists it")
        return [images[name] for name in names], [masks[name] for name in names]

    def _load(self, index):
        image = load_image(self.image_paths[index])
        mask = load_mask(self.mask_paths[index], len(self.classes))
        if image.size != mask.size:
            raise DataError(
                f"{self.mask_paths[index]}: is {mask.width}x{mask.height}, but its image is "
                f"{image.width}x{image.height}; export the mask again at the image's size"
            )
        self.images[index] = to_tensor(image, self.size)
        self.masks[index] = to_tensor(mask, self.size)

    def full_mask(self, index):
        """Return the mask at its image's own resolution, uint8 (H, W)."""
        mask = load_mask(self.mask_paths[index], len(self.classes))
        return torch.from_numpy(np.array(mask))

    def __len__(self):
        return len(self.image_paths)

    def __getitem__(self, index):
        return self.images[index], self.masks[index]


class Shapes(Dataset):
    """Drawn images of circles, squares, triangles and stars: real training with no download.

    Size, place, angle, colour, background, overlap and noise vary; each class leans to a hue of
    its own, so that a network learns it in a minute. The same `split`, `seed` and index always
    give the same picture. Gives what `VOC` gives. Raises DataError for an unknown split.
    """

    def __init__(self, split="train", size=64, seed=0):
        splits = {"train": 600, "val": 100, "test": 100}
        if split not in splits:
            raise DataError(f"shapes has no split '{split}'; choose from {', '.join(splits)}")
        self.split, self.size = split, size
        self.classes = ["background", "circle", "square", "triangle", "star"]
        self.palette = color_map(len(self.classes))
        stream = list(splits).index(split)
        pairs = [
            draw_shapes(np.random.default_rng([seed, stream, index]), size)
            for index in range(splits[split])
        ]
        self.images = torch.stack([to_tensor(image, size) for image, _ in pairs])
        self.masks = torch.stack([to_tensor(mask, size) for _, mask in pairs])

    def full_mask(self, index):
        """Return the mask, uint8 (S, S): drawn images have no other resolution."""
        return self.masks[index]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.masks[index]


def draw_shapes(rng, size):
    """Draw one picture of one to four shapes; return (RGB image, mask), both PIL and size x size."""
    canvas = 4 * size  # drawn four times as large, then shrunk: smooth edges
    corners = rng.integers(30, 226, (2, 2, 1)) + rng.integers(-30, 31, (2, 2, 3))
    image = Image.fromarray(corners.clip(0, 255).astype(np.uint8))  # a blend of four dull colours
    image = image.resize((canvas, canvas), Image.Resampling.BILINEAR)
    mask = Image.new("L", (canvas, canvas))
    for _ in range(rng.integers(1, 5)):
        label = int(rng.integers(1, 5))
        corner_count, relative_size = {1: (60, 1), 2: (4, 1.25), 3: (3, 1.55), 4: (10, 1.55)}[label]
        turn = 2 * math.pi * (rng.uniform() + np.arange(corner_count) / corner_count)
        radius = canvas * rng.uniform(0.1, 0.26) * relative_size
        if label == 4:
            radius = radius * np.where(np.arange(corner_count) % 2, 0.45, 1.0)  # a star's notches
        center = rng.uniform(0.15 * canvas, 0.85 * canvas, 2)
        outline = center + (radius * np.stack([np.cos(turn), np.sin(turn)])).T
        hue = (label / 4 + rng.normal(0, 0.07)) % 1
        rgb = colorsys.hsv_to_rgb(hue, rng.uniform(0.6, 1), rng.uniform(0.5, 1))
        points = [tuple(point) for point in outline]
        ImageDraw.Draw(image).polygon(points, fill=tuple(int(255 * value) for value in rgb))
        ImageDraw.Draw(mask).polygon(points, fill=label)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32)
    pixels = pixels + rng.normal(0, rng.uniform(0, 20), pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image, mask.resize((size, size), Image.Resampling.NEAREST)


def load_dataset(name, split, size, workers=None):
    """Return the data set that a script's --data names: `shapes`, `voc2007` or a folder.

    `voc2007` is `data/VOCdevkit/VOC2007`, downloaded there first where it is missing.
    """
    if name == "shapes":
        return Shapes(split, size)
    if name == "voc2007":
        name = download_voc2007("data", split)
    return VOC(name, split, size, workers)


def download_voc2007(root, split):
    """Make sure that `root`/VOCdevkit/VOC2007 holds the split; return `root`.

    Only the archive that has the split is fetched (train, val and trainval share one, test has its
    own), only where the split's files are missing, and its md5 is checked.
    Raises DataError with the address, the md5 and the place to put the file by hand.
    """
    folder = Path(root, "VOCdevkit", "VOC2007")
    split_file = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    # Is there while an archive is unpacked: files may be cut short, so it is unpacked again.
    unfinished = Path(root, f"unfinished-{'test' if split == 'test' else 'trainval'}")
    if (
        not unfinished.exists()
        and split_file.exists()
        and all(
            (folder / "JPEGImages" / f"{name}.jpg").exists()
            and (folder / "SegmentationClass" / f"{name}.png").exists()
            for name in _read_lines(split_file)
        )
    ):
        return root
    if split not in ("train", "val", "trainval", "test"):
        raise DataError(f"VOC 2007 has no split '{split}'; it has train, val, trainval and test")

    from torchvision.datasets import voc  # here, because it takes seconds to import

    source = voc.DATASET_YEAR_DICT["2007-test" if split == "test" else "2007"]
    print(f"downloading {source['url']} to {root}/", file=sys.stderr)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(TIMEOUT)  # else torchvision waits for a silent host for ever
        # Refuse paths that lead out of the folder, as newer versions of torchvision do themselves.
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
        voc.VOCSegmentation(root, year="2007", image_set=split, download=True)
    except (OSError, RuntimeError, HTTPException, tarfile.TarError) as error:
        raise DataError(
            f"{source['url']}: cannot be downloaded ({error}); fetch it by other means, save it "
            f"as {Path(root, source['filename'])} (md5 {source['md5']}) and run this again"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    unfinished.unlink()
    return root


def normalize(images):
    """Return uint8 images (N, 3, H, W), 0 to 255, as float32 with ImageNet's mean 0 and deviation 1."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images / 255 - mean) / std


def augment(images, masks, mode="affine"):
    """Give each sample of a batch another random transform, the same one to its image and mask.

    images: uint8 (N, 3, H, W); masks: uint8 (N, H, W); returns the like, on the same device.
    Mode `flip` mirrors left-right and top-bottom, each for half of the samples (the paper's).
    Mode `affine` mirrors left-right alone, since photographs have an up, then rotates by up to
    15 degrees, scales by 0.7 to 1.6, shears by up to 0.1 and shifts by up to an eighth. Images
    are sampled once, bilinearly, masks by nearest neighbour at the very same points; what comes
    from outside the picture is void in the mask and the mean colour in the image.
    """
    n, height, width = masks.shape
    device = images.device

    def uniform(low, high):
        return torch.rand(n, device=device) * (high - low) + low

    def coin():
        return torch.randint(0, 2, (n,), device=device) * 2.0 - 1.0

    mirror_x, mirror_y = coin(), coin()
    angle = shear = shift_x = shift_y = torch.zeros(n, device=device)
    zoom = torch.ones(n, device=device)
    if mode == "affine":
        mirror_y = torch.ones(n, device=device)
        angle = uniform(-15, 15).deg2rad()
        zoom = torch.exp2(uniform(math.log2(0.7), math.log2(1.6)))
        shear = uniform(-0.1, 0.1)
        shift_x, shift_y = (
            uniform(-0.25, 0.25),
            uniform(-0.25, 0.25),
        )  # an image is 2 wide here
    elif mode != "flip":
        raise ValueError(f"no augmentation is called '{mode}'; choose from flip, affine")

    # For each sample the matrix that takes a point of the output to the input point it shows:
    # mirror, then shear, rotate and scale, then shift, in coordinates from -1 to 1.
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    aspect = width / height
    matrix = torch.stack(
        [
            torch.stack([mirror_x * cos, mirror_y * (shear * cos - sin) / aspect, shift_x], 1),
            torch.stack([mirror_x * sin * aspect, mirror_y * (shear * sin + cos), shift_y], 1),
        ],
        dim=1,
    )
    grid = F.affine_grid(matrix, (n, 3, height, width), align_corners=False)
    # grid_sample fills with 0 outside, so 0 is made to stand for the mean colour, and for void.
    mean = 255 * torch.tensor(MEAN, device=device).view(3, 1, 1)
    images = F.grid_sample(images - mean, grid, mode="bilinear", align_corners=False) + mean
    masks = F.grid_sample(masks[:, None] - 255.0, grid, mode="nearest", align_corners=False) + 255
    return images.round().clamp(0, 255).byte(), masks[:, 0].round().byte()


def class_weights(dataset, scheme):
    """Return a float32 weight for each class, (C,), for a loss that should heed rare classes.

    With p(c) the share of class c among the pixels of `dataset.masks` that are not void:

    `inverse`: 1 / (C p(c)), the paper's; C counts the classes that occur. A pixel weighs 1 on average.
    `median`: median of f / f(c), where f(c) is c's share of the pixels of those images that show c
        (Eigen and Fergus 2015, Predicting Depth, Surface Normals and Semantic Labels, section 4.3.3).
    `enet`: 1 / ln(1.02 + p(c)), between 1.4 and 50.5 (Paszke et al. 2016, ENet, section 5.2).

    A class that never occurs would get an infinite weight from the first two: it gets 1, which
    changes nothing in training and lets its pixels count in a validation loss. ENet's is finite.
    """
    num_classes = len(dataset.classes)
    counts = torch.stack(
        [torch.bincount(mask.flatten(), minlength=256)[:num_classes] for mask in dataset.masks]
    ).double()  # (images, classes)
    pixels = counts.sum(0)
    share = pixels / pixels.sum()
    if scheme == "inverse":
        weights = 1 / ((pixels > 0).sum() * share)
    elif scheme == "median":
        pixels_where_present = (counts.sum(1, keepdim=True) * (counts > 0)).sum(0)
        share_where_present = pixels / pixels_where_present
        weights = share_where_present[pixels > 0].quantile(0.5) / share_where_present
    elif scheme == "enet":
        weights = 1 / torch.log(1.02 + share)
    else:
        raise ValueError(f"no scheme is called '{scheme}'; choose from inverse, median, enet")
    if scheme != "enet":
        weights[pixels == 0] = 1
    return weights.float()
