"""train.py: the schedule, accumulation and processes, resuming, the files of a run, the toy world, and bad commands."""

import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXTS, command, make_model
from safetensors.torch import load_file, save_file

import eval
import train
from model import Llama
from revela import Retriever


def write_groups(file, n=12, size=4):
    rows = [[f"{TEXTS[(i + j) % 18]} {'so ' * (3 * i % 7)}{i}" for j in range(size)] for i in range(n)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arguments(tmp_path, out, *more):
    """A small real run: 5 updates of 4 groups of 3 passages, the last of them in a second epoch."""
    if not (tmp_path / "base").exists():
        make_model(tmp_path / "base", initializer_range=0.1)
        write_groups(tmp_path / "groups.jsonl")
    args = ["--model", tmp_path / "base", "--data", tmp_path / "groups.jsonl", "--out", tmp_path / out, "--train_group_size", 3,
            "--gradient_accumulation_steps", 4, "--max_steps", 5, "--warmup_steps", 2, "--learning_rate", 1e-2,
            "--attn_temperature", 0.05, "--logging_steps", 1, "--save_steps", 2, "--device", "cpu",
            "--lora_r", 4, "--lora_alpha", 8, "--lora_dropout", 0.0, *more]  # fmt: skip
    return [str(a) for a in args]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder, lora=True):
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    return {f"{name} {k}": t for name in ("retriever", "lm") for k, t in load_file(folder / name / file).items()}


TIMING = {"tokens_per_s", "memory_gb", "eta_s"}

# ----------------------------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_its_closed_form():
    args = train.parse_args(["--model", "m", "--data", "d", "--learning_rate", "8", "--warmup_steps", "4"])
    rates = [train.learning_rate(step, args, 12) for step in range(12)]
    assert rates == [2, 4, 6, 8, 8, 7, 6, 5, 4, 3, 2, 1]
    args.warmup_steps = 0
    assert [train.learning_rate(step, args, 2) for step in range(2)] == [8, 4]


@pytest.mark.parametrize("lora", [True, False])
def test_accumulation_and_processes_do_not_change_the_update(tmp_path, lora):
    more = ("--learning_rate", 2e-4) if lora else ("--learning_rate", 3e-5, "--lora_r", 0, "--dual_loss")
    for name, processes, accumulation, groups, strategy in (("1x4", 0, 4, 1, "ddp"), ("1x2x2", 0, 2, 2, "fsdp"), ("2x2", 2, 2, 1, "ddp"),
                                                            ("4x1", 4, 1, 1, "ddp"), ("2x2f", 2, 2, 1, "fsdp"), ("4x1f", 4, 1, 1, "fsdp")):  # fmt: skip
        args = arguments(tmp_path, name, *more, "--gradient_accumulation_steps", accumulation, "--groups_per_device", groups, "--strategy", strategy)
        command("train.py", *args, processes=processes)
        for one, other in zip(metrics(tmp_path / "1x4"), metrics(tmp_path / name), strict=True):
            for key in [key for key in one if "loss" in key or "norm" in key]:
                assert one[key] == pytest.approx(other[key], rel=1e-5), (name, key)
        for key, w in weights(tmp_path / "1x4", lora).items():
            torch.testing.assert_close(w, weights(tmp_path / name, lora)[key], rtol=1e-6, atol=1e-6)
    if not lora:
        start = load_file(tmp_path / "base/model.safetensors")["model.layers.1.mlp.up_proj.weight"]
        moved = weights(tmp_path / "1x4", lora)["lm model.layers.1.mlp.up_proj.weight"] - start
        assert moved.abs().median() > 2e-5  # twenty times what may differ


def interrupted(folder, step):
    """Make the run in `folder` look as if it had been killed after checkpoint `step`."""
    for name in ("retriever", "lm"):
        shutil.rmtree(folder / name)
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        if int(checkpoint.name.split("_")[1]) > step:
            shutil.rmtree(checkpoint)
    (folder / "checkpoints/latest").write_text(f"step_{step:06d}\n")


