"""pretrained/gpt2.py against the reference library, transformers: import, export, every attention pattern on random models."""
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers  # its parts are imported where they are named: 3 s that a process without these tests need not wait
from safetensors.torch import load_file, save_file

import ar2diff
import eval as eval_script
import sample
from ar2diff import transfer
from autoregressive import cross_entropy
from conftest import width_of
from data.dataset import Batch, open_data
from diffusion import Absorbing, Gaussian, Uniform
from engine.checkpoint import save_checkpoint
from engine.cli import UserError
from engine.noise import Noise
from pretrained import gpt2
from pretrained.loading import build_model, load_checkpoint, process_of, tokenizer_of
from pretrained.published import export
from pretrained.published import main as export_main
from test_model import PATTERNS, left_padded, may_see

V, EOS, POSITIONS, LINE_END = 257, 256, 48, 10  # text tokens and EOS of the tokenizer `bytes`
SHAPES = [(2, 48, 3), (1, 32, 4), (3, 64, 1), (2, 128, 2)]  # layers, width, heads
SIZE = "--size=2x48x3"  # of the fixture `small`: conftest's flags name another
VECTORS = {"noisy.table.weight", "noisy.vectors_in.weight", "noisy.level_in.weight"}


def make(folder, shape, seed=0):
    """Save a random GPT-2 by transformers. Its own start has biases of 0 and gains of 1, which would hide a swapped pair."""
    torch.manual_seed(seed)
    n_layer, width, n_head = shape
    config = transformers.GPT2Config(vocab_size=V, n_positions=POSITIONS, n_layer=n_layer, n_embd=width, n_head=n_head,
                                     bos_token_id=EOS, eos_token_id=EOS)
    reference = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, p in reference.named_parameters():  # and matrices large enough that it does more than echo what it is fed
            p.copy_(p + 0.3 * torch.randn_like(p) if p.dim() == 1 else (2 if "wte" in name else 10) * p)
    reference.save_pretrained(folder)
    return reference.eval()


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def pair(request, tmp_path_factory):
    """(the reference, its folder, the checkpoint imported from there)"""
    folder = tmp_path_factory.mktemp("gpt2")
    reference = make(folder, request.param)
    return reference, folder, load_checkpoint(folder, tokenizer="bytes")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The same, of one shape."""
    folder = tmp_path_factory.mktemp("small")
    return make(folder, SHAPES[0], seed=1), folder, load_checkpoint(folder, tokenizer="bytes")


def tokens(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def reference_logits(reference, inputs, y, pattern, pad_mask=None):
    """Return the targets' logits of one joint pass of transformers under an explicit mask, at explicit positions."""
    S, L = inputs.size(1), inputs.size(1) + y.size(1)
    seen, positions = torch.from_numpy(may_see(*pattern, S, L - S))[None], torch.arange(L)[None]
    if pad_mask is not None:
        seen = seen & ~F.pad(pad_mask, (0, L - S))[:, None] | torch.eye(L, dtype=torch.bool)
        positions = torch.stack([torch.cat((torch.zeros(n), torch.arange(L - n))) for n in pad_mask.sum(1).tolist()]).long()
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min).expand(len(y), -1, -1)[:, None]
    with torch.no_grad():
        return reference(torch.cat((inputs, y), dim=1), attention_mask=mask, position_ids=positions).logits[:, S:]


@torch.no_grad()
def forward(model, inputs, y, pattern, pad_mask=None):
    return model.decode(y, model.encode(inputs, pad_mask, pattern[0]), pattern[1])


# ---- the same function as the reference ----

@pytest.mark.parametrize("pattern", PATTERNS, ids="-".join)
def test_logits_are_those_of_transformers_in_every_pattern_and_padding(pair, pattern):
    reference, _, c = pair
    model, S, y = build_model(c).eval(), 7, tokens(3, 6, seed=1)
    for n_inputs, lengths in ((0, None), (S, None), (S, [7, 3, 0])):
        inputs, pad_mask = tokens(3, n_inputs), None if lengths is None else left_padded(lengths, S)
        expected = reference_logits(reference, inputs, y, pattern, pad_mask)
        found = forward(model, inputs, y, pattern, pad_mask)
        assert expected.std() > 0.1
        assert (found[..., :V] - expected).abs().max() < 1e-5
    whole = torch.cat((tokens(3, S), y), dim=1)  # and without a word about masks and positions
    with torch.no_grad():
        plain = reference(whole).logits
    assert (forward(model, whole[:, :0], whole, ("causal", "causal"))[..., :V] - plain).abs().max() < 1e-5


