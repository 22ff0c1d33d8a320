"""Files from strangers, and damaged files: a reader gives a right answer or one sentence."""

import copy
import gzip
import json
import os
import random
import re
import sys
import warnings

import pytest
import torch
from conftest import TEXTS, edit, save_retriever
from safetensors.torch import load_file, save_file

import data
from data import Groups, blame, read_beir, read_lines
from eval import read_passages
from model import Llama, LlamaConfig, load_adapter, merge_lora, save_adapter, save_model
from revela import Retriever, Tokenizer, collate, load_pooling


def refused(folder, call):
    """The sentence with which `call` refuses a file of `folder`: one short, printable line."""
    with warnings.catch_warnings(record=True) as warned:
        with pytest.raises((ValueError, OSError)) as caught:
            call()
    text = str(caught.value)
    assert text.isprintable() and len(text) < 700 and str(folder) in text and not warned, text
    return text


@pytest.fixture
def full(tiny):
    """A model's folder with an adapter, and with what standardises its vectors, in a/."""
    save_retriever(tiny, tiny / "a", "mean")
    return tiny


def read_all(folder):
    llama = Llama.from_pretrained(folder)
    load_adapter(llama, folder / "a")
    load_pooling(Retriever(llama, pooling="mean"), folder / "a")
    return llama, Tokenizer(folder)


# --------------------------------------------------------------------------------------------------
# what a checkpoint and an adapter may say

SIZES = [name for name, kind in LlamaConfig.__annotations__.items() if kind is int]
IDS = ["bos_token_id", "eos_token_id", "pad_token_id"]
LLAMA3 = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
NO_SIZE = [-1, 0, 10**12, 10**400, 8.0, "8", True, [8], {}]
NO_NUMBER = [0, -1.0, float("inf"), float("nan"), 10**400, "x", True, []]
ABSURD = dict.fromkeys(SIZES, NO_SIZE)
ABSURD |= dict.fromkeys(["rope_theta", "rms_norm_eps", "initializer_range"], NO_NUMBER)
ABSURD |= dict.fromkeys(IDS, [-2, 10**12, 1.5, "2", True, {}])
ABSURD["eos_token_id"] = [*ABSURD["eos_token_id"], [], [[1]], ["x"]]
ABSURD["num_hidden_layers"] = [*NO_SIZE, 10**9]
ABSURD["num_key_value_heads"] = [*NO_SIZE, 3, 8]
ABSURD["head_dim"] = [*NO_SIZE, 7]
ABSURD |= {"tie_word_embeddings": ["false", 2, []], "model_type": [[], None, 3]}
ABSURD |= {"layer_types": [["full_attention", "sliding"], [["x"]], 3, "x"], "is_causal": [False]}
ABSURD["rope_scaling"] = ["llama3", 3, [1], {"type": {}}, {"type": "llama3"}]
for name in LLAMA3:
    rest = dict.fromkeys(LLAMA3, 1.0) | {"type": "llama3"}
    ABSURD["rope_scaling"] += [rest | {name: value} for value in NO_NUMBER]
ABSURD["rope_parameters"] = [{"partial_rotary_factor": 0.5}, {"full_attention": {"type": "yarn"}}]


@pytest.mark.parametrize("field", ABSURD)
def test_an_absurd_config_is_refused_by_field(tiny, field):
    for value in ABSURD[field]:
        edit(tiny, **{field: value})
        text = refused(tiny, lambda: LlamaConfig.from_pretrained(tiny))
        assert any(name in text for name in (field, "RoPE", "rotary")), text


def test_fields_unknown_to_us_are_named_in_a_config_and_refused_in_an_adapter(full, capsys):
    optional = [name for name in vars(LlamaConfig) if name in LlamaConfig.__annotations__]
    edit(full, **dict.fromkeys(optional, None) | {"model_type": "llama", "eos_token_id": 0})
    edit(full, use_cache=True, torch_dtype="float16", some_list=[], use_mrope=False)
    edit(full, tie_word_embeddings=True)
    read_all(full)
    assert capsys.readouterr().out == ""
    edit(full, logit_scale=0.5, auto_map={"AutoModel": "x.Y"})
    read_all(full)
    said = capsys.readouterr().out
    assert f"{full / 'config.json'}: fields unknown" in said and "auto_map, logit_scale" in said
    assert len(said.splitlines()) == 1
    edit(full / "a", "adapter_config.json", some_list=[], new_field=None, layer_scale=0.5, gate="x")
    assert "gate, layer_scale is set" in refused(full, lambda: read_all(full))


