"""Train a network for semantic segmentation.

    python train.py --model darrennet --augment --cosine     PASCAL VOC 2007, downloaded to data/
    python train.py --data shapes --model fcn --size 64      drawn shapes, no download
    python train.py --data DIR --class-weights               a folder of your own
    python train.py --resume                                 go on with the newest run
    torchrun --nproc_per_node=8 train.py                     train on eight GPUs

A run fills a folder, runs/NAME/: best.pt (the epoch with the best validation mIoU), last.pt (all that
resuming needs), log.csv, settings.json and, at the end, curves.png and samples.png.
"""

import argparse
import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F

import data
import models
import utils

SAVE_EVERY = 60  # seconds between two last.pt; on a GPU an epoch may be shorter than the writing


@dataclass
class Run:
    """The state of a run, which the functions of this file share. Checkpoints keep what changes."""

    args: argparse.Namespace
    out: Path
    device: torch.device
    rank: int  # the number of this process among those of torchrun
    processes: int
    batch_size: int  # of a step, over all processes; at most the whole training set
    train_set: torch.utils.data.Dataset  # both sets and the class weights: anew at each size
    val_set: torch.utils.data.Dataset
    weights: torch.Tensor  # of the classes, in the loss
    images: dict  # {"train", "val"}: names; {"before"}: the same of the file of --encoder-weights
    model: nn.Module
    parallel: nn.Module  # the model, wrapped where there are several processes
    average: nn.Module  # the model with the average of its weights over the steps
    optimizer: torch.optim.Optimizer
    history: list  # a row of log.csv for each epoch that is done
    step: int = 0  # steps done of the epoch under way
    loss: float = 0.0  # the sum of their losses; in train_one_epoch, this process's part alone
    caught: dict = field(default_factory=dict)  # signals that ask the run to stop

    @property
    def size(self):
        """The side of the images that the network is given now."""
        return self.val_set.size  # with affine augmentation, training images are twice as large

    def stop_signal(self):
        """Return the number of the signal that asks for the end, or 0; alike in all processes."""
        return int(utils.over_processes(max(self.caught, default=0), "MAX"))


def criterion(logits, masks, weights):
    """Return the loss, a scalar: the mean cross-entropy of the labelled pixels, weighted by class.

    logits: float (N, C, H, W); masks: uint8 (N, H, W), classes or void; weights: float (C,).
    Add a term (Dice, say, without the void) to that mean: training and validation both use it.
    """
    # The sum divided by hand, because F.cross_entropy's own mean is NaN where all is void.
    logits, labels = logits.float(), masks.long()
    total = F.cross_entropy(logits, labels, weights, ignore_index=data.VOID, reduction="sum")
    return total / pixel_weight(masks, weights).clamp(min=1e-9)


def pixel_weight(masks, weights):
    """Return the sum of the weights of a batch's labelled pixels, by which its loss is a mean."""
    by_label = F.pad(weights, (0, 256 - len(weights)))  # void, 255, weighs 0
    return by_label[masks.long()].sum()


def train_one_epoch(run, epoch):
    """Take the steps of an epoch that are left. No step waits for the GPU."""
    args, steps = run.args, len(run.train_set) // run.batch_size
    rates = utils.learning_rates(args, epoch, steps, run.size)
    order = data.epoch_order(run.train_set, run.batch_size, args.seed, epoch)
    order = order[run.step :]  # all of it, unless the run was stopped within the epoch
    label = f"epoch {epoch}/{args.epochs}"
    run.model.train()
    for indices in utils.progress(
        order, label, run.batch_size, lambda: run.processes * run.loss / run.step
    ):
        indices = indices[run.rank :: run.processes]  # this process's part of the batch
        images, masks = data.fetch(run.train_set, indices, run.device)
        if args.augment:
            images, masks = data.augment(images, masks, args.augment, run.size)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=args.amp):
            logits = run.parallel(data.normalize(images))
        loss = criterion(logits, masks, run.weights)
        if run.processes > 1:  # so that N processes learn what one would
            loss = loss * utils.share_of_batch(pixel_weight(masks, run.weights))
        run.optimizer.zero_grad()
        loss.backward()
        for group in run.optimizer.param_groups:
            group["lr"] = rates[run.step]  # by epoch and step alone: no scheduler to resume
        run.optimizer.step()
        utils.update_average(run.average, run.model, (epoch - 1) * steps + run.step, args.ema)
        run.step += 1
        run.loss += loss.detach() / run.processes  # no .item(), which would wait for the GPU
        if run.stop_signal():
            break
    run.loss = utils.over_processes(run.loss)


