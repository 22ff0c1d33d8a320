"""Train a retriever by language modelling: the explicit loop.

    torchrun train.py                                    # the toy world: nothing to download, about a minute on a laptop
    python train.py                                      # the same in one plain process
    torchrun --nproc_per_node=8 train.py --model path/to/SmolLM2-135M --data groups.jsonl --out runs/smol
    python train.py --resume latest --out runs/smol ...  # go on from the last checkpoint, with the arguments of before

An update is over `gradient_accumulation_steps` micro-batches on each process, of `groups_per_device` groups of
`train_group_size` passages. Passages see each other within their group alone: more accumulation or more processes mean
more groups in an update, not larger ones. The loss of an update is the mean over all of its tokens (with another
--objective: passages), however they are spread over micro-batches and processes.

A run folder (--out) holds config.json (all arguments), metrics.jsonl, checkpoints/, and at the end retriever/ and lm/:
PEFT adapters after LoRA training, whole Hugging Face checkpoints after full training (--lora_r 0).
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from data import Groups, Help, Tokenizer, collate, group_order, read_beir, write_toy_world
from eval import dense_run, leave, measure, setup, show, write_encoding
from model import (LORA_TARGETS, Llama, add_lora, find, load_adapter, read_json, read_safetensors, save_adapter, save_model,
                   tune_allocator)  # fmt: skip
from revela import Contrastive, Replug, Retriever, Revela

# ----------------------------------------------------------------------------------------------------------------------
# arguments

# The toy world's own defaults. The models are tiny, start at random and are trained whole, hence the large learning rate.
TOY = {
    "out": "runs/toy", "lora_r": 0, "attn_temperature": 0.05, "learning_rate": 2e-3, "warmup_steps": 50, "max_steps": 500,
    "groups_per_device": 2, "gradient_accumulation_steps": 1, "logging_steps": 25, "eval_every": 100, "save_steps": 250,
}  # fmt: skip

OUT_OF_MEMORY = """out of memory in update {} ({}). The last checkpoint is intact. These help and change nothing but rounding:
  --activation_checkpointing selective, or full;  --groups_per_device smaller, with more --gradient_accumulation_steps;
  --strategy fsdp, with several processes;  --dtype bfloat16 (more rounding).
