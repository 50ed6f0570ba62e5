"""tools/prepare.py: every export comes out as the pictures that were drawn, or in one line."""

import base64
import io
import json
import os
import shutil
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script
from PIL import Image, ImageDraw

import data

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import prepare

W, H = 48, 32
NAMES = ["a b", "c", "é", "d", "e", "f"]  # a space and an accent, as people have them
SPLIT = dict(zip(NAMES, ("train", "train", "train", "val", "val", "test")))
COLORS = np.array([(0, 0, 0), (250, 0, 90), (10, 200, 0)], np.uint8)
CLASSES = ["background", "disc", "box"]
VOID = "void"  # what `write` functions give in the place of a class that becomes void


def picture(seed):
    """Return an image, its mask (0, a disc of 1, a box of 2), and the outlines (class, points)."""
    rng = np.random.default_rng(seed)
    mask, outlines = Image.new("L", (W, H)), []
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    for label, left in ((1, 2), (2, 26)):
        x, y, r = left + 9 + int(rng.integers(-1, 2)), int(rng.integers(10, 22)), 7
        points = [(x + r * np.cos(a), y + r * np.sin(a)) for a in angles]
        if label == 2:
            points = [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
        ImageDraw.Draw(mask).polygon(points, fill=label)
        outlines.append((CLASSES[label], [(float(x), float(y)) for x, y in points]))
    mask, noise = np.array(mask), rng.integers(0, 40, (H, W, 3)).astype(np.uint8)
    image = Image.fromarray(noise + np.array([90, 180, 20], np.uint8)[mask][..., None])
    return image, mask, outlines


PICTURES = {name: picture(i) for i, name in enumerate(NAMES)}
ALL = [(name, *parts) for name, parts in PICTURES.items()]


def put(path, content, **options):
    """Write a text, an array, an image, or an object as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, (dict, list)):
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        image = Image.fromarray(content) if isinstance(content, np.ndarray) else content
        image.save(path, **options)


def runs(mask):
    """Return the lengths of zeros and ones in turn, column by column, as COCO counts them."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()


def compress(counts):
    """Return run lengths as COCO's string, from the description in its maskApi."""
    text = ""
    for i, count in enumerate(counts):
        number = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits, number = number & 31, number >> 5
            more = number != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return text


def labelme_apart(root):
    for name, image, mask, outlines in ALL:
        name, split = unicodedata.normalize("NFD", name), SPLIT[name]  # as macOS zips an accent
        put(root / f"photos/{split}/{name}.jpg", image, quality=95)
        (disc, points), (box, corners) = outlines
        (x0, y0), _, (x1, y1), _ = corners
        png = io.BytesIO()
        Image.fromarray(mask[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] == 2).save(png, "PNG")
        shapes = [
            {"label": disc, "points": points, "shape_type": "polygon"},
            {"label": box, "points": [corners[0], corners[2]], "shape_type": "rectangle"},
        ]
        if split == "val":
            code = base64.b64encode(png.getvalue()).decode()
            shapes[1] |= {"shape_type": "mask", "mask": code}
        content = {"imagePath": f"..\\..\\old\\{name}.jpg", "imageData": None, "shapes": shapes}
        put(root / f"json/{split}/{name}.json", content)
    return CLASSES


def coco(root, compressed, where, first):
    """Write COCO's images, and yield (split, JSON) of each; first: the id of the first category."""
    for split in ("train", "val", "test"):
        images, annotations = [], []
        for i, name in enumerate(name for name in NAMES if SPLIT[name] == split):
            image, mask, outlines = PICTURES[name]
            put(root / where.format(split=split) / f"{name}.jpg", image, quality=95)
            images.append({"id": i, "file_name": f"{name}.jpg", "width": W, "height": H})
            for label, (_, points) in enumerate(outlines):
                shape = [[v for point in points for v in point]]
                if compressed:
                    shape = {"size": [H, W], "counts": compress(runs(mask == label + 1))}
                known = {"id": len(annotations), "image_id": i, "category_id": first + label}
                annotations.append(known | {"segmentation": shape, "area": 9, "iscrowd": 0})
        kinds = [{"id": first + i, "name": CLASSES[i + 1], "supercategory": "x"} for i in (0, 1)]
        yield split, {"images": images, "annotations": annotations, "categories": kinds}


def coco_2017(root):
    for split, content in coco(root / "images", True, "{split}2017", 7):
        put(root / f"annotations/instances_{split}2017.json", content)
        put(root / f"annotations/captions_{split}2017.json", {"images": [], "annotations": []})
    return CLASSES


def coco_roboflow(root):
    for split, content in coco(root, False, "{split}", 1):
        folder = root / split.replace("val", "valid")
        (root / split).rename(folder)
        content["categories"].insert(0, {"id": 0, "name": "x", "supercategory": "none"})
        put(folder / "_annotations.coco.json", content)
    return CLASSES


def yolo(root, yaml, image="{split}/images", label="{split}/labels"):
    for name, image_, _, outlines in ALL:
        put(root / image.format(split=SPLIT[name]) / f"{name}.jpg", image_, quality=95)
        lines = [
            " ".join([str(i), *(f"{x / W:.7f} {y / H:.7f}" for x, y in points)])
            for i, (_, points) in enumerate(outlines)
        ]
        put(root / label.format(split=SPLIT[name]) / f"{name}.txt", "\n".join(lines))
    put(root / "data.yaml", yaml)


def yolo_list(root):
    names = """names: ['the "disc"', "a, box"]  # two"""
    yolo(root, f"# mine\nnc: 2\n{names}\n\nroboflow:\n  version: 1\n")
    return ["background", 'the "disc"', "a, box"]


def yolo_lines(root):
    yaml = "path: .\nnames:\n  0: disc # round\n  1: box\nval: x\n"
    yolo(root, yaml, "images/{split}", "labels/{split}")
    return CLASSES


def cvat(root):
    for name, image, mask, outlines in ALL:
        put(root / f"JPEGImages/day/{name}.png", image)
        if name != "c":
            put(root / f"SegmentationClass/day/{name}.png", COLORS[mask])
    labels = "part:disc:250,0,90::\nbox:10,200,0::\nbackground:0,0,0::\n"
    put(root / "labelmap.txt", "# label:color_rgb:parts:actions\n" + labels)
    for split, file in (("train", "Train"), ("val", "Validation")):
        names = "".join(f"day/{name}\n" for name in NAMES if SPLIT[name] == split)
        put(root / f"ImageSets/Segmentation/{file}.txt", names)
    return ["background", "part:disc", "box"]


def camvid_colors(root):
    for name, image, mask, outlines in ALL:
        put(root / f"701_StillsRaw_full/{name}.png", image)
        put(root / f"LabeledApproved_full/{name}_L.png", COLORS[mask])
    put(root / "label_colors.txt", "250 0 90\t\tdisc\n10 200 0\tbox\n0 0 0\t\tVoid\n")
    return ["Void", "disc", "box"]


def ade(root):
    for name, image, mask, outlines in ALL:
        part = {"train": "training", "val": "validation", "test": "testing"}[SPLIT[name]]
        put(root / f"images/{part}/{name}.jpg", image, quality=95)
        put(root / f"annotations/{part}/{name}.png", mask + 1)
    names = enumerate(["wall", "disc, plate", "box"], 1)
    rows = "".join(f"{i}\t0.1\t1\t1\t0\t{name}\n" for i, name in names)
    put(root / "objectInfo150.txt", "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + rows)
    return ["wall", "disc, plate", "box"]


def supervisely(root, drawn=False):
    for name, image, mask, outlines in ALL:
        folder = root / ("ds0" if SPLIT[name] == "train" else "ds1")
        put(folder / f"img/{name}.jpg", image, quality=95)
        if not drawn:
            put(folder / f"masks_machine/{name}.png", mask)
            put(folder / f"masks_human/{name}.png", COLORS[mask])
            continue
        png = io.BytesIO()
        Image.fromarray(mask == 1).save(png, "PNG")
        code = base64.b64encode(zlib.compress(png.getvalue())).decode()
        disc = {"geometryType": "bitmap", "bitmap": {"data": code, "origin": [0, 0]}}
        points = {"exterior": outlines[1][1], "interior": []}
        box = {"geometryType": "polygon", "points": points}
        objects = [{"classTitle": "disc", **disc}, {"classTitle": "box", **box}]
        content = {"size": {"height": H, "width": W}, "objects": objects}
        put(folder / f"ann/{name}.jpg.json", content)
    put(root / "meta.json", {"classes": [{"title": "disc"}, {"title": "box"}]})
    return CLASSES


def supervisely_json(root):
    return supervisely(root, drawn=True)


def city_train_ids(root):
    for name, image, mask, outlines in ALL:
        place = f"{SPLIT[name]}/ulm/{name}"
        put(root / f"leftImg8bit/{place}_leftImg8bit.png", image)
        put(root / f"gtFine/{place}_gtFine_labelTrainIds.png", mask)
        put(root / f"gtFine/{place}_gtFine_color.png", COLORS[mask])
    return ["road", "sidewalk", "building"]


def city_ids(root):
    """Cityscapes' own numbers, of which most are void: 7 road, 8 sidewalk, 11 building."""
    city_train_ids(root)
    for path in [*root.glob("gtFine/*/*/*_labelTrainIds.png")]:
        mask = np.array(Image.open(path))
        path.unlink()
        renamed = path.with_name(path.name.replace("TrainIds", "Ids"))
        put(renamed, np.array([7, 8, 11], np.uint8)[mask])
    return ["road", "sidewalk", "building"]


def oxford_pets(root):
    for name, image, mask, outlines in ALL:
        put(root / f"images/{name}.jpg", image, quality=95)
        put(root / f"annotations/trimaps/{name}.png", np.array([2, 1, 3], np.uint8)[mask])
    return ["background", "animal", VOID]


def segnet_camvid(root):
    for name, image, mask, outlines in ALL:
        put(root / f"{SPLIT[name]}/{name}.png", image)
        put(root / f"{SPLIT[name]}annot/{name}.png", np.array([11, 3, 8], np.uint8)[mask])
    return [VOID, "road", "car"]


def numpy_arrays(root):
    for name, image, mask, outlines in ALL:
        put(root / f"images/{name}.jpg", image, quality=95)
        (root / "masks").mkdir(exist_ok=True)
        np.save(root / f"masks/{name}.npy", np.array([-1, 1, 2])[mask])
    put(root / "classes.txt", "\n".join(CLASSES))
    return [VOID, "disc", "box"]


def two_columns(root):
    for name, image, mask, outlines in ALL:
        put(root / f"JPEGImages/{name}.jpg", image, quality=95)
        put(root / f"SegmentationClass/{name}.png", np.zeros_like(mask))
        put(root / f"SegmentationClassAug/{name}.png", mask)
    put(root / "classes.txt", "\n".join(CLASSES))
    for split in ("train", "val", "test"):
        names = [name for name in NAMES if SPLIT[name] == split]
        lines = [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png\n" for n in names]
        lines = [f"{n}\n" for n in names] if split == "val" else lines  # as VOC's beside SBD's
        put(root / f"ImageSets/Segmentation/{split}.txt", "".join(lines))
    put(root / "ImageSets/Layout/train.txt", "c 1\n")
    return CLASSES


def palettes(root):
    """Roboflow's masks beside images, some of them palettes and one 16-bit."""
    kinds = [lambda m: m, lambda m: m.astype(np.uint16), lambda m: np.stack([m] * 3, 2)]
    for i, (name, (image, mask, _)) in enumerate(PICTURES.items()):
        folder = root / SPLIT[name].replace("val", "valid")
        put(folder / f"{name}.jpg", image, quality=95)
        put(folder / f"{name}_mask.png", kinds[i % 3](mask))
        put(folder / "_classes.csv", "Pixel Value, Class\n0, background\n1, disc\n2, box\n")
    return CLASSES


EXPORTS = [
    labelme_apart, coco_2017, coco_roboflow, yolo_list, yolo_lines, cvat, camvid_colors, ade,
    supervisely, supervisely_json, city_train_ids, city_ids, oxford_pets, segnet_camvid,
    numpy_arrays, two_columns, palettes,
]  # fmt: skip
WITHOUT_SPLIT = (camvid_colors, supervisely, supervisely_json, oxford_pets, numpy_arrays)
SOME_DRAWN = (city_train_ids, city_ids, segnet_camvid, numpy_arrays)  # of more classes


@pytest.mark.parametrize("write", EXPORTS, ids=lambda write: write.__name__)
def test_export(write, tmp_path, capsys):
    classes = write(tmp_path / "export")
    before = sorted(tmp_path.rglob("*"))
    assert prepare.main([str(tmp_path / "export")]) == 1  # train.py does not read it
    assert sorted(tmp_path.rglob("*")) == before
    assert prepare.main([str(tmp_path / "export"), str(tmp_path / "new")]) == 0, capsys.readouterr()
    root = tmp_path / "new"
    names = data.read_classes(root)
    image_folder, mask_folder = data.find_folders(root)
    images = data.files_by_name(image_folder, data.IMAGE_SUFFIXES)
    masks = data.files_by_name(mask_folder, {".png"})
    assert images.keys() == masks.keys() and len(images) == 6
    drawn = {*classes} - {VOID}
    assert {*names} > drawn if write in SOME_DRAWN else {*names} == drawn
    for name, (image, truth, _) in PICTURES.items():
        (found,) = (each for each in images if name in each.replace("_leftImg8bit", "").split("_"))
        mask = data.load_mask(masks[found], len(names))
        assert Image.open(masks[found]).mode == "P"
        numbers = [data.VOID if each is VOID else names.index(each) for each in classes]
        want = np.array(numbers)[truth]
        want = np.zeros_like(want) if write is cvat and name == "c" else want
        assert (np.asarray(mask) == want).mean() > 0.985
        assert np.allclose(data.load_image(images[found]), image, atol=60)
    assert (root / "train.txt").exists() != (write in WITHOUT_SPLIT)
    for split in ("train", "val") if write not in WITHOUT_SPLIT else ():
        wanted = sum(SPLIT[name] == split for name in NAMES)
        assert len(data.split_names(root, split, images, masks)) == wanted


LIST = "background\ndisc\nbox\n"


def write_plain(root, change=lambda mask: mask, classes=LIST, ends=("", ".png"), **kind):
    for name, image, mask, _ in ALL:
        put(root / f"images/{name}.jpg", image, quality=95)
        put(root / f"masks/{name}{ends[0]}{ends[1]}", change(mask), **kind)
    if classes:
        put(root / "classes.txt", classes)
    return root


def test_numbers_that_are_no_names_pair_nothing(tmp_path, capsys):
    """Label Studio counts its tasks, whatever the images are called."""
    for number, name in enumerate(NAMES):
        put(tmp_path / f"in/images/street-{number + 1}.jpg", PICTURES[name][0])
        put(tmp_path / f"in/masks/task-{len(NAMES) - number}-label-disc-0.png", PICTURES[name][1])
    assert prepare.main([str(tmp_path / "in"), str(tmp_path / "new")]) == 2
    assert "in: " in capsys.readouterr().err and not (tmp_path / "new").exists()


BINARY = {  # as ISIC, Carvana, Kvasir and DRIVE have them
    "isic": {"change": lambda m: (m == 1) * np.uint8(255), "ends": ("_segmentation", ".png")},
    "carvana": {"change": lambda m: Image.fromarray(m == 1), "ends": ("_mask", ".gif")},
    "kvasir": {
        "change": lambda m: np.stack([(m == 1) * np.uint8(255)] * 3, 2),
        "ends": ("", ".jpg"),
        "quality": 95,
    },
    "drive": {"change": lambda m: (m == 1) * np.uint8(255), "ends": ("_manual1", ".gif")},
}


@pytest.mark.parametrize("kind", BINARY)
def test_masks_of_two_values(kind, tmp_path, capsys):
    root = write_plain(tmp_path / "in", classes="", **BINARY[kind])
    assert prepare.main([str(root), str(tmp_path / "new")]) == 0, capsys.readouterr()
    for name, (_, truth, _) in PICTURES.items():
        mask = np.asarray(Image.open(tmp_path / f"new/masks/{name}.png"))
        assert (mask == (truth == 1)).mean() > 0.985
    assert data.read_classes(tmp_path / "new")[0] == "background"


def test_void_is_no_soft_edge(tmp_path, capsys):
    root = write_plain(tmp_path / "in", lambda mask: np.uint8([0, 1, 255])[mask], "")
    mend = np.asarray(Image.open(root / "masks/c.png")).copy()
    mend[0, :2] = 3
    put(root / "masks/c.png", mend)
    assert prepare.main([str(root), str(tmp_path / "new")]) == 0
    assert (np.asarray(Image.open(tmp_path / "new/masks/c.png")) == mend).all()


def test_void(tmp_path, capsys):
    root = write_plain(tmp_path / "in", classes="void\ndisc\nbox")
    assert prepare.main([str(root)]) == 0
    assert "--void void has it left out" in capsys.readouterr().out
    for void in ("void", "0"):
        new = tmp_path / f"new{void}"
        assert prepare.main([str(root), str(new), "--void", void]) == 0
        assert data.read_classes(new) == ["disc", "box"]
        mask = np.asarray(Image.open(new / "masks/c.png"))
        assert (mask == np.array([255, 0, 1])[PICTURES["c"][1]]).all()
    assert prepare.main([str(root), str(tmp_path / "none"), "--void", "other"]) == 2
    assert "other is not one class, of void, disc, box, and not one" in capsys.readouterr().err


VOIDS = {  # lists where a class has another number than its value in masks, or than its line
    "labelmap.txt": (
        "x:200,200,200::\nvoid:250,0,90::\nbackground:0,0,0::\nbox:10,200,0::",
        COLORS,
    ),
    "class_dict.csv": (
        "name,r,g,b\nx,200,1,1\nvoid,250,0,90\nbackground,0,0,0\nbox,10,200,0",
        COLORS,
    ),
    "classes.txt": ("0 background\n7 x\n10 void\n20 box", np.uint8([0, 10, 20])),
}


@pytest.mark.parametrize("name", VOIDS)
def test_void_as_the_hint_says(name, tmp_path, capsys):
    text, values = VOIDS[name]
    root = write_plain(tmp_path / "in", lambda mask: values[mask], "")
    put(root / name, text)
    assert prepare.main([str(root), str(tmp_path / "first")]) == 0
    assert "class 2 is called void: with NEW, --void void leaves" in capsys.readouterr().out
    assert prepare.main([str(root), str(tmp_path / "new"), "--void", "void"]) == 0
    assert data.read_classes(tmp_path / "new") == ["background", "x", "box"]
    mask = np.asarray(Image.open(tmp_path / "new/masks/c.png"))
    assert (mask == np.array([0, 255, 2])[PICTURES["c"][1]]).all()
    both = [str(tmp_path / "both"), "--void", "void", "--void", "x"]
    assert prepare.main([str(root), *both]) == 0
    assert data.read_classes(tmp_path / "both") == ["background", "box"]


def test_void_that_is_a_name_and_another_value(tmp_path, capsys):
    root = write_plain(tmp_path / "in", classes="background\n0\n1")
    assert prepare.main([str(root), str(tmp_path / "new"), "--void", "1"]) == 2
    assert "1 is not one class" in capsys.readouterr().err


def test_void_of_gray_three_times_over(tmp_path):
    root = write_plain(tmp_path / "in", lambda mask: np.stack([mask * np.uint8(3)] * 3, 2), "")
    put(root / "labels.txt", "0 background\n3 disc")
    assert prepare.main([str(root), str(tmp_path / "new"), "--void", "6"]) == 0
    mask = np.asarray(Image.open(tmp_path / "new/masks/c.png"))
    assert (mask == np.array([0, 1, 255])[PICTURES["c"][1]]).all()


@pytest.mark.parametrize("nothing", ["unlabeled", "road"])
def test_images_without_a_mask_where_background_is_not_first(nothing, tmp_path):
    for i, name in enumerate(NAMES):
        put(tmp_path / f"in/JPEGImages/{name}.jpg", PICTURES[name][0])
        if i:
            put(tmp_path / f"in/SegmentationClass/{name}.png", COLORS[PICTURES[name][1]])
    labels = f"disc:250,0,90::\nbox:10,200,0::\n{nothing}:0,0,0::"
    put(tmp_path / "in/labelmap.txt", f"# label:color_rgb:parts:actions\n{labels}")
    assert prepare.main([str(tmp_path / "in"), str(tmp_path / "new")]) == 0
    made = tmp_path / f"new/masks/{NAMES[0]}.png"
    assert made.exists() == (nothing == "unlabeled")  # else it is left out
    assert not made.exists() or (np.asarray(Image.open(made)) == 2).all()


def paletted(mask, colors):
    image = Image.fromarray(np.asarray(mask, np.uint8))
    image.putpalette(np.array(colors, np.uint8).tobytes())
    return image


WHITE = np.array([(0, 0, 0), *COLORS[1:], *[(0, 0, 0)] * 252, (255, 255, 255)], np.uint8)
SWAPPED = WHITE[[0, 2, 1, *range(3, 256)]]  # in which 1 and 2 have exchanged their colours
SWAP = np.array([0, 2, 1, *range(3, 256)])  # so that the pictures stay the same
LISTED = "name,r,g,b\nbackground,0,0,0\nbox,10,200,0\ndisc,250,0,90\n"  # not in classes.txt's order
PALETTES = {  # {name: (a mask file, list of colours, what is said of SOURCE)}
    "right": (lambda m: paletted(m, WHITE), "", ""),
    "right and listed": (lambda m: paletted(m, WHITE), LISTED, ""),
    "void is listed": (lambda m: paletted(m, WHITE), LISTED + "void,255,255,255", ""),
    "gray": (lambda m: m, LISTED, ""),
    "swapped": (lambda m: paletted(SWAP[m], SWAPPED), LISTED, "(10, 200, 0), which is box's"),
}


@pytest.mark.parametrize("kind", PALETTES)
def test_palettes_that_contradict_the_values(kind, tmp_path, capsys):
    """Training goes by values. NEW goes by colours where a list has all of them, but void's."""
    change, text, said = PALETTES[kind]

    def with_void(mask):
        return np.where(np.arange(W) < 2, 255, mask).astype(np.uint8)

    root = write_plain(tmp_path / "in", lambda mask: change(with_void(mask)))
    if text:
        put(root / "class_dict.csv", text)
    assert prepare.main([str(root)]) == 0
    printed = capsys.readouterr().out
    assert said in printed and ("training goes by values" in printed) == bool(said), printed
    void = ["--void", "void"] if "void" in text else []
    assert prepare.main([str(root), str(tmp_path / "new"), *void]) == 0, capsys.readouterr()
    assert "go by values" not in capsys.readouterr().out
    found = data.read_classes(tmp_path / "new")  # a list with void is not in classes.txt's order
    new = np.array([*map(found.index, CLASSES), *range(3, 256)])
    for name in NAMES:
        mask = np.asarray(Image.open(tmp_path / f"new/masks/{name}.png"))
        assert (mask == new[with_void(PICTURES[name][1])]).all()


def test_palettes_without_a_list_of_colours(tmp_path, capsys):
    root = write_plain(tmp_path / "in", lambda mask: paletted(mask, WHITE))
    put(root / "masks/c.png", paletted(SWAP[PICTURES["c"][1]], SWAPPED))
    for new in ([], [str(tmp_path / "new")]):
        assert prepare.main([str(root), *new]) == 0
        printed = capsys.readouterr().out
        assert "(10, 200, 0), but a b.png has it in (250, 0, 90)" in printed
        assert "write class_dict.csv" in printed and "goes by values" in printed or new
    other = write_plain(tmp_path / "other/in", lambda mask: paletted(SWAP[mask], SWAPPED))
    put(other / "class_dict.csv", LISTED)
    put(other / "masks/c.png", paletted([[3, 2, 1]], [*SWAPPED[:3], (9, 9, 9)]))
    refused(other, capsys, "c.png", "has the colour (9, 9, 9), which is in no list")


@pytest.mark.parametrize("entries", [2, 256])
def test_palettes_that_begin_with_white(entries, tmp_path, capsys):
    palette = ([(255, 255, 255), (0, 0, 0)] * 128)[:entries]
    root = write_plain(tmp_path / "in", lambda mask: paletted(mask == 0, palette), LIST[:16])
    assert prepare.main([str(root)]) == 0
    assert "the colour (255, 255, 255), and 1 in black" in capsys.readouterr().out
    if entries == 256:  # the others may be colours of classes, too
        put(root / "class_dict.csv", "name,r,g,b\nbackground,0,0,0\ndisc,255,255,255")
    assert prepare.main([str(root), str(tmp_path / "new")]) == 0
    mask = np.asarray(Image.open(tmp_path / "new/masks/c.png"))
    assert (mask == (PICTURES["c"][1] > 0)).all()


def test_a_mask_that_shows_black_and_white_alone_goes_as_the_others(tmp_path):
    palette = [(0, 0, 0), (255, 255, 255), (128, 0, 0)]
    root = write_plain(tmp_path / "in", lambda mask: paletted(mask, palette))
    put(root / "masks/c.png", paletted(PICTURES["c"][1] == 1, palette))
    assert prepare.main([str(root), str(tmp_path / "new")]) == 0
    mask = np.asarray(Image.open(tmp_path / "new/masks/c.png"))
    assert (mask == (PICTURES["c"][1] == 1)).all()


def test_void_of_a_palette_that_is_filled_up_with_black(tmp_path):
    palette = np.zeros((256, 3), np.uint8)
    palette[:3] = COLORS
    root = write_plain(tmp_path / "in", lambda mask: paletted(mask - (mask == 2) * 3, palette))
    put(root / "class_dict.csv", LISTED)
    assert prepare.main([str(root), str(tmp_path / "new")]) == 0
    mask = np.asarray(Image.open(tmp_path / "new/masks/c.png"))
    assert (mask == np.array([0, 1, 255])[PICTURES["c"][1]]).all()


LISTS = {  # {a file: (its text, the values of background, disc and box in gray masks)}
    "labels.txt": ("disc: 2\nbackground: 0\nbox: 1", (0, 2, 1)),
    "classes.txt": ("background, 5\ndisc, 7\nbox, 9", (5, 7, 9)),
    "classes.csv": ("name,id\ndisc,1\nbox,2\nbackground,0", (0, 1, 2)),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_names_and_values(name, tmp_path):
    text, values = LISTS[name]
    root = write_plain(tmp_path / "in", lambda mask: np.uint8(values)[mask], "")
    put(root / name, text)
    assert prepare.main([str(root), str(tmp_path / "new")]) == 0
    new = np.array([*map(data.read_classes(tmp_path / "new").index, CLASSES)])
    mask = np.asarray(Image.open(tmp_path / "new/masks/c.png"))
    assert (mask == new[PICTURES["c"][1]]).all()


def test_a_numbered_list_counts_for_values_beside_one_of_colours(tmp_path):
    root = write_plain(tmp_path / "in", classes="")
    put(root / "class_dict.csv", "name,r,g,b\nbox,10,200,0\nbackground,0,0,0\ndisc,250,0,90")
    put(root / "labels.txt", "0 background\n1 disc\n2 box")
    assert prepare.main([str(root), str(tmp_path / "new")]) == 0
    new = np.array([*map(data.read_classes(tmp_path / "new").index, CLASSES)])
    mask = np.asarray(Image.open(tmp_path / "new/masks/c.png"))
    assert (mask == new[PICTURES["c"][1]]).all()


def test_lists_of_colours_in_several_folders_count_for_values_too(tmp_path):
    root = write_plain(tmp_path / "in", classes="")
    for folder in ("images", "masks"):
        put(root / folder / "class_dict.csv", LISTED)
    assert prepare.main([str(root), str(tmp_path / "new")]) == 0
    assert data.read_classes(tmp_path / "new") == ["background", "box", "disc"]  # LISTED's order
    mask = np.asarray(Image.open(tmp_path / "new/masks/c.png"))
    assert (mask == PICTURES["c"][1]).all()


def test_colours_before_names_under_any_title(tmp_path):
    root = write_plain(tmp_path / "in", lambda mask: COLORS[mask], "")
    for i, title in enumerate(("# class colours", "Label colours r g b", "class r,g,b,name")):
        put(root / "label_colors.txt", f"{title}\n250 0 90 disc\n0 0 0 background\n10 200 0 box")
        assert prepare.main([str(root), str(tmp_path / f"new{i}")]) == 0
        assert data.read_classes(tmp_path / f"new{i}") == ["background", "disc", "box"]


def test_the_new_folder_has_copies(tmp_path):
    root = write_plain(tmp_path / "in")
    before = (root / "images/c.jpg").read_bytes()
    assert prepare.main([str(root), str(tmp_path / "new")]) == 0
    with (tmp_path / "new/images/c.jpg").open("r+b") as file:
        file.write(b"changed in place")
    assert (root / "images/c.jpg").read_bytes() == before


def test_void_where_nothing_is_outlined(tmp_path):
    labelme_apart(tmp_path / "in")
    args = [str(tmp_path / "in"), str(tmp_path / "new"), "--void"]
    assert prepare.main([*args, "0"]) == 2  # outlines have no values
    assert prepare.main([*args, "background"]) == 0
    assert data.read_classes(tmp_path / "new") == ["box", "disc"]
    (path,) = (tmp_path / "new/masks").glob("*c.png")
    assert (np.asarray(Image.open(path)) == np.array([255, 1, 0])[PICTURES["c"][1]]).mean() > 0.985


def test_white(tmp_path, capsys):
    for name, (image, _, _) in PICTURES.items():
        gray = np.asarray(image.convert("L")).astype(np.uint16) * 16
        put(tmp_path / f"in/{name}.png", gray)
    put(tmp_path / "in/readme.txt", "scans of 2026")
    assert prepare.main([str(tmp_path / "in"), str(tmp_path / "none")]) == 2
    for flags in ("--white=-1", "--white=inf", "--white=0", "--size=0"):
        with pytest.raises(SystemExit):
            prepare.main([str(tmp_path / "in"), str(tmp_path / "none"), flags])
    with pytest.raises(SystemExit) as ended:
        prepare.main([str(tmp_path / "in"), "--white=4080"])
    assert ended.value.code == 2 and "write a folder: give NEW as well" in capsys.readouterr().err
    assert prepare.main([str(tmp_path / "in"), str(tmp_path / "new"), "--white", "4080"]) == 0
    for name, (image, _, _) in PICTURES.items():
        made = data.load_image(tmp_path / f"new/{name}.png").convert("L")
        assert np.abs(np.asarray(made, int) - np.asarray(image.convert("L"), int)).max() <= 1
    # Outlines beside such images are masks, as everywhere.
    shape = {"label": "box", "points": [[0, 0], [9, 9]], "shape_type": "rectangle"}
    for name in "cd":
        entry = {"imagePath": f"{name}.png", "imageData": None, "shapes": [shape]}
        put(tmp_path / f"in/{name}.json", entry)
    assert prepare.main([str(tmp_path / "in"), str(tmp_path / "out"), "--white", "4080"]) == 0
    assert np.asarray(Image.open(tmp_path / "out/masks/c.png"))[:9, :9].all()
    assert np.asarray(Image.open(tmp_path / "out/images/c.png")).dtype == np.uint8


def test_images_and_masks_side_by_side_some_with_several_masks(tmp_path, capsys):
    """BUSI's folder, whose own name is like one of masks."""
    for name, (image, mask, _) in PICTURES.items():
        folder = tmp_path / "in/Dataset_BUSI_with_GT" / SPLIT[name].replace("val", "benign")
        put(folder / f"{name}.png", image)
        put(folder / f"{name}_mask.png", Image.fromarray(mask == 1))
        if name == "d":
            put(folder / "d_mask_10.png", Image.fromarray(mask == 2))
    assert prepare.main([str(tmp_path / "in"), str(tmp_path / "new")]) == 0
    assert "1 images, such as d.png, have several masks" in capsys.readouterr().out
    made = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "new/masks").iterdir()}
    assert len(made) == len(NAMES)
    assert (made["benign_d"] == (PICTURES["d"][1] > 0)).all()
    assert (made["benign_e"] == (PICTURES["e"][1] == 1)).all()


def test_several_masks_over_each_other(tmp_path, capsys):
    """The last by name lies on top; --void 0 leaves void what none of them marks."""
    image, mask, _ = PICTURES["c"]
    for name in "abcde":
        put(tmp_path / f"in/images/{name}.png", image)
        put(tmp_path / f"in/masks/{name}_mask.png", mask)
    put(tmp_path / "in/masks/a_mask_1.png", (mask == 1) * np.uint8(2))
    put(tmp_path / "in/classes.txt", "void\ndisc\nbox")
    assert prepare.main([str(tmp_path / "in"), str(tmp_path / "new"), "--void", "0"]) == 0
    made = np.asarray(Image.open(tmp_path / "new/masks/a.png"))
    assert (made == np.where(mask > 0, 1, 255)).all()
    put(tmp_path / "in/masks/b_mask_1.png", np.zeros((9, 9), np.uint8))
    assert prepare.main([str(tmp_path / "in"), str(tmp_path / "small")]) == 2
    assert "b_mask_1.png: is (9, 9), but another mask" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("liver", "kidney"), ("scan", "vessels")])
