"""Train a network for semantic segmentation.

    python train.py --model darrennet --augment --cosine     PASCAL VOC 2007, downloaded to data/
    python train.py --data shapes --model fcn --size 64      drawn shapes, no download
    python train.py --data DIR --class-weights               a VOC-layout folder of your own
    python train.py --resume                                 go on with the newest run
    torchrun --nproc_per_node=8 train.py                     the same on eight GPUs

A run fills a folder runs/NAME/ with best.pt (the epoch with the best validation mIoU), last.pt (all
that resuming needs), log.csv, curves.png and samples.png.
"""

import argparse
import contextlib
import csv
import itertools
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import data
import models
import plots
import utils


@dataclass
class Run:
    """What the functions of a training run share; of these, checkpoints keep all that changes."""

    args: argparse.Namespace
    out: Path
    device: torch.device
    sets: tuple  # the training and the validation set
    model: nn.Module
    forward: nn.Module  # the model, or what makes it one of several processes' copies
    average: AveragedModel  # of the model over the steps, which is what is scored and kept
    weights: torch.Tensor  # of the classes, in the loss
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    order: torch.Generator  # draws the order of the images, alike in all processes
    history: list  # a row of log.csv for each epoch
    epoch: dict | None  # how far an epoch has come that was stopped
    rank: int = 0  # the number of this process
    processes: int = 1


def make_parser():
    """Return the parser of the command line."""
    parser = utils.make_parser(__doc__)
    add, number = parser.add_argument, utils.number
    default = "default: %(default)s"
    add("--model", choices=models.MODELS, default="darrennet", help=default)
    where = "voc2007 or voc2012 (downloaded to data/), shapes (drawn) or a folder; " + default
    add("--data", default="voc2007", metavar="NAME|DIR", help=where)
    add("--train-split", default="train", metavar="NAME", help=default)
    add("--val-split", default="val", metavar="NAME", help=default)
    add("--size", type=number(int, 32, 4096), default=224, help="side of the images; " + default)
    how = "random flips, or affine transforms (the bare flag); default: off"
    add("--augment", nargs="?", const="affine", choices=("flip", "affine"), help=how)
    how = "weigh rare classes more in the loss (bare: inverse frequency); default: off"
    schemes = ("inverse", "median", "enet")
    add("--class-weights", nargs="?", const="inverse", choices=schemes, help=how)
    add("--init", choices=utils.INITIALIZERS, default="kaiming", help=default)
    how = "start a resnet34_ model's encoder from ImageNet; default: yes"
    add("--pretrained", action=argparse.BooleanOptionalAction, help=how)
    how = "start from ERFNet's published weights (darrennet) or from any checkpoint of this project"
    add("--encoder-weights", metavar="FILE", help=how)
    how = "keep the encoder as it is for the first N epochs; " + default
    add("--freeze-encoder", type=number(int, 0), default=0, metavar="N", help=how)
    how = "images grow from a quarter of --size; default: with affine, unless pretrained"
    add("--progressive", action=argparse.BooleanOptionalAction, help=how)
    how = "passes over the training images; default: 100, but 800 with --progressive"
    add("--epochs", type=number(int, 1, 10**6), help=how)
    how = "stop after N epochs without a better validation mIoU; default: never"
    add("--patience", type=number(int, 1), metavar="N", help=how)
    add("--batch-size", type=number(int, 1, 10**5), default=16, help=default)
    how = "Adam's learning rate; default: 0.001, but 0.002 with --progressive"
    add("--lr", type=number(float, 0, 10), help=how)
    add("--cosine", action="store_true", help="anneal the learning rate to 0; default: constant")
    how = "decoupled from the gradient; default: 0.05, but 0.2 with --progressive"
    add("--weight-decay", type=number(float, 0, 10), help=how)
    how = "score and keep the weights' moving average, which lasts 1/(1 - X) steps; " + default
    add("--ema", type=number(float, 0, 0.9999), default=0.99, metavar="X", help=how)
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help=default)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps; " + default)
    how = "compute in bfloat16 where that is safe; default: on GPUs and CPUs that are fast at it"
    add("--amp", action=argparse.BooleanOptionalAction, help=how)
    add("--compile", action="store_true", help="let torch.compile speed the model up")
    how = "threads or processes that decode images; default: one a core"
    add("--workers", type=number(int, 1, 256), metavar="N", help=how)
    how = "keep the decoded images (auto: where they fit in a quarter of the memory); " + default
    add("--data-in-memory", choices=("auto", "yes", "no"), default="auto", help=how)
    add("--out", type=Path, metavar="DIR", help="the run's folder; default: runs/MODEL, numbered")
    how = "go on from this last.pt (bare: the newest run's) with the settings stored in it"
    add("--resume", nargs="?", const="newest", metavar="CHECKPOINT", help=how)
    return parser


