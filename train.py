"""Train a retriever by language modelling: the explicit loop.

    torchrun train.py                                     # the toy world: about a minute
    torchrun train.py --model path/to/SmolLM2-135M --data groups.jsonl --out runs/mine
    torchrun --nproc_per_node=8 train.py --recipe published --model ... --data groups.jsonl
    torchrun train.py --resume --out runs/mine ...        # go on from the last checkpoint

An update takes `gradient_accumulation_steps` micro-batches on each process, of
`groups_per_device` groups of `train_group_size` passages. Passages see each other within their
group alone: more accumulation or more processes mean more groups in an update, not larger ones. The
loss of an update is the mean over all of its tokens (of other objectives: passages), however they
are spread. What is "collective" below must be called by all processes.

A run folder (--out) holds config.json (all arguments), metrics.jsonl, checkpoints/, and at the end
retriever/ and lm/: PEFT adapters, or whole checkpoints after full training (--lora_r 0). The toy
world is in its world/.
"""

import json
import math
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from argparse import Namespace
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from data import (
    Groups,
    barrier,
    blame,
    command,
    flags_given,
    gathered,
    group_order,
    model_folder,
    read_collections,
    read_json,
    read_safetensors,
    replacing,
    say,
    setup,
    write,
    write_json,
    write_safetensors,
    write_toy_world,
)
from eval import dense_run, measure, show
from model import (
    LORA_TARGETS,
    Llama,
    LlamaConfig,
    add_lora,
    load_adapter,
    recompute,
    save_adapter,
    save_model,
)
from revela import (
    Contrastive,
    Control,
    Replug,
    Retriever,
    Revela,
    Tokenizer,
    collate,
    load_pooling,
    save_pooling,
)

# --------------------------------------------------------------------------------------------------
# arguments: {flag: (default, help, least, below)}, as `data.flags_given` reads them. Of choices the
# default is the first (but `parse_args` chooses the recipe)

DESCRIPTION = """Train a retriever by language modelling. The defaults below are those of --recipe
published; the recipes toy and small replace some."""
FLAGS = {
    "recipe": (
        ("toy", "small", "published"),
        "values of the flags that are not given; small with --data, else toy",
    ),
    "data": (None, "JSON lines of groups, which data.py makes; without: the toy world"),
    "model": (None, "the retriever's base model: a folder, or a hub id org/name[@revision]"),
    "lm": (None, "the language model's base model; without: --model"),
    "retriever_adapter": (
        None,
        "start the retriever from this LoRA adapter (its rank counts, not --lora_r)",
    ),
    "lm_adapter": (None, "start the language model from this LoRA adapter"),
    "freeze_lm": (False, "train the retriever alone"),
    "out": ("runs/published", "run folder to write; must be empty, unless --resume"),
    "resume": (False, "go on from the last checkpoint, if there is one"),
    # the method
    "objective": (("revela", "replug", "contrastive"), "the others are to compare with"),
    "attn_temperature": (1e-4, "tau of the softmax over similarities", 1e-9),
    "lm_temperature": (0.1, "replug: beta of the softmax over likelihoods", 1e-9),
    "reverse_kl": (False, "replug: minimise KL(R||L), as its paper does, and not KL(L||R)"),
    "pooling": (
        ("eos", "mean"),
        "a text's vector: state at the EOS, or standardised mean before it",
    ),
    "inbatch_scale": (1.0, "factor on what passages read from each other"),
    "inbatch_form": (("sum", "convex"), "convex: a passage's own reading weighs 1 - inbatch_scale"),
    "inbatch_start": (
        0.0,
        "share of the language model's blocks that come before any reading",
        0,
        1,
    ),
    "no_inbatch": (False, "the control: plain language modelling"),
    "v_norm": (True, "divide what is read by the mean length of its values"),
    "first_half": (True, "the query of a passage is its first half, not all of it"),
    "dual_loss": (False, "add the context stream's own next-token loss"),
    "train_group_size": (
        16,
        "passages of a group that are used, its first ones; of 2 the retriever learns nothing",
        2,
    ),
    "passage_max_len": (
        157,
        "tokens of a passage that are read; the retriever's prefix and EOS count",
        2,
    ),
    # LoRA
    "lora_r": (256, "rank; 0 trains all weights of both models"),
    "lora_alpha": (64.0, "the correction is alpha/r * B A", 1e-9),
    "lora_dropout": (0.1, "probability of dropout on the input of A", 0, 0.99),
    "lora_target_modules": (",".join(LORA_TARGETS), "layers that get LoRA matrices"),
    # optimisation
    "learning_rate": (1e-4, "peak of AdamW's learning rate"),
    "warmup_steps": (100, "updates until the peak; then linear decay to zero"),
    "weight_decay": (0.0, "AdamW's, on every trained weight"),
    "max_grad_norm": (1.0, "clip both models' gradients together to this norm; 0: do not"),
    "num_train_epochs": (1.0, "passes over --data, if --max_steps does not say", 1e-9),
    "max_steps": (0, "updates; 0: what --num_train_epochs asks for"),
    "groups_per_device": (1, "groups side by side in one micro-batch", 1),
    "gradient_accumulation_steps": (0, "micro-batches an update; 0: about 32 groups an update"),
    "seed": (0, "of weights, dropout, order of the data, and the toy world"),
    # machine, log, checkpoints
    "device": (None, "cuda, mps or cpu; without: the first that is there"),
    "strategy": (("ddp", "fsdp"), "with several processes: each holds all weights, or a part"),
    "dtype": (("bfloat16", "float32"), "bfloat16: autocast, and frozen weights are kept in it"),
    "activation_checkpointing": (
        ("none", "full"),
        "full: compute blocks again in the backward pass, instead of keeping what is in them",
    ),
    "compile": (False, "torch.compile each block: minutes at the start, then faster on a GPU"),
    "num_workers": (-1, "processes that prepare batches; -1: 2 for a GPU, else 0", -1),
    "logging_steps": (10, "updates between log lines; 0: only the last"),
    "save_steps": (500, "updates between checkpoints; 0: only the last"),
    "eval_every": (0, "updates between evaluations; 0: only before and after"),
    "eval_data": ([], "test collections to evaluate on, folders in BEIR layout"),
    "heldout_groups": (
        0,
        "the last groups of --data, at most half: not trained on, their loss is logged",
    ),
}

