"""Look a folder of images and masks over, or make a plain one of any tool's export.

    python tools/prepare.py SOURCE                     what training refuses, what one should know
    python tools/prepare.py SOURCE NEW                 a plain folder, for train.py --data NEW
    python tools/prepare.py SOURCE NEW --void other    the class other is no class, but void
    python tools/prepare.py SCANS NEW --white 4095     images of more than 8 bits, or these alone

NEW gets images/ (copies), masks/ (palette PNGs of classes, 255 for void), classes.txt and the
export's own split as lists; SOURCE is left as it is. What is chosen is printed: look at it,
mend SOURCE, delete NEW, run it again. The exit status is 0 where train.py takes the folder, 1 where
it does not, 2 where nothing could be done.

formats.py says what a folder holds. Reading, checking and writing are the same for all formats;
then the new folder is looked over.
"""

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from formats import (
    BACKGROUNDS,
    FORMATS,
    VOIDS,
    Folder,
    Item,
    divide,
    draw,
    find_pairs,
    named_like,
    normal,
    read_classes,
    read_values,
    settle,
    understand,
)

import data
import utils
from data import VOID, DataError

PALETTE = np.array(data.color_map(256), np.uint8).tobytes()  # of the masks that are written
WHITE = (255, 255, 255)
RGB_WEIGHTS = np.array([65536, 256, 1], np.int32)  # make one number of a colour
HINTS = {  # what to do about files that prepare.py does not read
    "json": "export it as COCO's or labelme's JSON, or as masks",
    "csv": "decode run lengths (Kaggle) into masks/NAME.png",
    "xml": "boxes are no outlines: draw these in labelme",
    "mat": "write masks/NAME.png of the .mat files, by scipy.io.loadmat",
}
TURNS = {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}  # EXIF's orientations


def open_export(folder, void):
    """Return the Export of a folder, with everything filled in. Raises DataError."""
    for read in FORMATS:
        export = read(folder)
        if export:
            break
    else:
        kinds = {(p.parent, p.suffix): str(p.relative_to(folder.root)) for p in folder.files}
        some = ", ".join([*kinds.values()][:4]) or "nothing at all"
        what = f"has no known masks or outlines, but {some}"
        how = "put a.jpg into images/ and its mask a.png into masks/, and write classes.txt"
        for kind, hint in HINTS.items():
            how = hint if folder.named(rf".*\.{kind}") else how
        how = how if folder.pictures or not folder.files else "put the images beside these files"
        raise DataError(folder.root, what, how)
    print(f"{folder.root}: {read.__doc__.split(':')[0].split(',')[0]}; classes: {export.where}")
    if export.items is None:
        find_pairs(folder, export)
    elif not any(isinstance(item.mask, Path) for item in export.items):
        left = set(folder.pictures) - {item.image for item in export.items}
        if left:
            print(f"{len(left)} images, such as {min(left).name}, have no outlines: left out")
    settle(folder, export.items)
    masks = [each for item in export.items for each in (item.mask, *item.more)]
    masks = [mask for mask in masks if isinstance(mask, Path)]
    if masks:
        values = read_all(folder, export, masks)
    else:
        values = {}
        export.table = {name: i for i, name in enumerate(export.names)}
        export.table |= {"__ignore__": VOID, "_background_": 0}
    check_names(folder, export)
    for text in void:
        make_void(folder, export, normal(text.strip()), values)
        check_names(folder, export)
    return export


