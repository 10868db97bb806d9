"""What may be added when AR weights become a diffusion model: shift, several canvases, the AR loss."""
from dataclasses import replace

import pytest
import torch

import diffusion
from autoregressive import Autoregressive, cross_entropy
from beyond.decoders import DECODERS
from beyond.guide import Guide, GuideConfig
from beyond.likelihood import bound_of
from conftest import EOS, MASK, PAD, S, T, ragged_batch, tiny_model, train_noise, width_of
from diffusion import Absorbing, Gaussian, Uniform
from engine.cli import UserError
from pretrained.loading import process_of

PROCESSES = [Uniform(11), Absorbing(MASK), Gaussian(16)]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.name)
AR = Autoregressive(MASK, EOS, PAD)
FEW = ["--steps=2", "--eval_sequences=4"]


def guide(process, **options):
    return Guide(process, AR, GuideConfig(**options))


# ---- shift ----

def test_shifted_logits_are_those_that_ar_would_read_of_the_same_tokens():
    """Fed clean text under a causal pattern, a shifted model is the AR model: slot i has read up to x0[i-1]."""
    model, batch = tiny_model(), ragged_batch()
    context = model.encode(batch.inputs, batch.pad_mask, "causal")
    expected = model.decode(AR.feed(batch.targets), context, "causal")
    for attention, same in (("causal", True), ("bidirectional", False)):
        process = Uniform(11, shift=MASK, targets_attention=attention)
        found = diffusion.denoise(process, model, batch.targets, context)
        assert ((found - expected).abs().max() < 1e-5) == same and found.shape == expected.shape


@every_process
def test_a_shifted_model_sees_every_target_the_last_one_too(process):
    process = replace(process, shift=MASK)
    model, y = tiny_model(), torch.randint(9, (1, T), generator=torch.Generator().manual_seed(0))
    y = model.embedding(y).detach() if process.name == "gaussian" else y
    context = model.encode(torch.randint(9, (1, S)))
    before = diffusion.denoise(process, model, y, context)
    for j in range(T):
        changed = y.clone()
        changed[0, j] = changed[0, (j + 1) % T] if y.is_floating_point() else (y[0, j] + 1) % 9
        assert ((diffusion.denoise(process, model, changed, context) - before)[0].abs().amax(-1) > 1e-6).all()


@every_process
def test_a_shifted_process_trains_decodes_and_bounds(process):
    process = replace(process, shift=MASK)
    model, batch = tiny_model(vector_width=width_of(process)), ragged_batch()
    process.loss(model, batch, train_noise(batch)).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters())
    for decoder in DECODERS[process.name].values():
        *_, answer = decoder(process, model, batch, train_noise(batch), n_steps=3, n_samples=2)
        assert answer.shape == (4, T)
    assert bound_of(process)(process, model, batch, train_noise(batch), 2).isfinite().all()


# ---- several canvases of one target ----

@every_process
def test_many_draws_train_on_as_many_canvases_behind_one_encoding(process, monkeypatch):
    model, batch, n = tiny_model(vector_width=width_of(process)), ragged_batch(), 3
    encoded, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda inputs, *rest: (encoded.append(len(inputs)), encode(inputs, *rest))[1])
    found = guide(process, n_draws=n).loss(model, batch, train_noise(batch), cross_entropy)
    assert encoded == [len(batch.targets)] and len(found.per_sequence) == n * len(batch.targets)
    many = type(batch)(*(x.repeat_interleave(n, dim=0) for x in batch))
    expected = process.loss(model, many, train_noise(batch).split(n))
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    assert torch.allclose(found.per_sequence, expected.per_sequence, rtol=1e-4)
    assert len(found.per_sequence.unique()) > len(batch.targets), "each canvas has noise of its own"
    assert len(found.t.unique()) == n * len(batch.targets), "and stands at a level of its own"
    one = guide(process, n_draws=1).loss(model, batch, train_noise(batch), cross_entropy)
    assert one.total.item() == process.loss(model, batch, train_noise(batch)).total.item(), "one draw: the process itself"


# ---- AR loss ----

