"""What the repository promises of itself: its layout, its size, and the code in its README."""

import ast
import importlib.util
import io
import re
import sys
import tokenize

import pytest
import torch
from conftest import REPOSITORY, write_voc

import data

SCRIPTS = ("train", "evaluate", "predict", "models", "data", "utils")
PACKAGES = {"torch", "torchvision", "numpy", "PIL", "matplotlib"}
TEXTS = ["README.md", *sorted(f"docs/{p.name}" for p in (REPOSITORY / "docs").glob("*.md"))]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
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
}


def lines_of_code(source):
    """Return the numbers of a source's lines that hold code."""
    numbers = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT and token.string.strip():
            numbers.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            numbers.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
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


def test_a_piece_is_read_with_all_that_it_reaches():
    one = (
        'def first():\n    """A docstring."""\n\n    # a comment\n    x = [\n        1,\n    ]\n'
        "    return second(x)\n\n\n@cache\ndef second(x):\n    return two.third(x) + first()\n"
        "\n\ndef other():\n    return 1\n"
    )
    two = 'def third(x):\n    return f"""\n    {x}"""\n'
    sizes, names = read_pieces({"one": one, "two": two})
    assert sizes == {"one.first": 5, "one.second": 3, "one.other": 2, "two.third": 3}
    assert reached_from("one.first", names) == {"one.first", "one.second", "two.third"}
    assert reached_from("two.third", names) == {"two.third"}


@pytest.mark.parametrize("piece", READING)
def test_what_a_reader_opens_for_a_piece_stays_small(piece):
    sources = {name: (REPOSITORY / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS}
    sizes, names = read_pieces(sources)
    reached = reached_from(piece, names)
    assert sum(sizes[each] for each in reached) <= READING[piece], sorted(reached)


def test_the_scripts_are_these_six_and_need_five_packages():
    assert sorted(path.stem for path in REPOSITORY.glob("*.py")) == sorted(SCRIPTS)
    imported = set()
    for name in SCRIPTS:
        for node in ast.walk(ast.parse((REPOSITORY / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) - set(SCRIPTS) == PACKAGES
    for name in ("models", "data", "utils"):  # each can be copied out alone
        tree = ast.parse((REPOSITORY / f"{name}.py").read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import)]
        assert not {alias.name for node in top for alias in node.names} & set(SCRIPTS)


def test_nothing_grows_beyond_what_can_be_read():
    lengths = {}
    for name in SCRIPTS:
        source = (REPOSITORY / f"{name}.py").read_text(encoding="utf-8")
        lengths[name] = len(source.splitlines())
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{name}.{node.name}"
    contributing = (REPOSITORY / "docs" / "contributing.md").read_text(encoding="utf-8")
    said = re.search(
        r"six scripts ([\d,]+) lines together, train.py 501, README.md 150", contributing
    )
    assert lengths["train"] <= 501 and sum(lengths.values()) <= int(said[1].replace(",", ""))
    assert len(README.splitlines()) <= 150


def test_the_readmes_training_script_runs_with_copied_files(tmp_path, monkeypatch, capsys):
    write_voc(tmp_path / "data/VOCdevkit/VOC2007", {"train": 20, "val": 2})
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = next(code for code in blocks if "augment(" in code)
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path / "data")
    exec(script.replace("range(10)", "range(2)"), {})  # noqa: S102
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and re.fullmatch(r"1 0\.\d{4} \d+\.\d%", lines[1])


def test_the_readmes_network_is_a_network():
    from torch import nn

    source = next(
        code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Tiny" in code
    )
    names = {"nn": nn}
    exec(source, names)  # noqa: S102
    assert names["MODELS"]["tiny"](5)(torch.zeros(2, 3, 40, 33)).shape == (2, 5, 40, 33)


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


def test_an_older_python_is_told_in_one_line(monkeypatch):
    spec = importlib.util.spec_from_file_location("utils_again", REPOSITORY / "utils.py")
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(SystemExit, match="Python 3.10 or newer is needed"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
