"""What goes wrong outside of our code: files from strangers, damaged files. A reader gives a right answer or one sentence."""

import copy
import gzip
import json
import os
import random
import shutil
import sys
import warnings

import pytest
import safetensors.torch
import torch
from conftest import TEXTS, edit, with_lora

import data
from data import Groups, Tokenizer, collate, read_beir, read_lines, read_passages
from model import LLAMA3_ROPE, Llama, LlamaConfig, load_adapter, read_json, read_safetensors, reading, save_adapter, save_model


def refused(folder, call):
    """The sentence with which `call` refuses a file of `folder`: short, one line, printable, with a name in it."""
    with warnings.catch_warnings(record=True) as warned:
        with pytest.raises((ValueError, OSError)) as caught:
            call()
    text = str(caught.value)
    assert text.isprintable() and len(text) < 700 and str(folder) in text and not warned, text
    return text


# ----------------------------------------------------------------------------------------------------------------------
# folders from strangers: what a checkpoint may say, name and link to


SIZES = [name for name, kind in LlamaConfig.__annotations__.items() if kind is int]
NO_SIZE = [-1, 0, 10**12, 10**400, 8.0, "8", True, [8], {}]
NO_NUMBER = [0, -1.0, float("inf"), float("nan"), 10**400, "x", True, []]


