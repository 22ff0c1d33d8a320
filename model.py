"""A Llama-family decoder with LoRA and in-batch attention, which reads and writes Hugging Face files.

The decoder is the usual one: pre-norm blocks of causal attention with rotary positions and grouped key/value heads,
and a SwiGLU MLP. Parameters carry Hugging Face's names, so that reading a checkpoint is a copy and not a translation.
What is new is `in_batch_attention`, and `Llama.forward_in_batch`, which runs a batch of passages through the decoder
twice at once: alone (the context stream) and looking at each other (the in-batch stream).

    model = Llama.from_pretrained("path/to/SmolLM2-135M")
    hidden = model(ids)                                  # [N, T, D]
    logits = model.logits(hidden)                        # [N, T, V]

Shapes, here and in the other files:
    G groups   B passages of a group   N sequences (= G*B)   T tokens   V vocabulary
    D hidden_size   H query heads   H_kv key/value heads   d head_dim   r LoRA rank
"""

import ctypes
import json
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


def tune_allocator():
    """Tell glibc to keep the memory that it frees. Else a CPU run spends up to half of its time asking the system for it
    again. The same as MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 MALLOC_ARENA_MAX=1 in the environment; elsewhere
    than on Linux with glibc it does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, value in ((-4, 0), (-1, -1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX of malloc.h
        mallopt and mallopt(option, value)


# ----------------------------------------------------------------------------------------------------------------------
# configuration


LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# What a number may be, by its name or else its type: least, most, types. Beyond that it is no model's, but would exhaust memory.
LIMITS = {"num_hidden_layers": (1, 1000, int), "max_position_embeddings": (1, 2**31, int), int: (1, 2**20, int),
          int | None: (-1, 2**31, int), float: (1e-30, 1e30, int, float)}  # fmt: skip


def check(what, value, least, most, *types):
    """Raise ValueError that begins with `what` if `value` is of none of the `types`, or not from `least` to `most`."""
    if type(value) not in types or not least <= value <= most:  # type(), since to isinstance() True is an int
        raise ValueError(f"{what} is {value!r:.80}; need {' or '.join(t.__name__ for t in types)} from {least} to {most}")


def check_supported(file, raw, allowed):
    """Raise ValueError that names `file` and the first field of `raw` whose value is not among the `allowed`."""
    for field, values in allowed.items():
        if raw.get(field) not in values:
            raise ValueError(f"{file}: {field} is {raw.get(field)!r:.80}; supported: {', '.join(map(str, values))}")


@dataclass
class LlamaConfig:
    """The fields of Hugging Face's config.json that decide what the decoder computes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or Llama 3's: {"rope_type": "llama3", "factor": ..., ...}
    tie_word_embeddings: bool = False  # the output head is the embedding
    model_type: str = "llama"  # "qwen2" is the same with a bias on q, k and v
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02  # standard deviation of fresh weights

    @classmethod
    def from_pretrained(cls, path):
        """Read `path`/config.json. Raises ValueError that names the field if it asks for what is not implemented."""
        file = find(path) / "config.json"
        raw = read_json(file)
        check_supported(file, raw, {
            "model_type": ("llama", "qwen2"), "hidden_act": (None, "silu"), "attention_bias": (None, False), "mlp_bias": (None, False),
            "use_sliding_window": (None, False), "quantization_config": (None,), "tie_word_embeddings": (None, False, True),
        })  # fmt: skip
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5, 4
        rope = rope if isinstance(rope, dict) else {"type": rope}
        kind = rope.get("rope_type", rope.get("type", "default"))
        check_supported(file, {"RoPE type": kind}, {"RoPE type": ("default", "llama3")})
        values = {k: v for k, v in raw.items() if k in cls.__annotations__ and v is not None}
        values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
        values["rope_scaling"] = {"rope_type": kind} | {k: rope.get(k) for k in LLAMA3_ROPE} if kind == "llama3" else None
        if isinstance(values.get("eos_token_id"), list):  # Llama-3 chat models list several; the first ends a text
            values["eos_token_id"] = next(iter(values["eos_token_id"]), None)
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
        for name, kind in cls.__annotations__.items():
            if name == "head_dim" and name not in values:  # what it follows from has been checked by now
                values[name] = values["hidden_size"] // values["num_attention_heads"]
            limits = LIMITS.get(name, LIMITS.get(kind))
            if limits and (name in values or not hasattr(cls, name)):  # is given, or has no default
                check(f"{file}: {name}", values.get(name), *limits)
        config = cls(**values)
        for name in LLAMA3_ROPE if config.rope_scaling else ():
            check(f"{file}: RoPE's {name}", config.rope_scaling[name], *LIMITS[float])
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise ValueError(f"{file}: need num_attention_heads that num_key_value_heads divides, and an even head_dim")
        return config


