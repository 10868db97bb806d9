"""The encoder-decoder where it differs: a case by hand, rows without inputs, what the encoder may see and how often it runs;
then the scripts. What both architectures share is tested for both where it belongs: test_model.py and others."""
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

import ar2diff
import eval as evaluation
import sample
from autoregressive import Autoregressive
from conftest import EOS, MASK, PAD, V, ragged_batch, train_noise, width_of
from diffusion import Absorbing, Gaussian, Uniform
from engine.cli import UserError
from engine.noise import Noise
from model import Transformer
from pretrained.loading import process_of

AR, FEW = Autoregressive(MASK, EOS, PAD, "bidirectional"), ["--steps=2", "--eval_sequences=2"]
PROCESSES = [Uniform(11), Absorbing(MASK), Gaussian(8, self_condition=1.0)]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.name)


def small_model(vector_width=0):
    torch.manual_seed(0)
    return Transformer(V, 2, 16, 2, "encoder-decoder", vector_width).eval()


# ---- the model ----

@torch.no_grad()
def test_one_layer_by_hand_is_the_softmax_average_of_the_encoders_output():
    """Width 2, one head: all vectors have length sqrt 2 and are told by their angle; position p turns queries and keys by p."""
    angles = torch.tensor([0.0, 2.0, 1 + math.pi / 2])  # of tokens 0, 1, 2
    at = lambda angle: math.sqrt(2) * torch.stack((angle.cos(), angle.sin()), dim=-1)
    model = Transformer(3, 1, 2, 1, "encoder-decoder").eval()
    model.embedding.weight.copy_(at(angles) / 10)
    for block in (*model.encoder, *model.blocks):  # only cross-attention does anything, and it copies
        block.attention_out.weight.zero_()
        block.mlp_out.weight.zero_()
    for linear, copies in ((model.blocks[0].cross.q, 1), (model.blocks[0].cross.kv, 2), (model.blocks[0].cross.out, 1)):
        linear.weight.copy_(torch.eye(2).repeat(copies, 1))
    seen = []
    model.blocks[0].register_forward_hook(lambda module, args, result: seen.append(result[0][:, 0]))
    inputs, pad_mask = torch.tensor([[2, 1, 2], [0, 1, 2]]), torch.tensor([[True, False, False], [True, True, True]])
    model.decode(torch.zeros(2, 1, dtype=torch.long), model.encode(inputs, pad_mask, "causal"), "causal")
    # The target is (sqrt 2, 0) + (cos 0, sin 0): angle 0. Token 1 at -2 has angle 0 as well: score 2 / sqrt 2, so a weight of
    # e^1.4142 / (e^1.4142 + 1) = 0.8044. Token 2 at -1 stands at a right angle: score 0, weight 0.1956.
    expected = torch.tensor([2.4142, 0.0]) + 0.8044 * at(angles[1]) + 0.1956 * at(angles[2])
    assert (expected - torch.tensor([1.7081, 1.1839])).abs().max() < 2e-4
    assert (seen[0][0] - expected).abs().max() < 2e-4
    assert (seen[0][1] - torch.tensor([2.4142, 0.0])).abs().max() < 1e-4, "without inputs there is nothing to attend to"


@pytest.mark.parametrize("inputs_attention", ["causal", "bidirectional"])
def test_a_row_without_inputs_takes_nothing_from_its_padding_and_gives_finite_gradients(inputs_attention, monkeypatch):
    model, batch, attend, masks = small_model(), ragged_batch(lengths=(0, 3, 0, 1)), F.scaled_dot_product_attention, []
    spy = lambda *args, **kw: masks.append(kw.get("attn_mask")) or attend(*args, **kw)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    run = lambda inputs: model.decode(batch.targets, model.encode(inputs, batch.pad_mask, inputs_attention), "bidirectional")
    logits = run(batch.inputs)
    assert len(masks) == 6 and all(m is None or m.any(-1).all() for m in masks), "some kernels turn an empty row into NaN"
    assert torch.equal(logits, run((batch.inputs + 1) % V * batch.pad_mask + batch.inputs * ~batch.pad_mask))
    (logits[::2] ** 2).sum().backward()  # of the two rows without inputs
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(p.grad.eq(0).all() for block in model.encoder for p in block.parameters())
    with torch.no_grad():
        for block in model.blocks:
            block.cross.out.weight.zero_()
    changed = (run(batch.inputs) - logits).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [False, True, False, True], "they are what the decoder says without cross-attention"


