"""utils.py against plain loops, hand-made masks and PyTorch's own modules."""

import io
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import looks_drawn
from torch import nn
from torch._inductor.exc import InvalidCxxCompiler
from torch.nn import functional as F

import utils


def count_by_loop(pred, mask, num_classes):
    cm = np.zeros((num_classes, num_classes), np.int64)
    for p, m in zip(np.asarray(pred).ravel(), np.asarray(mask).ravel()):
        if m != 255:
            cm[m, p] += 1
    return cm


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_confusion_matrix_is_that_of_a_double_loop(dtype):
    generator = torch.Generator().manual_seed(0)
    pred = torch.randint(0, 21, (3, 40, 50), generator=generator).to(dtype)
    mask = torch.randint(0, 22, (3, 40, 50), generator=generator).to(dtype)
    mask[mask == 21] = 255
    cm = utils.confusion_matrix(pred, mask, 21)
    assert cm.dtype == torch.int64
    assert np.array_equal(cm.numpy(), count_by_loop(pred, mask, 21))
    assert utils.confusion_matrix(mask, mask, 21).equal(torch.diag(cm.sum(1)))  # 255 in pred, too
    all_void = torch.full_like(mask, 255)
    assert utils.confusion_matrix(pred, all_void, 21).tolist() == np.zeros((21, 21)).tolist()


@pytest.mark.parametrize(
    "pred, mask", [(1, 3), (1, 254), (1, 256), (1, -1), (3, 0), (5, 2), (-1, 1)]
)
def test_a_label_outside_the_classes_is_refused(pred, mask):
    with pytest.raises(ValueError, match="outside the 3 classes"):
        utils.confusion_matrix(torch.tensor([0, pred]), torch.tensor([0, mask]), 3)


