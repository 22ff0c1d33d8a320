"""eval.py: measures against trec_eval's own values, exact search, runs, and the command."""

import io
import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import TEXTS, command, make_model, with_lora
from test_data import write_beir

from data import read_passages
from eval import MtebEncoder, bm25_run, dense_run, fuse, main, measure, mrr, mteb_results, ndcg, read_max_len, recall, search
from model import Llama, save_adapter
from revela import Retriever

STORED = json.loads((Path(__file__).parent / "trec_eval.json").read_text())  # made with pytrec_eval 0.5.11


@pytest.mark.parametrize("k", [5, 10, 100])
def test_ndcg_is_trec_evals(k):
    ours = ndcg(STORED["run"], STORED["qrels"], k)
    for qid, value in STORED["truth"].items():
        if max(STORED["qrels"][qid].values()) > 0:
            assert ours.pop(qid) == pytest.approx(value[f"ndcg_cut_{k}"], abs=1e-12)
    assert not ours


def test_recall_and_reciprocal_rank_are_trec_evals():
    r, m = recall(STORED["run"], STORED["qrels"], 100), mrr(STORED["run"], STORED["qrels"], 10**9)
    for qid in r:
        assert r[qid] == pytest.approx(STORED["truth"][qid]["recall_100"], abs=1e-12)
        assert m[qid] == pytest.approx(STORED["truth"][qid]["recip_rank"], abs=1e-12)


def test_measures_by_hand():
    qrels = {"q": {"a": 2, "b": 1, "x": 0, "n": -1}, "none": {"a": 0}, "missing": {"a": 1}}
    run = {"q": {"x": 4.0, "b": 3.0, "n": 2.5, "a": 1.0}, "none": {"a": 1.0}, "unjudged": {"a": 1.0}}
    ideal = 2 + 1 / math.log2(3)
    assert ndcg(run, qrels) == {"q": pytest.approx((1 / math.log2(3) + 2 / math.log2(5)) / ideal, abs=1e-15)}
    assert ndcg(run, qrels, 1) == {"q": 0} and mrr(run, qrels) == {"q": 1 / 2} and mrr(run, qrels, 1) == {"q": 0}
    assert recall(run, qrels, 3) == {"q": 1 / 2}
    # scores equal in float32 are ties: the larger id first, by bytes
    assert mrr({"q": {"a": 1.0, "é": 1.0 + 1e-9, "b": 1.0}}, {"q": {"b": 1}}) == {"q": 1 / 2}
    assert measure({"q": {}}, qrels)["ndcg@10"] == 0  # nothing found is zero, not left out


def test_processes_share_the_documents_and_find_the_same(tmp_path, tiny):
    for name, P in (("two", 2), ("many", 18)):
        ids = ["q", *(f"d{i}" for i in range(1, P))]  # one of them is the query's own
        corpus = "".join(json.dumps({"_id": docid, "text": f"{TEXTS[i]} {i}"}) + "\n" for i, docid in enumerate(ids))
        write_beir(tmp_path / name, "q\td1\t1\n", corpus)
    args = ["eval.py", "--model", tiny, "--data", tmp_path / "two", tmp_path / "many", "--top_k", 7, "--bm25"]
    one, _ = command(*args, "--out", tmp_path / "one.json", "--vectors", tmp_path / "one")
    four, _ = command(*args, "--out", tmp_path / "four.json", "--vectors", tmp_path / "four", processes=4)
    assert [row.split()[:7] for row in one.splitlines()] == [row.split()[:7] for row in four.splitlines()]
    one, four = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("one", "four"))
    assert one == four and {r["system"] for r in one} == {"dense", "bm25", "fused"}
    parts = np.concatenate([np.load(tmp_path / f"four/many.{rank}-of-4.npy") for rank in range(4)])
    np.testing.assert_allclose(parts, np.load(tmp_path / "one/many.npy"), atol=1e-6)


@pytest.mark.parametrize("chunk", [3, 7, 1000])
def test_search_is_exact(chunk):
    torch.manual_seed(0)
    q, p = torch.randn(5, 8), torch.randn(50, 8)
    scores, indices = search(q, p, 10, chunk)
    truth = (q @ p.T).sort(descending=True)
    torch.testing.assert_close(scores, truth.values[:, :10])
    assert torch.equal(indices, truth.indices[:, :10])
    assert search(q, p, 99, chunk)[1].shape == (5, 50)


