"""models.py and tools/layers.py against the paper's tables, ERFNet's published layout and torchvision's ResNet34."""

import re

import pytest
import torch
from conftest import REPOSITORY, call
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet34

import models
import utils
from tools import layers

# Summed by hand over the paper's tables: all parameters for 21 classes, and those of each class in
# the last layer (a 1x1 convolution of 32 or 64 channels, or a 2x2 one of 16, and a bias).
PARAMETERS = {
    "fcn": (5_500_245, 33),
    "darrennet": (2_064_321, 65),
    "unet": (31_044_821, 65),
    "resnet34_fcn": (25_214_357, 33),
    "resnet34_darrennet": (22_950_661, 65),
    "resnet34_unet": (24_427_157, 65),
}


@pytest.mark.parametrize("name", models.MODELS)
def test_parameters_are_those_of_the_tables(name):
    total, each = PARAMETERS[name]
    for classes in (21, 2):
        with torch.device("meta"):
            model = models.build_model(name, num_classes=classes)
        assert sum(p.numel() for p in model.parameters()) == total - (21 - classes) * each


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("height, width", [(32, 32), (33, 97), (97, 33), (224, 224), (375, 500)])
def test_logits_have_the_size_of_the_images(name, height, width):
    with torch.device("meta"):  # shapes alone, nothing computed
        logits = models.build_model(name, num_classes=7)(torch.empty(2, 3, height, width))
    assert logits.shape == (2, 7, height, width)


@pytest.mark.parametrize("name", ["fcn", "darrennet", "unet"])
def test_output_lies_above_its_input(name):
    """Gradients of one output pixel are centred on that pixel, also where sizes are odd."""
    torch.manual_seed(0)
    model = models.build_model(name, num_classes=2).eval()
    images = torch.randn(1, 3, 161, 161, requires_grad=True)
    model(images)[0, :, 90:106, 70:86].square().sum().backward()
    weight = images.grad.abs().sum((0, 1))
    weight = weight * (weight > 0.2 * weight.max())
    rows, columns = torch.meshgrid(torch.arange(161.0), torch.arange(161.0), indexing="ij")
    center = ((rows * weight).sum() / weight.sum(), (columns * weight).sum() / weight.sum())
    assert abs(center[0] - 97.5) < 8 and abs(center[1] - 77.5) < 8


def test_the_fcns_layers_are_in_the_papers_order():
    model = models.build_model("fcn")
    for layer in model.encoder:
        assert [type(part) for part in layer] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d]
    for layer in model.decoder[:5]:
        assert [type(part) for part in layer] == [nn.ConvTranspose2d, nn.ReLU, nn.BatchNorm2d]


def test_unet_convolves_twice_and_joins_what_it_skipped():
    with torch.device("meta"):
        model = models.build_model("unet")
    for double in [*model.encoder.convs, *model.decoder.convs]:
        assert [type(part) for part in double] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2
    skip = torch.tensor([[[[-1.0, 2.0, 3.0]]]])
    deeper = torch.tensor([[[[-4.0, 5.0, -6.0, 7.0], [8.0, 8.0, 8.0, 8.0]]]])
    joined = model.decoder.join(skip, deeper)
    assert joined.tolist() == [[[[-1.0, 2.0, 3.0]], [[0.0, 5.0, 0.0]]]]


def test_darrennet_has_erfnets_dilations_and_dropouts():
    encoder = models.build_model("darrennet", dropout=(0.1, 0.4)).encoder
    blocks = [m for m in encoder.layers if isinstance(m, models.NonBottleneck1d)]
    assert [b.conv3x1_2.dilation for b in blocks[:5]] == [(1, 1)] * 5
    assert [b.conv1x3_2.dilation[1] for b in blocks[5:]] == [2, 4, 8, 16, 2, 4, 8, 16]
    assert [b.dropout.p for b in blocks] == [0.1] * 5 + [0.4] * 8
    blocks = models.build_model("darrennet").encoder.modules()
    rates = [b.dropout.p for b in blocks if isinstance(b, models.NonBottleneck1d)]
    assert rates == [0.03] * 5 + [0.3] * 8
    with torch.inference_mode():
        assert encoder(torch.zeros(1, 3, 224, 224)).shape == (1, 128, 28, 28)


