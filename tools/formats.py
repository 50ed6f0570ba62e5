"""What a folder of another tool's holds: the formats that prepare.py reads, each a function.

A format is a function in FORMATS; it takes a Folder and returns an Export, or None for a folder of
another kind. prepare.py reads, checks and writes what an Export names.
"""

import base64
import io
import json
import os
import re
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

import data  # prepare.py says where it lies
from data import VOID, DataError

PICTURES = data.IMAGE_SUFFIXES | {".gif", ".npy"}
JPEGS = {".jpg", ".jpeg", ".jfif"}
# What the words in a folder's name say of the pictures in it; of masks the first kind is taken.
IMAGE_WORDS = "images image imgs img jpegimages pictures photos leftimg input original stillsraw"
MASK_WORDS = (
    "segmentationclasspng segmentationclass segmentationclassaug machine manual trimaps masks mask "
    "labels label annotations annotation annot ann gts gt groundtruth truth segmentation "
    "labeledapproved"
)
OTHER_WORDS = (
    "segmentationclassnpy segmentationclassvisualization segmentationobject human overlays "
    "nd"  # DRIVE's 2nd_manual, another's masks of the same images
)
# What precedes or follows an image's name in its mask's name, or in its own.
MASK_ENDS = "masks?|segmentations?|seg|labels?|gt|l|manual|anno|annotation|groundtruth"
MASK_END = rf"({MASK_ENDS})(_?\d{{1,2}})?"  # a_mask_1, a_mask_2: several masks of one image
ENDS = f"{MASK_ENDS}|training|test|images?|img|sat|rgb|leftImg8bit|gtFine|labelIds|labelTrainIds"
BACKGROUNDS = "background bg sky other void unlabeled unlabelled ignore"
VOIDS = "void unlabeled unlabelled ignore"  # names of what is no class
CAMVID = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
CITYSCAPES = (  # labelIds and names of the 19 classes that are trained on
    "7 road,8 sidewalk,11 building,12 wall,13 fence,17 pole,19 traffic light,20 traffic sign,"
    "21 vegetation,22 terrain,23 sky,24 person,25 rider,26 car,27 truck,28 bus,31 train,"
    "32 motorcycle,33 bicycle"
)
CLASS_FILES = r"label_?map\.txt|.*(class|colou?r|palette).*\.(csv|txt)|(labels|codes)\.txt"
BGR = r"(.*[\W_])?(bgr|b(lue)?[\W_].*g(reen)?[\W_].*r(ed)?)([\W_].*)?"  # a header like name,b,g,r
VOC_VOID = (224, 224, 192)  # the colour of void in VOC's masks
RGB = r"(?P<r>\d+)[\s,;]+(?P<g>\d+)[\s,;]+(?P<b>\d+)"
CLASS_LINES = (  # what the lines of such files look like; CVAT's have colons, names may have too
    rf"{RGB}[\s,;:]+(?P<name>.+)",
    rf"(\d+[,;]\s*)?(?P<name>.+?)[\s,;:=([]+{RGB}[)\]]?(:[^:]*){{0,2}}",
    r"(?P<value>\d+)\s*[,;:\s]\s*(?P<name>.+)",
    r"(?P<name>.+?)\s*[,;:=\t]\s*(?P<value>\d+)",
)
NAME_FIRST = r"\W*(name|label|class)\w*[\s,;:]+r\w*[\s,;]+g\w*[\s,;]+b\w*"  # a header


@dataclass
class Item:
    """An image and its mask: a file, a list of shapes (see `draw`), or None: background alone."""

    image: Path
    mask: object = None
    size: tuple = None  # (width, height) that the shapes were drawn on, if not the image's
    lists: frozenset = frozenset()  # train, val, test, ...
    name: str = ""  # in the new folder
    more: tuple = ()  # further files, each of another object of the same image


@dataclass
class Export:
    """What a format's function returns."""

    items: list  # None for the pairs that `find_pairs` finds
    names: list  # of the classes, [] if unknown
    table: dict  # {what stands in a mask: class}: a value, (red, green, blue), a shape's name
    where: str = "the values in the masks"  # the classes are known from
    blank: bool = False  # whether an image without a mask shows nothing but background


