"""The command lines, in processes of their own, on tiny folders in VOC's layout."""

import csv
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL_VOC, REPOSITORY, call, check, run_script, write_voc
from PIL import Image
from test_data import KINDS, write_folder
from test_models import published_file, random_encoder
from torchvision.models import resnet34

import data
import evaluate
import models
import plots
import predict
import train
import utils

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
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
def in_a_folder_of_its_own(tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)


def quick_train(*args, name="run", epochs=2):
    settings = ("--epochs", epochs, "--size", 32, "--batch-size", 2, "--device", "cpu")
    call(train, *settings, "--out", name, *args)


def state_of(path):
    return torch.load(path, weights_only=True)


def same_weights(a, b):
    return all(torch.equal(x, b["state_dict"][name]) for name, x in a["state_dict"].items())


@pytest.mark.parametrize("model", ["fcn", "darrennet"])
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
    for picture in ("confusion_matrix.png", "class_iou.png", "examples.png"):
        pixels = np.array(Image.open(f"run/{picture}").convert("L"))
        assert min(pixels.shape) > 300 and pixels.std() > 10
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
    quick_train(*flags, epochs=1)
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


def looks_drawn(path, width, height):
    """Fail unless the file is a picture of at least that size that is not blank."""
    pixels = np.array(Image.open(path).convert("L"))
    assert pixels.shape[0] >= height and pixels.shape[1] >= width, pixels.shape
    assert pixels.std() > 10 and pixels[0, 0] == 255  # ink on a light background


def test_several_checkpoints_are_compared(tmp_path, voc):
    quick_train("--model", "fcn", "--data", voc, name="runs/one", epochs=1)
    quick_train("--model", "darrennet", "--data", voc, "--size", 48, name="runs/two", epochs=1)
    args = ("runs/one/best.pt", "runs/two/best.pt", "--void-as-background")
    printed = check(run_script("evaluate.py", *args, cwd=tmp_path))
    table = [line for line in printed.splitlines() if line.startswith("|")]
    results = json.loads(Path("comparison/metrics.json").read_text())
    assert list(results) == ["one", "two"] and len(table) == 4
    for line, (name, metrics) in zip(table[2:], results.items()):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        iou = {c: value for c, value in metrics["iou"].items() if value is not None}
        assert cells[:2] == [name, metrics["model"]]
        model = models.from_checkpoint(state_of(f"runs/{name}/best.pt"))
        assert cells[3] == f"{sum(p.numel() for p in model.parameters()):,}"
        assert cells[4] == f"{metrics['mean_iou']:.4f}"
        assert float(cells[5].rstrip("%")) == pytest.approx(
            100 * metrics["pixel_accuracy"], abs=0.05
        )
        assert cells[6].split()[-1] == f"{max(iou.values()):.3f}"
        assert cells[7].split()[-1] == f"{min(iou.values()):.3f}"
        # Alone it scores the same.
        call(evaluate, f"runs/{name}/best.pt", "--void-as-background")
        alone = json.loads(Path(f"runs/{name}/metrics.json").read_text())
        assert alone["iou"] == metrics["iou"] and alone["protocol"] == metrics["protocol"]
    looks_drawn("comparison/comparison.png", 500, 600)


def test_the_comparisons_figure_shows_the_scores_of_the_metrics(voc, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "samples", lambda *args: drawn.append(args))
    for name in ("one", "two"):
        quick_train("--model", "fcn", "--data", voc, name=name, epochs=1)
    drawn.clear()
    call(evaluate, "one/best.pt", "two/best.pt", "--out", "both")
    results = json.loads(Path("both/metrics.json").read_text())
    expected = [f"{name}\nmIoU {m['mean_iou']:.4f}" for name, m in results.items()]
    assert list(drawn[0][2]) == ["truth", *expected]


def test_checkpoints_of_other_classes_are_not_compared(tmp_path, voc):
    quick_train("--model", "fcn", "--data", voc, epochs=1)
    quick_train("--model", "fcn", "--data", "shapes", name="shapes", epochs=1)
    args = ("run/best.pt", "shapes/best.pt")
    result = run_script("evaluate.py", *args, cwd=tmp_path)
    assert result.returncode == 2 and "shapes/best.pt: is of another data set" in result.stderr


