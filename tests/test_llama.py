"""pretrained/llama.py against the reference library, transformers: each family, every attention pattern, there and back."""
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from ar2diff import transfer
from conftest import width_of
from diffusion import Absorbing, Gaussian, Uniform
from engine.cli import UserError
from pretrained import llama
from pretrained.loading import build_model, load_checkpoint, tokenizer_of
from pretrained.published import export
from test_gpt2 import EOS, LINE_END, V, cached_and_whole, continuation, every_padding, forward, reference_logits, tokens
from test_model import PATTERNS, left_padded, may_see

SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # so short that it shows within the few columns of these tests
FAMILIES = {  # name: (family, what its config says)
    "llama": ("Llama", dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)),
    "untied": ("Llama", dict(num_attention_heads=3, num_key_value_heads=3, rms_norm_eps=1e-5)),
    "llama3": ("Llama", dict(num_attention_heads=6, num_key_value_heads=1, rope_parameters=SCALED | {"rope_theta": 5e5})),
    "qwen2": ("Qwen2", dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(num_attention_heads=4, num_key_value_heads=2, head_dim=20))}


def make(folder, family, n_layer=2, **fields):
    """Save a random model by transformers, whose own start hides a swapped pair: its biases are 0 and its gains 1."""
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**{"rope_parameters": {"rope_theta": 1e3, "rope_type": "default"}} | dict(
        vocab_size=V, hidden_size=48, intermediate_size=80, num_hidden_layers=n_layer, max_position_embeddings=64,
        bos_token_id=EOS, eos_token_id=EOS) | fields)
    reference = getattr(transformers, family + "ForCausalLM")(config)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(p + 0.3 * torch.randn_like(p) if p.dim() == 1 else (2 if "embed" in name or "head" in name else 10) * p)
    reference.save_pretrained(folder)
    return reference.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(the reference, its folder, the checkpoint imported from there)"""
    folder = tmp_path_factory.mktemp(request.param)
    family, fields = FAMILIES[request.param]
    return make(folder, family, **fields), folder, load_checkpoint(folder, tokenizer="bytes")


@pytest.mark.parametrize("pattern", PATTERNS, ids="-".join)
def test_logits_are_those_of_transformers_in_every_pattern_and_padding(pair, pattern):
    reference, _, c = pair
    model, S, y = build_model(c).eval(), 7, tokens(3, 12, seed=1)
    for n_inputs, lengths in ((0, None), (S, None), (S, [7, 3, 0])):
        inputs, pad_mask = tokens(3, n_inputs), None if lengths is None else left_padded(lengths, S)
        expected = reference_logits(reference, inputs, y, pattern, pad_mask)
        assert expected.std() > 0.1
        assert (forward(model, inputs, y, pattern, pad_mask)[..., :V] - expected).abs().max() < 1e-4
    whole = tokens(2, 60)  # and without a word about masks and positions
    with torch.no_grad():
        plain = reference(whole).logits
    assert (forward(model, whole[:, :0], whole, ("causal", "causal"))[..., :V] - plain).abs().max() < 1e-4


def test_the_scaling_of_llama_3_is_the_one_of_transformers_and_matters():
    config = transformers.LlamaConfig(head_dim=64, rope_parameters=SCALED | {"rope_theta": 5e5, "factor": 32.0,
                                                                            "original_max_position_embeddings": 8192})
    wanted = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    scaling = {key: config.rope_parameters[key] for key in llama.SCALING}
    found = llama.frequencies(64, 5e5, scaling)
    assert ((found - wanted) / wanted).abs().max() < 1e-5 < (llama.frequencies(64, 5e5, None) / wanted - 1).abs().max()


def test_greedy_continuations_are_those_of_transformers_before_and_after_export(pair, tmp_path):
    reference, _, c = pair
    export(c, tmp_path / "out")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(exported) is type(reference) and exported.config.eos_token_id == exported.config.bos_token_id == EOS
    for seed in range(3):
        prompt = tokens(1, 5, seed=seed)
        fed = F.pad(prompt, (1, 0), value=EOS)
        with torch.no_grad():
            assert (exported(fed).logits[..., :V] - reference(fed).logits).abs().max() < 1e-4
        wanted = reference.generate(fed, attention_mask=torch.ones_like(fed), do_sample=False, max_new_tokens=30,
                                    pad_token_id=0)[0, fed.size(1):].tolist()
        assert continuation(c, prompt, 30) == wanted and (len(set(wanted)) > 2 or wanted == [EOS])


def test_import_export_import_is_bit_identical_and_needs_no_flag(pair, tmp_path):
    _, folder, c = pair
    export(c, tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")
    assert {k: again[k] for k in again if k not in ("model", "history")} == \
           {k: c[k] for k in c if k not in ("model", "history")}
    assert again["model"].keys() == c["model"].keys()
    assert all(torch.equal(again["model"][k], c["model"][k]) for k in c["model"])
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], t[:V] if "embed" in k or "head" in k else t) for k, t in after.items())


@pytest.mark.parametrize("process", [Uniform(258), Absorbing(258), Gaussian(5)], ids=["uniform", "absorbing", "gaussian"])
def test_transfer_keeps_every_tensor_and_the_causal_logits_bit_for_bit(pair, process):
    _, _, c = pair
    after, report = transfer(c, process)
    assert after["shape"] == c["shape"] | {"vector_width": width_of(process)}
    assert all(torch.equal(after["model"][k], c["model"][k]) for k in c["model"])
    assert {name for name, *_, fate in report if fate == "copied"} == c["model"].keys()
    inputs, y, pad_mask = tokens(3, 8), tokens(3, 7, seed=1), left_padded([8, 5, 0], 8)
    logits = [forward(build_model(x).eval(), inputs, y, ("causal", "causal"), pad_mask) for x in (c, after)]
    assert torch.equal(*logits) and logits[0].std() > 0.1


@every_padding
def test_cached_decoding_equals_one_pass(pair, lengths):
    cached, whole, context = cached_and_whole(build_model(pair[2]).eval(), lengths)
    assert (cached - whole).abs().max() < 1e-4
    assert context.keys[0].size(1) == pair[0].config.num_key_value_heads  # few heads are kept, not a copy for each query


@pytest.mark.parametrize("pattern", PATTERNS, ids="-".join)
def test_padding_changes_nothing_and_a_token_moves_the_targets_that_may_see_it(pair, pattern):
    model, S, T = build_model(pair[2]).eval(), 5, 6
    columns = tokens(1, S + T)
    before, moved = forward(model, columns[:, :S], columns[:, S:], pattern), torch.zeros(T, S + T, dtype=torch.bool)
    padded = forward(model, F.pad(columns[:, :S], (9, 0), value=9), columns[:, S:], pattern, left_padded([S], S + 9))
    assert (padded - before).abs().max() < 1e-4
    for j in range(S + T):
        changed = columns.clone()
        changed[0, j] = (changed[0, j] + 1) % V
        moved[:, j] = (forward(model, changed[:, :S], changed[:, S:], pattern) - before)[0].abs().amax(-1) > 1e-5
    assert (moved.numpy() == may_see(*pattern, S, T)[S:]).all()


def test_vectors_come_at_the_scale_of_token_rows(pair):
    model = build_model(transfer(pair[2], Gaussian(5))[0]).eval()
    z = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vectors = model.embed_targets(z, model.encode(tokens(2, 4)))
    assert abs(vectors.square().mean().sqrt() / model.embedding.weight.square().mean().sqrt() - 1) < 0.01
    assert F.cosine_similarity(vectors, z, dim=-1).min() > 0.999


@pytest.mark.parametrize("kind, flags", [("ar", []), ("diff", []), ("diff", ["--process=absorbing", "--shift=false"]),
                                         ("diff", ["--process=gaussian"]), ("diff", ["--inputs_attention=full"])])
def test_training_starts_from_these_weights_and_the_loss_falls(train, pair, tmp_path, kind, flags):
    size = "--size=" + "x".join(str(pair[2]["shape"][key]) for key in ("n_layer", "width", "n_head"))
    run = train(kind, tmp_path / "x", f"--init_from={pair[1]}", size, "--steps=16", "--lr=3e-3", "--warmup=1", *flags)
    losses, now = [line["loss"] for line in run.log() if "lr" in line], run.checkpoint()
    assert sum(losses[-4:]) < sum(losses[:4]) and build_model(now).shape == now["shape"]
    assert now["process"].get("shift") == (LINE_END if kind == "diff" and "--shift=false" not in flags else None)
    assert kind == "ar" or now["process"]["inputs_attention"] == ("full" if "--inputs_attention=full" in flags else "causal")
    assert tokenizer_of(now).name == "bytes"


@pytest.mark.parametrize("kind", ["ar", "diff"])
def test_the_default_rate_is_lower_from_published_weights_and_known_on_resume(train, pair, ar_run, tmp_path, kind):
    size = "--size=" + "x".join(str(pair[2]["shape"][key]) for key in ("n_layer", "width", "n_head"))
    flags = [f"--init_from={pair[1]}", size, "--warmup=0", "--schedule=constant"]
    train(kind, tmp_path / "x", *flags, "--steps=1")
    resumed = train(kind, tmp_path / "x", *flags, "--steps=2", "--resume")
    own = train(kind, tmp_path / "own", f"--init_from={ar_run.folder}", *flags[2:], "--steps=1")
    assert [line["lr"] for run in (resumed, own) for line in run.log() if "lr" in line] == [3e-4, 3e-4, 1e-3]


@pytest.mark.parametrize("change, message", [
    (dict(model_type="gemma"), "a model of type 'gemma'; known are gpt2, llama, qwen2, qwen3"),
    (dict(hidden_act="gelu", mlp_bias=True), "a llama has hidden_act=silu, not gelu, mlp_bias=False, not True"),
    (dict(attention_multiplier=0.5, final_logit_softcapping=30.0), "attention_multiplier=0.5, final_logit_softcapping=30.0"),
    (dict(quantization_config={"bits": 4}), "its config says quantization_config"),
    (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "rope_type='yarn' is not one of default, llama3"),
    (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "'factor' is missing"),
    (dict(rope_parameters=dict.fromkeys(llama.SCALING, "8") | {"rope_type": "llama3", "rope_theta": 1e4}),
     "'factor' must be a number above 0, not 8"),
    (dict(num_hidden_layers=None), "'num_hidden_layers' is missing"),
    (dict(num_attention_heads="4"), "'num_attention_heads' must be a whole number, 1 or more, not 4"),
    (dict(head_dim="12"), "'head_dim' must be a whole number"),
    (dict(rms_norm_eps="1e-5"), "'rms_norm_eps' must be a number"),
    (dict(hidden_size=-48), "'hidden_size' must be .*, not -48"), (dict(num_hidden_layers=2.0), "must be a whole number"),
    (dict(rope_parameters="x"), "describe no model"), (dict(model_type=["llama"]), "'model_type' must be a string"),
    (dict(ar2diff_process="uniform"), "'ar2diff_process' must be an object"),
    (dict(ar2diff_canvas=["a", "b"]), "'ar2diff_canvas' must be two whole numbers"),
    (dict(ar2diff_canvas=5), "'ar2diff_canvas' must be two whole numbers"),
    (dict(num_key_value_heads=3), "no such shape: .*'n_kv_head': 3"), (dict(num_hidden_layers=1 << 29), "no such shape"),
    (dict(hidden_size=64, num_attention_heads=4), "does not hold a llama of 2 layers and width 64: .* of another shape"),
    (dict(num_hidden_layers=3), r"3 layers and width 48: 9 missing \(model.layers.2.input_layernorm.weight, "),
    (dict(num_hidden_layers=1), r"9 unexpected \(model.layers.1."),
    (dict(layer_types=["sliding_attention", "full_attention"]), "layer_types="),
    (dict(model_type="qwen2"), r"6 missing \(model.layers.0.self_attn.k_proj.bias, "),
    (dict(tie_word_embeddings=False), r"1 missing \(lm_head.weight\)$"),
])
def test_a_config_of_another_model_is_refused(tmp_path, change, message):
    make(tmp_path, *FAMILIES["llama"][:1], **FAMILIES["llama"][1])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(tmp_path, tokenizer="bytes")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_old_and_new_spellings_of_the_rope_are_the_same(tmp_path):
    make(tmp_path, *FAMILIES["llama3"][:1], **FAMILIES["llama3"][1])
    new = load_checkpoint(tmp_path, tokenizer="bytes")["shape"]
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}))
    assert load_checkpoint(tmp_path, tokenizer="bytes")["shape"] == new and new["base"] == 5e5
    assert new["scaling"] == {key: SCALED[key] for key in llama.SCALING}


@pytest.mark.slow
def test_the_compiler_traces_the_same_logits(pair):
    model, inputs, y = build_model(pair[2]).eval(), tokens(2, 6), tokens(2, 5)
    pad_mask, pattern = left_padded([6, 3], 6), ("bidirectional", "bidirectional")
    eager = forward(model, inputs, y, pattern, pad_mask)
    torch._dynamo.reset()
    model.encode = torch.compile(model.encode, backend="aot_eager", fullgraph=True)
    model.decode = torch.compile(model.decode, backend="aot_eager", fullgraph=True)
    assert (forward(model, inputs, y, pattern, pad_mask) - eager).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["ar", "diff"])
def test_bfloat16_trains_without_a_warning(train, pair, tmp_path, recwarn, kind):
    size = "--size=" + "x".join(str(pair[2]["shape"][key]) for key in ("n_layer", "width", "n_head"))
    flags = [f"--init_from={pair[1]}", size, "--steps=8", "--lr=3e-3", "--warmup=1", "--dtype=bfloat16"]
    run = train(kind, tmp_path / "x", *flags)
    losses = [line["loss"] for line in run.log() if "lr" in line]
    assert sum(losses[-3:]) < sum(losses[:3]) and not [w for w in recwarn if "dtype" in str(w.message)]


def test_an_encoder_decoder_of_this_flavour_is_refused():
    with pytest.raises(UserError, match="decoder-only"):
        llama.Llama(V, 1, 16, 2, architecture="encoder-decoder")
