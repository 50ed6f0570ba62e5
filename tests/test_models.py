"""models.py and tools/layers.py against the paper's tables, ERFNet's published layout and torchvision's ResNet34."""

import re
from itertools import pairwise

import pytest
import torch
from conftest import call, check, run_script
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet34

import models
import utils
from tools import layers


def conv(n_in, n_out, kernel_height, kernel_width=None):
    """Parameters of a convolution with bias, transposed or not."""
    return n_in * n_out * kernel_height * (kernel_width or kernel_height) + n_out


def batch_norm(n):
    return 2 * n


def fcn_parameters(classes):
    down = [(3, 32), (32, 64), (64, 128), (128, 256), (256, 512)]
    up = [(512, 512), (512, 256), (256, 128), (128, 64), (64, 32)]
    return sum(conv(i, o, 3) + batch_norm(o) for i, o in down + up) + conv(32, classes, 1)


def darrennet_parameters(classes):
    downsamplers = [(3, 16), (16, 64), (64, 128)]
    upsamplers = [(128, 64), (64, 16)]
    blocks = 5 * [64] + 8 * [128] + 2 * [64] + 2 * [16]
    return (
        sum(conv(i, o - i, 3) + batch_norm(o) for i, o in downsamplers)
        + sum(conv(i, o, 3) + batch_norm(o) for i, o in upsamplers)
        + sum(2 * (conv(n, n, 3, 1) + conv(n, n, 1, 3) + batch_norm(n)) for n in blocks)
        + conv(16, classes, 2)
    )


def unet_decoder_parameters(maps, classes):
    """deconv 2x2, then two 3x3 convolutions with batch norm, from the deepest map up."""
    steps = list(pairwise(reversed(maps)))
    return sum(
        conv(i, o, 2) + conv(2 * o, o, 3) + conv(o, o, 3) + 2 * batch_norm(o) for i, o in steps
    ) + conv(maps[0], classes, 1)


def unet_parameters(classes):
    maps = (64, 128, 256, 512, 1024)
    down = sum(conv(i, o, 3) + conv(o, o, 3) + 2 * batch_norm(o) for i, o in pairwise((3, *maps)))
    return down + unet_decoder_parameters(maps, classes)


def resnet34_encoder_parameters():
    """torchvision's own sum, less the classifier's: 512 x 1000 weights and 1000 biases."""
    return 21_797_672 - 513_000


def resnet34_fcn_parameters(classes):
    up = [(512, 512), (512, 256), (256, 128), (128, 64), (64, 32)]
    decoder = sum(conv(i, o, 3) + batch_norm(o) for i, o in up) + conv(32, classes, 1)
    return resnet34_encoder_parameters() + decoder


def resnet34_darrennet_parameters(classes):
    up = sum(
        conv(i, o, 3) + batch_norm(o) for i, o in [(512, 256), (256, 128), (128, 64), (64, 16)]
    )
    blocks = sum(2 * (conv(n, n, 3, 1) * 2 + batch_norm(n)) for n in (64, 64, 16, 16))
    return resnet34_encoder_parameters() + up + blocks + conv(16, classes, 2)


def resnet34_unet_parameters(classes):
    return resnet34_encoder_parameters() + unet_decoder_parameters((64, 64, 128, 256, 512), classes)


@pytest.mark.parametrize(
    "name, by_table, stated",
    [
        ("fcn", fcn_parameters, 5_500_245),
        ("darrennet", darrennet_parameters, 2_064_321),
        ("unet", unet_parameters, 31_044_821),
        ("resnet34_fcn", resnet34_fcn_parameters, 25_214_357),
        ("resnet34_darrennet", resnet34_darrennet_parameters, 22_950_661),
        ("resnet34_unet", resnet34_unet_parameters, 24_427_157),
    ],
)
def test_parameters_are_those_of_the_tables(name, by_table, stated):
    assert by_table(21) == stated
    for classes in (21, 2):
        with torch.device("meta"):
            model = models.build_model(name, num_classes=classes)
        assert sum(p.numel() for p in model.parameters()) == by_table(classes)


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
    for layer in models.build_model("fcn").encoder:
        assert [type(part) for part in layer] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d]


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