def resume(parser, argv, path):
    """Return (settings, checkpoint) of a stored run.

    A run may go on for more epochs or on another device; what would make it another run is refused.
    """
    path = utils.newest_checkpoint("last.pt") if path == "newest" else Path(path)
    checkpoint = utils.load_checkpoint(path)
    if "trained" not in checkpoint:
        raise utils.UserError(f"{path}: has no optimizer state; resume from the run's last.pt")
    parser.set_defaults(**checkpoint["args"], out=path.parent)
    args = parser.parse_args(argv)
    free = {"data", "epochs", "patience", "device", "amp", "compile", "workers", "data_in_memory"}
    for name, stored in checkpoint["args"].items():
        if name not in free and getattr(args, name) != stored:
            flag = "--" + name.replace("_", "-")
            raise utils.UserError(f"{path}: was trained with another {flag}; start a new run")
    args.out = path.parent
    return args, checkpoint


def new_run_folder(out, model):
    """Make and return the run's folder: `out`, or else runs/MODEL, runs/MODEL-2, ..."""
    names = itertools.chain([model], (f"{model}-{n}" for n in itertools.count(2)))
    out = out or next(path for path in map(Path("runs").joinpath, names) if not path.exists())
    if (out / "last.pt").exists():
        raise utils.UserError(
            f"{out}: holds a run; go on with --resume {out / 'last.pt'} or choose another --out"
        )
    utils.make_folder(out)
    return out


def make_model(args, num_classes):
    """Return a new network with its starting weights; pretrained parts are not initialised again."""
    options = {}
    if args.model.startswith("resnet34"):
        options["pretrained"] = args.pretrained is not False
    elif args.pretrained:
        raise utils.UserError(f"{args.model} has no pretrained encoder; a resnet34_ model has")
    model = models.build_model(args.model, num_classes, **options)
    utils.initialize(model.decoder if options.get("pretrained") else model, args.init)
    if args.encoder_weights:
        try:
            loaded, left = models.load_encoder(model, utils.read_tensors(args.encoder_weights))
        except (models.ModelError, AttributeError) as error:
            raise utils.UserError(f"{args.encoder_weights}: {error}; it is not for {args.model}")
        left = ", ".join(left) or "nothing"
        print(f"{args.encoder_weights}: {len(loaded)} tensors loaded; left out: {left}")
    return model


def image_size(args, epoch):
    """Return the side of the images in an epoch, counted from 1.

    With --progressive they grow: of 32 epochs 20 are at a quarter of --size, 11 at half and 1 at
    all of it, since steps are cheap on small images. Sides are multiples of 32, 64 at least.
    """
    if not args.progressive or 32 * epoch > 31 * args.epochs:
        return args.size
    part = args.size / (4 if 32 * epoch <= 20 * args.epochs else 2)
    return min(args.size, max(64, 32 * math.ceil(part / 32)))