class Folder:
    """The files below a folder, hidden ones left out."""

    def __init__(self, root):
        self.root, self.files, self.index = root, [], {}
        for here, folders, names in os.walk(root, followlinks=True):
            folders[:] = sorted(name for name in folders if name[0] not in "._")
            self.files += [Path(here, name) for name in sorted(names) if name[0] != "."]
        self.pictures = [path for path in self.files if path.suffix.lower() in PICTURES]
        for path in self.pictures:
            for name in {normal(path.name), normal(path.stem)}:
                self.index.setdefault(name, []).append(path)
        # The name of a folder that all the others lie in, such as Dataset_BUSI_with_GT, tells nothing.
        folders = {str(path.parent) for path in self.pictures}
        self.top = Path(os.path.commonpath(folders or [root]))
        if self.top != root and str(self.top) in folders:
            self.top = self.top.parent

    def named(self, pattern):
        """Return the files whose name is like a pattern, those nearest to the root first."""
        found = [path for path in self.files if re.fullmatch(pattern, path.name, re.IGNORECASE)]
        return sorted(found, key=lambda path: (len(path.parts), path))

    def find(self, text, split="", among=None):
        """Return the picture that a text means, by as much of its path as is needed, or None."""
        parts = [part for part in re.split(r"[\\/]+", normal(text.strip())) if part] or [""]
        stem = re.sub(r"\.\w+$", "", parts[-1]) if Path(text).suffix.lower() in PICTURES else ""
        found = {*self.index.get(parts[-1], ()), *self.index.get(stem, ())}
        found = {path for path in found if among is None or path in among}
        for depth in range(2, len(parts) + 1):
            near = {path for path in found if normal(path.parts[-depth:][0]) == parts[-depth]}
            found = near if len(found) > 1 and near else found
        if len(found) > 1:  # train/1.jpg or val/1.jpg?
            found = {path for path in found if split and split in map(split_of, path.parts)}
        return found.pop() if len(found) == 1 else None


def normal(text):
    return unicodedata.normalize("NFC", text)  # macOS writes an accent as a character of its own


def words(text):
    """Return the words in a name; train_labels and trainannot have two."""
    return re.findall("[a-z]+", re.sub(r"(?<=[a-z])annot\b", " annot", text.lower()))


def split_of(text):
    """Return the split that a name stands for, such as train for train2017 and Training, or ''."""
    found = re.search(r"\b(train|val|test)(ing|id|idate|idation|set)?\b", " ".join(words(text)))
    return found[1] if found else ""


def describe(folder, path):
    """Return (role, place) of a picture by the names of its folders, the innermost first.

    role: the rank of a folder of masks, "image", "other" or "". place: the folders that tell it
    from pictures of the same name; those of splits end with a slash.
    """
    role, place = "", []
    for part in path.relative_to(folder.top).parts[:-1]:
        apart = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", part)  # PedMasks
        found, split = {*words(part), *words(apart)}, split_of(part) or split_of(apart)
        kinds = [rank for rank, word in enumerate(MASK_WORDS.split()) if word in found]
        kinds += ["image"] if found & set(IMAGE_WORDS.split()) else []
        kinds = ["other"] if found & set(OTHER_WORDS.split()) else kinds
        role = kinds[0] if kinds else role
        if split and (kinds or len(words(part)) == 1):
            place.append(f"{split}/")
        elif not kinds:
            place.append(part)
    return role, tuple(place)


# -------------------------------------------------------------------- which mask is which image's


def core(path):
    """Return a file's name without what marks a mask or an image: a of a_mask.png, a.jpg.png."""
    stem, before = normal(path.stem), None
    while stem != before:
        ends = rf"[-_. ]+({MASK_END}|({ENDS})\d?)$|^({ENDS})[-_. ]+"
        ends = rf"{ends}|\.(jpe?g|png|tiff?|bmp)$"
        stem, before = re.sub(ends, "", stem, flags=re.IGNORECASE) or stem, stem
    return stem


def match(folder, images, masks):
    """Return {image: [masks]}, by the first of several ways to compare names that finds the most.

    One image has several masks where these differ by a last number alone, a_mask.png and
    a_mask_1.png; or where it is alone in folders of its own, and its masks' names are nobody else's.
    """
    places = {path: describe(folder, path)[1] for path in (*images, *masks)}
    stems = Counter(path.stem for path in masks)

    def nothing(path):  # so that folders alone tell
        return ""

    def belong(way, place, masks):
        if way is nothing:
            has_folder = any(part[-1] != "/" for part in place)
            return has_folder and all(stems[mask.stem] == 1 for mask in masks)
        alike = {re.sub(r"[_ ]?\d+$", "", mask.stem) for mask in masks}
        return len(masks) == 1 or (way is core and len(alike) == 1)

    best, stem = {}, lambda path: normal(path.stem)
    ways = [(way, True) for way in (stem, core, nothing)]
    for way, same_place in [*ways, (stem, False), (core, False)]:
        keys, pairs = {}, {}
        for path in (*images, *masks):
            key = places[path] if same_place else (), way(path)
            keys.setdefault(key, ([], []))[path in masks].append(path)
        for (place, _), (ours, theirs) in keys.items():
            if len(ours) == 1 and theirs and belong(way, place, theirs):
                pairs[ours[0]] = sorted(theirs)
            elif ours and theirs and way is stem and same_place:
                one, two = ours[:2] if len(ours) > 1 else theirs[:2]
                other = two.relative_to(folder.root)
                raise DataError(one, f"{other} has its name too", "rename or delete one of them")
        best = pairs if len(pairs) > len(best) else best
    return best


