"""train.py: its command line, its arithmetic against PyTorch's own, what a run leaves behind."""

import copy
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, call, check, fake_cuda, run_script, write_voc
from PIL import Image
from test_data import KINDS, write_folder
from test_models import published_file, random_encoder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet34

import data
import evaluate
import models
import predict
import train
import utils

RESULTS = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
COLUMNS = [
    "epoch",
    "lr",
    "train_loss",
    "val_loss",
    "val_mean_iou",
    "val_pixel_accuracy",
    "images_per_second",
    "seconds",
    "size",
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch, no_pictures, small):
    monkeypatch.chdir(tmp_path)


def quick_train(*args, name="run", epochs=2):
    settings = ("--epochs", epochs, "--size", 32, "--batch-size", 2, "--device", "cpu")
    call(train, *settings, "--out", name, *args)


def state_of(path):
    return torch.load(path, weights_only=True)


def same_weights(a, b):
    """Compare weights bit for bit; batch norm's counters, which nothing reads, are left out."""
    return all(
        torch.equal(x, b["state_dict"][name])
        for name, x in a["state_dict"].items()
        if not name.endswith("num_batches_tracked")
    )


# ------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("model", ["fcn", "darrennet"])
def test_a_run_leaves_what_it_should(tmp_path, voc, model):
    flags = ("--augment", "--cosine", "--class-weights", "--size", 32, "--batch-size", 2)
    settings = ("--model", model, "--data", voc, "--epochs", 2, "--out", "run", *flags)
    printed = check(run_script("train.py", *settings, cwd=tmp_path))
    assert "best: epoch" in printed and "evaluate.py run/best.pt" in printed
    with open("run/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS and [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[0]["lr"]) == 1e-3 and float(rows[1]["lr"]) == pytest.approx(5e-4)
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())
    for picture in ("curves.png", "samples.png"):
        pixels = np.array(Image.open(f"run/{picture}").convert("L"))
        assert min(pixels.shape) > 300 and pixels.std() > 10
    best = state_of("run/best.pt")
    assert best["model"] == model and len(best["classes"]) == len(best["palette"]) == 21
    assert best["size"] == 32 and "optimizer" not in best
    assert best["metrics"]["val_mean_iou"] == max(float(row["val_mean_iou"]) for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_the_labelling_tools_train_score_and_predict(tmp_path, kind):
    write_folder(tmp_path / "own", kind)
    quick_train("--model", "small", "--data", "own", epochs=1)
    call(evaluate, "run/best.pt", "--out", "scores")
    metrics = json.loads(Path("scores/metrics.json").read_text())
    assert [name.strip("_") for name in metrics["iou"]] == ["background", "cat", "dog"]
    image = next(path for path in (tmp_path / "own").rglob("a1.jpg"))
    call(predict, image, "--checkpoint", "run/best.pt")
    mask = Image.open("predictions/a1_mask.png")
    assert mask.size == (42, 40) and np.array(mask).max() <= 2
    cats = [250, 50, 10] if kind.startswith("cvat") else [128, 0, 0]
    assert mask.getpalette()[3:6] == cats


def test_same_seed_same_weights(voc):
    flags = ("--model", "darrennet", "--data", voc, "--augment", "--cosine")
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        quick_train(*flags, "--seed", seed, name=name, epochs=1)
    one, two, other = (state_of(f"{name}/last.pt") for name in ("one", "two", "other"))
    assert same_weights(one, two) and not same_weights(one, other)


def test_resume_needs_no_flags_and_ends_with_the_same_weights(tmp_path, voc):
    flags = ("--model", "darrennet", "--data", voc, "--augment", "--seed", 3)
    quick_train(*flags, name="runs/whole", epochs=3)
    quick_train(*flags, name="runs/halves", epochs=1)
    refused = run_script("train.py", *flags, "--out", "runs/halves", cwd=tmp_path)
    assert refused.returncode == 2 and "runs/halves/last.pt: is of another run" in refused.stderr
    torch.manual_seed(99)  # what the process did before must not matter
    call(train, "--resume", "--epochs", 3)  # the newest run
    whole, halves = (state_of(f"runs/{name}/last.pt") for name in ("whole", "halves"))
    assert same_weights(whole, halves)
    assert [row["epoch"] for row in halves["history"]] == [1, 2, 3]
    assert len(Path("runs/halves/log.csv").read_text().splitlines()) == 4


def test_runs_are_numbered_and_the_newest_is_the_default(voc, capsys):
    settings = ("--model", "small", "--data", voc, "--epochs", 1, "--size", 32, "--batch-size", 2)
    for _ in range(2):
        call(train, *settings)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["small", "small-2"]
    call(evaluate)
    assert "runs/small-2/best.pt" in capsys.readouterr().out


def test_the_newest_run_is_the_one_that_was_trained_last(capsys):
    for name, second in (("old/best.pt", 1), ("old/last.pt", 4), ("new/best.pt", 2)):
        path = Path("runs", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (second, second))
    assert utils.find_checkpoint(None) == Path("runs/old/best.pt")  # it was gone on with
    assert utils.find_checkpoint(None, "last.pt") == Path("runs/old/last.pt")
    Path("runs/stopped").mkdir()
    Path("runs/stopped/last.pt").touch()  # in its first epoch: there is no best.pt
    assert utils.find_checkpoint(None, fallback=Path("w.pt")) == Path("runs/stopped/best.pt")


def test_commands_to_paste_are_quoted_and_a_jump_of_the_rate_is_said(voc, capsys):
    quick_train("--data", voc, "--model", "small", "--cosine", name="my run", epochs=1)
    assert 'python evaluate.py "my run/best.pt"\n' in capsys.readouterr().out
    call(train, "--resume", "my run", "--epochs", 2)
    assert "annealed over 2 epochs now, so it jumps" in capsys.readouterr().out


def test_a_loss_that_is_not_a_number_stops_the_run(voc, monkeypatch):
    quick_train("--model", "small", "--data", voc, epochs=1)
    before = Path("run/last.pt").read_bytes()
    monkeypatch.setattr(data, "normalize", lambda images: images * float("nan"))
    with pytest.raises(utils.UserError, match=r"epoch 2/3: .* is not finite \(loss nan.*--lr"):
        call(train, "--resume", "run/last.pt", "--epochs", 3)
    # Nor is it kept by who stops the run because of it, in an epoch of which only a weight is left.
    train_one_epoch = train.train_one_epoch

    def broken(run, epoch):
        run.caught[signal.SIGINT] = 0.0
        train_one_epoch(run, epoch)
        run.loss = 1.0

    monkeypatch.setattr(train, "train_one_epoch", broken)
    with pytest.raises(utils.UserError, match="epoch 2/3: a loss or a weight is not .*nothing"):
        call(train, "--resume", "run/last.pt", "--epochs", 3)
    assert Path("run/last.pt").read_bytes() == before


# ------------------------------------------------------------------------- the paper's set-ups


def results_table():
    """Return {row's name: the command line's flags} from the table of docs/results.md."""
    rows = re.findall(r"^\| (.+?) \| `python train.py (.+?)` \|", RESULTS, flags=re.MULTILINE)
    return {name: flags.split() for name, flags in rows}


@pytest.fixture(scope="session")
def trained_encoders(tmp_path_factory):
    """A TORCH_HOME with a ResNet34 in it, and an ERFNet encoder, under their published names."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(1)
    torch.save(resnet34().state_dict(), folder / "hub/checkpoints/resnet34-b627a593.pth")
    torch.save(
        published_file(random_encoder(), "imagenet"), folder / "erfnet_encoder_pretrained.pth.tar"
    )
    return folder


# One row for each network, and ERFNet's encoder: the other rows differ in flags that other tests try.
ROWS = {
    (flags[flags.index("--model") + 1], "--encoder-weights" in flags): name
    for name, flags in results_table().items()
}


def save_nothing(run):
    """Leave an empty last.pt: with the optimizer of a large network it takes longer than all else."""
    (run.out / "last.pt").touch()


@pytest.mark.parametrize("name", ROWS.values())
def test_a_row_of_each_network_trains_scores_and_predicts(
    name, voc, trained_encoders, monkeypatch, capsys
):
    monkeypatch.setenv("TORCH_HOME", str(trained_encoders))
    monkeypatch.chdir(trained_encoders)  # where the row of ERFNet's encoder names its file
    flags = results_table()[name]
    run = voc / "run"
    monkeypatch.setattr(train, "save_last", save_nothing)
    call(train, *flags, "--data", voc, "--epochs", 1, "--size", 32, "--out", run)
    assert ("erfnet" in name.lower()) == (
        "226 tensors loaded; left out: module" in capsys.readouterr().out
    )
    # From here on the checkpoint is enough: nothing is looked up or downloaded again.
    monkeypatch.setenv("TORCH_HOME", str(voc))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    call(evaluate, run / "best.pt", "--void-as-background", "--out", run / "scores")
    metrics = json.loads((run / "scores/metrics.json").read_text())
    assert 0 <= metrics["mean_iou"] < 1 and 0 < metrics["pixel_accuracy"] < 1
    image = voc / "VOCdevkit/VOC2007/JPEGImages/val_0.jpg"
    call(predict, image, "--checkpoint", run / "best.pt", "--out", run)
    assert Image.open(run / "val_0_mask.png").size == Image.open(image).size


def test_the_results_have_a_row_for_each_result_of_the_paper():
    assert len(results_table()) == 18
    for flags in results_table().values():
        train.make_parser().parse_args(flags)
    named = {flags[flags.index("--model") + 1] for flags in results_table().values()}
    assert named | {"small"} == set(models.MODELS)


def test_the_script_of_the_results_runs_each_row_that_has_results(tmp_path):
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "$@" >> commands.txt\n')
    stub.chmod(0o755)
    path = f"{stub.parent}:{os.environ['PATH']}"
    script = ["sh", str(REPOSITORY / "docs" / "results.sh"), "VOC"]
    subprocess.run(script, check=True, env=os.environ | {"PATH": path})
    commands = [line.split() for line in Path("commands.txt").read_text().splitlines()]
    trained = [flags for name, *flags in commands if name == "train.py"]
    scored = [flags for name, *flags in commands if name == "evaluate.py"]
    for flags in trained:
        args = train.make_parser().parse_args(flags)
        assert args.data == "VOC"
        ways = [score[3:] for score in scored if score[0] == str(args.out / "best.pt")]
        assert ways == [
            ["--split", split, *protocol]
            for split in ("val", "test")
            for protocol in (["--void-as-background"], [])
        ]
    for name, flags in results_table().items():
        row = next(line for line in RESULTS.splitlines() if line.startswith(f"| {name} |"))
        in_script = [*flags, "--data"] in [line[: len(flags) + 1] for line in trained]
        assert in_script != row.endswith("| not run | not run |")


def test_pretrained_encoders_start_from_torchvisions_file(voc, trained_encoders, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(trained_encoders))
    monkeypatch.setattr(train, "save_last", save_nothing)
    quick_train("--model", "resnet34_fcn", "--data", voc, "--lr", 0, epochs=1)
    weights = torch.load(trained_encoders / "hub/checkpoints/resnet34-b627a593.pth")
    state = state_of("run/best.pt")["state_dict"]
    # With a learning rate of 0 it is still what the file has after an epoch.
    assert torch.equal(state["encoder.stem.0.weight"], weights["conv1.weight"])
    for name in ("0.conv1.weight", "1.bn2.weight"):
        assert torch.equal(state[f"encoder.layers.3.{name}"], weights[f"layer4.{name}"])
    assert not (state["decoder.0.2.running_mean"] == 0).all()


def test_without_network_the_error_says_where_the_weights_go(tmp_path, voc):
    settings = ("--model", "resnet34_unet", "--data", voc, "--size", 32, "--out", "run")
    nowhere = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path / "home")}
    result = run_script("train.py", *settings, cwd=tmp_path, **nowhere)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    said = result.stderr.splitlines()[-1]
    assert str(tmp_path / "home/hub/checkpoints/resnet34-b627a593.pth") in said
    assert "--no-pretrained" in said and not (tmp_path / "run").exists()


def test_encoder_weights_of_another_network_are_refused(tmp_path, voc):
    quick_train("--model", "small", "--data", voc, epochs=1)
    flags = ("--model", "darrennet", "--data", voc, "--encoder-weights", "run/best.pt")
    result = run_script("train.py", *flags, "--out", "other", cwd=tmp_path)
    assert result.returncode == 2 and not Path("other").exists()
    assert "run/best.pt: none of its tensors fits the model" in result.stderr
    torch.save({1: torch.zeros(2)}, "numbers.pt")
    with pytest.raises(utils.UserError, match="numbers.pt: .*; it is not for small"):
        quick_train("--model", "small", "--data", voc, "--encoder-weights", "numbers.pt")


def test_images_that_the_encoder_weights_learned_from_are_said(voc, capsys):
    flags, said = ("--model", "small", "--data", voc), "names of some learned from"
    quick_train(*flags, "--train-split", "val", "--val-split", "train", name="first", epochs=1)
    quick_train(*flags, "--encoder-weights", "first/last.pt", name="second", epochs=1)
    assert capsys.readouterr().out.count(f"3 validation images have {said}") == 1
    # A third network learned from them by way of the second, and still does when it goes on.
    quick_train(*flags, "--encoder-weights", "second/best.pt", name="third", epochs=1)
    assert said in capsys.readouterr().out
    call(train, "--resume", "third", "--epochs", 2)
    assert said not in capsys.readouterr().out
    call(evaluate, "third/last.pt")
    assert "was trained on 3 of these 3 images" in capsys.readouterr().out
    quick_train(*flags, name="fourth", epochs=1)
    quick_train(*flags, "--encoder-weights", "fourth/best.pt", name="fifth", epochs=1)
    call(evaluate, "fifth")
    out = capsys.readouterr().out
    assert said not in out and "was trained on" not in out


def test_a_run_of_a_network_that_is_gone_says_so(voc, monkeypatch):
    quick_train("--model", "small", "--data", voc, epochs=1)
    monkeypatch.delitem(models.MODELS, "small")
    with pytest.raises(models.ModelError, match="no model is called 'small'; choose from fcn"):
        call(train, "--resume", "run", "--epochs", 2)


# ------------------------------------------------------------------------- the arithmetic


def test_cosine_is_pytorchs_annealing_by_the_step(voc):
    quick_train("--model", "small", "--data", voc, "--cosine", "--lr", 0.01, epochs=3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.01)
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3 * (5 // 2))
    with open("run/log.csv", newline="") as file:
        for row in csv.DictReader(file):
            assert float(row["lr"]) == pytest.approx(expected.get_last_lr()[0])
            for _ in range(5 // 2):
                optimizer.step()
                expected.step()
    (group,) = state_of("run/last.pt")["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.01 * (1 + np.cos(np.pi * 5 / 6)) / 2)
    assert group["weight_decay"] == 0.05


def test_steps_take_the_transform_the_weights_and_the_rate_that_were_asked_for(voc, monkeypatch):
    modes, weights, rates = [], [], []
    augment, criterion = data.augment, train.criterion

    class Recording(torch.optim.AdamW):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    def recording_augment(images, masks, mode, size):
        modes.append(mode)
        return augment(images, masks, mode, size)

    def recording_criterion(logits, masks, class_weights):
        weights.append(class_weights)
        return criterion(logits, masks, class_weights)

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    monkeypatch.setattr(data, "augment", recording_augment)
    monkeypatch.setattr(train, "criterion", recording_criterion)
    flags = ("--augment", "flip", "--class-weights", "median", "--cosine", "--lr", 0.01)
    quick_train("--model", "small", "--data", voc, *flags)
    assert modes == ["flip"] * 4  # two epochs of two batches
    assert rates == pytest.approx([0.005 * (1 + np.cos(np.pi * step / 4)) for step in range(4)])
    expected = data.class_weights(data.VOC(voc, "train", 32), "median")
    assert len(expected.unique()) > 5 and all(torch.equal(each, expected) for each in weights)


def test_the_average_follows_the_weights_for_as_long_as_it_should():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.BatchNorm1d(2))
    average = copy.deepcopy(model)
    generator, expected = torch.Generator().manual_seed(0), 0
    for step in range(200):
        drawn = torch.randn(3, 2, generator=generator)
        with torch.no_grad():
            model[0].weight.copy_(drawn[:2])
            model[1].running_mean.copy_(drawn[2])
        utils.update_average(average, model, step, 0.9)
        # The share of what has been so far: none at first, then as if ten steps were before it.
        decay = min(0.9, step / (step + 10))
        expected = decay * expected + (1 - decay) * drawn.numpy()
    kept = average.state_dict()
    assert np.allclose(kept["0.weight"], expected[:2], atol=1e-6)
    assert np.allclose(kept["1.running_mean"], expected[2], atol=1e-6)


def test_the_average_is_what_is_scored_and_kept(voc):
    quick_train("--model", "small", "--data", voc, "--no-amp", "--lr", 0.01, name="averaged")
    last = state_of("averaged/last.pt")
    dataset = data.VOC(voc, "val", size=32)
    losses = []
    for weights in (last["state_dict"], last["trained"]):
        model = models.from_checkpoint(last | {"state_dict": weights})
        with torch.inference_mode():
            logits = model(data.normalize(dataset.images))
        labels = dataset.masks.long()
        losses.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=255).item())
    logged = last["history"][-1]["val_loss"]
    assert logged == pytest.approx(losses[0], rel=1e-5)
    assert logged != pytest.approx(losses[1], rel=1e-4)
    flags = ("--no-amp", "--lr", 0.01, "--ema", 0)
    quick_train("--model", "small", "--data", voc, *flags, name="plain")
    assert same_weights(state_of("plain/last.pt"), {"state_dict": last["trained"]})


def test_images_grow_and_cosine_annealing_starts_anew_with_each_size(voc, monkeypatch):
    seen, normalize = [], data.normalize
    monkeypatch.setattr(data, "normalize", lambda x: (seen.append(x.shape[-1]), normalize(x))[1])
    monkeypatch.setitem(models.MODELS, "plain", Plain)
    flags = ("--model", "plain", "--data", voc, "--augment", "--cosine", "--batch-size", 2)
    call(train, *flags, "--size", 224, "--epochs", 32, "--out", "run")
    with open("run/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = [int(row["size"]) for row in rows]
    assert sizes == [64] * 20 + [128] * 11 + [224]
    # An epoch is two batches of the five images; validation takes three in two.
    assert seen[: 4 * 32] == [size for size in sizes for _ in range(4)]
    for part, lr in ((rows[:20], 2e-3), (rows[20:31], 1e-3), (rows[31:], 2e-3 * 64 / 224)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
        expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(part))
        for row in part:
            assert float(row["lr"]) == pytest.approx(expected.get_last_lr()[0])
            optimizer.step()
            expected.step()
    best = state_of("run/best.pt")
    assert best["size"] == sizes[best["epoch"] - 1]


def test_a_run_that_goes_on_for_more_epochs_keeps_the_size_it_has_come_to(voc):
    flags = ("--model", "small", "--data", voc, "--progressive", "--size", 96)
    quick_train(*flags, epochs=2)
    call(train, "--resume", "run/last.pt", "--epochs", 4)
    assert [row["size"] for row in state_of("run/last.pt")["history"]] == [64, 96, 96, 96]


def test_a_run_made_longer_has_the_rate_and_the_time_of_its_size(voc, capsys):
    flags = ("--model", "small", "--data", voc, "--progressive", "--size", 96, "--cosine")
    quick_train(*flags, epochs=3)
    call(train, "--resume", "run", "--epochs", 6)
    last = state_of("run/last.pt")
    # Planned for 64x64 are five of six epochs; from the third on images have 96x96.
    for row in last["history"][3:5]:
        annealed = (1 + np.cos(np.pi * (row["epoch"] - 1) / 5)) / 2
        assert row["size"] == 96 and row["lr"] == pytest.approx(2e-3 * annealed * 64 / 96)
    args = train.make_parser().parse_args(["--progressive", "--size", "96", "--epochs", "32"])
    row = last["history"][3] | {"seconds": 10}
    train.report(SimpleNamespace(args=args, history=[row], rank=1), torch.eye(2))
    assert "epoch 4/32" in (said := capsys.readouterr().out) and "4 min 40 s left" in said


def test_a_full_gpus_run_goes_on_with_a_smaller_batch(voc):
    quick_train("--model", "small", "--data", voc, epochs=1)
    call(train, "--resume", "run", "--epochs", 2, "--batch-size", 3)
    steps = {
        state["step"].item() for state in state_of("run/last.pt")["optimizer"]["state"].values()
    }
    assert steps == {2 + 1}


def test_a_run_that_was_stopped_at_a_size_keeps_it_when_it_goes_on_for_more_epochs(voc):
    quick_train("--model", "small", "--data", voc, "--progressive", "--size", 96, epochs=1)
    last = state_of("run/last.pt")
    assert last["size"] == 96  # of three epochs the first has 64
    last |= {"history": [], "unfinished_epoch": {"step": 1, "loss": 2.5}}
    utils.save_checkpoint("run/last.pt", last)
    call(train, "--resume", "run", "--epochs", 3)
    assert [row["size"] for row in state_of("run/last.pt")["history"]] == [96, 96, 96]


@pytest.mark.parametrize(
    ("flags", "progressive", "epochs", "batch", "lr", "decay"),
    [
        (("--augment",), True, 800, 16, 2e-3, 0.2),
        (("--augment", "--size", 64), False, 100, 16, 1e-3, 0.05),  # no smaller size is of use
        (("--augment", "--no-progressive"), False, 100, 16, 1e-3, 0.05),
        (("--augment", "--model", "resnet34_fcn", "--no-pretrained"), True, 800, 16, 2e-3, 0.2),
        (("--augment", "flip"), False, 100, 16, 1e-3, 0.05),
        (("--progressive",), True, 800, 16, 2e-3, 0.2),
        (("--progressive", "--epochs", 7, "--batch-size", 3), True, 7, 3, 2e-3, 0.2),
        (("--progressive", "--lr", 0, "--weight-decay", 0), True, 800, 16, 0, 0),
        ((), False, 100, 16, 1e-3, 0.05),
    ],
)
def test_defaults_are_for_growing_images_or_large_ones(
    tmp_path, flags, progressive, epochs, batch, lr, decay
):
    write_voc(tmp_path / "voc", {"train": 17, "val": 1})
    flags = ("--model", "small", "--data", "voc", "--out", "run", *flags)
    args = train.make_parser().parse_args([str(flag) for flag in flags])
    run = train.set_up(args, None, torch.device("cpu"))
    assert (args.progressive, args.epochs, run.batch_size) == (progressive, epochs, batch)
    assert run.optimizer.defaults["lr"] == args.lr == lr
    assert run.optimizer.defaults["weight_decay"] == args.weight_decay == decay


@pytest.mark.parametrize(("count", "epochs"), [(1, 800), (209, 800), (836, 400), (7477, 134)])
def test_many_images_that_grow_need_fewer_epochs(monkeypatch, count, epochs):
    # 800 for VOC 2007's 209 images, and half of it for four times as many.
    monkeypatch.setattr(data.Shapes, "__len__", lambda self: count)
    flags = ["--data", "shapes", "--augment", "--size", "96"]
    args = train.make_parser().parse_args(flags)
    train.settle(args, torch.device("cpu"))
    assert args.epochs == epochs


def test_pretrained_networks_see_large_images_from_the_start(voc, trained_encoders, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(trained_encoders))
    encoder = str(trained_encoders / "erfnet_encoder_pretrained.pth.tar")
    for flags in (("resnet34_fcn",), ("darrennet", "--encoder-weights", encoder)):
        flags = ["--data", str(voc), "--augment", "--size", "128", "--model", *flags]
        run = train.set_up(train.make_parser().parse_args(flags), None, torch.device("cpu"))
        assert not run.args.progressive and run.val_set.size == 128


def test_patience_stops_the_run(voc, capsys):
    quick_train("--model", "small", "--data", voc, "--lr", 0, "--patience", 2, epochs=40)
    epochs = len(Path("run/log.csv").read_text().splitlines()) - 1
    best = state_of("run/best.pt")["epoch"]
    assert epochs == best + 2 < 40
    assert "stopped: no better validation mIoU for 2 epochs" in capsys.readouterr().out


def test_the_loss_is_pytorchs_mean_and_harmless_where_all_is_void():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 8, 9, generator=generator, requires_grad=True)
    masks = torch.randint(0, 5, (2, 8, 9), generator=generator).byte()
    masks[0, :3] = 255
    weights = torch.rand(5, generator=generator) + 0.5
    loss = train.criterion(logits, masks, weights)
    expected = F.cross_entropy(logits, masks.long(), weights, ignore_index=255)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert train.pixel_weight(masks, weights) == pytest.approx(
        sum(weights[label].item() for label in masks.flatten().tolist() if label != 255), rel=1e-5
    )
    void = train.criterion(logits, torch.full_like(masks, 255), weights)
    (gradient,) = torch.autograd.grad(void, logits)
    assert void == 0 and (gradient == 0).all()


def dice(logits, masks, weights, ce=train.criterion):
    """Cross-entropy and a Dice term, as a student would add it."""
    labelled = (masks != 255)[:, None]
    truth = F.one_hot(masks.long() % 255, logits.shape[1]).movedim(-1, 1) * labelled
    shares = logits.float().softmax(1) * labelled
    overlap = 2 * (shares * truth).sum() / (shares + truth).sum().clamp(min=1)
    return ce(logits, masks, weights) + 1 - overlap


def test_a_term_added_to_the_loss_counts_in_training_and_in_validation(voc, monkeypatch):
    flags = ("--model", "small", "--data", voc, "--no-amp")
    quick_train(*flags, name="plain", epochs=1)
    ce = train.criterion
    monkeypatch.setattr(train, "criterion", lambda *batch: ce(*batch) + 3)
    quick_train(*flags, name="constant", epochs=1)
    monkeypatch.setattr(train, "criterion", dice)
    quick_train(*flags, name="dice", epochs=1)
    plain, constant, with_dice = (state_of(f"{n}/last.pt") for n in ("plain", "constant", "dice"))
    for column in ("train_loss", "val_loss"):
        value = plain["metrics"][column]
        assert constant["metrics"][column] == pytest.approx(value + 3, rel=1e-5)
        assert value + 0.3 < with_dice["metrics"][column] < value + 1.1
    assert same_weights(plain, constant) and not same_weights(plain, with_dice)


def test_adams_moments_take_the_layout_of_the_weights_they_belong_to(voc):
    """A checkpoint of a device that keeps another layout goes on as one of this device would."""
    quick_train("--model", "small", "--data", voc, epochs=1)
    last = state_of("run/last.pt")
    parameter = next(i for i, p in enumerate(last["trained"].values()) if p.ndim == 4)
    moments = last["optimizer"]["state"]
    assert not moments[parameter]["exp_avg"].is_contiguous()
    for state in moments.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].contiguous()
    Path("moved").mkdir()
    torch.save(last, "moved/last.pt")
    shutil.copy("run/best.pt", "moved/best.pt")
    for run in ("run", "moved"):
        call(train, "--resume", run, "--epochs", 2)
    assert same_weights(state_of("run/last.pt"), state_of("moved/last.pt"))


class CudaCopies(TorchDispatchMode):
    """Counts the tensors that an operation brings from the CPU to the GPU, or back."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.device.type for t in args if isinstance(t, torch.Tensor) and t.ndim}
        moved = isinstance(out, torch.Tensor) and given and out.device.type not in given
        self.count += bool(moved) or "local_scalar" in str(func)
        return out


@pytest.mark.skipif(not fake_cuda(), reason="this PyTorch makes no fake CUDA tensors here")
def test_a_step_on_a_gpu_waits_for_no_copy(monkeypatch):
    """On fake CUDA tensors: an epoch of four steps has no more copies than one of two."""

    class Set(torch.utils.data.Dataset):
        size = 32

        def __init__(self, count):
            self.images = torch.empty(count, 3, 64, 64, dtype=torch.uint8, device="cuda")
            self.masks = torch.empty(count, 64, 64, dtype=torch.uint8, device="cuda")

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index], self.masks[index]

    args = train.make_parser().parse_args(["--augment", "--cosine", "--size", "32"])
    args.epochs, args.lr, args.amp, args.progressive = 1, 1e-3, False, False
    monkeypatch.setattr(utils, "over_processes", lambda value, *operation: 0.0)  # once an epoch
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    counts = []
    for images in (4, 8):
        with FakeTensorMode(allow_non_fake_inputs=True):
            with torch.device("cuda"):
                model, average = models.build_model("small"), models.build_model("small")

            def backward(loss, model=model):  # the real one asks for a real GPU
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)

            monkeypatch.setattr(torch.Tensor, "backward", backward)
            run = train.Run(
                args=args, out=None, device=torch.device("cuda"), rank=0, processes=1,
                batch_size=2, train_set=Set(images), val_set=Set(1),
                weights=torch.ones(21, device="cuda"), model=model, parallel=model,
                average=average, history=[], images={},
                optimizer=torch.optim.AdamW(model.parameters(), fused=True),
            )  # fmt: skip
            with CudaCopies() as copies:
                train.train_one_epoch(run, 1)
            counts.append(copies.count)
            assert run.step == images // 2
    assert counts[1] <= counts[0] <= 3  # the order of the images, and constants that are kept


