"""The method as plain loops in float64, written from the paper's equations and from nothing in model.py or revela.py.

It takes a dictionary of weights under Hugging Face's names (LoRA already merged) and knows no batches: every passage,
head, query token and key token is a loop of its own.
"""

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
    """x: list of [D] -> q[t][h], k[t][h], v[t][h] after norm, projection and RoPE (k, v repeated for grouped heads)."""
    name, d = f"layers.{layer}.", c.head_dim
    q, k, v = [], [], []
    for t, xt in enumerate(x):
        n = rms_norm(xt, w[name + "input_layernorm.weight"], c.rms_norm_eps)
        parts = {}
        for p in "qkv":
            y = w[f"{name}self_attn.{p}_proj.weight"] @ n
            if c.model_type == "qwen2":
                y = y + w[f"{name}self_attn.{p}_proj.bias"]
            parts[p] = y.split(d)
        repeat = c.num_attention_heads // c.num_key_value_heads
        q.append([rotary(y, t, c.rope_theta) for y in parts["q"]])
        k.append([rotary(parts["k"][h // repeat], t, c.rope_theta) for h in range(c.num_attention_heads)])
        v.append([parts["v"][h // repeat] for h in range(c.num_attention_heads)])
    return q, k, v


def attend(q, keys, values, v_norm=False):
    """One query [d] over lists of keys and values; with v_norm the result is divided by sum_u a_u |v_u| + 1e-6."""
    scores = torch.stack([q @ k for k in keys]) / math.sqrt(len(q))
    a = (scores - scores.max()).exp()
    a = a / a.sum()
    out = sum(a[u] * values[u] for u in range(len(values)))
    if v_norm:
        out = out / (sum(a[u] * values[u].pow(2).sum().sqrt() for u in range(len(values))) + 1e-6)
    return out


def finish_block(w, c, layer, x, attention):
    """Residual, o_proj and MLP; x, attention: lists over tokens of [D] and [H*d]."""
    name, out = f"layers.{layer}.", []
    for xt, at in zip(x, attention):
        xt = xt + w[name + "self_attn.o_proj.weight"] @ at
        n = rms_norm(xt, w[name + "post_attention_layernorm.weight"], c.rms_norm_eps)
        gate = w[name + "mlp.gate_proj.weight"] @ n
        xt = xt + w[name + "mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * (w[name + "mlp.up_proj.weight"] @ n))
        out.append(xt)
    return out


def causal(q, k, v, H):
    return [torch.cat([attend(q[t][h], [k[u][h] for u in range(t + 1)], [v[u][h] for u in range(t + 1)]) for h in range(H)])
            for t in range(len(q))]  # fmt: skip


def hidden_states(w, c, ids):
    """Plain decoder: final hidden states of one text, a list of [D]."""
    x = [w["embed_tokens.weight"][i] for i in ids]
    for layer in range(c.num_hidden_layers):
        q, k, v = block_qkv(w, c, layer, x)
        x = finish_block(w, c, layer, x, causal(q, k, v, c.num_attention_heads))
    return [rms_norm(xt, w["norm.weight"], c.rms_norm_eps) for xt in x]


def weights(w, c, queries, passages, tau):
    """In-batch weights of one group: queries, passages are lists of id lists that end in EOS."""
    unit = lambda y: y / y.pow(2).sum().sqrt()
    q = [unit(hidden_states(w, c, ids)[-1]) for ids in queries]
    p = [unit(hidden_states(w, c, ids)[-1]) for ids in passages]
    B, rows = len(q), []
    for i in range(B):
        s = {j: q[i] @ p[j] / tau for j in range(B) if j != i}
        top = max(s.values())
        e = {j: (sj - top).exp() for j, sj in s.items()}
        rows.append(torch.stack([e[j] / sum(e.values()) if j != i else torch.zeros_like(top) for j in range(B)]))
    return torch.stack(rows)


def losses(w, c, texts, wij, v_norm, scale=1.0, pad=None):
    """Summed next-token losses of one group, in the in-batch and the context stream, and the number of targets."""
    context = [[w["embed_tokens.weight"][i] for i in ids] for ids in texts]
    stream = [list(x) for x in context]
    H = c.num_attention_heads
    for layer in range(c.num_hidden_layers):
        kv = [block_qkv(w, c, layer, x) for x in context]
        new = []
        for i, x in enumerate(stream):
            q, k, v = block_qkv(w, c, layer, x)
            attention = causal(q, k, v, H)
            for t in range(len(x)):
                heads = []
                for h in range(H):
                    mixed = 0
                    for j in range(len(texts)):
                        if j != i:
                            keys, values = [kt[h] for kt in kv[j][1]], [vt[h] for vt in kv[j][2]]
                            mixed = mixed + wij[i, j] * attend(q[t][h], keys, values, v_norm)
                    heads.append(mixed)
                attention[t] = attention[t] + scale * torch.cat(heads)
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
