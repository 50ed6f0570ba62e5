"""Folders of photographs and masks, drawn shapes, and a batch's way to the network.

    train = load_dataset("voc2007", "train", size=224)  # decoded and resized once, kept as uint8
    image, mask = train[0]                              # uint8 (3, 224, 224) and (224, 224)
    images, masks = train[[0, 5, 7]]                    # a list of indices gives a whole batch
    images, masks = augment(images, masks)              # a random transform for each sample
    logits = model(normalize(images))

A folder of data is laid out as VOC is, or plainly (docs/formats.md):

    images/street.jpg   masks/street.png   classes.txt   train.txt  val.txt  (lists, if you like)

What a labelling tool exports becomes such a folder by this:

    python tools/prepare.py EXPORT NEW

The order of this file: data sets, files, batches, augmentation, class weights, download.
"""

import colorsys
import contextlib
import functools
import hashlib
import math
import os
import socket
import tarfile
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.nn import functional as F
from torch.utils.data import Dataset

NAMES = ("shapes", "voc2007", "voc2012")  # data that is drawn, or downloaded
MODES = ("flip", "affine")  # of `augment`
SCHEMES = ("inverse", "median", "enet", "mild")  # of `class_weights`
VOID = 255  # the mask value that counts neither in the loss nor in a score
DOWNLOADS = Path(__file__).resolve().parent / "data"
TIMEOUT = 30  # seconds for which a download waits for a silent host
PREPARE = "python tools/prepare.py DIR NEW"  # the remedy for all that other tools wrote
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
# ImageNet's, which torchvision's encoders expect; from scratch any numbers would do.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Pillow warns of images as large as phones take; at twice that size it refuses them.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class DataError(Exception):
    """Something is wrong with the user's data. One line: the file, what, the remedy."""

    def __init__(self, path, what, remedy):
        what = " ".join(str(what).split())
        super().__init__(f"{path}: {what[:150]}; {remedy}")  # file and remedy are never cut off


@contextlib.contextmanager
def blame(path, remedy):
    """Turn whatever goes wrong within into a DataError of one line: the file, what, the remedy.

    Put only reading and decoding inside: a bug of our own must not look like a bad file.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for files that are broken
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(path, reason, remedy) from error


@functools.cache
def say(line):
    """Print a remark on the user's data; the cache makes a line that is repeated print nothing."""
    print(line)


# ---------------------------------------------------------------------------- data sets


class SegmentationSet(Dataset):
    """What every data set here has. For one of your own write a class with these:

    images    torch.uint8 (N, 3, S, S), red, green, blue, 0 to 255; S is `load_dataset`'s size
    masks     torch.uint8 (N, S, S), class indices, or 255 (void) for pixels that do not count
    names     N different strings
    classes   the classes' names, in the order of their indices; 0 is the background
    palette   a colour [red, green, blue], 0 to 255, for each class: those of mask files
    full_mask(i)   the i-th mask at its photograph's own resolution, torch.uint8 (H, W)

    Then add its name to `NAMES` and a line to `load_dataset`.
    """

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.images[index], self.masks[index]


class VOC(SegmentationSet):
    """The images and masks of one split of a folder, decoded and resized once.

    root: a folder in VOC's layout or the plain one, or one that holds VOCdevkit/.
    split: the name of a list, see `split_names`. Images are stretched to squares of
    size x size. progress: see `load_dataset`, which can also download VOC.

    Gives `(image, mask)`, uint8 (3, S, S) and (S, S); a list of indices gives a stacked
    batch. Raises DataError.
    """

    def __init__(self, root, split="train", size=224, progress=None):
        self.root = find_root(root)
        image_folder, mask_folder = find_folders(self.root)
        self.classes = read_classes(self.root)
        self.palette = color_map(len(self.classes))
        self.image_paths = files_by_name(image_folder, IMAGE_SUFFIXES)
        self.mask_paths = files_by_name(mask_folder, {".png"})
        self.names = split_names(self.root, split, self.image_paths, self.mask_paths)

        count = len(self.names)
        with blame(f"{self.root}: split {split}", "too large; give a smaller --size"):
            self.images = torch.empty(count, 3, size, size, dtype=torch.uint8)
            self.masks = torch.empty(count, size, size, dtype=torch.uint8)

        def decode(index):
            name = self.names[index]
            image = load_image(self.image_paths[name])
            mask = load_mask(self.mask_paths[name], len(self.classes))
            if mask.size != image.size:
                what = f"is {mask.size}, but its image, turned upright, {image.size}"
                raise DataError(self.mask_paths[name], what, f"export it again, or {PREPARE}")
            self.images[index] = to_tensor(image, size)
            self.masks[index] = to_tensor(mask, size)

        # Shown, since a process that takes too much memory is killed without a message.
        label = f"reading {split}, {4 * count * size**2 / 2**30:.1f} GiB"
        # Threads are enough: Pillow releases Python's lock (the GIL) while it decodes.
        # get_num_threads: as many as a Slurm job or OMP_NUM_THREADS allows.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            steps = progress(range(count), label) if progress else range(count)
            list(zip(steps, pool.map(decode, range(count))))  # waits, and raises what `decode` did

    def full_mask(self, index):
        """Return the mask at its image's own resolution, uint8 (H, W)."""
        path = self.mask_paths[self.names[index]]
        return torch.from_numpy(np.array(load_mask(path, len(self.classes))))