def make_optimizer(model, args, steps):
    """Return (Adam with decoupled weight decay, the schedule of its learning rate by the step).

    `steps` is their number in an epoch. Cosine annealing starts anew where the images grow, from a
    rate that is lower by as much as they are larger.
    """
    # Fused takes 0.26 to 0.40 of the time on a CPU.
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True
    )
    sizes = [image_size(args, epoch) for epoch in range(1, args.epochs + 1)]

    def share_of_lr(step):
        if not args.cosine:
            return 1
        size = sizes[min(step // steps, args.epochs - 1)]
        since = step - steps * sizes.index(size)
        share = (1 + math.cos(math.pi * since / (steps * sizes.count(size)))) / 2
        return share * sizes[0] / size

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_lr)


def make_average(model, decay):
    """Return the exponential moving average of a model's weights and of its batch norms' averages.

    Early on it lasts a tenth of the steps so far, so that short trainings are not held back.
    """

    def update(averages, values, _):
        steps = average.n_averaged.item()  # always on the CPU: nothing waits for a GPU
        get_ema_multi_avg_fn(min(decay, steps / (steps + 10)))(averages, values, _)

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return average


def batches(run, dataset, indices):
    """Return a loader of the data set's batches, one for each tensor of indices.

    What is not in memory is decoded by worker processes, a few batches ahead.
    """
    streamed = dataset.images is None
    return DataLoader(
        dataset,
        batch_size=None,  # an entry of the sampler is a whole batch already
        sampler=indices,
        num_workers=(run.args.workers or os.cpu_count()) if streamed else 0,
        pin_memory=run.device.type == "cuda" and (streamed or not dataset.images.is_cuda),
        generator=torch.Generator(),  # else it draws from the one that augmentation draws from
    )


def total_loss(logits, masks, weights):
    """Return (the sum of the pixels' weighted cross-entropies, the sum of their weights).

    Their quotient is F.cross_entropy's mean; apart they can be summed over batches and processes.
    """
    labels = masks.long()
    total = F.cross_entropy(
        logits.float(), labels, weights, ignore_index=data.VOID, reduction="sum"
    )
    by_label = F.pad(weights, (0, 256 - len(weights)))  # void has the weight 0
    return total, by_label[labels].sum()


def prepare(run, images):
    """Return uint8 images as the network takes them, on the device."""
    return data.normalize(images.to(run.device, non_blocking=True))


def over_processes(run, value, operation="SUM"):
    """Return the sum (or MAX) of a number over the processes of the run, a float."""
    if run.processes > 1:
        value = torch.as_tensor(float(value), device=run.device)
        distributed.all_reduce(value, getattr(distributed.ReduceOp, operation))
    return float(value)


def train_one_epoch(run, stop):
    """Take one pass over the training set, or the rest of it, until `stop` has an entry.

    Nothing in here waits for the device. run.epoch: `order`, the batches' indices (steps, batch);
    `step`, the steps taken so far; `loss`, the sum of their losses. The latter two are kept up to
    date.
    """
    args, epoch = run.args, run.epoch
    label = f"epoch {epoch['number']}/{args.epochs}"
    mine = epoch["order"][epoch["step"] :, run.rank :: run.processes]
    if run.sets[0].images is not None:
        mine = mine.to(run.sets[0].images.device)  # once, instead of batch by batch
    loader = batches(run, run.sets[0], mine)

    def mean_loss():
        return f"loss {float(epoch['loss']) / max(1, epoch['step']):.4f}"

    if run.rank == 0:
        loader = utils.progress(loader, label, args.batch_size, mean_loss)
    for images, masks in loader:
        images, masks = (t.to(run.device, non_blocking=True) for t in (images, masks))
        if args.augment:
            images, masks = data.augment(images, masks, args.augment, run.sets[1].size)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=args.amp):
            logits = run.forward(prepare(run, images))
        loss, weight = total_loss(logits, masks, run.weights)
        if run.processes > 1:
            distributed.all_reduce(weight)
            loss *= run.processes  # since the gradients are averaged over the processes
        loss = loss / weight.clamp(min=1e-9)  # all void: no weight, and a loss of 0
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.scheduler.step()
        run.average.update_parameters(run.model)
        epoch["step"] += 1
        epoch["loss"] += loss.detach() / run.processes
        if stop:
            break
    epoch["loss"] = over_processes(run, epoch["loss"])


@torch.inference_mode()
def validate(run, stop):
    """Score the average on the validation set, void left out; return (loss, confusion matrix).

    The loss is the mean over all pixels of the split, so it does not depend on the batch size.
    Ends early where `stop` has an entry.
    """
    model = run.average.module.eval()
    dataset, num_classes = run.sets[1], len(run.sets[1].classes)
    cm = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=run.device)
    sums = torch.zeros(2, device=run.device)
    mine = torch.arange(run.rank, len(dataset), run.processes)
    loader = batches(run, dataset, mine.split(run.args.batch_size))
    if run.rank == 0:
        loader = utils.progress(loader, "validation", run.args.batch_size)
    for images, masks in loader:
        if stop:
            break
        masks = masks.to(run.device, non_blocking=True)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.args.amp):
            logits = model(prepare(run, images)).float()
        cm += utils.confusion_matrix(logits.max(1).indices, masks, num_classes)
        sums += torch.stack(total_loss(logits, masks, run.weights))
    if run.processes > 1:
        distributed.all_reduce(cm)
        distributed.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=1e-9)).item(), cm


