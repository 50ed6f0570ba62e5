"""Segment images of your own with a trained checkpoint.

    python predict.py img.jpg               the newest run's network, or else the one in weights/
    python predict.py photos/ --checkpoint runs/darrennet/best.pt --out segmented
    python predict.py img.jpg --size 448    small things are found better in larger images

Each image gives NAME_mask.png (a palette PNG of class indices, at the image's own size) and
NAME_overlay.png (the classes' colours over the image, with a legend). The checkpoint says what
model it is, its classes and their colours: no other flag is needed. A file is never overwritten but
by the same prediction: of the same image, by the same file and epoch, with the same flags. Exits
with 1 where some of several images cannot be read, 2 where none can or a path does not exist.
"""

import sys
from pathlib import Path, PureWindowsPath

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import data
import models
import utils

SHIPPED = Path(__file__).resolve().parent / "weights" / "darrennet_voc.pt"
SOFTWARE = "DarrenNet predict.py"  # stands in each file written here, so that others are known
KINDS = ("mask", "overlay")


def parse_args(argv=None):
    """Return the settings."""
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    how = "file or run's folder; default: best.pt of the newest in runs/, or else one in weights/"
    add("--checkpoint", type=Path, metavar="FILE", help=how)
    how = "default: predictions, or predictions-2 and so on where that holds other predictions"
    add("--out", type=Path, metavar="DIR", help=how)
    add("--size", type=utils.number(int, 32, 4096), help="side of its input; default: as trained")
    add("--tta", action="store_true", help="average with the mirrored image's prediction")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default: %(default)s")
    return parser.parse_args(argv)


def find_images(paths):
    """Return the image files among `paths`: files as they are, folders by the images in them."""
    found = []
    for path in utils.expand(paths):
        if not path.exists():
            raise utils.UserError(f"{path}: does not exist; give images or folders of images")
        found += images_in(path) if path.is_dir() else [path]
    return found


def images_in(folder):
    """Return a folder's images, and print what else is in it, but for hidden files."""
    files = data.image_files(folder)
    stems, images = {file.stem for file in files}, []
    for file in files:
        stem, _, kind = file.stem.rpartition("_")
        # Masks and overlays are no images: those named after another file, or written here.
        if kind not in KINDS or (stem not in stems and read_mark(file) is None):
            images.append(file)
    rest = sorted(set(folder.iterdir()) - set(images))
    names = [path.name for path in rest if not path.name.startswith(".")]
    kinds = ", ".join(sorted(data.IMAGE_SUFFIXES))
    if names:
        some = ", ".join(names[:9]) + (", ..." if len(names) > 9 else "")
        what = f"masks, overlays, folders, and files that are no {kinds} (convert HEIC to JPEG)"
        print(f"{folder}: left out {some}; not segmented: {what}")
    if not images:
        raise utils.UserError(f"{folder}: has no images ({kinds}) to segment")
    return images


def output_names(paths):
    """Return a name for each image's outputs: its stem, numbered where another had it before."""
    names = {}  # {lower case: name}, since to some file systems a and A are the same
    for path in paths:
        candidates = (candidate.name for candidate in utils.numbered(Path(path.stem)))
        name = next(name for name in candidates if name.lower() not in names)
        names[name.lower()] = name
    return list(names.values())


def read_mark(path):
    """Return how a file was made, as `write` noted it, None where it was not written here."""
    try:
        with Image.open(path) as image:
            return image.info.get("Comment") if image.info.get("Software") == SOFTWARE else None
    except (OSError, Image.DecompressionBombError):
        return None


def other_results(folder, marks):
    """Return words on a file that writing to a folder would lose, None where there is none.

    marks: {name: how its outputs are made}. Those that are there and were made so may be lost.
    """
    for name, mark in marks.items():
        for file in (folder / f"{name}_{kind}.png" for kind in KINDS):
            made = read_mark(file) if file.exists() else mark
            if made is None:
                return f"{file}: was not written by predict.py"
            if made != mark:
                return f"{file}: is of another image, of another network or with other flags"
    return None


