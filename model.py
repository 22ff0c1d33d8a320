"""A Llama-family decoder with LoRA and in-batch attention, under Hugging Face's names.

The decoder is the usual one: blocks of causal attention with rotary positions and of a SwiGLU MLP.
Parameters have the names that they have in checkpoints, so that loading is copying. What is new is
`in_batch_attention`: what the passages of a group read from each other. Files come last.

    model = Llama.from_pretrained("path/to/SmolLM2-135M")
    hidden = model(ids)                                  # [N, T, D]
    logits = model.logits(hidden)                        # [N, T, V]

Shapes, here and in the other files:
    G groups   B passages of a group   N sequences (= G*B)   T tokens   V vocabulary
    D hidden_size   H query heads   H_kv key/value heads   d head_dim   r LoRA rank
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import (
    blame,
    brief,
    model_folder,
    read_json,
    read_safetensors,
    say,
    write_json,
    write_safetensors,
)


@dataclass
class LlamaConfig:
    """The fields of Hugging Face's config.json that the decoder needs, or that we write back."""

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
    rope_scaling: dict | None = None  # None, or Llama 3's: {"rope_type": "llama3", "factor": ...}
    tie_word_embeddings: bool = False  # the output head is the embedding
    model_type: str = "llama"  # "qwen2": with biases on q, k, v; "qwen3": with norms on q, k
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02  # standard deviation of fresh weights

    @classmethod
    def from_pretrained(cls, path):
        """Read `path`/config.json. Raises ValueError that names a field we do not implement."""
        return cls(**read_config(model_folder(path)))


# --------------------------------------------------------------------------------------------------
# the decoder

# recompute(f, *args) is f(*args), of which args alone are kept: the backward pass calls f again
recompute = partial(checkpoint, use_reentrant=False)


class Linear(nn.Linear):
    """x W^T + bias; after `add_lora` also scale * B A dropout(x), with W frozen."""

    def __init__(self, in_features, out_features, bias=False):
        super().__init__(in_features, out_features, bias=bias)
        self.lora_A = self.lora_B = None  # `add_lora` sets them, `scale` and `dropout`

    def forward(self, x):
        if self.lora_A is None:
            return super().forward(x)
        # no dropout in an adapter that is frozen (train.py --freeze_lm)
        p = self.dropout if self.training and self.lora_A.weight.requires_grad else 0.0
        if p:
            y = recompute(self.correction, x, p)  # q, k and v share the x that is kept
        else:
            y = self.correction(x, p)
        # the frozen matmul comes last, and its backward pass needs W alone. So `recompute` around
        # this, as in `MLP`, does not repeat it: it stops once it has all that is needed
        return y + super().forward(x)

    def correction(self, x, p):
        """scale * B A dropout(x), of probability p."""
        return self.lora_B(self.scale * self.lora_A(dropout(x, p)))


def dropout(x, p):
    """Zero each element with probability p and divide the rest by 1 - p.

    On a CPU torch draws a random number for each element. Here a 64-bit number serves four elements
    with 16 bits each, in a fifth of the time. So p is rounded to a multiple of 2^-16. On mps the
    numbers are the CPU's, too, since `checkpoint` can draw only those again.
    """
    if p == 0 or x.device.type == "cuda":
        return F.dropout(x, p)
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64)
    bits.random_(-(2**63), None)  # each of the 2^64 values is as likely
    bits = bits.view(torch.int16)  # uniform in -2^15 .. 2^15 - 1
    bits = bits[: x.numel()].view(x.shape)
    dropped = round(p * 2**16)  # so many of the 2^16 values, the lowest ones
    kept = bits.ge_(dropped - 2**15).to(x)  # 0 or 1
    return (x * kept).mul_(2**16 / (2**16 - dropped))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean of x^2 + eps) * weight, in the precision of x."""

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def rope(config, T, device):
    """cos and sin [T, d] float32 of the rotary angles at positions 0..T-1.

    With Llama 3's rescaling, long wavelengths are stretched by `factor`, short ones are kept, and
    between them is a ramp.
    """
    even = torch.arange(0, config.head_dim, 2, device=device).float()  # [d/2]
    frequency = config.rope_theta ** (-even / config.head_dim)
    if scaling := config.rope_scaling:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        trained_on = scaling["original_max_position_embeddings"]
        turns = trained_on * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling["factor"])
    angles = torch.outer(torch.arange(T, device=device), frequency)  # [T, d/2]
    angles = angles.repeat(1, 2)  # [T, d]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn coordinates (i, i + d/2) of x [N, H, T, d] by the angles behind cos, sin [T, d]."""
    left, right = x.chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)  # by a right angle
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


