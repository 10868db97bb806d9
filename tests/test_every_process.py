"""What every process and every decoder must do, whoever adds one: all of PROCESSES and DECODERS is tested here, by itself."""
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import diffusion
import eval as evaluation
import sample
from autoregressive import Autoregressive, best_of, cross_entropy
from beyond.decoders import DECODERS
from beyond.likelihood import BOUNDS, bound_of
from conftest import EOS, MASK, PAD, T, V, Vectors, additions_of, ragged_batch, row, tiny_model, train_noise
from data.dataset import Batch
from diffusion import PROCESSES, Absorbing, Gaussian, Uniform, begin, denoise, pure_noise
from engine import cli
from engine.noise import Noise
from pretrained.loading import new_process

TEXTS = torch.tensor([[*range(n), *[EOS] * (n < T), *[PAD] * (T - n - 1)] for n in range(1, T + 1)])  # as AR writes them
TOKENIZER = SimpleNamespace(n_noise=11, mask=MASK)  # the ids of conftest.py
NOT_FLAGS = ("frozen", "prefix")  # of a decoder, but what a text asks for
VALUES = dict(threshold=0.3, block_len=4, top_k=3, budget=4.0, last_temperature=1.5)
takes = lambda decoder: inspect.signature(decoder).parameters
# (process, decoder, options): each decoder as it is, and with each of its options that changes what it does
WAYS = [(name, decoder, options) for name, decoders in DECODERS.items() for decoder, function in decoders.items()
        for options in ({}, *({option: VALUES[option]} for option in takes(function) if option in VALUES))]
in_words = lambda x: ",".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else x
every_way = pytest.mark.parametrize("name, decoder, options", WAYS, ids=in_words)
every_way_of_diffusion = pytest.mark.parametrize("name, decoder, options", [w for w in WAYS if w[0] in PROCESSES], ids=in_words)
every_process = pytest.mark.parametrize("name", ["ar", *PROCESSES])


def new(name):
    return Autoregressive(MASK, EOS, PAD) if name == "ar" else new_process(name, TOKENIZER)


def model_for(process):
    return tiny_model(**additions_of(process))


def patterns():
    """Return (6, T) bool, patterns of frozen positions: none, all, first, last, every other, random."""
    frozen = torch.zeros(6, T, dtype=torch.bool)
    frozen[1], frozen[2, 0], frozen[3, -1], frozen[4, ::2] = True, True, True, True
    frozen[5] = torch.tensor([False, True, True, False, True, False])
    return frozen


def six_rows():
    """Return a batch of 6 ragged rows whose targets are text, EOS and PAD in any order."""
    targets = torch.randint(11, (6, T), generator=torch.Generator().manual_seed(1))
    return ragged_batch(lengths=(4, 2, 0, 3, 1, 4))._replace(targets=targets)


def drafts_of(model, batch, name, decoder, indices=None, seed=0, **options):
    """Return the drafts, with those of the options that the decoder takes."""
    generate, noise = DECODERS[name][decoder], Noise(seed, "generate", 0, indices or range(len(batch.targets)))
    options = {option: value for option, value in options.items() if option in takes(generate)}
    return list(generate(new(name), model, batch, noise, **options))


class Watched:
    """A model that keeps what it is fed."""

    def __init__(self, model):
        self.model, self.noisy, self.n_encoded, self.fed = model, model.noisy, 0, []

    def encode(self, *args):
        self.n_encoded += 1
        return self.model.encode(*args)

    def decode(self, y, *args, **more):
        self.fed.append(y.clone())
        return self.model.decode(y, *args, **more)


