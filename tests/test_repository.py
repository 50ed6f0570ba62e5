"""What the repository promises of itself: its layout, its size, and the code in its README."""

import ast
import io
import re
import shlex
import sys
import tokenize
import zipfile

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, call, write_voc
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import data
import evaluate
import models
import predict
import train
from tools import results

SCRIPTS = ("models", "data", "utils", "train", "evaluate", "predict")
SOURCES = {name: (REPOSITORY / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
PACKAGES = {"torch", "torchvision", "numpy", "PIL", "matplotlib"}
TEXTS = ["README.md", *sorted(f"docs/{p.name}" for p in (REPOSITORY / "docs").glob("*.md"))]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# How many lines of code a reader opens at most to understand a piece: its own, and those of all
# that it reaches by name. Comments, docstrings and blank lines are free.
READING = {
    "data.VOC": 155,
    "data.Shapes": 70,
    "data.augment": 60,
    "data.class_weights": 30,
    "utils.initialize": 15,
    "utils.confusion_matrix": 15,
    "utils.iou": 8,
    "utils.segment": 25,
    "models.FCN": 40,
    "models.DarrenNet": 85,
    "models.UNet": 60,
    "train.criterion": 12,
    "train.train_one_epoch": 155,
    "train.validate": 65,
    "train.main": 950,
    "evaluate.main": 720,
    "predict.main": 330,
}


def lines_of_code(source):
    """Return the numbers of a source's lines that hold code."""
    numbers = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT and token.string.strip():
            numbers.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            numbers -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return numbers


def read_pieces(sources):
    """Return ({"script.name": lines of code}, {"script.name": the names that it may reach})."""
    sizes, names = {}, {}
    for script, source in sources.items():
        code = lines_of_code(source)
        for node in ast.parse(source).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            first = min(part.lineno for part in [node, *node.decorator_list])
            piece = f"{script}.{node.name}"
            sizes[piece] = len(code & set(range(first, node.end_lineno + 1)))
            parts = [part for part in ast.walk(node) if isinstance(part, (ast.Name, ast.Attribute))]
            names[piece] = {ast.unparse(part) for part in parts}  # f, or utils.f
            names[piece] |= {f"{script}.{name}" for name in names[piece]}
    return sizes, names


def reached_from(piece, names):
    """Return the pieces that a reader of one must open, itself among them."""
    reached, left = set(), {piece}
    while left:
        reached |= left
        left = {name for each in left for name in names[each] if name in names} - reached
    return reached


@pytest.mark.parametrize("piece", READING)
def test_what_a_reader_opens_for_a_piece_stays_small(piece):
    sizes, names = read_pieces(SOURCES)
    reached = reached_from(piece, names)
    assert sum(sizes[each] for each in reached) <= READING[piece], sorted(reached)


def test_nothing_grows_beyond_what_can_be_read():
    assert sum(len(lines_of_code(source)) for source in SOURCES.values()) <= 1750
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{name}.{node.name}"
    lines = [line for source in SOURCES.values() for line in source.splitlines()]
    assert sum(len(line) > 90 for line in lines) <= len(lines) // 10
    assert len(README.splitlines()) <= 120


def test_the_scripts_are_these_six_and_need_five_packages():
    assert sorted(path.stem for path in REPOSITORY.glob("*.py")) == sorted(SCRIPTS)
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    imported = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported = {name.split(".")[0] for name in imported}
    assert imported - set(sys.stdlib_module_names) - set(SCRIPTS) == PACKAGES
    for name, tree in TREES.items():
        top = [node for node in tree.body if isinstance(node, ast.Import)]
        names = {alias.name.split(".")[0] for node in top for alias in node.names}
        assert not names & {"torchvision", "matplotlib"}  # which take seconds to import
        if name in ("models", "data", "utils"):  # each can be copied out alone
            assert not names & set(SCRIPTS)


def test_the_readmes_training_script_runs(tmp_path, monkeypatch, capsys):
    write_voc(tmp_path / "data/VOCdevkit/VOC2007", {"train": 20, "val": 2})
    script = next(code for code in BLOCKS if "augment(" in code)
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path / "data")
    exec(script.replace("range(10)", "range(2)"), {})  # noqa: S102
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and re.fullmatch(r"1 0\.\d{4} \d+\.\d%", lines[1])


def test_the_readmes_network_is_one_more_network():
    names = {"nn": nn, "MODELS": dict(models.MODELS)}
    exec(next(code for code in BLOCKS if "Tiny" in code), names)  # noqa: S102
    assert names["MODELS"].keys() == {*models.MODELS, "tiny"}  # the six are still there
    assert names["MODELS"]["tiny"](5)(torch.zeros(2, 3, 40, 33)).shape == (2, 5, 40, 33)


@pytest.fixture
def options_blocks(tmp_path):
    """The Python blocks of docs/options.md, in a folder that has the files they name."""
    for name in ("docs", "weights"):
        (tmp_path / name).symlink_to(REPOSITORY / name, target_is_directory=True)
    return re.findall(r"```python\n(.*?)```", (tmp_path / "docs/options.md").read_text(), re.DOTALL)


def test_the_shipped_network_is_used_in_a_program_as_options_says(options_blocks, capsys):
    exec(next(code for code in options_blocks if "utils.segment" in code), names := {})  # noqa: S102
    shares = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert 70 < float(shares["cat"].rstrip("%")) < 95
    pytest.importorskip("cv2")
    photo = np.array(names["photo"])
    exec(next(code for code in options_blocks if "cv2" in code), names)  # noqa: S102
    assert np.array_equal(np.array(names["photo"]), photo)


def test_masks_become_gray_pngs_in_a_zip(options_blocks, tmp_path):
    call(predict, "docs/cat.png", "docs/person.jpg", "--out", "predictions")
    exec(next(code for code in options_blocks if "zipfile" in code), {})  # noqa: S102
    with zipfile.ZipFile("labels.zip") as labels:
        assert labels.namelist() == ["cat.png", "person.png"]
        with Image.open(labels.open("person.png")) as gray:
            assert gray.mode == "L" and gray.size == Image.open("docs/person.jpg").size
            classes = np.array(gray)
    # As torchvision's readers of masks give it; 15 is person.
    theirs = pil_to_tensor(Image.open("predictions/person_mask.png"))[0].numpy()
    assert np.array_equal(classes, theirs) and (classes == 15).mean() > 0.3


def test_the_onnx_network_gives_the_same_logits_at_odd_sizes(options_blocks):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    exec(next(code for code in options_blocks if "onnx.export" in code), names := {})  # noqa: S102
    assert names["classes"].shape == (1, 224, 224) and (names["classes"] == 8).mean() > 0.7
    images = torch.randn(3, 3, 101, 75)
    (logits,) = names["session"].run(None, {"images": images.numpy()})
    with torch.inference_mode():
        expected = names["model"](images)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["README.md", "docs/options.md"])