def divide(folder):
    """Return (images, {rank: masks}); {} where no masks are recognised."""
    groups = {}
    for path in folder.pictures:
        groups.setdefault(describe(folder, path)[0], set()).add(path)
    images = {path for path in groups.get("image") or groups.get("", ()) if path.suffix != ".npy"}
    groups = {rank: groups[rank] for rank in range(len(MASK_WORDS.split())) if rank in groups}
    if not groups:  # side by side: a.jpg and a_mask.png, or a.jpg and a.png
        marked = rf".*[-_. ]{MASK_END}\.\w+"
        masks = {path for path in images if re.fullmatch(marked, path.name, re.IGNORECASE)}
        others = {path.with_name(core(path)) for path in images - masks}
        masks = {path for path in masks if path.with_name(core(path)) in others}
        pngs = {path.with_suffix(".png") for path in images if path.suffix.lower() in JPEGS}
        masks = masks or (pngs & images if 2 * len(pngs) == len(images) else set())
        groups, images = {0: masks} if masks else {}, images - masks
    return sorted(images), groups


def find_pairs(folder, export):
    """Fill in `export.items`: by lists that name masks too, else by the names of the files."""
    images, groups = divide(folder)
    if not images:
        how = "export it with its images (in CVAT: Save images), or put them into images/"
        how = "save the .heic photos as JPEG" if folder.named(r".*\.hei[cf]") else how
        raise DataError(folder.root, "has masks, but no images", how)
    listed = [pair for found in read_lists(folder, images).values() for pair in found]
    pairs = {image: [mask] for image, mask in listed if mask}
    blank, how = export.blank and not pairs, "lists" if pairs else "names"
    blank = blank and any(named_like(name, f"background {VOIDS}") for name in export.names)
    kinds = [match(folder, images, masks) for masks in groups.values()]
    used = {*chain(*pairs.values())}  # VOC's train_aug.txt has a second column, val.txt has none
    named = {}
    if kinds:
        named = max(kinds, key=lambda kind: (len(used & {*chain(*kind.values())}), len(kind)))
    wanted = {image for image, _ in listed} if pairs else named.keys()
    pairs = {image: mask for image, mask in named.items() if image in wanted} | pairs
    if not pairs:
        some = ", ".join(path.name[:30] for masks in groups.values() for path in sorted(masks)[:2])
        what = f"no mask ({some}) is called like an image ({images[0].name[:30]})"
        raise DataError(folder.root, what, "call the mask of images/a.jpg masks/a.png")
    image, masks = min(pairs.items())
    print(f"by {how}: {masks[0].relative_to(folder.root)} is the mask of {image.name}, and so on")
    bare = sorted(set(images) - pairs.keys())
    lone = sorted(set().union(*groups.values()) - {*chain(*pairs.values())})
    several = [image for image, masks in pairs.items() if len(masks) > 1]
    for first, *others in pairs.values():
        for other in others:  # a folder for each class? left and right halves are of one
            sides = {re.sub("left|right", "", str(each.parent).lower()) for each in (first, other)}
            if len(sides) > 1:
                what = f"{other.relative_to(folder.root)} is a mask of the same image"
                how = "make one of both, with a value for each class; or, of one class, put them "
                raise DataError(first, what, f"{how}into one folder, as a_mask_1.png, a_mask_2.png")
    if several:
        print(f"{len(several)} images, such as {several[0].name}, have several masks: one mask now")
    if bare:
        rest = "all background" if blank else "left out"
        print(f"{len(bare)} images, such as {bare[0].name}, have no mask: they are {rest}")
    if lone:
        print(f"{len(lone)} masks, such as {lone[0].name}, have no image: they are left out")
    pairs |= {image: [None] for image in bare} if blank else {}
    pairs = sorted(pairs.items())
    export.items = [Item(image, mask, more=tuple(more)) for image, (mask, *more) in pairs]


def read_lists(folder, images):
    """Return {list's name: [(image, mask or None)]}; lists may have paths, endings, two columns."""
    images, lists = set(images), {}
    for path in folder.named(r".*\.(txt|lst)"):
        split, exact, pairs, lost = split_of(path.stem), len(words(path.stem)) == 1, [], []
        other = path.parent.name in ("labels", "Main", "Action", "Layout")  # of VOC's
        if path.stem in ("trainval", "default") or other:
            continue
        for line in data.read_lines(path) if split or path.parent.name == "Segmentation" else ():
            image = mask = None
            for space in re.finditer(r"[\s,]+", line):
                image = image or folder.find(line[: space.start()], split, images)
                mask = mask or image and folder.find(line[space.end() :], split)
            image = image if mask else folder.find(line, split, images) or image
            (pairs if image else lost).append((image, mask) if image else line)
        if lost and pairs:
            print(f"{path.name}: {len(lost)} lines name no image, such as {lost[0]}")
        # train_aug is a list of its own, and train too where there is no other.
        own, common = "" if exact else path.stem, split if exact or split not in lists else ""
        lists |= {name: pairs for name in (own, common) if name and pairs}
    return lists


