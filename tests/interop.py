"""Against transformers, peft, sentence-transformers, pytrec_eval, mteb and matplotlib themselves.

pip install transformers peft sentence-transformers pytrec-eval-terrier mteb matplotlib
python -m pytest -q tests/interop.py
python tests/interop.py FOLDER     # hidden states and logits of a real checkpoint, ours and theirs
python tests/interop.py --write    # golden/families/, from which test_model.py checks the same
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXTS, make_model, save_retriever, with_lora
from safetensors.torch import save_file

import eval
from data import read_beir, write_toy_world
from model import Llama, LlamaConfig, load_adapter, save_adapter, save_model
from revela import Retriever

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

TINY = dict(vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2)
TINY |= dict(initializer_range=0.2, num_attention_heads=4, num_key_value_heads=2)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(rope_type="llama3", rope_theta=5e5, original_max_position_embeddings=16)
TIED = dict(tie_word_embeddings=True)
FAMILIES = {
    "Llama-3.2": ("llama", TIED | dict(num_key_value_heads=1, head_dim=16, rope_parameters=LLAMA3)),
    "Qwen2.5": ("qwen2", TIED | dict(num_attention_heads=6)),
    "Qwen3": ("qwen3", TIED | dict(head_dim=16)),
    "SmolLM2": ("llama", TIED | dict(num_attention_heads=6)),
    "TinyLlama": ("llama", dict(tie_word_embeddings=False)),
    "Llama-2": ("llama", dict(tie_word_embeddings=False, num_key_value_heads=4)),
}
KINDS = ["llama", "qwen2", "qwen3"]


def theirs_of(family, folder):
    """Let transformers save a tiny random model of the family; return ids and results."""
    import transformers

    kind, options = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY | options)
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for p in theirs.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, p.mean().item(), 0.2)
    theirs.save_pretrained(folder)
    return vectors(theirs, torch.randint(0, 64, (2, 40)))


@torch.no_grad()
def vectors(theirs, ids):
    return {"ids": ids, "hidden": theirs.model(ids).last_hidden_state, "logits": theirs(ids).logits}


@torch.no_grad()
def compare(folder, truth):
    """The largest errors of our hidden states and logits, relative to the largest value."""
    llama = Llama.from_pretrained(folder)
    hidden = llama(truth["ids"])
    pairs = (hidden, truth["hidden"]), (llama.logits(hidden), truth["logits"])
    return [((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs]


# --------------------------------------------------------------------------------------------------
# transformers and peft


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_transformers_is_read(family, tmp_path, capsys):
    truth = theirs_of(family, tmp_path)
    capsys.readouterr()
    assert max(compare(tmp_path, truth)) < 1e-5
    assert capsys.readouterr().err == "", "nothing in it is unknown to us"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_of_ours_is_read_by_transformers(tmp_path, kind, tied):
    import transformers

    folder = make_model(tmp_path / "a", model_type=kind, tie_word_embeddings=tied)
    ours, ids = Llama.from_pretrained(folder), torch.arange(1, 30)[None]
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits = ours.logits(ours(ids))
        torch.testing.assert_close(theirs(ids).logits, logits, rtol=1e-5, atol=5e-5)  # of up to 30
        bare = Llama.from_pretrained(folder, head=False)
        save_model(bare, tmp_path / "b")
        theirs = transformers.AutoModel.from_pretrained(tmp_path / "b", dtype=torch.float32)
        hidden = theirs(ids).last_hidden_state
        torch.testing.assert_close(hidden, bare(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_adapters_go_both_ways_between_peft_and_us(tmp_path, kind, head, rslora):
    import peft
    import transformers

    tiny, ids = make_model(tmp_path / "tiny", model_type=kind), torch.arange(1, 30)[None]
    auto = transformers.AutoModelForCausalLM if head else transformers.AutoModel

    def base():
        return auto.from_pretrained(tiny, dtype=torch.float32)

    def run(theirs):
        return theirs(ids).logits if head else theirs(ids).last_hidden_state

    targets = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, use_rslora=rslora)
    theirs = peft.get_peft_model(base(), config).eval()
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    llama = Llama.from_pretrained(tiny, head=head)
    load_adapter(llama.eval(), tmp_path / "theirs")
    with torch.no_grad():
        truth, ours = run(theirs), llama.logits(llama(ids)) if head else llama(ids)
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=5e-5)
        save_adapter(llama, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
        torch.testing.assert_close(run(again), truth, rtol=1e-5, atol=1e-5)
        assert (truth - run(base())).abs().max() > 0.01


# Every field of their configurations: read, without effect on what is computed, or refused if set.
READ = set(LlamaConfig.__annotations__) | {"rope_parameters", "layer_types"}
HARMLESS = set("architectures dtype transformers_version use_cache pretraining_tp".split())
HARMLESS |= set("sliding_window max_window_layers".split())  # only with use_sliding_window
HARMLESS |= set("output_hidden_states output_attentions return_dict problem_type".split())
HARMLESS |= set(
    "chunk_size_feed_forward is_encoder_decoder id2label label2id _name_or_path".split()
)
REFUSED = {
    "hidden_act": ["gelu", "relu"],
    "attention_bias": [True],
    "attention_dropout": [0.1],
    "mlp_bias": [True],
    "use_sliding_window": [True],
    "layer_types": [["full_attention", "sliding_attention"]],
    "rope_parameters": [{"rope_type": t, "factor": 2.0} for t in ("linear", "yarn", "dynamic")],
    "is_causal": [False],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_a_configuration_is_decided(tmp_path, kind):
    import transformers

    config = transformers.AutoConfig.for_model(kind)
    fields = config.to_dict()
    unknown = fields.keys() - READ - HARMLESS - REFUSED.keys()
    assert unknown == {"model_type"} - READ, "decide these"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours = vars(LlamaConfig.from_pretrained(tmp_path))
    rope = ours.pop("rope_theta"), ours.pop("rope_scaling")
    assert rope == (config.rope_parameters["rope_theta"], None)
    head_dim = config.hidden_size // config.num_attention_heads
    assert ours == {name: getattr(config, name, head_dim) for name in ours}
    for name, values in REFUSED.items():
        for value in values:
            (tmp_path / "config.json").write_text(json.dumps(fields | {name: value}))
            match = "RoPE" if name == "rope_parameters" else name
            with pytest.raises(ValueError, match=match):
                LlamaConfig.from_pretrained(tmp_path)


ADAPTER_READ = set("r lora_alpha lora_dropout target_modules use_rslora peft_type".split())
ADAPTER_HARMLESS = set("auto_mapping base_model_name_or_path inference_mode peft_version".split())
ADAPTER_HARMLESS |= set("revision task_type megatron_core qalora_group_size".split())
ADAPTER_REFUSED = {"bias": ["all", "lora_only"], "init_lora_weights": ["pissa", "olora", "loftq"]}


def test_every_field_of_an_adapter_is_decided(tiny, tmp_path):
    import peft

    save_adapter(with_lora(Llama.from_pretrained(tiny)), tmp_path)
    mine = json.loads((tmp_path / "adapter_config.json").read_text())
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=mine["target_modules"])
    fields = config.to_dict() | {"target_modules": mine["target_modules"]}
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(fields))
    load_adapter(Llama.from_pretrained(tiny), tmp_path)
    for name in fields.keys() - ADAPTER_READ - ADAPTER_HARMLESS:
        for value in ADAPTER_REFUSED.get(name, [True, ["x"], {"x": 2}, "x"]):
            file.write_text(json.dumps(fields | {name: value}))
            with pytest.raises(ValueError, match=name):
                load_adapter(Llama.from_pretrained(tiny), tmp_path)


# --------------------------------------------------------------------------------------------------
# sentence-transformers, mteb


def exported(folder, pooling="eos", **options):
    tiny = make_model(folder / "tiny", **options)
    save_retriever(tiny, folder / "adapter", pooling)
    retriever = Retriever.from_pretrained(tiny, folder / "adapter")
    eval.export(Retriever.from_pretrained(tiny, folder / "adapter"), folder / "out", max_len=64)
    return retriever, folder / "out"


@pytest.mark.parametrize("kind, pooling", [*((kind, "eos") for kind in KINDS), ("qwen2", "mean")])
def test_sentence_transformers_encodes_an_export_as_we_do(tmp_path, kind, pooling):
    from sentence_transformers import SentenceTransformer

    retriever, folder = exported(tmp_path, pooling, model_type=kind)
    theirs, texts = SentenceTransformer(str(folder), device="cpu"), [*TEXTS, "", "x" * 300]
    query, passage = (retriever.encode(texts, k, max_len=64) for k in ("query", "passage"))
    for truth, vectors in (
        (passage, theirs.encode(texts)),
        (passage, theirs.encode_document(texts)),
        (query, theirs.encode_query(texts)),
        *((passage, theirs.encode(texts, prompt_name=name)) for name in ("passage", "document")),
        (query, theirs.encode(texts, prompt_name="query")),
    ):
        torch.testing.assert_close(torch.tensor(vectors), truth, rtol=0, atol=1e-4)
    theirs.save(str(tmp_path / "again"))  # a folder as sentence-transformers writes it
    if pooling == "mean":  # all but what is ours
        with pytest.raises(ValueError, match="or mean with our pooling.safetensors"):
            Retriever.from_pretrained(tmp_path / "again")
        shutil.copy(folder / "pooling.safetensors", tmp_path / "again")
    for ours in map(Retriever.from_pretrained, (folder, tmp_path / "again")):
        for kind, truth in (("query", query), ("passage", passage)):
            got = ours.encode(texts, kind, max_len=64)
            torch.testing.assert_close(got, truth, rtol=0, atol=1e-5)


def test_mteb_measures_an_export_as_we_do(tmp_path, monkeypatch, capsys):
    mteb = pytest.importorskip("mteb")

    write_toy_world(tmp_path / "world", seed=0, n_groups=20, n_test=60)
    collection = corpus, queries, qrels = read_beir(tmp_path / "world")
    retriever, folder = exported(tmp_path, seed=1)
    truth = eval.measure(eval.dense_run(retriever, collection, max_len=64), qrels)

    def load_data(self, *_, **__):  # else it is fetched
        documents = {docid: {"title": "", "text": text} for docid, text in corpus.items()}
        self.corpus, self.queries = {"test": documents}, {"test": queries}
        self.relevant_docs, self.data_loaded = {"test": qrels}, True
        self.convert_v1_dataset_format_to_v2(None)

    monkeypatch.setattr(type(mteb.get_task("SciFact")), "load_data", load_data)
    how = f"--model {folder} --mteb SciFact --max_len 64 --out {tmp_path}/r.json"
    eval.main(how.split())
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    out = capsys.readouterr().out
    assert result["data"] == "SciFact" and 0.01 < truth["ndcg@10"] < 0.99
    for name in ("ndcg@10", "mrr@10", "recall@100"):
        assert result[name] == pytest.approx(truth[name], abs=2e-5), name  # they round
        assert f"{result[name]:.4f}" in out


# --------------------------------------------------------------------------------------------------
# trec_eval, matplotlib

KNOWN = {"adi": 0.3914, "cisi": 0.3180}  # where documents and queries are both numbered from 1
REAL = sorted(Path("/work/shared/data/eval").glob("*/corpus.jsonl"))


@pytest.mark.parametrize("folder", [file.parent for file in REAL] or ["toy"], ids=str)
def test_measures_of_bm25_are_trec_evals(folder, tmp_path):
    pytrec_eval = pytest.importorskip("pytrec_eval")

    if folder == "toy":
        write_toy_world(folder := tmp_path / "world", seed=0, n_groups=20)
    corpus, queries, qrels = read_beir(folder)
    run = eval.bm25_run((corpus, queries, qrels), eval.BM25(corpus.values()))
    names = {"ndcg@10": "ndcg_cut_10", "recall@100": "recall_100", "mrr@10": "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100", "recip_rank"})
    truth = theirs.evaluate({qid: found for qid, found in run.items() if found})
    measured = eval.measure(run, qrels)
    ours, ndcg = measured["per_query"], measured["ndcg@10"]
    assert ours.keys() == queries.keys()
    assert ndcg == pytest.approx(KNOWN.get(folder.name, ndcg), abs=5e-5)
    for qid, row in ours.items():
        for name, value in row.items():
            expected = truth[qid][names[name]] if qid in truth else 0
            expected *= name != "mrr@10" or expected >= 1 / 10  # theirs has no cut
            assert value == pytest.approx(expected, abs=1e-12), (qid, name)


def test_plots_draw_what_the_files_say(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.syspath_prepend(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    import plot

    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *a, **k: drawn.append(a[0]) or savefig(*a, **k))
    steps = [{"step": n, "loss": 4 - n / 10, "max_weight": n / 20} for n in (10, 20)]
    losses = {"heldout_loss": {"uniform": 3.5, "retriever": 3.25, "alone": 4.0}}
    rows = [{"step": 0, "ndcg@10": 0.1}, *steps, {"step": 20, "ndcg@10": 0.3} | losses]
    Path("a").mkdir()
    Path("a/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("b-metrics.jsonl").write_text('{"step": 10, "loss": 3.0}\n')  # --no_inbatch
    plot.main(["updates", "c.svg", "a", "b-metrics.jsonl"])
    ndcg, loss, weight, gain = (
        {line.get_label(): tuple(map(list, line.get_data())) for line in axes.lines}
        for picture in drawn
        for axes in picture.axes
    )
    assert ndcg["a"] == ([0, 20], [0.1, 0.3]) and ndcg["b"] == ([], []) and len(ndcg) == 2
    assert loss == {"a": ([10, 20], [3.0, 2.0]), "b": ([10], [3.0])}
    assert weight == {"a": ([10, 20], [0.5, 1.0]), "b": ([], [])} and gain["a"] == ([20], [0.25])
    assert "updates" in Path("c.svg").read_text()
    with pytest.raises(SystemExit):
        plot.main(["updates", "c.svg", "a"])  # it exists
    for wrong in (["weights", "d.svg"], ["minutes", "d.svg", "a"]):
        with pytest.raises(SystemExit):
            plot.main(wrong)
    plot.main(["minutes", "d.svg"])
    ndcg, gain = drawn[-1].axes
    assert [line.get_xdata()[0] for line in ndcg.lines[:4]] == [n * 488 / 60 for n in (1, 2, 4, 7)]
    assert len(ndcg.lines) == len(gain.lines) == 5

    w = [[0, 0.1, 0.9], [0.3, 0, 0.7], [0.8, 0.2, 0]]
    texts = ["They ask Bo Zed for figs.", "Al Cy is a poet.", "The town of Bo Zed is Ash."]
    Path("groups").write_text(json.dumps(["a"] * 3) + "\n" + json.dumps(texts) + "\n")
    config = {"recipe": "toy", "data": "groups", "heldout_groups": 1, "train_group_size": 3}
    Path("a/config.json").write_text(json.dumps(config))
    Path("a/metrics.jsonl").write_text(json.dumps({"step": 5, "weights": w, "ndcg@10": 0.4}))
    plot.main(["weights", "w.svg", "a", "--at", "5"])
    (axes,) = drawn[-1].axes
    by_person = [[w[i][j] for j in (1, 0, 2)] for i in (1, 0, 2)]
    assert axes.images[0].get_array().tolist() == by_person
    assert axes.get_title() == "update 5\nnDCG@10 0.40"


if __name__ == "__main__":
    golden = Path(__file__).parent / "golden/families"
    if sys.argv[1:] == ["--write"]:
        for family in FAMILIES:
            save_file(theirs_of(family, golden / family), golden / family / "truth.safetensors")
    else:
        import transformers

        auto = transformers.AutoModelForCausalLM
        theirs = auto.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
        some = torch.Generator().manual_seed(0)
        ids = torch.randint(0, theirs.config.vocab_size, (4, 200), generator=some)
        print(
            "largest errors of hidden states and logits:",
            *compare(sys.argv[1], vectors(theirs, ids)),
        )
