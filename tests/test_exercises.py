"""The checks of assets/EXERCISES.md: steps of the objective, and what must not happen.

They run on the file that REVELA_MINE names; without it, on our code behind the same six functions.
"""

import os
import runpy
from types import SimpleNamespace

import naive
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from model import Llama, in_batch_attention, in_batch_attention_fast, in_batch_plan
from revela import Retriever, Revela, Tokenizer, collate, in_batch_weights, two_streams


def our_read(q, k, v, mask, v_norm=True):
    q, k, v = (x.expand(2, 1, -1, -1) for x in (q, k, v))  # the second is what the first reads
    return in_batch_attention(q, k, v, torch.ones(2, 2), mask.expand(2, -1), v_norm)[0, 0]


def our_attention(q, k, v, weights, mask, v_norm=True):
    weights = weights.clone().fill_diagonal_(0)
    weights, mask = weights[None], mask[None]
    plan = in_batch_plan(weights, 1, 1, 0, 1000)
    return in_batch_attention_fast(q, k, v, weights, mask, v_norm, plan)


def our_loss(retriever, lm, batch, tau):
    return Revela(Retriever(retriever), lm, tau)({name: t[None] for name, t in batch.items()})


ours = SimpleNamespace(
    embed=lambda llama, ids, mask: Retriever(llama)(ids, mask),
    weights=lambda q, p, tau: in_batch_weights(q[None], p[None], tau)[0],
    read=our_read,
    in_batch_attention=our_attention,
    two_streams=lambda lm, *args: two_streams(lm, *(x[None] for x in args))[0],
    loss=our_loss,
)
file = os.environ.get("REVELA_MINE")
mine = SimpleNamespace(**runpy.run_path(file)) if file else ours


@pytest.fixture
def parts(tmp_path):
    """Two different tiny models in float64, and a batch {query,passage,lm}_{ids,mask} [B, T]."""
    r, lm = make_model(tmp_path / "r", seed=1), make_model(tmp_path / "lm", seed=2)
    retriever, tokenizer = Llama.from_pretrained(r, torch.float64, head=False), Tokenizer(lm)
    lm = Llama.from_pretrained(lm, torch.float64)
    texts = ["the cat sees the sun.", "milk", "a dog likes the cat."]
    batch = collate([(texts, None)], tokenizer, tokenizer, first_half=True)
    return retriever, lm, {name: t[0] for name, t in batch.items()}


def rows(batch, name):
    return [ids[mask].tolist() for ids, mask in zip(batch[name + "_ids"], batch[name + "_mask"])]


def qkv(B=3, H=4, H_kv=2, T=5, d=6):
    """q, k, v, weights [B, B] with a diagonal that must not count, and mask."""
    torch.manual_seed(0)
    shapes = (B, H, T, d), (B, H_kv, T, d), (B, H_kv, T, d), (B, B)
    q, k, v, w = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return q, k, v, w.abs(), torch.arange(T) < torch.tensor([[5], [2], [4]])


def test_step1_embed(parts):
    llama, _, batch = parts
    vectors, w = mine.embed(llama, batch["passage_ids"], batch["passage_mask"]), llama.state_dict()
    truth = [naive.embedding(w, llama.config, ids) for ids in rows(batch, "passage")]
    assert vectors.dtype == torch.float32
    assert_close(vectors.double(), torch.stack(truth), rtol=1e-5, atol=1e-6)


