"""Score checkpoints on a split of their data set.

    python evaluate.py                                    the newest run, on its validation split
    python evaluate.py runs/darrennet --split test        another run, another split
    python evaluate.py runs/darrennet --void-as-background           as the paper scores
    python evaluate.py runs/fcn runs/unet --images 000039 000063     compare: table, images, curves

By default each prediction is brought to its image's own resolution and void is left
out, which is the rule of the VOC challenge. One confusion matrix is summed over the
whole split.

A checkpoint's scores and figures go to scores/ beside it, into a folder whose name has
the split and the flags that change scores: the same evaluation writes over its own.
Several checkpoints' go to comparison/, numbered.
"""

import csv
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import models
import utils

PAPER_SIZE = 224  # the side of the masks in the paper's protocol, whatever the network is fed
# Settings that have a column of their own, or say on what a run was made.
NOT_COMPARED = {"model", "device", "precision", "compile"}


def parse_args(argv=None):
    """Return the settings."""
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    how = "file or run's folder; several are compared; default: best.pt of the newest in runs/"
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help=how)
    add("--data", help="as for train.py; default: what it was trained on")
    how = "a list of the data, or all: every image with a mask; default: the run's validation split"
    add("--split", help=how)
    add("--size", type=utils.number(int, 32, 4096), help="side of its input; default: as trained")
    add("--tta", action="store_true", help="average with the mirrored image's prediction")
    how = f"the paper's protocol: masks of {PAPER_SIZE}x{PAPER_SIZE}, void counted as class 0"
    add("--void-as-background", action="store_true", help=how)
    how = "images to draw; default: best, middle and worst by score; for a comparison six"
    add("--images", nargs="+", metavar="NAME", help=how)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default: %(default)s")
    add("--out", type=Path, metavar="DIR", help="for scores and figures; default: see above")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------ scoring


def describe(path, checkpoint, args):
    """Return what is scored, and how: {checkpoint, data, split, size, protocol}."""
    protocol = "own resolution, void ignored"
    if args.void_as_background:
        protocol = f"{PAPER_SIZE}x{PAPER_SIZE}, void as background"
    source = given = args.data or checkpoint.get("data", "voc2007")
    if source not in data.NAMES:
        source = str(Path(source).expanduser().resolve())
        if not args.data and not Path(source).is_dir():
            raise utils.UserError(f"{path}: was trained on {given}, which is not here; give --data")
    return {
        "checkpoint": str(path.resolve()),
        "data": source,
        "split": args.split or checkpoint.get("args", {}).get("val_split", "val"),
        "size": args.size or checkpoint["size"],
        "protocol": protocol + (", mirrored images averaged" if args.tta else ""),
    }


def load_split(path, checkpoint, about, args):
    """Return the data set to score on. Raises UserError where it is of other classes."""
    source, split = about["data"], about["split"]
    dataset = data.load_dataset(source, split, about["size"], progress=utils.progress)
    data.check_labels(dataset, f"{source}: split {split}", learns=False)
    if args.void_as_background:  # in figures too
        dataset.masks = dataset.masks.masked_fill(dataset.masks == data.VOID, 0)
    own, found = checkpoint["classes"], list(dataset.classes)
    if own != found:
        raise utils.UserError(
            f"{path}: was trained on {len(own)} classes ({', '.join(own[:3])}, ...), but {source} "
            f"has {len(found)} ({', '.join(found[:3])}, ...); give the --data it was trained on"
        )
    for name in args.images or ():
        if name not in dataset.names:
            some = ", ".join(dataset.names[:4])
            raise utils.UserError(f"--images: split {split} has no '{name}'; it has {some}, ...")
    return dataset