def settle(folder, items):
    """Fill in the lists that items are in, by lists or else by folders, and their new names."""
    by_image = {item.image: item for item in items}
    places = {item.image: describe(folder, item.image)[1] for item in items}
    for name, pairs in read_lists(folder, by_image).items():
        for image, _ in pairs:
            by_image[image].lists |= {name}
    known = any(item.lists for item in items)
    for item in [] if known else items:
        item.lists = {part[:-1] for part in places[item.image] if part[-1] == "/"}
    used = set().union(*(item.lists for item in items))
    rest = [item for item in items if not item.lists]
    if "val" in used and "train" not in used:
        for item in rest:
            item.lists = {"train"}
    elif not {"train", "val"} <= used:  # data.py shares out what is not in test
        for item in items:
            item.lists -= {"train", "val"} if len(used) > 1 or rest else used
    for ends in ("/", ""):  # without the folders of splits, if names stay different
        names = {}
        for item in items:
            place = [part.strip("/") for part in places[item.image] if part[-1] != ends]
            item.name = normal("_".join([*place, item.image.stem]))
            with data.blame(item.image, "give it a name of UTF-8 letters"):
                item.name.encode()
            # Macs and Windows take A.jpg and a.jpg for one file.
            names.setdefault(item.name.casefold(), []).append(item.image)
        if len(names) == len(items):
            return
    twice = next(paths for paths in names.values() if len(paths) > 1)
    if twice[0] == twice[1]:
        raise DataError(twice[0], "has outlines in two places", "delete one of the two")
    raise DataError(twice[0], f"would be called like {twice[1]}", "rename one of the two")


# ------------------------------------------------------------------- classes, values and colours


def parse_classes(path):
    """Return (names, {colour or value: index}) of a file that lists classes; {}: a name a line."""
    every = data.read_lines(path)
    lines = [line for line in every if not line.startswith(("# ", "//"))]
    name_first = any(re.fullmatch(NAME_FIRST, line, re.IGNORECASE) for line in every)
    for kind in CLASS_LINES[1:] if name_first else CLASS_LINES:
        found = [re.fullmatch(kind, line) for line in lines]
        found = found[1:] if found and not found[0] else found  # a header
        if found and all(found):
            by_value, table = "value" in found[0].groupdict(), {}
            for header in [] if by_value else every[: every.index(found[0].string)]:
                if re.fullmatch(BGR, header, re.IGNORECASE):
                    raise DataError(path, f"has its colours as {header}", "write red, green, blue")
            for index, row in enumerate(found):
                key = int(row["value"]) if by_value else tuple(int(row[each]) for each in "rgb")
                if key in table:
                    raise DataError(path, f"has {key} twice", "give it to one class")
                table[key] = index
            return [row["name"].strip("\"' ") for row in found], table
    return (lines, {}) if path.suffix.lower() == ".txt" else ([], {})


def named_like(name, known="background"):
    return name.lower().strip("_ ") in known.split()


def background_first(names):
    """Return the names, each once, the background's first, which outlines seldom have."""
    names = [name for name in dict.fromkeys(names) if name != "__ignore__"]
    first = [name for name in names if named_like(name)][:1] or ["background"]
    return first + [name for name in names if name not in first]


def has_colors(table):
    """Return whether a list of classes names their colours, not their values."""
    return isinstance(next(iter(table)), tuple)


def read_classes(folder):
    """Return an Export with the classes, and what they look like in masks, that a list names."""
    known = [(*parse_classes(path), path) for path in folder.named(CLASS_FILES)]
    for names, _, path in known:
        if not names:
            data.say(f"{path.name} is not understood as a list of classes: name,r,g,b in each line")
    known = sorted([each for each in known if each[0]], key=lambda each: not each[1])
    if not known:
        is_voc = (folder.root / "JPEGImages").is_dir()
        return Export(None, data.read_classes(folder.root) if is_voc else [], {})
    names, table, path = known[0]  # lists of colours come first
    for other in known[1:]:  # Roboflow's lie in train/, valid/ and test/
        if other[2].name == path.name and other[:2] != (names, table):
            raise DataError(other[2], f"has other classes than {path}", "export them together")
    if "__ignore__" in names:  # of labelme's labels.txt; it stands for void, and is not counted
        names.remove("__ignore__")
        if not names or not named_like(names[0]):
            what = "has __ignore__, but no _background_, so what 0 means is unclear"
            raise DataError(path, what, "delete the line; or call it void, and give --void void")
    if table:  # lines of colours may have any order, and count as values too
        order = sorted(names, key=lambda name: not named_like(name))
        values = dict(enumerate(names)) if has_colors(table) else {}
        for theirs, numbers, other in reversed(known[1:]):  # plain lists before numbered ones
            if sorted(theirs) != sorted(names):
                data.say(f"{other.name} has other classes than {path.name}, which counts")
            elif not numbers:
                order, values = theirs, dict(enumerate(theirs)) if values else {}
            elif values and not has_colors(numbers):
                values = {value: theirs[i] for value, i in numbers.items()}
        meant = values | {key: names[i] for key, i in table.items()}
        names, table = order, {VOID: VOID, VOC_VOID: VOID}
        table |= {key: names.index(name) for key, name in meant.items()}
    blank = path.name in ("labelmap.txt", "_classes.csv")  # CVAT's, Roboflow's
    return Export(None, names, table, str(path.relative_to(folder.root)), blank)


