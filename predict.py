"""Segment images of your own with a trained checkpoint.

    python predict.py img.jpg               the newest run's network, or else the one in weights/
    python predict.py photos/ --checkpoint runs/darrennet/best.pt --out segmented
    python predict.py img.jpg --size 448    small things are found better in larger images

Each image gives NAME_mask.png (a palette PNG of class indices, at the image's own size)
and NAME_overlay.png (the photo with the classes in colour, and a legend). The
checkpoint says what model it is and what its classes are: no other flag is needed. No
file that is there is ever overwritten. Exits with 1 where some of several images cannot
be read, 2 where none can or a path does not exist.
"""

import sys
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import data
import models
import utils

SHIPPED = Path(__file__).resolve().parent / "weights" / "darrennet_voc.pt"
KINDS = ("mask", "overlay")


def parse_args(argv=None):
    """Return the settings."""
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    how = "file or run's folder; default: the newest run on photographs, or else one in weights/"
    add("--checkpoint", type=Path, metavar="FILE", help=how)
    add("--out", type=Path, metavar="DIR", help="default: predictions, or predictions-2, ...")
    add("--size", type=utils.number(int, 32, 4096), help="side of its input; default: as trained")
    add("--tta", action="store_true", help="average with the mirrored image's prediction")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default: %(default)s")
    return parser.parse_args(argv)


# -------------------------------------------------------------- the network, the images


def find_network(given):
    """Return (path, checkpoint): the one given, the newest run's, or that in weights/.

    A run of drawn shapes knows no photographs, so it is taken only where it is given.
    """
    if given:
        path = utils.find_checkpoint(given)
        return path, utils.load_checkpoint(path)
    runs = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    for path in [*reversed(runs), SHIPPED]:
        checkpoint = utils.load_checkpoint(path)
        if checkpoint.get("data") != "shapes":
            return path, checkpoint


def find_images(paths):
    """Return the image files among `paths`: files as they are, folders by the images in them."""
    found = []
    for path in utils.expand(paths):
        if not path.exists():
            raise utils.UserError(f"{path}: does not exist; give images or folders of images")
        if path.suffix in (".pt", ".pth", ".tar") or (path / "best.pt").exists():
            raise utils.UserError(f"{path}: is a network: predict.py IMAGE --checkpoint {path}")
        found += images_in(path) if path.is_dir() else [path]
    return list(dict.fromkeys(found))  # each once


def images_in(folder):
    """Return a folder's images, and print what else is in it, but for hidden files."""
    files = data.image_files(folder)
    outputs = {f"{file.stem}_{kind}" for file in files for kind in KINDS}
    images = [file for file in files if file.stem not in outputs]  # a.jpg's a_mask.png is no photo
    others = sorted(path.name for path in set(folder.glob("[!.]*")) - set(images))
    if others:
        some = ", ".join(others[:9]) + (", ..." if len(others) > 9 else "")
        print(f"{folder}: no images, or masks and overlays, and so left out: {some}")
    if not images:
        kinds = ", ".join(sorted(data.IMAGE_SUFFIXES))
        raise utils.UserError(f"{folder}: has no images ({kinds}; convert HEIC to JPEG)")
    return images


def output_names(paths):
    """Return a name for each image's outputs: its stem, numbered where another had it before."""

    def key(name):  # to some file systems a and A are the same, and both ways to write an accent
        return unicodedata.normalize("NFC", name).lower()

    names, candidates = {}, {}
    for path in paths:
        numbered = candidates.setdefault(key(path.stem), utils.numbered(Path(path.stem)))
        name = next(each.name for each in numbered if key(each.name) not in names)
        names[key(name)] = name
    return list(names.values())


def output_folder(given, names):
    """Return the folder to write to, in which nothing will be overwritten."""
    if not given:
        return utils.new_folder(Path("predictions"))
    for path in (given / f"{name}_{kind}.png" for name in names for kind in KINDS):
        if path.exists():
            raise utils.UserError(f"{path}: is there already; choose another --out")
    given.mkdir(parents=True, exist_ok=True)
    return given


# ----------------------------------------------------------------------------- pictures


def save_mask(path, mask, palette):
    """Write a class mask, 0 to 255, (H, W), as a palette PNG of its values."""
    image = Image.fromarray(np.asarray(mask, np.uint8))
    # VOC's colour for void. Setting a palette makes it mode P.
    image.putpalette(utils.colorize(np.arange(256), palette, (224, 224, 192)).tobytes())
    image.save(path)