@torch.inference_mode()
def validate(run):
    """Score `run.average` on the validation set, void left out; return (loss, confusion matrix).

    The loss is the weighted mean over the split's labelled pixels, whatever the batch size.
    Ends early where the run is to stop.
    """
    model, num_classes = run.average.eval(), len(run.val_set.classes)
    if run.processes > 1:  # score the first one's batch norm statistics, which best.pt keeps
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)
    cm = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=run.device)
    sums = torch.zeros(2, device=run.device)
    order = torch.arange(len(run.val_set), device=run.val_set.images.device)
    # Without gradients two batches fit a GPU, unless a CUDA graph keeps its memory.
    batch_size = run.batch_size * (2 if run.device.type == "cuda" and not run.args.compile else 1)
    for indices in utils.progress(order.split(batch_size), "validation", batch_size):
        if run.stop_signal():
            break
        indices = indices[run.rank :: run.processes]
        images, masks = data.fetch(run.val_set, indices, run.device)
        if len(images):  # the last batch may have fewer images than there are processes
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.args.amp):
                logits = model(data.normalize(images)).float()
            labels = logits.max(1).indices  # argmax, several times faster on CPUs
            cm += utils.confusion_matrix(labels, masks, num_classes)
            weight = pixel_weight(masks, run.weights)
            sums += torch.stack([criterion(logits, masks, run.weights) * weight, weight])
    if run.processes > 1:
        distributed.all_reduce(cm)
        distributed.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=1e-9)).item(), cm


def fit(run):
    """Train epoch by epoch from where the run is; return the exit status, 0 or 128 + a signal."""
    args, saved = run.args, -math.inf
    if utils.ended(run.history, args.epochs, args.patience):
        print("this run is finished; to go on with it, raise --epochs or --patience")
    while not utils.ended(run.history, args.epochs, args.patience):
        epoch, taken = len(run.history) + 1, run.step
        size = max(run.size, utils.image_size(args, epoch))
        if size > run.size:
            print(f"images of {size}x{size} from here on", flush=True)
            run.train_set, run.val_set, run.weights = load_sets(args, run.device, size, run.images)
            speed_up(run)
        started = time.monotonic()
        train_one_epoch(run, epoch)
        train_seconds = time.monotonic() - started
        val_loss, cm = validate(run)
        finite = all(tensor.isfinite().all() for tensor in run.average.state_dict().values())
        if not (finite and math.isfinite(run.loss + val_loss)):
            raise utils.UserError(
                f"epoch {epoch}/{args.epochs}: a loss or a weight is not finite (loss {run.loss}, in "
                f"validation {val_loss}); nothing of this epoch is kept; start anew with a smaller --lr"
            )
        if signal := run.stop_signal():
            save_last(run)
            print("stopped; go on with  python train.py --resume", utils.quote(run.out / "last.pt"))
            return 128 + signal
        row = {
            "epoch": epoch,
            "lr": utils.learning_rates(args, epoch, run.step, size)[0],
            "train_loss": run.loss / run.step,
            "val_loss": val_loss,
            "val_mean_iou": utils.mean_iou(cm),
            "val_pixel_accuracy": utils.pixel_accuracy(cm),
            "images_per_second": (run.step - taken) * run.batch_size / max(train_seconds, 1e-9),
            "seconds": time.monotonic() - started,
            "size": size,
        }
        run.history, run.step, run.loss = [*run.history, row], 0, 0.0
        save_best(run)  # before last.pt: after a crash in between, --resume repeats the epoch
        last = utils.ended(run.history, args.epochs, args.patience)
        if last or time.monotonic() - saved > SAVE_EVERY:
            save_last(run)
            saved = time.monotonic()
        report(run, cm)
        if last and epoch < args.epochs:
            print(f"stopped: no better validation mIoU for {args.patience} epochs")
    return 0