@pytest.mark.parametrize(
    "field, bad",
    [(name, NO_SIZE) for name in SIZES]
    + [(name, NO_NUMBER) for name in ("rope_theta", "rms_norm_eps", "initializer_range")]
    + [(name, [-2, 10**12, 1.5, "2", True, {}]) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
    + [("num_hidden_layers", [10**9]), ("eos_token_id", [[], [[1]], ["x"]]), ("tie_word_embeddings", ["false", 2, []]), ("model_type", [[], None, 3])]
    + [("rope_scaling", ["llama3", 3, [1], {"type": {}}, {"rope_type": "llama3"}])]
    + [("num_key_value_heads", [3, 8]), ("head_dim", [7])],
)  # fmt: skip
def test_an_absurd_config_is_refused_by_field(tiny, field, bad):
    for value in bad:
        edit(tiny, **{field: value})
        text = refused(tiny, lambda: Llama.from_pretrained(tiny))
        assert field in text or "RoPE" in text or "not JSON" in text, text  # NaN and Infinity are not JSON


def test_numbers_inside_llama_3s_rope_are_checked(tiny):
    for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        for value in NO_NUMBER:
            edit(tiny, rope_scaling=dict.fromkeys(LLAMA3_ROPE, 1.0) | {"rope_type": "llama3", name: value})
            text = refused(tiny, lambda: LlamaConfig.from_pretrained(tiny))
            assert name in text or "not JSON" in text


def test_the_largest_sizes_that_are_taken_for_serious_take_no_memory(tiny):
    most = {name: 2**20 for name in SIZES}
    edit(tiny, **most | {"num_hidden_layers": 2})
    assert "embed_tokens.weight has shape [300, 32], need [1048576, 1048576]" in refused(tiny, lambda: Llama.from_pretrained(tiny))


@pytest.mark.parametrize("weight_map", [None, [], "x", 3, {"a": 1}, {"a": None}, {"a": ["x"]}] + [{"a": name} for name in (
    "../tiny/model-1.safetensors", "/etc/passwd", "..", "", "model.safetensors.index.json", "folder.safetensors", "none.safetensors",
    "x\0.safetensors", "x\n.safetensors", "sub/model-1.safetensors")])  # fmt: skip
def test_an_index_names_files_of_its_folder_alone(tiny, weight_map):
    (tiny / "model.safetensors").rename(tiny / "model-1.safetensors")
    (tiny / "folder.safetensors").mkdir()
    (tiny / "sub").mkdir()
    shutil.copy(tiny / "model-1.safetensors", tiny / "sub")
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": "model-1.safetensors"}}))
    Llama.from_pretrained(tiny)
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    text = refused(tiny, lambda: Llama.from_pretrained(tiny))
    assert "weight_map must name" in text or ".safetensors does not exist, or is no file" in text


@pytest.mark.parametrize("how", ["two shards", "two spellings", "two spellings of LoRA"])
def test_a_tensor_that_is_there_twice_is_refused(tiny, tmp_path, how):
    tensors = safetensors.torch.load_file(tiny / "model.safetensors")
    if how == "two shards":
        safetensors.torch.save_file({"model.norm.weight": torch.ones(32)}, tiny / "b.safetensors")
        (tiny / "model.safetensors").rename(tiny / "a.safetensors")
        (tiny / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    elif how == "two spellings":
        safetensors.torch.save_file(tensors | {"norm.weight": torch.ones(32)}, tiny / "model.safetensors")
    else:
        llama = with_lora(Llama.from_pretrained(tiny))
        save_adapter(llama, tiny / "a")
        tensors = safetensors.torch.load_file(tiny / "a/adapter_model.safetensors")
        again = next(name for name in tensors if "A.weight" in name).replace("A.weight", "A.default.weight")
        safetensors.torch.save_file(tensors | {again: torch.ones(3, 32)}, tiny / "a/adapter_model.safetensors")
        assert "1 tensors twice" in refused(tiny, lambda: load_adapter(Llama.from_pretrained(tiny), tiny / "a"))
        return
    assert "1 tensors twice" in refused(tiny, lambda: Llama.from_pretrained(tiny))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool", "float8_e4m3fn", "float8_e5m2", "complex64"])
def test_weights_that_are_no_plain_floats_are_refused(tiny, dtype):
    tensors = safetensors.torch.load_file(tiny / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(getattr(torch, dtype))
    safetensors.torch.save_file(tensors, tiny / "model.safetensors")
    assert f"norm.weight has shape [32], need [32]; its type is torch.{dtype}" in refused(tiny, lambda: Llama.from_pretrained(tiny))


def test_doubles_and_nan_are_weights_too(tiny):
    tensors = safetensors.torch.load_file(tiny / "model.safetensors")
    tensors["model.norm.weight"] = torch.full((32,), torch.nan, dtype=torch.float64)
    safetensors.torch.save_file(tensors, tiny / "model.safetensors")
    assert Llama.from_pretrained(tiny).norm.weight.isnan().all()


def test_names_of_tensors_cannot_write_to_the_terminal(tiny):
    tensors = safetensors.torch.load_file(tiny / "model.safetensors")
    safetensors.torch.save_file(tensors | {"\x1b[2J\n" + "x" * 10**6: torch.ones(1)}, tiny / "model.safetensors")
    assert r"\x1b[2J\nxxx" in refused(tiny, lambda: Llama.from_pretrained(tiny))


@pytest.mark.parametrize(
    "field, bad",
    [("r", [0, -1, 10**9, 2**20, "3", 3.0, True, None, [3]]), ("lora_alpha", ["6", -1, 0, float("inf"), True, None, []]),
     ("lora_dropout", [-0.1, 2, "0", True, [], None]),
     ("target_modules", [None, "q_proj", {"q_proj": 1}, [3], [["q_proj"]], ["../q_proj"], ["q_proj", None]])],
)  # fmt: skip
def test_an_absurd_adapter_is_refused_by_field(tiny, field, bad):
    save_adapter(with_lora(Llama.from_pretrained(tiny)), tiny / "a")
    for value in bad:
        edit(tiny / "a", "adapter_config.json", **{field: value})
        text = refused(tiny, lambda: load_adapter(Llama.from_pretrained(tiny), tiny / "a"))
        assert field in text or "not JSON" in text or value == 2**20 and "need [1048576, 32]" in text, text


def test_a_rank_takes_memory_only_when_the_file_has_it(tiny, monkeypatch):
    save_adapter(with_lora(Llama.from_pretrained(tiny)), tiny / "a")
    edit(tiny / "a", "adapter_config.json", r=2**20)
    llama, made = Llama.from_pretrained(tiny), []
    monkeypatch.setattr(torch.nn.init, "zeros_", lambda p: made.append(p.device.type))
    refused(tiny, lambda: load_adapter(llama, tiny / "a"))
    assert set(made) == {"meta"}


BROKEN = {
    "panics when it is read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "panics at a text": {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": [],
                                            "special_tokens": {}}},
    "raises at a text": {"model": {"type": "WordLevel", "vocab": {"<eos>": 0}, "unk_token": "none"}},
    "makes a token that the model lacks": {"post_processor": {"type": "BertProcessing", "sep": ["m", 5], "cls": ["x", 300]}},
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_tokenizer_that_fails_is_one_sentence(tiny, how):
    edit(tiny, "tokenizer.json", **BROKEN[how])
    text = refused(tiny, lambda: Tokenizer(tiny).retriever_ids(["the cat"], "query", 9))
    assert "tokenizer.json" in text and ("makes token 300" in text) == ("lacks" in how)


def test_a_tokenizer_of_another_model_is_refused_before_the_embedding_is_asked(tiny):
    edit(tiny, vocab_size=200)
    with pytest.raises(ValueError, match="tokenizer.json makes token 2.. of a text, but the model's vocab_size is 200"):
        Tokenizer(tiny).lm_ids(["the cat sees milk"], 9)
    last = max(json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"].items(), key=lambda item: item[1])
    (tiny / "tokenizer_config.json").write_text(json.dumps({"eos_token": last[0]}))
    assert "no EOS token" in refused(tiny, lambda: Tokenizer(tiny))


@pytest.mark.parametrize("eos", [5, True, [], ["<eos>"], {"content": 5}, {"content": ["<eos>"]}, {}, "\ud800", "none"])
def test_an_absurd_eos_is_refused(tiny, eos):
    edit(tiny, eos_token_id=300)  # no token of the model, where that is asked instead
    (tiny / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    refused(tiny, lambda: Tokenizer(tiny))


def test_a_passage_of_which_the_tokenizer_leaves_nothing_is_one_eos(tiny):
    edit(tiny, "tokenizer.json", normalizer={"type": "Replace", "pattern": {"Regex": "[xy]"}, "content": ""})
    tokenizer = Tokenizer(tiny)
    batch = collate([(["xxx", "y"], None)], tokenizer, tokenizer)
    assert batch["lm_mask"].sum(-1).tolist() == [[1, 1]] and (batch["lm_ids"] == tokenizer.eos_id).all()


def test_ctrl_c_is_no_fault_of_the_file():
    with pytest.raises(KeyboardInterrupt), reading("file", "is damaged"):
        raise KeyboardInterrupt


FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "a/adapter_config.json", "a/adapter_model.safetensors"]


def read_all(folder):
    llama = Llama.from_pretrained(folder)
    load_adapter(llama, folder / "a")
    return llama, Tokenizer(folder)


def test_links_as_in_the_hubs_cache_are_followed(tiny, tmp_path):
    save_adapter(with_lora(Llama.from_pretrained(tiny)), tiny / "a")
    snapshot, blobs = tmp_path / "models--org--x/snapshots/abc", tmp_path / "models--org--x/blobs"
    blobs.mkdir(parents=True)
    for i, file in enumerate(FILES):
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (tiny / file).rename(blobs / str(i))
        (snapshot / file).symlink_to(("../" if "/" in file else "") + f"../../blobs/{i}")
    read_all(snapshot)


SECRETS = ["-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n", "TOKEN=c2VjcmV0\n", '{"auths": {"https://c2VjcmV0": {"auth": "c2VjcmV0"}}}\n']


@pytest.mark.parametrize("file", FILES)
def test_a_link_to_something_private_tells_nothing_of_it(tiny, tmp_path, file):
    save_adapter(with_lora(Llama.from_pretrained(tiny)), tiny / "a")
    (tiny / file).unlink()
    (tiny / file).symlink_to(tmp_path / "secret")
    for secret in SECRETS:
        (tmp_path / "secret").write_text(secret)
        if file == "tokenizer_config.json" and secret.startswith("{"):
            return  # a JSON object without an eos_token is a good one
        text = refused(tiny, lambda: read_all(tiny))
        assert "c2VjcmV0" not in text and "OPENSSH" not in text and "auths" not in text


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "itself"])
def test_what_is_no_regular_file_is_not_read(tiny, file, kind):
    save_adapter(with_lora(Llama.from_pretrained(tiny)), tiny / "a")
    (tiny / file).unlink()
    if kind == "pipe":
        os.mkfifo(tiny / file)
    elif kind == "folder":
        (tiny / file).mkdir()
    else:
        (tiny / file).symlink_to("/dev/zero" if kind == "device" else (tiny / file).name)
    if file != "tokenizer_config.json" or kind != "itself":  # as good as absent, and then config.json names the EOS
        assert "does not exist, or is no file" in refused(tiny, lambda: read_all(tiny))


def test_what_is_written_replaces_a_link_and_does_not_go_through_it(tiny, tmp_path):
    llama = with_lora(Llama.from_pretrained(tiny))
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a").mkdir()
    for write, names in ((save_adapter, ("adapter_config.json", "adapter_model.safetensors")), (save_model, ("config.json", "model.safetensors"))):
        for name in names:
            (tmp_path / "a" / name).symlink_to(tmp_path / "precious")
        write(llama if write is save_adapter else Llama.from_pretrained(tiny), tmp_path / "a")
        assert (tmp_path / "precious").read_text() == "mine" and not any((tmp_path / "a" / name).is_symlink() for name in names)


# ----------------------------------------------------------------------------------------------------------------------
# random damage to every reader: bytes, ends cut off, bits, JSON of another shape


def slots(value):
    """Every (container, key) within a JSON value."""
    for key, inner in list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []:
        yield value, key
        yield from slots(inner)


ODD = [None, True, False, -1, 0, 1, 3, 2.5, 1e-320, 10**12, -(10**12), 10**400, "", "x", "3", "\ud800\n\x1b[2J\x00", [], {}, [[]], ["q_proj"],
       {"a": None}, float("inf"), float("nan"), "@1e999", "@" + "[" * 700 + "]" * 700, "@" + "[" * 30000, "@" + "1" * 5000]  # fmt: skip


def reshape(rng, raw):
    """`raw`, a JSON text, with one or two of its values changed, left out, renamed, exchanged or wrapped up."""
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
    how = rng.randrange(8)
    if how == 0:
        return rng.randbytes(rng.choice((0, 1, 7, 8, 9, 100, len(raw))))
    if how == 1:
        return raw[: rng.randrange(len(raw))]
    if how == 2:
        start = rng.randrange(len(raw))
        return raw[:start] + raw[start + rng.randrange(1, 20) :]
    if how == 3:
        at, odd = rng.randrange(len(raw)), (b"\x00", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xff", b"\xe2\x80\xa8", b"\t", b'"', b"[", b"\xed\xa0\x80")
        return raw[:at] + rng.choice(odd) + raw[at:]
    if how == 4 or name.endswith((".tsv", ".gz")):
        spoiled = bytearray(raw)
        for _ in range(rng.choice((1, 1, 3))):
            spoiled[rng.randrange(min(len(raw), rng.choice((300, len(raw)))))] ^= 1 << rng.randrange(8)
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


def fuzz(folder, names, read, cases, seed=0, leaves=()):
    """Damage one of the files `names` of `folder` in turn, `cases` times in sum; `read` reads the folder and checks what comes
    out. Nothing but files that begin with one of `leaves` may be there afterwards that was not there before."""
    rng, good = random.Random(seed), {name: (folder / name).read_bytes() for name in names}
    before, accepted = set(folder.rglob("*")), 0
    read()
    for case in range(cases):
        name = names[case % len(names)]
        for path in set(folder.rglob("*")) - before:
            assert path.name.startswith(leaves) and "partial" not in path.name, path
            path.unlink()
        (folder / name).write_bytes(damage(rng, good[name], name))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                read()
                accepted += 1
            except (ValueError, OSError) as error:
                assert str(error).isprintable() and len(str(error)) < 700 and str(folder) in str(error), f"{name}, case {case}: {error}"
            except BaseException as error:
                raise AssertionError(f"{name}, case {case}: {type(error).__name__}: {error}") from error
        assert not warned, f"{name}, case {case}: {warned[0].message}"
        (folder / name).write_bytes(good[name])
    assert 0 < accepted < cases


IDS = torch.tensor([[1, 2, 3]])


def test_fuzz_config(tiny):
    edit(tiny, rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 64}, bos_token_id=1, pad_token_id=None)  # fmt: skip

    def read():
        c, raw = LlamaConfig.from_pretrained(tiny), json.loads((tiny / "config.json").read_text("utf-8-sig"))
        given = [name for name, kind in LlamaConfig.__annotations__.items() if kind is int and raw.get(name) is not None]
        assert all(getattr(c, name) == raw[name] for name in given)
        with torch.device("meta"):
            assert Llama(c)(IDS.to("meta")).shape == (1, 3, c.hidden_size)

    fuzz(tiny, ["config.json"], read, 1000)


def test_fuzz_checkpoint(tiny):
    def read():
        llama = Llama.from_pretrained(tiny)
        assert llama(IDS).shape == (1, 3, 32) and {p.dtype for p in llama.parameters()} == {torch.float32}

    fuzz(tiny, ["model.safetensors", "config.json"], read, 800)


def test_fuzz_sharded_checkpoint(tiny):
    whole = safetensors.torch.load_file(tiny / "model.safetensors")
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, file in enumerate(files):
        safetensors.torch.save_file({name: whole[name] for name in sorted(whole)[i::2]}, tiny / file)
    (tiny / "model.safetensors").unlink()
    weight_map = {name: files[i % 2] for i, name in enumerate(sorted(whole))}
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    fuzz(tiny, ["model.safetensors.index.json", *files], lambda: Llama.from_pretrained(tiny)(IDS), 400)


def test_fuzz_adapter(tiny, tmp_path):
    save_adapter(with_lora(Llama.from_pretrained(tiny)), tmp_path / "a")

    def read():
        llama = Llama.from_pretrained(tiny)
        load_adapter(llama, tmp_path / "a")
        assert llama(IDS).shape == (1, 3, 32)

    fuzz(tmp_path / "a", ["adapter_config.json", "adapter_model.safetensors"], read, 500)


def test_fuzz_tokenizer(tiny):
    def read():
        tokenizer = Tokenizer(tiny)
        batch = collate([(["the cat sees me", "\x00é"], None)], tokenizer, tokenizer, passage_max_len=20)
        assert all(0 <= ids.min() and ids.max() < 300 for name, ids in batch.items() if name.endswith("ids"))
        assert all(mask.any(-1).all() for name, mask in batch.items() if name.endswith("mask"))

    fuzz(tiny, ["tokenizer.json", "tokenizer_config.json", "config.json"], read, 1500)


def plain(path):
    return gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()


def values(path):
    """The JSON value of every line that has one, read at once and without care."""
    return [json.loads(line.decode("utf-8-sig")) for line in plain(path).split(b"\n") if line.strip()]


def groups_file(folder, name):
    rows = [TEXTS[:3], {"src": "wiki", "text": TEXTS[3:7]}, ["é\u2028x", "b\x00", "c"]]
    raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return folder / name


@pytest.mark.parametrize("name", ["g.jsonl", "g.jsonl.gz"])
def test_fuzz_groups(tmp_path, name):
    file = groups_file(tmp_path / "f", name)

    def read():
        assert [row for _, row in read_lines(file)] == values(file)
        groups = Groups(file, 3)
        truth = [row["text"] if isinstance(row, dict) else row for row in values(file)]
        assert [groups[i][0] for i in range(len(groups))] == [texts[:3] for texts in truth]

    fuzz(file.parent, [name], read, 700, leaves=(f"{name}.index", f"{name}.unpacked"))


def test_fuzz_index_of_groups(tmp_path):
    file = groups_file(tmp_path / "f", "g.jsonl")
    Groups(file, 3)
    index, rng = file.parent / "g.jsonl.index.safetensors", random.Random(1)
    good = index.read_bytes()
    for bad in [good.replace(b'"I64"', b'"F64"', 1), b'"F64"'.join(good.rsplit(b'"I64"', 1)), *(damage(rng, good, index.name) for _ in range(800))]:
        index.write_bytes(bad)
        groups = Groups(file, 3)
        assert [groups[i][0][0] for i in range(len(groups))] == [TEXTS[0], TEXTS[3], "é\u2028x"]


def collection(folder):
    (folder / "qrels").mkdir(parents=True)
    for name, rows in {
        "corpus": [{"_id": "d1", "title": "T", "text": "x"}, {"_id": 2, "text": "é"}, {"_id": "d\u2028", "title": None, "text": ""}],
        "queries": [{"_id": "q1", "text": "query"}, {"_id": 7, "text": "unjudged"}],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\t2\t-1\nq1\td\u2028\t1\n7\td1\t0\n", "utf-8")
    return folder


def test_fuzz_collection(tmp_path):
    folder = collection(tmp_path / "c")

    def read():
        corpus, queries, qrels = read_beir(folder)
        rows = {name: {str(row["_id"]): row for row in values(folder / f"{name}.jsonl")} for name in ("corpus", "queries")}
        assert corpus == {key: f"{row.get('title') or ''} {row['text']}".strip() for key, row in rows["corpus"].items()}
        assert qrels and queries == {key: rows["queries"][key]["text"].strip() for key in qrels}
        lines = [line.split("\t") for line in (folder / "qrels/test.tsv").read_text("utf-8-sig").split("\n")]
        judged = {(line[0].strip("\ufeff"), line[1], int(line[2])) for line in lines if len(line) > 2 and line[2].strip() != "score"}
        assert {(q, d, grade) for q, grades in qrels.items() for d, grade in grades.items()} <= judged

    fuzz(folder, ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"], read, 900)


def test_fuzz_documents(tmp_path, monkeypatch, capsys):
    folder, rng = tmp_path / "d", random.Random(2)
    folder.mkdir()
    docs = [{"id": i, "text": " ".join(rng.choice(TEXTS) + f" {i} {j}" for j in range(4))} for i in range(6)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "more.jsonl.gz").write_bytes(gzip.compress((folder / "docs.jsonl").read_bytes().replace(b"0", b"9")))
    files = ["docs.jsonl", "more.jsonl.gz"]
    args = ["data.py", "--docs", *(str(folder / file) for file in files), "--out", str(folder / "out.jsonl"), "--group_size", "3", "--max_words", "9"]
    monkeypatch.setattr(sys, "argv", args)

    def read():
        for file in files:
            passages = read_passages(folder / file)
            assert "".join("".join(text for _, text in passages).split()) == "".join(
                "".join(f"{doc.get('title') or ''} {doc['text']}".split()) for doc in values(folder / file))  # fmt: skip
        data.main()
        texts = [text for file in files for doc in values(folder / file) for text in doc["text"].encode("utf-8", "replace").decode().split()]
        words = [word for group in values(folder / "out.jsonl") for text in group for word in text.split()]
        assert words and set(words) <= set(texts)
        (folder / "out.jsonl").unlink()

    fuzz(folder, files, read, 600)


def test_fuzz_plain_readers(tiny):
    def read():
        assert read_json(tiny / "config.json") == json.loads((tiny / "config.json").read_text("utf-8-sig"))
        ours, truth = read_safetensors(tiny / "model.safetensors"), safetensors.torch.load((tiny / "model.safetensors").read_bytes())
        assert all(ours[name].equal(truth[name]) or ours[name].isnan().any() for name in ours.keys() | truth.keys())

    fuzz(tiny, ["config.json", "model.safetensors"], read, 800)