class Oracle:
    """A model that puts all mass on x0 (B, T), whatever it is fed: on all of it, or (AR) on its next tokens."""

    def __init__(self, x0):
        self.x0, self.noisy, self.n = x0, Vectors(), 0

    def encode(self, *_):
        return self

    def repeat(self, n):
        return self

    def decode(self, y, context, attention, extend=False, belief=None):
        logits = 100.0 * F.one_hot(self.x0.repeat_interleave(len(y) // len(self.x0), dim=0), V)
        self.n += y.size(1) if extend else 0
        return logits[:, self.n - y.size(1):self.n] if extend else logits


def test_no_two_processes_have_one_name():
    classes = [cls for cls in vars(diffusion).values() if isinstance(cls, type) and hasattr(cls, "corrupt")]
    assert [*PROCESSES.values()] == classes, "each class needs a `name` of its own, and a place in PROCESSES"


# ---- decoders ----

@every_way
def test_an_oracle_is_followed_in_no_more_evaluations_than_promised(name, decoder, options):
    frozen, batch = patterns(), six_rows()
    for n_steps in range(1, 2 * T + 1):
        for mask in (frozen, torch.ones_like(frozen), None) if name in PROCESSES else (None,):
            model, limit = Watched(Oracle(TEXTS)), n_steps if name in PROCESSES else T
            drafts = drafts_of(model, batch, name, decoder, n_steps=n_steps, n_samples=2, frozen=mask, **options)
            expected = TEXTS if mask is None else torch.where(mask, batch.targets, TEXTS)  # even where the oracle knows better
            assert torch.equal(drafts[-1], expected), f"n_steps={n_steps}: the last draft holds noise, or lost a frozen token"
            assert 1 <= len(drafts) - 1 == len(model.fed) <= limit and model.n_encoded == 1, (
                f"a draft for every evaluation, here {len(model.fed)}; n_steps={n_steps} allows {limit}, and one encoding")


@every_way
def test_drafts_are_canvases_of_tokens_from_the_noise_on_and_no_mask_is_left(name, decoder, options):
    process, batch = new(name), six_rows()
    for n_steps in (1, 2, 3, T, 2 * T):
        model = Watched(model_for(process))
        drafts = drafts_of(model, batch, name, decoder, n_steps=n_steps, n_samples=1, temperature=1.0, **options)
        assert all((x.shape, x.dtype) == ((6, T), torch.int64) and 0 <= x.min() <= x.max() < V for x in drafts)
        first, fed = drafts[0], model.fed[0]  # what is fed may also be vectors
        assert (first == PAD).all() if name == "ar" else fed.is_floating_point() or torch.equal(first, fed)
        assert not (drafts[-1] == getattr(process, "mask", -1)).any()


@every_way_of_diffusion
def test_what_is_frozen_stays_in_every_draft_whatever_the_model_says(name, decoder, options):
    model, frozen, batch = Watched(model_for(new(name))), patterns(), six_rows()
    before = [x.clone() for x in (*batch, frozen)]
    options = dict(options, n_steps=5, n_samples=3, temperature=1.0, frozen=frozen)
    drafts = drafts_of(model, batch, name, decoder, **options)
    assert all(torch.equal(draft[frozen], batch.targets[frozen]) for draft in drafts)
    assert (drafts[-1] != batch.targets)[~frozen].any(), "while the rest is written"
    mask, targets = (x.repeat_interleave(3, dim=0) for x in (frozen, batch.targets))
    assert all(y.is_floating_point() or torch.equal(y[mask], targets[mask]) for y in model.fed), "and is what the model reads"
    assert all(torch.equal(x, y) for x, y in zip((*batch, frozen), before)), "nothing is written to"


@every_way
def test_targets_that_are_not_frozen_are_never_read(name, decoder, options):
    """A leak: the answer would be there before the first step."""
    real, frozen, batch = model_for(new(name)), patterns(), six_rows()
    options = dict(options, n_steps=4, n_samples=2, temperature=1.0)
    for mask in (frozen, torch.zeros_like(frozen), None) if name in PROCESSES else (None,):
        found, other = [], (batch.targets + 3) % 9
        for targets in (batch.targets, other if mask is None else torch.where(mask, batch.targets, other)):
            model = Watched(real)
            drafts = drafts_of(model, batch._replace(targets=targets), name, decoder, frozen=mask, **options)
            found.append(drafts + model.fed)  # to the last bit of what the model reads
        assert len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found))


