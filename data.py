"""VOC-layout folders, a drawn data set, and what is done to a batch on its way to the network.

    python data.py --data DIR                    look a folder over before hours are spent on it
    python data.py --splits train val test       PASCAL VOC 2007, downloaded to data/

    train = VOC("voc2007", "train", size=224)    # decoded and resized once, kept as uint8
    image, mask = train[0]                       # uint8 (3, 224, 224) and (224, 224)
    images, masks = train[[0, 5, 7]]             # a list of indices gives a whole batch
    images, masks = augment(images, masks)       # a new random transform for each sample
    logits = model(normalize(images))

As a script it prints how many images have each class, its share of the pixels, what is worth
knowing and what is wrong; it exits with 1 where training would refuse the folder.
"""

import collections
import colorsys
import contextlib
import functools
import glob
import hashlib
import math
import os
import re
import shutil
import socket
import struct
import sys
import tarfile
import tempfile
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.nn import functional as F
from torch.utils.data import Dataset

# Pillow warns of images as large as phones take; twice that size it refuses, as does `_open`.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
TIMEOUT = 30  # seconds for which a download waits for a silent host
NAMES = ("shapes", "voc2007", "voc2012")  # data that is drawn, or downloaded
MODES = ("flip", "affine")  # of `augment`
SCHEMES = ("inverse", "median", "enet")  # of `class_weights`
VOID = 255  # the mask value that counts neither in the loss nor in a score
VOID_COLOR = (224, 224, 192)  # VOC's, for void in masks that are coloured instead of indexed
# What Pillow raises for a file that is broken.
BROKEN = (OSError, SyntaxError, TypeError, ValueError, EOFError, struct.error, zlib.error)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"}
# The folders of the images and of their masks, by the tool that writes them.
LAYOUTS = (
    ("JPEGImages", "SegmentationClass"),  # VOC, CVAT, newer labelme
    ("JPEGImages", "SegmentationClassPNG"),  # older labelme, beside SegmentationClass/*.npy
    ("images", "masks"),
    ("imgs", "masks"),  # Carvana
    ("img", "masks_machine"),  # Supervisely
)
ROBOFLOW = "_classes.csv"  # lies in a folder that holds images and their NAME_mask.png together
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
BACKGROUNDS = {"background", "void", "unlabeled", "unlabelled", "sky", "other"}
# ImageNet's, which pretrained encoders expect; as good as any other for training from scratch.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class DataError(Exception):
    """Something is wrong with the user's data; the message names the file and the remedy."""


def color_map(n):
    """Return the VOC development kit's colours of n classes: lists [red, green, blue], 0 to 255.

    The bits of a class's index are dealt to red, green and blue in turn, from each one's highest.
    """
    return [
        [sum((i >> (3 * j + c) & 1) << (7 - j) for j in range(3)) for c in range(3)]
        for i in range(n)
    ]


@functools.cache
def _say(line):
    """Print a line to standard error, the same line once only."""
    print(line, file=sys.stderr)


@contextlib.contextmanager
def _open(path, what):
    """Open a picture file; whatever Pillow raises on a broken one becomes a DataError."""
    try:
        with Image.open(path) as image:
            # A phone's MPO holds smaller versions of the same photograph behind the first.
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":
                raise DataError(f"{path}: has {frames} frames; save one of them as the {what}")
            yield image
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise DataError(f"{path}: has more than {limit:,} pixels; shrink it first") from error
    except BROKEN as error:
        raise DataError(f"{path}: cannot be read as an {what} ({error}); replace it") from error


