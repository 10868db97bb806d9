"""Self-conditioning of Uniform: AR weights do not notice it before training; who is told what, when, in loss and decoding."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ar2diff
import eval as evaluation
import sample
import test_gpt2
import test_llama
from ar2diff import transfer
from beyond.decoders import DECODERS
from conftest import Scripted, Spy, T, V, ragged_batch, row, targets_only, tiny_model, train_noise
from data.dataset import Batch
from diffusion import Gaussian, Uniform, denoise
from engine.checkpoint import save_checkpoint
from engine.cli import UserError
from engine.noise import Noise
from model import SelfConditioning
from pretrained.loading import build_model, load_checkpoint, process_of
from test_every_process import patterns, six_rows

NEW = {f"self_conditioning.{name}" for name in ("gain", "gate.weight", "up.weight", "out.weight")}
FEW = ["--steps=1", "--eval_sequences=0"]
both_passes = pytest.mark.parametrize("n_unroll", [1, 2])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{flavour: AR checkpoint} of random models that transformers wrote."""
    folder, (family, fields) = tmp_path_factory.mktemp("published"), test_llama.FAMILIES["qwen3"]
    test_gpt2.make(folder / "gpt2", test_gpt2.SHAPES[0])
    test_llama.make(folder / "llama", family, **fields)
    return {name: load_checkpoint(folder / name, tokenizer="bytes") for name in ("gpt2", "llama")}


@pytest.fixture(params=["ar_run", "encoder_decoder_run", "gpt2", "llama"])
def ar(request):
    """An AR checkpoint of each kind."""
    if request.param in ("gpt2", "llama"):
        return request.getfixturevalue("published")[request.param]
    return request.getfixturevalue(request.param).checkpoint()


@pytest.fixture(scope="module")
def told_run(train, ar_run, tmp_path_factory):
    """A run from AR weights that learns to be told."""
    return train("diff", tmp_path_factory.mktemp("runs") / "told", f"--init_from={ar_run.folder}", "--self_condition=0.5")


def told_model(seed=0):
    return tiny_model(seed, self_condition=True)


def soft(model, logits, temperature=1.0):
    """Return the mean embedding (B, T, C) that logits (B, T, V) at a temperature predict, in float64."""
    p = np.exp((logits - logits.max(-1, keepdim=True).values).detach().double().numpy() / temperature)
    return torch.from_numpy(p / p.sum(-1, keepdims=True)) @ model.embedding.weight.detach().double()


# ---- the layer ----

def test_it_computes_what_diffusion_gemma_computes_but_keeps_the_length_of_the_embeddings():
    modeling = pytest.importorskip("transformers.models.diffusion_gemma.modeling_diffusion_gemma")
    config = modeling.DiffusionGemmaTextConfig(hidden_size=16, intermediate_size=16, rms_norm_eps=1e-12,
                                               hidden_activation="silu")
    torch.manual_seed(0)
    ours, theirs = SelfConditioning(16), modeling.DiffusionGemmaSelfConditioning(config)
    with torch.no_grad():
        for mine, other in ((ours.gain, theirs.pre_norm.weight), (ours.gate.weight, theirs.gate_proj.weight),
                            (ours.up.weight, theirs.up_proj.weight), (ours.out.weight, theirs.down_proj.weight)):
            mine.copy_(torch.randn_like(mine))
            other.copy_(mine)
        x, belief = torch.randn(3, 5, 16) * torch.tensor([0.01, 1.0, 30.0])[:, None, None], 0.1 * torch.randn(3, 5, 16)
        rms = x.square().mean(-1, keepdim=True).sqrt()
        assert (ours(x, belief) / rms - theirs(x, belief)).abs().max() < 1e-5
        assert (ours(x, belief) - x).norm() > 0.1 * x.norm()
        assert (ours(x, 7 * belief) / ours(x, belief) - 1).abs().max() < 1e-3, "the direction of a belief tells, not its length"
        assert torch.equal(ours(x, torch.zeros_like(x)), x), "zeros are as if nothing were told, whatever it has learned"


