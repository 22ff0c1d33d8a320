"""The objective against the naive loops of naive.py: weights, losses, and the gradient of every LoRA matrix."""

import argparse
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import bench
import naive
import numpy as np
import pytest
import torch
from conftest import TEXTS, make_model, with_lora

from data import Tokenizer, collate
from model import Llama
from revela import Contrastive, Replug, Retriever, Revela
from train import update


def merged(llama):
    """float64 leaf copies of the LoRA matrices, and the dictionary of merged weights that depends on them."""
    lora = {n: p.detach().double().requires_grad_() for n, p in llama.named_parameters() if ".lora_" in n}
    w = {}
    for name, p in llama.named_parameters():
        if ".lora_" in name:
            continue
        w[name] = p.detach().double()
        at = name.removesuffix("weight")
        if at + "lora_A.weight" in lora and name.endswith(".weight"):
            w[name] = w[name] + llama.lora["lora_alpha"] / llama.lora["r"] * lora[at + "lora_B.weight"] @ lora[at + "lora_A.weight"]
    return lora, w


def rows(batch, name, g):
    return [ids[mask].tolist() for ids, mask in zip(batch[name + "_ids"][g], batch[name + "_mask"][g])]


GROUPS = [([TEXTS[0], TEXTS[7] + " so.", "ok"], None), ([TEXTS[3], "a<eos> b", TEXTS[12]], "stackoverflow")]


def make(tmp_path, groups=GROUPS, second_half=False, **changes):
    torch.manual_seed(1)
    base = make_model(tmp_path / "base", **changes)
    retriever = Retriever(with_lora(Llama.from_pretrained(base, head=False)), Tokenizer(base))
    lm = with_lora(Llama.from_pretrained(base))
    return retriever, lm, collate(groups, retriever.tokenizer, retriever.tokenizer, 40, True, second_half)


