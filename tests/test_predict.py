"""predict.py on photographs as people have them, by networks whose predictions are known."""

import colorsys
import hashlib
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, call, check, run_script
from PIL import Image
from test_evaluate import CLASSES, Colors, write_run
from torch import nn

import models
import predict
import utils


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "colors", Colors)
    monkeypatch.setattr(Colors, "sizes", [])
    write_run(Path("net.pt"), "/data/own")


def photo(path, *colors, size=(60, 40)):
    """Write an image of vertical stripes of equal width."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, "PNG")
    image = Image.new("RGB", (len(colors), 1))
    image.putdata([Image.new("RGB", (1, 1), color).getpixel((0, 0)) for color in colors])
    kind = "PNG" if path.suffix == ".png" else "JPEG"
    image.resize(size, Image.Resampling.NEAREST).save(path, kind)
    return path


def state(folder="."):
    """Return {file: hash of its bytes} of all files below a folder."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def segment(*args, checkpoint="net.pt"):
    call(predict, *args, "--checkpoint", checkpoint)


def mask_of(path):
    file = Image.open(path)
    assert file.mode == "P"
    return np.array(file)


# -------------------------------------------------------------------------------- what is written


def test_masks_shares_and_how_sure_the_network_is(capsys):
    photo("a.png", "red", "lime", "blue", "blue", size=(80, 40))
    segment("a.png")
    mask = mask_of("predictions/a_mask.png")
    assert mask.shape == (40, 80)
    # In the middle of each stripe, since the photograph is squeezed to 32 x 32.
    assert mask[20, [10, 30, 50, 70]].tolist() == [0, 1, 2, 2]
    said = re.search(r"^a.png: (.*); sure: (\d\.\d\d)$", capsys.readouterr().out, re.MULTILINE)
    shares = {c: f"{(mask == i).mean():.1%}" for i, c in enumerate(CLASSES)}
    assert said[1] == f"blue {shares['blue']}, " + ", ".join(
        f"{c} {shares[c]}" for c in sorted(CLASSES[:2], key=lambda c: -float(shares[c][:-1]))
    )
    assert 0.9 < float(said[2]) < 1  # sure but for where stripes meet


def test_how_sure_the_network_is_is_the_mean_probability_of_its_classes(capsys, monkeypatch):
    class Unsure(Colors):
        def forward(self, images):
            shares = torch.tensor([0.2, 0.7, 0.1]).log().view(1, 3, 1, 1)
            return shares.expand(len(images), 3, *images.shape[-2:])

    monkeypatch.setitem(models.MODELS, "colors", Unsure)
    segment(photo("a.png", "red"))
    printed = capsys.readouterr().out
    assert "a.png: green 100.0%; sure: 0.70" in printed and "1/3 is a mere guess" in printed


def test_a_larger_size_feeds_the_network_larger_images():
    segment(photo("a.png", "lime"), "--size", 96)
    assert Colors.sizes == [(96, 96)] and mask_of("predictions/a_mask.png").shape == (40, 60)


def test_the_network_is_named_first_and_where_others_are(tmp_path, capsys):
    segment(photo("a.png", "red"))
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == ("network: net.pt: colors, trained on own: 3 classes (background, green, blue)")
    assert str(predict.SHIPPED) in second and "--checkpoint" in second
    Path("runs/new").mkdir(parents=True)
    os.replace("net.pt", "runs/new/best.pt")
    call(predict, "a.png")
    assert capsys.readouterr().out.startswith("network: runs/new/best.pt: colors, trained on own")


def test_without_a_run_predict_takes_the_shipped_network(tmp_path):
    photo("a.png", "red")
    printed = check(run_script("predict.py", "a.png", cwd=tmp_path))
    assert printed.startswith("network: ") and f"weights/{predict.SHIPPED.name}" in printed
    assert "21 classes (background, aeroplane, " in printed
    assert Path("predictions/a_mask.png").exists()


