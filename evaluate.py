"""Score checkpoints on a split of their data set.

    python evaluate.py                                    the newest run, on its validation split
    python evaluate.py runs/darrennet --data voc2007 --split test    another run, another split
    python evaluate.py runs/darrennet --void-as-background           as the paper scores
    python evaluate.py runs/* --images 000039 000063                 compare: table, images, curves

By default each prediction is brought to its image's own resolution and void is left out, which is
the rule of the VOC challenge. One confusion matrix is summed over the whole split.

A checkpoint's scores and figures go to scores/ beside it, into a folder whose name has the split and
the flags: only the same evaluation overwrites it. Several checkpoints' go to comparison/, numbered.
"""

import contextlib
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch

import data
import models
import utils

# Settings that have a column of their own, or say where and how fast a run was made.
NOT_COMPARED = {"model", "size", "out", "resume", "device", "amp", "compile", "epochs"}


def parse_args(argv=None):
    """Return the settings."""
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    how = "file or run's folder; several are compared; default: best.pt of the newest in runs/"
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help=how)
    add("--data", help="as for train.py; default: what it was trained on")
    add("--split", help="default: the run's validation split, with the same images as then")
    add("--size", type=utils.number(int, 32, 4096), help="side of its input; default: as trained")
    add("--tta", action="store_true", help="average with the mirrored image's prediction")
    how = "the paper's protocol: at the size of the input, void counted as class 0"
    add("--void-as-background", action="store_true", help=how)
    how = "images to draw; default: best, middle and worst by score; for a comparison six"
    add("--images", nargs="+", metavar="NAME", help=how)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default: %(default)s")
    add("--out", type=Path, metavar="DIR", help="for metrics.json and figures; default: see above")
    return parser.parse_args(argv)


def describe(path, checkpoint, args):
    """Return what an evaluation is, {checkpoint, data, split, size, protocol}: all but its scores."""
    size = args.size or checkpoint["size"]
    protocol = "own resolution, void ignored"
    if args.void_as_background:
        protocol = f"{size}x{size}, void as background"
    source = args.data or checkpoint.get("data", "voc2007")
    return {
        "checkpoint": str(path.resolve()),
        "data": source if source in data.NAMES else str(Path(source).expanduser().resolve()),
        "split": args.split or checkpoint.get("args", {}).get("val_split", "val"),
        "size": size,
        "protocol": protocol + (", mirrored images averaged" if args.tta else ""),
    }


def folder_name(about, args):
    """Return a name for the folder of an evaluation's scores, which no other of the run's has."""
    file = Path(about["checkpoint"]).name
    parts = [
        (about["split"], True),
        ("paper", args.void_as_background),
        ("tta", args.tta),
        (f"{about['size']}", args.size),
        (file, file != "best.pt"),
        (re.sub(r"\W+", "_", about["data"]).strip("_"), args.data),
    ]
    return "-".join(part for part, given in parts if given)


def other_scores(folder, evaluations):
    """Return a remark if a folder's metrics.json is of other evaluations than these, else None."""
    path = folder / "metrics.json"
    if not path.exists():
        return None
    with contextlib.suppress(ValueError, AttributeError):  # another program's file
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored = [stored] if "checkpoint" in stored else stored.values()
        if [{key: each.get(key) for key in evaluations[0]} for each in stored] == evaluations:
            return None
    return f"{folder}: holds other scores"


def load_split(path, checkpoint, about, args):
    """Return the data set to score on. Raises UserError where it is gone, or of other classes."""
    source, split, names = about["data"], about["split"], None
    if not args.data:
        if source not in data.NAMES and not Path(source).is_dir():
            raise utils.UserError(f"{path}: was trained on {source}, which is gone; give --data")
        if split == checkpoint.get("args", {}).get("val_split"):
            names = checkpoint.get("images", {}).get("val")  # the folder's lists may have changed
    dataset = data.load_dataset(source, split, about["size"], names)
    own, found = checkpoint["classes"], list(dataset.classes)
    if own != found:
        raise utils.UserError(
            f"{path}: was trained on {len(own)} classes ({', '.join(own[:3])}, ...), but {source} "
            f"has {len(found)} ({', '.join(found[:3])}, ...); give the --data it was trained on"
        )
    name = next((name for name in args.images or () if name not in dataset.names), None)
    if name:
        some = ", ".join(dataset.names[:4])
        raise utils.UserError(f"--images: split {split} has no image '{name}'; it has {some}, ...")
    return dataset


def score(model, dataset, device, tta=False, void_as_background=False):
    """Return each image's confusion matrix, (N, C, C); their sum is that of the whole split.

    One image at a time, as in predict.py: its masks score exactly what is reported here.
    """
    matrices = []
    for index in utils.progress(range(len(dataset)), "scoring"):
        image, mask = dataset[index]
        if void_as_background:
            mask = mask.masked_fill(mask == data.VOID, 0)
        else:
            mask = dataset.full_mask(index)
        labels = label(model, image[None], device, mask.shape, tta)[0]
        matrices.append(utils.confusion_matrix(labels, mask, len(dataset.classes)))
    return torch.stack(matrices)