def test_the_largest_sizes_that_are_taken_for_serious_take_no_memory(full, monkeypatch):
    llama, made, init = Llama.from_pretrained(full), [], torch.nn.init.zeros_
    monkeypatch.setattr(torch.nn.init, "zeros_", lambda p: made.append(p.device.type) or init(p))
    edit(full / "a", "adapter_config.json", r=2**20)
    text = refused(full, lambda: load_adapter(llama, full / "a"))
    assert "[1048576, 32]" in text and set(made) == {"meta"}
    edit(full, **{name: 2**20 for name in SIZES} | {"num_hidden_layers": 2})
    assert "[1048576, 1048576]" in refused(full, lambda: Llama.from_pretrained(full))
    edit(full, **{name: 10**7 - 2 for name in SIZES} | {"num_hidden_layers": 2})
    assert "is no model" in refused(full, lambda: Llama.from_pretrained(full))  # 2**63 bytes


NO_RANK = [0, -1, 10**9, "3", 3.0, True, None, [3]]
NO_ALPHA = ["6", -1, 0, float("inf"), True, None, []]
NO_TARGETS = [None, "q_proj", {"q_proj": 1}, [3], [["q_proj"]], ["../q_proj"], ["q_proj", None]]
ABSURD_ADAPTER = {"r": NO_RANK, "lora_alpha": NO_ALPHA, "target_modules": NO_TARGETS}
ABSURD_ADAPTER["lora_dropout"] = [-0.1, 2, "0", True, [], None]


@pytest.mark.parametrize("field", ABSURD_ADAPTER)
def test_an_absurd_adapter_is_refused_by_field(full, field):
    llama = Llama.from_pretrained(full)
    for value in ABSURD_ADAPTER[field]:
        edit(full / "a", "adapter_config.json", **{field: value})
        text = refused(full, lambda: load_adapter(llama, full / "a"))
        assert field in text, text