# Teaches a small model within minutes. It starts from a vector that ranks well, the weights are not
# one-hot, and what passages read from each other does not wreck the language model.
SMALL = dict(
    attn_temperature=0.1, pooling="mean", inbatch_form="convex", inbatch_scale=0.25,
    inbatch_start=0.5, v_norm=False, passage_max_len=64, lora_r=32, lora_dropout=0.0,
    learning_rate=6e-4, warmup_steps=10, max_steps=100, gradient_accumulation_steps=1,
    heldout_groups=8, out="runs/small", logging_steps=5, save_steps=50,
)  # fmt: skip
# Two tiny models that start at random, and are trained whole: hence the large learning rate.
TOY = dict(
    attn_temperature=0.05, first_half=False, lora_r=0, learning_rate=2e-3, warmup_steps=50,
    max_steps=500, groups_per_device=2, gradient_accumulation_steps=1, dtype="float32",
    out="runs/toy", logging_steps=25, save_steps=250, eval_every=100,
)  # fmt: skip
RECIPES = {"toy": TOY, "small": SMALL, "published": {}}


def parse_args(argv=None):
    """The arguments of a run: those given, for the rest its recipe's values."""
    defaults, given = flags_given(DESCRIPTION, FLAGS, argv)
    recipe = given.setdefault("recipe", "small" if "data" in given else "toy")
    args = Namespace(**defaults | RECIPES[recipe] | given)
    if bool(args.data) != bool(args.model) or ((args.eval_data or args.lm) and not args.data):
        raise ValueError("--data (groups) and --model belong together; --eval_data, --lm need them")
    if (args.retriever_adapter or args.lm_adapter) and not args.lora_r:
        raise ValueError("an adapter to start from needs --lora_r; or merge it: eval.py --export")
    if args.inbatch_form == "convex" and args.inbatch_scale > 1:
        raise ValueError("--inbatch_form convex needs an --inbatch_scale of at most 1")
    args.lm = args.lm or args.model
    args.no_inbatch |= args.inbatch_scale == 0  # is the control, too
    if args.objective != "revela":
        if args.no_inbatch or args.strategy == "fsdp":
            raise ValueError("--objective replug, contrastive: without --no_inbatch, and with ddp")
        args.freeze_lm = True
    if args.no_inbatch and args.freeze_lm:
        raise ValueError("--no_inbatch with --freeze_lm leaves nothing to train")
    return args