def score(model, dataset, device, tta=False, void_as_background=False):
    """Return (confusion matrix of the whole split, the mIoU of each image, a list).

    One image at a time, as in predict.py, whose masks score exactly what is reported here
    (but for void_as_background).
    """
    num_classes = len(dataset.classes)
    cm, each = torch.zeros(num_classes, num_classes, dtype=torch.int64), []
    for index in utils.progress(range(len(dataset.names)), "scoring"):
        mask = dataset.full_mask(index)
        if void_as_background:
            mask = data.to_tensor(Image.fromarray(mask.numpy()), PAPER_SIZE)
            mask = mask.masked_fill(mask == data.VOID, 0)
        labels = label(model, dataset.images[[index]], device, mask.shape, tta)[0]
        one = utils.confusion_matrix(labels, mask, num_classes)
        cm += one
        each.append(utils.mean_iou(one))
    return cm, each


def label(model, images, device, size, tta=False):
    """Return the labels (N, *size), on the CPU, that a model gives uint8 images (N, 3, H, W)."""
    return utils.segment(model, data.normalize(images.to(device)), size, tta)[0].cpu()


def learned_from(images, names):
    """Return those names that a network learned from, by its checkpoint's `images`."""
    # VOC 2012 calls VOC 2007's 000032 2007_000032.
    learned = {name.removeprefix("2007_") for name in (images or {}).get("train", ())}
    return [name for name in names if name.removeprefix("2007_") in learned]


def score_checkpoint(path, checkpoint, about, dataset, args, device):
    """Return (metrics, confusion matrix, each image's mIoU, model) of one checkpoint."""
    model = utils.to_device(models.from_checkpoint(checkpoint), device)
    cm, each = score(model, dataset, device, args.tta, args.void_as_background)
    count = len(dataset.names)
    seen = learned_from(checkpoint.get("images"), dataset.names)
    if seen:
        print(f"{path}: was trained on {len(seen)} of these {count} images, by their names")
    by_class = {"iou": utils.iou(cm), "dice": utils.dice(cm)}
    for name, values in by_class.items():  # JSON has no NaN
        values = [None if math.isnan(value) else value for value in values.tolist()]
        by_class[name] = dict(zip(dataset.classes, values))
    metrics = {
        "mean_iou": utils.mean_iou(cm),
        "pixel_accuracy": utils.pixel_accuracy(cm),
        "mean_accuracy": utils.mean_accuracy(cm),
        "mean_dice": utils.dice(cm).nanmean().item(),
        "frequency_weighted_iou": utils.frequency_weighted_iou(cm),
        **by_class,
        **about,
        "images": count,
        "images_trained_on": len(seen),
        "model": checkpoint["model"],
        "epoch": checkpoint["epoch"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "settings": checkpoint.get("args", {}),
    }
    return metrics, cm, each, model


# ----------------------------------------------------------------------- one checkpoint


def scores_folder(about, args):
    """Return the folder for an evaluation's scores, beside its checkpoint."""
    path = Path(about["checkpoint"])
    parts = [
        about["split"],
        "paper" if args.void_as_background else "",
        "tta" if args.tta else "",
        str(args.size or ""),
        path.stem if path.name != "best.pt" else "",
        Path(about["data"]).name if args.data else "",
    ]
    return path.parent / "scores" / "-".join(part for part in parts if part)


def evaluate(path, checkpoint, about, dataset, args, device):
    """Score one checkpoint; print its scores, write them and the figures."""
    out = args.out or scores_folder(about, args)
    # Both fail before the work: no leave to write, or the table is open in Excel.
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "confusion_matrix.csv", "a"):
        pass
    metrics, cm, each, model = score_checkpoint(path, checkpoint, about, dataset, args, device)
    write_json(out / "metrics.json", metrics)
    with open(out / "confusion_matrix.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted, pixels", *dataset.classes])
        writer.writerows([name, *row] for name, row in zip(dataset.classes, cm.tolist()))

    print(f"{path}: {metrics['model']}, epoch {metrics['epoch']}")
    print(f"{len(dataset.names)} images of split {metrics['split']} of {metrics['data']}")
    print(f"{metrics['protocol']}\n")
    print(f"{'class':<16}{'IoU':>8}{'Dice':>8}")
    for name, iou, dice in zip(dataset.classes, utils.iou(cm), utils.dice(cm)):
        print(f"{name:<16}{iou:8.4f}{dice:8.4f}")
    for key in [key for key, value in metrics.items() if isinstance(value, float)]:
        print(f"{key.replace('_', ' '):<24}{metrics[key]:.6f}")

    size = metrics["size"]
    title = f"{metrics['model']}, {size}x{size}, split {metrics['split']}; {metrics['protocol']}"
    draw_confusion_matrix(out / "confusion_matrix.png", cm, dataset.classes, title)
    draw_examples(out / "examples.png", each, model, dataset, args, device, title)
    print(f"\nwritten to {out}: metrics.json, confusion_matrix.csv and .png, examples.png")


