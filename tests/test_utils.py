"""utils.py against plain loops, hand-made masks and PyTorch's own modules."""

import io
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REAL_VOC, REPOSITORY, fake_cuda
from PIL import Image
from torch import nn
from torch._subclasses import FakeTensorMode

import data
import utils

# ----------------------------------------------------------------------------------- a CUDA graph


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("amp", [False, True])
def test_a_cuda_graph_learns_what_the_model_itself_learns(amp):
    def train(graph):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1)
        model = utils.to_device(nn.Sequential(*layers), torch.device("cuda"))
        layout = utils.fast_layout(torch.device("cuda"))
        step = utils.cuda_graph(model, 4, 32, amp) if graph else model.train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(1)
        for _ in range(5):
            images = torch.randn(4, 3, 32, 32, device="cuda").contiguous(memory_format=layout)
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                logits = step(images)
            logits.float().square().mean().backward()
            optimizer.step()
        return model.state_dict()

    plain, recorded = train(False), train(True)
    assert plain["1.num_batches_tracked"] == recorded["1.num_batches_tracked"] == 5
    for name, value in plain.items():
        # One rounding to bfloat16 is about 4e-3.
        limits = {"rtol": 1e-2, "atol": 1e-3} if amp else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(recorded[name], value, **limits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_a_cuda_graph_drops_other_channels_at_each_step():
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Dropout2d(0.5)).cuda()
    step = utils.cuda_graph(model, 2, 32, amp=False)
    images = torch.ones(2, 3, 32, 32, device="cuda")
    first = step(images).clone()
    assert not torch.equal(first, step(images))


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


def test_pred_and_mask_of_other_shapes_are_refused():
    mask = torch.zeros(3, 4, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(3, 1, 4, 5\) and mask \(3, 4, 5\) differ in shape"):
        utils.confusion_matrix(mask[:, None], mask, 2)


@pytest.mark.parametrize(
    "pred, mask",
    [(1, 3), (1, 254), (1, 256), (1, 1000), (1, -1), (3, 0), (5, 2), (3, 255), (-1, 1)],
)
def test_a_label_outside_the_classes_is_refused(pred, mask):
    with pytest.raises(ValueError, match="outside the 3 classes"):
        utils.confusion_matrix(torch.tensor([0, pred]), torch.tensor([0, mask]), 3)


def test_labels_are_counted_on_the_cpu_where_the_gpu_is_apples(monkeypatch):
    asked = []

    class OnApples(torch.Tensor):
        device = torch.device("mps")

        def cpu(self):
            asked.append(self.tolist())
            return torch.tensor(self.tolist())

    moved, to = [], torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda t, d, *a: (moved.append(d), t)[1] if str(d) == "mps" else to(t, d, *a),
    )
    pred, mask = (torch.tensor(labels).as_subclass(OnApples) for labels in ([0, 1, 1], [0, 1, 0]))
    assert utils.confusion_matrix(pred, mask, 2).tolist() == [[1, 1], [0, 1]]
    assert asked == [[0, 1, 1], [0, 1, 0]] and moved == [torch.device("mps")]


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
    labels, sure = utils.segment(Colors(), images, (8, 12))
    assert labels.dtype == torch.uint8 and labels.shape == sure.shape == (1, 8, 12)
    assert (labels[..., :6] == 0).all() and (labels[..., 6:] == 2).all()
    # A network blind to the left half sees it in the mirrored image.
    half = nn.Sequential(Colors())
    half.register_forward_hook(
        lambda module, inputs, out: torch.cat([out[..., 2:] * 0, out[..., 2:]], -1)
    )
    images = torch.zeros(1, 3, 4, 4)
    images[:, 1] = 1
    assert (utils.segment(half, images, (4, 4))[0][..., :2] == 0).all()
    assert (utils.segment(half, images, (4, 4), tta=True)[0] == 1).all()


@pytest.mark.parametrize("size", [(5, 7), (11, 30)])
@pytest.mark.parametrize("tta", [False, True])
def test_segment_gives_the_best_class_of_the_resized_probabilities_and_its_probability(size, tta):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 6, 3, padding=1)
    images = torch.randn(2, 3, 5, 7)
    labels, sure = utils.segment(model, images, size, tta)
    with torch.inference_mode():
        probabilities = model(images).softmax(1)
        if tta:
            probabilities = (probabilities + model(images.flip(-1)).softmax(1).flip(-1)) / 2
        probabilities = nn.functional.interpolate(probabilities, size, mode="bilinear")
    assert torch.equal(labels.long(), probabilities.argmax(1)) and len(labels.unique()) > 3
    assert torch.allclose(sure, probabilities.amax(1))


