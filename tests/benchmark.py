"""Measure what the scripts cost beyond the networks: python tests/benchmark.py --data DIR [ROW ...]

Rows 1 to 5 and 8 are ratios of two things timed in turns in this one run: the medians of their
times, and between brackets the smallest and the largest ratio of any turn. Row 6 is memory, row 7
images a second. Nothing else should be running.
DIR is a folder that holds VOCdevkit/VOC2007. It takes about ten minutes on two cores.
"""

import argparse
import contextlib
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import data
import evaluate
import models
import train
import utils

FLAGS = ("--augment", "--cosine", "--no-progressive")  # of train.py, all epochs at one size


def ratio(one, other, turns=5, warm_up=1):
    """Time two functions in turns; return (ratio of the medians, smallest, largest, the medians)."""
    times = []
    for _ in range(warm_up + turns):
        pair = []
        for function in (one, other):
            synchronize()
            started = time.perf_counter()
            function()
            synchronize()
            pair.append(time.perf_counter() - started)
        times.append(pair)
    times = times[warm_up:]
    medians = [statistics.median(column) for column in zip(*times)]
    ratios = [a / b for a, b in times]
    return medians[0] / medians[1], min(ratios), max(ratios), medians


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def show(row, what, measured, target):
    value, low, high, (one, other) = measured
    print(
        f"| {row} | {what} | {value:.2f} ({low:.2f} to {high:.2f}) | {target} "
        f"| {1000 * one:.1f} ms, {1000 * other:.1f} ms |",
        flush=True,
    )


def make_run(folder, *flags):
    """Return the Run that train.py would make of the flags."""
    args = train.make_parser().parse_args([*map(str, flags), "--out", str(folder)])
    device = utils.select_device(args.device)
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        return train.set_up(args, None, device)


def epoch_of(run, steps):
    """Return a function that runs the last `steps` steps of an epoch of train.py's loop."""

    def epoch():
        run.step, run.loss = len(run.train_set) // run.batch_size - steps, 0.0
        train.train_one_epoch(run, 1)

    return epoch


def bare_steps(model, batch, size, device, steps, plain=False):
    """Return a function that takes steps on a batch that is there already.

    Layout, precision and optimizer are as in train.py, or as PyTorch has them where they are `plain`.
    """
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    images = data.normalize(images)
    if plain:
        images = images.contiguous()
    labels = torch.randint(0, 21, (batch, size, size), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=not plain)
    use_amp = not plain and utils.has_fast_bfloat16(device)

    def take():
        model.train()
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=use_amp):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return take


def row_1(root, folder):
    for name, size, steps, target in (
        ("fcn", 224, 4, 1.03),
        ("darrennet", 224, 3, 1.03),
        ("fcn", 64, 12, 1.08),
    ):
        flags = ("--model", name, "--data", root, "--size", size, *FLAGS)
        run = make_run(folder / f"{name}-{size}", *flags)
        bare = bare_steps(run.model, 16, size, run.device, steps)
        measured = ratio(epoch_of(run, steps), bare)
        target = target if run.device.type == "cpu" else 1.10
        show(1, f"train.py's loop / bare steps: {name}, {size}x{size}", measured, f"≤ {target}")


def row_2(root, folder):
    device = utils.select_device()
    for name, best, compiled in (
        ("fcn", "1.5", "1.7"),
        ("darrennet", "-", "1.25"),
        ("unet", "-", "-"),
    ):
        size, batch = (64, 4) if name == "unet" else (96, 16)
        steps = 2
        plain = bare_steps(models.build_model(name).to(device), batch, size, device, steps, True)
        ours = utils.to_device(models.build_model(name), device)
        faster = bare_steps(ours, batch, size, device, steps)
        what = f"plain step / ours: {name}, {size}x{size}"
        show(2, what, ratio(plain, faster), f"≥ {best}" if best != "-" else "-")
        if compiled == "-":
            continue
        ours = utils.to_device(models.build_model(name), device)
        if device.type == "cuda":
            ours = utils.cuda_graph(ours, batch, size, utils.has_fast_bfloat16(device))
        else:
            ours.compile()
        faster = bare_steps(ours, batch, size, device, steps)
        what = f"plain step / ours with --compile: {name}, {size}x{size}"
        show(2, what, ratio(plain, faster), f"≥ {compiled}")