# --------------------------------------------------------------------------------------------------
# models


def filled(llama, tensors, head):
    """A new Llama like `llama`, LoRA included, whose parameters are `tensors`, not copies of them.

    Parameters that `tensors` lack stay on the meta device.
    """
    with torch.device("meta"):
        copy = Llama(llama.config, head)
        if llama.lora:
            add_lora(copy, *llama.lora.values())  # r, alpha, dropout, targets
    copy.load_state_dict(tensors, strict=False, assign=True)
    copy.path = llama.path
    return copy


def build_models(args, dtype, device):
    """The Llamas of retriever and language model. Trainable weights are float32."""
    if not args.lora_r:
        dtype = torch.float32  # all weights are trained
    lm = Llama.from_pretrained(args.lm, dtype, device)
    kind = read_json(model_folder(args.lm) / "config.json").get("architectures")
    # a head that is tied is in no file: a retriever would pass for a language model
    if kind and "ForCausalLM" not in str(kind) and args.objective != "contrastive":
        raise ValueError(f"{args.lm} is {kind!r:.80}, and no language model: give one by --lm")
    if args.lm == args.model and args.lora_r:  # the frozen weights exist once
        base = filled(lm, lm.state_dict(), head=False)
    else:
        base = Llama.from_pretrained(args.model, dtype, device, head=False)
    targets = args.lora_target_modules.split(",")
    for llama, adapter in ((base, args.retriever_adapter), (lm, args.lm_adapter)):
        if adapter:
            load_adapter(llama, adapter)
        elif args.lora_r and not (llama is lm and args.freeze_lm):  # which needs none
            add_lora(llama, args.lora_r, args.lora_alpha, args.lora_dropout, targets)
    if args.freeze_lm:
        lm.requires_grad_(False)
    if args.no_inbatch:
        base.requires_grad_(False)  # nothing will reach it
    return base, lm


def build_objective(args, retriever, lm):
    """The module whose forward is the loss of a batch."""
    objectives = {
        "revela": Control if args.no_inbatch else Revela,
        "replug": partial(Replug, lm_temperature=args.lm_temperature, reverse_kl=args.reverse_kl),
        "contrastive": Contrastive,
    }
    return objectives[args.objective](
        retriever,
        lm,
        args.attn_temperature,
        args.v_norm,
        dual_loss=args.dual_loss,
        scale=args.inbatch_scale,
        convex=args.inbatch_form == "convex",
        start=args.inbatch_start,
    )


def wrap_blocks(llama, args):
    """Let each block be compiled, and computed again in the backward pass, if `args` say so."""
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # streams, sizes, with and without gradients
    for block in llama.layers:
        if args.compile:
            block.forward = torch.compile(block.forward)
        if args.activation_checkpointing == "full":  # second, since it goes around what is compiled
            block.forward = partial(recompute, block.forward)


