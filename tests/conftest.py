"""What the tests share: tiny random models, and a way to run our commands. Warnings are errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # here and in every process: sums in one order

import pytest  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from model import Llama, LlamaConfig, add_lora, save_adapter, save_model  # noqa: E402
from revela import Retriever, save_pooling  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")


SUBJECTS, OBJECTS = ("the cat", "a dog", "my bird"), ("milk", "the sun", "me")
TEXTS = [f"{a} {b} {c}." for a in SUBJECTS for b in ("sees", "likes") for c in OBJECTS]


def make_model(folder, seed=0, **changes):
    """Write a tiny Llama (GQA, tied head unless changed) with a byte-level tokenizer."""
    config = dict(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(seed)
    llama = Llama(LlamaConfig(**config | changes)).init_weights()
    for p in llama.parameters():
        if p.dim() == 1:  # norms and biases: not the ones and zeros they start as
            torch.nn.init.normal_(p, mean=p.mean().item(), std=0.2)
    save_model(llama, folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eos>"}}')
    return folder


def edit(folder, name="config.json", **changes):
    """Change fields of a JSON file; `...` takes one out."""
    config = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def with_lora(llama, r=3, dropout=0.0):
    """`llama` with LoRA matrices that do something."""
    add_lora(llama, r=r, alpha=6, dropout=dropout)
    for name, p in llama.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return llama


def save_retriever(base, folder, pooling="eos"):
    """Write an adapter that does something; with mean pooling, standardised by something."""
    retriever = Retriever(with_lora(Llama.from_pretrained(base, head=False)), pooling=pooling)
    save_adapter(retriever.llama, folder)
    if pooling == "mean":
        torch.nn.init.normal_(retriever.mean)
        torch.nn.init.uniform_(retriever.std, 0.5, 2)
    save_pooling(retriever, folder)


@pytest.fixture
def tiny(tmp_path):
    return make_model(tmp_path / "tiny")


def command(*args, processes=0, code=0, cwd=None, stdin=None):
    """Run `python args...`, or torchrun; check the exit code, return stdout and stderr."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    args = [*start, str(ROOT / args[0]), *map(str, args[1:])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        args, capture_output=True, text=True, cwd=cwd, env=env, timeout=600, input=stdin
    )
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done.stdout, done.stderr