def read_all(folder, export, paths):
    """Complete the table of an export by its mask files; return the values that are in them."""
    listed = {key for key in export.table if isinstance(key, tuple)}
    counts = each(lambda path: read_values(path, export.table)[1], paths, "reading")
    counts = {path: found for path, found in zip(paths, counts) if isinstance(found, Counter)}
    found = sum(counts.values(), Counter())
    values = understand(folder, export, found, paths)
    names = export.names
    blank = [i for i, name in enumerate(names) if named_like(name, f"background {VOIDS}")]
    export.table.setdefault("_background_", min(blank, default=0))  # of images without a mask
    known = {key: names[i] for key, i in export.table.items() if i < len(names)}
    palettes = {path: palette_colors(path, found) for path, found in counts.items()}
    for path, palette in palettes.items() if listed & found.keys() else ():
        left = [palette[i] for i in palette if i != VOID and palette[i] not in listed]
        if left:  # by its values it would go, while others go by colours
            raise DataError(path, f"has the colour {left[0]}, which is in no list", "add it there")
    problem = palette_problem(known, palettes)
    if problem:
        path, what, how, sure = problem
        if sure:
            raise DataError(path, what, f"{how}; else delete the list")
        print(f"{path}: {what}\nmasks go by values; {how} anew")
    return values


def check_names(folder, export):
    """Raise DataError for classes that `data.read_classes` would refuse: here it is early."""
    names = export.names
    if not 2 <= len({*names}) == len(names) <= VOID:
        what = f"has {len(names)} classes by {export.where} ({', '.join(names[:3])} ...)"
        raise DataError(folder.root, what, f"2 to {VOID} different ones are needed")


def make_void(folder, export, void, values):
    """Make a class, by its name, or a value of the masks void; the classes after it move up.

    values: those in the masks. Raises DataError for what is neither, or two different things.
    """
    names = [name.strip() for name in export.names]
    labels = {names.index(void)} if void in names else set()
    if void.isdecimal() and int(void) in values:
        labels.add(export.table.get(int(void), VOID))
    if len(labels) != 1:
        what = f"{void} is not one class, of {', '.join(names)}, and not one value of masks"
        raise DataError(folder.root, what, "give --void another")
    (label,) = labels
    if void.isdecimal() and int(void) in values:
        export.table[int(void)] = VOID
        export.table.setdefault((int(void),) * 3, VOID)  # of gray three times over
    gone = "no class" if label == VOID else export.names.pop(label)
    for key, old in export.table.items() if label != VOID else ():
        export.table[key] = VOID if old in (label, VOID) else old - (old > label)
    print(f"--void {void}: {gone} becomes void; classes from 0: {', '.join(export.names[:5])}")


def each(function, items, what):
    """Return [function(item), ...], worked out by all cores; a DataError stands for a result."""

    def guarded(item):
        try:
            return function(item)
        except DataError as error:
            return error

    pool = ThreadPoolExecutor(torch.get_num_threads())
    try:
        results = pool.map(guarded, items)
        return [result for _, result in zip(utils.progress(items, what), results)]
    finally:
        pool.shutdown(cancel_futures=True)  # without those that wait, by Ctrl-C


def open_image(path, white=None, decode=False):
    """Return (picture or None, (width, height) upright, EXIF's orientation, number of frames).

    The picture is there where the file will not do for data.py; with `white`, scaled to 8 bits.
    """
    with data.blame(path, "give another file"), Image.open(path) as file:
        turn, is_jpeg = file.getexif().get(0x0112, 1), file.format in ("JPEG", "MPO")
        size = file.size[::-1] if turn in TURNS else file.size
        frames = 1 if is_jpeg else getattr(file, "n_frames", 1)
        try:  # a JPEG has 8 bits, and is linked without a look at its pixels if it is whole
            decode = decode or not is_jpeg or not is_whole(path)
            picture = data.load_image(path) if decode else None
            if picture:  # Pillow turns TIFFs, and their size, by itself
                size = picture.size
            picture = None if path.suffix.lower() in data.IMAGE_SUFFIXES else picture
        except DataError:
            if not white:
                raise
            values = np.asarray(ImageOps.exif_transpose(file), dtype=np.float64)
            if file.mode[0] not in "IF":  # of 16-bit colours Pillow gives the upper half
                values = 256 * values[..., :3] + lower_half(path)[..., :3]
            values = np.nan_to_num(values * (255 / white)).clip(0, 255).round()
            picture = Image.fromarray(values.astype(np.uint8))
            size = picture.size
    return picture, size, turn, frames