class Shapes(SegmentationSet):
    """Drawn images of circles, squares, triangles and stars: real training with no download.

    Each class leans to a hue of its own, so that a network learns it in minutes. The
    same `split`, `seed` and index always give the same picture, drawn once and resized.
    Gives what `VOC` gives.
    """

    def __init__(self, split="train", size=64, seed=0):
        counts = {"train": 600, "val": 100, "test": 100}
        if split not in counts:
            raise DataError("shapes", f"has no split {split}", f"choose from {', '.join(counts)}")
        self.names = [f"{split}_{i}" for i in range(counts[split])]
        self.classes = ["background", "circle", "square", "triangle", "star"]
        self.palette = color_map(len(self.classes))
        # Three numbers make the seed of one picture.
        seeds = [[seed, list(counts).index(split), i] for i in range(counts[split])]
        pairs = [draw_shapes(np.random.default_rng(each)) for each in seeds]
        self.images = torch.stack([to_tensor(image, size) for image, _ in pairs])
        self.masks = torch.stack([to_tensor(mask, size) for _, mask in pairs])

    def full_mask(self, index):
        """Return the mask, uint8 (S, S): of drawn images no larger one is kept."""
        return self.masks[index]


def draw_shapes(rng, size=96):
    """Return a drawn picture of one to four shapes and its mask, PIL, size x size."""
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


def load_dataset(name, split, size, device=None, progress=None):
    """Return the data set that a script's --data names: one of `NAMES`, or a folder.

    device: a data set that fills less than a quarter of a CUDA device's memory is moved
    there. progress: a function of (items, label) that yields the items and shows how
    far it is.
    """
    if name == "shapes":
        dataset = Shapes(split, size)
    else:
        root = download_voc(name, split) if name in NAMES else name
        dataset = VOC(root, split, size, progress)
    if device and device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        if dataset.images.numel() + dataset.masks.numel() < memory / 4:
            dataset.images, dataset.masks = dataset.images.to(device), dataset.masks.to(device)
    return dataset


# ---------------------------------------------------------------- folders, lists, files


def find_root(folder):
    """Return the folder of a data set, absolute: `folder` itself, or the VOC in it."""
    root = Path(folder).expanduser().resolve()
    inside = [root / parent / f"VOC{year}" for parent in ("VOCdevkit", "") for year in (2007, 2012)]
    inside = [path for path in inside if path.is_dir()]
    if len(inside) > 1:
        say(f"{root}: {inside[0].name} is taken; for the other, --data {inside[1]}")
    return inside[0] if inside else root


def find_folders(root):
    """Return the folders of a data set's images and masks. Raises DataError."""
    for images, masks in (("JPEGImages", "SegmentationClass"), ("images", "masks")):
        if (root / images).is_dir() and (root / masks).is_dir():
            return root / images, root / masks
    with blame(root, f"give --data a folder, or one of {', '.join(NAMES)}"):
        has = ", ".join(sorted(path.name for path in root.iterdir())) or "nothing"
    raise DataError(root, f"has no images/ and masks/, but {has}", f"of an export: {PREPARE}")


def image_files(folder, suffixes=IMAGE_SUFFIXES):
    """Return a folder's images, sorted, without hidden files (macOS' ._photo.jpg)."""
    files = sorted(folder.glob("[!.]*"))
    return [path for path in files if path.suffix.lower() in suffixes]


