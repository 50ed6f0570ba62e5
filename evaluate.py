"""Score checkpoints on a split of their data set.

    python evaluate.py                                            the newest run, on val
    python evaluate.py runs/darrennet/best.pt --split test        another checkpoint or split
    python evaluate.py runs/darrennet/best.pt --void-as-background     as the paper scores
    python evaluate.py runs/*/best.pt                             compare several: table and figure

By default each prediction is brought to its image's own resolution and void is left out, which is
the rule of the VOC challenge. One confusion matrix is summed over the whole split.
"""

import json
import math
import time
from pathlib import Path

import torch

import data
import models
import plots
import utils


def parse_args(argv=None):
    """Return the settings."""
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    how = "one to score, or several to compare; default: the newest run's best.pt"
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help=how)
    add("--data", help="as for train.py; default: what it was trained on")
    add("--split", default="val", help="default: %(default)s")
    add("--tta", action="store_true", help="average with the mirrored image's prediction")
    add(
        "--void-as-background",
        action="store_true",
        help="the paper's protocol: at the training size, void counted as class 0",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default: %(default)s")
    add(
        "--workers", type=utils.number(int, 1, 256), help="threads that decode images; default: all"
    )
    how = "for metrics.json and figures; default: beside the checkpoint, or comparison/ for several"
    add("--out", type=Path, metavar="DIR", help=how)
    return parser.parse_args(argv)


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
        images = data.normalize(image[None].to(device))
        predicted = utils.segment(model, images, mask.shape, tta)[0].cpu()
        matrices.append(utils.confusion_matrix(predicted, mask, len(dataset.classes)))
    return torch.stack(matrices)


def predict(model, images, device, size):
    """Return the labels (N, *size) that a model gives uint8 images (N, 3, H, W)."""
    return utils.segment(model, data.normalize(images.to(device)), size).cpu()


def draw(out, model, dataset, matrices, metrics, title, device):
    """Draw confusion_matrix.png, class_iou.png and examples.png into the folder `out`."""
    title = f"{title}, split {metrics['split']}; {metrics['protocol']}"
    cm, classes = matrices.sum(0), dataset.classes
    plots.confusion_matrix(out / "confusion_matrix.png", cm, classes, title)
    plots.class_iou(out / "class_iou.png", metrics["iou"], f"IoU by class: {title}")

    scores = torch.tensor([utils.mean_iou(matrix) for matrix in matrices])
    order = scores.nan_to_num(-1).argsort(descending=True)
    order = order[~scores[order].isnan()]  # an image that is all void has no score
    middle = len(order) // 2
    ranks = [0, 1, middle, middle + 1, len(order) - 2, len(order) - 1]
    chosen = sorted({rank for rank in ranks if 0 <= rank < len(order)})
    indices = order[chosen]
    images, masks = dataset[indices]
    rows = {"truth": masks, "prediction": predict(model, images, device, masks.shape[-2:])}
    captions = [
        f"{'best' if rank < 2 else 'worst' if rank >= len(order) - 2 else 'median'}: {score:.3f}"
        for rank, score in zip(chosen, scores[indices].tolist())
    ]
    title = f"Images by their own mIoU: {title}"
    path = out / "examples.png"
    plots.samples(path, images, rows, classes, dataset.palette, title, captions)


def format_scores(metrics):
    """Return the scores as lines of text, a class a line."""
    lines = [f"{'class':<16}{'IoU':>8}"]
    for name, value in metrics["iou"].items():
        lines.append(f"{name:<16}" + ("       -" if value is None else f"{value:8.4f}"))
    lines += [
        "",
        f"{'mean IoU':<24}{metrics['mean_iou']:.6f}",
        f"{'pixel accuracy':<24}{metrics['pixel_accuracy']:.6f}",
        f"{'frequency-weighted IoU':<24}{metrics['frequency_weighted_iou']:.6f}",
    ]
    return "\n".join(lines)


def format_comparison(results):
    """Return a Markdown table with a row for each entry of {name: metrics}."""
    lines = [
        "| checkpoint | model | size | parameters | mIoU | accuracy | best | worst | images/s |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | --- | ---: |",
    ]
    for name, metrics in results.items():
        iou = {label: value for label, value in metrics["iou"].items() if value is not None}
        best, worst = (f"{c} {iou[c]:.3f}" for c in (max(iou, key=iou.get), min(iou, key=iou.get)))
        lines.append(
            f"| {name} | {metrics['model']} | {metrics['size']} | {metrics['parameters']:,} "
            f"| {metrics['mean_iou']:.4f} | {metrics['pixel_accuracy']:.1%} | {best} | {worst} "
            f"| {metrics['images_per_second']:.1f} |"
        )
    return "\n".join(lines)


def short_names(paths):
    """Return a name for each checkpoint: its run's folder, or as much of the path as tells it apart."""
    for parts in range(1, 100):
        names = ["/".join(path.with_suffix("").parts[-parts:]) for path in paths]
        names = [name.removesuffix("/best") for name in names]
        if len(set(names)) == len(set(paths)) and "best" not in names:
            return names
    return [str(path) for path in paths]


def score_checkpoint(path, args, device):
    """Return (model, data set, confusion matrix of each image, metrics) of one checkpoint."""
    checkpoint = utils.load_checkpoint(path)
    size = checkpoint["size"]
    dataset = data.load_dataset(
        args.data or checkpoint.get("data", "voc2007"), args.split, size, args.workers
    )
    if list(dataset.classes) != checkpoint["classes"]:
        raise utils.UserError(
            f"{path}: was trained on {len(checkpoint['classes'])} classes "
            f"({', '.join(checkpoint['classes'][:3])}, ...), but the data has "
            f"{len(dataset.classes)} ({', '.join(dataset.classes[:3])}, ...); give the --data "
            "it was trained on"
        )
    model = utils.to_device(models.from_checkpoint(checkpoint), device)
    started = time.monotonic()
    matrices = score(model, dataset, device, args.tta, args.void_as_background)
    seconds = time.monotonic() - started
    cm = matrices.sum(0)

    protocol = "own resolution, void ignored"
    if args.void_as_background:
        protocol = f"{size}x{size}, void as background"
    if args.tta:
        protocol += ", mirrored images averaged"
    values = [None if math.isnan(value) else value for value in utils.iou(cm).tolist()]
    metrics = {
        "mean_iou": utils.mean_iou(cm),
        "pixel_accuracy": utils.pixel_accuracy(cm),
        "frequency_weighted_iou": utils.frequency_weighted_iou(cm),
        "iou": dict(zip(dataset.classes, values)),
        "protocol": protocol,
        "split": args.split,
        "checkpoint": str(path),
        "model": checkpoint["model"],
        "epoch": checkpoint["epoch"],
        "size": size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "images_per_second": len(dataset) / seconds,
    }
    return model, dataset, matrices, metrics


def compare(paths, out, args, device):
    """Score several checkpoints; print their table, write metrics.json and comparison.png."""
    results, rows = {}, {}
    for name, path in zip(short_names(paths), paths):
        print(f"{path} ...", flush=True)
        model, dataset, _, results[name] = score_checkpoint(path, args, device)
        if not rows:  # the first checkpoint's images and size are what the figure shows
            first = dataset
            few = torch.linspace(0, len(first) - 1, min(6, len(first))).long()
            images, rows["truth"] = first[few]
        if dataset.classes != first.classes or len(dataset) != len(first):
            raise utils.UserError(f"{path}: is of another data set than {paths[0]}; score it alone")
        label = f"{name}\nmIoU {results[name]['mean_iou']:.4f}"
        rows[label] = predict(model, dataset[few][0], device, images.shape[-2:])
    print("\n" + format_comparison(results))
    (out / "metrics.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    protocols = {metrics["protocol"] for metrics in results.values()}  # differ where sizes do
    title = f"split {args.split}; {' or '.join(sorted(protocols))}"
    plots.samples(out / "comparison.png", images, rows, first.classes, first.palette, title)
    print(f"\nwritten to {out}: metrics.json, comparison.png")


def main(argv=None):
    """Run the command line; see the top of the file."""
    args = parse_args(argv)
    paths = args.checkpoints or [utils.newest_checkpoint()]
    device = utils.select_device(args.device)
    out = args.out or (paths[0].parent if len(paths) == 1 else Path("comparison"))
    for path in paths:
        utils.load_checkpoint(
            path
        )  # a wrong name among several is found before the first is scored
    utils.make_folder(out)
    if len(paths) > 1:
        return compare(paths, out, args, device)
    model, dataset, matrices, metrics = score_checkpoint(paths[0], args, device)
    print(f"{paths[0]}: {metrics['model']}, epoch {metrics['epoch']}")
    print(f"{len(dataset)} images of split {args.split}; {metrics['protocol']}\n")
    print(format_scores(metrics))
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    title = f"{metrics['model']}, {metrics['size']}x{metrics['size']}"
    draw(out, model, dataset, matrices, metrics, title, device)
    print(f"\nwritten to {out}: metrics.json, confusion_matrix.png, class_iou.png, examples.png")


if __name__ == "__main__":
    utils.run(main, data.DataError, models.ModelError)