def test_the_first_command_of_the_readme_sees_the_cat_and_the_astronaut():
    pictures = [REPOSITORY / "docs" / name for name in ("cat.png", "person.jpg")]
    call(predict, *pictures)
    cat, person = (mask_of(f"predictions/{name}_mask.png") for name in ("cat", "person"))
    # Looked at by eye: the cat's face, the room behind it; the woman's face, the rocket's nose.
    classes = utils.load_checkpoint(predict.SHIPPED)["classes"]
    assert classes[cat[150, 150]] == "cat" and classes[cat[60, 440]] == "background"
    assert classes[person[130, 225]] == "person" and classes[person[100, 390]] == "background"
    assert set(cat[cat > 0]) == {classes.index("cat")}


def test_the_network_for_streets_knows_camvids_classes(capsys):
    streets = predict.SHIPPED.with_name("darrennet_camvid.pt")
    segment(photo("a.png", "gray"), checkpoint=streets)
    printed = capsys.readouterr().out
    assert "trained on CamVid" in printed and "11 classes (sky, building, pole" in printed
    assert mask_of("predictions/a_mask.png").max() <= 10


def test_a_black_mask_is_explained_by_what_the_network_knows(capsys, monkeypatch):
    class Blind(Colors):
        def forward(self, images):
            shares = torch.tensor([0.5, 0.1, 0.4]).log().view(1, 3, 1, 1)
            return shares.expand(len(images), 3, *images.shape[-2:])

    monkeypatch.setitem(models.MODELS, "colors", Blind)
    segment(photo("a.png", "red"))
    printed = capsys.readouterr().out
    assert "background 100.0%; sure: 0.50" in printed
    assert "nothing but background, with a probability from 0.50 up" in printed
    assert (
        "1 of 1 masks are nothing but background" in printed
        and "scored 0.500 mIoU, after 7 epochs" in printed
    )


# ---------------------------------------------------------------------------- nothing is overwritten


