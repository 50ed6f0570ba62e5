"""train.py: its command line, its arithmetic against PyTorch's own, what a run leaves behind."""

import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import Plain, call, check, looks_drawn, read_rows, run_script, state_of, write_voc
from PIL import Image
from test_models import published_file, random_encoder
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
    return conftest.same(state_of(a)["state_dict"], state_of(b)["state_dict"])


@pytest.mark.parametrize("model", ["fcn", "darrennet"])
def test_a_run_leaves_what_it_should(tmp_path, voc, model):
    flags = ("--augment", "--cosine", "--class-weights", "--size", 32, "--batch-size", 2)
    settings = ("--model", model, "--data", voc, "--epochs", 2, "--out", "run", *flags)
    printed = check(run_script("train.py", *settings, cwd=tmp_path))
    assert (
        f"{voc.resolve()}: 5 images to train on, 3 to validate on, 0 of them on both lists, 21 classes"
        in printed
    )
    assert "best: epoch" in printed and 'evaluate.py "run/best.pt"\n' in printed
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


def test_images_per_second_leave_out_those_too_few_for_a_batch(voc, monkeypatch):
    """Of five images in batches of two an epoch takes four."""
    monkeypatch.setattr(train.time, "perf_counter", iter(range(100)).__next__)  # a second a look
    quick_train("--data", voc, epochs=3)
    assert [row["images_per_second"] for row in read_rows("run/log.csv")] == [4, 4, 4]


def test_a_plain_folder_trains_scores_and_is_predicted(tmp_path, monkeypatch, capsys):
    conftest.write_plain(tmp_path / "own")
    quick_train("--data", "own", epochs=1, name="my run")
    assert 'python evaluate.py "my run/best.pt"\n' in capsys.readouterr().out
    assert state_of("my run/best.pt")["data"] == str(tmp_path.resolve() / "own")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    call(evaluate, "../my run/best.pt", "--out", "scores")
    assert list(conftest.read_scores("scores")["iou"]) == ["background", "cat", "dog"]
    call(train, "--resume", "../my run", "--epochs", 2)
    call(predict, "../own/images/a1.jpg", "--checkpoint", "../my run")
    mask = Image.open("predictions/a1_mask.png")
    assert mask.size == (42, 40) and np.array(mask).max() <= 2
    assert mask.getpalette()[3:6] == [128, 0, 0]


def test_resume_needs_no_flags_and_ends_with_the_same_weights(tmp_path, voc):
    flags = ("--data", voc, "--augment", "--seed", 3)
    quick_train(*flags, name="runs/whole", epochs=3, model="darrennet")
    quick_train(*flags, name="runs/halves", epochs=1, model="darrennet")
    torch.manual_seed(99)  # what the process did before must not matter
    half = state_of("runs/halves/last.pt")
    half["optimizer"]["param_groups"][0]["fused"] = False  # as on a Mac in float16
    for state in half["optimizer"]["state"].values():  # on a GPU they lie in another order
        state["exp_avg"] = state["exp_avg"].contiguous()
        state["exp_avg_sq"] = state["exp_avg_sq"].contiguous()
    torch.save(half, "runs/halves/last.pt")
    call(train, "--resume", "--epochs", 3)  # the newest run
    assert same_weights("runs/whole/last.pt", "runs/halves/last.pt")
    assert state_of("runs/halves/last.pt")["optimizer"]["param_groups"][0]["fused"]
    assert [row["epoch"] for row in read_rows("runs/halves/log.csv")] == [1, 2, 3]


