"""The networks of the paper, each written to be read beside its table.

    model = build_model("darrennet", num_classes=21)
    logits = model(images)          # float (N, 3, H, W) -> (N, 21, H, W), any H and W from 32 up

Layer by layer, with parameters and multiply-adds:  python tools/layers.py darrennet

Every network halves the image a few times and doubles it as often. Where a side is odd,
halving rounds up, so that doubling gives at least the input's size back; the rest is
cut off at the right and at the bottom, so each output pixel stays on its input pixel:
33 becomes 17, then 34, cut to 33.
"""

import torch
from torch import nn
from torch.nn import functional as F


class ModelError(ValueError):
    """A name or a file that fits none of the networks here."""


def down(n_in, n_out):
    """A layer of the baseline's encoder: (N, n_in, H, W) to (N, n_out, H/2, W/2).

    Convolution, ReLU, batch norm, in the paper's order.
    """
    conv = nn.Conv2d(n_in, n_out, kernel_size=3, stride=2, padding=1)
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.BatchNorm2d(n_out))


def up(n_in, n_out):
    """A layer of the baseline's decoder: (N, n_in, H, W) to (N, n_out, 2H, 2W)."""
    conv = nn.ConvTranspose2d(n_in, n_out, kernel_size=3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.BatchNorm2d(n_out))


def fcn_decoder(num_classes):
    """The baseline's five layers up and its 1x1 classifier; behind ResNet34 Table 5."""
    return nn.Sequential(
        up(512, 512),
        up(512, 256),
        up(256, 128),
        up(128, 64),
        up(64, 32),
        nn.Conv2d(32, num_classes, kernel_size=1),
    )


class EncoderDecoder(nn.Module):
    """What all networks here are: an encoder, and a decoder that takes what the encoder gives.

    Maps float images (N, 3, H, W) to logits (N, num_classes, H, W), H and W from 32 up.
    train.py gives new weights to all parts but `pretrained_parts`, which came with trained
    ones. A network of your own needs this attribute only if it brings trained weights: a
    tuple of the names of its direct parts, such as ("backbone",).
    """

    def __init__(self, encoder, decoder, pretrained=False):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.pretrained_parts = ("encoder",) if pretrained else ()

    def forward(self, images):
        height, width = images.shape[-2:]
        return self.decoder(self.encoder(images))[..., :height, :width]


class FCN(EncoderDecoder):
    """The paper's baseline: five strided convolutions, five transposed ones back."""

    def __init__(self, num_classes=21):
        encoder = nn.Sequential(
            down(3, 32),
            down(32, 64),
            down(64, 128),
            down(128, 256),
            down(256, 512),
        )
        super().__init__(encoder, fcn_decoder(num_classes))


class Downsampler(nn.Module):
    """Table 3: a strided convolution and a max pooling, concatenated in the channels."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out - n_in, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)  # odd sides round up, as in conv
        self.bn = nn.BatchNorm2d(n_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(torch.cat([self.conv(x), self.pool(x)], dim=1)))


class NonBottleneck1d(nn.Module):
    """Table 2: a residual block, by ERFNet's name. A 3x1 and a 1x3 convolution stand for a 3x3 one."""

    def __init__(self, channels, dropout=0.0, dilation=1):
        super().__init__()
        d = dilation
        self.conv3x1_1 = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.conv1x3_1 = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1))
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3)
        self.conv3x1_2 = nn.Conv2d(channels, channels, (3, 1), padding=(d, 0), dilation=(d, 1))
        self.conv1x3_2 = nn.Conv2d(channels, channels, (1, 3), padding=(0, d), dilation=(1, d))
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)
        # Scaled by 0 at first, so that the block passes its input on unchanged (Goyal et
        # al. 2017, Accurate, Large Minibatch SGD, section 5.1): else the signal grows from
        # block to block.
        nn.init.zeros_(self.bn2.weight)
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
        self.layers = nn.Sequential(
            Downsampler(16, 64),
            *(NonBottleneck1d(64, shallow) for _ in range(5)),
            Downsampler(64, 128),
            *(NonBottleneck1d(128, deep, dilation) for dilation in (2, 4, 8, 16, 2, 4, 8, 16)),
        )

    def forward(self, images):
        return self.layers(self.initial_block(images))


