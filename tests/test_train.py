"""train.py: the update, going on, what is trained, recipes, limits, bad commands, run folders."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from argparse import Namespace
from functools import partial
from itertools import cycle, permutations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TEXTS, command, edit, make_model
from safetensors.torch import load_file, save_file

import eval
import train
from data import setup, write
from model import Llama, in_batch_plan, load_adapter, save_model
from revela import Retriever, Revela, collate


def write_groups(file, n=12):
    rows = [[f"{TEXTS[(i + j) % 18]} {'so ' * (3 * i % 7)}{i}" for j in range(4)] for i in range(n)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(tmp_path, out, *more):
    """A small real run: 5 updates of 4 groups of 3 passages, the last of them in a second epoch."""
    if not (tmp_path / "base").exists():
        make_model(tmp_path / "base", initializer_range=0.1)
        write_groups(tmp_path / "groups.jsonl")
    words = f"""--model {tmp_path}/base --data {tmp_path}/groups.jsonl --out {tmp_path}/{out}
        --recipe published --dtype float32 --train_group_size 3 --gradient_accumulation_steps 4
        --max_steps 5 --warmup_steps 2 --learning_rate 1e-2 --attn_temperature 0.05
        --lora_r 4 --lora_alpha 8 --lora_dropout 0.3 --logging_steps 1 --save_steps 2
        --device cpu"""
    return [*words.split(), *" ".join(more).split()]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    """{"retriever NAME", "lm NAME": tensor} of what a run saved at its end: LoRA, or all.

    And what standardises the retriever's vectors.
    """
    files = sorted(folder.glob("[rl]*/*.safetensors"))
    return {f"{f.parent.name} {name}": t for f in files for name, t in load_file(f).items()}


def flat(value):
    """The numbers in a JSON value, in order."""
    if isinstance(value, (dict, list)):
        parts = value.values() if isinstance(value, dict) else value
        return [number for part in parts for number in flat(part)]
    return [value]


def same(a, b, tolerance=0.0, logs=True):
    """The runs in a and b ended with the same weights, and logged the same but for times."""
    truth, no = weights(a), ["tokens_per_s", "memory_gb", "eta_s"]
    assert truth
    torch.testing.assert_close(weights(b), truth, rtol=tolerance, atol=tolerance)
    if tolerance:  # means over micro-batches, whatever their sizes, and what is rounded
        no += ["max_weight", "weight_entropy", "spread", "weights"]
    if logs:
        one, other = (
            flat([v for row in metrics(x) for n, v in row.items() if n not in no]) for x in (a, b)
        )
        assert other == pytest.approx(one, rel=10 * tolerance, abs=10 * tolerance)


def interrupted(folder, step):
    """Make a run look as if it had been killed after checkpoint `step`, while it wrote a line."""
    for name in ("retriever", "lm"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "checkpoints/latest").write_text(f"step_{step:06d}\n")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')


def work(rank, world, env, call, args):
    os.environ |= env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    call(*args)


def together(world, call, *args, **env):
    """call(*args) in so many processes, as torchrun would start them, but of one that has torch."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(s.getsockname()[1])}
    preload = "tokenizers torch.distributed.fsdp torch.distributed.checkpoint.state_dict"
    multiprocessing.set_forkserver_preload([*preload.split(), "torch._dynamo"])
    start = torch.multiprocessing.start_processes
    start(work, (world, env, call, args), nprocs=world, start_method="forkserver")


def run(*runs):
    """Train one after the other in this process."""
    for args in runs:
        train.main(args)
        dist.init_process_group = lambda *_, **__: None  # it is there


# --------------------------------------------------------------------------------------------------
# updates, going on, what is trained


def test_a_resumed_log_keeps_its_bytes_whatever_a_collection_is_called(tmp_path):
    file = tmp_path / "metrics.jsonl"
    train.Log(file, 0, torch.device("cpu"), 0).record({"step": 2, "per_data": {"é\u2028\udce9": 1}})
    before = file.read_bytes()
    for _ in range(2):
        train.Log(file, 2, torch.device("cpu"), 0)
        assert file.read_bytes() == before


def test_one_process_is_no_group_of_processes(monkeypatch):
    """gloo has no sum of tensors on Apple's GPUs, where torchrun starts one process, too."""
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("a group"))
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert train.setup("cpu") == (torch.device("cpu"), 0, 1)


def test_mps_waits_for_its_batches_and_trains_in_one_process(tmp_path, monkeypatch):
    """Its copies go on when the batch is freed, and gloo has no sum there."""

    class Tensor:
        def to(self, device, non_blocking):
            return non_blocking

    for name, waits in (("cuda", False), ("mps", True)):
        assert train.on(torch.device(name), {"ids": Tensor()}) == {"ids": not waits}
    monkeypatch.setattr(train, "setup", lambda _: (torch.device("mps"), 0, 2))
    with pytest.raises(ValueError, match="several processes cannot train on mps"):
        train.main(arguments(tmp_path, "run"))


