"""train.py: its command line, its arithmetic against PyTorch's own, what a run leaves behind."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    REPOSITORY,
    Dispatched,
    Plain,
    call,
    check,
    fake_cuda,
    looks_drawn,
    read_rows,
    read_scores,
    run_script,
    same,
    state_of,
    write_plain,
    write_voc,
)
from PIL import Image
from test_models import published_file, random_encoder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torchvision.models import resnet34

import data
import evaluate
import models
import predict
import train
import utils

COLUMNS = "epoch lr train_loss val_loss val_mean_iou val_pixel_accuracy images_per_second seconds"
pytestmark = pytest.mark.usefixtures("no_pictures", "small")


def quick_train(*args, name="run", epochs=2, model="small"):
    settings = ("--epochs", epochs, "--size", 32, "--batch-size", 2, "--device", "cpu")
    call(train, *settings, "--model", model, "--out", name, *args)


def same_weights(a, b):
    return same(state_of(a)["state_dict"], state_of(b)["state_dict"])


# ---------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("model", ["fcn", "darrennet"])
def test_a_run_leaves_what_it_should(tmp_path, voc, model):
    flags = ("--augment", "--cosine", "--class-weights", "--size", 32, "--batch-size", 2)
    settings = ("--model", model, "--data", voc, "--epochs", 2, "--out", "run", *flags)
    printed = check(run_script("train.py", *settings, cwd=tmp_path))
    assert f"{voc.resolve()}: 5 images to train on, 3 to validate on, 21 classes" in printed
    assert "best: epoch" in printed and "evaluate.py run/best.pt\n" in printed
    rows = read_rows("run/log.csv")
    assert list(rows[0]) == COLUMNS.split() and [row["epoch"] for row in rows] == [1, 2]
    assert rows[0]["lr"] == 2e-3 and rows[1]["lr"] == pytest.approx(1e-3)
    assert all(np.isfinite(value) for row in rows for value in row.values())
    looks_drawn("run/curves.png", 1000, 400)
    looks_drawn("run/samples.png", 500, 400)
    best, last = state_of("run/best.pt"), state_of("run/last.pt")
    assert best["model"] == model and len(best["classes"]) == len(best["palette"]) == 21
    assert best["size"] == 32 and "optimizer" not in best and "optimizer" in last
    assert best["metrics"]["val_mean_iou"] == max(row["val_mean_iou"] for row in rows)
    names = [f"train_{i}" for i in range(5)], [f"val_{i}" for i in range(3)]
    assert best["images"] == {"train": names[0], "val": names[1]}
    stored = json.loads(Path("run/settings.json").read_text())
    assert sorted(stored) == ["command", "device", "settings", "versions"]
    assert stored["command"] == " ".join(["train.py", *map(str, settings)])
    assert stored["settings"] == best["args"] and stored["versions"]["torch"] == torch.__version__
    assert stored["settings"]["lr"] == 2e-3 and stored["settings"]["weight_decay"] == 0.2
    assert stored["device"].startswith("cpu")
    files = ("best.pt", "curves.png", "last.pt", "log.csv", "samples.png", "settings.json")
    assert sorted(os.listdir("run")) == list(files)


def test_a_plain_folder_trains_scores_and_is_predicted(tmp_path, monkeypatch):
    write_plain(tmp_path / "own")
    quick_train("--data", "own", epochs=1)
    assert state_of("run/best.pt")["data"] == str(tmp_path.resolve() / "own")  # found from anywhere
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    call(evaluate, "../run/best.pt", "--out", "scores")
    assert list(read_scores("scores")["iou"]) == ["background", "cat", "dog"]
    call(train, "--resume", "../run", "--epochs", 2)
    call(predict, "../own/images/a1.jpg", "--checkpoint", "../run/best.pt")
    mask = Image.open("predictions/a1_mask.png")
    assert mask.size == (42, 40) and np.array(mask).max() <= 2
    assert mask.getpalette()[3:6] == [128, 0, 0]


def test_names_of_data_are_kept_as_they_are():
    call(train, "--data", "shapes", "--model", "small", "--size", 32, "--epochs", 1, "--out", "run")
    assert state_of("run/best.pt")["data"] == "shapes"


def test_same_seed_same_weights(voc):
    flags = ("--data", voc, "--augment", "--cosine")
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        quick_train(*flags, "--seed", seed, name=name, epochs=1, model="darrennet")
    assert same_weights("one/last.pt", "two/last.pt")
    assert not same_weights("one/last.pt", "other/last.pt")


def test_resume_needs_no_flags_and_ends_with_the_same_weights(tmp_path, voc):
    flags = ("--data", voc, "--augment", "--seed", 3)
    quick_train(*flags, name="runs/whole", epochs=3, model="darrennet")
    quick_train(*flags, name="runs/halves", epochs=1, model="darrennet")
    torch.manual_seed(99)  # what the process did before must not matter
    call(train, "--resume", "--epochs", 3)  # the newest run
    assert same_weights("runs/whole/last.pt", "runs/halves/last.pt")
    assert [row["epoch"] for row in read_rows("runs/halves/log.csv")] == [1, 2, 3]


def test_runs_are_numbered_and_the_newest_is_the_default(voc, capsys):
    settings = ("--model", "small", "--data", voc, "--epochs", 1, "--size", 32, "--batch-size", 2)
    for _ in range(2):
        call(train, *settings)
    assert sorted(os.listdir("runs")) == ["small", "small-2"]
    call(evaluate)
    assert "runs/small-2/best.pt" in capsys.readouterr().out


def test_commands_to_paste_are_quoted(voc, capsys):
    quick_train("--data", voc, name="my run", epochs=1)
    assert "python evaluate.py 'my run/best.pt'\n" in capsys.readouterr().out


def test_a_loss_that_is_not_a_number_stops_the_run_and_nothing_of_it_is_saved(voc, monkeypatch):
    quick_train("--data", voc, epochs=1)
    before = Path("run/last.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(data, "normalize", lambda images: images * float("nan"))
        with pytest.raises(utils.UserError, match=r"epoch 2: .* not finite \(nan.*smaller --lr"):
            call(train, "--resume", "run/last.pt", "--epochs", 3)
    monkeypatch.setattr(train, "validate", lambda run: (float("inf"), torch.eye(21)))
    with pytest.raises(utils.UserError, match="epoch 2: .*in validation inf"):
        call(train, "--resume", "run/last.pt", "--epochs", 3)
    assert Path("run/last.pt").read_bytes() == before


# --------------------------------------------------------------------- how long, how often


@pytest.mark.parametrize(
    ("flags", "epochs"),
    [
        ((), 2500),  # 10,000 steps of 4: 17 images in batches of 4
        (("--steps", 4), 1),
        (("--steps", 5), 2),
        (("--steps", 5, "--batch-size", 16), 5),
        (("--steps", 5, "--batch-size", 99), 5),  # all 17 are one batch
        (("--epochs", 7), 7),
    ],
)
def test_steps_are_whole_passes_rounded_up(tmp_path, flags, epochs):
    write_voc(tmp_path / "voc", {"train": 17, "val": 1})
    flags = ("--model", "small", "--data", "voc", "--size", "32", "--batch-size", 4, *flags)
    args, last = train.read_settings([str(flag) for flag in flags])
    assert last is None and train.Run(args, None, torch.device("cpu")).epochs == epochs


def test_steps_exclude_epochs(capsys):
    with pytest.raises(SystemExit, match="2"):
        train.read_settings(["--steps", "5", "--epochs", "5"])
    assert "--epochs: not allowed with argument --steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (3, [1, 2, 3]),
        (199, [*range(1, 200)]),
        (201, [*range(2, 201, 2), 201]),
        (350, [*range(3, 350, 3), 350]),
    ],
)
def test_a_run_is_validated_about_a_hundred_times_and_after_the_last_epoch(
    voc, monkeypatch, epochs, expected
):
    validated, saved, save = [], [], utils.save_checkpoint

    def validate(run):
        validated.append(run.history[-1]["epoch"] if run.history else 0)
        return 1.0, torch.eye(21)

    def recording(path, checkpoint):
        saved.append((path.name, checkpoint["epoch"]))
        if checkpoint["epoch"] in (expected[0], epochs):
            save(path, checkpoint)

    monkeypatch.setattr(train, "train_one_epoch", lambda run, epoch: float(epoch))
    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(utils, "save_checkpoint", recording)
    quick_train("--data", voc, epochs=epochs)
    rows = read_rows("run/log.csv")
    assert [row["epoch"] for row in rows] == expected and len(validated) == len(expected)
    # Each row has the mean loss of the epochs since the row before.
    bounds = [0, *expected]
    means = [np.mean(range(a + 1, b + 1)) for a, b in zip(bounds, bounds[1:])]
    assert [row["train_loss"] for row in rows] == means
    # Of equals the first is the best.
    assert saved == [("best.pt", expected[0])] + [("last.pt", epoch) for epoch in expected]


def test_defaults_are_fixed_numbers_that_no_other_flag_changes():
    parse = train.make_parser().parse_args
    plain = vars(parse([]))
    expected = {"model": "darrennet", "data": "voc2007", "size": 96, "steps": 10_000, "lr": 2e-3}
    expected |= {"weight_decay": 0.2, "batch_size": 16, "ema": 0.99, "seed": 0, "epochs": None}
    expected |= {"augment": None, "cosine": False, "class_weights": None, "precision": "auto"}
    assert expected.items() <= plain.items()
    flags = [
        "--augment",
        "--augment flip",
        "--cosine",
        "--class-weights",
        "--epochs 3",
        "--compile",
    ]
    flags += ["--size 224", "--model unet", "--model resnet34_unet", "--encoder-weights x.pt"]
    for flag in flags:
        name = flag.split()[0].removeprefix("--").replace("-", "_")
        changed = {key for key, value in vars(parse(flag.split())).items() if value != plain[key]}
        assert changed == {name}


def test_no_flag_changes_the_settings_of_a_run_either(voc):
    for flags in ((), ("--augment",), ("--cosine", "--class-weights"), ("--size", 64)):
        args, _ = train.read_settings(["--model", "small", "--data", str(voc), *map(str, flags)])
        before = copy.copy(vars(args))
        run = train.Run(args, None, torch.device("cpu"))
        assert vars(run.args) == before and run.epochs == 10_000  # of one step each
        assert run.optimizer.defaults["lr"] == 2e-3
        assert run.optimizer.defaults["weight_decay"] == 0.2


def test_patience_stops_the_run(voc, capsys):
    quick_train("--data", voc, "--lr", 0, "--patience", 2, epochs=40)
    epochs = len(read_rows("run/log.csv"))
    assert epochs == state_of("run/best.pt")["epoch"] + 2 < 40
    assert "stopped: no better validation mIoU for 2 epochs" in capsys.readouterr().out


# ------------------------------------------------------------------------------- resuming


def test_what_would_make_it_another_run_is_refused(voc):
    """All settings but those that a run may change, each typed with another value."""
    quick_train("--data", voc, epochs=1)
    others = {"--model": "fcn", "--augment": "flip", "--class-weights": "enet", "--size": 64}
    others |= {"--init": "xavier_normal", "--encoder-weights": "x", "--lr": 0.5, "--ema": 0.5}
    others |= {"--weight-decay": 0.5, "--seed": 7, "--train-split": "x", "--val-split": "x"}
    for typed in [["--cosine"], ["--no-pretrained"], *map(list, others.items())]:
        flag = typed[0].replace("no-", "")
        with pytest.raises(utils.UserError, match=f"last.pt: was trained with another {flag};"):
            train.read_settings(["--resume", "run", *map(str, typed)])
    free = "--data --steps --epochs --patience --batch-size --device --precision --compile"
    known = {action.option_strings[-1] for action in train.make_parser()._actions}
    tried = {"--cosine", "--no-pretrained", *others}
    assert known == {*free.split(), "--no-compile", "--out", "--resume", "--help"} - {"--compile"} | tried


def test_what_a_run_may_change_is_taken_and_the_rest_stays(voc):
    quick_train("--data", voc, "--lr", 0.01, epochs=1)
    flags = "--data x --patience 3 --batch-size 5 --device mps --precision bfloat16 --compile"
    args, last = train.read_settings(["--resume", "run", *flags.split(), "--steps", "60"])
    changed = {"data": "x", "patience": 3, "batch_size": 5, "device": "mps", "compile": True}
    changed |= {"precision": "bfloat16", "steps": 60, "epochs": None}
    assert changed.items() <= vars(args).items()
    assert (args.lr, args.size, args.model, args.out) == (0.01, 32, "small", Path("run"))
    assert last["epoch"] == 1
    args, _ = train.read_settings(["--resume", "run/last.pt", "--lr", "0.01", "--epochs", "4"])
    assert (args.epochs, args.lr) == (4, 0.01)  # what stays may be typed again


def test_a_run_goes_on_for_steps_whatever_it_was_begun_with(voc):
    quick_train("--data", voc, epochs=1)  # of two steps
    call(train, "--resume", "run", "--steps", 5)
    assert len(read_rows("run/log.csv")) == 3
    call(train, "--resume", "run", "--epochs", 4)
    call(train, "--resume", "run", "--steps", 10)
    assert len(read_rows("run/log.csv")) == 5


def test_steps_as_many_as_the_default_count_when_they_are_typed(voc):
    quick_train("--data", voc, epochs=1)
    args, _ = train.read_settings(["--resume", "run", "--steps", "10000"])
    assert (args.epochs, args.steps) == (None, 10_000)


def test_one_command_starts_a_run_and_goes_on_with_it(voc, capsys):
    for epochs in (1, 2):
        quick_train("--data", voc, "--resume", epochs=epochs)
    assert [row["epoch"] for row in read_rows("run/log.csv")] == [1, 2]
    quick_train("--data", voc, "--resume", epochs=2)
    assert "this run is finished; to go on with it, raise --steps" in capsys.readouterr().out
    # Nor does a folder of a run that was ended before it was validated stop it.
    Path("killed").mkdir()
    Path("killed/settings.json").touch()
    with pytest.raises(utils.UserError, match="killed: holds a run; --resume it, or"):
        quick_train("--data", voc, name="killed", epochs=1)
    quick_train("--data", voc, "--resume", name="killed", epochs=1)
    assert len(read_rows("killed/log.csv")) == 1
    with pytest.raises(utils.UserError, match="--out other: a resumed run goes on in run"):
        call(train, "--resume", "run", "--out", "other")


def test_a_run_goes_on_with_the_columns_that_it_has(voc):
    quick_train("--data", voc, epochs=1)
    last = state_of("run/last.pt")
    old = {k: v for k, v in last["history"][0].items() if k != "val_loss"} | {"gone": 1.5}
    utils.save_checkpoint("run/last.pt", last | {"history": [old]})
    call(train, "--resume", "run", "--epochs", 2)
    first, second = read_rows("run/log.csv")
    assert list(first) == COLUMNS.split() and math.isnan(first["val_loss"])
    assert first["val_mean_iou"] == old["val_mean_iou"] and second["val_loss"] > 0


def test_a_full_gpus_run_goes_on_with_a_smaller_batch(voc):
    quick_train("--data", voc, epochs=1)
    call(train, "--resume", "run", "--epochs", 2, "--batch-size", 3)
    steps = {s["step"].item() for s in state_of("run/last.pt")["optimizer"]["state"].values()}
    assert steps == {2 + 1}


def test_the_newest_run_is_the_one_that_was_trained_last():
    for name, second in (("old/best.pt", 3), ("old/last.pt", 4), ("new/best.pt", 2)):
        path = Path("runs", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (second, second))
    assert utils.find_checkpoint(None) == Path("runs/old/best.pt")
    assert utils.find_checkpoint(None, "last.pt") == Path("runs/old/last.pt")
    assert utils.find_checkpoint(Path("runs/new")) == Path("runs/new/best.pt")


def test_checkpoints_that_cannot_be_gone_on_with_are_refused(voc, monkeypatch):
    quick_train("--data", voc, epochs=1)
    with pytest.raises(utils.UserError, match="best.pt: is no last.pt of this train.py; start"):
        call(train, "--resume", "run/best.pt")
    write_voc(Path("two"), num_classes=2)
    Path("two/classes.txt").write_text("background\ncat")
    with pytest.raises(utils.UserError, match="two: has other classes than the run had"):
        call(train, "--resume", "run", "--epochs", 2, "--data", "two")
    monkeypatch.delitem(models.MODELS, "small")
    with pytest.raises((SystemExit, models.ModelError)):
        call(train, "--resume", "run", "--epochs", 2)


def test_another_optimizers_run_is_restored_and_all_its_groups_get_the_rate(voc, monkeypatch):
    def two_groups(parameters, lr, weight_decay, fused):
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first]}, {"params": rest}], lr, momentum=0.9)

    monkeypatch.setattr(torch.optim, "AdamW", two_groups)
    quick_train("--data", voc, "--cosine", epochs=1)
    call(train, "--resume", "run", "--epochs", 2)
    rates = [group["lr"] for group in state_of("run/last.pt")["optimizer"]["param_groups"]]
    assert rates[0] == rates[1] < 1e-3


def test_adams_moments_take_the_layout_of_the_weights_they_belong_to(voc):
    """A checkpoint of a device that keeps another layout goes on as one of this device would."""
    quick_train("--data", voc, epochs=1)
    last = state_of("run/last.pt")
    parameter = next(i for i, p in enumerate(last["trained"].values()) if p.ndim == 4)
    moments = last["optimizer"]["state"]
    assert not moments[parameter]["exp_avg"].is_contiguous()
    for state in moments.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].contiguous()
    Path("moved").mkdir()
    for name in ("best.pt", "last.pt"):
        torch.save(last, f"moved/{name}")
    for run in ("run", "moved"):
        call(train, "--resume", run, "--epochs", 2)
    assert same_weights("run/last.pt", "moved/last.pt")


# -------------------------------------------------------------------- the networks' starts


@pytest.fixture(scope="session")
def trained_encoders(tmp_path_factory):
    """A TORCH_HOME with a ResNet34 in it, and an ERFNet encoder, under their published names."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(1)
    torch.save(resnet34().state_dict(), folder / "hub/checkpoints/resnet34-b627a593.pth")
    file = published_file(random_encoder(), "imagenet")
    torch.save(file, folder / "erfnet_encoder_pretrained.pth.tar")
    return folder


