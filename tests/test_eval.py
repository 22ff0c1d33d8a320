"""eval.py: measures against trec_eval's own values, exact search, BM25, runs, and the command."""

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
from conftest import ROOT, TEXTS, command, edit, make_model, save_retriever, with_lora
from safetensors.torch import load_file
from test_data import write_beir

import eval
from eval import (
    BM25,
    bm25_run,
    dense_run,
    fuse,
    main,
    measure,
    mrr,
    ndcg,
    read_passages,
    recall,
)
from model import Llama, merge_lora, save_adapter, save_model
from revela import POOLING, Retriever, save_pooling

# --------------------------------------------------------------------------------------------------
# measures, search, runs


def test_measures_are_trec_evals():
    stored = json.loads((Path(__file__).parent / "trec_eval.json").read_text())
    run, qrels, truth = (stored[name] for name in ("run", "qrels", "truth"))  # pytrec_eval 0.5.11's
    ours = {f"ndcg_cut_{k}": ndcg(run, qrels, k) for k in (5, 10, 100)}
    ours |= {"recall_100": recall(run, qrels, 100), "recip_rank": mrr(run, qrels, 10**9)}
    relevant = {qid for qid in truth if max(qrels[qid].values()) > 0}
    for name, values in ours.items():
        assert values == pytest.approx({q: truth[q][name] for q in relevant}, abs=1e-12), name


def test_measures_by_hand():
    qrels = {"q": {"a": 2, "b": 1, "x": 0, "n": -1}, "none": {"a": 0}, "missing": {"a": 1}}
    found = {"x": 4.0, "b": 3.0, "n": 2.5, "a": 1.0}
    run = {"q": found, "none": {"a": 1.0}, "unjudged": {"a": 1.0}}
    ideal = 2 + 1 / math.log2(3)
    assert ndcg(run, qrels) == {"q": pytest.approx((1 / math.log2(3) + 2 / math.log2(5)) / ideal)}
    assert ndcg(run, qrels, 1) == {"q": 0} and mrr(run, qrels) == {"q": 1 / 2}
    assert mrr(run, qrels, 1) == {"q": 0} and recall(run, qrels, 3) == {"q": 1 / 2}
    # scores equal in float32 are ties: the larger id first, by bytes
    assert mrr({"q": {"a": 1.0, "é": 1.0 + 1e-9, "b": 1.0}}, {"q": {"b": 1}}) == {"q": 1 / 2}
    assert measure({"q": {}}, qrels)["ndcg@10"] == 0  # nothing found is zero, not left out


@pytest.mark.parametrize("chunk", [3, 7, 1000])
def test_search_is_exact(chunk):
    torch.manual_seed(0)
    q, p = torch.randn(5, 8), torch.randn(50, 8)
    scores, indices = eval.search(q, p, 10, chunk)
    truth = (q @ p.T).sort(descending=True)
    torch.testing.assert_close(scores, truth.values[:, :10])
    assert torch.equal(indices, truth.indices[:, :10])
    assert eval.search(q, p, 99, chunk)[1].shape == (5, 50)


def test_bm25_equals_its_formula():
    texts = ["The cat, the CAT!", "a dog and a cat", "", "dog dog dog", "über_x 42", "猫が好き cat"]
    words = [re.findall(r"[猫が好き]|[^\W猫が好き]+", text.lower()) for text in texts]
    mean = sum(map(len, words)) / len(words)
    for query in ("the cat", "dog dog cat", "nothing", "ÜBER_x 42", "", "好きな猫"):
        truth = []
        for doc in words:
            score = 0
            for term in BM25(texts).words(query):
                df, tf = sum(term in d for d in words), doc.count(term)
                idf = math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
                score += idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * len(doc) / mean))
            truth.append(score)
        assert BM25(texts).scores(query).tolist() == pytest.approx(truth, abs=1e-6)


