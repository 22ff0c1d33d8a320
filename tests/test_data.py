"""data.py and the batch: tokens, groups, their order, passages, notes, collections, a toy world."""

import gzip
import json
import random
import re
import signal
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
import torch
from conftest import ROOT, TEXTS, command, edit

import data
from data import (
    Groups,
    group_by_document,
    group_by_similarity,
    group_order,
    read_beir,
    read_lines,
)
from eval import read_passages
from revela import Tokenizer, collate, pad

# --------------------------------------------------------------------------------------------------
# tokens


def real(batch, name, g, b):
    return batch[f"{name}_ids"][g, b][batch[f"{name}_mask"][g, b]].tolist()


def test_the_batch_is_what_the_design_says(tiny):
    t = Tokenizer(tiny)
    groups = [(["the cat sees me.", "a dog"], None), (["x" * 80, "my bird"], "stackoverflow")]
    batch = collate(groups, t, t, passage_max_len=30, first_half=True)
    apart = collate(groups, t, t, passage_max_len=30, apart=True)
    for g, (texts, src) in enumerate(groups):
        for b, text in enumerate(texts):
            query = t.tokenizer.encode("query: " + text).ids[:29]
            query = query if src else query[: len(query) // 2]
            passage = t.tokenizer.encode("passage: " + text).ids[:29]
            assert real(batch, "query", g, b) == query + [t.eos_id]
            assert real(batch, "passage", g, b) == passage + [t.eos_id]
            assert real(batch, "lm", g, b) == t.tokenizer.encode(text).ids[:30]
            middle = -(-len(text.split()) // 2)
            for name, half in (("query", slice(middle)), ("passage", slice(middle, None))):
                ids = t.tokenizer.encode(f"{name}: " + " ".join(text.split()[half])).ids[:29]
                assert real(apart, name, g, b) == ids + [t.eos_id]
    for name in ("query", "passage", "lm"):
        mask = batch[name + "_mask"]
        assert mask.shape[-1] == -(-int(mask.sum(-1).max()) // 8) * 8, "to the longest, no further"
        assert (batch[name + "_ids"][~mask] == t.eos_id).all()
    ids, mask = pad([[1], [2, 3, 4]], 9)
    assert ids.tolist() == [[1] + [9] * 7, [2, 3, 4] + [9] * 5] and mask.sum(1).tolist() == [1, 3]


@pytest.mark.parametrize("added", ["$A", "m $A", "$A <eos>", "m $A <eos>", "$A <eos> x", "$A x"])
def test_a_bos_is_kept_and_a_text_ends_with_one_eos_whatever_is_added(tiny, added):
    t = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    ids, tokens = t.encode("query: the cat").ids, added.replace("$A", "").split()
    t.post_processor = tokenizers.processors.TemplateProcessing(
        single=added, special_tokens=[(token, t.token_to_id(token)) for token in tokens]
    )
    t.enable_truncation(3)  # the file's own, which do not count
    t.enable_padding(length=50)
    t.save(str(tiny / "tokenizer.json"))
    ids = [t.token_to_id("m")] * added.startswith("m") + ids
    ours = Tokenizer(tiny)
    assert ours.token_ids(["query: the cat"], 99) == [ids] and ours.eos_id not in ids
    for max_len, ratio, n in ((99, 1.0, len(ids)), (99, 0.5, len(ids) // 2), (4, 1.0, 3)):
        kept = ids[:n]
        assert ours.retriever_ids(["the cat"], "query", max_len, ratio) == [kept + [ours.eos_id]]


EOS = [(None, [6, 7], 6), ({}, 5, 5), ({"eos_token": "m"}, 5, "m")]
EOS += [({"eos_token": {"content": "m"}}, 5, "m")]


@pytest.mark.parametrize("named, config, eos", EOS)
def test_where_the_eos_comes_from(tiny, named, config, eos):
    (tiny / "tokenizer_config.json").unlink()
    if named is not None:
        (tiny / "tokenizer_config.json").write_text(json.dumps(named))
    edit(tiny, eos_token_id=config)
    t = Tokenizer(tiny)
    assert t.eos_id in (eos, t.tokenizer.token_to_id(str(eos)))


# --------------------------------------------------------------------------------------------------
# groups


def test_groups_are_read_by_offset_in_both_formats(tmp_path):
    file = tmp_path / "g.jsonl"
    rows = b'["a", "b", "c"]\r\n\n{"src": "wiki", "text": ["d", "\\u00e9", "f"]}\n["g","h\xc3\xa9"]'
    file.write_bytes(b"\xef\xbb\xbf" + rows)
    groups = Groups(file, 2)
    truth = [(["a", "b"], None), (["d", "é"], "wiki"), (["g", "hé"], None)]
    assert [groups[i] for i in range(len(groups))] == truth
    assert list(tmp_path.iterdir()) == [file], "nothing is written beside it"
    same, other = tmp_path / "same.jsonl", tmp_path / "other.jsonl"
    same.write_bytes(file.read_bytes())
    other.write_bytes(file.read_bytes().replace(b"c", b"x"))
    assert Groups(same, 2).checksum == groups.checksum != Groups(other, 2).checksum
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(rows))
    with pytest.raises(ValueError, match="g.jsonl.gz: .*gunzip"):
        Groups(tmp_path / "g.jsonl.gz", 2)
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no groups"):
        Groups(file, 2)


ODD = ["\x00NUL", "half \ud83d of a pair", "line\u2028separator\x85", "a\r\nb\rc", "\ufeffmark"]
ODD += ["é" * 10**5, "<eos>", "\u200b"]


def test_odd_texts_come_back_as_they_are_and_are_tokenized(tmp_path, tiny):
    rows = [json.dumps(ODD), json.dumps({"src": None, "text": ODD[::-1]})]
    joined = "\r\n\n \r\n\ufeff".join(["", *rows]) + "\r\n"  # files with marks, one after the other
    (tmp_path / "g.jsonl").write_text(joined, newline="")
    groups, t = Groups(tmp_path / "g.jsonl", len(ODD)), Tokenizer(tiny)
    assert [groups[i] for i in range(len(groups))] == [(ODD, None), (ODD[::-1], None)]
    batch = collate([groups[0]], t, t, passage_max_len=40)
    for b, text in enumerate(ODD):
        ids = t.tokenizer.encode(text.replace("\ud83d", "?")).ids[:40]
        assert real(batch, "lm", 0, b) == ids and ids
    assert t.retriever_ids([""], "passage", 50)[0][-1] == t.eos_id


NOT_JSON = ["[1, 2", '["a", "\udcff"]', '["a", "b\x00"]', "[" * 10**5, "\ufeff"]
NOT_JSON += ['{"src": %s, "text": ["a", "b"]}' % ("9" * 5000)]
BAD_LINES = dict.fromkeys(NOT_JSON, " is not JSON in UTF-8")
BAD_LINES |= dict.fromkeys(['"text"', '{"text": "a"}', '["a", 3]'], ": need a list of texts")
BAD_LINES |= {'["a"]': ": a group of 1 passages; need 2", '["a", " "]': ": passage 2 is empty"}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "g.jsonl").write_text('["a", "b"]\n' + line, errors="surrogateescape")
    with pytest.raises(ValueError, match="g.jsonl:2" + BAD_LINES[line]):
        Groups(tmp_path / "g.jsonl", 2)


def test_the_order_is_a_function_of_seed_and_position_alone():
    n, updates, size = 10, 7, 4  # crosses epochs

    def flat(*args, **more):
        return [i for batch in group_order(n, *args, **more) for i in batch]

    whole = flat(3, 0, updates, batch_size=size)
    assert sorted(whole[:n]) == list(range(n)) == sorted(whole[n : 2 * n])
    assert whole[:n] != whole[n : 2 * n] and whole != flat(4, 0, updates, batch_size=size)
    assert flat(3, 4, updates, batch_size=size) == whole[4 * size :], "as a resumed run reads them"
    for world, accumulation, groups in ((1, 4, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1)):
        for u in range(updates):
            ranks = [flat(3, u, u + 1, r, world, accumulation, groups) for r in range(world)]
            assert sorted(sum(ranks, [])) == sorted(whole[u * size : (u + 1) * size])


# --------------------------------------------------------------------------------------------------
# documents


def test_passages_keep_every_character_and_respect_sentences():
    rng = random.Random(0)
    pieces = ["word ", "a", ". ", "B", "? ", "\n", "\n\n", ' "Q." ', "  ", "e.g. x ", "文。", "กข"]
    for _ in range(200):
        text = "".join(rng.choice(pieces) for _ in range(80))
        passages = data.split_passages(text, 12)
        assert "".join("".join(passages).split()) == "".join(text.split())
        assert all(0 < len(p.split()) <= 12 and p == p.strip() and p in text for p in passages)


PASSAGES = {
    "One two. Three four. Five.": (4, ["One two. Three four.", "Five."]),
    "a b c d e. F g.": (3, ["a b c", "d e.", "F g."]),  # too long a sentence
    "f:\n    x = 1\n\ng:\n    y = 2": (5, ["f:\n    x = 1", "g:\n    y = 2"]),
    " \n ": (5, []),
    # without spaces each character is a word
    "我喜欢猫。狗呢？它睡了！": (6, ["我喜欢猫。", "狗呢？", "它睡了！"]),
    "猫が好き。「犬も。」と言う。": (8, ["猫が好き。", "「犬も。」と言う。"]),
    "ฉันรักแมวมาก": (6, ["ฉันรัก", "แมวมาก"]),  # no full stops: by length
    "猫" * 11: (4, ["猫猫猫猫", "猫猫猫猫", "猫猫猫"]),
    "BERT模型。It works. 好。": (5, ["BERT模型。", "It works. 好。"]),
}


@pytest.mark.parametrize("text", PASSAGES)
def test_texts_are_cut_at_full_stops_and_else_by_length(text):
    max_words, passages = PASSAGES[text]
    assert data.split_passages(text, max_words) == passages


def test_no_passage_begins_with_a_mark_that_belongs_to_the_letter_before():
    for text in ("น้ำกำลังไปที่บ้าน", "ខ្មែរ ភាសាខ្មែរ"):
        for max_words in range(2, 9):
            starts = [passage[0] for passage in data.split_passages(text, max_words)]
            assert not any(unicodedata.category(start) in ("Mn", "Mc") for start in starts)


def documents(sizes):
    return [[f"{d}.{i}" for i in range(n)] for d, n in enumerate(sizes)]


@pytest.mark.parametrize("size, run", [(16, 16), (16, 4), (5, 3), (2, 1)])
def test_groups_by_document_are_runs_and_use_every_passage_once(size, run):
    docs = documents(random.Random(1).choices(range(41), k=60))
    groups = group_by_document(docs, size, run, seed=2)
    used = [p for g in groups for p in g]
    assert all(len(g) == size for g in groups) and len(set(used)) == len(used)
    assert sum(map(len, docs)) - len(used) < size
    place = {p: (d, i) for d, doc in enumerate(docs) for i, p in enumerate(doc)}
    pairs = [(place[a], place[b]) for g in groups for a, b in zip(g, g[1:])]
    starts = sum(b != (a[0], a[1] + 1) for a, b in pairs)
    assert starts <= sum(-(-len(d) // run) for d in docs), "hardly a run is cut"
    assert groups == group_by_document(docs, size, run, seed=2)
    assert groups != group_by_document(docs, size, run, seed=3)


def test_long_documents_fill_groups_alone():
    a, b, c = documents([32, 16, 7])
    assert sorted(group_by_document([a, b, c], 16, 16)) == [a[:16], a[16:], b]


def test_groups_by_similarity_are_runs_of_documents_alike():
    rng, docs = random.Random(0), []
    for topic in range(5):  # documents share words with those of their topic alone, but for one
        words = [f"t{topic}w{i}" for i in range(40)] + ["the"] * 20
        for _ in range(9):
            docs.append([" ".join(rng.choices(words, k=15)) for _ in range(rng.randrange(9))])
    docs = [list(dict.fromkeys(doc)) for doc in docs]
    place = {p: (d, i) for d, doc in enumerate(docs) for i, p in enumerate(doc)}
    groups = group_by_similarity(docs, 6, 2, seed=1, nearest=8)
    used = [p for g in groups for p in g]
    assert len(groups) > 15 and len(set(used)) == len(used)
    for group in groups:
        runs = [[place[p] for p in group[i : i + 2]] for i in (0, 2, 4)]
        assert all(b == (a[0], a[1] + 1) and a[1] % 2 == 0 for a, b in runs), "whole runs"
        assert len({run[0][0] for run in runs}) == 3, "of three documents"
        assert len({run[0][0] // 9 for run in runs}) == 1, "alike"
    assert groups == group_by_similarity(docs, 6, 2, seed=1, nearest=8)
    assert groups != group_by_similarity(docs, 6, 2, seed=2, nearest=8)
    blocks = group_by_similarity(docs, 6, 2, seed=1, block=23)
    assert 15 < len(blocks) and len({p for g in blocks for p in g}) == 6 * len(blocks)
    assert len({place[p][0] for g in blocks for p in g}) > 23, "of all blocks"
    assert group_by_similarity([[f"{i} a", f"{i} b"] for i in range(90)], 64, 1), (
        "of many documents"
    )


def test_the_command_makes_groups_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    def run(*docs, **flags):
        options = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        options = [option for option in options if option != "True"]
        monkeypatch.setattr(sys, "argv", ["data.py", "--docs", *map(str, docs), *options])
        data.main()
        return [group for _, group in read_lines(flags["out"])], capsys.readouterr().out

    docs = [" ".join(TEXTS[(i + j) % 18] for j in range(9)) + f" {i}." for i in range(20)]
    gz, out = tmp_path / "docs.jsonl.gz", tmp_path / "out.jsonl"
    gz.write_bytes(gzip.compress("".join(json.dumps({"text": d}) + "\n" for d in docs).encode()))
    groups, said = run(gz, out=out, group_size=4, max_words=9, run_length=2)
    assert f"{len(groups)} groups of 4" in said and len(groups) > 3
    alike, _ = run(
        gz, out=tmp_path / "s.jsonl", group_size=4, max_words=9, run_length=2, similar=True
    )
    assert len(alike) > 3 and {len(group) for group in alike} == {4} and alike != groups
    used = [text for group in groups for text in group]
    assert len(set(used)) == len(used) and all(len(text.split()) <= 9 for text in used)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        run(gz, out=out)
    assert out.read_bytes() == before
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    for file, flags, message in (
        ("bad.jsonl", {}, 'bad.jsonl:2: need an object with a text under "text"'),
        ("docs.jsonl.gz", {"group_size": 999}, "too few for a group of 999"),
        ("docs.jsonl.gz", {"group_size": 1}, "--group_size is 1; need"),
        ("docs.jsonl.gz", {"similar": True}, "--similar, --run_length must divide --group_size"),
        ("docs.jsonl.gz", {"similar": True, "run_length": 5}, "--run_length must divide"),
        ("docs.jsonl.gz", {"max_words": 0}, "--max_words is 0; need"),
        ("none.jsonl", {}, "none.jsonl does not exist"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            run(tmp_path / file, **{"out": tmp_path / "x.jsonl"} | flags)
    assert not list(tmp_path.glob("x.jsonl*"))
    stderr = command("data.py", "--docs", tmp_path / "bad.jsonl", "--out", "y.jsonl", code=1)[1]
    assert stderr.startswith("data.py: ") and len(stderr.splitlines()) == 1


def test_too_little_memory_is_one_line_that_says_where_help_is(monkeypatch, capsys):
    def gpu():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    codes = []
    monkeypatch.setattr("data.leave", codes.append)
    for fails in (gpu, lambda: torch.empty(2**60), lambda: np.empty(2**57)):
        data.command(fails)
        line = r"\S+: out of memory \(.*allocate .*\)\. What helps: .*\n"
        assert re.fullmatch(line, capsys.readouterr().err)
    assert codes == [1, 1, 1]


def test_a_workers_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.leave", lambda _: None)
    file = tmp_path / "groups.jsonl"
    file.write_text('["a", "b"]')
    loader = torch.utils.data.DataLoader(Groups(file, 2), num_workers=1)
    file.write_text("nonsense")
    data.command(lambda: list(loader))
    assert re.fullmatch(r"\S+: .*group 0 is not JSON in UTF-8: .*\n", capsys.readouterr().err)
    file.unlink()
    data.command(lambda: list(loader))
    assert re.fullmatch(r"\S+: .*No such file.*\n", capsys.readouterr().err)


def test_ctrl_c_prints_nothing_and_a_shell_sees_it():
    code = "import data, time; data.command(lambda: print('begun', flush=True) or time.sleep(99))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == -signal.SIGINT


# --------------------------------------------------------------------------------------------------
# notes


NOTES = {
    "a.md": ("naïve", "naïve\n".encode()),
    "b.txt": ("mark", "\ufeffmark".encode()),
    "f.py": ("x = '\ufffd'", "x = 'é'".encode("latin-1")),
    "file.md": ("linked file", b"linked file"),
    "folder/g.md": ("linked folder", b"linked folder"),
}


def test_notes_are_read_as_they_come(tmp_path, capsys):
    notes = tmp_path / "notes"
    for name in ("folder", ".git"):
        (notes / name).mkdir(parents=True)
    for name, (_, raw) in NOTES.items():
        (notes / name).write_bytes(raw)
    for name in ("file.md", "folder"):
        (notes / name).rename(tmp_path / name)
        (notes / name).symlink_to(tmp_path / name)
    (notes / "loop").symlink_to(notes)
    (tmp_path / "folder/back").symlink_to(notes)
    for name, raw in (("z.png", b"\x89PNG\0 milk\xff"), ("empty", b""), (".git/config", b"hidden")):
        (notes / name).write_bytes(raw)
    assert read_passages(notes) == [(name, text) for name, (text, _) in NOTES.items()]
    assert capsys.readouterr().out == f"{notes / 'z.png'} is no text, and left out\n"
    for name in ("a.md", "b.txt", "f.py"):  # one such file is notes, too
        assert read_passages(notes / name) == [(name, NOTES[name][0])]


def test_notes_that_are_json_lines_or_nothing(tmp_path):
    rows = b'{"_id": "x", "title": "Cats", "text": "see milk"}\n{"text": "a dog"}\n'
    (tmp_path / "n.jsonl").write_bytes(rows)
    (tmp_path / "n.jsonl.gz").write_bytes(gzip.compress(rows))
    for name in ("n.jsonl", "n.jsonl.gz"):
        assert read_passages(tmp_path / name) == [("x", "Cats see milk"), ("2", "a dog")]
    (tmp_path / "twice.jsonl").write_bytes(rows + rows)
    assert len(read_passages(tmp_path / "twice.jsonl")) == 4
    (tmp_path / "nul.txt").write_bytes(b"\xff\0")
    (tmp_path / "empty").mkdir()
    (tmp_path / "space.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "list.jsonl").write_text('["a"]\n')
    for name, message in {
        "nul.txt": "nul.txt holds no text",
        "empty": "empty holds no text",
        "space.jsonl": "space.jsonl holds no text",
        "list.jsonl": "list.jsonl:1: need an object",
        "none": "none does not exist",
    }.items():
        with pytest.raises((ValueError, OSError), match=message):
            read_passages(tmp_path / name)


# --------------------------------------------------------------------------------------------------
# collections and the toy world

CORPUS = '{"_id": "d", "title": "T", "text": "x"}\n{"_id": "e", "text": "y"}\n'


def write_beir(folder, qrels="query-id\tcorpus-id\tscore\nq\td\t1\n", corpus=CORPUS):
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_text(corpus)
    queries = '{"_id": "q", "text": "query"}\n{"_id": "r", "text": "unjudged"}\n'
    (folder / "queries.jsonl").write_text(queries)
    (folder / "qrels/test.tsv").write_text(qrels, errors="surrogateescape", newline="")
    return folder


def test_a_collection_is_read(tmp_path):
    corpus, queries, qrels = read_beir(write_beir(tmp_path, "q\td\t2\nr\td\t0\n"))
    assert corpus == {"d": "T x", "e": "y"} and queries == {"q": "query"}
    assert qrels == {"q": {"d": 2}}
    odd = '\r\n\r\n\ufeff{"_id": "a\u2028b", "title": null, "text": "\\ud800"}'
    lines = "\ufeffquery-id\tcorpus-id\tscore\r\nq\t12\t1\r\n\r\nq\ta\u2028b\t2\nq\t12\t1"
    corpus, _, qrels = read_beir(write_beir(tmp_path, lines, '{"_id": 12, "text": "x"}' + odd))
    assert corpus == {"12": "x", "a\u2028b": "\ud800"} and qrels == {"q": {"12": 1, "a\u2028b": 2}}


PLAIN, FOURTH = ["q d 2", "q e 0", "11 77 -1"], ["q {} d 2", "q {} e 0", "11 {} 77 -1"]
ZERO, Q0 = ([line.format(x) for line in FOURTH] for x in ("0", "Q0"))  # MS MARCO's, TREC's
SHAPES = [PLAIN, ["query-id corpus-id score", *PLAIN], ZERO, Q0, ["qid iter docid rel", *ZERO]]
SHAPES += [["", *PLAIN]]


@pytest.mark.parametrize("lines", SHAPES)
@pytest.mark.parametrize("separator, end", [("\t", "\n"), (" ", "\r\n"), ("   ", "\n")])
def test_judgements_in_all_their_shapes(tmp_path, lines, separator, end):
    text = "".join(line.replace(" ", separator) + end for line in lines)
    (tmp_path / "q").write_text(text, newline="")
    assert data.read_qrels(tmp_path / "q") == {"q": {"d": 2, "e": 0}, "11": {"77": -1}}


def test_what_is_judged_and_not_there_is_said_and_not_found(tmp_path, capsys):
    qrels = "q\td\t1\nq\tgone\t2\nq\te\t0\nr\td\t1\nlost\td\t1\n"
    _, queries, read = read_beir(write_beir(tmp_path, qrels))
    assert read == {"q": {"d": 1, "gone": 2, "e": 0}, "r": {"d": 1}} and set(queries) == {"q", "r"}
    said = capsys.readouterr().out
    assert "1 queries are not in queries.jsonl" in said
    assert "1 judgements of documents not in corpus.jsonl" in said
    for qrels in ("q\td\t1\na\td\t1\nb\td\t1\n", "q\td\t1\nq\tx\t1\nq\ty\t1\n", "a\td\t1\n"):
        with pytest.raises(ValueError, match="test.tsv judges mostly queries or documents"):
            read_beir(write_beir(tmp_path, qrels))


def test_collections_of_one_name_are_told_apart(tmp_path):
    a, b, c = (write_beir(tmp_path / name) for name in ("a/x", "b/x", "c"))
    write_beir(b, "q\te\t1\n")
    read = data.read_collections([a, b, c])
    assert list(read) == [str(a), str(b), "c"]
    assert [qrels["q"] for _, _, qrels in read.values()] == [{"d": 1}, {"e": 1}, {"d": 1}]


SHAPE, OBJECT = "test.tsv:2: need query-id, corpus-id", "corpus.jsonl:2: need an object with a text"
BAD_QRELS = dict.fromkeys(["q d", "q\t1\td\t1", "q\td\t1.0", "q\te\t1\tmore"], SHAPE)
BAD_QRELS |= {"q\td\t" + "9" * 400: SHAPE, "\udcff\td\t1": "test.tsv:2 is not UTF-8"}
BAD_QRELS["q\td\t2"] = "test.tsv:2: 'd' has another score for 'q' above"
BAD_ROWS = dict.fromkeys(["[]", '{"_id": "x"}', '{"_id": "x", "text": 3}'], OBJECT)
ODD = ['{"text": ""}', '{"_id": null, "text": ""}', '{"_id": true, "text": ""}']
ODD += ['{"_id": 3.0, "text": ""}', '{"_id": "x", "text": "", "title": ["T"]}']
BAD_ROWS |= dict.fromkeys(ODD, 'corpus.jsonl:2: need an "_id", and a text as "title"')
BAD_ROWS |= {'{"_id": 3, "text": ""}': "corpus.jsonl:2: id '3' occurs twice", "x": ":2 is not JSON"}


@pytest.mark.parametrize("line", [*BAD_QRELS, *BAD_ROWS], ids=lambda line: line[:20])
def test_a_bad_collection_is_named(tmp_path, line):
    if line in BAD_QRELS:
        write_beir(tmp_path, f"q\td\t1\n{line}\n")
    else:
        write_beir(tmp_path, corpus='{"_id": "3", "text": "x"}\n' + line)
    with pytest.raises(ValueError, match=(BAD_QRELS | BAD_ROWS)[line]) as caught:
        read_beir(tmp_path)
    assert str(caught.value).count(str(tmp_path)) == 1


def test_an_empty_collection_is_named(tmp_path):
    for qrels in ("", "q\td\t0\n"):
        with pytest.raises(ValueError, match="test.tsv has no relevant document"):
            read_beir(write_beir(tmp_path, qrels))
    with pytest.raises(ValueError, match="corpus.jsonl is empty"):
        read_beir(write_beir(tmp_path, corpus=""))
    with pytest.raises(ValueError, match="test.tsv:1: need query-id"):  # a number: no header
        read_beir(write_beir(tmp_path, "q\te\t1.0\nq\td\t1\n"))


def name(text):
    return re.search(r"(?!They|The )[A-Z]\w+ [A-Z]\w+", text).group()


def test_the_toy_world_is_a_function_of_its_seed_and_its_tests_are_held_out(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        data.write_toy_world(tmp_path / folder, seed, n_groups=50)
    for file in ("groups.jsonl", "corpus.jsonl", "tokenizer.json"):
        a, b, c = ((tmp_path / folder / file).read_bytes() for folder in "abc")
        assert a == b and a != c
    _, queries, qrels = read_beir(tmp_path / "a")
    assert len(queries) == 200 and all(len(grades) == 2 for grades in qrels.values())
    groups = [group for _, group in read_lines(tmp_path / "a/groups.jsonl")]
    assert all(len(group) == 16 and len({name(text) for text in group}) == 8 for group in groups)
    trained = {name(text) for group in groups for text in group}
    assert not trained & {name(text) for text in queries.values()} and len(trained) > 200
