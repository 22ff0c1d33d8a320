"""Revela: a retriever that is trained by nothing but language modelling.

A retriever embeds the B passages of a group; a language model predicts the tokens of each passage while it reads, in
every block, the other passages, and how much it sees of each is decided by the retriever. To predict well, the
language model needs the right passages in view; the next-token loss therefore teaches the retriever what is relevant.

    1. embed        p_i = unit(retriever("passage: " D_i EOS)),   q_i = unit(retriever("query: " D_i or half of it EOS))
    2. similarity   s_ij = q_i . p_j,    w_i = softmax over j != i of s_ij / tau
    3. two streams  context stream:   the plain causal pass, which leaves keys and values K_j, V_j in every block
                    in-batch stream:  out_i = causal_attention_i + scale * sum over j != i of w_ij C_ij
                    (C_ij: what the tokens of D_i read from K_j, V_j; see `model.in_batch_attention`)
    4. loss         next-token cross-entropy of the in-batch stream; the retriever learns through w alone

Two other objectives on the same batches stand at the end, to compare with: `Replug` and `Contrastive`.

    retriever = Retriever.from_pretrained("path/to/SmolLM2-135M")
    vectors = retriever.encode(["a text", "another"], kind="passage")        # [2, D]

Shapes:   G groups   B passages of a group   N = G*B   T tokens   D hidden_size   V vocabulary
"""

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import Tokenizer, pad
from model import Llama, find, load_adapter


# A passage whose weight is at most this does not count: what a row of 16 can lose changes neither the loss nor its
# gradient within the rounding of float32. At tau = 1e-4 nearly all weights are smaller; at 0.05 hardly any is.
NEGLIGIBLE = 1e-8

# Tokens in a batch where no gradient is wanted; on a CPU as many as suit its caches (16,384 take a quarter longer there).
BATCH_TOKENS = {"cpu": 4096, "mps": 16384, "cuda": 16384}