def test_the_learning_rate_is_its_closed_form():
    args = train.parse_args("--model m --data d --learning_rate 8 --warmup_steps 4".split())
    rates = [train.learning_rate(step, args, 12) for step in range(12)]
    assert rates == [2, 4, 6, 8, 8, 7, 6, 5, 4, 3, 2, 1]
    args.warmup_steps = 0
    assert [train.learning_rate(step, args, 2) for step in range(2)] == [8, 4]


def test_a_warmup_that_is_longer_than_the_run_is_said(tmp_path, capsys):
    for warmup, said in ((3, False), (4, False), (5, True)):
        train.main(arguments(tmp_path, f"run{warmup}", f"--max_steps 4 --warmup_steps {warmup}"))
        assert ("--warmup_steps" in "".join(capsys.readouterr())) == said


MEAN = """--pooling mean --inbatch_form convex --inbatch_scale 0.25 --inbatch_start 0.5
    --heldout_groups 2"""


@pytest.mark.parametrize("lora", [True, False], ids=["lora with dropout", "full"])
def test_accumulation_processes_and_strategies_do_not_change_the_update(tmp_path, lora):
    def args(out, accumulation, *more):
        how = "--learning_rate 3e-5 --lora_r 0 --dual_loss"
        how = f"--learning_rate 2e-4 {MEAN}" if lora else how
        more = how, f"--max_steps 3 --gradient_accumulation_steps {accumulation}", *more
        return arguments(tmp_path, out, *more)

    train.main(args("1x4", 4))
    together(2, run, args("2x2", 2), args("2x2f", 2, "--strategy fsdp"))
    together(4, run, args("4x1", 1, "--activation_checkpointing full"))
    others = ["2x2", "2x2f", "4x1"]
    if not lora:  # dropout is drawn for a micro-batch as a whole
        train.main(args("1x2x2", 2, "--groups_per_device 2"))
        others.append("1x2x2")
        start = load_file(tmp_path / "base/model.safetensors")["model.layers.1.mlp.up_proj.weight"]
        moved = weights(tmp_path / "1x4")["lm model.layers.1.mlp.up_proj.weight"] - start
        assert moved.abs().median() > 2e-5  # twenty times what may differ
    for other in others:
        same(tmp_path / "1x4", tmp_path / other, 1e-6)


def test_fsdp_trains_the_control_whose_retriever_never_runs(tmp_path):
    def args(out, accumulation, *more):
        more = f"--no_inbatch --gradient_accumulation_steps {accumulation} --max_steps 2", *more
        return arguments(tmp_path, out, "--learning_rate 2e-4 --lora_dropout 0", *more)

    train.main(args("whole", 4))
    together(2, run, args("parts", 2, "--strategy fsdp"))
    same(tmp_path / "whole", tmp_path / "parts", 1e-6)


def test_what_shards_save_is_float32_after_a_pass_in_bfloat16(tmp_path):
    more = "--strategy fsdp --dtype bfloat16 --lora_r 0 --heldout_groups 3 --max_steps 1"
    together(2, run, arguments(tmp_path, "run", more))
    saved = weights(tmp_path / "run")
    assert {t.dtype for t in saved.values()} == {torch.float32}


def test_what_is_computed_again_is_not_kept(tiny):
    def kept(how):
        llama, numbers = Llama.from_pretrained(tiny), []
        train.wrap_blocks(llama, Namespace(activation_checkpointing=how, compile=False))
        hooks = (lambda t: numbers.append(t.numel()) or t), (lambda t: t)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            llama(torch.arange(64).view(4, 16))
        return sum(numbers)

    assert kept("none") > 2 * kept("full")


def test_what_is_not_finite_stops_before_the_update(tmp_path):
    train.main(arguments(tmp_path, "run"))
    interrupted(tmp_path / "run", 2)
    file = tmp_path / "run/checkpoints/step_000002/state.safetensors"
    state = load_file(file)
    state[next(name for name in state if "lm." in name and "lora_B" in name)][0, 0] = torch.nan
    save_file(state, file)
    with pytest.raises(ValueError, match="loss nan, .* nothing was updated.*--learning_rate"):
        train.main(arguments(tmp_path, "run", "--resume"))
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_000002\n"


def test_an_update_without_a_target_is_counted_as_none(tmp_path):
    """Passages of one token each: there is no next one."""
    args = arguments(tmp_path, "run", "--max_steps 1 --warmup_steps 0")
    (tmp_path / "groups.jsonl").write_text('["a", "b", "c"]\n' * 4)
    train.main(args)
    [row] = metrics(tmp_path / "run")
    assert row["loss"] == row["max_weight"] == row["tokens_per_s"] == 0