def test_a_loss_that_is_not_a_number_stops_the_run_and_nothing_of_it_is_saved(voc, monkeypatch):
    quick_train("--data", voc, epochs=1)
    before = Path("run/last.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(data, "normalize", lambda images: images * float("nan"))
        with pytest.raises(utils.UserError, match=r"epoch 2: .*nan.* not finite; .*smaller --lr"):
            call(train, "--resume", "run/last.pt", "--epochs", 3)
    monkeypatch.setattr(train, "validate", lambda run: (float("inf"), torch.eye(21)))
    with pytest.raises(utils.UserError, match="epoch 2: .*validation loss inf"):
        call(train, "--resume", "run/last.pt", "--epochs", 3)
    assert Path("run/last.pt").read_bytes() == before


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
    typed = dict(vars(args))
    run = train.Run(args, last, torch.device("cpu"))
    assert run.epochs == epochs and vars(run.args) == typed  # no setting follows from the data
    assert (run.optimizer.defaults["lr"], run.optimizer.defaults["weight_decay"]) == (2e-3, 0.2)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(3, [1, 2, 3]), (199, [*range(1, 200)]), (350, [*range(3, 350, 3), 350])],
)
def test_a_run_is_validated_about_a_hundred_times_and_after_the_last_epoch(
    voc, monkeypatch, epochs, expected
):
    saved, save = [], utils.save_checkpoint

    def recording(path, checkpoint):
        saved.append((path.name, checkpoint["epoch"]))
        if checkpoint["epoch"] in (expected[0], epochs):
            save(path, checkpoint)

    monkeypatch.setattr(train, "train_one_epoch", lambda run, epoch: float(epoch))
    monkeypatch.setattr(train, "validate", lambda run: (1.0, torch.eye(21)))
    monkeypatch.setattr(utils, "save_checkpoint", recording)
    quick_train("--data", voc, epochs=epochs)
    # Each row has the mean loss of the epochs since the row before.
    pairs = itertools.pairwise([0, *expected])
    means = [(b, np.mean(range(a + 1, b + 1))) for a, b in pairs]
    assert [(row["epoch"], row["train_loss"]) for row in read_rows("run/log.csv")] == means
    # Of equals the first is the best.
    assert saved == [("best.pt", expected[0])] + [("last.pt", epoch) for epoch in expected]


def test_validation_masks_that_are_all_void_are_refused(voc):
    quick_train("--data", voc, epochs=1)
    for path in voc.glob("VOCdevkit/VOC2007/SegmentationClass/val_*.png"):
        Image.new("L", Image.open(path).size, 255).save(path)
    said = "split val: at this --size, masks have nothing"
    with pytest.raises(data.DataError, match=said):
        quick_train("--data", voc, epochs=1, name="no")
    with pytest.raises(data.DataError, match=said):
        call(evaluate, "run", "--device", "cpu")
    assert not Path("no").exists()


def test_patience_counts_epochs_without_a_better_score(voc, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_one_epoch", lambda run, epoch: 1.0)
    right = iter([1, 3, 2, 2.5, 2, 2, 2])  # of ten pixels: the second epoch is the best

    def validate(run):
        cm = torch.zeros(21, 21)
        cm[0, 0] = next(right)
        cm[0, 1] = 10 - cm[0, 0]
        return 1.0, cm

    monkeypatch.setattr(train, "validate", validate)
    quick_train("--data", voc, "--patience", 3, epochs=50)
    scores = [row["val_mean_iou"] for row in read_rows("run/log.csv")]
    assert scores == pytest.approx([0.05, 0.15, 0.1, 0.125, 0.1])  # class 1 has an IoU of 0
    assert state_of("run/best.pt")["epoch"] == 2
    printed = capsys.readouterr().out
    assert "stopped: no better validation mIoU for 3 epochs" in printed
    assert "best: epoch 2, validation mIoU 0.1500, pixel accuracy 30.0%" in printed
    call(train, "--resume", "run")  # as a job that is put into the queue again
    assert "stopped: no better validation mIoU for 3 epochs" in capsys.readouterr().out
    assert len(read_rows("run/log.csv")) == 5
    call(train, "--resume", "run", "--patience", 5)
    assert len(read_rows("run/log.csv")) == 7


def test_a_log_that_excel_holds_open_is_written_at_the_next_validation(voc, monkeypatch, capsys):
    locked = [True]

    def open_once_refused(path, *args, **kwargs):
        if str(path).endswith("log.csv") and locked and locked.pop():
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *args, **kwargs)

    monkeypatch.setattr(train, "open", open_once_refused, raising=False)
    quick_train("--data", voc, epochs=2)
    assert "log.csv'; close it: the next validation writes all rows" in capsys.readouterr().out
    assert [row["epoch"] for row in read_rows("run/log.csv")] == [1, 2]