@every_way
def test_the_same_seed_gives_the_same_sample_in_every_batch_padded_or_not(name, decoder, options):
    model, batch, frozen, state = model_for(new(name)), ragged_batch(), patterns()[[0, 4, 5, 2]], torch.get_rng_state()
    options = dict(options, n_steps=4, n_samples=3, temperature=0.7)
    last = lambda batch, rows=(0, 1, 2, 3), seed=0: drafts_of(model, batch, name, decoder, rows, seed,
                                                              frozen=frozen[list(rows)], **options)[-1]
    whole = last(batch)
    assert torch.equal(torch.cat([last(row(batch, b), [b]) for b in range(4)]), whole)
    assert torch.equal(torch.cat([last(Batch(*(x[h:h + 2] for x in batch)), [h, h + 1]) for h in (0, 2)]), whole)
    again, *others = (last(batch, seed=seed) for seed in range(8))
    assert torch.equal(again, whole) and not all(torch.equal(other, whole) for other in others)  # argmax forgets some noise
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


@pytest.mark.parametrize("name, decoder", dict.fromkeys(way[:2] for way in WAYS))
def test_every_option_has_a_default_and_a_flag_that_takes_it(name, decoder):
    _, _, _, _, *parameters = inspect.signature(DECODERS[name][decoder]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name not in NOT_FLAGS}
    assert inspect.Parameter.empty not in defaults.values() and "n_samples" in defaults  # which eval.py reports
    flags = [f"--{option}={value}" for option, value in defaults.items()] + [f"--decoder={decoder}"] * (name in PROCESSES)
    assert sample.choose_decoder(sample.parse(sample.Config, ["checkpoint", *flags]), new(name)) == (decoder, defaults)


# ---- processes ----

@pytest.mark.parametrize("name", PROCESSES)
def test_its_default_decoder_is_the_first_of_its_decoders_and_at_noise_level_zero_the_text_is_all_there(name):
    process, x0 = new(name), six_rows().targets
    model, t, noise = model_for(process), torch.zeros(6, dtype=torch.float64), Noise(0, "train", 0, range(6))
    assert next(iter(DECODERS[name].items())) == (process.decoder, type(process).generate) and process.name == name
    if getattr(process, "vector_width", 0):
        assert torch.equal(process.nearest(model, process.corrupt(process.vectors(model, x0), t, noise)), x0)
    else:
        assert torch.equal(process.corrupt(x0, t, noise), x0)


@every_process
def test_the_loss_teaches_every_weight_and_an_oracle_has_nothing_to_learn(name):
    process, batch = new(name), six_rows()
    model, before, state = model_for(process), [x.clone() for x in batch], torch.get_rng_state()
    losses = process.loss(model, batch, train_noise(batch))
    losses.total.backward()
    assert losses.total.isfinite() and losses.per_sequence.isfinite().all() and losses.per_sequence.shape == (6,)
    assert not losses.per_sequence.requires_grad and (losses.t is None if name == "ar" else losses.t.shape == (6,))
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    twice = process.loss(model, batch, train_noise(batch), lambda logits, x0: 2 * cross_entropy(logits, x0)).total
    assert (twice / losses.total - 2).abs() < 1e-5, "the cross-entropy is the one that is given"
    assert process.loss(Oracle(batch.targets), batch, train_noise(batch)).total < 1e-4
    assert process.loss(Oracle(batch.targets.roll(1, dims=1)), batch, train_noise(batch)).total > 20, "only where aligned"
    assert all(torch.equal(x, y) for x, y in zip((*batch, torch.get_rng_state()), (*before, state))), "nothing else is touched"


@pytest.mark.parametrize("process", [*map(new, ("ar", *PROCESSES)), Uniform(11, unroll_temperature=1.0),
                                     Uniform(11, self_condition=0.5), Uniform(11, 1, self_condition=0.5),
                                     Uniform(11, unroll_temperature=1.0, self_condition=0.5), Absorbing(MASK, weighted=False),
                                     Gaussian(V, self_condition=0.0), Gaussian(V, self_condition=1.0)], ids=str)
