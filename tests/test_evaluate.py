"""evaluate.py on tiny data sets, by networks whose predictions are known or counted by numpy."""

import contextlib
import csv
import hashlib
import json
import os
import shutil
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import REAL_VOC, REPOSITORY, call, check, looks_drawn, read_scores, state_of
from PIL import Image
from torch import nn

import data
import evaluate
import models
import predict
import train
import utils
from tools import results

CLASSES = ["background", "green", "blue"]


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


def write_run(path, root, model="colors", classes=CLASSES, seed=0, **changes):
    """Write a checkpoint as train.py does, with random weights where the model has any."""
    torch.manual_seed(seed)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "model": model,
        "classes": list(classes),
        "palette": data.color_map(len(classes)),
        "size": 32,
        "data": str(root),
        "images": {"train": list(TRAIN), "val": list(VAL)},
        "state_dict": models.build_model(model, len(classes)).state_dict(),
        "epoch": 7,
        "metrics": {"val_mean_iou": 0.5},
        "args": {"train_split": "train", "val_split": "val", "model": model},
    }
    utils.save_checkpoint(path, checkpoint | changes)


@pytest.fixture
def own(colors):
    """A folder of data, and a run on it, in run/."""
    root = write_data(Path("own"), train=TRAIN, val=VAL, test=TEST)
    write_run("run/best.pt", root)
    return root


def compare_masks_with_metrics(root, predicted, ids, metrics):
    """Score the masks that predict.py wrote with numpy alone; expect what evaluate.py reports."""
    cm = np.zeros((21, 21), np.int64)
    for name in ids:
        file = Image.open(predicted / f"{name}_mask.png")
        assert file.mode == "P"
        p, m = np.array(file), np.array(Image.open(root / f"SegmentationClass/{name}.png"))
        assert p.shape == m.shape and (predicted / f"{name}_overlay.png").exists()
        np.add.at(cm, (m[m != 255], p[m != 255]), 1)
    right, union = cm.diagonal(), cm.sum(0) + cm.sum(1) - cm.diagonal()
    iou = right[union > 0] / union[union > 0]
    assert round(iou.mean(), 6) == round(metrics["mean_iou"], 6)
    assert round(right.sum() / cm.sum(), 6) == round(metrics["pixel_accuracy"], 6)
    reported = np.array([np.nan if v is None else v for v in metrics["iou"].values()])
    assert np.array_equal(np.isnan(reported), union == 0)
    assert np.allclose(reported[union > 0], iou)
    return cm