def is_whole(path):
    """Return whether a file ends as a JPEG does; one that was cut off does not."""
    with path.open("rb") as file:
        file.seek(-2, os.SEEK_END)
        return file.read() == b"\xff\xd9"


def lower_half(path):
    """Return the lower bytes of a file's 16-bit colours: it is read in the other order of bytes."""
    with Image.open(path) as file:
        for index, tile in enumerate(file.tile):
            mode, *rest = [tile.args] if isinstance(tile.args, str) else tile.args
            mode = mode[:-1] + ("L" if mode[-1] == "B" else "B")
            file.tile[index] = tile._replace(args=(mode, *rest) if rest else mode)
        return np.asarray(ImageOps.exif_transpose(file))


def read_mask(path, export):
    """Return a mask file as a PIL image, mode L, of the classes that its values or colours mean."""
    values, found = read_values(path, export.table)
    pixels = values if values.ndim == 2 else values.astype(np.int32) @ RGB_WEIGHTS
    labels = np.full(pixels.shape, VOID, np.uint8)
    for key in found:
        if key not in export.table:
            what = f"has {key}, which is no class by {export.where}"
            raise DataError(path, what, "name it there, or mend the mask")
        number = key if isinstance(key, int) else int(np.dot(key, RGB_WEIGHTS))
        labels[pixels == number] = export.table[key]
    return Image.fromarray(labels)


def take(item, export, white, out, link):
    """Write an item's image and mask into a folder; return whether the mask had to be turned."""
    picture, size, turn, _ = open_image(item.image, white)
    turned, images = False, out / "images" if export else out
    if export:
        where, mask = item.image, None
        if isinstance(item.mask, Path):
            where, mask = item.mask, read_mask(item.mask, export)
        for path in item.more:  # other objects of the same image, over the first
            other, nothing = read_mask(path, export), export.table["_background_"]
            if other.size != mask.size:
                what = f"is {other.size}, but another mask of its image {mask.size}"
                raise DataError(path, what, "export it again")
            objects = [255 * (label != nothing) for label in range(256)]
            mask.paste(other, mask=other.point(objects))
        with data.blame(item.image, "mend its outlines"):
            mask = mask or draw(item.size or size, item.mask or [], export.table)
        if turn in TURNS and mask.size == size[::-1] != size:
            mask, turned = mask.transpose(Image.Transpose[TURNS[turn]]), True
        if mask.size != size:
            what = f"the mask is {mask.size}, but its image, turned upright, {size}"
            raise DataError(where, what, "export it again")
        mask.putpalette(PALETTE)
        mask.save(out / "masks" / f"{item.name}.png", compress_level=1)
    if picture:
        picture.save(images / f"{item.name}.png", compress_level=1)
        return turned
    target = images / f"{item.name}{item.image.suffix}"
    try:
        link(item.image.resolve(), target)
    except FileExistsError:  # copying would write through the link into SOURCE
        raise
    except OSError:  # a system that allows no links
        shutil.copyfile(item.image, target)
    return turned


