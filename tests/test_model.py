"""model.py: in-batch attention, golden vectors of the published implementation, LoRA, and files."""

import math
import shutil
from pathlib import Path

import naive
import pytest
import torch
import torch.nn.functional as F
from conftest import edit, make_model, with_lora
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import data
import model
from model import Llama, LlamaConfig, add_lora, dropout, load_adapter, save_adapter, save_model
from revela import Retriever, Revela, two_streams

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted((GOLDEN / "families").iterdir())
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda folder: folder.name)


@pytest.fixture(params=["written out", "sdpa"])
def attention(request, monkeypatch):
    """Both ways to compute attention, though on this machine only the first is used."""
    if request.param == "sdpa":
        monkeypatch.setattr(model, "WRITTEN_OUT_ON", None)


# --------------------------------------------------------------------------------------------------
# in-batch attention

V_NORM = pytest.mark.parametrize("v_norm", [True, False])


def problem(seed=0, G=2, B=4, H=4, H_kv=2, T=5, d=6):
    """q, k, v, weights and mask of G groups, in float64."""
    g = torch.Generator().manual_seed(seed)
    shapes = (G, B, H, T, d), (G, B, H_kv, T, d), (G, B, H_kv, T, d), (G, B, B)
    q, k, v, w = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return q, k, v, w.abs(), torch.arange(T) < torch.randint(1, T + 1, (G, B, 1), generator=g)


@V_NORM
def test_in_batch_attention_equals_loops_and_has_their_gradients(v_norm):
    *inputs, mask = problem(B=3, T=3, d=2)
    assert torch.autograd.gradcheck(
        lambda *x: model.in_batch_attention(*x, mask, v_norm), [x.requires_grad_() for x in inputs]
    )
    together = model.in_batch_attention(*inputs, mask, v_norm)
    for g, args in enumerate(zip(*inputs, mask)):
        truth = naive.in_batch_attention(*args, v_norm)
        for out in (together[g], model.in_batch_attention(*args, v_norm)):
            torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-12)


# which of 4 passages each one reads: all others; one; three, two, one or none
READ = {"all": 1 - torch.eye(4), "one": torch.eye(4).roll(1, 0), "uneven": torch.ones(4, 4).triu(1)}


@V_NORM
@pytest.mark.parametrize("read", READ)
def test_the_fast_form_is_the_definition(v_norm, read):
    """Output and all gradients, with the plan in many parts, several, and one."""
    *inputs, mask = problem()
    inputs[2][0, 0, 0, 0] = 0
    for x in inputs:
        x.requires_grad_()
    q, k, v, w = *inputs[:3], inputs[3] * READ[read]
    truth = model.in_batch_attention(q, k, v, w, mask, v_norm)
    d_out = torch.randn_like(truth)
    truths = [truth, *torch.autograd.grad(truth, inputs, d_out, retain_graph=True)]
    most, parts = int(READ[read].sum(1).max()), []
    for size in (1, 6, 1000):
        plan = model.in_batch_plan(w, 1, 1, 0, size)
        assert plan[0][1].shape[1] == most and max(j.numel() for _, j in plan) <= max(size, most)
        parts.append(len(plan))
        rows = (x.flatten(0, 1) for x in (q, k, v))  # [N, ...]
        out = model.in_batch_attention_fast(*rows, w, mask, v_norm, plan).view_as(q)
        ours = [out, *torch.autograd.grad(out, inputs, d_out, retain_graph=True)]
        for one, other in zip(ours, truths):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert parts[0] == 8 > parts[1] > parts[2] == 1


@V_NORM
@pytest.mark.parametrize("form", ["plain", "fast", "fast, few"])
def test_bfloat16_leaves_the_gradient_of_the_weights_what_passages_do_not_share(form, v_norm):
    """The softmax over passages sees only differences of gradients that are large and alike."""
    q, k, v, w, mask = problem(3, G=1, B=8, T=64, d=64)
    read = torch.ones(8, 8).triu(1).bool() if "few" in form else ~torch.eye(8).bool()
    v, w, results = v + 2, w * read / w.sum(-1, keepdim=True), []
    d_out = 2 + torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    for dtype, w in ((torch.float64, w), (torch.bfloat16, w.float())):
        args = *(x.to(dtype) for x in (q, k, v)), w.requires_grad_(), mask, v_norm
        if form == "plain" or dtype == torch.float64:
            out = model.in_batch_attention(*args)
        else:
            plan = model.in_batch_plan(w, 1, 1, 0, 16)
            rows = (x.flatten(0, 1) for x in args[:3])  # [N, ...]
            out = model.in_batch_attention_fast(*rows, *args[3:], plan).view_as(q)
        assert out.dtype == dtype
        out.backward(d_out.to(dtype))
        rows = [row[kept].double() for row, kept in zip(w.grad[0], read) if kept.any()]
        results.append((out.double(), torch.cat([row - row.mean() for row in rows])))
    for tolerance, truth, low in zip((0.02, 0.3 if v_norm else 0.05), *results):
        assert (low - truth).abs().max() < tolerance * truth.abs().max()