def test_a_model_told_zeros_is_the_model_told_nothing_and_each_row_hears_its_own():
    model, batch = told_model(), ragged_batch()
    context = model.encode(batch.inputs, batch.pad_mask, "bidirectional")
    with torch.no_grad():
        told = torch.randn(4, T, 16)
        told[[1, 3]] = 0.0
        nothing, some, zeros = (model.decode(batch.targets, context, "bidirectional", belief=belief)
                                for belief in (None, told, torch.zeros(4, T, 16)))
    assert torch.equal(nothing, zeros) and torch.equal(nothing[[1, 3]], some[[1, 3]])
    assert ((nothing - some)[[0, 2]].abs().amax((1, 2)) > 0.01).all()


# ---- AR weights, converted ----

@pytest.mark.parametrize("shift", [None, 65], ids=["plain", "shifted"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional", "full"])
def test_before_training_the_logits_are_those_of_the_ar_weights_bit_for_bit_with_any_belief(ar, attention, shift):
    if ar["shape"]["architecture"] == "encoder-decoder" and (shift or attention == "full"):
        return  # both are refused
    process = Uniform(258, self_condition=0.5, inputs_attention=attention, shift=shift)
    after, _ = transfer(ar, process)
    old, new = build_model(ar).eval(), build_model(after).eval()
    rng = torch.Generator().manual_seed(0)
    inputs, y = torch.randint(256, (3, 8), generator=rng), torch.randint(256, (3, 7), generator=rng)
    pad_mask = torch.arange(8) < torch.tensor([[0], [3], [8]])
    with torch.no_grad():
        expected = denoise(process, old, y, old.encode(inputs, pad_mask, attention))
        context, beliefs = new.encode(inputs, pad_mask, attention), torch.randn(3, 7, ar["shape"]["width"], generator=rng)
        for belief in (None, 0 * beliefs, beliefs, 1e4 * beliefs, 1e-4 * beliefs, new.believe(expected)):
            assert torch.equal(denoise(process, new, y, context, belief), expected)
        assert expected.std() > 0.01
        new.self_conditioning.out.weight.normal_()
        assert not torch.equal(denoise(process, new, y, context, beliefs), expected), "and when it has learned, they are not"


def test_the_report_calls_exactly_its_tensors_new_and_everything_else_is_carried_over(ar):
    before = {name: x.clone() for name, x in ar["model"].items()}
    after, report = transfer(ar, Uniform(258, self_condition=0.5))
    assert {name for name, *_, fate in report if fate == "new"} == NEW == after["model"].keys() - before.keys()
    assert {name for name, *_, fate in report if fate == "copied"} == before.keys() == ar["model"].keys()
    assert all(torch.equal(after["model"][name], x) and torch.equal(ar["model"][name], x) for name, x in before.items())
    assert {(name, shape, n) for name, shape, n, _ in report} == {
        (name, tuple(x.shape), x.numel()) for name, x in after["model"].items()}
    assert after["shape"] == ar["shape"] | {"self_condition": True} and not ar["shape"]["self_condition"]
    assert process_of(after) == Uniform(258, self_condition=0.5)
    for process in (Uniform(258), Gaussian(5), Gaussian(5, self_condition=0.0)):
        converted, _ = transfer(ar, process)
        assert not NEW & converted["model"].keys() and converted["shape"]["self_condition"] is False


def test_two_seeds_differ_in_the_new_tensors_alone_and_the_global_generator_is_left_alone(ar):
    process, state = Uniform(258, self_condition=0.5), torch.get_rng_state()
    first, again, other = (transfer(ar, process, seed)[0]["model"] for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    differ = {name for name in first if not torch.equal(first[name], other[name])}
    assert differ == {"self_conditioning.gate.weight", "self_conditioning.up.weight"} < NEW
    assert not first["self_conditioning.out.weight"].any() and (first["self_conditioning.gain"] == 1).all()
    assert all(first[name].std() > 0.01 for name in differ)


def test_training_from_ar_weights_adds_it_and_ar2diff_alone_does_not(train, told_run, ar_run, tmp_path, capsys):
    c, ar = told_run.checkpoint(), ar_run.checkpoint()
    assert process_of(c) == Uniform(258, self_condition=0.5) and c["shape"] == ar["shape"] | {"self_condition": True}
    assert c["model"].keys() == ar["model"].keys() | NEW
    assert not any(torch.equal(c["model"][name], x) for name, x in ar["model"].items()), "what was there learns on"
    still = train("diff", tmp_path / "still", f"--init_from={ar_run.folder}", "--self_condition=0.5", "--lr=1e-30",
                  "--weight_decay=0", "--seed=4", *FEW).checkpoint()["model"]
    expected = transfer(ar, Uniform(258, self_condition=0.5), seed=4)[0]["model"]
    assert all((still[name] - x).abs().max() < 1e-29 for name, x in expected.items()), "from the seed of the run"
    with pytest.raises(UserError, match="unrecognized arguments: --self_condition|--self_condition") as caught:
        ar2diff.main([str(ar_run.folder), str(tmp_path / "new"), "--self_condition=0.5"])
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()
    ar2diff.main([str(ar_run.folder), str(tmp_path / "plain")])
    plain = load_checkpoint(tmp_path / "plain")
    assert plain["model"].keys() == ar["model"].keys() and plain["shape"] == ar["shape"]
    assert process_of(plain).self_condition == 0


def test_a_model_from_scratch_has_it_too_and_no_other_process_has(train, tmp_path):
    c = train("diff", tmp_path / "told", "--self_condition=1", "--n_unroll=1", *FEW).checkpoint()
    assert c["shape"]["self_condition"] is True and NEW <= c["model"].keys() and process_of(c).self_condition == 1
    for flags in ([], ["--self_condition=0"], ["--process=absorbing"], ["--process=gaussian", "--self_condition=1"]):
        c = train("diff", tmp_path / "-".join(["x", *flags]), *flags, *FEW).checkpoint()
        assert c["shape"]["self_condition"] is False and not NEW & c["model"].keys()


# ---- loss ----

def formula(process, model, batch):
    """Return (total, per sequence), one sequence and one pass at a time: of one pass the second is what counts, of two both."""
    noise = train_noise(batch)
    xt, total, first = process.corrupt(batch.targets, noise.uniform(), noise), 0.0, []
    told = noise.uniform() < process.self_condition
    for b in range(len(xt)):
        y, belief, losses = xt[b:b + 1], torch.zeros(1, T, 16), []
        for _ in range(2):
            context = model.encode(row(batch, b).inputs, None, "bidirectional")
            logits = model.decode(y, context, "bidirectional", belief=belief)[0].detach()
            p = logits.double().softmax(-1)[range(T), batch.targets[b]]
            losses.append(float(-p.log().mean()))
            y = logits.argmax(-1)[None] if process.n_unroll == 2 else y
            belief = soft(model, logits[None]).float() * told[b]
        losses = losses if process.n_unroll == 2 else losses[1:]
        first.append(losses[0])
        total += sum(losses) / len(xt)
    return total, np.array(first)


@both_passes
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_the_loss_is_the_explicit_formula(n_unroll, share):
    process, model, batch = Uniform(11, n_unroll, self_condition=share), told_model(), six_rows()
    told = told_rows(process, batch)
    assert told.all() if share == 1 else told.any() and not told.all()
    losses = process.loss(model, batch, train_noise(batch))
    total, first = formula(process, model, batch)
    assert abs(float(losses.total.detach()) - total) < 1e-4
    assert abs(losses.per_sequence.numpy() - first).max() < 1e-4 and not losses.per_sequence.requires_grad
    plain, _ = formula(Uniform(11, n_unroll), model, batch)
    assert abs(total - plain) > 1e-3, "what is told matters here"


def told_rows(process, batch, step=0, indices=None):
    """Return which rows are told, (B,), by the noise of each alone: its third kind of number, after level and corruption."""
    noise = Noise(0, "train", step, indices or range(len(batch.targets)))
    process.corrupt(batch.targets, noise.uniform(), noise)
    return noise.uniform() < process.self_condition


@both_passes
@pytest.mark.parametrize("shift", [None, 13], ids=["plain", "shifted"])
def test_the_first_pass_is_told_nothing_and_the_second_the_mean_embedding_of_what_the_first_predicted(n_unroll, shift):
    """In the rows that are told; zeros in the others."""
    spy, batch = Spy(told_model()), six_rows()
    process = Uniform(11, n_unroll, self_condition=0.4, shift=shift)
    process.loss(spy, batch, train_noise(batch)).total.backward()
    told, noise, extra = told_rows(process, batch), train_noise(batch), int(shift is not None)
    assert len(spy.fed) == 2 and spy.told[0] is None and len(spy.encoded) == 1
    belief, logits = spy.told[1], spy.given[0][:, :T]  # shifted, what is read before a position is told at it
    assert belief.shape == (6, T + extra, 16) and not belief.requires_grad and not belief[:, :extra].any()
    assert (belief[told][:, extra:] - soft(spy.model, logits)[told]).abs().max() < 1e-5
    assert not belief[~told].any() and belief[told][:, extra:].any(-1).all()
    xt = process.corrupt(batch.targets, noise.uniform(), noise)
    assert torch.equal(spy.fed[0][:, extra:], xt)
    assert torch.equal(spy.fed[1][:, extra:], xt if n_unroll == 1 else logits.argmax(-1))
    assert [x.requires_grad for x in spy.given] == [n_unroll == 2, True], "a first pass that only tells has no gradient"


@both_passes
def test_no_gradient_flows_through_what_is_told(n_unroll):
    """The gradient is that of separate passes that are fed and told plain constants."""
    model, batch = told_model(), six_rows()
    spy = Spy(model)
    Uniform(11, n_unroll, self_condition=0.7).loss(spy, batch, train_noise(batch)).total.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for y, belief in [*zip(spy.fed, spy.told)][-n_unroll:]:
        context = model.encode(batch.inputs, batch.pad_mask, "bidirectional")
        logits = model.decode(y, context, "bidirectional", belief=belief)
        F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
    assert all((p.grad - together[name]).abs().max() < 1e-5 for name, p in model.named_parameters())
    assert all(together[name].abs().max() > 1e-4 for name in NEW)


@both_passes
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_the_option_losses_drafts_and_random_numbers_are_bit_for_bit_what_they_are_without_the_tensors(
        n_unroll, temperature):
    batch, process = six_rows(), Uniform(11, n_unroll, temperature)
    plain, told = tiny_model(), told_model(seed=1)
    told.load_state_dict(plain.state_dict() | {k: x for k, x in told.state_dict().items() if k in NEW})
    found = []
    for model in (plain, told):
        noise = train_noise(batch)
        losses = process.loss(model, batch, noise)
        losses.total.backward()
        drafts = process.generate(model, batch, Noise(0, "generate", 0, range(6)), n_steps=4, temperature=0.7, n_samples=2)
        found.append([losses.total, losses.per_sequence, *drafts, noise.uniform(), plain.embedding.weight.grad,
                      *(dict(model.named_parameters())[k].grad for k in plain.state_dict())])
        model.zero_grad(set_to_none=False)
    noise = train_noise(batch)
    process.corrupt(batch.targets, noise.uniform(), noise)
    if n_unroll == 2 and temperature:
        noise.categorical(torch.zeros(6, T, V), temperature)
    assert torch.equal(found[0][-len(plain.state_dict()) - 2], noise.uniform()), "no number is drawn that was not before"
    assert all(p.grad is None or not p.grad.any() for p in told.self_conditioning.parameters())
    assert all(torch.equal(a, b) for a, b in zip(found[0][:-1 - len(plain.state_dict())], found[1]))


@both_passes
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_the_output_layer_learns_first_and_after_one_step_every_new_tensor(ar_run, n_unroll, half):
    """Under autocast too: weights that it has cast to bfloat16 without a gradient must not be used again with one."""
    process, batch = Uniform(258, n_unroll, self_condition=1.0), six_rows()
    model = build_model(transfer(ar_run.checkpoint(), process)[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def gradients(step):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = process.loss(model, batch, train_noise(batch, step))
        losses.total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        return {name for name, p in model.named_parameters() if p.grad.any()}

    names = {name for name, _ in model.named_parameters()}
    assert gradients(0) == names - (NEW - {"self_conditioning.out.weight"})
    optimizer.step()
    assert gradients(1) == names


@both_passes
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_who_is_told_is_a_matter_of_each_rows_own_noise_however_the_batch_is_split(n_unroll, temperature):
    process, n, seen = Uniform(11, n_unroll, temperature, self_condition=0.3), 120, []
    batch = targets_only(torch.randint(11, (n, T), generator=torch.Generator().manual_seed(0)))
    for step in range(6):
        whole = None
        for size in (n, 40, 7, 1):
            told = []
            for i in range(0, n, size):
                model = Scripted(lambda y: torch.zeros(*y.shape, V))
                part = Batch(batch.inputs[i:i + size], None, batch.targets[i:i + size])
                process.loss(model, part, Noise(0, "train", step, range(i, i + len(part.targets))))
                assert len(model.fed) == 2 and model.told[0] is None
                assert model.told[1].amax((1, 2)).eq(model.told[1].amin((1, 2))).all(), "all of a row or nothing"
                told.append(model.told[1].any(-1).any(-1))
            whole = torch.cat(told) if whole is None else whole
            assert torch.equal(torch.cat(told), whole), f"in parts of {size}"
        assert temperature and n_unroll == 2 or torch.equal(whole, told_rows(process, batch, step))
        seen.append(whole)
    share = torch.stack(seen).double().mean()
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / (6 * n))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2)), "other rows at every step"


# ---- decoding ----

@pytest.mark.parametrize("decoder, options, heats", [
    ("resample", dict(temperature=0.2), [0.2] * 5), ("resample", dict(temperature=1.3), [1.3] * 5),
    ("resample", dict(temperature=0.0), [1e-6] * 5),
    ("entropy", dict(temperature=1.2, last_temperature=0.2), [1.2, 1.0, 0.8, 0.6, 0.4]),
    ("entropy", dict(temperature=0.8, last_temperature=0.0), [0.8, 0.64, 0.48, 0.32, 0.16])])
@pytest.mark.parametrize("shift", [None, 13], ids=["plain", "shifted"])
def test_the_first_step_is_told_nothing_and_each_later_one_what_the_one_before_drew_from(decoder, options, heats, shift):
    batch, frozen = six_rows(), patterns()
    for share in (0.01, 1.0, 0.0):  # in decoding there is no share: all are told, or none
        spy, process = Spy(told_model()), Uniform(11, self_condition=share, shift=shift)
        noise = Noise(0, "generate", 0, range(6))
        list(DECODERS["uniform"][decoder](process, spy, batch, noise, n_steps=5, n_samples=2, frozen=frozen, **options))
        assert len(spy.fed) == 5 and spy.told[0] is None
        for k in range(1, 5):
            if share == 0:
                assert spy.told[k] is None
                continue
            extra, logits = int(shift is not None), spy.given[k - 1][:, :T]
            assert not spy.told[k][:, :extra].any()
            assert (spy.told[k][:, extra:] - soft(spy.model, logits, heats[k - 1])).abs().max() < 1e-4, k


def test_at_temperature_zero_what_is_told_is_the_embedding_of_the_draft():
    spy = Spy(told_model())
    drafts = list(Uniform(11, self_condition=1.0).generate(spy, six_rows(), Noise(0, "generate", 0, range(6)), 4, 0.0, 1))
    assert all((spy.told[k] - spy.model.embedding(drafts[k])).abs().max() < 1e-6 for k in range(1, 4))


@pytest.mark.parametrize("decoder", ["resample", "entropy"])
def test_drafts_of_a_model_that_is_told_do_not_depend_on_the_batch(decoder):
    model, batch, process = told_model(), ragged_batch(), Uniform(11, self_condition=0.5)
    options = dict(n_steps=5, n_samples=2, temperature=0.7)
    generate = DECODERS["uniform"][decoder]
    last = lambda batch, rows: [*generate(process, model, batch, Noise(0, "generate", 0, rows), **options)][-1]
    whole = last(batch, range(4))
    assert torch.equal(torch.cat([last(row(batch, b), [b]) for b in range(4)]), whole)
    untold = [*generate(Uniform(11), model, batch, Noise(0, "generate", 0, range(4)), **options)][-1]
    assert not torch.equal(untold, whole), "and what it is told matters"


def test_scripts_write_score_and_go_on_with_such_a_checkpoint(train, told_run, task, tmp_path, capsys):
    for decoder in DECODERS["uniform"]:
        sample.main([str(told_run.folder), "--prompt=ab", f"--decoder={decoder}", "--n_steps=3"])
        result, = evaluation.main([str(told_run.folder), f"--decoder={decoder}", "--n_steps=3", "--temperature=1"])
        assert result["decoder"] == decoder and result["evaluations"] == 3
    for flags, share in (([], 0.5), (["--self_condition=1"], 1.0), (["--self_condition=0.1"], 0.1)):
        c = train("diff", tmp_path / str(share), f"--init_from={told_run.folder}", *flags, *FEW).checkpoint()
        assert process_of(c) == Uniform(258, self_condition=share)
        assert c["model"].keys() == told_run.checkpoint()["model"].keys()


# ---- bad input ----

@pytest.mark.parametrize("flags, message", [
    (["--init_from={plain}", "--self_condition=0.5"], "--self_condition=0.5, but the checkpoint lacks the tensors .*autoreg"),
    (["--init_from={told}", "--self_condition=0"], "--self_condition=0.0, but the checkpoint has the tensors .*autoreg"),
    (["--self_condition=1.5"], "--self_condition=1.5 must lie between 0 and 1"),
    (["--self_condition=-0.1"], "--self_condition=-0.1 must lie between 0 and 1"),
    (["--self_condition=nan"], "--self_condition=nan must lie between 0 and 1"),
    (["--init_from={ar}", "--self_condition=1.5"], "--self_condition=1.5 must lie between 0 and 1"),
    (["--process=absorbing", "--self_condition=0.5"], "--self_condition is for --process=uniform or gaussian, not for abs"),
    (["--init_from={ar}", "--process=absorbing", "--self_condition=0.5"], "not for absorbing")])
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_written(train, ar_run, diff_run, told_run, tmp_path, flags,
                                                                         message):
    folders = {"plain": diff_run.folder, "told": told_run.folder, "ar": ar_run.folder}
    with pytest.raises(UserError, match=message) as caught:
        train("diff", tmp_path / "x", *(flag.format(**folders) for flag in flags))
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]


def test_a_run_is_not_resumed_with_another_share(train, told_run):
    before = told_run.files()
    for share in (0, 0.6):
        with pytest.raises(UserError, match="self_condition") as caught:
            train("diff", told_run.folder, "--resume", "--steps=9", f"--self_condition={share}")
        assert "\n" not in str(caught.value) and told_run.files() == before


def test_a_gaussian_checkpoint_whose_tensors_do_not_depend_on_the_share_may_change_it(train, tmp_path):
    run = train("diff", tmp_path / "a", "--process=gaussian", *FEW)
    names = run.checkpoint()["model"].keys()
    for share in (0, 1):
        run = train("diff", tmp_path / f"b{share}", f"--init_from={run.folder}", f"--self_condition={share}", *FEW)
        assert process_of(run.checkpoint()) == Gaussian(self_condition=float(share))
        assert run.checkpoint()["model"].keys() == names


def test_a_file_whose_process_is_told_and_whose_tensors_are_not_there_is_refused(told_run, tmp_path):
    c = told_run.checkpoint()
    c["shape"]["self_condition"] = False
    save_checkpoint(tmp_path / "process.pt", c)
    with pytest.raises(UserError, match="lacks self-conditioning"):
        load_checkpoint(tmp_path / "process.pt")
    c = told_run.checkpoint()
    del c["model"]["self_conditioning.up.weight"]
    with pytest.raises(UserError, match="self_conditioning.up.weight"):
        build_model(c)