def test_an_unknown_name_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'segnet'.*fcn, darrennet"):
        models.build_model("segnet")


# ------------------------------------------------------------------------------- trained encoders


class PublishedEncoder(nn.Module):
    """ERFNet's encoder as its paper and its files' key names give it (Romera et al. 2018)."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.initial_block = self.downsampler(3, 16)
        dilations = [1] * 5 + [2, 4, 8, 16, 2, 4, 8, 16]
        self.dilations = [None, *dilations[:5], None, *dilations[5:]]
        self.encoder.layers = nn.ModuleList(
            [self.downsampler(16, 64)]
            + [self.non_bottleneck(64, d) for d in dilations[:5]]
            + [self.downsampler(64, 128)]
            + [self.non_bottleneck(128, d) for d in dilations[5:]]
        )
        self.encoder.output_conv = nn.Conv2d(128, 20, 1)

    @staticmethod
    def downsampler(n_in, n_out):
        block = nn.Module()
        block.conv = nn.Conv2d(n_in, n_out - n_in, 3, 2, 1)
        block.bn = nn.BatchNorm2d(n_out, eps=1e-3)
        return block

    @staticmethod
    def non_bottleneck(n, d):
        block = nn.Module()
        block.conv3x1_1 = nn.Conv2d(n, n, (3, 1), 1, (1, 0))
        block.conv1x3_1 = nn.Conv2d(n, n, (1, 3), 1, (0, 1))
        block.bn1 = nn.BatchNorm2d(n, eps=1e-3)
        block.conv3x1_2 = nn.Conv2d(n, n, (3, 1), 1, (d, 0), (d, 1))
        block.conv1x3_2 = nn.Conv2d(n, n, (1, 3), 1, (0, d), (1, d))
        block.bn2 = nn.BatchNorm2d(n, eps=1e-3)
        return block

    def forward(self, x):
        for block in [self.encoder.initial_block, *self.encoder.layers]:
            if hasattr(block, "conv"):
                x = block.bn(torch.cat([block.conv(x), F.max_pool2d(x, 2, 2)], 1)).relu()
            else:
                y = block.bn1(block.conv1x3_1(block.conv3x1_1(x).relu())).relu()
                y = block.bn2(block.conv1x3_2(block.conv3x1_2(y).relu()))
                x = (x + y).relu()
        return x


def published_file(encoder, kind):
    """The state dict of an ERFNet in the form in which its authors' files have it."""
    state = encoder.state_dict()
    state = {
        k: v for k, v in state.items() if "num_batches_tracked" not in k
    }  # older than PyTorch 0.4
    if kind == "imagenet":
        state = {k: v for k, v in state.items() if "output_conv" not in k}
        state = {f"module.features.{k}": v for k, v in state.items()}
        state["module.classifier.linear.weight"] = torch.zeros(1000, 128)
        return {"epoch": 4, "arch": "erfnet", "state_dict": state, "best_prec1": 60.0}
    state = {f"module.{k}": v for k, v in state.items()}
    return state | {"module.decoder.output_conv.weight": torch.zeros(16, 20, 2, 2)}


def random_encoder():
    torch.manual_seed(5)
    encoder = PublishedEncoder().eval()
    for name, tensor in encoder.state_dict().items():
        if "running_mean" in name:
            tensor.normal_(0, 0.1)
        elif "running_var" in name:
            tensor.uniform_(0.5, 1.5)
    return encoder