# --------------------------------------------------------------------------------------------------
# the published implementation


@pytest.mark.parametrize("case", ["vnorm_t0.05", "vnorm_t1e-4", "novnorm_t0.05", "novnorm_t1e-4"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_golden(family, case, attention):
    folder, v_norm, tau = GOLDEN / family, case.startswith("v"), float(case.split("_t")[1])
    x, truth = load_file(folder / "inputs.safetensors"), load_file(folder / f"{case}.safetensors")
    retriever = Retriever.from_pretrained(folder / "base_retriever", folder / "lora_retriever")
    lm = Llama.from_pretrained(folder / "base_reference")
    load_adapter(lm, folder / "lora_reference")
    batch = {name.replace("llm", "lm"): t[None] for name, t in x.items()}
    batch |= {name: t.bool() for name, t in batch.items() if "mask" in name}
    ids, mask, real = batch["lm_ids"], batch["lm_mask"], batch["lm_mask"][0]
    revela = Revela(retriever, lm, tau, v_norm)
    loose = 10 if tau < 1e-3 else 1  # float32 similarities divided by 1e-4: see golden/README.md

    def check(what, ours, tolerance):
        theirs = truth[what][real] if "_pass" in what else truth[what]
        error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"{what}: {error:.1e}"

    q, p = revela.embed(batch)
    check("passage_reps", p[0], 1e-5)
    check("query_reps", q[0], 1e-5)
    weights = revela.weights(batch)
    check("attn_weights", weights[0], 1e-5 * loose)

    calls = []  # inputs of o_proj
    for block in lm.layers:
        attn = block.self_attn
        attn.o_proj.register_forward_pre_hook(lambda _, args: calls.append(args[0][real]))
    context = lm(ids[0])
    hidden = two_streams(lm, ids, mask, weights, v_norm)[0]
    names = "0_attn_pass1 1_attn_pass1 0_attn_pass1 0_attn_pass2 1_attn_pass2"  # lm, two_streams
    for name, ours in zip(names.split(), calls, strict=True):
        check(f"layer{name}", ours, 1e-5 * loose)
    check("logits_pass1", lm.logits(context)[real], 1e-5)
    check("logits_pass2", lm.logits(hidden)[real], 1e-5 * loose)

    loss = revela(batch)
    check("loss", loss, 1e-5)
    loss.backward()
    prefixes = "grad.retriever.base_model.model.", "grad.reference.base_model.model.model."
    gradients = {
        prefix + name: p.grad
        for prefix, llama in zip(prefixes, (retriever.llama, lm))
        for name, p in llama.named_parameters()
        if ".lora_" in name
    }
    assert set(gradients) == {name for name in truth if name.startswith("grad.")}
    largest = max(truth[n].abs().max() for n in gradients if "grad.retriever" in n)
    for name, gradient in gradients.items():
        of_retriever = "grad.retriever" in name
        if largest < 1e-6 and of_retriever:  # Qwen at 1e-4: every row of w is exactly one-hot
            assert gradient.abs().max() < 1e-6
        else:
            check(name, gradient, 1e-2 if loose > 1 and of_retriever else 1e-4)


# --------------------------------------------------------------------------------------------------
# the decoder and LoRA


@every_family
def test_every_family_computes_what_transformers_does(family, attention):
    """Stored by interop.py: tiny random models as transformers writes them, and what they give."""
    llama, truth = Llama.from_pretrained(family), load_file(family / "truth.safetensors")
    hidden = llama(truth["ids"])
    for ours, theirs in ((hidden, truth["hidden"]), (llama.logits(hidden), truth["logits"])):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_padding_on_the_right_changes_no_row_and_on_the_left_is_refused(tiny):
    llama, ids = Llama.from_pretrained(tiny), torch.randint(1, 300, (2, 7))
    padded, mask = F.pad(ids, (0, 4)), (torch.arange(11) < 7).expand(2, -1)
    torch.testing.assert_close(llama(padded, mask)[:, :7], llama(ids), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="pad on the right"):
        llama(padded, mask.flip(1))


ROPE = dict(factor=32, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192)


def test_rope_of_llama_3_equals_its_definition(tiny):
    c = LlamaConfig.from_pretrained(tiny)
    c.head_dim, c.rope_theta, c.rope_scaling, truth = 64, 500000.0, ROPE, []
    for i in range(32):
        frequency = 500000.0 ** (-2 * i / 64)
        wavelength = 2 * math.pi / frequency
        smooth = min(max((8192 / wavelength - 1) / (4 - 1), 0), 1)
        truth.append((1 - smooth) * frequency / 32 + smooth * frequency)
    cos, sin = model.rope(c, 2, "cpu")
    angles = torch.atan2(sin[1], cos[1])
    torch.testing.assert_close(angles, torch.tensor(truth * 2), rtol=1e-5, atol=1e-9)


def test_lora_starts_at_zero_freezes_the_rest_and_merges(tiny):
    llama, ids = Llama.from_pretrained(tiny), torch.arange(1, 9)[None]
    before = llama(ids)
    add_lora(llama, r=2, alpha=6, targets=["q_proj", "down_proj"])
    assert torch.equal(llama(ids), before)
    trained = {n.split(".")[-3] for n, p in llama.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "down_proj"}
    with pytest.raises(ValueError, match="w_proj is unknown"):
        add_lora(llama, 2, 6, targets=["w_proj"])
    with_lora(llama)
    add_lora(llama, 2, 6, targets=(name for name in ["v_proj"]))  # in place of what was there
    assert torch.equal(llama(ids), before) and llama.lora["target_modules"] == ["v_proj"]
    trained = {n.split(".")[-3] for n, p in llama.named_parameters() if p.requires_grad}
    assert trained == {"v_proj"}
    apart = with_lora(llama)(ids)
    with pytest.raises(ValueError, match="needs a model without LoRA"):
        model.save_model(llama, tiny)
    model.merge_lora(llama)
    assert llama.lora is None and not any(".lora_" in n for n, _ in llama.named_parameters())
    torch.testing.assert_close(llama(ids), apart, rtol=1e-5, atol=1e-5)
    assert (apart - before).abs().max() > 0.1


def test_a_frozen_adapter_has_no_dropout(tiny):
    """--freeze_lm with an --lm_adapter: its file may ask for dropout."""
    llama = with_lora(Llama.from_pretrained(tiny), dropout=0.5).train()
    ids = torch.arange(12).view(2, 6)
    assert not llama(ids).equal(llama(ids))
    llama.requires_grad_(False)
    assert llama(ids).equal(llama.eval()(ids))


@pytest.mark.parametrize(
    "p, dtype", [(0.1, torch.float32), (0.1, torch.bfloat16), (0.5, torch.bfloat16)]
)
def test_dropout_drops_each_element_by_itself_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    y = dropout(torch.ones(1001, 999, dtype=dtype), p)  # no multiple of four: a number makes four
    assert y.dtype == dtype and y.shape == (1001, 999)
    torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / (1 - p)], dtype=dtype))
    zero = (y == 0).double().flatten()
    x = torch.rand(1001, 999, dtype=dtype) + 1
    y = dropout(x, p)  # the factor 1 / (1 - p) is not rounded: only each product is
    ratio = y[y != 0].double() / x[y != 0].double()
    assert abs(ratio.mean() * (1 - p) - 1) < 1e-4

    def check(share, p, n):
        assert abs(share - p) < 5 * (p * (1 - p) / n) ** 0.5

    for i in range(4):
        check(zero[i::4].mean(), p, len(zero) / 4)
        check((zero[i + 1 :] * zero[: -i - 1]).mean(), p * p, len(zero))