def load_image(path):
    """Return the image file as a PIL image in mode RGB, turned upright as its EXIF data says.

    Transparent pixels are put over white. 16-bit grey is scaled by its range, 0 to 65535, floats by
    0 to 1; other numbers are refused. Raises DataError.
    """
    with _open(path, "image") as file:
        image, mode = ImageOps.exif_transpose(file), file.mode
        if mode == "I" and file.format == "PNG":
            mode = "I;16"  # which versions of Pillow before 11 call I
        if mode[0] in "IF":
            values = np.asarray(image) / (65535 if mode.startswith("I;16") else 1)
            low, high = values.min(), values.max()
            if mode == "I" or not (low >= 0 and high <= 1):  # nan is refused too
                raise DataError(
                    f"{path}: holds numbers from {low:g} to {high:g}, and which is white is unknown; "
                    "save it with 8 bits, or as floats from 0 to 1"
                )
            image = Image.fromarray((255 * values).round().astype(np.uint8))
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def load_mask(path, num_classes, colors=None):
    """Return the mask file as a PIL image, mode L, of class indices.

    A palette PNG gives the indices that are stored in it (its colours are only for looking at), a
    grayscale PNG its grey values, and so does an RGB PNG that is all grey. With `colors`,
    {(red, green, blue): class}, an RGB or palette PNG gives the classes of its colours; the value i
    of a grayscale PNG, or of a palette that names no class but background, means the i-th of
    `colors`. A mask is turned as its EXIF data say. Raises DataError for all else: other colours,
    and values that are neither a class (below num_classes) nor void.
    """
    with _open(path, "image of labels") as file:
        kind = f"{file.mode} {file.format}"
        scaled = file.format == "PNG" and file.tile[0][3] != file.mode  # to 8 bits, by Pillow
        kind = "2- or 4-bit grayscale PNG" if scaled and file.mode == "L" else kind
        file = ImageOps.exif_transpose(file)
        labels, is_rgb = np.array(file), kind in ("RGB PNG", "RGBA PNG")
        by_color = colors and (is_rgb or kind == "P PNG")
        rgb = file.convert("RGBA").convert("RGB") if by_color else None
    mask = _classes_of_colors(path, rgb, colors, not is_rgb) if by_color else None
    if mask:
        return mask
    if is_rgb and not (scaled or np.ptp(labels[..., :3], 2).any() or (labels[..., 3:] < 255).any()):
        labels = labels[..., 0]  # grey three times over, as OpenCV writes it
    elif kind == "1 PNG" and not colors:
        labels = labels.astype(np.uint8)
    elif kind not in ("P PNG", "L PNG"):
        raise DataError(
            f"{path}: is a mask of kind {kind}; save masks as palette or 8-bit grayscale PNG "
            "whose values are class indices, or name the colours of RGB masks in labelmap.txt"
        )
    wrong = np.unique(labels[(labels >= num_classes) & (labels != VOID)])
    if len(wrong):
        y, x = np.argwhere(labels == wrong[0])[0]
        raise DataError(
            f"{path}: has the values {', '.join(map(str, wrong[:5]))} (the first at column {x}, row "
            f"{y}), but the {num_classes} classes are 0 to {num_classes - 1} and void is {VOID}; "
            "mend the mask, or list all classes in classes.txt, background first"
        )
    if colors:
        labels = np.append(list(colors.values()), [VOID] * 256).astype(np.uint8)[labels]
    return Image.fromarray(labels)


def _classes_of_colors(path, image, colors, is_palette):
    """Return an RGB mask's classes as a PIL image; DataError where it has a colour without one.

    None for a palette of which nothing is named, or only background: its indices count then.
    """
    colors = {VOID_COLOR: VOID} | colors
    counts = {color: count for count, color in image.getcolors(image.width * image.height)}
    unnamed = sorted(counts.keys() - colors, key=counts.get, reverse=True)
    if unnamed:
        if is_palette and {colors.get(color, 0) for color in counts} <= {0, VOID}:
            _say(f"{path.parent}: palettes in other colours than labelmap.txt's are read by index")
            return None
        some = ", ".join(f"{counts[color]:,} of {color}" for color in unnamed[:3])
        count = f"{sum(map(counts.get, unnamed)):,} pixels in {len(unnamed)} colours"
        said = f"{path}: has {count} that labelmap.txt does not name ({some})"
        raise DataError(f"{said}; name them, or mend the mask")
    if is_palette:  # which tools put in any order
        _say(f"{path.parent}: palettes are read by their colours")
    pixels = np.asarray(image)
    labels = np.zeros(pixels.shape[:2], np.uint8)
    for color in counts:
        labels[(pixels == color).all(2)] = colors[color]
    return Image.fromarray(labels)


def to_tensor(image, size):
    """Return a PIL image, squeezed to size x size, as a uint8 tensor: (3, S, S), or (S, S) for a mask.

    Images are resized with an antialiased bilinear filter, masks by nearest neighbour.
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
        raise DataError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from error
    return [line for line in lines if line and not f"{line} ".startswith("# ")]  # a comment


def read_classes(root):
    """Return (names, palette, colors) of a data folder's classes, background first.

    From CVAT's `labelmap.txt`, else `classes.txt` or labelme's `class_names.txt` (a name a line;
    `__ignore__` is void), else Roboflow's `_classes.csv`; a folder in VOC's layout without any has
    VOC's 21. palette: a list of [red, green, blue]; colors: what `load_mask` takes, or None.
    """
    files = [root / name for name in ("labelmap.txt", "classes.txt", "class_names.txt", ROBOFLOW)]
    path = next((file for file in files if file.exists()), None)
    if path is None:
        if not (root / "JPEGImages").is_dir():
            raise DataError(f"{root}: has no classes.txt; list the classes, background first")
        if not root.name.lower().startswith("voc"):
            _say(f"{root}: has no classes.txt, so its classes are VOC's 21")
        return list(VOC_CLASSES), color_map(len(VOC_CLASSES)), None
    if path.name == "labelmap.txt":
        if files[1].exists():
            _say(f"{root}: the classes are those of labelmap.txt; classes.txt is not read")
        names = _read_labelmap(path)
        order = sorted(names, key=lambda rgb: names[rgb].lower() != "background")  # it comes first
        classes, palette = [names[rgb] for rgb in order], [list(rgb) for rgb in order]
        colors = {rgb: order.index(rgb) for rgb in names}
    else:
        classes = [line for line in _read_lines(path) if line != "__ignore__"]
        if path.name == ROBOFLOW:  # value, name
            rows = dict(re.findall(r"^(\d+)\s*,\s*(.+)$", "\n".join(classes), re.MULTILINE))
            classes = [rows.get(str(value), "") for value in range(len(rows))]
        palette, colors = color_map(len(classes)), None
    if not 2 <= len(set(classes)) == len(classes) <= VOID or "" in classes:
        said = f"{path}: has {len(classes)} lines; it should list 2 to {VOID} different classes"
        raise DataError(f"{said}, one a line")
    return classes, palette, colors


def _read_labelmap(path):
    """Return {(red, green, blue): name} of the classes in CVAT's labelmap.txt, in its order."""
    names = {}
    for line in _read_lines(path):
        # name:red,green,blue:parts:actions; the name may have colons of its own.
        match = re.fullmatch(r"(.+):(\d+),(\d+),(\d+)(:[^:]*){0,2}", line)
        rgb = tuple(map(int, match.groups()[1:4])) if match else None
        if not match or max(rgb) > 255 or rgb in names:
            said = f"'{line}' is not name:red,green,blue of 0 to 255, or its colour is taken"
            raise DataError(f"{path}: {said}")
        names[rgb] = match[1]
    if "background" not in map(str.lower, names.values()):
        raise DataError(f"{path}: names no class 'background'; add background:0,0,0::")
    return names