def test_micro_batches_see_the_same_noise_and_average_to_the_gradient_of_the_batch(process):
    """1 x 8, 2 x 4 and 8 x 1: ragged inputs, and all draws of a loss included."""
    model, batch, results = model_for(process), ragged_batch((4, 2, 0, 3, 1, 4, 4, 2)), []
    for size in (8, 4, 1):
        model.zero_grad()
        parts = [process.loss(model, Batch(*(x[i:i + size] for x in batch)), Noise(0, "train", 5, range(i, i + size)))
                 for i in range(0, 8, size)]
        (sum(part.total for part in parts) / len(parts)).backward()
        t = torch.arange(8) if process.name == "ar" else torch.cat([part.t for part in parts])
        results.append((t, torch.cat([part.per_sequence for part in parts]), [p.grad.clone() for p in model.parameters()]))
    (t, per_sequence, gradient), *others = results
    assert len(t.unique()) == 8
    for t_, per_sequence_, gradient_ in others:
        assert torch.equal(t, t_) and (per_sequence - per_sequence_).abs().max() < 1e-4
        assert max((a - b).abs().max() for a, b in zip(gradient, gradient_)) < 2e-5 * max(g.abs().max() for g in gradient)


@every_process
def test_its_bound_is_its_own_or_refused(name):
    process = new(name)
    if type(process) in BOUNDS:
        nats = bound_of(process)(process, model_for(process), ragged_batch(), Noise(0, "valid", 0, range(4)), 3)
        assert nats.shape == (4,) and nats.dtype == torch.float64 and nats.isfinite().all() and (nats > 0).all()
    else:
        with pytest.raises(cli.UserError, match=f"no likelihood bound is known for the process '{name}'"):
            bound_of(process)


# ---- one more of each ----

class Stamp(Uniform):
    """Replace tokens by a random one, the same throughout a text: a process that differs from Uniform by its noise alone."""
    name = "stamp"

    def corrupt(self, x0, t, noise):
        replaced = noise.uniform(x0.size(1)) < t[:, None]
        return torch.where(replaced.to(x0.device), noise.integers(self.n_noise, 1).to(x0.device), x0)


@torch.no_grad()
def guess(process, model, batch, noise, n_samples=1, frozen=None):
    """Take the argmax of one evaluation: the shortest decoder there is."""
    context, noise, x0, frozen = begin(process, model, batch, noise, n_samples, frozen)
    xt = pure_noise(process, x0, frozen, noise)
    logits = denoise(process, model, xt, context)
    drafts = [xt, torch.where(frozen, x0, logits.argmax(-1))]
    return (yield from best_of(drafts, cross_entropy(logits, xt).mean(dim=1), n_samples))


def test_a_new_decoder_is_found_by_its_name(diff_run, monkeypatch, capsys):
    monkeypatch.setitem(DECODERS["uniform"], "guess", guess)
    sample.main([str(diff_run.folder), "--prompt=ab", "--decoder=guess", "--show_steps"])
    assert [line[:4] for line in capsys.readouterr().out.splitlines()[:2]] == ["   0", "   1"]
    result, = evaluation.main([str(diff_run.folder), "--decoder=guess"])
    assert (result["decoder"], result["options"], result["evaluations"]) == ("guess", {"n_samples": 1}, 1)
    with pytest.raises(cli.UserError, match="--n_steps goes with --decoder=resample or .*, not with guess"):
        sample.main([str(diff_run.folder), "--prompt=ab", "--decoder=guess", "--n_steps=2"])


def test_a_new_process_trains_and_writes_and_inherits_no_bound(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROCESSES, "stamp", Stamp)
    monkeypatch.setitem(DECODERS, "stamp", {"resample": Stamp.generate, "guess": guess})
    run = train("diff", tmp_path / "stamp", "--process=stamp", "--n_unroll=1")
    for flags, n_drafts in (["--n_steps=3"], 4), (["--decoder=guess"], 2):
        capsys.readouterr()
        sample.main([str(run.folder), "--prompt=ab", "--show_steps", *flags])
        assert len(capsys.readouterr().out.split("\n\n")[0].splitlines()) == n_drafts
    with pytest.raises(cli.UserError, match="no likelihood bound is known for the process 'stamp'"):
        bound_of(Stamp(11))
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: evaluation.main([str(run.folder), "--metric=bits"]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: no likelihood bound") and error.count("\n") == 1