# ------------------------------------------------------------------------------------ devices


def test_select_device():
    assert utils.select_device("cpu") == torch.device("cpu")
    assert utils.select_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "toaster"):
        with pytest.raises(utils.UserError, match=f"device '{name}' cannot be used here"):
            utils.select_device(name)


def test_a_gpu_without_kernels_is_refused_by_name(monkeypatch):
    def ones(*size, device):  # a GPU older than PyTorch's kernels: its memory can be had
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "empty", lambda *size, device: torch.zeros(1))
    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(
        utils.UserError, match="'cuda' .*no kernel image.*; try --device auto or cpu"
    ):
        utils.select_device("auto")


@pytest.mark.skipif(not fake_cuda(), reason="this PyTorch makes no fake CUDA tensors here")
@pytest.mark.parametrize(("generation", "last"), [((7, 5), False), ((8, 0), True)])
def test_images_and_weights_have_channels_last_on_gpus_from_ampere_on(
    monkeypatch, generation, last
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    with FakeTensorMode():
        images = data.normalize(torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="cuda"))
    assert images.is_contiguous(memory_format=torch.channels_last) == last
    assert images.is_contiguous() != last
    assert (utils.fast_layout(torch.device("cuda")) is torch.channels_last) == last  # the weights


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


def test_a_file_that_another_program_has_open_is_replaced_a_little_later(tmp_path, monkeypatch):
    refusals, replace = [PermissionError("used by another process")] * 2, os.replace

    def busy(source, target):
        if refusals:
            raise refusals.pop()
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    utils.save_checkpoint(tmp_path / "a.pt", CHECKPOINT)
    assert utils.load_checkpoint(tmp_path / "a.pt")["epoch"] == 3
    refusals[:] = [PermissionError("used by another process")] * 4
    with pytest.raises(PermissionError, match="used by another process"):
        utils.save_checkpoint(tmp_path / "a.pt", CHECKPOINT)


def test_a_log_that_a_spreadsheet_has_open_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def locked(*args, **options):
        raise PermissionError(13, "Permission denied", "log.csv")

    monkeypatch.setattr("builtins.open", locked)
    utils.write_log(tmp_path, [{"epoch": 1}])
    monkeypatch.undo()
    assert "'log.csv'; close it: a later epoch writes all rows" in capsys.readouterr().out
    utils.write_log(tmp_path, [{"epoch": 1}, {"epoch": 2}])
    assert (tmp_path / "log.csv").read_text().split() == ["epoch", "1", "2"]


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    broken = CHECKPOINT | {"state_dict": {"weight": torch.tensor([1.0, math.nan])}}
    utils.save_checkpoint(tmp_path / "a.pt", broken)
    with pytest.raises(utils.UserError, match="a.pt: has weights that are not finite"):
        utils.load_checkpoint(tmp_path / "a.pt")


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