def test_a_compiled_run_learns_what_another_learns(voc, monkeypatch):
    compiled, compile_module = [], torch.nn.Module.compile

    def without_a_compiler(module):
        compiled.append(module)
        compile_module(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_a_compiler)
    monkeypatch.setitem(models.MODELS, "plain", Plain)
    quick_train("--data", voc, "--model", "plain", "--augment", name="plain", epochs=1)
    quick_train("--data", voc, "--model", "plain", "--augment", "--compile", name="run", epochs=1)
    assert [type(module) for module in compiled] == [Plain, Plain]
    assert same_weights(state_of("run/best.pt"), state_of("plain/best.pt"))
    call(train, "--resume", "run", "--epochs", 2, "--no-compile")  # on a machine without compiler
    assert len(compiled) == 2 and state_of("run/last.pt")["args"]["compile"] is False


def test_compile_is_left_out_on_an_apple_gpu(capsys):
    args = train.make_parser().parse_args(["--compile"])
    run = train.Run(args, None, torch.device("mps"), 0, 1, *10 * [None])  # no module to compile
    train.speed_up(run)
    assert "the run goes on without it" in capsys.readouterr().out


def test_slow_bfloat16_is_said(voc, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "plain", Plain)
    monkeypatch.setattr(utils, "has_fast_bfloat16", lambda device: True)
    quick_train("--data", voc, "--model", "plain", epochs=1)
    assert "on 1 x cpu in bfloat16\n" in capsys.readouterr().out
    monkeypatch.setattr(utils, "has_fast_bfloat16", lambda device: False)  # of another processor
    call(train, "--resume", "run", "--epochs", 2)
    assert "in bfloat16, which may be slow here: try --no-amp\n" in capsys.readouterr().out


