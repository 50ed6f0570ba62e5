"""What the scripts share: scores, initialisation, device, checkpoints, pictures, command line."""

import argparse
import contextlib
import glob
import io
import itertools
import math
import os
import signal
import sys
import time
from datetime import timedelta
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import ImageFont
from torch import nn
from torch.nn import functional as F


class UserError(ValueError):
    """Something the user can mend; the message says what and how."""


# ------------------------------------------------------------------------------- scores


def confusion_matrix(pred, mask, num_classes):
    """Count pixels by true and predicted class, void left out.

    pred, mask: integer tensors of one shape, 0 to num_classes - 1, mask also void
    (255). Returns int64 (C, C) on their device, rows ground truth, columns prediction.
    Sum the matrices of a whole split, then score: a mean of per-batch scores depends on
    the batch size. Raises ValueError for other shapes, types and labels.
    """
    if pred.shape != mask.shape or pred.is_floating_point() or mask.is_floating_point():
        kinds = ", ".join(f"{each.dtype} {tuple(each.shape)}" for each in (pred, mask))
        raise ValueError(f"pred and mask should be integers of one shape, and are {kinds}")
    labels = torch.stack([mask, pred]).int()
    if pred.device.type == "mps":  # where bincount is slow, and in some versions fails
        labels = labels.cpu()
    void = labels[0] == 255
    labels = labels.masked_fill(void, 0)
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise ValueError(f"the label {labels[wrong][0]} is outside the {num_classes} classes")
    # A pair (true class t, predicted class p) is counted as C * t + p. Void is counted
    # last, and left out: to pick all other pixels first takes several times as long.
    pairs = (num_classes * labels[0] + labels[1]).masked_fill(void, num_classes**2)
    counts = torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)[:-1]
    return counts.view(num_classes, num_classes).to(pred.device)


def iou(cm):
    """Return each class's intersection over union from a confusion matrix, float64 (C,), 0 to 1.

    TP / (TP + FP + FN), the paper's equation 5. For class c TP are its pixels that were
    found, FN those that were missed (the rest of row c), FP pixels that were wrongly
    called c (the rest of column c). NaN for a class in neither truth nor prediction.
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


def mean_accuracy(cm):
    """Return the mean of TP / (TP + FN), a float, over the classes that the truth has."""
    cm = cm.cpu().double()
    return (cm.diag() / cm.sum(1)).nanmean().item()


def dice(cm):
    """Return each class's Dice coefficient from a confusion matrix, float64 (C,), 0 to 1.

    2 TP / (2 TP + FP + FN), also called F1; NaN for a class in neither truth nor
    prediction.
    """
    cm = cm.cpu().double()
    return 2 * cm.diag() / (cm.sum(0) + cm.sum(1))


def frequency_weighted_iou(cm):
    """Return the mean of `iou` weighted by each class's share of the true pixels, a float.

    Long et al. 2015, Fully Convolutional Networks for Semantic Segmentation, section 5.
    """
    share = cm.cpu().double().sum(1) / cm.sum().item()
    return (share * iou(cm)).nansum().item()


@torch.inference_mode()
def segment(model, images, size, tta=False):
    """Return the class of every pixel, and the probability of that class.

    images: normalised, float (N, 3, H, W); size: (height, width) of what is returned,
    labels, uint8 (N, height, width), and probabilities, float, of that shape too.

    Softmax, or by `tta` (test-time augmentation) its mean with the mirrored image's; then
    smooth, bring to `size`, argmax. evaluate.py and predict.py both label pixels by this
    function. What it returns takes no part in a gradient (torch.inference_mode). Raises
    ValueError for a model in training mode.
    """
    if model.training:  # batch norms would go by this batch, and learn from it
        raise ValueError("the model is in training mode; call model.eval() first")
    probabilities = model(images).float().softmax(1)
    if tta:
        mirrored = model(images.flip(-1)).float().softmax(1).flip(-1)
        probabilities = (probabilities + mirrored) / 2
    # Transposed convolutions leave stripes at outlines. A mean over 3x3 pixels of the
    # network's own grid removes them.
    probabilities = F.avg_pool2d(probabilities, 3, 1, 1, count_include_pad=False)
    # One class after the other, keeping the best so far: to enlarge all at once would
    # take 2 GB for VOC's classes and a photograph of 24 million pixels.
    best = probabilities.new_full((len(images), *size), -1)
    labels = torch.zeros_like(best, dtype=torch.uint8)
    for c in range(probabilities.shape[1]):
        one = F.interpolate(probabilities[:, c : c + 1], size, mode="bilinear")[:, 0]
        labels[one > best] = c
        best = torch.maximum(best, one)
    return labels, best


def best_row(history):
    """Return the row of log.csv with the highest validation mIoU, the earliest of equals."""
    return max(history, key=lambda row: row["val_mean_iou"])


# ----------------------------------------------------------------------- initialisation


INITIALIZERS = {
    "kaiming": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
}


def initialize(model, scheme):
    """Set the weights of 2d convolutions and linear layers by PyTorch's initialiser of that name.

    `kaiming`: normal, deviation sqrt(2 / n_in) (He et al. 2015, Delving Deep; the paper's
    eq. 3, corrected). `xavier_uniform`: uniform within +- sqrt(6 / (n_in + n_out)) (Glorot
    and Bengio 2010; eq. 1). `xavier_normal`: normal, deviation sqrt(2 / (n_in + n_out))
    (eq. 2). n_in and n_out are the connections that PyTorch counts (its fan_in and
    fan_out), of transposed convolutions the other way round. Biases become 0; batch
    norms stay as the network made them. Raises KeyError for another scheme.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            INITIALIZERS[scheme](module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------- device


def select_device(name="auto"):
    """Return the torch.device called `name`; `auto` takes CUDA, else Apple's MPS, else the CPU.

    Raises UserError where this machine or this PyTorch has no such device.
    """
    if name == "auto":
        found = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
        name = next(name for name, backend in found.items() if backend.is_available())
    try:
        device = torch.ones(1, device=name).device  # tries it: fails without kernels for this GPU
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error)[:90]}); try cpu")