@pytest.fixture
def no_last(monkeypatch):
    """Leave an empty last.pt: with the optimizer of a large network it takes longer than all else."""
    save = utils.save_checkpoint

    def save_best(path, checkpoint):
        path.touch() if path.name == "last.pt" else save(path, checkpoint)

    monkeypatch.setattr(utils, "save_checkpoint", save_best)


@pytest.mark.parametrize("name", [*models.MODELS, "erfnet"])
def test_each_network_trains_scores_and_predicts(
    name, voc, trained_encoders, monkeypatch, capsys, no_last
):
    monkeypatch.setenv("TORCH_HOME", str(trained_encoders))
    encoder = ("--encoder-weights", trained_encoders / "erfnet_encoder_pretrained.pth.tar")
    flags = encoder if name == "erfnet" else ()
    quick_train("--data", voc, *flags, epochs=1, model="darrennet" if flags else name)
    said = capsys.readouterr().out
    assert ("226 tensors loaded, left out: ['module" in said) == (name == "erfnet")
    assert ("; pretrained: encoder\n" in said) == name.startswith("resnet34")
    # From here on the checkpoint is enough: nothing is looked up or downloaded again.
    monkeypatch.setenv("TORCH_HOME", str(voc))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    call(evaluate, "run/best.pt", "--void-as-background", "--out", "scores")
    metrics = read_scores("scores")
    assert 0 <= metrics["mean_iou"] < 1 and 0 < metrics["pixel_accuracy"] < 1
    image = voc / "VOCdevkit/VOC2007/JPEGImages/val_0.jpg"
    call(predict, image, "--checkpoint", "run/best.pt")
    assert Image.open("predictions/val_0_mask.png").size == Image.open(image).size