def shard(revela, device, dtype):
    """FSDP2: each process holds a part of each weight, and a whole block's while it runs.

    What is used outside of blocks (embeddings, heads, final norms) is one unit more. A block of the
    language model is gathered for each of its two streams.
    """
    # FSDP2 warns, lest someone write to them, that a block returns views: its keys and values
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # gradients are reduced in float32
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for llama in revela.llamas.values():
        for block in llama.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(revela, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(revela, "diagnose")


def all_reduce(t):
    """Replace `t` by its sum over all processes, and return it. Collective: all must call it."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def full_tensor(t):
    """A tensor of which each process may hold a part, as a whole. Collective."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def unsharded(llama, device):
    """`llama` itself, if it is not sharded; else a copy of it on `device`. Collective."""
    if not isinstance(llama.layers[0], FSDPModule):
        return llama
    weights = {name: full_tensor(p.detach()).to(device) for name, p in llama.named_parameters()}
    return filled(llama, weights, llama.has_head)


def unsharded_retriever(retriever, device):
    """A Retriever in eval mode, whole on this process. Collective.

    If `retriever` is not sharded, it has the same decoder: so call `revela.train()` afterwards.
    """
    copy = Retriever(unsharded(retriever.llama, device), retriever.tokenizer, retriever.pooling)
    copy.mean, copy.std = retriever.mean, retriever.std  # shared, so that `standardise` sets both
    return copy.eval()


# --------------------------------------------------------------------------------------------------
# one update


def learning_rate(step, args, total):
    """The rate of update `step` (from 0): up in `warmup_steps` updates, then down to 0 at `total`.

    Both linearly.
    """
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    return args.learning_rate * (total - step) / (total - args.warmup_steps)


def on(device, batch):
    """`batch` on `device`."""
    gpu = device.type == "cuda"  # mps would read the batch after it is freed
    return {name: tensor.to(device, non_blocking=gpu) for name, tensor in batch.items()}


def update(model, micro_batches, seeds, optimizer, max_grad_norm, autocast, device, world_size):
    """Take one step on the mean loss over all tokens (or passages) of all processes' micro-batches.

    model            an objective, or the DDP around one
    micro_batches    on `device`
    seeds            one for the dropout of each micro-batch

    Returns {name: scalar tensor} over all processes: `tokens`, the number of targets; the means of
    the objective's `stats`; `grad_norm_*` before clipping. Raises ValueError if a norm is not
    finite, before anything is changed.
    """
    revela = getattr(model, "module", model)
    counts = [revela.count(batch) for batch in micro_batches]
    total = all_reduce(sum(counts)).clamp(min=1)  # passages of one token have no target
    stats = Counter(tokens=sum(revela.is_target(batch).sum() for batch in micro_batches))
    for i, batch in enumerate(micro_batches):
        share = counts[i] / total
        # for DDP, which then reduces gradients once an update. FSDP does it each time, into parts
        model.require_backward_grad_sync = i == len(micro_batches) - 1
        torch.manual_seed(seeds[i])
        with autocast():
            loss = model(batch)
        (loss * share * world_size).backward()  # DDP and FSDP take the mean over processes
        stats.update({name: value * share for name, value in revela.stats.items()})  # adds
    sums = all_reduce(torch.stack([value.float() for value in stats.values()]))
    stats = dict(zip(stats, sums))
    norms = []
    for name, llama in revela.llamas.items():
        gradients = [p.grad for p in llama.parameters() if p.grad is not None]
        norms.append(full_tensor(torch.nn.utils.get_total_norm(gradients).to(device)))
        stats[f"grad_norm_{name}"] = norms[-1]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if not norm.isfinite():  # the norm is the same on all processes: so all stop
        what = f"loss {stats['loss'].item()}, norm of gradients {norm.item()}: nothing was updated"
        raise ValueError(f"{what}. Start anew with a smaller --learning_rate or --dtype float32")
    if max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(revela.parameters(), max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad()
    return stats


# --------------------------------------------------------------------------------------------------
# checkpoints

# Arguments that may differ at --resume. The first line is of names: `identify` compares what they
# stand for. The others change nothing but rounding, and some the random numbers of dropout.
MAY_CHANGE = """recipe data model lm retriever_adapter lm_adapter
out resume device strategy compile groups_per_device gradient_accumulation_steps
activation_checkpointing num_workers logging_steps eval_every eval_data save_steps""".split()
# whole tensors, not this process's parts
DCP_OPTIONS = {"full_state_dict": True, "ignore_frozen_params": True, "strict": False}


def save_models(revela, folder, args, rank):
    """Write `folder`/retriever and, unless it is frozen, `folder`/lm. Collective.

    Adapters, or after full training whole checkpoints with their tokenizers.
    """
    if rank == 0:  # first, for without it the retriever would be read as one that pools by the EOS
        save_pooling(revela.retriever, folder / "retriever")
    for name, llama in revela.llamas.items():
        if name == "lm" and args.freeze_lm:
            continue
        # the other processes help to gather, and keep nothing
        llama = unsharded(llama, "meta" if rank else "cpu")
        if rank:
            continue
        if llama.lora:
            save_adapter(llama, folder / name)
            continue
        save_model(llama, folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            if (model_folder(llama.path) / file).exists():
                shutil.copyfile(model_folder(llama.path) / file, folder / name / file)


def save_checkpoint(folder, step, revela, optimizer, identity, rank):
    """Write `folder`/step_N: trained weights, `mean` and `std`, moments, arguments. Collective.

    It appears whole or not at all, and only then does `folder`/latest name it. Order of the data
    and dropout follow from seed and step: there is nothing else to keep.
    """
    final = folder / f"step_{step:06d}"
    options = dcp.StateDictOptions(cpu_offload=True, **DCP_OPTIONS)  # so rank 0 alone gets them
    weights, optim = dcp.get_state_dict(revela, optimizer, options=options)
    if rank:
        return
    state = dict(weights)
    for name, moments in optim["state"].items():
        state |= {f"{name}.{key}": tensor for key, tensor in moments.items()}
    try:
        with replacing(final) as partial:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            write_safetensors(partial / "state.safetensors", state)
            write_json(partial / "meta.json", {"step": step} | identity)
            if final.exists():  # of one that was killed before `latest` named it
                shutil.rmtree(final)
        write(folder / "latest", final.name + "\n")
    except (OSError, ValueError) as error:
        shutil.rmtree(f"{final}.partial", ignore_errors=True)
        raise OSError(f"{final} could not be written ({error}); the one before is intact") from None


def identify(args, groups, per_update, llamas):
    """{name: value} of all that decides what a training computes. Collective."""
    identity = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    identity |= {"groups": len(groups), "checksum of --data": groups.checksum}
    identity |= {"processes x --groups_per_device x --gradient_accumulation_steps": per_update}
    for name, llama in llamas.items():
        tokenizer = model_folder(llama.path) / "tokenizer.json"
        identity[f"the {name}'s tokenizer.json (checksum)"] = zlib.crc32(tokenizer.read_bytes())
        identity |= {f"the {name}'s {k}": value for k, value in vars(llama.config).items()}
        identity[f"the {name}'s LoRA"] = llama.lora  # that of a given adapter, not of the flags
        checksum = 0
        for p in llama.parameters():
            if not p.requires_grad:  # and so is not in a checkpoint
                frozen = full_tensor(p.detach()).cpu().view(torch.uint8).numpy()
                checksum = zlib.crc32(frozen, checksum)
        identity[f"the {name}'s frozen weights (checksum)"] = checksum
    return identity


def restore(folder, revela, optimizer, identity):
    """Load the checkpoint that `folder`/latest names. Returns its step; 0 if there is none.

    Raises ValueError that names what differs if it is another training's. Collective.
    """
    latest = folder / "latest"
    found = latest.read_text().strip() if latest.exists() else None
    if len(set(gathered(found))) > 1:
        raise ValueError(f"{folder}: processes see different checkpoints; --out must be shared")
    if found is None:
        return 0
    start = folder / Path(found).name  # never outside of `folder`
    before, saved = read_json(start / "meta.json"), read_safetensors(start / "state.safetensors")
    for name, value in json.loads(json.dumps(identity)).items():  # as JSON: tuples become lists
        if before.get(name) != value:
            was, now = f"{before.get(name)!r:.200}", f"{value!r:.200}"
            raise ValueError(f"cannot resume {start}: {name} was {was} there, now it is {now}")
    # called for the names, and to give a new AdamW its moments, zeros
    options = dcp.StateDictOptions(ignore_frozen_params=True)
    weights, optim = dcp.get_state_dict(revela, optimizer, options=options)
    with blame(start / "state.safetensors", "lacks something of this run"):
        weights = {name: saved[name] for name in weights}
        for name, moments in optim["state"].items():
            optim["state"][name] = {key: saved[f"{name}.{key}"] for key in moments}
    options = dcp.StateDictOptions(**DCP_OPTIONS)
    dcp.set_state_dict(
        revela, optimizer, model_state_dict=weights, optim_state_dict=optim, options=options
    )
    return before["step"]


# --------------------------------------------------------------------------------------------------
# the log


def peak_memory(device):
    """The most memory held so far, in GB: of the GPU, else of RAM.

    On Linux the parent's memory, as it was at the start of this process, counts if it is more.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


LINE = """{step:6}/{total}  loss {loss:.4f}  lr {lr:.1e}  grad {grad_norm_retriever:.1e} \
{grad_norm_lm:.1e}  max w {max_weight:.2f}  spread {spread:.2f}  {tokens_per_s:,.0f} tok/s  \
{memory_gb:.1f} GB  {minutes:.1f} min left"""


class Log:
    """metrics.jsonl, and lines on the screen: means over the updates since the last line.

    sums   over these updates: of their statistics and `seconds`; `updates` is their number
    """

    def __init__(self, file, first_step, device, rank):
        self.file, self.device, self.rank = file, device, rank
        self.sums = Counter()
        # what comes after the checkpoint is dropped, and half a line of a killed run
        lines = file.read_text("utf-8").split("\n")[:-1] if first_step else []
        rows = [row for row in map(json.loads, lines) if row["step"] <= first_step]
        # whether the evaluation after `first_step` is there: the run may have been killed before it
        self.evaluated = any(row["step"] == first_step and "loss" not in row for row in rows)
        if rank == 0:
            write(file, "".join(json.dumps(row) + "\n" for row in rows))  # as `record` writes them

    def record(self, values):
        """Append a line to metrics.jsonl, by the first process."""
        if self.rank == 0:
            with open(self.file, "a") as file:
                file.write(json.dumps(values) + "\n")

    def evaluation(self, step, row):
        """Record and print what `evaluate` found, if anything."""
        if row:
            self.record({"step": step} | row)
        for key, what in (("per_data", "nDCG@10"), ("heldout_loss", "held-out loss")):
            if key in row:
                shown = ", ".join(f"{name} {value:.4f}" for name, value in row[key].items())
                say(f"step {step}: {what} {shown}")

    def line(self, step, total, lr):
        """Record and print the means."""
        updates = self.sums.pop("updates")
        values = {"step": step, "lr": lr}
        values |= {name: float(value) / updates for name, value in self.sums.items()}
        seconds = values.pop("seconds")  # of an update
        values["tokens_per_s"] = values.pop("tokens") / seconds
        values["memory_gb"] = peak_memory(self.device)
        values["eta_s"] = seconds * (total - step)
        self.record(values)
        # a Counter: what the control lacks is 0
        say(LINE.format_map(Counter(values, total=total, minutes=values["eta_s"] / 60)))
        self.sums = Counter()


# --------------------------------------------------------------------------------------------------
# several processes, signals, and the run folder

STOPPED = 75  # the exit code after SIGTERM or SIGINT: EX_TEMPFAIL of sysexits.h, "try again later"


def ignore_signals(_):
    """Let a worker live on after Ctrl-C: the update in progress needs its batches."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def catch_signals():
    """A list that gets the first SIGTERM or SIGINT; at a second one the process leaves at once."""
    signals = []

    def caught(number, _):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, caught)
    return signals


def check_out(out, resume):
    """Raise ValueError unless `out` is free, or with `resume` the folder of a run before."""
    config, latest = out / "config.json", out / "checkpoints/latest"
    ours = resume and config.exists() and "recipe" in read_json(config)
    if ours and (out / "retriever").exists() and not latest.exists():
        raise ValueError(f"{out} is a finished run, and has no checkpoint: choose another --out")
    files = [file.name for file in out.iterdir()] if out.exists() else []
    # a run that was killed at its start leaves nothing but this
    if files not in ([], ["config.json.partial"]) and not ours:
        raise ValueError(
            f"{out} is not empty: choose another --out, or go on with --resume, if it is a run's"
        )


def made_by():
    """What makes this run: commit, versions, GPU or processor."""
    commit, git = None, ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with suppress(OSError):  # there may be no git
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    gpu = torch.cuda.is_available() and torch.cuda.get_device_name()
    return {
        "commit": commit,
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
        "machine": gpu or platform.processor() or platform.machine(),
    }


def make_world(folder, args, rank):
    """Set args.model, .lm, .data, .eval_data to the toy world in `folder`; make it if need be."""
    if rank == 0 and not folder.exists():
        # should this be killed, --resume knows the folder by it
        write_json(folder.parent / "config.json", vars(args))
        with replacing(folder) as partial:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            write_toy_world(partial, args.seed)
            torch.manual_seed(args.seed)
            llama = Llama(LlamaConfig.from_pretrained(partial)).init_weights()
            save_model(llama, partial)
    barrier()
    args.model = args.lm = str(folder)
    args.data, args.eval_data = f"{folder}/groups.jsonl", [str(folder)]


# --------------------------------------------------------------------------------------------------


def prepare(args, device, world_size):
    """(model, optimizer), new. The model is the objective, wrapped by DDP or FSDP if need be."""
    dtype, gpu = getattr(torch, args.dtype), device.type == "cuda"
    fsdp = args.strategy == "fsdp" and world_size > 1
    torch.manual_seed(args.seed)
    where = torch.device("cpu") if fsdp else device  # shards move to the device one by one
    base, lm = build_models(args, dtype, where)
    wrap_blocks(base, args)
    wrap_blocks(lm, args)
    retriever = Retriever(base, Tokenizer(args.model), args.pooling)
    model = build_objective(args, retriever, lm)
    if fsdp:
        shard(model, device, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=args.weight_decay, fused=gpu)
    if world_size > 1 and not fsdp:
        model = DistributedDataParallel(model, device_ids=[device] if gpu else None)
    return model, optimizer


def make_autocast(args, device):
    """The function () -> context in which the forward pass runs."""
    enabled = args.dtype == "bfloat16"
    return partial(torch.autocast, device.type, torch.bfloat16, enabled)


def make_collate(args, tokenizer):
    """The function [(texts, src)] -> batch."""
    return partial(
        collate,
        tokenizer=tokenizer,
        lm_tokenizer=Tokenizer(args.lm),
        passage_max_len=args.passage_max_len,
        first_half=args.first_half,
        apart=args.objective == "contrastive",
    )


def make_loader(args, groups, order, to_batch, gpu):
    """Batches of `groups`. `order` yields the list of indices of each."""
    workers = args.num_workers
    if workers < 0:
        workers = 2 if gpu else 0
    return torch.utils.data.DataLoader(
        groups,
        batch_sampler=order,
        collate_fn=to_batch,
        num_workers=workers,
        pin_memory=gpu,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # its own, so that the one behind dropout is left alone
    )


def evaluate(revela, collections, heldout, autocast, device):
    """What is recorded of an evaluation, and the runs on `collections`. Collective.

    heldout: batches of groups that are not trained on, for `Revela.diagnose`; the weights of the
    first group are recorded, too.
    """
    row, runs = {}, {}
    revela.eval()
    if collections:
        retriever = unsharded_retriever(revela.retriever, device)
        runs = {name: dense_run(retriever, c) for name, c in collections.items()}
        ndcg = {name: measure(run, collections[name][2])["ndcg@10"] for name, run in runs.items()}
        row |= {"ndcg@10": sum(ndcg.values()) / len(ndcg), "per_data": ndcg}
    if heldout:
        with autocast():
            found = [revela.diagnose(batch) for batch in heldout]
        losses, weights = zip(*found)
        row["heldout_loss"] = mean_loss = {}
        for name in losses[0]:
            mean_loss[name] = sum(loss[name].item() for loss in losses) / len(losses)
        first = weights[0][0]  # [B, B]: of the first batch's one group
        row["weights"] = [[round(w, 4) for w in w_i] for w_i in first.tolist()]
    for module in revela.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # else weights stay whole, in bfloat16, after a pass without gradients
    revela.train()
    return row, runs


def train(args, device, rank, world_size):
    """Train as `args` say. Returns the exit code."""
    out, gpu = Path(args.out), device.type == "cuda"
    toy = args.data is None
    if toy:
        make_world(out / "world", args, rank)
    model, optimizer = prepare(args, device, world_size)
    revela = getattr(model, "module", model)
    autocast = make_autocast(args, device)

    # -- data, and the update to go on from
    groups = Groups(args.data, args.train_group_size)
    collections = read_collections(args.eval_data)
    n_train = len(groups) - min(args.heldout_groups, len(groups) // 2)
    side_by_side = world_size * args.groups_per_device
    accumulation = args.gradient_accumulation_steps or max(1, 32 // side_by_side)
    per_update = accumulation * side_by_side  # groups
    total = args.max_steps or math.ceil(args.num_train_epochs * n_train / per_update)
    to_batch = make_collate(args, revela.retriever.tokenizer)
    identity = identify(args, groups, per_update, revela.llamas)
    # mean and std come with the model, or from a checkpoint, or are measured before update 1
    has_pooling = load_pooling(revela.retriever, model_folder(args.retriever_adapter or args.model))
    first_step = restore(out / "checkpoints", revela, optimizer, identity)
    order = group_order(
        n_train, args.seed, first_step, total,
        rank, world_size, accumulation, args.groups_per_device,
    )  # fmt: skip
    loader = make_loader(args, groups, order, to_batch, gpu)
    if rank == 0:
        write_json(out / "config.json", vars(args) | {"made_by": made_by()})
    log = Log(out / "metrics.jsonl", first_step, device, rank)
    say(
        f"recipe {args.recipe}: {total} updates of {world_size} processes x {accumulation} "
        f"micro-batches x {args.groups_per_device} groups of {args.train_group_size} passages, "
        f"{total * per_update / n_train:.2f} epochs of {n_train:,} groups; "
        f"{sum(p.numel() for p in revela.parameters() if p.requires_grad):,} trained parameters; "
        f"{args.dtype} on {device}"
    )
    if args.warmup_steps > total:
        say(f"--warmup_steps {args.warmup_steps}: the run ends before its learning rate's peak")

    def batch_of(i):
        return on(device, to_batch([groups[i]]))

    heldout = [batch_of(i) for i in range(n_train, len(groups))]

    def report(step):
        first_or_last = step in (0, total)
        if every(args.eval_every, step) or first_or_last:
            row, runs = evaluate(revela, collections, heldout, autocast, device)
            log.evaluation(step, row)
            if toy and rank == 0 and first_or_last:
                show(runs["world"], collections["world"])

    # -- before the first update
    if first_step == 0 and args.pooling == "mean" and not has_pooling:
        some = map(batch_of, range(min(25, n_train)))  # 400 passages, of groups of 16
        with autocast():
            unsharded_retriever(revela.retriever, device).standardise(some)
        revela.train()
    if not log.evaluated:
        report(first_step)

    # -- the loop
    batches, signals = iter(loader), catch_signals()
    for step in range(first_step + 1, total + 1):  # `learning_rate` and `order` count from 0
        began = time.perf_counter()
        lr = learning_rate(step - 1, args, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro_batches = [on(device, next(batches)) for _ in range(accumulation)]
        seeds = [dropout_seed(args.seed, step, i * world_size + rank) for i in range(accumulation)]
        stats = update(
            model, micro_batches, seeds,
            optimizer, args.max_grad_norm, autocast, device, world_size,
        )  # fmt: skip
        log.sums.update(stats, seconds=time.perf_counter() - began, updates=1)  # adds

        last = step == total
        # a signal to any process stops all
        stop = bool(all_reduce(torch.full((), len(signals), device=device)))
        if every(args.logging_steps, step) or last or stop:
            log.line(step, total, lr)
        if every(args.save_steps, step) or last or stop:
            save_checkpoint(out / "checkpoints", step, revela, optimizer, identity, rank)
            barrier()
        report(step)
        if stop and not last:
            say(f"stopped by a signal after update {step}, which is saved: go on with --resume")
            return STOPPED
    save_models(revela, out, args, rank)
    say(f"saved {out}/retriever" + ("" if args.freeze_lm else f" and {out}/lm"))
    return 0


def every(n, step):
    """Whether what is due every `n` updates is due after update `step`."""
    return n > 0 and step % n == 0


def dropout_seed(seed, step, position):
    """The seed of the micro-batch at `position` of update `step`, whoever computes it."""
    return int(np.random.default_rng([seed, step, position]).integers(2**62))


def main(argv=None):
    args = parse_args(argv)
    device, rank, world_size = setup(args.device)
    if device.type == "mps" and world_size > 1:
        raise ValueError("several processes cannot train on mps: start one, or give --device cpu")
    if rank == 0:
        check_out(Path(args.out), args.resume)
    code = train(args, device, rank, world_size)
    barrier()
    return code


if __name__ == "__main__":
    command(main)