def test_non_bottleneck_is_residual_and_starts_by_passing_its_input_on():
    block = models.NonBottleneck1d(8, dilation=4)
    utils.initialize(block, "kaiming")
    x = torch.randn(1, 8, 20, 20)
    assert torch.equal(block(x), x.relu())
    nn.init.ones_(block.bn2.weight)
    assert not torch.equal(block(x), x.relu())


def erfnet(state, x):
    """Compute ERFNet's encoder as its paper gives it (Romera et al. 2018), of a state dict."""

    def conv(name, x, **how):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **how)

    def bn(name, x):
        values = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *values, eps=1e-3)

    blocks = ["initial_block", *(f"layers.{i}" for i in range(15))]
    for name, d in zip(blocks, [0, 0, 1, 1, 1, 1, 1, 0, 2, 4, 8, 16, 2, 4, 8, 16]):
        name = f"encoder.{name}"
        if d == 0:  # a downsampler
            strided = conv(f"{name}.conv", x, stride=2, padding=1)
            x = bn(f"{name}.bn", torch.cat([strided, F.max_pool2d(x, 2, 2)], 1)).relu()
            continue
        y = conv(f"{name}.conv3x1_1", x, padding=(1, 0)).relu()
        y = bn(f"{name}.bn1", conv(f"{name}.conv1x3_1", y, padding=(0, 1))).relu()
        y = conv(f"{name}.conv3x1_2", y, padding=(d, 0), dilation=(d, 1)).relu()
        y = bn(f"{name}.bn2", conv(f"{name}.conv1x3_2", y, padding=(0, d), dilation=(1, d)))
        x = (x + y).relu()
    return x


def random_encoder():
    """Return random weights under the names of ERFNet's published files."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"initial_block": (3, 16), "layers.0": (16, 64), "layers.6": (64, 128)}
    state, norms = {"encoder.output_conv.weight": (20, 128, 1, 1)}, {}
    for name, (n_in, n_out) in shapes.items():
        state[f"encoder.{name}.conv.weight"] = (n_out - n_in, n_in, 3, 3)
        norms[f"encoder.{name}.bn"] = n_out
    for i in [*range(1, 6), *range(7, 15)]:
        n = 64 if i < 6 else 128
        for part in (1, 2):
            state[f"encoder.layers.{i}.conv3x1_{part}.weight"] = (n, n, 3, 1)
            state[f"encoder.layers.{i}.conv1x3_{part}.weight"] = (n, n, 1, 3)
            norms[f"encoder.layers.{i}.bn{part}"] = n
    state |= {name.replace("weight", "bias"): shape[:1] for name, shape in state.items()}
    for name, n in norms.items():
        state |= {f"{name}.{k}": (n,) for k in ("running_mean", "running_var", "weight", "bias")}
    drawn = {k: 0.05 * torch.randn(shape, generator=generator) for k, shape in state.items()}
    return {
        k: v + (1 if k[-3:] == "var" or ".bn" in k and k[-6:] == "weight" else 0)
        for k, v in drawn.items()
    }


def published_file(encoder, kind):
    """The state dict of an ERFNet in the form in which its authors' files have it."""
    state = dict(encoder)
    if kind == "imagenet":
        state = {k: v for k, v in state.items() if "output_conv" not in k}
        state = {f"module.features.{k}": v for k, v in state.items()}
        state["module.classifier.linear.weight"] = torch.zeros(1000, 128)
        return {"epoch": 4, "arch": "erfnet", "state_dict": state, "best_prec1": 60.0}
    state = {f"module.{k}": v for k, v in state.items()}
    state["module.decoder.layers.0.bn.weight"] = torch.full((64,), 3.0)
    return state | {"module.decoder.output_conv.weight": torch.zeros(16, 20, 2, 2)}


@pytest.mark.parametrize("kind", ["imagenet", "cityscapes"])
def test_erfnets_published_files_give_erfnets_encoder(kind):
    encoder = random_encoder()
    model = models.build_model("darrennet").eval()
    decoder = {k: v.clone() for k, v in model.decoder.state_dict().items()}
    loaded, left = models.load_encoder(model, published_file(encoder, kind))
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        assert torch.allclose(model.encoder(images), erfnet(encoder, images), atol=1e-5)
    assert len(loaded) == 3 * 6 + 13 * 16 + (kind == "cityscapes")
    changed = {k for k, v in model.decoder.state_dict().items() if not torch.equal(v, decoder[k])}
    assert changed == ({"layers.0.bn.weight"} if kind == "cityscapes" else set())
    expected = {
        "imagenet": {"classifier.linear.weight"},
        "cityscapes": {
            "encoder.output_conv.weight",
            "encoder.output_conv.bias",
            "decoder.output_conv.weight",
        },
    }
    assert set(left) == expected[kind]