# -------------------------------------------------------------------- networks of one's own


class Plain(torch.nn.Module):
    """A network that is nothing but a module: no encoder, no decoder."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, num_classes, 3, padding=1)

    def forward(self, images):
        return self.conv(images)


class OwnPretrained(Plain):
    """A network that brings a part of its weights along, and says which."""

    pretrained_parts = ("conv",)

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.last = torch.nn.Conv2d(num_classes, num_classes, 1)
        torch.nn.init.constant_(self.conv.weight, 0.125)
        torch.nn.init.constant_(self.last.weight, 0.125)

    def forward(self, images):
        return self.last(self.conv(images))


def test_a_plain_module_trains_resumes_scores_and_predicts(voc, monkeypatch):
    monkeypatch.setitem(models.MODELS, "plain", Plain)
    quick_train("--model", "plain", "--data", voc, "--augment", epochs=1)
    call(train, "--resume", "run", "--epochs", 2)
    assert [row["epoch"] for row in state_of("run/last.pt")["history"]] == [1, 2]
    call(evaluate, "run", "--out", "scores")
    assert json.loads(Path("scores/metrics.json").read_text())["model"] == "plain"
    call(predict, voc / "VOCdevkit/VOC2007/JPEGImages/val_0.jpg", "--checkpoint", "run/best.pt")
    assert Path("predictions/val_0_mask.png").exists()


def test_a_part_that_came_pretrained_is_not_initialised_again(voc, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "own", OwnPretrained)
    quick_train("--model", "own", "--data", voc, "--lr", 0, epochs=1)
    state = state_of("run/last.pt")["state_dict"]
    assert (state["conv.weight"] == 0.125).all() and not (state["last.weight"] == 0.125).any()
    assert "initialised by --init kaiming: last; pretrained: conv" in capsys.readouterr().out


# ------------------------------------------------------------------------ what a run says of itself


def test_settings_json_tells_the_commands_and_every_setting(voc):
    quick_train("--model", "small", "--data", voc, "--augment", "--size", 96, epochs=1)
    call(train, "--resume", "run", "--epochs", 2)
    stored = json.loads(Path("run/settings.json").read_text())
    assert len(stored["commands"]) == 2 and stored["commands"][1].endswith(
        "--resume run --epochs 2"
    )
    assert f"--data {voc}" in stored["commands"][0]
    settings = stored["settings"]
    assert settings["lr"] == 2e-3 and settings["weight_decay"] == 0.2 and settings["progressive"]
    assert settings["data"] == str(voc / "VOCdevkit/VOC2007") and settings["epochs"] == 2
    assert stored["versions"]["torch"] == torch.__version__ and stored["device"].startswith("cpu")


def test_what_a_flag_brings_with_it_is_said(voc, capsys):
    flags = ["--model", "small", "--data", str(voc), "--augment", "--epochs", "32"]
    train.set_up(train.make_parser().parse_args(flags), None, torch.device("cpu"))
    said = capsys.readouterr().out.splitlines()[0]
    assert "images grow (64, 128, 224), because of --augment" in said
    assert "--lr 0.002 --weight-decay 0.2; --no-progressive takes it back" in said
    assert "--epochs" not in said  # which was typed
    flags += ["--no-progressive"]
    train.set_up(train.make_parser().parse_args(flags), None, torch.device("cpu"))
    assert "grow" not in capsys.readouterr().out


def test_a_run_is_gone_on_with_by_its_folder_or_by_its_command(voc, tmp_path, monkeypatch):
    """The batch size of the command is larger than the set; the data's path is relative."""
    monkeypatch.chdir(voc.parent)
    flags = ("--model", "small", "--data", "voc", "--size", 32, "--batch-size", 16, "--out", "run")
    call(train, *flags, "--epochs", 1)
    call(train, *flags, "--epochs", 2, "--resume")
    call(train, "--resume", "run", "--epochs", 3)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")  # the data is found from any folder
    call(train, "--resume", "../run/last.pt", "--epochs", 4)
    assert len(state_of("../run/last.pt")["history"]) == 4
    with pytest.raises(utils.UserError, match="--out other: a resumed run goes on in ../run"):
        call(train, "--resume", "../run", "--out", "other")