def shard(folder):
    """Make model.safetensors two shards."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)


def test_a_tensor_that_is_there_twice_is_refused(full):
    file, adapter = full / "model.safetensors", full / "a/adapter_model.safetensors"
    tensors, lora = load_file(file), load_file(adapter)
    again = next(name for name in lora if "A.weight" in name).replace("A.w", "A.default.w")
    save_file(lora | {again: torch.ones(3, 32)}, adapter)
    assert "lora_A.weight twice" in refused(full, lambda: read_all(full))
    save_file(tensors | {"norm.weight": torch.ones(32)}, file)
    assert "norm.weight twice" in refused(full, lambda: read_all(full))
    save_file(tensors, file)
    shard(full)
    for i in (0, 1):
        tensors = load_file(full / f"model-{i}.safetensors")
        save_file(tensors | {"model.norm.weight": torch.ones(32)}, full / f"model-{i}.safetensors")
    assert "norm.weight twice" in refused(full, lambda: read_all(full))


def test_weights_that_are_no_plain_floats_are_refused(tiny):
    tensors = load_file(tiny / "model.safetensors")
    for dtype in "int8 uint8 int64 bool float8_e4m3fn float8_e5m2 complex64".split():
        norm = torch.ones(32).to(getattr(torch, dtype))
        save_file(tensors | {"model.norm.weight": norm}, tiny / "model.safetensors")
        text = refused(tiny, lambda: Llama.from_pretrained(tiny))
        assert f"norm.weight is torch.{dtype}; need floats" in text
    norm = torch.full((32,), torch.nan, dtype=torch.float64)  # doubles and nan are weights, too
    save_file(tensors | {"model.norm.weight": norm}, tiny / "model.safetensors")
    assert Llama.from_pretrained(tiny).norm.weight.isnan().all()


def test_names_of_tensors_cannot_write_to_the_terminal(tiny):
    tensors = load_file(tiny / "model.safetensors")
    for odd in ("\x1b[2J\n", "\N{RIGHT-TO-LEFT OVERRIDE}"):
        for t in (torch.ones(1), torch.ones(1).int()):
            save_file(tensors | {odd + "x" * 10**6: t}, tiny / "model.safetensors")
            refused(tiny, lambda: Llama.from_pretrained(tiny))


@pytest.mark.parametrize("name", ["mean", "std"])
def test_what_cannot_standardise_is_refused(full, name):
    file, good = full / "a/pooling.safetensors", {"mean": torch.zeros(32), "std": torch.ones(32)}
    ones = torch.ones(32)
    odd = [torch.nan, torch.inf, -torch.inf] + [0, -1] * (name == "std")
    bad = [ones.where(torch.arange(32) != 5, value) for value in odd]
    bad += [ones[:31], ones[None], torch.tensor(1.0), ones.bool(), ones.to(torch.complex64)]
    cases = [good | {name: t} for t in bad] + [{}, {name: good[name]}]
    cases += [good | {more: ones} for more in ("x", "llama.norm.weight")]
    for tensors in [*cases, good]:
        save_file(tensors, file)
        if tensors is not good:
            text = refused(file, lambda: Retriever.from_pretrained(full, full / "a"))
            assert "need floats mean and std [32]" in text, tensors
    Retriever.from_pretrained(full, full / "a")


EMPTY = {"pair": [], "special_tokens": {}, "single": [{"SpecialToken": {"id": "x", "type_id": 0}}]}
OF_BERT = {"type": "BertProcessing", "sep": ["m", 5], "cls": ["x", 300]}
BROKEN = {
    "panics": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "panics at a text": {"post_processor": {"type": "TemplateProcessing", **EMPTY}},
    "raises at a text": {"model": {"type": "WordLevel", "vocab": {"<eos>": 0}, "unk_token": "no"}},
    "makes a token that the model lacks": {"post_processor": OF_BERT},
    "is nothing": {"model": ...},
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_tokenizer_that_fails_is_one_sentence(tiny, how):
    edit(tiny, "tokenizer.json", **BROKEN[how])
    text = refused(tiny, lambda: Tokenizer(tiny).retriever_ids(["the cat"], "query", 9))
    assert "tokenizer.json" in text and ("makes token 300" in text) == ("lacks" in how)


def test_a_tokenizer_of_another_model_is_refused_before_the_embedding_is_asked(tiny):
    edit(tiny, vocab_size=200)
    text = refused(tiny, lambda: Tokenizer(tiny).token_ids(["the cat sees milk"], 9))
    assert "of a text, but the model's vocab_size is 200" in text
    vocabulary = json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    (tiny / "tokenizer_config.json").write_text(json.dumps({"eos_token": last}))
    assert "no EOS token" in refused(tiny, lambda: Tokenizer(tiny))


NO_EOS = [5, True, [], ["<eos>"], {"content": 5}, {"content": ["<eos>"]}, {}, "\ud800", "none"]


@pytest.mark.parametrize("eos", NO_EOS)
def test_an_absurd_eos_is_refused(tiny, eos):
    edit(tiny, eos_token_id=300)  # no token of the model, where that is asked instead
    (tiny / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    refused(tiny, lambda: Tokenizer(tiny))


def test_a_passage_of_which_the_tokenizer_leaves_nothing_is_one_eos(tiny):
    replace = {"type": "Replace", "pattern": {"Regex": "[xy]"}, "content": ""}
    edit(tiny, "tokenizer.json", normalizer=replace)
    tokenizer = Tokenizer(tiny)
    batch = collate([(["xxx", "y"], None)], tokenizer, tokenizer)
    assert batch["lm_mask"].sum(-1).tolist() == [[1, 1]]
    assert (batch["lm_ids"] == tokenizer.eos_id).all()


# --------------------------------------------------------------------------------------------------
# what a folder may hold and link to

MODEL = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
FILES = [*MODEL, "a/adapter_config.json", "a/adapter_model.safetensors"]
FILES += ["a/pooling.safetensors"]


def test_ctrl_c_is_no_fault_of_the_file():
    with pytest.raises(KeyboardInterrupt), blame("file", "is damaged"):
        raise KeyboardInterrupt


def test_links_as_in_the_hubs_cache_are_followed(full, tmp_path):
    snapshot, blobs = tmp_path / "models--org--x/snapshots/abc", tmp_path / "models--org--x/blobs"
    blobs.mkdir(parents=True)
    for i, file in enumerate(FILES):
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (full / file).rename(blobs / str(i))
        (snapshot / file).symlink_to(("../" if "/" in file else "") + f"../../blobs/{i}")
    read_all(snapshot)


SECRETS = ["-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n", "TOKEN=c2VjcmV0\n"]
SECRETS += ['{"auths": {"https://c2VjcmV0": {"auth": "c2VjcmV0"}}}\n']


@pytest.mark.parametrize("file", FILES)
def test_a_link_to_something_private_tells_nothing_of_it(full, tmp_path, capsys, file):
    (full / file).unlink()
    (full / file).symlink_to(tmp_path / "secret")
    for secret in SECRETS:
        (tmp_path / "secret").write_text(secret)
        if file == "tokenizer_config.json" and secret.startswith("{"):
            continue  # a JSON object without an eos_token is a good one
        text = refused(full, lambda: read_all(full)) + capsys.readouterr().err
        assert not any(word in text for word in ("c2VjcmV0", "OPENSSH"))


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "itself"])
@pytest.mark.parametrize("file", FILES)
def test_what_is_no_regular_file_is_not_read(full, file, kind):
    (full / file).unlink()
    if kind == "pipe":
        os.mkfifo(full / file)
    elif kind == "folder":
        (full / file).mkdir()
    else:
        (full / file).symlink_to("/dev/zero" if kind == "device" else (full / file).name)
    if kind != "itself" or file not in ("tokenizer_config.json", FILES[-1]):  # as good as absent
        assert "does not exist, or is no file" in refused(full, lambda: read_all(full))


def test_what_is_written_replaces_a_link_and_does_not_go_through_it(full, tmp_path):
    (tmp_path / "precious").write_text("mine")
    adapted, merged = read_all(full)[0], read_all(full)[0]
    merge_lora(merged)
    for write, llama in ((save_adapter, adapted), (save_model, merged)):
        out = tmp_path / write.__name__
        out.mkdir()
        for file in FILES:
            (out / file.removeprefix("a/")).symlink_to(tmp_path / "precious")
        write(llama, out)
        assert (tmp_path / "precious").read_text() == "mine"
        assert sum(not file.is_symlink() for file in out.iterdir()) == 2


# --------------------------------------------------------------------------------------------------
# random damage to every reader: bytes, ends cut off, bits, JSON of another shape


def slots(value):
    """Every (container, key) within a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value) if type(value) is list else 0)
    for key in list(keys):
        yield value, key
        yield from slots(value[key])