def test_affine_augmentation_is_given_images_of_twice_the_size(voc):
    for flags, sides in ((["--augment"], (64, 32)), (["--augment", "flip"], (32, 32))):
        args = train.make_parser().parse_args(["--data", str(voc), "--size", "32", *flags])
        train_set, val_set, _ = train.load_sets(args, torch.device("cpu"))
        assert (train_set.images.shape[-1], val_set.images.shape[-1]) == sides


def test_defaults_are_fixed_numbers_that_no_other_flag_changes():
    parse = train.make_parser().parse_args
    plain = vars(parse([]))
    expected = {"model": "darrennet", "data": "voc2007", "size": 96, "steps": 10_000, "lr": 2e-3}
    expected |= {"weight_decay": 0.2, "batch_size": 16, "ema": 0.99, "seed": 0, "epochs": None}
    expected |= {"augment": None, "cosine": False, "class_weights": None, "precision": "auto"}
    assert expected.items() <= plain.items()
    flags = "--augment, --augment flip, --cosine, --class-weights, --epochs 3, --compile, --size 64"
    flags += ", --model resnet34_unet, --encoder-weights x.pt, --encoder-lr 0"
    for flag in flags.split(", "):
        name = flag.split()[0].removeprefix("--").replace("-", "_")
        changed = {key for key, value in vars(parse(flag.split())).items() if value != plain[key]}
        assert changed == {name}
    assert parse(["--augment"]).augment == "affine"
    assert parse(["--class-weights"]).class_weights == "inverse"


def test_what_would_make_it_another_run_is_refused(voc):
    """All settings but those that a run may change, each typed with another value."""
    quick_train("--data", voc, epochs=1)
    others = {"--model": "fcn", "--augment": "flip", "--class-weights": "enet", "--size": 64}
    others |= {"--init": "xavier_normal", "--encoder-weights": "x", "--lr": 0.5, "--ema": 0.5}
    others |= {"--weight-decay": 0.5, "--seed": 7, "--train-split": "x", "--val-split": "x"}
    others |= {"--encoder-lr": 0.5, "--batch-size": 5}
    for typed in [["--cosine"], ["--no-pretrained"], *map(list, others.items())]:
        flag = typed[0].replace("no-", "")
        with pytest.raises(utils.UserError, match=f"last.pt: was trained with another {flag};"):
            train.read_settings(["--resume", "run", *map(str, typed)])
    known = {action.option_strings[0] for action in train.make_parser()._actions}
    free = "--data --steps --epochs --patience --device --precision --compile"
    assert known == {*free.split(), "--out", "--resume", "-h", "--cosine", "--pretrained", *others}


def test_what_a_run_may_change_is_taken_and_the_rest_stays(voc):
    quick_train("--data", voc, "--lr", 0.01, epochs=1)
    flags = "--data x --patience 3 --device mps --precision bfloat16 --compile"
    args, last = train.read_settings(["--resume", "run", *flags.split(), "--steps", "60"])
    changed = {"data": "x", "patience": 3, "device": "mps", "compile": True}
    changed |= {"precision": "bfloat16", "steps": 60, "epochs": None}
    assert changed.items() <= vars(args).items()
    assert (args.lr, args.size, args.model, args.out) == (0.01, 32, "small", Path("run"))
    assert last["epoch"] == 1
    args, _ = train.read_settings(["--resume", "run/last.pt", "--lr", "0.01", "--epochs", "4"])
    assert (args.epochs, args.lr) == (4, 0.01)  # what stays may be typed again
    args, _ = train.read_settings(["--resume", "run", "--steps", "10000"])  # as many as by default
    assert (args.epochs, args.steps) == (None, 10_000)