def write(folder, name, mark, image, mask, checkpoint):
    """Write an image's mask and overlay, with `mark`, the text that says how they were made."""
    utils.make_folder(folder)
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    info.add_text("Comment", mark)
    utils.save_mask(folder / f"{name}_mask.png", mask, checkpoint["palette"], pnginfo=info)
    picture = utils.overlay(image, mask, checkpoint["classes"], checkpoint["palette"])
    # A photograph hardly shrinks any further at the higher levels, which take most of the time.
    picture.save(folder / f"{name}_overlay.png", compress_level=1, pnginfo=info)


def say_network(path, checkpoint):
    """Print what the network is, what it knows, and where others are."""
    classes = checkpoint["classes"]
    names = ", ".join(classes[:6]) + (", ..." if len(classes) > 6 else "")
    # A Windows path has / and \ for separators: the network may have been trained anywhere.
    where = checkpoint.get("trained_on") or PureWindowsPath(checkpoint.get("data", "unknown")).name
    print(f"network: {path}: {checkpoint['model']}, trained on {where}", end=": ")
    print(f"{len(classes)} classes ({names})")
    others = sorted(set(SHIPPED.parent.glob("*.pt")) - {path.resolve()})
    if others:
        print(f"  --checkpoint takes another, such as {', '.join(map(str, others))}")


def main(argv=None):
    """Run the command line; see the top of the file."""
    args = parse_args(argv)
    network = utils.find_checkpoint(args.checkpoint, fallback=SHIPPED)
    checkpoint = utils.load_checkpoint(network)
    say_network(network, checkpoint)
    device = utils.select_device(args.device)
    model = utils.to_device(models.from_checkpoint(checkpoint), device)
    classes, size = checkpoint["classes"], args.size or checkpoint["size"]
    paths = find_images(args.images)
    how = f"by {network.resolve()}, epoch {checkpoint['epoch']}, at {size}x{size}, tta {args.tta}"
    marks = [ascii(f"{path.resolve()}, {how}") for path in paths]  # a name may be no Unicode
    made = dict(zip(output_names(paths), marks))
    out = utils.free_folder(args.out, Path("predictions"), lambda f: other_results(f, made))
    failed = black = 0
    clear = "\033[K" if sys.stdout.isatty() else ""  # the rest of the progress line
    for path, (name, mark) in utils.progress(list(zip(paths, made.items())), "segmenting"):
        try:
            image = data.load_image(path)
        except data.DataError as error:
            failed += 1
            hint = "; convert HEIC to JPEG" if path.suffix.lower() in (".heic", ".heif") else ""
            message = " ".join(f"{error}{hint}".split())
            print(f"{clear}predict.py: error: {message}", file=sys.stderr)
            continue
        images = data.normalize(data.to_tensor(image, size)[None].to(device))
        labels, sure = utils.segment(model, images, (image.height, image.width), args.tta)
        mask, mean, least = labels[0].cpu(), sure.mean().item(), sure.min().item()
        del labels, sure  # as large as the photograph
        write(out, name, mark, image, mask, checkpoint)
        shares = utils.class_shares(mask, classes)
        found = ", ".join(f"{label} {share:.1%}" for label, share in shares.items())
        written = "" if name == path.stem else f" -> {name}_mask.png"
        print(f"{clear}{' '.join(str(path).splitlines())}{written}: {found}; sure: {mean:.2f}")
        if list(shares) == classes[:1]:
            black += 1
            print(f"  nothing but {classes[0]}, with a probability from {least:.2f} up")
    if black:
        score = checkpoint["metrics"].get("val_mean_iou", float("nan"))
        print(
            f"{black} of {len(paths)} masks are nothing but {classes[0]}: right where no class is to be "
            f"seen; in validation it scored {score:.3f} mIoU, after {checkpoint['epoch']} epochs"
        )
    if failed < len(paths):
        print(f"sure: the mean probability of the classes chosen; 1/{len(classes)} is a mere guess")
        print(f"masks and overlays are in {out}")
    return 0 if not failed else 1 if failed < len(paths) else 2


if __name__ == "__main__":
    utils.cli(main, data.DataError, models.ModelError)
