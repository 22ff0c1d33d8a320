"""README.md and assets/*.md against the code: commands parse, flags are read and explained, links lead somewhere."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import train

PAGES = [ROOT / "README.md", *sorted((ROOT / "assets").rglob("*.md"))]
SCRIPTS = ("train", "data", "eval")


def commands(text):
    """(script, arguments) of every command in fenced blocks, and in spans of code that begin as one ("..." stands for anything)."""
    fenced = re.compile(r"^```.*?\n(.*?)^```", re.M | re.S)
    lines = "\n".join(fenced.findall(text)).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`((?:python|torchrun) [^`]*)`", fenced.sub("", text))
    for line in lines + [" ".join(span.replace("...", "").split()) for span in spans]:
        if not re.search(rf"\b({'|'.join(SCRIPTS)})\.py\b", line):
            continue  # not ours, and perhaps not even words of a shell
        words = shlex.shlex(line, posix=True, punctuation_chars=True)  # && and | are words of their own
        words.whitespace_split = True
        script, args = None, []
        for word in [*words, ";"]:
            if script and set(word) <= set(";|&<>"):
                yield script, args
                script, args = None, []
            elif script:
                args.append(word)
            elif word.split("/")[-1] in [f"{name}.py" for name in SCRIPTS]:
                script = word.split("/")[-1].removesuffix(".py")


@pytest.fixture
def parsers(monkeypatch):
    """{script: its ArgumentParser}, caught when `main` is about to parse with it."""

    class Caught(Exception):
        pass

    def parse_args(parser, *_):
        raise Caught(parser)

    def error(parser, message):
        raise ValueError(message)

    found = {}
    for script in SCRIPTS:
        with monkeypatch.context() as patch, pytest.raises(Caught) as caught:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            importlib.import_module(script).main()
        found[script] = caught.value.args[0]
    monkeypatch.setattr(argparse.ArgumentParser, "error", error)
    monkeypatch.setenv("COLUMNS", "1000")  # of --help: one line for each flag
    return found


def test_every_command_parses(parsers):
    seen = set()
    for page in PAGES:
        for script, args in commands(page.read_text()):
            try:
                train.parse_args(args) if script == "train" else parsers[script].parse_args(args)
            except ValueError as error:
                pytest.fail(f"{page.name}: {script}.py {' '.join(args)}: {error}")
            seen.add(script)
    assert seen == set(SCRIPTS)


def test_commands_are_found_wherever_they_hide():
    text = """`torchrun --nproc_per_node=8 train.py ...` and `eval.py --adapter`
```sh
A=1 .venv/bin/torchrun --standalone \\
    train.py --out x  # it's a comment
python data.py --docs a b --out c && python eval.py --bm25 | tail > log
that's no command
```
"""
    assert list(commands(text)) == [("train", ["--out", "x"]), ("data", ["--docs", "a", "b", "--out", "c"]), ("eval", ["--bm25"]), ("train", [])]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_explained(script, parsers):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    read = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    lines = {line.split()[0]: line for line in parsers[script].format_help().replace("\n" + " " * 20, " ").splitlines() if line.startswith("  --")}
    for action in parsers[script]._actions[1:]:  # but for --help
        flag = action.option_strings[0]
        assert f"args.{action.dest}" in read, f"{flag} is never read"
        assert action.help, f"{flag} has no help"
        shown = action.default not in (None, []) and action.default is not False
        assert not shown or f"(default: {action.default})" in lines[flag], f"--help lacks the default of {flag}"
        assert action.type not in (int, float) or len(action.help.split()) >= 2, f"{flag} should say what it counts, or its unit"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    """A link to a file, whose anchor is a heading, a function or a line; a link's text that is code is defined there, on that line."""
    text = page.read_text()
    links = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text) + [("", url) for url in re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)]
    for name, url in links:
        if re.match(r"https?:|mailto:", url):
            continue
        file, _, anchor = url.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), url
        if target.suffix == ".md" and anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], url
        if target.suffix == ".py":
            lines, at = target.read_text().splitlines(), re.match(r"L(\d+)", anchor)
            code = re.fullmatch(r"`(?:\w+\.)*(\w+)(?:\(\))?`", "" if name.endswith(".py`") else name)
            wanted = anchor if anchor and not at else code[1] if code else ""
            here = lines[int(at[1]) - 1 : int(at[1])] if at else lines
            assert any(re.match(rf"( *(def|class) )?{wanted}\b" if wanted else "", line) for line in here), f"{name}: {url}"