CASES = {
    "llama": (dict(v_norm=True, tau=0.05, scale=1.0, dual=False), {}),
    "no_v_norm": (dict(v_norm=False, tau=0.2, scale=0.3, dual=True), {}),
    "qwen2": (dict(v_norm=True, tau=0.1, scale=1.0, dual=True), dict(model_type="qwen2", tie_word_embeddings=False)),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_naive_loops(case, tmp_path):
    (o, changes) = CASES[case]
    retriever, lm, batch = make(tmp_path, **changes)
    revela = Revela(retriever, lm, o["tau"], o["v_norm"], o["scale"], o["dual"])
    loss = revela(batch)
    loss.backward()

    c = lm.config
    lora_r, w_r = merged(retriever.llama)
    lora_l, w_l = merged(lm)
    total, context, n = 0, 0, 0
    for g in range(2):
        wij = naive.weights(w_r, c, rows(batch, "query", g), rows(batch, "passage", g), o["tau"])
        torch.testing.assert_close(revela.weights(batch)[g].double(), wij, rtol=1e-4, atol=1e-6)
        parts = naive.losses(w_l, c, rows(batch, "lm", g), wij, o["v_norm"], o["scale"], pad=c.eos_token_id)
        total, context, n = total + parts[0], context + parts[1], n + parts[2]
    truth = (total + context) / n if o["dual"] else total / n
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    assert int(revela.targets(batch).sum()) == n
    for module, lora in ((retriever.llama, lora_r), (lm, lora_l)):
        for name, p in module.named_parameters():
            if name in lora:
                error = (p.grad.double() - lora[name].grad).abs().max() / lora[name].grad.abs().max()
                assert error < 1e-4, (name, error)
            else:
                assert p.grad is None, name


def likelihood(w, c, context, text):
    """The mean log-likelihood of the second half of `text`'s tokens, read after `context` and its first half: a plain loop."""
    ids, first = context + text, len(context) + len(text) // 2
    hidden, total = naive.hidden_states(w, c, ids), 0
    for t in range(first, len(ids)):
        logits = w.get("lm_head.weight", w["embed_tokens.weight"]) @ hidden[t - 1]
        total = total + logits[ids[t]] - torch.logsumexp(logits, 0)
    return total / (len(ids) - first)


@pytest.mark.parametrize("name", ["replug", "contrastive"])
def test_a_baselines_loss_and_gradients_equal_naive_loops(name, tmp_path):
    changes = dict(model_type="qwen2", tie_word_embeddings=False) if name == "replug" else {}
    retriever, lm, batch = make(tmp_path, second_half=name == "contrastive", **changes)
    for layer in lm.layers:
        layer.mlp.down_proj.dropout.p = 0.5  # must not be in the scores
    tau, beta = 0.2, 0.3
    objective = Replug(retriever, lm, tau, beta) if name == "replug" else Contrastive(retriever, lm, tau)
    loss = objective(batch)
    loss.backward()

    lora, w = merged(retriever.llama)
    _, w_lm = merged(lm)
    unit = lambda ids: torch.nn.functional.normalize(naive.hidden_states(w, retriever.llama.config, ids)[-1], dim=0)
    truth, largest = 0, 0
    for g in range(2):
        q, p = ([unit(ids) for ids in rows(batch, kind, g)] for kind in ("query", "passage"))
        texts = rows(batch, "lm", g)
        for i in range(3):
            js = [j for j in range(3) if name == "contrastive" or j != i]
            e = {j: (q[i] @ p[j] / tau).exp() for j in js}
            P = {j: e[j] / sum(e.values()) for j in js}
            largest += max(P.values()).item() / 6
            if name == "contrastive":
                truth = truth - P[i].log() / 6
            else:
                with torch.no_grad():
                    l = {j: (likelihood(w_lm, lm.config, texts[j], texts[i]) / beta).exp() for j in js}
                truth = truth + sum(P[j] * (P[j] / (l[j] / sum(l.values()))).log() for j in js) / 6
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    assert objective.stats["max_weight"].item() == pytest.approx(largest, rel=1e-5)
    assert objective.stats["loss"] == loss and int(objective.count(batch)) == 6
    for n, p in retriever.llama.named_parameters():
        if n in lora:
            assert (p.grad.double() - lora[n].grad).abs().max() < 1e-4 * lora[n].grad.abs().max(), n
    assert all(p.grad is None for p in lm.parameters())


def test_the_pieces_of_replugs_likelihoods_change_nothing(tmp_path):
    retriever, lm, batch = make(tmp_path)
    replug = Replug(retriever, lm, 0.1, 0.1)
    whole = replug.likelihoods(batch)
    torch.testing.assert_close(whole, replug.likelihoods(batch, batch_tokens=100, chunk=900))
    assert (whole == 0).sum() == 6  # the diagonals alone


@pytest.mark.parametrize("name", ["revela", "replug", "contrastive"])
def test_micro_batches_do_not_change_the_update(name, tmp_path):
    """Four micro-batches of one group, of very different lengths, are one of four groups."""
    groups = GROUPS + [(["a", "b", "c"], None), ([" ".join(TEXTS[i : i + 3]) for i in range(3)], None)]
    results = []
    for at in ([slice(0, 4)], [slice(g, g + 1) for g in range(4)]):
        retriever, lm, _ = make(tmp_path)
        lm.requires_grad_(name == "revela")
        makes = {"revela": Revela, "replug": partial(Replug, lm_temperature=0.3), "contrastive": Contrastive}
        objective = makes[name](retriever, lm, attn_temperature=0.2)
        micro_batches = [collate(groups[g], retriever.tokenizer, retriever.tokenizer, 40, True, name == "contrastive") for g in at]
        before = {n: p.detach().clone() for n, p in objective.named_parameters()}
        sgd = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=1.0)
        stats = update(objective, micro_batches, sgd, 1e9, nullcontext, torch.device("cpu"), 1)
        moved = {n: before[n] - p.detach() for n, p in objective.named_parameters() if p.requires_grad}
        results.append(moved | {n: stats[n] for n in ("loss", "tokens", "grad_norm_retriever", "grad_norm_lm")})
    for n, one in results[0].items():
        assert (one - results[1][n]).abs().max() <= 1e-4 * one.abs().max(), n


def test_the_eos_inside_a_text_is_seen_but_not_predicted(tmp_path):
    retriever, lm, batch = make(tmp_path)
    inside = (batch["lm_ids"] == lm.config.eos_token_id) & batch["lm_mask"]
    assert inside.sum() == 1  # the group above has one
    assert not Revela(retriever, lm).targets(batch)[inside[..., 1:]].any()
    lm.config.pad_token_id = 299  # a model with a pad token of its own predicts the EOS
    assert Revela(retriever, lm).targets(batch)[inside[..., 1:]].all()