def test_a_document_with_the_querys_own_id_is_not_a_result(tiny):
    corpus, queries = {"1": "the cat", "2": "a dog", "3": "my cat"}, {"1": "cat", "9": "zebra"}
    run = dense_run(Retriever.from_pretrained(tiny), corpus, queries, k=2)
    assert set(run["1"]) == {"2", "3"} and len(run["9"]) == 2
    assert bm25_run(corpus, queries) == {"1": {"3": pytest.approx(math.log(1 + 1.5 / 2.5) / 1.9, rel=1e-6)}, "9": {}}


def test_fused_scores_are_sums_of_scaled_ones():
    a, b = {"q": {"x": 3.0, "y": 2.0, "z": 1.0}, "r": {}}, {"q": {"y": 10.0, "w": 0.0}, "r": {"x": 5.0}}
    assert fuse(a, b) == {"q": {"x": 1.0, "y": 1.5, "z": 0.0, "w": 0.0}, "r": {"x": 0.0}}


def collection(folder):
    rng = random.Random(0)
    words = "the cat sees milk a dog likes sun my bird".split()
    rows = [{"_id": f"d{i}", "title": "", "text": " ".join(rng.choices(words, k=6))} for i in range(12)]
    write_beir(folder, corpus="".join(json.dumps(row) + "\n" for row in rows), qrels="q\td3\t1\nq\td5\t2\nr\td1\t1\n")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "cat milk"}\n{"_id": "r", "text": "bird"}\n')
    return folder


def test_the_command_prints_a_table_and_writes_results(tmp_path):
    base, data, out = make_model(tmp_path / "base"), collection(tmp_path / "birds"), tmp_path / "results.json"
    args = ["eval.py", "--model", base, "--bm25", "--data", data, "--device", "cpu", "--out", out]
    stdout, _ = command(*args)
    written = json.loads(out.read_text())
    assert [(r["data"], r["system"]) for r in written["results"]] == [("birds", s) for s in ("dense", "bm25", "fused")]
    assert written["config"]["model"] == str(base)
    for result, line in zip(written["results"], stdout.splitlines()[1:]):
        assert line.split()[:2] == ["birds", result["system"]] and float(line.split()[2]) == round(result["ndcg@10"], 4)
        assert result["ndcg@10"] == sum(v["ndcg@10"] for v in result["per_query"].values()) / 2
    assert len({len(line) for line in stdout.splitlines()}) == 1, "aligned"
    before = out.read_bytes()
    assert "exists already" in command(*args, code=1)[1] and out.read_bytes() == before


# ----------------------------------------------------------------------------------------------------------------------
# questions at a prompt


def write_notes(folder):
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "cats.md").write_text("The cat sees milk.\n" + "It purrs, and purrs. " * 40)
    (folder / "sub/dogs.py").write_text("# a dog likes the sun \N{DOG}\n")
    (folder / ".git/config").write_text("milk")
    (folder / "picture.png").write_bytes(b"\x89PNG milk")
    return folder


def answers(stdout):
    """[(score, source)] of each question."""
    results = [re.findall(r"^ *(-?\d+\.\d{3})  (\S+)$", block, re.M) for block in stdout.split("\n> ")[1:-1]]
    return [[(float(score), source) for score, source in block] for block in results]


@pytest.fixture
def ask(monkeypatch, capsys):
    def run(asked, *args):
        monkeypatch.setattr("sys.stdin", io.StringIO(asked))
        main([str(arg) for arg in (*args, "--device", "cpu")])
        return capsys.readouterr().out

    return run


def test_questions_about_a_folder_are_answered_with_passages_and_their_files(tiny, tmp_path, ask):
    notes, asked = write_notes(tmp_path / "notes"), "milk of a cat\nzebra\n sun\n\nnever asked\n"
    stdout, _ = command("eval.py", "--bm25", "--interactive", notes, stdin=asked)
    assert stdout.startswith("3 passages of 2 texts") and stdout.count("> ") == 4 and "zebra" not in stdout
    assert [[source for _, source in results] for results in answers(stdout)] == [["cats.md", "sub/dogs.py"], [], ["sub/dogs.py"]]
    assert "nothing found" in stdout and "  The cat sees milk. It purrs, and" in stdout and max(map(len, stdout.splitlines())) < 220

    dense = answers(ask(asked, "--model", tiny, "--interactive", notes, "--max_len", 64))
    retriever = Retriever.from_pretrained(tiny)
    passages = [passage for _, passage in read_passages(notes)]
    for question, results in zip(asked.splitlines()[:3], dense, strict=True):
        truth = retriever.encode([question.strip()], "query", max_len=64) @ retriever.encode(passages, max_len=64).T
        assert [score for score, _ in results] == pytest.approx(sorted(truth[0].tolist(), reverse=True), abs=1e-3)
    (both,) = answers(ask("milk", "--model", tiny, "--bm25", "--interactive", notes))
    assert len(both) == 3 and both[0][0] >= 1  # a sum of two that are scaled to 1


