"""evaluate.py on tiny data sets, by networks whose predictions are known or counted by numpy."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL_VOC, REPOSITORY, call, check, read_scores, run_script
from PIL import Image
from torch import nn

import data
import evaluate
import models
import predict
import utils

CLASSES = ["background", "green", "blue"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Colors(nn.Module):
    """Calls red pixels class 0, green ones 1, and blue ones 2; has no weights."""

    sizes = None  # a list of the images' sizes, new for each test

    def __init__(self, num_classes):
        super().__init__()

    def forward(self, images):
        self.sizes.append(tuple(images.shape[-2:]))
        return images * 10


@pytest.fixture
def colors(monkeypatch, no_pictures):
    """The network above among the models; its scores need no figures."""
    monkeypatch.setitem(models.MODELS, "colors", Colors)
    monkeypatch.setattr(Colors, "sizes", [])


def write_data(root, **splits):
    """Write images of one colour in VOC's layout. splits: {split: {name: (colour, label)}}."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for split, images in splits.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(images))
        for name, (color, label) in images.items():
            Image.new("RGB", (40, 30), color).save(root / f"JPEGImages/{name}.png")
            Image.new("L", (40, 30), label).save(root / f"SegmentationClass/{name}.png")
    return root.resolve()


# Of the validation images two are right: IoUs of 1, 1/2 and 0. All of `test` are.
TRAIN = {"t0": ("red", 0), "t1": ("lime", 1)}
VAL = {"v0": ("red", 0), "v1": ("lime", 1), "v2": ("lime", 2)}
TEST = {"e0": ("red", 0), "e1": ("blue", 2)}


def write_run(path, root, model="colors", classes=CLASSES, names=True, seed=0, **args):
    """Write a checkpoint as train.py does, with random weights where the model has any."""
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "model": model,
        "options": {},
        "classes": list(classes),
        "palette": data.color_map(len(classes)),
        "size": 32,
        "data": str(root),
        "state_dict": models.build_model(model, len(classes)).state_dict(),
        "epoch": 7,
        "metrics": {"val_mean_iou": 0.5},
        "args": {"train_split": "train", "val_split": "val", "model": model} | args,
    }
    if names:
        checkpoint["images"] = {"train": list(TRAIN), "val": list(VAL)}
    utils.save_checkpoint(path, checkpoint)


# ----------------------------------------------------------------------------------- the scores


def test_predicted_masks_score_what_evaluate_reports(tmp_path, voc):
    root = voc / "VOCdevkit" / "VOC2007"
    write_run(Path("run/best.pt"), root, "darrennet", data.VOC_CLASSES, names=False)
    # The data and the network are those of the checkpoint: no training flag is needed.
    table = check(run_script("evaluate.py", "run/best.pt", cwd=tmp_path))
    metrics = read_scores("run/scores/val")
    assert metrics["split"] == "val" and metrics["checkpoint"] == str(Path("run/best.pt").resolve())
    assert list(metrics["iou"]) == list(data.VOC_CLASSES)
    assert f"{metrics['mean_iou']:.6f}" in table and f"{metrics['pixel_accuracy']:.6f}" in table
    for picture in ("confusion_matrix.png", "class_iou.png", "examples.png"):
        looks_drawn(Path("run/scores/val", picture), 300, 300)
    ids = [f"val_{i}" for i in range(3)]
    paths = [root / f"JPEGImages/{name}.jpg" for name in ids]
    flags = ("--checkpoint", "run", "--out", "segmented")
    check(run_script("predict.py", *paths, *flags, cwd=tmp_path))
    compare_masks_with_metrics(root, Path("segmented"), ids, metrics)


@pytest.mark.parametrize("flags", [(), ("--tta",), ("--size", 80)])
def test_masks_by_the_same_flags_score_the_same(voc, no_pictures, flags):
    root = voc / "VOCdevkit" / "VOC2007"
    write_run(Path("run/best.pt"), root, "fcn", data.VOC_CLASSES, names=False)
    call(evaluate, "run", *flags, "--out", "scores")
    ids = [f"val_{i}" for i in range(3)]
    paths = [root / f"JPEGImages/{name}.jpg" for name in ids]
    call(predict, *paths, "--checkpoint", "run", *flags)
    compare_masks_with_metrics(root, Path("predictions"), ids, read_scores("scores"))