def test_pretrained_encoders_start_from_torchvisions_file(
    voc, trained_encoders, monkeypatch, no_last
):
    monkeypatch.setenv("TORCH_HOME", str(trained_encoders))
    quick_train("--data", voc, "--lr", 0, epochs=1, model="resnet34_fcn")
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
    assert "--no-pretrained" in said and not Path("run").exists()


def test_encoder_weights_of_another_network_are_refused(voc):
    quick_train("--data", voc, epochs=1)
    flags = ("--data", voc, "--encoder-weights", "run/best.pt")
    with pytest.raises(utils.UserError, match="run/best.pt: none of its tensors fits .*darrennet"):
        quick_train(*flags, name="other", model="darrennet")
    assert not Path("other").exists()
    torch.save({1: torch.zeros(2)}, "numbers.pt")
    with pytest.raises(utils.UserError, match="numbers.pt: .*; it is not for small"):
        quick_train("--data", voc, "--encoder-weights", "numbers.pt", name="other")


def test_a_fine_tuned_network_says_what_its_weights_had_learned_from(voc, capsys):
    flags = ("--data", voc)
    quick_train(*flags, "--train-split", "val", "--val-split", "train", name="first", epochs=1)
    quick_train(*flags, "--encoder-weights", "first/last.pt", name="second", epochs=1)
    both = sorted([f"train_{i}" for i in range(5)] + [f"val_{i}" for i in range(3)])
    assert state_of("second/best.pt")["images"]["train"] == both
    call(train, "--resume", "second", "--epochs", 2)  # and still when it goes on
    assert state_of("second/last.pt")["images"]["train"] == both
    call(evaluate, "second/last.pt")
    assert "was trained on 3 of these 3 images" in capsys.readouterr().out
    quick_train(*flags, name="third", epochs=1)
    call(evaluate, "third")
    assert "was trained on" not in capsys.readouterr().out


