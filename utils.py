"""Pieces that the scripts share: initialisation, scores, device, checkpoints, pictures, progress."""

import argparse
import contextlib
import csv
import gc
import glob
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import signal
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

if sys.version_info < (3, 10):  # noqa: UP036, said in one line to whoever has an older one
    sys.exit(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}")

# Colours that colour-blind readers tell apart (Okabe and Ito 2008, Color Universal Design).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
VOID_COLOR = (224, 224, 192)  # VOC's, for the pixels that an annotator left out
INITIALIZERS = {
    "kaiming": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
}


class UserError(ValueError):
    """Something the user can mend; the message says what and how."""


def cli(main, *user_errors):
    """Call a script's `main`; where the user can mend what went wrong, say so in one line.

    UserError, OSError, the further exception classes given and a few known errors of PyTorch end
    the process with status 2, as argparse's own do, Ctrl-C with 130, a closed pipe with 1, without a
    word. All others are bugs: they keep their traceback.
    """
    if os.name == "nt":
        os.system("")  # has older consoles of Windows obey "\033[K" instead of showing it
    for stream in (sys.stdout, sys.stderr):  # a file on Windows may know few letters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # `| head` has seen enough; nor is there anything to flush at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError, *user_errors) as error:
        message = " ".join(str(error).split())
    except (RuntimeError, ValueError) as error:  # PyTorch has no classes of its own for these
        compiler = "--compile needs a C++ compiler; install one, or give --no-compile"
        memory = "the GPU's memory is full; try a smaller --batch-size or --size"
        remedies = {
            "out of memory": memory,
            "_ALLOC_FAILED": memory,  # by cuBLAS; cuDNN then says "unable to find an engine"
            "find an engine": f"{memory}; or the GPU is too old for this PyTorch",
            "more than 1 value per channel": "batch norm cannot learn from one value a channel, as "
            "one image gives at this --size; take a larger --batch-size, or --size 64 or more",
            "C++ compiler": compiler,
            "Compiler: ": compiler,
            "closed by peer": "another process failed; see its message",
            "Connection reset": "another process failed; see its message",
        }
        message = next((remedies[part] for part in remedies if part in str(error)), None)
        if not message:
            raise
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def make_parser(description):
    """Return an argparse parser that shows `description` as it is, and errors in one line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=layout)
    parser.error = lambda message: parser.exit(
        2, f"{parser.prog}: error: {' '.join(message.split())}; see --help\n"
    )
    return parser


@contextlib.contextmanager
def stop_signals():
    """Give a dictionary that records SIGINT, SIGTERM and SIGHUP, which then do not end the process.

    So work can end at a good place. After one second, another signal ends the process at once; one
    that comes sooner is ignored: torchrun passes the same one on, a notebook's `!` sends two. What
    the process was started to ignore (nohup, a shell's &) stays so.
    """
    caught = {}  # {a signal's number: when it first came}

    def catch(number, frame):
        caught.setdefault(number, time.monotonic())
        if time.monotonic() - min(caught.values()) > 1:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    kinds = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    heeded = [number for number in kinds if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, catch) for number in heeded}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def process_group(device_name):
    """Join the processes that torchrun started, if it did; give (device, rank, their number).

    Only the first process prints; errors are printed by all. Where one fails, torchrun ends the
    others.
    """
    if "LOCAL_RANK" not in os.environ:
        yield select_device(device_name), 0, 1
        return
    if device_name in ("auto", "cuda") and torch.cuda.is_available():
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = select_device("cpu" if device_name == "auto" else device_name)
    nccl = device.type == "cuda" and distributed.is_nccl_available()  # Windows has none
    # gloo too, for numbers that are on the CPU: summing them does not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    # The others wait while the first downloads and decodes.
    distributed.init_process_group(backend, timeout=timedelta(hours=6))
    rank = distributed.get_rank()
    with contextlib.redirect_stdout(open(os.devnull, "w") if rank else sys.stdout):
        yield device, rank, distributed.get_world_size()
    distributed.destroy_process_group()


def over_processes(value, operation="SUM"):
    """Return the sum (or MAX) of a number over the processes, a float; all must call this together."""
    if not distributed.is_available() or not distributed.is_initialized():
        return float(value)
    value = torch.tensor(float(value), dtype=torch.float64)
    distributed.all_reduce(value, getattr(distributed.ReduceOp, operation))
    return value.item()


def share_of_batch(weight):
    """Return the factor that makes one process's loss its part of the loss of the whole batch.

    weight: the sum of the class weights of this process's pixels, a tensor. The factor is the
    number of processes (gradients are averaged over them) times its share of the batch's sum. So
    N processes learn what one would: exactly, where the loss is a mean over pixels.
    """
    total = weight.clone()
    distributed.all_reduce(total)
    return distributed.get_world_size() * weight / total.clamp(min=1e-9)


@contextlib.contextmanager
def first_process_first():
    """Let a machine's first process run a block before its others do."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        over_processes(0)  # waits: it returns when the first has left its block
    try:
        yield
    finally:  # where it failed, the others are to find that out themselves
        if first:
            over_processes(0)


@contextlib.contextmanager
def run_folder(args, resumed, rank=0):
    """Give the run's folder: --out, or else runs/MODEL, runs/MODEL-2, ... Raises UserError.

    A new run that comes to no checkpoint leaves no folder.
    """
    out = args.out or next(p for p in numbered(Path("runs", args.model)) if not p.exists())
    if resumed or rank:  # it is there, or another process makes it
        yield out
        return
    files = [out / name for name in ("last.pt", "best.pt", "log.csv", "settings.json")]
    or_else = f"--resume {out}" if files[0].exists() else "delete it, if that run is over"
    for file in files:
        if file.exists():
            raise UserError(f"{file}: is of another run; choose another --out, or {or_else}")
    make_folder(out)
    try:
        yield out
    finally:
        if not (out / "last.pt").exists():
            for file in files:
                file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something else
                out.rmdir()


def write_settings(out, argv, args, device):
    """Write a run's settings.json: the commands as typed, every setting, the versions, the device."""
    path = out / "settings.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"commands": []}
    words = [Path(sys.argv[0]).name, *map(str, sys.argv[1:] if argv is None else argv)]
    stored["commands"].append(shlex.join(words))
    stored["settings"] = {k: v for k, v in vars(args).items() if k not in ("out", "resume")}
    stored["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    stored["device"] = f"{device}, {platform.platform()}, {torch.get_num_threads()} threads"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def make_folder(path):
    """Make the folder `path`, with those above it, unless it is there. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made a folder ({error.strerror}); choose another --out")
    if not os.access(path, os.W_OK):
        raise UserError(f"{path}: cannot be written to; choose another --out")


def select_device(name="auto"):
    """Return the torch.device called `name`; `auto` takes CUDA, else Apple's MPS, else the CPU.

    Raises UserError where this machine or this PyTorch has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.ones(1, device=name).device  # fails without kernels for this GPU
        if device.type == "cuda":
            torch.cuda.set_device(device)  # whose random generator `random_state` is to keep
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:90]
        raise UserError(f"device '{name}' cannot be used here ({reason}); try --device auto or cpu")


def fast_layout(device):
    """Return the memory format in which the device computes convolutions fast.

    Channels last: on an Intel CPU a forward pass takes 0.5 to 0.8 of the time, a training step 0.8
    to 1.1 (at commit 52f3c55), and the tensor cores of GPUs take it. Apple's GPUs and, in float32,
    those before Ampere are not known to gain from it: they keep PyTorch's default.
    """
    older = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.contiguous_format if older or device.type == "mps" else torch.channels_last


def to_device(model, device):
    """Move a network to the device, in its fast layout, which activations then follow; return it."""
    return model.to(device, memory_format=fast_layout(device))


def has_fast_bfloat16(device):
    """Return whether the device multiplies bfloat16 matrices in hardware: GPUs from Ampere on, AMX.

    AMX is part of Intel's server processors since 2023; a DarrenNet trains twice as fast with it.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions do not tell
    return device.type == "cpu" and capabilities.get("amx_bf16", False)


def initialize(model, scheme):
    """Set all weights of convolutions and linear layers by PyTorch's initialiser of that name.

    `kaiming`: normal, deviation sqrt(2 / n_in) (He et al. 2015; the paper's eq. 3, corrected).
    `xavier_uniform`: uniform within +- sqrt(6 / (n_in + n_out)) (Glorot and Bengio 2010; eq. 1).
    `xavier_normal`: normal, deviation sqrt(2 / (n_in + n_out)) (eq. 2).
    n_in and n_out are the connections that PyTorch counts (its fan_in and fan_out). Biases become
    0; batch norms stay as the network made them. Raises ValueError for another scheme.
    """
    if scheme not in INITIALIZERS:
        raise ValueError(f"no scheme is called '{scheme}'; choose from {', '.join(INITIALIZERS)}")
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            INITIALIZERS[scheme](module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# (20, 4): up to 20/32 of the epochs, growing images have 1/4 of --size, where steps are cheap.
GROWTH = ((20, 4), (31, 2), (32, 1))


def image_size(args, epoch):
    """Return the side of the images in an epoch, counted from 1; a multiple of 32 while they grow."""
    if not args.progressive:
        return args.size
    divisor = next(divisor for part, divisor in GROWTH if 32 * epoch <= part * args.epochs)
    return min(args.size, max(64, 32 * math.ceil(args.size / divisor / 32)))


def learning_rates(args, epoch, steps, side=0):
    """Return the learning rate of each of an epoch's steps: --lr, or cosine annealing to 0.

    Where images grow, annealing starts anew with each size, from --lr times the first side / this
    one. side: of the images now; a run that was resumed for more epochs had planned a smaller one.
    """
    if not args.cosine:
        return [args.lr] * steps
    sizes = [image_size(args, number) for number in range(1, args.epochs + 1)]
    size = sizes[epoch - 1]
    done = (epoch - 1 - sizes.index(size)) * steps  # at this size, before this epoch
    total = sizes.count(size) * steps  # at this size in all
    factors = [(1 + math.cos(math.pi * (done + step) / total)) / 2 for step in range(steps)]
    return [args.lr * (factor * sizes[0] / max(size, side)) for factor in factors]


def update_average(average, model, steps, decay):
    """Move the averages of a model's weights, and of its batch norms' statistics, towards the latest.

    An exponential moving average over about 1 / (1 - decay) steps, but early on over a tenth of
    the `steps` so far, so that it soon forgets the random start.
    """
    averages, values = (
        [t for t in itertools.chain(m.parameters(), m.buffers()) if t.is_floating_point()]
        for m in (average, model)
    )
    get_ema_multi_avg_fn(min(decay, steps / (steps + 10)))(averages, values, None)


def cuda_graph(model, batch_size, size, amp):
    """Return a function that maps images to logits as the model does in training, as a CUDA graph.

    A graph starts all kernels of a pass, forward or backward, at once: started one by one, those of
    a small network take longer to start than to compute. What the model does is recorded once, so
    it must do the same for all images, float (batch_size, 3, size, size): it takes no other shape.
    Raises UserError for a model that cannot be recorded.
    """
    # Recording takes place on a stream of its own, of which PyTorch would warn at the first step.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    gc.collect()  # an earlier graph, which refers to itself, keeps its memory until then
    images = torch.zeros(batch_size, 3, size, size, device="cuda")
    images = images.contiguous(memory_format=fast_layout(images.device))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.cuda.get_rng_state()
    try:
        # Weights that autocast keeps in bfloat16 would be recorded, and not follow the training.
        with torch.autocast("cuda", torch.bfloat16, enabled=amp, cache_enabled=False):
            whole = nn.Sequential(model.train())  # PyTorch replaces its `forward`, not the model's
            recorded = torch.cuda.make_graphed_callables(whole, (images,), allow_unused_input=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"no CUDA graph of the network can be made ({reason}); try --no-compile")
    model.load_state_dict(before)  # recording took steps, which batch norm's statistics remember
    torch.cuda.set_rng_state(random)
    return recorded


def match_layouts(optimizer):
    """Give Adam's moments the memory layout of their weights, which its fused kernel takes for granted.

    Those of a checkpoint from another kind of device have another.
    """
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)


def confusion_matrix(pred, mask, num_classes):
    """Count pixels by true and predicted class, void left out.

    pred, mask: integer tensors of one shape, pred from 0 to num_classes - 1, mask likewise or void
    (255). Returns int64 (C, C) on their device, rows ground truth, columns prediction. Sum the
    matrices of a whole split, then score: a mean of per-batch scores depends on the batch size.
    Raises ValueError for other shapes, and for a label outside the classes, on a void pixel too.
    """
    if pred.shape != mask.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and mask {tuple(mask.shape)} differ in shape")
    device = pred.device
    if device.type == "mps":  # where bincount is slow, and fails in some versions of PyTorch
        pred, mask = pred.cpu(), mask.cpu()
    known = (mask < num_classes) | (mask == 255)
    if pred.min() < 0 or pred.max() >= num_classes or mask.min() < 0 or not known.all():
        raise ValueError(f"a label is outside the {num_classes} classes")
    # Void has a row of its own, cut off at the end: picking out the other pixels first takes
    # twenty times as long. int32, since bincount's time is mostly that of reading its input.
    pairs = mask.int() * num_classes + pred.int()
    counts = torch.bincount(pairs.flatten(), minlength=256 * num_classes).view(256, -1)
    return counts[:num_classes].to(device)


def iou(cm):
    """Return each class's intersection over union from a confusion matrix, float64 (C,), 0 to 1.

    TP / (TP + FP + FN), the paper's equation 5; NaN for a class in neither truth nor prediction.
    """
    cm = cm.cpu().double()  # Apple's GPUs have no float64
    true_positive = cm.diag()
    return true_positive / (cm.sum(0) + cm.sum(1) - true_positive)


def mean_iou(cm):
    """Return the mean of `iou` over the classes that have one (the paper's equation 6), a float."""
    return iou(cm).nanmean().item()


def pixel_accuracy(cm):
    """Return the share of pixels whose class is right (the paper's equation 4), a float."""
    cm = cm.cpu().double()
    return (cm.diag().sum() / cm.sum()).item()


def frequency_weighted_iou(cm):
    """Return the mean of `iou` weighted by each class's share of the true pixels, a float.

    Long et al. 2015, Fully Convolutional Networks for Semantic Segmentation, section 5.
    """
    share = cm.cpu().double().sum(1) / cm.sum().item()
    return (share * iou(cm)).nansum().item()


def best_row(history):
    """Return the row of log.csv with the highest validation mIoU, the earliest of equals."""
    return max(history, key=lambda row: row["val_mean_iou"])


def ended(history, epochs, patience=None):
    """Return whether a run has had all its epochs, or `patience` of them without a better mIoU."""
    since_best = len(history) - best_row(history)["epoch"] if history else 0
    return len(history) >= epochs or since_best >= (patience or math.inf)


@torch.inference_mode()
def segment(model, images, size, tta=False):
    """Return the class of every pixel for a normalised float batch (N, 3, H, W), and how sure it is.

    The probabilities are brought to `size` (height, width) bilinearly before the best class is
    taken; returns labels, uint8 (N, height, width), and their probabilities, float, of that shape.
    `tta` averages the probabilities with those of the mirrored image. `model` must be in eval
    mode. evaluate.py and predict.py label pixels with this alone.
    """
    probabilities = model(images).float().softmax(1)
    if tta:
        probabilities = (probabilities + model(images.flip(-1)).float().softmax(1).flip(-1)) / 2
    if probabilities.shape[-2:] == tuple(size):
        best = probabilities.max(1)  # several times faster than argmax on CPUs
        return best.indices.byte(), best.values
    # Class by class: a photograph of 24 million pixels then needs three maps of its size instead of
    # one for each class, 2 GB for VOC's.
    best = probabilities.new_full((len(images), *size), -1)
    labels = torch.zeros_like(best, dtype=torch.uint8)
    for c, one in enumerate(probabilities.split(1, dim=1)):
        one = F.interpolate(one, size, mode="bilinear", align_corners=False)[:, 0]
        labels.masked_fill_(one > best, c)
        torch.maximum(best, one, out=best)
    return labels, best


# ------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(path, checkpoint):
    """Write a dictionary of tensors and plain values to `path`, whole or not at all.

    It goes to a temporary file in the same folder, is flushed to the disk, then renamed, so a
    crash or a full disk leaves an earlier file at `path` as it was. Raises OSError.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        for pause in (0.1, 1, 3):  # Windows replaces no file that another program has open
            with contextlib.suppress(PermissionError):
                return os.replace(temporary, path)
            time.sleep(pause)
        os.replace(temporary, path)
    except RuntimeError as error:
        if "inline_container" not in str(error):  # what torch.save makes of a write that fails
            raise
        raise OSError(f"{path}: cannot be written; is the disk full?") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_tensors(path):
    """Return what torch.save put into a file, tensors on the CPU: tensors and plain values alone.

    So a file from a stranger cannot run code. Raises UserError for a file that cannot be read so.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        early = Path(path).name == "best.pt" and Path(path).with_name("last.pt").exists()
        hint = " yet: the run was stopped in its first epoch, --resume it" if early else ""
        raise UserError(f"{path}: does not exist{hint}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: is no checkpoint, or has code in it, which is refused") from error
    except Exception as error:  # torch.load raises many kinds for files that it cannot read
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as a file of tensors ({reason})") from error


def load_checkpoint(path):
    """Return the dictionary that `save_checkpoint` wrote, its tensors on the CPU.

    Its keys are `model` (a name in models.MODELS), `options`, `classes`, `palette`, `size`,
    `state_dict`, `epoch` and `metrics`. train.py adds `data`, `images` (names) and `args`
    (settings), and in last.pt all that resuming needs.
    Raises UserError where the file is missing or is no such checkpoint.
    """
    checkpoint = read_tensors(path)
    needed = {"model", "options", "classes", "palette", "size", "state_dict", "epoch", "metrics"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise UserError(f"{path}: is not a checkpoint of this project; give one of train.py's")
    if not all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values()):
        raise UserError(f"{path}: has weights that are not finite: it is damaged; train anew")
    return checkpoint


def find_checkpoint(given, name="best.pt", fallback=None):
    """Return a checkpoint's path: of the file or run's folder `given`, else of the newest in runs/.

    Where there is no run it is `fallback`. Raises UserError where there is none of these.
    """
    if given:
        return given / name if given.is_dir() else given
    files = [path for kind in ("best", "last") for path in Path("runs").glob(f"*/{kind}.pt")]
    found = sorted(files, key=lambda path: path.stat().st_mtime)
    if not found and not fallback:
        raise UserError(
            f"there is no checkpoint runs/*/{name} yet; train one first "
            "(python train.py --data shapes --model fcn --size 64 --epochs 10) or name a file"
        )
    return found[-1].with_name(name) if found else fallback


def quote(path):
    """Return a path as it can be pasted into a command line, on Windows too (unlike shlex.quote)."""
    return str(path) if re.fullmatch(r"[\w./\\:-]+", str(path)) else f'"{path}"'


def expand(paths):
    """Return `paths`, a list of Path, with patterns like runs/*/best.pt replaced by what they match.

    Windows' command line leaves this to the program, as others do where a pattern is quoted. A path
    that exists is taken as it is. Raises UserError for a pattern that nothing matches.
    """
    found = []
    for path in paths:
        matches = [path] if path.exists() else sorted(glob.glob(str(path), recursive=True))
        if not matches and set("*?[") & set(str(path)):
            raise UserError(f"{path}: nothing matches this pattern")
        found += map(Path, matches or [path])
    return found


def numbered(folder):
    """Yield the paths `folder`, folder-2, folder-3, ... without end."""
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def free_folder(given, wanted, in_the_way):
    """Return the folder to write to: `given`, or else the first free one of `wanted`, wanted-2, ...

    in_the_way(folder) returns nothing, or words on what must not be overwritten there. Raises
    UserError where that is so in `given`.
    """
    for folder in [given] if given else numbered(wanted):
        words = in_the_way(folder)
        if not words:
            return folder
        if given:
            raise UserError(f"{words}; choose another --out")
        print(f"{folder} is left as it is ({words})")


def random_state(device):
    """Return the states of PyTorch's random generators, the CPU's and the device's, as tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_state(states, device):
    """Put the generators back to what `random_state` returned; another device's is left alone."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


# ------------------------------------------------------------------------------ the command line


def read_settings(parser, argv):
    """Return train.py's (settings, checkpoint to go on from or None), as its parser reads argv.

    A run may go on for more epochs or on another device; what would make it another run is refused.
    """
    args = parser.parse_args(argv)
    if not args.resume:
        return args, None
    path = find_checkpoint(args.out if args.resume == "newest" else Path(args.resume), "last.pt")
    checkpoint = load_checkpoint(path)
    if "trained" not in checkpoint:
        raise UserError(f"{path}: has no optimizer state; resume from the run's last.pt")
    if args.out and args.out.resolve() != path.parent.resolve():
        raise UserError(f"--out {args.out}: a resumed run goes on in {path.parent}")
    stored = {name: value for name, value in checkpoint["args"].items() if name in vars(args)}
    parser.set_defaults(**stored | {"out": path.parent})  # what is not typed stays as it was
    args = parser.parse_args(argv)
    may_change = {"data", "epochs", "patience", "batch_size", "device", "amp", "compile"}
    for name in stored.keys() - may_change:
        if getattr(args, name) != stored[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{path}: was trained with another {flag}; start a new run")
    if args.cosine and args.epochs != stored["epochs"] and os.environ.get("RANK", "0") == "0":
        print(f"the learning rate is annealed over {args.epochs} epochs now, so it jumps")
    return args, checkpoint


def number(kind, low, high=math.inf):
    """Return an argparse type: `kind` (int or float) from `low` to `high`, both included."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # also refuses nan
            raise ValueError  # argparse says "invalid", and __name__
        return value

    parse.__name__ = f"{kind.__name__} from {low}" + (f" to {high}" if high < math.inf else " up")
    return parse


def progress(items, label, images_each=1, loss=None):
    """Yield `items`, keeping one line on standard error: share done, images/s, loss(), time left.

    On a terminal the line is rewritten twice a second and goes away at the end; in a file there
    is a new line every half minute, so that short work leaves none. Of several processes only the
    first keeps it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield from items
        return
    terminal = sys.stderr.isatty()
    pause = 0.5 if terminal else 30
    start = shown = time.monotonic()
    try:
        for done, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if now - shown > pause:
                shown, rate = now, done / max(now - start, 1e-9)
                line = f"{label} {done}/{len(items)}  {rate * images_each:.1f} images/s  "
                line += f"loss {float(loss()):.4f}  " if loss else ""
                line += f"{format_seconds((len(items) - done) / rate)} left"
                # Back at the start of the line, so that what the caller prints next takes its place.
                print(line, end="\033[K\r" if terminal else "\n", file=sys.stderr, flush=True)
    finally:  # where the caller breaks off, too
        if terminal:
            print("\033[K", end="", file=sys.stderr, flush=True)


def format_seconds(seconds):
    """Return a duration as people say it: 45 s, 3 min 20 s, 2 h 05 min."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{seconds} s"
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


# --------------------------------------------------------------------------------------- pictures


def colorize(mask, palette):
    """Return a class mask, integers (H, W), as RGB uint8 (H, W, 3); void gets its own colour."""
    table = np.full((256, 3), VOID_COLOR, np.uint8)
    table[: len(palette)] = palette
    return np.take(table, np.asarray(mask), axis=0)  # several times faster than table[mask]


def save_mask(path, mask, palette, **options):
    """Write a class mask, 0 to 255, (H, W), as a palette PNG of its values; options: of Image.save."""
    image = Image.fromarray(np.asarray(mask, np.uint8))
    image.putpalette(colorize(np.arange(256), palette).tobytes())  # makes it mode P
    image.save(path, **options)


def overlay(image, mask, classes, palette):
    """Return a PIL RGB picture: the classes' colours over the image in grey, and a legend below it.

    image: PIL RGB; mask: uint8 (H, W) at the image's size. Mixed with greys a colour keeps its hue,
    so that it is found in the legend whatever the photograph's colours are; a class's border has
    its pure colour and a white line around it. Background (class 0) is the image in light grey. The
    legend names the classes that the mask has, with the share of pixels each takes.
    """
    mask = np.asarray(mask)
    border = near_another(mask, max(1, min(image.size) // 200))
    strength = np.where(border, np.uint8(255), np.where(mask > 0, np.uint8(165), np.uint8(70)))
    colors = [(255, 255, 255), *colors_with_hue(palette[1:])]

    shares = class_shares(mask, classes)
    size = max(12, min(image.size) // 25)
    font = load_font(size)
    entries = [f"{name} {share:.1%}" for name, share in shares.items()]
    widths = [int(2.5 * size + font.getlength(entry)) for entry in entries]
    canvas_width = max([image.width, *widths])
    # Entries go from left to right, and on to a new row where the next would not fit.
    places, x, y = [], 0, 0
    for width in widths:
        if x + width > canvas_width:
            x, y = 0, y + 2 * size
        places.append((x, image.height + y))
        x += width
    canvas = Image.new("RGB", (canvas_width, image.height + y + 2 * size), "white")
    canvas.paste(image.convert("L"), (0, 0))
    canvas.paste(Image.fromarray(colorize(mask, colors)), (0, 0), Image.fromarray(strength))
    draw = ImageDraw.Draw(canvas)
    for (x, y), entry, name in zip(places, entries, shares):
        box = (x + size // 2, y + size // 2, x + size * 3 // 2, y + size * 3 // 2)
        draw.rectangle(box, fill=colors[classes.index(name)], outline="black")
        draw.text((x + 2 * size, y + size), entry, font=font, fill="black", anchor="lm")
    return canvas


def colors_with_hue(palette):
    """Return a palette as tuples, its greys replaced, which over a grey image would not be seen."""
    colors = [tuple(color) for color in palette]
    vivid = [color for color in itertools.product((0, 128, 255), repeat=3) if len(set(color)) > 1]
    for index, color in enumerate(colors):
        if max(color) - min(color) < 40:  # then by what is farthest from all others
            colors[index] = max(vivid, key=lambda new: min(map(partial(math.dist, new), colors)))
    return colors


def load_font(size):
    """Return the font that comes with matplotlib, or else Pillow's own, which has no umlauts."""
    try:  # without importing matplotlib, which takes long
        folder = Path(find_spec("matplotlib").origin).parent
        return ImageFont.truetype(folder / "mpl-data/fonts/ttf/DejaVuSans.ttf", size)
    except (AttributeError, OSError):
        return ImageFont.load_default(size)


def near_another(mask, distance):
    """Return where a class mask (H, W) has another class `distance` pixels away, a bool array."""
    near = np.zeros(mask.shape, bool)
    for here, there in ((near, mask), (near.T, mask.T)):  # up and down; left and right, as a view
        differs = there[distance:] != there[:-distance]
        here[distance:] |= differs
        here[:-distance] |= differs
    return near


def class_shares(mask, classes):
    """Return {class name: share of the labelled pixels} for a mask's classes, the largest first."""
    counts = np.bincount(np.asarray(mask).ravel(), minlength=len(classes))[: len(classes)]
    order = sorted(np.flatnonzero(counts), key=lambda c: -counts[c])
    return {classes[c]: counts[c] / counts.sum() for c in order}


@contextlib.contextmanager
def drawing(path, width, height, title):
    """Give an empty matplotlib figure, of so many inches, with a title; write it to `path` at the end.

    matplotlib is imported here, since predict.py needs none of it. An MPLBACKEND inherited from a
    notebook may name what is not installed, which would end that import; a Figure needs no backend.
    """
    if not {"matplotlib", "ipykernel"} & sys.modules.keys():  # a notebook's own plots need it
        os.environ.pop("MPLBACKEND", None)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):  # a class's name may have $ in it
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(title, wrap=True)
        yield figure
        figure.savefig(path, dpi=100)


def write_log(run, rows):
    """Write a run's log.csv: a row, a dictionary, for each epoch."""
    try:
        with open(run / "log.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    except PermissionError as error:  # Excel has it open
        print(f"{error}; close it: a later epoch writes all rows")


def read_log(run):
    """Return the rows of a run's log.csv, dictionaries of numbers. Raises UserError or OSError."""
    path = Path(run, "log.csv")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        best_row(rows)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is not a log of train.py with an epoch in it") from error
    return rows


def curves(path, histories, title):
    """Draw the losses and validation scores of runs over the epochs, each run in its own colour.

    histories: {name: the rows of the run's log.csv}. The best epoch of each run has a dot.
    """
    panels = (
        ("loss (dotted: in training)", {"val_loss": "-", "train_loss": ":"}),
        ("mean IoU, validation", {"val_mean_iou": "-"}),
        ("pixel accuracy, validation", {"val_pixel_accuracy": "-"}),
    )
    with drawing(path, 12, 4.2 + 0.25 * len(histories), title) as figure:
        for axes, (label, columns) in zip(figure.subplots(1, len(panels)), panels):
            for (name, rows), color in zip(histories.items(), itertools.cycle(COLORS)):
                epochs, best = [row["epoch"] for row in rows], best_row(rows)
                name = f"{name}: best {best['val_mean_iou']:.4f}"
                for column, style in columns.items():
                    values = [row[column] for row in rows]
                    axes.plot(epochs, values, style, color=color, label=name)
                if len(columns) == 1:
                    axes.plot(best["epoch"], best[column], "o", color=color)
            axes.set(title=label, xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        if len(histories) > 1:
            lines = axes.get_legend_handles_labels()
            figure.legend(*lines, loc="outside lower center", frameon=False)


def samples(path, images, rows, classes, palette, title, captions=()):
    """Draw a grid with a column for each image: the image on top, then its masks row by row.

    images: uint8 (N, 3, H, W); rows: {name: uint8 masks (N, H, W)}; captions: a line above each
    image. Below the grid, a legend of the classes that appear.
    """
    present = torch.stack(list(rows.values())).unique().tolist()
    names = [classes[c] if c < len(classes) else "void" for c in present]
    width = max(6.3, 2.1 * len(images))
    columns = max(1, int(width / (0.6 + 0.09 * max(map(len, names)))))  # inches of an entry
    height = 2.1 * (1 + len(rows)) + 0.7 + 0.22 * math.ceil(len(names) / columns)
    with drawing(path, width, height, title) as figure:
        from matplotlib.patches import Patch

        grid = figure.subplots(1 + len(rows), len(images), squeeze=False)
        for axes, caption in zip(grid[0], captions):
            axes.set_title(caption, fontsize=10)
        pictures = [images.permute(0, 2, 3, 1).numpy()]
        pictures += [[colorize(mask, palette) for mask in masks] for masks in rows.values()]
        for line, name, shown in zip(grid, ["image", *rows], pictures):
            line[0].set_ylabel(name)
            for axes, picture in zip(line, shown):
                axes.imshow(picture, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
        colors = colorize(np.array(present), palette) / 255
        handles = [Patch(fc=color, ec="black", label=name) for color, name in zip(colors, names)]
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