def label(model, images, device, size, tta=False):
    """Return the labels (N, *size), on the CPU, that a model gives uint8 images (N, 3, H, W)."""
    return utils.segment(model, data.normalize(images.to(device)), size, tta)[0].cpu()


def score_checkpoint(path, checkpoint, about, out, args, device):
    """Return (metrics, confusion matrix of each image, model, data set) of one checkpoint."""
    dataset = load_split(path, checkpoint, about, args)
    model = utils.to_device(models.from_checkpoint(checkpoint), device)
    utils.make_folder(out)  # fails before the work where it cannot be written to
    started = time.perf_counter()
    matrices = score(model, dataset, device, args.tta, args.void_as_background)
    seconds = time.perf_counter() - started
    cm = matrices.sum(0)
    if cm.sum() == 0:
        where = f"{about['data']}: split {about['split']}"
        raise utils.UserError(f"{where} is void throughout: nothing can be scored")
    values = [None if math.isnan(value) else value for value in utils.iou(cm).tolist()]
    trained_on = data.learned_from(checkpoint.get("images"), dataset.names)
    if trained_on:
        some = f"{len(trained_on)} of these {len(dataset)} images"
        print(f"{path}: was trained on {some}, by their names: on others it is less good")
    metrics = {
        "mean_iou": utils.mean_iou(cm),
        "pixel_accuracy": utils.pixel_accuracy(cm),
        "frequency_weighted_iou": utils.frequency_weighted_iou(cm),
        "iou": dict(zip(dataset.classes, values)),
        **about,
        "images": len(dataset),
        "images_trained_on": len(trained_on),
        "model": checkpoint["model"],
        "epoch": checkpoint["epoch"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "settings": checkpoint.get("args", {}),
        "images_per_second": len(dataset) / max(seconds, 1e-9),
    }
    return metrics, matrices, model, dataset


def draw(out, metrics, matrices, model, dataset, args, device):
    """Draw confusion_matrix.png, class_iou.png and examples.png into the folder `out`."""
    size = metrics["size"]
    title = f"{metrics['model']}, {size}x{size}, split {metrics['split']}; {metrics['protocol']}"
    draw_confusion_matrix(out / "confusion_matrix.png", matrices.sum(0), dataset.classes, title)
    draw_class_iou(out / "class_iou.png", metrics["iou"], f"IoU by class: {title}")

    scores = torch.tensor([utils.mean_iou(matrix) for matrix in matrices])
    order = scores.argsort(descending=True).tolist()
    order = [i for i in order if not scores[i].isnan()]  # an image that is all void has no score
    middle = len(order) // 2
    shown = sorted({*order[:2], *order[middle : middle + 2], *order[-2:]}, key=order.index)
    shown = [dataset.names.index(n) for n in args.images or ()] or shown
    images, masks = dataset[shown]
    rows = {"truth": masks, "prediction": label(model, images, device, masks.shape[-2:], args.tta)}
    captions = [f"{dataset.names[i][-16:]}: {scores[i]:.3f}" for i in shown]
    which = "Images" if args.images else "Best, middle and worst images"
    title = f"{which} by their own mIoU: {title}"
    path = out / "examples.png"
    utils.samples(path, images, rows, dataset.classes, dataset.palette, title, captions)


def draw_confusion_matrix(path, cm, classes, title):
    """Draw a confusion matrix (C, C) with each row as shares, in %, of the true class's pixels."""
    shares = (100 * cm.double() / cm.sum(1, keepdim=True)).numpy()  # NaN, left blank, without any
    side = 3 + 0.42 * len(classes)
    title += "\n% of each true class's pixels (rows add up to 100)"
    with utils.drawing(path, side, side, title) as figure:
        axes = figure.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:
                ink = "white" if share > 55 else "black"
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=ink, size=8)
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        axes.set(xlabel="predicted class", ylabel="true class")


def draw_class_iou(path, values, title):
    """Draw each class's IoU as a bar, the best on top. values: {class name: IoU or None}."""
    scored = {name: value for name, value in values.items() if value is not None}
    scored = dict(sorted(scored.items(), key=lambda item: item[1]))
    title += f"\nmean {sum(scored.values()) / len(scored):.3f}"
    with utils.drawing(path, 8, 1.6 + 0.3 * len(scored), title) as figure:
        axes = figure.subplots()
        bars = axes.barh(list(scored), list(scored.values()), color="#0072b2")
        axes.bar_label(bars, [f"{value:.3f}" for value in scored.values()], padding=3)
        axes.set(xlim=(0, 1), xlabel="IoU")