def test_an_evaluation_that_fails_loses_no_training(tmp_path, monkeypatch):
    evaluate = train.evaluate

    def fails(*args):
        if (tmp_path / "run/checkpoints").exists():
            raise OSError("no space left")
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", fails)
    more = "--max_steps 2 --save_steps 0 --heldout_groups 2"
    with pytest.raises(OSError, match="no space left"):
        train.main(arguments(tmp_path, "run", more))
    monkeypatch.undo()
    train.main(arguments(tmp_path, "run", more, "--resume"))
    train.main(arguments(tmp_path, "whole", more))
    same(tmp_path / "run", tmp_path / "whole")  # with the evaluation that failed


def test_what_0_means(tmp_path):
    train.write_toy_world(tmp_path / "world", 0, n_groups=1, n_test=20)
    train.main(arguments(tmp_path, "huge", "--max_steps 3 --max_grad_norm 1e9"))
    train.main(arguments(tmp_path, "clipped", "--max_steps 3 --max_grad_norm 0.1"))
    names = ("max_grad_norm", "max_steps", "logging_steps", "save_steps", "eval_every")
    flags = [f"--{name} 0" for name in names]
    more = f"--num_train_epochs 0.75 --eval_data {tmp_path}/world"
    train.main(arguments(tmp_path, "off", *flags, more))
    same(tmp_path / "huge", tmp_path / "off", logs=False)
    steps = [(row["step"], "loss" in row) for row in metrics(tmp_path / "off")]
    assert steps == [(0, False), (3, True), (3, False)]
    assert len(list((tmp_path / "off/checkpoints").glob("step_*"))) == 1
    with pytest.raises(AssertionError):
        same(tmp_path / "huge", tmp_path / "clipped", logs=False)


