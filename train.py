"""Train a network for semantic segmentation.

    python train.py --model darrennet --augment --cosine     PASCAL VOC 2007, downloaded to data/
    python train.py --data shapes --model fcn --size 64      drawn shapes, no download
    python train.py --data DIR --augment --cosine            a folder of your own
    python train.py --resume                                 go on with the newest run
    torchrun --nproc_per_node=8 train.py                     train on eight GPUs

A run fills a folder, runs/MODEL/: best.pt (the epoch with the best validation mIoU),
last.pt (what --resume needs), log.csv, settings.json and, at the end, curves.png and
samples.png. It is validated 100 to 200 times (a short one after each epoch); --resume
goes on from the last of these.

The order of this file is that of a run: settings, data and network, the step,
validation, the loop, files; at the end what makes it faster, and `main`. To learn how
training works read from `class Run` to `fit`.
"""

import argparse
import contextlib
import copy
import csv
import json
import math
import os
import platform
import shlex
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import models
import utils

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
# GPUs of the T4's kind, Turing, but ones that make NaN of float16 (PyTorch's issue 77955).
NO_FLOAT16 = (
    "GTX 16", "T400", "T500", "T550", "T600", "T1000", "T1200", "T2000", "MX450", "MX550",
    "CMP 30HX",
)  # fmt: skip

# What a run writes into its folder.
FILES = ("best.pt", "last.pt", "log.csv", "settings.json", "curves.png", "samples.png")

# ----------------------------------------------------------------------------- settings


def make_parser():
    """Return the parser of the command line."""
    parser = utils.make_parser(__doc__)
    count, real = utils.number(int, 1, 10**6), utils.number(float, 0, 10)
    default, yes_or_no = "; default: %(default)s", argparse.BooleanOptionalAction

    group = parser.add_argument_group("everyday")
    add = group.add_argument
    add("--model", choices=models.MODELS, default="darrennet", help="the network" + default)
    how = "voc2007 or voc2012 (downloaded to data/), shapes (drawn) or a folder" + default
    add("--data", default="voc2007", metavar="NAME|DIR", help=how)
    how = "transform the images at random: flip, or affine (no value: affine); default: no"
    add("--augment", nargs="?", const="affine", choices=data.MODES, help=how)
    add("--cosine", action="store_true", help="lower the learning rate to 0; default: constant")
    how = "rare classes count more in the loss (no value: inverse); default: no"
    add("--class-weights", nargs="?", const="inverse", choices=data.SCHEMES, help=how)
    add("--size", type=utils.number(int, 32, 4096), default=96, help="the images' side" + default)
    length = group.add_mutually_exclusive_group().add_argument
    how = "how long to train, in batches, rounded up to whole passes over the data" + default
    length("--steps", type=count, default=10_000, metavar="N", help=how)
    length("--epochs", type=count, metavar="N", help="the same in passes, instead of --steps")
    add("--out", type=Path, metavar="DIR", help="the run's folder; default: runs/MODEL, numbered")
    how = "go on with this run, a folder or last.pt; no value: with --out, or else the newest"
    add("--resume", nargs="?", const="newest", metavar="RUN", help=how)

    add = parser.add_argument_group("training").add_argument
    add("--init", choices=utils.INITIALIZERS, default="kaiming", help="how weights begin" + default)
    add("--pretrained", action=yes_or_no, default=True, help="resnet34_: begin from ImageNet's")
    add("--encoder-weights", metavar="FILE", help="start from all weights in FILE that fit")
    how = "the encoder learns at FACTOR times the rate; 0 freezes it" + default
    add("--encoder-lr", type=utils.number(float, 0, 1), default=1.0, metavar="FACTOR", help=how)
    add("--batch-size", type=count, default=16, metavar="N", help="images in a step" + default)
    add("--lr", type=real, default=2e-3, metavar="X", help="learning rate (AdamW's)" + default)
    add("--weight-decay", type=real, default=0.2, metavar="X", help="pulls weights to 0" + default)
    how = "average the weights over about 1/(1 - X) steps; 0: no average" + default
    add("--ema", type=utils.number(float, 0, 0.9999), default=0.99, metavar="X", help=how)
    add("--patience", type=count, metavar="N", help="stop after N epochs without a better mIoU")
    add("--seed", type=utils.number(int, 0, 2**31 - 1), default=0, help="random seed" + default)
    add("--train-split", default="train", metavar="NAME", help="the list to learn from" + default)
    add("--val-split", default="val", metavar="NAME", help="the list to validate on" + default)

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps" + default)
    how = "number format in the network; auto: 16 bits where the device is fast with them" + default
    add("--precision", choices=PRECISIONS, default="auto", help=how)
    how = "a CUDA graph on one CUDA GPU, else torch.compile; not by torchrun; default: no"
    add("--compile", action=yes_or_no, default=False, help=how)
    return parser