# --------------------------------------------------------------------------- the arithmetic


def test_cosine_is_pytorchs_annealing_by_the_step(voc, monkeypatch):
    rates, weights, modes = [], [], []
    augment, criterion = data.augment, train.criterion

    class Recording(torch.optim.AdamW):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    monkeypatch.setattr(
        data, "augment", lambda i, m, mode, size: (modes.append(mode), augment(i, m, mode, size))[1]
    )
    monkeypatch.setattr(
        train, "criterion", lambda x, y, w: (weights.append(w), criterion(x, y, w))[1]
    )
    flags = ("--augment", "flip", "--class-weights", "median", "--cosine", "--lr", 0.01)
    quick_train("--data", voc, *flags, epochs=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.01)
    expected, planned = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6), []
    for _ in range(6):  # three epochs of two steps
        planned.append(expected.get_last_lr()[0])
        optimizer.step()
        expected.step()
    assert rates == pytest.approx(planned) and modes == ["flip"] * 6
    assert [row["lr"] for row in read_rows("run/log.csv")] == pytest.approx(planned[::2])
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
        train.update_average(average, model, step, 0.9)
        # The share of what has been so far: none at first, then as if ten steps were before it.
        decay = min(0.9, step / (step + 10))
        expected = decay * expected + (1 - decay) * drawn.numpy()
    kept = average.state_dict()
    assert np.allclose(kept["0.weight"], expected[:2], atol=1e-6)
    assert np.allclose(kept["1.running_mean"], expected[2], atol=1e-6)