def test_masks_that_are_not_its_own_are_never_overwritten(tmp_path):
    for name in ("a0", "a1"):
        photo(f"photos/{name}.jpg", "red")
        Image.new("L", (60, 40), 2).save(f"photos/{name}_mask.png")
    before = state("photos")
    for args in (("photos",), ("photos/a1.jpg",), ("photos/a0.jpg", "photos/a1.jpg")):
        with pytest.raises(utils.UserError, match="a._mask.png: was not written by predict.*--out"):
            segment(*args, "--out", "photos")
    assert state("photos") == before and Colors.sizes == []  # found before anything is segmented
    write_run(Path("fcn.pt"), "/data/own", "fcn")
    flags = ("--checkpoint", "fcn.pt", "--out", "photos")
    result = run_script("predict.py", "photos", *flags, cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert (
        "photos/a0_mask.png: was not written by predict.py; choose another --out" in result.stderr
    )
    assert state("photos") == before


@pytest.mark.parametrize("written", ["text", "overlay", "folder"])
def test_whatever_else_bears_the_name_of_an_output_is_left_alone(written):
    photo("a.jpg", "red")
    target = Path("out/a_overlay.png")
    if written == "overlay":  # of an editor, with a text of its own
        photo(target, "blue")
    elif written == "text":
        Path("out").mkdir()
        target.write_text("mine")
    else:
        target.mkdir(parents=True)
    before = state("out")
    with pytest.raises(utils.UserError, match="a_overlay.png: was not written by predict.py"):
        segment("a.jpg", "--out", "out")
    assert state("out") == before


def test_the_same_prediction_may_be_made_again_but_no_other_overwritten(capsys):
    photo("a.jpg", "red")
    photo("there/a.jpg", "blue")
    write_run(Path("other.pt"), "/data/own")
    segment("a.jpg")
    segment("a.jpg")
    first = state("predictions")
    assert not Path("predictions-2").exists()
    capsys.readouterr()
    segment("there/a.jpg")
    printed = capsys.readouterr().out
    assert "predictions is left as it is" in printed and "are in predictions-2" in printed
    segment("a.jpg", checkpoint="other.pt")
    segment("a.jpg", "--tta")
    segment("a.jpg", "--size", 64)
    segment("there/a.jpg")  # finds its own again
    assert state("predictions") == first and not Path("predictions-6").exists()
    for number, label in ((2, 2), (3, 0), (4, 0), (5, 0)):
        assert (mask_of(f"predictions-{number}/a_mask.png") == label).all()
    with pytest.raises(
        utils.UserError, match="is of another image, of another network or with other flags"
    ):
        segment("a.jpg", "--out", "predictions-2")
    segment("a.jpg", "--out", "predictions")
    assert state("predictions") == first
    segment(photo("b.jpg", "red"), "--out", "predictions-2")  # beside the others
    assert len(list(Path("predictions-2").iterdir())) == 4
    utils.save_checkpoint("net.pt", utils.load_checkpoint("net.pt") | {"epoch": 99})
    segment("a.jpg")  # by the same file, after more training
    assert state("predictions") == first and Path("predictions-6").exists()


def test_two_images_with_one_name_are_both_kept():
    for folder, color in (("one", "red"), ("two", "blue")):
        photo(f"{folder}/same.png", color)
        photo(f"{folder}/{folder}.jpg", color, size=(40, 60))
    photo("one/SAME.jpg", "lime", size=(50, 50))
    segment("one", "two")
    stems = ["one", "SAME", "same-2", "same-3", "two"]
    written = sorted(path.name for path in Path("predictions").iterdir())
    assert written == sorted(f"{stem}_{kind}.png" for stem in stems for kind in ("mask", "overlay"))
    labels = {stem: np.unique(mask_of(f"predictions/{stem}_mask.png")).tolist() for stem in stems}
    assert labels == {"one": [0], "SAME": [1], "same-2": [0], "same-3": [2], "two": [2]}


def test_names_of_any_kind(tmp_path):
    names = ["-dash.jpg", "new\nline.jpg", "ünïcödé 写真.jpg", "a [1].jpg"]
    names += [os.fsdecode(b"latin\xe9.jpg")] if sys.platform == "linux" else []
    for name in names:
        photo(f"photos/{name}", "red")
    for _ in range(2):  # the second time over the first's
        printed = check(run_script("predict.py", "photos", "photos/a [1].jpg", cwd=tmp_path))
        assert len(re.findall(r"^photos/.*; sure: ", printed, re.MULTILINE)) == len(names) + 1
    written = {path.name for path in Path("predictions").iterdir()}
    stems = [Path(name).stem for name in names] + ["a [1]-2"]
    assert written == {f"{stem}_{kind}.png" for stem in stems for kind in ("mask", "overlay")}
    assert not Path("predictions-2").exists()


# ------------------------------------------------------------------------------ which images


def test_a_folders_masks_and_what_is_no_image_are_left_out_and_named(capsys):
    for name in ("a.JPG", "b.jpeg", "c.jfif", "day2/d.jpg", "._a.JPG", ".hidden.png"):
        photo(f"photos/{name}", "red")
    photo("photos/a_mask.png", "blue")
    photo("photos/a_overlay.png", "blue")
    photo("photos/gas_mask.png", "blue")  # a photograph: nothing is called gas
    Path("photos/IMG_1234.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    Path("photos/notes.txt").write_text("text")
    segment("photos")
    written = {path.name for path in Path("predictions").glob("*_mask.png")}
    assert written == {f"{stem}_mask.png" for stem in ("a", "b", "c", "gas_mask")}
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("photos: left out"))
    names = line.removeprefix("photos: left out ").partition(";")[0]
    assert names == "IMG_1234.HEIC, a_mask.png, a_overlay.png, day2, notes.txt"
    assert "convert HEIC to JPEG" in line and "hidden" not in printed and "._a" not in printed
    # Its own masks and overlays are known by what is written in them, whatever they are called.
    Path("predictions/b_mask.png").rename("predictions/x_mask.png")
    with pytest.raises(utils.UserError, match="predictions: has no images"):
        segment("predictions")


def test_a_photograph_in_heic_is_refused_with_the_remedy(tmp_path):
    Path("IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    result = run_script("predict.py", "IMG_1.HEIC", cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "IMG_1.HEIC" in result.stderr and "convert HEIC to JPEG" in result.stderr
    assert not Path("predictions").exists()
    Path("photos").mkdir()
    os.replace("IMG_1.HEIC", "photos/IMG_1.HEIC")
    with pytest.raises(utils.UserError, match="photos: has no images"):
        segment("photos")


def test_patterns_that_no_shell_has_expanded(capsys):
    for name in ("a", "b"):
        photo(f"photos/{name}.jpg", "red")
    segment("photos/*.jpg")
    assert len(list(Path("predictions").glob("*_mask.png"))) == 2
    with pytest.raises(utils.UserError, match=r"x\*.jpg: nothing matches this pattern"):
        segment("x*.jpg")


def test_predict_does_not_wait_for_torchvision_or_matplotlib(tmp_path):
    (tmp_path / "imports.py").write_text(
        f"import sys\nsys.path.append({str(REPOSITORY)!r})\nimport predict\n"
        "print([m for m in ('torchvision', 'matplotlib') if m in sys.modules])"
    )
    printed = check(run_script(tmp_path / "imports.py", cwd=tmp_path))
    assert printed.strip() == "[]"


# ---------------------------------------------------------------------------------- the overlay


@pytest.mark.parametrize("color", [(0, 255, 0), (255, 0, 0), (255, 255, 255), (3, 60, 20)])
def test_in_the_overlay_a_class_has_the_hue_of_the_legend_on_any_photograph(color):
    palette = [[0, 0, 0], [128, 0, 0], [0, 0, 128], [64, 128, 0]]
    mask = np.zeros((80, 100), np.uint8)
    for c in range(1, 4):
        mask[20:60, 25 * c - 5 : 25 * c + 15] = c
    image = Image.new("RGB", (100, 80), color)
    picture = np.array(utils.overlay(image, mask, ["nothing", "a", "b", "c"], palette))[:80, :100]
    for c in range(1, 4):
        hue, saturation, _ = colorsys.rgb_to_hsv(*(np.array(palette[c]) / 255))
        pixels = picture[mask == c] / 255
        shown = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in pixels])
        assert np.abs((shown[:, 0] - hue + 0.5) % 1 - 0.5).max() < 0.02
        assert shown[:, 1].min() > 0.3 * saturation
        # The border has the pure colour.
        assert picture[20, 25 * c].tolist() == picture[59, 25 * c + 5].tolist() == palette[c]
    # The rest is grey, but for the white line around the classes; brighter where the photograph is.
    rest = picture[mask == 0].astype(int)
    assert (rest.max(1) - rest.min(1)).max() == 0 and (rest == 255).all(1).any()
    grey = np.array(Image.new("RGB", (1, 1), color).convert("L")).item()
    assert rest.min() == pytest.approx(grey + (255 - grey) * 70 / 255, abs=1)