def test_the_order_of_images_and_their_augmentation_share_no_seed(voc, monkeypatch):
    """Else an image's place in the first batch tells whether it is mirrored."""
    orders, others, seed = [], [], torch.manual_seed

    class Generator(torch.Generator):
        def manual_seed(self, number):
            orders.append(number)
            return super().manual_seed(number)

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "manual_seed", lambda number: others.append(number) or seed(number))
    quick_train("--data", voc, "--augment", epochs=3)
    assert len(set(orders)) == 3 and len(set(others)) == 4  # epochs, and the first weights
    assert not {*orders} & {*others}


def test_one_command_starts_a_run_and_goes_on_with_it(voc, capsys):
    for epochs in (1, 2):
        quick_train("--data", voc, "--resume", epochs=epochs)
    assert [row["epoch"] for row in read_rows("run/log.csv")] == [1, 2]
    quick_train("--data", voc, "--resume", epochs=2)
    assert "this run is finished; to go on with it, raise --steps" in capsys.readouterr().out
    # Nor does a folder of a run that was ended before it was validated stop it. It may be
    # another's, which still trains: one that fails leaves it there.
    Path("killed").mkdir()
    Path("killed/settings.json").touch()
    with pytest.raises(utils.UserError, match="killed: holds a run; add --resume, or"):
        quick_train("--data", voc, name="killed", epochs=1)
    with pytest.raises(data.DataError, match="has no nowhere.txt"):
        quick_train("--data", voc, "--resume", "--val-split", "nowhere", name="killed", epochs=1)
    assert os.listdir("killed") == ["settings.json"]
    quick_train("--data", voc, "--resume", name="killed", epochs=1)
    assert len(read_rows("killed/log.csv")) == 1
    # A network without its last.pt, or a file of another kind, is not written over.
    for file in ("best.pt", "log.csv", "curves.png"):
        Path(file[:4]).mkdir()
        Path(file[:4], file).write_text("mine")
        for flags in ((), ("--resume",)):
            with pytest.raises(utils.UserError, match=f"{file[:4]}: holds a run; add --resume, or"):
                quick_train("--data", voc, *flags, name=file[:4], epochs=1)
        assert [path.read_text() for path in Path(file[:4]).iterdir()] == ["mine"]
    with pytest.raises(utils.UserError, match="run/last.pt: was trained with another --out"):
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


def test_checkpoints_that_cannot_be_gone_on_with_are_refused(voc):
    quick_train("--data", voc, epochs=1)
    shutil.copy("run/last.pt", "run/epoch1.pt")  # which would write over run/last.pt
    Path("copied").mkdir()
    shutil.copy("run/last.pt", "copied/last.pt")
    for given in ("run/best.pt", "run/epoch1.pt", "copied"):
        with pytest.raises(utils.UserError, match="pt: is no last.pt beside a best.pt; give the"):
            call(train, "--resume", given, "--epochs", 2)
    write_voc(Path("two"), num_classes=2)
    Path("two/classes.txt").write_text("background\ncat")
    with pytest.raises(utils.UserError, match="two: has other classes than the run; give"):
        call(train, "--resume", "run", "--epochs", 2, "--data", "two")


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
    assert ("226 tensors loaded, left out: ['classifier" in said) == (name == "erfnet")
    assert ("; pretrained: encoder\n" in said) == name.startswith("resnet34")
    # From here on the checkpoint is enough: nothing is looked up or downloaded again.
    monkeypatch.setenv("TORCH_HOME", str(voc))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    call(evaluate, "run/best.pt", "--void-as-background", "--out", "scores")
    metrics = conftest.read_scores("scores")
    assert 0 <= metrics["mean_iou"] < 1 and 0 < metrics["pixel_accuracy"] < 1
    image = voc / "VOCdevkit/VOC2007/JPEGImages/val_0.jpg"
    call(predict, image, "--checkpoint", "run/best.pt")
    assert Image.open("predictions/val_0_mask.png").size == Image.open(image).size