def test_the_average_is_what_is_scored_and_kept(voc):
    flags = ("--data", voc, "--precision", "float32", "--lr", 0.01)
    quick_train(*flags, name="averaged")
    last = state_of("averaged/last.pt")
    dataset = data.VOC(voc, "val", size=32)
    labels, losses = dataset.masks.long(), []
    for weights in (last["state_dict"], last["trained"]):
        model = models.from_checkpoint(last | {"state_dict": weights})
        with torch.inference_mode():
            logits = model(data.normalize(dataset.images))
        losses.append(F.cross_entropy(logits, labels, ignore_index=255).item())
    logged = last["history"][-1]
    assert logged["val_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert logged["val_loss"] != pytest.approx(losses[1], rel=1e-4)
    model = models.from_checkpoint(last)
    with torch.inference_mode():
        right = (model(data.normalize(dataset.images)).argmax(1) == labels)[labels != 255]
    assert logged["val_pixel_accuracy"] == pytest.approx(right.float().mean().item())
    quick_train(*flags, "--ema", 0, name="plain")
    kept = {k: v for k, v in state_of("plain/last.pt")["state_dict"].items() if "num_b" not in k}
    assert all(torch.equal(value, last["trained"][name]) for name, value in kept.items())


def test_the_loss_is_pytorchs_mean_and_harmless_where_all_is_void():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 8, 9, generator=generator, requires_grad=True)
    masks = torch.randint(0, 5, (2, 8, 9), generator=generator).byte()
    masks[0, :3] = 255
    weights = torch.rand(5, generator=generator) + 0.5
    loss = train.criterion(logits, masks, weights)
    expected = F.cross_entropy(logits, masks.long(), weights, ignore_index=255)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert train.pixel_weight(masks, weights).item() == pytest.approx(
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
    flags = ("--data", voc, "--precision", "float32")
    quick_train(*flags, name="plain", epochs=1)
    ce = train.criterion
    monkeypatch.setattr(train, "criterion", lambda *batch: ce(*batch) + 3)
    quick_train(*flags, name="constant", epochs=1)
    monkeypatch.setattr(train, "criterion", dice)
    quick_train(*flags, name="dice", epochs=1)
    plain, constant, more = (
        state_of(f"{n}/last.pt")["metrics"] for n in ("plain", "constant", "dice")
    )
    for column in ("train_loss", "val_loss"):
        assert constant[column] == pytest.approx(plain[column] + 3, rel=1e-5)
        assert plain[column] + 0.3 < more[column] < plain[column] + 1.1
    assert same_weights("plain/last.pt", "constant/last.pt")
    assert not same_weights("plain/last.pt", "dice/last.pt")


def test_an_epoch_is_random_by_seed_epoch_and_process_alone(voc):
    seen = []

    class Seeing(Plain):
        def forward(self, images):
            seen.append(images.sum().item())
            return super().forward(images)

    args, _ = train.read_settings(
        ["--data", str(voc), "--augment", "--size", "32", "--batch-size", "4"]
    )
    models.MODELS["small"], args.model = Seeing, "small"
    run = train.Run(args, None, torch.device("cpu"))

    def images_of(epoch, rank=0, processes=1, seed=0):
        seen.clear()
        run.rank, run.processes, args.seed = rank, processes, seed
        torch.rand(5)  # what was drawn before must not matter
        train.train_one_epoch(run, epoch)
        return tuple(seen)

    first = images_of(1)
    assert images_of(1) == first
    others = {images_of(2), images_of(1, seed=1), images_of(1, 0, 2), images_of(1, 1, 2)}
    assert len(others) == 4 and first not in others


# ------------------------------------------------------------- precision, --compile, GPUs


@pytest.mark.skipif(not fake_cuda(), reason="this PyTorch makes no fake CUDA tensors here")
def test_a_step_on_a_gpu_waits_for_no_copy(monkeypatch):
    """On fake CUDA tensors: an epoch of four steps has no more copies than one of two."""

    def fake_set(count):
        images = torch.empty(count, 3, 64, 64, dtype=torch.uint8, device="cuda")
        masks = torch.empty(count, 64, 64, dtype=torch.uint8, device="cuda")
        return SimpleNamespace(names=range(count), images=images, masks=masks)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    items, counts = [], []
    item = torch.Tensor.item
    monkeypatch.setattr(
        torch.Tensor, "item", lambda t: items.append(0.0) or 0.0 if t.is_cuda else item(t)
    )
    for images in (4, 8):
        with FakeTensorMode(allow_non_fake_inputs=True):
            with torch.device("cuda"):
                model, average = models.build_model("small"), models.build_model("small")

            def backward(loss, model=model):  # the real one asks for a real GPU
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)

            monkeypatch.setattr(torch.Tensor, "backward", backward)
            run = SimpleNamespace(
                args=train.make_parser().parse_args(["--augment", "--cosine", "--size", "32"]),
                device=torch.device("cuda"), rank=0, processes=1, batch_size=2, epochs=1,
                train_set=fake_set(images), weights=torch.ones(21, device="cuda"), model=model,
                forward=model, average=average, precision="float32",
                optimizer=torch.optim.AdamW(model.parameters(), fused=True),
            )  # fmt: skip
            with Dispatched() as copies:
                train.train_one_epoch(run, 1)
            counts.append(copies.count)
    assert counts[1] <= counts[0] <= 3 and len(items) == 2  # the order, constants; the mean loss