def test_a_photograph_of_24_million_pixels_takes_the_memory_of_few_maps():
    """Besides the photograph and its mask, segment needs three maps of its size, not one a class."""

    class Flat(nn.Module):
        def forward(self, images):
            return torch.zeros(len(images), 21, 4, 4).index_fill_(1, torch.tensor([20]), 1.0)

    seen = []
    interpolate = torch.nn.functional.interpolate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "interpolate",
            lambda one, *args, **kwargs: (
                seen.append(one.shape[1]) or interpolate(one, *args, **kwargs)
            ),
        )
        labels, sure = utils.segment(Flat(), torch.zeros(1, 3, 4, 4), (60, 40))
    assert seen == [1] * 21 and (labels == 20).all()
    assert sure.mean().item() == pytest.approx(np.e / (np.e + 20), abs=1e-6)


def test_a_black_mask_by_a_network_that_ended_no_epoch_is_explained(capsys):
    write_run(Path("last.pt"), "/data/own")
    last = torch.load("last.pt", weights_only=True)
    torch.save(last | {"metrics": {}, "epoch": 0}, "last.pt")
    photo("a.png", "red")
    segment("a.png", checkpoint="last.pt")
    assert "1 of 1 masks are nothing but background" in capsys.readouterr().out


def test_images_are_normalised_where_the_network_is(monkeypatch):
    """The layout that normalize chooses is the device's, so it must come after the move."""
    log, to, normalize = [], torch.Tensor.to, predict.data.normalize
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, *a, **k: (log.append(t.dtype), to(t, *a, **k))[1]
    )
    monkeypatch.setattr(
        predict.data, "normalize", lambda images: (log.append("normalize"), normalize(images))[1]
    )
    segment(photo("a.png", "red"))
    assert torch.uint8 in log[: log.index("normalize")]
