"""One update of a recipe as train.py runs it: seconds and memory, beside the plain way to write it.

    python tests/bench.py --model path/to/SmolLM2-135M
    python tests/bench.py --model ... --recipe published --parts ours --groups_per_device 4

*Plain* is the method as one would write it down first: the streams one after the other, the scores
of every passage with every other in one tensor, all logits at once. It has the same weights, batch
and autocast, and its loss and gradients must be ours, which is checked first. Its memory grows with
B * B: of the published recipe it takes some 14 GB at B 8 (--train_group_size 8). Texts are random:
T/2 to T ids. An update is of one micro-batch, where the published recipe takes 32 groups. Flags
that are not here are train.py's. Each row is a process of its own, for the peak of its memory. Its
last column is the share of a large matmul's speed; what is computed twice counts twice.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from data import setup
from model import rope, rotate
from revela import Retriever, Revela, in_batch_weights, pad


class Plain(Revela):
    """The same loss, written plainly; groups one at a time."""

    def forward(self, batch):
        total = 0
        for g in range(len(batch["lm_ids"])):
            b = {name: tensor[g] for name, tensor in batch.items()}
            vectors = []
            for name in ("query", "passage"):
                hidden, _ = self.run(self.retriever.llama, b[name + "_ids"])
                eos = b[name + "_mask"].sum(1) - 1
                x = hidden[range(len(hidden)), eos].float()
                if self.retriever.pooling == "mean":
                    x = torch.stack([h[:n].float().mean(0) for h, n in zip(hidden, eos)])
                    x = (x - self.retriever.mean) / self.retriever.std
                vectors.append(F.normalize(x, dim=-1)[None])
            w = in_batch_weights(*vectors, self.attn_temperature)[0]
            _, context = self.run(self.lm, b["lm_ids"])
            hidden, _ = self.run(self.lm, b["lm_ids"], b["lm_mask"], context, w)
            targets = b["lm_ids"][:, 1:].masked_fill(~self.is_target(b), -100).flatten()
            logits = self.lm.logits(hidden)[:, :-1].flatten(0, 1).float()
            total = total + F.cross_entropy(logits, targets, reduction="sum")
        loss = total / self.count(batch)
        self.stats = {"loss": loss.detach()}
        return loss

    def run(self, llama, ids, mask=None, context=None, w=None):
        """Hidden states [B, T, D] and each block's keys and values [B, H, T, d].

        With `context`, those of the pass before, and w [B, B], it is the in-batch stream.
        """
        c, (B, T), kept = llama.config, ids.shape, []
        cos, sin = rope(c, T, ids.device)
        future = torch.ones(T, T, dtype=torch.bool, device=ids.device).triu(1)
        x = llama.embed(ids)
        for number, block in enumerate(llama.layers):
            a, m, n = block.self_attn, block.mlp, block.input_layernorm(x)
            projected = (linear(p, n) for p in (a.q_proj, a.k_proj, a.v_proj))
            q, k, v = (y.view(B, T, -1, c.head_dim).transpose(1, 2) for y in projected)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
            kept.append((k, v))
            scores = q @ k.transpose(2, 3) / c.head_dim**0.5  # [B, H, T, T]
            out = scores.masked_fill(future, -torch.inf).softmax(-1).to(v.dtype) @ v
            if context and number >= int(self.form["start"] * len(llama.layers)):
                k, v = context[number]
                scores = torch.einsum("bhtd,chud->bchtu", q, k) / c.head_dim**0.5
                scores = scores.masked_fill(~mask[None, :, None, None, :], -torch.inf)
                p = scores.softmax(-1).to(v.dtype)  # [B, B, H, T, T]
                read = torch.einsum("bchtu,chud->bchtd", p, v)
                if self.form["v_norm"]:
                    lengths = torch.einsum("bchtu,chu->bcht", p, v.norm(dim=-1))
                    read = read / (lengths[..., None] + 1e-6)
                read = torch.einsum("bc,bchtd->bhtd", w.to(read.dtype), read)
                scale = self.form["scale"]
                out = (1 - scale if self.form["convex"] else 1) * out + scale * read
            x = x + linear(a.o_proj, out.transpose(1, 2).flatten(2).to(x.dtype))
            n = block.post_attention_layernorm(x)
            x = x + linear(m.down_proj, F.silu(linear(m.gate_proj, n)) * linear(m.up_proj, n))
        return llama.norm(x), kept


def linear(layer, x):
    y = F.linear(x, layer.weight, layer.bias)
    if layer.lora_A is None:
        return y
    return y + layer.scale * layer.lora_B(layer.lora_A(F.dropout(x, layer.dropout)))


def build(model, *flags):
    """Arguments, device, our objective, the plain one with the same weights, and a batch."""
    args = train.parse_args(["--model", str(model), "--data", "none", *flags])
    device, _, _ = setup(args.device)
    torch.manual_seed(args.seed)
    retriever, lm = train.build_models(args, getattr(torch, args.dtype), device)
    for llama in (retriever, lm):
        train.wrap_blocks(llama, args)
    ours = train.build_objective(args, Retriever(retriever, pooling=args.pooling), lm)
    plain = Plain(ours.retriever, lm, args.attn_temperature)
    plain.form = ours.form
    (G, B), T, batch = (args.groups_per_device, args.train_group_size), args.passage_max_len, {}
    lengths = [T, *torch.randint(T // 2, T + 1, (G * B - 1,)).tolist()]
    for name, share in (("query", 1 + args.first_half), ("passage", 1), ("lm", 1)):
        rows = [torch.randint(3, lm.config.vocab_size, (n // share,)).tolist() for n in lengths]
        for what, x in zip(("ids", "mask"), pad(rows, 0)):
            batch[f"{name}_{what}"] = x.unflatten(0, (G, B))
    return args, device, ours, plain, batch


def compare(model):
    """{flags: relative errors of loss, retriever's and language model's gradients}, small."""
    flags = "--recipe published --device cpu --dtype float32 --lora_r 8 --lora_dropout 0"
    flags += " --groups_per_device 2 --train_group_size 4 --passage_max_len 24 "
    errors, small = {}, "--attn_temperature 0.2 --pooling mean --inbatch_form convex "
    small += "--inbatch_scale 0.3 --inbatch_start 0.5"
    for more in ("--attn_temperature 1e-4", "--attn_temperature 0.05", small):
        _, _, ours, plain, batch = build(model, *(flags + more).split())
        for name, p in ours.named_parameters():
            torch.nn.init.normal_(p, std=0.02) if "lora_B" in name else None
        if ours.retriever.pooling == "mean":
            ours.retriever.standardise([batch])
        parts = [[p for p in m.parameters() if p.requires_grad] for m in (ours.retriever, ours.lm)]
        results = []
        for loss in (ours(batch), plain(batch)):
            gradients = [torch.autograd.grad(loss, part, retain_graph=True) for part in parts]
            flat = [torch.cat([g.flatten() for g in part]) for part in gradients]
            results.append([loss.detach(), *flat])
        pairs = list(zip(*results))
        errors[more] = [float((x - y).abs().max() / (y.abs().max() + 1e-30)) for x, y in pairs]
    return errors


def measure(part, steps, flags, model):
    """Median seconds of an update and their spread, peak memory, and the share of the peak."""
    args, device, ours, plain, batch = build(model, *flags)
    batch = train.on(device, batch)
    objective, gpu = {"ours": ours, "plain": plain}[part], device.type == "cuda"
    dtype, trained = getattr(torch, args.dtype), [p for p in ours.parameters() if p.requires_grad]
    autocast = train.make_autocast(args, device)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=gpu)

    def seconds(function, *args):
        start = time.perf_counter()
        function(*args)
        torch.cuda.synchronize() if gpu else None
        return time.perf_counter() - start

    def step():
        train.update(objective, [batch], [0], optimizer, args.max_grad_norm, autocast, device, 1)

    step()  # with --compile the one that compiles
    times = [seconds(step) for _ in range(steps)]
    memory = train.peak_memory(device)
    with FlopCounterMode(display=False) as flops:  # last: it holds tensors
        step()
    x = torch.randn(4096, 4096, device=device, dtype=dtype)
    peak = 2 * 4096**3 / min(seconds(torch.matmul, x, x) for _ in range(10))
    s = statistics.median(times)
    return s, max(times) - min(times), memory, flops.get_total_flops() / s / peak


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder of a checkpoint")
    parser.add_argument("--recipe", nargs="+", default=["small", "published"], help="what to time")
    parser.add_argument("--parts", nargs="+", default=["plain", "ours"], help="whose updates")
    parser.add_argument("--steps", type=int, default=3, help="updates to time")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # in a process of its own
    a, flags = parser.parse_known_args()
    if a.row:
        timed = partial(measure, a.row, a.steps, ["--recipe", *a.recipe, *flags])
        return print(json.dumps((compare if a.row == "compare" else timed)(a.model)))

    def row(part, recipe="published"):
        command = [sys.executable, *sys.argv, "--recipe", recipe, "--row", part]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout)
        print(recipe, part, *done.stderr.splitlines()[-1:], f"exit code {done.returncode}")

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ours against plain:")
    for tau, errors in (row("compare") or {}).items():
        print("  {}: loss {:.0e}, gradients {:.0e} {:.0e}".format(tau, *errors))
    for recipe in a.recipe:
        for part in a.parts:
            if r := row(part, recipe):
                line = "{:<9} {:<5} {:7.2f} s, spread {:.2f} {:6.1f} GB {:5.0%} of the matmul peak"
                print(line.format(recipe, part, *r), flush=True)


if __name__ == "__main__":
    main()
