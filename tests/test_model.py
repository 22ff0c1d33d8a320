"""model.py: in-batch attention, the published implementation's golden vectors, files in and out, and their errors."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import edit, make_model
from safetensors.torch import load_file, save_file

import model
from model import (
    Llama, LlamaConfig, add_lora, in_batch_attention, load_adapter, read_tensors, rope, save_adapter, save_model,
)  # fmt: skip
from revela import Retriever, Revela

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(params=["written out", "sdpa"])
def attention(request, monkeypatch):
    """Both ways to compute attention, though on this machine only the first is used."""
    if request.param == "sdpa":
        monkeypatch.setattr(model, "WRITTEN_OUT", set())


# ----------------------------------------------------------------------------------------------------------------------
# in-batch attention


def naive_attention(q, k, v, weights, mask, v_norm):
    """The equation, one query token at a time. q [B, H, T, d], k and v [B, H_kv, T, d], weights [B, B], mask [B, T]."""
    B, H, T, d = q.shape
    out = torch.zeros_like(q)
    for i in range(B):
        for j in range(B):
            for h in range(H):
                keys, values = (y[j, h // (H // k.shape[1])][mask[j]] for y in (k, v))
                for t in range(T):
                    a = torch.softmax(keys @ q[i, h, t] / math.sqrt(d), 0)
                    c = a @ values
                    if v_norm:
                        c = c / (a @ values.norm(dim=1) + 1e-6)
                    if i != j:
                        out[i, h, t] += weights[i, j] * c
    return out


def problem(seed=0, G=2, B=3, H=4, H_kv=2, T=5, d=6):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    mask = torch.arange(T) < torch.randint(1, T + 1, (G, B, 1), generator=g)
    return rand(G, B, H, T, d), rand(G, B, H_kv, T, d), rand(G, B, H_kv, T, d), rand(G, B, B).abs(), mask


@pytest.mark.parametrize("kept", [6, 4, 3])
@pytest.mark.parametrize("v_norm", [True, False])
def test_in_batch_attention_equals_loops(v_norm, kept, attention):
    """Also when only `kept` of a group's 6 pairs count: more than half take another way than a few."""
    q, k, v, w, mask = problem()
    v[0, 0, 0, 0] = 0  # a value of norm zero
    at = torch.tensor([[0, 1], [2, 0], [1, 2], [1, 0], [0, 2], [2, 1]])[:kept].T
    counts = torch.zeros(3, 3).index_put(tuple(at), torch.ones(kept))
    out = in_batch_attention(q, k, v, w, mask, v_norm, None if kept == 6 else counts.expand(2, 3, 3).nonzero(as_tuple=True))
    for g in range(2):
        truth = naive_attention(q[g], k[g], v[g], w[g] * counts, mask[g], v_norm)
        torch.testing.assert_close(out[g], truth, rtol=1e-10, atol=1e-12)
        if kept == 6:
            torch.testing.assert_close(in_batch_attention(q[g], k[g], v[g], w[g], mask[g], v_norm), truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("v_norm", [True, False])
def test_in_batch_attention_gradients(v_norm, few, attention):
    q, k, v, w, mask = problem(1, G=2, B=3, H=2, H_kv=1, T=3, d=2)
    inputs = [x.requires_grad_() for x in (q, k, v, w)]
    pairs = (torch.tensor([0, 0, 1]), torch.tensor([0, 0, 2]), torch.tensor([1, 2, 0])) if few else None
    assert torch.autograd.gradcheck(lambda *x: in_batch_attention(*x, mask, v_norm, pairs), inputs)


@pytest.mark.parametrize("few", [False, True])
def test_gradient_of_the_weights_in_bfloat16_survives_what_passages_share(few):
    """The softmax over passages sees differences alone, of gradients that are large and nearly equal where passages share much."""
    q, k, v, w, mask = problem(3, G=1, B=8, T=64, d=64)
    v, d_out = v + 2, 2 + torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = torch.arange(8) > torch.arange(8)[:, None] if few else ~torch.eye(8, dtype=torch.bool)
    differences, w = [], w / w.sum(-1, keepdim=True)
    for dtype, w in ((torch.float64, w), (torch.bfloat16, w.float())):
        out = in_batch_attention(*(x.to(dtype) for x in (q, k, v)), w.requires_grad_(), mask, False, kept[None].nonzero(as_tuple=True))
        out.backward(d_out.to(dtype))
        rows = [row[keep].double() for row, keep in zip(w.grad[0], kept) if keep.any()]
        differences.append(torch.cat([row - row.mean() for row in rows]))
    truth, low = differences
    assert (low - truth).abs().max() < 0.1 * truth.abs().max()


def test_in_batch_attention_in_bfloat16_stays_close():
    q, k, v, w, mask = problem(2, d=64)
    w = w / w.sum(-1, keepdim=True)
    truth = in_batch_attention(q, k, v, w, mask)
    low = in_batch_attention(*(x.bfloat16() for x in (q, k, v)), w.float(), mask)
    assert low.dtype == torch.bfloat16 and (low - truth).abs().max() < 0.02 * truth.abs().max()


# ----------------------------------------------------------------------------------------------------------------------
# the published implementation

CASES = [(f, f"{v}_t{t}") for f in ("llama", "qwen2") for v in ("vnorm", "novnorm") for t in ("0.05", "1e-4")]


@pytest.mark.parametrize("family, case", CASES)
def test_golden(family, case, attention):
    x, truth = load_file(GOLDEN / family / "inputs.safetensors"), load_file(GOLDEN / family / f"{case}.safetensors")
    retriever = Retriever.from_pretrained(GOLDEN / family / "base_retriever", GOLDEN / family / "lora_retriever")
    lm = Llama.from_pretrained(GOLDEN / family / "base_reference")
    load_adapter(lm, GOLDEN / family / "lora_reference")
    batch = {name.replace("llm", "lm"): t[None] for name, t in x.items()}
    batch |= {name: t.bool() for name, t in batch.items() if "mask" in name}
    tau = float(case.split("_t")[1])
    revela = Revela(retriever, lm, tau, v_norm=case.startswith("v"))

    def check(what, ours, theirs, tolerance):
        error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"{what}: {error:.1e}"

    loose = 10 if tau < 1e-3 else 1  # float32 similarities divided by 1e-4: see golden/README.md
    check("passage_reps", retriever(batch["passage_ids"], batch["passage_mask"])[0], truth["passage_reps"], 1e-5)
    check("query_reps", retriever(batch["query_ids"], batch["query_mask"])[0], truth["query_reps"], 1e-5)
    weights = revela.weights(batch)
    check("weights", weights[0], truth["attn_weights"], 1e-5 * loose)
    real, blocks = batch["lm_mask"], {}
    for layer, block in enumerate(lm.layers):  # inputs of o_proj: context stream, then in-batch stream
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args, layer=layer: blocks.update({layer: args[0]}))
    hidden, context = lm.forward_in_batch(batch["lm_ids"], real, weights, revela.v_norm, context=True)
    for layer, attention in blocks.items():
        for i in (1, 2):
            ours = attention.chunk(2)[i - 1][real[0]]
            check(f"layer{layer}_attn_pass{i}", ours, truth[f"layer{layer}_attn_pass{i}"][real[0]], 1e-5 * loose)
    check("logits_pass1", lm.logits(context)[real], truth["logits_pass1"][real[0]], 1e-5)
    check("logits_pass2", lm.logits(hidden)[real], truth["logits_pass2"][real[0]], 1e-5 * loose)

    loss = revela(batch)
    check("loss", loss, truth["loss"], 1e-5)
    loss.backward()
    gradients = {f"retriever.base_model.model.{n}": p.grad for n, p in retriever.llama.named_parameters() if ".lora_" in n}
    gradients |= {f"reference.base_model.model.model.{n}": p.grad for n, p in lm.named_parameters() if ".lora_" in n}
    assert {"grad." + name for name in gradients} == {name for name in truth if name.startswith("grad.")}
    largest = max(g.abs().max() for n, g in truth.items() if n.startswith("grad.retriever"))
    for name, gradient in gradients.items():
        if largest < 1e-6 and name.startswith("retriever"):  # Qwen at 1e-4: every row of w is exactly one-hot
            assert gradient.abs().max() < 1e-6
        else:
            check(name, gradient, truth["grad." + name], 1e-2 if loose > 1 and name.startswith("retriever") else 1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# the decoder


@pytest.mark.parametrize("family", ["Llama-2", "Llama-3.2", "Qwen2.5", "SmolLM2", "TinyLlama"])
def test_every_family_computes_what_transformers_does(family, attention):
    """Stored by interop.py: tiny random models as transformers writes them, hidden states, logits."""
    llama, truth = Llama.from_pretrained(GOLDEN / "families" / family), load_file(GOLDEN / "families" / family / "truth.safetensors")
    hidden = llama(truth["ids"])
    for ours, theirs in ((hidden, truth["hidden"]), (llama.logits(hidden), truth["logits"])):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("file, dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_any_file_is_read_in_any_dtype(tiny, file, dtype):
    tensors = {name: t.to(file) for name, t in load_file(tiny / "model.safetensors").items()}
    save_file(tensors, tiny / "model.safetensors")
    llama = Llama.from_pretrained(tiny, dtype)
    assert torch.equal(llama.norm.weight, tensors["model.norm.weight"].to(dtype))
    assert {p.dtype for p in llama.parameters()} == {dtype}


def test_padding_on_the_right_changes_no_row_and_on_the_left_is_refused(tiny):
    llama = Llama.from_pretrained(tiny)
    ids = torch.randint(1, 300, (2, 7))
    padded, mask = F.pad(ids, (0, 4)), torch.arange(11) < 7
    torch.testing.assert_close(llama(padded, mask.expand(2, -1))[:, :7], llama(ids), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="pad on the right"):
        llama(padded, mask.flip(0).expand(2, -1))


def test_rope_of_llama_3_equals_its_definition(tiny):
    c = LlamaConfig.from_pretrained(tiny)
    c.head_dim, c.rope_theta = 64, 500000.0
    c.rope_scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192}  # fmt: skip
    truth = []
    for i in range(32):
        freq = 500000.0 ** (-2 * i / 64)
        wavelength = 2 * math.pi / freq
        if wavelength > 8192 / 1.0:
            freq = freq / 32
        elif wavelength > 8192 / 4.0:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            freq = (1 - smooth) * freq / 32 + smooth * freq
        truth.append(freq)
    cos, sin = rope(c, 2, "cpu")
    torch.testing.assert_close(torch.atan2(sin[1], cos[1]), torch.tensor(truth * 2), rtol=1e-5, atol=1e-9)


def test_lora_starts_at_zero_scales_and_freezes_the_rest(tiny):
    llama, ids = Llama.from_pretrained(tiny), torch.arange(1, 9)[None]
    before = llama(ids)
    add_lora(llama, r=2, alpha=6, dropout=0.0, targets=["q_proj", "down_proj"])
    assert torch.equal(llama(ids), before)
    assert {n.split(".")[-3] for n, p in llama.named_parameters() if p.requires_grad} == {"q_proj", "down_proj"}
    with pytest.raises(ValueError, match="w_proj is unknown"):
        add_lora(llama, 2, 6, 0.0, ["w_proj"])


@pytest.mark.parametrize("r, N", [(2, 3), (2, 500), (32, 3), (32, 500)])
def test_lora_merged_or_apart_is_one_function(tiny, r, N):
    llama = Llama.from_pretrained(tiny)
    add_lora(llama, r=r, alpha=6, dropout=0.0, targets=["up_proj"])
    layer, x = llama.layers[0].mlp.up_proj, torch.randn(N, 32, requires_grad=True)
    A, B = layer.lora_A.weight, torch.nn.init.normal_(layer.lora_B.weight)
    apart = []
    layer.lora_A.register_forward_hook(lambda *_: apart.append(True))
    truth = x @ layer.weight.T + 6 / r * x @ A.T @ B.T
    torch.testing.assert_close(layer(x), truth)
    assert bool(apart) == (r == 2 or N == 3)  # 3 * 80 N r against 3 * 1536 r + 1536 N
    gradients = (torch.autograd.grad(y.square().sum(), (x, A, B)) for y in (layer(x), truth))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


# ----------------------------------------------------------------------------------------------------------------------
# files


def test_what_is_saved_is_what_is_read(tiny, tmp_path):
    for head in (True, False):
        llama = Llama.from_pretrained(tiny, head=head)
        save_model(llama, tmp_path / "again")
        again = Llama.from_pretrained(tmp_path / "again", head=head)
        assert llama.config == again.config
        assert all(torch.equal(p, q) for p, q in zip(llama.parameters(), again.parameters(), strict=True))


def test_a_sharded_checkpoint_is_the_same_model(tiny):
    whole, llama = dict(read_tensors(tiny)), Llama.from_pretrained(tiny)
    names = sorted(whole)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: whole[name] for name in part}, tiny / file)
    (tiny / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(p, q) for p, q in zip(llama.parameters(), Llama.from_pretrained(tiny).parameters(), strict=True))
    for bad in ("../model.safetensors", "/etc/passwd", 3):
        edit(tiny, "model.safetensors.index.json", weight_map=index["weight_map"] | {names[0]: bad})
        with pytest.raises(ValueError, match="weight_map must name .safetensors files of this folder"):
            Llama.from_pretrained(tiny)
    edit(tiny, "model.safetensors.index.json", **index)
    (tiny / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors"):
        Llama.from_pretrained(tiny)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="mixtral"), "model_type is 'mixtral'"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(use_sliding_window=True), "use_sliding_window"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(rope_scaling={"rope_type": "yarn"}), "RoPE type is 'yarn'"),
        (dict(rope_scaling={"type": "llama3", "factor": 8.0}), "low_freq_factor is None"),
        (dict(hidden_size=...), "hidden_size"),
        (dict(hidden_size="wide"), "hidden_size is 'wide'; need int"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tiny, changes, message):
    edit(tiny, **changes)
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_pretrained(tiny)