def test_masks_of_the_same_names_in_all_folders_are_no_objects(names, tmp_path):
    """Organs, say: which of them would be class 1 is unclear, so they are not laid together."""
    image, mask, _ = PICTURES["c"]
    for number in range(3):
        put(tmp_path / f"in/p{number}/images/scan.png", image)
        for label, name in enumerate(names, 1):
            put(tmp_path / f"in/p{number}/masks/{name}.png", (mask == label) * np.uint8(255))
    done = prepare.main([str(tmp_path / "in"), str(tmp_path / "new")])
    assert done == (0 if "scan" in names else 2)
    for path in (tmp_path / "new/masks").glob("*.png"):
        assert (np.asarray(Image.open(path)) == (mask == 1)).all()


def test_numbers_after_other_words_stay(tmp_path):
    for name in ("case01_image_1", "case01_image_2", "case02_image_1", "case02_image_10"):
        put(tmp_path / f"in/images/{name}.png", PICTURES["c"][0])
        put(tmp_path / f"in/masks/{name}_mask.png", PICTURES["c"][1])
    assert prepare.main([str(tmp_path / "in"), str(tmp_path / "new")]) == 0
    assert len([*(tmp_path / "new/masks").iterdir()]) == 4


def test_a_folder_for_each_image_and_a_mask_for_each_object(tmp_path):
    """As in the Data Science Bowl 2018, where names are hashes, which share numbers."""
    for number, (image, mask, _) in enumerate(PICTURES.values()):
        folder = tmp_path / f"in/stage1_train/{number}ab4"
        put(folder / f"images/{number}ab4.png", image)
        put(folder / f"masks/c{number + 1}d.png", (mask == 1) * np.uint8(255))
        put(folder / f"masks/d{number + 2}e.png", (mask == 2) * np.uint8(255))
    assert prepare.main([str(tmp_path / "in"), str(tmp_path / "new")]) == 0
    for number, (_, mask, _) in enumerate(PICTURES.values()):
        (path,) = (tmp_path / "new/masks").glob(f"*{number}ab4.png")
        assert (np.asarray(Image.open(path)) == (mask > 0)).all()