def report(run, cm):
    """Write an epoch's line to log.csv and print it; say so where only one class is named."""
    if run.rank == 0:
        utils.write_log(run.out, run.history)
    row, epochs = run.history[-1], run.args.epochs
    later = range(row["epoch"] + 1, epochs + 1)
    left = sum(max(1, utils.image_size(run.args, epoch) / row["size"]) ** 2 for epoch in later)
    predicted = cm.sum(0).nonzero().flatten().tolist()
    print(
        f"epoch {row['epoch']}/{epochs}  lr {row['lr']:.1e}  loss {row['train_loss']:.3f}  "
        f"val loss {row['val_loss']:.3f}  mIoU {row['val_mean_iou']:.4f}  "
        f"accuracy {row['val_pixel_accuracy']:.1%}  "
        f"predicts {len(predicted)}/{len(cm)} classes  {row['images_per_second']:.1f} images/s  "
        f"{utils.format_seconds(left * row['seconds'])} left",
        flush=True,
    )
    if len(predicted) == 1:
        print(f"  so far every pixel is labelled {run.val_set.classes[predicted[0]]}: go on")


def checkpoint_of(run):
    """Return what best.pt holds: all that scoring and predicting need."""
    return {
        "model": run.args.model,
        "options": {"pretrained": False} if models.takes_pretrained(run.args.model) else {},
        "classes": list(run.train_set.classes),
        "palette": run.train_set.palette,
        "size": run.size,
        "data": run.args.data,
        "images": run.images,
        "args": {k: v for k, v in vars(run.args).items() if k not in ("out", "resume")},
        "state_dict": run.average.state_dict(),
        "epoch": len(run.history),
        "metrics": run.history[-1] if run.history else {},
    }


def save_best(run):
    """Write best.pt where the last epoch is the best; the first process alone does."""
    if run.rank == 0 and utils.best_row(run.history) is run.history[-1]:
        utils.save_checkpoint(run.out / "best.pt", checkpoint_of(run))


def save_last(run):
    """Write last.pt, with all that `restore` needs; the first process alone does."""
    if run.rank == 0:
        state = {
            "trained": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "random_state": utils.random_state(run.device),
            "history": run.history,
            "unfinished_epoch": {"step": run.step, "loss": float(run.loss)},
        }
        utils.save_checkpoint(run.out / "last.pt", checkpoint_of(run) | state)


