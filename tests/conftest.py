"""Tiny VOC-layout folders, and the scripts run as a user runs them."""

import csv
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # on tensors as small as these, threads only wait
import numpy as np
import prefork
import pytest
import torch
from PIL import Image
from torch import nn

import data
import evaluate
import models
import utils

REPOSITORY = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo"])  # what takes seconds to import
REAL_VOC = os.environ.get("VOC_ROOT")


def write_voc(root, splits=None, num_classes=21, seed=0):
    """Write a VOC-layout folder of noise images with blocky masks of odd and differing sizes."""
    rng = np.random.default_rng(seed)
    splits = splits or {"train": 5, "val": 3}
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    palette = np.array(data.color_map(256), dtype=np.uint8).tobytes()
    for split, count in splits.items():
        names = [f"{split}_{i}" for i in range(count)]
        for name in names:
            width, height = rng.integers(40, 90, 2)
            blocks = rng.integers(0, num_classes, (3, 4), dtype=np.uint8)
            blocks[0, 0] = data.VOID
            mask = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
            mask.putpalette(palette)
            mask.save(root / "SegmentationClass" / f"{name}.png")
            noise = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            image.save(root / "JPEGImages" / f"{name}.jpg")
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def write_plain(root, files=10):
    """Write a plain folder of noise images and masks of three classes, and void.

    files: how many, a0.jpg and so on, or their names. Returns {name: its mask, uint8 (H, W)}.
    """
    rng = np.random.default_rng(0)
    files = [f"a{i}.jpg" for i in range(files)] if isinstance(files, int) else files
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    truth = {}
    for file in files:
        name, ending = os.path.splitext(file)
        mask = rng.integers(0, 3, (5, 6)).astype(np.uint8).repeat(8, 0).repeat(7, 1)
        mask[:8, :7] = data.VOID
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
        noise = Image.fromarray(rng.integers(0, 256, (40, 42, 3), dtype=np.uint8))
        noise.save(root / "images" / file, "PNG" if ending.lower() == ".png" else "JPEG")
        truth[name] = mask
    return truth


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own_with_every_remark_printed_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.say.cache_clear()
    utils.shown_names.cache_clear()


@pytest.fixture
def voc(tmp_path):
    """A folder that holds VOCdevkit/VOC2007 with 5 train and 3 val images."""
    write_voc(tmp_path / "voc" / "VOCdevkit" / "VOC2007")
    return tmp_path / "voc"


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the figures at the end of a run in this process: they take longer than it."""
    names = ((utils, "curves"), (utils, "samples"), (evaluate, "draw_confusion_matrix"))
    for module, name in names:
        monkeypatch.setattr(module, name, lambda *args: None)


class Small(models.EncoderDecoder):
    """The FCN with few layers, and dropout: it trains and saves at once."""

    def __init__(self, num_classes=21):
        encoder = models.down(3, 16), models.down(16, 32), nn.Dropout2d(0.1)
        decoder = models.up(32, 16), models.up(16, 16), nn.Conv2d(16, num_classes, kernel_size=1)
        super().__init__(nn.Sequential(*encoder), nn.Sequential(*decoder))


@pytest.fixture
def small(monkeypatch):
    """Make `Small` a model that scripts know by this name, where they run in this process."""
    monkeypatch.setitem(models.MODELS, "small", Small)


class Plain(nn.Module):
    """A network that is nothing but a module: no encoder, no decoder, no batch norm."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 3, padding=1)

    def forward(self, images):
        return self.conv(images)


class Process:
    """A script in a process of its own."""

    def __init__(self, script, *args, cwd, **environment):
        self.folder = tempfile.mkdtemp()
        self.outputs = [str(Path(self.folder, name)) for name in ("stdout", "stderr")]
        job = str(REPOSITORY / script), [str(arg) for arg in args], str(cwd), environment
        self.process = FORKS.Process(target=prefork.run, args=(*job, self.outputs))
        self.process.start()
        self.pid, self.is_alive = self.process.pid, self.process.is_alive

    def wait(self):
        """Wait for the process to end; return what subprocess.run would."""
        self.process.join()
        texts = [Path(path).read_text() for path in self.outputs]
        shutil.rmtree(self.folder)
        return subprocess.CompletedProcess([], self.process.exitcode, *texts)


def run_script(script, *args, cwd, **environment):
    """Run a script of the repository in a process of its own, in the folder `cwd`."""
    return Process(script, *args, cwd=cwd, **environment).wait()


def call(module, *args):
    """Call a script's main in this process, with a command line; return the exit status."""
    return module.main([str(arg) for arg in args])


def read_scores(folder):
    """Return what evaluate.py wrote to metrics.json."""
    return json.loads(Path(folder, "metrics.json").read_text())


def check(result):
    """Fail with the process's own words unless it succeeded; return what it printed."""
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def state_of(path):
    """Return what a checkpoint holds."""
    return torch.load(path, weights_only=True)


def same(a, b):
    """Return whether nested dictionaries and lists of tensors and plain values are alike, bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def read_rows(path):
    """Return the rows of a log.csv as dictionaries of numbers."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def looks_drawn(path, width, height):
    """Fail unless the file is a picture of at least that size that is not blank."""
    pixels = np.array(Image.open(path).convert("L"))
    assert pixels.shape[0] >= height and pixels.shape[1] >= width, pixels.shape
    assert pixels.std() > 10 and pixels[0, 0] == 255  # ink on a light background
