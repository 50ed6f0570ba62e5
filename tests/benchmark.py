"""Measure what the scripts cost beyond the networks: python tests/benchmark.py --data DIR [ROW ...]

Each row is a ratio of two things timed in turns: the medians of their times, and between brackets
the smallest and the largest ratio of any turn. Nothing else should be running. DIR is a folder that
holds VOCdevkit/VOC2007. All rows take about eight minutes on two cores.

1: the loop of train.py beside bare steps. 2: scoring beside its parts. 3: what could make a step
faster, beside the step as it is, with OMP_NUM_THREADS=1, since one of it acts on one thread alone;
--run RUN takes the steps of a run that has learned, whose small numbers may be slow.
"""

import contextlib
import functools
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import data
import evaluate
import models
import train
import utils

USUAL = ("--augment", "--cosine")


def timed(function):
    """Return how many seconds a function takes, with what it gave the GPU to do."""
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def show(row, what, one, other, turns=5):
    """Time two functions in turns, after one to warm up, and print a row of the table."""
    times = [(timed(one), timed(other)) for _ in range(turns + 1)][1:]
    ratios = [a / b for a, b in times]
    a, b = (statistics.median(column) for column in zip(*times))
    brackets = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"| {row} | {what} | {a / b:.2f} ({brackets}) | {1000 * a:.1f} ms, {1000 * b:.1f} ms |")


def make_run(*flags):
    """Return the Run that train.py would make of the flags."""
    args, last = train.read_settings([*map(str, flags)])
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        return train.Run(args, last, utils.select_device(args.device))


def epoch_of(run, steps):
    """Return a function that takes so many steps as train.py does."""
    run.train_set.names = run.train_set.names[: steps * run.batch_size]
    return lambda: train.train_one_epoch(run, 1)


def bare_steps(model, batch, size, device, steps):
    """Return a function that takes steps on a batch that is there already.

    Layout, precision and optimizer are as in train.py.
    """
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    images = data.normalize(images)
    labels = torch.randint(0, 21, (batch, size, size), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    precision = train.fast_precision(device)
    cast = {"dtype": getattr(torch, precision), "enabled": precision != "float32"}

    def take():
        model.train()
        for _ in range(steps):
            with torch.autocast(device.type, **cast):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return take


def row_1(root):
    for name, size, steps in (("fcn", 224, 4), ("darrennet", 224, 3), ("fcn", 64, 12)):
        run = make_run("--model", name, "--data", root, "--size", size, *USUAL)
        bare = bare_steps(run.model, 16, size, run.device, steps)
        show(1, f"train.py's loop / bare steps: {name}, {size}x{size}", epoch_of(run, steps), bare)


def row_2(root):
    pred = torch.randint(0, 21, (16, 375, 500), dtype=torch.uint8)
    mask = torch.where(torch.rand(pred.shape) < 0.05, data.VOID, pred)

    def loop():
        """Count as many do: boolean masks, class by class."""
        for c in range(21):
            p, m = (pred == c) & (mask != data.VOID), mask == c
            (p & m).sum().item(), (p | m).sum().item()

    what = "loop over classes / confusion matrix, 16 masks of 500x375"
    show(2, what, loop, lambda: utils.confusion_matrix(pred, mask, 21))

    dataset = data.VOC(root, "val", 224)
    dataset.names = dataset.names[:40]
    device = utils.select_device()
    model = utils.to_device(models.build_model("fcn"), device).eval()

    def decode_and_segment():
        for index in range(len(dataset)):
            images = data.normalize(dataset.images[[index]].to(device))
            utils.segment(model, images, dataset.full_mask(index).shape)[0].cpu()

    what = "evaluate.py's scoring / decoding and network alone: fcn, 224x224"
    show(2, what, lambda: evaluate.score(model, dataset, device), decode_and_segment)


def row_3(root, resumed=None):
    run = make_run("--resume", resumed) if resumed else make_run("--data", root, *USUAL)
    steps = epoch_of(run, 6)

    def flushed():
        """Take the steps with numbers that are smaller than float32's normal ones as 0."""
        torch.set_flush_denormal(True)
        steps()
        torch.set_flush_denormal(False)

    def every_fifth():
        """Take the steps, averaging the weights after each fifth alone."""
        update, count = train.update_average, itertools.count()
        train.update_average = lambda *args: next(count) % 5 or update(*args)
        steps()
        train.update_average = update

    def benchmarked():
        """Take the steps with the convolutions that cuDNN finds to be fastest."""
        torch.backends.cudnn.benchmark = True
        steps()
        torch.backends.cudnn.benchmark = False

    what = f"{run.args.model}, {run.args.size}x{run.args.size}: step /"
    show(3, f"{what} with denormal numbers as 0", steps, flushed)
    show(3, f"{what} averaging after each fifth", steps, every_fifth)
    if run.device.type == "cuda":
        show(3, f"{what} with cudnn.benchmark", steps, benchmarked)


def main(argv=None):
    """Run the rows asked for, or all."""
    parser = utils.make_parser(__doc__)
    parser.add_argument("rows", nargs="*", type=int, metavar="ROW", help="1 to 3; default: all")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--run", metavar="RUN", help="for row 3: its last.pt")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {utils.select_device()}\n")
    print("| row | what | ratio | medians |\n| --- | --- | --- | --- |")
    for number in args.rows or (1, 2, 3):
        row = (row_1, row_2, functools.partial(row_3, resumed=args.run))[number - 1]
        row(args.data)


if __name__ == "__main__":
    main()