def is_background(name):
    """Return whether a class's name says that it is what is left when all else is labelled."""
    return name.lower().strip("_ ") in BACKGROUNDS


def image_files(folder, suffixes=IMAGE_SUFFIXES, pattern="*"):
    """Return the image files in a folder, sorted; hidden ones are left out, macOS's `._x` too."""
    # glob.glob passes hidden files over, and follows links to folders, unlike Path.glob.
    found = (folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True))
    return sorted(path for path in found if path.suffix.lower() in suffixes)


def _by_name(folder, suffixes):
    """Return {name: [files]}; a file's name is its path in `folder`, without its ending."""
    found = {}
    for path in image_files(folder, suffixes, "**/*"):
        name = path.relative_to(folder).with_suffix("").as_posix()
        # macOS writes an accent as a character of its own, and lists may not.
        found.setdefault(unicodedata.normalize("NFC", name), []).append(path)
    return found


def find_root(root, split):
    """Return the folder of a data set, absolute: `root`, the VOC in it, or a VOC to download."""
    if root in NAMES[1:]:
        root = download_voc("data", root.removeprefix("voc"), split)
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise DataError(f"{root}: {what}; give --data a folder, or one of {', '.join(NAMES[1:])}")
    folders = [root / folder / f"VOC{y}" for folder in ("VOCdevkit", "") for y in (2007, 2012)]
    folders = [folder for folder in folders if folder.is_dir()]
    if len(folders) > 1:
        _say(f"{root}: {folders[0].name} is taken; for the other, --data {folders[1]}")
    return folders[0] if folders else root


def find_folders(root, split):
    """Return the folders of a split's images and masks (one for both where Roboflow wrote it)."""
    for name in (split, "valid", ".") if split == "val" else (split, "."):
        if (root / name / ROBOFLOW).exists():
            return root / name, root / name
    for images, masks in LAYOUTS:
        if (root / images).is_dir() and image_files(root / masks, {".png"}, "**/*"):
            return root / images, root / masks
    found = {path.relative_to(root) for path in (*root.glob("*"), *root.glob("*/*"))}
    found = sorted({str(path.with_stem("*") if path.suffix else path) for path in found})
    raise DataError(
        f"{root}: has {', '.join(found[:8]) or 'nothing'}, but should have images/ and masks/*.png "
        "(or another layout of docs/formats.md); rename, save masks as PNG, or give another --data"
    )


def find_pairs(image_folder, mask_folder):
    """Return ({name: ([images], [masks])}, masks left over); each list has one file if all is well.

    The mask of NAME.jpg is NAME.png, NAME_mask.png (Carvana, Roboflow) or NAME.jpg.png (Supervisely).
    """
    images, masks = _by_name(image_folder, IMAGE_SUFFIXES), _by_name(mask_folder, {".png"})
    if image_folder == mask_folder:
        images = {name: files for name, files in images.items() if not name.endswith("_mask")}
        masks = {name: files for name, files in masks.items() if name.endswith("_mask")}
    pairs = {}
    for name, files in images.items():
        names = [name, f"{name}_mask", *(name + file.suffix for file in files)]
        pairs[name] = files, next((masks.pop(each) for each in names if each in masks), [])
    return pairs, [mask for files in masks.values() for mask in files]