def test_the_benchmark_compares_like_with_like():
    """What bench.py times beside ours is the same function: here with weights that are not one-hot, and with some that are."""
    folder = Path(__file__).parent / "golden/families/SmolLM2"
    a = argparse.Namespace(model=folder, device="cpu", dtype="bfloat16", T=160, lora_r=256, activation_checkpointing="none")
    for tau, errors in bench.compare(a).items():
        assert max(errors) < 1e-5, (tau, errors)


def test_no_inbatch_is_the_plain_language_model(tmp_path):
    retriever, lm, batch = make(tmp_path)
    loss = Revela(retriever, lm, inbatch_scale=0)(batch)
    logits = lm.logits(lm(batch["lm_ids"].flatten(0, 1)))[:, :-1]
    targets = batch["lm_ids"].flatten(0, 1)[:, 1:].masked_fill(~Revela(retriever, lm).targets(batch).flatten(0, 1), -100)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets))


def test_nothing_of_a_passage_comes_back_to_it(tmp_path):
    """Changing the last token of a passage changes no prediction of that passage before it, and changes the others."""
    retriever, lm, batch = make(tmp_path)
    w = torch.rand(2, 3, 3)
    before, _ = lm.forward_in_batch(batch["lm_ids"], batch["lm_mask"], w)
    last = int(batch["lm_mask"][0, 1].sum()) - 1
    batch["lm_ids"][0, 1, last] += 1
    after, _ = lm.forward_in_batch(batch["lm_ids"], batch["lm_mask"], w)
    torch.testing.assert_close(before[0, 1, :last], after[0, 1, :last])
    assert (before[0, 0] - after[0, 0]).abs().max() > 1e-4
    torch.testing.assert_close(before[1], after[1])  # the other group


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputing_activations_changes_nothing(tmp_path, how):
    retriever, lm, batch = make(tmp_path)
    for layer in lm.layers:
        layer.mlp.down_proj.dropout.p = 0.3  # the same units must be dropped again
    revela, gradients = Revela(retriever, lm, 0.05, dual_loss=True), []
    for mode in ("none", how):
        for llama in (retriever.llama, lm):
            llama.recompute_activations(mode)
        torch.manual_seed(0)
        revela(batch).backward()
        gradients.append({name: p.grad for name, p in revela.named_parameters() if p.requires_grad})
        revela.zero_grad()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_the_chunks_of_the_cross_entropy_change_nothing(tmp_path):
    retriever, lm, batch = make(tmp_path)
    revela = Revela(retriever, lm)
    hidden = torch.randn(*batch["lm_ids"].shape, 32, requires_grad=True)
    whole, pieces = revela.cross_entropy(hidden, batch), revela.cross_entropy(hidden, batch, chunk=900)
    torch.testing.assert_close(whole, pieces)
    torch.testing.assert_close(torch.autograd.grad(whole, hidden), torch.autograd.grad(pieces, hidden))


def test_encode_is_the_same_alone_and_in_any_batch(tmp_path):
    retriever, _, _ = make(tmp_path)
    texts = TEXTS + ["", "x" * 300]
    together = retriever.encode(texts, "passage", max_len=64, batch_tokens=200)
    assert together.dtype == torch.float32 and together.shape == (len(texts), 32)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(texts)))
    mapped = retriever.encode(texts, "passage", max_len=64, out=tmp_path / "v.npy", chunk=7)
    torch.testing.assert_close(mapped, together, atol=1e-6, rtol=1e-5)
    assert np.array_equal(np.load(tmp_path / "v.npy"), mapped.numpy())
    with pytest.raises(ValueError, match="v.npy exists already"):
        retriever.encode(texts, out=tmp_path / "v.npy")
    for i in (0, 5, len(texts) - 2, len(texts) - 1):
        torch.testing.assert_close(retriever.encode([texts[i]], "passage", max_len=64)[0], together[i], atol=1e-6, rtol=1e-5)
    assert (together - retriever.encode(texts, "query", max_len=64)).abs().max() > 0.01  # the prefix counts


def test_encode_in_training_mode_has_no_dropout_and_keeps_the_mode(tmp_path):
    base = make_model(tmp_path / "base")
    llama = with_lora(Llama.from_pretrained(base, head=False), dropout=0.5)
    retriever = Retriever(llama, Tokenizer(base)).train()
    assert torch.equal(retriever.encode(TEXTS), retriever.encode(TEXTS)) and retriever.training


def test_encode_without_a_tokenizer_says_so(tmp_path):
    base = make_model(tmp_path / "base")
    (base / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="base has no tokenizer.json"):
        Retriever.from_pretrained(base).encode(["a"])