def test_precision_is_what_was_asked_for(voc, monkeypatch, capsys):
    seen = []

    class Watched(Plain):
        def forward(self, images):
            out = super().forward(images)
            seen.append(out.dtype)
            return out

    monkeypatch.setitem(models.MODELS, "small", Watched)
    cases = [("float32", True, "float32"), ("bfloat16", False, "bfloat16")]
    cases += [("auto", True, "bfloat16"), ("auto", False, "float32")]
    for number, (asked, fast, used) in enumerate(cases):
        monkeypatch.setattr(train, "has_fast_bfloat16", lambda device, fast=fast: fast)
        seen.clear()
        quick_train("--data", voc, "--precision", asked, name=f"run{number}", epochs=1)
        # The first is the trial of the network's output, the last draws the samples.
        assert set(seen[1:-1]) == {getattr(torch, used)} and len(seen) > 4
        assert f"parameters on 1 x cpu in {used}\n" in capsys.readouterr().out
    assert state_of("run1/best.pt")["state_dict"]["conv.weight"].dtype == torch.float32


def test_bfloat16_is_taken_where_the_processor_multiplies_it(monkeypatch):
    cpu = torch.device("cpu")
    for told, expected in (({"amx_bf16": True}, True), ({"amx_bf16": False}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda told=told: told, raising=False)
        assert train.has_fast_bfloat16(cpu) is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older versions of PyTorch
    assert train.has_fast_bfloat16(cpu) is False
    assert train.has_fast_bfloat16(torch.device("mps")) is False


def test_a_compiled_run_learns_what_another_learns(voc, monkeypatch):
    compiled, compile_module = [], torch.nn.Module.compile

    def without_a_compiler(module):
        compiled.append(module)
        compile_module(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_a_compiler)
    monkeypatch.setitem(models.MODELS, "plain", Plain)
    flags = ("--data", voc, "--augment")
    quick_train(*flags, name="plain", epochs=1, model="plain")
    quick_train(*flags, "--compile", epochs=1, model="plain")
    assert [type(module) for module in compiled] == [Plain]
    assert same_weights("run/best.pt", "plain/best.pt")
    call(train, "--resume", "run", "--epochs", 2, "--no-compile")  # on a machine without compiler
    assert len(compiled) == 1 and state_of("run/last.pt")["args"]["compile"] is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_cuda_graph_learns_what_the_model_itself_learns(voc, monkeypatch, precision):
    monkeypatch.setitem(models.MODELS, "plain", Plain)
    flags = ("--data", voc, "--device", "cuda", "--precision", precision)
    for name, more in (("plain", ()), ("graph", ("--compile",))):
        quick_train(*flags, *more, name=name, model="plain", epochs=3)
    plain, graph = (state_of(f"{name}/last.pt")["trained"] for name in ("plain", "graph"))
    for name, value in plain.items():
        torch.testing.assert_close(graph[name], value, rtol=1e-2, atol=1e-3)


# ------------------------------------------------------------------- networks of one's own


class OwnPretrained(Plain):
    """A network that brings a part of its weights along, unless told not to, and says which."""

    def __init__(self, num_classes, pretrained=True):
        super().__init__(num_classes)
        self.last = torch.nn.Conv2d(num_classes, num_classes, 1)
        torch.nn.init.constant_(self.last.weight, 0.125)
        self.pretrained_parts = ("conv",) if pretrained else ()
        if pretrained:
            torch.nn.init.constant_(self.conv.weight, 0.125)

    def forward(self, images):
        return self.last(self.conv(images))


def test_a_plain_module_trains_resumes_scores_and_predicts(voc, monkeypatch):
    monkeypatch.setitem(models.MODELS, "plain", Plain)
    quick_train("--data", voc, "--augment", epochs=1, model="plain")
    call(train, "--resume", "run", "--epochs", 2)
    assert [row["epoch"] for row in state_of("run/last.pt")["history"]] == [1, 2]
    call(evaluate, "run", "--out", "scores")
    assert read_scores("scores")["model"] == "plain"
    call(predict, voc / "VOCdevkit/VOC2007/JPEGImages/val_0.jpg", "--checkpoint", "run/best.pt")
    assert Path("predictions/val_0_mask.png").exists()


def test_a_part_that_came_pretrained_is_not_initialised_again(voc, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "own", OwnPretrained)
    for name, flags in (("with", ()), ("without", ("--no-pretrained",))):
        quick_train("--data", voc, "--lr", 0, *flags, name=name, epochs=1, model="own")
        state = state_of(f"{name}/last.pt")["state_dict"]
        assert (state["conv.weight"] == 0.125).all() == (name == "with")
        assert not (state["last.weight"] == 0.125).any()
        assert state_of(f"{name}/best.pt")["options"] == {"pretrained": False}
    printed = capsys.readouterr().out
    assert "--init kaiming: last; pretrained: conv\n" in printed
    assert "--init kaiming: conv, last; pretrained: nothing\n" in printed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[..., ::2, ::2], r"\(1, 21, 16, 16\) .* should make logits \(1, 21, 32"),
        (lambda x: {"out": x}, r"makes dict of an image"),
        (lambda x: x[:, :5], r"makes \(1, 5, 32, 32\)"),
    ],
)
def test_a_network_that_makes_something_else_is_refused_in_one_line(voc, monkeypatch, change, said):
    class Wrong(Plain):
        def forward(self, images):
            return change(super().forward(images))

    monkeypatch.setitem(models.MODELS, "wrong", Wrong)
    with pytest.raises(models.ModelError, match=said):
        quick_train("--data", voc, epochs=1, model="wrong")
    assert not Path("run").exists()