def read_settings(argv):
    """Return (settings, the content of last.pt, or None for a new run).

    A resumed run keeps its settings: only those in `free` may be typed anew.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    # --out DIR --resume starts a new run while DIR has no last.pt.
    starts = args.resume == "newest" and args.out and not (args.out / "last.pt").exists()
    if not args.resume or starts:
        return args, None

    wanted = args.out if args.resume == "newest" else Path(args.resume)
    path = utils.find_checkpoint(wanted, "last.pt")
    last = utils.load_checkpoint(path)
    stored = dict(last.get("args") or {})
    # old.pt, a copy of an earlier last.pt, would overwrite the newer files beside it.
    whole = path.name == "last.pt" and path.with_name("best.pt").exists()
    if not whole or "steps" not in stored or "optimizer" not in last:
        raise utils.UserError(f"{path}: is no last.pt beside a best.pt; give the run's folder")
    stored["out"] = path.parent
    parser.set_defaults(**stored)  # what is not typed again stays as it was
    args = parser.parse_args(argv)
    if any(str(word).startswith("--st") for word in argv or sys.argv):
        args.epochs = None  # --steps was typed (argparse takes --st, too): it counts now
    free = {"data", "steps", "epochs", "patience", "device", "precision", "compile"}
    changed = [name for name in stored.keys() - free if getattr(args, name) != stored[name]]
    if changed:
        flag = "--" + changed[0].replace("_", "-")
        raise utils.UserError(f"{path}: was trained with another {flag}; start a new run")
    return args, last


def without_place(args):
    """Return the settings as a dictionary, less those that say where the run lies."""
    return {k: v for k, v in vars(args).items() if k not in ("out", "resume")}


# ------------------------------------------------------------- the data and the network


class Run:
    """A training run: settings, data, networks, optimizer, history.

    The functions below take it as `run`. It has two networks: `model` learns, and the
    weights of `average` are a running mean of model's. `average` is what is validated,
    what best.pt holds (as `state_dict`) and what evaluate.py scores; last.pt holds both.

    On one CPU in float32 `rank` is 0, `processes` is 1, `forward` is the model itself,
    and `scaler` does nothing. last: the content of last.pt, or None for a new run.
    """

    def __init__(self, args, last, device, rank=0, processes=1):
        self.args, self.device = args, device
        self.rank, self.processes = rank, processes  # torchrun's: this is process `rank`
        self.precision = fast_precision(device) if args.precision == "auto" else args.precision

        # Process 0 loads, and downloads, first; the others wait for it, then load.
        if rank > 0:
            distributed.barrier()
        self.train_set, self.val_set, self.class_weights = load_sets(args, device)
        if rank == 0 and processes > 1:
            distributed.barrier()
        self.batch_size = min(args.batch_size, len(self.train_set.names))  # of all processes
        # Images that are too few for a last batch are left out.
        self.epoch_steps = len(self.train_set.names) // self.batch_size
        self.epochs = args.epochs or math.ceil(args.steps / self.epoch_steps)
        check_settings(self, last)

        torch.manual_seed(args.seed)
        file = utils.read_tensors(args.encoder_weights) if args.encoder_weights and not last else {}
        # Of last.pt this takes the averaged weights; `restore` loads those that learn.
        model = models.from_checkpoint(last) if last else make_model(args, self.train_set, file)
        self.model = utils.to_device(model, device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        # fused: one kernel updates all weights, on a CPU in 0.26 to 0.40 of the time.
        fused = (device.type, self.precision) != ("mps", "float16")  # there it ignores the scaler
        options = {"weight_decay": args.weight_decay, "fused": fused}
        groups = parameter_groups(self.model, args.encoder_lr)
        self.optimizer = torch.optim.AdamW(groups, args.lr, **options)
        # float16 rounds numbers below 3e-8 to 0. So the loss is multiplied by a large
        # factor before backward(), and the gradients are divided by it before the step.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "float16")
        self.history = []  # the rows of log.csv
        if last:
            restore(self, last)
        # All images that its weights ever learned from, those of FILE included:
        # evaluate.py says when it scores on some of them.
        before = ((last or file).get("images") or {}).get("train", [])
        learned = {*before, *map(str, self.train_set.names)}
        self.seen = {"train": sorted(learned), "val": list(map(str, self.val_set.names))}
        # What a step calls: the model, or a faster form of it with the same weights.
        self.forward = fast_forward(self)
        # The networks' own tensors, not copies: they change with every step.
        self.tensors = float_tensors(self.average), float_tensors(self.model)


def load_sets(args, device):
    """Return (training set, validation set, class weights, float32 (C,))."""
    # Affine augmentation zooms in: it is given images of twice the size, and returns --size.
    side = args.size * (2 if args.augment == "affine" else 1)
    how = {"device": device, "progress": utils.progress}
    train_set = data.load_dataset(args.data, args.train_split, side, **how)
    val_set = data.load_dataset(args.data, args.val_split, args.size, **how)
    data.check_labels(train_set, f"{args.data}: split {args.train_split}")
    data.check_labels(val_set, f"{args.data}: split {args.val_split}", learns=False)
    weights = torch.ones(len(train_set.classes), device=device)
    if args.class_weights:
        weights = data.class_weights(train_set, args.class_weights).to(device)
    return train_set, val_set, weights


def make_model(args, train_set, file):
    """Return a new network; file: what --encoder-weights holds, or {}."""
    imagenet = args.pretrained and not file
    options = {"pretrained": imagenet} if args.model.startswith("resnet34_") else {}
    model = models.build_model(args.model, len(train_set.classes), **options)

    pretrained = getattr(model, "pretrained_parts", ())
    # Only parts without trained weights get new ones.
    new = [name for name, _ in model.named_children() if name not in pretrained]
    for name in new:
        utils.initialize(model.get_submodule(name), args.init)
    print(f"--init {args.init}: {', '.join(new)}; pretrained: {', '.join(pretrained) or 'nothing'}")
    if args.encoder_weights:
        loaded, left = models.load_encoder(model, file)
        if not loaded or hasattr(model, "encoder") and not any("encoder." in n for n in loaded):
            raise utils.UserError(f"{args.encoder_weights}: does not fit {args.model}'s encoder")
        print(f"{args.encoder_weights}: {len(loaded)} tensors loaded, left out: {str(left)[:90]}")
    return model


def parameter_groups(model, encoder_lr):
    """Return AdamW's groups: one of all parameters, or two: the others, then the encoder's.

    Two where --encoder-lr is not 1. At 0 the encoder is frozen here.
    """
    if encoder_lr == 1:
        return [{"params": list(model.parameters())}]
    if not hasattr(model, "encoder"):
        raise utils.UserError("--encoder-lr: this network has no part that is called `encoder`")
    model.encoder.requires_grad_(encoder_lr > 0)
    others = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    return [{"params": others}, {"params": list(model.encoder.parameters())}]


def check_settings(run, last):
    """Raise an error where the settings do not fit the data, or the run that is to go on."""
    if last and list(run.train_set.classes) != last["classes"]:
        raise utils.UserError(f"{run.args.data}: has other classes than the run; give its --data")
    if run.batch_size < run.processes:
        raise utils.UserError(f"--batch-size is {run.batch_size} for {run.processes} processes")
    if run.processes > 1 and run.args.patience:
        raise utils.UserError("--patience is for one process: only the first one validates")


def restore(run, last):
    """Load an interrupted run's state, `last` (the content of last.pt), into a new run."""
    run.history = last["history"]
    # Both networks have the averaged weights until here.
    run.model.load_state_dict(last["trained"])
    # Adam's moments alone: `fused` is chosen for this device, the rate is set in each step.
    state = run.optimizer.state_dict() | {"state": last["optimizer"]["state"]}
    run.optimizer.load_state_dict(state)
    run.scaler.load_state_dict(last.get("scaler") or run.scaler.state_dict())
    # Another kind of device may have stored Adam's two moments in another memory order.
    # The fused kernel expects that of the weights: the moments are copied into it.
    for parameter, moments in run.optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(parameter).copy_(moments[name])