@pytest.mark.parametrize("kind, upright", [("jpg", False), ("tif", False), ("tif", True)])
def test_exif_turns_an_image_once_and_its_mask_too(tmp_path, kind, upright):
    root, exif = write_plain(tmp_path / "in"), Image.Exif()
    exif[0x0112] = 6
    for name, (image, mask, _) in PICTURES.items():
        (root / f"images/{name}.jpg").unlink()
        image.save(root / f"images/{name}.{kind}", exif=exif)
        put(root / f"masks/{name}.png", np.rot90(mask, -1).copy() if upright else mask)
    assert prepare.main([str(root)]) == (0 if upright else 1)
    assert prepare.main([str(root), str(tmp_path / "new")]) == 0
    mask = np.asarray(Image.open(tmp_path / "new/masks/c.png"))
    assert (mask == np.rot90(PICTURES["c"][1], -1)).all()


def test_a_list_without_masks_does_no_harm_to_training(tmp_path, capsys):
    root = write_plain(tmp_path / "in")
    put(root / "train.txt", "c\nd\n")
    put(root / "val.txt", "e\nf\n")
    put(root / "test.txt", "secret\n")
    put(root / "._train.txt", "of macOS")
    (root / "notes.txt").write_bytes(b"gr\xfcn, in no UTF-8")
    (root / "images/a b.jpg").write_bytes(b"broken")
    assert prepare.main([str(root)]) == 0
    said = capsys.readouterr().out
    assert "test.txt: 'secret' is no image's name" in said and "._train" not in said
    assert "notes cannot be scored: " in said
    assert f"in no list: {root}/images/a b.jpg: cannot identify image" in said


