"""What the repository promises of itself: its layout, its size, and the code in its README."""

import ast
import importlib.util
import re
import sys

import pytest
import torch
from conftest import REPOSITORY, write_voc

SCRIPTS = ("train", "evaluate", "predict", "models", "data", "utils")
PACKAGES = {"torch", "torchvision", "numpy", "PIL", "matplotlib"}
TEXTS = ["README.md", *sorted(f"docs/{p.name}" for p in (REPOSITORY / "docs").glob("*.md"))]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


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
        r"six scripts ([\d,]+) lines together, train.py 500, README.md 150", contributing
    )
    assert lengths["train"] <= 500 and sum(lengths.values()) <= int(said[1].replace(",", ""))
    assert len(README.splitlines()) <= 150


def test_the_readmes_training_script_runs_with_copied_files(tmp_path, monkeypatch, capsys):
    write_voc(tmp_path / "data/VOCdevkit/VOC2007", {"train": 20, "val": 2})
    script = next(
        code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "VOC(" in code
    )
    monkeypatch.chdir(tmp_path)
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