# ----------------------------------------------------------------------------- the step


def criterion(logits, masks, weights):
    """Return the loss, a scalar: the mean cross-entropy of the labelled pixels (not void).

    logits: float (N, C, H, W); masks: uint8 (N, H, W), classes or void; weights: the
    classes' weights, float (C,). To try another loss change this function: training and
    validation both use it. A Dice term, for example, must leave void out.
    """
    # Divided by hand, because F.cross_entropy's own mean is NaN where all is void.
    logits, labels = logits.float(), masks.long()
    total = F.cross_entropy(logits, labels, weights, ignore_index=data.VOID, reduction="sum")
    return total / pixel_weight(masks, weights).clamp(min=1e-9)


def pixel_weight(masks, weights):
    """Return the sum of the class weights of all labelled pixels, the divisor of `criterion`."""
    # Each label's weight is looked up; the padding gives void (255) the weight 0. To
    # index with masks != 255 would make the CPU wait for the GPU.
    by_label = F.pad(weights, (0, 256 - len(weights)))
    return by_label[masks.long()].sum()


def learning_rate(args, done, total):
    """Return the learning rate when `done` of `total` steps, or epochs, are over.

    It is --lr or, with --cosine, falls from --lr to 0 along half a cosine.
    """
    factor = (1 + math.cos(math.pi * done / total)) / 2 if args.cosine else 1
    return args.lr * factor