def read_values(path, colors):
    """Return (a mask's values, int (H, W), or colours, uint8 (H, W, 3), a Counter of these).

    A palette that has only the known colors counts by them, for tools put its indices in any order;
    so does one of black and white alone. 255 is void if it has no class's colour for itself.
    """
    with data.blame(path, "save it again, as palette PNG"):
        if path.suffix.lower() == ".npy":
            values = np.squeeze(np.load(path))
            if values.ndim != 2 or values.min() < -1 or (values != np.round(values)).any():
                raise ValueError(f"is {values.dtype} {values.shape}, and no labels")
            values = np.where(values < 0, VOID, values)
        else:
            with Image.open(path) as file:
                raw, image = str(file.tile[0][3]), ImageOps.exif_transpose(file)
            if image.mode == "P":
                palette = [*map(tuple, np.array(image.getpalette()).reshape(-1, 3).tolist())]
                used = {i for i, count in enumerate(image.histogram()) if count}
                black_white = {*palette} == {(0, 0, 0), (255, 255, 255)}
                if colors and len(palette) > VOID:  # some programs fill a palette up with black
                    own = palette[VOID] in colors and palette[VOID] not in palette[:VOID]
                    palette[VOID] = palette[VOID] if own else VOC_VOID
                has_color = max(used) < len(palette)  # else Pillow would take black
                if has_color and ({palette[i] for i in used} <= colors.keys() or black_white):
                    image.putpalette([*chain(*palette)])
                    image = image.convert("RGB")
            values = np.asarray(image)
            if image.mode in ("RGBA", "LA"):
                if values[..., -1].min() < 255:
                    raise ValueError("is transparent in parts")
                values = values[..., :-1].squeeze()
            if path.suffix.lower() in JPEGS and np.ptp(np.atleast_3d(values), 2).max() <= 16:
                values = np.atleast_3d(values)[..., 0]
            # Gray of 2 or 4 bits is stretched to 255 by Pillow.
            values = values // {"L;2": 85, "L;4": 17}[raw] if raw in ("L;2", "L;4") else values
        if values.ndim == 3:
            image = Image.fromarray(values)
            found = image.getcolors(4096) or image.getcolors(values.size)
            return values, Counter({color: count for count, color in found})
        values = values.astype(np.int64)
        counts = np.bincount(values.ravel())
        return values, Counter({i: int(counts[i]) for i in np.flatnonzero(counts).tolist()})


def understand(folder, export, found, paths):
    """Fill in what values and colours mean where the format leaves it open; return the values.

    found: a Counter of what stands in all masks; paths: of the masks. Raises DataError.
    """
    names, table = export.names, export.table
    colors = [key for key in found if isinstance(key, tuple)]
    # Gray three times over, as OpenCV writes it, stands for values.
    thrice = all(len(set(key)) == 1 for key in colors) and not all(key in table for key in colors)
    found = Counter({key[0] if thrice and key in colors else key: found[key] for key in found})
    grays = {key for key in found if isinstance(key, int)}
    high, middle = max(grays - {VOID}, default=0), sum(found[value] for value in range(48, 208))
    two = len(names) <= 2 and high < 256 and (found[VOID] or high > 207)
    if grays and all((value,) * 3 in table for value in grays):
        table |= {value: table[(value,) * 3] for value in grays}
    elif not table and colors and not thrice:
        some = ", ".join(str(key) for key, _ in found.most_common() if key in colors)
        what = f"masks have {len(colors)} colours that nothing names: {some}"
        how = "write class_dict.csv there: name,r,g,b, and a line for each class"
        blurred = [path for path in paths if path.suffix.lower() in JPEGS]
        if blurred:
            what, how = "is a JPEG, which blurs a mask's colours", "export the masks as PNG"
        raise DataError(blurred[0] if blurred else folder.root, what, how)
    elif not table and len(names) > 2 and grays == {0, VOID}:
        what = f"masks have 0 and 255 alone, but {export.where} has {len(names)} classes"
        raise DataError(folder.root, what, "write classes.txt: background, and one other class")
    elif not table and two and grays <= {0, VOID}:
        print("masks have 0 and 255 alone: 255 is taken for class 1, not for void")
        table |= {0: 0, VOID: 1}
    elif not table and two and high > 207 and middle < 0.05 * found.total():
        print("masks have 0, 255 and soft edges: from 128 on they are taken for class 1")
        table |= {value: int(value > 127) for value in range(256)}
    elif not table:
        soft = [path for path in paths if path.suffix.lower() in JPEGS]
        if soft or (high > 250 and not names):
            what = f"and others have values up to {high}, which are no classes"
            how = "export masks as PNG" if soft else "write classes.txt, a line for each value"
            raise DataError((soft or paths)[0], what, how)
        if high == len(names) > 0 and not named_like(names[0], BACKGROUNDS):
            print(f"{export.where} has no line for the value 0: it is called background")
            names = ["background", *names]
        if not names:
            some = ", ".join(str(value) for value in sorted(grays))
            print(f"values are taken for classes, {VOID} for void; masks have {some[:80]}")
        names = names or ["background", *(f"class_{i}" for i in range(1, max(2, high + 1)))]
        table |= {value: value for value in (*range(len(names)), VOID)}
    table |= {(key,) * 3: table[key] for key in list(table) if thrice and isinstance(key, int)}
    if len(names) < 2 and 1 in table.values():
        names = ["background", *(names or ["object"])]
    export.names = list(names)
    return grays