def test_without_network_the_error_says_where_the_weights_go(tmp_path, voc):
    settings = ("--model", "resnet34_unet", "--data", voc, "--size", 32, "--out", "run")
    nowhere = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path / "home")}
    result = run_script("train.py", *settings, cwd=tmp_path, **nowhere)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    said = result.stderr.splitlines()[-1]
    assert "bring https://download.pytorch.org/models/resnet34-b627a593.pth and give that" in said
    assert "--no-pretrained" in said and not Path("run").exists()
    # As it says: the file alone is enough.
    torch.save(resnet34().state_dict(), "brought.pth")
    settings += ("--encoder-weights", "brought.pth", "--epochs", 1)
    said = check(run_script("train.py", *settings, cwd=tmp_path, **nowhere))
    assert "brought.pth: 216 tensors loaded, left out: ['fc.weight', 'fc.bias']" in said


def test_encoder_weights_of_another_network_are_refused(voc):
    quick_train("--data", voc, epochs=1)
    flags = ("--data", voc, "--encoder-weights", "run/best.pt")
    with pytest.raises(utils.UserError, match="run/best.pt: does not fit darrennet's encoder"):
        quick_train(*flags, name="other", model="darrennet")
    assert not Path("other").exists()


def test_a_fine_tuned_network_says_what_its_weights_had_learned_from(voc, capsys):
    flags = ("--data", voc)
    quick_train(*flags, "--train-split", "val", "--val-split", "train", name="first", epochs=1)
    given = ("--encoder-weights", "first/last.pt", "--lr", 0)
    quick_train(*flags, *given, name="second", epochs=1)
    learned = state_of("first/last.pt")["state_dict"]
    started = state_of("second/last.pt")["trained"]
    names = [name for name, _ in models.build_model("small").named_parameters()]
    assert all(torch.equal(started[name], learned[name]) for name in names) and names
    both = sorted([f"train_{i}" for i in range(5)] + [f"val_{i}" for i in range(3)])
    assert state_of("second/best.pt")["images"]["train"] == both
    call(train, "--resume", "second", "--epochs", 2)  # and still when it goes on
    assert state_of("second/last.pt")["images"]["train"] == both
    call(evaluate, "second/last.pt")
    assert "was trained on 3 of these 3 images" in capsys.readouterr().out
    quick_train(*flags, name="third", epochs=1)
    call(evaluate, "third")
    assert "was trained on" not in capsys.readouterr().out


def test_cosine_is_pytorchs_annealing_by_the_step(voc, monkeypatch):
    rates, weights, modes, decays = [], [], [], set()
    augment, criterion = data.augment, train.criterion

    class Recording(torch.optim.AdamW):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            decays.add(self.param_groups[0]["weight_decay"])
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    monkeypatch.setattr(data, "augment", lambda *a: (modes.append(a[2:]), augment(*a))[1])
    monkeypatch.setattr(train, "criterion", lambda *a: (weights.append(a[2]), criterion(*a))[1])
    flags = ("--augment", "flip", "--class-weights", "median", "--cosine", "--lr", 0.01)
    quick_train("--data", voc, *flags, "--weight-decay", 0.07, epochs=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.01)
    expected, planned = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6), []
    for _ in range(6):  # three epochs of two steps
        planned.append(expected.get_last_lr()[0])
        optimizer.step()
        expected.step()
    assert rates == pytest.approx(planned) and modes == [("flip", 32)] * 6 and decays == {0.07}
    assert [row["lr"] for row in read_rows("run/log.csv")] == pytest.approx(planned[::2])
    expected = data.class_weights(data.VOC(voc, "train", 32), "median")
    assert len(expected.unique()) > 5 and all(torch.equal(each, expected) for each in weights)


def test_the_average_follows_the_weights_for_as_long_as_it_should():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.BatchNorm1d(2))
    average = copy.deepcopy(model)
    run = SimpleNamespace(args=SimpleNamespace(ema=0.9))
    run.tensors = train.float_tensors(average), train.float_tensors(model)
    generator, expected = torch.Generator().manual_seed(0), 0
    for step in range(200):
        drawn = torch.randn(3, 2, generator=generator)
        with torch.no_grad():
            model[0].weight.copy_(drawn[:2])
            model[1].running_mean.copy_(drawn[2])
        train.update_average(run, step)
        # The share of what has been so far: none at first, then as if ten steps were before it.
        decay = min(0.9, step / (step + 10))
        expected = decay * expected + (1 - decay) * drawn.numpy()
    kept = average.state_dict()
    assert np.allclose(kept["0.weight"], expected[:2], atol=1e-6)
    assert np.allclose(kept["1.running_mean"], expected[2], atol=1e-6)