These help and change what is computed: --passage_max_len, --train_group_size, --lora_r smaller."""

STOPPED = 75  # the exit code after SIGTERM or SIGINT: EX_TEMPFAIL of sysexits.h, "try again later"

# Arguments that may change when a run is resumed: none of them changes what is computed, as long as an update is over as many groups.
FREE = {"out", "resume", "device", "strategy", "groups_per_device", "gradient_accumulation_steps", "activation_checkpointing", "compile",
        "num_workers", "logging_steps", "eval_every", "eval_data", "save_steps"}  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Train a retriever by language modelling.", allow_abbrev=False,
        formatter_class=Help,
        epilog="Without --data, a toy world is written and trained on, with defaults of its own: "
        + ", ".join(f"{k} {v}" for k, v in TOY.items()),
    )  # fmt: skip
    add = parser.add_argument_group("data and models").add_argument
    add("--data", help="JSON lines of groups, each a list of passages, gzipped or not; made by data.py. None: the toy world")
    add("--model", help="base model of the retriever: a folder in Hugging Face layout, or a hub id org/name[@revision]")
    add("--lm", help="base model of the language model (default: --model)")
    add("--retriever_adapter", help="start the retriever from this LoRA adapter (its rank, alpha and layers count)")
    add("--lm_adapter", help="start the language model from this LoRA adapter")
    add("--objective", choices=("revela", "replug", "contrastive"), default="revela",
        help="what is trained for. replug, contrastive: the baselines of revela.py, which train the retriever alone (they imply "
        "--freeze_lm) and have no in-batch attention. contrastive implies --first_half, and does not use --lm")  # fmt: skip
    add("--freeze_lm", action="store_true", help="train the retriever alone")
    add("--out", default="runs/revela", help="run folder to write; must not hold a run, unless it is resumed")
    add("--resume", help="'latest', or the name of a folder under checkpoints/, such as step_000500: go on from there")
    add = parser.add_argument_group("method").add_argument
    add("--attn_temperature", type=float, default=1e-4, help="tau of the softmax over similarities; at 1e-4, as published, almost no row has a gradient, at 0.01 to 0.05 every row has")
    add("--lm_temperature", type=float, default=0.1, help="replug: beta of the softmax over the language model's likelihoods")
    add("--inbatch_scale", type=float, default=1.0, help="factor on what passages read from each other; 1: as published; 0.1 teaches a small model from the first update")
    add("--no_inbatch", action="store_true", help="the control: no in-batch attention, so nothing reaches the retriever")
    add("--no_v_norm", action="store_true", help="leave V-norm out of the in-batch attention")
    add("--first_half", action="store_true", help="the query of a passage is its first half, not all of it")
    add("--dual_loss", action="store_true", help="add the context stream's own next-token loss")
    add("--train_group_size", type=int, default=16, help="passages of a group that are used: its first ones")
    add("--passage_max_len", type=int, default=157, help="tokens of a passage that are read (prefix and EOS included)")
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_r", type=int, default=256, help="rank; 0 trains all weights of both models")
    add("--lora_alpha", type=float, default=64, help="the correction is alpha/r * B A")
    add("--lora_dropout", type=float, default=0.1, help="probability of dropout on the input of A")
    add("--lora_target_modules", default=",".join(LORA_TARGETS), help="layers that get LoRA matrices, separated by commas")
    add = parser.add_argument_group("optimisation").add_argument
    add("--learning_rate", type=float, default=1e-4, help="peak of AdamW's learning rate")
    add("--warmup_steps", type=int, default=100, help="updates until the peak; then linear decay to zero")
    add("--weight_decay", type=float, default=0.0, help="AdamW's, on every trained weight")
    add("--max_grad_norm", type=float, default=1.0, help="gradients of both models together are clipped to this norm")
    add("--num_train_epochs", type=float, default=1.0, help="passes over --data")
    add("--max_steps", type=int, help="updates (default: what num_train_epochs asks for)")
    add("--groups_per_device", type=int, default=1, help="groups side by side in one micro-batch")
    add("--gradient_accumulation_steps", type=int, help="micro-batches per update and process (default: 32 groups per update)")
    add("--seed", type=int, default=0, help="of weights, dropout, order of the data, and the toy world")
    add = parser.add_argument_group("machine, log and checkpoints").add_argument
    add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    add("--strategy", choices=("ddp", "fsdp"), default="ddp",
        help="with several processes: ddp: each holds everything; fsdp: each holds a part of all weights, gradients and moments")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="bfloat16: autocast, with frozen weights kept in bfloat16; trained weights stay float32")  # fmt: skip
    add("--activation_checkpointing", choices=("none", "selective", "full"), default="none",
        help="compute again in the backward pass instead of keeping: selective: all but matmuls; full: whole blocks")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile each block: minutes at the start, for faster updates on a GPU")
    add("--num_workers", type=int, help="processes that prepare batches; 0: the training process does (default: 2 for a GPU, else 0)")
    add("--logging_steps", type=int, default=10, help="updates between log lines")
    add("--save_steps", type=int, default=500, help="updates between checkpoints; the last one is always saved")
    add("--eval_every", type=int, default=0, help="updates between evaluations on --eval_data; 0: only before and after")
    add("--eval_data", nargs="+", help="test collections, folders in BEIR layout")
    args = parser.parse_args(argv)
    if args.data is None:
        if args.model:
            raise ValueError("--model needs --data: a file of groups, which data.py makes from documents")
        parser.set_defaults(**TOY)
        args = parser.parse_args(argv)
    elif not args.model:
        raise ValueError("--data needs --model, the base model to train: a folder or a hub id such as HuggingFaceTB/SmolLM2-135M")
    if (args.retriever_adapter or args.lm_adapter) and not args.lora_r:
        raise ValueError("--lora_r 0 trains all weights: an adapter to start from must be merged first (eval.py --export)")
    if args.objective != "revela" and (args.no_inbatch or args.strategy == "fsdp"):
        raise ValueError(f"--objective {args.objective} has no in-batch attention to leave out, and goes with --strategy ddp alone")
    args.freeze_lm |= args.objective != "revela"
    args.first_half |= args.objective == "contrastive"
    return args


# ----------------------------------------------------------------------------------------------------------------------
# parts


def build_models(args, dtype, device, start):
    """(retriever, lm), their trainable weights in float32, as they stand in the checkpoint folder `start`, or fresh."""
    same = args.lm in (None, args.model)
    lm_base = args.model if same else args.lm
    if args.lora_r == 0:
        lm = Llama.from_pretrained(start / "lm" if start and not args.freeze_lm else lm_base, torch.float32, device)
        lm.requires_grad_(not args.freeze_lm)
        retriever = Llama.from_pretrained(start / "retriever" if start else args.model, torch.float32, device, head=False)
        return Retriever(retriever, Tokenizer(args.model)), lm
    lm = Llama.from_pretrained(lm_base, dtype, device)
    if same:  # the frozen weights exist once
        with torch.device("meta"):
            retriever = Llama(lm.config, head=False)
        retriever.load_state_dict(lm.state_dict(), strict=False, assign=True)
        retriever.path = lm.path
    else:
        retriever = Llama.from_pretrained(args.model, dtype, device, head=False)
    for llama, name, adapter in ((retriever, "retriever", args.retriever_adapter), (lm, "lm", args.lm_adapter)):
        learns = llama is retriever or not args.freeze_lm
        if start and learns:
            adapter = start / name
        if adapter:
            load_adapter(llama, adapter)
        elif learns:
            add_lora(llama, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules.split(","))
        if not learns:
            llama.requires_grad_(False)
    return Retriever(retriever, Tokenizer(args.model)), lm


def shard(revela, device, dtype):
    """FSDP2: every process holds a part of each weight, and the whole of a block's only while that block runs. What is used
    outside of blocks (embeddings, which may be the output head too, heads and final norms) is one unit more."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    low = torch.bfloat16 if dtype == torch.bfloat16 else None  # gradients still meet in float32
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)}
    for block in [*revela.retriever.llama.layers, *revela.lm.layers]:
        fully_shard(block, **options)
    return fully_shard(revela, **options)