# ----------------------------------------------------------------------------------------------------------------------
# in-batch attention


# Where attention is written out: forward and backward at T = 160 take a quarter of SDPA's time in bfloat16 on a CPU, and
# as long in float32.
WRITTEN_OUT = {"cpu"}


def attend(q, k, v, scale, causal=False):
    """softmax(scale * q k^T) v for q [N, H, T, d] and k, v [N, H_kv, U, d]; each key/value head serves H / H_kv query heads."""
    if q.device.type not in WRITTEN_OUT:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    (N, H, T, d), H_kv, U = q.shape, k.shape[1], k.shape[2]
    scores = (q.reshape(N, H_kv, -1, d) * scale) @ k.transpose(2, 3)  # [N, H_kv, H/H_kv*T, U]
    if causal:
        future = torch.ones(T, U, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.view(N, H, T, U).masked_fill_(future, -torch.inf).view(N, H_kv, -1, U)
    return (scores.softmax(-1) @ v).view(N, H, T, d)


def in_batch_attention(q, k, v, weights, mask, v_norm=True, pairs=None):
    """What each passage of a group reads from the other passages: out_i = sum over j != i of w_ij C_ij.

        C_ij[t] = sum_u a_u v_ju / (sum_u a_u |v_ju| + 1e-6),   a = softmax_u(q_it . k_ju / sqrt(d))

    over all real tokens u of passage j, without a causal mask: D_j is context, not future. The division ("V-norm") is
    ordinary attention in disguise. With n_u = |v_ju| + 1e-6 and because the a_u sum to one,

        C_ij[t] = sum_u b_u (v_ju / n_u),   b = softmax_u(q_it . k_ju / sqrt(d) + log n_u)

    so it costs one bias per key, and padding is the same bias at minus infinity.

    q        [B, H, T, d]      queries of the in-batch stream, after RoPE (a leading G is allowed everywhere)
    k, v     [B, H_kv, T, d]   keys (after RoPE) and values of the context stream
    weights  [B, B]            w_ij >= 0; its diagonal is ignored
    mask     [B, T]            true at real tokens; every passage has at least one
    v_norm   False leaves the division out: C_ij[t] = sum_u a_u v_ju
    pairs    (g, i, j), three int64 [P]: the only terms of the sums that count; None: all with i != j
    returns  [B, H, T, d]
    """
    if q.dim() == 4:
        return in_batch_attention(q[None], k[None], v[None], weights[None], mask[None], v_norm, pairs)[0]
    G, B, H, T, d = q.shape
    g, i, j = pairs or (1 - torch.eye(B, device=q.device)).expand(G, B, B).nonzero(as_tuple=True)
    wide = torch.promote_types(v.dtype, torch.float32)
    bias = torch.zeros_like(mask, dtype=wide).masked_fill(~mask.bool(), -1e4)[:, :, None]  # [G, B, 1, T]
    if v_norm:
        n = torch.linalg.vector_norm(v.to(wide), dim=-1) + 1e-6  # [G, B, H_kv, T]
        v, bias = v / n[..., None].to(v.dtype), bias + n.log()
    # The bias rides along as one more coordinate (q's is 1), since SDPA's fast kernels take no bias with a gradient.
    bias = (bias * math.sqrt(d)).to(k.dtype).expand(k.shape[:-1])
    k, q = torch.cat([k, bias[..., None]], -1), F.pad(q, (0, 1), value=1.0)
    # What a pair computes is far larger than what it computes it from, so it is not kept but done again for backward. It is
    # done for `size` pairs at a time, or passages i with as many, so that their scores fit into a CPU's cache.
    again, size = partial(checkpoint, use_reentrant=False, preserve_rng_state=False), max(1, 2**24 // (H * T * T))

    if q.device.type in WRITTEN_OUT and 2 * len(i) > G * B * (B - 1):  # most pairs: two matmuls with all keys and all values
        keys, values = k.permute(0, 2, 4, 1, 3).flatten(3), v.transpose(1, 2).flatten(2, 3)  # [G, H_kv, d+1, B*T], [G, H_kv, B*T, d]
        H_kv = k.shape[2]

        def rows(q, w):  # of b passages i: q [G, b, H, T, d+1], w [G, b, B] -> [G, b, H, T, d]
            q = q.unflatten(2, (H_kv, -1)).transpose(1, 2).flatten(2, 4) / math.sqrt(d)  # [G, H_kv, b*H/H_kv*T, d+1]
            a = (q @ keys).unflatten(2, (-1, H // H_kv * T)).unflatten(-1, (B, T)).softmax(-1)  # [G, H_kv, b, H/H_kv*T, B, T]
            w = w[:, None, :, None].expand(a.shape[:-1]).to(a.dtype)  # before rounding, so that its gradient is summed in float32
            out = (a * w[..., None]).flatten(2, 3).flatten(3) @ values  # [G, H_kv, b*H/H_kv*T, d]
            return out.unflatten(2, (-1, H // H_kv, T)).transpose(1, 2).flatten(2, 3)

        w = torch.zeros_like(weights).index_put((g, i, j), weights[g, i, j]).to(wide)
        size = max(1, size // (G * B))
        return torch.cat([again(rows, *part) for part in zip(q.split(size, 1), w.split(size, 1))], 1)

    def terms(q, k, v, w, q_at, kv_at):  # the sum of w_ij C_ij over some pairs [G*B, H, T, d]
        wv = (v.index_select(0, kv_at) * w[:, None, None, None]).to(v.dtype)  # [P, H_kv, T, d+1]
        c = attend(q.index_select(0, q_at), k.index_select(0, kv_at), wv, 1 / math.sqrt(d))[..., :d]
        return torch.zeros(G * B, H, T, d, dtype=wide, device=q.device).index_add(0, q_at, c.to(wide))

    q, k, v, w = q.flatten(0, 1), k.flatten(0, 1), F.pad(v, (0, 1)).flatten(0, 1), weights[g, i, j].to(wide)
    out = 0
    for part in zip(w.split(size), (g * B + i).split(size), (g * B + j).split(size)):
        out = out + again(terms, q, k, v, *part)
    return out.unflatten(0, (G, B)).to(q.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# the decoder


class Linear(nn.Linear):
    """x W^T + bias; after `add_lora` also scale * B A dropout(x), with W frozen.

    Without dropout that is x (W + scale B A)^T: one matmul for N tokens instead of three, for the price of making the sum
    (and of its gradient, from which those of A and B follow). In multiplications, beyond those of the layer itself:
        apart   N r (in + out),  backward twice that      merged   in out r,  backward twice that and N in out
    """

    def __init__(self, d_in, d_out, bias=False):
        super().__init__(d_in, d_out, bias=bias)
        self.lora_A = self.lora_B = self.dropout = None
        self.scale = 1.0

    def forward(self, x):
        if self.lora_A is None:
            return super().forward(x)
        (out, d_in), r, N = self.weight.shape, self.lora_A.out_features, x.numel() // x.shape[-1]
        learning = torch.is_grad_enabled()
        apart, merged = N * r * (d_in + out), d_in * out * r
        if self.dropout.p and self.training or (1 + 2 * learning) * apart < (1 + 2 * learning) * merged + learning * N * d_in * out:
            return super().forward(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scale
        return F.linear(x, self.merged(), self.bias)

    def merged(self):
        """W + scale B A [out, in]."""
        return self.weight + self.scale * (self.lora_B.weight @ self.lora_A.weight)


def rope(config, T, device):
    """cos and sin [T, d] (float32) of the rotary angles at positions 0..T-1, with Llama 3's rescaling if asked for."""
    freq = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)  # [d/2]
    if s := config.rope_scaling:  # long wavelengths are stretched by `factor`, short ones kept, between them a ramp
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = freq * (keep + (1 - keep) / s["factor"])
    angles = torch.arange(T, device=device).float()[:, None] * freq  # [T, d/2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn coordinates (i, i + d/2) of x [N, H, T, d] by the angles behind cos, sin [T, d]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-right, left], dim=-1) * sin.to(x.dtype)


def recomputed(on, f, *args):
    """f(*args). If `on`, what f would keep for the backward pass is let go and computed again there (but for a matmul that
    comes last in f: only its inputs are needed)."""
    return checkpoint(f, *args, use_reentrant=False) if on and torch.is_grad_enabled() else f(*args)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.recompute = False
        self.head_dim = c.head_dim
        bias = c.model_type == "qwen2"
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)

    def forward(self, x, cos, sin, mix=None, skip=0):
        heads = lambda y: y.view(*y.shape[:2], -1, self.head_dim).transpose(1, 2)  # [N, T, H*d] -> [N, H, T, d]
        q, k, v = heads(self.q_proj(x[skip:])), heads(self.k_proj(x)), heads(self.v_proj(x))

        def read(q, k, v):
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            out = attend(q, k[skip:], v[skip:], 1 / math.sqrt(self.head_dim), causal=True)
            if mix is not None:  # x is the context stream, then the in-batch stream, N sequences each
                N = len(x) // 2
                out = torch.cat([out[:-N], out[-N:] + mix(q[-N:], k[:N], v[:N])])
            return self.o_proj(out.transpose(1, 2).flatten(2))  # [N, T, H*d] -> [N, T, D]

        return recomputed(self.recompute, read, q, k, v)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.recompute = False
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x):
        return recomputed(self.recompute, lambda g, u: self.down_proj(F.silu(g) * u), self.gate_proj(x), self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.recompute = False
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, mix=None, skip=0):
        """x [N, T, D]; the first `skip` sequences leave their keys and values to `mix` and go no further."""
        x = x[skip:] + self.self_attn(recomputed(self.recompute, self.input_layernorm, x), cos, sin, mix, skip)
        return x + self.mlp(recomputed(self.recompute, self.post_attention_layernorm, x))


class Llama(nn.Module):
    """The decoder. `head=False` leaves the output head out, as a retriever does."""

    def __init__(self, config, head=True):
        super().__init__()
        self.config, self.has_head = config, head
        self.path = None  # where the weights came from
        self.recompute_blocks = False
        self.lora = None  # rank, alpha, dropout and targets once `add_lora` has been here
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = None
        if head and not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def init_weights(self):
        """Fresh random weights: normal with config.initializer_range, norms at one, biases at zero."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=self.config.initializer_range)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
        return self

    def recompute_activations(self, how):
        """What to compute a second time in the backward pass instead of keeping it, to save memory (same results):
        "none"; "selective": all but what comes out of matmuls, for about a tenth more time; "full": whole blocks."""
        self.recompute_blocks = how == "full"
        for block in self.layers:
            block.recompute = block.self_attn.recompute = block.mlp.recompute = how == "selective"

    def forward(self, ids, mask=None):
        """ids [N, T] int64 -> hidden states [N, T, D] after the final norm.

        mask [N, T], true at real tokens, is only checked: they must come first (right padding), and then causal
        attention never shows them a padding token. What comes out at padding is of no use.
        """
        if mask is not None and (mask[:, 1:].bool() & ~mask[:, :-1].bool()).any():
            raise ValueError("mask has padding before a real token; pad on the right")
        cos, sin = rope(self.config, ids.shape[1], ids.device)
        x = self.embed_tokens(ids)  # [N, T, D]
        for block in self.layers:
            x = recomputed(self.recompute_blocks, block, x, cos, sin)
        return self.norm(x)

    def forward_in_batch(self, ids, mask, weights, v_norm=True, scale=1.0, context=False, pairs=None):
        """The two streams, through each block together: passages alone, and passages reading each other.

        In every block the in-batch stream adds scale * in_batch_attention(its queries, the context stream's keys and
        values) to its own causal attention. The context stream never reads another passage, so nothing of D_i comes
        back to D_i; after its last keys and values it has no further use.

        ids, mask [G, B, T]; weights [G, B, B], of which only `pairs` count if they are given; returns the hidden states
        of the in-batch stream [G, B, T, D] and, if `context` is asked for, those of the context stream (else None).
        """
        G, B, T = ids.shape

        def mix(q, k, v):
            q, k, v = (y.unflatten(0, (G, B)) for y in (q, k, v))  # [G*B, H, T, d] -> [G, B, H, T, d]
            return scale * in_batch_attention(q, k, v, weights, mask, v_norm, pairs).flatten(0, 1)

        cos, sin = rope(self.config, T, ids.device)
        x = self.embed_tokens(ids.flatten(0, 1))  # [G*B, T, D]
        x = torch.cat([x, x])  # [2*G*B, T, D]: context stream, in-batch stream
        for block in self.layers:
            skip = G * B if block is self.layers[-1] and not context else 0
            x = recomputed(self.recompute_blocks, block, x, cos, sin, mix, skip)
        x = self.norm(x)
        streams = x.view(-1, G, B, T, x.shape[-1])  # [2 or 1, G, B, T, D]
        return streams[-1], streams[0] if context else None

    def logits(self, hidden):
        """hidden [..., D] -> next-token logits [..., V]."""
        if not self.has_head:
            raise ValueError("this Llama was built without an output head (head=False)")
        return F.linear(hidden, (self.lm_head or self.embed_tokens).weight)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", head=True):
        """Read a Hugging Face checkpoint folder (config.json, and safetensors in one file or sharded with an index).

        Every tensor of the model must be there in its shape, and every tensor there must belong to the model; else
        ValueError names it. `dtype` is what the weights are kept in, whatever the file has.
        """
        folder = find(path)
        with torch.device("meta"):
            model = cls(LlamaConfig.from_pretrained(folder), head)
        tensors = [(name.removeprefix("model."), t) for name, t in read_tensors(folder)
                   if not name.endswith("rotary_emb.inv_freq")  # old files store RoPE's frequencies
                   and (name != "lm_head.weight" or model.lm_head)]  # and some a tied head a second time  # fmt: skip
        load_strictly(model, tensors, path, device, dtype)
        model.path = str(path)
        return model


# ----------------------------------------------------------------------------------------------------------------------
# LoRA

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(llama, r, alpha, dropout=0.0, targets=LORA_TARGETS, device=None):
    """Freeze `llama` and give every projection named in `targets` trainable A [r, in], B [out, r] (float32): a
    correction alpha/r * B A that starts at zero, on `device` or where the layer is. Raises ValueError for an unknown target."""
    if unknown := set(targets) - set(LORA_TARGETS):
        raise ValueError(f"LoRA target {', '.join(sorted(unknown))} is unknown; the layers are {', '.join(LORA_TARGETS)}")
    llama.requires_grad_(False)
    llama.lora = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": sorted(targets)}
    for name, layer in llama.named_modules():
        if isinstance(layer, Linear) and name.rpartition(".")[2] in targets:
            layer.lora_A = nn.Linear(layer.in_features, r, bias=False, device=device or layer.weight.device)
            layer.lora_B = nn.Linear(r, layer.out_features, bias=False, device=device or layer.weight.device)
            nn.init.kaiming_uniform_(layer.lora_A.weight, a=math.sqrt(5))  # as peft does
            nn.init.zeros_(layer.lora_B.weight)
            layer.dropout, layer.scale = nn.Dropout(dropout), alpha / r


@torch.no_grad()
def merge_lora(llama):
    """Make the LoRA matrices part of the weights: the same function without them."""
    for layer in llama.modules():
        if isinstance(layer, Linear) and layer.lora_A is not None:
            layer.weight = nn.Parameter(layer.merged().to(layer.weight.dtype))
            layer.lora_A = layer.lora_B = layer.dropout = None
    llama.lora = None


def save_adapter(llama, folder):
    """Write the LoRA matrices as a folder that `peft` loads, for the base model or, with a head, for the causal LM."""
    prefix, task = ("base_model.model.model.", "CAUSAL_LM") if llama.has_head else ("base_model.model.", "FEATURE_EXTRACTION")
    config = {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": llama.path, "bias": "none", **llama.lora}
    tensors = {prefix + name: p.detach() for name, p in llama.named_parameters() if ".lora_" in name}
    write_folder(folder, "adapter_config.json", config, "adapter_model.safetensors", tensors)


def load_adapter(llama, folder):
    """Add the LoRA matrices of a `peft` folder to `llama`. Keys may carry the extra level of a model with a head, and
    an adapter name (".default"). Raises ValueError for what a plain LoRA does not have."""
    folder = find(folder)
    file = folder / "adapter_config.json"
    config = read_json(file)
    none, no = (None, [], {}), (None, False)
    check_supported(file, config, {
        "peft_type": ("LORA",), "bias": ("none", None), "use_dora": no, "fan_in_fan_out": no, "modules_to_save": none, "rank_pattern": none,
        "alpha_pattern": none, "layers_to_transform": none, "layer_replication": none,
    })  # fmt: skip
    r, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if not isinstance(targets, list) or not all(target in LORA_TARGETS for target in targets):
        raise ValueError(f"{file}: target_modules is {targets!r:.80}; need a list of layer names: {', '.join(LORA_TARGETS)}")
    check(f"{file}: r", r, *LIMITS[int])
    check(f"{file}: lora_alpha", alpha, *LIMITS[float])
    check(f"{file}: lora_dropout", dropout := config.get("lora_dropout", 0.0), 0, 1, int, float)
    if config.get("use_rslora"):  # scale alpha / sqrt(r) instead of alpha / r
        alpha = alpha * math.sqrt(r)
    tensors = [(name.removeprefix("base_model.model.").removeprefix("model.").replace(".default.", "."), tensor)
               for name, tensor in read_safetensors(folder / "adapter_model.safetensors").items()]  # fmt: skip
    add_lora(llama, r, alpha, dropout, targets, device="meta")  # takes no memory before the file has proved that r is so large
    load_strictly(llama, tensors, folder, llama.embed_tokens.weight.device, torch.float32, only=".lora_")


# ----------------------------------------------------------------------------------------------------------------------
# files

# A folder may come from a stranger. Nothing in it is code, it names no file outside of itself, and only regular files are read.
# Links are followed wherever they lead: the hub's cache is made of them, people link large weights, and who plants one learns
# nothing, since of a content an error shows one refused value at most.

# All that is ever read of a folder; nothing else is fetched from the hub.
FILES = ("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "tokenizer.json",
         "tokenizer_config.json", "adapter_config.json", "adapter_model.safetensors")  # fmt: skip


def find(name):
    """The local folder of `name`: a folder, or a model of the Hugging Face hub, "org/name" or "org/name@revision".

    What is fetched goes to the hub's usual cache and is not fetched again; HF_HUB_OFFLINE and HF_ENDPOINT are respected.
    Raises ValueError that says how to fetch by hand.
    """
    if Path(name).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", str(name)):
        return Path(name)
    from huggingface_hub import snapshot_download  # here, since it is slow to import

    repo, _, revision = str(name).partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=FILES))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is no folder here, and it could not be had from the Hugging Face hub ({str(error).splitlines()[0]}); to "
            f"fetch it by hand: `hf download {repo} --local-dir FOLDER` where there is a network, then give FOLDER"
        ) from None


def existing(file):
    """`file`. Raises FileNotFoundError that names it if it is none, but a folder perhaps, or a device that never ends."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist, or is no file")
    return file


def brief(text):
    """`text`, in which may stand what a stranger likes, as one short line that a terminal shows as it is."""
    return repr(str(text))[1:-1][:200]


@contextmanager
def reading(file, failed):
    """Make whatever a library raises on the content of `file` one ValueError: "{file} {failed}: ...", on one line."""
    try:
        yield
    except BaseException as error:
        if str(error).startswith(str(file)) or not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # it says so itself, or it is Ctrl-C; a panic in Rust is no Exception either
        raise ValueError(f"{file} {failed}: {brief(error) or type(error).__name__}") from None


def parse(line, where):
    """The JSON value of the bytes `line`. Raises ValueError that begins with `where`."""
    with reading(where, "is not JSON in UTF-8"):
        return json.loads(line.decode("utf-8-sig"), parse_constant={}.__getitem__)  # a KeyError at NaN and Infinity


def read_json(file):
    """The JSON object in `file`. Raises FileNotFoundError or ValueError that name it."""
    value = parse(Path(existing(file)).read_bytes(), file)
    if not isinstance(value, dict):
        raise ValueError(f"{file}: need a JSON object, got {type(value).__name__}")
    return value


def read_safetensors(file):
    """{name: tensor} of one safetensors file. Raises FileNotFoundError or ValueError that name it."""
    existing(file)
    with reading(file, "is damaged or incomplete"):
        return load_file(file)


def read_tensors(folder):
    """[(name, tensor)] of a checkpoint: model.safetensors, or the shards that model.safetensors.index.json lists."""
    folder = Path(folder)
    index, shards = folder / "model.safetensors.index.json", {"": "model.safetensors"}
    if not (folder / "model.safetensors").exists() and index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(re.fullmatch(r"[\w.-]+\.safetensors", str(s)) for s in shards.values()):
            raise ValueError(f"{index}: weight_map must name .safetensors files of this folder")
    return [pair for shard in sorted(set(shards.values())) for pair in read_safetensors(folder / shard).items()]


def load_strictly(model, tensors, source, device, dtype, only=""):
    """Make `tensors`, pairs of name and tensor, the parameters of `model` whose names contain `only`: all of them, as `dtype`
    on `device`. Raises ValueError that names what does not match."""
    given, expected = dict(tensors), {name: p for name, p in model.state_dict().items() if only in name}
    if len(given) < len(tensors):
        raise ValueError(f"{source} has {len(tensors) - len(given)} tensors twice: in two shards, or with and without a prefix")
    for what, names in {"lacks": expected.keys() - given.keys(), "has, beside what the model needs,": given.keys() - expected.keys()}.items():
        if names:
            raise ValueError(f"{source} {what} {len(names)} tensors: {brief(', '.join(sorted(names)[:3]))}")
    for name, p in expected.items():
        t = given[name]
        if p.shape != t.shape or not t.is_floating_point() or t.dtype.itemsize < 2:
            raise ValueError(f"{source}: tensor {name} has shape {brief(list(t.shape))}, need {list(p.shape)}; "
                             f"its type is {t.dtype}, need floats of at least 16 bits")  # fmt: skip
    # copies, since the file's own memory is not aligned, by which matmuls may round otherwise than before they were saved
    model.load_state_dict({name: t.to(device, dtype, copy=True) for name, t in given.items()}, strict=False, assign=True)


def save_model(llama, folder):
    """Write all weights as a Hugging Face checkpoint: a causal LM, or without a head the bare decoder."""
    c = llama.config
    architecture = {"llama": "Llama", "qwen2": "Qwen2"}[c.model_type] + ("ForCausalLM" if llama.has_head else "Model")
    dtype = str(llama.embed_tokens.weight.dtype).removeprefix("torch.")
    config = {"architectures": [architecture], "torch_dtype": dtype, "hidden_act": "silu", **vars(c)}
    tensors = {name: p.detach() for name, p in llama.named_parameters()}
    if llama.has_head:
        tensors = {name if name == "lm_head.weight" else "model." + name: p for name, p in tensors.items()}
    write_folder(folder, "config.json", config, "model.safetensors", tensors)


def write_folder(folder, config_name, config, tensors_name, tensors):
    """Write {folder}/{config_name} and {folder}/{tensors_name}."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / config_name).unlink(missing_ok=True)  # else a link there would be written through; save_file replaces it
    (Path(folder) / config_name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, Path(folder) / tensors_name, {"format": "pt"})