def restore(run, checkpoint):
    """Put all that a last.pt keeps but the average into a run that was set up like that one."""
    run.model.load_state_dict(checkpoint["trained"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    utils.match_layouts(run.optimizer)
    run.history = checkpoint["history"]
    run.step = checkpoint["unfinished_epoch"]["step"]
    run.loss = checkpoint["unfinished_epoch"]["loss"] / run.processes  # the file has the sum
    if run.rank == 0:
        utils.set_random_state(checkpoint["random_state"], run.device)
    else:  # another process's state is not kept; new numbers, so that no transforms are repeated
        torch.manual_seed(run.args.seed + run.rank + 1000 * len(run.history))


def finish(run):
    """Draw the curves, and the best epoch's predictions for a few images; say what to do next."""
    out, args = run.out, run.args
    checkpoint = utils.load_checkpoint(out / "best.pt")
    size, epoch, metrics = checkpoint["size"], checkpoint["epoch"], checkpoint["metrics"]
    title = f"{args.model}; validation on split {args.val_split}, void left out"
    utils.curves(out / "curves.png", {args.model: run.history}, title)
    dataset = run.val_set
    if dataset.size != size:  # the best epoch had smaller images than the last
        dataset = data.load_dataset(args.data, args.val_split, size, dataset.names)
    few = torch.linspace(0, len(dataset) - 1, min(6, len(dataset))).long()
    images, masks = (tensor.cpu() for tensor in dataset[few])
    model = utils.to_device(models.from_checkpoint(checkpoint), run.device)
    labels, _ = utils.segment(model, data.normalize(images.to(run.device)), (size, size))
    rows = {"truth": masks, "prediction": labels.cpu()}
    title = f"{args.model}, epoch {epoch}, split {args.val_split}, {size}x{size}"
    utils.samples(out / "samples.png", images, rows, dataset.classes, dataset.palette, title)
    print(
        f"best: epoch {epoch}, validation mIoU {metrics['val_mean_iou']:.4f}, "
        f"pixel accuracy {metrics['val_pixel_accuracy']:.1%}\n"
        f"look at    {out / 'curves.png'} and {out / 'samples.png'}\n"
        f"score it   python evaluate.py {utils.quote(out / 'best.pt')}\n"
        f"use it     python predict.py IMAGE --checkpoint {utils.quote(out / 'best.pt')}"
    )


def load_sets(args, device, size, images=None):
    """Return (training set, validation set, class weights, float32 (C,)); images: see Run."""
    # Affine augmentation zooms in, so it is given images of twice the size.
    side = size * (2 if args.augment == "affine" else 1)
    train, val = (images["train"], images["val"]) if images else (None, None)
    train_set = data.load_dataset(args.data, args.train_split, side, train, device=device)
    val_set = data.load_dataset(args.data, args.val_split, size, val, device=device)
    data.remark_on_void(train_set, data.require_labels(train_set))
    data.require_labels(val_set, learns=False)
    weights = torch.ones(len(train_set.classes), device=device)
    if args.class_weights:
        weights = data.class_weights(train_set, args.class_weights).to(device)
    return train_set, val_set, weights


def make_model(args, num_classes, device, file):
    """Return a new network, --init where it is not pretrained; file: what --encoder-weights holds."""
    options = {"pretrained": args.pretrained} if models.takes_pretrained(args.model) else {}
    model = models.build_model(args.model, num_classes, **options)
    models.check_output(model, num_classes, args.size, device)  # now, not when images have grown
    pretrained = getattr(model, "pretrained_parts", ())
    parts = [name for name, _ in model.named_children() if name not in pretrained]
    for name in parts:
        utils.initialize(model.get_submodule(name), args.init)
    print(f"initialised by --init {args.init}: {', '.join(parts) or 'nothing'}", end="")
    print(f"; pretrained: {', '.join(pretrained)}" if pretrained else "")
    if args.encoder_weights:
        try:
            loaded, left = models.load_encoder(model, file)
        except (models.ModelError, AttributeError, TypeError) as error:
            raise utils.UserError(f"{args.encoder_weights}: {error}; it is not for {args.model}")
        left = ", ".join(left) or "nothing"
        print(f"{args.encoder_weights}: {len(loaded)} tensors loaded; left out: {left}")
    return model


def settle(args, device):
    """Fill in the settings that follow from others; say which, and what takes them back."""
    has_pretrained = models.takes_pretrained(args.model)
    if args.pretrained and not has_pretrained:
        raise utils.UserError(f"{args.model} has no pretrained encoder; a resnet34_ model has")
    args.pretrained = has_pretrained if args.pretrained is None else args.pretrained
    if args.progressive is None:
        from_scratch = not args.pretrained and not args.encoder_weights
        args.progressive = from_scratch and args.augment == "affine" and args.size > 64
    defaults = {"epochs": 100, "lr": 1e-3, "weight_decay": 0.05}
    if args.progressive:
        defaults = {"epochs": 800, "lr": 2e-3, "weight_decay": 0.2}
    if args.progressive and args.epochs is None:  # docs/experiments.md, the fifth round
        count = len(data.load_dataset(args.data, args.train_split, 32, load=False))
        defaults["epochs"] = round(800 * min(1, math.sqrt(209 / count)))  # 134 for 7,477 images
    filled_in = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    vars(args).update(filled_in)
    if args.progressive and filled_in:
        sides = sorted({utils.image_size(args, epoch) for epoch in range(1, args.epochs + 1)})
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in filled_in.items()]
        print(
            f"images grow ({', '.join(map(str, sides))}), because of --augment or --progressive: "
            f"{' '.join(flags)}; --no-progressive takes it back"
        )
    if args.amp is None:
        args.amp = utils.has_fast_bfloat16(device)


def set_up(args, resumed, device, rank=0, processes=1):
    """Return the Run that the settings describe, or that goes on from the checkpoint `resumed`."""
    file = utils.read_tensors(args.encoder_weights) if args.encoder_weights and not resumed else {}
    with utils.first_process_first():  # it downloads what is missing
        settle(args, device)
        size = utils.image_size(args, 1)
        if resumed:  # images never shrink, not even where a run that ended goes on for more epochs
            epoch = min(len(resumed["history"]) + 1, args.epochs)
            size = max(utils.image_size(args, epoch), resumed["size"])
        images = resumed and resumed.get("images")
        train_set, val_set, weights = load_sets(args, device, size, images)
    if resumed and list(train_set.classes) != resumed["classes"]:
        raise data.DataError(f"{args.data}: has other classes than the run that is to go on")
    args.data = str(train_set.root or args.data)  # so that it is found from any folder
    batch_size = min(args.batch_size, len(train_set))
    if batch_size < processes:
        raise utils.UserError(f"--batch-size is {batch_size} for {processes} processes")
    if len(train_set) == 1:
        print("the training set is one image: the network will know only that one")

    torch.manual_seed(args.seed)
    new = None if resumed else make_model(args, len(train_set.classes), device, file)
    if not images:
        images = {"train": train_set.names, "val": val_set.names, "before": file.get("images")}
        if seen := data.learned_from(images, val_set.names):
            some = f"{len(seen)} validation images have names of some learned from, {seen[0]}, ..."
            print(f"{some}: where they are the same, validation flatters")
    model = utils.to_device(new or models.from_checkpoint(resumed), device)
    average = copy.deepcopy(model).requires_grad_(False)
    options = {"weight_decay": args.weight_decay, "fused": True}  # CPU: 0.26 to 0.40 of the time
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, **options)
    torch.manual_seed(args.seed + rank)  # each process augments its images differently
    run = Run(
        args=args, out=args.out, device=device, rank=rank, processes=processes,
        batch_size=batch_size, train_set=train_set, val_set=val_set, weights=weights, images=images,
        model=model, parallel=model, average=average, optimizer=optimizer, history=[],
    )  # fmt: skip
    if resumed:
        restore(run, resumed)
    if processes > 1:
        if device.type == "cuda":
            run.model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        run.parallel = nn.parallel.DistributedDataParallel(run.model)
    speed_up(run)
    return run