@pytest.mark.parametrize("kind", ["imagenet", "cityscapes"])
def test_erfnets_published_files_give_erfnets_encoder(kind):
    encoder = random_encoder()
    model = models.build_model("darrennet").eval()
    decoder = {k: v.clone() for k, v in model.decoder.state_dict().items()}
    loaded, left = models.load_encoder(model, published_file(encoder, kind))
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        assert torch.allclose(model.encoder(images), encoder(images), atol=1e-5)
    assert len(loaded) == 3 * 6 + 13 * 16
    assert all(torch.equal(v, decoder[k]) for k, v in model.decoder.state_dict().items())
    expected = {
        "imagenet": {"module.classifier.linear.weight"},
        "cityscapes": {
            "encoder.output_conv.weight",
            "encoder.output_conv.bias",
            "module.decoder.output_conv.weight",
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
    with pytest.raises(ValueError, match="none of its tensors fits"):
        models.load_encoder(models.build_model("darrennet"), file)


def test_resnet34_maps_are_torchvisions():
    torch.manual_seed(0)
    encoder = models.ResNet34Encoder(pretrained=False, all_maps=True).eval()
    theirs = resnet34(weights=None).eval()
    names = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    ours = dict(zip(names, [encoder.stem[0], encoder.stem[1], *encoder.layers]))
    for name, module in ours.items():
        getattr(theirs, name).load_state_dict(module.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        maps = encoder(images)
        x = theirs.relu(theirs.bn1(theirs.conv1(images)))
        expected = [x]
        x = theirs.maxpool(x)
        for name in names[2:]:
            x = getattr(theirs, name)(x)
            expected.append(x)
    assert [m.shape[1] for m in maps] == [64, 64, 128, 256, 512]
    assert all(torch.equal(a, b) for a, b in zip(maps, expected))


# ----------------------------------------------------------------------------------- layer tables


def printed_table(text):
    """Return the rows of a table that tools/layers.py prints, as dictionaries of strings."""
    head, *rows = (re.split(r"  +", line.replace(",", "")) for line in text.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_layer_table_of_darrennet_is_table_1(tmp_path):
    printed = check(run_script("tools/layers.py", "darrennet", cwd=tmp_path))
    layers_printed, sums = printed.split("\n\n")
    rows = printed_table(layers_printed)
    first = {"layer": "encoder.initial_block.conv", "in": "3", "out": "13", "kernel": "3x3"}
    first |= {"stride": "2x2", "padding": "1x1", "dilation": "1x1", "output": "112x112"}
    first |= {"parameters": str(3 * 13 * 9 + 13), "multiply_adds": str(3 * 13 * 9 * 112 * 112)}
    assert rows[0] == first
    deepest = next(row for row in rows if row["layer"] == "encoder.layers.10.conv1x3_2")
    assert deepest["dilation"] == "1x16" and deepest["padding"] == "0x16"
    assert deepest["output"] == "28x28"
    # A transposed convolution uses each weight once for every pixel of its input.
    assert rows[-1]["output"] == "224x224"
    assert rows[-1]["multiply_adds"] == str(16 * 21 * 4 * 112 * 112)
    (total,) = printed_table(sums)
    assert total["model"] == "darrennet" and total["parameters"] == "2064321"
    multiply_adds = sum(int(row["multiply_adds"]) for row in rows)
    assert total["multiply-adds at 224x224"] == str(multiply_adds)


def test_without_a_name_each_network_has_a_line(capsys):
    call(layers)
    rows = printed_table(capsys.readouterr().out)
    assert [row["model"] for row in rows] == list(models.MODELS)
    assert rows[0]["parameters"] == str(fcn_parameters(21))


def test_multiply_adds_of_resnet34_are_those_torchvision_states():
    rows = layers.layer_table(models.ResNet34Encoder(pretrained=False), 224)
    from torchvision.models import ResNet34_Weights

    stated = ResNet34_Weights.IMAGENET1K_V1.meta["_ops"]  # in 10^9, with the classifier
    assert sum(row["multiply_adds"] for row in rows) / 1e9 == pytest.approx(stated, abs=0.01)
