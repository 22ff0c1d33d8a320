"""How fast is a training step, and what does it hold in memory, beside the plain way to write the same equations?

    python tests/bench.py --model path/to/SmolLM2-135M                     # on a CPU, bfloat16, LoRA r 256
    python tests/bench.py --model ... --sizes 8 16 32 --groups 1 4 --parts ours encode --device cuda

*Plain* is the method as one would write it down first: context stream and in-batch stream one after the other, the scores
of every passage with every other in one tensor [B, B, H, T, T], all logits at once, LoRA as two more matmuls, everything
padded to the longest allowed. It has the same weights, the same batch, the same autocast and the same allocator settings, and its
loss and gradients must be ours, which is checked first (on a small batch, in float32). Each row is a process of its own, for the
peak of its memory. Text does not matter for speed: ids are random, lengths uniform in [T/2, T].
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import pad
from model import Llama, add_lora, rope, rotate, tune_allocator
from revela import Retriever, Revela
from train import peak_memory

# ----------------------------------------------------------------------------------------------------------------------
# the plain way


def linear(layer, x):
    out = F.linear(x, layer.weight, layer.bias)
    return out + layer.lora_B(layer.lora_A(x)) * layer.scale if layer.lora_A is not None else out


def plain_pass(llama, ids, mask, context=None, weights=None, v_norm=True):
    """One pass: hidden states [B, T, D] and each block's keys and values [B, H, T, d]; with `context` (those of a pass before)
    and `weights` [B, B] it is the in-batch stream."""
    c, (B, T), kept = llama.config, ids.shape, []
    cos, sin = rope(c, T, ids.device)
    future = torch.ones(T, T, dtype=torch.bool, device=ids.device).triu(1)
    x = llama.embed_tokens(ids)
    for number, block in enumerate(llama.layers):
        a, n = block.self_attn, block.input_layernorm(x)
        q, k, v = (linear(p, n).view(B, T, -1, c.head_dim).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))  # [B, H, T, d]
        kept.append((k, v))
        scores = q @ k.transpose(2, 3) / c.head_dim**0.5  # [B, H, T, T]
        out = scores.masked_fill(future, -torch.inf).softmax(-1).to(v.dtype) @ v
        if context:
            k, v = context[number]
            scores = torch.einsum("bhtd,chud->bchtu", q, k) / c.head_dim**0.5  # [B, B, H, T, T]
            p = scores.masked_fill(~mask[None, :, None, None, :], -torch.inf).softmax(-1).to(v.dtype)
            read = torch.einsum("bchtu,chud->bchtd", p, v)
            if v_norm:
                read = read / (torch.einsum("bchtu,chu->bcht", p, v.norm(dim=-1))[..., None] + 1e-6)
            out = out + torch.einsum("bc,bchtd->bhtd", weights.to(read.dtype), read)
        x = x + linear(a.o_proj, out.transpose(1, 2).flatten(2).to(x.dtype))
        m, n = block.mlp, block.post_attention_layernorm(x)
        x = x + linear(m.down_proj, F.silu(linear(m.gate_proj, n)) * linear(m.up_proj, n))
    return llama.norm(x), kept


def plain_loss(revela, batch):
    """The mean over the groups' losses, which have equal numbers of targets here or come one at a time."""
    total = 0
    for g in range(len(batch["lm_ids"])):
        b = {name: t[g] for name, t in batch.items()}
        vectors = []
        for name in ("query", "passage"):
            hidden, _ = plain_pass(revela.retriever.llama, b[name + "_ids"], None)
            vectors.append(F.normalize(hidden[range(len(hidden)), b[name + "_mask"].sum(1) - 1].float(), dim=-1))
        with torch.autocast(hidden.device.type, enabled=False):
            s = vectors[0] @ vectors[1].T / revela.attn_temperature
        w = s.masked_fill(torch.eye(len(s), dtype=torch.bool, device=s.device), -torch.inf).softmax(-1)
        _, context = plain_pass(revela.lm, b["lm_ids"], b["lm_mask"])
        hidden, _ = plain_pass(revela.lm, b["lm_ids"], b["lm_mask"], context, w, revela.v_norm)
        targets = b["lm_ids"][:, 1:].masked_fill(~revela.targets(b), -100)
        total = total + F.cross_entropy(revela.lm.logits(hidden)[:, :-1].flatten(0, 1).float(), targets.flatten())
    return total / len(batch["lm_ids"])


# ----------------------------------------------------------------------------------------------------------------------
# measuring