def test_frames_and_what_vanishes(tmp_path, capsys):
    for i in range(20):  # a bright bar that wanders, and a class of one pixel
        image, mask = np.zeros((96, 96, 3), np.uint8), np.zeros((96, 96), np.uint8)
        image[:, 4 * i : 4 * i + 12], mask[:, 4 * i : 4 * i + 12], mask[0, 0] = 255, 1, 2
        put(tmp_path / f"in/images/f{i:03}.png", image)
        put(tmp_path / f"in/masks/f{i:03}.png", mask)
    put(tmp_path / "in/classes.txt", "background\nbar\ndot")
    assert prepare.main([str(tmp_path / "in"), "--size", "32"]) == 0
    printed = capsys.readouterr().out
    assert "video" in printed and "vanishes from" in printed


def refused(root, capsys, *wanted):
    """Check that a folder is refused in one line that has some words, and leaves nothing."""
    new = root.parent / "new"
    assert prepare.main([str(root), str(new)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: error: ") and error.count("\n") == 1 and len(error) < 301
    assert all(word in error for word in wanted), error
    assert not new.exists() and not [p for p in root.parent.iterdir() if p.name[0] == "."]


def test_refusals(tmp_path, capsys):
    colored = write_plain(tmp_path / "1/in", lambda mask: COLORS[mask], "")
    refused(colored, capsys, "(250, 0, 90)", "class_dict.csv")
    blurred = write_plain(tmp_path / "2/in", lambda mask: mask * 60, ends=("", ".jpg"))
    refused(blurred, capsys, "PNG")
    twice = write_plain(tmp_path / "3/in")
    put(twice / "images/c.png", PICTURES["c"][0])
    refused(twice, capsys, "c.jpg", "c.png")
    boxes = tmp_path / "4/in"
    yolo(boxes, "names: [disc, box]")
    put(boxes / "train/labels/c.txt", "0 .5 .5 .2 .2\n")
    refused(boxes, capsys, "c.txt", "boxes")
    small = write_plain(tmp_path / "5/in", lambda mask: mask[1:])
    put(small / "masks/c.png", PICTURES["c"][1][:, 1:])
    refused(small, capsys, "6 of 6")
    same = write_plain(tmp_path / "6/in")
    for folder in ("images/a/b_c.jpg", "images/a_b/c.jpg", "masks/a/b_c.png", "masks/a_b/c.png"):
        put(same / folder, PICTURES["c"][folder[0] == "m"])
    refused(same, capsys, "would be called like")
    if sys.platform == "linux":  # elsewhere case is ignored, and names are letters
        blind = write_plain(tmp_path / "13/in")
        put(blind / "images/C.jpg", PICTURES["c"][0])
        put(blind / "masks/C.png", PICTURES["c"][1])
        refused(blind, capsys, "would be called like")
        strange, name = write_plain(tmp_path / "14/in"), os.fsdecode(b"caf\xe9")
        put(strange / f"images/{name}.jpg", PICTURES["c"][0])
        put(strange / f"masks/{name}.png", PICTURES["c"][1])
        result = run_script("tools/prepare.py", strange, "new", cwd=tmp_path)
        assert result.returncode == 2 and "UTF-8 letters" in result.stderr
        assert result.stderr.count("\n") == 1 and not (tmp_path / "new").exists()
    ignored = write_plain(tmp_path / "7/in", classes="__ignore__\ndisc\nbox\nrare")
    refused(ignored, capsys, "__ignore__")
    xml = tmp_path / "8/in"
    put(xml / "JPEGImages/c.jpg", PICTURES["c"][0])
    put(xml / "Annotations/c.xml", "<annotation/>")
    refused(xml, capsys, "boxes")
    shape = {"label": "disc", "points": [[1, 1], [4e9, 1], [1, 9]], "shape_type": "polygon"}
    for folder, path, words in (("9", "c.jpg", "far outside"), ("10", "/etc/passwd", "passwd")):
        put(tmp_path / folder / "in/c.jpg", PICTURES["c"][0])
        put(tmp_path / folder / "in/c.json", {"imagePath": path, "shapes": [shape]})
        refused(tmp_path / folder / "in", capsys, words)
    cut = write_plain(tmp_path / "11/in") / "images/c.jpg"
    cut.write_bytes(cut.read_bytes()[:-300])
    refused(cut.parent.parent, capsys, "c.jpg", "truncated")


def test_refusals_of_what_would_be_learned_wrong(tmp_path, capsys):
    apart = write_plain(tmp_path / "1/in", ends=("", "_mask.png"))
    for name, (_, mask, _) in PICTURES.items():  # a folder for each class
        (apart / f"masks/{name}_mask.png").unlink()
        put(apart / f"masks/disc/{name}.png", (mask == 1) * np.uint8(255))
        put(apart / f"masks/box/{name}.png", (mask == 2) * np.uint8(255))
    refused(apart, capsys, "is a mask of the same image", "a value for each class")
    colored = write_plain(tmp_path / "2/in", lambda mask: COLORS[mask], "")
    headers = "name,b,g,r", "# name,b,g,r", "name,blue_value,green_value,red_value"
    for header in headers:
        put(colored / "class_dict.csv", f"# mine\n{header}\nx,0,0,0\ndisc,90,0,250\nbox,0,200,10")
        refused(colored, capsys, "class_dict.csv", header)
    put(colored / "class_dict.csv", "name,r,g,b\nx,0,0,0\nb g r,250,0,90\nvoid,0,0,0\nbox,10,200,0")
    refused(colored, capsys, "class_dict.csv", "has (0, 0, 0) twice")
    put(colored / "class_dict.csv", "name,r,g,b\n7,0,0,0\nb g r,250,0,90\n1,10,200,0")
    assert prepare.main([str(colored), str(tmp_path / "2/named")]) == 0
    assert data.read_classes(tmp_path / "2/named") == ["7", "b g r", "1"]
    binary = write_plain(tmp_path / "3/in", lambda mask: (mask > 0) * np.uint8(255))
    refused(binary, capsys, "masks have 0 and 255 alone, but classes.txt has 3 classes")
    phone = write_plain(tmp_path / "4/in")
    for path in (phone / "images").iterdir():
        path.rename(path.with_suffix(".HEIC"))
    refused(phone, capsys, "save the .heic photos as JPEG")
    nothing = write_plain(tmp_path / "5/in", classes="")
    put(nothing / "labels.txt", "__ignore__")
    refused(nothing, capsys, "__ignore__")


def test_left_and_right_are_of_one_class(tmp_path, capsys):
    """Montgomery County's X-rays have a folder of masks for each lung."""
    for name, (image, mask, _) in PICTURES.items():
        put(tmp_path / f"in/CXR_png/{name}.png", image)
        for side, label in (("left", 1), ("right", 2)):
            put(tmp_path / f"in/ManualMask/{side}Mask/{name}.png", (mask == label) * np.uint8(255))
    assert prepare.main([str(tmp_path / "in"), str(tmp_path / "new")]) == 0
    (path,) = (tmp_path / "new/masks").glob("*c.png")
    mask = np.asarray(Image.open(path))
    assert (mask == (PICTURES["c"][1] > 0)).all()


def test_new_must_be_new_and_elsewhere(tmp_path, capsys):
    root = write_plain(tmp_path / "in")
    for new in (root, root / "new", tmp_path):
        assert prepare.main([str(root), str(new)]) == 2
    assert len(list(root.iterdir())) == 3
    assert prepare.main([str(tmp_path / "absent")]) == 2


def test_nothing_is_left_by_an_interruption(tmp_path, monkeypatch):
    root = write_plain(tmp_path / "in")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare.main([str(root), str(tmp_path / "new")])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_findings_are_printed_where_every_mask_is_wrong(tmp_path, capsys):
    root = write_plain(tmp_path / "in", lambda mask: np.stack([mask] * 3, 2))
    assert prepare.main([str(root)]) == 1
    printed = capsys.readouterr().out
    assert "train: " in printed and "to mend before training (6)" in printed
    assert prepare.main([str(root), str(tmp_path / "new")]) == 0
