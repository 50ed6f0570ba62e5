"""Train a network for semantic segmentation.

    python train.py --model darrennet --augment --cosine     PASCAL VOC 2007, downloaded to data/
    python train.py --data shapes --model fcn --size 64      drawn shapes, no download
    python train.py --data DIR --class-weights               a VOC-layout folder of your own
    python train.py --resume                                 go on with the newest run

A run fills a folder runs/NAME/ with best.pt (the epoch with the best validation mIoU), last.pt (all
that resuming needs), log.csv, curves.png and samples.png.
"""

import argparse
import csv
import itertools
import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import data
import models
import utils


def make_parser():
    """Return the parser of the command line."""
    parser = utils.make_parser(__doc__)
    add, number = parser.add_argument, utils.number
    default = "default: %(default)s"
    add("--model", choices=models.MODELS, default="darrennet", help=default)
    where = "voc2007 (downloaded to data/), shapes (drawn) or a folder in VOC's layout; " + default
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
    add("--epochs", type=number(int, 1, 10**6), default=100, help=default)
    how = "stop after N epochs without a better validation mIoU; default: never"
    add("--patience", type=number(int, 1), metavar="N", help=how)
    add("--batch-size", type=number(int, 1, 10**5), default=16, help=default)
    add("--lr", type=number(float, 0, 10), default=1e-3, help="Adam's learning rate; " + default)
    add("--cosine", action="store_true", help="anneal the learning rate to 0; default: constant")
    add("--weight-decay", type=number(float, 0, 10), default=0.0, help="decoupled; " + default)
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help=default)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps; " + default)
    how = "compute in bfloat16 where that is safe; default: on CUDA devices that have it"
    add("--amp", action=argparse.BooleanOptionalAction, help=how)
    add("--compile", action="store_true", help="let torch.compile speed the model up")
    add(
        "--workers", type=number(int, 1, 256), help="threads that decode images; default: all cores"
    )
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
    if "optimizer" not in checkpoint:
        raise utils.UserError(f"{path}: has no optimizer state; resume from the run's last.pt")
    parser.set_defaults(**checkpoint["args"], out=path.parent)
    args = parser.parse_args(argv)
    free = {"data", "epochs", "patience", "device", "amp", "compile", "workers"}
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
        print(f"{args.encoder_weights}: {len(loaded)} tensors loaded; left out: {', '.join(left)}")
    return model


def make_optimizer(model, args, steps):
    """Return (Adam with decoupled weight decay, the schedule of its learning rate by the step)."""
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)

    def share_of_lr(step):
        return (1 + math.cos(math.pi * step / steps)) / 2 if args.cosine else 1

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_lr)


def train_one_epoch(model, dataset, epoch, weights, optimizer, scheduler, device, args, stop):
    """Take one pass over the training set, or the rest of it, until `stop` has an entry.

    epoch: `order`, the batches' indices (steps, batch); `step`, the steps taken so far; `loss`,
    the sum of their losses. The latter two are kept up to date.
    """
    label = f"epoch {epoch['number']}/{args.epochs}"
    batches = epoch["order"][epoch["step"] :]

    def mean_loss():
        return f"loss {epoch['loss'] / max(1, epoch['step']):.4f}"

    for indices in utils.progress(batches, label, args.batch_size, mean_loss):
        images, masks = (tensor.to(device) for tensor in dataset[indices])
        if args.augment:
            images, masks = data.augment(images, masks, args.augment)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            logits = model(data.normalize(images))
        loss = F.cross_entropy(logits.float(), masks.long(), weights, ignore_index=data.VOID)
        epoch["step"] += 1
        if math.isfinite(loss.item()):
            epoch["loss"] += loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        elif (masks != data.VOID).any():  # else there is no pixel to learn from in this batch
            raise utils.UserError(
                f"{label}, step {epoch['step']}: the loss is {loss.item()}; this step is not taken, "
                "last.pt is from before this epoch; try a smaller --lr, or --no-amp"
            )
        scheduler.step()
        if stop:
            break


@torch.inference_mode()
def validate(model, dataset, weights, device, args, stop):
    """Score a split at the training size, void left out; return (loss, confusion matrix).

    The loss is the mean over all pixels of the split, so it does not depend on the batch size.
    Ends early where `stop` has an entry.
    """
    model.eval()
    num_classes = len(dataset.classes)
    cm = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    loss_sum = weight_sum = 0.0
    batches = torch.arange(len(dataset)).split(args.batch_size)
    for indices in utils.progress(batches, "validation", args.batch_size):
        if stop:
            break
        images, masks = (tensor.to(device) for tensor in dataset[indices])
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            logits = model(data.normalize(images)).float()
        cm += utils.confusion_matrix(logits.max(1).indices, masks, num_classes)
        labels = masks.long()
        loss = F.cross_entropy(logits, labels, weights, ignore_index=data.VOID, reduction="sum")
        loss_sum += loss.item()
        weight_sum += weights[labels[labels != data.VOID]].sum().item()
    return loss_sum / max(weight_sum, 1e-9), cm