def compare_masks_with_metrics(root, predicted, ids, metrics):
    """Score the masks that predict.py wrote with numpy alone; expect what evaluate.py reports."""
    intersection, union, right, total = np.zeros(21), np.zeros(21), 0, 0
    for name in ids:
        file = Image.open(predicted / f"{name}_mask.png")
        assert file.mode == "P"
        p, m = np.array(file), np.array(Image.open(root / f"SegmentationClass/{name}.png"))
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
def test_predicted_masks_score_what_evaluate_reports_on_real_voc(no_pictures):
    root = Path(REAL_VOC, "VOCdevkit", "VOC2007").resolve()
    ids = (root / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[::4]
    Path("voc/ImageSets/Segmentation").mkdir(parents=True)
    Path("voc/ImageSets/Segmentation/val.txt").write_text("\n".join(ids))
    for folder in ("JPEGImages", "SegmentationClass"):
        Path("voc", folder).symlink_to(root / folder)
    write_run(Path("run/best.pt"), Path("voc"), "darrennet", data.VOC_CLASSES, names=False)
    Path("photos").mkdir()
    for name in ids:
        Path(f"photos/{name}.jpg").symlink_to(root / f"JPEGImages/{name}.jpg")
    call(evaluate, "run")
    call(predict, "photos", "--checkpoint", "run")
    compare_masks_with_metrics(root, Path("predictions"), ids, read_scores("run/scores/val"))


def test_scores_of_a_known_network(colors):
    write_run(Path("run/best.pt"), write_data(Path("own"), train=TRAIN, val=VAL))
    call(evaluate, "run")
    metrics = read_scores("run/scores/val")
    assert metrics["iou"] == {"background": 1, "green": 0.5, "blue": 0}
    assert metrics["mean_iou"] == pytest.approx(0.5)
    assert metrics["pixel_accuracy"] == pytest.approx(2 / 3)
    assert metrics["images"] == 3 and metrics["images_trained_on"] == 0


def test_void_as_background_scores_at_the_training_size(voc, no_pictures):
    root = voc / "VOCdevkit" / "VOC2007"
    write_run(Path("run/best.pt"), root, "fcn", data.VOC_CLASSES, names=False)
    call(evaluate, "run/best.pt", "--void-as-background", "--out", "paper")
    metrics = read_scores("paper")
    assert metrics["protocol"] == "32x32, void as background"

    dataset = data.VOC(root, "val", size=32)
    checkpoint = torch.load("run/best.pt", weights_only=True)
    with torch.inference_mode():
        logits = models.from_checkpoint(checkpoint)(data.normalize(dataset.images))
    truth = np.where(dataset.masks == 255, 0, dataset.masks)
    accuracy = (logits.argmax(1).numpy() == truth).mean()
    assert metrics["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-3)


def test_images_of_another_size_than_in_training(colors):
    write_run(Path("run/best.pt"), write_data(Path("own"), train=TRAIN, val=VAL))
    call(evaluate, "run", "--size", 96)
    assert set(Colors.sizes) == {(96, 96)}
    assert read_scores("run/scores/val-96")["size"] == 96
    call(evaluate, "run", "--size", 96, "--void-as-background")
    assert read_scores("run/scores/val-paper-96")["protocol"] == "96x96, void as background"


def test_a_split_that_is_void_throughout_is_said_to_be(colors):
    root = write_data(Path("own"), train=TRAIN, val=VAL, test={"e0": ("red", 255)})
    write_run(Path("run/best.pt"), root)
    with pytest.raises(utils.UserError, match="split test is void throughout"):
        call(evaluate, "run", "--split", "test")
    assert not list(Path("run").rglob("metrics.json"))


# ---------------------------------------------------------------------------- which images, which data


def test_the_default_is_the_runs_own_split_and_one_it_was_trained_on_is_said(colors, capsys):
    root = write_data(Path("own"), train=TRAIN, val=VAL)
    write_run(Path("run/best.pt"), root, train_split="val", val_split="train")
    checkpoint = torch.load("run/best.pt", weights_only=True)
    checkpoint["images"] = {"train": list(VAL), "val": list(TRAIN)}
    torch.save(checkpoint, "run/best.pt")
    call(evaluate, "run")
    metrics = read_scores("run/scores/train")
    assert metrics["split"] == "train" and metrics["mean_iou"] == 1
    assert metrics["images_trained_on"] == 0 and "was trained on" not in capsys.readouterr().out
    call(evaluate, "run", "--split", "val")
    assert read_scores("run/scores/val")["images_trained_on"] == 3
    assert "was trained on 3 of these 3 images" in capsys.readouterr().out


def test_voc_2012_has_the_images_of_voc_2007_under_other_names(colors, capsys):
    names = ("000039", "000063", "2008_000001")
    root = write_data(Path("own"), val=dict(zip(names, VAL.values())))
    write_run(Path("run/best.pt"), root)
    checkpoint = torch.load("run/best.pt", weights_only=True)
    checkpoint["images"] = {"train": ["2007_000039", "2008_000063"], "val": ["2007_000063"]}
    torch.save(checkpoint, "run/best.pt")
    call(evaluate, "run", "--data", root)
    assert read_scores(next(Path("run/scores").iterdir()))["images_trained_on"] == 1
    assert "was trained on 1 of these 3 images" in capsys.readouterr().out


def test_a_list_that_has_changed_is_scored_as_it_is_now(colors, capsys):
    root = write_data(Path("own"), train=TRAIN, val=VAL)
    write_run(Path("run/best.pt"), root)
    call(evaluate, "run")
    assert read_scores("run/scores/val")["images_trained_on"] == 0
    capsys.readouterr()
    write_data(root, val={"v0": ("red", 0), "t1": ("lime", 1), "new": ("lime", 0)})
    call(evaluate, "run")
    # Of its three images, red and green, one was trained on.
    scores = read_scores("run/scores/val")
    assert scores["iou"] == {"background": 0.5, "green": 0.5, "blue": None}
    assert scores["images_trained_on"] == 1
    assert "was trained on 1 of these 3 images" in capsys.readouterr().out


def test_the_split_all_is_every_image(colors):
    root = write_data(Path("own"), train=TRAIN, val=VAL, test=TEST)
    write_run(Path("run/best.pt"), root)
    call(evaluate, "run", "--split", "all", "--out", "scores")
    scores = read_scores("scores")
    assert scores["images"] == 7 and scores["images_trained_on"] == 2
    assert scores["iou"] == {"background": 1, "green": 2 / 3, "blue": 0.5}


def test_a_run_is_scored_on_its_own_data_from_any_folder(colors, monkeypatch):
    write_run(Path("a/run/best.pt"), write_data(Path("a/data"), train=TRAIN, val=VAL))
    write_data(Path("b/data"), train=TRAIN, val=TEST)
    monkeypatch.chdir("b")
    call(evaluate, "../a/run")
    assert read_scores("../a/run/scores/val")["pixel_accuracy"] == pytest.approx(2 / 3)
    shutil.move("../a/data", "../a/moved")
    with pytest.raises(utils.UserError, match="a/data, which is gone; give --data"):
        call(evaluate, "../a/run")
    call(evaluate, "../a/run", "--data", "../a/moved", "--out", "moved")
    assert read_scores("moved")["pixel_accuracy"] == pytest.approx(2 / 3)


def test_checkpoints_from_before_the_names_were_kept(colors):
    root = write_data(Path("own"), train=TRAIN, val=VAL)
    write_run(Path("old/best.pt"), root, names=False)
    old = torch.load("old/best.pt", weights_only=True)
    torch.save({key: value for key, value in old.items() if key != "args"}, "old/best.pt")
    call(evaluate, "old/best.pt")
    assert read_scores("old/scores/val")["pixel_accuracy"] == pytest.approx(2 / 3)


def test_evaluate_refuses_data_with_other_classes(tmp_path, voc):
    write_run(Path("run/best.pt"), voc, "fcn", data.VOC_CLASSES, names=False)
    result = run_script("evaluate.py", "run/best.pt", "--data", "shapes", cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "was trained on 21 classes" in result.stderr
    assert not Path("run/scores").exists()


def test_a_run_that_was_stopped_in_its_first_epoch_is_told_to_go_on():
    Path("run").mkdir()
    Path("run/last.pt").touch()
    with pytest.raises(utils.UserError, match="run/best.pt: does not exist yet: .*--resume it"):
        call(evaluate, "run")
    with pytest.raises(utils.UserError, match="run/bets.pt: does not exist$"):
        call(evaluate, "run/bets.pt")


def test_without_a_checkpoint_evaluate_says_how_to_get_one(tmp_path):
    result = run_script("evaluate.py", cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "there is no checkpoint" in result.stderr and "python train.py" in result.stderr


# ------------------------------------------------------------------------------ nothing is overwritten


def test_no_evaluation_overwrites_another_ones_scores(colors):
    root = write_data(Path("own"), train=TRAIN, val=VAL, test=TEST)
    other = write_data(Path("other"), train=TRAIN, val=TEST)
    write_run(Path("run/best.pt"), root)
    write_run(Path("run/last.pt"), root)
    scores = Path("run/scores")
    commands = {
        "val": (),
        "test": ("--split", "test"),
        "val-paper": ("--void-as-background",),
        "val-tta": ("--tta",),
        "val-" + "_".join(other.parts[1:]).replace("-", "_"): ("--data", other),
        "val-64": ("--size", 64),
        "val-paper-tta-64": ("--size", 64, "--tta", "--void-as-background"),
    }
    for folder, flags in commands.items():
        before = {file: file.read_bytes() for file in scores.rglob("*.json")}
        call(evaluate, "run", *flags)
        assert (scores / folder / "metrics.json").exists()
        assert all(file.read_bytes() == text for file, text in before.items())
    call(evaluate, "run/last.pt")
    assert read_scores(scores / "val-last.pt")["checkpoint"].endswith("last.pt")
    call(evaluate, "run")  # the very same may be done again
    assert sorted(path.name for path in scores.iterdir()) == sorted([*commands, "val-last.pt"])

    before = (scores / "test/metrics.json").read_text()
    for paths in (("run",), ("run", "run/last.pt")):
        with pytest.raises(utils.UserError, match="scores/test: holds other scores; .*--out"):
            call(evaluate, *paths, "--out", scores / "test")
    assert (scores / "test/metrics.json").read_text() == before
    call(evaluate, "run", "--split", "test", "--out", scores / "test")
    Path("notes").mkdir()
    for text in ("not JSON", "[1, 2]", '{"a": 1}'):
        Path("notes/metrics.json").write_text(text)
        with pytest.raises(utils.UserError, match="notes: holds other scores"):
            call(evaluate, "run", "--out", "notes")


# ------------------------------------------------------------------------------------- several runs


def looks_drawn(path, width, height):
    """Fail unless the file is a picture of at least that size that is not blank."""
    pixels = np.array(Image.open(path).convert("L"))
    assert pixels.shape[0] >= height and pixels.shape[1] >= width, pixels.shape
    assert pixels.std() > 10 and pixels[0, 0] == 255  # ink on a light background


LOG = "epoch,train_loss,val_loss,val_mean_iou,val_pixel_accuracy\n1,3,4,0.1,0.2\n2,2,3,0.3,0.4\n"


def test_several_checkpoints_are_compared(tmp_path, voc):
    root = voc / "VOCdevkit" / "VOC2007"
    for name, model, args in (
        ("one", "fcn", {"cosine": True, "epochs": 9}),
        ("two", "darrennet", {}),
    ):
        write_run(Path(f"runs/{name}/best.pt"), root, model, data.VOC_CLASSES, names=False, **args)
        Path(f"runs/{name}/log.csv").write_text(LOG)
    # A pattern that no shell has expanded.
    printed = check(run_script("evaluate.py", "runs/*", "--void-as-background", cwd=tmp_path))
    table = [line for line in printed.splitlines() if line.startswith("|")]
    results = read_scores("comparison")
    assert list(results) == ["one", "two"] and len(table) == 4
    for line, (name, metrics) in zip(table[2:], results.items()):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        iou = {c: value for c, value in metrics["iou"].items() if value is not None}
        assert cells[:2] == [name, metrics["model"]]
        model = models.build_model(metrics["model"])
        assert cells[3] == f"{sum(p.numel() for p in model.parameters()):,}"
        assert cells[4] == ("7 of 9" if name == "one" else "7 of ?")
        assert cells[5] == f"{metrics['mean_iou']:.4f}"
        assert float(cells[6].rstrip("%")) == pytest.approx(
            100 * metrics["pixel_accuracy"], abs=0.05
        )
        assert cells[7].split()[-1] == f"{max(iou.values()):.3f}"
        assert cells[8].split()[-1] == f"{min(iou.values()):.3f}"
        assert cells[10] == ("--cosine" if name == "one" else "-")
    looks_drawn("comparison/comparison.png", 500, 600)
    looks_drawn("comparison/curves.png", 1000, 400)


def test_alone_a_checkpoint_scores_what_it_does_among_others(colors):
    root = write_data(Path("own"), train=TRAIN, val=VAL)
    for name in ("one", "two"):
        write_run(Path(f"runs/{name}/best.pt"), root)
    call(evaluate, "runs/one", "runs/two")
    call(evaluate, "runs/two")
    alone, among = read_scores("runs/two/scores/val"), read_scores("comparison")["two"]
    for metrics in (alone, among):
        assert metrics.pop("images_per_second") > 0
    assert alone == among and alone["iou"]["green"] == 0.5


def test_a_comparison_of_other_runs_gets_a_folder_of_its_own(colors):
    root = write_data(Path("own"), train=TRAIN, val=VAL)
    for name in ("one", "two", "three"):
        write_run(Path(f"{name}/best.pt"), root)
    for others in ("two", "three", "two"):
        call(evaluate, "one", others)
    for folder, others in (("comparison", "two"), ("comparison-2", "three")):
        assert list(read_scores(folder)) == ["one", others]
    assert not Path("comparison-3").exists()  # the very same may be done again


def test_a_log_that_was_cut_off_is_found_before_the_scoring(colors):
    root = write_data(Path("own"), train=TRAIN, val=VAL)
    for name in ("one", "two"):
        write_run(Path(f"{name}/best.pt"), root)
    Path("two/log.csv").write_text(LOG[: len(LOG) - 5])
    with pytest.raises(utils.UserError, match="two/log.csv: is not a log"):
        call(evaluate, "one", "two")
    assert not Path("comparison").exists()


def test_runs_on_other_data_of_the_same_names_are_not_compared(colors):
    for name in ("one", "two"):
        write_run(Path(f"{name}/best.pt"), write_data(Path(f"own-{name}"), train=TRAIN, val=VAL))
    with pytest.raises(utils.UserError, match="two/best.pt: has other images or masks than one"):
        call(evaluate, "one", "two")
    call(evaluate, "one", "two", "--data", "own-one")


def test_the_same_data_under_another_name_is_the_same(colors):
    root = write_data(Path("own"), train=TRAIN, val=VAL)
    write_run(Path("one/best.pt"), root)
    write_run(Path("two/best.pt"), root)
    checkpoint = torch.load("two/best.pt", weights_only=True)
    torch.save(checkpoint | {"data": "own/../own"}, "two/best.pt")
    call(evaluate, "one", "two")


def test_the_comparisons_table_tells_by_flags_how_runs_differ():
    base = {"mean_iou": 0.5, "pixel_accuracy": 0.5, "iou": {"a": 0.5}, "model": "fcn", "size": 64}
    base |= {"parameters": 5, "images_per_second": 1.0, "epoch": 1}
    settings = {"seed": 0, "lr": 0.001, "data": "/x", "out": "a", "device": "cpu", "ema": 0.99}
    results = {
        "plain": base | {"settings": settings | {"augment": None, "cosine": False}},
        "best": base | {"settings": settings | {"augment": "flip", "cosine": True, "out": "b"}},
        "seed": base | {"settings": settings | {"augment": None, "cosine": False, "seed": 1}},
        "old": base | {"settings": settings | {"ema": 0, "class_weights": "a_b", "data": "/y"}},
    }
    rows = evaluate.format_comparison(results).splitlines()[2:]
    assert [row.strip("|").split("|")[-1].strip() for row in rows] == [
        "--data /x --ema 0.99 --seed 0",
        "--augment flip --cosine --data /x --ema 0.99 --seed 0",
        "--data /x --ema 0.99 --seed 1",
        "--class-weights a_b --data /y --ema 0 --seed 0",
    ]


def test_runs_of_one_name_are_compared_by_their_paths(colors):
    root = write_data(Path("own"), train=TRAIN, val=VAL)
    for path in ("a/run/best.pt", "b/run/best.pt", "b/run/last.pt"):
        write_run(Path(path), root)
    call(evaluate, "a/run", "b/run/last.pt")
    assert list(read_scores("comparison")) == ["run", "run/last"]
    call(evaluate, "a/run", "b/run", "b/run/last.pt")
    assert list(read_scores("comparison-2")) == ["a/run/best.pt", "b/run/best.pt", "b/run/last.pt"]


@pytest.fixture
def drawn(colors, monkeypatch):
    """The arguments of utils.samples and utils.curves, {name: their arguments}."""
    calls = {}
    for name in ("samples", "curves"):
        monkeypatch.setattr(utils, name, lambda *args, name=name: calls.update({name: args}))
    return calls


def test_the_comparisons_figures_show_the_scores_and_the_images_asked_for(drawn):
    root = write_data(Path("own"), train=TRAIN, val=VAL)
    for name in ("one", "two"):
        write_run(Path(f"{name}/best.pt"), root)
    Path("two/log.csv").write_text(LOG)
    call(evaluate, "one", "two")
    path, _, rows, classes, _, _, captions = drawn["samples"]
    assert path == Path("comparison/comparison.png") and list(captions) == list(VAL)
    assert list(rows) == ["truth", "one\nmIoU 0.5000", "two\nmIoU 0.5000"]
    assert rows["truth"][:, 5, 5].tolist() == [0, 1, 2]
    assert rows["two\nmIoU 0.5000"][:, 5, 5].tolist() == [0, 1, 1] and classes == CLASSES
    path, histories, _ = drawn["curves"]
    assert path == Path("comparison/curves.png") and list(histories) == ["two"]
    assert [row["val_mean_iou"] for row in histories["two"]] == [0.1, 0.3]

    call(evaluate, "one", "two", "--images", "v2", "v0")
    assert drawn["samples"][-1] == ["v2", "v0"]
    assert drawn["samples"][2]["truth"][:, 5, 5].tolist() == [2, 0]
    call(evaluate, "one", "--images", "v1")
    assert drawn["samples"][-1] == ["v1: 1.000"]  # its own mIoU
    with pytest.raises(utils.UserError, match="split val has no image 'v9'; it has v0, v1, v2"):
        call(evaluate, "one", "two", "--images", "v0", "v9")


def test_the_figures_show_the_predictions_that_are_scored(drawn, monkeypatch):
    class LeftIsGreen(Colors):
        def forward(self, images):
            logits = torch.zeros_like(images)
            logits[:, 1, :, : images.shape[-1] // 2] = 5
            return logits

    monkeypatch.setitem(models.MODELS, "colors", LeftIsGreen)
    root = write_data(Path("own"), train=TRAIN, val=VAL)
    for name in ("one", "two"):
        write_run(Path(f"{name}/best.pt"), root)
    for runs in (("one",), ("one", "two")):
        for flags, expected in (((), [1, 0]), (("--tta",), [1, 1])):  # mirrored, right is green too
            call(evaluate, *runs, *flags)
            rows = list(drawn["samples"][2].values())
            assert rows[-1][0, 5, [5, -5]].tolist() == expected


def test_the_best_middle_and_worst_images_are_drawn(drawn):
    # The network calls the red pixels 0: an image's accuracy is the share that is red.
    root = write_data(Path("own"), train=TRAIN, val={f"v{i}": ("red", 0) for i in range(9)})
    for i in range(9):
        mask = np.zeros((30, 40), np.uint8)
        mask[:, : 4 * i] = 1
        Image.fromarray(mask).save(root / f"SegmentationClass/v{i}.png")
    write_run(Path("run/best.pt"), root, names=False)
    call(evaluate, "run")
    # Of 10 parts 10 - i are right: IoU (10 - i) / 10 for class 0, and 0 for class 1 where it is.
    shown = {0: 1.0, 1: 0.45, 4: 0.3, 5: 0.25, 7: 0.15, 8: 0.1}
    assert drawn["samples"][-1] == [f"v{i}: {score:.3f}" for i, score in shown.items()]


def test_runs_that_were_validated_on_other_images_are_not_compared(colors):
    root = write_data(Path("own"), train=TRAIN, val=VAL)
    write_run(Path("one/best.pt"), root)
    write_run(Path("two/best.pt"), root, val_split="train", train_split="val", names=False)
    with pytest.raises(utils.UserError, match="two/best.pt: has other images or masks than one"):
        call(evaluate, "one", "two")
    call(evaluate, "one", "two", "--split", "val")
    assert read_scores("comparison")["two"]["pixel_accuracy"] == pytest.approx(2 / 3)


def test_names_that_do_not_exist_are_found_before_anything_is_scored(colors):
    write_run(Path("one/best.pt"), write_data(Path("own"), train=TRAIN, val=VAL))
    with pytest.raises(utils.UserError, match="two/best.pt: does not exist"):
        call(evaluate, "one", "two/best.pt")
    with pytest.raises(utils.UserError, match=r"runs/\*/best.pt: nothing matches this pattern"):
        call(evaluate, "runs/*/best.pt")
    assert Colors.sizes == []


def test_figures_show_the_numbers_of_the_metrics(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    cm = torch.tensor([[30, 10, 0], [5, 15, 0], [0, 0, 0]])
    classes = ["nothing", "cat", "dog"]
    evaluate.draw_confusion_matrix(tmp_path / "a.png", cm, classes, "title")
    cells = {tuple(map(round, text.get_position())): text for text in figures[0].axes[0].texts}
    numbers = {place: text.get_text() for place, text in cells.items()}
    assert numbers == {(0, 0): "75", (1, 0): "25", (0, 1): "25", (1, 1): "75"}
    values = {"nothing": 30 / 45, "cat": 0.5, "dog": None}
    evaluate.draw_class_iou(tmp_path / "b.png", values, "title")
    axes = figures[1].axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 30 / 45]
    assert [text.get_text() for text in axes.texts] == ["0.500", "0.667"]


def test_a_folder_called_shapes_is_not_taken_for_the_drawn_shapes(no_pictures):
    shapes = data.Shapes("val", 32)
    Path("shapes").mkdir()
    write_run(Path("run/best.pt"), "shapes", model="fcn", classes=shapes.classes)
    call(evaluate, "run")
    assert read_scores("run/scores/val")["images"] == len(shapes)


@pytest.mark.skipif(not REAL_VOC, reason="VOC_ROOT names no VOC 2007")
def test_the_shipped_network_scores_what_the_docs_say(no_pictures):
    weights = REPOSITORY / "weights" / "darrennet_voc.pt"
    call(evaluate, weights, "--data", REAL_VOC, "--void-as-background", "--out", "scores")
    metrics = read_scores("scores")
    docs = (REPOSITORY / "docs" / "shipped-network.md").read_text(encoding="utf-8")
    said = re.search(r"`--void-as-background` \(the paper.*?\| (0\.\d+) \| (\d+\.\d+) % \|", docs)
    assert float(said[1]) == pytest.approx(metrics["mean_iou"], abs=1e-4)
    assert float(said[2]) == pytest.approx(100 * metrics["pixel_accuracy"], abs=1e-2)