def speed_up(run):
    """Do what --compile asks for: a CUDA graph on one CUDA GPU, torch.compile elsewhere."""
    if not run.args.compile:
        return
    if run.device.type == "cuda" and run.processes == 1:
        run.parallel = run.model  # no more the graph for smaller images
        run.parallel = utils.cuda_graph(run.model, run.batch_size, run.size, run.args.amp)
    elif run.device.type == "mps":  # where torch.compile fails, or is slower: pytorch issue 192551
        print("--compile: not on Apple's GPUs; the run goes on without it")
    else:
        print("compiling: the first step at each size takes a minute or more", flush=True)
        run.model.compile()
        run.average.compile()


def make_parser():
    """Return the parser of the command line."""
    parser = utils.make_parser(__doc__)
    count, real = utils.number(int, 1, 10**6), utils.number(float, 0, 10)
    default, yes_or_no = "; default: %(default)s", argparse.BooleanOptionalAction

    add = parser.add_argument_group("everyday").add_argument
    add("--model", choices=models.MODELS, default="darrennet", help="the network" + default)
    how = "voc2007 or voc2012 (downloaded to data/), shapes (drawn) or a folder" + default
    add("--data", default="voc2007", metavar="NAME|DIR", help=how)
    how = "transform the images at random: flip, or affine (--augment alone); default: no"
    add("--augment", nargs="?", const="affine", choices=data.MODES, help=how)
    add("--cosine", action="store_true", help="lower the learning rate to 0; default: constant")
    how = "rare classes count more in the loss (alone: inverse); default: no"
    add("--class-weights", nargs="?", const="inverse", choices=data.SCHEMES, help=how)
    add("--size", type=utils.number(int, 32, 4096), default=224, help="the images' side" + default)
    how = "passes over the training images; default: 100, or up to 800 where images grow"
    add("--epochs", type=count, metavar="N", help=how)
    add("--out", type=Path, metavar="DIR", help="the run's folder; default: runs/MODEL, numbered")
    how = "go on with a run, its folder or last.pt (alone: the newest), and its settings"
    add("--resume", nargs="?", const="newest", metavar="RUN", help=how)

    add = parser.add_argument_group("training").add_argument
    add("--init", choices=utils.INITIALIZERS, default="kaiming", help="of new weights" + default)
    how = "start a resnet34_ model's encoder from ImageNet; default: yes"
    add("--pretrained", action=yes_or_no, help=how)
    how = "start from ERFNet's weights (darrennet) or a checkpoint, its decoder too where it fits"
    add("--encoder-weights", metavar="FILE", help=how)
    how = "images grow from --size / 4; default: with affine, --size over 64, not pretrained"
    add("--progressive", action=yes_or_no, help=how)
    add("--batch-size", type=count, default=16, metavar="N", help="images in a step" + default)
    how = "learning rate (AdamW's); default: 0.001, or 0.002 where images grow"
    add("--lr", type=real, metavar="X", help=how)
    how = "how strongly weights are pulled to 0; default: 0.05, or 0.2 where images grow"
    add("--weight-decay", type=real, metavar="X", help=how)
    how = "keep weights averaged over about 1/(1 - X) steps; 0: the last step's" + default
    add("--ema", type=utils.number(float, 0, 0.9999), default=0.99, metavar="X", help=how)
    how = "stop after N epochs without a better validation mIoU; default: never"
    add("--patience", type=count, metavar="N", help=how)
    how = "the same seed gives the same weights (on the CPU)" + default
    add("--seed", type=utils.number(int, 0, 2**32 - 1), default=0, metavar="N", help=how)
    add("--train-split", default="train", metavar="NAME", help="to learn from" + default)
    add("--val-split", default="val", metavar="NAME", help="to score after each epoch" + default)

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps" + default)
    add("--amp", action=yes_or_no, help="compute in bfloat16; default: where that is fast")
    how = "train faster: by a CUDA graph on one CUDA GPU, by torch.compile elsewhere"
    add("--compile", action=yes_or_no, help=how + "; default: no")
    return parser


def main(argv=None):
    """Run the command line; see the top of the file."""
    args, resumed = utils.read_settings(make_parser(), argv)
    with utils.process_group(args.device) as (device, rank, processes):
        run = set_up(args, resumed, device, rank, processes)
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        slow = args.amp and not utils.has_fast_bfloat16(device)  # asked for, or from another device
        print(
            f"{args.data}: {len(run.train_set)} images to train on, {len(run.val_set)} to validate "
            f"on, {len(run.val_set.classes)} classes\n{args.model}: {parameters:,} parameters on "
            f"{processes} x {device} in {'bfloat16' if args.amp else 'float32'}"
            f"{', which may be slow here: try --no-amp' if slow else ''}"
        )
        with utils.run_folder(args, resumed, rank) as out, utils.stop_signals() as caught:
            run.out, run.caught = out, caught
            print(f"run in {run.out}", flush=True)
            if rank == 0:
                utils.write_settings(run.out, argv, args, device)
            status = fit(run)
            utils.over_processes(0)  # waits: no process ends before the first has saved
        if status == 0 and rank == 0:
            finish(run)
    return status


if __name__ == "__main__":
    utils.cli(main, data.DataError, models.ModelError)