def test_a_network_is_tried_at_the_size_that_it_is_for():
    conv = torch.nn.Conv2d(3, 5, 3, 2, 1), torch.nn.ConvTranspose2d(5, 5, 2, 2)
    models.check_output(torch.nn.Sequential(*conv), 5, 64)
    with pytest.raises(models.ModelError, match=r"makes \(1, 5, 76, 76\) .* \(1, 5, 75, 75\)"):
        models.check_output(torch.nn.Sequential(*conv), 5, 75)


# ------------------------------------------------------------------------- a run's folder


def test_of_runs_that_start_at_once_none_shares_a_folder():
    args = train.make_parser().parse_args(["--model", "small"])
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(train.claim_folder, [args] * 24))
    assert len(set(folders)) == 24 and {f.name for f in folders} > {"small", "small-24"}
    args.out = Path("named")

    def claim(_):
        try:
            return train.claim_folder(args)
        except utils.UserError:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert sum(folder is not None for folder in pool.map(claim, range(24))) == 1


def test_processes_that_start_at_once_do_not_share_one_either(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import train, time\n"
    code += "time.sleep(max(0, float(sys.argv[1]) - time.time()))\n"
    code += "args = train.make_parser().parse_args(['--model', 'fcn'])\n"
    code += "print(*[train.claim_folder(args) for _ in range(50)], sep='\\n')"
    Path("claim.py").write_text(code)
    import time

    from conftest import Process

    started = [Process(tmp_path / "claim.py", time.time() + 1.5, cwd=tmp_path) for _ in range(3)]
    folders = [line for process in started for line in check(process.wait()).split()]
    assert len(folders) == len(set(folders)) == 150


def test_an_empty_folder_that_is_there_is_fine(voc):
    Path("run").mkdir()
    quick_train("--data", voc, epochs=1)
    with pytest.raises(utils.UserError, match="run: holds a run; --resume it, or choose another"):
        quick_train("--data", voc, epochs=1)


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_checkpoints_that_are_there_are_not_written_over(voc, name):
    Path("taken").mkdir()
    Path("taken", name).write_text("another's")
    with pytest.raises(utils.UserError, match="taken"):
        quick_train("--data", voc, name="taken", epochs=1)
    assert Path("taken", name).read_text() == "another's"


def test_a_run_that_came_to_no_checkpoint_leaves_no_folder(voc, monkeypatch):
    def full(run, epoch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "train_one_epoch", full)
    Path("mine").mkdir()
    Path("mine/notes.txt").touch()
    for flags in ((), ("--out", "named"), ("--out", "mine")):
        with pytest.raises(torch.OutOfMemoryError):
            call(train, "--model", "small", "--data", voc, "--size", 32, *flags)
    assert not Path("named").exists() and os.listdir("runs") == []
    assert os.listdir("mine") == ["notes.txt"]


def test_a_log_that_a_spreadsheet_has_open_does_not_end_the_run(voc, monkeypatch, capsys):
    opened = []

    def locked(path, *args, **options):
        if str(path).endswith("log.csv"):
            opened.append(path)
            if len(opened) == 1:
                raise PermissionError(13, "Permission denied", "log.csv")
        return open(path, *args, **options)

    monkeypatch.setattr(train, "open", locked, raising=False)
    quick_train("--data", voc, epochs=2)
    assert "'log.csv'; close it: the next validation writes all rows" in capsys.readouterr().out
    assert [row["epoch"] for row in read_rows("run/log.csv")] == [1, 2]


def test_a_clock_that_stands_still_divides_nothing_by_zero(voc, monkeypatch):
    """Windows' clock may show the same time before and after an epoch."""
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(f"time.{name}", lambda: 5.0)
    quick_train("--data", voc, epochs=1)
    call(evaluate, "run")


def test_one_class_alone_is_said(voc, monkeypatch, capsys):
    cm = torch.zeros(21, 21, dtype=torch.int64)
    cm[:, 0] = 5
    monkeypatch.setattr(train, "validate", lambda run: (1.0, cm))
    quick_train("--data", voc, epochs=1)
    printed = capsys.readouterr().out
    assert "so far every pixel is labelled background" in printed
    assert re.search(
        r"^epoch 1/1  loss \d.* mIoU 0.0023  accuracy 4.8%  predicts 1/21", printed, re.M
    )


# ------------------------------------------------------------------------------ the command


def test_help_comes_in_three_groups_and_explains_every_flag(tmp_path):
    printed = check(run_script("train.py", "--help", cwd=tmp_path))
    assert [line for line in printed.splitlines() if line in ("everyday:", "training:", "machine:")]
    for action in train.make_parser()._actions:
        assert action.help, action.option_strings


def test_the_scripts_import_late_what_is_slow_to_import():
    code = (
        f"import sys\nsys.path.append({str(REPOSITORY)!r})\nimport predict, train, evaluate\n"
        "print([m for m in ('torchvision', 'matplotlib', 'torch._dynamo') if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"