def test_the_average_is_what_is_scored_and_kept(voc):
    flags = ("--data", voc, "--augment", "--precision", "float32", "--lr", 0.01)
    quick_train(*flags, name="averaged")
    last = state_of("averaged/last.pt")
    dataset = data.VOC(voc, "val", size=32)
    labels, losses, predictions = dataset.masks.long(), [], []
    for weights in (last["state_dict"], last["trained"]):
        model = models.from_checkpoint(last | {"state_dict": weights})
        with torch.inference_mode():
            logits = model(data.normalize(dataset.images))
        losses.append(F.cross_entropy(logits, labels, ignore_index=255).item())
        predictions.append(logits.argmax(1))
    logged = last["history"][-1]
    # Scores by hand, over all images at once; training validates them in two batches.
    known = labels != 255
    truth, found = labels[known].numpy(), predictions[0][known].numpy()
    assert logged["val_pixel_accuracy"] == pytest.approx((truth == found).mean())
    ious = [
        ((truth == c) & (found == c)).sum() / ((truth == c) | (found == c)).sum()
        for c in np.union1d(truth, found)
    ]
    assert logged["val_mean_iou"] == pytest.approx(np.mean(ious)) and len(ious) > 2
    assert logged["val_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert logged["val_loss"] != pytest.approx(losses[1], rel=1e-4)
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


def test_a_term_added_to_the_loss_counts_in_training_and_in_validation(voc, monkeypatch):
    flags = ("--data", voc, "--precision", "float32")
    quick_train(*flags, name="plain", epochs=1)
    ce = train.criterion
    monkeypatch.setattr(train, "criterion", lambda *batch: ce(*batch) + 3)
    quick_train(*flags, name="constant", epochs=1)
    plain, constant = (state_of(f"{name}/last.pt")["metrics"] for name in ("plain", "constant"))
    for column in ("train_loss", "val_loss"):
        assert constant[column] == pytest.approx(plain[column] + 3, rel=1e-5)
    assert same_weights("plain/last.pt", "constant/last.pt")


def test_an_epoch_is_random_by_seed_epoch_and_process_alone(voc, monkeypatch):
    flags = ["--data", str(voc), "--model", "small", "--augment", "--batch-size", "4"]
    args, _ = train.read_settings(flags)
    run, seen, augment = train.Run(args, None, torch.device("cpu")), [], data.augment
    taken, fetch = [], data.fetch
    monkeypatch.setattr(data, "augment", lambda *a: (seen.append(torch.rand(1)), augment(*a))[1])
    monkeypatch.setattr(data, "fetch", lambda *a: (taken.extend(a[1].tolist()), fetch(*a))[1])

    def drawn(epoch, rank=0, processes=1, seed=0):
        seen.clear()
        taken.clear()
        run.rank, run.processes, args.seed = rank, processes, seed
        torch.rand(5)  # what was drawn before must not matter
        train.train_one_epoch(run, epoch)
        return seen[0].item()

    first = drawn(1)
    assert drawn(1) == first
    assert len({first, drawn(2), drawn(1, seed=1), drawn(1, 1, 2)}) == 4

    def images(*how, **seed):
        drawn(*how, **seed)
        return taken.copy()

    batch, parts = images(1), (images(1, 0, 2), images(1, 1, 2))
    assert len(batch) == 4 and [len(part) for part in parts] == [2, 2]
    assert sorted(parts[0] + parts[1]) == sorted(batch)  # each image in one process
    assert images(1, seed=1) != batch
    weights = {}
    for seed in ("0", "1"):
        args, _ = train.read_settings([*flags, "--seed", seed])
        weights[seed] = train.Run(args, None, torch.device("cpu")).model.state_dict()
    assert not conftest.same(weights["0"], weights["1"])


def test_precision_is_what_was_asked_for(voc, monkeypatch, capsys):
    seen = []

    class Watched(Plain):
        def forward(self, images):
            out = super().forward(images)
            seen.append(out.dtype)
            return out

    monkeypatch.setitem(models.MODELS, "small", Watched)
    monkeypatch.setattr(train, "fast_precision", lambda device: "bfloat16")
    cases = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "auto": "bfloat16"}
    for number, (asked, used) in enumerate(cases.items()):
        seen.clear()
        quick_train("--data", voc, "--precision", asked, name=f"run{number}", epochs=1)
        # The last draws the samples.
        assert set(seen[:-1]) == {getattr(torch, used)} and len(seen) > 3
        assert f"parameters on 1 x cpu in {used}\n" in capsys.readouterr().out
    assert state_of("run1/best.pt")["state_dict"]["conv.weight"].dtype == torch.float32