def train_one_epoch(run, epoch):
    """Take an epoch's steps; return their mean loss, a float. No step waits for a CUDA GPU."""
    args = run.args
    batches = data.epoch_order(run.train_set, run.batch_size, args.seed, epoch)
    total = torch.zeros((), device=run.device)
    # Random numbers follow from --seed, epoch and process alone, so --resume has none to
    # restore. Large primes: epochs, processes and `epoch_order` never share a seed.
    torch.manual_seed(1_000_003 * epoch + 7_919 * (run.rank + 1) + args.seed)
    set_training_mode(run)
    for step, indices in enumerate(utils.progress(batches, f"epoch {epoch}/{run.epochs}")):
        # This process's part of the batch, which is all of it where there is one process.
        indices = indices[run.rank :: run.processes]
        images, masks = data.fetch(run.train_set, indices, run.device)
        if args.augment:
            images, masks = data.augment(images, masks, args.augment, args.size)
        with autocast(run):
            logits = run.forward(data.normalize(images))
        loss = criterion(logits, masks, run.class_weights)

        # Set in every step from `done`, so --resume needs no scheduler's state. The second
        # group, where there is one, is the encoder's (parameter_groups).
        done = (epoch - 1) * len(batches) + step
        for group, factor in zip(run.optimizer.param_groups, (1, args.encoder_lr)):
            group["lr"] = factor * learning_rate(args, done, run.epochs * len(batches))
        run.optimizer.zero_grad()
        # But for float16 this is  loss.backward()  and  optimizer.step().
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        update_average(run, done)
        total += loss.detach()  # .item() would make the CPU wait for the GPU in every step
    return total.item() / len(batches)


def set_training_mode(run):
    """Have dropout drop, and batch norms learn their statistics, but not in a frozen encoder."""
    run.model.train()
    if run.args.encoder_lr == 0:
        run.model.encoder.eval()


def autocast(run, **options):
    """Return a context: convolutions compute in --precision, weights stay float32."""
    if run.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(run.device.type, getattr(torch, run.precision), **options)


def update_average(run, steps):
    """Move the averaged weights, and batch norms' statistics, a little towards the latest.

    average = decay * average + (1 - decay) * latest  is a mean over about the last
    1 / (1 - decay) steps, 100 of them for 0.99. At first decay is smaller: the random
    start is soon forgotten.
    """
    decay = min(run.args.ema, steps / (steps + 10))
    # PyTorch's helper does this for all tensors at once, in place.
    get_ema_multi_avg_fn(decay)(*run.tensors, None)


def float_tensors(network):
    """Return a network's float tensors, not copied; batch norms' counters stay out."""
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]


# -------------------------------------------------------------- validation and the loop