def best_row(history):
    """Return the row of log.csv with the highest validation mIoU, the earliest of equals."""
    return max(history, key=lambda row: row["val_mean_iou"])


def save(out, history, epoch, dataset, model, optimizer, scheduler, device, args):
    """Write last.pt, and after a whole epoch (`epoch` is None) log.csv and a new best.pt.

    best.pt comes first: a crash between the two leads to the same best.pt once more.
    """
    checkpoint = {
        "model": args.model,
        "options": {},
        "classes": list(dataset.classes),
        "palette": dataset.palette,
        "size": args.size,
        "data": args.data,
        "state_dict": model.state_dict(),
        "epoch": len(history),
        "metrics": history[-1] if history else {},
    }
    if epoch is None and best_row(history) is history[-1]:
        utils.save_checkpoint(out / "best.pt", checkpoint)
    checkpoint |= {
        "args": {k: v for k, v in vars(args).items() if k not in ("out", "resume")},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random_state": utils.random_state(device),
        "history": history,
        "unfinished_epoch": epoch,
    }
    utils.save_checkpoint(out / "last.pt", checkpoint)
    if epoch is None:
        with open(out / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, history[0])
            writer.writeheader()
            writer.writerows(history)


def report_epoch(label, row, epochs_left, cm, dataset):
    """Print an epoch's line; say so where the network has learned to name no more than one class."""
    predicted = cm.sum(0).nonzero().flatten().tolist()
    print(
        f"{label}  lr {row['lr']:.1e}  loss {row['train_loss']:.3f}  "
        f"val loss {row['val_loss']:.3f}  mIoU {row['val_mean_iou']:.4f}  "
        f"accuracy {row['val_pixel_accuracy']:.1%}  predicts {len(predicted)}/{len(cm)} classes  "
        f"{row['images_per_second']:.1f} images/s  "
        f"{utils.format_seconds(epochs_left * row['seconds'])} left",
        flush=True,
    )
    if len(predicted) == 1:
        print(f"  so far every pixel is labelled {dataset.classes[predicted[0]]}: train on")


def finish(out, history, dataset, device):
    """Draw the curves, and the best epoch's predictions for a few images; say what to do next."""
    checkpoint = utils.load_checkpoint(out / "best.pt")
    name, size, epoch = checkpoint["model"], checkpoint["size"], checkpoint["epoch"]
    utils.plot_curves(out / "curves.png", history, f"{name}, {size}x{size}")

    few = torch.linspace(0, len(dataset) - 1, min(6, len(dataset))).long()
    images, masks = dataset[few]
    model = models.from_checkpoint(checkpoint).to(device)
    predicted = utils.segment(model, data.normalize(images.to(device)), (size, size)).cpu()
    rows = {"truth": masks, "prediction": predicted}
    title = f"{name}, epoch {epoch}, split {dataset.split}, {size}x{size}"
    path = out / "samples.png"
    utils.plot_samples(path, images, rows, dataset.classes, dataset.palette, title)
    metrics = checkpoint["metrics"]
    print(
        f"best: epoch {epoch}, validation mIoU {metrics['val_mean_iou']:.4f}, "
        f"pixel accuracy {metrics['val_pixel_accuracy']:.1%}\n"
        f"look at    {out / 'curves.png'} and {out / 'samples.png'}\n"
        f"score it   python evaluate.py {out / 'best.pt'}\n"
        f"use it     python predict.py IMAGE --checkpoint {out / 'best.pt'}"
    )


def load_splits(args, checkpoint):
    """Return the training and the validation set; with a checkpoint, of its classes."""
    sets = [
        data.load_dataset(args.data, split, args.size, args.workers)
        for split in (args.train_split, args.val_split)
    ]
    for dataset in sets:
        if (dataset.masks == data.VOID).all():
            raise data.DataError(f"{args.data}: split {dataset.split} has no pixel with a label")
        if checkpoint and list(dataset.classes) != checkpoint["classes"]:
            raise data.DataError(f"{args.data}: has other classes than the run that is to go on")
    if min(args.batch_size, len(sets[0])) == 1 and args.size < 64:
        raise utils.UserError(
            "batch norm cannot learn from one value a channel, which is what a batch of one gives "
            "at this --size; take a larger --batch-size, or --size 64 or more"
        )
    if len(sets[0]) == 1:
        print("the training set is one image: batch norm knows no other, nor will the network")
    return sets