def _read_names(list_path, image_folder, pairs):
    """Return the names of the images that a list means, a line each.

    A name may stand there with its ending, with its folder, and with its mask in another column.
    """
    names = []
    for line in _read_lines(list_path):
        found = []
        for text in (line, line.split()[0]):
            text = "/" + unicodedata.normalize("NFC", text.replace("\\", "/"))
            path = PurePosixPath(text.rpartition(f"/{image_folder.name}/")[2].lstrip("/"))
            has_ending = path.suffix.lower() in IMAGE_SUFFIXES
            found.append(str(path.with_suffix("") if has_ending else path))
        names.append(next((name for name in found if name in pairs), found[0]))
    once = list(dict.fromkeys(names))
    if len(once) < len(names):
        name = collections.Counter(names).most_common(1)[0][0]
        _say(f"{list_path}: names images more than once, such as {name}: each counts once")
    return once


def _folder_split(name):
    """Return which split an image's folder stands for: train/ is train, Validation/ val."""
    folder = name.rpartition("/")[0].split("/")[0].lower()
    return re.sub(r"^(train|val|test)(ing|id|idate|idation)?([-_ ]?set)?$", r"\1", folder)


def _share_out(root, split, names):
    """Return a fifth of the names for `val`, the others for `train`: by a hash of each name alone."""
    folders = sorted({name.split("/")[0] for name in names if "/" in name})
    within = f" in {', '.join(folders[:8])}" if folders else ""
    order = sorted((hashlib.sha256(os.fsencode(name)).hexdigest(), name) for name in names)
    if len(order) < 2:
        raise DataError(f"{root}: has {len(order)} labelled images; training needs 2 at least")
    few = sum(digest < "33" for digest, _ in order)  # 0x33 / 0xff is a fifth; none is left empty
    few = min(max(few, 1), len(order) - 1)
    chosen = sorted(name for _, name in (order[:few] if split == "val" else order[few:]))
    some = f"{len(chosen)} of {len(order)} images{within}, by their names, the same every time"
    _say(f"{root} has no lists of train and val: {split} is {some}")
    return chosen


def split_names(root, split, image_folder, pairs, roboflow):
    """Return the names of the images in a split: those that ImageSets/Segmentation/SPLIT.txt lists.

    A train.txt and val.txt may lie in `root` too, or images in folders train/, val/ and test/. Where
    there is none of these, about a fifth of its images is for `val`, the others for `train`: of
    those in trainval.txt or default.txt, or else of all that have a mask; never of those in
    test.txt. Which split an image is in depends on its own name alone, so it stays there when
    others are added, save where a split would be empty.
    """
    if roboflow and image_folder != root:  # the split has a folder of its own
        if not pairs:
            raise DataError(f"{image_folder}: has no images; export the data set again")
        return list(pairs)
    folder = root / "ImageSets" / "Segmentation"
    beside = [root / f"{name}.txt" for name in ("train", "val", "test")]
    found = [path for path in sorted(folder.glob("*.txt")) + beside if path.exists()]
    lists = {_folder_split(f"{path.stem}/"): path for path in found}  # CVAT has a Validation.txt
    lists |= {path.stem: path for path in found}
    if split in lists:
        names = _read_names(lists[split], image_folder, pairs)
        if not names:
            raise DataError(f"{lists[split]}: lists no images; write their names, one a line")
        return names
    parts, wanted = {name: _folder_split(name) for name in pairs}, _folder_split(f"{split}/")
    folders = set(parts.values())
    if wanted in folders and (wanted in ("val", "test") or {"train", "val"} <= folders):
        return [name for name in pairs if parts[name] == wanted]
    apart = {name for name in pairs if parts[name] in ("val", "test")}
    if "test" in lists:
        apart.update(_read_names(lists["test"], image_folder, pairs))
    if split == "train" and "val" in folders:
        return [name for name in pairs if name not in apart]
    if split not in ("train", "val") or "train" in lists or "val" in lists:
        said = f"; beside it lie {', '.join(path.name for path in found)}" if found else ""
        if root.name in ("VOC2007", "VOC2012"):
            said += f"; --data {root.name.lower()} downloads VOC's own"
        beside = lists.get("train") or lists.get("val") or folder / "train.txt"
        path = beside.parent / f"{split}.txt"
        raise DataError(f"{path}: does not exist; it should list the split's images{said}")
    both = lists.get("trainval") or lists.get("default")
    if both:
        names = set(_read_names(both, image_folder, pairs))
    else:
        bare = [name for name in pairs if not (pairs[name][1] or roboflow or name in apart)]
        names = pairs.keys() - bare
        if bare:
            some = f"{len(bare)} images, such as {bare[0]}"
            _say(f"{root}: {some}, have no mask of that name, a PNG, and are left out")
    return _share_out(root, split, names - apart)