def test_step2_weights():
    torch.manual_seed(0)
    q, p = F.normalize(torch.randn(2, 4, 8), dim=-1)
    p[0] = q[0]  # most similar to itself: nothing of that may be left
    for tau, rtol in ((0.5, 1e-5), (1e-4, 1e-2)):  # at the second, exp(s / tau) is beyond float32
        w = mine.weights(q, p, tau)
        assert (w.diagonal() == 0).all()
        for i in range(4):
            others = [j for j in range(4) if j != i]
            truth = (p[others].double() @ q[i].double() / tau).softmax(0)
            assert_close(w[i, others].double(), truth, rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("v_norm", [False, True])
def test_step3_read(v_norm):
    q, k, v, _, mask = qkv()
    for j in range(3):
        keys, values = list(k[j, 0][mask[j]]), list(v[j, 0][mask[j]])
        truth = torch.stack([naive.attend(qt, keys, values, v_norm) for qt in q[0, 0]])
        assert_close(mine.read(q[0, 0], k[j, 0], v[j, 0], mask[j], v_norm), truth)


class Count(TorchFunctionMode):
    """Counts the attentions and the matrix products that are computed inside."""

    products = softmaxes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        fused = "attention" in func.__name__
        self.products += any(name in func.__name__ for name in ("matmul", "einsum", "bmm"))
        self.products += 2 * fused
        self.softmaxes += fused + ("softmax" in func.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("v_norm", [False, True])
def test_step4_in_batch_attention_in_one_go(v_norm):
    args = *qkv(), v_norm
    with Count() as count:
        out = mine.in_batch_attention(*args)
    assert_close(out, naive.in_batch_attention(*args))
    enough = "one attention is enough for all pairs and heads: two matrix products, one softmax"
    assert count.products <= 2 and count.softmaxes <= 1, enough


def test_step5_two_streams_without_a_leak(parts):
    _, lm, batch = parts
    ids, mask = batch["lm_ids"], batch["lm_mask"]
    w = torch.rand(3, 3, dtype=torch.float64).fill_diagonal_(0)

    def stream(ids, w):
        return mine.two_streams(lm, ids, mask, w)

    with torch.no_grad():
        assert_close(stream(ids, 0 * w)[mask], lm(ids)[mask])
        before = stream(ids, w)
        truth, _, _ = naive.losses(lm.state_dict(), lm.config, rows(batch, "lm"), w, v_norm=True)
        targets = mask[:, 1:]
        logits = lm.logits(before)[:, :-1][targets]
        assert_close(F.cross_entropy(logits, ids[:, 1:][targets], reduction="sum"), truth)
        for i in range(3):
            changed, last = ids.clone(), int(mask[i].sum()) - 1
            changed[i, last] += 1
            difference = (stream(changed, w) - before).abs().amax(-1)  # [B, T]
            leak = "a token came back, over other passages, to the tokens that are to predict it"
            assert difference[i, :last].max() < 1e-9, leak
            others = [j for j in range(3) if j != i]
            unread = "no other passage has read the token that changed"
            assert difference[others].amax(1).min() > 1e-3, unread
            alone = w.clone()
            alone[i] = 0
            assert_close(stream(ids, alone)[i][mask[i]], lm(ids)[i][mask[i]])
            assert_close(stream(ids, alone)[others], before[others])


def test_step6_the_loss(parts):
    retriever, lm, batch = parts
    w_r, w_lm = retriever.state_dict(), lm.state_dict()
    asked = rows(batch, "query"), rows(batch, "passage")
    w = naive.weights(w_r, retriever.config, *asked, 0.2)
    total, _, n = naive.losses(w_lm, lm.config, rows(batch, "lm"), w, v_norm=True)
    assert_close(mine.loss(retriever, lm, batch, 0.2).double(), total / n, rtol=1e-5, atol=0)


def test_step6_the_gradient_goes_through_the_weights_alone(parts):
    retriever, lm, batch = parts
    params = list(retriever.parameters())

    def gradient(tau):
        loss = mine.loss(retriever, lm, batch, tau)
        return torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)

    uphill, step = gradient(0.2), 1e-2
    slope, ends = sum(g.square().sum() for g in uphill), []
    with torch.no_grad():
        for move in (step, -2 * step):
            for p, g in zip(params, uphill):
                p += move * g
            ends.append(mine.loss(retriever, lm, batch, 0.2).to(slope))
    assert slope > 1e-3, "the retriever gets no gradient"
    assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-2, atol=0)
    flat = max(g.abs().max() for g in gradient(1e9))
    assert flat < 1e-6, "with weights that are the same for any retriever, it still gets a gradient"