class DarrenNetDecoder(nn.Module):
    """Table 1, the way back: (N, 128, h, w) to logits (N, num_classes, 8h, 8w)."""

    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(
            Upsampler(128, 64),
            NonBottleneck1d(64),
            NonBottleneck1d(64),
            Upsampler(64, 16),
            NonBottleneck1d(16),
            NonBottleneck1d(16),
        )
        self.output_conv = nn.ConvTranspose2d(16, num_classes, 2, stride=2)

    def forward(self, x):
        return self.output_conv(self.layers(x))


class DarrenNet(EncoderDecoder):
    """The paper's network: ERFNet (Romera et al. 2018) without the encoder's own output layer.

    `dropout` holds the probabilities of dropping a channel in the encoder's 64- and
    128-channel blocks; the default is ERFNet's.
    """

    def __init__(self, num_classes=21, dropout=(0.03, 0.3)):
        super().__init__(DarrenNetEncoder(dropout), DarrenNetDecoder(num_classes))


def double_conv(n_in, n_out):
    """Two 3x3 convolutions, each with batch norm and ReLU."""
    layers = []
    for channels in (n_in, n_out):
        layers += [nn.Conv2d(channels, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(True)]
    return nn.Sequential(*layers)


class UNetEncoder(nn.Module):
    """Table 6 down to conv10: gives five feature maps, 64 channels at full size to 1024 at 1/16."""

    def __init__(self):
        super().__init__()
        channels = ((3, 64), (64, 128), (128, 256), (256, 512), (512, 1024))
        self.convs = nn.ModuleList(double_conv(n_in, n_out) for n_in, n_out in channels)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, images):
        maps = [self.convs[0](images)]
        for conv in self.convs[1:]:
            maps.append(conv(self.pool(maps[-1])))
        return maps


class UNetDecoder(nn.Module):
    """Table 6 from deconv1: doubles the deepest map, joins it to the next, and so on up.

    `widths` are the channels of the five maps, the largest map first. The last layer
    gives logits at the size of the largest map.
    """

    def __init__(self, widths, num_classes):
        super().__init__()
        w1, w2, w3, w4, w5 = widths
        channels = ((w5, w4), (w4, w3), (w3, w2), (w2, w1))
        self.deconvs = nn.ModuleList(
            nn.ConvTranspose2d(n_in, n_out, 2, stride=2) for n_in, n_out in channels
        )
        # The paper's table has 64 channels into the last of these, conv17; with the skip
        # it must be 128, as in those before it.
        self.convs = nn.ModuleList(double_conv(2 * width, width) for width in (w4, w3, w2, w1))
        self.output = nn.Conv2d(w1, num_classes, 1)

    def forward(self, maps):
        map1, map2, map3, map4, x = maps
        x = self.convs[0](self.join(map4, self.deconvs[0](x)))
        x = self.convs[1](self.join(map3, self.deconvs[1](x)))
        x = self.convs[2](self.join(map2, self.deconvs[2](x)))
        x = self.convs[3](self.join(map1, self.deconvs[3](x)))
        return self.output(x)

    @staticmethod
    def join(skip, x):
        """Concatenate an encoder's map and the ReLU of x, cut to its size, in the channels."""
        height, width = skip.shape[-2:]
        return torch.cat([skip, F.relu(x)[..., :height, :width]], dim=1)


class UNet(EncoderDecoder):
    """Table 6 (Ronneberger et al. 2015), here padded, with batch norm, and no ReLU on the logits."""

    def __init__(self, num_classes=21):
        super().__init__(UNetEncoder(), UNetDecoder((64, 128, 256, 512, 1024), num_classes))


class ResNet34Encoder(nn.Module):
    """torchvision's ResNet34 without its classifier (Deep Residual Learning, 2015).

    Gives the last feature map, 512 channels at 1/32 of the image; with `all_maps` a list
    of five: 64 channels at 1/2, 64 at 1/4, 128 at 1/8, 256 at 1/16, 512 at 1/32.
    `pretrained` takes the weights that torchvision trained on ImageNet; raises ModelError,
    naming the file, where they can be neither found nor downloaded.
    """

    def __init__(self, pretrained, all_maps=False):
        super().__init__()
        from torchvision.models import ResNet34_Weights, resnet34  # here: it is slow to import

        weights = ResNet34_Weights.IMAGENET1K_V1
        try:
            resnet = resnet34(weights=weights if pretrained else None)
        except Exception as error:  # no network, a broken download, a full disk
            said = f"ImageNet's ResNet34 cannot be fetched ({str(error)[:90]})"
            remedy = f"bring {weights.url} and give that file by --encoder-weights"
            raise ModelError(f"{said}; {remedy}, or say --no-pretrained") from error
        self.all_maps = all_maps
        # All layers with weights have torchvision's names, so that its files fit as they are.
        self.conv1, self.bn1, self.pool = resnet.conv1, resnet.bn1, resnet.maxpool
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4

    def forward(self, images):
        map1 = F.relu(self.bn1(self.conv1(images)))
        map2 = self.layer1(self.pool(map1))
        map3 = self.layer2(map2)
        map4 = self.layer3(map3)
        map5 = self.layer4(map4)
        return [map1, map2, map3, map4, map5] if self.all_maps else map5