@pytest.mark.parametrize("more", [["--lora_dropout", 0.3], ["--lora_r", 0]], ids=["lora with dropout", "full"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, more):
    lora = "--lora_r" not in more
    train.main(arguments(tmp_path, "a", *more))
    truth, lines = weights(tmp_path / "a", lora), metrics(tmp_path / "a")
    interrupted(tmp_path / "a", 2)
    with open(tmp_path / "a/metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # what a process killed while it wrote leaves behind
    train.main(arguments(tmp_path, "a", *more, "--resume", "latest"))
    again = weights(tmp_path / "a", lora)
    assert all(torch.equal(truth[key], again[key]) for key in truth.keys() | again.keys())
    strip = lambda rows: [{k: v for k, v in row.items() if k not in TIMING} for row in rows]
    assert strip(lines) == strip(metrics(tmp_path / "a"))
    train.main(arguments(tmp_path, "a", *more, "--resume", "latest"))  # finished: nothing left to do, nothing lost
    assert strip(lines) == strip(metrics(tmp_path / "a"))


def test_a_checkpoint_goes_on_under_another_strategy_and_number_of_processes(tmp_path):
    args = lambda out, accumulation, *more: arguments(tmp_path, out, "--gradient_accumulation_steps", accumulation, "--learning_rate", 2e-4, *more)
    train.main(args("whole", 4))
    command("train.py", *args("moved", 2, "--strategy", "fsdp", "--activation_checkpointing", "full"), processes=2)
    for step, accumulation, processes, strategy in ((2, 1, 4, "ddp"), (4, 2, 2, "fsdp"), (4, 4, 0, "ddp")):
        interrupted(tmp_path / "moved", step)
        command("train.py", *args("moved", accumulation, "--strategy", strategy, "--resume", "latest"), processes=processes)
        for key, w in weights(tmp_path / "whole").items():
            torch.testing.assert_close(w, weights(tmp_path / "moved")[key], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="over 4 groups there, now it would be over 3: choose processes x"):
        train.main(args("moved", 3, "--resume", "latest"))


SHARDS = """
import sys
import torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.tensor import distribute_tensor
import train
from eval import leave, setup

folder = Path(sys.argv[1])
device, rank, world = setup("cpu")
def fresh(start=None):
    args = train.parse_args(sys.argv[2:])
    retriever, lm = train.build_models(args, torch.float32, device, start)
    revela = train.shard(train.Revela(retriever, lm), device, torch.float32)
    trained = [p for p in revela.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return args, revela, optimizer

args, revela, optimizer = fresh()
for name, p in revela.named_parameters():
    if p.requires_grad:
        for t, factor in ((p, 1.0), (optimizer.state[p]["exp_avg"], 2.0), (optimizer.state[p]["exp_avg_sq"], 3.0)):
            part = t.to_local()
            with torch.no_grad():
                part.copy_(factor * (100 * rank + torch.arange(part.numel()).view(part.shape)))
train.save_checkpoint(folder, 7, revela, optimizer, args, 1, rank)
dist.barrier()
_, again, moments = fresh(folder / "step_000007")
train.restore(folder / "step_000007", again, moments)
for (name, p), q in zip(revela.named_parameters(), again.parameters()):
    assert torch.equal(p.to_local(), q.to_local()), name
    if p.requires_grad:
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][key].to_local(), moments.state[q][key].to_local()), (name, key)
dist.barrier()
leave()
"""


@pytest.mark.parametrize("more", [[], ["--lora_r", "0"]], ids=["lora", "full"])
def test_every_shard_is_saved_and_comes_back(tmp_path, more):
    """Each process fills its part of each tensor with numbers of its own. Rows are dealt out as torch.chunk does."""
    args = arguments(tmp_path, "run", *more)
    (tmp_path / "shards.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})" + SHARDS)
    command(tmp_path / "shards.py", tmp_path / "saved", *args, processes=3)
    folder = tmp_path / "saved/step_000007"
    moments = {key: t for key, t in load_file(folder / "optimizer.safetensors").items() if "exp_avg" in key}
    for key, t in (weights(folder, lora=not more) | moments).items():
        factor = 2 if key.endswith("exp_avg") else 3 if key.endswith("exp_avg_sq") else 1
        parts = torch.zeros_like(t).chunk(3)
        truth = torch.cat([100 * rank + torch.arange(part.numel()).view(part.shape) for rank, part in enumerate(parts)])
        assert torch.equal(t, factor * truth.float()), key


@pytest.mark.parametrize("processes", [0, 2])
def test_a_run_stopped_by_a_signal_saves_and_goes_on_bitwise(tmp_path, processes):
    args = lambda out: arguments(tmp_path, out, "--max_steps", 60, "--gradient_accumulation_steps", 2, "--lora_dropout", 0.3, "--save_steps", 1000)
    command("train.py", *args("whole"), processes=processes)
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    command_line, env = [sys.executable, *start, str(ROOT / "train.py"), *args("cut")], {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command_line, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        next(line for line in run.stdout if line.strip().startswith("3/60"))
        run.send_signal(signal.SIGTERM)
        rest = run.stdout.read()
    assert run.returncode == (1 if processes else train.STOPPED)  # 1: torchrun's own
    assert processes or "stopped by a signal after update" in rest
    at = json.loads((tmp_path / "cut/checkpoints" / (tmp_path / "cut/checkpoints/latest").read_text().strip() / "meta.json").read_text())["step"]
    assert 3 <= at < 60 and not (tmp_path / "cut/retriever").exists()
    command("train.py", *args("cut"), "--resume", "latest", processes=processes)
    assert all(torch.equal(w, weights(tmp_path / "cut")[name]) for name, w in weights(tmp_path / "whole").items())


def test_what_is_not_finite_stops_before_the_update(tmp_path):
    args = arguments(tmp_path, "run", "--max_steps", 5, "--save_steps", 1, "--learning_rate", 1e-3)
    train.main(args)
    interrupted(tmp_path / "run", 3)
    adapter = tmp_path / "run/checkpoints/step_000003/lm/adapter_model.safetensors"
    tensors = load_file(adapter)
    tensors[next(name for name in tensors if "lora_B" in name)][0, 0] = float("nan")
    save_file(tensors, adapter)
    _, stderr = command("train.py", *args, "--resume", "latest", code=1)
    assert "update 4, process 0: not finite" in stderr and "Its groups" in stderr and "--learning_rate" in stderr
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step_000001", "step_000002", "step_000003"]


def test_evaluation_does_not_change_training(tmp_path):
    train.write_toy_world(tmp_path / "world", 0, n_groups=1)
    train.main(arguments(tmp_path, "without", "--lora_dropout", 0.3))
    train.main(arguments(tmp_path, "with", "--lora_dropout", 0.3, "--eval_data", tmp_path / "world", "--eval_every", 2))
    for key, w in weights(tmp_path / "without").items():
        assert torch.equal(w, weights(tmp_path / "with")[key])
    evaluations = [m for m in metrics(tmp_path / "with") if "ndcg@10" in m]
    assert [m["step"] for m in evaluations] == [0, 2, 4, 5]
    again = Retriever.from_pretrained(tmp_path / "base", tmp_path / "with/retriever")
    run = eval.dense_run(again, *eval.read_beir(tmp_path / "world")[:2])
    assert eval.measure(run, eval.read_beir(tmp_path / "world")[2])["ndcg@10"] == evaluations[-1]["ndcg@10"]


def test_two_models_with_two_tokenizers(tmp_path):
    other = make_model(tmp_path / "other", seed=5, hidden_size=16, head_dim=4, num_key_value_heads=4, tie_word_embeddings=False)
    args = arguments(tmp_path, "run", "--lm", other)
    train.main(args)
    assert {t.shape[1] for k, t in weights(tmp_path / "run").items() if "q_proj.lora_A" in k} == {32, 16}


@pytest.mark.parametrize("more", [[], ["--lora_r", 0]], ids=["lora", "full"])
def test_a_frozen_lm_is_not_touched_and_the_retriever_learns(tmp_path, more):
    train.main(arguments(tmp_path, "run", "--freeze_lm", *more, "--save_steps", 3))
    assert not (tmp_path / "run/lm").exists() and {m["grad_norm_lm"] for m in metrics(tmp_path / "run")} == {0.0}
    file = tmp_path / "run/retriever" / ("model.safetensors" if more else "adapter_model.safetensors")
    truth = load_file(file)
    assert more or any(t.abs().max() > 1e-3 for name, t in truth.items() if "lora_B" in name)
    shutil.rmtree(tmp_path / "run/checkpoints/step_000005")
    (tmp_path / "run/checkpoints/latest").write_text("step_000003\n")
    train.main(arguments(tmp_path, "run", "--freeze_lm", *more, "--save_steps", 3, "--resume", "latest"))
    assert all(torch.equal(truth[name], t) for name, t in load_file(file).items())


@pytest.mark.parametrize("objective", ["replug", "contrastive"])
def test_a_baseline_trains_the_retriever_alone_and_resumes_only_as_itself(tmp_path, objective):
    args = arguments(tmp_path, "run", "--objective", objective, "--lora_dropout", 0.3, "--save_steps", 3)
    train.main(args)
    assert not (tmp_path / "run/lm").exists()
    lines, truth = metrics(tmp_path / "run"), load_file(tmp_path / "run/retriever/adapter_model.safetensors")
    assert {"loss", "max_weight", "weight_entropy", "spread", "tokens_per_s"} <= lines[0].keys() and {m["grad_norm_lm"] for m in lines} == {0.0}
    assert any(t.abs().max() > 1e-3 for n, t in truth.items() if "lora_B" in n)
    (tmp_path / "run/checkpoints/latest").write_text("step_000003\n")
    with pytest.raises(ValueError, match=f"--objective was {objective} there, now it is revela"):
        train.main([*args, "--objective", "revela", "--resume", "latest"])
    train.main([*args, "--resume", "latest"])
    assert all(torch.equal(truth[n], t) for n, t in load_file(tmp_path / "run/retriever/adapter_model.safetensors").items())


def test_training_starts_from_given_adapters(tmp_path):
    train.main(arguments(tmp_path, "a"))
    more = ["--retriever_adapter", tmp_path / "a/retriever", "--lm_adapter", tmp_path / "a/lm", "--lora_r", 9]
    train.main(arguments(tmp_path, "b", *more, "--learning_rate", 0))
    for name, w in weights(tmp_path / "a").items():
        assert torch.equal(w, weights(tmp_path / "b")[name])
    train.main(arguments(tmp_path, "c", *more[:2]))
    lm = lambda run: weights(tmp_path / run)["lm base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    assert not torch.equal(lm("c"), lm("a"))  # the lm started anew
    with pytest.raises(ValueError, match="must be merged first"):
        train.main(arguments(tmp_path, "d", *more[:4], "--lora_r", 0))


def test_gzipped_groups_train_as_plain_ones(tmp_path):
    train.main(arguments(tmp_path, "plain"))
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "groups.jsonl").read_bytes()))
    command("train.py", *arguments(tmp_path, "packed", "--data", packed), processes=2, code=0)
    train.main(arguments(tmp_path, "again", "--data", packed, "--num_workers", 2))
    assert all(torch.equal(w, weights(tmp_path / "again")[name]) for name, w in weights(tmp_path / "plain").items())
    packed.write_bytes(packed.read_bytes()[:-20])
    os.utime(packed, (2e9, 2e9))  # newer than what was unpacked
    with pytest.raises(ValueError, match="packed.jsonl.gz cannot be unpacked"):
        train.main(arguments(tmp_path, "cut", "--data", packed))
    assert not list(tmp_path.glob("*.partial"))


def test_bfloat16_keeps_trained_weights_in_float32_and_stays_near(tmp_path):
    train.main(arguments(tmp_path, "wide"))
    train.main(arguments(tmp_path, "narrow", "--dtype", "bfloat16"))
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "narrow").values())
    assert metrics(tmp_path / "narrow")[-1]["loss"] == pytest.approx(metrics(tmp_path / "wide")[-1]["loss"], rel=0.02)