# On this device attention is written out. Forward and backward (T = 160) take a quarter of the time
# of torch's scaled_dot_product_attention in bfloat16, and the same in float32.
WRITTEN_OUT_ON = "cpu"


def causal_attention(q, k, v):
    """out_t = sum over u <= t of a_tu v_u,   a_t = softmax over u <= t of q_t . k_u / sqrt(d)

    q [N, H, T, d], k and v [N, H_kv, T, d] -> [N, H, T, d]. A key/value head serves H / H_kv query
    heads, which are stacked along T for one matmul. Padding comes last, so that nobody sees it.
    """
    if q.device.type != WRITTEN_OUT_ON:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    N, H, T, d = q.shape
    rows = q.reshape(N, k.shape[1], -1, d)  # [N, H_kv, H/H_kv*T, d]
    rows = rows / math.sqrt(d)
    scores = rows @ k.mT  # [N, H_kv, H/H_kv*T, T]
    future = q.new_full((T, T), -torch.inf).triu(1)
    a = (scores.view(N, H, T, T) + future).softmax(-1)
    out = a.view_as(scores) @ v  # [N, H_kv, H/H_kv*T, d]
    return out.view_as(q)


class Attention(nn.Module):
    """The projections of a block's attention: `Block` calls `qkv`, attends, and calls `o_proj`."""

    def __init__(self, config):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        H, H_kv = config.num_attention_heads, config.num_key_value_heads
        bias = config.model_type == "qwen2"
        self.head_dim = d
        self.q_proj = Linear(D, H * d, bias)
        self.k_proj = Linear(D, H_kv * d, bias)
        self.v_proj = Linear(D, H_kv * d, bias)
        self.o_proj = Linear(H * d, D)
        norm = RMSNorm if config.model_type == "qwen3" else nn.Identity  # which takes anything
        self.q_norm = norm(d, config.rms_norm_eps)
        self.k_norm = norm(d, config.rms_norm_eps)

    def qkv(self, x, cos, sin):
        """x [N, T, D] -> q [N, H, T, d], k and v [N, H_kv, T, d]; q and k after RoPE."""
        # frozen weights may be bfloat16: cast x once, and not in each projection
        x = x.to(self.q_proj.weight.dtype)
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(2, heads)  # [N, T, H, d]
        k = self.k_proj(x).unflatten(2, heads)  # [N, T, H_kv, d]
        v = self.v_proj(x).unflatten(2, heads)
        q = self.q_norm(q).transpose(1, 2)  # [N, H, T, d]
        k = self.k_norm(k).transpose(1, 2)  # [N, H_kv, T, d]
        v = v.transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    """W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        x = x.to(self.gate_proj.weight.dtype)
        gate, up = self.gate_proj(x), self.up_proj(x)
        return recompute(self.down, gate, up)

    def down(self, gate, up):  # both [N, T, intermediate_size]
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, read=None, kv_only=False):
        """x [N, T, D] -> x after the block, and its keys and values [N, H_kv, T, d].

        read      a function: read(own, q) takes the place of own, the causal attention. What it
                  returns, own and q are [N, H, T, d]
        kv_only   only keys and values are wanted: x is returned as it is
        """
        q, k, v = self.self_attn.qkv(self.input_layernorm(x), cos, sin)
        if kv_only:
            return x, k, v
        out = causal_attention(q, k, v)  # [N, H, T, d]
        if read is not None:
            out = read(out, q)
        out = out.transpose(1, 2).flatten(2)  # [N, T, H*d]
        x = x + self.self_attn.o_proj(out)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, k, v


class Llama(nn.Module):
    """The decoder. `head=False` leaves the output head out, as a retriever does."""

    def __init__(self, config, head=True):
        super().__init__()
        self.config, self.has_head = config, head
        self.path = None  # where the weights came from
        self.lora = None  # once `add_lora` was here, its arguments under PEFT's names, in order
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if head and not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", head=True):
        """Read a Hugging Face checkpoint: config.json, and safetensors in one file or in shards.

        `dtype` is what the weights are kept in, whatever the file has. Raises ValueError that names
        a tensor which is missing, left over, or of another shape.
        """
        folder = model_folder(path)
        with torch.device("meta"), blame(folder, "is no model"):
            model = cls(LlamaConfig.from_pretrained(folder), head)
        tensors, stored_head = [], None
        for name, tensor in read_tensors(folder):
            if name == "lm_head.weight" and model.lm_head is None:
                stored_head = tensor  # not needed, but it must be the embedding again, see below
            elif not name.endswith("rotary_emb.inv_freq"):  # RoPE's, in old files
                tensors.append((name, tensor))
        load_strictly(model, tensors, path, device, dtype)
        embedding = model.embed_tokens.weight
        if head and stored_head is not None and not embedding.equal(stored_head.to(embedding)):
            raise ValueError(
                f"{path}: lm_head.weight is not the embedding; "
                "set tie_word_embeddings in its config.json to false to use it"
            )
        model.path = str(path)
        return model

    def init_weights(self):
        """Draw fresh weights: normal matrices, norms at one, biases at zero. Returns self."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=self.config.initializer_range)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
        return self

    def forward(self, ids, mask=None):
        """ids [N, T] (or [G, B, T]) int64 -> hidden states [N, T, D] after the final norm.

        No mask is needed: padding is on the right, where causal attention sees none of it. If mask
        [N, T], true at real tokens, is given, this is checked. What is at padding is of no use.
        """
        if mask is not None and (mask.int().diff() > 0).any():
            raise ValueError("mask has padding before a real token; pad on the right")
        cos, sin = rope(self.config, ids.shape[-1], ids.device)
        x = self.embed(ids.flatten(0, -2))  # [N, T, D]
        for block in self.layers:
            x, _, _ = block(x, cos, sin)
        return self.norm(x).unflatten(0, ids.shape[:-1])

    def embed(self, ids):
        """ids [N, T] -> the residual stream [N, T, D].

        It stays float32 under autocast. It has a few huge coordinates: rounded to bfloat16 in every
        block, they would drown the gradient in noise.
        """
        x = self.embed_tokens(ids)
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return x.float() if autocast else x

    def logits(self, hidden):
        """hidden [..., D] -> next-token logits [..., V]."""
        if not self.has_head:
            raise ValueError("this Llama was built without an output head (head=False)")
        return F.linear(hidden, (self.lm_head or self.embed_tokens).weight)