def save(run, last=True):
    """After a whole epoch write log.csv and a new best.pt; with `last`, also last.pt.

    best.pt comes before last.pt: a crash between the two leads to the same best.pt once more.
    """
    train_set, epoch_ended = run.sets[0], run.epoch is None
    checkpoint = {
        "model": run.args.model,
        "options": {},
        "classes": list(train_set.classes),
        "palette": train_set.palette,
        "size": run.sets[1].size,
        "data": run.args.data,
        "state_dict": run.average.module.state_dict(),
        "epoch": len(run.history),
        "metrics": run.history[-1] if run.history else {},
    }
    if epoch_ended and utils.best_row(run.history) is run.history[-1]:
        utils.save_checkpoint(run.out / "best.pt", checkpoint)
    if last:
        checkpoint |= {
            "args": {k: v for k, v in vars(run.args).items() if k not in ("out", "resume")},
            "trained": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scheduler": run.scheduler.state_dict(),
            "random_state": utils.random_state(run.device),
            "order": run.order.get_state(),
            "history": run.history,
            "unfinished_epoch": run.epoch,
        }
        utils.save_checkpoint(run.out / "last.pt", checkpoint)
    if epoch_ended:
        with open(run.out / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, run.history[0])
            writer.writeheader()
            writer.writerows(run.history)


def report_epoch(run, cm):
    """Print an epoch's line; say so where the network has learned to name no more than one class."""
    row = run.history[-1]
    later = range(row["epoch"] + 1, run.args.epochs + 1)
    left = sum((image_size(run.args, epoch) / row["size"]) ** 2 for epoch in later)
    predicted = cm.sum(0).nonzero().flatten().tolist()
    print(
        f"epoch {row['epoch']}/{run.args.epochs}  lr {row['lr']:.1e}  "
        f"loss {row['train_loss']:.3f}  val loss {row['val_loss']:.3f}  "
        f"mIoU {row['val_mean_iou']:.4f}  accuracy {row['val_pixel_accuracy']:.1%}  "
        f"predicts {len(predicted)}/{len(cm)} classes  {row['images_per_second']:.1f} images/s  "
        f"{utils.format_seconds(left * row['seconds'])} left",
        flush=True,
    )
    if len(predicted) == 1:
        name = run.sets[0].classes[predicted[0]]
        print(f"  so far every pixel is labelled {name}: train on")


def finish(run):
    """Draw the curves, and the best epoch's predictions for a few images; say what to do next."""
    out, dataset = run.out, run.sets[1]
    checkpoint = utils.load_checkpoint(out / "best.pt")
    name, size, epoch = checkpoint["model"], checkpoint["size"], checkpoint["epoch"]
    sizes = ", ".join(f"{side}x{side}" for side in sorted({row["size"] for row in run.history}))
    title = f"{name}, {sizes}; validation on split {dataset.split}, void left out"
    plots.curves(out / "curves.png", {name: run.history}, title)

    if dataset.size != size:  # the best epoch had smaller images than the last
        dataset = load_splits(run.args, run.device, size)[1]
    few = torch.linspace(0, len(dataset) - 1, min(6, len(dataset))).long()
    images, masks = (tensor.cpu() for tensor in dataset[few])
    model = utils.to_device(models.from_checkpoint(checkpoint), run.device)
    inputs = data.normalize(images.to(run.device))
    rows = {"truth": masks, "prediction": utils.segment(model, inputs, (size, size)).cpu()}
    title = f"{name}, epoch {epoch}, split {dataset.split}, {size}x{size}"
    path = out / "samples.png"
    plots.samples(path, images, rows, dataset.classes, dataset.palette, title)
    metrics = checkpoint["metrics"]
    print(
        f"best: epoch {epoch}, validation mIoU {metrics['val_mean_iou']:.4f}, "
        f"pixel accuracy {metrics['val_pixel_accuracy']:.1%}\n"
        f"look at    {out / 'curves.png'} and {out / 'samples.png'}\n"
        f"score it   python evaluate.py {out / 'best.pt'}\n"
        f"use it     python predict.py IMAGE --checkpoint {out / 'best.pt'}"
    )