def full(t):
    """The whole of a tensor of which every process may hold a part; every process must call this."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def whole(llama, device, only=""):
    """`llama` itself, or if it is sharded, a copy with whole weights on `device`, of which those count whose names contain
    `only`; every process must call this."""
    if not isinstance(llama.embed_tokens.weight, DTensor):
        return llama
    with torch.device("meta"):
        copy = Llama(llama.config, llama.has_head)
        if llama.lora:
            add_lora(copy, *llama.lora.values())
    weights = {name: full(p.detach()).to(device) for name, p in llama.named_parameters() if only in name}
    copy.load_state_dict(weights, strict=False, assign=True)
    copy.path = llama.path
    return copy


def save_models(revela, folder, args, rank):
    """Write {folder}/retriever and, unless it is frozen, {folder}/lm: adapters, or whole checkpoints with tokenizers. The
    first process does; every process must call this."""
    for llama, name, base in ((revela.retriever.llama, "retriever", args.model), (revela.lm, "lm", args.lm or args.model)):
        if name == "lm" and args.freeze_lm:
            continue
        llama = whole(llama, "meta" if rank else "cpu", only=".lora_" if llama.lora else "")
        if rank:
            continue
        if llama.lora:
            save_adapter(llama, folder / name)
        else:
            save_model(llama, folder / name)
            base = find(base)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                if (base / file).exists():
                    shutil.copyfile(base / file, folder / name / file)
        if name == "retriever":
            write_encoding(folder / name)


def learning_rate(step, args, total):
    """Of update `step` (from 0): up linearly to the peak in `warmup_steps` updates, then down linearly to 0 at `total`."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    return args.learning_rate * (total - step) / (total - args.warmup_steps)


