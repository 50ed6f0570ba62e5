"""The figures that training and scoring leave behind, drawn with matplotlib; no display is needed.

python plots.py runs/fcn runs/darrennet             the curves of several runs in one picture
python plots.py runs/* --out curves.png
"""

import csv
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

import utils

# Colours that colour-blind readers tell apart (Okabe and Ito 2008, Color Universal Design).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


def read_log(run):
    """Return the rows of a run's log.csv, dictionaries of numbers. Raises UserError."""
    path = Path(run, "log.csv")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError as error:
        raise utils.UserError(
            f"{run}: has no log.csv; give folders that train.py filled"
        ) from error
    except (OSError, TypeError, ValueError) as error:
        raise utils.UserError(f"{path}: is not a log of train.py ({error})") from error
    if not rows or "val_mean_iou" not in rows[0]:
        raise utils.UserError(f"{path}: has no epochs yet; train first")
    return rows


def curves(path, histories, title):
    """Draw the losses and validation scores of runs over the epochs, each run in its own colour.

    histories: {name: the rows of the run's log.csv}. The best epoch of each run has a dot.
    """
    names = [
        f"{name}: best {utils.best_row(rows)['val_mean_iou']:.4f}"
        for name, rows in histories.items()
    ]
    legend_rows = len(names) if len(names) > 1 else 0
    figure = Figure(figsize=(12, 4.2 + 0.25 * legend_rows), layout="constrained")
    figure.suptitle(title)
    panels = (
        ("loss", {"val_loss": "-", "train_loss": ":"}),
        ("mean IoU, validation", {"val_mean_iou": "-"}),
        ("pixel accuracy, validation", {"val_pixel_accuracy": "-"}),
    )
    handles = []
    for axes, (label, columns) in zip(figure.subplots(1, len(panels)), panels):
        for number, rows in enumerate(histories.values()):
            epochs = [row["epoch"] for row in rows]
            best = utils.best_row(rows)
            for column, style in columns.items():
                color = COLORS[number % len(COLORS)]
                (line,) = axes.plot(epochs, [row[column] for row in rows], style, color=color)
            if column == "val_mean_iou":
                handles.append(line)
            if label != "loss":
                axes.plot(best["epoch"], best[column], "o", color=color)
        axes.set(title=label, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if label == "loss":
            styles = [Line2D([], [], ls=style, color="black") for style in columns.values()]
            axes.legend(styles, ["validation", "training"], frameon=False)
    if len(names) > 1:
        figure.legend(handles, names, loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=110)


def confusion_matrix(path, cm, classes, title):
    """Draw a confusion matrix (C, C) with each row as shares, in %, of the true class's pixels."""
    shares = (
        100 * cm.double() / cm.sum(1, keepdim=True)
    )  # NaN where a class never occurs: left blank
    side = 3 + 0.42 * len(classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(shares.numpy()):
        if share >= 0.5:
            color = "white" if share > 55 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=color, size=8)
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=90)
    axes.set_yticks(ticks, classes)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.suptitle(f"{title}\n% of each true class's pixels (rows add up to 100)")
    figure.savefig(path, dpi=100)


def class_iou(path, values, title):
    """Draw each class's IoU as a bar, the best on top. values: {class name: IoU or None}."""
    scored = {name: value for name, value in values.items() if value is not None}
    scored = dict(sorted(scored.items(), key=lambda item: item[1]))
    figure = Figure(figsize=(8, 1.6 + 0.3 * len(scored)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(scored), list(scored.values()), color="#0072b2")
    axes.bar_label(bars, [f"{value:.3f}" for value in scored.values()], padding=3)
    axes.set(xlim=(0, 1), xlabel="IoU")
    figure.suptitle(f"{title}\nmean {sum(scored.values()) / len(scored):.3f}")
    figure.savefig(path, dpi=100)


def samples(path, images, rows, classes, palette, title, captions=()):
    """Draw a grid with a column for each image: the image on top, then its masks row by row.

    images: uint8 (N, 3, H, W); rows: {name: uint8 masks (N, H, W)}; captions: a line above each
    image. Below the grid, a legend of the classes that appear.
    """
    height = 2.1 * (1 + len(rows)) + 0.9
    figure = Figure(figsize=(2.1 * len(images), height), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(1 + len(rows), len(images), squeeze=False)
    for axes, caption in zip(grid[0], captions):
        axes.set_title(caption, fontsize=10)
    pictures = [images.permute(0, 2, 3, 1).numpy()]
    pictures += [[utils.colorize(mask, palette) for mask in masks] for masks in rows.values()]
    for line, name, shown in zip(grid, ["image", *rows], pictures):
        line[0].set_ylabel(name)
        for axes, picture in zip(line, shown):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
    present = torch.stack(list(rows.values())).unique().tolist()
    names = [classes[c] if c < len(classes) else "void" for c in present]
    colors = utils.colorize(np.array(present), palette) / 255
    handles = [Patch(fc=color, ec="black", label=name) for color, name in zip(colors, names)]
    columns = min(len(handles), 1 + 4 * len(images) // 3)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=100)


def class_counts(path, classes, counts, title):
    """Draw how many images show each class, and what share of the pixels it takes, split by split.

    counts: {split: pixels of each class in each mask, int64 (N, C)}; shares on a log scale.
    """
    figure = Figure(figsize=(10, 2 + 0.36 * len(classes)), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2, sharey=True)
    thickness = 0.8 / len(counts)
    for number, (split, pixels) in enumerate(counts.items()):
        y = np.arange(len(classes)) + thickness * (number - (len(counts) - 1) / 2)
        shares = 100 * pixels.sum(0) / pixels.sum()
        values = ((pixels > 0).sum(0).tolist(), shares.tolist())
        for axes, widths, form in zip(panels, values, ("{}", "{:.2g}")):
            bars = axes.barh(y, widths, thickness, color=COLORS[number], label=split)
            axes.bar_label(bars, [form.format(width) for width in widths], padding=2, fontsize=7)
    panels[0].set(title="images that show the class", xlabel="images")
    panels[1].set(title="share of the labelled pixels", xlabel="% (log scale)", xscale="log")
    panels[1].xaxis.set_major_formatter("{x:g}")
    panels[0].set_yticks(range(len(classes)), classes)
    panels[0].invert_yaxis()
    for axes in panels:
        axes.margins(x=0.12, y=0.01)
    panels[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=100)


def main(argv=None):
    """Run the command line; see the top of the file."""
    parser = utils.make_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py filled")
    how = "the picture to write; default: %(default)s"
    parser.add_argument("--out", type=Path, default="curves.png", metavar="FILE", help=how)
    args = parser.parse_args(argv)
    histories = {run: read_log(run) for run in args.runs}
    utils.make_folder(args.out.parent)
    curves(args.out, histories, "Training runs, validation at the training size, void left out")
    for run, rows in histories.items():
        best = utils.best_row(rows)
        print(f"{run}: best epoch {best['epoch']:.0f}, mIoU {best['val_mean_iou']:.4f}")
    print(f"written: {args.out}")


if __name__ == "__main__":
    utils.run(main)