def load_splits(args, device, size, checkpoint=None):
    """Return the training and the validation set at a size; with a checkpoint, of its classes.

    They are moved to a CUDA device whose memory they fill no more than a quarter of.
    """
    # Affine augmentation zooms in, so it is given images of twice the size.
    sizes = (size * (2 if args.augment == "affine" else 1), size)
    sets = [
        data.load_dataset(args.data, split, size, args.workers, args.data_in_memory)
        for split, size in zip((args.train_split, args.val_split), sizes)
    ]
    for dataset in sets:
        if checkpoint and list(dataset.classes) != checkpoint["classes"]:
            raise data.DataError(f"{args.data}: has other classes than the run that is to go on")
        if dataset.images is None:
            continue
        if (dataset.masks == data.VOID).all():
            raise data.DataError(f"{args.data}: split {dataset.split} has no pixel with a label")
        if device.type == "cuda":
            bytes_free = torch.cuda.get_device_properties(device).total_memory / 4
            if dataset.images.numel() + dataset.masks.numel() < bytes_free:
                dataset.images, dataset.masks = dataset.images.to(device), dataset.masks.to(device)
    train_set = sets[0]
    if train_set.images is not None and not ((train_set.masks > 0) & (train_set.masks < 255)).any():
        raise data.DataError(
            f"{args.data}: the masks of split {train_set.split} have nothing but background (0) and "
            "void (255); if 255 marks an object in them, save it as class 1"
        )
    if min(args.batch_size, len(train_set)) == 1 and size < 64:
        raise utils.UserError(
            "batch norm cannot learn from one value a channel, which is what a batch of one gives "
            "at this --size; take a larger --batch-size, or --size 64 or more"
        )
    if len(train_set) == 1:
        print("the training set is one image: batch norm knows no other, nor will the network")
    return sets


def loss_weights(args, train_set, device):
    """Return the classes' weights in the loss, float32 (C,)."""
    if args.class_weights:
        return data.class_weights(train_set, args.class_weights).to(device)
    return torch.ones(len(train_set.classes), device=device)


def start_epoch(run, number):
    """Fetch larger images where it is time for them; draw the epoch's order, unless it has begun."""
    args, size = run.args, image_size(run.args, number)
    if size > run.sets[1].size:
        print(f"images of {size}x{size} from here on", flush=True)
        run.sets = load_splits(args, run.device, size)
        run.weights = loss_weights(args, run.sets[0], run.device)
    if run.epoch is None:
        steps = len(run.sets[0]) // args.batch_size
        order = torch.randperm(len(run.sets[0]), generator=run.order)
        order = order[: steps * args.batch_size].view(steps, args.batch_size)
        run.epoch = {"number": number, "order": order, "step": 0, "loss": 0.0}
        run.epoch["lr"] = run.scheduler.get_last_lr()[0]
    frozen = number <= args.freeze_encoder
    # The encoder's batch norms are frozen too.
    run.model.train().encoder.train(not frozen).requires_grad_(not frozen)


def require_finite(loss, what):
    """Raise UserError where a loss is infinite or not a number."""
    if not math.isfinite(loss):
        raise utils.UserError(
            f"{what} is {loss}; last.pt is from before this epoch; try a smaller --lr, or --no-amp"
        )


def fit(run):
    """Train from where run.history and run.epoch end; save after every epoch.

    Returns the exit status: 0, or 128 + the number of the signal that stopped it.
    """
    args = run.args
    saved, saving = -math.inf, 0.0
    with utils.stop_signals() as stop:
        # Several processes must stop after the same step: they finish the epoch.
        stop_now = stop if run.processes == 1 else []
        for number in range(len(run.history) + 1, args.epochs + 1):
            start_epoch(run, number)
            started, taken, steps = time.monotonic(), run.epoch["step"], len(run.epoch["order"])
            train_one_epoch(run, stop_now)
            seconds = time.monotonic() - started
            require_finite(run.epoch["loss"], f"epoch {number}/{args.epochs}: the loss")
            val_loss, cm = validate(run, stop_now)
            if stop_now:
                save(run)
                return stopped(run, stop_now[0])
            require_finite(val_loss, f"epoch {number}/{args.epochs}: the validation loss")
            row = {
                "epoch": number,
                "lr": run.epoch["lr"],
                "train_loss": run.epoch["loss"] / steps,
                "val_loss": val_loss,
                "val_mean_iou": utils.mean_iou(cm),
                "val_pixel_accuracy": utils.pixel_accuracy(cm),
                "images_per_second": (steps - taken) * args.batch_size / seconds,
                "seconds": time.monotonic() - started,
                "size": run.sets[1].size,
            }
            run.history.append(row)
            run.epoch = None
            caught = 0
            if run.processes > 1:  # a process that was told to stop takes the others along
                caught = int(over_processes(run, max(stop, default=0), "MAX"))
            best = utils.best_row(run.history)["epoch"]
            patience_ends = number - best >= (args.patience or math.inf)
            if run.rank == 0:
                # Saving may take a twentieth of the time, no more: on a GPU an epoch takes less
                # than writing a large network does.
                now = time.monotonic()
                last = caught or patience_ends or number == args.epochs or now - saved > 20 * saving
                save(run, last)
                if last:
                    saved, saving = time.monotonic(), time.monotonic() - now
                report_epoch(run, cm)
            if caught:
                return stopped(run, caught)
            if patience_ends:
                print(f"stopped: no better validation mIoU for {args.patience} epochs")
                break
    return 0