def test_bm25_in_english_has_no_stop_words_and_no_endings(tmp_path):
    texts = ["The relations of cities", "A relational city", "it was going well", "ring", "was"]
    index = BM25(texts, english=True)
    assert [index.words(text) for text in texts[:4]] == [
        ["rel", "cit"], ["relational", "cit"], ["going", "well"], ["ring"],
    ]  # fmt: skip
    assert index.scores("A CITY is").nonzero()[0].tolist() == [0, 1]
    assert not index.scores("was the").any() and BM25(texts).scores("was").any()
    write_beir(tmp_path, corpus='{"_id": "d", "text": "queries"}\n{"_id": "e", "text": "y"}\n')
    for flags, found in (([], 0.0), (["--english"], 1.0)):
        out = tmp_path / f"{found}.json"
        main(["--bm25", *flags, "--data", str(tmp_path), "--out", str(out)])
        assert json.loads(out.read_text())["results"][0]["ndcg@10"] == found


def test_bm25_cuts_the_names_of_code(tmp_path):
    text = "def load_StateDict(HTTPError, x2): __init__"
    names = ["load", "state", "dict", "httperror", "x2", "init"]
    assert BM25(["x"], identifiers=True).words(text) == ["def", *names]
    assert "load_statedict" in BM25(["x"]).words(text)
    write_beir(tmp_path, corpus='{"_id": "d", "text": "myQueries"}\n{"_id": "e", "text": "y"}\n')
    for flags, found in (([], 0.0), (["--identifiers"], 1.0)):
        out = tmp_path / f"{found}.json"
        main(["--bm25", "--english", *flags, "--data", str(tmp_path), "--out", str(out)])
        assert json.loads(out.read_text())["results"][0]["ndcg@10"] == found


def test_bm25_leaves_marks_with_their_letters():
    texts = ["हिन्दी की किताब", "बच्चे के लिए", "x\u0301 un café", "مُحَمَّد x", "བོད་ ꯃꯤꯇꯩ"]
    words = [BM25(["x"]).words(text) for text in texts]
    assert words == [text.replace("་", "").split() for text in texts]
    assert BM25(["x"]).words("cafe\u0301") == ["café"]
    assert BM25(texts).scores("के").nonzero()[0].tolist() == [1]


@pytest.mark.parametrize(
    "words", ["我喜欢猫 狗睡了 猫", "猫が好き 犬は寝た 猫", "ฉันรักแมว หมานอน แมว"]
)
def test_bm25_finds_words_in_texts_without_spaces(words):
    a, b, question = words.split()
    run = bm25_run(({"a": f"x{a}。", "b": b}, {"q": question}, {"q": {}}), BM25([f"x{a}。", b]))
    assert list(run["q"])[0] == "a" and BM25([a]).words(f"x{a}y")[:: len(a) + 1] == ["x", "y"]


def test_the_query_itself_is_no_result_but_what_only_has_its_number_is(tiny):
    corpus = {"1": "the cat", "2": "T the cat", "3": "the bird", "4": "the cat"}
    corpus["5"] = "they all saw the cat"
    queries = dict.fromkeys("1245x", "the cat") | {"3": "the cow"}
    qrels = {"1": {"5": 1}, "2": {"2": 0}, "3": {"5": 1}, "4": {"4": 1}, "5": {}, "x": {"1": 1}}
    left_out = dict.fromkeys("345x", set()) | {"1": {"1"}, "2": {"2"}}
    collection, retriever = (corpus, queries, qrels), Retriever.from_pretrained(tiny)
    index = BM25(collection[0].values())
    for run in (dense_run(retriever, collection, 5), bm25_run(collection, index, 5)):
        assert {qid: set(corpus) - set(found) for qid, found in run.items()} == left_out
    for run in (dense_run(retriever, collection, 4), bm25_run(collection, index, 4)):
        assert {len(found) for found in run.values()} == {4}, "another takes its place"


def test_fused_scores_are_sums_of_scaled_ones():
    a = {"q": {"x": 3.0, "y": 2.0, "z": 1.0}, "r": {}, "s": {"x": 1.0, "y": 0.5}}
    b = {"q": {"y": 10.0, "w": 0.0}, "r": {"x": 5.0}, "s": {"y": 2.0, "z": 2.0}}
    fused = fuse(a, b)
    assert fused["q"] == {"x": 1.0, "y": 1.5, "z": 0.0, "w": 0.0}
    assert fused["r"] == {"x": 1.0}, "one hit counts"
    assert fused["s"] == {"x": 1.0, "y": 1.0, "z": 1.0}, "equal scores count"


