"""data.py: the tokens of a batch, the order of the groups, passages and groups, BM25, collections, the toy world."""

import gzip
import json
import math
import os
import random
import re

import pytest
import tokenizers
from conftest import TEXTS, command, edit

import data
from data import (
    BM25, Groups, Tokenizer, collate, group_by_bm25, group_by_document, group_order, pad, parse_group, read_beir, read_lines,
    split_passages, write_toy_world,
)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# tokens


def test_the_batch_is_what_the_design_says(tiny):
    t = Tokenizer(tiny)
    ids = lambda text: t.tokenizer.encode(text).ids
    groups = [(["the cat sees me.", "a dog"], None), (["x" * 80, "my bird"], "stackoverflow")]
    batch = collate(groups, t, t, passage_max_len=30, first_half=True)
    for g, (texts, src) in enumerate(groups):
        for b, text in enumerate(texts):
            row = lambda name: batch[name + "_ids"][g, b][batch[name + "_mask"][g, b]].tolist()
            query = ids("query: " + text)[:29]
            assert row("passage") == ids("passage: " + text)[:29] + [t.eos_id]
            assert row("query") == (query if src else query[: int(len(query) * 0.5)]) + [t.eos_id]
            assert row("lm") == ids(text)[:30]
    for name in ("query", "passage", "lm"):
        mask = batch[name + "_mask"]
        assert mask.shape[-1] == -(-int(mask.sum(-1).max()) // 8) * 8, "padded to the longest row, not further"
        assert (batch[name + "_ids"][~mask] == t.eos_id).all()


def test_the_halves_of_a_passage_share_no_token_and_leave_none_out(tiny):
    t = Tokenizer(tiny)
    ids = lambda text: t.tokenizer.encode(text).ids
    assert len(ids("query:")) != len(ids("passage:"))  # the halves must meet all the same
    texts = ["the cat sees me.", "a dog", "x" * 80, "my bird"]
    batch = collate([(texts[:2], None), (texts[2:], "stackoverflow")], t, t, passage_max_len=30, second_half=True)
    for i, text in enumerate(texts):
        query, passage = (batch[f"{name}_ids"].flatten(0, 1)[i][batch[f"{name}_mask"].flatten(0, 1)[i]].tolist() for name in ("query", "passage"))
        whole, prefix = ids("query: " + text)[:29], len(ids("passage:"))
        assert query == whole[: len(whole) // 2] + [t.eos_id]
        assert passage[:prefix] == ids("passage:") and passage[-1] == t.eos_id
        assert passage[prefix:-1] == whole[max(len(query) - 1, len(ids("query:"))) :]


def test_a_bos_that_the_tokenizer_adds_is_kept(tiny):
    t = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    t.post_processor = tokenizers.processors.TemplateProcessing(single="m $A", special_tokens=[("m", t.token_to_id("m"))])
    t.enable_truncation(3)
    t.enable_padding()
    t.save(str(tiny / "tokenizer.json"))
    ours, bos = Tokenizer(tiny), t.token_to_id("m")
    assert ours.lm_ids(["the cat sees me.", "a"], 100)[0][0] == bos and len(ours.lm_ids(["the cat sees me.", "a"], 100)[1]) == 2
    assert ours.retriever_ids(["a"], "query", 100)[0][0] == bos
    assert len(ours.lm_ids(["x" * 50], 20)[0]) == 20  # the file's own truncation and padding do not count


@pytest.mark.parametrize(
    "tokenizer_config, config, eos",
    [('{"eos_token": "m"}', 5, "m"), ('{"eos_token": {"content": "m"}}', 5, "m"), ("{}", 5, 5), (None, [6, 7], 6)],
)
def test_where_the_eos_comes_from(tiny, tokenizer_config, config, eos):
    (tiny / "tokenizer_config.json").unlink()
    if tokenizer_config:
        (tiny / "tokenizer_config.json").write_text(tokenizer_config)
    edit(tiny, eos_token_id=config)
    t = Tokenizer(tiny)
    assert t.eos_id == (t.tokenizer.token_to_id(eos) if isinstance(eos, str) else eos)


def test_a_tokenizer_that_cannot_be_used_says_why(tiny):
    (tiny / "tokenizer_config.json").write_text('{"eos_token": "no such token"}')
    with pytest.raises(ValueError, match="no EOS token"):
        Tokenizer(tiny)
    (tiny / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        Tokenizer(tiny)
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist"):
        Tokenizer(tiny)


def test_strange_text_is_tokenized(tiny):
    t = Tokenizer(tiny)
    for text in ("\x00", "half a pair \ud800 of surrogates", "\r\n", "é" * 1000, "a<eos>b", ""):
        assert t.retriever_ids([text], "passage", 50)[0][-1] == t.eos_id
    ids, mask = pad([[1], [2, 3, 4]], 9)
    assert ids.tolist() == [[1] + [9] * 7, [2, 3, 4] + [9] * 5] and mask.sum(1).tolist() == [1, 3] and mask[1, :3].all()


# ----------------------------------------------------------------------------------------------------------------------
# groups


def test_groups_are_read_by_offset_in_both_formats(tmp_path):
    file = tmp_path / "g.jsonl"
    file.write_bytes(b'\xef\xbb\xbf["a", "b", "c"]\r\n\n{"src": "wiki", "text": ["d", "\\u00e9", "f"]}\n["g","h\xc3\xa9"]')
    groups = Groups(file, 2)
    assert [groups[i] for i in range(len(groups))] == [(["a", "b"], None), (["d", "é"], "wiki"), (["g", "hé"], None)]


ODD = ["\x00NUL", "half \ud83d of a pair", "line\u2028separator\x85", "a\r\nb\rc", "\ufeffmark", "é" * 10**6, "<eos>", "\u200b"]


def test_odd_texts_come_back_as_they_are_and_are_tokenized(tmp_path, tiny):
    rows = [json.dumps(ODD), json.dumps({"src": None, "text": ODD[::-1]})]
    (tmp_path / "g.jsonl").write_bytes("\r\n\n \r\n\ufeff".join(["", *rows, ""]).encode().rstrip(b"\xef\xbb\xbf"))  # files with BOMs, joined
    groups = Groups(tmp_path / "g.jsonl", len(ODD))
    assert [groups[i] for i in range(len(groups))] == [(ODD, None), (ODD[::-1], None)]
    t = Tokenizer(tiny)
    batch = collate([groups[0]], t, t, passage_max_len=40)
    for b, text in enumerate(ODD):
        ids = batch["lm_ids"][0, b][batch["lm_mask"][0, b]].tolist()
        assert ids == t.tokenizer.encode(text.replace("\ud83d", "?")).ids[:40] and len(ids) > 0


@pytest.mark.parametrize(
    "line, message",
    [
        ("[1, 2", "g.jsonl:2 is not JSON"),
        ('"text"', "g.jsonl:2: need a list of texts"),
        ('{"text": "a"}', "g.jsonl:2: need a list of texts"),
        ('["a", 3]', "g.jsonl:2: need a list of texts"),
        ('["a"]', "g.jsonl:2: a group of 1 passages; need 2"),
        ('["a", " "]', "g.jsonl:2: passage 2 is empty"),
        ('["a", "\udcff"]', "g.jsonl:2 is not JSON in UTF-8"),
        ('["a", "b\x00"]', "g.jsonl:2 is not JSON"),
        ('{"src": NaN, "text": ["a", "b"]}', "g.jsonl:2 is not JSON"),
        ('{"src": -Infinity, "text": ["a", "b"]}', "g.jsonl:2 is not JSON"),
        ('{"src": %s, "text": ["a", "b"]}' % ("9" * 5000), "g.jsonl:2 is not JSON"),
        ("[" * 10**5, "g.jsonl:2 is not JSON"),
        ('{"text":' * 10**5, "g.jsonl:2 is not JSON"),
        ("\ufeff", "g.jsonl:2 is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "g.jsonl").write_text('["a", "b"]\n' + line, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        Groups(tmp_path / "g.jsonl", 2)


def test_the_index_is_kept_until_the_file_or_the_question_changes(tmp_path, monkeypatch):
    file, read = tmp_path / "g.jsonl", lambda size=2: [groups[i][0] for groups in [Groups(file, size)] for i in range(len(groups))]
    file.write_text('["a", "b", "c"]\n["d", "e", "f"]\n')
    checked = []
    monkeypatch.setattr(data, "parse_group", lambda *args: checked.append(args[1]) or parse_group(*args))
    truth = [["a", "b"], ["d", "e"]]
    assert read() == truth and sum(".jsonl:" in where and "byte" not in where for where in checked) == 2
    checked.clear()
    assert read() == truth and all("byte" in where for where in checked)
    assert read(3) == [["a", "b", "c"], ["d", "e", "f"]]
    file.write_text('["x", "y", "z"]\n["d", "e", "f"]\n["g", "h", "i"]\n')
    assert read() == [["x", "y"], ["d", "e"], ["g", "h"]]
    for garbage in (b"", b"\x08" + bytes(7) + b"{}      ", b"x" * 500):
        (tmp_path / "g.jsonl.index.safetensors").write_bytes(garbage)
        assert read()[0] == ["x", "y"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.jsonl", "g.jsonl.index.safetensors"]
    (tmp_path / "g.jsonl.index.safetensors").unlink()
    monkeypatch.setattr(data.os, "replace", lambda *_: (tmp_path / "none").stat())  # fails, as in a read-only folder
    assert read()[0] == ["x", "y"] and [p.name for p in tmp_path.iterdir()] == ["g.jsonl"]


def test_a_gzipped_file_is_unpacked_again_whenever_it_is_another(tmp_path):
    file = tmp_path / "g.jsonl.gz"
    for i, text in enumerate(("newer", "older")):  # a file can be replaced by one with an earlier time
        file.write_bytes(gzip.compress(json.dumps([text, "b"]).encode()))
        os.utime(file, (10**9 - i, 10**9 - i))
        assert Groups(file, 2)[0] == ([text, "b"], None)
    inode = (tmp_path / "g.jsonl.gz.unpacked").stat().st_ino
    assert Groups(file, 2)[0] == (["older", "b"], None) and (tmp_path / "g.jsonl.gz.unpacked").stat().st_ino == inode
    good = gzip.compress(random.Random(0).randbytes(1000))
    for bad in (good[:-9], good[:500], good[:20] + b"\xff" * 9 + good[29:], b"no gzip", good + b"x"):
        file.write_bytes(bad)
        for read in (lambda: Groups(file, 2), lambda: list(read_lines(file))):
            with pytest.raises(ValueError, match="g.jsonl.gz(.unpacked:1)?(:1)? (cannot be (unpacked|read)|is not JSON)"):
                read()
    assert not list(tmp_path.glob("*partial"))


def test_no_groups_at_all_is_said(tmp_path):
    (tmp_path / "g.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no groups"):
        Groups(tmp_path / "g.jsonl", 2)


def test_the_order_is_a_function_of_seed_and_position_alone():
    n, updates, per_update = 10, 7, 4  # crosses epochs
    whole = [i for batch in group_order(n, 3, 0, updates, groups=per_update) for i in batch]
    assert sorted(whole[:n]) == list(range(n)) == sorted(whole[n : 2 * n]) and whole[:n] != whole[n : 2 * n]
    resumed = [i for batch in group_order(n, 3, 4, updates, groups=per_update) for i in batch]
    assert resumed == whole[4 * per_update :]
    for world, accumulation, groups in ((1, 4, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1)):
        ranks = [list(group_order(n, 3, 0, updates, r, world, accumulation, groups)) for r in range(world)]
        for u in range(updates):
            seen = [i for rank in ranks for micro in rank[u * accumulation : (u + 1) * accumulation] for i in micro]
            assert sorted(seen) == sorted(whole[u * per_update : (u + 1) * per_update])
    assert whole != [i for batch in group_order(n, 4, 0, updates, groups=per_update) for i in batch]


# ----------------------------------------------------------------------------------------------------------------------
# documents


def test_passages_keep_every_character_and_respect_sentences():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice(["word ", "a", ". ", "B", "? ", "\n", "\n\n", ' "Q." ', "  ", "e.g. x "]) for _ in range(80))
        passages = split_passages(text, 12)
        assert re.sub(r"\s", "", "".join(passages)) == re.sub(r"\s", "", text)
        assert all(0 < len(p.split()) <= 12 and p == p.strip() and p in text for p in passages)
    assert split_passages("One two. Three four. Five.", 4) == ["One two. Three four.", "Five."]
    assert split_passages("a b c d e. F g.", 3) == ["a b c", "d e.", "F g."]  # too long a sentence
    assert split_passages("def f():\n    x = 1\n\ndef g():\n    y = 2", 5) == ["def f():\n    x = 1", "def g():\n    y = 2"]
    assert split_passages(" \n ") == []


def documents(sizes):
    return [[f"{d}.{i}" for i in range(n)] for d, n in enumerate(sizes)]


@pytest.mark.parametrize("size, run", [(16, 16), (16, 4), (5, 3), (2, 1)])
def test_groups_by_document_are_runs_and_use_every_passage_once(size, run):
    docs = documents([random.Random(1).randint(0, 40) for _ in range(60)])
    groups = list(group_by_document(docs, size, run, seed=2))
    used = [p for g in groups for p in g]
    assert all(len(g) == size for g in groups) and len(set(used)) == len(used)
    assert sum(map(len, docs)) - len(used) < size
    runs = sum(a.split(".")[0] != b.split(".")[0] or int(b.split(".")[1]) != int(a.split(".")[1]) + 1 for g in groups for a, b in zip(g, g[1:]))
    assert runs + len(groups) <= sum(-(-len(d) // run) for d in docs) + len(groups), "hardly a run is cut"
    assert groups == list(group_by_document(docs, size, run, seed=2)) != list(group_by_document(docs, size, run, seed=3))


def test_long_documents_fill_groups_alone():
    groups = list(group_by_document(documents([32, 16, 7]), 16, 16))
    assert sorted(groups) == [[f"0.{i}" for i in range(16)], [f"0.{i}" for i in range(16, 32)], [f"1.{i}" for i in range(16)]]


def test_groups_by_bm25_hold_a_passage_and_its_nearest_once_each():
    docs = [[f"{topic} {topic} word{i}" for i in range(4)] for topic in ("red", "green", "blue", "black")]
    groups = list(group_by_bm25(docs, 4, seed=0))
    assert len(groups) == 4
    for group in groups:
        assert len(set(group)) == 4 and len({text.split()[0] for text in group}) == 1
    assert {text for group in groups for text in group} == {text for doc in docs for text in doc}
    assert list(group_by_bm25(docs, 17)) == []


def test_bm25_equals_its_formula():
    texts = ["The cat, the CAT!", "a dog and a cat", "", "dog dog dog", "über_x 42"]
    words = [re.findall(r"\w+", t.lower()) for t in texts]
    mean = sum(map(len, words)) / len(words)
    for query in ("the cat", "dog dog cat", "nothing", "ÜBER_x 42", ""):
        truth = []
        for doc in words:
            score = 0
            for term in re.findall(r"\w+", query.lower()):
                df = sum(term in d for d in words)
                tf = doc.count(term)
                idf = math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
                score += idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * len(doc) / mean))
            truth.append(score)
        assert BM25(texts).scores(query).tolist() == pytest.approx(truth, abs=1e-6)


def test_the_command_makes_groups_and_overwrites_nothing(tmp_path):
    docs = [{"id": i, "text": " ".join(TEXTS[(i + j) % 18] for j in range(9)) + f" {i}."} for i in range(20)]
    with gzip.open(tmp_path / "docs.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(d) + "\n" for d in docs))
    for kind in (["--group", "bm25"], ["--run_length", "2"]):
        out = tmp_path / f"{kind[1]}.jsonl"
        args = ["data.py", "--docs", tmp_path / "docs.jsonl.gz", "--out", out, "--group_size", "4", "--max_words", "9", *kind]
        stdout, _ = command(*args)
        groups = [group for _, group in read_lines(out)]
        assert f"{len(groups)} groups of 4" in stdout and all(len(set(g)) == 4 for g in groups) and len(groups) > 3
        before = out.read_bytes()
        assert "exists already" in command(*args, code=1)[1] and out.read_bytes() == before
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    args = ["data.py", "--out", tmp_path / "x.jsonl", "--docs"]
    assert 'bad.jsonl:2: need an object with a text under "text"' in command(*args, tmp_path / "bad.jsonl", code=1)[1]
    assert "too few for one group" in command(*args, tmp_path / "docs.jsonl.gz", "--group_size", "999", code=1)[1]
    assert "No such file" in command(*args, tmp_path / "none.jsonl", code=1)[1]
    assert not list(tmp_path.glob("x.jsonl*"))
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*ODD, "twice twice"]))
    command(*args, tmp_path / "odd.jsonl", "--group_size", "2", "--max_words", "1")
    texts = [text for _, group in read_lines(tmp_path / "x.jsonl") for text in group]
    words = {"twice"} | {word for text in ODD for word in text.replace("\ud83d", "?").split()}
    assert set(texts) <= words and len(set(texts)) == len(texts) == len(words) // 2 * 2 and max(map(len, texts)) == 10**6


# ----------------------------------------------------------------------------------------------------------------------
# collections and the toy world


def write_beir(folder, qrels="query-id\tcorpus-id\tscore\nq\td\t1\n", corpus='{"_id": "d", "title": "T", "text": "x"}\n'):
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_text(corpus)
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "query"}\n{"_id": "r", "text": "unjudged"}\n')
    (folder / "qrels/test.tsv").write_text(qrels, errors="surrogateescape")
    return folder


def test_a_collection_is_read(tmp_path):
    corpus, queries, qrels = read_beir(write_beir(tmp_path, qrels="q\td\t2\nr\td\t0\n"))
    assert corpus == {"d": "T x"} and queries == {"q": "query"} and qrels == {"q": {"d": 2}}


def test_a_collection_with_numbers_for_ids_and_odd_line_ends_is_read(tmp_path):
    write_beir(tmp_path, corpus='{"_id": 12, "text": "x"}\r\n\r\n\ufeff{"_id": "a\u2028b", "title": null, "text": "\\ud800"}')
    (tmp_path / "qrels/test.tsv").write_bytes("\ufeffquery-id\tcorpus-id\tscore\r\nq\t12\t1\r\n\r\nq\ta\u2028b\t2\nq\t12\t1\tmore".encode())
    corpus, queries, qrels = read_beir(tmp_path)
    assert corpus == {"12": "x", "a\u2028b": "\ud800"} and qrels == {"q": {"12": 1, "a\u2028b": 2}}


@pytest.mark.parametrize(
    "files, message",
    [
        (dict(qrels="q\tnone\t1\n"), "test.tsv:1: 'none' is not in corpus.jsonl"),
        (dict(qrels="query-id\tcorpus-id\tscore\nz\td\t1\n"), "test.tsv:2: 'z' is not in queries.jsonl"),
        (dict(qrels="q d 1\n"), "test.tsv:1: need query-id, corpus-id and a whole score"),
        (dict(qrels="q\td\t0\n"), "no relevant document"),
        (dict(corpus=""), "corpus.jsonl is empty"),
        (dict(corpus='{"_id": "d", "text": "x"}\n{"_id": "d", "text": "y"}\n'), "corpus.jsonl:2: id 'd' occurs twice"),
        (dict(corpus='{"_id": 3, "text": "x"}\n{"_id": "3", "text": "y"}\n'), "corpus.jsonl:2: id '3' occurs twice"),
        (dict(corpus='{"_id": true, "text": "x"}\n'), 'corpus.jsonl:1: need an object with texts "_id" and "text"'),
        (dict(corpus='{"_id": "d", "text": "x", "title": ["T"]}\n'), "corpus.jsonl:1: need an object"),
        (dict(corpus='{"_id": "d"}\n'), "corpus.jsonl:1: need an object"),
        (dict(corpus='["d", "x"]\n'), "corpus.jsonl:1: need an object"),
        (dict(qrels="q\td\t1\nq\td\t2\n"), "test.tsv:2: 'd' has another score for 'q' above"),
        (dict(qrels="q\td\t1.0\n"), "test.tsv:1: need query-id, corpus-id and a whole score"),
        (dict(qrels="q\td\t" + "9" * 400), "test.tsv:1: need query-id, corpus-id and a whole score"),
        (dict(qrels="q\td\t1\n\udcff\td\t1\n"), "test.tsv:2: need query-id, corpus-id and a whole score"),
        (dict(corpus='{"_id": 3.0, "text": "x"}\n'), 'corpus.jsonl:1: need an object with texts "_id" and "text"'),
        (dict(corpus="nonsense\n"), "corpus.jsonl:1 is not JSON"),
    ],
)
def test_a_bad_collection_is_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_beir(write_beir(tmp_path, **files))
    assert str(caught.value).count(str(tmp_path)) == 1


def test_the_toy_world_is_a_function_of_its_seed_and_its_tests_are_held_out(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_toy_world(tmp_path / name, seed, n_groups=50)
    for file in ("groups.jsonl", "corpus.jsonl", "model.safetensors", "tokenizer.json"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b and a != c
    corpus, queries, qrels = read_beir(tmp_path / "a")
    assert len(queries) == 200 and all(len(grades) == 2 for grades in qrels.values())
    name = lambda text: re.search(r"([A-Z]\w+) ([A-Z]\w+)", text.replace("They", "they").replace("The ", "the ")).group()
    trained = {name(text) for _, group in read_lines(tmp_path / "a/groups.jsonl") for text in group}
    assert not trained & {name(text) for text in queries.values()} and len(trained) > 200
    for _, group in read_lines(tmp_path / "a/groups.jsonl"):
        assert len(group) == 16 and len({name(text) for text in group}) == 8
    assert Tokenizer(tmp_path / "a").eos_id == 0
