"""One run in several processes, as torchrun starts them, against the same run in one."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, Process, read_rows, state_of, write_voc
from test_download import archives  # noqa: F401, a fixture
from torchvision.datasets import voc as torchvision_voc

import train

# A small network, without the two things that tell batches apart which are divided over processes:
# dropout, and batch norm, whose statistics are each process's own on the CPU. No figures, which
# would take longer than the training.
TINY = """
import models, utils
from torch import nn

utils.curves = utils.samples = lambda *args: None

def tiny(num_classes):
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, num_classes, 3, padding=1)
    return nn.Sequential(*layers)

models.MODELS["tiny"] = tiny
"""
# A network with a layer that it does not use.
UNUSED = """
class Unused(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.used, self.unused = tiny(num_classes), nn.Conv2d(3, 3, 1)

    def forward(self, images):
        return self.used(images)

models.MODELS["tiny"] = Unused
"""
# VOC's archive comes from a server on this machine.
LOCAL_ARCHIVE = """
import json, pathlib
from torchvision.datasets import voc
import data
voc.DATASET_YEAR_DICT["2007"] = json.load(open("entry.json"))
data.DOWNLOADS = pathlib.Path("data").resolve()
"""


def write_script(folder, change=""):
    """Write train_.py, which is train.py with the small network and another change."""
    (folder / "train_.py").write_text(
        f"import sys, torch\nsys.path.insert(0, {str(REPOSITORY)!r})\n{TINY}{change}\n"
        "import data, train, utils\nutils.cli(train.main, data.DataError)\n"
    )


def start(folder, processes, *args, change=""):
    """Start a changed train.py in several processes, with the environment that torchrun gives them."""
    write_script(folder, change)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Process(
            folder / "train_.py", *args, cwd=folder,
            **(common | {"RANK": str(n), "LOCAL_RANK": str(n)} if processes > 1 else {}),
        )
        for n in range(processes)
    ]  # fmt: skip


def flags(*more):
    common = (
        "--data",
        "voc",
        "--model",
        "tiny",
        "--size",
        32,
        "--device",
        "cpu",
        "--precision",
        "float32",
    )
    return (*common, *more)


def finish(processes):
    """Wait for processes that should succeed; return what they printed."""
    results = [process.wait() for process in processes]
    assert [result.returncode for result in results] == [0] * len(results), results[0].stderr
    return [result.stdout for result in results]


def test_two_processes_train_and_score_as_one_does(tmp_path):
    write_voc(tmp_path / "voc", {"train": 9, "val": 5})
    args = flags("--batch-size", 4, "--lr", 1e-5, "--epochs", 2)
    (alone,) = finish(start(tmp_path, 1, *args, "--out", "run-1"))
    first, second = finish(start(tmp_path, 2, *args, "--out", "run-2"))
    # The first process alone prints.
    assert "1 x cpu" in alone and "2 x cpu" in first and "run in run-2" in first and second == ""
    assert first.count("epoch 1/2") == 1
    one, two = (read_rows(tmp_path / f"run-{n}/log.csv") for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)
        assert a["val_mean_iou"] == b["val_mean_iou"]
        assert a["val_pixel_accuracy"] == b["val_pixel_accuracy"]
    # The gradients were averaged: the weights are those of the whole batches.
    one, two = (state_of(f"run-{n}/last.pt") for n in (1, 2))
    for name, value in one["trained"].items():
        torch.testing.assert_close(two["trained"][name], value, rtol=1e-3, atol=1e-6)
    # What two processes began, one goes on with.
    finish(start(tmp_path, 1, "--resume", "run-2/last.pt", "--epochs", 3))
    assert len(read_rows(tmp_path / "run-2/log.csv")) == 3


def test_class_weights_and_unused_layers_do_no_harm(tmp_path):
    write_voc(tmp_path / "voc", {"train": 4, "val": 1})
    args = flags("--batch-size", 2, "--epochs", 2, "--class-weights", "--out", "run")
    first, second = finish(start(tmp_path, 2, *args, change=UNUSED))
    assert "epoch 2/2" in first and second == ""
    assert len(read_rows("run/log.csv")) == 2


def test_torchrun_itself_trains_one_run(tmp_path):
    write_voc(tmp_path / "voc", {"train": 4, "val": 2})
    write_script(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    args = map(str, flags("--batch-size", 4, "--epochs", 2))
    result = subprocess.run(
        [*command, "train_.py", *args], check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert os.listdir("runs") == ["tiny"] and len(read_rows("runs/tiny/log.csv")) == 2
    assert result.stdout.count("best: epoch") == 1


@pytest.mark.parametrize("left_out", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_only_all_three_variables_are_taken_for_torchrun(monkeypatch, left_out):
    """A Slurm job or a notebook may have one of them."""
    for name in {"RANK", "WORLD_SIZE", "LOCAL_RANK"} - {left_out}:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    with train.process_group("cpu") as joined:
        assert joined == (torch.device("cpu"), 0, 1)


def test_the_first_of_three_processes_downloads_and_the_others_wait(archives):  # noqa: F811
    (archives / "entry.json").write_text(json.dumps(torchvision_voc.DATASET_YEAR_DICT["2007"]))
    args = ("--data", "voc2007", "--model", "fcn", "--size", 64, "--epochs", 1, "--out", "run")
    args += ("--device", "cpu")
    processes = start(archives, 3, *args, change=LOCAL_ARCHIVE)
    results = [process.wait() for process in processes]
    # A set of two images is too small for three processes, which is found after the download.
    assert [result.returncode for result in results] == [2] * 3
    assert "".join(result.stdout for result in results).count("downloading") == 1
    errors = "".join(result.stderr for result in results)
    assert errors.count("--batch-size is 2 for 3 processes") == 3
    names = (archives / "data/VOCdevkit/VOC2007/ImageSets/Segmentation/train.txt").read_text()
    for name in names.split():
        assert (archives / f"data/VOCdevkit/VOC2007/JPEGImages/{name}.jpg").exists()


def test_an_error_in_a_process_is_one_line(tmp_path):
    write_voc(tmp_path / "voc")
    cases = {"--batch-size 1": "--batch-size is 1 for 2 processes"}
    cases["--patience 3"] = "--patience is for one process: only the first one validates"
    for typed, said in cases.items():
        processes = start(tmp_path, 2, *flags(*typed.split(), "--out", "run"))
        results = [process.wait() for process in processes]
        assert [result.returncode for result in results] == [2, 2]
        assert [r.stderr for r in results] == [f"train_.py: error: {said}\n"] * 2
    assert not (tmp_path / "run").exists()