@every_process
def test_the_ar_loss_is_added_with_its_weight_and_the_log_shows_the_diffusion_loss(process):
    model, batch = tiny_model(vector_width=width_of(process)), ragged_batch()
    plain = process.loss(model, batch, train_noise(batch))
    guided = guide(process, ar_weight=0.25).loss(model, batch, train_noise(batch), cross_entropy)
    logits = model.decode(AR.feed(batch.targets), model.encode(batch.inputs, batch.pad_mask), "causal")
    assert abs(guided.total - plain.total - 0.25 * cross_entropy(logits, batch.targets).mean()) < 1e-5
    assert torch.equal(guided.per_sequence, plain.per_sequence) and torch.equal(guided.t, plain.t)


@pytest.mark.parametrize("attention, encodings", [("causal", 1), ("bidirectional", 2)])
@every_process
def test_inputs_that_both_losses_read_alike_are_encoded_once_and_teach_what_two_encodings_would(process, attention, encodings,
                                                                                                 monkeypatch):
    process = replace(process, inputs_attention=attention)
    model, batch = tiny_model(vector_width=width_of(process)), ragged_batch()
    (process.loss(model, batch, train_noise(batch)).total + 0.5 * AR.loss(model, batch, None).total).backward()
    apart = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    calls, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda *inputs: (calls.append(inputs), encode(*inputs))[1])
    for n in (1, 2):  # both of one size of batch: nothing is kept from one step to the next
        guide(process, ar_weight=0.5, n_draws=n).loss(model, batch, train_noise(batch), cross_entropy).total.backward()
        assert len(calls) == n * encodings
        assert n > 1 or all((p.grad - g).abs().max() < 1e-5 for p, g in zip(model.parameters(), apart))


@every_process
def test_every_help_trains_from_the_command_line_and_is_recorded(process, train, ar_run, tmp_path):
    flags = [f"--init_from={ar_run.folder}", f"--process={process.name}", *FEW]
    runs = {flag: train("diff", tmp_path / str(i), *flags, *flag.split()) for i, flag in enumerate(
        ["", "--shift", "--n_draws=2", "--ar_weight=0.5"])}
    weights = [run.checkpoint()["model"]["embedding.weight"] for run in runs.values()]
    assert all(w.isfinite().all() for w in weights)
    assert all(not torch.equal(w, v) for i, w in enumerate(weights) for v in weights[:i]), "each has an effect of its own"
    shifted = process_of(runs["--shift"].checkpoint())
    guided = runs["--ar_weight=0.5"].checkpoint()
    assert shifted.shift == 258 and guided["config"]["ar_weight"] == 0.5
    assert process_of(guided) == process_of(runs[""].checkpoint()), "what else it was trained by is no property of the model"
    on = train("diff", tmp_path / "on", f"--init_from={runs['--shift'].folder}", *FEW)
    assert process_of(on.checkpoint()).shift == 258, "a model that reads shifted goes on so"
    on = train("diff", tmp_path / "off", f"--init_from={runs['--ar_weight=0.5'].folder}", *FEW)
    assert on.checkpoint()["config"]["ar_weight"] == 0, "help is asked for anew"


def test_validation_is_by_the_process_alone_so_that_runs_with_and_without_help_compare(train, ar_run, tmp_path):
    help = ["--ar_weight=9", "--n_draws=2"]
    origin = [f"--init_from={ar_run.folder}", "--lr=1e-12", *FEW]
    logs = [train("diff", tmp_path / str(i), *origin, *flags).log() for i, flags in enumerate((help, []))]
    (train_helped, valid_helped), (train_alone, valid_alone) = [(log[0], log[-1]) for log in logs]
    assert abs(valid_helped["loss"] - valid_alone["loss"]) < 1e-5 and abs(train_helped["loss"] - train_alone["loss"]) > 1


@pytest.mark.parametrize("flags, message", [
    (["--ar_weight=-1"], "--ar_weight=-1.0 must be 0 or more, and finite"),
    (["--ar_weight=inf"], "--ar_weight=inf must be 0 or more, and finite"),
    (["--n_draws=0"], "--n_draws=0 must be at least 1"),
    (["--shift", "--architecture=encoder-decoder"], "--shift: the targets of an encoder-decoder do not follow its inputs")])
def test_what_makes_no_sense_is_one_line_and_writes_nothing(train, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train("diff", tmp_path / "x", *FEW, *flags)
    assert not (tmp_path / "x").exists()