# --------------------------------------------------------------------------------------------------
# LoRA

LORA_TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def add_lora(llama, r, alpha, dropout=0.0, targets=LORA_TARGETS, device=None):
    """Freeze `llama` and give its projections a trainable correction alpha/r * B A, zero at first.

    It takes the place of any LoRA before. A [r, in] and B [out, r] are float32, on `device` or
    where the layer is. Raises ValueError for an unknown name in `targets`.
    """
    targets = sorted(targets)
    for name in targets:
        if name not in LORA_TARGETS:
            raise ValueError(f"LoRA target {name} is unknown; need some of {LORA_TARGETS}")
    llama.requires_grad_(False)
    llama.lora = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": targets}
    for name, layer in llama.named_modules():
        if isinstance(layer, Linear):
            layer.lora_A = layer.lora_B = None
        if name.endswith(tuple(targets)):
            where = device or layer.weight.device
            layer.lora_A = nn.Linear(layer.in_features, r, bias=False, device=where)
            layer.lora_B = nn.Linear(r, layer.out_features, bias=False, device=where)
            nn.init.kaiming_uniform_(layer.lora_A.weight, a=math.sqrt(5))  # as peft does
            nn.init.zeros_(layer.lora_B.weight)
            layer.dropout, layer.scale = dropout, alpha / r


@torch.no_grad()
def merge_lora(llama):
    """Make the LoRA matrices part of the weights: the same function without them."""
    for layer in llama.modules():
        if isinstance(layer, Linear) and layer.lora_A is not None:
            correction = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
            merged = (layer.weight + correction).to(layer.weight.dtype)
            layer.weight = nn.Parameter(merged, requires_grad=False)
            layer.lora_A = layer.lora_B = None
    llama.lora = None


# --------------------------------------------------------------------------------------------------
# in-batch attention


def with_diagonal(w, value):
    """w [..., B, B] with `value` where a passage meets itself."""
    itself = torch.eye(w.shape[-1], dtype=torch.bool, device=w.device)
    return w.masked_fill(itself, value)


