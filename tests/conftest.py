"""Tiny VOC-layout folders, and the scripts run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data

REPOSITORY = Path(__file__).resolve().parent.parent
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


@pytest.fixture
def voc(tmp_path):
    """A folder that holds VOCdevkit/VOC2007 with 5 train and 3 val images."""
    write_voc(tmp_path / "voc" / "VOCdevkit" / "VOC2007")
    return tmp_path / "voc"


def run_script(script, *args, cwd, **environment):
    """Run a script of the repository in a process of its own, in the folder `cwd`."""
    return subprocess.run(
        [sys.executable, REPOSITORY / script, *map(str, args)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def call(module, *args):
    """Call a script's main in this process, with the arguments of a command line."""
    module.main([str(arg) for arg in args])


def check(result):
    """Fail with the process's own words unless it succeeded; return what it printed."""
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