def test_a_checkpoint_of_another_number_of_classes_fits_but_for_its_classifier():
    trained = models.build_model("unet", num_classes=5)
    file = {"model": "unet", "state_dict": trained.state_dict()}
    model = models.build_model("unet", num_classes=3)
    loaded, left = models.load_encoder(model, file)
    assert left == ["decoder.output.weight", "decoder.output.bias"]
    own = model.state_dict()
    assert all(torch.equal(own[name], file["state_dict"][name]) for name in loaded)
    assert models.load_encoder(models.build_model("darrennet"), file)[0] == []


@pytest.mark.parametrize("before", ["module.", "model._orig_mod.module.", "module.model."])
def test_words_that_others_put_before_all_names_are_cut_off(before):
    trained = models.build_model("darrennet").state_dict()
    model = models.build_model("darrennet")
    file = {f"{before}{name}": tensor for name, tensor in trained.items()}
    loaded, left = models.load_encoder(model, {"state_dict": file})
    assert (loaded, left) == (list(trained), [])
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    own = nn.ModuleDict({"model": nn.Linear(2, 2)})  # whose own names begin with such a word
    assert models.load_encoder(own, own.state_dict()) == (["model.weight", "model.bias"], [])


@pytest.mark.parametrize("name", ["resnet34_fcn", "resnet34_darrennet", "resnet34_unet"])
def test_torchvisions_file_gives_the_encoder_torchvisions_maps(name, tmp_path):
    torch.manual_seed(0)
    theirs = resnet34(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet34.pth")
    model = models.build_model(name).eval()
    loaded, left = models.load_encoder(model, utils.read_tensors(tmp_path / "resnet34.pth"))
    assert left == ["fc.weight", "fc.bias"]
    assert len(loaded) == len(model.encoder.state_dict()) == len(theirs.state_dict()) - 2
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        x = theirs.relu(theirs.bn1(theirs.conv1(images)))
        expected = [x]
        x = theirs.maxpool(x)
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            x = layer(x)
            expected.append(x)
        maps = model.encoder(images)
    maps = maps if name == "resnet34_unet" else [*expected[:4], maps]
    assert [m.shape[1] for m in maps] == [64, 64, 128, 256, 512]
    assert all(torch.equal(a, b) for a, b in zip(maps, expected))


def test_layer_table_of_darrennet_is_table_1(capsys):
    rows = layers.layer_table(models.build_model("darrennet"), 224)
    first = {"layer": "encoder.initial_block.conv", "in": 3, "out": 13, "kernel": "3x3"}
    first |= {"stride": "2x2", "padding": "1x1", "dilation": "1x1", "output": "112x112"}
    first |= {"parameters": 3 * 13 * 9 + 13, "multiply_adds": 3 * 13 * 9 * 112 * 112}
    assert rows[0] == first
    deepest = next(row for row in rows if row["layer"] == "encoder.layers.10.conv1x3_2")
    assert (deepest["dilation"], deepest["padding"], deepest["output"]) == ("1x16", "0x16", "28x28")
    # A transposed convolution uses each weight once for every pixel of its input.
    assert rows[-1]["multiply_adds"] == 16 * 21 * 4 * 112 * 112
    call(layers)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    text = (REPOSITORY / "docs/options.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    assert [tuple(line) for line in lines] == table
    assert [line[0] for line in lines] == list(models.MODELS)
    adds = sum(row["multiply_adds"] for row in rows)
    assert lines[1] == ["darrennet", "2,064,321", f"{adds:,}"]
    call(layers, "darrennet")
    printed = capsys.readouterr().out
    assert "encoder.layers.10.conv1x3_2 " in printed and f"{adds:,}" in printed


def test_multiply_adds_of_resnet34_are_those_torchvision_states():
    rows = layers.layer_table(models.ResNet34Encoder(pretrained=False), 224)
    from torchvision.models import ResNet34_Weights

    stated = ResNet34_Weights.IMAGENET1K_V1.meta["_ops"]  # in 10^9, with the classifier
    assert sum(row["multiply_adds"] for row in rows) / 1e9 == pytest.approx(stated, abs=0.01)
