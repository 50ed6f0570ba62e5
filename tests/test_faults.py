"""Crashes, kills and bad input: nothing lost, nothing silent. Real processes wherever it counts."""

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Process, call, run_script, same, write_voc
from PIL import Image
from PIL.PngImagePlugin import putchunk

import train
import utils

KILLS = 5

pytestmark = pytest.mark.usefixtures("no_pictures", "small")


def settings(root, out, epochs, model="small"):
    flags = ("--model", model, "--data", root, "--augment", "--cosine", "--device", "cpu")
    sizes = ("--size", 32, "--batch-size", 2, "--epochs", epochs, "--out", out)
    return [str(flag) for flag in (*flags, *sizes)]


def outcome(run):
    """Return all of last.pt that does not tell the time."""
    last = torch.load(Path(run, "last.pt"), weights_only=True)
    timeless = [{k: v for k, v in row.items() if "second" not in k} for row in last["history"]]
    return [last["state_dict"], last["trained"], last["optimizer"], last["epoch"], timeless]


def wait_for_epochs(process, log, count):
    """Wait until the log has more than that many epochs, or the process has ended."""
    while process.is_alive():
        with contextlib.suppress(FileNotFoundError):
            if len(log.read_text().splitlines()) > count + 1:
                return
        time.sleep(0.01)


# train.py with the small network.
WITH_SMALL = f"""
import sys
sys.path[:0] = {[str(REPOSITORY), str(REPOSITORY / "tests")]!r}
import conftest, data, models, train, utils
models.MODELS["small"] = conftest.Small
utils.cli(train.main, data.DataError)
"""


def test_killed_at_random_and_resumed_ends_as_if_it_never_was(voc, tmp_path):
    Path("train_.py").write_text(WITH_SMALL)
    epochs = 40  # many more than are done when the last kill comes
    call(train, *settings(voc, "whole", epochs))
    last_row = utils.load_checkpoint("whole/last.pt")["history"][-1]
    chance = random.Random(time.time_ns())
    # One command starts the run and goes on with it.
    command, log = [*settings(voc, "killed", epochs), "--resume"], Path("killed/log.csv")
    done = []
    for _ in range(KILLS):
        process = Process(tmp_path / "train_.py", *command, cwd=tmp_path)
        wait_for_epochs(process, log, done[-1] if done else 0)
        time.sleep(chance.uniform(0, 2 * last_row["seconds"]))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
        done.append(len(utils.load_checkpoint("killed/last.pt")["history"]))
        assert (Path("killed/best.pt")).exists()
    assert done == sorted(done) and 0 < done[-1] < epochs
    call(train, *command)
    assert same(outcome("whole"), outcome("killed"))
    whole, killed = (utils.load_checkpoint(f"{run}/best.pt") for run in ("whole", "killed"))
    assert whole["epoch"] == killed["epoch"] and same(whole["state_dict"], killed["state_dict"])


