"""Segment images of your own with a trained checkpoint.

    python predict.py img.jpg               the newest run's network, or else the one in weights/
    python predict.py photos/ --checkpoint runs/darrennet/best.pt --out segmented
    python predict.py photos/ --grid photos.png                   all overlays in one picture

Each image gives NAME_mask.png (a palette PNG of class indices, at the image's own size) and
NAME_overlay.png (the colours over the image, with a legend). The checkpoint says what model it is,
its classes and their colours: no other flag is needed. Exits with 1 where some of several images
cannot be read, 2 where none can.
"""

import contextlib
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import data
import models
import utils

SHIPPED = Path(__file__).resolve().parent / "weights" / "darrennet_voc2007.pt"
THUMBNAIL = (400, 400)  # the most that --grid shows of an overlay, in pixels


def parse_args(argv=None):
    """Return the settings."""
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    how = "default: the newest run's best.pt, or else weights/darrennet_voc2007.pt"
    add("--checkpoint", type=Path, metavar="FILE", help=how)
    add("--out", type=Path, default="predictions", metavar="DIR", help="default: %(default)s")
    add("--grid", type=Path, metavar="FILE", help="also show all the overlays in this one picture")
    add("--tta", action="store_true", help="average with the mirrored image's prediction")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default: %(default)s")
    return parser.parse_args(argv)


def find_images(paths):
    """Return the image files among `paths`: files as they are, folders by the images in them."""
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                file for file in path.iterdir() if file.suffix.lower() in data.IMAGE_SUFFIXES
            )
            if not inside:
                raise utils.UserError(
                    f"{path}: has no images ({', '.join(sorted(data.IMAGE_SUFFIXES))})"
                )
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise utils.UserError(f"{path}: does not exist; give images or folders of images")
    return found


def output_names(paths):
    """Return a name for each image's outputs: its stem, numbered where another had it before."""
    names = {}  # from lower case, since some file systems take a for A
    for path in paths:
        numbered = (f"{path.stem}-{number}" for number in itertools.count(2))
        candidates = itertools.chain([path.stem], numbered)
        name = next(name for name in candidates if name.lower() not in names)
        names[name.lower()] = name
    return list(names.values())


def segment_photo(path, name, model, checkpoint, args, device_lock):
    """Segment one image and write its two files; return (classes' shares, overlay for --grid).

    Raises DataError where the image cannot be read.
    """
    image = data.load_image(path)
    images = data.normalize(data.to_tensor(image, checkpoint["size"])[None])
    with device_lock:
        images = images.to(next(model.parameters()).device)
        mask = utils.segment(model, images, (image.height, image.width), args.tta)[0].cpu()
    utils.make_folder(args.out)
    utils.save_mask(args.out / f"{name}_mask.png", mask, checkpoint["palette"])
    picture = utils.overlay(image, mask, checkpoint["classes"], checkpoint["palette"])
    # A photograph hardly shrinks any further at the higher levels, which take most of the time.
    picture.save(args.out / f"{name}_overlay.png", compress_level=1)
    if args.grid:
        picture.thumbnail(THUMBNAIL)
    return utils.class_shares(mask, checkpoint["classes"]), picture


@contextlib.contextmanager
def mapper(count):
    """Give a function that works as `map` does, on several images at once where there are several.

    An image a core, each with one thread, is faster than one after the other with all threads. One
    alone stays in this thread, for PyTorch to divide among the cores.
    """
    # A photograph of 100 million pixels takes 2 GB.
    workers = min(count, torch.get_num_threads(), data.memory_size() // 2**31)
    if workers < 2:
        yield map
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C too, which must not wait for the rest


def main(argv=None):
    """Run the command line; see the top of the file."""
    args = parse_args(argv)
    paths = find_images(args.images)
    if not args.checkpoint:
        args.checkpoint = utils.newest_checkpoint(fallback=SHIPPED)
        print(f"network: {args.checkpoint}")
    checkpoint = utils.load_checkpoint(args.checkpoint)
    device = utils.select_device(args.device)
    model = utils.to_device(models.from_checkpoint(checkpoint), device)
    background = checkpoint["classes"][0]
    # GPUs take one image at a time, while other threads read and write theirs.
    lock = contextlib.nullcontext() if device.type == "cpu" else threading.Lock()

    def work(path, name):
        try:
            return segment_photo(path, name, model, checkpoint, args, lock)
        except data.DataError as error:
            return error, None

    failed, sheet = 0, {}
    clear = "\033[K" if sys.stdout.isatty() else ""  # the rest of the progress line
    names = output_names(paths)
    with mapper(len(paths)) as apply:
        results = apply(work, paths, names)
        for path, name in utils.progress(list(zip(paths, names)), "segmenting"):
            shares, picture = next(results)
            if picture is None:
                failed += 1
                print(f"{clear}predict.py: error: {' '.join(str(shares).split())}", file=sys.stderr)
                continue
            found = ", ".join(f"{label} {share:.1%}" for label, share in shares.items())
            print(f"{clear}{' '.join(str(path).splitlines())}: {found}")
            if list(shares) == [background]:
                print(
                    f"  nothing but {background} was found; the mask is black because no pixel is "
                    "of another class, most often because the network was trained too little"
                )
            if args.grid:
                sheet[name] = picture
    if failed < len(paths):
        print(f"masks and overlays are in {args.out}")
    if sheet:
        utils.make_folder(args.grid.parent)
        utils.contact_sheet(sheet).save(args.grid)
        print(f"all of them side by side: {args.grid}")
    return 0 if not failed else 1 if failed < len(paths) else 2


if __name__ == "__main__":
    utils.run(main, data.DataError, models.ModelError)
