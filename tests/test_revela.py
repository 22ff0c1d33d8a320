"""revela.py: losses and gradients against the loops of naive.py, and what must change nothing."""

import math
import os
from argparse import Namespace
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

from model import Llama, in_batch_attention, rope
from revela import (
    Contrastive,
    Control,
    Replug,
    Retriever,
    Revela,
    Tokenizer,
    collate,
    halves,
    two_streams,
)
from train import make_autocast, update, wrap_blocks

GROUPS = [([TEXTS[0], TEXTS[7] + " so.", "ok"], None)]
GROUPS += [([TEXTS[3], "a<eos> b", TEXTS[12]], "stackoverflow")]


def make(tmp_path, groups=GROUPS, apart=False, dropout=0.0, pooling="eos", **changes):
    """A retriever and a language model with LoRA, always the same, and a batch."""
    base = make_model(tmp_path / "base", **changes)
    retriever = with_lora(Llama.from_pretrained(base, head=False), dropout=dropout)
    lm, tokenizer = with_lora(Llama.from_pretrained(base), dropout=dropout), Tokenizer(base)
    batch = collate(groups, tokenizer, tokenizer, 40, True, apart)
    retriever = Retriever(retriever, tokenizer, pooling)
    if pooling == "mean":
        torch.nn.init.normal_(retriever.mean)
        torch.nn.init.uniform_(retriever.std, 0.5, 2)
    return retriever, lm, batch


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
UPPER = dict(num_hidden_layers=3, pooling="mean")  # start * 3 is rounded down
CASES = {  # as Revela has them. With a pad token of its own, a model predicts the EOS
    "llama": ((0.05, True, 1.0, False), {}),
    "no_v_norm": ((0.2, False, 0.3, True), {}),
    "qwen2": ((0.1, True, 1.0, True), QWEN2),
    "qwen3": ((0.1, True, 1.0, False), dict(model_type="qwen3", pad_token_id=299)),
    "convex": ((0.3, False, 0.25, True, True, 0.5), UPPER),
    "start": ((0.3, True, 0.7, False, False, 0.99), UPPER | QWEN2),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_naive_loops(case, tmp_path):
    method, changes = CASES[case]
    (tau, v_norm, scale, dual), (convex, start) = method[:4], method[4:] or (False, 0)
    retriever, lm, batch = make(tmp_path, **changes)
    form = {"scale": scale, "convex": convex, "start": start}
    revela = Revela(retriever, lm, tau, v_norm, dual_loss=dual, **form)
    loss = revela(batch)
    loss.backward()

    c, (lora_r, w_r), (lora_l, w_l) = lm.config, merged(retriever.llama), merged(lm)
    standard = "pooling" in changes and [t.double() for t in (retriever.mean, retriever.std)]
    reading = {"own": 1 - scale if convex else 1, "first": math.floor(start * len(lm.layers))}
    total, context, n = 0, 0, 0
    for g in range(2):
        texts = rows(batch, "query", g), rows(batch, "passage", g)
        wij = naive.weights(w_r, c, *texts, tau, standard)
        torch.testing.assert_close(revela.weights(batch)[g].double(), wij, rtol=1e-4, atol=1e-6)
        pad = c.pad_token_id or c.eos_token_id  # is not predicted, also inside a text
        parts = naive.losses(w_l, c, rows(batch, "lm", g), wij, v_norm, scale, pad, **reading)
        total, context, n = total + parts[0], context + parts[1], n + parts[2]
    truth = (total + context) / n if dual else total / n
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    assert int(revela.count(batch)) == n == batch["lm_mask"][..., 1:].sum() - int(pad == 0)
    check_gradients(retriever.llama, lora_r)
    check_gradients(lm, lora_l)


OBJECTIVES = {"revela": Revela, "contrastive": Contrastive}
OBJECTIVES["replug"] = partial(Replug, lm_temperature=0.3)
OBJECTIVES["reverse"] = partial(Replug, lm_temperature=0.3, reverse_kl=True)


@pytest.mark.parametrize("name", ["replug", "reverse", "contrastive"])
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
                Q = (l_i.detach() / 0.3).softmax(0)
                one, other = (P, Q) if name == "reverse" else (Q, P)
                truth = truth + (one * (one / other).log()).sum() / 6
            largest += P.max().item() / 6
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    assert objective.stats["max_weight"].item() == pytest.approx(largest, rel=1e-5)
    assert objective.stats["loss"] == loss and int(objective.count(batch)) == 6
    assert objective({k: t.long() for k, t in batch.items()}) == loss  # Hugging Face's masks
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
    targets = control.is_target(batch)
    truth = F.cross_entropy(lm.logits(hidden)[..., :-1, :][targets], ids[..., 1:][targets])
    torch.testing.assert_close(control(batch), truth)
    gradient = torch.autograd.grad(truth, hidden)
    for max_logits in (900, 2**23):  # three targets at a time; all
        loss = control.cross_entropy(hidden, batch, max_logits)
        torch.testing.assert_close(loss, truth)
        torch.testing.assert_close(torch.autograd.grad(loss, hidden), gradient)


@pytest.mark.parametrize("start, first", [(0, 0), (0.34, 1), (0.5, 1), (0.99, 2)])
def test_blocks_before_the_start_are_those_of_two_streams_without_reading(tmp_path, start, first):
    _, lm, batch = make(tmp_path, num_hidden_layers=3)
    ids, mask, w = batch["lm_ids"], batch["lm_mask"], torch.rand(2, 3, 3)
    calls, (cos, sin) = [], rope(lm.config, ids.shape[2], ids.device)
    for number, block in enumerate(lm.layers):
        block.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    ours = two_streams(lm, ids, mask, w, scale=0.3, convex=True, start=start)
    assert calls == [*range(first), *(n for n in range(first, 3) for _ in "cs")], "and run once"

    context = stream = lm.embed(ids.flatten(0, 1))
    for number, block in enumerate(lm.layers):
        context, *kv = block(context, cos, sin)

        def read(own, q, kv=kv):
            parts = (x.unflatten(0, (2, 3)) for x in (q, *kv))
            return 0.7 * own + 0.3 * in_batch_attention(*parts, w, mask).flatten(0, 1)

        stream, *_ = block(stream, cos, sin, read if number >= first else None)
    truth, trained = lm.norm(stream).view_as(ours), [p for p in lm.parameters() if p.requires_grad]
    torch.testing.assert_close(ours[mask], truth[mask], rtol=1e-5, atol=1e-5)
    pairs = [torch.autograd.grad(h[mask].square().sum(), trained) for h in (ours, truth)]
    for one, other in zip(*pairs):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


def test_a_diagnosis_is_the_loss_with_the_weights_with_uniform_ones_and_alone(tmp_path):
    retriever, lm, batch = make(tmp_path, dropout=0.3, num_hidden_layers=3)
    revela = Revela(
        retriever, lm, 0.05, False, dual_loss=True, scale=0.3, convex=True, start=0.5
    ).eval()
    losses, w = revela.diagnose(batch)
    truth = {"retriever": revela(batch) - revela.stats["context_loss"]}
    assert torch.equal(w, revela.weights(batch)) and not w.requires_grad
    ids, mask, uniform = batch["lm_ids"], batch["lm_mask"], (1 - torch.eye(3)).expand(2, 3, 3) / 2
    hidden = two_streams(lm, ids, mask, uniform, False, 0.3, True, 0.5)
    truth |= {"uniform": revela.cross_entropy(hidden, batch)}
    truth |= {"alone": Control(retriever, lm).eval()(batch)}
    assert losses.keys() == truth.keys() and len({round(x.item(), 4) for x in losses.values()}) == 3
    for name, loss in losses.items():
        torch.testing.assert_close(loss, truth[name].detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputing_activations_changes_nothing(tmp_path, dtype):
    gradients, calls = [], []
    for mode in ("none", "full"):
        retriever, lm, batch = make(tmp_path, dropout=0.3)  # the same must be dropped again
        lm.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(mode))
        args = Namespace(activation_checkpointing=mode, compile=False, dtype=dtype)
        for llama in (retriever.llama, lm):
            wrap_blocks(llama, args)
        revela = Revela(retriever, lm, 0.05, dual_loss=True)
        torch.manual_seed(0)
        with make_autocast(args, torch.device("cpu"))():
            loss = revela(batch)
        loss.backward()
        gradients.append({n: p.grad for n, p in revela.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert (calls.count("none"), calls.count("full")) == (3, 6)  # it is really computed again


def test_the_benchmark_compares_like_with_like():
    """What bench.py times beside ours is the same function: with one-hot weights, and without."""
    for flags, errors in bench.compare(Path(__file__).parent / "golden/families/SmolLM2").items():
        assert max(errors) < 1e-5, (flags, errors)


def test_the_mean_is_of_all_before_the_eos_and_standardised_by_that_of_passages(tmp_path):
    with pytest.raises(ValueError, match="pooling is 'lasttoken'; need 'eos' or 'mean'"):
        make(tmp_path, pooling="lasttoken")
    retriever, _, short = make(tmp_path, pooling="mean")
    long = make(tmp_path, [([TEXTS[5] * 2, "b", TEXTS[1]], None)] * 3)[2]  # padded further
    w, shared = merged(retriever.llama)[1], (retriever.mean, retriever.std)
    passages = [ids for batch in (short, long) for g in batch["passage_ids"] for ids in g]
    masks = [mask for batch in (short, long) for g in batch["passage_mask"] for mask in g]
    means = []
    for ids, mask in zip(passages, masks):
        hidden = naive.hidden_states(w, retriever.llama.config, ids[mask].tolist())[:-1]
        means.append(sum(hidden).detach() / len(hidden))
    mean = sum(means) / len(means)
    std = (sum((x - mean) ** 2 for x in means) / (len(means) - 1)).sqrt()
    retriever.standardise(iter([short, long]))
    assert shared[0] is retriever.mean and shared[1] is retriever.std, "in place: they are shared"
    for ours, truth in zip(shared, (mean, std)):
        assert not ours.requires_grad and (ours - truth).abs().max() < 1e-5 * truth.abs().max()

    retriever.standardise([{name: x[:, :1].expand(-1, 3, -1) for name, x in long.items()}])
    assert (retriever.std > 0).all(), "although these passages are all the same"
    retriever.mean, retriever.std = mean.float(), std.float()
    nothing = retriever(torch.tensor([[0, 0]]), torch.tensor([[True, False]]))[0]  # but an EOS
    torch.testing.assert_close(nothing, F.normalize(-mean / std, dim=0).float())

    ids, mask = short["passage_ids"].clone(), short["passage_mask"]
    before, last = retriever(ids, mask), mask.sum(-1, keepdim=True) - 1
    after = torch.arange(ids.shape[-1]) >= last  # the EOS and padding
    ids[after] = torch.randint(300, (int(after.sum()),))
    assert torch.equal(retriever(ids, mask), before)
    ids[..., 0] += 1  # of the prefix
    assert (retriever(ids, mask) - before).norm(dim=-1).min() > 0.01

    retriever.standardise([make(tmp_path, [(["b"] * 3, None)], pooling="mean")[2]])
    eos_alone = torch.zeros_like(mask)
    eos_alone[..., 0] = True
    assert retriever.std.min() > 0 and retriever(ids, eos_alone).isfinite().all()


@pytest.mark.parametrize("pooling", ["eos", "mean"])
def test_encode_is_the_same_alone_and_in_any_batch(tmp_path, pooling):
    retriever, texts = make(tmp_path, dropout=0.5, pooling=pooling)[0], [*TEXTS, "", "x" * 300]
    retriever.train()
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
    with pytest.raises(ValueError, match="needs a list of texts"):
        encode("one text")
    retriever.tokenizer = None
    with pytest.raises(ValueError, match="base has no tokenizer.json"):
        encode(texts)


def test_room_for_vectors_is_taken_before_a_text_is_encoded(tiny, tmp_path, monkeypatch):
    retriever, taken = Retriever.from_pretrained(tiny), []

    def embedded(ids, mask):
        assert taken
        return torch.zeros(len(ids), 32)

    monkeypatch.setattr(retriever, "forward", embedded)
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: taken.append(args), raising=False)
    retriever.encode(["a"] * 9, out=tmp_path / "v.npy")
    assert taken[0][1:] == (0, os.path.getsize(tmp_path / "v.npy")) and not retriever.training
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: open(tmp_path / "no/where"))
    with pytest.raises(ValueError, match="w.npy could not be written: .*No such file"):
        retriever.encode(["a"], out=tmp_path / "w.npy")


def test_halves_are_of_words_or_of_characters_where_there_are_no_spaces():
    assert halves("a bb\n c. d e") == ("a bb c.", "d e") and halves("one") == ("one", "")
    assert halves("猫喜欢牛奶。狗喜欢太阳。") == ("猫喜欢牛奶。", "狗喜欢太阳。")
    assert halves("我 喜欢牛奶") == ("我 喜欢", "牛奶")