def test_curves_of_several_runs_lie_over_each_other(tmp_path, voc):
    for name in ("one", "two"):
        quick_train("--model", "fcn", "--data", voc, name=name)
    printed = check(run_script("plots.py", "one", "two", "--out", "both.png", cwd=tmp_path))
    looks_drawn("both.png", 1000, 400)
    for name in ("one", "two"):
        best = state_of(f"{name}/best.pt")
        score = best["metrics"]["val_mean_iou"]
        assert f"{name}: best epoch {best['epoch']}, mIoU {score:.4f}" in printed
    Path("log.csv").write_text("a,b\nc,d\n")
    for run, said in (("nowhere", "nowhere: has no log.csv"), (".", "log.csv: is not a log of")):
        result = run_script("plots.py", run, cwd=tmp_path)
        assert result.returncode == 2 and said in result.stderr


def test_the_drawn_curves_are_the_logs_numbers(voc, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.undo()
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    rows = [
        {"epoch": e, "train_loss": 3 / e, "val_loss": 4 / e, "val_mean_iou": v, "val_pixel_accuracy": e / 9}
        for e, v in ((1, 0.1), (2, 0.3), (3, 0.2))
    ]  # fmt: skip
    plots.curves("a.png", {"one": rows, "two": rows[:2]}, "title")
    loss, iou, accuracy = figures[0].axes
    lines = [line.get_ydata() for line in loss.lines]
    assert [list(line) for line in lines[:2]] == [[4, 2, 4 / 3], [3, 1.5, 1]]
    assert list(iou.lines[0].get_ydata()) == [0.1, 0.3, 0.2]
    assert list(accuracy.lines[0].get_ydata()) == [1 / 9, 2 / 9, 3 / 9]
    assert "one: best 0.3000" in [text.get_text() for text in figures[0].legends[0].get_texts()]


# ------------------------------------------------------------------------------------ check.py


def test_check_finds_all_that_training_would_refuse(tmp_path, voc):
    root = voc / "VOCdevkit" / "VOC2007"
    (root / "JPEGImages/train_0.jpg").unlink()
    (root / "SegmentationClass/train_1.png").unlink()
    mask = Image.open(root / "SegmentationClass/train_2.png")
    mask.convert("RGB").save(root / "SegmentationClass/train_2.png")
    mask.resize((5, 6)).save(root / "SegmentationClass/train_3.png")
    Image.new("L", mask.size, 99).save(root / "SegmentationClass/val_1.png")
    Image.new("RGB", (9, 9)).save(root / "JPEGImages/more.jpg")
    result = run_script("check.py", "--data", voc, "--size", 32, cwd=tmp_path)
    assert result.returncode == 1
    listed = result.stdout.partition("to mend before training (5):")[2].splitlines()[1:6]
    expected = (
        "train: .*train_0.jpg: does not exist",
        "train: .*train_1.png: does not exist",
        "train: .*train_2.png: is a mask of kind RGB",
        "train: .*train_3.png: is 5x6, but its image is",
        "val: .*val_1.png: has the values 99",
    )
    for line, pattern in zip(listed, expected, strict=True):
        assert re.search(pattern, line)
    assert "1 images of" in result.stdout and "are in none of these splits" in result.stdout
    looks_drawn("check.png", 800, 600)


def test_check_counts_classes_and_shows_the_weights(tmp_path, voc):
    for path in (voc / "VOCdevkit/VOC2007/SegmentationClass").glob("train*"):
        labels = np.array(Image.open(path))
        Image.fromarray(np.where(labels == 7, 0, labels).astype(np.uint8)).save(path)
    printed = check(run_script("check.py", "--data", voc, "--size", 32, cwd=tmp_path))
    dataset = data.VOC(voc, "train", 32)
    masks = dataset.masks.numpy()
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    for c, name in enumerate(dataset.classes):
        first = next(line.split() for line in printed.splitlines() if line.startswith(f"{name} "))
        assert int(first[1]) == (masks == c).any((1, 2)).sum()
        share = 100 * (masks == c).sum() / (masks != 255).sum()
        assert float(first[2]) == pytest.approx(share, abs=6e-4)
    weights = data.class_weights(dataset, "median")
    assert lines["tvmonitor"][2] == f"{weights[20]:.3f}"
    assert "nothing that training would refuse" in printed
    assert "train: no pixel of class car" in printed


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_the_labelling_tools_train_score_and_predict(tmp_path, kind):
    write_folder(tmp_path / "own", kind)
    quick_train("--model", "fcn", "--data", "own", epochs=1)
    call(evaluate, "run/best.pt")
    metrics = json.loads(Path("run/metrics.json").read_text())
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


def test_predict_keeps_both_of_two_images_with_one_name_and_shows_all_in_a_grid(voc):
    quick_train("--model", "fcn", "--data", voc, epochs=1)
    for folder, color in (("one", "red"), ("two", "blue")):
        Path(folder).mkdir()
        Image.new("RGB", (60, 40), color).save(f"{folder}/same.png")
        Image.new("RGB", (40, 60), color).save(f"{folder}/{folder}.jpg")
    Image.new("RGB", (50, 50), "green").save("one/same.jpg")
    call(predict, "one", "two", "--checkpoint", "run/best.pt", "--grid", "sheets/grid.png")
    stems = ["one", "same", "same-2", "same-3", "two"]
    written = sorted(path.name for path in Path("predictions").iterdir())
    assert written == sorted(f"{stem}_{kind}.png" for stem in stems for kind in ("mask", "overlay"))
    sizes = {stem: Image.open(f"predictions/{stem}_mask.png").size for stem in stems}
    assert sizes["same"] == (50, 50) and sizes["same-2"] == sizes["same-3"] == (60, 40)
    grid = Image.open("sheets/grid.png").convert("RGB")
    colors = np.array(grid).reshape(-1, 3)
    assert grid.width > 3 * 60 and grid.height > 2 * 60  # five pictures in two rows of three
    assert (colors == 255).all(1).mean() > 0.2 and len(np.unique(colors, axis=0)) > 10


def test_a_loss_that_is_not_a_number_stops_the_run(voc, monkeypatch):
    quick_train("--model", "fcn", "--data", voc, epochs=1)
    before = Path("run/last.pt").read_bytes()
    monkeypatch.setattr(data, "normalize", lambda images: images * float("nan"))
    with pytest.raises(utils.UserError, match="epoch 2/3: the loss is nan.*--lr"):
        call(train, "--resume", "run/last.pt", "--epochs", 3)
    assert Path("run/last.pt").read_bytes() == before


# ------------------------------------------------------------------------- the paper's set-ups


def readme_table():
    """Return {row's name: the command line's flags} from the README's table of results."""
    rows = re.findall(r"^\| (.+?) \| `python train.py (.+?)` \|", README, flags=re.MULTILINE)
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


@pytest.mark.parametrize("name", readme_table())
def test_every_row_of_the_readmes_table_trains_scores_and_predicts(
    name, voc, trained_encoders, monkeypatch, capsys
):
    """With README_ON_VOC=1 on the real VOC that VOC_ROOT names: minutes instead of seconds."""
    root, size, epochs = (REAL_VOC, 64, 2) if os.environ.get("README_ON_VOC") else (voc, 32, 1)
    monkeypatch.setenv("TORCH_HOME", str(trained_encoders))
    monkeypatch.chdir(trained_encoders)  # where the row of ERFNet's encoder names its file
    flags = readme_table()[name]
    run = voc / "run"
    call(train, *flags, "--data", root, "--epochs", epochs, "--size", size, "--out", run)
    assert ("erfnet" in name.lower()) == (
        "226 tensors loaded; left out: module" in capsys.readouterr().out
    )
    # From here on the checkpoint is enough: nothing is looked up or downloaded again.
    monkeypatch.setenv("TORCH_HOME", str(voc))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    call(evaluate, run / "best.pt", "--void-as-background")
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 <= metrics["mean_iou"] < 1 and 0 < metrics["pixel_accuracy"] < 1
    image = voc / "VOCdevkit/VOC2007/JPEGImages/val_0.jpg"
    call(predict, image, "--checkpoint", run / "best.pt", "--out", run)
    assert Image.open(run / "val_0_mask.png").size == Image.open(image).size


def test_the_readme_has_a_row_for_each_result_of_the_paper():
    assert len(readme_table()) == 18
    assert {flags[flags.index("--model") + 1] for flags in readme_table().values()} == set(
        models.MODELS
    )


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
        assert args.data == "VOC" and [str(args.out / "best.pt")] * 2 == [
            score[0] for score in scored if score[0] == str(args.out / "best.pt")
        ]
    for name, flags in readme_table().items():
        row = next(line for line in README.splitlines() if line.startswith(f"| {name} |"))
        in_script = [*flags, "--data"] in [line[: len(flags) + 1] for line in trained]
        assert in_script != row.endswith("| not run | not run |")


def test_pretrained_encoders_start_from_torchvisions_file(voc, trained_encoders, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(trained_encoders))
    quick_train("--model", "resnet34_fcn", "--data", voc, "--freeze-encoder", 9, epochs=1)
    weights = torch.load(trained_encoders / "hub/checkpoints/resnet34-b627a593.pth")
    state = state_of("run/best.pt")["state_dict"]
    # Frozen, so after an epoch it is still what the file has, batch norms' averages too.
    assert torch.equal(state["encoder.stem.0.weight"], weights["conv1.weight"])
    for name in ("0.conv1.weight", "1.bn2.running_mean", "1.bn2.running_var"):
        assert torch.equal(state[f"encoder.layers.3.{name}"], weights[f"layer4.{name}"])
    assert not (state["decoder.0.2.running_mean"] == 0).all()


def test_the_encoder_learns_after_the_epochs_for_which_it_is_frozen(voc):
    flags = ("--model", "darrennet", "--data", voc, "--freeze-encoder", 1)
    quick_train(*flags, epochs=1)
    frozen = state_of("run/last.pt")
    call(train, "--resume", "run/last.pt", "--epochs", 2)
    thawed = state_of("run/last.pt")
    name = "encoder.layers.9.conv3x1_1.weight"
    assert not torch.equal(frozen["state_dict"][name], thawed["state_dict"][name])
    assert not thawed["state_dict"]["encoder.initial_block.bn.running_mean"].eq(0).all()
    assert frozen["state_dict"]["encoder.initial_block.bn.running_mean"].eq(0).all()


def test_without_network_the_error_says_where_the_weights_go(tmp_path, voc):
    settings = ("--model", "resnet34_unet", "--data", voc, "--size", 32, "--out", "run")
    nowhere = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path / "home")}
    result = run_script("train.py", *settings, cwd=tmp_path, **nowhere)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    said = result.stderr.splitlines()[-1]
    assert str(tmp_path / "home/hub/checkpoints/resnet34-b627a593.pth") in said
    assert "--no-pretrained" in said and not (tmp_path / "run").exists()