def test_confusion_matrix_refuses_probabilities_and_other_shapes_and_counts_nothing_in_nothing():
    mask = torch.tensor([[0, 1]])
    for pred in (torch.tensor([[0.01, 0.99]]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="integers of one shape"):
            utils.confusion_matrix(pred, mask, 2)
        with pytest.raises(ValueError, match="integers of one shape"):
            utils.confusion_matrix(mask, pred, 2)
    assert utils.confusion_matrix(mask[:0], mask[:0], 2).tolist() == [[0, 0], [0, 0]]


def test_scores_by_hand():
    #                       pred: a  b  c  d
    cm = torch.tensor([[6, 2, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    iou = utils.iou(cm)
    assert iou[:2].tolist() == [6 / 9, 1 / 4] and iou[2:].isnan().all()
    assert utils.mean_iou(cm) == pytest.approx((6 / 9 + 1 / 4) / 2)
    assert utils.pixel_accuracy(cm) == pytest.approx(0.7)
    assert utils.frequency_weighted_iou(cm) == pytest.approx(0.8 * 6 / 9 + 0.2 / 4)
    assert utils.mean_accuracy(cm) == pytest.approx((6 / 8 + 1 / 2) / 2)
    assert utils.dice(cm)[:2].tolist() == [12 / 15, 2 / 5] and utils.dice(cm)[2:].isnan().all()
    cm[0, 2] = 10  # a class that is predicted, but is nowhere, has an IoU of 0, not none
    assert utils.iou(cm)[2] == 0 and utils.mean_iou(cm) == pytest.approx((6 / 19 + 1 / 4 + 0) / 3)


@pytest.mark.parametrize("scheme", ["kaiming", "xavier_uniform", "xavier_normal"])
def test_initial_weights_follow_the_papers_equations(scheme):
    torch.manual_seed(0)
    layers = nn.Conv2d(96, 160, 3), nn.BatchNorm2d(160), nn.Linear(300, 500)
    model = nn.Sequential(*layers, nn.ConvTranspose2d(160, 96, 3))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    utils.initialize(model, scheme)
    # PyTorch counts a transposed convolution's connections the other way round.
    counts = (96 * 9, 160 * 9), (300, 500), (96 * 9, 160 * 9)
    for module, (n_in, n_out) in zip((model[0], model[2], model[3]), counts):
        weight = module.weight
        bound = math.sqrt(6) / math.sqrt(n_in + n_out)  # equation 1
        deviation = {
            "xavier_uniform": bound / math.sqrt(3),
            "xavier_normal": math.sqrt(2) / math.sqrt(n_in + n_out),  # equation 2
            "kaiming": math.sqrt(2 / n_in),  # equation 3, put upright
        }[scheme]
        assert weight.std().item() == pytest.approx(deviation, rel=0.01)
        assert abs(weight.mean().item()) < 0.02 * deviation
        largest = weight.abs().max().item()
        assert 0.999 * bound < largest <= bound if scheme == "xavier_uniform" else largest > bound
        assert (module.bias == 0).all()
    # Batch norms are the network's own affair.
    assert (model[1].weight == 7).all() and (model[1].bias == 7).all()


@pytest.mark.parametrize("size", [(5, 7), (11, 30), (3, 4)])
@pytest.mark.parametrize("tta", [False, True])
def test_segment_gives_the_best_class_of_the_averaged_and_resized_probabilities(size, tta):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 6, 3, padding=1)
    images = torch.randn(2, 3, 5, 7)
    with pytest.raises(ValueError, match="training mode"):
        utils.segment(model, images, size, tta)
    model.eval()
    labels, sure = utils.segment(model, images, size, tta)
    with torch.inference_mode():
        p = model(images).softmax(1)
        if tta:
            p = (p + model(images.flip(-1)).softmax(1).flip(-1)) / 2
    means = torch.zeros_like(p)  # of those of the nine pixels that are there
    for y, x in np.ndindex(5, 7):
        means[:, :, y, x] = p[:, :, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].mean((2, 3))
    p = F.interpolate(means, size, mode="bilinear")
    assert torch.equal(labels.long(), p.argmax(1)) and len(labels.unique()) > 2
    assert torch.allclose(sure, p.amax(1))


CHECKPOINT = {
    "model": "fcn",
    "classes": ["background", "cat"],
    "palette": [[0, 0, 0], [128, 0, 0]],
    "size": 32,
    "state_dict": {"weight": torch.arange(5.0)},
    "epoch": 3,
    "metrics": {"val_mean_iou": 0.5},
}


def test_checkpoints_come_back_as_they_were():
    utils.save_checkpoint("a.pt", CHECKPOINT)
    loaded = utils.load_checkpoint("a.pt")
    assert torch.equal(loaded.pop("state_dict")["weight"], torch.arange(5.0))
    assert loaded == {k: v for k, v in CHECKPOINT.items() if k != "state_dict"}
    assert os.listdir() == ["a.pt"]


def test_a_file_that_another_program_holds_open_for_a_moment_is_replaced(monkeypatch):
    refusals, replace = [PermissionError(13, "in use")] * 3, os.replace

    def held_open(source, target):
        if refusals:
            raise refusals.pop()
        replace(source, target)

    monkeypatch.setattr(os, "replace", held_open)
    monkeypatch.setattr(utils.time, "sleep", lambda seconds: None)
    Path("new").mkdir()
    utils.replace("new", "there")
    assert os.listdir() == ["there"]
    refusals += [PermissionError(13, "in use")] * 9
    with pytest.raises(PermissionError):
        utils.replace("there", "elsewhere")


@pytest.mark.parametrize("key", CHECKPOINT)
def test_a_checkpoint_whose_values_are_missing_or_of_another_kind_is_refused(key):
    without = {k: v for k, v in CHECKPOINT.items() if k != key}
    for wrong in (without, without | {key: 1.5}, without | {key: None}, without | {key: ("x",)}):
        torch.save(wrong, "a.pt")
        said = rf"a.pt: is no checkpoint of train.py \({key} is missing or strange\)"
        with pytest.raises(utils.UserError, match=said):
            utils.load_checkpoint("a.pt")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_files_that_are_no_checkpoints_are_refused():
    utils.save_checkpoint("good.pt", CHECKPOINT)
    Path("cut.pt").write_bytes(Path("good.pt").read_bytes()[:-300])
    Path("text.pt").write_text("not weights")
    Path("lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    Path("page.pt").write_text("\n<!DOCTYPE html><title>Google Drive</title>")
    torch.save({"state_dict": Malicious()}, "code.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"state_dict": {}}, "dict.pt")
    torch.save(nn.Linear(2, 2), "module.pt")
    names = dict.fromkeys(("cut", "text", "code", "list", "module"), "is broken, or holds more")
    names |= {"missing": "does not exist", "lfs": "is git-lfs' note", "page": "is a web page"}
    names |= {"dict": "is no checkpoint of train.py"}
    for name, said in names.items():
        with pytest.raises(utils.UserError, match=f"^{name}.pt: {said}") as error:
            utils.load_checkpoint(f"{name}.pt")
        assert len(str(error.value)) <= 300 and len(str(error.value).splitlines()) == 1
    assert not Path("it_ran").exists()


def test_two_processes_that_save_at_once_have_temporary_files_of_their_own(monkeypatch):
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: written.append(str(a)) or replace(a, b))
    for pid in (17, 18):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        utils.save_checkpoint("a.pt", CHECKPOINT)
    assert len(set(written)) == 2 and "17" in written[0] and "18" in written[1]


def test_vivid_colors_are_all_different_and_darker_after_the_last():
    colors = np.array(utils.vivid_colors(61))
    assert colors.shape == (61, 3) and len({tuple(color) for color in colors.tolist()}) == 61
    assert colors[0].max() - colors[0].min() < 10 and colors[0].max() < 60  # a dark grey
    assert (colors[1:21].max(1) - colors[1:21].min(1)).min() >= 60  # no grey among the others
    assert np.abs(colors[21:41] - 0.6 * colors[1:21]).max() <= 0.5
    assert np.abs(colors[41:] - 0.36 * colors[1:21]).max() <= 0.5


def test_names_that_the_font_lacks_are_shown_by_number_and_that_is_said_once(capsys):
    names = ("background", "Gläser", "猫", "a dog", "고양이")
    for _ in range(2):
        shown = list(utils.shown_names(names))
        assert shown == ["background", "Gläser", "class 2", "a dog", "class 4"]
    said = "the font lacks letters of some classes: pictures show these by their numbers\n"
    assert capsys.readouterr().out == said
    assert list(utils.shown_names(("cat", "dog"))) == ["cat", "dog"]
    assert capsys.readouterr().out == ""


ROWS = [
    {"epoch": e, "train_loss": 3 / e, "val_loss": 4 / e, "val_mean_iou": v, "val_pixel_accuracy": e / 9}
    for e, v in ((1, 0.1), (2, 0.3), (3, 0.2))
]  # fmt: skip


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, which are saved, too."""
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k)
    )
    return drawn


def test_the_drawn_curves_are_the_logs_numbers(figures):
    utils.curves("a.png", {"one": ROWS, "_two": ROWS[:2]}, "title")
    loss, iou, accuracy = figures[0].axes
    lines = [list(line.get_ydata()) for line in loss.lines]
    assert lines[:3] == [[3, 1.5, 1], [4, 2, 4 / 3], [2]]  # training, validation, its dot
    assert list(iou.lines[0].get_ydata()) == [0.1, 0.3, 0.2]
    dot = iou.lines[1]
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([2], [0.3])
    assert list(accuracy.lines[0].get_ydata()) == [1 / 9, 2 / 9, 3 / 9]
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert texts == ["one: best 0.3000", "_two: best 0.3000"]
    looks_drawn("a.png", 1000, 400)


def test_samples_are_the_images_and_their_masks_in_the_classes_colours(figures):
    images = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).byte()
    truth = torch.tensor([0, 1, 1, 255], dtype=torch.uint8).view(1, 2, 2).repeat(2, 2, 2)
    rows = {"truth": truth, "prediction": torch.zeros_like(truth)}
    classes = ["_a", "$b^$", "c"]  # as a formula the second would be refused
    utils.samples("a.png", images, rows, classes, "title", ["one", "caf\udce9"])
    axes = np.array(figures[0].axes).reshape(3, 2)
    shown = [[np.asarray(one.get_images()[0].get_array()) for one in row] for row in axes]
    assert np.array_equal(shown[0][1], images[1].permute(1, 2, 0))
    colors = np.array([*utils.vivid_colors(3), (255, 255, 255)])
    assert np.array_equal(shown[1][0], colors[np.where(truth[0] == 255, 3, truth[0])])
    assert (shown[2][1] == colors[0]).all()
    assert [one.get_title() for one in axes[0]] == ["one", "caf?"]
    assert [row[0].get_ylabel() for row in axes] == ["image", "truth", "prediction"]
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == ["_a", "$b^$", "void"]


@pytest.mark.parametrize("names", (["c0", "c1"], [f"class_{i}" for i in range(40)]))
def test_legend_and_captions_stay_within_the_page(figures, names):
    masks = torch.arange(6 * 8 * 8).view(6, 8, 8).remainder(len(names)).byte()
    images, rows = masks[:, None].repeat(1, 3, 1, 1), {"truth": masks}
    utils.samples("a.png", images, rows, names, "title", ["0001TP_006690: 0.624"] * 6)
    figures[0].draw_without_rendering()  # at its own resolution again, not the file's
    page = figures[0].bbox
    box = figures[0].legends[0].get_window_extent()
    assert box.x0 >= page.x0 and box.x1 <= page.x1
    captions = [axes.title.get_window_extent() for axes in figures[0].axes[:6]]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(captions))


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried " + 300 * "x"),
            "smaller --size or, to train, --batch-size",
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), "--size or, to train"),
        (
            utils.UserError("x: DefaultCPUAllocator: can't; give less"),
            "error: x: DefaultCPUAllocator: can't; give less",
        ),
        (InvalidCxxCompiler(), "--no-compile does without a compiler"),
        (utils.UserError("x.pt: mend\nit"), "error: x.pt: mend it"),
        (FileExistsError(17, "File exists", "x"), "File exists: 'x'"),
        (KeyError("given"), "given"),
    ],
)
def test_what_the_user_can_mend_is_one_line(capsys, error, remedy):
    with pytest.raises(SystemExit, match="2"):
        utils.cli(failing(error), KeyError)
    said = capsys.readouterr().err
    assert remedy in said and said.count("\n") == 1 and len(said) <= 300


@pytest.mark.parametrize("said", ["a bug", "Connection reset by peer", "no engine to execute"])
def test_other_errors_keep_their_message_and_traceback(said):
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match=said):
            utils.cli(failing(kind(said)))


def test_patterns_are_expanded_each_path_is_given_once_and_names_that_exist_are_taken(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.pt").touch()
    (tmp_path / "[ab]").touch()
    plain, missing = tmp_path / "[ab]", tmp_path / "nothing.pt"
    found = utils.expand([tmp_path / "b/best.pt", tmp_path / "*/best.pt", plain, missing, missing])
    assert found == [tmp_path / "b/best.pt", tmp_path / "a/best.pt", plain, missing]
    assert utils.expand([tmp_path / "*.jpg"]) == [tmp_path / "*.jpg"]


def test_progress_is_one_line_on_a_terminal_and_silent_in_a_short_file(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def show(stream, items, until=None):
        clock = iter(range(1000))
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setattr("time.monotonic", lambda: next(clock))
        for item in utils.progress(items, "work"):
            if item == until:
                break
        return stream.getvalue()

    shown = show(Terminal(), "abcd")
    assert "work 2/4  0:00:02 left" in shown and "\n" not in shown
    assert shown.endswith(" left\r" + 60 * " " + "\r")
    assert "work 2/4" in show(Terminal(), "abcd", until="c")  # also where it is broken off
    assert show(io.StringIO(), "abcd") == ""
    assert show(io.StringIO(), "x" * 70) == "work 31/70  0:00:39 left\nwork 62/70  0:00:08 left\n"
