"""One run on two processes, against the same run on one; data that is decoded as it is needed."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, call, run_script, write_voc
from PIL import Image

import train
import utils

# Two things tell batches apart that are divided over processes: dropout, which the FCN has not,
# and batch norm, whose statistics are each process's own on the CPU. So it is left out here.
WITHOUT_BATCH_NORM = f"""
import sys
import torch
sys.path.insert(0, {str(REPOSITORY)!r})

class NoNorm(torch.nn.Identity):
    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = torch.ones(channels), torch.zeros(channels)

torch.nn.BatchNorm2d = NoNorm
import data, train, utils
utils.run(train.main, data.DataError)
"""


def train_without_batch_norm(folder, processes, *args):
    (folder / "train_.py").write_text(WITHOUT_BATCH_NORM)
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [sys.executable, *(start if processes > 1 else []), "train_.py", *map(str, args)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def read_rows(path):
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_two_processes_train_and_score_as_one_does(tmp_path):
    write_voc(tmp_path / "voc", {"train": 9, "val": 5})
    flags = ("--data", "voc", "--model", "fcn", "--size", 32, "--batch-size", 4, "--lr", 1e-5)
    flags += ("--class-weights", "enet", "--device", "cpu", "--no-amp")
    for processes in (1, 2):
        out = ("--epochs", 2, "--out", f"run-{processes}")
        result = train_without_batch_norm(tmp_path, processes, *flags, *out)
        assert result.returncode == 0, result.stderr
    assert ", 2 processes; run in run-2" in result.stdout
    assert result.stdout.count("epoch 1/2") == 1  # the first process alone prints
    one, two = (read_rows(tmp_path / f"run-{n}/log.csv") for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)
        assert a["val_mean_iou"] == b["val_mean_iou"]
        assert a["val_pixel_accuracy"] == b["val_pixel_accuracy"]
    # What two processes began, one goes on with.
    resumed = ("--resume", "run-2/last.pt", "--epochs", 3)
    result = train_without_batch_norm(tmp_path, 1, *resumed)
    assert result.returncode == 0, result.stderr
    assert len(read_rows(tmp_path / "run-2/log.csv")) == 3


def test_an_error_in_the_processes_ends_the_run_with_a_message(tmp_path):
    write_voc(tmp_path / "voc")
    flags = ("--data", "voc", "--size", 32, "--batch-size", 1, "--out", "run")
    result = train_without_batch_norm(tmp_path, 2, *flags, "--model", "fcn", "--device", "cpu")
    assert result.returncode != 0 and not (tmp_path / "run").exists()
    assert "train_.py: error: " in result.stderr


def test_streamed_data_trains_to_the_same_weights(voc, tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    flags = ("--data", voc, "--model", "fcn", "--size", 32, "--batch-size", 2, "--augment")
    flags += ("--class-weights", "--epochs", 2, "--device", "cpu", "--workers", 2)
    for choice in ("yes", "no"):
        call(train, *flags, "--data-in-memory", choice, "--out", choice)
    kept, streamed = (utils.load_checkpoint(f"{choice}/last.pt") for choice in ("yes", "no"))
    for name, tensor in kept["state_dict"].items():
        assert torch.equal(tensor, streamed["state_dict"][name])
    for a, b in zip(kept["history"], streamed["history"], strict=True):
        assert a["val_loss"] == b["val_loss"] and a["val_mean_iou"] == b["val_mean_iou"]


def test_a_bad_file_that_a_worker_process_meets_is_one_line(voc, tmp_path):
    path = voc / "VOCdevkit/VOC2007/SegmentationClass/train_1.png"
    Image.new("L", Image.open(path).size, 77).save(path)
    flags = ("--data", voc, "--model", "fcn", "--size", 32, "--batch-size", 2, "--device", "cpu")
    flags += ("--data-in-memory", "no", "--epochs", 3, "--out", "run")
    result = run_script("train.py", *flags, cwd=tmp_path)
    assert result.returncode == 2
    said = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(said) == 1 and said[0].startswith(f"train.py: error: {path}: has the values 77")
    assert not Path(tmp_path, "run/last.pt").exists()