def convert(folder, export, white, out, link):
    """Write a plain folder. Raises DataError, after a line for each file that is wrong."""
    items = export.items if export else [Item(path) for path in folder.pictures]
    if not export:
        settle(folder, items)
    for name in ("images", "masks") if export else ("",):
        (out / name).mkdir(parents=True, exist_ok=True)
    results = each(lambda item: take(item, export, white, out, link), items, "writing")
    errors = [result for result in results if isinstance(result, DataError)]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        print(*errors[:20], sep="\n")
        what = f"{len(errors)} of {len(items)} files cannot be taken, see above"
        raise DataError(folder.root, what, "mend or delete them")
    if any(results):
        print(f"EXIF turns {sum(results)} images whose masks were not turned, and now are")
    lists = {name: [] for name in sorted(set().union(*(item.lists for item in items)))}
    for item in items if export else ():
        for name in item.lists:
            lists[name].append(item.name)
    # classes.txt is last: without it train.py takes a folder for no data.
    for name, lines in [*lists.items(), ("classes", export.names)] if export else ():
        (out / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def open_plain(root):
    """Return (classes, images, masks) of a folder that train.py reads, or None."""
    try:
        image_folder, mask_folder = data.find_folders(root)
        images = data.files_by_name(image_folder, data.IMAGE_SUFFIXES)
        masks = data.files_by_name(mask_folder, {".png"})
        return (data.read_classes(root), images, masks) if images.keys() & masks.keys() else None
    except DataError:
        return None


def look_at(image, mask, num_classes, size, decode):
    """Return (pixels by value, mask at `size`, is EXIF's turn unclear, frames > 1, palette)."""
    path, (_, shape, turn, frames) = mask, open_image(image, decode=decode)
    mask = data.load_mask(path, num_classes)
    if mask.size != shape:
        what = f"is {mask.size}, but its image, turned upright, {shape}"
        raise DataError(path, what, f"export it again, or {data.PREPARE}")
    unclear = turn in (2, 3, 4) or (turn in TURNS and shape[0] == shape[1])
    counts = np.array(mask.histogram())
    colors = palette_colors(path, np.flatnonzero(counts))
    return counts, data.to_tensor(mask, size), unclear, frames > 1, colors


def look_over(root, size, decode):
    """Print what is in a folder that train.py reads; return what it refuses, a line each."""
    classes, images, masks = open_plain(root)
    names, splits, errors = sorted(images.keys() & masks.keys()), {}, []
    notes = {"images have no mask of that name": [*images.keys() - masks.keys()]}
    notes["masks have no image of that name"] = [*masks.keys() - images.keys()]
    texts = *root.glob("[!.]*.txt"), *root.glob("ImageSets/Seg*/[!.]*.txt")
    lists = {path.stem: path for path in texts}
    for split in sorted({"train", "val", *lists} - {"classes"}):
        try:
            splits[split] = data.split_names(root, split, images, masks)
        except DataError as error:
            if split in ("train", "val"):
                errors.append(str(error))
            else:  # a test set whose masks a teacher keeps, or no list at all
                print(f"{split} cannot be scored: {error}")
                with contextlib.suppress(DataError):
                    listed = data.read_lines(lists[split])
                    splits[split] = [name for name in listed if name in images and name in masks]

    pairs = [(images[name], masks[name]) for name in names]
    looks = each(lambda pair: look_at(*pair, len(classes), size, decode), pairs, "looking over")
    wrong = {name: look for name, look in zip(names, looks) if isinstance(look, DataError)}
    results = {name: look for name, look in zip(names, looks) if name not in wrong}
    in_a_list = set().union(*splits.values())
    for name, error in wrong.items():
        if name in in_a_list:
            errors.append(str(error))
        else:  # train.py opens it for the split `all` alone
            print(f"in no list: {error}")
    print_classes(classes, results.values(), size)
    palettes = {masks[name]: look[-1] for name, look in results.items()}
    known = dict(enumerate(classes))
    with contextlib.suppress(DataError):  # where there is a list of colours
        export = read_classes(Folder(root))
        colors = {key: i for key, i in export.table.items() if isinstance(key, tuple)}
        known |= {key: export.names[i] for key, i in colors.items() if i != VOID}
    problem = palette_problem(known, palettes)
    if problem:
        path, what, how, _ = problem
        print(f"{path}: {what}\ntraining goes by values; {how}, and train on that")
    for split, listed in splits.items():
        print(f"{split}: {len(listed)} images")
        dataset = data.SegmentationSet()
        dataset.classes, dataset.names = classes, [name for name in listed if name in results]
        if dataset.names and split in ("train", "val"):
            dataset.masks = torch.stack([results[name][1] for name in dataset.names])
            try:
                data.check_labels(dataset, f"{root.name}, {split}", learns=split == "train")
            except DataError as error:
                errors.append(str(error))
    often = Counter(name for part in ("train", "val", "test") for name in splits.get(part, ()))
    notes["images are in two of train, val and test"] = [name for name in often if often[name] > 1]
    notes["images are in no list"] = [*set(names).difference(*splits.values())]
    turned, several = ([name for name in results if results[name][key]] for key in (2, 3))
    notes["images are turned by EXIF; look whether their masks are, too"] = turned
    notes["images have several frames, of which the first is taken"] = several
    for what, some in notes.items():
        if some:
            print(f"{len(some)} {what}, such as {min(some)}")
    if not {"train", "val"} & lists.keys() and are_frames([images[name] for name in results]):
        print("these look like frames of a video: val will have near copies of what train has;")
        print("write train.txt and val.txt, with whole videos in each")
    return errors


def palette_colors(path, values):
    """Return the colours of a palette mask's values, {value: (red, green, blue)}; {} without one."""
    if path.suffix.lower() == ".npy":
        return {}
    with Image.open(path) as file:
        palette = np.array(file.getpalette() or []).reshape(-1, 3).tolist()
    return {i: tuple(color) for i, color in enumerate(palette) if i in values}


def palette_problem(known, colors):
    """Return (path, what, remedy, is it sure) where palettes contradict the values, or None.

    known: {value or listed colour: class}; colors: {a mask's path: its `palette_colors`}. Training
    goes by values. But some programs number the colours of each picture anew, or begin with white.
    """
    first, how = {}, "if the colours are right, write class_dict.csv (name,r,g,b), and make NEW"
    for path, palette in colors.items():
        for value, color in sorted(palette.items()):
            seen, other = first.setdefault(value, (color, path.name))
            name = known.get(value, "void")
            meant = known.get(color, name)
            what = f"has the value {value} ({name}) in the colour {color}"
            if meant.lower() != name.lower() and not (name == "void" and named_like(meant, VOIDS)):
                left = [palette[i] for i in palette if i != VOID and palette[i] not in known]
                add = f"add {left[0]} to the list, and " if left else ""
                what += f", which is {meant}'s in the list of colours"
                return path, what, f"if the colours are right, {add}make NEW", True
            if color != seen and value != VOID:
                what += f", but {other} has it in {seen}"
                return path, what, how, False
            if value == 0 and color == WHITE and {*palette.values()} == {WHITE, (0, 0, 0)}:
                what += f", and {max(palette)} in black"
                return path, what, how, False


def print_classes(classes, results, size):
    """Print each class's images and pixels, what vanishes at a size, and what is odd about 0."""
    full = np.array([counts for counts, *_ in results]).reshape(-1, 256)
    small = [np.bincount(mask.ravel(), minlength=256) for _, mask, *_ in results]
    vanished = ((full > 0) & (np.array(small).reshape(-1, 256) == 0)).sum(0)
    print(f"\n{'class':<24}{'images':>8}{'% of pixels':>13}   of {len(full)} images")
    for label, name in enumerate(classes):
        share = 100 * full[:, label].sum() / max(1, full[:, :VOID].sum())
        lost = f"   vanishes from {vanished[label]} at {size}x{size}: a larger --size keeps more"
        lost, count = lost if vanished[label] else "", (full[:, label] > 0).sum()
        print(f"{label:>3} {name:<20}{count:>8}{share:>13.3f}{lost}")
    print(f"void (255): {full[:, VOID].sum() / max(1, full.sum()):.1%} of all pixels")
    if not named_like(classes[0], BACKGROUNDS):
        print(f"class 0 is {classes[0]}: if 0 means background, list background first")
    for label, name in enumerate(classes):
        if label and named_like(name, VOIDS):
            print(f"class {label} is called {name}: with NEW, --void {name.strip()} leaves it out")


def are_frames(paths):
    """Return whether images with numbers are far more like the next than like others: a video's."""
    numbers = [(re.split(r"(\d+)\D*$", path.stem), path) for path in paths]
    ordered = sorted((parts[0], int(parts[1]), path) for parts, path in numbers if len(parts) > 1)
    if len(ordered) < max(12, 0.8 * len(paths)):
        return False
    picks = np.linspace(0, len(ordered) - 2, 12).astype(int)
    pairs = [[data.load_image(ordered[i + step][2]) for step in (0, 1)] for i in picks]
    small = np.array([[np.asarray(image.resize((16, 16)), float) for image in p] for p in pairs])
    near, far = abs(small[:, 0] - small[:, 1]), abs(small[:, 0] - np.roll(small[:, 1], 6, 0))
    return np.median(near.mean((1, 2, 3))) < 0.5 * np.median(far.mean((1, 2, 3)))


def run(args):
    """Look a folder over, or convert it and look the result over; return the exit status."""
    if not Path(args.source).is_dir():
        raise DataError(args.source, "is no folder", "give the folder of an export")
    root, new = data.find_root(args.source), args.new and Path(args.new).absolute()
    if new and (new.exists() or root in new.resolve().parents):
        what = "is there already" if new.exists() else "lies within SOURCE"
        raise DataError(new, what, "give a folder that does not exist, in another place")
    if not new and open_plain(root):
        errors = look_over(root, args.size, decode=True)
    else:
        folder = Folder(root)
        outlines = [p for p in folder.named(r".*\.txt") if normal(p.stem) in folder.index]  # YOLO's
        labelled = divide(folder)[1] or outlines or folder.named(r".*\.json")
        export = open_export(folder, args.void) if labelled or not args.white else None
        if new:
            new.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile's folder for NEW: on Windows only its owner could read what is made in it.
        place = new.with_name(f".unfinished-{os.getpid()}") if new else Path(tempfile.mkdtemp())
        place.mkdir(exist_ok=not new)
        try:
            out = place / root.name
            convert(folder, export, args.white, out, shutil.copyfile if new else os.symlink)
            if new:
                utils.replace(out, new)
            errors = look_over(new or out, args.size, decode=False) if export else []
        finally:
            shutil.rmtree(place, ignore_errors=True)
        if not new:
            errors.append(f"{root}: is an export: python tools/prepare.py {args.source} NEW")
    if errors:
        print(f"\nto mend before training ({len(errors)}):", *errors[:20], sep="\n  ")
    return int(bool(errors))


def main(argv=None):
    """Run the command line, see the top of the file; return the exit status."""
    parser = utils.make_parser(__doc__)
    white, size = utils.number(float, 1e-6, 1e9), utils.number(int, 1, 4096)
    parser.add_argument("source", metavar="SOURCE", help="a folder of data, or an export")
    parser.add_argument("new", metavar="NEW", nargs="?", help="a folder that does not exist yet")
    how = "a class, or a value of the masks, that becomes void; may be given several times"
    parser.add_argument("--void", metavar="CLASS", action="append", default=[], help=how)
    parser.add_argument("--white", type=white, metavar="VALUE", help="becomes 255 in 8-bit images")
    parser.add_argument("--size", type=size, default=96, help="for what vanishes; default: 96")
    args = parser.parse_args(argv)
    if not args.new and (args.void or args.white):
        parser.error("--void and --white write a folder: give NEW as well")
    try:
        return run(args)
    except DataError as error:
        if sys.flags.dev_mode:
            raise
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 2 if args.new or not Path(args.source).is_dir() else 1  # 1: looked at, and refused


if __name__ == "__main__":
    utils.cli(main)  # in one line: no room, no rights; Ctrl-C, after which nothing is left