def continuation(c, prompt, n):
    """Return up to n greedy tokens, as sample.py writes them: cached, EOS the last."""
    model, empty, pad = build_model(c).eval(), torch.zeros(1, n, dtype=torch.long), tokenizer_of(c).pad
    *_, draft = process_of(c).generate(model, Batch(empty[:, :0], None, empty), Noise(0, "generate", 0, [0]), prefix=prompt)
    return [i for i in draft[0].tolist() if i != pad]


def test_greedy_continuations_are_those_of_transformers_before_and_after_export(pair, tmp_path):
    reference, _, c = pair
    export(c, tmp_path / "out")
    exported = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert exported.config.vocab_size == 384 and exported.config.eos_token_id == exported.config.bos_token_id == EOS
    for seed in range(4):
        prompt = tokens(1, 5, seed=seed)
        fed = F.pad(prompt, (1, 0), value=EOS)  # what precedes every text of GPT-2's training
        with torch.no_grad():
            assert (exported(fed).logits[..., :V] - reference(fed).logits).abs().max() < 1e-5
        wanted, again = (m.generate(fed, attention_mask=torch.ones_like(fed), do_sample=False, max_new_tokens=30,
                                    pad_token_id=0)[0, fed.size(1):].tolist() for m in (reference, exported))
        assert continuation(c, prompt, 30) == wanted == again
        assert len(set(wanted)) > 2