def test_the_same_seed_drops_the_same_also_when_computed_again(tiny):
    """Gradients of an MLP, whose backward pass draws the masks again, are the written-out ones."""
    mlp = with_lora(Llama.from_pretrained(tiny), dropout=0.4).layers[0].mlp
    x, weights = torch.randn(50, 32, requires_grad=True), dict(mlp.named_parameters())

    def written_out(kept_by):
        def linear(name, x):
            W, A, B = (weights[f"{name}_proj.{m}weight"] for m in ("", "lora_A.", "lora_B."))
            return x @ W.T + 6 / 3 * (x * kept_by(x)) @ A.T @ B.T

        return linear("down", F.silu(linear("gate", x)) * linear("up", x))

    torch.manual_seed(7)
    truth = written_out(lambda x: dropout(torch.ones_like(x), 0.4))
    assert not torch.allclose(truth, written_out(lambda x: dropout(torch.ones_like(x), 0.4)))
    torch.manual_seed(7)
    y = mlp(x)
    torch.rand(3)  # what is drawn in between changes nothing
    torch.testing.assert_close(y, truth)
    trained = [x, *(p for p in weights.values() if p.requires_grad)]
    assert len(trained) == 7
    ours, theirs = (torch.autograd.grad(z.square().sum(), trained) for z in (y, truth))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(mlp.eval()(x), written_out(torch.ones_like))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_block_keeps_what_projections_read_once_and_what_is_multiplied(tiny, p):
    """How many bfloat16 numbers are kept for the backward pass, for each of 80 tokens."""
    block = with_lora(Llama.from_pretrained(tiny, torch.bfloat16), dropout=p).layers[0]
    cos, sin = model.rope(LlamaConfig.from_pretrained(tiny), 40, "cpu")

    def kept(function):
        storages = {}

        def keep(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            function(torch.randn(2, 40, 32, requires_grad=True) * 1)  # autocast caches leaves
        sizes = sorted(storage.nbytes() / (2 * 80) for storage in storages.values())
        return [size for size in sizes if size >= 32]  # LoRA's are smaller

    assert kept(lambda x: block.self_attn.qkv(x, cos, sin)) == [32]
    assert kept(block.mlp) == [32, 48, 48]  # x, gate and up


# --------------------------------------------------------------------------------------------------
# files


def same(one, other):
    return all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("head", [True, False])
@every_family
def test_what_is_saved_is_what_is_read_in_any_dtype(family, head, tmp_path):
    llama = Llama.from_pretrained(family, head=head)
    for dtype in (torch.float32, torch.bfloat16):
        save_model(llama.to(dtype), tmp_path)
        again = Llama.from_pretrained(tmp_path, head=head)
        assert llama.config == again.config and same(llama.float(), again)
    low = Llama.from_pretrained(family, torch.bfloat16, head=head)
    assert same(low, llama.bfloat16()) and {p.dtype for p in low.parameters()} == {torch.bfloat16}


def test_what_cannot_be_written_leaves_what_was_there(tiny, monkeypatch):
    llama, file = Llama.from_pretrained(tiny), tiny / "model.safetensors"
    before = file.read_bytes()

    def fails(_, file, *__):
        Path(file).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(data, "save_file", fails)
    with pytest.raises(ValueError, match="model.safetensors could not be written: No space left"):
        save_model(llama, tiny)
    assert file.read_bytes() == before


def test_a_sharded_checkpoint_is_the_same_model(tiny):
    whole, llama = load_file(tiny / "model.safetensors"), Llama.from_pretrained(tiny)
    weight_map = {name: f"model-0000{len(name) % 2}.safetensors" for name in whole}
    for file in set(weight_map.values()):
        save_file({name: whole[name] for name in whole if weight_map[name] == file}, tiny / file)
    (tiny / "model.safetensors").unlink()
    assert same(llama, Llama.from_pretrained(tiny))
    (tiny / "model-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="missing .*weight"):
        Llama.from_pretrained(tiny)


REFUSED = dict(model_type="mixtral", hidden_act="gelu", attention_bias=True, hidden_size="wide")
REFUSED |= dict(quantization_config={"bits": 4}, use_sliding_window=True, num_hidden_layers=...)


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tiny, field):
    edit(tiny, **{field: REFUSED[field]})
    with pytest.raises(ValueError, match=f"config.json: {field} is "):
        LlamaConfig.from_pretrained(tiny)


def test_older_and_newer_spellings_of_rope_and_eos(tiny):
    rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    edit(tiny, rope_theta=..., rope_parameters=rope_parameters, head_dim=..., eos_token_id=[7, 8])
    c = LlamaConfig.from_pretrained(tiny)
    assert (c.rope_theta, c.rope_scaling, c.head_dim, c.eos_token_id) == (500.0, None, 8, 7)
    edit(tiny, rope_parameters=..., rope_scaling=ROPE | {"type": "llama3"})
    assert LlamaConfig.from_pretrained(tiny).rope_scaling == ROPE | {"rope_type": "llama3"}
    edit(tiny, rope_scaling={"type": "yarn"})
    with pytest.raises(ValueError, match="RoPE type is 'yarn'"):
        LlamaConfig.from_pretrained(tiny)


def test_a_broken_checkpoint_is_one_sentence_with_its_name(tiny):
    file = tiny / "model.safetensors"
    tensors = load_file(file)

    def attempt(match, kind=ValueError):
        with pytest.raises(kind, match=match):
            Llama.from_pretrained(tiny)

    for name, tensor, match in (
        ("layers.0.extra", torch.zeros(1), r"left over \['layers.0.extra'\]"),
        ("model.norm.weight", torch.zeros(31), r"norm.weight has shape \[31\], need \[32\]"),
        ("model.norm.weight", torch.zeros(32).long(), "norm.weight is torch.int64"),
        ("norm.weight", torch.zeros(32), "norm.weight twice"),
    ):
        save_file(tensors | {name: tensor}, file)
        attempt(match)
    save_file({n: t for n, t in tensors.items() if n != "model.norm.weight"}, file)
    attempt(r"missing \['norm.weight'\]")
    file.write_bytes(file.read_bytes()[:-100])
    attempt("model.safetensors is damaged or incomplete")
    file.unlink()
    attempt("model.safetensors does not exist", FileNotFoundError)
    (tiny / "config.json").write_text('{"a": ')
    attempt("config.json is not JSON")
    (tiny / "config.json").unlink()
    attempt("config.json does not exist", FileNotFoundError)


def test_a_tied_head_stored_twice_and_stored_rope_are_passed_over(tiny):
    tensors = load_file(tiny / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tiny / "model.safetensors")
    Llama.from_pretrained(tiny, torch.bfloat16)
    tensors["lm_head.weight"][7, 3] += 0.1
    save_file(tensors, tiny / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):
        Llama.from_pretrained(tiny)
    Llama.from_pretrained(tiny, head=False)


def test_an_untied_head_is_used_and_needed(tmp_path):
    llama = Llama.from_pretrained(make_model(tmp_path, tie_word_embeddings=False), head=False)
    with pytest.raises(ValueError, match="without an output head"):
        llama.logits(torch.randn(2, 32))
    save_model(llama, tmp_path)
    with pytest.raises(ValueError, match="missing .*lm_head.weight"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("head", [True, False])
def test_adapters_round_trip_in_every_spelling(tiny, tmp_path, head):
    llama, ids = with_lora(Llama.from_pretrained(tiny, head=head), r=4), torch.arange(1, 9)[None]
    save_adapter(llama, tmp_path / "a")
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    prefixes = ["base_model.model.", "base_model.model.model."]
    ours, other = prefixes[head], prefixes[not head]
    assert set(tensors) == {ours + n for n, _ in llama.named_parameters() if ".lora_" in n}
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    renamed = {n.replace(ours, other).replace("A.", "A.default."): tensors[n] for n in tensors}
    save_file(renamed, tmp_path / "b/adapter_model.safetensors")
    for folder in ("a", "b"):
        again = Llama.from_pretrained(tiny)
        load_adapter(again, tmp_path / folder)
        assert torch.equal(again(ids), llama(ids)) and again.lora == llama.lora
        lora = [p for name, p in again.named_parameters() if ".lora_" in name]
        assert all(p.requires_grad and p.dtype == torch.float32 for p in lora)
        assert all(p.data_ptr() % 64 == 0 for p in lora)  # else matmuls may round otherwise
    edit(tmp_path / "a", "adapter_config.json", use_rslora=True)
    load_adapter(again := Llama.from_pretrained(tiny), tmp_path / "a")
    assert again.layers[0].self_attn.q_proj.scale == pytest.approx(6 / 4**0.5)


NO_PLAIN_LORA = [
    ("use_dora", True, "use_dora is "),
    ("modules_to_save", ["lm_head"], "modules_to_save is "),
    ("peft_type", "IA3", "peft_type is 'IA3'"),
    ("rank_pattern", {"q_proj": 4}, "rank_pattern is "),
    ("target_modules", "all-linear", "target_modules is 'all-linear'"),
    ("target_modules", ["q_proj"], "left over .*up_proj"),
    ("target_modules", ["q_proj", "up_proj", "k_proj"], "missing .*k_proj"),
    ("r", 4, r"A.weight has shape \[3, 32\], need \[4, 32\]"),
    ("r", ..., "r is None"),
]


@pytest.mark.parametrize("field, value, message", NO_PLAIN_LORA)
def test_an_adapter_that_is_no_plain_lora_is_refused(tiny, tmp_path, field, value, message):
    llama = Llama.from_pretrained(tiny)
    add_lora(llama, 3, 6, targets=["q_proj", "up_proj"])
    save_adapter(llama, tmp_path)
    edit(tmp_path, "adapter_config.json", **{field: value})
    with pytest.raises(ValueError, match=message):
        load_adapter(Llama.from_pretrained(tiny), tmp_path)


def test_an_adapter_that_holds_weights_of_the_base_is_refused(tiny, tmp_path):
    llama = Llama.from_pretrained(tiny)
    add_lora(llama, 3, 6)
    save_adapter(llama, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.embed_tokens.weight"] = torch.zeros(300, 32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="left over .*embed_tokens.weight"):
        load_adapter(Llama.from_pretrained(tiny), tmp_path)