def test_a_resumed_run_keeps_its_images_though_the_folder_has_grown(tmp_path):
    write_folder(tmp_path / "own", "plain")
    quick_train("--model", "small", "--data", "own", epochs=1)
    before = state_of("run/last.pt")["images"]
    assert sorted(before["train"] + before["val"]) == [f"a{i}" for i in range(10)]
    for i in range(10, 30):
        for folder, ending in (("images", "jpg"), ("masks", "png")):
            (tmp_path / f"own/{folder}/a{i}.{ending}").write_bytes(
                (tmp_path / f"own/{folder}/a1.{ending}").read_bytes()
            )
    call(train, "--resume", "run", "--epochs", 2)
    assert state_of("run/last.pt")["images"] == before


def test_processes_after_the_first_do_not_repeat_their_transforms_after_resuming(voc):
    args = train.make_parser().parse_args(["--data", str(voc), "--model", "small", "--size", "32"])
    run = train.set_up(args, None, torch.device("cpu"), rank=1)
    first = torch.rand(3)
    quick_train("--model", "small", "--data", voc, epochs=1)
    train.restore(run, state_of("run/last.pt"))
    assert not torch.equal(torch.rand(3), first)


def test_processes_share_the_loss_of_an_epoch_that_was_stopped(voc):
    args = train.make_parser().parse_args(["--data", str(voc), "--model", "small", "--size", "32"])
    one = train.set_up(args, None, torch.device("cpu"))
    quick_train("--model", "small", "--data", voc, epochs=1)
    last = state_of("run/last.pt") | {"unfinished_epoch": {"step": 1, "loss": 2.5}}
    for rank, processes, expected in ((0, 1, 2.5), (0, 2, 1.25), (1, 2, 1.25)):
        one.rank, one.processes = rank, processes
        train.restore(one, last)
        assert (one.step, one.loss) == (1, expected)