def test_auto_takes_what_the_hardware_is_fast_with(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for told, expected in (({"amx_bf16": True}, "bfloat16"), ({}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda told=told: told, raising=False)
        assert train.fast_precision(cpu) == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older versions of PyTorch
    assert train.fast_precision(cpu) == train.fast_precision(torch.device("mps")) == "float32"
    cards = {"H200": (9, 0, "bfloat16"), "RTX 3060": (8, 6, "bfloat16"), "T4": (7, 5, "float16")}
    cards |= {"V100": (7, 0, "float16"), "P100": (6, 0, "float32")}
    cards |= dict.fromkeys(("NVIDIA GeForce GTX 1650", "T600"), (7, 5, "float32"))  # make NaN of it
    for name, (major, minor, expected) in cards.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, v=(major, minor): v)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d, name=name: name)
        assert train.fast_precision(cuda) == expected


def test_float16_scales_the_loss_and_goes_on_with_its_scale(voc, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, growth_interval=3)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    flags = ("--data", voc, "--precision", "float16", "--augment")
    quick_train(*flags, name="whole", epochs=4)
    quick_train(*flags, name="halves", epochs=2)
    call(train, "--resume", "halves", "--epochs", 4)
    assert same_weights("whole/last.pt", "halves/last.pt")
    # Doubled after every third of eight steps.
    assert state_of("halves/last.pt")["scaler"]["scale"] == 2.0**16 * 2**2
    assert state_of("halves/last.pt")["scaler"]["_growth_tracker"] == 2
    quick_train("--data", voc, "--precision", "float32", "--augment", name="plain", epochs=4)
    losses = [[float(r["val_loss"]) for r in read_rows(f"{n}/log.csv")] for n in ("whole", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_gradients_that_stay_infinite_end_the_run(voc, monkeypatch):
    scaler, ce = functools.partial(torch.amp.GradScaler, init_scale=2e-6), train.criterion
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(train, "criterion", lambda x, *rest: ce(x, *rest) + (0 * x).sum().sqrt())
    with pytest.raises(utils.UserError, match="epoch 1: .* gradients are not .*float32"):
        quick_train("--data", voc, "--precision", "float16", epochs=2)
    assert not Path("run").exists()


def steps_of(name, voc, factor):
    """Return a network before and after an epoch with an --encoder-lr, as dictionaries of tensors."""
    flags = ["--data", str(voc), "--model", name, "--no-pretrained", "--size", "32"]
    args, _ = train.read_settings([*flags, "--encoder-lr", str(factor), "--batch-size", "5"])
    with contextlib.redirect_stdout(io.StringIO()):
        run = train.Run(args, None, torch.device("cpu"))
    before = copy.deepcopy(run.model.state_dict())
    train.train_one_epoch(run, 1)
    return before, run.model.state_dict(), run.average.state_dict()


@pytest.mark.parametrize("name", models.MODELS)
def test_a_frozen_encoder_stays_as_it_is_bit_for_bit(name, voc):
    before, *after = steps_of(name, voc, 0)
    for state in after:
        moved = {part for part in before if not torch.equal(state[part], before[part])}
        assert moved and all(part.startswith("decoder.") for part in moved)


def test_the_encoder_learns_at_a_tenth_of_the_rate(voc, monkeypatch):
    before, whole, _ = steps_of("fcn", voc, 1)
    same, tenth, _ = steps_of("fcn", voc, 0.1)
    for name, tensor in before.items():
        assert torch.equal(tensor, same[name])
        if name.endswith("weight"):  # one step of AdamW, whose length is the rate's
            expected = (whole[name] - tensor) * (0.1 if name.startswith("encoder.") else 1)
            torch.testing.assert_close(tenth[name] - tensor, expected, rtol=1e-2, atol=1e-7)
    # And a run goes on with it as with any other setting.
    flags = ("--data", voc, "--encoder-lr", 0.1)
    quick_train(*flags, name="whole", epochs=2, model="fcn")
    quick_train(*flags, name="halves", epochs=1, model="fcn")
    call(train, "--resume", "halves", "--epochs", 2)
    assert same_weights("whole/last.pt", "halves/last.pt")
    monkeypatch.setitem(models.MODELS, "plain", Plain)
    with pytest.raises(utils.UserError, match="--encoder-lr: this network has no part .*encoder"):
        quick_train(*flags, name="none", epochs=1, model="plain")
    assert not Path("none").exists()


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
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_cuda_graph_learns_what_the_model_itself_learns(voc, monkeypatch, precision):
    monkeypatch.setitem(models.MODELS, "plain", Plain)
    flags = ("--data", voc, "--device", "cuda", "--precision", precision)
    for name, more in (("plain", ()), ("graph", ("--compile",))):
        quick_train(*flags, *more, name=name, model="plain", epochs=3)
    plain, graph = (state_of(f"{name}/last.pt")["trained"] for name in ("plain", "graph"))
    for name, value in plain.items():
        torch.testing.assert_close(graph[name], value, rtol=1e-2, atol=1e-3)


class OwnPretrained(Plain):
    """A network that brings a part of its weights along where it is told to, and says which."""

    def __init__(self, num_classes, pretrained=False):
        super().__init__(num_classes)
        self.last = torch.nn.Conv2d(num_classes, num_classes, 1)
        torch.nn.init.constant_(self.last.weight, 0.125)
        self.pretrained_parts = ("conv",) if pretrained else ()
        if pretrained:
            torch.nn.init.constant_(self.conv.weight, 0.125)

    def forward(self, images):
        return self.last(self.conv(images))


def test_a_part_that_came_pretrained_is_not_initialised_again(voc, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "resnet34_own", OwnPretrained)
    uniform = ("--no-pretrained", "--init", "xavier_uniform")
    for name, flags in (("with", ()), ("without", uniform)):
        quick_train("--data", voc, "--lr", 0, *flags, name=name, epochs=1, model="resnet34_own")
        state = state_of(f"{name}/last.pt")["state_dict"]
        assert (state["conv.weight"] == 0.125).all() == (name == "with")
        assert not (state["last.weight"] == 0.125).any()
    printed = capsys.readouterr().out
    assert "--init kaiming: last; pretrained: conv\n" in printed
    assert "--init xavier_uniform: conv, last; pretrained: nothing\n" in printed
    # 21 connections in and out. A normal distribution of Kaiming's deviation goes further.
    assert 0.3 < state["last.weight"].abs().max() <= (6 / 42) ** 0.5


def test_of_runs_that_start_at_once_none_shares_a_folder():
    args = train.make_parser().parse_args(["--model", "small"])
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(train.claim_folder, [args] * 24))
    folders = {folder for folder, _ in claimed}
    assert all(new for _, new in claimed)
    assert len(folders) == 24 and {f.name for f in folders} > {"small", "small-24"}
    args.out = Path("named")

    def claim(_):
        try:
            return train.claim_folder(args)
        except utils.UserError:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert sum(folder is not None for folder in pool.map(claim, range(24))) == 1


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


def test_help_explains_every_flag(tmp_path):
    assert "python train.py --resume" in check(run_script("train.py", "--help", cwd=tmp_path))
    assert all(action.help for action in train.make_parser()._actions)
