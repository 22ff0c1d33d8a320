"""Revela: a retriever that is trained by nothing but language modelling.

A retriever embeds the B passages of a group. A language model predicts the tokens of each passage.
Its blocks read the other passages, too, and the retriever decides how much of each. To predict well
it needs the right passages in view. So its next-token loss teaches the retriever what is relevant.

    1. embed        p_i = unit(retriever("passage: " D_i EOS))
                    q_i = unit(retriever(first half of ("query: " D_i), EOS))
    2. similarity   s_ij = q_i . p_j,    w_i = softmax over j != i of s_ij / tau
    3. two streams  of the same language model, each passage at positions 0 to T-1 in both
                    context stream:   the plain causal pass; leaves keys and values K_j, V_j in
                                      every block
                    in-batch stream:  out_i = own_i + sum over j of w_ij C_ij
                                      own_i: causal attention of D_i to itself
                                      C_ij: attention of D_i to K_j, V_j (`in_batch_attention`)
    4. loss         next-token cross-entropy of the in-batch stream; both models learn from it, the
                    retriever through w alone

The retriever and the objective come first, then the way from texts to batches, and to vectors. Last
are the retriever's file, and other objectives, to compare with.

    retriever = Retriever.from_pretrained("path/to/SmolLM2-135M")
    vectors = retriever.encode(["a text", "another"], kind="passage")        # [2, D]

Shapes:   G groups   B passages of a group   N = G*B   T tokens   V vocabulary
          D hidden_size   H query heads   H_kv key/value heads   d head_dim
"""

import os
from functools import partial

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import (
    POOLING,
    PREFIX,
    WORD,
    blame,
    model_folder,
    must_be_new,
    must_exist,
    read_json,
    read_safetensors,
    write_safetensors,
)
from model import (
    NEGLIGIBLE,
    SIZE,
    Llama,
    check,
    in_batch_attention_fast,
    in_batch_plan,
    load_adapter,
    recompute,
    rope,
    with_diagonal,
)


class Retriever(nn.Module):
    """A decoder whose hidden states make a text's embedding, a vector of length one.

    Pooling "eos", as published, takes the state at the EOS. "mean" takes the mean of all states
    before it, prefix included, and standardises each coordinate by `mean` and `std` [D]: those of
    training passages before the first update. It ranks well before any training.
    """

    def __init__(self, llama, tokenizer=None, pooling="eos"):
        super().__init__()
        if pooling not in ("eos", "mean"):
            raise ValueError(f"pooling is {pooling!r:.80}; need 'eos' or 'mean'")
        self.llama, self.tokenizer, self.pooling = llama, tokenizer, pooling
        # 0 and 1, which change nothing, until `standardise` or `load_pooling`
        zero = torch.zeros(llama.config.hidden_size, device=llama.embed_tokens.weight.device)
        self.register_buffer("mean", zero)
        self.register_buffer("std", torch.ones_like(zero))

    @classmethod
    def from_pretrained(cls, base, adapter=None, dtype=torch.float32, device="cpu"):
        """Read a Hugging Face checkpoint, and optionally a PEFT adapter on top of it.

        Both are folders or hub ids. The tokenizer is read where there is one; `encode` needs it.
        The retriever comes in eval mode.
        """
        llama = Llama.from_pretrained(base, dtype, device, head=False)
        if adapter:
            load_adapter(llama, adapter)
        has_tokenizer = (model_folder(base) / "tokenizer.json").exists()
        folder = model_folder(adapter or base)
        pooling = "mean" if (folder / POOLING).exists() else "eos"
        check_pooling(folder / "1_Pooling/config.json", pooling)  # what others wrote must agree
        retriever = cls(llama, Tokenizer(base) if has_tokenizer else None, pooling)
        load_pooling(retriever, folder)
        return retriever.eval()

    def forward(self, ids, mask):
        """ids, mask [..., T], right padded, EOS last -> unit vectors [..., D] float32."""
        x = (self.pool(ids, mask) - self.mean) / self.std  # [N, D]
        return F.normalize(x, dim=-1).unflatten(0, ids.shape[:-1])

    def pool(self, ids, mask):
        """ids, mask [..., T] of N texts -> [N, D] float32: their vectors before standardisation."""
        ids, mask = ids.flatten(0, -2), mask.flatten(0, -2)  # [N, T]
        hidden = self.llama(ids)  # [N, T, D]; no token sees the padding to its right
        n = mask.sum(-1) - 1  # [N]: tokens before the EOS, which is at position n
        if self.pooling == "eos":
            row = torch.arange(len(n), device=n.device)
            return hidden[row, n].float()
        position = torch.arange(ids.shape[1], device=n.device)
        before_eos = position < n[:, None]  # [N, T]
        x = hidden.float() * before_eos[..., None]
        return x.sum(1) / n[:, None].clamp(min=1)

    @torch.no_grad()
    def standardise(self, batches):
        """Let `mean` and `std` be those of the passages of `batches`."""
        x = [self.pool(batch["passage_ids"], batch["passage_mask"]) for batch in batches]
        x = torch.cat(x)  # [N, D]
        self.mean.copy_(x.mean(0))
        self.std.copy_(x.std(0).clamp(min=1e-6))  # above 0, should all passages be the same

    def encode(self, texts, kind="passage", **options):
        """Texts -> unit vectors, float32 [N, D] on the CPU. Options: see `encode_texts`."""
        return encode_texts(self, texts, kind, **options)