def test_a_start_that_failed_leaves_nothing(voc, monkeypatch):
    def full(run, epoch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "train_one_epoch", full)
    for flags in ((), ("--out", "named")):
        with pytest.raises(torch.OutOfMemoryError):
            call(train, "--model", "small", "--data", voc, "--size", 32, *flags)
    assert not Path("named").exists() and not list(Path("runs").iterdir())


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("last.pt", "--resume taken"),
        ("best.pt", "delete it, if that run is over"),
        ("settings.json", "delete it, if that run is over"),
    ],
)
def test_a_folder_with_another_runs_files_is_left_as_it_is(voc, name, remedy):
    Path("taken").mkdir()
    Path("taken", name).write_text("another's")
    said = f"taken/{name}: is of another run; choose another --out, or {remedy}"
    with pytest.raises(utils.UserError, match=said):
        quick_train("--model", "small", "--data", voc, name="taken")
    assert Path("taken", name).read_text() == "another's"


def test_a_run_that_patience_ended_is_not_gone_on_with(voc, capsys):
    quick_train("--model", "small", "--data", voc, "--lr", 0, "--patience", 1, epochs=9)
    before = len(state_of("run/last.pt")["history"])
    assert "this run is finished" not in capsys.readouterr().out
    call(train, "--resume", "run")
    assert len(state_of("run/last.pt")["history"]) == before < 9
    assert "this run is finished; to go on with it, raise --epochs or" in capsys.readouterr().out