def test_import_export_import_is_bit_identical_and_needs_no_flag(pair, tmp_path):
    _, folder, c = pair
    export(c, tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")  # the tokenizer is told by config.json
    assert {k: again[k] for k in again if k not in ("model", "history")} == \
           {k: c[k] for k in c if k not in ("model", "history")}
    assert again["model"].keys() == c["model"].keys()
    assert all(torch.equal(again["model"][k], c["model"][k]) for k in c["model"])
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {k.removeprefix("transformer.") for k in before} - {"lm_head.weight"} == after.keys()
    assert all(torch.equal(before[f"transformer.{k}"], t[:V] if k == "wte.weight" else t) for k, t in after.items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("process", [Uniform(258), Absorbing(258), Gaussian(5)], ids=["uniform", "absorbing", "gaussian"])
def test_transfer_keeps_every_tensor_and_the_causal_logits_bit_for_bit(pair, process):
    _, _, c = pair
    after, report = transfer(c, process)
    assert after["shape"] == c["shape"] | {"vector_width": width_of(process)} and after["history"] == c["history"]
    assert all(torch.equal(after["model"][k], c["model"][k]) for k in c["model"])
    assert after["model"].keys() - c["model"].keys() == (VECTORS if width_of(process) else set())
    assert {name for name, *_, fate in report if fate == "copied"} == c["model"].keys()
    inputs, y, pad_mask = tokens(3, 8), tokens(3, 7, seed=1), left_padded([8, 5, 0], 8)
    logits = [forward(build_model(x).eval(), inputs, y, ("causal", "causal"), pad_mask) for x in (c, after)]
    assert torch.equal(*logits) and logits[0].std() > 0.1


# ---- positions, padding, cache ----

@pytest.mark.parametrize("pattern", PATTERNS, ids="-".join)
def test_the_amount_of_padding_changes_nothing(small, pattern):
    model, inputs, y = build_model(small[2]).eval(), tokens(2, 6), tokens(2, 5, seed=1)
    plain = forward(model, inputs, y, pattern)
    for n_pad in (1, 4, 20):
        padded, pad_mask = F.pad(inputs, (n_pad, 0), value=9), left_padded([6, 6], 6 + n_pad)
        assert (forward(model, padded, y, pattern, pad_mask) - plain).abs().max() < 1e-5
    ragged = left_padded([6, 4], 6)  # each row by its own amount
    alone = forward(model, inputs[1:, 2:], y[1:], pattern)
    assert (forward(model, inputs, y, pattern, ragged)[1:] - alone).abs().max() < 1e-5
    empty = forward(model, inputs, y, pattern, left_padded([6, 0], 6))[1:]
    assert (empty - forward(model, inputs[1:, :0], y[1:], pattern)).abs().max() < 1e-5


def cached_and_whole(model, lengths):
    """Return the logits of some targets in several calls, each row twice, those in one call, and the context."""
    y = tokens(3, 7, seed=1)
    inputs, pad_mask = tokens(3, 0 if lengths == [] else 6), left_padded(lengths, 6) if lengths else None
    whole = forward(model, inputs, y, ("causal", "causal"), pad_mask)
    context = model.encode(inputs, pad_mask).repeat(2)
    with torch.no_grad():
        cached = torch.cat([model.decode(part.repeat_interleave(2, dim=0), context, "causal", extend=True)
                            for part in y.split((1, 1, 3, 2), dim=1)], dim=1)
    return cached, whole.repeat_interleave(2, dim=0), context


every_padding = pytest.mark.parametrize("lengths", [None, [6, 2, 0], []], ids=["unpadded", "padded", "no inputs"])


@every_padding
def test_cached_decoding_equals_one_pass(small, lengths):
    cached, whole, _ = cached_and_whole(build_model(small[2]).eval(), lengths)
    assert (cached - whole).abs().max() < 1e-5


@pytest.mark.parametrize("pattern", PATTERNS, ids="-".join)
def test_a_changed_token_moves_exactly_the_targets_that_may_see_it(small, pattern):
    model, S, T = build_model(small[2]).eval(), 5, 6
    columns = tokens(1, S + T)
    before, moved = forward(model, columns[:, :S], columns[:, S:], pattern), torch.zeros(T, S + T, dtype=torch.bool)
    for j in range(S + T):
        changed = columns.clone()
        changed[0, j] = (changed[0, j] + 1) % V
        after = forward(model, changed[:, :S], changed[:, S:], pattern)
        moved[:, j] = (after - before)[0].abs().amax(-1) > 1e-6
    assert (moved.numpy() == may_see(*pattern, S, T)[S:]).all()


@pytest.mark.parametrize("n_layer, width, n_params", [(12, 768, 124_439_808), (24, 1024, 354_823_168), (36, 1280, 774_030_080),
                                                      (48, 1600, 1_557_611_200)])
def test_the_four_sizes_have_the_number_of_parameters_that_the_reference_gives_them(n_layer, width, n_params):
    with torch.device("meta"):
        reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=n_layer, n_embd=width, n_head=width // 64))
        assert gpt2.GPT2(50257, n_layer, width, width // 64).n_params() == reference.num_parameters() == n_params


def test_more_columns_than_positions_are_refused_by_number(small):
    model = build_model(small[2]).eval()
    forward(model, tokens(1, 20), tokens(1, POSITIONS - 20), ("causal", "causal"))
    for inputs_attention in ("causal", "full"):
        with pytest.raises(UserError, match="49 columns of inputs and targets, but this model has 48 positions"):
            forward(model, tokens(1, 20), tokens(1, POSITIONS - 19), (inputs_attention, "bidirectional"))
    with pytest.raises(UserError, match="50 columns"):
        model.encode(tokens(1, 50))
    context = model.encode(tokens(1, 0))
    with torch.no_grad(), pytest.raises(UserError, match="49 columns"):
        for _ in range(POSITIONS + 1):
            model.decode(tokens(1, 1), context, "causal", extend=True)


def test_vectors_come_at_the_scale_of_token_rows_whatever_their_own(small):
    model = build_model(transfer(small[2], Gaussian(5))[0]).eval()
    z, context = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(0)), model.encode(tokens(2, 4))
    with torch.no_grad():
        vectors = model.embed_targets(z, context) - model.positions.weight[4:10]
        assert abs(vectors.square().mean().sqrt() / model.embedding.weight.square().mean().sqrt() - 1) < 0.01
        assert F.cosine_similarity(vectors, z, dim=-1).min() > 0.999
        logits = model.decode(z, context, "bidirectional")
        assert (model.decode(100 * z, context, "bidirectional") - logits).abs().max() < 1e-4
    assert torch.isfinite(logits).all()


def test_an_encoder_decoder_of_this_flavour_is_refused():
    with pytest.raises(UserError, match="decoder-only"):
        gpt2.GPT2(V, 1, 16, 2, architecture="encoder-decoder")


@pytest.mark.slow
def test_the_compiler_traces_the_same_logits(small):
    model, inputs, y = build_model(small[2]).eval(), tokens(2, 6), tokens(2, 5)
    pad_mask, pattern = left_padded([6, 3], 6), ("bidirectional", "bidirectional")
    eager = forward(model, inputs, y, pattern, pad_mask)
    torch._dynamo.reset()
    model.encode = torch.compile(model.encode, backend="aot_eager", fullgraph=True)
    model.decode = torch.compile(model.decode, backend="aot_eager", fullgraph=True)
    assert (forward(model, inputs, y, pattern, pad_mask) - eager).abs().max() < 1e-5


# ---- the imported checkpoint ----

def test_new_rows_are_near_the_mean_take_little_probability_and_are_the_same_every_time(pair):
    reference, folder, c = pair
    rows, old = c["model"]["embedding.weight"], reference.transformer.wte.weight.detach()
    assert rows.shape == (384, old.size(1)) and torch.equal(rows[:V], old)
    assert torch.equal(rows, load_checkpoint(folder, tokenizer="bytes")["model"]["embedding.weight"])
    distance = rows[V + 1:] - old.mean(dim=0)  # all but PAD
    assert 0 < distance.std() < 0.02 * old.std() and len({tuple(row) for row in rows[V:].tolist()}) == 384 - V
    logits = forward(build_model(c).eval(), tokens(2, 0), tokens(2, 40), ("causal", "causal"))
    assert logits.softmax(-1)[..., V + 1:].sum(-1).max() < (383 - V) / 384 * 1.1  # Jensen: no more than the average token


def test_padding_as_end_of_text_costs_less_than_as_the_mean(tmp_path):
    """Why PAD's row is no mean: a model that has learned documents with an EOS between them finds PAD far likelier so."""
    make(tmp_path, (2, 48, 3))
    c, rng = load_checkpoint(tmp_path, tokenizer="bytes"), torch.Generator().manual_seed(0)
    model, ar = build_model(c), process_of(c)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    document = lambda: torch.tensor([*b"the cat"[:int(torch.randint(3, 8, (), generator=rng))], EOS])
    for _ in range(60):
        x0 = torch.stack([torch.cat([document() for _ in range(12)])[:40] for _ in range(8)])
        ar.loss(model, Batch(x0[:, :0], None, x0), None).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = model.state_dict()["embedding.weight"]
    padded = F.pad(torch.stack([torch.tensor([*b"the cat", EOS])] * 4), (0, 12), value=EOS + 1)
    loss = {}
    for name, row in (("mean", rows[:V].mean(dim=0)), ("eos", 0.9 * rows[EOS] + 0.1 * rows[:V].mean(dim=0))):
        rows[EOS + 1] = row
        with torch.no_grad():
            loss[name] = ar.loss(model.eval(), Batch(padded[:, :0], None, padded), None).total
    assert loss["eos"] < loss["mean"] - 1


def test_the_checkpoint_says_what_it_is(small):
    _, folder, c = small
    tokenizer = tokenizer_of(c)
    assert (c["step"], c["input_len"], c["target_len"]) == (0, 0, POSITIONS // 2)
    assert c["process"] == dict(name="ar", start=tokenizer.eos, eos=EOS, pad=EOS + 1, inputs_attention="causal")
    assert c["shape"]["flavour"] == "gpt2" and build_model(c).shape == c["shape"]
    assert len(c["history"]) == 1 and str(folder) in c["history"][0]


@pytest.mark.parametrize("change", [
    lambda t, c: {f"transformer.{k}": v for k, v in t.items()},
    lambda t, c: t | {"lm_head.weight": t["wte.weight"].clone()},
    lambda t, c: t | {f"h.{i}.attn.{name}": torch.ones(1, 1, 4, 4) for i in range(2) for name in ("bias", "masked_bias")},
    lambda t, c: {k: v.double() for k, v in t.items()},
], ids=["prefix", "lm_head", "buffers", "dtype"])
def test_every_published_variant_is_the_same_model(tmp_path, change):
    reference = make(tmp_path / "a", SHAPES[3], seed=2)  # heads of 64, as the published sizes have
    tensors = {k.removeprefix("transformer."): t for k, t in load_file(tmp_path / "a" / "model.safetensors").items()}
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "b").mkdir()
    save_file(change(tensors, config), tmp_path / "b" / "x.safetensors")
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    model = build_model(load_checkpoint(tmp_path / "b" / "x.safetensors", tokenizer="bytes")).eval()
    y = tokens(2, 20)
    with torch.no_grad():
        assert (forward(model, y[:, :0], y, ("causal", "causal"))[..., :V] - reference(y).logits).abs().max() < 1e-5


def test_half_precision_files_are_read_as_float32(small, tmp_path):
    half = {k: t.half() for k, t in load_file(small[1] / "model.safetensors").items()}
    save_file(half, tmp_path / "model.safetensors")
    shutil.copy(small[1] / "config.json", tmp_path)
    model = load_checkpoint(tmp_path, tokenizer="bytes")["model"]
    assert all(t.dtype == torch.float32 for t in model.values())
    assert torch.equal(model["positions.weight"], half["transformer.wpe.weight"].float())


# ---- the scripts ----

def lines_of(run):
    return [line["loss"] for line in run.log() if "lr" in line]


@pytest.mark.parametrize("kind, flags", [("ar", []), ("diff", []), ("diff", ["--process=absorbing"]),
                                         ("diff", ["--process=gaussian"]), ("diff", ["--inputs_attention=full"])])
def test_training_starts_from_these_weights_and_the_loss_falls(train, small, task, tmp_path, capsys, kind, flags):
    reference, folder, c = small
    run = train(kind, tmp_path / "x", f"--init_from={folder}", SIZE, "--steps=2", "--lr=3e-3", "--warmup=1", *flags)
    assert ("AR2Diff" in capsys.readouterr().out) == (kind == "diff")
    losses, now = lines_of(run), run.checkpoint()
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and losses[1] < losses[0]
    assert now["shape"] == c["shape"] | {"vector_width": now["shape"]["vector_width"]} and now["history"] == c["history"]
    assert build_model(now).shape["flavour"] == "gpt2"
    if kind == "ar":  # the first loss, by transformers
        batch = open_data(task, tokenizer_of(c), 8, 7).train_batch(0, 0, range(8), 8)
        known, targets = batch.inputs.clamp(max=V - 1), batch.targets  # PAD ids, which transformers lacks, are masked
        fed = F.pad(targets[:, :-1], (1, 0), value=LINE_END)
        model = transformers.GPT2LMHeadModel.from_pretrained(exported(c, tmp_path / "reference")).eval()
        logits = reference_logits(model, known, fed, ("causal", "causal"), batch.pad_mask)
        assert abs(losses[0] - cross_entropy(logits, targets).mean()) < 1e-5
        assert process_of(now) == replace(process_of(c), start=LINE_END)


def exported(c, folder):
    export(c, folder)
    return folder


def test_shift_knows_that_these_weights_start_from_a_line_end_behind_inputs(train, small, tmp_path):
    folder = small[1]
    run = train("diff", tmp_path / "x", f"--init_from={folder}", SIZE, "--shift", "--steps=2")
    assert process_of(run.checkpoint()).shift == LINE_END
    on = train("diff", tmp_path / "x", f"--init_from={folder}", SIZE, "--shift", "--steps=3", "--resume")
    assert process_of(on.checkpoint()).shift == LINE_END
    converted = train("diff", tmp_path / "converted", f"--init_from={folder}", SIZE, "--steps=1")  # forgets that it was AR
    on = train("diff", tmp_path / "y", f"--init_from={converted.folder}", "--shift", SIZE, "--steps=1")
    assert process_of(on.checkpoint()).shift == LINE_END


def test_what_was_trained_resumes_and_goes_back_to_transformers(train, small, tmp_path, capsys):
    flags = [f"--init_from={small[1]}", SIZE, "--eval_every=2"]
    straight = train("ar", tmp_path / "a", *flags, "--steps=4", "--schedule=constant")
    train("ar", tmp_path / "b", *flags, "--steps=2", "--schedule=constant")
    resumed = train("ar", tmp_path / "b", *flags, "--steps=4", "--schedule=constant", "--resume")
    one, two = straight.checkpoint()["model"], resumed.checkpoint()["model"]
    assert all(torch.equal(one[k], two[k]) for k in one)
    export_main([str(resumed.folder), str(tmp_path / "out")])
    assert "'bytes'" in capsys.readouterr().out
    reference, y = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval(), tokens(2, 20)
    with torch.no_grad():
        plain = reference(y).logits
    assert (forward(build_model(resumed.checkpoint()).eval(), y[:, :0], y, ("causal", "causal")) - plain).abs().max() < 1e-5


def test_the_other_scripts_open_such_a_folder(small, text, tmp_path, capsys):
    folder = str(exported(small[2], tmp_path / "in"))  # it names its tokenizer; these scripts have no flag for it
    sample.main([folder, "--prompt=ab", "--target_len=8"])
    assert capsys.readouterr().out.startswith("ab")
    result, = eval_script.main([folder, f"--data={text}", "--metric=bits", "--n_examples=4"])
    assert 0 < result["per_token"][0] < 100 and folder in result["lineage"][0]
    ar2diff.main([folder, str(tmp_path / "converted")])
    assert "bit-identical" in capsys.readouterr().out
    made = load_checkpoint(tmp_path / "converted")
    assert process_of(made) == Uniform(258, inputs_attention="causal", shift=EOS)
    assert build_model(made).shape["flavour"] == "gpt2"
    sample.main([str(tmp_path / "converted"), "--prompt=", "--n_samples=2", "--n_steps=2"])


# ---- what is refused, in one line ----

def refused(match, call, *args, **options):
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, message", [
    (lambda t: {k: v for k, v in t.items() if ".mlp." not in k},
     r"gpt2 of 2 layers and width 48: 8 missing \(h.0.mlp.c_fc.bias, h.0.mlp.c_fc.weight, h.0.mlp.c_proj.bias, \.\.\.\)$"),
    (lambda t: t | {"h.0.extra.weight": torch.ones(1)}, r"1 unexpected \(h.0.extra.weight\)$"),
    (lambda t: t | {"h.1.attn.c_attn.weight": t["h.1.attn.c_attn.weight"].T.contiguous(), "ln_f.bias": torch.ones(3)},
     r"2 of another shape \(h.1.attn.c_attn.weight, ln_f.bias\)$"),
    (lambda t: {k.replace("h.1.", "h.5."): v for k, v in t.items()}, r"12 missing \(h.1.*\); 12 unexpected \(h.5"),
    (lambda t: {k: v for k, v in t.items() if k[:3] != "wpe"}, r"1 missing \(wpe.weight\)$"),
    (lambda t: t | {"lm_head.weight": t["wte.weight"] + 1}, "lm_head.weight is not tied"),
    (lambda t: {k: v for k, v in t.items() if k[0] != "h"}, "24 missing"),
    (lambda t: t | {"wte.weight": t["wte.weight"][:99]}, r"\(99 tokens\).*tokenizer 'bytes' \(256 and EOS\).*--tokenizer"),
])
def test_tensors_that_do_not_fit_are_listed(small, tmp_path, change, message):
    tensors = {k.removeprefix("transformer."): t for k, t in load_file(small[1] / "model.safetensors").items()}
    save_file({k: t.clone() for k, t in change(tensors).items()}, tmp_path / "model.safetensors")
    shutil.copy(small[1] / "config.json", tmp_path)
    refused(message, load_checkpoint, tmp_path, tokenizer="bytes")