def test_commands_can_be_typed_as_they_stand(text):
    parsers = {"train": train.read_settings, "evaluate": evaluate.parse_args}
    parsers["predict"] = predict.parse_args
    text = (REPOSITORY / text).read_text(encoding="utf-8")
    commands = re.findall(r"python (train|evaluate|predict)\.py ([^`\n]*)", text)
    commands = [each for each in commands if "..." not in each[1] and "--resume" not in each[1]]
    assert len(commands) > 5
    for script, flags in commands:
        parsers[script](shlex.split(flags))  # exits where it does not know a flag or a value


@pytest.mark.parametrize("script", [train, evaluate, predict], ids=lambda each: each.__name__)
def test_options_md_names_all_flags(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    flags = {*re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out.split("\n\n")[0])}
    text = (REPOSITORY / "docs/options.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {script.__name__}.py\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`--[^|]*) \|", section, re.MULTILINE)
    assert {*re.findall(r"--[a-z-]+", " ".join(rows))} == flags


def test_no_figure_of_the_tables_was_typed(capsys):
    results.print_tables(results.read_json(REPOSITORY / "docs/results.json"))
    printed = capsys.readouterr().out.strip().splitlines()
    text = (REPOSITORY / "docs/results.md").read_text(encoding="utf-8").splitlines()
    assert len(printed) > 10 and not {*printed} - {*text}


@pytest.mark.parametrize("text", TEXTS)
def test_links_lead_somewhere(text):
    path = REPOSITORY / text
    found = re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", path.read_text(encoding="utf-8"))
    for target, heading in found:
        if target.startswith("http"):
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        if heading:  # GitHub's names of headings: small letters, hyphens for spaces, no other signs
            prose = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
            lines = re.findall(r"^#+ (.*)", prose, re.MULTILINE)
            names = [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines]
            assert heading in names, (target, heading)


@pytest.mark.parametrize("text", TEXTS)
def test_commands_have_no_comments(text):  # zsh and cmd.exe take them for arguments
    source = (REPOSITORY / text).read_text(encoding="utf-8")
    blocks = [block for block in source.split("\n```")[1::2] if block.startswith("\n")]
    assert [block for block in blocks if "python " in block and "#" in block] == []