# --------------------------------------------------------------------------------------------------
# the command


def run_main(*args):
    main([str(arg) for arg in (*args, "--device", "cpu")])


def test_processes_share_the_documents_and_find_the_same(tmp_path, tiny, capsys):
    for name, P in (("two", 2), ("many", 130)):
        ids = ["q", *(f"d{i}" for i in range(1, P))]
        rows = [{"_id": d, "text": f"{TEXTS[i % 18]} {i}"} for i, d in enumerate(ids)]
        corpus = "".join(json.dumps(row) + "\n" for row in rows)
        write_beir(tmp_path / name, "q\td1\t1\n", corpus)
    args = "--model", tiny, "--data", tmp_path / "two", tmp_path / "many", "--top_k", 100, "--bm25"
    outs = [("--out", tmp_path / f"{n}.json", "--vectors", tmp_path / n) for n in ("one", "four")]
    run_main(*args, *outs[0])
    printed = capsys.readouterr().out, command("eval.py", *args, *outs[1], processes=4)[0]
    one, four = ([row.split()[:7] for row in table.splitlines()] for table in printed)
    assert one == four
    one, four = (json.loads(out[1].read_text())["results"] for out in outs)
    assert one == four
    parts = [np.load(tmp_path / f"four/many.{rank}-of-4.npy") for rank in range(4)]
    whole = np.load(tmp_path / "one/many.npy")
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)


def collection(folder):
    rng, words = random.Random(0), "the cat sees milk a dog likes sun my bird".split()
    rows = [{"_id": f"d{i}", "text": " ".join(rng.choices(words, k=6))} for i in range(12)]
    corpus = "".join(json.dumps(row) + "\n" for row in rows)
    write_beir(folder, "q\td3\t1\nq\td5\t2\nr\td1\t1\n", corpus)
    queries = '{"_id": "q", "text": "cat milk"}\n{"_id": "r", "text": "bird"}\n'
    (folder / "queries.jsonl").write_text(queries)
    return folder


SYSTEMS = ["dense", "bm25", "fused"]


def test_the_command_prints_a_table_and_writes_results(tiny, tmp_path, capsys):
    args = ["--model", tiny, "--bm25", "--out", tmp_path / "r.json"]
    folders = [collection(tmp_path / "a/birds"), collection(tmp_path / "b/birds")]
    run_main(*args, "--data", *folders, "--vectors", tmp_path / "v")
    written, out = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out
    rows = [(result["data"], result["system"]) for result in written["results"]]
    assert rows == [(str(folder), system) for folder in folders for system in SYSTEMS]
    assert written["config"]["model"] == str(tiny) and len(list((tmp_path / "v").iterdir())) == 2
    for result, line in zip(written["results"], out.splitlines()[1:], strict=True):
        assert line.split()[:2] == [result["data"], result["system"]]
        assert float(line.split()[2]) == round(result["ndcg@10"], 4)
        each = [values["ndcg@10"] for values in result["per_query"].values()]
        assert result["ndcg@10"] == sum(each) / 2
    before = (tmp_path / "r.json").read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        run_main(*args, "--data", *folders)
    assert (tmp_path / "r.json").read_bytes() == before


def test_results_are_written_as_they_come(tiny, tmp_path, monkeypatch):
    data, out = [collection(tmp_path / name) for name in "ab"], tmp_path / "r.json"
    search_again = eval.bm25_run

    def fails(*args, **options):
        if out.exists() and len(json.loads(out.read_text())["results"]) > 3:
            raise OSError("no space left")
        return search_again(*args)

    monkeypatch.setattr(eval, "bm25_run", fails)
    with pytest.raises(OSError, match="no space left"):
        run_main("--bm25", "--model", tiny, "--out", out, "--data", *data)
    kept = [(r["data"], r["system"]) for r in json.loads(out.read_text())["results"]]
    assert kept == [*(("a", system) for system in SYSTEMS), ("b", "dense")]