@pytest.mark.parametrize("config, message", [
    ("{", "config.json: not JSON .Expecting"), ("[]", "an object with 'model_type' is needed, not a list"),
    ("{}", "config.json: 'model_type' is missing"), ('{"model_type": "gpt2"}', "'n_layer' is missing"),
    (dict(n_head=5), "no such shape: .*'n_head': 5"),
    (dict(n_head="3"), "'n_head' must be a whole number"), (dict(n_head=2.5), "'n_head' must be a whole number"),
    (dict(n_embd=64, n_head=4), "does not hold a gpt2 of 2 layers and width 64: .* of another shape"),
    (dict(n_head=3, n_layer=1 << 19), "no such shape"), (dict(n_head=3, n_layer=3), r"12 missing \(h.2"),
    (dict(n_head=3, activation_function="relu"), "activation_function=gelu_new, not relu"),
    (dict(n_head=3, scale_attn_by_inverse_layer_idx=True), "a gpt2 has scale_attn_by_inverse_layer_idx=False, not True"),
    (dict(n_head=3, model_type="gpt_neo"), "a model of type 'gpt_neo'; known are gpt2, llama, qwen2, qwen3"),
    (dict(n_head=3, attention_sink=4), "its config says attention_sink=4, which is not known here"),
    (dict(n_head=3, ar2diff_tokenizer={"name": "bytes", "hash": "0"}), "not trained with the tokenizer 'bytes'"),
    (dict(n_head=3, ar2diff_tokenizer={"name": "bytes"}), "'ar2diff_tokenizer' must be a name and a hash"),
])
def test_a_config_of_another_model_is_refused(small, tmp_path, config, message):
    shutil.copy(small[1] / "model.safetensors", tmp_path)
    whole = {"model_type": "gpt2", "n_layer": 2, "n_embd": 48, "n_positions": POSITIONS}
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(whole | config))
    refused(message, load_checkpoint, tmp_path, tokenizer="bytes")