def test_predicted_masks_score_what_evaluate_reports(tmp_path, voc):
    root = voc / "VOCdevkit" / "VOC2007"
    write_run("run/best.pt", root, "darrennet", data.VOC_CLASSES)
    # The data and the network are those of the checkpoint: no training flag is needed.
    table = check(conftest.run_script("evaluate.py", "run/best.pt", cwd=tmp_path))
    out = Path("run/scores/val")
    metrics = read_scores(out)
    assert metrics["split"] == "val" and metrics["checkpoint"] == str(Path("run/best.pt").resolve())
    assert "images_per_second" not in metrics and list(metrics["iou"]) == list(data.VOC_CLASSES)
    assert f"{metrics['mean_iou']:.6f}" in table and f"{metrics['pixel_accuracy']:.6f}" in table
    files = ["confusion_matrix.csv", "confusion_matrix.png", "examples.png", "metrics.json"]
    assert sorted(os.listdir(out)) == files
    for picture in files[1:3]:
        looks_drawn(out / picture, 300, 300)
    ids = [f"val_{i}" for i in range(3)]
    paths = [root / f"JPEGImages/{name}.jpg" for name in ids]
    flags = ("--checkpoint", "run", "--out", "segmented")
    check(conftest.run_script("predict.py", *paths, *flags, cwd=tmp_path))
    cm = compare_masks_with_metrics(root, Path("segmented"), ids, metrics)
    with open(out / "confusion_matrix.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head[1:] == [row[0] for row in rows] == list(data.VOC_CLASSES)
    assert [[int(cell) for cell in row[1:]] for row in rows] == cm.tolist()


@pytest.mark.parametrize("flags", [("--tta",), ("--size", 80)])
def test_masks_by_the_same_flags_score_the_same(voc, no_pictures, flags):
    root = voc / "VOCdevkit" / "VOC2007"
    write_run("run/best.pt", root, "fcn", data.VOC_CLASSES)
    call(evaluate, "run", *flags, "--out", "scores")
    ids = [f"val_{i}" for i in range(3)]
    paths = [root / f"JPEGImages/{name}.jpg" for name in ids]
    call(predict, *paths, "--checkpoint", "run", *flags)
    compare_masks_with_metrics(root, Path("predictions"), ids, read_scores("scores"))


@pytest.mark.skipif(not REAL_VOC, reason="VOC_ROOT names no VOC 2007")
def test_the_shipped_network_on_every_tenth_image_of_real_voc(no_pictures):
    root = Path(REAL_VOC, "VOCdevkit", "VOC2007").resolve()
    ids = (root / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[::10]
    Path("voc/ImageSets/Segmentation").mkdir(parents=True)
    Path("voc/ImageSets/Segmentation/val.txt").write_text("\n".join(ids))
    for folder in ("JPEGImages", "SegmentationClass"):
        Path("voc", folder).symlink_to(root / folder)
    Path("photos").mkdir()
    for name in ids:
        Path(f"photos/{name}.jpg").symlink_to(root / f"JPEGImages/{name}.jpg")
    weights = REPOSITORY / "weights" / "darrennet_voc.pt"
    call(evaluate, weights, "--data", "voc", "--out", "scores")
    call(predict, "photos", "--checkpoint", weights)
    metrics = read_scores("scores")
    compare_masks_with_metrics(root, Path("predictions"), ids, metrics)
    assert metrics["pixel_accuracy"] > 0.8 and metrics["mean_iou"] > 0.25


@pytest.mark.parametrize("flags", [(), ("--size", 64), ("--size", 224)])
def test_the_papers_protocol_scores_masks_of_224_whatever_the_network_is_fed(
    voc, no_pictures, flags
):
    root = voc / "VOCdevkit" / "VOC2007"
    write_run("run/best.pt", root, "fcn", data.VOC_CLASSES)
    call(evaluate, "run", "--void-as-background", *flags, "--out", "paper")
    metrics, size = read_scores("paper"), flags[1] if flags else 32
    assert metrics["protocol"] == "224x224, void as background" and metrics["size"] == size
    model = models.from_checkpoint(state_of("run/best.pt"))
    right, union, pixels = np.zeros(21), np.zeros(21), 0
    for name in (f"val_{i}" for i in range(3)):
        image = Image.open(root / f"JPEGImages/{name}.jpg").resize((size, size), 2)  # bilinear
        images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        labels = utils.segment(model, data.normalize(images), (224, 224))[0][0].numpy()
        mask = Image.open(root / f"SegmentationClass/{name}.png")
        truth = np.array(mask.resize((224, 224), Image.Resampling.NEAREST))
        assert (truth == 255).any()
        truth = np.where(truth == 255, 0, truth)
        pixels += truth.size
        for c in range(21):
            right[c] += ((labels == c) & (truth == c)).sum()
            union[c] += ((labels == c) | (truth == c)).sum()
    assert metrics["pixel_accuracy"] == pytest.approx(right.sum() / pixels, abs=1e-9)
    iou = right[union > 0] / union[union > 0]
    assert metrics["mean_iou"] == pytest.approx(iou.mean(), abs=1e-9)


def test_voc_2012_has_the_images_of_voc_2007_under_other_names():
    images = {"train": ["2007_000032", "000063", "2008_000001"], "val": ["000039"]}
    names = ["000032", "2007_000063", "2008_000001", "000039", "000001", "2007_000009"]
    assert evaluate.learned_from(images, names) == names[:3]
    assert evaluate.learned_from(None, names) == evaluate.learned_from({}, names) == []


def test_a_list_that_has_changed_is_scored_as_it_is_now(own, capsys):
    call(evaluate, "run")
    assert read_scores("run/scores/val")["images_trained_on"] == 0
    write_data(own, val={"v0": ("red", 0), "t1": ("lime", 1), "new": ("lime", 0)})
    call(evaluate, "run")
    # Of its three images, red and green, one was trained on. The scores of before are written over.
    scores = read_scores("run/scores/val")
    assert scores["iou"] == {"background": 0.5, "green": 0.5, "blue": None}
    assert scores["images_trained_on"] == 1 and os.listdir("run/scores") == ["val"]
    assert "was trained on 1 of these 3 images" in capsys.readouterr().out


def test_scores_are_those_worked_out_by_hand(own, capsys):
    """Red is right, of two green images one is blue in truth: 3 images of equal size."""
    call(evaluate, "run")
    scores = read_scores("run/scores/val")
    assert scores["dice"] == pytest.approx({"background": 1, "green": 2 / 3, "blue": 0})
    assert scores["mean_dice"] == pytest.approx(5 / 9)
    assert scores["mean_accuracy"] == scores["pixel_accuracy"] == pytest.approx(2 / 3)
    assert scores["frequency_weighted_iou"] == pytest.approx(0.5)
    assert "green             0.5000  0.6667\n" in capsys.readouterr().out


def test_the_split_all_is_every_image(own):
    call(evaluate, "run", "--split", "all")
    scores = read_scores("run/scores/all")
    assert scores["images"] == 7 and scores["images_trained_on"] == 2
    assert scores["iou"] == {"background": 1, "green": 2 / 3, "blue": 0.5}


def test_weights_that_do_not_fit_are_found_before_anything_is_written(own):
    write_run("run/best.pt", own, state_dict={"other": torch.zeros(1)})
    with pytest.raises(models.ModelError, match="do not fit"):
        call(evaluate, "run")
    assert not Path("run/scores").exists()


def test_each_kind_of_evaluation_has_a_folder_of_its_own(own):
    other = write_data(Path("deep/other"), train=TRAIN, val=TEST)
    write_run("run/last.pt", own)
    commands = {
        "val": (),
        "test": ("--split", "test"),
        "val-paper": ("--void-as-background",),
        "val-tta": ("--tta",),
        "val-other": ("--data", other),
        "val-64": ("--size", 64),
        "val-paper-tta-64": ("--size", 64, "--tta", "--void-as-background"),
        "val-last": (),
    }
    forwards = {}
    for folder, flags in commands.items():
        Colors.sizes.clear()
        call(evaluate, "run/last.pt" if folder == "val-last" else "run", *flags)
        forwards[folder] = len(Colors.sizes)
    assert sorted(os.listdir("run/scores")) == sorted(commands)
    assert forwards["val-tta"] == forwards["val-paper-tta-64"] == 2 * forwards["val"] > 0
    before = {path: path.read_bytes() for path in Path("run/scores").rglob("metrics.json")}
    call(evaluate, "run", "--split", "test")  # the very same command writes over its own
    assert {path: path.read_bytes() for path in Path("run/scores").rglob("metrics.json")} == before


LOG = "epoch,train_loss,val_loss,val_mean_iou,val_pixel_accuracy\n1,3,4,0.1,0.2\n2,2,3,0.3,0.4\n"


def test_several_checkpoints_are_compared(tmp_path, voc):
    root = voc / "VOCdevkit" / "VOC2007"
    for name, model, args in (("one", "fcn", {"cosine": True}), ("two", "darrennet", {})):
        write_run(f"runs/{name}/best.pt", root, model, data.VOC_CLASSES, args=args)
        Path(f"runs/{name}/log.csv").write_text(LOG)
    # A pattern that no shell has expanded.
    printed = check(
        conftest.run_script("evaluate.py", "runs/*", "--void-as-background", cwd=tmp_path)
    )
    table = [line for line in printed.splitlines() if line.startswith("|")]
    results = read_scores("comparison")
    assert list(results) == ["one", "two"] and len(table) == 4
    for line, (name, metrics) in zip(table[2:], results.items()):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        iou = [value for value in metrics["iou"].values() if value is not None]
        assert cells[:3] == [name, metrics["model"], "32"] and cells[4] == "7"
        model = models.build_model(metrics["model"])
        assert cells[3] == f"{sum(p.numel() for p in model.parameters()):,}"
        assert cells[5] == f"{metrics['mean_iou']:.4f}"
        assert cells[6] == f"{100 * metrics['pixel_accuracy']:.1f}%"
        assert [cells[n].split()[-1] for n in (7, 8)] == [f"{max(iou):.3f}", f"{min(iou):.3f}"]
        assert cells[9] == ("--cosine" if name == "one" else "-")
    looks_drawn("comparison/comparison.png", 500, 600)
    looks_drawn("comparison/curves.png", 1000, 400)


def test_all_checkpoints_are_checked_before_the_first_is_scored(own):
    others = {
        "text.pt": (None, "text.pt: is broken, or holds more than tensors"),
        "classes.pt": ({"classes": ["background", "a", "b"]}, "knows other classes than run"),
        "data.pt": ({"data": "shapes"}, "is scored on other images than run"),
        "split.pt": ({"args": {"val_split": "test"}}, "is scored on other images than run"),
        "model.pt": ({"model": "gone"}, "no model is called 'gone'"),
        "weights.pt": ({"state_dict": {"x": torch.zeros(1)}}, "the weights do not fit colors"),
    }
    for name, (changes, said) in others.items():
        write_run(name, own, **(changes or {})) if name != "model.pt" else None
        if name == "text.pt":
            Path(name).write_text("text")
        if name == "model.pt":
            torch.save(state_of("run/best.pt") | changes, name)
        with pytest.raises((utils.UserError, models.ModelError), match=said):
            call(evaluate, "run", name)
        assert Colors.sizes == [] and not Path("comparison").exists(), name
    call(evaluate, "run", "split.pt", "--split", "val")
    _, split = read_scores("comparison").values()
    assert split["pixel_accuracy"] == pytest.approx(2 / 3)


def test_names_and_logs_are_checked_before_anything_is_scored(own):
    write_run("two/best.pt", own)
    Path("two/log.csv").write_text(LOG[: len(LOG) - 5])
    with pytest.raises(utils.UserError, match="two/log.csv: is no log of train.py"):
        call(evaluate, "run", "two")
    for text in ("a,b\nc,d\n", "a,b\n1,2\n", "epoch,val_mean_iou\n"):
        Path("log.csv").write_text(text)
        with pytest.raises(utils.UserError, match="log.csv: is no log of"):
            evaluate.read_log("log.csv")
    with pytest.raises(utils.UserError, match="three/best.pt: does not exist"):
        call(evaluate, "run", "three/best.pt")
    with pytest.raises(utils.UserError, match=r"runs/\*/best.pt: does not exist"):
        call(evaluate, "runs/*/best.pt")
    for runs in (("run",), ("run", "run/best.pt")):
        with pytest.raises(utils.UserError, match="split val has no 'v9'; it has v0, v1, v2"):
            call(evaluate, *runs, "--images", "v0", "v9")
    assert Colors.sizes == [] and not Path("comparison").exists()


def test_the_comparisons_table_tells_by_flags_how_runs_differ():
    base = {"mean_iou": 0.5, "pixel_accuracy": 0.5, "iou": {"a": 0.5}, "model": "fcn", "size": 64}
    base |= {"parameters": 5, "epoch": 1}
    settings = {"seed": 0, "lr": 0.001, "data": "/x", "device": "cpu", "ema": 0.99, "steps": 5}
    results = {
        "plain": base | {"settings": settings | {"augment": None, "cosine": False}},
        "best": base | {"settings": settings | {"augment": "flip", "cosine": True, "epochs": 3}},
        "seed": base | {"settings": settings | {"augment": None, "cosine": False, "seed": 1}},
        "old": base | {"settings": settings | {"ema": 0, "class_weights": "a_b", "data": "/y"}},
    }
    rows = evaluate.format_comparison(results).splitlines()[2:]
    assert [row.strip("|").split("|")[-1].strip() for row in rows] == [
        "--data /x --ema 0.99 --seed 0",
        "--augment flip --cosine --data /x --ema 0.99 --epochs 3 --seed 0",
        "--data /x --ema 0.99 --seed 1",
        "--class-weights a_b --data /y --ema 0 --seed 0",
    ]


@pytest.fixture
def drawn(colors, monkeypatch):
    """The arguments of utils.samples and utils.curves, {name: their arguments}."""
    calls = {}
    for name in ("samples", "curves"):
        monkeypatch.setattr(utils, name, lambda *args, name=name: calls.update({name: args}))
    return calls


def test_the_comparisons_figures_show_the_scores_and_the_images_asked_for(drawn, own):
    write_run("two/best.pt", own, size=64)
    Path("two/log.csv").write_text(LOG)
    call(evaluate, "run", "two")
    assert [*dict.fromkeys(Colors.sizes)] == [(32, 32), (64, 64)]  # each as it was trained
    path, _, rows, classes, _, captions = drawn["samples"]
    assert path == Path("comparison/comparison.png") and list(captions) == list(VAL)
    assert list(rows) == ["truth", "run\nmIoU 0.5000", "two\nmIoU 0.5000"]
    assert rows["truth"][:, 5, 5].tolist() == [0, 1, 2]
    assert rows["two\nmIoU 0.5000"][:, 5, 5].tolist() == [0, 1, 1] and classes == CLASSES
    path, histories, _ = drawn["curves"]
    assert path == Path("comparison/curves.png") and list(histories) == ["two"]
    assert [row["val_mean_iou"] for row in histories["two"]] == [0.1, 0.3]

    call(evaluate, "run", "two", "--images", "v2", "v0")
    assert drawn["samples"][-1] == ["v2", "v0"]
    assert drawn["samples"][2]["truth"][:, 5, 5].tolist() == [2, 0]
    call(evaluate, "run", "--images", "v1")
    assert drawn["samples"][-1] == ["v1: 1.000"]  # its own mIoU
    # Without names the best two, the middle two, the worst two; of equals the first of the list.
    names = {name: ("lime", 1 if name in "bdfg" else 2) for name in "abcdefg"}
    call(evaluate, "run", "--data", write_data(Path("seven"), val=names))
    assert [caption[0] for caption in drawn["samples"][-1]] == list("bdgace")


def test_a_table_that_excel_holds_open_is_said_before_the_work(own, monkeypatch):
    def refused(path, *args, **kwargs):
        if str(path).endswith("confusion_matrix.csv"):
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *args, **kwargs)

    monkeypatch.setattr(evaluate, "open", refused, raising=False)
    with pytest.raises(PermissionError, match=r"confusion_matrix\.csv"):
        call(evaluate, "run", "--out", "scores")
    assert Colors.sizes == [] and not Path("scores/metrics.json").exists()


def test_the_drawn_confusion_matrix_has_each_classes_shares(monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    cm = torch.tensor([[30, 10, 0], [2, 18, 0], [0, 0, 0]])
    evaluate.draw_confusion_matrix("a.png", cm, ["nothing", "cat", "犬"], "title")
    axes = figures[0].axes[0]
    numbers = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    assert numbers == {(0, 0): "75", (1, 0): "25", (0, 1): "10", (1, 1): "90"}
    assert "predicted" in axes.get_xlabel() and "true" in axes.get_ylabel()
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["nothing", "cat", "class 2"]
    # Of two classes with long names it is still large enough to read: an inch and more.
    evaluate.draw_confusion_matrix("b.png", cm[:2, :2], ["background", "cracked pavement"], "title")
    figures[1].draw_without_rendering()
    assert figures[1].axes[0].get_window_extent().width > figures[1].dpi


def test_results_trains_what_is_missing_and_makes_its_table_of_the_scores(voc, monkeypatch, capsys):
    flags = "--model fcn --epochs 1 --size 32"
    rows = (("a", "FCN", "0.06, 75 %", flags), ("transfer", "T", "", "--model resnet34_fcn"))
    monkeypatch.setattr(results, "ROWS", rows)
    monkeypatch.setattr(results, "SEEDS", {"a": (0, 1)})
    script, scripts = results.script, {"train.py": train, "evaluate.py": evaluate}

    def only_the_first_in_a_process_of_its_own(name, *args, log, threads):
        if Path("runs/results/a/best.pt").exists():
            with open(log, "a") as file, contextlib.redirect_stdout(file):
                return call(scripts[name], *args)
        script(name, *args, log=log, threads=threads)

    monkeypatch.setattr(results, "script", only_the_first_in_a_process_of_its_own)
    call(results, "--data", voc)
    runs = ("runs/results/a", "runs/results/a-1")
    scores = [read_scores(f"{run}/scores/val-paper") for run in runs]
    low, high = sorted(each["mean_iou"] for each in scores)
    accuracy = sum(each["pixel_accuracy"] for each in scores) / 2
    lines = capsys.readouterr().out.splitlines()
    first, second = [line.split(" | ") for line in lines[2:4]]
    assert first[:3] == ["| FCN, mean of 2 seeds", f"`{flags}`", "0.06, 75 %"]
    assert first[3] == f"{(low + high) / 2:.4f} ({low:.4f} to {high:.4f}), {accuracy:.1%}"
    assert first[5:] == ["not run", "not run |"]  # no --test was given
    assert second[3:] == ["not run"] * 3 + ["not run |"]  # no --encoder was given
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| a", "| a-1"]
    settings = [utils.load_checkpoint(f"{run}/best.pt")["args"] for run in runs]
    assert [each["seed"] for each in settings] == [0, 1]
    kept = Path("runs/results/results.json")
    assert json.loads(kept.read_text())["a-1"]["flags"] == f"{flags} --seed 1"

    # What stands in results.json is not trained again, where its run has gone, too.
    shutil.rmtree("runs/results/a")
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    call(results, "--data", voc)
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before

    # Nor is it for --test, which scores the other. Meanwhile a second call finishes a row.
    lists = data.find_root(voc) / "ImageSets/Segmentation"
    shutil.copy(lists / "val.txt", lists / "test.txt")
    begun = []

    def finish_run(folder, flags, place, splits, threads):
        begun.append((folder.name, *splits))
        stored = json.loads(kept.read_text())
        kept.write_text(json.dumps(stored | {"b": stored["a"]}))
        return stored["a-1"]

    monkeypatch.setattr(results, "finish_run", finish_run)
    call(results, "--data", voc, "--test")
    assert begun == [("a-1", "val", "test")] and json.loads(kept.read_text()).keys() == {
        "a",
        "a-1",
        "b",
    }
    assert "a: was trained elsewhere, not scored here" in capsys.readouterr().err
    monkeypatch.setattr(results, "ROWS", (("a", "FCN", "", f"{flags} --cosine"),))
    with pytest.raises(utils.UserError, match="results.json: a was trained with flags --model fcn"):
        call(results, "--data", voc)


def test_results_stops_after_an_error_and_knows_what_a_row_was_made_of(voc, monkeypatch):
    row = "--model fcn --epochs 1 --size 32"
    rows = ("a", "A", "", row), ("b", "B", "", row), ("transfer", "T", "", row)
    monkeypatch.setattr(results, "ROWS", rows)
    monkeypatch.setattr(results, "SEEDS", {})
    begun = []

    def ended(name, *args, log, threads):
        begun.append(name)
        raise utils.UserError("no disk")

    with monkeypatch.context() as patch:
        patch.setattr(results, "script", ended)
        patch.setattr(results, "commit", lambda: "old")
        with pytest.raises(utils.UserError, match="no disk"):
            call(results, "--data", voc, "--rows", "a", "b")
    assert begun == ["train.py"]

    # The run came to no checkpoint: what is recorded is of the call that trains it.
    def here(name, *args, log, threads):
        call({"train.py": train, "evaluate.py": evaluate}[name], *args)

    monkeypatch.setattr(results, "script", here)
    monkeypatch.setattr(results, "commit", lambda: "new")
    encoder = models.build_model("fcn").state_dict()
    torch.save(encoder, "one.pt")
    torch.save(encoder | {"more": torch.zeros(1)}, "two.pt")
    call(results, "--data", voc, "--rows", "a", "transfer", "--encoder", "one.pt")
    stored = json.loads(Path("runs/results/results.json").read_text())
    assert stored["a"]["commit"] == "new" and "encoder" not in stored["a"]
    digest = hashlib.sha256(Path("one.pt").read_bytes()).hexdigest()
    assert stored["transfer"]["encoder"] == digest[:8]
    with pytest.raises(utils.UserError, match="transfer was trained with encoder .{8}; give"):
        call(results, "--data", voc, "--rows", "transfer", "--encoder", "two.pt")