class ResNet34FCN(EncoderDecoder):
    """Table 5: the baseline's decoder behind ResNet34."""

    def __init__(self, num_classes=21, pretrained=False):
        super().__init__(ResNet34Encoder(pretrained), fcn_decoder(num_classes), pretrained)


class ResNet34DarrenNet(EncoderDecoder):
    """DarrenNet's decoder behind ResNet34; two more upsamplers, from 512 channels to 128."""

    def __init__(self, num_classes=21, pretrained=False):
        decoder = (Upsampler(512, 256), Upsampler(256, 128), DarrenNetDecoder(num_classes))
        super().__init__(ResNet34Encoder(pretrained), nn.Sequential(*decoder), pretrained)


class ResNet34UNet(EncoderDecoder):
    """UNet's decoder on ResNet34's five maps, and an upsampling of its logits by 2."""

    def __init__(self, num_classes=21, pretrained=False):
        decoder = UNetDecoder((64, 64, 128, 256, 512), num_classes)
        doubling = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        encoder = ResNet34Encoder(pretrained, all_maps=True)
        super().__init__(encoder, nn.Sequential(decoder, doubling), pretrained)


MODELS = {
    "fcn": FCN,
    "darrennet": DarrenNet,
    "unet": UNet,
    "resnet34_fcn": ResNet34FCN,
    "resnet34_darrennet": ResNet34DarrenNet,
    "resnet34_unet": ResNet34UNet,
}


def build_model(name, num_classes=21, **options):
    """Return a new network by its name in `MODELS`; `options` go to its constructor.

    Raises ModelError, naming the choices, for a name that is not there.
    """
    if name not in MODELS:
        raise ModelError(f"no model is called '{name}'; choose from {', '.join(MODELS)}")
    return MODELS[name](num_classes, **options)


def from_checkpoint(checkpoint):
    """Return a checkpoint's network, with its weights, in eval mode, on the CPU.

    `checkpoint` needs the keys `model`, `classes` and `state_dict`. Raises ModelError where
    they do not belong together.
    """
    name, num_classes = checkpoint["model"], len(checkpoint["classes"])
    try:
        model = build_model(name, num_classes)
        model.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError) as error:
        said = f"the weights do not fit {name} as models.py has it now; train anew"
        raise ModelError(f"{said} ({str(error)[:90]})") from error
    return model.eval()


def load_encoder(model, file):
    """Copy all tensors that fit into `model`, the decoder's too; return (loaded, left out), names.

    `file` is what torch.load gave: a checkpoint of this project, a file of ERFNet's
    authors, torchvision's ResNet34, or any dictionary of tensors that are named as in
    `model` or in its encoder. Words that others put before all of their names (`module.`
    and the like) are cut off.
    """
    stored = file.get("state_dict", file)
    own = model.state_dict()
    # Three times: several of them may stand before a name, in any order.
    for word in 3 * ("module.", "_orig_mod.", "model."):
        if not own.keys() & stored.keys() and all(name.startswith(word) for name in stored):
            stored = {name.removeprefix(word): tensor for name, tensor in stored.items()}
    renamed = {}
    for name, tensor in stored.items():
        # As in the model, as in its encoder, or as in ERFNet's file of ImageNet's weights.
        candidates = (name, f"encoder.{name}", name.removeprefix("features."))
        renamed[next((each for each in candidates if each in own), name)] = tensor
    fits = [name for name in renamed if name in own and renamed[name].shape == own[name].shape]
    model.load_state_dict({name: renamed[name] for name in fits}, strict=False)
    return fits, [name for name in renamed if name not in fits]