class Retriever(nn.Module):
    """A decoder whose hidden state at the last token, scaled to length one, is the embedding of a text."""

    def __init__(self, llama, tokenizer=None):
        super().__init__()
        self.llama, self.tokenizer = llama, tokenizer

    @classmethod
    def from_pretrained(cls, base, adapter=None, dtype=torch.float32, device="cpu"):
        """A Hugging Face checkpoint, and optionally a PEFT adapter on top of it: folders or hub ids. The tokenizer is
        read where there is one; only `encode` needs it."""
        llama = Llama.from_pretrained(base, dtype, device, head=False)
        if adapter:
            load_adapter(llama, adapter)
        return cls(llama, Tokenizer(base) if (find(base) / "tokenizer.json").exists() else None)

    def forward(self, ids, mask):
        """ids, mask [..., T] (right padded) -> unit vectors [..., D] float32: the hidden state at the last real token."""
        hidden = self.llama(ids.flatten(0, -2))  # [N, T, D]
        last = mask.flatten(0, -2).sum(-1) - 1  # [N]
        hidden = hidden[torch.arange(len(last), device=last.device), last]  # [N, D]
        return F.normalize(hidden.float(), dim=-1).view(*ids.shape[:-1], -1)

    @torch.no_grad()
    def encode(self, texts, kind="passage", max_len=512, batch_tokens=None, progress=False, out=None, chunk=2**16):
        """Texts -> unit vectors, float32 [N, D] on the CPU, in the order of `texts`.

        kind: "query" or "passage" (they have different prefixes). Texts are read up to `max_len` tokens, EOS included;
        `chunk` texts at a time are tokenized and run sorted by length, in batches of at most `batch_tokens` tokens (default:
        `BATCH_TOKENS`; at least one text). Dropout is off. With `out`, a file name, the vectors are written to that .npy file,
        which must not exist, and what comes back is memory-mapped from it: memory holds one chunk, however many texts there are.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.llama.path} has no tokenizer.json, which encode needs")
        weight, was_training, shape = self.llama.embed_tokens.weight, self.training, (len(texts), self.llama.config.hidden_size)
        if out is not None and Path(out).exists():
            raise ValueError(f"{out} exists already; remove it or choose another name")
        batch_tokens = batch_tokens or BATCH_TOKENS[weight.device.type]
        vectors = torch.empty(shape)
        if out is not None:
            vectors = torch.from_numpy(np.lib.format.open_memmap(f"{out}.partial", "w+", np.float32, shape))
        bar = tqdm(total=sum(map(len, texts)), desc=f"{len(texts):,} {kind} texts", unit=" characters", disable=not progress)
        precision = torch.autocast(weight.device.type, weight.dtype) if weight.dtype.itemsize < 4 else nullcontext()
        self.eval()
        with bar, precision:
            for first in range(0, len(texts), chunk):
                rows = self.tokenizer.retriever_ids(texts[first : first + chunk], kind, max_len)
                order, start = sorted(range(len(rows)), key=lambda i: -len(rows[i])), 0  # the longest first: memory is claimed at once
                while start < len(rows):
                    batch = order[start : start + max(1, batch_tokens // len(rows[order[start]]))]
                    ids, mask = pad([rows[i] for i in batch], self.tokenizer.eos_id)
                    vectors[[first + i for i in batch]] = self(ids.to(weight.device), mask.to(weight.device)).cpu()
                    start += len(batch)
                    bar.update(sum(len(texts[first + i]) for i in batch))
        self.train(was_training)
        if out is not None:
            os.replace(f"{out}.partial", out)
        return vectors


class Revela(nn.Module):
    """The objective: the language model's loss on a batch of groups, through which both models learn.

    attn_temperature   tau; 1e-4 in the published recipe
    v_norm             see `model.in_batch_attention`
    inbatch_scale      factor on what passages read from each other (1: published; 0: the control, no in-batch attention)
    dual_loss          add the context stream's own next-token loss
    """

    def __init__(self, retriever, lm, attn_temperature=1e-4, v_norm=True, inbatch_scale=1.0, dual_loss=False):
        super().__init__()
        self.retriever, self.lm = retriever, lm
        self.attn_temperature, self.v_norm = attn_temperature, v_norm
        self.inbatch_scale, self.dual_loss = inbatch_scale, dual_loss
        self.stats = {}  # of the last forward; tensors without gradient

    def similarities(self, batch):
        """s [G, B, B] float32: the cosine of query i (rows) and passage j of a group."""
        p = self.retriever(batch["passage_ids"], batch["passage_mask"])  # [G, B, D]
        q = self.retriever(batch["query_ids"], batch["query_mask"])  # [G, B, D]
        # spread: 0 if all passages have one embedding (collapse), 1 if their mean is zero
        self.stats["spread"] = (1 - p.detach().flatten(0, 1).mean(0).square().sum()).sqrt()
        with torch.autocast(p.device.type, enabled=False):  # in float32: tau may be 1e-4
            return q @ p.transpose(1, 2)  # [G, B, B]

    def weights(self, batch):
        """w [G, B, B] float32: how much passage i sees of passage j. Rows sum to one, the diagonal is zero."""
        s = self.similarities(batch)
        itself = torch.eye(s.shape[-1], dtype=torch.bool, device=s.device)
        w = (s / self.attn_temperature).masked_fill(itself, -torch.inf).softmax(-1)
        self.observe(w.detach())
        self.stats["dropped_weight"] = w.detach().where(w <= NEGLIGIBLE, 0).sum(-1).mean()
        return w

    def observe(self, w):
        """Statistics of distributions over passages, the rows of w."""
        self.stats["max_weight"] = w.amax(-1).mean()
        self.stats["weight_entropy"] = torch.special.entr(w).sum(-1).mean()

    def targets(self, batch):
        """[G, B, T-1] bool: the tokens, from the second on, that are predicted. Padding is not, nor is a token equal to
        the pad token inside a text (as published)."""
        ids = batch["lm_ids"][..., 1:]
        pad_id = self.lm.config.pad_token_id if self.lm.config.pad_token_id is not None else self.lm.config.eos_token_id
        return batch["lm_mask"][..., 1:].bool() & (ids != (-1 if pad_id is None else pad_id))

    def count(self, batch):
        """How many things the loss of `batch` is the mean of: its targets, or in the baselines below its passages."""
        return self.targets(batch).sum()

    def forward(self, batch):
        """batch {query,passage,lm}_{ids,mask}, each [G, B, T] -> the mean loss over the batch's targets (scalar)."""
        ids, mask = batch["lm_ids"], batch["lm_mask"]
        if self.inbatch_scale == 0:
            hidden, context = self.lm(ids.flatten(0, 1)).unflatten(0, ids.shape[:2]), None  # [G, B, T, D]
        else:
            weights = self.weights(batch)
            pairs = (weights > NEGLIGIBLE).nonzero(as_tuple=True)
            hidden, context = self.lm.forward_in_batch(ids, mask, weights, self.v_norm, self.inbatch_scale, self.dual_loss, pairs)
        loss = self.cross_entropy(hidden, batch)
        self.stats["loss"] = loss.detach()
        if context is not None:
            context_loss = self.cross_entropy(context, batch)
            self.stats["context_loss"] = context_loss.detach()
            loss = loss + context_loss
        return loss

    def cross_entropy(self, hidden, batch, chunk=2**23):
        """Mean next-token loss of hidden [G, B, T, D] at the targets of the batch."""
        targets = self.targets(batch)
        hidden, ids = hidden[..., :-1, :][targets], batch["lm_ids"][..., 1:][targets]  # [M, D] and [M]
        head = (self.lm.lm_head or self.lm.embed_tokens).weight
        return CrossEntropy.apply(hidden, head, ids, max(1, chunk // len(head))) / max(len(ids), 1)


class CrossEntropy(torch.autograd.Function):
    """Sum over M targets of logsumexp(W h) - (W h)[target], `size` rows at a time: all logits at once are large (16 x 157
    x 128k floats are 1.3 GB). The gradient, W^T (softmax(W h) - onehot), is made while a piece's logits are there."""

    @staticmethod
    def forward(ctx, hidden, W, ids, size):
        """hidden [M, D], W [V, D], ids [M] int64 -> scalar, float32."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        W_low, total, d_hidden = W.to(dtype), torch.zeros((), device=hidden.device), torch.empty_like(hidden)
        d_W = torch.zeros_like(W) if ctx.needs_input_grad[1] else None
        with torch.autocast(device, enabled=False):
            for h, at, d_h in zip(hidden.split(size), ids[:, None].split(size), d_hidden.split(size)):
                h = h.to(dtype)
                logits = F.linear(h, W_low).float()  # [size, V]
                total -= logits.log_softmax(-1).gather(1, at).sum()
                d_logits = logits.softmax(-1).scatter_add_(1, at, -torch.ones_like(at, dtype=torch.float32)).to(dtype)
                d_h.copy_(d_logits @ W_low)
                if d_W is not None:
                    d_W += d_logits.T @ h
        ctx.save_for_backward(d_hidden, d_W)
        return total

    @staticmethod
    def backward(ctx, d_total):
        d_hidden, d_W = ctx.saved_tensors
        return d_hidden * d_total, d_W if d_W is None else d_W * d_total, None, None


# ----------------------------------------------------------------------------------------------------------------------
# baselines: the same batches and the same retriever, but other losses, which leave the language model as it is


class Replug(Revela):
    """REPLUG LSR (Shi et al. 2023, arXiv 2301.12652): retrieve what helps a frozen language model that reads it before D_i.

        l_ij = mean over the second half of the tokens of D_i of log p_lm(token | D_j and D_i up to that token)
        P_i  = softmax over j != i of s_ij / tau         Q_i = softmax over j != i of l_ij / beta
        loss = mean over i of KL(P_i || Q_i) = sum over j of P_ij log(P_ij / Q_ij)

    This is the paper's direction, from its P_R (the retriever, which learns) to its Q_LM. beta is `lm_temperature`.
    """

    def __init__(self, retriever, lm, attn_temperature, lm_temperature):
        super().__init__(retriever, lm, attn_temperature)
        self.lm_temperature = lm_temperature

    def count(self, batch):
        return torch.tensor(batch["lm_ids"].shape[:2].numel())  # G * B

    def forward(self, batch):
        s, l = self.similarities(batch), self.likelihoods(batch)  # [G, B, B]
        G, B, _ = s.shape
        others = ~torch.eye(B, dtype=torch.bool, device=s.device)
        log_p = (s[:, others].view(G, B, B - 1) / self.attn_temperature).log_softmax(-1)
        log_q = (l[:, others].view(G, B, B - 1) / self.lm_temperature).log_softmax(-1)
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        self.observe(log_p.detach().exp())
        self.stats["loss"] = loss.detach()
        return loss

    @torch.no_grad()
    def likelihoods(self, batch, batch_tokens=None, chunk=2**23):
        """l [G, B, B] float32, zero on the diagonal. `batch_tokens` tokens at a time run, `chunk` logits exist at once."""
        self.lm.eval()  # no dropout
        B, T = batch["lm_ids"].shape[1:]
        ids, mask = batch["lm_ids"].flatten(0, 1), batch["lm_mask"].flatten(0, 1)  # [N, T]
        n, row = mask.sum(-1), torch.arange(len(ids), device=ids.device)
        l = torch.zeros(len(ids), B, device=ids.device)  # [N, B]
        pairs = ((row[:, None] // B == row // B) & (row[:, None] != row)).nonzero()  # [P, 2]
        pairs = pairs[n[pairs].sum(1).argsort()]  # those of one length together, so that little is padding
        for i, j in (p.T for p in pairs.split(max(1, (batch_tokens or BATCH_TOKENS[ids.device.type]) // (2 * T)))):
            texts, real = torch.cat([ids[j], ids[i]], 1), torch.cat([mask[j], mask[i]], 1)  # [P, 2T]
            order = (~real).int().argsort(dim=1, stable=True)  # D_j, D_i, and what was padding behind either
            start, end = n[j] + n[i] // 2, n[j] + n[i]
            texts = texts.gather(1, order)[:, : end.max()]  # [P, L]
            at = torch.arange(1, texts.shape[1], device=ids.device)
            scored = (start[:, None] <= at) & (at < end[:, None])  # [P, L-1]: from the second token on
            hidden, targets = self.lm(texts)[:, :-1][scored], texts[:, 1:][scored]  # [M, D] and [M]
            size = max(1, chunk // self.lm.config.vocab_size)
            pieces = zip(hidden.split(size), targets.split(size))
            log_p = -torch.cat([F.cross_entropy(self.lm.logits(h).float(), t, reduction="none") for h, t in pieces])  # [M]
            l[i, j % B] = torch.zeros(scored.shape, device=ids.device).masked_scatter(scored, log_p).sum(1) / scored.sum(1)
        return l.view(-1, B, B)


class Contrastive(Revela):
    """InfoNCE between the halves of passages, with the group's other passages as negatives; no language model is needed.

        loss = mean over i of -log of (softmax over all j of s_ij / tau) at j = i

    The queries must be first halves and the passages second halves: `collate(..., second_half=True)` makes such batches.
    """

    count = Replug.count

    def forward(self, batch):
        log_p = (self.similarities(batch) / self.attn_temperature).log_softmax(-1)  # [G, B, B]
        loss = -log_p.diagonal(dim1=1, dim2=2).mean()
        self.observe(log_p.detach().exp())
        self.stats["loss"] = loss.detach()
        return loss