@torch.inference_mode()
def validate(run):
    """Score `run.average` on the validation set, void left out; return (loss, confusion matrix).

    The loss is the weighted mean over the split's labelled pixels, whatever the batch
    size (a term that is no mean over pixels, such as Dice, may depend on it). This is at
    the training size: evaluate.py scores at the photos' own, and smooths (`utils.segment`).
    """
    model, num_classes = run.average.eval(), len(run.val_set.classes)
    cm = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=run.device)
    total, labelled = torch.zeros(2, device=run.device)
    order = torch.arange(len(run.val_set.names), device=run.val_set.images.device)
    for indices in order.split(run.batch_size):
        images, masks = data.fetch(run.val_set, indices, run.device)
        with autocast(run):
            logits = model(data.normalize(images)).float()
        # max, because argmax takes several times as long on CPUs.
        cm += utils.confusion_matrix(logits.max(1).indices, masks, num_classes)
        # A mean times its weight is a sum again; the sums are divided once, at the end.
        weight = pixel_weight(masks, run.class_weights)
        total += criterion(logits, masks, run.class_weights) * weight
        labelled += weight
    return (total / labelled.clamp(min=1e-9)).item(), cm


def fit(run):
    """Train to the last epoch; validate, save and print 100 to 200 times."""
    first = run.history[-1]["epoch"] + 1 if run.history else 1
    if first > run.epochs:
        print("this run is finished; to go on with it, raise --steps or --epochs")
    losses, started = [], time.perf_counter()
    for epoch in range(first, run.epochs + 1):
        # Before the epoch, so that a run that has stopped does so again when it is resumed.
        if run.args.patience and run.history:
            since_best = run.history[-1]["epoch"] - utils.best_row(run.history)["epoch"]
            if since_best >= run.args.patience:
                print(f"stopped: no better validation mIoU for {since_best} epochs")
                break
        losses.append(train_one_epoch(run, epoch))
        # A long run is validated 100 to 200 times, a short one after each epoch.
        if epoch % max(1, run.epochs // 100) != 0 and epoch < run.epochs:
            continue
        if run.rank == 0:  # the others wait for it in their next step, to average gradients
            # `seconds`: of training alone; the row's have the validation's as well.
            loss, seconds = sum(losses) / len(losses), time.perf_counter() - started
            val_loss, cm = validate(run)
            # Checked before saving. In float16 an infinite gradient halves the scaler's
            # factor: one as small as this means that gradients stay infinite.
            if not math.isfinite(loss + val_loss) or run.scaler.get_scale() < 1e-6:
                said = f"epoch {epoch}: loss {loss}, validation loss {val_loss}, or gradients"
                remedy = "start anew with a smaller --lr, or --precision float32"
                raise utils.UserError(f"{said} are not finite; {remedy}")
            row = {
                "epoch": epoch,
                "lr": learning_rate(run.args, epoch - 1, run.epochs),
                "train_loss": loss,
                "val_loss": val_loss,
                "val_mean_iou": utils.mean_iou(cm),
                "val_pixel_accuracy": utils.pixel_accuracy(cm),
                "images_per_second": len(losses) * run.epoch_steps * run.batch_size / seconds,
                "seconds": time.perf_counter() - started,
            }
            run.history.append(row)
            save(run)
            report(run, row, cm, left=(run.epochs - epoch) * row["seconds"] / len(losses))
        losses, started = [], time.perf_counter()


def report(run, row, cm, left):
    """Print one line on a validation; `left`: seconds. Remark where it names a single class."""
    predicted = cm.sum(0).nonzero().flatten().tolist()
    print(
        f"epoch {row['epoch']}/{run.epochs}  "
        f"loss {row['train_loss']:.3f}  val loss {row['val_loss']:.3f}  "
        f"mIoU {row['val_mean_iou']:.4f}  accuracy {row['val_pixel_accuracy']:.1%}  "
        f"predicts {len(predicted)}/{len(cm)} classes  "
        f"{row['images_per_second']:.1f} images/s  {timedelta(seconds=round(left))} left",
        flush=True,
    )
    if len(predicted) == 1:
        print(f"  so far every pixel is {run.val_set.classes[predicted[0]]}, as is usual early on")


# ----------------------------------------------------------------------- a run's folder


def claim_folder(args):
    """Return (the run's folder, whether this process made its settings.json).

    The folder is --out, or else the first free of runs/MODEL, runs/MODEL-2, ... It is
    claimed by making settings.json, which only one of several runs that start at once
    can do. Raises UserError where --out has a file that a run would write over.
    """
    for folder in [args.out] if args.out else utils.numbered(Path("runs", args.model)):
        folder.mkdir(parents=True, exist_ok=True)
        there = [name for name in FILES if (folder / name).exists()]
        if args.resume and there == ["settings.json"]:
            return folder, False  # that run ended before its first validation
        with contextlib.suppress(FileExistsError):
            if not there:  # mode x fails if the file is there by now: another run was faster
                open(folder / "settings.json", "x").close()
                return folder, True
    raise utils.UserError(f"{args.out}: holds a run; add --resume, or (no last.pt) another --out")


def write_settings(run, argv):
    """Write settings.json: the command as typed, every setting, the versions, the device."""
    typed = sys.argv[1:] if argv is None else map(str, argv)
    machine = f"{run.device}, {run.precision}, {torch.get_num_threads()} threads"
    stored = {
        "command": shlex.join([Path(sys.argv[0]).name, *typed]),
        "settings": without_place(run.args),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": f"{machine}, {platform.platform()}",
    }
    path = run.args.out / "settings.json"
    path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def save(run):
    """Write last.pt and log.csv; best.pt too where this validation is the best so far."""
    checkpoint = {
        "model": run.args.model,
        # Python's values, where a data set of one's own has numpy's: torch.load takes none.
        "classes": list(map(str, run.train_set.classes)),
        "palette": [list(map(int, color)) for color in run.train_set.palette],
        "size": run.args.size,
        "data": run.args.data,
        "images": run.seen,
        "args": without_place(run.args),
        "state_dict": run.average.state_dict(),
        "epoch": run.history[-1]["epoch"],
        "metrics": run.history[-1],
    }
    resuming = {
        "trained": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "history": run.history,
    }
    # best.pt first: after a crash between the two, --resume repeats this validation.
    if utils.best_row(run.history)["epoch"] == run.history[-1]["epoch"]:
        utils.save_checkpoint(run.args.out / "best.pt", checkpoint)
    utils.save_checkpoint(run.args.out / "last.pt", checkpoint | resuming)
    try:
        with open(run.args.out / "log.csv", "w", newline="", encoding="utf-8") as file:
            # Rows that were written before a column was added lack it.
            writer = csv.DictWriter(file, run.history[-1], restval="nan", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(run.history)
    except PermissionError as error:  # Excel has it open
        print(f"{error}; close it: the next validation writes all rows")


def finish(run):
    """Draw the curves, and the best epoch's predictions for a few images; say what to do next."""
    out, args, val_set = run.args.out, run.args, run.val_set
    best = utils.best_row(run.history)
    title = f"{args.model}; validation on split {args.val_split}, void left out"
    utils.curves(out / "curves.png", {args.model: run.history}, title)
    # At most six, evenly spread.
    few = torch.linspace(0, len(val_set.names) - 1, min(6, len(val_set.names))).long()
    images, masks = val_set.images[few].cpu(), val_set.masks[few].cpu()
    with torch.inference_mode():
        model = models.from_checkpoint(utils.load_checkpoint(out / "best.pt"))
        labels = model(data.normalize(images)).argmax(1)
    rows = {"truth": masks, "prediction": labels}
    title = f"{args.model}, epoch {best['epoch']}, split {args.val_split}, {args.size}x{args.size}"
    utils.samples(out / "samples.png", images, rows, val_set.classes, title)
    # For Windows, too: its cmd takes slashes, but of quotes the double ones alone.
    print(
        f"best: epoch {best['epoch']}, validation mIoU {best['val_mean_iou']:.4f}, "
        f"pixel accuracy {best['val_pixel_accuracy']:.1%}\n"
        f"look at    {out / 'curves.png'} and {out / 'samples.png'}\n"
        f'score it   python evaluate.py "{out.as_posix()}/best.pt"\n'
        f'use it     python predict.py IMAGE --checkpoint "{out.as_posix()}/best.pt"'
    )


# ----------------------------------------------------- faster, and on several processes


def fast_precision(device):
    """Return the numbers that a device multiplies fastest: bfloat16, float16 or float32.

    float16 lacks the range of float32, bfloat16 has it. Since 2023 Intel's processors for
    servers multiply bfloat16 in a unit of its own (AMX; docs/speed.md).
    """
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)  # 7: V100, T4, RTX 20; 8: Ampere
        if any(card in torch.cuda.get_device_name(device) for card in NO_FLOAT16):
            return "float32"
        return "bfloat16" if major >= 8 else "float16" if major == 7 else "float32"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions do not tell
    return "bfloat16" if device.type == "cpu" and capabilities.get("amx_bf16") else "float32"


def fast_forward(run):
    """Return what the step calls: the model, wrapped for several processes, or as --compile asks."""
    if run.processes > 1:
        if run.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(run.model)  # in place
        # static_graph: all steps are alike, so a layer without use does no harm.
        return nn.parallel.DistributedDataParallel(run.model, static_graph=True)
    if run.args.compile and run.device.type == "cuda":
        return cuda_graph(run)
    if run.args.compile:
        run.model.compile()  # the first step takes a minute or more
    return run.model


def cuda_graph(run):
    """Return a function that maps images to logits as the model does in training, as a CUDA graph.

    A graph starts all kernels of a pass, forward or backward, at once: started one by
    one, those of a small network take longer to start than to compute. What the model
    does is recorded once, so it must do the same for all images, float (batch_size, 3,
    size, size): it takes no other shape. Raises UserError for a model that cannot be
    recorded.
    """
    # Recording has a stream of its own, of which PyTorch would warn at the first step.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    size = run.args.size
    images = data.normalize(torch.zeros(run.batch_size, 3, size, size, device="cuda").byte())
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    try:
        # Weights that autocast keeps in 16 bits would be recorded, and never change.
        with autocast(run, cache_enabled=False):
            set_training_mode(run)
            whole = nn.Sequential(run.model)  # whose `forward` PyTorch replaces
            recorded = torch.cuda.make_graphed_callables(whole, (images,), allow_unused_input=True)
    except RuntimeError as error:
        raise utils.UserError(f"no CUDA graph ({str(error)[:90]}); try --no-compile") from error
    run.model.load_state_dict(before)  # recording took steps, which batch norm remembers
    return recorded


@contextlib.contextmanager
def process_group(device_name):
    """Join the processes that torchrun started, if it did; give (device, rank, their number).

    Each trains on its part of every batch; gradients are averaged over them, so that
    all have the same weights. Only the first process prints; errors are printed by all.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        yield utils.select_device(device_name), 0, 1
        return
    if device_name in ("auto", "cuda") and torch.cuda.is_available():
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = utils.select_device("cpu" if device_name == "auto" else device_name)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = distributed.get_rank()
    with open(os.devnull, "w") as null:
        out, err = (null, null) if rank else (sys.stdout, sys.stderr)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield device, rank, distributed.get_world_size()
    distributed.barrier()  # else torchrun may end the first, which still saves, with the others
    distributed.destroy_process_group()


def main(argv=None):
    """Run the command line; see the top of the file."""
    args, last = read_settings(argv)
    claimed = False
    with process_group(args.device) as (device, rank, processes):
        if rank == 0 and not last:
            args.out, claimed = claim_folder(args)
        try:
            run = Run(args, last, device, rank, processes)
            if args.data not in data.NAMES:  # so that it is found from any folder
                args.data = str(Path(args.data).expanduser().resolve())
            both = set(run.train_set.names) & set(run.val_set.names)
            parameters = sum(parameter.numel() for parameter in run.model.parameters())
            print(
                f"{args.data}: {len(run.train_set.names)} images to train on, "
                f"{len(run.val_set.names)} to validate on, {len(both)} of them on both lists, "
                f"{len(run.val_set.classes)} classes\n"
                f"{args.model}: {parameters:,} parameters on {processes} x {device} in {run.precision}\n"
                f'run in {args.out}; after a break --resume "{args.out}" goes on',
                flush=True,
            )
            if rank == 0:
                write_settings(run, argv)
            fit(run)
            if rank == 0:
                finish(run)
        finally:  # a run that came to no checkpoint leaves no folder
            if claimed and not (args.out / "last.pt").exists():
                with contextlib.suppress(OSError):  # it holds something else, or is open
                    (args.out / "settings.json").unlink(missing_ok=True)
                    args.out.rmdir()


if __name__ == "__main__":
    utils.cli(main, data.DataError, models.ModelError)