def test_patterns_are_expanded_and_names_that_exist_are_not(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.pt").touch()
    (tmp_path / "[ab]").touch()
    plain, missing = tmp_path / "[ab]", tmp_path / "nothing.pt"
    found = utils.expand([tmp_path / "*" / "best.pt", plain, missing])
    assert found == [tmp_path / "a/best.pt", tmp_path / "b/best.pt", plain, missing]
    with pytest.raises(utils.UserError, match=r"\*.jpg: nothing matches this pattern"):
        utils.expand([tmp_path / "*.jpg"])


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
    image.paste((200, 200, 200), (0, 0, width // 4, height))
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 2
    palette = [[0, 0, 0], [128, 0, 0], [0, 200, 0]]
    picture = np.array(utils.overlay(image, mask, ["nothing", "cat", "dog"], palette))
    assert picture.shape[0] > height and picture.shape[1] >= width
    # The background is still seen, in grey, up to the white line around the class.
    left = picture[:height, : width // 2].astype(int)
    assert (left.max(-1) == left.min(-1)).all()
    assert left[5, width // 4 - 1, 0] > left[5, width // 4, 0] + 50 and (left[:, -1] == 255).all()
    colored = picture[:height, width // 2 : width].astype(int)
    assert (colored[..., 1] > 120).all() and (colored[..., 0] < 80).all()
    legend = picture[height:].reshape(-1, 3).tolist()
    assert [0, 200, 0] in legend and [128, 0, 0] not in legend


def test_classes_in_grey_or_white_get_a_colour_over_the_grey_image():
    palette = data.color_map(21)
    colors = utils.colors_with_hue(palette[1:])
    assert [i for i, color in enumerate(colors, 1) if list(color) != palette[i]] == [7]  # the car
    assert max(colors[6]) - min(colors[6]) > 100 and len(set(colors)) == 20
    red, *others = utils.colors_with_hue([[255, 0, 0], [255, 255, 255], [10, 10, 10]])
    assert red == (255, 0, 0) and len({red, *others}) == 3
    assert all(max(color) - min(color) > 100 for color in others)


def test_the_legend_has_letters_for_umlauts():
    box = utils.load_font(20).getmask("\ufffe").getbbox()  # what stands for a letter it lacks
    for letter in "äöüßéñłČ":
        font = utils.load_font(20)
        assert bytes(font.getmask(letter)) != bytes(font.getmask("\ufffe")), letter
    assert box


def test_pixels_near_another_class():
    mask = np.zeros((5, 7), np.uint8)
    mask[:, 4:] = 1
    near = utils.near_another(mask, 2)
    assert near.astype(int).tolist() == [[0, 0, 1, 1, 1, 1, 0]] * 5
    assert np.array_equal(utils.near_another(mask.T, 2), near.T)
    assert not utils.near_another(np.zeros((1, 1), np.uint8), 1).any()


def test_class_shares_are_sorted():
    shares = utils.class_shares(np.array([[1, 1, 1, 0]]), ["background", "cat", "dog"])
    assert list(shares.items()) == [("cat", 0.75), ("background", 0.25)]
    shares = utils.class_shares(np.array([[1, 1, 1, 0, 255]]), ["background", "cat", "dog"])
    assert list(shares.items()) == [("cat", 0.75), ("background", 0.25)]  # void has no share


def test_a_truth_with_void_is_drawn_and_saved_from_any_integers(tmp_path):
    truth = torch.tensor([[0, 1], [255, 255]]).repeat(20, 20)
    classes, palette = ["background", "cat"], [[0, 0, 0], [128, 0, 0]]
    utils.save_mask(tmp_path / "mask.png", truth, palette)
    assert np.array_equal(np.array(Image.open(tmp_path / "mask.png")), truth.numpy())
    for mask in (truth.numpy().astype(np.uint8), np.full((40, 40), 255, np.uint8)):
        picture = utils.overlay(Image.new("RGB", (40, 40)), mask, classes, palette)
        assert picture.height > 40


# ----------------------------------------------------------------------------------------- figures


def looks_drawn(path, width, height):
    """Fail unless the file is a picture of at least that size that is not blank."""
    pixels = np.array(Image.open(path).convert("L"))
    assert pixels.shape[0] >= height and pixels.shape[1] >= width, pixels.shape
    assert pixels.std() > 10 and pixels[0, 0] == 255  # ink on a light background


def test_logs_are_read_as_numbers_and_others_refused(tmp_path):
    (tmp_path / "log.csv").write_text("epoch,val_mean_iou\n1,0.25\n2,0.5\n")
    rows = utils.read_log(tmp_path)
    assert rows == [{"epoch": 1, "val_mean_iou": 0.25}, {"epoch": 2, "val_mean_iou": 0.5}]
    for text in ("a,b\nc,d\n", "a,b\n1,2\n", "epoch,val_mean_iou\n"):
        (tmp_path / "log.csv").write_text(text)
        with pytest.raises(utils.UserError, match="log.csv: is not a log of"):
            utils.read_log(tmp_path)


ROWS = [
    {"epoch": e, "train_loss": 3 / e, "val_loss": 4 / e, "val_mean_iou": v, "val_pixel_accuracy": e / 9}
    for e, v in ((1, 0.1), (2, 0.3), (3, 0.2))
]  # fmt: skip


def test_the_drawn_curves_are_the_logs_numbers(monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    utils.curves("a.png", {"one": ROWS, "two": ROWS[:2]}, "title")
    loss, iou, accuracy = figures[0].axes
    lines = [line.get_ydata() for line in loss.lines]
    assert [list(line) for line in lines[:2]] == [[4, 2, 4 / 3], [3, 1.5, 1]]
    assert list(iou.lines[0].get_ydata()) == [0.1, 0.3, 0.2]
    assert list(accuracy.lines[0].get_ydata()) == [1 / 9, 2 / 9, 3 / 9]
    assert "one: best 0.3000" in [text.get_text() for text in figures[0].legends[0].get_texts()]


def test_curves_and_samples_are_drawn_whatever_backend_a_notebook_asked_for(tmp_path):
    script = (
        f"import sys; sys.path.append({str(REPOSITORY)!r})\n"
        "import torch, utils\n"
        f"utils.curves('curves.png', {{'one': {ROWS}, 'two': {ROWS}}}, 'title')\n"
        "masks = torch.tensor([0, 1, 1, 255], dtype=torch.uint8).view(1, 2, 2).repeat(3, 8, 8)\n"
        "images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)\n"
        "palette = [[0, 0, 0], [128, 0, 0]]\n"
        "utils.samples('samples.png', images, {'truth': masks}, ['a', 'b'], palette, 'title')\n"
    )
    environment = os.environ | {"MPLBACKEND": "no_such_backend"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    looks_drawn(tmp_path / "curves.png", 1000, 400)
    looks_drawn(tmp_path / "samples.png", 500, 400)


def test_a_long_title_stays_within_a_narrow_figure(tmp_path):
    title = (
        "Images by their own mIoU: fcn, 64x64, split val; own resolution, mirrored images averaged"
    )
    for width in (4.2, 12):
        with utils.drawing(tmp_path / "a.png", width, 4, title + "\nthe second line") as figure:
            text = figure._suptitle
            assert text.get_text().split() == [*title.split(), "the", "second", "line"]
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= width * figure.dpi


def test_a_narrow_figure_has_its_whole_legend_and_names_as_they_are(tmp_path, monkeypatch):
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k)
    )
    classes = [f"a long $name_{i}_$ of a class" for i in range(30)]  # no formula
    masks = torch.arange(30, dtype=torch.uint8).repeat(1, 30, 1)
    images = torch.zeros(1, 3, 30, 30, dtype=torch.uint8)
    path = tmp_path / "samples.png"
    utils.samples(path, images, {"truth": masks}, classes, data.color_map(30), "title")
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == classes
    box, whole = legend.get_window_extent(), drawn[0].bbox
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 < whole.y1 / 2
    assert rcParams["text.parse_math"]  # a notebook's own figures are as they were


def test_a_reader_that_has_seen_enough_gets_no_message(tmp_path):
    # More than a pipe holds, so that the writer meets its closed end.
    code = 'import utils\nutils.cli(lambda: print(*range(99999), sep="\\n"))'
    shell = f"{sys.executable} -c '{code}' | head -n 2"
    command = ["sh", "-c", shell]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    where = {"cwd": REPOSITORY, "env": buffered}
    result = subprocess.run(command, check=True, capture_output=True, text=True, **where)
    assert result.stdout == "0\n1\n" and result.stderr == ""


# -------------------------------------------------------------------------------------- progress


def test_progress_is_one_line_on_a_terminal_and_silent_in_a_short_file(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream in (Terminal(), io.StringIO()):
        clock = iter(range(1000))
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setattr("time.monotonic", lambda clock=clock: next(clock))
        assert list(utils.progress("abcd", "work", 16, lambda: 0.5)) == list("abcd")
        shown = stream.getvalue()
        if stream.isatty():
            assert "work 2/4  16.0 images/s  loss 0.5000  2 s left" in shown
            assert "\n" not in shown and shown.endswith("\033[K\r\033[K")
        else:
            assert shown == ""
    stream = Terminal()  # also where the work is broken off
    monkeypatch.setattr("sys.stderr", stream)
    for item in utils.progress("abcd", "work"):
        if item == "c":
            break
    assert "work 2/4" in stream.getvalue() and stream.getvalue().endswith("\033[K\r\033[K")


def test_durations_read_as_people_say_them():
    said = [utils.format_seconds(seconds) for seconds in (0.4, 59.7, 200, 7500)]
    assert said == ["0 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]


def test_a_process_that_failed_does_not_wait_for_the_others(monkeypatch):
    """Under NCCL leaving the group may hang, and the message would never be printed."""
    called = []
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(
            torch.distributed, name, lambda *args, name=name, **more: called.append(name)
        )
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(utils.UserError, match="failed"), utils.process_group("cpu"):
        raise utils.UserError("failed")
    assert called == ["init_process_group"]


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_only_cuda_is_sent_batches_that_it_need_not_have_yet(monkeypatch, device):
    asked, shapes = [], data.Shapes("val", 32)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, where, non_blocking: asked.append(non_blocking)
    )
    data.fetch(shapes, torch.tensor([0, 1]), torch.device(device))
    assert asked == [False, False]


def test_several_gpus_without_nccl_meet_by_gloo(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)  # as on Windows
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **more: asked.append(backend)
    )
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(utils, "select_device", torch.device)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with utils.process_group("cuda:1") as (device, rank, processes):
        assert (device, rank, processes) == (torch.device("cuda:1"), 0, 2)
    assert asked == ["gloo"]