def to_device(model, device):
    """Move a network to a torch.device, in the layout that is fast there; return it.

    Activations follow. Channels last: on an Intel CPU a forward pass takes 0.5 to 0.8
    of the time, a training step 0.8 to 1.1 (at commit 52f3c55), and the tensor cores of
    GPUs take it. Apple's GPUs are not known to gain from it: they keep PyTorch's
    default.
    """
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    return model.to(device, memory_format=layout)


# -------------------------------------------------------------------------- checkpoints


# What every checkpoint has. train.py adds `data`, `args` and `images` (the names of those
# learned from, and validated on), and to last.pt what resuming needs.
KEYS = {
    "model": str,  # a name in models.MODELS
    "classes": list,
    "palette": list,
    "size": int,
    "state_dict": dict,
    "epoch": int,
    "metrics": dict,
}
# First bytes of files that are given by mistake, and what to say; b"" fits all others.
NO_WEIGHTS = {
    b"version https://git-lfs": "is git-lfs' note of a file; `git lfs pull` fetches the file",
    b"<": "is a web page; download the file itself",
    b"": "is broken, or holds more than tensors: a network is saved by its state_dict()",
}


def save_checkpoint(path, checkpoint):
    """Write a dictionary of tensors and plain values to `path`, whole or not at all.

    It goes to a temporary file in the same folder, is flushed to the disk, then
    renamed, so a crash or a full disk leaves an earlier file at `path` as it was.
    Raises OSError.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # another process may save here, too
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace(source, target):
    """Rename a file or folder; what is at `target` is replaced. Raises OSError.

    Tried again for some seconds, since Windows renames nothing that another program,
    an antivirus scanner say, has open.
    """
    for pause in (0.1, 1, 3):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(pause)
    return os.replace(source, target)  # the last time with its error


def read_tensors(path):
    """Return what torch.save put into a file, tensors on the CPU: tensors and plain values alone.

    weights_only: a file from a stranger cannot run code. Raises UserError for a file
    that cannot be read so, or that holds no dictionary.
    """
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError as error:
        raise UserError(f"{path}: does not exist; is its name right?") from error
    except Exception as error:  # torch.load raises many kinds for files that it cannot read
        with open(path, "rb") as file:
            start = file.read(100).lstrip()
        said = next(said for sign, said in NO_WEIGHTS.items() if start.startswith(sign))
        raise UserError(f"{path}: {said}") from error


def load_checkpoint(path):
    """Return the dictionary that `save_checkpoint` wrote, with `KEYS`, its tensors on the CPU.

    Raises UserError where the file is missing or is no such checkpoint.
    """
    checkpoint = read_tensors(path)
    wrong = [key for key, kind in KEYS.items() if not isinstance(checkpoint.get(key), kind)]
    if wrong:
        raise UserError(f"{path}: is no checkpoint of train.py ({wrong[0]} is missing or strange)")
    return checkpoint


def find_checkpoint(given, name="best.pt"):
    """Return a checkpoint's path: of the file or run's folder `given`, else of the newest in runs/."""
    if given:
        return given / name if given.is_dir() else given
    files = sorted(Path("runs").glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"there is no runs/*/{name} yet; train a network first, or name a file")
    return files[-1]


def numbered(folder):
    """Yield the paths `folder`, folder-2, folder-3, ... without end."""
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def new_folder(wanted):
    """Make and return the folder `wanted`, or wanted-2, wanted-3, ... where it is there already."""
    for folder in numbered(wanted):
        with contextlib.suppress(FileExistsError):  # of two that ask at once, one is given it
            folder.mkdir(parents=True)
            return folder


# ----------------------------------------------------------------------------- pictures


# The classes' colours in all that people look at, from class 1 on. The first eight by
# eye, the others as far from these as can be, to colour-blind readers too (CIELAB
# distances of the colours and of what people without red or green cones see, Machado et
# al. 2009). Class 0 is dark grey.
VIVID = (
    (230, 25, 75), (0, 130, 200), (255, 200, 30), (60, 200, 90), (245, 130, 48), (105, 0, 165),
    (70, 220, 240), (250, 120, 190), (105, 0, 255), (180, 240, 180), (150, 75, 120), (165, 240, 105),
    (210, 15, 0), (60, 150, 105), (60, 135, 255), (0, 120, 0), (240, 135, 150), (135, 60, 150),
    (75, 195, 255), (90, 90, 255),
)  # fmt: skip
BACKGROUND, VOID_COLOR = (45, 45, 52), (255, 255, 255)
# Of lines, for colour-blind readers too (Okabe and Ito 2008, Color Universal Design).
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


def vivid_colors(n):
    """Return the colours of n classes in pictures, [(red, green, blue)]; later rounds are darker."""
    colors = [BACKGROUND]
    for index in range(n - 1):
        rounds, place = divmod(index, len(VIVID))
        colors.append(tuple(round(0.6**rounds * value) for value in VIVID[place]))
    return colors


def colorize(mask, palette, void=VOID_COLOR):
    """Return a class mask, integers (H, W), as RGB uint8 (H, W, 3); void gets its own colour."""
    table = np.full((256, 3), void, np.uint8)
    table[: len(palette)] = palette
    return np.take(table, np.asarray(mask), axis=0)  # several times faster than table[mask]


def load_font(size):
    """Return the font that comes with matplotlib, or else Pillow's own, which has no umlauts."""
    try:  # without importing matplotlib, which takes long
        folder = Path(find_spec("matplotlib").origin).parent
        return ImageFont.truetype(folder / "mpl-data/fonts/ttf/DejaVuSans.ttf", size)
    except (AttributeError, OSError):
        return ImageFont.load_default(size)