def setup(a):
    tune_allocator()
    torch.manual_seed(0)
    dtype = getattr(torch, a.dtype)
    lm, retriever = Llama.from_pretrained(a.model, dtype, a.device), Llama.from_pretrained(a.model, dtype, a.device, head=False)
    for (name, p), (_, other) in zip(retriever.named_parameters(), lm.named_parameters()):
        p.data = other.data  # the frozen weights once, for both sides
    for llama in (lm, retriever):
        add_lora(llama, a.lora_r, 64)
        llama.recompute_activations(a.activation_checkpointing)
    return Revela(Retriever(retriever), lm, a.attn_temperature)


def make_batch(a, vocabulary, B, G, longest):
    """Random texts of T/2 to T tokens, padded to T if `longest`, else to the longest there is."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(a.T // 2, a.T + 1, (G * B,), generator=generator).tolist()
    batch = {}
    for name, share in (("query", 2), ("passage", 1), ("lm", 1)):
        rows = [torch.randint(3, vocabulary, (n // share,), generator=generator).tolist() for n in lengths]
        ids, mask = pad(rows + ([[1] * a.T] if longest else []), 0)
        batch |= {name + "_ids": ids[: G * B].unflatten(0, (G, B)), name + "_mask": mask[: G * B].unflatten(0, (G, B))}
    return {name: t.to(a.device) for name, t in batch.items()}


def step_row(a, part, B, G):
    """Median and spread of the time of a training step (forward, backward, AdamW), peak memory, tokens and FLOPs."""
    revela = setup(a)
    batch = make_batch(a, revela.lm.config.vocab_size, B, G, longest=part == "plain")
    optimizer = torch.optim.AdamW([p for p in revela.parameters() if p.requires_grad], lr=1e-5, fused=a.device == "cuda")
    low = a.dtype == "bfloat16"

    def step():
        with torch.autocast(a.device, torch.bfloat16, enabled=low):
            loss = revela(batch) if part == "ours" else plain_loss(revela, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize() if a.device == "cuda" else None

    with FlopCounterMode(display=False) as flops:  # in the first step, which is not timed
        step()
    times = []
    for _ in range(a.steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    memory = peak_memory(torch.device(a.device))
    tokens = sum(int(batch[name + "_mask"].sum()) for name in ("query", "passage", "lm"))
    return {"times": times, "memory": memory, "tokens": tokens, "flops": flops.get_total_flops()}


def matmul_peak(device, dtype, n=4096):
    """FLOP/s of a large matmul: the best of ten."""
    x, best = torch.randn(n, n, device=device, dtype=dtype), 0
    for _ in range(10):
        start = time.perf_counter()
        x @ x
        torch.cuda.synchronize() if device == "cuda" else None
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def compare(a):
    """The largest errors, relative to the largest value, of our loss, retriever's gradients and language model's gradients
    against the plain ones: in float32, for 4 passages of 24 tokens."""
    a = argparse.Namespace(**vars(a) | {"dtype": "float32", "T": 24, "lora_r": 8})
    errors = {}
    for tau in (1e-4, 0.05):
        a.attn_temperature = tau
        revela, results = setup(a), []
        batch = make_batch(a, revela.lm.config.vocab_size, 4, 1, longest=False)
        for name, p in revela.named_parameters():
            torch.nn.init.normal_(p, std=0.02) if "lora_B" in name else None
        for loss in (revela(batch), plain_loss(revela, batch)):
            gradients = [torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], retain_graph=True)
                         for module in (revela.retriever, revela.lm)]  # fmt: skip
            results.append([[loss.detach()], *gradients])
        errors[tau] = [
            float(max((x - y).abs().max() for x, y in zip(ours, plain)) / max(y.abs().max() for y in plain).clamp(min=1e-30))
            for ours, plain in zip(*results)
        ]
    return errors


def encode_row(a, part):
    """Documents per second: ours, or transformers' usual loop (32 at a time as they come, padded to the longest of them)."""
    tune_allocator()
    retriever = Retriever.from_pretrained(a.model, dtype=getattr(torch, a.dtype), device=a.device)
    words, random = "the of a wing flow heat boundary layer shock pressure".split(), torch.Generator().manual_seed(0)
    length = lambda: int(20 + 300 * torch.rand(1, generator=random) ** 2)  # many short, few long, as in real collections
    texts = [" ".join(words[int(i)] for i in torch.randint(0, len(words), (length(),), generator=random)) for _ in range(a.texts)]
    if part == "plain":
        import transformers

        theirs = transformers.AutoModel.from_pretrained(a.model, dtype=getattr(torch, a.dtype)).to(a.device).eval()

    def run():
        if part == "ours":
            return retriever.encode(texts, max_len=512)
        vectors = []
        with torch.no_grad():
            for i in range(0, len(texts), 32):
                ids, mask = pad(retriever.tokenizer.retriever_ids(texts[i : i + 32], "passage", 512), 0)
                hidden = theirs(ids.to(a.device), attention_mask=mask.to(a.device)).last_hidden_state
                vectors.append(F.normalize(hidden[torch.arange(len(ids)), mask.sum(1) - 1].float(), dim=-1).cpu())
        return torch.cat(vectors)

    times = []
    for _ in range(3):
        start = time.perf_counter()
        vectors = run()
        times.append(time.perf_counter() - start)
    return {"times": times, "vectors": vectors[:20].tolist()}