def test_another_optimizers_run_is_restored_and_all_its_groups_get_the_rate(voc, monkeypatch):
    def two_groups(parameters, lr, weight_decay, fused):
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first]}, {"params": rest}], lr, momentum=0.9)

    monkeypatch.setattr(torch.optim, "AdamW", two_groups)
    quick_train("--model", "small", "--data", voc, "--cosine", epochs=1)
    call(train, "--resume", "run", "--epochs", 2)
    rates = [group["lr"] for group in state_of("run/last.pt")["optimizer"]["param_groups"]]
    assert rates[0] == rates[1] < 1e-3


class KnowsWeights(Plain):
    """A network that takes its own trained weights unless told not to."""

    def __init__(self, num_classes, pretrained=True):
        super().__init__(num_classes)
        self.pretrained_parts = ("conv",) if pretrained else ()
        if pretrained:
            torch.nn.init.constant_(self.conv.weight, 0.125)


def test_no_pretrained_reaches_any_network_and_scoring_asks_for_no_weights(voc, monkeypatch):
    monkeypatch.setitem(models.MODELS, "knows", KnowsWeights)
    flags = ("--model", "knows", "--data", voc, "--lr", 0)
    quick_train(*flags, name="with", epochs=1)
    quick_train(*flags, "--no-pretrained", name="without", epochs=1)
    means = [state_of(f"{run}/best.pt")["state_dict"]["conv.weight"] for run in ("with", "without")]
    assert (means[0] == 0.125).all() and not (means[1] == 0.125).any()
    assert state_of("with/best.pt")["options"] == {"pretrained": False}


