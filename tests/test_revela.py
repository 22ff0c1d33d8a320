"""revela.py: losses and gradients against the loops of naive.py, and what must change nothing."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import bench
import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TEXTS, make_model, with_lora

from model import Llama
from revela import Contrastive, Control, Replug, Retriever, Revela, Tokenizer, collate
from train import recompute_activations, update

GROUPS = [([TEXTS[0], TEXTS[7] + " so.", "ok"], None)]
GROUPS += [([TEXTS[3], "a<eos> b", TEXTS[12]], "stackoverflow")]


def make(tmp_path, groups=GROUPS, apart=False, dropout=0.0, **changes):
    """A retriever and a language model with LoRA, always the same, and a batch."""
    base = make_model(tmp_path / "base", **changes)
    retriever = with_lora(Llama.from_pretrained(base, head=False), dropout=dropout)
    lm, tokenizer = with_lora(Llama.from_pretrained(base), dropout=dropout), Tokenizer(base)
    batch = collate(groups, tokenizer, tokenizer, 40, True, apart)
    return Retriever(retriever, tokenizer), lm, batch


def merged(llama):
    """float64 leaf copies of the LoRA matrices, and the merged weights that depend on them."""
    w = {n: p.detach().double() for n, p in llama.named_parameters()}
    lora = {n: w.pop(n).requires_grad_() for n in list(w) if ".lora_" in n}
    for name in [n.removesuffix("lora_A.weight") for n in lora if "lora_A" in n]:
        BA = lora[name + "lora_B.weight"] @ lora[name + "lora_A.weight"]
        w[name + "weight"] = w[name + "weight"] + 6 / 3 * BA  # alpha / r
    return lora, w


def check_gradients(llama, lora):
    for name, p in llama.named_parameters():
        if name in lora:
            truth = lora[name].grad
            assert (p.grad.double() - truth).abs().max() < 1e-4 * truth.abs().max(), name
        else:
            assert p.grad is None, name


def rows(batch, name, g):
    pairs = zip(batch[name + "_ids"][g], batch[name + "_mask"][g])
    return [ids[mask].tolist() for ids, mask in pairs]


QWEN2 = dict(model_type="qwen2", tie_word_embeddings=False)
CASES = {  # tau, v_norm, scale, dual loss. With a pad token of its own, a model predicts the EOS
    "llama": ((0.05, True, 1.0, False), {}),
    "no_v_norm": ((0.2, False, 0.3, True), {}),
    "qwen2": ((0.1, True, 1.0, True), QWEN2),
    "qwen3": ((0.1, True, 1.0, False), dict(model_type="qwen3", pad_token_id=299)),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_naive_loops(case, tmp_path):
    (tau, v_norm, scale, dual), changes = CASES[case]
    retriever, lm, batch = make(tmp_path, **changes)
    revela = Revela(retriever, lm, tau, v_norm, scale, dual)
    loss = revela(batch)
    loss.backward()

    c, (lora_r, w_r), (lora_l, w_l) = lm.config, merged(retriever.llama), merged(lm)
    total, context, n = 0, 0, 0
    for g in range(2):
        wij = naive.weights(w_r, c, rows(batch, "query", g), rows(batch, "passage", g), tau)
        torch.testing.assert_close(revela.weights(batch)[g].double(), wij, rtol=1e-4, atol=1e-6)
        pad = c.pad_token_id or c.eos_token_id  # is not predicted, also inside a text
        parts = naive.losses(w_l, c, rows(batch, "lm", g), wij, v_norm, scale, pad)
        total, context, n = total + parts[0], context + parts[1], n + parts[2]
    truth = (total + context) / n if dual else total / n
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    assert int(revela.count(batch)) == n == batch["lm_mask"][..., 1:].sum() - int(pad == 0)
    check_gradients(retriever.llama, lora_r)
    check_gradients(lm, lora_l)


OBJECTIVES = {"revela": Revela, "contrastive": Contrastive}
OBJECTIVES["replug"] = partial(Replug, lm_temperature=0.3)


@pytest.mark.parametrize("name", ["replug", "contrastive"])
def test_a_baselines_loss_and_gradients_equal_naive_loops(name, tmp_path):
    apart = name == "contrastive"
    retriever, lm, batch = make(tmp_path, apart=apart, **({} if apart else QWEN2))
    for layer in lm.layers:
        layer.mlp.down_proj.dropout = 0.5  # must not be in the likelihoods
    objective = OBJECTIVES[name](retriever, lm, attn_temperature=0.2)
    loss = objective(batch)
    loss.backward()

    c, (lora, w), (_, w_lm) = lm.config, merged(retriever.llama), merged(lm)
    truth, largest = 0, 0
    for g in range(2):
        q = [naive.embedding(w, c, ids) for ids in rows(batch, "query", g)]
        p = [naive.embedding(w, c, ids) for ids in rows(batch, "passage", g)]
        texts = rows(batch, "lm", g)
        for i in range(3):
            js = [j for j in range(3) if apart or j != i]
            P = torch.stack([q[i] @ p[j] / 0.2 for j in js]).softmax(0)
            if apart:
                truth = truth - P[i].log() / 6
            else:
                l_i = torch.stack([naive.likelihood(w_lm, c, texts[j], texts[i]) for j in js])
                truth = truth + (P * (P / (l_i.detach() / 0.3).softmax(0)).log()).sum() / 6
            largest += P.max().item() / 6
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    assert objective.stats["max_weight"].item() == pytest.approx(largest, rel=1e-5)
    assert objective.stats["loss"] == loss and int(objective.count(batch)) == 6
    check_gradients(retriever.llama, lora)
    check_gradients(lm, {})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_do_not_change_the_update(name, tmp_path):
    """Four micro-batches of one group, of very different lengths, are one of four groups."""
    more = [["a", "b", "c"], [" ".join(TEXTS[i : i + 3]) for i in range(3)]]
    groups, results = GROUPS + [(texts, None) for texts in more], []
    for parts in ([groups], [[group] for group in groups]):
        made = [make(tmp_path, part, name == "contrastive") for part in parts]
        retriever, lm, _ = made[0]
        lm.requires_grad_(name == "revela")
        objective = OBJECTIVES[name](retriever, lm, attn_temperature=0.2)
        trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in trained.items()}
        sgd, batches = torch.optim.SGD(trained.values(), lr=1.0), [batch for _, _, batch in made]
        how = range(len(parts)), sgd, 1e9, nullcontext, torch.device("cpu"), 1
        stats = update(objective, batches, *how)
        names = "loss", "tokens", "grad_norm_retriever", "grad_norm_lm"
        moved = {n: before[n] - p.detach() for n, p in trained.items()}
        results.append(moved | {n: stats[n] for n in names})
    for n, one in results[0].items():
        assert (one - results[1][n]).abs().max() <= 1e-4 * one.abs().max(), n


def test_the_control_is_the_plain_language_model_and_chunks_of_its_loss_change_nothing(tmp_path):
    retriever, lm, batch = make(tmp_path)
    control, ids = Control(retriever, lm), batch["lm_ids"]
    hidden = lm(ids.flatten(0, 1)).unflatten(0, ids.shape[:2]).detach().requires_grad_()
    targets = control.targets(batch)
    truth = F.cross_entropy(lm.logits(hidden)[..., :-1, :][targets], ids[..., 1:][targets])
    torch.testing.assert_close(control(batch), truth)
    gradient = torch.autograd.grad(truth, hidden)
    for chunk in (900, 2**23):  # three targets at a time; all
        loss = control.cross_entropy(hidden, batch, chunk)
        torch.testing.assert_close(loss, truth)
        torch.testing.assert_close(torch.autograd.grad(loss, hidden), gradient)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputing_activations_changes_nothing(tmp_path, how):
    gradients, calls = [], []
    for mode in ("none", how):
        retriever, lm, batch = make(tmp_path, dropout=0.3)  # the same must be dropped again
        lm.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(mode))
        for llama in (retriever.llama, lm):
            recompute_activations(llama, mode)
        revela = Revela(retriever, lm, 0.05, dual_loss=True)
        torch.manual_seed(0)
        revela(batch).backward()
        gradients.append({n: p.grad for n, p in revela.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert (calls.count("none"), calls.count(how)) == (3, 6)  # it is really computed again


def test_the_benchmark_compares_like_with_like():
    """What bench.py times beside ours is the same function: with one-hot weights, and without."""
    for flags, errors in bench.compare(Path(__file__).parent / "golden/families/SmolLM2").items():
        assert max(errors) < 1e-5, (flags, errors)


def test_encode_is_the_same_alone_and_in_any_batch(tmp_path):
    retriever, texts = make(tmp_path, dropout=0.5)[0].train(), [*TEXTS, "", "x" * 300]
    encode = partial(retriever.encode, max_len=64)
    close = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-5)
    together = encode(texts, batch_tokens=200)
    assert retriever.training and torch.equal(together, encode(texts, batch_tokens=200))
    assert together.dtype == torch.float32
    close(together.norm(dim=1), torch.ones(len(texts)))
    for i in (0, 5, len(texts) - 2, len(texts) - 1):
        close(encode([texts[i]])[0], together[i])
    assert (together - encode(texts, "query")).abs().max() > 0.01  # the prefix counts
    mapped = encode(texts, out=tmp_path / "v.npy", chunk=7)
    close(mapped, together)
    assert np.array_equal(np.load(tmp_path / "v.npy"), mapped.numpy())
    with pytest.raises(ValueError, match="v.npy exists already"):
        encode(texts, out=tmp_path / "v.npy")
    retriever.tokenizer = None
    with pytest.raises(ValueError, match="base has no tokenizer.json"):
        encode(texts)