ODD = [None, True, False, -1, 0, 1, 3, 2.5, 1e-320, 10**12, -(10**12), 10**400, "", "x", "3"]
ODD += ["\ud800\n\x1b[2J\x00", [], {}, [[]], ["q_proj"], {"a": None}, float("inf"), float("nan")]
ODD += ["@1e999", "@" + "[" * 700 + "]" * 700, "@" + "[" * 30000, "@" + "1" * 5000]
BYTES = [b"\x00", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xff", b"\xe2\x80\xa8", b"\t", b'"', b"["]


def reshape(rng, raw):
    """`raw`, a JSON text, with values changed, left out, renamed, exchanged or wrapped up."""
    root = [json.loads(raw)]
    for _ in range(rng.choice((1, 1, 2))):
        container, key = rng.choice(list(slots(root)))
        how = rng.randrange(6)
        if how == 0 and container is not root:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[rng.choice(("x", key + "\n", *container))] = container.pop(key)
        elif how == 2:
            other, at = rng.choice(list(slots(root)))
            container[key] = copy.deepcopy(other[at])
        elif how == 3:
            container[key] = [container[key]]
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    text = json.dumps(root[0]) if root else ""
    for odd in ODD:
        if isinstance(odd, str) and odd.startswith("@"):  # what json.dumps cannot write
            text = text.replace(f'"{odd}"', odd[1:])
    return text.encode()


def damage(rng, raw, name):
    """`raw`, the bytes of a file called `name`, in some way other than they were."""
    how, at = rng.randrange(8), rng.randrange(len(raw))
    if how == 0:
        return rng.randbytes(rng.choice((0, 1, 7, 8, 9, 100, len(raw))))
    if how == 1:
        return raw[:at]
    if how == 2:
        return raw[:at] + raw[at + rng.randrange(1, 20) :]
    if how == 3:
        return raw[:at] + rng.choice(BYTES) + raw[at:]
    if how == 4 or name.endswith((".tsv", ".gz")):
        spoiled = bytearray(raw)
        for _ in range(rng.choice((1, 1, 3))):
            spoiled[rng.randrange(min(len(raw), rng.choice((300, len(raw)))))] ^= 1 << at % 8
        return bytes(spoiled)
    if name.endswith(".safetensors"):
        size = int.from_bytes(raw[:8], "little")
        header = reshape(rng, raw[8 : 8 + size])
        return len(header).to_bytes(8, "little") + header + raw[8 + size :]
    if name.endswith(".jsonl"):
        lines = raw.splitlines(keepends=True)
        i = rng.randrange(len(lines))
        lines[i] = rng.choice((reshape(rng, lines[i]) + b"\n", lines[i] * 2))
        return b"".join(lines)
    return reshape(rng, raw)


def fuzz(folder, names, read, cases):
    """Damage one of the files `names` of `folder` in turn, `cases` times in sum.

    `read` reads the folder and checks what comes out. No file may be there afterwards that was not
    there before.
    """
    rng, good = random.Random(0), {name: (folder / name).read_bytes() for name in names}
    before, accepted = set(folder.rglob("*")), 0
    read()
    for case in range(cases):
        name = names[case % len(names)]
        (folder / name).write_bytes(damage(rng, good[name], name))
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                read()
            accepted += 1
        except (ValueError, OSError) as error:
            text = str(error)
            fine = text.isprintable() and len(text) < 700 and str(folder) in text
            assert fine, f"{name}, case {case}: {error}"
        except BaseException as error:
            failed = f"{name}, case {case}: {type(error).__name__}: {error}"
            raise AssertionError(failed) from error
        assert not warned, f"{name}, case {case}: {warned[0].message}"
        assert set(folder.rglob("*")) == before, f"{name}, case {case}"
        (folder / name).write_bytes(good[name])
    assert 0 < accepted < cases


TOKENS = torch.tensor([[1, 2, 3]])


def test_fuzz_config(tiny):
    rope = dict.fromkeys(LLAMA3, 2.0) | {"rope_type": "llama3"}
    edit(tiny, rope_scaling=rope, bos_token_id=1, layer_types=["full_attention"] * 2)

    def read():
        config = LlamaConfig.from_pretrained(tiny)
        raw = json.loads((tiny / "config.json").read_text("utf-8-sig"))
        assert all(getattr(config, n) == raw[n] for n in SIZES if raw.get(n) is not None)
        with torch.device("meta"):
            assert Llama(config)(TOKENS.to("meta")).shape == (1, 3, config.hidden_size)

    fuzz(tiny, ["config.json"], read, 300)


def test_fuzz_checkpoint(full):
    def read():
        llama, _ = read_all(full)
        assert llama(TOKENS).shape == (1, 3, 32)
        assert {p.dtype for p in llama.parameters()} == {torch.float32}

    fuzz(full, ["model.safetensors", "config.json", *FILES[4:]], read, 400)
    shard(full)
    shards = sorted(file.name for file in full.glob("model*"))
    fuzz(full, shards, read, 150)


def test_fuzz_tokenizer(tiny):
    def read():
        tokenizer = Tokenizer(tiny)
        batch = collate([(["the cat sees me", "\x00é"], None)], tokenizer, tokenizer, 20)
        for name in ("query", "passage", "lm"):
            ids, mask = batch[name + "_ids"], batch[name + "_mask"]
            assert 0 <= ids.min() and ids.max() < 300 and mask.any(-1).all()

    fuzz(tiny, ["tokenizer.json", "tokenizer_config.json", "config.json"], read, 900)


def values(path):
    """The JSON value of every line that has one, read at once and without care."""
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.name.endswith(".gz") else raw
    return [json.loads(line.decode("utf-8-sig")) for line in raw.split(b"\n") if line.strip()]


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    raw = "".join(
        json.dumps(row, ensure_ascii="\ud800" in str(row)) + "\n" for row in rows
    ).encode()
    file.write_bytes(gzip.compress(raw) if file.name.endswith(".gz") else raw)


def test_fuzz_groups(tmp_path):
    file = tmp_path / "f/g.jsonl"
    write_lines(file, [TEXTS[:3], {"src": "wiki", "text": TEXTS[3:7]}, ["é\u2028x", "b\x00", "c"]])

    def read():
        assert [row for _, row in read_lines(file)] == values(file)
        groups = Groups(file, 3)
        truth = [row["text"] if isinstance(row, dict) else row for row in values(file)]
        assert [groups[i][0] for i in range(len(groups))] == [texts[:3] for texts in truth]

    fuzz(file.parent, [file.name], read, 500)


def test_fuzz_collection(tmp_path):
    folder, qrels = tmp_path / "c", tmp_path / "c/qrels/test.tsv"
    corpus = [{"_id": "d1", "title": "T", "text": "x"}, {"_id": 2, "text": "é"}]
    corpus += [{"_id": "d\u2028x", "title": None, "text": ""}]
    write_lines(folder / "corpus.jsonl", corpus)
    queries = [{"_id": "q1", "text": "query"}, {"_id": 7, "text": "unjudged"}]
    write_lines(folder / "queries.jsonl", queries)
    qrels.parent.mkdir()
    qrels.write_text(
        "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\t2\t-1\nq1\td\u2028x\t1\n7\td1\t0\n"
    )

    def read():
        corpus, queries, judged = read_beir(folder)
        rows = {name: values(folder / f"{name}.jsonl") for name in ("corpus", "queries")}
        text = lambda row: f"{row.get('title') or ''} {row['text']}".strip()  # noqa: E731
        rows = {name: {str(row["_id"]): text(row) for row in rows[name]} for name in rows}
        assert corpus == rows["corpus"] and judged
        assert queries == {qid: rows["queries"][qid] for qid in judged}
        lines = [re.split("[\t\r ]+", line) for line in qrels.read_text("utf-8-sig").split("\n")]
        judgements = {(line[0], *line[-2:]) for line in lines}
        for qid, grades in judged.items():
            assert {(qid, docid, str(grade)) for docid, grade in grades.items()} <= judgements

    fuzz(folder, ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"], read, 450)


def test_fuzz_documents(tmp_path, monkeypatch):
    folder, rng = tmp_path / "d", random.Random(2)
    texts = [" ".join(rng.choice(TEXTS) + f" {i} {j}" for j in range(4)) for i in range(6)]
    files = [folder / "docs.jsonl", folder / "more.jsonl.gz"]
    write_lines(files[0], [{"text": text} for text in texts])
    write_lines(files[1], [{"text": text.replace("0", "9")} for text in texts])
    args = ["--docs", *files, "--out", folder / "out.jsonl", "--group_size", 3, "--max_words", 9]
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])

    def read():
        words = set()
        for file in files:
            passages = "".join(text for _, text in read_passages(file))
            docs = values(file)
            whole = "".join(f"{doc.get('title') or ''} {doc['text']}" for doc in docs)
            assert "".join(passages.split()) == "".join(whole.split())
            words.update(" ".join(doc["text"] for doc in docs).replace("\ud800", "?").split())
        data.main()
        groups = values(folder / "out.jsonl")
        (folder / "out.jsonl").unlink()
        found = {word for group in groups for text in group for word in text.split()}
        assert found and found <= words

    fuzz(folder, [file.name for file in files], read, 400)
