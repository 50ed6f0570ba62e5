"""Look a data folder over before hours are spent on it.

    python check.py --data DIR                what train.py would read from the folder
    python check.py                           PASCAL VOC 2007 in data/

Prints what is wrong (images and masks that do not pair, that differ in size or cannot be read,
labels out of range, RGB masks, classes that never occur), how many images and pixels each class has
in each split, and the class weights that would follow; draws the counts as a bar chart.
Exits with 1 where training would refuse the data.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import data
import plots
import utils


def parse_args(argv=None):
    """Return the settings."""
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--data", default="voc2007", help="as for train.py; default: %(default)s")
    how = "default: train and val"
    add("--splits", nargs="+", default=["train", "val"], metavar="NAME", help=how)
    size = utils.number(int, 32, 4096)
    add("--size", type=size, default=224, help="pixels are counted at this size; default: 224")
    how = "the bar chart; default: %(default)s"
    add("--out", type=Path, default="check.png", metavar="FILE", help=how)
    return parser.parse_args(argv)


def look_over(dataset):
    """Read every pair of a data set; return (errors, sizes of the images, pixels by class (N, C))."""

    def look(index):
        try:
            image, mask = dataset.read(index)
        except data.DataError as error:
            return str(error), None, None
        mask = data.to_tensor(mask, dataset.size)
        return None, image.size, torch.bincount(mask.flatten(), minlength=256)

    with ThreadPoolExecutor() as pool:
        errors, sizes, counts = zip(*pool.map(look, range(len(dataset))))
    counts = [count for count in counts if count is not None]
    counts = torch.stack(counts) if counts else torch.zeros(1, 256, dtype=torch.int64)
    return [e for e in errors if e], [s for s in sizes if s], counts[:, : len(dataset.classes)]


def print_counts(classes, counts):
    """Print a line for each class: the images that show it and its share of pixels, by split."""
    print(
        f"\n{'class':<16}" + "".join(f"{split + ' images':>16}{'% pixels':>10}" for split in counts)
    )
    for c, name in enumerate(classes):
        line = f"{name:<16}"
        for pixels in counts.values():
            share = 100 * pixels[:, c].sum() / pixels.sum().clamp(min=1)
            line += f"{(pixels[:, c] > 0).sum().item():>16}{share.item():>10.3f}"
        print(line)


def print_weights(dataset):
    """Print the weights of the loss that each scheme of --class-weights gives."""
    schemes = ("inverse", "median", "enet")
    weights = [data.class_weights(dataset, scheme).tolist() for scheme in schemes]
    print(f"\n{'--class-weights':<16}" + "".join(f"{scheme:>10}" for scheme in schemes))
    for name, *values in zip(dataset.classes, *weights):
        print(f"{name:<16}" + "".join(f"{value:>10.3f}" for value in values))


def main(argv=None):
    """Run the command line; see the top of the file."""
    args = parse_args(argv)
    if args.data in ("voc2007", "voc2012"):
        args.data = data.download_voc("data", args.data.removeprefix("voc"), args.splits[0])
    sets = {split: data.VOC(args.data, split, args.size, in_memory=False) for split in args.splits}
    errors, remarks, counts = [], [], {}
    for split, dataset in sets.items():
        found, sizes, counts[split] = look_over(dataset)
        errors += [f"{split}: {error}" for error in found]
        print(f"{dataset.root}: split {split}, {len(dataset)} images", end="")
        if sizes:
            low, high = min(sizes, key=lambda s: s[0] * s[1]), max(sizes, key=lambda s: s[0] * s[1])
            print(f", from {low[0]}x{low[1]} to {high[0]}x{high[1]} pixels", end="")
        print()
        for c, name in enumerate(dataset.classes):
            if not counts[split][:, c].any():
                remarks.append(f"{split}: no pixel of class {name}")
    dataset = sets[args.splits[0]]
    names = [name for each in sets.values() for name in {path.stem for path in each.mask_paths}]
    twice = len(names) - len(set(names))
    if twice:
        remarks.append(f"{twice} images are in more than one split: their scores will flatter")
    folder = dataset.image_paths[0].parent
    unused = {p.stem for p in folder.iterdir() if p.suffix.lower() in data.IMAGE_SUFFIXES}
    unused -= set(names)
    if unused:
        remarks.append(f"{len(unused)} images of {folder} are in none of these splits")

    print_counts(dataset.classes, counts)
    if not errors:
        print_weights(dataset)
    title = (
        f"{dataset.root.name}: {', '.join(f'{len(s)} {name}' for name, s in sets.items())} images"
    )
    utils.make_folder(args.out.parent)
    plots.class_counts(args.out, dataset.classes, counts, title)
    print(f"\nbar chart: {args.out}")
    for kind, lines in (("worth knowing", remarks), ("to mend before training", errors)):
        if lines:
            print(f"\n{kind} ({len(lines)}):\n  " + "\n  ".join(lines))
    if not errors:
        print("\nnothing that training would refuse")
    return 1 if errors else 0


if __name__ == "__main__":
    utils.run(main, data.DataError)
