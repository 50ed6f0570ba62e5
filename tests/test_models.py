"""models.py against the paper's tables."""

import pytest
import torch
from torch import nn

import models


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


@pytest.mark.parametrize(
    "name, by_table, stated",
    [("fcn", fcn_parameters, 5_500_245), ("darrennet", darrennet_parameters, 2_064_321)],
)
def test_parameters_are_those_of_the_tables(name, by_table, stated):
    assert by_table(21) == stated
    for classes in (21, 2):
        model = models.build_model(name, num_classes=classes)
        assert sum(p.numel() for p in model.parameters()) == by_table(classes)


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("height, width", [(32, 32), (33, 33), (97, 32), (224, 224), (375, 500)])
def test_logits_have_the_size_of_the_images(name, height, width):
    model = models.build_model(name, num_classes=7).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, height, width)).shape == (1, 7, height, width)


@pytest.mark.parametrize("name", models.MODELS)
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


def test_darrennet_has_erfnets_dilations_and_dropouts():
    encoder = models.build_model("darrennet", dropout=(0.1, 0.4)).encoder
    blocks = [m for m in encoder.layers if isinstance(m, models.NonBottleneck1d)]
    assert [b.conv3x1_2.dilation for b in blocks[:5]] == [(1, 1)] * 5
    assert [b.conv1x3_2.dilation[1] for b in blocks[5:]] == [2, 4, 8, 16, 2, 4, 8, 16]
    assert [b.dropout.p for b in blocks] == [0.1] * 5 + [0.4] * 8
    with torch.inference_mode():
        assert encoder(torch.zeros(1, 3, 224, 224)).shape == (1, 128, 28, 28)


def test_non_bottleneck_is_residual():
    block = models.NonBottleneck1d(8, dilation=4).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(1, 8, 20, 20)
    assert torch.equal(block(x), x.relu())


def test_an_unknown_name_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'segnet'.*fcn, darrennet"):
        models.build_model("segnet")