@cache
def shown_names(classes):
    """Return the names of classes, a tuple, as pictures show them: by number where letters lack."""
    font, names = load_font(20), list(classes)
    lacking = bytes(font.getmask("\uffff"))  # the box that stands for letters the font lacks
    for index, name in enumerate(classes):
        if any(bytes(font.getmask(letter)) == lacking for letter in name):
            names[index] = f"class {index}"
    if names != list(classes):
        print("the font lacks letters of some classes: pictures show these by their numbers")
    return names


@contextlib.contextmanager
def drawing(path, width, height, title):
    """Give an empty matplotlib figure, of so many inches, with a title; write it to `path` at the end.

    Letters have 10 points whatever the size: of a figure 9 inches wide they are still
    read at half a page's width of a report.
    matplotlib is imported here, since predict.py needs none of it. An MPLBACKEND
    inherited from a notebook may name what is not installed, which would end that
    import; a Figure needs no backend.
    """
    if not {"matplotlib", "ipykernel"} & sys.modules.keys():  # a notebook's own plots need it
        os.environ.pop("MPLBACKEND", None)
    from matplotlib import figure, rc_context

    with rc_context({"text.parse_math": False}):  # $ in a name is no formula
        page = figure.Figure(figsize=(width, height), layout="constrained")
        page.suptitle(title, wrap=True)
        yield page
        page.savefig(path, dpi=150)


def curves(path, histories, title):
    """Draw the losses and validation scores of runs over the epochs, each run in its own colour.

    histories: {name: the rows of the run's log.csv}. A dot marks the epoch with the best
    mean IoU.
    """
    panels = (
        ("loss (dotted: in training)", {"train_loss": ":", "val_loss": "-"}),
        ("mean IoU, validation", {"val_mean_iou": "-"}),
        ("pixel accuracy, validation", {"val_pixel_accuracy": "-"}),
    )
    with drawing(path, 9, 3.15 + 0.19 * len(histories), title) as figure:
        for axes, (label, columns) in zip(figure.subplots(1, len(panels)), panels):
            for (name, rows), color in zip(histories.items(), itertools.cycle(LINES)):
                epochs, best = [row["epoch"] for row in rows], best_row(rows)
                name = f"{name}: best {best['val_mean_iou']:.4f}"
                for column, style in columns.items():
                    axes.plot(epochs, [row[column] for row in rows], style, color=color, label=name)
                # After the loop `column` is the last one, that of validation.
                axes.plot(best["epoch"], best[column], "o", color=color)
            axes.set(title=label, xlabel="epoch")
            axes.grid(alpha=0.3)
        if len(histories) > 1:
            # Every second line of the last panel is a run's dot.
            figure.legend(handles=axes.lines[::2], loc="outside lower center", frameon=False)