def in_batch_attention(q, k, v, weights, mask, v_norm=True):
    """What each passage of a group reads from the others: out_i = sum over j != i of w_ij C_ij.

        C_ij[t] = sum_u a_u v_ju / (sum_u a_u |v_ju| + 1e-6),   a = softmax_u(q_it . k_ju / sqrt(d))

    over all real tokens u of passage j. There is no causal mask: D_j is context, not future. The
    division, "V-norm", is by the mean length of what is read: so |C_ij| <= 1, and how much is read
    of a passage is up to w_ij, not to the length of its values. `v_norm=False` leaves it out.

    This is the definition. Training runs `in_batch_attention_fast`; a test holds the two equal.

    q        [..., B, H, T, d]      queries of the in-batch stream, after RoPE
    k, v     [..., B, H_kv, T, d]   keys (after RoPE) and values of the context stream
    weights  [..., B, B]            w_ij >= 0; the diagonal is ignored
    mask     [..., B, T]            true at real tokens; every passage has at least one
    returns  [..., B, H, T, d]
    """
    *_, H, _, d = q.shape
    shared = H // k.shape[-3]  # query heads of a key/value head
    k = k.repeat_interleave(shared, dim=-3)  # [..., B, H, T, d]
    v = v.repeat_interleave(shared, dim=-3)
    scores = torch.einsum("...ihtd,...jhud->...ijhtu", q, k) / math.sqrt(d)  # [..., B, B, H, T, T]
    padding = ~mask.bool()[..., None, :, None, None, :]  # [..., 1, B, 1, 1, T]
    a = scores.masked_fill(padding, -torch.inf).softmax(-1)
    C = torch.einsum("...ijhtu,...jhud->...ijhtd", a, v)  # [..., B, B, H, T, d]
    if v_norm:
        lengths = torch.linalg.vector_norm(v, dim=-1)  # [..., B, H, T]
        mean = torch.einsum("...ijhtu,...jhu->...ijht", a, lengths)
        C = C / (mean[..., None] + 1e-6)
    w = with_diagonal(weights, 0)[..., None, None, None]  # [..., B, B, 1, 1, 1]
    return (w * C).sum(-4).to(q.dtype)  # [..., B, H, T, d]


# The function below computes the same, fast. First, V-norm is ordinary attention in disguise. Let
# n_u = |v_ju| + 1e-6. The a_u sum to one, so the divisor of C_ij is sum_u a_u n_u, and
#
#     C_ij[t] = sum_u b_u (v_ju / n_u),   b_u = a_u n_u / sum_u a_u n_u
#                                             = softmax_u(q_it . k_ju / sqrt(d) + log n_u)
#
# So V-norm costs one bias for each key. Padding is the same bias at minus infinity. Second, w_ij
# goes into the values, and the sum over j into the matmul that sums over u. Third, a passage whose
# weight is next to nothing is left out: `in_batch_plan` says who reads whom.


# A weight up to this is left out: its part in the sum is as small, and so is the error in the
# gradient of s / tau. At tau 1e-4 most are that small, at 0.05 few.
NEGLIGIBLE = 1e-8
MAX_SCORES = 2**24  # attention scores that exist at once: 64 MiB in float32