def test_a_run_that_is_ended_between_validations_repeats_the_epochs_since(voc, monkeypatch):
    """Of 250 epochs every second is validated; the fifth is broken off."""
    train_one_epoch = train.train_one_epoch

    def run_until(last, name):
        def stopped(run, epoch):
            if epoch == last:
                raise KeyboardInterrupt
            return train_one_epoch(run, epoch)

        monkeypatch.setattr(train, "train_one_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            call(train, *settings(voc, name, 250), "--resume")

    run_until(7, "whole")
    run_until(5, "ended")
    assert utils.load_checkpoint("ended/last.pt")["epoch"] == 4
    run_until(7, "ended")
    assert outcome("whole")[3] == 6 and same(outcome("ended"), outcome("whole"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_at_once_and_what_was_saved_stays(voc, tmp_path, number):
    Path("train_.py").write_text(WITH_SMALL)
    process = Process(tmp_path / "train_.py", *settings(voc, "run", 9000), cwd=tmp_path)
    while process.is_alive() and not Path("run/log.csv").exists():
        time.sleep(0.01)
    os.kill(process.pid, number)
    result = process.wait()
    assert result.returncode == (130 if number == signal.SIGINT else -number)
    assert result.stderr == "" and utils.load_checkpoint("run/last.pt")["history"]


def test_a_full_disk_leaves_the_earlier_checkpoints(voc, tmp_path):
    pytest.importorskip("resource")
    call(train, *settings(voc, "run", 1, "darrennet"))
    before = {name: Path("run", name).read_bytes() for name in ("best.pt", "last.pt", "log.csv")}
    # Files cannot grow beyond a megabyte: a write fails half-way, as on a full disk.
    Path("small_files.py").write_text(
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\nimport data, train, utils\n"
        "utils.cli(train.main, data.DataError)\n"
    )
    flags = ("--resume", "run/last.pt", "--epochs", 3)
    result = run_script(tmp_path / "small_files.py", *flags, cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert {name: Path("run", name).read_bytes() for name in before} == before
    assert not list(Path("run").glob("*.tmp"))


def edit(path, change):
    """Rewrite a picture file as `change` makes it of the old one."""
    with Image.open(path) as image:
        image.load()
    change(image).save(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def huge(path):
    """Write the head of a PNG of 20000 x 20000 pixels."""
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        size = (20000).to_bytes(4, "big") * 2
        putchunk(file, b"IHDR", size, b"\x08\x02\x00\x00\x00")
        putchunk(file, b"IDAT", b"")


def sixteen_bit(like, path):
    width, height = Image.open(like).size
    Image.fromarray(np.ones((height, width), np.uint16)).save(path, "PNG")


def jpeg_mask(path):
    image = Image.open(path).convert("L")
    image.save(path, format="JPEG")


def label_99(path):
    labels = np.array(Image.open(path))
    labels[7, 5] = 99
    Image.fromarray(labels).save(path)


JPEG = "JPEGImages/train_1.jpg"
MASK = "SegmentationClass/train_1.png"
SPLIT = "ImageSets/Segmentation/train.txt"
PREPARE = "python tools/prepare.py DIR NEW"

# (what is wrong, what spoils the VOC folder, the command's flags, what the one line must say)
SPOILED_FOLDERS = [
    ("an empty folder", shutil.rmtree, (), "voc: No such file or directory; give --data"),
    ("no images", lambda r: shutil.rmtree(r / "JPEGImages"), (), "has no images/ and masks/, but"),
    ("no split file", lambda r: (r / SPLIT).unlink(), (), "has no train.txt; write it"),
    ("an empty split", lambda r: (r / SPLIT).write_text("\n\n"), (), "none for train; files: "),
    ("a split in UTF-16", lambda r: (r / SPLIT).write_text("a", "utf-16"), (), "as UTF-8"),
    ("a list with endings", lambda r: edit_lines(r / SPLIT, "{}.jpg"), (), "'train_0.jpg' is no image"),
    ("a list with masks", lambda r: edit_lines(r / SPLIT, "/a/{0}.jpg /b/{0}.png"), (), PREPARE),
    ("no classes", lambda r: (r / "names.txt").write_text("cat"), (), "classes.txt: No such file"),
    ("__ignore__", lambda r: (r / "classes.txt").write_text("__ignore__\na\nb"), (), "__ignore__"),
    ("a missing image", lambda r: (r / JPEG).unlink(), (), "'train_1' is no image's name"),
    ("a missing mask", lambda r: (r / MASK).unlink(), (), "'train_1' is no image's name"),
    ("masks of other names", lambda r: rename_masks(r), (), "train_1_mask.png; else"),
    ("two images of a name", lambda r: shutil.copy(r / JPEG, r / JPEG.replace("jpg", "jpeg")), (),
     "train_1.jpg: train_1.jpeg has its name too"),
    ("a truncated image", lambda r: truncate(r / JPEG), (), "train_1.jpg: image file is truncated"),
    ("a truncated mask", lambda r: truncate(r / MASK), (), f"save masks as palette PNG, or {PREPARE}"),
    ("a zero-byte image", lambda r: (r / JPEG).write_bytes(b""), (), "train_1.jpg: cannot identify"),
    ("text as JPEG", lambda r: (r / JPEG).write_text("hello"), (), "train_1.jpg: cannot identify"),
    ("20000x20000", lambda r: huge(r / JPEG), (), "train_1.jpg: Image size (400000000 pixels)"),
    ("a 16-bit image", lambda r: sixteen_bit(r / MASK, r / JPEG), (), f"{PREPARE} --white NUMBER"),
    ("an RGB mask", lambda r: edit(r / MASK, lambda m: m.convert("RGB")), (), "is a RGB PNG"),
    ("an RGBA mask", lambda r: edit(r / MASK, lambda m: m.convert("RGBA")), (), "is a RGBA PNG"),
    ("a JPEG mask", lambda r: jpeg_mask(r / MASK), (), "is a L JPEG"),
    ("masks that are .jpg", lambda r: [(r / SPLIT).unlink(), (r / SPLIT).with_name("val.txt").unlink(),
     *[p.rename(p.with_suffix(".jpg")) for p in (r / "SegmentationClass").iterdir()]], (),
     "images, 0 of them with a PNG mask, none for train; files: "),
    ("a 16-bit mask", lambda r: sixteen_bit(r / MASK, r / MASK), (), "train_1.png: is a I;16 PNG"),
    ("a wrong label", lambda r: label_99(r / MASK), (), "train_1.png: has the values [99]; classes"),
    ("other sizes", lambda r: edit(r / MASK, lambda m: m.resize((9, 8))), (), "train_1.png: is (9, 8)"),
    ("all void", lambda r: [edit(p, lambda m: Image.new("L", m.size, 255)) for p in
     (r / "SegmentationClass").iterdir()], (), "have nothing but background"),
    ("objects as 255", lambda r: masks_of_0_and_255(r), (), "an object of 255 should be 1"),
]  # fmt: skip


def edit_lines(path, form):
    """Write each line of a list in another form."""
    path.write_text("\n".join(form.format(name) for name in path.read_text().split()))


def rename_masks(root):
    for path in (root / "SegmentationClass").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))


def masks_of_0_and_255(root):
    """Mark objects as hobbyists often do; here 255 is void, so nothing could be learned."""
    for path in (root / "SegmentationClass").iterdir():
        edit(path, lambda mask: Image.fromarray(np.where(np.array(mask), 255, 0).astype(np.uint8)))


def nothing(root):
    pass


BAD_FLAGS = [
    ("no data folder", nothing, ("--data", "nowhere"), "nowhere: No such file or directory; give --data"),
    ("an unknown split", nothing, ("--val-split", "vla"), "no vla.txt; write it"),
    ("an unknown model", nothing, ("--model", "segnet"), "argument --model: invalid choice"),
    ("an unknown device", nothing, ("--device", "toaster"), "--device toaster cannot be used"),
    ("one of another package", nothing, ("--device", "hpu"), "--device hpu cannot be used"),
    ("no such GPU", nothing, ("--device", "cuda:99"), "--device cuda:99 cannot be used here"),
    ("an unknown scheme", nothing, ("--class-weights", "magic"), "argument --class-weights"),
    ("no encoder file", nothing, ("--encoder-weights", "gone.pth"), "gone.pth: does not exist"),
    ("a folder to resume", nothing, ("--resume", "."), "last.pt: does not exist"),
    ("an unknown precision", nothing, ("--precision", "int8"), "argument --precision: invalid"),
    ("steps and epochs", nothing, ("--steps", "3"), "--steps: not allowed with argument --epochs"),
    ("an --out that is a file", nothing, ("--out", __file__), "test_faults.py"),
    ("an --out below a file", nothing, ("--out", f"{__file__}/x"), "test_faults.py/x"),
] + [
    (f"{flag} {value}", nothing, (f"{flag}={value}",), f"argument {flag}: invalid")
    for flag, values in {
        "--size": ("0", "31", "-224", "9999999", "big"),
        "--epochs": ("0", "-1", "1e3"),
        "--batch-size": ("0", "-16"),
        "--lr": ("-0.1", "nan", "inf", "1000"),
        "--weight-decay": ("-1", "nan"),
        "--patience": ("0",),
        "--seed": ("-1", "99999999999999999999"),
    }.items()
    for value in values
]  # fmt: skip

# (what is wrong, the script, its arguments, what the one line must say); files are from `given`
OTHER_SCRIPTS = [
    ("a checkpoint that is a folder", "evaluate.py", ("folder",), "best.pt: does not exist"),
    ("text for a checkpoint", "evaluate.py", ("notes.txt",), "notes.txt: is broken, or holds"),
    ("weights of another model", "evaluate.py", ("mixed.pt",), "weights do not fit darrennet"),
    ("an unknown split", "evaluate.py", ("good.pt", "--split", "x"), "has no x.txt"),
    ("other classes", "evaluate.py", ("good.pt", "--data", "shapes"), "trained on 21 classes"),
    ("no checkpoint", "evaluate.py", (), "there is no runs/*/best.pt yet"),
    ("a missing image", "predict.py", ("x.jpg", "--checkpoint", "good.pt"), "x.jpg: does not exist"),
    ("a folder of none", "predict.py", ("folder", "--checkpoint", "good.pt"), "folder: has no"),
    ("only text", "predict.py", ("notes.txt", "--checkpoint", "good.pt"), "notes.txt: cannot"),
    ("a full --out", "predict.py", ("photo.jpg", "--checkpoint", "good.pt", "--out", "notes.txt"),
     "notes.txt"),
    ("a network for a photo", "predict.py", ("good.pt", "photo.jpg"), "good.pt: is a network: predict"),
]  # fmt: skip

CASES = SPOILED_FOLDERS + BAD_FLAGS + OTHER_SCRIPTS


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    """A folder with a VOC folder, a trained checkpoint, and files that are none."""
    folder = tmp_path_factory.mktemp("given")
    root = write_voc(folder / "voc")
    out = folder / "run"
    flags = ("--model", "fcn", "--data", root, "--size", 32, "--epochs", 1, "--out", out)
    call(train, *flags)
    good = (out / "best.pt").read_bytes()
    shutil.rmtree(out)
    (folder / "good.pt").write_bytes(good)
    (folder / "notes.txt").write_text("not weights, nor an image")
    (folder / "folder").mkdir()
    mixed = torch.load(folder / "good.pt", weights_only=True) | {"model": "darrennet"}
    torch.save(mixed, folder / "mixed.pt")
    shutil.copy(root / "JPEGImages" / "val_0.jpg", folder / "photo.jpg")
    return folder


def run_case(case, folder, given):
    """Run one case in `folder`; return (the process's result, the files it left behind)."""
    shutil.copytree(given / "voc", folder / "voc")
    for path in given.iterdir():
        if path.name != "voc":
            (folder / path.name).symlink_to(path)
    _, second, third, _ = case
    if callable(second):
        second(folder / "voc")
        script, args = "train.py", ["--data", "voc", "--epochs", "1", "--out", "run", *third]
    else:
        script, args = second, third
    before = set(folder.rglob("*"))
    result = run_script(script, *args, cwd=folder)
    return result, set(folder.rglob("*")) - before


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[0] for case in CASES])
def test_bad_input_is_one_line_and_status_2_with_nothing_written(given, tmp_path, number):
    result, left_behind = run_case(CASES[number], tmp_path, given)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert len(result.stderr.replace(str(tmp_path), "/home/me")) <= 300
    assert CASES[number][3] in result.stderr
    assert left_behind == set()
