"""The command lines, in processes of their own, on tiny folders in VOC's layout."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL_VOC, REPOSITORY, call, check, run_script
from PIL import Image

import data
import evaluate
import models
import predict
import train
import utils

COLUMNS = [
    "epoch",
    "lr",
    "train_loss",
    "val_loss",
    "val_mean_iou",
    "val_pixel_accuracy",
    "images_per_second",
    "seconds",
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def quick_train(*args, name="run", epochs=2):
    settings = ("--epochs", epochs, "--size", 32, "--batch-size", 2, "--device", "cpu")
    call(train, *settings, "--out", name, *args)


def state_of(path):
    return torch.load(path, weights_only=True)


def same_weights(a, b):
    return all(torch.equal(x, b["state_dict"][name]) for name, x in a["state_dict"].items())


@pytest.mark.parametrize("model", models.MODELS)
def test_train_evaluate_predict(tmp_path, voc, model):
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

    # The data and the network are those of the checkpoint: no training flag is needed again.
    table = check(run_script("evaluate.py", "run/best.pt", cwd=tmp_path))
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["split"] == "val" and metrics["checkpoint"] == "run/best.pt"
    assert list(metrics["iou"]) == best["classes"]
    assert f"{metrics['mean_iou']:.6f}" in table and f"{metrics['pixel_accuracy']:.6f}" in table
    ids = [f"val_{i}" for i in range(3)]
    paths = [voc / f"VOCdevkit/VOC2007/JPEGImages/{name}.jpg" for name in ids]
    flags = ("--checkpoint", "run/best.pt", "--out", "segmented")
    check(run_script("predict.py", *paths, *flags, cwd=tmp_path))
    compare_masks_with_metrics(voc, Path("segmented"), ids, metrics)


def compare_masks_with_metrics(voc, predicted, ids, metrics):
    """Score the masks that predict.py wrote with numpy alone; expect what evaluate.py reports."""
    truth = voc / "VOCdevkit" / "VOC2007" / "SegmentationClass"
    intersection, union, right, total = np.zeros(21), np.zeros(21), 0, 0
    for name in ids:
        file = Image.open(predicted / f"{name}_mask.png")
        assert file.mode == "P"
        p, m = np.array(file), np.array(Image.open(truth / f"{name}.png"))
        assert p.shape == m.shape and (predicted / f"{name}_overlay.png").exists()
        p, m = p[m != 255], m[m != 255]
        right, total = right + (p == m).sum(), total + m.size
        for c in range(21):
            intersection[c] += ((p == c) & (m == c)).sum()
            union[c] += ((p == c) | (m == c)).sum()
    iou = intersection[union > 0] / union[union > 0]
    assert round(iou.mean(), 6) == round(metrics["mean_iou"], 6)
    assert round(right / total, 6) == round(metrics["pixel_accuracy"], 6)
    reported = np.array([np.nan if v is None else v for v in metrics["iou"].values()])
    assert np.array_equal(np.isnan(reported), union == 0)
    assert np.allclose(reported[union > 0], iou)


@pytest.mark.skipif(not REAL_VOC, reason="VOC_ROOT names no VOC 2007")
def test_predicted_masks_score_what_evaluate_reports_on_real_voc():
    flags = ("--model", "fcn", "--data", REAL_VOC, "--size", 64, "--batch-size", 16)
    quick_train(*flags, epochs=3)
    root = Path(REAL_VOC, "VOCdevkit", "VOC2007")
    ids = (root / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    Path("photos").mkdir()
    for name in ids:
        Path(f"photos/{name}.jpg").symlink_to((root / f"JPEGImages/{name}.jpg").resolve())
    call(evaluate, "run/best.pt")
    call(predict, "photos", "--checkpoint", "run/best.pt")
    metrics = json.loads(Path("run/metrics.json").read_text())
    compare_masks_with_metrics(Path(REAL_VOC), Path("predictions"), ids, metrics)


def test_void_as_background_scores_at_the_training_size(voc):
    quick_train("--model", "fcn", "--data", voc)
    call(evaluate, "run/best.pt", "--void-as-background", "--out", "paper")
    metrics = json.loads(Path("paper/metrics.json").read_text())
    assert metrics["protocol"] == "32x32, void as background"

    dataset = data.VOC(voc, "val", size=32)
    with torch.inference_mode():
        logits = models.from_checkpoint(state_of("run/best.pt"))(data.normalize(dataset.images))
    truth = np.where(dataset.masks == 255, 0, dataset.masks)
    accuracy = (logits.argmax(1).numpy() == truth).mean()
    assert metrics["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-3)


def test_evaluate_refuses_data_with_other_classes(tmp_path, voc):
    quick_train("--model", "fcn", "--data", voc, epochs=1)
    result = run_script("evaluate.py", "run/best.pt", "--data", "shapes", cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "was trained on 21 classes" in result.stderr
    assert not Path("run/metrics.json").exists()


def test_same_seed_same_weights(voc):
    flags = ("--model", "darrennet", "--data", voc, "--augment", "--cosine")
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        quick_train(*flags, "--seed", seed, name=name)
    one, two, other = (state_of(f"{name}/last.pt") for name in ("one", "two", "other"))
    assert same_weights(one, two) and not same_weights(one, other)


def test_resume_needs_no_flags_and_ends_with_the_same_weights(tmp_path, voc):
    flags = ("--model", "darrennet", "--data", voc, "--augment", "--seed", 3)
    quick_train(*flags, name="runs/whole", epochs=4)
    quick_train(*flags, name="runs/halves", epochs=2)
    refused = run_script("train.py", *flags, "--out", "runs/halves", cwd=tmp_path)
    assert refused.returncode == 2 and "runs/halves: holds a run" in refused.stderr
    torch.manual_seed(99)  # what the process did before must not matter
    call(train, "--resume", "--epochs", 4)  # the newest run
    whole, halves = (state_of(f"runs/{name}/last.pt") for name in ("whole", "halves"))
    assert same_weights(whole, halves)
    assert [row["epoch"] for row in halves["history"]] == [1, 2, 3, 4]
    assert len(Path("runs/halves/log.csv").read_text().splitlines()) == 5


def test_runs_are_numbered_and_the_newest_is_the_default(voc, capsys):
    settings = ("--model", "fcn", "--data", voc, "--epochs", 1, "--size", 32, "--batch-size", 2)
    for _ in range(2):
        call(train, *settings)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["fcn", "fcn-2"]
    call(evaluate)
    assert "runs/fcn-2/best.pt" in capsys.readouterr().out
    image = voc / "VOCdevkit" / "VOC2007" / "JPEGImages" / "val_0.jpg"
    call(predict, image)
    printed = capsys.readouterr().out
    assert f"{image}: " in printed and "%" in printed
    assert Path("predictions/val_0_overlay.png").exists()


def test_predict_says_why_a_mask_is_all_black(voc, capsys):
    quick_train("--model", "fcn", "--data", voc, epochs=1)
    checkpoint = state_of("run/best.pt")
    checkpoint["state_dict"]["decoder.5.bias"][0] = 1e4
    torch.save(checkpoint, "black.pt")
    image = voc / "VOCdevkit" / "VOC2007" / "JPEGImages" / "val_0.jpg"
    call(predict, image, "--checkpoint", "black.pt")
    printed = capsys.readouterr().out
    assert "background 100.0%" in printed and "nothing but background was found" in printed


def test_a_loss_that_is_not_a_number_stops_the_run(voc, monkeypatch):
    quick_train("--model", "fcn", "--data", voc, epochs=1)
    before = Path("run/last.pt").read_bytes()
    monkeypatch.setattr(data, "normalize", lambda images: images * float("nan"))
    with pytest.raises(utils.UserError, match="epoch 2/3, step 1: the loss is nan.*--lr"):
        call(train, "--resume", "run/last.pt", "--epochs", 3)
    assert Path("run/last.pt").read_bytes() == before


def break_nothing(root):
    pass


def drop_mask(root):
    (root / "SegmentationClass" / "train_1.png").unlink()


def rgb_mask(root):
    path = root / "SegmentationClass" / "train_1.png"
    Image.open(path).convert("RGB").save(path)


def label_outside(root):
    (root / "classes.txt").write_text("background\ncat\n")


def text_as_jpeg(root):
    (root / "JPEGImages" / "train_1.jpg").write_text("hello")


def other_size(root):
    path = root / "SegmentationClass" / "train_1.png"
    mask = Image.open(path)
    mask.resize((mask.width + 1, mask.height)).save(path)


@pytest.mark.parametrize(
    "spoil, flags, said",
    [
        (break_nothing, ("--data", "nowhere"), "nowhere: has no folder JPEGImages"),
        (break_nothing, ("--train-split", "tarin"), "tarin.txt: does not exist"),
        (break_nothing, ("--device", "cuda:99"), "device 'cuda:99' cannot be used here"),
        (break_nothing, ("--resume", "gone.pt"), "gone.pt: does not exist"),
        (break_nothing, ("--lr", "nan"), "argument --lr: invalid float from 0 to 10"),
        (break_nothing, ("--size", "8"), "argument --size: invalid int from 32 to 4096"),
        (drop_mask, (), "train_1.png: does not exist"),
        (rgb_mask, (), "train_1.png: is a mask of kind RGB PNG"),
        (label_outside, (), "but the 2 classes are 0 to 1"),
        (text_as_jpeg, (), "train_1.jpg: cannot be read as an image"),
        (other_size, (), "train_1.png: is "),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_leaves_nothing(tmp_path, voc, spoil, flags, said):
    spoil(voc / "VOCdevkit" / "VOC2007")
    result = run_script("train.py", "--data", voc, "--out", "run", *flags, cwd=tmp_path)
    assert result.returncode == 2
    assert said in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    if "argument" not in said:  # argparse shows the usage first
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_without_a_checkpoint_evaluate_and_predict_say_how_to_get_one(tmp_path, voc):
    image = voc / "VOCdevkit" / "VOC2007" / "JPEGImages" / "val_0.jpg"
    for script, args in (("predict.py", [image]), ("evaluate.py", [])):
        result = run_script(script, *args, cwd=tmp_path)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
        assert "there is no checkpoint" in result.stderr and "python train.py" in result.stderr
        assert not (tmp_path / "predictions").exists()


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "predict.py"])
def test_help_says_what_each_flag_does(tmp_path, script):
    printed = check(run_script(script, "--help", cwd=tmp_path))
    assert f"python {script}" in printed and "--device" in printed


def test_predict_does_not_wait_for_torchvision_or_matplotlib(tmp_path):
    (tmp_path / "imports.py").write_text(
        "import sys, predict\nprint([m for m in ('torchvision', 'matplotlib') if m in sys.modules])"
    )
    printed = check(run_script(tmp_path / "imports.py", cwd=tmp_path, PYTHONPATH=str(REPOSITORY)))
    assert printed.strip() == "[]"
