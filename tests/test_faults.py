"""Crashes, signals and bad input: nothing lost, nothing silent. Real processes wherever it counts."""

import contextlib
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Process, Small, call, run_script, write_voc
from PIL import Image
from PIL.PngImagePlugin import putchunk

import data
import models
import train
import utils

KILLS = 5
RELIABILITY = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.usefixtures("no_pictures", "small")

# ---------------------------------------------------------------------------------------- resuming


def settings(root, out, epochs, model="small"):
    flags = ("--model", model, "--data", root, "--augment", "--cosine", "--device", "cpu")
    sizes = ("--size", 32, "--batch-size", 2, "--epochs", epochs, "--out", out)
    return [str(flag) for flag in (*flags, *sizes)]


def outcome(run):
    """Return all of last.pt that does not tell the time."""
    last = torch.load(Path(run, "last.pt"), weights_only=True)
    timeless = [{k: v for k, v in row.items() if "second" not in k} for row in last["history"]]
    return [
        last["state_dict"],
        last["trained"],
        last["optimizer"],
        last["random_state"],
        timeless,
    ]


def assert_same(a, b):
    """Compare nested lists and dictionaries of tensors and plain values bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def wait_for_epochs(process, log, count):
    """Wait until the log has more than that many epochs, or the process has ended."""
    while process.alive():
        with contextlib.suppress(FileNotFoundError):
            if len(log.read_text().splitlines()) > count + 1:
                return
        time.sleep(0.01)


# train.py with the small network, which saves each epoch.
SAVES_EACH_EPOCH = f"""
import sys
sys.path[:0] = {[str(REPOSITORY), str(REPOSITORY / "tests")]!r}
import conftest, data, models, train, utils
models.MODELS["small"] = conftest.Small
train.SAVE_EVERY = 0
utils.cli(train.main, data.DataError)
"""


def test_killed_at_random_and_resumed_ends_as_if_it_never_was(voc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train_.py").write_text(SAVES_EACH_EPOCH)
    epochs = 60  # many more than are done when the last kill comes
    call(train, *settings(voc, "whole", epochs))
    last_row = utils.load_checkpoint("whole/last.pt")["history"][-1]
    chance = random.Random(time.time_ns())
    command, log = settings(voc, "killed", epochs), Path("killed/log.csv")
    done = []
    for _ in range(KILLS):
        process = Process(tmp_path / "train_.py", *command, cwd=tmp_path)
        wait_for_epochs(process, log, done[-1] if done else 0)
        time.sleep(chance.uniform(0, last_row["seconds"]))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
        command = ["--resume", "killed/last.pt"]
        done.append(len(utils.load_checkpoint("killed/last.pt")["history"]))
        assert (Path("killed/best.pt")).exists()
    assert done == sorted(done) and 0 < done[-1] < epochs
    call(train, *command)
    assert_same(outcome("whole"), outcome("killed"))
    for name in ("best.pt", "last.pt"):
        whole, killed = (utils.load_checkpoint(f"{run}/{name}") for run in ("whole", "killed"))
        assert whole["epoch"] == killed["epoch"]
    assert not list(Path("killed").glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_says_how_to_go_on_and_exits(voc, tmp_path, number):
    process = Process("train.py", *settings(voc, "run", 200, "darrennet"), cwd=tmp_path)
    wait_for_epochs(process, tmp_path / "run/log.csv", 0)
    os.kill(process.pid, number)
    result = process.wait()
    assert result.returncode == 128 + number and result.stderr == ""
    said = "stopped; go on with  python train.py --resume run/last.pt"
    assert result.stdout.splitlines()[-1] == said
    last = utils.load_checkpoint(tmp_path / "run/last.pt")
    assert len(last["history"]) >= 1 and last["unfinished_epoch"]["step"] >= 1


def test_what_nohup_has_a_process_ignore_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with utils.stop_signals() as caught:
            signal.raise_signal(signal.SIGHUP)
            assert caught == {}
            signal.raise_signal(signal.SIGTERM)
            assert list(caught) == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


GROWING = ["--progressive", "--size", "96"]  # 64 in the first of two epochs


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A folder with a VOC folder, and a run of two epochs, whole/, that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    root = write_voc(folder / "voc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "small", Small)
        call(train, *settings(root, folder / "whole", 2), *GROWING)
    return folder


@pytest.mark.parametrize("checks", [1, 2, 5, 8])
def test_stopped_in_the_middle_of_an_epoch_nothing_is_lost(whole, tmp_path, monkeypatch, checks):
    class StopAfter(list):
        """A list that seems empty the first times it is looked at."""

        looked = 0

        def __iter__(self):
            self.looked += 1
            return super().__iter__() if self.looked > checks else iter(())

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stopper = contextlib.nullcontext(StopAfter([signal.SIGTERM]))
        patch.setattr(utils, "stop_signals", lambda: stopper)
        assert train.main(settings(whole / "voc", "stopped", 2) + GROWING) == 128 + signal.SIGTERM
    assert utils.load_checkpoint("stopped/last.pt")["unfinished_epoch"]["step"] in (1, 2)
    torch.manual_seed(77)
    call(train, "--resume", "stopped/last.pt")
    assert_same(outcome(whole / "whole"), outcome("stopped"))


def test_a_full_disk_leaves_the_earlier_checkpoints(voc, tmp_path, monkeypatch):
    pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
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


# -------------------------------------------------------------------------------------- the numbers


def test_weights_that_broke_in_an_epochs_last_step_are_not_saved(voc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(train, *settings(voc, "run", 1))
    before = Path("run/last.pt").read_bytes()
    monkeypatch.setattr(train, "validate", lambda *args: (float("nan"), None))
    with pytest.raises(utils.UserError, match="epoch 2/2: .*in validation nan.*--lr"):
        call(train, "--resume", "run/last.pt", "--epochs", 2)
    assert Path("run/last.pt").read_bytes() == before


def test_a_run_goes_on_with_its_own_settings_alone(voc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(train, *settings(voc, "run", 1))
    with pytest.raises(utils.UserError, match="was trained with another --model; start a new run"):
        call(train, "--resume", "run/last.pt", "--model", "fcn")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
)
def test_a_full_gpu_names_the_flags_to_try(capsys, error):
    def full():
        raise error

    with pytest.raises(SystemExit, match="2"):
        utils.cli(full)
    said = capsys.readouterr().err
    assert "--batch-size" in said and "--size" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "said", ["InvalidCxxCompiler: No working C++ compiler found", "Compiler: cl is not found."]
)
def test_a_missing_compiler_names_the_flag_that_asks_for_it(capsys, said):
    def compiles():
        raise RuntimeError(said)  # as torch.compile does, on Linux and on Windows

    with pytest.raises(SystemExit, match="2"):
        utils.cli(compiles)
    message = capsys.readouterr().err
    assert "--compile needs a C++ compiler" in message and len(message.splitlines()) == 1


def test_other_errors_keep_their_traceback():
    def bug():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        utils.cli(bug)


def test_a_batch_without_a_labelled_pixel_teaches_nothing_and_harms_nothing(tmp_path, monkeypatch):
    root = write_voc(tmp_path / "voc", {"train": 3, "val": 1})
    for name in ("train_0", "train_1"):
        path = root / "SegmentationClass" / f"{name}.png"
        Image.new("L", Image.open(path).size, data.VOID).save(path)
    monkeypatch.chdir(tmp_path)
    flags = ("--size", 64, "--batch-size", 1, "--epochs", 2, "--out", "run")
    call(train, "--data", root, "--model", "small", *flags)
    state = utils.load_checkpoint("run/last.pt")["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_one_image_trains_and_is_told_what_that_means(tmp_path, monkeypatch, capsys):
    root = write_voc(tmp_path / "voc", {"train": 1, "val": 1})
    monkeypatch.chdir(tmp_path)
    call(train, "--data", root, "--model", "small", "--size", 64, "--epochs", 1, "--out", "run")
    assert "the training set is one image" in capsys.readouterr().out
    flags = ("--data", root, "--model", "fcn", "--size", 32, "--epochs", 1, "--out", "small")
    result = run_script("train.py", *flags, cwd=tmp_path)
    assert result.returncode == 2 and not Path("small").exists()
    assert re.search(r"error: batch norm.*--batch-size.*--size", result.stderr)


# ---------------------------------------------------------------------------------------- bad input


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
    ("an empty split", lambda r: (r / SPLIT).write_text("\n\n"), (), "train.txt: "),
    ("a split in UTF-16", lambda r: (r / SPLIT).write_text("a", "utf-16"), (), "as UTF-8 text"),
    ("a list with endings", lambda r: edit_lines(r / SPLIT, "{}.jpg"), (), "called 'train_0.jpg'"),
    ("a list with masks", lambda r: edit_lines(r / SPLIT, "/a/{0}.jpg /b/{0}.png"), (), PREPARE),
    ("no classes", lambda r: (r / "names.txt").write_text("cat"), (), "classes.txt: No such file"),
    ("__ignore__", lambda r: (r / "classes.txt").write_text("__ignore__\na\nb"), (), "__ignore__"),
    ("a missing image", lambda r: (r / JPEG).unlink(), (), "no image called 'train_1'"),
    ("a missing mask", lambda r: (r / MASK).unlink(), (), "no mask called 'train_1'"),
    ("masks of other names", lambda r: rename_masks(r), (), "train_1_mask.png; for other"),
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
    ("a 16-bit mask", lambda r: sixteen_bit(r / MASK, r / MASK), (), "train_1.png: is a I;16 PNG"),
    ("a wrong label", lambda r: label_99(r / MASK), (), "train_1.png: has the values [99]; classes"),
    ("other sizes", lambda r: edit(r / MASK, lambda m: m.resize((9, 8))), (), "train_1.png: is (9, 8)"),
    ("all void", lambda r: [edit(p, lambda m: Image.new("L", m.size, 255)) for p in
     (r / "SegmentationClass").iterdir()], (), "has no pixel with a label"),
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
    ("an unknown device", nothing, ("--device", "toaster"), "device 'toaster' cannot be used"),
    ("no such GPU", nothing, ("--device", "cuda:99"), "device 'cuda:99' cannot be used here"),
    ("an unknown scheme", nothing, ("--class-weights", "magic"), "argument --class-weights"),
    ("no encoder file", nothing, ("--encoder-weights", "gone.pth"), "gone.pth: does not exist"),
    ("a folder to resume", nothing, ("--resume", "."), "last.pt: does not exist"),
    ("an --out that is a file", nothing, ("--out", __file__), "test_faults.py: cannot be made"),
    ("an --out below a file", nothing, ("--out", f"{__file__}/x"), "choose another --out"),
    ("pretrained fcn", nothing, ("--model", "fcn", "--pretrained"), "fcn has no pretrained encoder"),
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
    ("a truncated checkpoint", "evaluate.py", ("cut.pt",), "cut.pt: cannot be read"),
    ("text for a checkpoint", "evaluate.py", ("notes.txt",), "notes.txt: is no checkpoint"),
    ("code in a checkpoint", "evaluate.py", ("code.pt",), "has code in it, which is refused"),
    ("another program's file", "evaluate.py", ("other.pt",), "other.pt: is not a checkpoint"),
    ("weights of another model", "evaluate.py", ("mixed.pt",), "weights do not fit darrennet"),
    ("a network with other options", "evaluate.py", ("grown.pt",), "keyword argument 'depth'"),
    ("an unknown split", "evaluate.py", ("good.pt", "--split", "x"), "has no x.txt"),
    ("other classes", "evaluate.py", ("good.pt", "--data", "shapes"), "trained on 21 classes"),
    ("no checkpoint", "evaluate.py", (), "there is no checkpoint"),
    ("a missing image", "predict.py", ("x.jpg", "--checkpoint", "good.pt"), "x.jpg: does not exist"),
    ("a folder of none", "predict.py", ("folder", "--checkpoint", "good.pt"), "folder: has no"),
    ("only text", "predict.py", ("notes.txt", "--checkpoint", "good.pt"), "notes.txt: cannot"),
    ("a full --out", "predict.py", ("photo.jpg", "--checkpoint", "good.pt", "--out", "notes.txt"),
     "notes.txt: cannot be made a folder"),
]  # fmt: skip

CASES = SPOILED_FOLDERS + BAD_FLAGS + OTHER_SCRIPTS


class Malicious:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


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
    (folder / "cut.pt").write_bytes(good[:-1000])
    (folder / "notes.txt").write_text("not weights, nor an image")
    (folder / "folder").mkdir()
    torch.save({"state_dict": Malicious()}, folder / "code.pt")
    torch.save({"state_dict": {}}, folder / "other.pt")
    mixed = torch.load(folder / "good.pt", weights_only=True) | {"model": "darrennet"}
    torch.save(mixed, folder / "mixed.pt")
    torch.save(mixed | {"options": {"depth": 5}}, folder / "grown.pt")
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
    if CASES[number] not in OTHER_SCRIPTS:
        assert len(result.stderr.replace(str(tmp_path), "/home/me")) <= 300
    assert CASES[number][3] in result.stderr
    assert left_behind == set()


def test_the_docs_count_what_is_tried_here():
    said = re.search(r"(\d+) kinds of bad input.*?(\d+) times with SIGKILL", RELIABILITY, re.DOTALL)
    assert (int(said[1]), int(said[2])) == (len(CASES), KILLS)


# ------------------------------------------------------------------------- odd input that must work


def test_odd_but_good_folders_train_and_score(tmp_path, monkeypatch):
    root = write_voc(tmp_path / "voc", {"train": 4, "val": 2})
    lines = (root / SPLIT).read_text().split()
    for old, new in (("train_2", "-a dash, spaces"), ("train_3", "ünïcödé 写真")):
        lines[lines.index(old)] = new
        for name in ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"):
            (root / name.format(old)).rename(root / name.format(new))
    (root / SPLIT).write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    for name, size in (("train_0", (1, 1)), ("train_1", (1, 3000))):
        Image.new("RGB", size, "red").save(root / f"JPEGImages/{name}.jpg")
        Image.new("L", size, 3).save(root / f"SegmentationClass/{name}.png")
    monkeypatch.chdir(tmp_path)
    flags = ("--model", "small", "--size", 32, "--epochs", 1, "--out", "run")
    call(train, "--data", root, "--val-split", "train", *flags)
    import evaluate

    call(evaluate, "run/best.pt", "--split", "train", "--out", "scores")
    assert Path("scores/metrics.json").exists()


def test_predict_does_the_good_images_of_a_mixed_folder(given, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    names = ["-dash.jpg", "new\nline.jpg", "with space.jpg", "ünïcödé.jpg", "a.jpg"]
    for name in names:
        shutil.copy(given / "photo.jpg", photos / name)
    (photos / "b.jpg").write_text("this is text")
    Image.new("RGB", (1, 3000)).save(photos / "thin.png")
    Image.new("RGB", (1, 1)).save(photos / "dot.png")
    result = run_script("predict.py", photos, "--checkpoint", given / "good.pt", cwd=tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "b.jpg: cannot identify" in result.stderr
    written = {path.name for path in (tmp_path / "predictions").iterdir()}
    stems = [Path(name).stem for name in names] + ["thin", "dot"]
    assert written == {f"{stem}_{kind}.png" for stem in stems for kind in ("mask", "overlay")}
    assert Image.open(tmp_path / "predictions/thin_mask.png").size == (1, 3000)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_files_that_may_not_be_read_or_written(given, tmp_path):
    secret = tmp_path / "secret.jpg"
    shutil.copy(given / "photo.jpg", secret)
    secret.chmod(0)
    result = run_script("predict.py", secret, "--checkpoint", given / "good.pt", cwd=tmp_path)
    assert result.returncode == 2 and "secret.jpg: Permission denied" in result.stderr
    (tmp_path / "locked").mkdir(mode=0o500)
    flags = ("--data", given / "voc", "--out", "locked", "--size", 32)
    result = run_script("train.py", *flags, cwd=tmp_path)
    assert result.returncode == 2 and "locked: cannot be written to" in result.stderr


def test_a_phones_photograph_of_many_pixels_brings_no_warning(tmp_path):
    Image.new("RGB", (15, 10)).save(tmp_path / "photo.png")
    # Pillow warns from so many pixels on, and refuses twice as many.
    script = "from PIL import Image\nImage.MAX_IMAGE_PIXELS = 100\nimport data\n"
    (tmp_path / "load.py").write_text(
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n{script}"
        "print(data.load_image('photo.png').size)\n"
    )
    result = run_script(tmp_path / "load.py", cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("(15, 10)\n", "")


def test_a_phones_photograph_with_previews_is_no_animation(tmp_path):
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=frames[1:])
    image = data.load_image(tmp_path / "phone.jpg")
    assert image.size == (40, 30) and image.getpixel((5, 5))[0] > 240