def samples(path, images, rows, classes, title, captions=()):
    """Draw a grid with a column for each image: the image on top, then its masks row by row.

    images: uint8 (N, 3, H, W); rows: {name: uint8 masks (N, H, W)}; captions: a line
    above each image. Below the grid, a legend of the classes that appear.
    """
    present = torch.stack(list(rows.values())).unique().tolist()
    colors, names = vivid_colors(len(classes)), [*shown_names(tuple(classes))]
    names = [names[c] if c < len(classes) else "void" for c in present]
    width = max(4.7, 1.6 * len(images))
    # An entry of the legend takes 0.67 inches, and 0.09 for each letter.
    columns = max(1, int(width / (0.67 + 0.09 * max(map(len, names)))))
    height = 1.6 * (1 + len(rows)) + 0.5 + 0.2 * math.ceil(len(names) / columns)
    with drawing(path, width, height, title) as figure:
        from matplotlib.patches import Patch

        grid = figure.subplots(1 + len(rows), len(images), squeeze=False)
        for axes, caption in zip(grid[0], captions):
            # A file's name may have bytes that are no letters, which matplotlib refuses.
            axes.set_title(caption.encode(errors="replace").decode(), fontsize=7.5)
        pictures = [images.permute(0, 2, 3, 1).numpy()]
        pictures += [[colorize(mask, colors) for mask in masks] for masks in rows.values()]
        for line, name, shown in zip(grid, ["image", *rows], pictures):
            line[0].set_ylabel(name)
            for axes, picture in zip(line, shown):
                axes.imshow(picture, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
        fills = colorize(np.array(present), colors) / 255
        handles = [Patch(fc=fill, ec="black", label=name) for fill, name in zip(fills, names)]
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


# ------------------------------------------------------------------------- command line


def cli(main, *user_errors):
    """Call a script's `main`; where the user can mend what went wrong, say so in one line.

    UserError, OSError, the further exception classes given, and a lack of memory or of
    a compiler end the process with status 2, as argparse's own errors do, Ctrl-C with
    130, without a word. All others are bugs: they keep their traceback. In
    `python -X dev` UserError, OSError and the classes given have it, too.
    """
    for stream in (sys.stdout, sys.stderr):  # a file on Windows may know few letters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        sys.exit(main())
    except (KeyboardInterrupt, BrokenPipeError):  # or `| head` has seen enough
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        message = " ".join(str(error).split())
        mendable = isinstance(error, (UserError, OSError, *user_errors))  # and says how
        # GPUs' (Apple's raise a plain RuntimeError), and a CPU's: DefaultCPUAllocator.
        if not mendable and ("out of memory" in message or "CPUAllocator" in message):
            message = f"{message[:150]}; try a smaller --size or, to train, --batch-size"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            message = f"{message[:150]}; --no-compile does without a compiler"
        elif sys.flags.dev_mode or not mendable:
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


def number(kind, low, high=math.inf):
    """Return an argparse type: `kind` (int or float) from `low` to `high`, both included."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # also refuses nan
            raise ValueError  # argparse says "invalid", and __name__
        return value

    parse.__name__ = f"{kind.__name__} from {low}" + (f" to {high}" if high < math.inf else " up")
    return parse


def expand(paths):
    """Return `paths`, a list of Path, with patterns like runs/*/best.pt replaced by what they match.

    Windows' command line leaves this to the program. A path that exists, or that
    nothing matches, is taken as it is.
    """
    found = []
    for path in paths:
        matches = [] if path.exists() else sorted(glob.glob(str(path), recursive=True))
        found += map(Path, matches or [path])
    return list(dict.fromkeys(found))  # each once


def progress(items, label):
    """Yield `items`, keeping one line on standard error: label, how many are done, time left.

    On a terminal the line is rewritten twice a second and goes away at the end; in a
    file there is a new line every half minute, so that short work leaves none.
    """
    terminal = sys.stderr.isatty()
    # On a terminal back to the line's start, so that what comes next takes its place.
    pause, end = (0.5, "\r") if terminal else (30, "\n")
    start = shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown > pause:
            shown = now
            left = timedelta(seconds=round((now - start) / done * (len(items) - done)))
            print(f"{label} {done}/{len(items)}  {left} left", end=end, file=sys.stderr, flush=True)
    if terminal:
        print(" " * 60, end="\r", file=sys.stderr, flush=True)
