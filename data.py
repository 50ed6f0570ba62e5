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
VOID_COLOR = (224, 224, 192)  # VOC's, for void in masks that are coloured instead of indexed
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
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


def load_mask(path, num_classes, colors=None):
    """Return the mask file as a PIL image, mode L, of class indices.

    A palette PNG gives the indices that are stored in it (its colours are only for looking at), a
    grayscale PNG its grey values. With `colors`, {(red, green, blue): class}, an RGB PNG gives the
    classes of its colours, and an index stands for a colour by its place in `colors`.
    Raises DataError for any other kind of file, for a value that is neither a class (0 to
    num_classes - 1) nor void (255), and for a colour that is not in `colors`.
    """
    with _open(path, "image of labels") as file:
        kind = f"{file.mode} {file.format}"
        if kind == "L PNG" and file.tile[0][3] != "L":
            kind = "2- or 4-bit grayscale PNG"  # Pillow stretches its values to 0 to 255
        mask = file.copy()
    if colors and kind in ("RGB PNG", "RGBA PNG"):
        return Image.fromarray(_classes_of_colors(path, np.asarray(mask.convert("RGB")), colors))
    if kind not in ("P PNG", "L PNG"):
        raise DataError(
            f"{path}: is a mask of kind {kind}; save masks as palette or 8-bit grayscale PNG "
            "whose values are class indices, or name the colours of RGB masks in labelmap.txt"
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
    if colors:
        table = np.full(256, VOID, np.uint8)
        table[: len(colors)] = list(colors.values())
        labels = table[labels]
    return Image.fromarray(labels)


def _classes_of_colors(path, pixels, colors):
    """Return the classes, uint8 (H, W), of an RGB mask's pixels, uint8 (H, W, 3)."""
    packed = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    found, index, counts = np.unique(packed, return_inverse=True, return_counts=True)
    rgb = [(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in found]
    colors = {VOID_COLOR: VOID} | colors
    unknown = {c: int(n) for c, n in zip(rgb, counts) if c not in colors}
    if unknown:
        some = [f"{n:,} of {c}" for c, n in sorted(unknown.items(), key=lambda item: -item[1])[:3]]
        raise DataError(
            f"{path}: has {sum(unknown.values()):,} pixels in {len(unknown)} colours that "
            f"labelmap.txt does not name ({', '.join(some)}); name them, or mend the mask"
        )
    return np.array([colors[c] for c in rgb], np.uint8)[index.reshape(packed.shape)]


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


def read_classes(root):
    """Return (names, palette, colors) of a data folder's classes, background first.

    From `labelmap.txt` (lines `name:red,green,blue:...`, as CVAT writes it), else `classes.txt` or
    labelme's `class_names.txt` (a name a line); a folder in VOC's layout without any has VOC's 21
    classes. palette: a list of [red, green, blue]; colors: what `load_mask` takes, or None.
    Raises DataError.
    """
    path = root / "labelmap.txt"
    if path.exists():
        colors = {}
        for line in _read_lines(path):
            if line.startswith("#"):
                continue
            try:
                name, rgb = line.split(":")[:2]
                red, green, blue = (int(value) for value in rgb.split(","))
            except ValueError as error:
                raise DataError(f"{path}: '{line}' is not name:red,green,blue") from error
            if (red, green, blue) in colors or not {red, green, blue} <= set(range(256)):
                raise DataError(f"{path}: the colour of '{line}' is taken, or not from 0 to 255")
            colors[red, green, blue] = name
        named = {name.lower(): rgb for rgb, name in colors.items()}
        if "background" not in named:
            raise DataError(f"{path}: names no class 'background'; add background:0,0,0::")
        order = sorted(colors, key=lambda rgb: rgb != named["background"])  # it comes first
        classes, palette = [colors[rgb] for rgb in order], [list(rgb) for rgb in order]
        return classes, palette, {rgb: order.index(rgb) for rgb in colors}
    paths = [path for path in (root / "classes.txt", root / "class_names.txt") if path.exists()]
    if paths:
        classes = _read_lines(paths[0])
    elif (root / "JPEGImages").is_dir():
        classes = list(VOC_CLASSES)
    else:
        raise DataError(
            f"{root}: has no classes.txt; list the classes in it, one a line, background first"
        )
    if not 2 <= len(classes) <= VOID or len(set(classes)) < len(classes):
        raise DataError(f"{paths[0]}: should list 2 to {VOID} different classes, one a line")
    return classes, color_map(len(classes)), None


def split_names(root, split, labelled):
    """Return the names of the images in a split: those that ImageSets/Segmentation/SPLIT.txt lists.

    Where a folder has neither train.txt nor val.txt, every fifth of its images, in an order drawn
    at random but always the same, is for `val`, the others for `train`: of those in default.txt,
    or else of all that are `labelled`, a list of names. Raises DataError.
    """
    folder = root / "ImageSets" / "Segmentation"
    path = folder / f"{split}.txt"
    if path.exists():
        names = _read_lines(path)
        if not names:
            raise DataError(f"{path}: lists no images")
        return names
    if split not in ("train", "val") or any(
        (folder / f"{s}.txt").exists() for s in ("train", "val")
    ):
        raise DataError(f"{path}: does not exist; it should list the split's images")
    path = folder / "default.txt"
    names = sorted(_read_lines(path) if path.exists() else labelled)
    if len(names) < 2:
        raise DataError(f"{root}: has {len(names)} labelled images; training needs 2 at least")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    for_val = set(order[: max(1, len(names) // 5)])
    chosen = [name for i, name in enumerate(names) if (i in for_val) == (split == "val")]
    print(
        f"{root} has no list of its splits: {split} is {len(chosen)} of its {len(names)} images, "
        "drawn at random, the same ones every time",
        file=sys.stderr,
    )
    return chosen


class VOC(Dataset):
    """A split of a folder of images and masks; decoded and resized once, then kept in memory.

    `root` holds `JPEGImages/` and `SegmentationClass/` (VOC's layout; labelme and CVAT write it
    too), or `images/` and `masks/`, or else `VOCdevkit/VOC2007/` (or `VOC2012/`) with these in it.
    An image and its mask have the same name but for the ending. See `read_classes` and
    `split_names` for the classes and the splits.

    Gives `(image, mask)`, uint8 (3, S, S) and (S, S); a list of indices gives a stacked batch.
    Mask values are class indices, or 255 for void. `workers` threads decode (default: all cores).
    With `in_memory=False` the images are decoded each time they are asked for, and
    `images` and `masks`, else the tensors of the whole split, are None.
    Raises DataError, naming the file, for whatever is missing or unreadable.
    """

    def __init__(self, root, split="train", size=224, workers=None, in_memory=True):
        self.root = Path(root)
        for year in ("2007", "2012"):
            if (self.root / "VOCdevkit" / f"VOC{year}").is_dir():
                self.root = self.root / "VOCdevkit" / f"VOC{year}"
        self.split, self.size = split, size
        image_folder, mask_folder = self._find_folders()
        self.classes, self.palette, self.colors = read_classes(self.root)
        images = {
            path.stem: path
            for path in sorted(image_folder.iterdir())
            if path.suffix.lower() in IMAGE_SUFFIXES
        }
        names = split_names(self.root, split, [path.stem for path in mask_folder.glob("*.png")])
        self.image_paths = [images.get(name, image_folder / f"{name}.jpg") for name in names]
        self.mask_paths = [mask_folder / f"{name}.png" for name in names]

        self.images = self.masks = None
        if in_memory:
            self.load(workers)

    def load(self, workers=None):
        """Decode the whole split into memory, with `workers` threads (default: all cores)."""
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        masks = torch.empty(len(self), self.size, self.size, dtype=torch.uint8)

        def load_one(index):
            images[index], masks[index] = self[index]

        # Threads are enough: Pillow lets go of the interpreter while it decodes and resizes.
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            list(pool.map(load_one, range(len(self))))
        self.images, self.masks = images, masks

    def _find_folders(self):
        for images, *masks in (
            ("JPEGImages", "SegmentationClass", "SegmentationClassPNG"),
            ("images", "masks"),
        ):
            # labelme's SegmentationClass may hold .npy files, beside a folder with the PNGs.
            for folder in (self.root / name for name in masks):
                if (self.root / images).is_dir() and next(folder.glob("*.png"), None):
                    return self.root / images, folder
        raise DataError(
            f"{self.root}: has neither JPEGImages/ and SegmentationClass/*.png nor images/ and "
            "masks/*.png; give --data a folder that has, or one that holds VOCdevkit/VOC2007"
        )

    def read(self, index):
        """Return an image and its mask at their own resolution, PIL images of mode RGB and L."""
        for path in (self.image_paths[index], self.mask_paths[index]):
            if not path.exists():
                raise DataError(f"{path}: does not exist, but is needed for split {self.split}")
        image = load_image(self.image_paths[index])
        mask = load_mask(self.mask_paths[index], len(self.classes), self.colors)
        if image.size != mask.size:
            raise DataError(
                f"{self.mask_paths[index]}: is {mask.width}x{mask.height}, but its image is "
                f"{image.width}x{image.height}; export the mask again at the image's size"
            )
        return image, mask

    def full_mask(self, index):
        """Return the mask at its image's own resolution, uint8 (H, W)."""
        mask = load_mask(self.mask_paths[index], len(self.classes), self.colors)
        return torch.from_numpy(np.array(mask))

    def __len__(self):
        return len(self.image_paths)

    def __getitem__(self, index):
        if self.images is not None:
            return self.images[index], self.masks[index]
        if isinstance(index, int):
            return tuple(to_tensor(picture, self.size) for picture in self.read(index))
        images, masks = zip(*(self[int(i)] for i in index))
        return torch.stack(images), torch.stack(masks)


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


def load_dataset(name, split, size, workers=None, in_memory="auto"):
    """Return the data set that a script's --data names: `shapes`, `voc2007`, `voc2012` or a folder.

    The VOCs are `data/VOCdevkit/VOC2007` or `VOC2012`, downloaded there first where missing.
    in_memory: `yes`, `no`, or `auto`: where the split takes less than a quarter of the memory.
    """
    if name == "shapes":
        return Shapes(split, size)
    if name in ("voc2007", "voc2012"):
        name = download_voc("data", name.removeprefix("voc"), split)
    dataset = VOC(name, split, size, workers, in_memory=False)
    needed, memory = len(dataset) * 4 * size**2, memory_size()
    if in_memory == "yes" or in_memory == "auto" and needed < memory / 4:
        dataset.load(workers)
        return dataset
    print(
        f"{name}: {needed / 2**30:.1f} GiB for split {split}, of {memory / 2**30:.0f} GiB of memory: "
        "its images are decoded each time they are needed",
        file=sys.stderr,
    )
    for path in dataset.image_paths + dataset.mask_paths:
        if not path.exists():  # else found out in the middle of an epoch
            raise DataError(f"{path}: does not exist, but is needed for split {split}")
    return dataset


def memory_size():
    """Return how many bytes of memory this machine has; 8 GiB where it does not tell (Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return 8 * 2**30


def download_voc(root, year, split):
    """Make sure that `root`/VOCdevkit/VOC`year` holds the split; return that folder.

    Only the archive that has the split is fetched (train, val and trainval share one, 2007's test
    has its own), only where the split's files are missing, and its md5 is checked.
    Raises DataError with the address, the md5 and the place to put the file by hand.
    """
    folder = Path(root, "VOCdevkit", f"VOC{year}")
    split_file = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    # Is there while an archive is unpacked: files may be cut short, so it is unpacked again.
    archive = "test" if split == "test" else "trainval"
    unfinished = Path(root, f"unfinished-{year}-{archive}")
    if (
        not unfinished.exists()
        and split_file.exists()
        and all(
            (folder / "JPEGImages" / f"{name}.jpg").exists()
            and (folder / "SegmentationClass" / f"{name}.png").exists()
            for name in _read_lines(split_file)
        )
    ):
        return folder
    splits = ["train", "val", "trainval"] + ["test"] * (year == "2007")
    if split not in splits:
        raise DataError(f"VOC {year} has no split '{split}'; it has {', '.join(splits)}")

    from torchvision.datasets import voc  # here, because it takes seconds to import

    source = voc.DATASET_YEAR_DICT["2007-test" if split == "test" else year]
    print(f"downloading {source['url']} to {root}/", file=sys.stderr)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(TIMEOUT)  # else torchvision waits for a silent host for ever
        # Refuse paths that lead out of the folder, as newer versions of torchvision do themselves.
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
        voc.VOCSegmentation(root, year=year, image_set=split, download=True)
    except (OSError, RuntimeError, HTTPException, tarfile.TarError) as error:
        raise DataError(
            f"{source['url']}: cannot be downloaded ({error}); fetch it by other means, save it "
            f"as {Path(root, source['filename'])} (md5 {source['md5']}) and run this again"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    unfinished.unlink()
    return folder


def normalize(images):
    """Return uint8 images (N, 3, H, W), 0 to 255, as float32 with ImageNet's mean 0 and deviation 1."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    normalized = (images / 255 - mean) / std
    # In the layout of the weights (utils.to_device), or else part of the network's maps go without.
    apple = images.device.type == "mps"
    layout = torch.contiguous_format if apple else torch.channels_last
    return normalized.contiguous(memory_format=layout)


def augment(images, masks, mode="affine", size=None):
    """Give each sample of a batch another random transform, the same one to its image and mask.

    images: uint8 (N, 3, H, W); masks: uint8 (N, H, W); returns the like, on the same device, of
    size x size pixels (default: the size given).
    Mode `flip` mirrors left-right and top-bottom, each for half of the samples (the paper's).
    Mode `affine` mirrors left-right alone, since photographs have an up, rotates by up to 15
    degrees, shears by up to 0.1, stretches by up to 1.2, and zooms by 0.8 to 2.6 to any place in
    the picture; give it images larger than `size`, and what it zooms in to has detail. Then it
    changes the images' brightness, contrast and saturation, each by up to 30 %, and tint by 15 %.
    Images are sampled once, bilinearly, masks by nearest neighbour at the very same points; what
    comes from outside the picture is void in the mask and about the mean colour in the image.
    """
    n, height, width = masks.shape
    device = images.device

    def uniform(low, high):
        return torch.rand(n, device=device) * (high - low) + low

    def coin():
        return torch.randint(0, 2, (n,), device=device) * 2.0 - 1.0

    mirror_x, mirror_y = coin(), coin()
    angle = shear = shift_x = shift_y = torch.zeros(n, device=device)
    zoom = stretch = torch.ones(n, device=device)
    if mode == "affine":
        mirror_y = torch.ones(n, device=device)
        angle = uniform(-15, 15).deg2rad()
        zoom = torch.exp2(uniform(math.log2(0.8), math.log2(2.6)))
        stretch = torch.exp2(uniform(-math.log2(1.2), math.log2(1.2)))
        shear = uniform(-0.1, 0.1)
        reach = (1 - 1 / zoom).abs() + 0.25  # an image is 2 wide here: an eighth over the edge
        shift_x, shift_y = uniform(-1, 1) * reach, uniform(-1, 1) * reach
    elif mode != "flip":
        raise ValueError(f"no augmentation is called '{mode}'; choose from flip, affine")

    # For each sample the matrix that takes a point of the output to the input point it shows:
    # mirror, then shear, rotate, stretch and zoom, then shift, in coordinates from -1 to 1.
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    mirror_x, aspect = mirror_x * stretch, width / height
    matrix = torch.stack(
        [
            torch.stack([mirror_x * cos, mirror_y * (shear * cos - sin) / aspect, shift_x], 1),
            torch.stack([mirror_x * sin * aspect, mirror_y * (shear * sin + cos), shift_y], 1),
        ],
        dim=1,
    )
    shape = (n, 3, size or height, size or width)
    grid = F.affine_grid(matrix, shape, align_corners=False)
    # grid_sample fills with 0 outside, so 0 is made to stand for the mean colour, and for void.
    mean = 255 * torch.tensor(MEAN, device=device).view(3, 1, 1)
    images = F.grid_sample(images - mean, grid, mode="bilinear", align_corners=False) + mean
    masks = F.grid_sample(masks[:, None] - 255.0, grid, mode="nearest", align_corners=False) + 255
    if mode == "affine":
        images = jitter_colors(images)
    return images.round().clamp(0, 255).byte(), masks[:, 0].round().byte()


def jitter_colors(images, strength=0.3):
    """Change brightness, contrast, saturation and tint of each float image (N, 3, H, W) at random."""

    def factor(channels=1, strength=strength):
        noise = torch.rand(len(images), channels, 1, 1, device=images.device)
        return 1 + strength * (2 * noise - 1)

    images = images * factor() * factor(3, strength / 2)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * factor() + mean
    gray = images.mean(1, keepdim=True)
    return (images - gray) * factor() + gray


def class_counts(dataset):
    """Return how many pixels of each class each mask of a data set has, int64 (N, C), without void."""

    def count(index):
        mask = dataset[index][1]
        return torch.bincount(mask.flatten(), minlength=256)[: len(dataset.classes)]

    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(count, range(len(dataset)))))


def class_weights(dataset, scheme):
    """Return a float32 weight for each class, (C,), for a loss that should heed rare classes.

    With p(c) the share of class c among all pixels of the masks that are not void:

    `inverse`: 1 / (C p(c)), the paper's; C counts the classes that occur. A pixel weighs 1 on average.
    `median`: median of f / f(c), where f(c) is c's share of the pixels of those images that show c
        (Eigen and Fergus 2015, Predicting Depth, Surface Normals and Semantic Labels, section 4.3.3).
    `enet`: 1 / ln(1.02 + p(c)), between 1.4 and 50.5 (Paszke et al. 2016, ENet, section 5.2).

    A class that never occurs would get an infinite weight from the first two: it gets 1, which
    changes nothing in training and lets its pixels count in a validation loss. ENet's is finite.
    """
    counts = class_counts(dataset).double()
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
