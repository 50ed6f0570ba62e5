"""utils.py against plain loops, hand-made masks and PyTorch's own modules."""

import io
import math
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import REAL_VOC
from PIL import Image
from torch import nn

import data
import plots
import utils

# ------------------------------------------------------------------------------------- scores


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


@pytest.mark.skipif(not REAL_VOC, reason="VOC_ROOT names no VOC 2007")
def test_confusion_matrix_on_real_masks_is_that_of_a_double_loop():
    masks = data.VOC(REAL_VOC, "val", size=64).masks[:40]
    pred = masks.roll(5, -1) % 21  # shifted masks make plausible predictions; void becomes 3
    assert np.array_equal(utils.confusion_matrix(pred, masks, 21), count_by_loop(pred, masks, 21))


def test_a_label_outside_the_classes_is_refused():
    with pytest.raises(ValueError, match="outside the 3 classes"):
        utils.confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 3]), 3)


def test_scores_by_hand():
    #                       pred: a  b  c  d
    cm = torch.tensor([[6, 2, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    iou = utils.iou(cm)
    assert iou[:2].tolist() == [6 / 9, 1 / 4] and iou[2:].isnan().all()
    assert utils.mean_iou(cm) == pytest.approx((6 / 9 + 1 / 4) / 2)
    assert utils.pixel_accuracy(cm) == pytest.approx(0.7)
    assert utils.frequency_weighted_iou(cm) == pytest.approx(0.8 * 6 / 9 + 0.2 / 4)
    cm[0, 2] = 10  # a class that is predicted, but is nowhere, has an IoU of 0, not none
    assert utils.iou(cm)[2] == 0 and utils.mean_iou(cm) == pytest.approx((6 / 19 + 1 / 4 + 0) / 3)


# -------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("scheme", ["kaiming", "xavier_uniform", "xavier_normal"])
def test_initial_weights_follow_the_papers_equations(scheme):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(96, 160, 3), nn.BatchNorm2d(160), nn.Linear(300, 500))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    utils.initialize(model, scheme)
    for module, n_in, n_out in ((model[0], 96 * 9, 160 * 9), (model[2], 300, 500)):
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


# ------------------------------------------------------------------------------------ segment


class Colors(nn.Module):
    """Takes the three colour channels themselves for the logits of three classes."""

    def forward(self, images):
        return images * 10


def test_segment_labels_each_pixel_and_scales_to_the_size_asked_for():
    images = torch.zeros(1, 3, 4, 4)
    images[0, 0, :, :2] = 1
    images[0, 2, :, 2:] = 1
    labels = utils.segment(Colors(), images, (8, 12))
    assert labels.dtype == torch.uint8 and labels.shape == (1, 8, 12)
    assert (labels[..., :6] == 0).all() and (labels[..., 6:] == 2).all()
    # A network blind to the left half sees it in the mirrored image.
    half = nn.Sequential(Colors())
    half.register_forward_hook(
        lambda module, inputs, out: torch.cat([out[..., 2:] * 0, out[..., 2:]], -1)
    )
    images = torch.zeros(1, 3, 4, 4)
    images[:, 1] = 1
    assert (utils.segment(half, images, (4, 4))[..., :2] == 0).all()
    assert (utils.segment(half, images, (4, 4), tta=True) == 1).all()


# ------------------------------------------------------------------------------------ devices


def test_select_device():
    assert utils.select_device("cpu") == torch.device("cpu")
    assert utils.select_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "toaster"):
        with pytest.raises(utils.UserError, match=f"device '{name}' cannot be used here"):
            utils.select_device(name)


def test_bfloat16_is_taken_where_the_processor_multiplies_it(monkeypatch):
    cpu = torch.device("cpu")
    for told, expected in (({"amx_bf16": True}, True), ({"amx_bf16": False}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda told=told: told, raising=False)
        assert utils.has_fast_bfloat16(cpu) is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older versions of PyTorch
    assert utils.has_fast_bfloat16(cpu) is False
    assert utils.has_fast_bfloat16(torch.device("mps")) is False


# ---------------------------------------------------------------------------------- checkpoints

CHECKPOINT = {
    "model": "fcn",
    "options": {},
    "classes": ["background", "cat"],
    "palette": [[0, 0, 0], [128, 0, 0]],
    "size": 32,
    "state_dict": {"weight": torch.arange(5.0)},
    "epoch": 3,
    "metrics": {"val_mean_iou": 0.5},
}


def test_checkpoints_come_back_as_they_were(tmp_path):
    utils.save_checkpoint(tmp_path / "a.pt", CHECKPOINT)
    loaded = utils.load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(loaded.pop("state_dict")["weight"], torch.arange(5.0))
    assert loaded == {k: v for k, v in CHECKPOINT.items() if k != "state_dict"}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_write_that_fails_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    utils.save_checkpoint(tmp_path / "a.pt", CHECKPOINT)
    before = (tmp_path / "a.pt").read_bytes()

    def full_disk(checkpoint, file):
        file.write(b"half a checkpo")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        utils.save_checkpoint(tmp_path / "a.pt", CHECKPOINT)
    assert (tmp_path / "a.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_files_that_are_no_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    utils.save_checkpoint(tmp_path / "good.pt", CHECKPOINT)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:-300])
    (tmp_path / "text.pt").write_text("not weights")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Malicious()))
    torch.save({"state_dict": Malicious()}, tmp_path / "code.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    for name in ("missing", "cut", "text", "pickle", "code", "other"):
        with pytest.raises(utils.UserError, match=f"{name}.pt: "):
            utils.load_checkpoint(tmp_path / f"{name}.pt")
    assert not (tmp_path / "it_ran").exists()


# -------------------------------------------------------------------------------------- pictures


def test_masks_are_saved_as_palette_indices_in_the_classes_colors(tmp_path):
    mask = np.array([[0, 1, 2], [2, 1, 255]], np.uint8)
    palette = [[0, 0, 0], [128, 0, 0], [10, 20, 30]]
    utils.save_mask(tmp_path / "mask.png", torch.from_numpy(mask), palette)
    image = Image.open(tmp_path / "mask.png")
    assert image.mode == "P" and np.array_equal(np.array(image), mask)
    colors = np.array(image.convert("RGB"))
    assert colors[0].tolist() == palette and colors[1, 2].tolist() == [224, 224, 192]


@pytest.mark.parametrize("width, height", [(30, 20), (500, 375)])
def test_overlay_keeps_background_and_names_the_classes_below(width, height):
    image = Image.new("RGB", (width, height), (100, 100, 100))
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 2
    palette = [[0, 0, 0], [128, 0, 0], [0, 200, 0]]
    picture = np.array(utils.overlay(image, mask, ["nothing", "cat", "dog"], palette))
    assert picture.shape[0] > height and picture.shape[1] >= width
    assert (picture[:height, : width // 2] == 100).all()
    colored = picture[:height, width // 2 : width].astype(int)
    assert (colored[..., 1] > 120).all() and (colored[..., 0] < 80).all()
    legend = picture[height:].reshape(-1, 3).tolist()
    assert [0, 200, 0] in legend and [128, 0, 0] not in legend


def test_class_shares_are_sorted():
    shares = utils.class_shares(np.array([[1, 1, 1, 0]]), ["background", "cat", "dog"])
    assert list(shares.items()) == [("cat", 0.75), ("background", 0.25)]


def test_figures_show_the_numbers_of_the_metrics(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    cm = torch.tensor([[30, 10, 0], [5, 15, 0], [0, 0, 0]])
    classes = ["nothing", "cat", "dog"]
    plots.confusion_matrix(tmp_path / "a.png", cm, classes, "title")
    cells = {tuple(map(round, text.get_position())): text for text in figures[0].axes[0].texts}
    numbers = {place: text.get_text() for place, text in cells.items()}
    assert numbers == {(0, 0): "75", (1, 0): "25", (0, 1): "25", (1, 1): "75"}
    values = {"nothing": 30 / 45, "cat": 0.5, "dog": None}
    plots.class_iou(tmp_path / "b.png", values, "title")
    axes = figures[1].axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 30 / 45]
    assert [text.get_text() for text in axes.texts] == ["0.500", "0.667"]


# -------------------------------------------------------------------------------------- progress


def test_progress_is_one_line_on_a_terminal_and_silent_in_a_short_file(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream in (Terminal(), io.StringIO()):
        clock = iter(range(1000))
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setattr("time.monotonic", lambda clock=clock: next(clock))
        assert list(utils.progress("abcd", "work", 16, lambda: "loss 0.5")) == list("abcd")
        shown = stream.getvalue()
        if stream.isatty():
            assert "work 2/4  16.0 images/s  loss 0.5  2 s left" in shown
            assert "\n" not in shown and shown.endswith("\033[K\r\033[K")
        else:
            assert shown == ""


def test_durations_read_as_people_say_them():
    said = [utils.format_seconds(seconds) for seconds in (0.4, 59.7, 200, 7500)]
    assert said == ["0 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]