@pytest.mark.parametrize("inputs_attention", ["causal", "bidirectional"])
def test_an_input_moves_exactly_the_keys_and_values_that_may_see_it_in_every_layer(inputs_attention):
    model, inputs = small_model(), torch.arange(5)[None]
    keys_values = lambda inputs: torch.stack([t for kv in model.encode(inputs, None, inputs_attention).cross for t in kv])
    before = keys_values(inputs)  # (layers x 2, 1, H, S, D)
    for j in range(5):
        changed = torch.where(torch.arange(5) == j, 7, inputs)
        moved = (keys_values(changed) - before).abs().amax((1, 2, 4)) > 1e-6  # (layers x 2, S)
        assert moved.tolist() == [[i >= j or inputs_attention == "bidirectional" for i in range(5)]] * 4


@pytest.mark.parametrize("process, n_passes", [(AR, 1), (Uniform(11), 2), (Absorbing(MASK), 1), (PROCESSES[2], 2)],
                         ids=["ar", "uniform", "absorbing", "gaussian"])
def test_the_encoder_and_its_keys_and_values_are_computed_once_for_all_passes_steps_and_samples(process, n_passes):
    model, batch, calls = small_model(width_of(process)), ragged_batch(), []
    for name, module in {"encoder": model.encoder[1], "keys": model.blocks[1].cross.kv, "decoder": model.blocks[1]}.items():
        module.register_forward_hook(lambda module, args, result, name=name: calls.append((name, len(args[0]))))

    process.loss(model, batch, train_noise(batch))
    assert calls == [("encoder", 4), ("keys", 4)] + [("decoder", 4)] * n_passes
    calls.clear()
    options = {"temperature": 1.0} if process is AR else {"n_steps": 3}
    drafts = list(process.generate(model, batch, Noise(0, "generate", 0, range(4)), n_samples=2, **options))
    assert calls[:2] == [("encoder", 4), ("keys", 4)] and {("decoder", 8)} == set(calls[2:]) and len(drafts) > 1


def test_an_encoder_without_inputs_and_inputs_that_see_targets_are_refused():
    for width, attention in ((0, "causal"), (3, "full")):
        with pytest.raises(UserError, match="needs inputs .*cannot see the targets"):
            small_model().encode(torch.zeros(1, width, dtype=torch.long), None, attention)


# ---- the scripts ----

def test_ar_inputs_attend_in_both_directions_unless_told_or_begun_otherwise(train, ar_run, encoder_decoder_run, tmp_path):
    assert process_of(ar_run.checkpoint()).inputs_attention == "causal"
    assert process_of(encoder_decoder_run.checkpoint()).inputs_attention == "bidirectional"
    causal = train("ar", tmp_path / "a", "--architecture=encoder-decoder", "--inputs_attention=causal", *FEW)
    on = train("ar", tmp_path / "b", f"--init_from={causal.folder}", *FEW)
    assert [process_of(run.checkpoint()).inputs_attention for run in (causal, on)] == ["causal"] * 2
    assert on.checkpoint()["shape"]["architecture"] == "encoder-decoder"