def write_json(path, value):
    """Write plain values as JSON text."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def draw_examples(path, each, model, dataset, args, device, title):
    """Draw --images, or the best, middle and worst images by `each`, their own mIoU."""
    scored = [index for index in range(len(each)) if not math.isnan(each[index])]  # not all void
    order = sorted(scored, key=lambda index: -each[index])
    middle = len(order) // 2
    shown = sorted({*order[:2], *order[middle : middle + 2], *order[-2:]}, key=order.index)
    if args.images:
        shown = [dataset.names.index(name) for name in args.images]
    images, masks = dataset.images[shown], dataset.masks[shown]
    rows = {"truth": masks, "prediction": label(model, images, device, masks.shape[-2:], args.tta)}
    captions = [f"{dataset.names[i][-16:]}: {each[i]:.3f}" for i in shown]
    which = "Images with" if args.images else "Best, middle and worst images by"
    title = f"{which} their own mIoU: {title}"
    utils.samples(path, images, rows, dataset.classes, title, captions)


def draw_confusion_matrix(path, cm, classes, title):
    """Draw a confusion matrix (C, C), each row as shares of the true class's pixels."""
    shares = (100 * cm.double() / cm.sum(1, keepdim=True)).numpy()  # NaN, left blank, without any
    side = max(4.7, 2.2 + 0.32 * len(classes))
    title += "\n% of each true class's pixels (rows add up to 100)"
    names = utils.shown_names(tuple(classes))
    with utils.drawing(path, side, side, title) as figure:
        axes = figure.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:
                ink = "white" if share > 55 else "black"
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=ink, size=9)
        axes.set_xticks(range(len(classes)), names, rotation=90)
        axes.set_yticks(range(len(classes)), names)
        axes.set(xlabel="predicted class", ylabel="true class")


# ------------------------------------------------------------------ several checkpoints