def files_by_name(folder, suffixes):
    """Return {name: path} of a folder's files; a name is the file's without its ending."""
    found = {}
    for path in image_files(folder, suffixes):
        name = unicodedata.normalize("NFC", path.stem)
        if name in found:
            raise DataError(path, f"{found[name].name} has its name too", "rename one of them")
        found[name] = path
    return found


def read_lines(path):
    """Return a text file's lines, without the empty ones. Raises DataError."""
    with blame(path, f"for an export {PREPARE}; else write it, a name a line, as UTF-8"):
        # Windows editors put a mark in front; macOS splits accents from their letters.
        text = unicodedata.normalize("NFC", path.read_text(encoding="utf-8-sig"))
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_classes(root):
    """Return the names of a folder's classes: those in classes.txt, or VOC's 21."""
    # VOC itself has no .txt file beside its folders. A tool that exports its layout adds
    # one, and must name its classes in classes.txt.
    if (root / "JPEGImages").is_dir() and not any(root.glob("*.txt")):
        if not root.name.startswith("VOC"):
            say(f"{root}: has no classes.txt, so its classes are VOC's 21")
        return list(VOC_CLASSES)
    path = root / "classes.txt"
    classes = read_lines(path)
    if "__ignore__" in classes or not 2 <= len(set(classes)) == len(classes) <= VOID:
        what = f"should list 2 to {VOID} different classes, one a line, background first"
        raise DataError(path, what, f"write it anew, or, for labelme's __ignore__, {PREPARE}")
    return classes


def split_names(root, split, images, masks):
    """Return the names of the images in a split, each of which has an image and a mask.

    images, masks: {name: path}. The split NAME is what NAME.txt lists, beside the
    folders or in ImageSets/Segmentation/: a name a line, without ending. `all` is every
    image that has a mask. Where neither train.txt nor val.txt is there, `share_out`
    makes them; names in test.txt are in neither. Raises DataError.
    """
    lists = {path.stem: path for path in root.glob("*.txt") if path.name != "classes.txt"}
    lists |= {path.stem: path for path in (root / "ImageSets" / "Segmentation").glob("*.txt")}
    paired = sorted(images.keys() & masks.keys())
    if split in lists:
        names = list(dict.fromkeys(read_lines(lists[split])))  # each once
    elif split == "all":
        names = paired
    elif split in ("train", "val") and not {"train", "val"} & lists.keys():
        test = set(read_lines(lists["test"]) if "test" in lists else [])
        names = share_out([name for name in paired if name not in test])[split]
        say(f"{root}: no train.txt and val.txt: {split} is {len(names)} images, by their names")
    else:
        remedy = f"write it, a name a line, or take {', '.join([*sorted(lists)[:9], 'all'])}"
        raise DataError(root, f"has no {split}.txt", remedy)
    unpaired = [name for name in names if name not in images or name not in masks]
    if unpaired or not names:
        what = f"{len(images)} images, {len(paired)} of them with a PNG mask, none for {split}"
        if unpaired:
            what = f"'{unpaired[0]}' is no image's name, or that image has no mask, a PNG"
        here = ", ".join(path.name for path in [*images.values()][:2] + [*masks.values()][:2])
        raise DataError(lists.get(split, root), what, f"files: {here[:99]}; else {PREPARE}")
    return names


def share_out(names):
    """Return {"train": names, "val": names}, about a fifth for val, by a hash of each name alone.

    So an image stays on its side when others are added, save where a side would be empty.
    """
    ranked = sorted((hashlib.sha256(os.fsencode(name)).hexdigest(), name) for name in names)
    few = sum(digest < "33" for digest, _ in ranked)  # hexadecimal 33 is a fifth of ff
    few = min(max(few, 1), len(ranked) - 1)
    val = {name for _, name in ranked[:few]}
    return {"train": sorted(set(names) - val), "val": sorted(val)}