def test_older_and_newer_spellings_of_a_config(tiny):
    edit(tiny, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 500.0}, head_dim=..., eos_token_id=[7, 8])
    c = LlamaConfig.from_pretrained(tiny)
    assert (c.rope_theta, c.rope_scaling, c.head_dim, c.eos_token_id) == (500.0, None, 8, 7)
    numbers = dict.fromkeys(model.LLAMA3_ROPE, 2.0)
    edit(tiny, rope_parameters=..., rope_scaling=numbers | {"type": "llama3"})
    save_model(Llama.from_pretrained(tiny), tiny)
    assert LlamaConfig.from_pretrained(tiny).rope_scaling == numbers | {"rope_type": "llama3"}


def test_a_broken_checkpoint_is_one_clear_sentence(tiny, tmp_path):
    file = tiny / "model.safetensors"
    tensors = load_file(file)

    def attempt(match, kind=ValueError, **changed):
        save_file({n: t for n, t in (tensors | changed).items() if t is not None}, file)
        with pytest.raises(kind, match=match):
            Llama.from_pretrained(tiny)

    attempt("lacks 1 tensors: norm.weight", **{"model.norm.weight": None})
    attempt("1 tensors: layers.0.extra", **{"model.layers.0.extra": torch.zeros(1)})
    attempt(r"norm.weight has shape \[31\], need \[32\]", **{"model.norm.weight": torch.zeros(31)})
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or incomplete"):
        Llama.from_pretrained(tiny)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist"):
        Llama.from_pretrained(tiny)
    (tiny / "config.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="config.json is not JSON"):
        Llama.from_pretrained(tiny)
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        Llama.from_pretrained(tmp_path / "nowhere")


def test_a_tied_head_stored_twice_and_stored_rope_are_passed_over(tiny):
    tensors = load_file(tiny / "model.safetensors")
    extra = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | extra, tiny / "model.safetensors")
    Llama.from_pretrained(tiny)