def test_help_comes_in_three_groups_and_explains_every_flag(tmp_path):
    printed = check(run_script("train.py", "--help", cwd=tmp_path))
    assert [line for line in printed.splitlines() if line in ("everyday:", "training:", "machine:")]
    for action in train.make_parser()._actions:
        assert action.help, action.option_strings


def test_the_scripts_import_late_what_is_slow_to_import(tmp_path):
    (tmp_path / "imports.py").write_text(
        f"import sys\nsys.path.append({str(REPOSITORY)!r})\nimport predict, train, evaluate\n"
        "print([m for m in ('torchvision', 'matplotlib', 'torch._dynamo') if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "imports.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"


def test_a_network_is_tried_at_the_size_that_it_is_for():
    conv = (
        torch.nn.Conv2d(3, 5, 3, stride=2, padding=1),
        torch.nn.ConvTranspose2d(5, 5, 2, stride=2),
    )
    models.check_output(torch.nn.Sequential(*conv), 5, 64)
    with pytest.raises(models.ModelError, match=r"makes \(1, 5, 76, 76\) .* \(1, 5, 75, 75\)"):
        models.check_output(torch.nn.Sequential(*conv), 5, 75)


def test_a_network_for_one_size_alone_that_keeps_tensors_learns(voc, monkeypatch):
    class Fixed(Plain):
        def __init__(self, num_classes):
            super().__init__(num_classes)
            self.position = torch.nn.Parameter(torch.zeros(1, 3, 96, 96))
            self.kept = None

        def forward(self, images):
            if self.kept is None:
                self.kept = torch.linspace(0, 1, images.shape[-1])
            return super().forward((images + self.position) * self.kept)

    monkeypatch.setitem(models.MODELS, "fixed", Fixed)
    quick_train("--data", voc, "--model", "fixed", "--size", 96, epochs=1)
    assert state_of("run/best.pt")["state_dict"]["position"].any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda logits: logits[..., ::2, ::2],
            r"\(1, 21, 16, 16\) .* should make logits \(1, 21, 32",
        ),
        (lambda logits: {"out": logits}, r"makes dict of an image"),
        (lambda logits: logits[:, :5], r"makes \(1, 5, 32, 32\)"),
    ],
)
def test_a_network_that_makes_something_else_is_refused_in_one_line(voc, monkeypatch, change, said):
    class Wrong(Plain):
        def forward(self, images):
            return change(super().forward(images))

    monkeypatch.setitem(models.MODELS, "wrong", Wrong)
    with pytest.raises(models.ModelError, match=said):
        quick_train("--model", "wrong", "--data", voc, epochs=1)
    assert not Path("run").exists()


def test_images_in_both_splits_are_said_once(voc, capsys):
    flags = ("--progressive", "--size", 96, "--val-split", "train")
    quick_train("--model", "small", "--data", voc, *flags)
    said = "5 validation images have names of some learned from, train_0, ...: where they"
    assert capsys.readouterr().out.count(said) == 1


def test_a_clock_that_stands_still_divides_nothing_by_zero(voc, monkeypatch):
    """Windows' clock may show the same time before and after an epoch."""
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(f"time.{name}", lambda: 5.0)
    quick_train("--model", "small", "--data", voc, epochs=1)
    call(evaluate, "run")