def test_vectors_are_found_again_only_for_the_same_texts_and_model(tiny, tmp_path, ask):
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"_id": "x", "title": "Cats", "text": "see milk"}\n{"text": "a dog likes the sun"}\n')
    assert read_passages(notes) == [("x", "Cats see milk"), ("2", "a dog likes the sun")]
    sources = lambda *more: [s for _, s in answers(ask("milk\n", "--interactive", notes, "--vectors", tmp_path / "v", *more))[0]]
    first = sources("--model", tiny)
    assert sorted(first) == ["2", "x"]
    (file,) = (tmp_path / "v").iterdir()
    np.save(file, -np.load(file))  # so that it shows when they are read
    assert sources("--model", tiny) == first[::-1]
    sources("--model", make_model(tmp_path / "other", seed=1))
    sources("--model", tiny, "--max_len", 99)
    notes.write_text('{"text": "a dog"}\n')
    sources("--model", tiny)
    assert len(list((tmp_path / "v").iterdir())) == 4
    notes.write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match="notes.jsonl holds no text"):
        read_passages(notes)
    notes.write_text('["a"]\n')
    with pytest.raises(ValueError, match="notes.jsonl:1: need an object"):
        read_passages(notes)


# ----------------------------------------------------------------------------------------------------------------------
# to others


def test_an_export_is_the_same_retriever_and_its_tokenizer_ends_texts_itself(tiny, tmp_path):
    save_adapter(with_lora(Llama.from_pretrained(tiny, head=False)), tmp_path / "adapter")
    texts = [*TEXTS, "", "x" * 300]
    truth = Retriever.from_pretrained(tiny, tmp_path / "adapter").encode(texts, "query", max_len=64)
    command("eval.py", "--model", tiny, "--adapter", tmp_path / "adapter", "--export", tmp_path / "out", "--max_len", 64, "--device", "cpu")
    assert read_max_len(tmp_path / "out") == 64
    config = json.loads((tmp_path / "out/config_sentence_transformers.json").read_text())
    assert config["prompts"] == {"query": "query: ", "passage": "passage: "}
    # as sentence-transformers goes on: prefix, the tokenizer's own EOS, last hidden state, unit length
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    tokenizer.enable_truncation(64)
    merged = Llama.from_pretrained(tmp_path / "out", head=False)
    for text, vector in zip(texts, truth):
        hidden = merged(torch.tensor([tokenizer.encode("query: " + text).ids]))[0, -1]
        torch.testing.assert_close(torch.nn.functional.normalize(hidden, dim=0), vector, rtol=0, atol=1e-5)


def test_mteb_calls_encode_with_batches_and_a_kind(tiny):
    retriever = Retriever.from_pretrained(tiny)
    encoder = MtebEncoder(retriever, "tiny", max_len=64)
    batches = [{"text": TEXTS[:3], "title": ["", "", ""]}, {"text": TEXTS[3:5]}]
    common = dict(task_metadata=None, hf_split="test", hf_subset="default", batch_size=32, show_progress_bar=False)
    for prompt_type, kind in (("query", "query"), ("document", "passage"), (None, "passage")):
        got = encoder.encode(iter(batches), prompt_type=prompt_type, **common)
        assert got.dtype == np.float32 and np.array_equal(got, retriever.encode(TEXTS[:5], kind, max_len=64).numpy())
    a, b = got[:2], got[2:4]
    assert np.allclose(encoder.similarity(a, b), a @ b.T) and np.allclose(encoder.similarity_pairwise(a, b), (a * b).sum(1))


def test_without_mteb_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ValueError, match="pip install 'mteb>=2'"):
        mteb_results(None, ["SciFact"])


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        main(["--plot", str(tmp_path / "curves.svg"), str(tmp_path)])


@pytest.mark.parametrize(
    "args, message",
    [
        (["--data", "x"], "nothing to do: give --data or --interactive with --model"),
        (["--model", "x"], "nothing to do: give --data or --interactive with --model"),
        (["--interactive", "x"], "nothing to do: give --data or --interactive with --model"),
        (["--data", "x", "--bm25", "--adapter", "y"], "--adapter needs the --model"),
        (["--data", "nowhere", "--bm25"], "nowhere/corpus.jsonl"),
        (["--data", "x", "--bm"], "unrecognized arguments: --bm"),
        (["--data", "x", "--model", "nowhere"], "nowhere/config.json does not exist"),
    ],
)
def test_a_wrong_command_is_one_clear_sentence(args, message):
    _, stderr = command("eval.py", *args, code=1)
    assert message in stderr and "Traceback" not in stderr