# -------------------------------------------------------------------------------- shapes, formats


def draw(size, shapes, table):
    """Return shapes (name, kind, what) as a PIL image, mode L, of classes, each over the last.

    what: points [(x, y), ...]; for "shares", in shares of the size; for "code", COCO's run lengths;
    for "picture", (a picture in base64, labelme's or Supervisely's, its corner); for "holed",
    an outline, and those of the holes in it.
    """
    canvas = Image.new("L", size, table.get("_background_", 0))  # --void makes it void
    pen = ImageDraw.Draw(canvas)
    for name, kind, what in shapes:
        if name not in table:
            raise ValueError(f"{name} is no class by the export's list")
        label = table[name]
        if kind == "code" and size != (what["size"][1], what["size"][0]):
            raise ValueError(f"run lengths are for {what['size']}, and not for {size[::-1]}")
        outlines = what if kind == "holed" else [] if kind in ("code", "picture") else [what]
        if not all(np.all(np.abs(points) < 1e6) for points in outlines):
            raise ValueError(f"a point of {name} is far outside")
        if kind == "code":
            canvas.paste(label, mask=Image.fromarray(run_lengths(what)))
        elif kind == "picture":
            raw, (x, y) = base64.b64decode(what[0]), what[1]
            shape = Image.open(io.BytesIO(raw if raw[:1] == b"\x89" else zlib.decompress(raw)))
            shape = np.array(shape.getchannel("A") if shape.mode == "RGBA" else shape.convert("L"))
            canvas.paste(label, (round(x), round(y)), Image.fromarray(shape > 0))
        elif kind == "holed":  # what lies below shows in holes
            stencil = Image.new("1", size)
            for index, points in enumerate(what):
                ImageDraw.Draw(stencil).polygon([*map(tuple, points)], fill=index == 0)
            canvas.paste(label, mask=stencil)
        elif kind == "rectangle" and len(what) == 2:  # two corners
            pen.rectangle([*np.min(what, 0), *np.max(what, 0)], fill=label)
        elif kind == "circle":  # the centre, and a point of the edge
            pen.circle(what[0], np.hypot(*np.subtract(*what)), fill=label)
        elif kind in ("line", "linestrip"):  # as wide as labelme draws them
            pen.line([tuple(point) for point in what], fill=label, width=10)
        elif kind == "point":
            pen.circle(what[0], 5, fill=label)
        elif len(what) > 2:
            scale = size if kind == "shares" else (1, 1)
            pen.polygon([(x * scale[0], y * scale[1]) for x, y in what], fill=label)
    return canvas


def run_lengths(code):
    """Return COCO's {"size": [H, W], "counts": ...} as bool (H, W).

    Counts are of zeros and ones in turn, column by column. In a string each is written in groups of
    5 bits, the lowest first, as characters from "0" on: 32 says that more follow; 16 in the last,
    that it is negative. From the fourth on it is the difference from the last but one.
    """
    counts, number, shift = [], 0, 0
    for bits in [ord(c) - 48 for c in code["counts"]] if isinstance(code["counts"], str) else []:
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (bits >> 4 & 1) << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    counts, (height, width) = counts or code["counts"], code["size"]
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def read_json(path):
    """Return the object in a JSON file, {} where it holds something else."""
    with data.blame(path, "export it again, as JSON"):
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    return found if isinstance(found, dict) else {}


def find_image(folder, path, name, split=""):
    """Return the image that a JSON file names, from where the file lies, or else by its name."""
    near = Path(os.path.abspath(path.parent / name.replace("\\", "/")))
    inside = near in folder.index.get(normal(near.name), ())
    found = near if inside else folder.find(name, split)
    if not found:
        raise DataError(path, f"its image {name} is not in SOURCE", "put the images beside it")
    return found