# ----------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of a checkpoint; its tokenizer is used for encoding")
    add("--parts", nargs="+", default=["ours", "plain", "encode"], choices=("ours", "plain", "encode"), help="what to time")
    add("--sizes", nargs="+", type=int, default=[8, 16, 32, 64, 128], help="passages of a group, B")
    add("--plain_sizes", nargs="+", type=int, default=[8], help="those of the plain way, which needs B * B")
    add("--groups", nargs="+", type=int, default=[1], help="groups side by side, G")
    add("--T", type=int, default=160, help="tokens of a passage")
    add("--steps", type=int, default=3, help="steps to time, after one that is not")
    add("--texts", type=int, default=200, help="texts to encode")
    add("--lora_r", type=int, default=256, help="rank")
    add("--attn_temperature", type=float, default=1e-4, help="tau")
    add("--activation_checkpointing", choices=("none", "selective", "full"), default="selective", help="of ours")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="autocast, or not")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where")
    add("--row", help=argparse.SUPPRESS)  # one row, in a process of its own: "part B G"
    a = parser.parse_args()
    if a.row:
        part, B, G = a.row.split()
        row = compare(a) if part == "compare" else encode_row(a, B) if part == "encode" else step_row(a, part, int(B), int(G))
        print(json.dumps(row))
        return

    def row(*what):
        command = [sys.executable, __file__, *sys.argv[1:], "--row", " ".join(map(str, what))]
        done = subprocess.run(command, capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip().splitlines()[-1:] or [f"died: {done.returncode}"]

    peaks = {name: matmul_peak(a.device, getattr(torch, name)) for name in ("bfloat16", "float32")}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads on {a.device}; matmul peak: "
          + ", ".join(f"{name} {peak / 1e9:,.0f} GFLOP/s" for name, peak in peaks.items()))  # fmt: skip
    errors = row("compare", 0, 0)
    if isinstance(errors, list):
        sys.exit(f"bench.py: {errors[0]}")
    for tau, (loss, retriever, lm) in errors.items():
        print(f"ours against plain, float32, tau {tau}: loss {loss:.1e}, gradients: retriever {retriever:.1e}, lm {lm:.1e} (of the largest)")
    print(f"{'':<6} {'B':>4} {'G':>3} {'s/step':>8} {'spread':>7} {'GB':>6} {'tokens/s':>9} {'peak':>5} {'ms/passage':>11}")
    for part in ("plain", "ours"):
        for B in {"plain": a.plain_sizes, "ours": a.sizes}[part] if part in a.parts else []:
            for G in a.groups:
                r = row(part, B, G)
                if isinstance(r, list):
                    print(f"{part:<6} {B:>4} {G:>3} {r[0]}", flush=True)
                    continue
                s = statistics.median(r["times"])
                print(f"{part:<6} {B:>4} {G:>3} {s:8.2f} {max(r['times']) - min(r['times']):7.2f} {r['memory']:6.1f} {r['tokens'] / s:9,.0f} "
                      f"{r['flops'] / s / peaks[a.dtype]:5.0%} {1000 * s / B / G:11.0f}", flush=True)  # fmt: skip
    if "encode" in a.parts:
        rows = {part: row("encode", part, 0) for part in ("plain", "ours")}
        for part, r in rows.items():
            speed = r[0] if isinstance(r, list) else f"{a.texts / statistics.median(r['times']):.1f} documents/s"
            print(f"encode, {'transformers' if part == 'plain' else part}: {speed}")
        if not any(isinstance(r, list) for r in rows.values()):
            difference = (torch.tensor(rows["ours"]["vectors"]) - torch.tensor(rows["plain"]["vectors"])).abs().max()
            print(f"largest difference of vectors: {difference:.1e}")


if __name__ == "__main__":
    main()
