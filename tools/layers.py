"""Print a network's layers, as the tables of the paper list them, or a line for each network.

    python tools/layers.py                # parameters and multiply-adds of all networks
    python tools/layers.py darrennet      # one network, layer by layer

Multiply-adds are those of one image of 224x224.
"""

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models


def layer_table(model, size=224):
    """Return a row for each convolution and pooling layer, in the order in which they run.

    A row is a dictionary: layer, in, out, kernel, stride, padding, dilation, output, parameters,
    multiply_adds, for one image of size x size. Runs on the meta device, which computes shapes
    alone.
    """
    rows = []

    def record(name, layer, inputs, output):
        row = {"layer": name, "in": inputs[0].shape[1], "out": output.shape[1]}
        for key in ("kernel_size", "stride", "padding", "dilation"):
            value = getattr(layer, key)
            value = (value, value) if isinstance(value, int) else value
            row[key.removesuffix("_size")] = "x".join(map(str, value))
        row["output"] = "x".join(map(str, output.shape[-2:]))
        row["parameters"] = sum(parameter.numel() for parameter in layer.parameters())
        # A weight is used once at every pixel of the output; if transposed, of the input.
        pixels = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        weights = layer.weight.numel() if row["parameters"] else 0
        row["multiply_adds"] = weights * pixels[0, 0].numel()
        rows.append(row)

    model = copy.deepcopy(model).to("meta").eval()
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d)):
            layer.register_forward_hook(partial(record, name))
    model(torch.empty(1, 3, size, size, device="meta"))
    return rows


def print_table(rows):
    """Print rows, dictionaries with the same keys, as columns under their keys."""
    lines = [[f"{v:,}" if isinstance(v, int) else v for v in row.values()] for row in rows]
    lines.insert(0, list(rows[0]))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = [line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:])]
        print("  ".join(cells))


def main(argv=None):
    """Print a network's layers and its sums, or the sums of all networks."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    names = ", ".join(models.MODELS)
    parser.add_argument("name", nargs="?", choices=models.MODELS, metavar="NAME", help=names)
    name = parser.parse_args(argv).name
    sums = []
    for each in [name] if name else models.MODELS:
        model = models.build_model(each)
        rows = layer_table(model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        sums.append({"model": each, "parameters": parameters})
        sums[-1]["multiply-adds at 224x224"] = sum(row["multiply_adds"] for row in rows)
    if name and rows:
        print_table(rows)
        print()
    print_table(sums)


if __name__ == "__main__":
    main()
