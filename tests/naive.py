"""The method as plain loops in float64, written from the paper's equations and no file of ours.

It takes a dictionary of weights under Hugging Face's names (LoRA already merged) and knows no
batches: every passage, head, query token and key token is a loop of its own.
"""

import itertools
import math

import torch


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def rotary(x, position, theta):
    """x [d]: the pair (i, i + d/2) turns by position * theta^(-2i/d)."""
    d = len(x)
    out = [None] * d
    for i in range(d // 2):
        angle = position * theta ** (-2 * i / d)
        out[i] = x[i] * math.cos(angle) - x[i + d // 2] * math.sin(angle)
        out[i + d // 2] = x[i + d // 2] * math.cos(angle) + x[i] * math.sin(angle)
    return torch.stack(out)


def block_qkv(w, c, layer, x):
    """x: list of [D] -> q[t][h], k[t][h], v[t][h] after RoPE (k, v repeated for grouped heads)."""
    name = f"layers.{layer}."
    q, k, v = [], [], []
    for t, xt in enumerate(x):
        n = rms_norm(xt, w[name + "input_layernorm.weight"], c.rms_norm_eps)
        parts = {}
        for p in "qkv":
            y = w[f"{name}self_attn.{p}_proj.weight"] @ n
            if c.model_type == "qwen2":
                y = y + w[f"{name}self_attn.{p}_proj.bias"]
            parts[p] = y.split(c.head_dim)
            if c.model_type == "qwen3" and p != "v":
                norm = w[f"{name}self_attn.{p}_norm.weight"]
                parts[p] = [rms_norm(y, norm, c.rms_norm_eps) for y in parts[p]]
        H, repeat = c.num_attention_heads, c.num_attention_heads // c.num_key_value_heads
        q.append([rotary(y, t, c.rope_theta) for y in parts["q"]])
        k.append([rotary(parts["k"][h // repeat], t, c.rope_theta) for h in range(H)])
        v.append([parts["v"][h // repeat] for h in range(H)])
    return q, k, v


def attend(q, keys, values, v_norm=False):
    """One query [d] over lists of keys and values; v_norm: divided by sum_u a_u |v_u| + 1e-6."""
    scores = torch.stack([q @ k for k in keys]) / math.sqrt(len(q))
    a = (scores - scores.max()).exp()
    a = a / a.sum()
    out = sum(a[u] * values[u] for u in range(len(values)))
    if v_norm:
        lengths = [values[u].pow(2).sum().sqrt() for u in range(len(values))]
        out = out / (sum(a[u] * lengths[u] for u in range(len(values))) + 1e-6)
    return out


def in_batch_attention(q, k, v, weights, mask, v_norm):
    """What passages read: q [B, H, T, d], k, v [B, H_kv, T, d], weights [B, B], mask [B, T]."""
    B, H, T, _ = q.shape
    out = torch.zeros_like(q)
    for i, h, t in itertools.product(range(B), range(H), range(T)):
        for j in set(range(B)) - {i}:
            keys, values = (x[j, h // (H // x.shape[1])][mask[j]] for x in (k, v))
            out[i, h, t] += weights[i, j] * attend(q[i, h, t], keys, values, v_norm)
    return out


def finish_block(w, c, layer, x, attention):
    """Residual, o_proj and MLP; x, attention: lists over tokens of [D] and [H*d]."""
    name, out = f"layers.{layer}.", []
    for xt, at in zip(x, attention):
        xt = xt + w[name + "self_attn.o_proj.weight"] @ at
        n = rms_norm(xt, w[name + "post_attention_layernorm.weight"], c.rms_norm_eps)
        gate = w[name + "mlp.gate_proj.weight"] @ n
        inner = gate / (1 + (-gate).exp()) * (w[name + "mlp.up_proj.weight"] @ n)
        out.append(xt + w[name + "mlp.down_proj.weight"] @ inner)
    return out


def causal(q, k, v, H):
    out = []
    for t in range(len(q)):
        past = range(t + 1)
        heads = [
            attend(q[t][h], [k[u][h] for u in past], [v[u][h] for u in past]) for h in range(H)
        ]
        out.append(torch.cat(heads))
    return out


def hidden_states(w, c, ids):
    """Plain decoder: final hidden states of one text, a list of [D]."""
    x = [w["embed_tokens.weight"][i] for i in ids]
    for layer in range(c.num_hidden_layers):
        q, k, v = block_qkv(w, c, layer, x)
        x = finish_block(w, c, layer, x, causal(q, k, v, c.num_attention_heads))
    return [rms_norm(xt, w["norm.weight"], c.rms_norm_eps) for xt in x]


def embedding(w, c, ids, standard=None):
    """The vector [D] of one text that ends in EOS; standard: mean and std, if its mean is meant."""
    hidden = hidden_states(w, c, ids)
    y = hidden[-1]
    if standard:
        y = (sum(hidden[:-1]) / (len(ids) - 1) - standard[0]) / standard[1]
    return y / y.pow(2).sum().sqrt()


def weights(w, c, queries, passages, tau, standard=None):
    """In-batch weights of one group: queries, passages are lists of lists of ids."""
    q = [embedding(w, c, ids, standard) for ids in queries]
    p = [embedding(w, c, ids, standard) for ids in passages]
    B, rows = len(q), []
    for i in range(B):
        s = {j: q[i] @ p[j] / tau for j in range(B) if j != i}
        e = {j: (s[j] - max(s.values())).exp() for j in s} | {i: torch.zeros_like(q[i][0])}
        rows.append(torch.stack([e[j] / sum(e.values()) for j in range(B)]))
    return torch.stack(rows)


def likelihood(w, c, context, text):
    """Mean log-likelihood of the second half of `text`, read after `context` and its first half."""
    ids, first = context + text, len(context) + len(text) // 2
    hidden, total = hidden_states(w, c, ids), 0
    for t in range(first, len(ids)):
        logits = w.get("lm_head.weight", w["embed_tokens.weight"]) @ hidden[t - 1]
        total = total + logits[ids[t]] - torch.logsumexp(logits, 0)
    return total / (len(ids) - first)


def losses(w, c, texts, wij, v_norm, scale=1.0, pad=None, own=1.0, first=0):
    """Summed next-token losses of one group, in-batch and context stream, and how many they are.

    own: factor on a passage's own attention; first: the layer from which on others are read.
    """
    context = [[w["embed_tokens.weight"][i] for i in ids] for ids in texts]
    stream = [list(x) for x in context]
    H = c.num_attention_heads
    for layer in range(c.num_hidden_layers):
        kv = [block_qkv(w, c, layer, x) for x in context]
        new = []
        for i, x in enumerate(stream):
            q, k, v = block_qkv(w, c, layer, x)
            attention = causal(q, k, v, H)
            for t in range(len(x)) if layer >= first else ():
                heads = []
                for h in range(H):
                    mixed = 0
                    for j in range(len(texts)):
                        if j != i:
                            keys, values = ([y[h] for y in kv[j][n]] for n in (1, 2))
                            mixed = mixed + wij[i, j] * attend(q[t][h], keys, values, v_norm)
                    heads.append(mixed)
                attention[t] = own * attention[t] + scale * torch.cat(heads)
            new.append(finish_block(w, c, layer, x, attention))
        context = [finish_block(w, c, layer, x, causal(*kv[j], H)) for j, x in enumerate(context)]
        stream = new
    head = w.get("lm_head.weight", w["embed_tokens.weight"])

    def loss(streams):
        total, n = 0, 0
        for ids, x in zip(texts, streams):
            for t in range(len(ids) - 1):
                if ids[t + 1] != pad:
                    logits = head @ rms_norm(x[t], w["norm.weight"], c.rms_norm_eps)
                    total, n = total + torch.logsumexp(logits, 0) - logits[ids[t + 1]], n + 1
        return total, n

    return loss(stream)[0], loss(context)[0], loss(stream)[1]
