"""Pieces that the scripts share: initialisation, scores, device, checkpoints, pictures, progress."""

import argparse
import contextlib
import math
import os
import pickle
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F

VOID_COLOR = (224, 224, 192)  # VOC's, for the pixels that an annotator left out
INITIALIZERS = {
    "kaiming": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
}


class UserError(ValueError):
    """Something the user can mend; the message says what and how."""


def run(main, *user_errors):
    """Call a script's `main`; where the user can mend what went wrong, say so in one line.

    UserError, OSError, a full GPU and the further exception classes given end the process with
    status 2, as argparse's own errors do, Ctrl-C with 130. All others are bugs: they keep their
    traceback.
    """
    try:
        sys.exit(main())
    except torch.OutOfMemoryError:
        message = "the GPU's memory is full; try a smaller --batch-size or --size"
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (UserError, OSError, *user_errors) as error:
        # A DataLoader's worker hands an error on as a traceback, whose last line is the message.
        text = str(error)
        text = text.splitlines()[-1].partition("Error: ")[2] if "Traceback" in text else text
        message = " ".join(text.split())
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
    """Give a list to which SIGINT and SIGTERM add their number instead of ending the process.

    So that work can end at a good place. The second signal of a kind ends the process at once.
    """
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        device = torch.empty(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # whose random generator `random_state` is to keep
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device '{name}' cannot be used here ({reason}); try --device auto")


def to_device(model, device):
    """Move a network to the device, in the layout that makes its convolutions fast; return it.

    Channels last, which its activations then follow: a forward pass takes 0.5 to 0.8 of the time
    on an Intel CPU, a training step 0.8 to 1.1 (row 2 of tests/benchmark.py), and it is the one
    that the tensor cores of GPUs take. Not measured on Apple's GPUs, which keep PyTorch's default.
    """
    apple = device.type == "mps"
    return model.to(device, memory_format=torch.preserve_format if apple else torch.channels_last)


def has_fast_bfloat16(device):
    """Return whether the device multiplies bfloat16 matrices in hardware: GPUs from Ampere on, AMX.

    AMX is part of Intel's server processors since 2023; a DarrenNet trains twice as fast with it
    (row 2 of tests/benchmark.py). Versions of PyTorch that do not tell count as without.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and capabilities.get("amx_bf16", False)


def initialize(model, scheme):
    """Set all weights of convolutions and linear layers by PyTorch's initialiser of that name.

    `kaiming`: normal, deviation sqrt(2 / n_in) (He et al. 2015; the paper's eq. 3, put upright).
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


def confusion_matrix(pred, mask, num_classes):
    """Count pixels by true and predicted class, void left out.

    pred, mask: integer tensors of one shape, pred from 0 to num_classes - 1, mask likewise or void
    (255). Returns int64 (C, C) on their device, rows ground truth, columns prediction. Sum the
    matrices of a whole split, then score: a mean of per-batch scores depends on the batch size.
    Raises ValueError for a label outside the classes.
    """
    # Void has a row of its own, cut off at the end: picking out the other pixels first takes twenty
    # times as long. int32, since bincount's time is mostly that of reading its input.
    pairs = mask.int() * num_classes + pred
    counts = torch.bincount(pairs.flatten(), minlength=256 * num_classes).view(-1, num_classes)
    if counts[num_classes:255].any() or len(counts) > 256:
        raise ValueError(f"a label is outside the {num_classes} classes")
    return counts[:num_classes]


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


@torch.inference_mode()
def segment(model, images, size, tta=False):
    """Return the class of every pixel for a normalised float batch (N, 3, H, W).

    The probabilities are brought to `size` (height, width) bilinearly before the best class is
    taken; returns uint8 (N, height, width). `tta` averages them with those of the mirrored image.
    `model` must be in eval mode. Both evaluate.py and predict.py label pixels with this alone.
    """
    probabilities = model(images).float().softmax(1)
    if tta:
        probabilities = (probabilities + model(images.flip(-1)).float().softmax(1).flip(-1)) / 2
    if probabilities.shape[-2:] == tuple(size):
        return probabilities.max(1).indices.byte()  # several times faster than argmax on CPUs
    # Class by class: a photograph of 24 million pixels then needs two maps of its size instead of
    # one for each class, 2 GB for VOC's. The best of C classes has 1/C or more at every pixel, so
    # one that stays below that in the whole batch is nowhere the best; 0.99 allows for rounding.
    resize = partial(F.interpolate, size=size, mode="bilinear", align_corners=False)
    best = resize(probabilities[:, :1])[:, 0]
    labels = torch.zeros_like(best, dtype=torch.uint8)
    highest = probabilities.amax((0, 2, 3)).tolist()
    for c in range(1, len(highest)):
        if highest[c] > 0.99 / len(highest):
            candidate = resize(probabilities[:, c : c + 1])[:, 0]
            labels.masked_fill_(candidate > best, c)
            torch.maximum(best, candidate, out=best)
    return labels


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
        os.replace(temporary, path)
    except RuntimeError as error:  # what torch.save makes of a write that fails
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
        raise UserError(f"{path}: does not exist") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: is no checkpoint, or has code in it, which is refused") from error
    except Exception as error:  # torch.load raises many kinds for files that it cannot read
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as a file of tensors ({reason})") from error


def load_checkpoint(path):
    """Return the dictionary that `save_checkpoint` wrote, its tensors on the CPU.

    Its keys are `model` (a name in models.MODELS), `options`, `classes`, `palette`, `size`, `data`,
    `state_dict`, `epoch` and `metrics`; train.py's last.pt has all that resuming needs besides.
    Raises UserError where the file is missing or is no such checkpoint.
    """
    checkpoint = read_tensors(path)
    needed = {"model", "options", "classes", "palette", "size", "state_dict", "epoch", "metrics"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise UserError(
            f"{path}: is not a checkpoint of this project; give one that train.py wrote"
        )
    return checkpoint


def newest_checkpoint(name="best.pt", runs="runs", fallback=None):
    """Return the path of the newest run's checkpoint of that name, or else `fallback`.

    Raises UserError where there is neither.
    """
    found = sorted(Path(runs).glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    if not found and fallback and fallback.exists():
        return fallback
    if not found:
        raise UserError(
            f"there is no checkpoint {runs}/*/{name} yet; train one first "
            "(python train.py --data shapes --size 64 --epochs 12) or name a file"
        )
    return found[-1]


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


def number(kind, low, high=math.inf):
    """Return an argparse type: `kind` (int or float) from `low` to `high`, both included."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # also refuses nan
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} from {low}" + (f" to {high}" if high < math.inf else " up")
    return parse


def progress(items, label, images_each=1, status=lambda: ""):
    """Yield `items`, keeping one line on standard error: share done, images/s, time left, status().

    On a terminal the line is rewritten twice a second and goes away at the end; in a file there
    is a new line every half minute, so that short work leaves none.
    """
    terminal = sys.stderr.isatty()
    pause = 0.5 if terminal else 30
    start = shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown > pause:
            shown, rate = now, done / (now - start)
            line = f"{label} {done}/{len(items)}  {rate * images_each:.1f} images/s  {status()}  "
            line += f"{format_seconds((len(items) - done) / rate)} left"
            # Back at the start of the line, so that what the caller prints next takes its place.
            print(line, end="\033[K\r" if terminal else "\n", file=sys.stderr, flush=True)
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


def save_mask(path, mask, palette):
    """Write a class mask, uint8 (H, W), as a palette PNG whose pixel values are the classes."""
    image = Image.fromarray(np.asarray(mask))
    image.putpalette(colorize(np.arange(256), palette).tobytes())  # makes it mode P
    image.save(path)


def overlay(image, mask, classes, palette):
    """Return a PIL RGB picture: the classes' colours over the image, and a legend below it.

    image: PIL RGB; mask: uint8 (H, W) at the image's size. Background (class 0) is left as it
    is. The legend names the classes that the mask has, with the share of pixels each takes.
    """
    mask = np.asarray(mask)
    colored = Image.fromarray(colorize(mask, palette))
    strength = Image.fromarray(np.where(mask > 0, 140, 0).astype(np.uint8))
    blended = Image.composite(colored, image, strength)

    shares = class_shares(mask, classes)
    size = max(12, min(image.size) // 25)
    font = ImageFont.load_default(size)
    entries = [f"{name} {share:.1%}" for name, share in shares.items()]
    widths = [int(2.5 * size + font.getlength(entry)) for entry in entries]
    canvas_width = max(image.width, *widths)
    # Entries go from left to right, and on to a new row where the next would not fit.
    places, x, y = [], 0, 0
    for width in widths:
        if x + width > canvas_width:
            x, y = 0, y + 2 * size
        places.append((x, image.height + y))
        x += width
    canvas = Image.new("RGB", (canvas_width, image.height + y + 2 * size), "white")
    canvas.paste(blended, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for (x, y), entry, name in zip(places, entries, shares):
        box = (x + size // 2, y + size // 2, x + size * 3 // 2, y + size * 3 // 2)
        draw.rectangle(box, fill=tuple(palette[classes.index(name)]), outline="black")
        draw.text((x + 2 * size, y + size), entry, font=font, fill="black", anchor="lm")
    return canvas


def contact_sheet(pictures):
    """Return one PIL RGB picture of all in {name: PIL picture}, row by row, with names below."""
    columns = math.ceil(math.sqrt(len(pictures)))
    margin, font = 8, ImageFont.load_default(14)
    width = max(picture.width for picture in pictures.values()) + margin
    height = max(picture.height for picture in pictures.values()) + 30
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width + margin, rows * height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, picture) in enumerate(pictures.items()):
        x, y = margin + number % columns * width, margin + number // columns * height
        sheet.paste(picture, (x, y))
        text = " ".join(name.split())
        while font.getlength(text) > width - margin:
            text = text.removesuffix("…")[:-1] + "…"
        draw.text((x, y + picture.height + 4), text, font=font, fill="black")
    return sheet


def class_shares(mask, classes):
    """Return {class name: share of the pixels} for the classes in a mask, the largest first."""
    counts = np.bincount(np.asarray(mask).ravel(), minlength=len(classes))
    order = sorted(np.flatnonzero(counts), key=lambda c: -counts[c])
    return {classes[c]: counts[c] / counts.sum() for c in order}