def read_log(path):
    """Return the rows of a run's log.csv, dictionaries of numbers. Raises UserError or OSError."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        utils.best_row(rows)
    except (KeyError, TypeError, ValueError) as error:
        raise utils.UserError(f"{path}: is no log of train.py with a row; move it away") from error
    return rows


def format_comparison(results):
    """Return a Markdown table with a row for each entry of {name: metrics}.

    The last column has the training settings, as flags, in which the runs differ.
    """
    every = [metrics["settings"] for metrics in results.values()]
    keys = sorted(set().union(*every) - NOT_COMPARED)
    keys = [key for key in keys if len({str(settings.get(key)) for settings in every}) > 1]
    lines = [
        "| run | model | size | parameters | epoch | mIoU | accuracy | best | worst | flags |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- |",
    ]
    for (name, metrics), settings in zip(results.items(), every):
        iou = {c: value for c, value in metrics["iou"].items() if value is not None}
        best, worst = (f"{c} {iou[c]:.3f}" for c in (max(iou, key=iou.get), min(iou, key=iou.get)))
        idle = "steps" if settings.get("epochs") else ""  # --epochs counts instead of it
        given = [k for k in keys if k != idle and str(settings.get(k)) not in ("None", "False")]
        flags = [f"--{k.replace('_', '-')} {settings[k]}".removesuffix(" True") for k in given]
        lines.append(
            f"| {name} | {metrics['model']} | {metrics['size']} | {metrics['parameters']:,} "
            f"| {metrics['epoch']} | {metrics['mean_iou']:.4f} | {metrics['pixel_accuracy']:.1%} "
            f"| {best} | {worst} | {' '.join(flags) or '-'} |"
        )
    return "\n".join(lines)


def load_all(paths, checkpoints, evaluations, args):
    """Return the data set of each of several checkpoints, if they can be compared."""
    loaded = {}  # runs of one size share theirs
    for path, checkpoint, about in zip(paths, checkpoints, evaluations):
        if checkpoint["classes"] != checkpoints[0]["classes"]:
            raise utils.UserError(f"{path}: knows other classes than {paths[0]}; score it alone")
        if (about["data"], about["split"]) != (evaluations[0]["data"], evaluations[0]["split"]):
            said = f"{path}: is scored on other images than {paths[0]}"
            raise utils.UserError(f"{said}; say --data or --split")
        if about["size"] not in loaded:
            loaded[about["size"]] = load_split(path, checkpoint, about, args)
    return [loaded[about["size"]] for about in evaluations]


def compare(paths, checkpoints, evaluations, args, device):
    """Score several checkpoints; print their table, write metrics.json and the figures."""
    datasets = load_all(paths, checkpoints, evaluations, args)
    full = [path.resolve() for path in paths]
    names = [f"{path.parent.name}/{path.stem}".removesuffix("/best") for path in full]
    if len(set(names)) < len(names):
        names = list(map(str, paths))
    logs = {name: path.parent / "log.csv" for name, path in zip(names, paths)}
    histories = {name: read_log(path) for name, path in logs.items() if path.exists()}
    out = args.out or utils.new_folder(Path("comparison"))
    out.mkdir(parents=True, exist_ok=True)

    # The first checkpoint's images and size are what the figure shows.
    first, count = datasets[0], len(datasets[0].names)
    shown = torch.linspace(0, count - 1, min(6, count)).int().tolist()
    if args.images:
        shown = [first.names.index(name) for name in args.images]
    images, rows, results = first.images[shown], {"truth": first.masks[shown]}, {}
    every = zip(names, paths, checkpoints, evaluations, datasets)
    for name, path, checkpoint, about, dataset in every:
        print(f"{path} ...", flush=True)
        scored = score_checkpoint(path, checkpoint, about, dataset, args, device)
        results[name], _, _, model = scored
        title = f"{name}\nmIoU {results[name]['mean_iou']:.4f}"
        rows[title] = label(model, dataset.images[shown], device, images.shape[-2:], args.tta)

    write_json(out / "metrics.json", results)
    print("\n" + format_comparison(results))
    title = f"split {evaluations[0]['split']}; {evaluations[0]['protocol']}"
    captions = [first.names[i][-24:] for i in shown]
    utils.samples(out / "comparison.png", images, rows, first.classes, title, captions)
    if histories:
        title = "Training runs, validation at the training size, void left out"
        utils.curves(out / "curves.png", histories, title)
    drawn = ", curves.png" if histories else ""
    print(f"\nwritten to {out}: metrics.json, comparison.png{drawn}")


def main(argv=None):
    """Run the command line; see the top of the file."""
    args = parse_args(argv)
    paths = [utils.find_checkpoint(path) for path in utils.expand(args.checkpoints) or [None]]
    device = utils.select_device(args.device)
    # All are read first: a wrong one is found before the first is scored.
    checkpoints = [utils.load_checkpoint(path) for path in paths]
    for checkpoint in checkpoints:
        models.from_checkpoint(checkpoint)  # raises where weights and network do not fit
    evaluations = [describe(path, checkpoint, args) for path, checkpoint in zip(paths, checkpoints)]
    if len(paths) > 1:
        compare(paths, checkpoints, evaluations, args, device)
    else:
        dataset = load_split(paths[0], checkpoints[0], evaluations[0], args)
        evaluate(paths[0], checkpoints[0], evaluations[0], dataset, args, device)


if __name__ == "__main__":
    utils.cli(main, data.DataError, models.ModelError)