@every_process
def test_from_ar_to_diffusion_to_a_score_and_a_sample(train, encoder_decoder_run, tmp_path, capsys, process):
    ar2diff.main([str(encoder_decoder_run.folder), str(tmp_path / "zero"), f"--process={process.name}"])
    one, two = (train("diff", tmp_path / name, f"--init_from={origin}", *FEW, *flags) for name, origin, flags in (
        ("one", tmp_path / "zero", ["--architecture=encoder-decoder"]),
        ("two", encoder_decoder_run.path, [f"--process={process.name}"])))
    weights, ar = one.checkpoint()["model"], encoder_decoder_run.checkpoint()
    assert one.log() == two.log() and all(torch.equal(weights[k], w) for k, w in two.checkpoint()["model"].items())
    assert not any(torch.equal(weights[k], w) for k, w in ar["model"].items()), "every tensor is trained"
    assert one.checkpoint()["shape"] | {"vector_width": 0} == ar["shape"] and process_of(one.checkpoint()).name == process.name
    for folder in (one.folder, encoder_decoder_run.folder):
        assert evaluation.main([str(folder), "--n_samples=1"])[0]["n"] == 5
        assert 0 < evaluation.main([str(folder), "--metric=bits", "--n_draws=2"])[0]["per_token"][0] < math.inf
    capsys.readouterr()
    sample.main([str(one.folder), "--prompt=ab", "--n_steps=3", "--show_steps"])
    assert [line.split()[0] for line in capsys.readouterr().out.split("\n")[:4]] == ["0", "1", "2", "3"]


def test_diffusion_can_begin_without_an_ar_model_and_resumes_exactly(train, tmp_path):
    flags = ["--architecture=encoder-decoder", "--schedule=constant", "--dropout=0.1"]
    whole, halves = (train("diff", tmp_path / name, f"--steps={n}", *flags) for name, n in (("whole", 4), ("halves", 2)))
    train("diff", halves.folder, "--steps=4", "--resume", *flags)
    before, after = whole.checkpoint()["model"], halves.checkpoint()["model"]
    assert any(name.startswith("encoder.") for name in before) and all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(UserError, match="--architecture=decoder-only differs from the checkpoint's, encoder-decoder"):
        train("diff", halves.folder, "--steps=9", "--resume", "--architecture=decoder-only")


@pytest.mark.parametrize("flags, message", [
    (["--architecture=encoder-decodr"], "did you mean 'encoder-decoder'"),
    (["--architecture=encoder-decoder", "--data={text}", "--input_len=0"], "needs inputs: set --input_len above 0"),
    (["--init_from={ed}", "--data={text}", "--input_len=0"], "needs inputs: set --input_len above 0"),
    (["--architecture=encoder-decoder", "--inputs_attention=full"], "inputs_attention.*full"),
    (["--init_from={ed}", "--inputs_attention=full"], "inputs_attention.*full"),
    (["--init_from={ed}", "--architecture=decoder-only"], "decoder-only differs from the checkpoint's, encoder-decoder"),
    (["--init_from={ar}", "--architecture=encoder-decoder"], "encoder-decoder differs from the checkpoint's, decoder-only")])
def test_what_an_encoder_decoder_cannot_do_is_refused_before_anything_is_written(
        train, text, ar_run, encoder_decoder_run, tmp_path, flags, message):
    flags = [flag.format(text=text, ar=ar_run.folder, ed=encoder_decoder_run.folder) for flag in flags]
    for kind in ("ar", "diff"):
        with pytest.raises(UserError, match=message):
            train(kind, tmp_path / "x", *flags)
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_resumed_with_another_architecture_and_stays_as_it_was(train, ar_run, encoder_decoder_run, tmp_path):
    for run, other in ((ar_run, "encoder-decoder"), (encoder_decoder_run, "decoder-only")):
        copy = type(run)(tmp_path / other)
        shutil.copytree(run.folder, copy.folder)
        with pytest.raises(UserError, match=f"--architecture={other} differs from the checkpoint's"):
            train("ar", copy.folder, "--resume", "--steps=9", f"--architecture={other}")
        assert copy.files() == run.files()


def test_a_conversion_to_inputs_that_see_targets_is_refused_and_a_lost_tensor_is_named(encoder_decoder_run, tmp_path):
    with pytest.raises(UserError, match="--inputs_attention=full: in an encoder-decoder inputs never see targets"):
        ar2diff.main([str(encoder_decoder_run.folder), str(tmp_path / "x"), "--inputs_attention=full"])
    assert not list(tmp_path.iterdir())
    for name in ("encoder.1.qkv.weight", "blocks.0.cross.kv.weight"):
        checkpoint = encoder_decoder_run.checkpoint()
        del checkpoint["model"][name]
        with pytest.raises(UserError, match=name):
            ar2diff.transfer(checkpoint, Uniform(258))