def test_encoder_weights_of_another_network_are_refused(tmp_path, voc):
    quick_train("--model", "fcn", "--data", voc, epochs=1)
    flags = ("--model", "darrennet", "--data", voc, "--encoder-weights", "run/best.pt")
    result = run_script("train.py", *flags, "--out", "other", cwd=tmp_path)
    assert result.returncode == 2 and not Path("other").exists()
    assert "run/best.pt: none of its tensors fits the model" in result.stderr


def test_cosine_is_pytorchs_annealing_by_the_step_and_adam_is_pytorchs(voc):
    quick_train("--model", "fcn", "--data", voc, "--cosine", "--lr", 0.01, epochs=3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.01)
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3 * (5 // 2))
    with open("run/log.csv", newline="") as file:
        for row in csv.DictReader(file):
            assert float(row["lr"]) == pytest.approx(expected.get_last_lr()[0])
            for _ in range(5 // 2):
                optimizer.step()
                expected.step()
    last = state_of("run/last.pt")
    assert last["scheduler"]["_last_lr"] == [pytest.approx(0, abs=1e-12)]
    assert last["optimizer"]["param_groups"][0]["weight_decay"] == 0.05


def test_the_average_follows_the_weights_for_as_long_as_it_should():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.BatchNorm1d(2))
    average = train.make_average(model, 0.9)
    generator, expected = torch.Generator().manual_seed(0), 0
    for step in range(200):
        drawn = torch.randn(3, 2, generator=generator)
        with torch.no_grad():
            model[0].weight.copy_(drawn[:2])
            model[1].running_mean.copy_(drawn[2])
        average.update_parameters(model)
        # The share of what has been so far: none at first, then as if ten steps were before it.
        decay = min(0.9, step / (step + 10))
        expected = decay * expected + (1 - decay) * drawn.numpy()
    kept = average.module.state_dict()
    assert np.allclose(kept["0.weight"], expected[:2], atol=1e-6)
    assert np.allclose(kept["1.running_mean"], expected[2], atol=1e-6)


def test_the_average_is_what_is_scored_and_kept(voc):
    quick_train("--model", "fcn", "--data", voc, "--no-amp", name="averaged")
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
    quick_train("--model", "fcn", "--data", voc, "--no-amp", "--ema", 0, name="plain")
    assert same_weights(state_of("plain/last.pt"), {"state_dict": last["trained"]})


def test_images_grow_and_cosine_annealing_starts_anew_with_each_size(voc, monkeypatch):
    seen, prepare = [], train.prepare
    monkeypatch.setattr(train, "prepare", lambda *a: (seen.append(a[1].shape[-1]), prepare(*a))[1])
    flags = ("--model", "fcn", "--data", voc, "--augment", "--cosine", "--batch-size", 2)
    call(train, *flags, "--size", 224, "--epochs", 32, "--out", "run")
    with open("run/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = [int(row["size"]) for row in rows]
    assert sizes == [64] * 20 + [128] * 11 + [224]
    # An epoch is two batches of the five images; validation takes three in two.
    assert seen == [size for size in sizes for _ in range(4)]
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
    flags = ("--model", "fcn", "--data", voc, "--progressive", "--size", 96)
    quick_train(*flags, epochs=2)
    call(train, "--resume", "run/last.pt", "--epochs", 4)
    assert [row["size"] for row in state_of("run/last.pt")["history"]] == [64, 96, 96, 96]


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
    flags = ("--model", "fcn", "--data", "voc", "--out", "run", *flags)
    args = train.make_parser().parse_args([str(flag) for flag in flags])
    run = train.set_up(args, None, torch.device("cpu"), 0, 1)
    assert (args.progressive, args.epochs, args.batch_size) == (progressive, epochs, batch)
    assert run.optimizer.defaults["lr"] == args.lr == lr
    assert run.optimizer.defaults["weight_decay"] == args.weight_decay == decay


def test_pretrained_networks_see_large_images_from_the_start(voc, trained_encoders, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(trained_encoders))
    encoder = trained_encoders / "erfnet_encoder_pretrained.pth.tar"
    flags = ("--data", voc, "--augment", "--size", 128)
    quick_train("--model", "resnet34_fcn", *flags, name="resnet34", epochs=1)
    quick_train("--model", "darrennet", "--encoder-weights", encoder, *flags, name="erf", epochs=1)
    assert not state_of("resnet34/last.pt")["args"]["progressive"]
    assert not state_of("erf/last.pt")["args"]["progressive"]


def test_patience_stops_the_run(voc, capsys):
    quick_train("--model", "fcn", "--data", voc, "--lr", 0, "--patience", 2, epochs=40)
    epochs = len(Path("run/log.csv").read_text().splitlines()) - 1
    best = state_of("run/best.pt")["epoch"]
    assert epochs == best + 2 < 40
    assert "stopped: no better validation mIoU for 2 epochs" in capsys.readouterr().out


def test_without_a_checkpoint_evaluate_says_how_to_get_one(tmp_path):
    result = run_script("evaluate.py", cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "there is no checkpoint" in result.stderr and "python train.py" in result.stderr


def test_without_a_run_predict_takes_the_shipped_network(tmp_path, voc):
    image = voc / "VOCdevkit" / "VOC2007" / "JPEGImages" / "val_0.jpg"
    printed = check(run_script("predict.py", image, cwd=tmp_path))
    assert printed.startswith("network: ") and "weights/darrennet_voc2007.pt" in printed
    assert Path("predictions/val_0_mask.png").exists()


@pytest.mark.skipif(not REAL_VOC, reason="VOC_ROOT names no VOC 2007")
def test_the_shipped_network_scores_what_the_readme_says(tmp_path):
    weights = REPOSITORY / "weights" / "darrennet_voc2007.pt"
    args = ("--data", REAL_VOC, "--void-as-background", "--out", "scores")
    check(run_script("evaluate.py", weights, *args, cwd=tmp_path))
    metrics = json.loads(Path("scores/metrics.json").read_text())
    said = re.search(r"scores (0\.\d+) mIoU and (\d+\.\d+) % pixel\s+accuracy", README)
    assert float(said[1]) == pytest.approx(metrics["mean_iou"], abs=1e-4)
    assert float(said[2]) == pytest.approx(100 * metrics["pixel_accuracy"], abs=1e-2)


@pytest.mark.parametrize(
    "script", ["train.py", "evaluate.py", "predict.py", "check.py", "plots.py"]
)
def test_help_says_what_each_flag_does(tmp_path, script):
    printed = check(run_script(script, "--help", cwd=tmp_path))
    assert f"python {script}" in printed and "--out" in printed


def test_predict_does_not_wait_for_torchvision_or_matplotlib(tmp_path):
    (tmp_path / "imports.py").write_text(
        f"import sys\nsys.path.append({str(REPOSITORY)!r})\nimport predict\n"
        "print([m for m in ('torchvision', 'matplotlib') if m in sys.modules])"
    )
    printed = check(run_script(tmp_path / "imports.py", cwd=tmp_path))
    assert printed.strip() == "[]"
