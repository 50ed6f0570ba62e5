"""Tiny VOC-layout folders, and the scripts run as a user runs them."""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # on tensors as small as these, threads only wait
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import evaluate
import models
import utils

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_VOC = os.environ.get("VOC_ROOT")
torch.backends.mps.is_available = cache(lambda: False)  # as in prefork.py


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


@pytest.fixture
def voc(tmp_path):
    """A folder that holds VOCdevkit/VOC2007 with 5 train and 3 val images."""
    write_voc(tmp_path / "voc" / "VOCdevkit" / "VOC2007")
    return tmp_path / "voc"


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the figures at the end of a run in this process: they take longer than it."""
    for module, name in (
        (utils, "curves"),
        (utils, "samples"),
        (evaluate, "draw_confusion_matrix"),
        (evaluate, "draw_class_iou"),
    ):
        monkeypatch.setattr(module, name, lambda *args: None)


class Small(models.EncoderDecoder):
    """The FCN with few layers, and dropout: it trains and saves at once.

    For tests of what is alike for all networks.
    """

    def __init__(self, num_classes=21):
        encoder = models.down(3, 16), models.down(16, 32), nn.Dropout2d(0.1)
        decoder = models.up(32, 16), models.up(16, 16), nn.Conv2d(16, num_classes, kernel_size=1)
        super().__init__(nn.Sequential(*encoder), nn.Sequential(*decoder))


@pytest.fixture
def small(monkeypatch):
    """Make `Small` a model that scripts know by this name, where they run in this process."""
    monkeypatch.setitem(models.MODELS, "small", Small)


class Process:
    """A script in a process of its own, forked by tests/prefork.py."""

    server = None

    def __init__(self, script, *args, cwd, **environment):
        if not Process.server:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            command = [sys.executable, REPOSITORY / "tests" / "prefork.py"]
            Process.server = subprocess.Popen(command, **pipes)
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = {name: Path(self.folder.name, name) for name in ("stdout", "stderr")}
        job = {name: str(path) for name, path in self.outputs.items()}
        job |= {"script": str(REPOSITORY / script), "args": [str(arg) for arg in args]}
        job |= {"cwd": str(cwd), "env": environment}
        self.pid = self.ask(job)

    def ask(self, question):
        """Send the server a line, and return its answer."""
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def alive(self):
        """Return whether the process still runs."""
        return self.ask({"pid": self.pid, "wait": False}) is None

    def wait(self):
        """Wait for the process to end; return what subprocess.run would."""
        status = self.ask({"pid": self.pid, "wait": True})
        texts = {name: path.read_text() for name, path in self.outputs.items()}
        self.folder.cleanup()
        return subprocess.CompletedProcess([], status, **texts)


@pytest.fixture(scope="session", autouse=True)
def _end_server():
    yield
    if Process.server:
        Process.server.stdin.close()
        Process.server.wait()


def run_script(script, *args, cwd, **environment):
    """Run a script of the repository in a process of its own, in the folder `cwd`."""
    return Process(script, *args, cwd=cwd, **environment).wait()


def fake_cuda():
    """Return whether PyTorch can make fake CUDA tensors on this machine; older versions need a GPU."""
    try:
        with FakeTensorMode():
            torch.empty(2, device="cuda").uniform_() - 1.0
        return True
    except (RuntimeError, AssertionError):
        return False


def call(module, *args):
    """Call a script's main in this process, with a command line; return the exit status."""
    return module.main([str(arg) for arg in args])


def check(result):
    """Fail with the process's own words unless it succeeded; return what it printed."""
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