WRONG = {
    "--data x": "nothing to do: give --data or --interactive with --model",
    "--model x": "nothing to do",
    "--interactive x": "nothing to do",
    "--data x --bm25 --adapter y": "--adapter needs the --model",
    "--bm25 --data birds nowhere": "nowhere/corpus.jsonl does not exist",
    "--bm25 --data birds bad": "queries.jsonl:2 is not JSON",
    "--bm25 --data birds --split dev": "qrels/dev.tsv does not exist",
    "--bm25 --data birds --out .": ". exists already",
    "--bm25 --data birds --top_k -1": "--top_k is -1; need",
    "--bm25 --data birds --top_k 10": "--top_k is 10; need",
    "--bm25 --data birds --top_k x": "argument --top_k: invalid int value: 'x'",
    "--bm25 --data birds --device gpu": "--device gpu is not there; here are: .*cpu",
    "--bm25 --data birds --device cuda": "--device cuda is not there",
    "--bm25 --data birds --device cpu:x": "--device cpu:x is not there: Invalid device string",
    "--bm --data birds": "unrecognized arguments: --bm",
    "--model nowhere --data birds": "nowhere/config.json does not exist",
    "--model tiny --export tiny": "tiny exists already",
    "--model tiny --data birds --max_len -1": "--max_len is -1; need",
    "--model tiny --data birds --max_len 1": "--max_len is 1; need",
    "--model tiny --data birds --batch_tokens -1": "--batch_tokens is -1; need",
    "--model tiny --data other birds --vectors kept": "kept/birds.npy exists already",
}


@pytest.mark.parametrize("args", WRONG)
def test_a_wrong_command_is_refused_before_anything_is_encoded(
    tiny, tmp_path, monkeypatch, capsys, args
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Retriever, "encode", lambda *_, **__: pytest.fail("encodes"))
    for name in ("birds", "other", "bad"):
        collection(Path(name))
    Path("bad/queries.jsonl").write_text('{"_id": "q", "text": "cat"}\nnonsense\n')
    Path("kept").mkdir()
    Path("kept/birds.npy").touch()
    with pytest.raises((ValueError, OSError, SystemExit)) as caught:
        main(args.split())
    said = capsys.readouterr()
    text = said.err if caught.type is SystemExit else str(caught.value)
    assert re.search(WRONG[args], text) and said.out == ""


def test_a_refusal_is_one_line(tmp_path):
    stderr = command("eval.py", "--bm25", "--data", tmp_path / "nowhere", code=1)[1]
    assert stderr.startswith("eval.py: ") and len(stderr.splitlines()) == 1


@pytest.mark.parametrize("lora", [True, False])
def test_what_training_wrote_given_as_model_says_which_flag_it_belongs_to(tiny, tmp_path, lora):
    llama, folder = Llama.from_pretrained(tiny, head=False), tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"model": "m", "data": "g.jsonl"}')  # all arguments
    if lora:
        save_adapter(with_lora(llama), folder / "retriever")
        use = f"--adapter {folder}/retriever"
    else:
        save_model(llama, folder / "retriever")
        use = f"--model {folder}/retriever"
    for path in (folder, folder / "retriever")[: 1 + lora]:
        with pytest.raises(ValueError, match=use):
            Retriever.from_pretrained(path)


# --------------------------------------------------------------------------------------------------
# questions at a prompt


@pytest.fixture
def ask(monkeypatch):
    """Asks questions; returns what is printed, and [(score, source)] of the answers to each."""

    def run(asked, *args):
        terminal = io.TextIOWrapper(io.BytesIO(), "ascii")  # lacks most characters
        typed = io.BytesIO(asked.encode("utf-8", "surrogateescape"))
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, "utf-8"))
        monkeypatch.setattr("sys.stdout", terminal)
        run_main(*args)
        terminal.flush()
        out = terminal.buffer.getvalue().decode("ascii")
        blocks = [re.findall(r"^ *(-?\d+\.\d{3})  (\S+)$", b, re.M) for b in out.split("\n> ")[1:]]
        return out, [[(float(score), source) for score, source in block] for block in blocks]

    return run