def load_image(path):
    """Return the image file as a PIL image in mode RGB, turned upright as its EXIF data says.

    Transparent pixels of PNG and WebP are put over white; a TIFF's fourth band is left
    out, since it may be near infrared. Raises DataError, for more than 8 bits a channel
    too.
    """
    with blame(path, "give another file"), Image.open(path) as file:
        # Pillow says ";16" where it would cut off the lower half of 16 bits. In "BGR;16"
        # the three channels share them.
        if file.mode[0] in "IF" or ";16" in str(file.tile).replace("BGR;16", ""):
            what = "has more than 8 bits a channel, and which number is white is unknown"
            raise DataError(path, what, f"{PREPARE} --white NUMBER makes 8 of them")
        image = ImageOps.exif_transpose(file)
        if file.format == "TIFF" and image.mode in ("RGBA", "RGBX", "LA"):
            say(f"{Path(path).parent}: the last of the bands of TIFFs, {image.mode}, is left out")
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def load_mask(path, num_classes):
    """Return the mask file as a PIL image, mode L, of class indices and void (255).

    A palette PNG gives the indices that are stored in it (its colours are only for
    looking at), an 8-bit grayscale PNG its grey values. Raises DataError for all else,
    and for other values.
    """
    with blame(path, f"save masks as palette PNG, or {PREPARE}"), Image.open(path) as file:
        kind = f"{file.mode} {file.format}"
        # Gray of 2 or 4 bits is "L;2" or "L;4" here; Pillow would stretch it to 255.
        if kind != "P PNG" and (kind != "L PNG" or file.tile[0][3] != "L"):
            what = f"is a {kind}, and a mask is a palette or 8-bit grayscale PNG of classes"
            raise DataError(path, what, f"{PREPARE} makes such masks of many kinds")
        labels = np.array(ImageOps.exif_transpose(file))
    values = np.flatnonzero(np.bincount(labels.ravel(), minlength=256)).tolist()
    wrong = [value for value in values if value >= num_classes and value != VOID]
    if wrong:
        what = f"has the values {wrong[:5]}; classes are 0 to {num_classes - 1}, void is {VOID}"
        raise DataError(path, what, f"mend it, list all classes in classes.txt, or {PREPARE}")
    return Image.fromarray(labels)


def to_tensor(image, size):
    """Return a PIL image as a uint8 tensor, (3, S, S), or (S, S) for a mask.

    It is stretched to a square: an image with an antialiased bilinear filter, a mask by
    nearest neighbour.
    """
    is_image = image.mode == "RGB"
    resampling = Image.Resampling.BILINEAR if is_image else Image.Resampling.NEAREST
    array = np.array(image.resize((size, size), resampling))
    return torch.from_numpy(array.transpose(2, 0, 1) if is_image else array)


