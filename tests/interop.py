"""Against transformers, peft, sentence-transformers and matplotlib themselves: CI's second step, since they are no requirements of ours.

    pip install transformers peft sentence-transformers matplotlib
    python -m pytest -q tests/interop.py
    python tests/interop.py FOLDER        # hidden states and logits of a real checkpoint, ours and transformers'
    python tests/interop.py --write       # make golden/families/, from which test_model.py checks the same without them
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, make_model, with_lora
from safetensors.torch import load_file, save_file
from test_data import write_beir

from eval import export, main
from model import Llama, load_adapter, save_adapter, save_model
from revela import Retriever

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

TINY = dict(vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, initializer_range=0.2)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
FAMILIES = {
    "Llama-3.2": ("llama", dict(num_attention_heads=4, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "Qwen2.5": ("qwen2", dict(num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True)),
    "SmolLM2": ("llama", dict(num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True)),
    "TinyLlama": ("llama", dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)),
    "Llama-2": ("llama", dict(num_attention_heads=4, tie_word_embeddings=False)),
}


def theirs_of(family, folder):
    """A tiny model of the family with random weights, saved by transformers; ids, and what it makes of them."""
    import transformers

    kind, options = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY, **options)
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
    """The largest error of our hidden states and logits, relative to the largest value."""
    ours = Llama.from_pretrained(folder)
    hidden = ours(truth["ids"])
    error = lambda a, b: ((a - b).abs().max() / b.abs().max()).item()
    return error(hidden, truth["hidden"]), error(ours.logits(hidden), truth["logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_transformers_is_read(family, tmp_path):
    assert max(compare(tmp_path, theirs_of(family, tmp_path))) < 1e-5


@pytest.mark.parametrize("changes", [{}, dict(model_type="qwen2"), dict(tie_word_embeddings=False)])
def test_a_checkpoint_of_ours_is_read_by_transformers(tmp_path, changes):
    import transformers

    ours, ids = Llama.from_pretrained(make_model(tmp_path / "a", **changes)), torch.arange(1, 30)[None]
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
        torch.testing.assert_close(theirs(ids).logits, ours.logits(ours(ids)), rtol=1e-5, atol=5e-5)  # of up to 30
        bare = Llama.from_pretrained(tmp_path / "a", head=False)
        save_model(bare, tmp_path / "b")
        theirs = transformers.AutoModel.from_pretrained(tmp_path / "b", dtype=torch.float32)
        torch.testing.assert_close(theirs(ids).last_hidden_state, bare(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_adapters_go_both_ways_between_peft_and_us(tiny, tmp_path, head, rslora):
    import peft
    import transformers

    ids, kind = torch.arange(1, 30)[None], transformers.AutoModelForCausalLM if head else transformers.AutoModel
    base = lambda: kind.from_pretrained(tiny, dtype=torch.float32)
    run = lambda m: m(ids).logits if head else m(ids).last_hidden_state
    ours = lambda llama: llama.logits(llama(ids)) if head else llama(ids)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=rslora)
    theirs = peft.get_peft_model(base(), config).eval()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, std=0.3) if "lora_B" in name else None
    theirs.save_pretrained(tmp_path / "theirs")
    llama = Llama.from_pretrained(tiny, head=head)
    load_adapter(llama.eval(), tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(ours(llama), run(theirs), rtol=1e-5, atol=1e-5)
        save_adapter(llama, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
        torch.testing.assert_close(run(again), run(theirs), rtol=1e-5, atol=1e-5)
        assert (run(theirs) - run(base())).abs().max() > 0.01


def test_sentence_transformers_encodes_an_export_as_we_do(tiny, tmp_path):
    from sentence_transformers import SentenceTransformer

    save_adapter(with_lora(Llama.from_pretrained(tiny, head=False)), tmp_path / "adapter")
    retriever, texts = Retriever.from_pretrained(tiny, tmp_path / "adapter"), [*TEXTS, "", "x" * 300]
    truth = {kind: retriever.encode(texts, kind, max_len=64) for kind in ("query", "passage")}
    export(retriever, tmp_path / "out", max_len=64)
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    for kind in truth:
        got = torch.tensor(theirs.encode(texts, prompt_name=kind))
        torch.testing.assert_close(got, truth[kind], rtol=0, atol=1e-4)


def test_a_plot_draws_what_the_runs_metrics_say(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (figures.append(self), savefig(self, *args, **more)))
    whole = [{"step": 0, "ndcg@10": 0.1}, {"step": 10, "loss": 4.0, "max_weight": 0.5}, {"step": 20, "loss": 3.5, "max_weight": 0.75},
             {"step": 20, "ndcg@10": 0.3}]  # fmt: skip
    control = [{"step": 10, "loss": 3.0}]  # --no_inbatch, without an evaluation
    (tmp_path / "a").mkdir()
    for file, rows in (("a/metrics.jsonl", whole), ("b-metrics.jsonl", control)):
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [str(tmp_path / "a"), str(tmp_path / "b-metrics.jsonl")]
    data = write_beir(tmp_path / "world")
    main(["--plot", str(tmp_path / "c.svg"), *runs, "--bm25", "--data", str(data)])
    main(["--plot", str(tmp_path / "c.png"), *runs])
    lines = [[(line.get_label(), *map(list, line.get_data())) for line in axes.lines] for axes in figures[0].axes]
    assert lines[0][:2] == [("a", [0, 20], [0.1, 0.3]), ("b", [], [])] and lines[0][2][0] == "bm25 on world"
    assert lines[1:] == [[("a", [10, 20], [4.0, 3.5]), ("b", [10], [3.0])], [("a", [10, 20], [0.5, 0.75]), ("b", [], [])]]
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["nDCG@10", "loss", "mean largest weight"]
    assert "updates" in (tmp_path / "c.svg").read_text() and (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="c.svg exists already"):
        main(["--plot", str(tmp_path / "c.svg"), *runs])


if __name__ == "__main__":
    golden = Path(__file__).parent / "golden/families"
    if sys.argv[1:] == ["--write"]:
        for family in FAMILIES:
            save_file(theirs_of(family, golden / family), golden / family / "truth.safetensors")
    else:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
        ids = torch.randint(0, model.config.vocab_size, (4, 200), generator=torch.Generator().manual_seed(0))
        print("largest relative error of hidden states and logits:", compare(sys.argv[1], vectors(model, ids)))