def overlay(image, mask, classes):
    """Return a PIL RGB picture: the photo with the classes in colour, and a legend below it.

    image: PIL RGB; mask: uint8 (H, W) at the image's size. Background (class 0) is the
    photo as it is; a class is its colour at half strength, with an outline. The legend
    names the classes that take more than half a percent of the pixels.
    """
    mask, colors = np.asarray(mask), utils.vivid_colors(len(classes))
    strength = np.where(mask > 0, np.uint8(128), np.uint8(0))
    strength[outline(mask, max(2, min(image.size) // 200))] = 255

    shares = {c: share for c, share in class_shares(mask, len(classes)).items() if share > 0.005}
    names = utils.shown_names(tuple(classes))
    entries = [f"{names[c]} {share:.1%}" for c, share in shares.items()]
    size = max(12, min(image.size) // 25)
    font = utils.load_font(size)
    width = int(3 * size + max([0, *map(font.getlength, entries)]))  # of an entry
    columns = max(1, image.width // width)
    rows = -(-len(entries) // columns)
    canvas_size = (max(image.width, width), image.height + rows * 2 * size)
    canvas = Image.new("RGB", canvas_size, "white")
    canvas.paste(image, (0, 0))
    canvas.paste(Image.fromarray(utils.colorize(mask, colors)), (0, 0), Image.fromarray(strength))
    draw = ImageDraw.Draw(canvas)
    for place, (c, entry) in enumerate(zip(shares, entries)):
        x, y = place % columns * width, image.height + place // columns * 2 * size
        box = (x + size // 2, y + size // 2, x + size * 3 // 2, y + size * 3 // 2)
        draw.rectangle(box, fill=colors[c] if c else "white", outline="black")
        draw.text((x + 2 * size, y + size), entry, font=font, fill="black", anchor="lm")
    return canvas


def outline(mask, width):
    """Return a mask, bool (H, W), of the pixels of objects within `width` of another class."""
    near = np.zeros(mask.shape, bool)
    near[width:] |= mask[width:] != mask[:-width]
    near[:-width] |= mask[:-width] != mask[width:]
    near[:, width:] |= mask[:, width:] != mask[:, :-width]
    near[:, :-width] |= mask[:, :-width] != mask[:, width:]
    return near & (mask > 0)


def class_shares(mask, num_classes):
    """Return {class: share of the pixels} for the classes that a mask has, the largest first."""
    counts = np.bincount(np.asarray(mask).ravel(), minlength=num_classes)
    order = sorted(np.flatnonzero(counts).tolist(), key=lambda c: -counts[c])
    return {c: counts[c] / counts.sum() for c in order}


# ---------------------------------------------------------------------------------- run


def main(argv=None):
    """Run the command line; see the top of the file."""
    args = parse_args(argv)
    network, checkpoint = find_network(args.checkpoint)
    device = utils.select_device(args.device)
    classes, size = checkpoint["classes"], args.size or checkpoint["size"]
    print(f"network: {network}: {checkpoint['model']} with {len(classes)} classes, ", end="")
    print(f"{', '.join(classes[:6])}{', ...' * (len(classes) > 6)}; --checkpoint takes another")
    model = utils.to_device(models.from_checkpoint(checkpoint), device)
    paths = find_images(args.images)
    names = output_names(paths)
    out = output_folder(args.out, names)
    failed = bare = 0
    for number, (path, name) in enumerate(zip(paths, names), start=1):
        try:
            image = data.load_image(path)
        except data.DataError as error:
            failed += 1
            print(f"predict.py: error: {error}", file=sys.stderr)
            continue
        images = data.normalize(data.to_tensor(image, size)[None].to(device))
        labels, sure = utils.segment(model, images, (image.height, image.width), args.tta)
        objects = labels > 0
        certainty = sure[objects].mean().item() if objects.any() else None
        mask = labels[0].cpu()
        del labels, sure, objects  # as large as the photograph

        save_mask(out / f"{name}_mask.png", mask, checkpoint["palette"])
        # Higher levels hardly shrink a photograph further, and take most of the time.
        overlay(image, mask, classes).save(out / f"{name}_overlay.png", compress_level=1)
        shares = class_shares(mask, len(classes))
        found = ", ".join(f"{classes[c]} {share:.1%}" for c, share in shares.items())
        written = "" if name == path.stem else f" -> {name}_mask.png"
        sure = f"; sure of what is no {classes[0]}: {certainty:.2f}" if certainty else ""
        done = f"{number}/{len(paths)} " if len(paths) > 1 else ""
        print(f"{done}{' '.join(str(path).splitlines())}{written}: {found}{sure}", flush=True)
        bare += certainty is None
    if bare:
        score = checkpoint["metrics"].get("val_mean_iou", float("nan"))
        print(f"{bare} of {len(paths) - failed} masks are nothing but {classes[0]}:")
        print(f"right if that is all; in validation this network scored {score:.3f} mIoU, of 1")
    if failed < len(paths):
        print(f"masks and overlays are in {out}")
    elif not args.out:
        out.rmdir()  # nothing was written
    return 0 if not failed else 1 if failed < len(paths) else 2  # all were read, some, none


if __name__ == "__main__":
    utils.cli(main, data.DataError, models.ModelError)
