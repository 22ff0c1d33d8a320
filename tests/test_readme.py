"""README.md and assets/*.md against the code: commands, flags, links, length."""

import ast
import re
import shlex

import numpy as np
import pytest
from conftest import ROOT

import data
import eval
import train
from data import flags_given

PAGES = [ROOT / "README.md", *sorted((ROOT / "assets").rglob("*.md"))]
SCRIPTS = {"train": train, "data": data, "eval": eval}


def commands(text):
    """(script, arguments) of our commands in fenced blocks, and in spans of code that begin as one
    ("..." stands for anything)."""
    fenced = re.compile(r"^```.*?\n(.*?)^```", re.M | re.S)
    lines = "\n".join(fenced.findall(text)).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`((?:python|torchrun) [^`]*)`", fenced.sub("", text))
    for line in lines + [" ".join(span.replace("...", "").split()) for span in spans]:
        if not re.search(rf"\b({'|'.join(SCRIPTS)})\.py\b", line):
            continue  # not ours, and perhaps not even words of a shell
        words = shlex.shlex(line, posix=True, punctuation_chars=True)  # && is a word of its own
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


def test_every_command_parses(capsys):
    seen = []
    for page in PAGES:
        for script, args in commands(page.read_text()):
            try:
                flags_given("", SCRIPTS[script].FLAGS, args)
                if script == "train":
                    train.parse_args(args)
            except (ValueError, SystemExit) as error:
                said = f"{error} {capsys.readouterr().err}"
                pytest.fail(f"{page.name}: {script}.py {' '.join(args)}: {said}")
            seen.append(script)
    assert set(seen) == set(SCRIPTS) and len(seen) > 30


def test_the_published_recipe_spelt_out_is_the_recipe():
    text = (ROOT / "assets/PUBLISHED.md").read_text()
    short, spelt = (vars(train.parse_args(args)) for _, args in list(commands(text))[:2])
    assert spelt == short | {"gradient_accumulation_steps": 4}  # 32 groups: of 8 processes
    rows = re.findall(r"^\| `(--\w+)`.*? \| (.*?) \|", text, re.M)
    ours = set(re.findall(r"--(\w+)", " ".join(column for _, column in rows)))
    assert len(rows) > 15 and ours <= train.FLAGS.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_explained(script, monkeypatch, capsys):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    loads = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and type(n.ctx) is ast.Load]
    read = {ast.unparse(node) for node in loads}
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit):
        SCRIPTS[script].main()
    shown = " ".join(capsys.readouterr().out.split())
    for name, (default, text, *_) in SCRIPTS[script].FLAGS.items():
        assert f"args.{name}" in read, f"--{name} is never read"
        if type(default) in (int, float):
            text += f" (default: {default})"
        assert len(text.split()) > 1 and text in shown, f"--{name} is not explained"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    """A link's anchor is a heading; a text that is code is defined there."""
    text = page.read_text()
    links = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text)
    for name, url in links:
        if re.match(r"https?:|mailto:", url):
            continue
        file, _, anchor = url.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), url
        if target.suffix == ".md" and anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, url
        code = re.fullmatch(r"`(?:\w+\.)*(\w+)`", name)
        if target.suffix == ".py" and code and code[1] != "py":
            assert re.search(rf"^ *((def|class) )?{code[1]}\b", target.read_text(), re.M), name


def test_the_tables_are_what_the_raw_numbers_say(monkeypatch):
    """All tables, in order, but that of checksums."""
    monkeypatch.syspath_prepend(ROOT / "assets")
    import tables

    readme, results = ((ROOT / page).read_text() for page in ("README.md", "assets/RESULTS.md"))
    sections = re.split("^## ", results, flags=re.M)
    text = "".join(section for section in sections if not section.startswith("What was run"))
    made = ["\n".join(table()) + "\n" for table in tables.TABLES]
    assert re.findall(r"(?:^\|.*\n)+", text, re.M) == made
    assert "\n".join(tables.readme()) in readme and "\n".join(tables.claims()) in results


def test_an_interval_is_over_runs_and_queries(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "assets")
    from tables import interval

    def numbers(*collections):
        return [float(x) for x in re.findall(r"[+-][\d.]+", interval(collections))]

    one, other = np.zeros((1, 400)), np.ones((1, 400))
    assert numbers((other, one)) == [1, 1, 1]  # no chance in it
    runs = np.concatenate([one, other])  # resampled means: 0, 1/2, 1 in 1, 2, 1 of 4 cases
    assert numbers((runs, one)) == [0.5, 0, 1]
    queries = np.tile([1.0, -1.0], 200)[None]  # the mean's standard deviation is 1 / 20
    assert np.allclose(numbers((queries, one)), [0, -1.96 / 20, 1.96 / 20], atol=0.005)
    # of two collections: half of either; the runs are drawn together, the queries apart
    assert numbers((runs, one), (runs, one)) == [0.5, 0, 1]
    half = 1.96 / 20 / 2**0.5
    assert np.allclose(numbers((queries, one), (queries, one)), [0, -half, half], atol=0.005)


def test_the_source_of_a_package_becomes_a_collection_and_texts_to_train_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "assets")
    import torch_study

    (tmp_path / "torch/testing").mkdir(parents=True)
    (tmp_path / "torch/testing/later.py").write_text("not Python")
    (tmp_path / "torch/module.py").write_text(SOURCE)
    (tmp_path / "torch/other.py").write_text("x = 1\n")
    monkeypatch.setattr("torch.__file__", str(tmp_path / "torch/__init__.py"))
    monkeypatch.setattr("sys.argv", ["torch_study.py", str(tmp_path / "study")])
    torch_study.main()
    corpus, queries, qrels = data.read_beir(tmp_path / "study")
    places = {docid: list(grades) for docid, grades in qrels.items()}
    assert sorted(queries.values()) == ["Add one to x, then two.", "Give back what was given."]
    found = {queries[qid]: corpus[docid] for qid, [docid] in places.items()}
    assert found["Add one to x, then two."].splitlines() == ADD and len(corpus) == 2
    assert found["Give back what was given."].splitlines()[:2] == ["@cache", "def same(self, x):"]
    docs = [row for _, row in data.read_lines(tmp_path / "study/docs.jsonl")]
    assert [row["_id"] for row in docs] == ["torch/module.py", "torch/other.py"]
    text = docs[0]["text"]
    assert not any(query in text for query in queries.values()) and "short(x)" in text
    assert text.startswith('"""What a module says of itself stays."""') and "\n".join(ADD) in text
    with pytest.raises(SystemExit):
        torch_study.main()  # nothing is overwritten


ADD = ["def add(x):", *["    x = x + 1"] * 3, "    return x"]
SOURCE = '''"""What a module says of itself stays."""

def add(x):
    """Add one
    to x, then two. And more.

    Not this."""
    x = x + 1
    x = x + 1
    x = x + 1
    return x

class A:
    @cache
    def same(self, x):
        """Give back what was given."""

        y = x  # which
        del x
        return y

    def short(x):
        """This body is much too short."""
        return x

    def says_little(x):
        """Says little."""
        x = x + 1
        x = x + 1
        x = x + 1
        return x
'''


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_bytes()) < 10_240