def coco(folder):
    """COCO JSON: one for each split, or for all. A crowd is its class; larger objects lie below."""
    paths = [path for path in folder.named(r".*\.json") if normal(path.stem) not in folder.index]
    named = [path for path in paths if re.match("instances_|.*coco", path.name)]
    items, names = [], []
    for path in named or paths:
        file, split = read_json(path), split_of(path.stem) or split_of(path.parent.name)
        if not {"images", "annotations", "categories"} <= file.keys():
            if named:
                raise DataError(path, "has no images and annotations", "export it again")
            continue
        with data.blame(path, "export it again, as COCO's JSON for segmentation"):
            kinds = {each["id"]: str(each["name"]) for each in file["categories"]}
            shapes, used = {str(each["id"]): [] for each in file["images"]}, set()
            for each in sorted(file["annotations"], key=lambda each: -(each.get("area") or 0)):
                parts, name = each["segmentation"], kinds[each["category_id"]]
                if not parts:
                    raise ValueError(f"annotation {each['id']} is a box and has no outline")
                alone = isinstance(parts, dict) or isinstance(parts[0], (int, float))  # VIA's
                for part in [parts] if alone else parts:
                    is_code = isinstance(part, dict)
                    if not is_code and len(part) % 2:
                        raise ValueError(f"annotation {each['id']} has an x without a y")
                    what = part if is_code else [*zip(part[::2], part[1::2])]
                    shape = name, "code" if is_code else "polygon", what
                    shapes[str(each["image_id"])].append(shape)
                used.add(each["category_id"])
            # Roboflow's first category is named for the project, and nothing belongs to it.
            parents = {each.get("supercategory") for each in file["categories"]}
            names += [kinds[i] for i in sorted(kinds) if i in used or kinds[i] not in parents]
            for each in file["images"]:
                image = find_image(folder, path, each["file_name"], split)
                size = each["width"], each["height"]
                items.append(Item(image, shapes[str(each["id"])], size, {split} - {""}))
    return Export(items, background_first(names), {}, "the categories") if items else None


def labelme(folder):
    """labelme: a JSON for each image, beside it or in a folder of their own."""
    paths = [path for path in folder.named(r".*\.json") if normal(path.stem) in folder.index]
    items, names = [], []
    for path in [] if all(divide(folder)) else paths:
        file = read_json(path)
        with data.blame(path, "no labelme file? export it again"):
            name, size = file["imagePath"], (file.get("imageWidth"), file.get("imageHeight"))
            if not (path.parent / name.replace("\\", "/")).is_file():
                name = f"{path.parent.name}/{path.stem}"
            shapes = []
            for each in file["shapes"]:
                kind, what = each.get("shape_type"), each["points"]
                if each.get("mask"):
                    kind, what = "picture", (each["mask"], what[0])
                shapes.append((str(each["label"]), kind, what))
        names += [name for name, _, _ in shapes]
        items.append(Item(find_image(folder, path, name), shapes, size if all(size) else None))
    lists = folder.named(r"(labels|class_names|classes)\.txt") if items else []
    names = [*(data.read_lines(lists[0]) if lists else ()), *sorted(names)]
    return Export(items, background_first(names), {}, "the labels") if items else None


def read_yaml_names(path):
    """Return the names in a YOLO data.yaml: a list or a map, in brackets or a line each."""
    with data.blame(path, "write the classes as  names: [first, second]"):
        text = path.read_text(encoding="utf-8-sig")
    match = re.search(r"^names[ \t]*:(.*(?:\n(?:[ \t\-\]}#].*)?)*)", text, re.MULTILINE)
    text = match[1] if match else ""
    text = re.sub(r"('[^'\n]*'|\"[^\"\n]*\")|(^|\s)#.*", r"\1\2", text).strip()
    value = r"'(?:[^']|'')*'|\"[^\"]*\"|[^\s,\[\]{}'\"][^,\[\]{}\n]*"
    if text[:1] not in ("[", "{"):  # a line each, with a hyphen or a number
        value = r"'(?:[^']|'')*'|\"[^\"]*\"|[^\s'\"].*"
        text = re.sub(r"^\s*-\s+", "", text, flags=re.MULTILINE)
    found = re.findall(rf"(?:['\"]?(\d+)['\"]?\s*:\s+)?({value})", text)
    pairs = sorted((int(key or i), name.strip()) for i, (key, name) in enumerate(found))
    return [name[1:-1].replace("''", "'") if name[0] in "'\"" else name for _, name in pairs]


def yolo(folder):
    """YOLO outlines: a text for each image, in labels/ or beside it; without one all background."""
    texts, items, ids, bare = set(folder.named(r".*\.txt")), [], {0}, 0
    lists = [path for path in folder.named(r".*\.ya?ml") if read_yaml_names(path)]
    names = read_yaml_names(lists[0]) if lists else []
    for image in folder.pictures if lists or not all(divide(folder)) else ():
        parts = image.relative_to(folder.root).parts
        beside = folder.root.joinpath(*("labels" if part == "images" else part for part in parts))
        paths = beside.with_suffix(".txt"), image.with_suffix(".txt")
        path, shapes = next((path for path in paths if path in texts), None), []
        bare += path is None
        for line in data.read_lines(path) if path else ():
            with data.blame(path, "a line is: class x y x y x y ..., in shares of the size"):
                label, *numbers = map(float, line.split())
                if len(numbers) % 2 or not all(-0.5 <= number <= 1.5 for number in numbers):
                    raise ValueError(f"has no points in shares of the size: {line[:60]}")
            if len(numbers) == 4:
                raise DataError(path, "has boxes, no outlines", "export it for segmentation")
            shapes.append((int(label), "shares", [*zip(numbers[::2], numbers[1::2])]))
            ids.add(int(label))
        items.append(Item(image, shapes))
    if bare == len(items):
        return None
    lists = lists or folder.named(r"classes\.txt|.*\.names")
    names = names or (data.read_lines(lists[0]) if lists else [])
    if lists and max(ids) >= len(names):
        raise DataError(lists[0], f"has no name for class {max(ids)}", "add it")
    names = names or [f"class_{i + 1}" for i in range(max(ids) + 1)]
    for item in items:
        item.mask = [(names[i], kind, what) for i, kind, what in item.mask]
    if bare:
        print(f"{bare} images have no label file: they are all background")
    return Export(items, background_first(names), {}, lists[0].name if lists else "the numbers")


