"""The networks of the paper, each written to be read beside its table.

    model = build_model("darrennet", num_classes=21)
    logits = model(images)          # float (N, 3, H, W) -> (N, 21, H, W), any H and W from 32 up

Every network halves the image a few times and doubles it as often. Where a side is odd, halving
rounds up, so that doubling gives at least the input's size back; what is over is cut off at the
right and at the bottom, which keeps each output pixel above its input pixel.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


def conv_relu_bn(conv):
    """One layer of the baseline: (transposed) convolution, ReLU, batch norm, in the paper's order."""
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.BatchNorm2d(conv.out_channels))


def fcn_decoder(num_classes):
    """Five doublings, 512 channels at 1/32 of the image to 32 at full size, then a 1x1 classifier."""
    widths = (512, 512, 256, 128, 64, 32)
    return nn.Sequential(
        *(
            conv_relu_bn(nn.ConvTranspose2d(n_in, n_out, 3, stride=2, padding=1, output_padding=1))
            for n_in, n_out in pairwise(widths)
        ),
        nn.Conv2d(32, num_classes, 1),
    )


class FCN(nn.Module):
    """The paper's baseline: five strided convolutions down, five transposed convolutions up.

    Maps float images (N, 3, H, W) to logits (N, num_classes, H, W), H and W from 32 up.
    """

    def __init__(self, num_classes=21):
        super().__init__()
        widths = (3, 32, 64, 128, 256, 512)
        self.encoder = nn.Sequential(
            *(
                conv_relu_bn(nn.Conv2d(n_in, n_out, 3, stride=2, padding=1))
                for n_in, n_out in pairwise(widths)
            )
        )
        self.decoder = fcn_decoder(num_classes)

    def forward(self, images):
        height, width = images.shape[-2:]
        return self.decoder(self.encoder(images))[..., :height, :width]


class Downsampler(nn.Module):
    """Table 3: a strided convolution beside a max pooling, side by side in the channels."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out - n_in, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)  # odd sides round up, as in conv
        self.bn = nn.BatchNorm2d(n_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(torch.cat([self.conv(x), self.pool(x)], dim=1)))


class NonBottleneck1d(nn.Module):
    """Table 2: a residual block whose two 3x3 convolutions are each factored into 3x1 and 1x3."""

    def __init__(self, channels, dropout=0.0, dilation=1):
        super().__init__()
        d = dilation
        self.conv3x1_1 = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.conv1x3_1 = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1))
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3)
        self.conv3x1_2 = nn.Conv2d(channels, channels, (3, 1), padding=(d, 0), dilation=(d, 1))
        self.conv1x3_2 = nn.Conv2d(channels, channels, (1, 3), padding=(0, d), dilation=(1, d))
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x):
        y = F.relu(self.conv3x1_1(x))
        y = F.relu(self.bn1(self.conv1x3_1(y)))
        y = F.relu(self.conv3x1_2(y))
        y = self.dropout(self.bn2(self.conv1x3_2(y)))
        return F.relu(x + y)


class Upsampler(nn.Module):
    """Table 4: a transposed convolution that doubles the size."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv = nn.ConvTranspose2d(n_in, n_out, 3, stride=2, padding=1, output_padding=1)
        self.bn = nn.BatchNorm2d(n_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class DarrenNetEncoder(nn.Module):
    """Table 1 down to 1/8 of the image: (N, 3, H, W) to (N, 128, H/8, W/8), rounded up.

    The modules carry ERFNet's names, so that its published weights load as they are.
    """

    def __init__(self, dropout):
        super().__init__()
        shallow, deep = dropout
        self.initial_block = Downsampler(3, 16)
        self.layers = nn.ModuleList(
            [
                Downsampler(16, 64),
                *(NonBottleneck1d(64, shallow) for _ in range(5)),
                Downsampler(64, 128),
                *(NonBottleneck1d(128, deep, dilation) for dilation in (2, 4, 8, 16, 2, 4, 8, 16)),
            ]
        )

    def forward(self, images):
        x = self.initial_block(images)
        for layer in self.layers:
            x = layer(x)
        return x


class DarrenNetDecoder(nn.Module):
    """Table 1 from 1/8 of the image back to its size: (N, 128, h, w) to (N, num_classes, 8h, 8w)."""

    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                Upsampler(128, 64),
                NonBottleneck1d(64),
                NonBottleneck1d(64),
                Upsampler(64, 16),
                NonBottleneck1d(16),
                NonBottleneck1d(16),
            ]
        )
        self.output_conv = nn.ConvTranspose2d(16, num_classes, 2, stride=2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.output_conv(x)


class DarrenNet(nn.Module):
    """The paper's network: ERFNet (Romera et al. 2018) without the encoder's own output layer.

    Maps float images (N, 3, H, W) to logits (N, num_classes, H, W), H and W from 32 up.
    `dropout` holds the probabilities of dropping a channel in the encoder's 64- and 128-channel
    blocks; the default is ERFNet's.
    """

    def __init__(self, num_classes=21, dropout=(0.03, 0.3)):
        super().__init__()
        self.encoder = DarrenNetEncoder(dropout)
        self.decoder = DarrenNetDecoder(num_classes)

    def forward(self, images):
        height, width = images.shape[-2:]
        return self.decoder(self.encoder(images))[..., :height, :width]


MODELS = {"fcn": FCN, "darrennet": DarrenNet}


def build_model(name, num_classes=21, **options):
    """Return a new network by its name in `MODELS`; `options` go to its constructor.

    Raises ValueError, naming the choices, for a name that is not there.
    """
    if name not in MODELS:
        raise ValueError(f"no model is called '{name}'; choose from {', '.join(MODELS)}")
    return MODELS[name](num_classes, **options)


def from_checkpoint(checkpoint):
    """Return the network that a checkpoint describes, with its weights, in eval mode on the CPU.

    `checkpoint` needs the keys `model`, `options`, `classes` and `state_dict`. Raises ValueError
    where they do not belong together.
    """
    model = build_model(checkpoint["model"], len(checkpoint["classes"]), **checkpoint["options"])
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit {checkpoint['model']}: {error}") from error
    return model.eval()