def test_an_untied_head_is_used_and_needed(tmp_path):
    folder = make_model(tmp_path / "untied", tie_word_embeddings=False)
    llama = Llama.from_pretrained(folder)
    h = torch.randn(2, 32)
    torch.testing.assert_close(llama.logits(h), h @ dict(read_tensors(folder))["lm_head.weight"].T)
    with pytest.raises(ValueError, match="without an output head"):
        Llama.from_pretrained(folder, head=False).logits(h)
    save_model(Llama.from_pretrained(folder, head=False), folder)
    with pytest.raises(ValueError, match="lacks 1 tensors: lm_head.weight"):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize("head", [True, False])
def test_adapters_round_trip_in_every_spelling(tiny, tmp_path, head):
    llama = Llama.from_pretrained(tiny, head=head)
    add_lora(llama, 3, 6, 0.1, ["q_proj", "up_proj"])
    for name, p in llama.named_parameters():
        torch.nn.init.normal_(p) if ".lora_" in name else None
    save_adapter(llama, tmp_path / "a")
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    prefix = "base_model.model.model." if head else "base_model.model."
    assert set(tensors) == {prefix + n for n, _ in llama.named_parameters() if ".lora_" in n}
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    other = "base_model.model." if head else "base_model.model.model."
    renamed = {n.replace(prefix, other).replace("A.weight", "A.default.weight"): t for n, t in tensors.items()}
    save_file(renamed, tmp_path / "b/adapter_model.safetensors")
    for folder in ("a", "b"):
        again = Llama.from_pretrained(tiny)
        load_adapter(again, tmp_path / folder)
        ids = torch.arange(1, 9)[None]
        assert torch.equal(again.eval()(ids), llama.eval()(ids))
        lora = [p for name, p in again.named_parameters() if ".lora_" in name]
        assert all(p.requires_grad and p.dtype == torch.float32 and p.data_ptr() % 64 == 0 for p in lora)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(use_dora=True), "use_dora is True"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
        (dict(rank_pattern={"q_proj": 4}), "rank_pattern"),
        (dict(target_modules="all-linear"), "need a list of layer names"),
        (dict(target_modules=["q_proj"]), "beside what the model needs"),
        (dict(target_modules=["q_proj", "up_proj", "k_proj"]), "lacks 4 tensors"),
        (dict(r=4), r"has shape \[3, 32\], need \[4, 32\]"),
        (dict(r=...), "r is None"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(tiny, tmp_path, changes, message):
    llama = Llama.from_pretrained(tiny)
    add_lora(llama, 3, 6, 0.0, ["q_proj", "up_proj"])
    save_adapter(llama, tmp_path / "a")
    edit(tmp_path / "a", "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_adapter(Llama.from_pretrained(tiny), tmp_path / "a")


def test_rslora_divides_by_the_root_of_the_rank(tiny, tmp_path):
    llama = Llama.from_pretrained(tiny)
    add_lora(llama, 4, 6, 0.0, ["q_proj"])
    save_adapter(llama, tmp_path / "a")
    edit(tmp_path / "a", "adapter_config.json", use_rslora=True)
    again = Llama.from_pretrained(tiny)
    load_adapter(again, tmp_path / "a")
    assert again.layers[0].self_attn.q_proj.scale == pytest.approx(6 / 2)