def in_batch_plan(weights, H, T, negligible=NEGLIGIBLE, max_scores=MAX_SCORES):
    """Who reads whom: a list of parts (i [b], j [b, n]), in which passage i[x] reads passages j[x].

    weights [G, B, B] have a diagonal of zero. Passages of all groups are numbered from 0 to N-1,
    sorted by how many weights above `negligible` they have, and cut into parts of at most
    `max_scores` attention scores, or of one passage. The first passage of a part has the most such
    weights, n. Each passage of the part reads n: those to which it gives its n largest weights.
    """
    B, max_pairs = weights.shape[-1], max_scores // (H * T * T)
    w, order = weights.flatten(0, 1).sort(descending=True)  # [N, B]
    counts = (w > negligible).sum(1).clamp(min=1)  # [N]; a row of zeros reads something, too
    counts, rows = counts.sort(descending=True)  # rows: passages, those that read most come first
    counts = counts.tolist()
    plan, start = [], 0
    while start < len(rows):
        n = counts[start]
        i = rows[start : start + max(1, max_pairs // n)]
        first = i // B * B  # the first passage of its group
        plan.append((i, first[:, None] + order[i, :n]))
        start += len(i)
    return plan


def in_batch_attention_fast(q, k, v, weights, mask, v_norm, plan):
    """`in_batch_attention` with nothing but the terms of `plan` in its sums.

    q [N, H, T, d], k and v [N, H_kv, T, d], mask [G, B, T] -> [N, H, T, d]. weights [G, B, B] have
    a diagonal of zero. Scores exist for one part of the plan at a time, and are computed again for
    the backward pass: they are far larger than what they come from.
    """
    N, _, T, d = q.shape
    B = weights.shape[-1]
    bias = mask.reshape(N, 1, T).bool().log().to(v.dtype)  # log 1 is 0, log 0 is -inf
    if v_norm:
        lengths = torch.linalg.vector_norm(v, dim=-1) + 1e-6  # [N, H_kv, T]: n_u
        v = v / lengths[..., None]
        bias = bias + lengths.log()  # [N, H_kv, T]
    queries = q.reshape(N, k.shape[1], -1, d)  # [N, H_kv, H/H_kv*T, d]
    queries = queries / math.sqrt(d)
    weights = weights.flatten(0, 1)  # [N, B]

    def passages(x, j):
        """x[j] as [b, H_kv, n, T, ...]."""
        x = x.index_select(0, j.flatten())  # not x[j]: its backward pass is slow
        return x.unflatten(0, j.shape).transpose(1, 2)

    def attend(i, j):
        """What passages i [b] read of passages j [b, n]."""
        keys = passages(k, j).flatten(2, 3)  # [b, H_kv, n*T, d]
        scores = queries.index_select(0, i) @ keys.mT  # [b, H_kv, H/H_kv*T, n*T]
        scores = scores.unflatten(-1, (-1, T))  # [b, H_kv, H/H_kv*T, n, T]
        scores = scores + passages(bias, j)[:, :, None]
        a = scores.softmax(-1)  # over the tokens of each passage: a_u, or with V-norm b_u
        w = weights[i[:, None], j % B]  # [b, n]; j % B: its number in its group
        w = w[:, None, :, None, None]
        values = (w * passages(v, j)).to(v.dtype)  # [b, H_kv, n, T, d]
        values = values.flatten(2, 3)
        return a.flatten(3) @ values  # over passages and tokens at once: [b, H_kv, H/H_kv*T, d]

    parts = [recompute(attend, i, j, preserve_rng_state=False) for i, j in plan]
    order = torch.cat([i for i, _ in plan]).argsort()  # back to that of the passages
    return torch.cat(parts).index_select(0, order).view_as(q)


# --------------------------------------------------------------------------------------------------
# files: Hugging Face checkpoints and PEFT adapters. They are not to be trusted: what we do not
# compute is refused by name, and no file can name one outside of its folder.

# CONFIG, ROPE and ADAPTER below are {names of fields: [what each may be]}. A list has values and
# rules:
#
#     range(1, 9)    an integer in this range
#     (0.5, 1e9)     a number from the first to below the second
#     [SIZE, "a"]    a list, not empty, whose items each follow one of the rules in it
#     dict           any object
SIZE = range(1, 10**7)
ID = range(-1, 10**9)
NUMBER = (1e-29, 1e15)


def fits(x, allowed):
    """Whether the value x is one of those `allowed`, or follows one of the rules among them."""
    for rule in allowed:
        if isinstance(rule, range):
            good = type(x) is int and x in rule  # True is no int here
        elif isinstance(rule, tuple):
            good = type(x) in (int, float) and rule[0] <= x < rule[1]
        elif isinstance(rule, list):
            good = type(x) is list and x and all(fits(item, rule) for item in x)
        else:
            good = type(x) is dict if rule is dict else x == rule
        if good:
            return True
    return False


# Fields that change nothing here.
IGNORED = """architectures auto_mapping base_model_name_or_path dtype inference_mode is_llama_config
    max_window_layers megatron_core peft_version pretraining_tp qalora_group_size revision
    sliding_window task_type torch_dtype transformers_version use_cache""".split()


def check(where, raw, rules):
    """Return, in one line, the names of the fields of `raw` that are set and have no rule.

    A key of `rules` may hold several names. Raises ValueError that names a field whose value its
    rule does not allow.
    """
    unknown = {name for name in raw if raw[name]} - set(IGNORED)
    for names, allowed in rules.items():
        for name in names.split():
            value = raw.get(name)
            if not fits(value, allowed):
                words = [str(getattr(x, "__name__", x)) for x in allowed]  # "dict" for the type
                need = " or ".join(words).replace("None", "unset")
                raise ValueError(f"{where} {name} is {value!r:.80}; need {need}")
            unknown.discard(name)
    return brief(", ".join(sorted(unknown)))


# Fields that change what is computed may have only the values with which we compute it.
CONFIG = {
    "model_type": ["llama", "qwen2", "qwen3"],
    "vocab_size hidden_size intermediate_size num_attention_heads": [SIZE],
    "num_key_value_heads head_dim max_position_embeddings": [None, SIZE],
    "num_hidden_layers": [range(1, 1000)],
    "rms_norm_eps rope_theta initializer_range": [None, NUMBER],
    "rope_scaling rope_parameters": [None, dict],
    "bos_token_id pad_token_id": [None, ID],
    "eos_token_id": [None, ID, [ID]],  # Llama 3's chat models list several
    "tie_word_embeddings": [None, False, True],
    "hidden_act": [None, "silu"],
    "layer_types": [None, ["full_attention"]],
    "is_causal": [None, True],
    "attention_bias mlp_bias rope_interleaved use_sliding_window": [None, False],
    "attention_dropout": [None, 0],
    "partial_rotary_factor": [None, 1],
    "quantization_config": [None],
}
ROPE = {
    "rope_type type": [None, "default", "llama3"],
    "rope_theta": [None, NUMBER],
    "partial_rotary_factor": [None, 1],
}
LLAMA3 = "factor low_freq_factor high_freq_factor original_max_position_embeddings"
ADAPTER = {
    "peft_type": ["LORA"],
    "r": [SIZE],
    "lora_alpha": [NUMBER],
    "lora_dropout": [(0, 0.99)],
    "target_modules": [LORA_TARGETS],
    "use_rslora": [None, False, True],
    "bias": [None, "none"],
    # others (pissa, olora ...) change the base's weights
    "init_lora_weights": [None, False, True, "gaussian", "eva", "orthogonal"],
}


def read_config(folder):
    """The fields of LlamaConfig in a config.json. Raises ValueError that names a bad one."""
    for place in (folder, folder / "retriever"):  # what training wrote is often given as --model
        if (place / "adapter_config.json").exists():
            raise ValueError(f"{folder} is no model: use --adapter {place}, its base as --model")
    if (folder / "retriever").exists():
        raise ValueError(f"{folder} is a training run: use --model {folder}/retriever")
    file = folder / "config.json"
    raw = read_json(file)
    if unknown := check(f"{file}:", raw, CONFIG):
        say(f"{file}: fields unknown to us, and not used: {unknown}")
    raw |= read_rope(file, raw)
    heads = raw["num_attention_heads"]
    values = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads}
    for name in LlamaConfig.__annotations__:
        if raw.get(name) is not None:
            values[name] = raw[name]
    if isinstance(raw.get("eos_token_id"), list):
        values["eos_token_id"] = raw["eos_token_id"][0]
    H_kv, d = values["num_key_value_heads"], values["head_dim"]
    if heads % H_kv or d % 2 or d == 0:
        raise ValueError(
            f"{file}: num_key_value_heads must divide num_attention_heads, and head_dim be even"
        )
    return values


def read_rope(file, raw):
    """rope_theta and rope_scaling of a config.json, as transformers 4 or 5 writes them."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    llama3 = (rope.get("rope_type") or rope.get("type")) == "llama3"
    rules = ROPE | {LLAMA3: [NUMBER if llama3 else None]}
    if unknown := check(f"{file}: RoPE", rope, rules):
        raise ValueError(f"{file}: RoPE's {unknown} is not supported")
    theta = rope.get("rope_theta") or raw.get("rope_theta")
    scaling = None
    if llama3:
        scaling = {"rope_type": "llama3"} | {name: rope[name] for name in LLAMA3.split()}
    return {"rope_theta": theta, "rope_scaling": scaling}


def read_tensors(folder):
    """Yield (name, tensor) of model.safetensors, or of its shards, model-*.safetensors."""
    file = folder / "model.safetensors"
    shards = [] if file.exists() else sorted(folder.glob("model-*.safetensors"))
    for shard in shards or [file]:
        yield from read_safetensors(shard).items()


def load_strictly(model, tensors, source, device, dtype):
    """Fill the parameters of `model` that are still on the meta device.

    `tensors`: pairs of name and tensor. They become `dtype` on `device`. A name may begin as in
    peft or in a model with a head, and may hold an adapter's name (".default"). Raises ValueError
    that names what does not match.
    """
    given = {}
    for name, t in tensors:
        name = name.removeprefix("base_model.model.").removeprefix("model.")
        name = name.replace(".default.", ".")
        if name in given:
            raise ValueError(f"{source} has the tensor {brief(name)} twice")
        if not t.is_floating_point() or t.dtype.itemsize < 2:
            raise ValueError(f"{source}: {brief(name)} is {t.dtype}; need floats, 16 bits or more")
        # copied, since a file's memory is not aligned, and matmuls then round differently
        given[name] = t.to(device, dtype, copy=True)
    shapes = {name: p.shape for name, p in model.named_parameters() if p.is_meta}
    missing = [name for name in shapes if name not in given]
    left = [name for name in given if name not in shapes]
    if missing or left:
        raise ValueError(f"{source}: missing {missing[:3]}, left over {brief(left[:3])}")
    for name, shape in shapes.items():
        has = given[name].shape
        if has != shape:
            raise ValueError(f"{source}: tensor {name} has shape {list(has)}, need {list(shape)}")
    model.load_state_dict(given, strict=False, assign=True)


def load_adapter(llama, folder):
    """Freeze `llama` and put the LoRA matrices of a PEFT folder in place of any it has.

    Raises ValueError that names a field or tensor of what is more than plain LoRA.
    """
    folder = model_folder(folder)
    file = folder / "adapter_config.json"
    config = read_json(file)
    if unknown := check(f"{file}:", config, ADAPTER):
        raise ValueError(f"{file}: {unknown} is set; need plain LoRA, without it")
    r, alpha, dropout = config["r"], config["lora_alpha"], config["lora_dropout"]
    if config.get("use_rslora"):  # scale alpha / sqrt(r) instead of alpha / r
        alpha = alpha * math.sqrt(r)
    tensors = read_safetensors(folder / "adapter_model.safetensors").items()
    # on the meta device: nothing is allocated before the file's shapes have confirmed r
    add_lora(llama, r, alpha, dropout, config["target_modules"], device="meta")
    device = llama.embed_tokens.weight.device
    load_strictly(llama, tensors, folder, device, torch.float32)


def save_adapter(llama, folder):
    """Write the LoRA matrices as a PEFT folder, for the bare decoder or, with a head, the LM.

    With mean pooling a retriever needs `revela.save_pooling`, too.
    """
    if llama.has_head:
        prefix, task = "base_model.model.model.", "CAUSAL_LM"
    else:
        prefix, task = "base_model.model.", "FEATURE_EXTRACTION"
    config = {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": llama.path}
    config |= {"bias": "none", **llama.lora}
    tensors = {}
    for name, tensor in llama.state_dict().items():
        if ".lora_" in name:
            tensors[prefix + name] = tensor
    write_folder(folder, "adapter_", config, tensors)


def save_model(llama, folder):
    """Write all weights as a Hugging Face checkpoint: a causal LM, or the bare decoder."""
    if llama.lora:
        raise ValueError("save_model needs a model without LoRA: call merge_lora, or save_adapter")
    if llama.has_head:
        prefix, kind = "model.", "ForCausalLM"
    else:
        prefix, kind = "", "Model"
    name = llama.config.model_type.capitalize() + kind
    dtype = str(llama.embed_tokens.weight.dtype).removeprefix("torch.")
    config = {"architectures": [name], "torch_dtype": dtype, "hidden_act": "silu"}
    tensors = {prefix + name: t for name, t in llama.state_dict().items()}
    if llama.lm_head:
        tensors["lm_head.weight"] = tensors.pop("model.lm_head.weight")
    write_folder(folder, "", config | vars(llama.config), tensors)


def write_folder(folder, prefix, config, tensors):
    """Write `folder`/{prefix}config.json and {prefix}model.safetensors."""
    write_json(f"{folder}/{prefix}config.json", config)
    write_safetensors(f"{folder}/{prefix}model.safetensors", tensors)