def format_comparison(results):
    """Return a Markdown table with a row for each entry of {name: metrics}.

    The last column has the training settings, as flags, in which the runs differ.
    """
    every = [metrics["settings"] for metrics in results.values()]
    keys = sorted(set().union(*every) - NOT_COMPARED)
    keys = [key for key in keys if len({str(settings.get(key)) for settings in every}) > 1]
    lines = [
        "| run | model | size | parameters | epoch | mIoU | accuracy | best | worst | images/s | flags |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- | ---: | --- |",
    ]
    for (name, metrics), settings in zip(results.items(), every):
        iou = {label: value for label, value in metrics["iou"].items() if value is not None}
        best, worst = (f"{c} {iou[c]:.3f}" for c in (max(iou, key=iou.get), min(iou, key=iou.get)))
        given = [k for k in keys if str(settings.get(k)) not in ("None", "False")]
        flags = [f"--{k.replace('_', '-')} {settings[k]}".removesuffix(" True") for k in given]
        lines.append(
            f"| {name} | {metrics['model']} | {metrics['size']} | {metrics['parameters']:,} "
            f"| {metrics['epoch']} of {settings.get('epochs', '?')} "
            f"| {metrics['mean_iou']:.4f} | {metrics['pixel_accuracy']:.1%} | {best} | {worst} "
            f"| {metrics['images_per_second']:.1f} | {' '.join(flags) or '-'} |"
        )
    return "\n".join(lines)


def compare(paths, checkpoints, evaluations, out, args, device):
    """Score several checkpoints; print their table, write metrics.json and the figures."""
    results, rows = {}, {}
    full = [path.resolve() for path in paths]
    names = [f"{path.parent.name}/{path.stem}".removesuffix("/best") for path in full]
    if len(set(names)) < len(set(full)):
        names = list(map(str, paths))
    histories = {
        name: utils.read_log(path.parent)
        for name, path in zip(names, paths)
        if (path.parent / "log.csv").exists()
    }
    for name, path, *loaded in zip(names, paths, checkpoints, evaluations):
        print(f"{path} ...", flush=True)
        results[name], _, model, dataset = score_checkpoint(path, *loaded, out, args, device)
        if not rows:  # the first checkpoint's images and size are what the figure shows
            first, spread = dataset, torch.linspace(0, len(dataset) - 1, min(6, len(dataset)))
            shown = [first.names.index(n) for n in args.images or ()] or spread.int().tolist()
            images, rows["truth"] = first[shown]
        if (dataset.names, dataset.root) != (first.names, first.root):
            said = f"{path}: has other images or masks than {paths[0]}"
            raise utils.UserError(f"{said}; say --data or --split")
        title = f"{name}\nmIoU {results[name]['mean_iou']:.4f}"
        rows[title] = label(model, dataset[shown][0], device, images.shape[-2:], args.tta)
    print("\n" + format_comparison(results))
    (out / "metrics.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    protocols = {metrics["protocol"] for metrics in results.values()}  # differ where sizes do
    title = f"split {results[name]['split']}; {' or '.join(sorted(protocols))}"
    captions = [first.names[i][-24:] for i in shown]
    path = out / "comparison.png"
    utils.samples(path, images, rows, first.classes, first.palette, title, captions)
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
    # All are read first, so that a wrong name among them is found before the first is scored.
    checkpoints = [utils.load_checkpoint(path) for path in paths]
    for path, checkpoint in zip(paths, checkpoints):
        if checkpoint["classes"] != checkpoints[0]["classes"]:
            raise utils.UserError(f"{path}: knows other classes than {paths[0]}; score it alone")
    evaluations = [describe(path, checkpoint, args) for path, checkpoint in zip(paths, checkpoints)]
    path, several = paths[0], len(paths) > 1
    wanted = path.parent / "scores" / folder_name(evaluations[0], args)
    wanted = Path("comparison") if several else wanted
    out = utils.free_folder(args.out, wanted, lambda f: other_scores(f, evaluations))
    if several:
        return compare(paths, checkpoints, evaluations, out, args, device)
    loaded = path, checkpoints[0], evaluations[0]
    metrics, matrices, model, dataset = score_checkpoint(*loaded, out, args, device)
    print(f"{path}: {metrics['model']}, epoch {metrics['epoch']}")
    print(f"{len(dataset)} images of split {metrics['split']} of {metrics['data']}")
    print(f"{metrics['protocol']}\n")
    for name, value in metrics["iou"].items():
        print(f"{name:<16}{math.nan if value is None else value:8.4f}")
    for key in ("mean_iou", "pixel_accuracy", "frequency_weighted_iou"):
        print(f"{key.replace('_', ' '):<24}{metrics[key]:.6f}")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    draw(out, metrics, matrices, model, dataset, args, device)
    print(f"\nwritten to {out}: metrics.json, confusion_matrix.png, class_iou.png, examples.png")


if __name__ == "__main__":
    utils.cli(main, data.DataError, models.ModelError)