def fit(model, sets, weights, optimizer, scheduler, history, epoch, out, device, args):
    """Train from where `history` and the unfinished `epoch` (or None) end; save after every epoch.

    Returns the exit status: 0, or 128 + the number of the signal that stopped it.
    """
    train_set, val_set = sets
    batch_size, steps = args.batch_size, len(train_set) // args.batch_size
    with utils.stop_signals() as stop:
        for number in range(len(history) + 1, args.epochs + 1):
            started = time.monotonic()
            if epoch is None:
                order = torch.randperm(len(train_set))[: steps * batch_size].view(steps, batch_size)
                epoch = {"number": number, "order": order, "step": 0, "loss": 0.0}
                epoch["lr"] = scheduler.get_last_lr()[0]
            taken = epoch["step"]
            frozen = number <= args.freeze_encoder
            model.train().encoder.train(not frozen).requires_grad_(not frozen)  # batch norms too
            train_one_epoch(
                model, train_set, epoch, weights, optimizer, scheduler, device, args, stop
            )
            seconds = time.monotonic() - started
            val_loss, cm = validate(model, val_set, weights, device, args, stop)
            if stop:
                save(out, history, epoch, train_set, model, optimizer, scheduler, device, args)
                print(f"stopped; go on with  python train.py --resume {out / 'last.pt'}")
                return 128 + stop[0]
            if math.isnan(val_loss):
                raise utils.UserError(
                    f"epoch {number}: the validation loss is nan; last.pt is from before this "
                    "epoch; try a smaller --lr, or --no-amp"
                )
            row = {
                "epoch": number,
                "lr": epoch["lr"],
                "train_loss": epoch["loss"] / steps,
                "val_loss": val_loss,
                "val_mean_iou": utils.mean_iou(cm),
                "val_pixel_accuracy": utils.pixel_accuracy(cm),
                "images_per_second": (steps - taken) * batch_size / seconds,
                "seconds": time.monotonic() - started,
            }
            history.append(row)
            epoch = None
            save(out, history, epoch, train_set, model, optimizer, scheduler, device, args)
            report_epoch(f"epoch {number}/{args.epochs}", row, args.epochs - number, cm, train_set)
            if args.patience and number - best_row(history)["epoch"] >= args.patience:
                print(f"stopped: no better validation mIoU for {args.patience} epochs")
                break
    return 0


def main(argv=None):
    """Run the command line; see the top of the file."""
    parser = make_parser()
    args, resumed = parser.parse_args(argv), None
    if args.resume:
        args, resumed = resume(parser, argv, args.resume)
    device = utils.select_device(args.device)
    if args.amp is None:
        args.amp = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    torch.manual_seed(args.seed)

    sets = train_set, val_set = load_splits(args, resumed)
    # Whole batches alone: batch norm learns nothing from a single left-over image. Each epoch has
    # an order of its own, so no image is left out for good.
    args.batch_size = min(args.batch_size, len(train_set))
    num_classes = len(train_set.classes)
    model = models.from_checkpoint(resumed) if resumed else make_model(args, num_classes)
    model.to(device)
    if args.compile:
        model.compile()
    weights = torch.ones(num_classes, device=device)
    if args.class_weights:
        weights = data.class_weights(train_set, args.class_weights).to(device)
    steps = args.epochs * (len(train_set) // args.batch_size)
    optimizer, scheduler = make_optimizer(model, args, steps)
    history, epoch = [], None
    if resumed:
        optimizer.load_state_dict(resumed["optimizer"])
        scheduler.load_state_dict(resumed["scheduler"])
        history, epoch = resumed["history"], resumed["unfinished_epoch"]
        utils.set_random_state(resumed["random_state"], device)
    out = args.out if resumed else new_run_folder(args.out, args.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{args.data}: {len(train_set)} images to train on, {len(val_set)} to validate on, "
        f"{num_classes} classes\n{args.model}: {parameters:,} parameters on {device}; run in {out}",
        flush=True,
    )
    status = fit(model, sets, weights, optimizer, scheduler, history, epoch, out, device, args)
    if status == 0:
        finish(out, history, val_set, device)
    return status


if __name__ == "__main__":
    utils.run(main, data.DataError, models.ModelError)