# --------------------------------------------------------------------------------------------------
# the objective


class Revela(nn.Module):
    """The language model's loss on a batch of groups, through which both models learn.

    attn_temperature   tau; 1e-4 in the published recipe: only passages whose similarity is within
                       about 1e-3 of the best one's get a weight
    dual_loss          add the context stream's own next-token loss
    v_norm, **form     how passages read each other: arguments of `two_streams`
    """

    def __init__(
        self, retriever, lm, attn_temperature=1e-4, v_norm=True, *, dual_loss=False, **form
    ):
        super().__init__()
        self.retriever, self.lm = retriever, lm
        self.llamas = {"retriever": retriever.llama, "lm": lm}  # keys: folders they are saved in
        self.form = {"v_norm": v_norm} | form
        self.attn_temperature, self.dual_loss = attn_temperature, dual_loss
        self.stats = {}  # of the last forward; tensors without gradient

    def forward(self, batch):
        """batch {query,passage,lm}_{ids,mask}, each [G, B, T] -> mean loss over its targets."""
        q, p = self.embed(batch)
        w = in_batch_weights(q, p, self.attn_temperature)
        loss = self.loss_in_batch(batch, w)
        self.stats = observe(loss, w, p)
        if self.dual_loss:
            # a pass of its own: `two_streams` leaves the context stream's last block unfinished
            context_loss = self.loss_alone(batch)
            self.stats["context_loss"] = context_loss.detach()
            loss = loss + context_loss
        return loss

    def loss_in_batch(self, batch, w):
        """The next-token loss of passages that read each other by the weights w [G, B, B]."""
        ids, mask = batch["lm_ids"], batch["lm_mask"]
        hidden = two_streams(self.lm, ids, mask, w, **self.form)
        return self.cross_entropy(hidden, batch)

    def loss_alone(self, batch):
        """The next-token loss of passages alone: that of the context stream."""
        hidden = self.lm(batch["lm_ids"])
        return self.cross_entropy(hidden, batch)

    def embed(self, batch):
        """The queries and passages of a batch, q and p [G, B, D]."""
        # p before q: another order would give dropout other numbers, and a seed another run
        p = self.retriever(batch["passage_ids"], batch["passage_mask"])
        q = self.retriever(batch["query_ids"], batch["query_mask"])
        return q, p

    def weights(self, batch):
        """w [G, B, B] of a batch."""
        return in_batch_weights(*self.embed(batch), self.attn_temperature)

    @torch.no_grad()
    def diagnose(self, batch):
        """What are the weights worth? The loss with them, with uniform ones, and of passages alone.

        Returns {name: scalar tensor}, and the weights [G, B, B]. In training mode with dropout.
        """
        w = self.weights(batch)
        uniform = torch.full_like(w, 1 / (w.shape[-1] - 1))  # `two_streams` ignores the diagonal
        losses = {
            "retriever": self.loss_in_batch(batch, w),
            "uniform": self.loss_in_batch(batch, uniform),
            "alone": self.loss_alone(batch),
        }
        return losses, w

    def is_target(self, batch):
        """[G, B, T-1] bool: whether the next token is real.

        As published, the pad token does not count, even where a text holds it. Without a
        pad_token_id the EOS is the pad token.
        """
        config = self.lm.config
        pad_id = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
        real = batch["lm_mask"][..., 1:]
        if pad_id is None:
            return real
        return real & (batch["lm_ids"][..., 1:] != pad_id)

    def count(self, batch):
        """The number of terms in the mean loss. `train.update` weighs micro-batches by it."""
        return self.is_target(batch).sum()

    def cross_entropy(self, hidden, batch, max_logits=2**23):
        """Mean next-token loss of hidden [G, B, T, D] at the targets of the batch.

        All logits would be large (16 x 157 x 128k floats: 1.3 GB). So at most `max_logits` exist at
        once, and the backward pass computes them again.
        """
        targets = self.is_target(batch).flatten().nonzero()[:, 0]  # [M]: where they are
        ids = batch["lm_ids"][..., 1:].flatten()[targets]  # [M]
        hidden = hidden[..., :-1, :].flatten(0, 2)
        # index_select, since the backward pass of hidden[targets] is slow
        hidden = hidden.index_select(0, targets)  # [M, D]

        def summed(hidden, ids):
            logits = self.lm.logits(hidden).float()
            return F.cross_entropy(logits, ids, reduction="sum")

        size = max(1, max_logits // self.lm.config.vocab_size)
        total = 0
        for part in zip(hidden.split(size), ids.split(size)):
            total = total + recompute(summed, *part, preserve_rng_state=False)
        return total / max(len(ids), 1)


def similarities(q, p):
    """s [G, B, B] float32: the cosine of query i (rows) and passage j, from q and p [G, B, D]."""
    with torch.autocast(q.device.type, enabled=False):  # in float32: tau may be 1e-4
        return q @ p.transpose(1, 2)


def in_batch_weights(q, p, tau):
    """w [G, B, B] float32: how much passage i sees of passage j.

    Rows sum to one, and the diagonal is zero.
    """
    s = similarities(q, p)
    return with_diagonal(s / tau, -torch.inf).softmax(-1)


def two_streams(lm, ids, mask, weights, v_norm=True, scale=1.0, convex=False, start=0.0):
    """Run a batch through the language model twice: passages alone, and reading each other.

    The context stream never sees another passage, so nothing of D_i comes back to D_i.

    ids, mask [G, B, T], weights [G, B, B] -> hidden states of the in-batch stream [G, B, T, D]
    v_norm   see `model.in_batch_attention`
    scale    factor on what passages read from each other; 1 as published
    convex   own_i and what is read weigh 1 - scale and scale, instead of 1 and scale
    start    share of the blocks, from the first on, in which passages do not read each other
    """
    G, B, T = ids.shape
    cos, sin = rope(lm.config, T, ids.device)
    weights = with_diagonal(weights, 0)
    # for speed: who reads whom, without weights up to 1e-8. In every block it is the same
    plan = in_batch_plan(weights, lm.config.num_attention_heads, T)

    @torch.compiler.disable  # each form of the plan would be compiled anew
    def add_others(own, q, k, v):
        """own, the causal attention, plus what the passages read from each other [N, H, T, d]."""
        others = in_batch_attention_fast(q, k, v, weights, mask, v_norm, plan)
        if convex:
            own = (1 - scale) * own
        return own + scale * others

    x = lm.embed(ids.flatten(0, 1))  # [N, T, D]
    first = int(start * len(lm.layers))
    for block in lm.layers[:first]:  # the streams are still the same: run once
        x, _, _ = block(x, cos, sin)
    context = stream = x
    # a block returns x, keys (after RoPE) and values; read(own, q) takes the place of own attention
    for block in lm.layers[first:]:
        last = block is lm.layers[-1]  # of its context stream only keys and values are needed
        context, k, v = block(context, cos, sin, kv_only=last)
        read = partial(add_others, k=k, v=v)
        stream, _, _ = block(stream, cos, sin, read)
    return lm.norm(stream).unflatten(0, (G, B))


@torch.no_grad()
def observe(loss, w, p):
    """Statistics for the log: of the loss, the weights w and the passages' vectors p."""
    mean = p.flatten(0, 1).mean(0)  # [D]
    # 0 if all vectors are equal (collapse), 1 if their mean is zero
    spread = 1 - mean.square().sum()
    return {
        "loss": loss.detach(),
        "max_weight": w.amax(-1).mean(),
        "weight_entropy": torch.special.entr(w).sum(-1).mean(),
        "dropped_weight": w.where(w <= NEGLIGIBLE, 0).sum(-1).mean(),
        "spread": spread.clamp(min=0).sqrt(),
    }


# --------------------------------------------------------------------------------------------------
# text -> batch. Training and evaluation share it: prefixes, EOS and truncation are added here.


class Tokenizer:
    """The tokenizer.json of a model folder, and the end-of-text token that goes with it."""

    def __init__(self, folder):
        """EOS: tokenizer_config.json's eos_token, else config.json's eos_token_id."""
        folder = model_folder(folder)
        self.file = must_exist(folder / "tokenizer.json")
        config = read_json(folder / "config.json")
        check(f"{folder}:", config, {"vocab_size": [SIZE]})  # a positive integer
        self.vocab_size = config["vocab_size"]
        eos_id = config.get("eos_token_id")
        if isinstance(eos_id, list) and eos_id:
            eos_id = eos_id[0]
        file = folder / "tokenizer_config.json"
        eos = read_json(file).get("eos_token") if file.exists() else None
        if isinstance(eos, dict):
            eos = eos.get("content")
        # `blame` turns what fails inside into one sentence that names the file
        with blame(self.file, f"is not a tokenizer, or not one for eos_token {eos!r:.80}"):
            self.tokenizer = tokenizers.Tokenizer.from_file(str(self.file))
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            self.eos_id = self.tokenizer.token_to_id(eos) if eos else eos_id
            # what it adds before a text, perhaps a BOS; what it adds at the end is left out
            whole = self.tokenizer.encode("a")
            first = whole.special_tokens_mask.index(0)  # of the text's tokens
            self.bos_ids = whole.ids[:first]
        if type(self.eos_id) is not int or self.eos_id not in range(self.vocab_size):
            raise ValueError(
                f"{folder}: no EOS token: "
                "tokenizer_config.json needs an eos_token that is in the vocabulary"
            )

    def token_ids(self, texts, max_len):
        """Token ids of `texts`, at most `max_len` each, without EOS.

        A BOS comes first, and counts, if the tokenizer adds one. A lone surrogate is read as "?".
        """
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        with blame(self.file, "fails at a text"):
            rows = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        rows = [self.bos_ids + row.ids for row in rows]
        rows = [row[:max_len] for row in rows]
        most = max((token for row in rows for token in row), default=0)
        if most >= self.vocab_size:
            raise ValueError(
                f"{self.file} makes token {most} of a text, "
                f"but the model's vocab_size is {self.vocab_size}"
            )
        return rows

    def retriever_ids(self, texts, kind, max_len, ratio=1.0):
        """Token ids of `texts` as the retriever reads them: prefix, text, EOS; at most `max_len`.

        Of the n tokens before the EOS, BOS and prefix counted, the first int(n * ratio) are kept.
        """
        texts = [PREFIX[kind] + text for text in texts]
        rows = self.token_ids(texts, max_len - 1)
        return [row[: int(len(row) * ratio)] + [self.eos_id] for row in rows]


def pad(rows, value):
    """Lists of ids -> ids [N, T] int64 and mask [N, T] bool, padded on the right.

    T is the longest length, rounded up to a multiple of 8, with which matmuls are fastest.
    """
    lengths = [len(row) for row in rows]
    T = (max(lengths) + 7) // 8 * 8
    ids = torch.tensor([row + [value] * (T - len(row)) for row in rows])
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return ids, mask


def collate(groups, tokenizer, lm_tokenizer, passage_max_len=157, first_half=False, apart=False):
    """[(texts, src)] of G groups -> the batch: {query,passage,lm}_{ids,mask}, each [G, B, T].

    first_half   the query of a passage is the first half of its tokens, prefix counted: so w_i
                 knows nothing of the second half. (The loss is of both.) As published, not in
                 groups with src "stackoverflow", whose passages are questions with answers
    apart        the query is the first half of the words, and the passage is the rest
    """
    rows = {"query": [], "passage": [], "lm": []}
    for texts, src in groups:
        queries = passages = texts
        ratio = 0.5 if first_half and src != "stackoverflow" else 1.0
        if apart:
            queries, passages = zip(*map(halves, texts))
            ratio = 1.0
        rows["query"] += tokenizer.retriever_ids(queries, "query", passage_max_len, ratio)
        rows["passage"] += tokenizer.retriever_ids(passages, "passage", passage_max_len)
        rows["lm"] += lm_tokenizer.token_ids(texts, passage_max_len)
    rows["lm"] = [row or [lm_tokenizer.eos_id] for row in rows["lm"]]  # some texts have no tokens
    batch = {}
    for name in rows:
        padding = lm_tokenizer if name == "lm" else tokenizer
        ids, mask = pad(rows[name], padding.eos_id)  # [N, T]
        batch[f"{name}_ids"] = ids.unflatten(0, (len(groups), -1))  # [G, B, T]
        batch[f"{name}_mask"] = mask.unflatten(0, (len(groups), -1))
    return batch


def halves(text):
    """The first half of the words of `text`, and the rest."""
    ends = [word.end() for word in WORD.finditer(text)]
    middle = ends[(len(ends) - 1) // 2]
    return tuple(" ".join(half.split()) for half in (text[:middle], text[middle:]))


# --------------------------------------------------------------------------------------------------
# texts -> vectors


@torch.no_grad()
def encode_texts(retriever, texts, kind="passage", max_len=512, batch_tokens=None, progress=False,
                 out=None, chunk=2**16):  # fmt: skip
    """Texts -> unit vectors, float32 [N, D] on the CPU, in the order of `texts`. No dropout.

    kind           "query" or "passage": they have different prefixes
    max_len        tokens of a text that are read, EOS included
    batch_tokens   most tokens of a batch of several texts; default: what suits the device
    out            file name: the vectors are written to this .npy file, which must not exist, and
                   come back memory-mapped. Then memory holds one chunk, however many texts
    chunk          texts that are tokenized at a time, and run sorted by length
    """
    if retriever.tokenizer is None:
        raise ValueError(f"{retriever.llama.path} has no tokenizer.json, which encode needs")
    if isinstance(texts, str):
        raise ValueError("encode needs a list of texts, and was given one text")
    weight = retriever.llama.embed_tokens.weight
    device, shape = weight.device, (len(texts), weight.shape[1])
    batch_tokens = batch_tokens or (4096 if device.type == "cpu" else 16384)
    if out is None:
        vectors = torch.empty(shape)
    else:
        must_be_new(out)
        with blame(out, "could not be written"):
            mapped = np.lib.format.open_memmap(f"{out}.partial", "w+", np.float32, shape)
            if hasattr(os, "posix_fallocate"):  # on a full disk a write to memory kills the process
                with open(f"{out}.partial", "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
        vectors = torch.from_numpy(mapped)
    # weights in bfloat16: by autocast, under which the residual stream stays float32
    low = weight.dtype.itemsize < 4
    precision = torch.autocast(device.type, weight.dtype, enabled=low)
    bar = tqdm(total=len(texts), desc=f"{kind} texts", disable=not progress)
    was_training = retriever.training
    retriever.eval()
    with bar, precision:
        for first in range(0, len(texts), chunk):
            rows = retriever.tokenizer.retriever_ids(texts[first : first + chunk], kind, max_len)
            for batch in by_length(rows, batch_tokens):
                ids, mask = pad([rows[i] for i in batch], retriever.tokenizer.eos_id)
                embedded = retriever(ids.to(device), mask.to(device))  # [n, D]
                vectors[[first + i for i in batch]] = embedded.cpu()
                bar.update(len(batch))
    retriever.train(was_training)
    if out is not None:
        os.replace(f"{out}.partial", out)
    return vectors


def by_length(rows, batch_tokens):
    """Yield lists of indices of `rows`, the longest first: batches of at most `batch_tokens`.

    All texts of a batch count as long as its longest. A text of more tokens is a batch of its own.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while order:
        size = max(1, batch_tokens // len(rows[order[0]]))
        yield order[:size]
        order = order[size:]


# --------------------------------------------------------------------------------------------------
# the retriever's file


def load_pooling(retriever, folder):
    """Read `mean` and `std` if `folder` has them, and return whether it has.

    Raises ValueError if they do not fit.
    """
    file = folder / POOLING
    if not file.exists():
        return False
    if retriever.pooling != "mean":
        raise ValueError(f"{file}: its retriever pools by --pooling mean, not {retriever.pooling}")

    def good(t):
        floats = t.is_floating_point() and t.shape == retriever.mean.shape
        return floats and t.float().isfinite().all()

    given = read_safetensors(file)
    fit = given.keys() == {"mean", "std"} and all(map(good, given.values()))
    if not fit or given["std"].float().min() < 1e-30:  # of less, 1 / std may overflow
        raise ValueError(
            f"{file}: need floats mean and std [{len(retriever.mean)}] and nothing else, "
            "finite, std above 0"
        )
    retriever.mean.copy_(given["mean"])
    retriever.std.copy_(given["std"])
    return True


def save_pooling(retriever, folder):
    """Write `mean` and `std` if there are any."""
    if retriever.pooling == "mean":
        tensors = {"mean": retriever.mean.cpu(), "std": retriever.std.cpu()}
        write_safetensors(f"{folder}/{POOLING}", tensors)


def check_pooling(file, pooling):
    """Raise ValueError if sentence-transformers' `file` asks for another pooling than ours."""
    config = read_json(file) if file.exists() else {}
    asked = []  # {"pooling_mode_lasttoken": true} in old files, {"pooling_mode": "lasttoken"} now
    for name, value in config.items():
        if name.startswith("pooling_mode") and value:
            asked.append(value if name == "pooling_mode" else name)
    ours = ["lasttoken", "pooling_mode_lasttoken"]
    if pooling == "mean":
        ours = ["mean", "pooling_mode_mean_tokens"]
    if not all(mode in ours for mode in asked):
        raise ValueError(f"{file}: {asked!r:.80}; need lasttoken, or mean with our {POOLING}")


# --------------------------------------------------------------------------------------------------
# to compare with: other losses on such batches


class Control(Revela):
    """Plain language modelling: no in-batch attention, so nothing reaches the retriever."""

    def forward(self, batch):
        loss = self.loss_alone(batch)
        self.stats = {"loss": loss.detach()}
        return loss


class Contrastive(Revela):
    """InfoNCE: the first half of a passage must find its own rest among the rests of its group.

        loss = mean over i of -log of (softmax over all j of s_ij / tau) at j = i

    `collate(..., apart=True)` makes the batches. The rests of other documents are its negatives if
    the groups are made by `data.py --run_length 1`. The language model is not used.
    """

    def count(self, batch):
        return batch["lm_mask"][..., 0].sum()  # G * B: each passage has a token

    def forward(self, batch):
        q, p = self.embed(batch)
        s = similarities(q, p) / self.attn_temperature  # [G, B, B]
        log_p = s.log_softmax(-1)
        loss = -log_p.diagonal(dim1=1, dim2=2).mean()
        self.stats = observe(loss, log_p.exp(), p)
        return loss


class Replug(Revela):
    """REPLUG LSR (Shi et al. 2023, arXiv 2301.12652): retrieve what helps a frozen language model
    that reads it before D_i.

        l_ij = mean over the second half of D_i's tokens of log p(token | D_j, D_i before it)
        R_i  = softmax over j != i of s_ij / tau       (the retriever's)
        L_i  = softmax over j != i of l_ij / beta      (the language model's; beta: lm_temperature)
        loss = mean over i of KL(L_i || R_i),   KL = sum over j of L_ij log(L_ij / R_ij)

    This is the direction that Revela's authors compare with. `reverse_kl`: KL(R_i || L_i), as the
    REPLUG paper has it. Batches are those of Revela. If the tokenizer adds a BOS, D_j and D_i each
    begin with one.
    """

    count = Contrastive.count

    def __init__(self, *args, lm_temperature, reverse_kl=False, **options):
        super().__init__(*args, **options)
        self.lm_temperature, self.reverse_kl = lm_temperature, reverse_kl

    def forward(self, batch):
        q, p = self.embed(batch)
        s = similarities(q, p) / self.attn_temperature  # [G, B, B]
        likely = self.likelihoods(batch) / self.lm_temperature
        log_R = with_diagonal(s, -torch.inf).log_softmax(-1)
        log_L = with_diagonal(likely, -torch.inf).log_softmax(-1)
        log_a, log_b = (log_R, log_L) if self.reverse_kl else (log_L, log_R)
        # the diagonal's -inf minus -inf would be NaN
        terms = log_a.exp() * with_diagonal(log_a - log_b, 0)
        loss = terms.sum(-1).mean()  # KL(a || b)
        self.stats = observe(loss, log_R.exp(), p)
        return loss

    @torch.no_grad()
    def likelihoods(self, batch):
        """l_ij [G, B, B] float32. The diagonal, D_i after itself, is of no use."""
        self.lm.eval()  # no dropout; it is frozen anyway
        rows = []
        for ids, mask in zip(batch["lm_ids"], batch["lm_mask"].bool()):  # [B, T] of a group
            passages = [row[real].tolist() for row, real in zip(ids, mask)]
            of_group = [self.likelihood(own, passages) for own in passages]  # B of [B]
            rows.append(torch.stack(of_group))
        return torch.stack(rows)

    def likelihood(self, own, contexts):
        """The mean log-likelihood [B] of the second half of `own` after each of B `contexts`.

        All are lists of ids.
        """
        device = self.lm.embed_tokens.weight.device
        ids, mask = pad([context + own for context in contexts], 0)  # [B, T]
        ids, mask = ids.to(device), mask.to(device)
        m = len(own) - len(own) // 2
        first = mask.sum(1, keepdim=True) - m  # [B, 1]
        at = first + torch.arange(m, device=device)  # [B, m]: positions of the last m tokens
        before = at[..., None] - 1  # the state one before a token predicts it
        hidden = self.lm(ids).take_along_dim(before, 1)  # [B, m, D]
        logits = self.lm.logits(hidden).float().transpose(1, 2)  # [B, V, m]
        log_p = -F.cross_entropy(logits, ids.take_along_dim(at, 1), reduction="none")  # [B, m]
        return log_p.mean(1)