def test_damaged_files_another_tokenizer_and_a_missing_library_are_named(small, tmp_path, monkeypatch):
    whole = (small[1] / "model.safetensors").read_bytes()
    (tmp_path / "alone.safetensors").write_bytes(whole)
    refused("config.json: No such file", load_checkpoint, tmp_path / "alone.safetensors", tokenizer="bytes")
    shutil.copy(small[1] / "config.json", tmp_path)
    for name, content in (("cut", whole[:-100]), ("page", b"<html>please log in</html>"), ("empty", b"")):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        refused(f"{name}.safetensors is truncated or no safetensors file", load_checkpoint, path, tokenizer="bytes")
    refused("was not trained with the tokenizer 'bpe'", load_checkpoint, small[1], tokenizer="bpe")
    refused("did you mean 'bytes'", load_checkpoint, small[1], tokenizer="byte")
    refused("no checkpoint at .*gpt2-huge; .* or the name smollm2", load_checkpoint, tmp_path / "gpt2-huge")
    refused("no checkpoint at gpt2; ", load_checkpoint, "gpt2")  # which names a tokenizer alone


def test_flags_that_do_not_fit_this_flavour_are_refused_before_anything_is_written(train, small, task, tmp_path):
    for flags, message in (
            (["--target_len=41"], "--input_len and --target_len make (49|50) columns, this model has 48 positions"),
            (["--architecture=encoder-decoder"], "--architecture=encoder-decoder differs"),
            (["--size=tiny"], "differs from the checkpoint's 2x48x3"),
            (["--tokenizer=bpe"], "not trained with the tokenizer 'bpe'")):
        for kind in ("ar", "diff"):
            refused(message, train, kind, tmp_path / "x", f"--init_from={small[1]}", SIZE, *flags)
    folder = str(exported(small[2], tmp_path / "in"))
    refused("3 columns of prompt and 46 to write are more than this model's 48 positions", sample.main,
            [folder, "--prompt=abc", "--target_len=46"])
    refused("was trained elsewhere; name the data", eval_script.main, [folder, "--metric=bits"])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_only_what_the_format_can_hold_is_exported(train, small, ar_run, tmp_path):
    c = small[2]
    ar, gaussian, both_ways = (tmp_path / f"{name}.pt" for name in "adb")
    save_checkpoint(ar, c)
    save_checkpoint(gaussian, transfer(c, Gaussian(5))[0])
    save_checkpoint(both_ways, c | {"input_len": 8, "process": c["process"] | {"inputs_attention": "bidirectional"}})
    there = tmp_path / "there"
    there.mkdir()
    for words, message in (([ar_run.folder, "new"], "not of the gpt2 or llama flavour"),
                           ([gaussian, "new"], "new tensors have no place"), ([both_ways, "new"], "both ways"),
                           ([small[1], "new"], "no checkpoint at .*ckpt.pt"),
                           ([ar, there], "there exists; it is not overwritten"),
                           ([ar, gaussian / "new"], "cannot prepare")):
        refused(message, export_main, [str(tmp_path / word) for word in words])
    assert not list(there.iterdir()) and not (tmp_path / "new").exists()