def class_loop(pred, mask, num_classes):
    """Count as peers do: boolean masks, class by class."""
    valid = mask != data.VOID
    scores = []
    for c in range(num_classes):
        p, m = (pred == c) & valid, (mask == c) & valid
        scores.append(((p & m).sum().item(), (p | m).sum().item()))
    return scores


def row_3(root, folder):
    pred = torch.randint(0, 21, (16, 375, 500), dtype=torch.uint8)
    mask = torch.where(torch.rand(pred.shape) < 0.05, data.VOID, pred)
    one = ratio(lambda: class_loop(pred, mask, 21), lambda: utils.confusion_matrix(pred, mask, 21))
    show(3, "loop over classes / confusion matrix, 16 masks of 500x375", one, "≥ 8")

    dataset = data.VOC(root, "val", 224)
    dataset.names = dataset.names[:40]
    device = utils.select_device()
    model = utils.to_device(models.build_model("fcn"), device).eval()

    def decode_and_segment():
        for index in range(len(dataset)):
            images = data.normalize(dataset.images[index][None].to(device))
            utils.segment(model, images, dataset.full_mask(index).shape)[0].cpu()

    measured = ratio(lambda: evaluate.score(model, dataset, device), decode_and_segment)
    show(3, "evaluate.py's scoring / decoding and network alone: fcn, 224x224", measured, "≤ 1.05")


def row_4(root, folder):
    def load(threads):
        """Load the split with so many threads."""
        torch.set_num_threads(threads)
        data.VOC(root, "train", 224)

    threads = torch.get_num_threads()
    measured = ratio(lambda: load(1), lambda: load(os.cpu_count()))
    torch.set_num_threads(threads)
    show(4, f"first load on one core / on all {os.cpu_count()}: 209 images", measured, "≥ 1.7 on 2")


def row_5(root, folder):
    model = models.build_model("darrennet")
    checkpoint = {
        "model": "darrennet", "options": {}, "classes": list(data.VOC_CLASSES), "size": 224,
        "palette": data.color_map(21), "state_dict": model.state_dict(), "epoch": 0, "metrics": {},
    }  # fmt: skip
    utils.save_checkpoint(folder / "net.pt", checkpoint)
    dataset = data.VOC(root, "val", 32)
    photos = [dataset.image_paths[name] for name in dataset.names[:100]]

    def process(*command):
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)

    predict = (
        REPOSITORY / "predict.py",
        "--checkpoint",
        folder / "net.pt",
        "--out",
        folder / "out",
    )
    measured = ratio(lambda: process(*predict, photos[0]), lambda: process("-c", "import torch"))
    show(5, "predict.py on one photo / import torch", measured, "≤ 1.35")
    few, many = photos[:1], photos

    def network():
        model.eval()
        with torch.inference_mode():
            for _ in range(len(many) - len(few)):
                model(torch.zeros(1, 3, 224, 224))

    def difference():
        """A folder of 100 less one photo: the start of the process is not a photo's cost."""
        started = time.perf_counter()
        process(*predict, *few)
        start = time.perf_counter() - started
        started = time.perf_counter()
        process(*predict, *many)
        return time.perf_counter() - started - start

    seconds = [difference() for _ in range(3)]
    bare = [timed(network) for _ in range(3)]
    values = [a / b for a, b in zip(seconds, bare)]
    each = [statistics.median(times) / (len(many) - len(few)) for times in (seconds, bare)]
    measured = each[0] / each[1], min(values), max(values), each
    show(5, "predict.py for each photo of 100 / the network alone, 224x224", measured, "≤ 1.3")