@pytest.mark.parametrize("more", ["", "--lora_r 0", MEAN], ids=["lora", "full", "mean"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one_wherever_it_was_moved(tmp_path, more):
    train.main(arguments(tmp_path, "whole", more))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.copytree(tmp_path / "base", tmp_path / "moved")
    shutil.copy(tmp_path / "groups.jsonl", tmp_path / "moved/groups")
    interrupted(tmp_path / "cut", 2)
    moved = f"--resume --model {tmp_path}/moved --data {tmp_path}/moved/groups"
    for _ in range(2):  # the second time nothing is left to do, and nothing is lost
        train.main(arguments(tmp_path, "cut", more, moved))
        same(tmp_path / "whole", tmp_path / "cut")
        assert metrics(tmp_path / "cut")[:2] == metrics(tmp_path / "whole")[:2]  # times, too


def test_a_checkpoint_goes_on_under_another_strategy_and_number_of_processes(tmp_path):
    def args(out, accumulation, *more):
        more = f"--learning_rate 2e-4 --gradient_accumulation_steps {accumulation}", MEAN, *more
        return arguments(tmp_path, out, *more)

    train.main(args("whole", 4))
    together(2, run, args("moved", 2, "--strategy fsdp --activation_checkpointing full"))
    for step, processes, strategy in ((2, 4, "ddp"), (4, 2, "fsdp"), (4, 1, "ddp")):
        interrupted(tmp_path / "moved", step)
        resumed = args("moved", 4 // processes, f"--strategy {strategy} --resume")
        together(processes, run, resumed)
        same(tmp_path / "whole", tmp_path / "moved", 1e-6)
    with pytest.raises(ValueError, match="processes x .* was 4 there, now it is 3"):
        train.main(args("moved", 3, "--resume"))


def shards(folder, argv):
    """Give each process's part of each tensor numbers of its own; save all, and restore it."""
    device, rank, world = setup("cpu")

    def fresh():
        args = train.parse_args(argv)
        retriever, lm = train.build_models(args, torch.float32, device)
        revela = train.build_objective(args, Retriever(retriever), lm)
        train.shard(revela, device, torch.float32)
        trained = [p for p in revela.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0)
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return revela, optimizer

    def parts(revela, optimizer):
        tensors = {name: p for name, p in revela.named_parameters() if p.requires_grad}
        for name, p in list(tensors.items()):
            moments = optimizer.state[p]
            tensors |= {f"{name}.{key}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        return {name: t.detach().to_local() for name, t in tensors.items()}

    first, second = fresh(), fresh()
    truth = parts(*first)
    for number, part in enumerate(truth.values()):
        part.copy_(torch.arange(part.numel()).view_as(part) + 2**12 * (world * number + rank))
    train.save_checkpoint(folder, 7, *first, {"of": "this"}, rank)
    dist.barrier()
    assert train.restore(folder, *second, {"of": "this"}) == 7
    saved, restored = load_file(folder / "step_000007/state.safetensors"), parts(*second)
    pooled = {"retriever.mean", "retriever.std"}
    assert {name for name in saved if not name.endswith(".step")} == truth.keys() | pooled
    for name, part in truth.items():
        assert torch.equal(restored[name], part), name
        dealt = (*saved[name].chunk(world), part[:0], part[:0])[rank]  # to the last, perhaps none
        assert torch.equal(dealt, part), name


@pytest.mark.parametrize("more", ["", "--lora_r 0"], ids=["lora", "full"])
def test_every_shard_is_saved_and_comes_back(tmp_path, more):
    together(3, shards, tmp_path / "saved", arguments(tmp_path, "run", more))


@pytest.mark.parametrize("processes", [0, 2])
def test_a_run_stopped_by_a_signal_saves_and_goes_on_bitwise(tmp_path, processes):
    more = "--max_steps 60 --gradient_accumulation_steps 1 --save_steps 1000 --resume"
    more += " --num_workers 1"
    together(processes or 1, run, arguments(tmp_path, "whole", more))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [sys.executable, *(launch if processes else []), ROOT / "train.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "env": env}
    words += arguments(tmp_path, "cut", more)
    with subprocess.Popen(words, **pipes, start_new_session=True) as process:
        next(line for line in process.stdout if line.strip().startswith("3/60"))
        # Ctrl-C goes to all, workers included
        process.send_signal(signal.SIGTERM) if processes else os.killpg(process.pid, signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == (1 if processes else train.STOPPED)  # 1: torchrun's own
    assert processes or "stopped by a signal after update" in rest
    before = metrics(tmp_path / "cut")
    assert not (tmp_path / "cut/retriever").exists() and 3 <= len(before) < 60
    together(processes or 1, run, arguments(tmp_path, "cut", more))
    same(tmp_path / "whole", tmp_path / "cut")
    assert metrics(tmp_path / "cut")[: len(before)] == before  # times, too


@pytest.mark.parametrize("lora", ["", "--lora_r 0"], ids=["lora", "full"])
def test_what_standardises_stays_with_the_retriever(tmp_path, lora):
    world, adapter = tmp_path / "world", tmp_path / "run/retriever"
    train.write_toy_world(world, 0, n_groups=1, n_test=40)
    train.main(arguments(tmp_path, "run", lora, "--pooling mean", f"--eval_data {world}"))

    def evaluated(out):
        start = f"--model {tmp_path}/base --adapter {adapter}" if not lora else f"--model {adapter}"
        files = f"--data {world} --out {tmp_path}/{out}.json --device cpu"
        eval.main([*start.split(), *files.split()])
        return json.loads((tmp_path / f"{out}.json").read_text())["results"][0]["ndcg@10"]

    before, after = (row["ndcg@10"] for row in metrics(tmp_path / "run") if "ndcg@10" in row)
    assert evaluated("mean") == pytest.approx(after, abs=1e-6) and after != before

    lines = (tmp_path / "groups.jsonl").read_text().splitlines()
    (tmp_path / "others").write_text("".join(line + "\n" for line in lines[:3]))
    start = f"--model {adapter} --lm {tmp_path}/base" if lora else f"--retriever_adapter {adapter}"

    def started(out, *more):
        more = lora, start, f"--data {tmp_path}/others --max_steps 1 --learning_rate 0", *more
        train.main(arguments(tmp_path, out, *more))
        return weights(tmp_path / out)

    (file,) = adapter.glob("pooling*")
    truth, kept = load_file(file), started("kept", "--pooling mean")
    assert all(torch.equal(kept[f"retriever {name}"], t) for name, t in truth.items())
    with pytest.raises(ValueError, match="pooling.safetensors: .* by --pooling mean, not eos"):
        started("refused")
    file.unlink()
    anew = started("anew", "--pooling mean")
    assert not any(torch.equal(anew[f"retriever {name}"], t) for name, t in truth.items())
    started("eos")
    assert not (tmp_path / "eos/retriever/pooling.safetensors").exists()
    assert evaluated("eos") != after


def test_a_retriever_is_never_saved_without_what_standardises_it(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_adapter", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments(tmp_path, "run", "--pooling mean --max_steps 1 --warmup_steps 0"))
    assert (tmp_path / "run/retriever/pooling.safetensors").exists()


def test_held_out_groups_are_not_trained_on_but_diagnosed(tmp_path, capsys):
    method = MEAN.replace("groups 2", "groups 3"), "--eval_every 2"
    train.main(arguments(tmp_path, "out", *method))
    lines = (tmp_path / "groups.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fewer").write_text("".join(lines[:9]))
    train.main(arguments(tmp_path, "less", *method, f"--data {tmp_path}/fewer --heldout_groups 0"))
    same(tmp_path / "out", tmp_path / "less", logs=False)  # what standardises, too
    rows = [row for row in metrics(tmp_path / "out") if "heldout_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 5] and len(metrics(tmp_path / "less")) == 5

    lm, base = Llama.from_pretrained(tmp_path / "base"), tmp_path / "base"
    load_adapter(lm, tmp_path / "out/lm")
    retriever = Retriever.from_pretrained(base, tmp_path / "out/retriever")
    revela = Revela(retriever, lm, 0.05, scale=0.25, convex=True, start=0.5).eval()
    tokenizer, total = retriever.tokenizer, {"retriever": 0, "uniform": 0, "alone": 0}
    groups = [[(json.loads(line)[:3], None)] for line in lines]
    batches = [collate(group, tokenizer, tokenizer, 157, True) for group in groups]
    first = Retriever(Llama.from_pretrained(base, head=False), tokenizer, "mean")
    first.standardise(batches[:9])  # before the first update, on what is trained on
    torch.testing.assert_close((retriever.mean, retriever.std), (first.mean, first.std))
    for i, batch in enumerate(batches[9:]):
        losses, w = revela.diagnose(batch)
        total = {name: total[name] + loss.item() / 3 for name, loss in losses.items()}
        if i == 0:
            assert rows[-1]["weights"] == [pytest.approx(w_i, abs=1e-4) for w_i in w[0].tolist()]
    assert rows[-1]["heldout_loss"] == pytest.approx(total, rel=1e-5)
    assert rows[0]["weights"] != rows[-1]["weights"]
    train.main(arguments(tmp_path, "half", *method, "--heldout_groups 99 --max_steps 1"))
    assert "epochs of 6 groups" in capsys.readouterr().out


def test_evaluation_does_not_change_training(tmp_path):
    train.write_toy_world(tmp_path / "world", 0, n_groups=1, n_test=20)
    train.main(arguments(tmp_path, "without"))
    train.main(arguments(tmp_path, "with", f"--eval_data {tmp_path}/world --eval_every 2"))
    same(tmp_path / "without", tmp_path / "with", logs=False)
    evaluations = [row for row in metrics(tmp_path / "with") if "ndcg@10" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4, 5]


ALONE = ["--freeze_lm", "--freeze_lm --lora_r 0", "--objective replug", "--objective contrastive"]


@pytest.mark.parametrize("more", ALONE)
def test_a_retriever_that_is_trained_alone_learns_and_resumes_only_as_itself(tmp_path, more):
    train.main(arguments(tmp_path, "whole", more))
    rows = metrics(tmp_path / "whole")
    assert {row["grad_norm_lm"] for row in rows} == {0.0} and not (tmp_path / "whole/lm").exists()
    assert {"loss", "max_weight", "weight_entropy", "spread", "tokens_per_s"} <= rows[0].keys()
    folder = tmp_path / "whole/checkpoints"
    early, late = (load_file(folder / f"step_00000{i}/state.safetensors") for i in (2, 5))
    moved = [(late[name] - t).abs().max() for name, t in early.items() if name.endswith("weight")]
    assert all(name.startswith("retriever.") for name in late) and max(moved) > 1e-3
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    interrupted(tmp_path / "cut", 2)
    other = "--resume --objective revela --no-freeze_lm"
    with pytest.raises(ValueError, match="(freeze_lm was True|objective was '.*') there, now "):
        train.main(arguments(tmp_path, "cut", more, other))
    train.main(arguments(tmp_path, "cut", more, "--resume"))
    same(tmp_path / "whole", tmp_path / "cut")


def test_two_models_with_two_tokenizers(tmp_path):
    sizes = {"hidden_size": 16, "head_dim": 4, "num_key_value_heads": 4}
    other = make_model(tmp_path / "other", seed=5, **sizes, tie_word_embeddings=False)
    train.main(arguments(tmp_path, "a", f"--lm {other} --max_steps 1"))
    edit(other, "tokenizer.json", normalizer={"type": "Prepend", "prepend": "me "})
    train.main(arguments(tmp_path, "b", f"--lm {other} --max_steps 1"))
    assert metrics(tmp_path / "a")[0]["loss"] != metrics(tmp_path / "b")[0]["loss"]
    adapters = weights(tmp_path / "a").items()
    widths = {(name[:2], t.shape[1]) for name, t in adapters if "q_proj.lora_A" in name}
    assert widths == {("re", 32), ("lm", 16)}


def test_training_starts_from_given_adapters(tmp_path):
    train.main(arguments(tmp_path, "a"))
    retriever, lm = (f"--{name}_adapter {tmp_path}/a/{name}" for name in ("retriever", "lm"))
    train.main(arguments(tmp_path, "b", retriever, lm, "--lora_r 9 --learning_rate 0"))
    train.main(arguments(tmp_path, "c", retriever, "--learning_rate 0"))  # the lm starts anew
    a, b, c = (weights(tmp_path / out) for out in "abc")
    assert all(torch.equal(w, b[name]) for name, w in a.items())
    assert all(torch.equal(w, c[n]) == n.startswith("retriever") for n, w in a.items())
    (tmp_path / "a/retriever").rename(tmp_path / "moved")
    moved = f"--retriever_adapter {tmp_path}/moved --learning_rate 0 --resume"
    train.main(arguments(tmp_path, "c", moved))
    with pytest.raises(ValueError, match="needs --lora_r; or merge it: eval.py --export"):
        train.main(arguments(tmp_path, "d", moved, "--lora_r 0"))


def test_a_resume_without_the_adapter_that_it_began_with_is_refused(tmp_path):
    train.main(arguments(tmp_path, "a", "--max_steps 1"))
    for name, more in (("retriever", "--lora_alpha 16"), ("lm", "--freeze_lm")):
        args = arguments(tmp_path, name, "--max_steps 1", more)
        train.main([*args, f"--{name}_adapter", f"{tmp_path}/a/{name}"])
        with pytest.raises(ValueError, match="LoRA was {.* there, now it is"):
            train.main([*args, "--resume"])


def sees_its_own_disk(folder):
    _, rank, _ = setup("cpu")
    if rank == 0:
        write(folder / "0/latest", "step_000002\n")
    with pytest.raises(ValueError, match="--out must be shared"):
        train.restore(folder / str(rank), None, None, {})


def test_a_resume_where_processes_see_different_checkpoints_is_refused(tmp_path):
    together(2, sees_its_own_disk, tmp_path)


def test_a_retriever_given_as_the_language_model_is_refused(tmp_path):
    args = arguments(tmp_path, "run", "--lm", f"{tmp_path}/retriever")
    save_model(Llama.from_pretrained(tmp_path / "base", head=False), tmp_path / "retriever")
    shutil.copy(tmp_path / "base/tokenizer.json", tmp_path / "retriever")
    with pytest.raises(ValueError, match=r"retriever is \['LlamaModel'\], and no language model"):
        train.main(args)
    train.main([*args, "--objective", "contrastive"])  # which does not use it


def test_a_resume_on_other_frozen_weights_is_refused(tmp_path):
    """SmolLM2 and SmolLM2-Instruct have one config."""
    bases = [make_model(tmp_path / f"base{seed}", seed) for seed in (0, 1)]
    train.main(arguments(tmp_path, "a", f"--model {bases[0]} --max_steps 1"))
    moved = bases[0].rename(tmp_path / "moved")
    train.main(arguments(tmp_path, "a", f"--model {moved} --max_steps 1 --resume"))
    with pytest.raises(ValueError, match="the retriever's frozen weights .* was"):
        train.main(arguments(tmp_path, "a", f"--model {bases[1]} --max_steps 1 --resume"))


def test_peak_memory_is_in_gigabytes():
    held = torch.ones(2**28)  # 1.07 GB
    assert held.nbytes / 1e9 < train.peak_memory(torch.device("cpu")) < 50


def test_bfloat16_keeps_trained_weights_in_float32_and_stays_near(tmp_path):
    for dtype in ("float32", "bfloat16"):
        train.main(arguments(tmp_path, dtype, f"--dtype {dtype} --lora_dropout 0"))
    wide, narrow = (metrics(tmp_path / dtype)[-1]["loss"] for dtype in ("float32", "bfloat16"))
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "bfloat16").values())
    assert narrow != wide and narrow == pytest.approx(wide, rel=0.02)


def test_one_checkpoint_for_both_models_is_in_memory_once(tmp_path):
    args = train.parse_args(arguments(tmp_path, "run"))
    retriever, lm = train.build_models(args, torch.bfloat16, torch.device("cpu"))
    for name, p in retriever.named_parameters():
        frozen = ".lora_" not in name
        assert p.dtype == (torch.bfloat16 if frozen else torch.float32), name
        assert (lm.get_parameter(name).data_ptr() == p.data_ptr()) == frozen, name


def test_the_toy_world_is_learned_and_only_through_in_batch_attention(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = "--max_steps 300 --train_group_size 8 --eval_every 0"
    stdout, _ = command("train.py", *more.split(), processes=1, cwd=tmp_path)
    before, after = (row["ndcg@10"] for row in metrics(Path("runs/toy")) if "ndcg@10" in row)
    assert before < 0.6 and after > 0.8
    assert f"step 0: nDCG@10 world {before:.4f}" in stdout and stdout.count("query: ") == 6
    paths = "--model runs/toy/retriever --data runs/toy/world --out results.json"
    eval.main([*paths.split(), "--device", "cpu"])
    result = json.loads(Path("results.json").read_text())["results"][0]
    assert result["ndcg@10"] == pytest.approx(after, abs=1e-12)
    Llama.from_pretrained("runs/toy/lm")  # the language model is saved whole, too

    train.main("--no_inbatch --max_steps 3 --out control --device cpu".split())
    values = [row["ndcg@10"] for row in metrics(Path("control")) if "ndcg@10" in row]
    assert values[-1] == values[0]  # the retriever gets no gradient at all
    assert "max_weight" not in metrics(Path("control"))[1]  # and nothing is read


# --------------------------------------------------------------------------------------------------
# recipes, limits, bad commands, run folders


# fmt: off
RECIPES = {
    "small": dict(
        dtype="bfloat16", first_half=True, passage_max_len=64, inbatch_scale=0.25, v_norm=False,
        attn_temperature=0.1, lora_r=32, lora_alpha=64, lora_dropout=0, learning_rate=6e-4,
        warmup_steps=10, gradient_accumulation_steps=1, max_steps=100, pooling="mean",
        inbatch_form="convex", inbatch_start=0.5, heldout_groups=8, save_steps=50),
    "published": dict(
        dtype="bfloat16", first_half=True, passage_max_len=157, inbatch_scale=1, v_norm=True,
        attn_temperature=1e-4, lora_r=256, lora_alpha=64, lora_dropout=0.1, learning_rate=1e-4,
        warmup_steps=100, gradient_accumulation_steps=0, max_steps=0, num_train_epochs=1,
        train_group_size=16, groups_per_device=1, pooling="eos", inbatch_form="sum",
        inbatch_start=0, heldout_groups=0),
    "toy": dict(
        dtype="float32", first_half=False, passage_max_len=157, inbatch_scale=1, v_norm=True,
        attn_temperature=0.05, lora_r=0, learning_rate=2e-3, warmup_steps=50, max_steps=500,
        groups_per_device=2, gradient_accumulation_steps=1, pooling="eos", inbatch_form="sum",
        inbatch_start=0),
}
# fmt: on


def test_recipes_have_their_values_and_any_flag_overrides_them():
    def parsed(*words):
        return vars(train.parse_args(" ".join(words).split())).items()

    def spelt(name, value):
        return f"--{'no-' if value is False else ''}{name} {'' if type(value) is bool else value}"

    given = "--model m --data d"
    assert parsed() >= (RECIPES["toy"] | {"recipe": "toy", "data": None}).items()
    assert parsed(given) >= (RECIPES["small"] | {"recipe": "small"}).items()
    assert parsed("--inbatch_scale 0") >= {"no_inbatch": True}.items()
    assert RECIPES.keys() == train.RECIPES.keys()
    for one, other in permutations(RECIPES, 2):
        assert parsed(given, "--recipe", one) >= RECIPES[one].items()
        flags = [spelt(name, value) for name, value in RECIPES[other].items()]
        assert parsed(given, "--recipe", one, *flags) >= RECIPES[other].items()


OFF = ["num_workers"]  # at -1
POSITIVE = """attn_temperature lm_temperature train_group_size passage_max_len lora_alpha
    num_train_epochs groups_per_device""".split()
NUMBERS = [name for name, (default, *_) in train.FLAGS.items() if type(default) in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_beyond_its_limits_is_refused_by_name_before_anything_is_loaded(name, capsys):
    values = {"-2": False, "nan": False, "inf": False, "-1": name in OFF, "0": name not in POSITIVE}
    if name in ("train_group_size", "passage_max_len", "lora_dropout", "inbatch_start"):
        values["1"] = False
    for value, taken in values.items():
        words = ["--model", "nowhere", "--data", "nowhere", f"--{name}", value]
        if taken:
            assert getattr(train.parse_args(words), name) == int(value)
            continue
        with pytest.raises((ValueError, SystemExit)) as error:
            train.main(words)
        said = str(error.value) + capsys.readouterr().err
        assert re.search(rf"--{name}\b.*{value}", said) and "nowhere" not in said, said


def test_bad_commands_are_one_sentence_and_leave_the_run_folder_usable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = arguments(tmp_path, "run")
    Path("short.jsonl").write_text('["only one"]\n')
    Path("groups.jsonl.gz").write_text("")
    shutil.copytree("base", "cut")
    Path("cut/model.safetensors").write_bytes(b"\x00" * 20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for more, message in {
        "--data none.jsonl": "none.jsonl does not exist",
        "--data short.jsonl": "short.jsonl:1: a group of 1 passages; need 3",
        "--data groups.jsonl.gz": "gunzip",
        "--model none": "config.json does not exist",
        "--model cut": "model.safetensors is damaged or incomplete",
        "--lora_target_modules q_proj,w": "LoRA target w is unknown",
        "--eval_data none": "none/corpus.jsonl",
        "--device cuda": "--device cuda is not there; here are: .*cpu",
        "--objective replug --strategy fsdp": "--objective .* with ddp",
        "--objective replug --inbatch_scale 0": "--objective .* without --no_inbatch",
        "--no_inbatch --freeze_lm": "leaves nothing to train",
        "--inbatch_form convex --inbatch_scale 2": "convex needs .* at most 1",
        "--out base --resume": "base is not empty: choose another --out",  # base is as it was
    }.items():
        with pytest.raises((ValueError, OSError), match=message):
            train.main([*args, *more.split()])
    train.main(args)
    for alone in ("--data x", "--model x", "--eval_data x", "--lm x"):
        with pytest.raises(ValueError, match="--data .* and --model belong together; --eval_d"):
            train.main([*alone.split(), "--out", "toy"])
    monkeypatch.setattr(train, "write_toy_world", partial(train.write_toy_world, n_groups=9))
    toy = "--device cpu --out toy --max_steps 1".split()
    with pytest.raises(ValueError, match="LoRA target w is unknown"):
        train.main([*toy, "--lora_r", "1", "--lora_target_modules", "w"])
    train.main([*toy, "--resume"])  # the world is there
    with pytest.raises(SystemExit):
        train.main(["--temprature", "1"])
    assert command("train.py", "--model", "x", code=1)[1].startswith("train.py: --data")


def test_a_run_is_never_overwritten_and_resumes_only_as_itself(tmp_path):
    args = arguments(tmp_path, "run", "--max_steps 2")
    train.main(args)
    config = (tmp_path / "run/config.json").read_bytes()
    assert json.loads(config).items() >= {"learning_rate": 1e-2, "max_steps": 2, "seed": 0}.items()
    with pytest.raises(ValueError, match="run is not empty: .* --resume"):
        train.main(args)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/config.json.partial").write_text("{")  # at its start
    train.check_out(tmp_path / "killed", resume=True)
    (tmp_path / "killed/.notes").touch()
    with pytest.raises(ValueError, match="killed is not empty"):
        train.check_out(tmp_path / "killed", resume=True)
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    edit(tmp_path / "other", rope_theta=7.0)
    shutil.copytree(tmp_path / "base", tmp_path / "words")
    with open(tmp_path / "words/tokenizer.json", "a") as file:
        file.write("\n")
    write_groups(tmp_path / "longer", 13)
    raw = (tmp_path / "groups.jsonl").read_text()
    (tmp_path / "changed").write_text(raw.replace("milk", "wine", 1))
    for more, message in {
        "--max_steps 5": "max_steps was 2 there, now it is 5",
        "--learning_rate 0.5": "learning_rate was 0.01 there, now it is 0.5",
        "--no-v_norm": "v_norm was True there, now it is False",
        f"--data {tmp_path}/longer": "groups was 12 there, now it is 13",
        f"--data {tmp_path}/changed": "checksum of --data was",
        f"--model {tmp_path}/other": "retriever.* rope_theta was 10000.0 there, now it is 7.0",
        f"--lm {tmp_path}/other": "lm.* rope_theta was 10000.0",
        f"--model {tmp_path}/words": r"the retriever's tokenizer.json \(checksum\) was",
        f"--lm {tmp_path}/words": r"the lm's tokenizer.json \(checksum\) was",
    }.items():
        with pytest.raises(ValueError, match=message):
            train.main([*args, "--resume", *more.split()])
    (tmp_path / "run/checkpoints/latest").write_text("../../elsewhere\n")
    with pytest.raises(FileNotFoundError, match="run/checkpoints/elsewhere/meta.json does not"):
        train.main([*args, "--resume"])
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(ValueError, match="run is a finished run, and has no checkpoint"):
        train.main([*args, "--resume"])
    assert (tmp_path / "run/config.json").read_bytes() == config


@pytest.mark.filterwarnings("ignore")  # those of the compiler itself
def test_compiled_blocks_compute_the_same(tmp_path, monkeypatch):
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward  # a backend that needs no C++ compiler

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    how = "--lora_dropout 0 --gradient_accumulation_steps 1 --max_steps 2"
    train.main(arguments(tmp_path, "plain", how))
    again = "--activation_checkpointing full"
    counts = {}
    for name, more in (("kept", ""), ("again", again), ("parts", "")):
        if name == "parts":  # in every other update a part for each passage
            sizes = cycle([2**24, 1])

            def plan(*args):
                return in_batch_plan(*args, max_scores=next(sizes))

            monkeypatch.setattr("revela.in_batch_plan", plan)
        torch._dynamo.reset()
        graphs.clear()
        train.main(arguments(tmp_path, name, how, "--compile", more))
        counts[name] = len(graphs)
        same(tmp_path / "plain", tmp_path / name, 1e-5, logs=False)
    assert min(counts.values()) > 3 and counts["kept"] == counts["parts"]