def color_map(n):
    """Return VOC's colours of n classes: lists [red, green, blue], 0 to 255.

    The index's bits 0, 3 and 6 become bits 7, 6 and 5 of red, 1, 4 and 7 those of green,
    2 and 5 those of blue: class 1 is (128, 0, 0), 2 is (0, 128, 0), 4 is (0, 0, 128).
    """
    colors = [[0, 0, 0] for _ in range(n)]
    for index, color in enumerate(colors):
        for bit in range(8):
            color[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    return colors


# ---------------------------------------------------- batches on their way to a network


def epoch_order(dataset, batch_size, seed, epoch):
    """Return the indices of an epoch's batches, int64 (batches, batch_size), in random order.

    The same seed and epoch give the same order, in all processes. Whole batches only:
    batch norm learns badly from a few images that are left over. The order is another in
    each epoch, so the images left out differ, too.
    """
    generator = torch.Generator().manual_seed(1_000_003 * epoch + seed)
    order = torch.randperm(len(dataset.names), generator=generator)
    batch_size = min(batch_size, len(order))  # a set that is smaller is one batch
    order = order[: len(order) // batch_size * batch_size].view(-1, batch_size)
    return order.to(dataset.images.device)


def fetch(dataset, indices, device):
    """Return the images and masks at some indices as tensors on a device.

    Where `load_dataset` put them on the GPU they are there already, and nothing waits.
    """
    return dataset.images[indices].to(device), dataset.masks[indices].to(device)


def _channels(values, device):
    """Return three numbers as float32 (3, 1, 1), filled in on the device: nothing waits."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])


def _check_bytes(batch):
    """Raise TypeError for batches of another type (torchvision's ToTensor gives floats)."""
    if batch.dtype != torch.uint8:
        raise TypeError(f"images and masks should be torch.uint8, 0 to 255, not {batch.dtype}")


def normalize(images):
    """Return uint8 images (N, 3, H, W) as float32: (images / 255 - MEAN) / STD by channel.

    Give a single image as image[None].
    """
    _check_bytes(images)
    mean, std = _channels(MEAN, images.device), _channels(STD, images.device)
    normalized = (images / 255 - mean) / std
    # The same memory layout as that of the weights (utils.to_device).
    layout = torch.contiguous_format if images.is_mps else torch.channels_last
    return normalized.contiguous(memory_format=layout)


def augment(images, masks, mode="affine", size=None):
    """Give each sample of a batch its own random transform, the same to its image and mask.

    images: uint8 (N, 3, H, W); masks: uint8 (N, H, W); a single sample is image[None] and
    mask[None]. Returns both, stretched to size x size pixels; no size: as large as they
    came.

    Mode `flip` mirrors left-right and top-bottom, each for half of the samples (the
    paper's). Mode `affine` mirrors left-right alone, since photographs have an up,
    rotates by up to 15 degrees, shears by up to 0.1, stretches by up to 1.2, and zooms
    by 0.8 to 2.6 to any place in the picture; give it images larger than `size`, and
    what it zooms in to has detail. Then it changes the images' brightness, contrast and
    saturation, each by up to 30 %, and tint by 15 %. Images are sampled once,
    bilinearly, masks by nearest neighbour at the very same points; what comes from
    outside the picture is void in the mask and about the mean colour in the image.
    """
    _check_bytes(images)
    _check_bytes(masks)
    n, height, width = masks.shape
    matrices = random_matrices(n, mode, width / height, images.device)
    shape = (n, 3, size or height, size or width)
    grid = F.affine_grid(matrices, shape, align_corners=False)
    # grid_sample gives 0 outside the picture. So the mean colour, and VOID, are subtracted
    # first and added after it: what comes from outside is that.
    mean = 255 * _channels(MEAN, images.device)
    centered, below_void = images - mean, masks[:, None] - float(VOID)
    images = F.grid_sample(centered, grid, mode="bilinear", align_corners=False) + mean
    masks = F.grid_sample(below_void, grid, mode="nearest", align_corners=False) + VOID
    if mode == "affine":
        images = jitter_colors(images)
    return images.round().clamp(0, 255).byte(), masks[:, 0].round().byte()


def random_matrices(n, mode, aspect, device):
    """Return n random transforms of `augment`'s mode, float32 (n, 2, 3).

    Each maps a point of the output to the point of the input that gives its colour:
    mirror and stretch, then shear, rotate, zoom, shift. Coordinates go from -1 to 1
    across the picture, whose width is `aspect` times its height. Raises ValueError for
    an unknown mode.
    """

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
        # The picture is 2 wide, the part shown 2 / zoom. Zoomed in, it may go 0.25 past the edge.
        reach = (1 - 1 / zoom).abs() + 0.25
        shift_x, shift_y = uniform(-1, 1) * reach, uniform(-1, 1) * reach
    elif mode != "flip":
        raise ValueError(f"no augmentation is called '{mode}'; choose from {', '.join(MODES)}")
    # With x in units of the height a point becomes  1 / zoom * R * S * M * point, shifted:
    #   M = [mirror_x * stretch  0; 0  mirror_y],  S = [1  shear; 0  1],
    #   R = [cos  -sin; sin  cos].
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    mirror_x = mirror_x * stretch
    first = [mirror_x * cos, mirror_y * (shear * cos - sin) / aspect, shift_x]
    second = [mirror_x * sin * aspect, mirror_y * (shear * sin + cos), shift_y]
    return torch.stack([torch.stack(first, 1), torch.stack(second, 1)], dim=1)


def jitter_colors(images, strength=0.3):
    """Change brightness, contrast, saturation and tint of float images (N, 3, H, W).

    Each factor is drawn from 1 - strength to 1 + strength, for each image;
    those of the tint from half as far.
    """

    def factor(channels=1, strength=strength):
        noise = torch.rand(len(images), channels, 1, 1, device=images.device)
        return 1 + strength * (2 * noise - 1)

    images = images * factor() * factor(3, strength / 2)  # brightness, and tint by channel
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * factor() + mean  # contrast
    gray = images.mean(1, keepdim=True)
    return (images - gray) * factor() + gray  # saturation


# ------------------------------------------------------------- classes and their shares


def class_counts(dataset):
    """Return how many pixels of each class each mask has, int64 (N, C), without void."""
    counts = [mask.flatten().bincount(minlength=256) for mask in dataset.masks.cpu()]
    return torch.stack(counts)[:, : len(dataset.classes)]


def check_labels(dataset, where, learns=True):
    """Raise DataError for masks that have nothing to learn, or to score by.

    To learn from (`learns`) they need a class beside background. To score by they may be
    background alone, but not background and void: then objects were probably saved as
    255. where: how messages name the data set.
    """
    background = dataset.classes[0]
    if background.lower().strip("_ ") in ("void", "unlabeled", "unlabelled", "ignore"):
        said = f"{where}: class 0 is called {background}, but is learned and counts in scores"
        say(f"{said}; {PREPARE} --void {background} has it left out")
    pixels = class_counts(dataset).sum(0)
    has_void = pixels.sum() < dataset.masks.numel()
    if not pixels[1:].any() and (learns or has_void):
        what = f"at this --size, masks have nothing but {background} (0), or void ({VOID})"
        raise DataError(where, what, f"an object of {VOID} should be 1; {PREPARE} mends that")


def class_weights(dataset, scheme):
    """Return a float32 weight for each class, (C,), for a loss that should heed rare classes.

    With p(c) the share of class c among all pixels of the masks that are not void:

    `inverse`: 1 / (C p(c)), the paper's. C: how many classes occur. A pixel weighs 1 on
        average.
    `median`: the median of all f, divided by f(c). f(c): the pixels of class c, divided
        by all pixels of the images that show c (Eigen and Fergus 2015, Predicting Depth,
        Surface Normals and Semantic Labels, arXiv 1411.4734).
    `enet`: 1 / ln(1.02 + p(c)), from 1.4 to 50.5 (Paszke et al. 2016, ENet, section 5.2).
    `mild`: 1 / p(c)^0.15, ours: 1 for a class that is everywhere, 2 for one with a
        hundredth of the pixels (docs/experiments.md has what it brings).

    A class that never occurs gets 1, by `enet` 50.5.
    """
    counts = class_counts(dataset).double()
    pixels = counts.sum(0)
    share = pixels / pixels.sum()
    if scheme == "enet":
        return (1 / torch.log(1.02 + share)).float()
    if scheme == "inverse":
        weights = 1 / ((pixels > 0).sum() * share)
    elif scheme == "median":
        pixels_where_present = (counts.sum(1, keepdim=True) * (counts > 0)).sum(0)
        share_where_present = pixels / pixels_where_present
        weights = share_where_present[pixels > 0].quantile(0.5) / share_where_present
    elif scheme == "mild":
        weights = share**-0.15
    else:
        raise ValueError(f"no scheme is called '{scheme}'; choose from {', '.join(SCHEMES)}")
    weights[pixels == 0] = 1
    return weights.float()


# ----------------------------------------------------------------------------- download


def download_voc(name, split):
    """Return the folder of voc2007 or voc2012, downloaded where a split is missing.

    train, val and trainval come in one archive, 2007's test in another; the first is
    taken for whole where val's list is there. Raises DataError.
    """
    year, part = name[3:], "test" if (name, split) == ("voc2007", "test") else "val"
    folder = DOWNLOADS / "VOCdevkit" / f"VOC{year}"
    if (folder / "ImageSets" / "Segmentation" / f"{part}.txt").exists():
        return folder

    from torchvision.datasets import utils, voc  # here, because they take seconds to import

    source = voc.DATASET_YEAR_DICT["2007-test" if part == "test" else year]
    path = DOWNLOADS / source["filename"]
    print(f"downloading {source['url']} to {DOWNLOADS}", flush=True)
    socket.setdefaulttimeout(TIMEOUT)  # else torchvision waits for a silent host for ever
    with blame(source["url"], f"save it as {path} (md5 {source['md5']}) by other means"):
        utils.download_url(source["url"], DOWNLOADS, path.name, source["md5"])
        with tarfile.open(path) as tar:
            # Nothing outside the folder. Debian 12's Python 3.11.2 has no such check:
            # there the md5 must do.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            # The lists come last: one that exists proves that all else was unpacked.
            order = sorted(tar, key=lambda member: ("ImageSets" in member.name, member.name))
            tar.extractall(DOWNLOADS, order)
    return folder