def timed(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import benchmark, torch, train, models, utils
name, kind = sys.argv[1:]
if kind == "loop":
    flags = ("--model", name, "--data", {root!r}, *benchmark.FLAGS, "--device", "cpu")
    run = benchmark.make_run(Path({folder!r}, name), *flags)
    benchmark.epoch_of(run, 2)()
else:
    cpu = torch.device("cpu")
    model = utils.to_device(models.build_model(name), cpu)
    benchmark.bare_steps(model, 16, 224, cpu, 2)()
print(benchmark.peak_memory())
"""


def peak_memory():
    """Return the most memory that this process has had, in MiB."""
    with contextlib.suppress(OSError):  # Linux: getrusage's figure there includes the parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS gives bytes


def row_6(root, folder):
    code = MEMORY.format(
        tests=str(REPOSITORY / "tests"), root=str(root), folder=str(folder / "memory")
    )
    for name in ("fcn", "darrennet"):
        peaks = []
        for kind in ("loop", "bare"):
            command = [sys.executable, "-c", code, name, kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks.append(float(done.stdout))
        one, other = peaks
        what = f"peak memory, train.py's loop / bare steps: {name}, 224x224"
        print(f"| 6 | {what} | {one / other:.2f} | ≤ 1.25 | {one:.0f} MiB, {other:.0f} MiB |")


def row_7(root, folder):
    device = utils.select_device()
    print("\n| training, images/s | " + " | ".join(f"batch {b}" for b in (1, 4, 16, 64)) + " |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in ("fcn", "darrennet"):
        model = utils.to_device(models.build_model(name), device)
        seconds = {}
        for size in (64, 96, 128, 224, 320):
            line = []
            for batch in (1, 4, 16, 64):
                if batch * size**2 > 16 * 224**2 and device.type == "cpu":
                    line.append("not run")  # half a minute a step
                    continue
                step = bare_steps(model, batch, size, device, 1)
                step()
                each = statistics.median(timed(step) for _ in range(3))
                seconds[size, batch] = each / batch
                line.append(f"{batch / each:.1f}")
            print(f"| {name}, {size}x{size} | " + " | ".join(line) + " |", flush=True)
        x, y = np.log([(size**2, s) for (size, batch), s in seconds.items() if batch == 16]).T
        slope = np.polyfit(x, y, 1)[0]
        print(f"\n{name}: seconds an image grow with pixels to the power {slope:.2f} (batch 16)\n")


def row_8(root, folder):
    if not torch.cuda.is_available():
        print("| 8 | train.py's loop / with --compile | not run: there is no CUDA GPU | - | - |")
        return
    for name, size in (
        ("darrennet", 64),
        ("darrennet", 128),
        ("darrennet", 224),
        ("fcn", 64),
        ("resnet34_unet", 224),
        ("unet", 224),
    ):
        flags = ["--model", name, "--data", root, "--size", size, *FLAGS]
        flags += ["--no-pretrained"] if models.takes_pretrained(name) else []
        runs = [make_run(folder / name, *flags, *more) for more in ((), ("--compile",))]
        measured = ratio(*(epoch_of(run, 12) for run in runs), turns=3)
        show(8, f"train.py's loop / with --compile: {name}, {size}x{size}", measured, "-")


def main():
    """Run the rows asked for, or all."""
    rows = [row_1, row_2, row_3, row_4, row_5, row_6, row_7, row_8]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", type=int, metavar="ROW", help="1 to 8; default: all")
    parser.add_argument("--data", required=True, metavar="DIR")
    args = parser.parse_args()
    device = utils.select_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name += " " + next(
            line.partition(":")[2] for line in lines if line.startswith("model name")
        )
    print(
        f"{name.strip()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, device {device},"
    )
    print(f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| row | what | ratio | target | medians |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for number in args.rows or range(1, 9):
            rows[number - 1](Path(args.data).resolve(), Path(folder))


if __name__ == "__main__":
    main()