def supervisely(folder):
    """Supervisely: meta.json; data sets with img/, and masks_machine/ or ann/."""
    metas, items = folder.named(r"meta\.json"), []
    if not metas or "classes" not in read_json(metas[0]):
        return None
    with data.blame(metas[0], "export it again"):
        titles = [each["title"] for each in read_json(metas[0])["classes"]]
    names, where = background_first(titles), metas[0].name
    if all(divide(folder)):
        table = {0: 0, VOID: VOID} | {i: names.index(each) for i, each in enumerate(titles, 1)}
        for path in folder.named(r"obj_class_to_machine_color\.json"):
            colors = {title: rgb for title, rgb in read_json(path).items() if title in names}
            table |= {rgb[0]: names.index(title) for title, rgb in colors.items()}
        return Export(None, names, table, where)
    for path in [path for path in folder.named(r".*\.json") if path.parent.name == "ann"]:
        file, shapes = read_json(path), []
        with data.blame(path, "export it again"):
            for each in file["objects"]:
                name, kind, bitmap = each["classTitle"], each["geometryType"], each.get("bitmap")
                points = each.get("points") or {"exterior": (), "interior": ()}
                shapes += [(name, "picture", (bitmap["data"], bitmap["origin"]))] if bitmap else []
                outline, holes = points["exterior"], points["interior"]
                kind, what = ("holed", [outline, *holes]) if holes else (kind, outline)
                shapes += [] if bitmap else [(name, kind, what)]
            size = file["size"]["width"], file["size"]["height"]
        image = find_image(folder, path, f"{path.parent.parent.name}/img/{path.stem}")
        items.append(Item(image, shapes, size))
    return Export(items, names, {}, where) if items else None


def cityscapes(folder):
    """Cityscapes: leftImg8bit/ and gtFine/; labels that are not among the 19 classes are void."""
    images = [path for path in folder.pictures if "leftImg8bit" in path.parts]
    rows = [row.split(" ", 1) for row in CITYSCAPES.split(",")]
    for kind in ("gtFine_labelIds", "gtFine_labelTrainIds", "gtCoarse_labelIds"):
        found = [folder.index.get(path.stem.replace("leftImg8bit", kind)) for path in images]
        items = [Item(image, masks[0]) for image, masks in zip(images, found) if masks]
        if items:
            table = dict.fromkeys(range(256), VOID)
            table |= {i if "Train" in kind else int(row[0]): i for i, row in enumerate(rows)}
            return Export(items, [row[1] for row in rows], table, "Cityscapes' labels.py")


def data_sets(folder):
    """a known data set: ADE20K, Oxford-IIIT Pet or SegNet's CamVid."""
    parents = {path.parent.name for path in folder.pictures}
    infos = folder.named(r"objectInfo150\.txt")
    if infos or any("ADEChallengeData2016" in path.parts for path in folder.pictures):
        names, where = [f"class_{i}" for i in range(1, 151)], "ADE20K's numbers"
        if infos:
            names = [line.split("\t")[-1].strip() for line in data.read_lines(infos[0])[1:]]
            where = "ADE20K's objectInfo150.txt"
        table = {0: VOID} | {i + 1: i for i in range(len(names))}  # 1 is the first; 0 is void
        return Export(None, names, table, where)
    if "trimaps" in parents:  # 3 is the border between an animal (1) and the background (2)
        return Export(None, ["background", "animal"], {1: 1, 2: 0, 3: VOID}, "Oxford-IIIT Pet")
    if "trainannot" in parents and not folder.named(CLASS_FILES):
        table = {i: i for i in range(11)} | {11: VOID, VOID: VOID}
        return Export(None, CAMVID.split(), table, "SegNet's CamVid")


def mask_files(folder):
    """images and masks, with a list of colours or classes or none: CVAT, Roboflow, any."""
    lists = read_lists(folder, folder.pictures) if not divide(folder)[1] else {"": [(0, 1)]}
    if any(mask for pairs in lists.values() for _, mask in pairs):
        return read_classes(folder)


FORMATS = (cityscapes, supervisely, coco, labelme, yolo, data_sets, mask_files)
