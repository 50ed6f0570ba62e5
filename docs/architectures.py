"""Draw docs/architectures.png from the networks themselves: python docs/architectures.py"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import models

COLORS = {"convolution": "#0072b2", "transposed convolution": "#d55e00", "max pooling": "#999999"}
SKIP = "#009e73"


def kind(model, row):
    """Return what a row of `models.layer_table` is, as the legend calls it."""
    layer = type(model.get_submodule(row["layer"])).__name__
    kinds = {"Conv2d": "convolution", "ConvTranspose2d": "transposed convolution"}
    return kinds.get(layer, "max pooling")


def draw(axes, name):
    """Draw a network from left to right: a bar a layer, as tall as its output is large."""
    model = models.build_model(name)
    x, stages = 0.0, []
    for row in models.layer_table(model):
        height = int(row["output"].split("x")[0])
        width = 0.7 + row["out"] / 500  # the wider, the more channels
        color = COLORS[kind(model, row)]
        axes.add_patch(Rectangle((x, -height / 2), width, height, fc=color, ec="white", lw=0.4))
        if not stages or stages[-1]["height"] != height:
            if stages:
                stages[-1]["channels"] = row["in"]
            stages.append({"height": height, "left": x})
        stages[-1] |= {"right": x + width, "channels": row["out"]}
        x += width + 0.08
    for stage in stages:
        middle = (stage["left"] + stage["right"]) / 2
        text = f"{stage['channels']}\n{stage['height']}²"
        axes.text(middle, -122, text, ha="center", va="top", fontsize=8)
    if name.endswith("unet"):  # the skips, between the stages of one size
        deepest = min(range(len(stages)), key=lambda i: stages[i]["height"])
        for left in stages[:deepest]:
            for right in stages[deepest + 1 :]:
                if left["height"] == right["height"]:
                    ends, y = (left["right"], right["left"]), 0.44 * left["height"]
                    axes.plot(ends, (y, y), color=SKIP, lw=1.5)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    axes.set_title(f"{name}: {parameters / 1e6:.1f} million parameters", loc="left")
    axes.set(xlim=(-0.5, x + 0.5), ylim=(-175, 118))
    axes.set_axis_off()


def main():
    figure = Figure(figsize=(13, 12), layout="constrained")
    figure.suptitle("Each bar a layer, from the image (left) to the logits (right)", fontsize=13)
    for axes, name in zip(figure.subplots(len(models.MODELS), 1), models.MODELS):
        draw(axes, name)
    note = "height: side of the output for a 224×224 image; width: channels;\nbelow: channels and side at the end of each stage"
    handles = [Patch(fc=color, label=name) for name, color in COLORS.items()]
    handles.append(Line2D([], [], color=SKIP, label="skip connection"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, title=note, frameon=False)
    figure.savefig(REPOSITORY / "docs" / "architectures.png", dpi=90)


if __name__ == "__main__":
    main()