def stopped(run, signal):
    """Say how to go on; return the exit status of a process that a signal stopped."""
    print(f"stopped; go on with  python train.py --resume {run.out / 'last.pt'}")
    return 128 + signal


@contextlib.contextmanager
def process_group(device_name):
    """Join the processes that torchrun started, if it did; give (device, rank, their number).

    Only the first process prints; errors are printed by all.
    """
    if "LOCAL_RANK" not in os.environ:
        yield utils.select_device(device_name), 0, 1
        return
    if device_name == "auto" and torch.cuda.is_available():
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = utils.select_device("cpu" if device_name == "auto" else device_name)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = distributed.get_rank()
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w") if rank else sys.stdout):
            yield device, rank, distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def main(argv=None):
    """Run the command line; see the top of the file."""
    parser = make_parser()
    args, resumed = parser.parse_args(argv), None
    if args.resume:
        args, resumed = resume(parser, argv, args.resume)
    with process_group(args.device) as (device, rank, processes):
        run = set_up(args, resumed, device, rank, processes)
        status = fit(run)
        if status == 0 and rank == 0:
            finish(run)
    return status


def set_up(args, resumed, device, rank, processes):
    """Return the Run that the settings and the checkpoint to go on from, or None, describe."""
    if args.progressive is None:
        pretrained = args.model.startswith("resnet34") and args.pretrained is not False
        new = not pretrained and not args.encoder_weights
        args.progressive = new and args.augment == "affine" and args.size > 64
    # 800 epochs on growing images take about 1.5 times as long as 100 on the largest.
    args.epochs = args.epochs or (800 if args.progressive else 100)
    if args.lr is None:
        args.lr = 2e-3 if args.progressive else 1e-3
    if args.weight_decay is None:
        args.weight_decay = 0.2 if args.progressive else 0.05
    if args.amp is None:
        args.amp = utils.has_fast_bfloat16(device)
    torch.manual_seed(args.seed)
    history, epoch = (resumed["history"], resumed["unfinished_epoch"]) if resumed else ([], None)
    # The images never shrink, not even where a run that ended goes on for more epochs.
    size = image_size(args, min(len(history) + 1, args.epochs))
    size = max([size] + [row["size"] for row in history])
    sets = train_set, val_set = load_splits(args, device, size, resumed)
    # Whole batches alone: batch norm learns nothing from a single left-over image. Each epoch has
    # an order of its own, so no image is left out for good.
    args.batch_size = min(args.batch_size, len(train_set))
    if args.batch_size < processes:
        raise utils.UserError(f"--batch-size is {args.batch_size} for {processes} processes")
    num_classes = len(train_set.classes)
    model = models.from_checkpoint(resumed) if resumed else make_model(args, num_classes)
    utils.to_device(model, device)
    average = make_average(model, args.ema)
    weights = loss_weights(args, train_set, device)
    optimizer, scheduler = make_optimizer(model, args, len(train_set) // args.batch_size)
    order = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed + rank)  # each process augments its images differently
    if resumed:
        model.load_state_dict(resumed["trained"])
        average.n_averaged.fill_(resumed["scheduler"]["last_epoch"])
        optimizer.load_state_dict(resumed["optimizer"])
        scheduler.load_state_dict(resumed["scheduler"])
        order.set_state(resumed["order"])
        if rank == 0:
            utils.set_random_state(resumed["random_state"], device)
    forward = model
    if processes > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        forward = nn.parallel.DistributedDataParallel(
            model, find_unused_parameters=args.freeze_encoder > 0
        )
    if args.compile:
        model.compile()
        average.module.compile()
    if rank == 0:
        args.out = args.out if resumed else new_run_folder(args.out, args.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{args.data}: {len(train_set)} images to train on, {len(val_set)} to validate on, "
        f"{num_classes} classes\n{args.model}: {parameters:,} parameters on {device}"
        + (f", {processes} processes" if processes > 1 else "")
        + f"; run in {args.out}",
        flush=True,
    )
    return Run(
        args, args.out, device, sets, model, forward, average, weights, optimizer, scheduler, order,
        history, epoch, rank, processes,
    )  # fmt: skip


if __name__ == "__main__":
    utils.run(main, data.DataError, models.ModelError)
