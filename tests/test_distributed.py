"""One run in several processes, as torchrun starts them, against the same run in one."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, Process, write_voc
from test_download import archives  # noqa: F401, a fixture
from torchvision.datasets import voc as torchvision_voc

import utils

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
# Saving last.pt takes two seconds, and says when it begins.
SLOW_SAVING = """
import time, pathlib, utils
save = utils.save_checkpoint
def slow(path, checkpoint):
    if path.name == "last.pt" and checkpoint["unfinished_epoch"]["step"]:
        pathlib.Path("saving").touch()
        time.sleep(2)
    save(path, checkpoint)
utils.save_checkpoint = slow
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


def read_rows(path):
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def flags(*more):
    common = ("--data", "voc", "--model", "tiny", "--size", 32, "--device", "cpu", "--no-amp")
    return (*common, *more)


def wait_for(path, processes):
    while not path.exists() and all(process.alive() for process in processes):
        time.sleep(0.01)


def test_two_processes_train_and_score_as_one_does(tmp_path):
    write_voc(tmp_path / "voc", {"train": 9, "val": 5})
    args = flags("--batch-size", 4, "--lr", 1e-5, "--class-weights", "enet", "--epochs", 2)
    for processes in (1, 2):
        out = ("--out", f"run-{processes}")
        started = start(tmp_path, processes, *args, *out)
        results = [process.wait() for process in started]
        assert [result.returncode for result in results] == [0] * processes, results[0].stderr
    # The first process alone prints.
    assert "2 x cpu" in results[0].stdout and "run in run-2" in results[0].stdout
    assert results[0].stdout.count("epoch 1/2") == 1 and results[1].stdout == ""
    one, two = (read_rows(tmp_path / f"run-{n}/log.csv") for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)
        assert a["val_mean_iou"] == b["val_mean_iou"]
        assert a["val_pixel_accuracy"] == b["val_pixel_accuracy"]
    # What two processes began, one goes on with.
    args = ("--resume", "run-2/last.pt", "--epochs", 3)
    (process,) = start(tmp_path, 1, *args)
    result = process.wait()
    assert result.returncode == 0, result.stderr
    assert len(read_rows(tmp_path / "run-2/log.csv")) == 3


def test_torchrun_itself_hands_a_signal_on_and_the_run_is_saved(tmp_path):
    write_voc(tmp_path / "voc", {"train": 40, "val": 2})
    write_script(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    args = flags("--batch-size", 4, "--epochs", 500, "--out", "run")
    torchrun = subprocess.Popen(
        [*command, "train_.py", *map(str, args)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "run/log.csv").exists() and torchrun.poll() is None:
        time.sleep(0.05)
    torchrun.terminate()
    printed, errors = torchrun.communicate()
    assert "stopped; go on with  python train.py --resume run/last.pt" in printed, errors
    assert utils.load_checkpoint(tmp_path / "run/last.pt")["history"]


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_process_ends_all_after_the_step_and_the_save(tmp_path, told):
    """Without --out, so that only the first process knows the folder; in the middle of saving too."""
    write_voc(tmp_path / "voc", {"train": 40, "val": 2})
    args = flags("--batch-size", 4, "--epochs", 500)
    processes = start(tmp_path, 2, *args, change=SLOW_SAVING)
    wait_for(tmp_path / "runs/tiny/log.csv", processes)
    os.kill(processes[told].pid, signal.SIGTERM)
    wait_for(tmp_path / "saving", processes)
    os.kill(processes[1 - told].pid, signal.SIGTERM)  # in the middle of saving
    results = [process.wait() for process in processes]
    assert [result.returncode for result in results] == [143, 143], results[0].stderr
    assert [result.stderr for result in results] == ["", ""]
    last = utils.load_checkpoint(tmp_path / "runs/tiny/last.pt")
    assert 1 <= last["unfinished_epoch"]["step"] <= 10 and last["history"]


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
    processes = start(tmp_path, 2, *flags("--batch-size", 1, "--out", "run"))
    results = [process.wait() for process in processes]
    assert [result.returncode for result in results] == [2, 2]
    assert not (tmp_path / "run").exists()
    for result in results:
        assert result.stderr == "train_.py: error: --batch-size is 1 for 2 processes\n"


def test_data_that_is_not_there_is_one_line_of_each_process(tmp_path):
    processes = start(tmp_path, 2, "--data", "nowhere", "--device", "cpu")
    for result in [process.wait() for process in processes]:
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert "nowhere: No such file or directory; give --data" in result.stderr