class VOC(Dataset):
    """A split of a folder of images and masks; decoded and resized once, then kept as tensors.

    `root` holds two folders of `LAYOUTS`, or Roboflow's export, or `VOCdevkit/VOC2007/` (or
    `VOC2012/`) with these in it. See `find_pairs` for the names of the masks, `read_classes` and
    `split_names` for the classes and the splits. `names`: just these images, whatever lists say.

    Gives `(image, mask)`, uint8 (3, S, S) and (S, S); a list of indices gives a stacked batch.
    Mask values are class indices, or 255 for void. `images` and `masks` are the tensors of the
    whole split; with `load=False` they are None until `load()` is called. Raises DataError.
    """

    def __init__(self, root, split="train", size=224, names=None, load=True):
        self.root, self.split, self.size = find_root(root, split), split, size
        self.image_folder, mask_folder = find_folders(self.root, split)
        roboflow = self.image_folder == mask_folder
        home = self.image_folder if roboflow else self.root
        self.classes, self.palette, self.colors = read_classes(home)
        for file in self.root.glob(f"*/{ROBOFLOW}") if roboflow else ():
            if read_classes(file.parent)[0] != self.classes:
                raise DataError(f"{file}: has other classes than {home}; export them together")
        self.pairs, rest = find_pairs(self.image_folder, mask_folder)
        if names is None:
            names = split_names(self.root, split, self.image_folder, self.pairs, roboflow)
        self.names = list(names)
        known = [self.pairs.get(name, ([], [])) for name in self.names]
        if rest and all(images for images, _ in known):  # else a missing image is an error
            _say(f"{mask_folder}: {len(rest)} masks have no image, such as {rest[0].name}")
        blank = {name for name, (images, masks) in zip(self.names, known) if images and not masks}
        # CVAT and Roboflow write no mask for an image that shows nothing but background.
        writes_none = (roboflow or self.colors) and is_background(self.classes[0])
        if writes_none and 0 < len(blank) < len(self):
            some = f"{len(blank)} of {len(self)} images, such as {min(blank)},"
            _say(f"{self.root}: split {split}: {some} have no mask: they are all background")
        else:
            blank = set()  # where any mask is missing, `read` will say so
        self.image_paths, self.mask_paths = [], []  # which need not exist; None for a blank mask
        for name, (images, masks) in zip(self.names, known):
            self.image_paths += images[:1] or [self.image_folder / f"{name}.jpg"]
            expected = mask_folder / f"{name}{'_mask' if roboflow else ''}.png"
            self.mask_paths += masks[:1] or [None if name in blank else expected]
        self.images = self.masks = None
        if load:
            self.load()

    def load(self):
        """Decode the whole split into `images` and `masks`, with as many threads as cores.

        Where this takes more than a quarter of the memory, they lie in a temporary file, which has
        no name and is gone with the tensors. Processes of torchrun divide memory and cores.
        """
        n, size, processes = len(self), self.size, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed, folder = n * 4 * size**2, tempfile.gettempdir()
        if needed <= memory_size() / 4 / processes:
            pixels = torch.empty(needed, dtype=torch.uint8)
        else:
            said = f"{self.root}: split {self.split} takes {needed / 2**30:.2f} GiB, too much for memory"
            if shutil.disk_usage(folder).free < needed * processes:
                raise DataError(f"{said} and for {folder}; give a smaller --size, or set TMPDIR")
            _say(f"{said}: it is kept in a temporary file in {folder}")
            with tempfile.TemporaryFile() as file:
                pixels = torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=(needed,)))
        self.images = pixels[: n * 3 * size**2].view(n, 3, size, size)
        self.masks = pixels[n * 3 * size**2 :].view(n, size, size)

        def load_one(index):
            self.images[index], self.masks[index] = (to_tensor(p, size) for p in self.read(index))

        # Threads are enough: Pillow lets go of the interpreter while it decodes and resizes.
        with ThreadPoolExecutor(max(1, os.cpu_count() // processes)) as pool:
            list(pool.map(load_one, range(n)))

    def read(self, index):
        """Return an image and its mask at their own resolution, PIL images of mode RGB and L."""
        path, mask_path = self.image_paths[index], self.mask_paths[index]
        for files in self.pairs.get(self.names[index], ()):
            if len(files) > 1:
                raise DataError(f"{files[0]}: {files[1].name} has its name too; keep one of them")
        needed = f"does not exist, but is needed for split {self.split}"
        if not path.exists():
            some = f"has {len(self.pairs)} images, such as {', '.join(list(self.pairs)[:2])}"
            raise DataError(f"{path}: {needed}; {self.image_folder} {some}")
        if mask_path and not mask_path.exists():
            others = f"{path.stem}_mask.png or {path.name}.png"
            raise DataError(f"{mask_path}: {needed}; nor does {others}")
        image = load_image(path)
        mask = Image.new("L", image.size)
        if mask_path:
            mask = load_mask(mask_path, len(self.classes), self.colors)
        if image.size != mask.size:
            raise DataError(
                f"{mask_path}: is {mask.width}x{mask.height}, but its image, turned upright, is "
                f"{image.width}x{image.height}; export the mask again at that size"
            )
        return image, mask

    def full_mask(self, index):
        """Return the mask at its image's own resolution, uint8 (H, W)."""
        return torch.from_numpy(np.array(self.read(index)[1]))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.images[index], self.masks[index]


class Shapes(Dataset):
    """Drawn images of circles, squares, triangles and stars: real training with no download.

    Each class leans to a hue of its own, so that a network learns it in minutes. The same `split`,
    `seed` and index always give the same picture. Gives what `VOC` gives.
    """

    def __init__(self, split="train", size=64, seed=0):
        splits = {"train": 600, "val": 100, "test": 100}
        if split not in splits:
            raise DataError(f"shapes has no split '{split}'; choose from {', '.join(splits)}")
        self.root, self.split, self.size = None, split, size
        count, stream = splits[split], list(splits).index(split)
        self.names = [f"{split}_{i}" for i in range(count)]
        self.classes = ["background", "circle", "square", "triangle", "star"]
        self.palette = color_map(len(self.classes))
        pairs = [draw_shapes(np.random.default_rng([seed, stream, i]), size) for i in range(count)]
        self.images = torch.stack([to_tensor(image, size) for image, _ in pairs])
        self.masks = torch.stack([to_tensor(mask, size) for _, mask in pairs])

    def full_mask(self, index):
        """Return the mask, uint8 (S, S): drawn images have no other resolution."""
        return self.masks[index]

    __len__, __getitem__ = VOC.__len__, VOC.__getitem__


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


def load_dataset(name, split, size, names=None, load=True, device=None):
    """Return the data set that a script's --data names: `shapes`, `voc2007`, `voc2012` or a folder.

    VOC is data/VOCdevkit/VOC2007 or VOC2012, downloaded where missing. names, load: see `VOC`. It
    is moved to a CUDA `device` if it fills less than a quarter of its memory.
    """
    dataset = Shapes(split, size) if name == "shapes" else VOC(name, split, size, names, load)
    if device and device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        if dataset.images.numel() + dataset.masks.numel() < memory / 4:
            dataset.images, dataset.masks = dataset.images.to(device), dataset.masks.to(device)
    return dataset


def learned_from(images, names):
    """Return those names that a checkpoint's `images`, or those before them, say were learned from."""
    learned = set()
    while images:  # VOC 2012 calls VOC 2007's 000032 2007_000032
        learned |= {name.removeprefix("2007_") for name in images.get("train", ())}
        images = images.get("before")
    return [name for name in names if name.removeprefix("2007_") in learned]


def memory_size():
    """Return how many bytes of memory this machine has; 8 GiB where it does not tell (Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return 8 * 2**30


def download_voc(root, year, split):
    """Make sure that `root`/VOCdevkit/VOC`year` holds the split; return that folder.

    Only the archive that has the split is fetched (train, val and trainval share one, 2007's test
    has its own), and only where the split's list is missing. Of several processes, let one come
    first: the others then find the files there.
    """
    folder = Path(root, "VOCdevkit", f"VOC{year}")
    if (folder / "ImageSets" / "Segmentation" / f"{split}.txt").exists():
        return folder
    splits = ["train", "val", "trainval"] + ["test"] * (year == "2007")
    if split not in splits:
        raise DataError(f"VOC {year} has no split '{split}'; it has {', '.join(splits)}")

    from torchvision.datasets import utils, voc  # here, because they take seconds to import

    source = voc.DATASET_YEAR_DICT["2007-test" if split == "test" else year]
    path = Path(root, source["filename"])
    print(f"downloading {source['url']} to {root}/", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(TIMEOUT)  # else torchvision waits for a silent host for ever
        utils.download_url(source["url"], root, path.name, source["md5"])
        with tarfile.open(path) as tar:
            # Its lists come last: where they are, an earlier unpacking came to its end.
            members = sorted(tar, key=lambda member: "ImageSets" in member.name)
            for member in members:
                member.name = member.name.lstrip("/")
                if ".." in member.name or not (member.isfile() or member.isdir()):
                    raise tarfile.TarError(f"'{member.name}' in it is no file inside {root}")
            # Python's own check on top, which Debian 12's 3.11.2 does not have.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(root, members)
    except (OSError, RuntimeError, HTTPException, tarfile.TarError) as error:
        raise DataError(
            f"{source['url']}: cannot be downloaded ({error}); fetch it by other means, save it "
            f"as {path} (md5 {source['md5']}) and run this again"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return folder


def epoch_order(dataset, batch_size, seed, epoch):
    """Return the indices of an epoch's batches, int64 (batches, batch_size), in random order.

    Epoch n, from 1, has a seeded generator's n-th permutation: alike in all processes, and no state
    to keep. Whole batches only, since batch norm learns badly from a few images that are left over;
    the order differs from epoch to epoch, so no image is left out for good.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epoch):
        order = torch.randperm(len(dataset), generator=generator)
    batch_size = min(batch_size, len(order))  # a set that is smaller is one batch
    order = order[: len(order) // batch_size * batch_size].view(-1, batch_size)
    return order.to(dataset.images.device)


def fetch(dataset, indices, device):
    """Return the images and masks at some indices as tensors on a device."""
    images, masks = dataset[indices]
    cuda = device.type == "cuda"
    if cuda and not images.is_cuda:
        images, masks = images.pin_memory(), masks.pin_memory()
    # A copy that nobody waits for is safe on CUDA alone, where the kernels queue behind it.
    return [tensor.to(device, non_blocking=cuda) for tensor in (images, masks)]


def _channels(values, device):
    """Return numbers as float32 (3, 1, 1), made on the device: a copy to it makes the CPU wait."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])


def _check_bytes(images):
    """Raise TypeError for images of another type: those of torchvision's ToTensor go up to 1."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images should be uint8, from 0 to 255, and are {images.dtype}")


def normalize(images):
    """Return uint8 images (N, 3, H, W), or one, as float32, less ImageNet's mean, over its deviation."""
    _check_bytes(images)
    mean, std = _channels(MEAN, images.device), _channels(STD, images.device)
    normalized = (images / 255 - mean) / std
    # The layout of the weights (utils.fast_layout); else some layers would run in another.
    older = images.is_cuda and torch.cuda.get_device_capability(images.device) < (8, 0)
    plain = older or images.is_mps or images.dim() == 3
    layout = torch.contiguous_format if plain else torch.channels_last
    return normalized.contiguous(memory_format=layout)


def augment(images, masks, mode="affine", size=None):
    """Give each sample of a batch its own random transform, the same to its image and mask.

    images: uint8 (N, 3, H, W); masks: uint8 (N, H, W); returns the same, size x size pixels.
    Mode `flip` mirrors left-right and top-bottom, each for half of the samples (the paper's).
    Mode `affine` mirrors left-right alone, since photographs have an up, rotates by up to 15
    degrees, shears by up to 0.1, stretches by up to 1.2, and zooms by 0.8 to 2.6 to any place in
    the picture; give it images larger than `size`, and what it zooms in to has detail. Then it
    changes the images' brightness, contrast and saturation, each by up to 30 %, and tint by 15 %.
    Images are sampled once, bilinearly, masks by nearest neighbour at the very same points; what
    comes from outside the picture is void in the mask and about the mean colour in the image.
    """
    _check_bytes(images)
    n, height, width = masks.shape
    matrices = random_matrices(n, mode, width / height, images.device)
    shape = (n, 3, size or height, size or width)
    grid = F.affine_grid(matrices, shape, align_corners=False)
    # grid_sample fills with 0 outside, so 0 is made to stand for the mean colour, and for void.
    mean = 255 * _channels(MEAN, images.device)
    centered, below_void = images - mean, masks[:, None] - float(VOID)
    images = F.grid_sample(centered, grid, mode="bilinear", align_corners=False) + mean
    masks = F.grid_sample(below_void, grid, mode="nearest", align_corners=False) + VOID
    if mode == "affine":
        images = jitter_colors(images)
    return images.round().clamp(0, 255).byte(), masks[:, 0].round().byte()


def random_matrices(n, mode, aspect, device):
    """Return n random transforms of `augment`'s mode, float32 (n, 2, 3).

    Each maps an output point to the input point whose colour it takes: mirror and stretch, then
    shear, rotate, zoom and shift. Coordinates go from -1 to 1 across the picture, whose width is
    `aspect` times its height. Raises ValueError for an unknown mode.
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
        reach = (1 - 1 / zoom).abs() + 0.25  # of a width of 2: up to 1/8 past the edge
        shift_x, shift_y = uniform(-1, 1) * reach, uniform(-1, 1) * reach
    elif mode != "flip":
        raise ValueError(f"no augmentation is called '{mode}'; choose from {', '.join(MODES)}")
    # With x in units of the height, from right to left:
    # shift + 1 / zoom * [cos -sin; sin cos] * [1 shear; 0 1] * [mirror_x * stretch 0; 0 mirror_y]
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    mirror_x = mirror_x * stretch
    first = [mirror_x * cos, mirror_y * (shear * cos - sin) / aspect, shift_x]
    second = [mirror_x * sin * aspect, mirror_y * (shear * sin + cos), shift_y]
    return torch.stack([torch.stack(first, 1), torch.stack(second, 1)], dim=1)


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
    counts = [mask.flatten().bincount(minlength=256) for mask in dataset.masks.cpu()]
    return torch.stack(counts)[:, : len(dataset.classes)]


def require_labels(dataset, learns=True):
    """Raise DataError where masks have nothing to learn, or to score by; return their class counts.

    learns: whether the set is for training, where background alone will not do.
    """
    where = f"{dataset.root}: split {dataset.split}"
    each = class_counts(dataset)
    counts = each.sum(0)
    if not counts.any():
        raise DataError(f"{where} has no pixel with a label: its masks are all void ({VOID})")
    if not counts[1:].any() and (learns or (dataset.masks == VOID).any()):
        size = f"{dataset.size}x{dataset.size}"
        raise DataError(
            f"{where}: the masks have nothing but {dataset.classes[0]} (0) and perhaps void ({VOID}) "
            f"at {size}: no object, or one that is marked with {VOID}, which should be 1"
        )
    return each


def remark_on_void(dataset, counts):
    """Say which masks have only background and void, which may be an object marked 255."""
    size = dataset.size
    bare = (counts[:, 1:].sum(1) == 0) & (counts[:, 0] < size**2)
    if bare.any():
        some = f"{bare.sum()} masks, such as that of {dataset.names[bare.int().argmax()]},"
        _say(
            f"{dataset.root}: at {size}x{size} {some} have 0 and {VOID} alone: void, or an object "
            "that should be 1? data.py looks them over"
        )


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
        raise ValueError(f"no scheme is called '{scheme}'; choose from {', '.join(SCHEMES)}")
    if scheme != "enet":
        weights[pixels == 0] = 1
    return weights.float()


def look_over(dataset, shades):
    """Read all of a data set, fill in its `masks`, print what it has; return what is wrong, lines.

    shades: {index: the colours that palettes give to it}, of the data sets looked at before.
    """
    n, size, classes = len(dataset), dataset.size, dataset.classes
    dataset.masks = torch.full((n, size, size), VOID, dtype=torch.uint8)
    full, errors, turned = torch.zeros(n, 256, dtype=torch.int64), [], []
    for index in range(n):
        try:
            image, mask = dataset.read(index)
        except DataError as error:
            errors.append(str(error))
            continue
        full[index] = torch.tensor(mask.histogram())
        dataset.masks[index] = to_tensor(mask, size)
        with Image.open(dataset.image_paths[index]) as file:
            # `read` refuses a quarter turn that the mask lacks; not half a turn, or a mirror.
            if file.getexif().get(0x0112, 1) > 1 and file.size == image.size:
                turned.append(dataset.names[index])
        if dataset.mask_paths[index] and not dataset.colors:
            with Image.open(dataset.mask_paths[index]) as file:
                for color, i in file.palette.colors.items() if file.palette else ():
                    if full[index, i] and i != VOID:
                        shades[i].add(color)
    print(f"\n{dataset.root}: split {dataset.split}, {n} images, at {size}x{size}")
    if errors:
        return errors
    counts = require_labels(dataset, learns=dataset.split == "train")
    print(f"{'class':<16}{'images':>8}{'% pixels':>10}")
    for name, now, before in zip(classes, counts.T, full.T):
        shown, lost = (now > 0).sum(), ((before > 0) & (now == 0)).sum()  # images
        remark = f"  vanishes from {lost} of {(before > 0).sum()}: a larger --size keeps more"
        share = 100 * now.sum() / counts.sum()
        print(f"{name:<16}{shown:>8}{share:>10.3f}{remark if lost else ''}")
    print(f"void: {(dataset.masks == VOID).float().mean():.1%} of all pixels")
    if not is_background(classes[0]):
        print(f"class 0 is {classes[0]}; if 0 means background, list background first")
    bare = [name for name, row in zip(dataset.names, full) if row[VOID] and not row[1:VOID].any()]
    if bare:
        several = f"{len(bare)} masks, such as that of {bare[0]}, have"
        print(f"{several} 0 and {VOID} alone: void, or an object that should be 1?")
    unclear = [str(i) for i, colors in shades.items() if len(colors) > 1]
    if unclear:
        print(f"the masks' palettes disagree on the colour of {', '.join(unclear)}: mixed up?")
    if turned:
        some = f"{len(turned)} images, such as {turned[0]}"
        print(f"EXIF data turn or mirror {some}: their masks must be upright")
    return errors


def main(argv=None):
    """Look a folder over; return 1 where training would refuse it, else 0."""
    import utils  # here, so that this file can be copied out alone

    parser = utils.make_parser(__doc__)
    add, size = parser.add_argument, utils.number(int, 32, 4096)
    add("--data", default="voc2007", help="a folder, voc2007 or voc2012; default: voc2007")
    add("--splits", nargs="+", default=["train", "val"], metavar="NAME", help="default: train val")
    add("--size", type=size, default=224, help="pixels are counted at this size; default: 224")
    args = parser.parse_args(argv)
    sets, errors, shades = [], [], collections.defaultdict(set)
    for split in args.splits:
        try:
            sets.append(VOC(args.data, split, args.size, load=False))
            errors += [f"{split}: {line}" for line in look_over(sets[-1], shades)]
        except DataError as error:
            errors.append(f"{split}: {error}")
    used = [path for dataset in sets for path in set(dataset.image_paths)]
    unused = {files[0] for dataset in sets for files, _ in dataset.pairs.values()} - set(used)
    print(f"\n{len(used) - len(set(used))} images are in more than one of these splits", end=", ")
    print(f"{len(unused)} of the folder in none")
    if errors:
        print(f"\nto mend before training ({len(errors)}):", *errors, sep="\n  ")
        return 1
    print("nothing that training would refuse")
    return 0


if __name__ == "__main__":
    import utils

    utils.cli(main, DataError)