def test_questions_about_notes_are_answered_with_passages_and_their_files(tiny, tmp_path, ask):
    (notes := tmp_path / "notes").mkdir()
    purrs = "It purrs, and purrs. " * 40
    (notes / "cats.md").write_text(f"The cat sees milk.\n{purrs}Part E4711.")
    (notes / "dogs.py").write_text("# a dog likes the sun \N{DOG}\n")
    (notes / "zh.txt").write_text("猫" * 99 + "\n" + "狗" * 99)
    asked = "milk of a cat\nzebra \udce9\n sun\n狗\n\nnever asked\n"
    out, answers = ask(asked, "--bm25", "--interactive", notes)
    sources = [[source for _, source in answer] for answer in answers]
    assert sources == [["cats.md", "dogs.py"], [], ["dogs.py"], ["zh.txt"], []]
    assert out.startswith("5 passages of 3 texts; ") and out.count("nothing found") == 1
    assert "  The cat sees milk. It purrs, and" in out and max(map(len, out.splitlines())) < 220
    assert "  " + "?" * 99 in out, "shortened by characters, not left out"

    _, dense = ask(asked, "--model", tiny, "--interactive", notes, "--max_len", 64)
    retriever = Retriever.from_pretrained(tiny)
    vectors = retriever.encode([passage for _, passage in read_passages(notes)], max_len=64)
    for question, answer in zip(asked.replace("\udce9", "\ufffd").splitlines()[:4], dense):
        truth = (retriever.encode([question.strip()], "query", max_len=64) @ vectors.T)[0]
        best = truth.sort(descending=True).values[:5].tolist()
        assert [score for score, _ in answer] == pytest.approx(best, abs=1e-3)
    _, ((first, *_), *_) = ask("E4711\n", "--model", tiny, "--bm25", "--interactive", notes)
    assert first[1] == "cats.md" and first[0] >= 1, "what one passage alone has is found"
    _, answers = ask("sun\n", "--bm25", "--interactive", notes / "dogs.py")
    assert [source for _, source in answers[0]] == ["dogs.py"]


def test_vectors_are_found_again_only_for_the_same_texts_and_model(tiny, tmp_path, ask):
    notes, kept = tmp_path / "notes.jsonl", tmp_path / "v"
    notes.write_text('{"_id": "x", "text": "Cats see milk"}\n{"text": "a dog likes the sun"}\n')

    def sources(*more):
        _, (answer, *_) = ask("milk\n", "--interactive", notes, "--vectors", kept, *more)
        return [source for _, source in answer]

    once = sources("--model", tiny)
    assert sorted(once) == ["2", "x"]
    (file,) = kept.iterdir()
    np.save(file, -np.load(file))  # so that it shows when they are read
    assert sources("--model", tiny) == once[::-1]
    sources("--model", make_model(tmp_path / "other", seed=1))
    sources("--model", tiny, "--max_len", 99)
    notes.write_text('{"text": "a dog"}\n')
    sources("--model", tiny)
    assert len(list(kept.iterdir())) == 4


# --------------------------------------------------------------------------------------------------
# to others


@pytest.mark.parametrize("pooling", ["eos", "mean"])
@pytest.mark.parametrize("added", ["$A", "m $A <eos>"])
def test_an_export_is_the_same_retriever_and_its_tokenizer_ends_texts_itself(
    tiny, tmp_path, added, pooling
):
    t = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    special = [(token, t.token_to_id(token)) for token in added.replace("$A", "").split()]
    t.post_processor = tokenizers.processors.TemplateProcessing(added, special_tokens=special)
    t.save(str(tiny / "tokenizer.json"))
    out, adapter, texts = tmp_path / "out", tmp_path / "adapter", [*TEXTS, "", "x" * 300]
    save_retriever(tiny, adapter, pooling)
    retriever = Retriever.from_pretrained(tiny, adapter)
    assert retriever.pooling == pooling and Retriever.from_pretrained(tiny).pooling == "eos"
    run_main("--model", tiny, "--adapter", adapter, "--export", out, "--max_len", 64)
    prompts = json.loads((out / "config_sentence_transformers.json").read_text())["prompts"]
    t = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    lengths = json.loads((out / "sentence_bert_config.json").read_text())
    t.enable_truncation(lengths["max_seq_length"])
    again = Retriever.from_pretrained(out)
    for prompt, kind in (("query", "query"), ("passage", "passage"), ("document", "passage")):
        truth = retriever.encode(texts, kind, max_len=64)
        ours = again.encode(texts, kind, max_len=64)
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-5)
        for text, vector in zip(texts, truth):  # as sentence-transformers goes on
            hidden = again.llama(torch.tensor([t.encode(prompts[prompt] + text).ids]))[0]
            hidden = hidden[-1] if pooling == "eos" else hidden.mean(0)
            if pooling == "mean":
                dense = load_file(out / "2_Dense/model.safetensors")
                hidden = dense["linear.weight"] @ hidden + dense["linear.bias"]
            unit = torch.nn.functional.normalize(hidden, dim=0)
            torch.testing.assert_close(unit, vector, rtol=0, atol=1e-5)