def fsync(path):
    """Return when what was written to `path`, a file or folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write(file, text):
    """Make `text` the content of `file`, which at any moment, whatever fails, has the old content or the new one."""
    partial = Path(f"{file}.partial")
    partial.write_text(text)
    fsync(partial)
    os.replace(partial, file)
    fsync(file.parent)


def save_checkpoint(folder, step, revela, optimizer, args, per_update, rank):
    """Write {folder}/step_N: models, optimizer, arguments. It appears whole or not at all, and only then does {folder}/latest
    name it. Order of the data and dropout follow from seed, step and rank. Every process must call this."""
    final, partial = folder / f"step_{step:06d}", folder / f"step_{step:06d}.partial"
    moments, names = {}, [name for name, p in revela.named_parameters() if p.requires_grad]
    for i, state in optimizer.state_dict()["state"].items():
        for key, t in state.items():
            t = full(t)
            moments |= {} if rank else {f"{names[i]}.{key}": t.cpu()}
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        save_models(revela, partial, args, rank)
        if rank:
            return
        save_file(moments, partial / "optimizer.safetensors")
        meta = {"step": step, "groups_per_update": per_update, "args": vars(args)}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        for path in [*partial.rglob("*"), partial]:
            fsync(path)
        if final.exists():  # from a run that was killed before `latest` named it, or that this one went back behind
            shutil.rmtree(final)
        os.replace(partial, final)
        fsync(folder)
        write(folder / "latest", final.name + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{final} could not be written ({error}); the checkpoint before it is intact") from None


def find_checkpoint(args, per_update):
    """(folder, step) of the checkpoint that --resume means. Raises ValueError if there is none, or if it was made with
    arguments that compute something else."""
    folder = Path(args.out) / "checkpoints"
    if args.resume == "latest" and not (folder / "latest").exists():
        raise ValueError(f"nothing to resume: {folder} holds no finished checkpoint")
    name = (folder / "latest").read_text().strip() if args.resume == "latest" else args.resume
    if not re.fullmatch(r"step_\d+", name):
        raise ValueError(f"--resume {args.resume}: {name!r} is no checkpoint; need 'latest' or a folder of {folder}, such as step_000500")
    start = folder / name
    meta = read_json(start / "meta.json")
    try:
        step, before, groups = int(meta["step"]), dict(meta["args"]), int(meta["groups_per_update"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{start}/meta.json is not a checkpoint's of this version ({error!r})") from None
    for name, value in vars(args).items():
        if name not in FREE and before.get(name) != value:
            raise ValueError(f"cannot resume {start}: --{name} was {before.get(name)} there, now it is {value}")
    if groups != per_update:
        raise ValueError(f"cannot resume {start}: an update was over {groups} groups there, now it would be over {per_update}: choose "
                         f"processes x --groups_per_device x --gradient_accumulation_steps = {groups}")  # fmt: skip
    return start, step


def restore(start, revela, optimizer):
    """Put back what a checkpoint holds beside the models: the optimizer's moments, this process's part of them if sharded."""
    saved, state = read_safetensors(start / "optimizer.safetensors"), optimizer.state_dict()
    trained = [(name, p) for name, p in revela.named_parameters() if p.requires_grad]
    if lacking := [name for name, p in trained if getattr(saved.get(f"{name}.exp_avg_sq"), "shape", None) != p.shape]:
        raise ValueError(f"{start}/optimizer.safetensors has no moments, or of the wrong shape, for {lacking[0]}")
    for i, (name, p) in enumerate(trained):
        part = lambda t: distribute_tensor(t.to(p.device), p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else t
        state["state"][i] = {"step": saved[f"{name}.step"]} | {key: part(saved[f"{name}.{key}"]) for key in ("exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict(state)


def update(model, micro_batches, optimizer, max_grad_norm, autocast, device, world):
    """One step of the optimizer on the mean loss over all tokens (or passages) of the `micro_batches` of all processes.

    `model` is an objective of revela.py, sharded or not, or the DDP around one. Returns {name: scalar tensor}: its statistics,
    as this process's addend to the mean over the update, and the gradient norms of both models before clipping. Raises
    FloatingPointError before anything is changed if a gradient is not finite.
    """
    ddp = isinstance(model, DistributedDataParallel)
    revela = model.module if ddp else model
    counts = [revela.count(batch) for batch in micro_batches]
    total = sum(counts).to(device)
    if world > 1:
        dist.all_reduce(total)
    stats = {"tokens": sum(revela.targets(batch).sum() for batch in micro_batches)}
    for i, batch in enumerate(micro_batches):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        share = counts[i].to(device) / total
        last = i == len(micro_batches) - 1  # gradients meet once per update
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        with model.no_sync() if ddp and not last else nullcontext():
            with autocast():
                loss = model(batch)
            (loss * share * world).backward()  # DDP and FSDP take the mean over processes, we want the sum
        for name, value in revela.stats.items():
            stats[name] = stats.get(name, 0) + value * share
    norm = {}
    for name, module in (("retriever", revela.retriever), ("lm", revela.lm)):
        norm[name] = full(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]).to(device))
        stats[f"grad_norm_{name}"] = norm[name] / world
    total_norm = torch.linalg.vector_norm(torch.stack(list(norm.values())))
    if not total_norm.isfinite():  # on one process means on all of them, since gradients have met
        raise FloatingPointError(f"loss {stats['loss'].item()}, norm of the gradients {total_norm.item()}")
    torch.nn.utils.clip_grads_with_norm_(revela.parameters(), max_grad_norm, total_norm)
    optimizer.step()
    optimizer.zero_grad()
    return stats


def peak_memory(device):
    """The most memory that this process has held so far, in GB: of the GPU, else of RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # here, since Windows lacks it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ----------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    tune_allocator()
    device, rank, world = setup(args.device)
    say = print if rank == 0 else lambda *_: None
    barrier = dist.barrier if world > 1 else lambda: None
    out = Path(args.out)
    accumulation = args.gradient_accumulation_steps or max(1, 32 // (world * args.groups_per_device))
    per_update = world * accumulation * args.groups_per_device
    toy = args.data is None
    if toy:
        args.model, args.data, args.eval_data = str(out / "world"), str(out / "world/groups.jsonl"), [str(out / "world")]
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"  # torchrun starts us again after a failure
    if restarts and (out / "config.json").exists() and vars(args) == read_json(out / "config.json") | {"resume": args.resume}:  # this very run
        args.resume = "latest" if (out / "checkpoints/latest").exists() else None
    elif not args.resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another --out, or go on with --resume latest")
    barrier()
    if toy and rank == 0 and not args.resume:
        write_toy_world(out / "world", args.seed)
    barrier()

    # -- models, optimizer, and where they start
    start, first_step = find_checkpoint(args, per_update) if args.resume else (None, 0)
    dtype, fsdp = getattr(torch, args.dtype), args.strategy == "fsdp" and world > 1
    torch.manual_seed(args.seed)
    retriever, lm = build_models(args, dtype, torch.device("cpu") if fsdp else device, start)  # shards move to the device one by one
    for llama in (retriever.llama, lm):
        llama.recompute_activations(args.activation_checkpointing)
        for block in llama.layers if args.compile else ():
            torch._dynamo.config.recompile_limit = 64  # a block meets both models, streams and sizes, with and without gradients
            block.compile()
    scale = 0.0 if args.no_inbatch else args.inbatch_scale
    if scale == 0:
        retriever.requires_grad_(False)  # nothing will reach it
    if args.objective == "revela":
        revela = Revela(retriever, lm, args.attn_temperature, not args.no_v_norm, scale, args.dual_loss)
    elif args.objective == "replug":
        revela = Replug(retriever, lm, args.attn_temperature, args.lm_temperature)
    else:
        revela = Contrastive(retriever, lm, args.attn_temperature)
    model = revela
    if fsdp:
        shard(revela, device, dtype)
    elif world > 1:
        model = DistributedDataParallel(revela, device_ids=[device] if device.type == "cuda" else None)
    trained = [p for p in revela.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay, fused=device.type == "cuda")
    if start:
        restore(start, revela, optimizer)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    # -- data
    groups = Groups(args.data, args.train_group_size) if rank == 0 else None
    barrier()  # the first process unpacks a gzipped file for all
    groups = groups or Groups(args.data, args.train_group_size)
    collections = {Path(folder).resolve().name: read_beir(folder) for folder in args.eval_data or []}
    total = args.max_steps or math.ceil(args.num_train_epochs * len(groups) / per_update)
    order = group_order(len(groups), args.seed, first_step, total, rank, world, accumulation, args.groups_per_device)
    halves = {"first_half": args.first_half, "second_half": args.objective == "contrastive"}
    tokenizers = {"tokenizer": retriever.tokenizer, "lm_tokenizer": Tokenizer(args.lm or args.model)}
    batches = iter(
        torch.utils.data.DataLoader(
            groups,
            batch_sampler=order,
            collate_fn=partial(collate, **tokenizers, **halves, passage_max_len=args.passage_max_len),
            num_workers=2 * (device.type == "cuda") if args.num_workers is None else args.num_workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # its own, so that the loader does not draw from the one behind dropout
        )
    )
    say(f"{len(groups):,} groups in {args.data}; {sum(p.numel() for p in trained):,} trained parameters; {args.dtype} on {device}")
    say(f"an update: {world} processes x {accumulation} micro-batches x {args.groups_per_device} groups of "
        f"{args.train_group_size} passages; {total} updates are {total * per_update / len(groups):.2f} epochs")  # fmt: skip

    # -- log and evaluation, by the first process
    out.mkdir(parents=True, exist_ok=True)
    metrics = out / "metrics.jsonl"
    if rank == 0:
        if start:
            write(start.parent / "latest", start.name + "\n")
        write(out / "config.json", json.dumps(vars(args), indent=1) + "\n")
        lines = metrics.read_text().splitlines(keepends=True) if start and metrics.exists() else []
        lines = [line for line in lines if line.endswith("\n")]  # a killed run may have left half of one
        write(metrics, "".join(line for line in lines if json.loads(line)["step"] <= first_step))

    def record(values):
        if rank == 0:
            with open(metrics, "a") as file:
                file.write(json.dumps(values) + "\n")

    def evaluate(step):
        if collections:
            searcher = Retriever(whole(retriever.llama, device), retriever.tokenizer)
            runs = {name: dense_run(searcher, *c[:2]) for name, c in collections.items()}
        if collections and rank == 0:
            ndcg = {name: measure(run, collections[name][2])["ndcg@10"] for name, run in runs.items()}
            record({"step": step, "ndcg@10": sum(ndcg.values()) / len(ndcg), "per_data": ndcg})
            say(f"step {step}: nDCG@10 " + ", ".join(f"{name} {value:.4f}" for name, value in ndcg.items()))
            if toy and step in (0, total):
                show(runs["world"], collections["world"])
        barrier()

    # -- the loop
    if not start:
        evaluate(0)
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):  # finish the update, save, leave; at a second one leave at once
        signal.signal(number, lambda number, _: (signals.append(number), signal.signal(number, signal.SIG_DFL)))
    sums, since, clock = {}, first_step, time.perf_counter()
    for step in range(first_step + 1, total + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, args, total)
        micro_batches = [next(batches) for _ in range(accumulation)]
        torch.manual_seed(int(np.random.default_rng([args.seed, step, rank]).integers(2**62)))  # dropout, so that a resumed run draws the same
        try:
            stats = update(model, micro_batches, optimizer, args.max_grad_norm, autocast, device, world)
        except FloatingPointError as error:
            read = list(group_order(len(groups), args.seed, step - 1, step, rank, world, accumulation, args.groups_per_device))
            raise ValueError(
                f"update {step}, process {rank}: not finite: {error}. Its groups (of {args.data}, from 0): {read}. Nothing was "
                "updated, and the last checkpoint is intact. Try a smaller --learning_rate, or --dtype float32"
            ) from None
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise ValueError(OUT_OF_MEMORY.format(step, str(error).splitlines()[0])) from None
        for name, value in stats.items():
            sums[name] = sums.get(name, 0) + value
        stop = torch.tensor(float(len(signals)), device=device)
        if world > 1:
            dist.all_reduce(stop)  # all processes stop after the same update

        if step % args.logging_steps == 0 or step == total or stop:
            values = torch.stack([value.to(device).float() for value in sums.values()])
            if world > 1:
                dist.all_reduce(values)
            v = dict(zip(sums, (values / (step - since)).tolist()))  # means over the updates since the last line
            seconds = (time.perf_counter() - clock) / (step - since)
            v = {"step": step, "lr": group["lr"]} | v | {"tokens_per_s": v.pop("tokens") / seconds}
            v |= {"memory_gb": peak_memory(device), "eta_s": seconds * (total - step)}
            record(v)
            say(
                f"{step:6}/{total}  loss {v['loss']:.4f}  lr {v['lr']:.1e}  "
                f"grad {v['grad_norm_retriever']:.1e} {v['grad_norm_lm']:.1e}  "
                + (f"max w {v['max_weight']:.2f}  spread {v['spread']:.2f}  " if scale else "")
                + f"{v['tokens_per_s']:,.0f} tok/s  {v['memory_gb']:.1f} GB  {v['eta_s'] // 60:.0f}:{v['eta_s'] % 60:02.0f} left"
            )
            sums, since, clock = {}, step, time.perf_counter()

        pause = time.perf_counter()
        if step % args.save_steps == 0 or step == total or stop:
            save_checkpoint(out / "checkpoints", step, revela, optimizer, args, per_update, rank)
            barrier()
        if stop and step < total:
            say(f"stopped by a signal after update {step}, which is saved: go on with --resume latest --out {out}")
            code = STOPPED
            break
        if step == total or (args.eval_every and step % args.eval_every == 0):
            evaluate(step)
        clock += time.perf_counter() - pause
    else:
        code = 0
        save_models(revela, out, args, rank)
        say(f"saved {out}/retriever" + ("" if args.freeze_lm else f" and {out}/lm"))
    barrier()  # a process that leaves while another still works would end the job for both
    return code


if __name__ == "__main__":
    try:
        code = main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    leave(code)