def test_one_checkpoint_for_both_models_is_in_memory_once(tmp_path):
    args = train.parse_args(arguments(tmp_path, "run"))
    retriever, lm = train.build_models(args, torch.float32, torch.device("cpu"), None)
    for name, p in retriever.llama.named_parameters():
        other = lm.get_parameter(name)
        assert (p.data_ptr() == other.data_ptr()) == (".lora_" not in name), name


# ----------------------------------------------------------------------------------------------------------------------
# the toy world


def test_the_toy_world_is_learned_and_only_through_in_batch_attention(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stdout, _ = command("train.py", "--max_steps", 300, "--warmup_steps", 50, "--eval_every", 0, processes=1, cwd=tmp_path)
    before, after = (m["ndcg@10"] for m in metrics(Path("runs/toy")) if "ndcg@10" in m)
    assert before < 0.6 and after > 0.8
    assert f"step 0: nDCG@10 world {before:.4f}" in stdout and stdout.count("query: ") == 6
    results = Path("results.json")
    eval.main(["--model", "runs/toy/retriever", "--data", "runs/toy/world", "--device", "cpu", "--out", str(results)])
    assert json.loads(results.read_text())["results"][0]["ndcg@10"] == pytest.approx(after, abs=1e-12)
    Llama.from_pretrained("runs/toy/lm")  # the language model is saved whole, too

    train.main(["--no_inbatch", "--max_steps", "3", "--out", "control", "--device", "cpu"])
    values = [m["ndcg@10"] for m in metrics(Path("control")) if "ndcg@10" in m]
    assert values[-1] == values[0]  # the retriever gets no gradient at all


# ----------------------------------------------------------------------------------------------------------------------
# the published command


def test_the_published_command_has_a_translation_that_parses(monkeypatch):
    readme = (Path(train.__file__).parent / "README.md").read_text()
    block = next(b for b in re.findall(r"```\n(.*?)```", readme, re.S) if "--attn_temperature 1e-4" in b)
    words = shlex.split(block.replace("\\\n", " "))
    args = train.parse_args(words[words.index("train.py") + 1 :])
    published = dict(lora_r=256, attn_temperature=1e-4, inbatch_scale=1.0, no_v_norm=False, first_half=True, train_group_size=16,
                     learning_rate=1e-4, passage_max_len=157, warmup_steps=100, dtype="bfloat16", lora_dropout=0.1, lora_alpha=64)  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published
    rows = dict(re.findall(r"^\| `(--\w+)`.*? \| (.*?) \|", readme, re.M))
    theirs = """lora_r lora_target_modules bm25_retrieval_file add_passage_prefix add_query_prefix first_half pooling append_eos_token
        normalize temperature attn_temperature per_device_train_batch_size train_group_size learning_rate passage_max_len
        gradient_accumulation_steps warmup_steps resume top_k save_steps deepspeed"""
    assert {f"--{name}" for name in theirs.split()} <= rows.keys()
    for flag in re.findall(r"`(--\w+)", " ".join(rows.values())):
        assert hasattr(args, flag.removeprefix("--")), flag


# ----------------------------------------------------------------------------------------------------------------------
# bad commands


def test_bad_commands_are_one_clear_sentence(tmp_path):
    args = arguments(tmp_path, "run")
    (tmp_path / "short.jsonl").write_text('["only one"]\n')
    shutil.copytree(tmp_path / "base", tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_bytes(b"\x00" * 20)
    for more, message in [
        (["--resume", "latest"], "nothing to resume"),
        (["--data", tmp_path / "none.jsonl"], "none.jsonl"),
        (["--data", tmp_path / "short.jsonl"], "short.jsonl:1: a group of 1 passages; need 3"),
        (["--model", tmp_path / "none"], "config.json does not exist"),
        (["--model", tmp_path / "cut"], "model.safetensors is damaged or incomplete"),
        (["--lora_target_modules", "q_proj,w"], "LoRA target w is unknown"),
        (["--eval_data", tmp_path / "none"], "none/corpus.jsonl"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            train.main(args + [str(m) for m in more])
        assert not (tmp_path / "run/metrics.jsonl").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    for more in (["--learning", "1"], ["--temprature", "1"]):
        _, stderr = command("train.py", *args, *more, code=1)
        assert "unrecognized arguments" in stderr and "Traceback" not in stderr
    assert command("train.py", "--model", "x", code=1)[1] == "train.py: --model needs --data: a file of groups, which data.py makes from documents\n"
    assert "--data needs --model" in command("train.py", "--data", "x", code=1)[1]


def test_under_max_restarts_a_run_goes_on_by_itself_but_no_other_run_is_touched(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    train.main(arguments(tmp_path, "run"))
    truth, before = weights(tmp_path / "run"), (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="run is not empty"):
        train.main(arguments(tmp_path, "run", "--seed", 1))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    for _ in range(2):  # the second time, config.json is that of a resumed run
        interrupted(tmp_path / "run", 2)
        train.main(arguments(tmp_path, "run"))
        assert all(torch.equal(w, weights(tmp_path / "run")[name]) for name, w in truth.items())
    assert [m["step"] for m in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_out_of_memory_says_which_flags_help(tmp_path, monkeypatch):
    def update(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "update", update)
    with pytest.raises(ValueError, match="out of memory in update 1 .CUDA out of memory.*2.00 GiB") as error:
        train.main(arguments(tmp_path, "run"))
    flags = set(re.findall(r"--(\w+)", str(error.value)))
    assert len(flags) > 6 and all(hasattr(train.parse_args(arguments(tmp_path, "run")), flag) for flag in flags)


def test_a_run_is_never_overwritten_and_resumes_only_as_itself(tmp_path):
    train.main(arguments(tmp_path, "run", "--max_steps", 2))
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["learning_rate"] == 1e-2 and config["max_steps"] == 2 and config["seed"] == 0
    with pytest.raises(ValueError, match="run is not empty"):
        train.main(arguments(tmp_path, "run"))
    with pytest.raises(ValueError, match="--max_steps was 2 there, now it is 5"):
        train.main(arguments(tmp_path, "run", "--resume", "latest"))
    with pytest.raises(ValueError, match="--learning_rate was 0.01 there, now it is 0.5"):
        train.main(arguments(tmp_path, "run", "--max_steps", 2, "--learning_rate", 0.5, "--resume", "latest"))
    with pytest.raises(FileNotFoundError, match="step_1/meta.json does not exist"):
        train.main(arguments(tmp_path, "run", "--max_steps", 2, "--resume", "step_1"))
    (tmp_path / "run/checkpoints/latest").write_text("../../elsewhere\n")
    for name in ("latest", "../elsewhere"):
        with pytest.raises(ValueError, match="elsewhere' is no checkpoint; need 'latest' or a folder of"):
            train.main(arguments(tmp_path, "run", "--max_steps", 2, "--resume", name))