def test_an_export_without_what_it_needs_is_refused_before_it_is_written(tiny, tmp_path):
    (tiny / "tokenizer_config.json").unlink()
    edit(tiny, eos_token_id=299)  # which tokenizer.json does not have
    retriever = Retriever.from_pretrained(tiny)
    with pytest.raises(ValueError, match="tokenizer.json .*299"):
        eval.export(retriever, tmp_path / "out")
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer.json, which --export needs"):
        eval.export(Retriever.from_pretrained(tiny), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_mteb_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ValueError, match="pip install 'mteb>=2'"):
        eval.parse_args(["--model", "m", "--data", "d", "--mteb", "SciFact"])


def test_what_sentence_transformers_saved_is_read_as_it_is_or_refused(tiny):
    def put(name, **fields):
        (tiny / name).parent.mkdir(exist_ok=True)
        (tiny / name).write_text(json.dumps(fields))

    put("1_Pooling/config.json", pooling_mode="lasttoken", include_prompt=True)
    Retriever.from_pretrained(tiny)
    for fields in (
        {"pooling_mode": "mean"},
        {"pooling_mode_cls_token": True, "pooling_mode_lasttoken": False},
        {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode": ["x" * 10**6]},
    ):
        put("1_Pooling/config.json", word_embedding_dimension=32, **fields)
        with pytest.raises(ValueError, match="1_Pooling/config.json: .* need last") as caught:
            Retriever.from_pretrained(tiny)
        assert len(str(caught.value)) < 700
    retriever = Retriever(Llama.from_pretrained(tiny), pooling="mean")
    save_pooling(retriever, tiny)
    put("1_Pooling/config.json", pooling_mode_mean_tokens=True)
    Retriever.from_pretrained(tiny)
    put("1_Pooling/config.json", pooling_mode_mean_sqrt_len_tokens=True)  # another mean than ours
    with pytest.raises(ValueError, match="1_Pooling/config.json: .* or mean"):
        Retriever.from_pretrained(tiny)


def test_an_export_is_never_without_what_standardises_it(tiny, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval, "save_model", killed)
    retriever = Retriever.from_pretrained(tiny)
    retriever.pooling = "mean"
    with pytest.raises(KeyboardInterrupt):
        eval.export(retriever, tmp_path / "export")
    assert (tmp_path / "export" / POOLING).exists()


def test_the_average_of_retrievers_is_that_of_their_weights(tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "assets")
    import average

    for pooling in ("eos", "mean"):
        folders = [tmp_path / f"{pooling}{i}" for i in range(3)]
        for folder in folders:
            save_retriever(tiny, folder, pooling)
        out = tmp_path / pooling
        average.main([out, *folders])
        states = []
        for adapter in (out, *folders):
            retriever = Retriever.from_pretrained(tiny, adapter)
            merge_lora(retriever.llama)
            states.append(retriever.state_dict())
        for name, found in states[0].items():
            expected = sum(state[name] for state in states[1:]) / 3
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert (out / POOLING).exists() == (pooling == "mean")
    for folders, said in (([out, folders[0]], "two"), ([out, *folders], "exists already")):
        with pytest.raises(ValueError, match=said):
            average.main(folders)
    edit(folders[1], "adapter_config.json", lora_alpha=1)
    with pytest.raises(ValueError, match="differ"):
        average.main([tmp_path / "other", *folders])
