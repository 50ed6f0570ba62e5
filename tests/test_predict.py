"""predict.py on photographs as people have them, by networks whose predictions are known."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, call, check, run_script
from PIL import Image
from test_evaluate import CLASSES, Colors, write_run

import models
import predict
import utils


@pytest.fixture(autouse=True)
def net(monkeypatch):
    """A network that tells red, green and blue apart, in net.pt."""
    monkeypatch.setitem(models.MODELS, "colors", Colors)
    monkeypatch.setattr(Colors, "sizes", [])
    write_run("net.pt", "/data/own")


def photo(path, *colors, size=(60, 40)):
    """Write an image of vertical stripes of equal width."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.array([Image.new("RGB", (1, 1), color).getpixel((0, 0)) for color in colors], np.uint8)
    image = Image.fromarray(row[None]).resize(size, Image.Resampling.NEAREST)
    image.save(path, "PNG" if path.suffix == ".png" else "JPEG")
    return path


def state(folder="."):
    """Return {file: hash of its bytes} of all files below a folder."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def segment(*args, checkpoint="net.pt"):
    return call(predict, *args, "--checkpoint", checkpoint)


def mask_of(path):
    file = Image.open(path)
    assert file.mode == "P"
    return np.array(file)


def test_masks_shares_and_how_sure_the_network_is(capsys):
    photo("a.png", "red", "lime", "blue", "blue", size=(80, 40))
    segment("a.png")
    mask = mask_of("predictions/a_mask.png")
    assert mask.shape == (40, 80)
    # In the middle of each stripe, since the photograph is squeezed to 32 x 32.
    assert mask[20, [10, 30, 50, 70]].tolist() == [0, 1, 2, 2]
    printed = capsys.readouterr().out
    said = r"^a.png: (.*); sure of what is no background: (\d\.\d\d)$"
    line = re.search(said, printed, re.MULTILINE)
    shares = {c: (mask == i).mean() for i, c in enumerate(CLASSES)}
    order = sorted(CLASSES, key=lambda c: -shares[c])
    assert line[1] == ", ".join(f"{c} {shares[c]:.1%}" for c in order)
    assert 0.8 < float(line[2]) < 1  # sure but for where stripes meet


def test_how_sure_it_is_is_the_mean_probability_where_there_is_no_background(capsys, monkeypatch):
    def half(self, images):  # the left is background for certain, the right 0.6 green
        shares = torch.tensor([0.3, 0.6, 0.1]).view(1, 3, 1, 1).repeat(1, 1, 32, 32)
        shares[..., :15] = torch.tensor([0.998, 0.001, 0.001]).view(3, 1, 1)
        return shares.log()

    monkeypatch.setattr(Colors, "forward", half)
    segment(photo("a.png", "red", size=(32, 32)))
    said = "a.png: background 50.0%, green 50.0%; sure of what is no background: 0.60\n"
    assert said in capsys.readouterr().out


def test_a_black_mask_is_explained_by_what_the_network_can_do(capsys):
    segment(photo("a.png", "red"))
    printed = capsys.readouterr().out
    assert "a.png: background 100.0%\n" in printed  # and not how sure it is of nothing
    assert "1 of 1 masks are nothing but background" in printed
    assert "this network scored 0.500 mIoU, of 1\n" in printed
    write_run("bare.pt", "/data/own", metrics={})
    segment("a.png", checkpoint="bare.pt")
    assert "1 of 1 masks are nothing but background" in capsys.readouterr().out


def test_pictures_hold_no_text_and_no_paths():
    segment(photo("a.png", "lime"))
    for kind in ("mask", "overlay"):
        path = Path(f"predictions/a_{kind}.png")
        assert not getattr(Image.open(path), "text", {}) and b"net.pt" not in path.read_bytes()


def test_a_mask_keeps_the_palette_of_the_checkpoint():
    mask = np.array([[0, 1, 2], [2, 1, 255]], np.uint8)
    palette = [[0, 0, 0], [128, 0, 0], [10, 20, 30]]
    predict.save_mask("mask.png", torch.from_numpy(mask).long(), palette)
    image = Image.open("mask.png")
    assert image.mode == "P" and np.array_equal(np.array(image), mask)
    colors = np.array(image.convert("RGB"))
    assert colors[0].tolist() == palette and colors[1, 2].tolist() == [224, 224, 192]
    write_run("net.pt", "/data/own", palette=palette)
    segment(photo("a.png", "blue"))
    found = np.array(Image.open("predictions/a_mask.png").convert("RGB"))
    assert (found == palette[2]).all()


def test_the_newest_run_on_photographs_is_taken_and_named(capsys):
    photo("a.png", "red")
    for number, (name, root) in enumerate((("old", "/x"), ("new", "/y"), ("stars", "shapes"))):
        write_run(f"runs/{name}/best.pt", root)
        os.utime(f"runs/{name}/best.pt", (number, number))
    call(predict, "a.png")
    said = "network: runs/new/best.pt: colors with 3 classes, background, green, blue; --check"
    assert capsys.readouterr().out.startswith(said)
    segment("a.png", checkpoint="runs/stars")  # which is taken where it is named
    assert capsys.readouterr().out.startswith("network: runs/stars/best.pt: ")


def test_a_network_among_the_images_is_told_apart():
    photo("a.png", "red")
    write_run("runs/new/best.pt", "/y")
    Path("erfnet.pth.tar").touch()
    for path in ("runs/new", "runs/new/best.pt", "erfnet.pth.tar"):
        with pytest.raises(
            utils.UserError, match=f"{path}: is a network: predict.py IMAGE --check"
        ):
            call(predict, path, "a.png")
    assert not Path("predictions").exists()


def test_without_a_run_predict_takes_the_shipped_network(tmp_path):
    photo("a.png", "red")
    write_run("runs/stars/best.pt", "shapes", model="fcn")
    printed = check(run_script("predict.py", "a.png", cwd=tmp_path))
    assert printed.startswith(f"network: {predict.SHIPPED}: ")
    assert "21 classes, background, aeroplane, " in printed
    assert Path("predictions/a_mask.png").exists()


def test_the_shipped_network_sees_the_cat_and_the_astronaut():
    pictures = [REPOSITORY / "docs" / name for name in ("cat.png", "person.jpg")]
    call(predict, *pictures)
    cat, person = (mask_of(f"predictions/{name}_mask.png") for name in ("cat", "person"))
    # Looked at by eye: the cat's face, the room behind it; the woman's face, the rocket's nose.
    classes = utils.load_checkpoint(predict.SHIPPED)["classes"]
    assert classes[cat[150, 150]] == "cat" and classes[cat[60, 440]] == "background"
    assert classes[person[130, 225]] == "person" and classes[person[100, 390]] == "background"
    assert set(cat[cat > 0]) == {classes.index("cat")}


def test_each_run_has_the_first_folder_that_is_free():
    photo("a.jpg", "red")
    segment("a.jpg")
    first = state("predictions")
    segment("a.jpg")
    Path("predictions-3").touch()
    segment(photo("there/a.jpg", "blue"))
    assert state("predictions") == first
    for folder, label in (("predictions-2", 0), ("predictions-4", 2)):
        assert (mask_of(f"{folder}/a_mask.png") == label).all() and len(os.listdir(folder)) == 2


@pytest.mark.parametrize("kind", ["mask", "overlay"])
def test_a_file_that_would_be_overwritten_is_a_refusal_before_any_work(kind):
    photo("a.jpg", "red")
    photo("b.jpg", "red")
    segment("b.jpg", "--out", "out")
    target = Path(f"out/a_{kind}.png")
    target.write_text("mine")
    before = state("out")
    Colors.sizes.clear()
    for images in (("a.jpg",), ("b.jpg",), ("c.jpg", "a.jpg")):
        photo("c.jpg", "red")
        with pytest.raises(utils.UserError, match=r"out/[ab]_\w+.png: is there already; choose"):
            segment(*images, "--out", "out")
    assert state("out") == before and Colors.sizes == []
    segment("c.jpg", "--out", "out")  # beside the others
    assert before.items() < state("out").items() and len(state("out")) == 5


def test_two_images_with_one_name_are_both_kept(capsys):
    for folder, color in (("one", "red"), ("two", "blue")):
        photo(f"{folder}/same.png", color)
        photo(f"{folder}/{folder}.jpg", color, size=(40, 60))
    photo("one/SAME.jpg", "lime", size=(50, 50))
    segment("one", "two", "one/one.jpg")  # a file that is given twice is one image
    stems = ["SAME", "one", "SAME-2", "SAME-3", "two"]
    written = sorted(os.listdir("predictions"))
    assert written == sorted(f"{stem}_{kind}.png" for stem in stems for kind in ("mask", "overlay"))
    labels = [np.unique(mask_of(f"predictions/{stem}_mask.png")).tolist() for stem in stems]
    assert labels == [[1], [0], [0], [2], [2]]
    assert "two/same.png -> SAME-3_mask.png: blue 100.0%" in capsys.readouterr().out


def test_names_of_many_files_are_found_at_once(monkeypatch):
    tried, numbered = [], utils.numbered

    def counted(path):
        yield from (tried.append(each) or each for each in numbered(path))

    monkeypatch.setattr(utils, "numbered", counted)
    paths = [Path(f"{i}/frame.jpg") for i in range(2000)]
    names = predict.output_names(paths)
    assert len(tried) <= 4000  # and not two million, each name from the start
    assert names == ["frame", *(f"frame-{i}" for i in range(2, 2001))]


def test_names_that_a_mac_takes_for_one_are_told_apart():
    paths = [Path("a/\u00e9.jpg"), Path("b/e\u0301.jpg"), Path("c/\u00c9.jpg")]
    names = predict.output_names(paths)
    assert names == ["\u00e9", "\u00e9-2", "\u00e9-3"]


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
    line = next(line for line in capsys.readouterr().out.splitlines() if "left out" in line)
    names = line.partition("left out: ")[2]
    assert names == "IMG_1234.HEIC, a_mask.png, a_overlay.png, day2, notes.txt"


def test_what_cannot_be_read_is_said_and_the_rest_is_done(capsys):
    photo("a.jpg", "red")
    Path("b.jpg").write_text("text")
    assert segment("a.jpg", "b.jpg") == 1
    assert re.fullmatch(r"predict.py: error: b.jpg: cannot identify.*\n", capsys.readouterr().err)
    assert sorted(os.listdir("predictions")) == ["a_mask.png", "a_overlay.png"]
    assert segment("b.jpg") == 2 and not Path("predictions-2").exists()
    with pytest.raises(utils.UserError, match="^gone.jpg: does not exist; give images or"):
        segment("a.jpg", "gone.jpg")


@pytest.mark.parametrize("color", [(0, 255, 0), (255, 255, 255), (3, 60, 20)])
def test_the_overlay_is_the_photograph_with_classes_at_half_strength_and_an_outline(color):
    mask = np.zeros((80, 100), np.uint8)
    for c in (1, 2, 3):
        mask[20:60, 25 * c - 5 : 25 * c + 15] = c
    image = Image.new("RGB", (100, 80), color)
    picture = np.array(predict.overlay(image, mask, ["nothing", "a", "b", "c"]))[:80, :100]
    assert (picture[mask == 0] == color).all()  # as it is, in colour
    for c in (1, 2, 3):
        vivid = np.array(utils.VIVID[c - 1])
        inside = picture[25:55, 25 * c : 25 * c + 10].astype(int)
        assert np.abs(inside - (vivid + color) / 2).max() <= 1.5
        for y, x in ((20, 25 * c), (59, 25 * c + 5), (40, 25 * c - 5), (40, 25 * c + 14)):
            assert (picture[y, x] == vivid).all()


def test_the_legend_names_the_classes_of_over_half_a_percent(monkeypatch):
    written, drawing = [], predict.ImageDraw.ImageDraw
    draw = drawing.text
    record = lambda self, xy, text, **k: written.append(text) or draw(self, xy, text, **k)
    monkeypatch.setattr(drawing, "text", record)
    mask = np.zeros((100, 200), np.uint8)  # 20,000 pixels: half a percent is 100
    mask[:50] = 2
    mask[50, :101] = 1
    mask[51, :100] = 3
    picture = predict.overlay(Image.new("RGB", (200, 100)), mask, ["nothing", "cat", "犬", "cow"])
    assert written == ["class 2 50.0%", "nothing 49.0%", "cat 0.5%"]
    legend = np.array(picture)[100:].reshape(-1, 3).tolist()
    shown = [list(color) in legend for color in utils.VIVID[:3]]
    assert shown == [True, True, False] and picture.width == 200
