"""Score a checkpoint on a split of its data set.

    python evaluate.py                                            the newest run, on val
    python evaluate.py runs/darrennet/best.pt --split test        another checkpoint or split
    python evaluate.py runs/darrennet/best.pt --void-as-background     as the paper scores

By default each prediction is brought to its image's own resolution and void is left out, which is
the rule of the VOC challenge. One confusion matrix is summed over the whole split.
"""

import json
import math
from pathlib import Path

import torch

import data
import models
import utils


def parse_args(argv=None):
    """Return the settings."""
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, help="default: the newest run's best.pt")
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
    add("--out", type=Path, metavar="DIR", help="for metrics.json; default: beside the checkpoint")
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


def draw(out, model, dataset, matrices, metrics, title, device):
    """Draw confusion_matrix.png, class_iou.png and examples.png into the folder `out`."""
    title = f"{title}, split {metrics['split']}; {metrics['protocol']}"
    cm, classes = matrices.sum(0), dataset.classes
    utils.plot_confusion_matrix(out / "confusion_matrix.png", cm, classes, title)
    utils.plot_class_iou(out / "class_iou.png", metrics["iou"], f"IoU by class: {title}")

    scores = torch.tensor([utils.mean_iou(matrix) for matrix in matrices])
    order = scores.nan_to_num(-1).argsort(descending=True)
    order = order[~scores[order].isnan()]  # an image that is all void has no score
    middle = len(order) // 2
    ranks = [0, 1, middle, middle + 1, len(order) - 2, len(order) - 1]
    chosen = sorted({rank for rank in ranks if 0 <= rank < len(order)})
    indices = order[chosen]
    images, masks = dataset[indices]
    size = tuple(masks.shape[-2:])
    rows = {
        "truth": masks,
        "prediction": utils.segment(model, data.normalize(images.to(device)), size).cpu(),
    }
    captions = [
        f"{'best' if rank < 2 else 'worst' if rank >= len(order) - 2 else 'median'}: {score:.3f}"
        for rank, score in zip(chosen, scores[indices].tolist())
    ]
    title = f"Images by their own mIoU: {title}"
    path = out / "examples.png"
    utils.plot_samples(path, images, rows, classes, dataset.palette, title, captions)


def format_table(metrics):
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


def main(argv=None):
    """Run the command line; see the top of the file."""
    args = parse_args(argv)
    path = args.checkpoint or utils.newest_checkpoint()
    checkpoint = utils.load_checkpoint(path)
    device = utils.select_device(args.device)
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
    model = models.from_checkpoint(checkpoint).to(device)
    out = args.out or Path(path).parent
    utils.make_folder(out)
    matrices = score(model, dataset, device, args.tta, args.void_as_background)
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
    }
    print(f"{path}: {checkpoint['model']}, epoch {checkpoint['epoch']}")
    print(f"{len(dataset)} images of split {args.split}; {protocol}\n")
    print(format_table(metrics))
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    draw(out, model, dataset, matrices, metrics, f"{checkpoint['model']}, {size}x{size}", device)
    print(f"\nwritten to {out}: metrics.json, confusion_matrix.png, class_iou.png, examples.png")


if __name__ == "__main__":
    utils.run(main, data.DataError, models.ModelError)
