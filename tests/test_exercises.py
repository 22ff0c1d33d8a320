"""The checks of assets/EXERCISES.md: steps of the objective, against loops in float64 and against what must not happen.

They run on the file that the environment variable REVELA_MINE names; without it, on our own code behind the same six functions.
"""

import importlib.util
import os
from types import SimpleNamespace

import naive
import pytest
import torch
from conftest import make_model
from torch.overrides import TorchFunctionMode

from data import Tokenizer, collate
from model import Llama, in_batch_attention
from revela import Retriever, Revela


def load(file):
    spec = importlib.util.spec_from_file_location("mine", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_weights(q, p, tau):
    asked = {"query_ids": q[None], "query_mask": None, "passage_ids": p[None], "passage_mask": None}
    return Revela(lambda vectors, _: vectors, None, tau).weights(asked)[0]


def our_read(q, k, v, mask, v_norm=True):
    two = lambda y: torch.stack([y, y])[:, None]  # the second passage is what the first reads
    return in_batch_attention(two(q), two(k), two(v), torch.ones(2, 2), torch.stack([mask, mask]), v_norm)[0, 0]


ours = SimpleNamespace(
    embed=lambda llama, ids, mask: Retriever(llama)(ids, mask),
    weights=our_weights,
    read=our_read,
    in_batch_attention=in_batch_attention,
    two_streams=lambda lm, ids, mask, w: lm.forward_in_batch(ids[None], mask[None], w[None])[0][0],
    loss=lambda retriever, lm, batch, tau: Revela(Retriever(retriever), lm, tau)({name: t[None] for name, t in batch.items()}),
)
mine = load(os.environ["REVELA_MINE"]) if "REVELA_MINE" in os.environ else ours


@pytest.fixture
def parts(tmp_path):
    """(retriever, lm, batch): two different tiny models in float64, and a batch {query,passage,lm}_{ids,mask}, each [B, T]."""
    retriever = Llama.from_pretrained(make_model(tmp_path / "r", seed=1), torch.float64, head=False)
    lm = Llama.from_pretrained(make_model(tmp_path / "lm", seed=2), torch.float64)
    tokenizer = Tokenizer(tmp_path / "lm")
    batch = collate([(["the cat sees the sun.", "milk", "a dog likes the cat."], None)], tokenizer, tokenizer, first_half=True)
    return retriever, lm, {name: t[0] for name, t in batch.items()}


def rows(batch, name):
    return [ids[mask].tolist() for ids, mask in zip(batch[name + "_ids"], batch[name + "_mask"])]


def qkv(B=3, H=4, H_kv=2, T=5, d=6):
    """q [B, H, T, d], k and v [B, H_kv, T, d], weights [B, B] with a diagonal that must not count, mask [B, T]."""
    torch.manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    return rand(B, H, T, d), rand(B, H_kv, T, d), rand(B, H_kv, T, d), rand(B, B).abs(), torch.arange(T) < torch.tensor([[5], [2], [4]])


def naive_read(q, k, v, mask, v_norm):
    """What one head reads, with loops: q, k, v [T, d], mask [T]."""
    return torch.stack([naive.attend(qt, list(k[mask]), list(v[mask]), v_norm) for qt in q])


def test_step1_embed(parts):
    llama, _, batch = parts
    vectors = mine.embed(llama, batch["passage_ids"], batch["passage_mask"])
    states = torch.stack([naive.hidden_states(dict(llama.named_parameters()), llama.config, ids)[-1] for ids in rows(batch, "passage")])
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.double(), states / states.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_step2_weights():
    torch.manual_seed(0)
    q, p = torch.nn.functional.normalize(torch.randn(2, 4, 8), dim=-1)
    for tau in (0.5, 1e-4):  # at the second, exp(s / tau) is beyond float32
        w = mine.weights(q, p, tau)
        for i in range(4):
            others = [j for j in range(4) if j != i]
            truth = torch.stack([q[i].double() @ p[j].double() for j in others]).div(tau).softmax(0)
            torch.testing.assert_close(w[i, others].double(), truth, rtol=1e-2 if tau < 1e-3 else 1e-5, atol=1e-30)
        assert (w.diagonal() == 0).all()


@pytest.mark.parametrize("v_norm", [False, True])
def test_step3_read(v_norm):
    q, k, v, _, mask = qkv()
    for j in range(3):
        args = q[0, 0], k[j, 0], v[j, 0], mask[j], v_norm
        torch.testing.assert_close(mine.read(*args), naive_read(*args), rtol=1e-9, atol=1e-9)


class Count(TorchFunctionMode):
    """Counts the attentions and the matrix products that are computed inside."""

    def __init__(self):
        super().__init__()
        self.products = self.softmaxes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        fused = "attention" in func.__name__
        self.products += 2 * fused + any(name in func.__name__ for name in ("matmul", "einsum", "bmm"))
        self.softmaxes += fused + ("softmax" in func.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("v_norm", [False, True])
def test_step4_in_batch_attention_in_one_go(v_norm):
    q, k, v, w, mask = qkv()
    truth = torch.zeros_like(q)
    for i in range(3):
        for j in range(3):
            for h in range(4):
                if i != j:
                    truth[i, h] += w[i, j] * naive_read(q[i, h], k[j, h // 2], v[j, h // 2], mask[j], v_norm)
    with Count() as count:
        out = mine.in_batch_attention(q, k, v, w, mask, v_norm)
    torch.testing.assert_close(out, truth, rtol=1e-9, atol=1e-9)
    assert count.products <= 2 and count.softmaxes <= 1, "one attention is enough for all pairs and heads: two matrix products, one softmax"


def test_step5_two_streams_without_a_leak(parts):
    _, lm, batch = parts
    ids, mask, w = batch["lm_ids"], batch["lm_mask"], torch.rand(3, 3, dtype=torch.float64)
    stream = lambda ids, w: mine.two_streams(lm, ids, mask, w)
    with torch.no_grad():
        torch.testing.assert_close(stream(ids, 0 * w)[mask], lm(ids)[mask])
        before = stream(ids, w)
        for i in range(3):
            changed, last = ids.clone(), int(mask[i].sum()) - 1
            changed[i, last] += 1
            difference = (stream(changed, w) - before).abs().amax(-1)  # [B, T]
            assert difference[i, :last].max() < 1e-9, "a token came back, over other passages, to the tokens that are to predict it"
            others = [j for j in range(3) if j != i]
            assert difference[others].amax(1).min() > 1e-3, "no other passage has read the token that changed"
            alone = w.clone()
            alone[i] = 0
            torch.testing.assert_close(stream(ids, alone)[i][mask[i]], lm(ids)[i][mask[i]])
            torch.testing.assert_close(stream(ids, alone)[others], before[others])


def test_step6_the_loss(parts):
    retriever, lm, batch = parts
    w_r, w_lm = dict(retriever.named_parameters()), dict(lm.named_parameters())
    with torch.no_grad():
        w = naive.weights(w_r, retriever.config, rows(batch, "query"), rows(batch, "passage"), 0.2)
        total, _, n = naive.losses(w_lm, lm.config, rows(batch, "lm"), w, v_norm=True)
    torch.testing.assert_close(mine.loss(retriever, lm, batch, 0.2).double(), total / n, rtol=1e-5, atol=0)


def test_step6_the_gradient_goes_through_the_weights_alone(parts):
    retriever, lm, batch = parts
    params = list(retriever.parameters())

    def gradient(tau):
        return torch.autograd.grad(mine.loss(retriever, lm, batch, tau), params, allow_unused=True, materialize_grads=True)

    uphill, step = gradient(0.2), 1e-2
    slope, ends = sum(g.square().sum() for g in uphill), []
    with torch.no_grad():
        for move in (step, -2 * step):
            for p, g in zip(params, uphill):
                p += move * g
            ends.append(mine.loss(retriever, lm, batch, 0.2).to(slope))
    assert slope > 1e-3, "the retriever gets no gradient"
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-2, atol=0)
    flat = max(g.abs().max() for g in gradient(1e9))
    assert flat < 1e-6, "with weights that are the same for any retriever, it still gets a gradient"
