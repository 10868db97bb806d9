"""diffusion.py: Uniform's noise against its closed form, its loss against its formula, its decoders against oracles and spies;
and what the processes and decoders that there are promise each. What every one must do, whatever it is, stands in
test_every_process.py; Absorbing and Gaussian have files of their own."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import diffusion
from autoregressive import best_of
from beyond import decoders
from beyond.decoders import DECODERS
from beyond.likelihood import bound_of
from conftest import EOS, MASK, PAD, Scripted, Spy, T, V, oracle, ragged_batch, row, targets_only, tiny_model, train_noise
from data.dataset import Batch
from data.tokenizer import load_tokenizer
from diffusion import Absorbing, Gaussian, Uniform
from engine.noise import Noise
from model import Transformer
from test_every_process import patterns, six_rows

PROCESS = Uniform(n_noise=11)
ABSORBING, GAUSSIAN = Absorbing(MASK), Gaussian(vector_width=V)
WAYS = {  # every way to generate: process, decoder, options
    "resample": (PROCESS, "resample", {}),
    "ancestral": (PROCESS, "ancestral", {}),
    "threshold": (ABSORBING, "threshold", {}),
    "confidence": (ABSORBING, "confidence", {}),
    "confidence-blocks": (ABSORBING, "confidence", {"block_len": 4}),  # the last block is shorter
    "masked-ancestral": (ABSORBING, "ancestral", {}),
    "euler": (GAUSSIAN, "euler", {}),
}
every_way = pytest.mark.parametrize("process, decoder, options", WAYS.values(), ids=WAYS)


def drafts_of(model, batch, indices=None, process=PROCESS, decoder=None, seed=0, **options):
    noise = Noise(seed, "generate", 0, indices or range(len(batch.targets)))
    return list(DECODERS[process.name][decoder or process.decoder](process, model, batch, noise, **options))


def model_for(process, seed=0):
    return tiny_model(seed, getattr(process, "vector_width", 0))


def watch_samples(patch, watch):
    """Let watch(drafts, score, n_samples) see all samples before the best of them is chosen."""
    def see(drafts, score, n_samples):
        watch(drafts, score, n_samples)
        yield from best_of(drafts, score, n_samples)
    for module in (diffusion, decoders):
        patch.setattr(module, "best_of", see)


# ---- corruption ----

@pytest.mark.parametrize("t", [0.1, 0.5, 0.9, 1.0])
def test_the_share_of_changed_tokens_is_t_times_1_minus_1_over_v(t):
    n, size = 200, 500
    x0 = torch.randint(11, (n, size), generator=torch.Generator().manual_seed(0))
    changed = PROCESS.corrupt(x0, torch.full((n,), t), Noise(0, "train", 0, range(n))) != x0
    p = t * (1 - 1 / 11)
    assert abs(changed.double().mean() - p) < 4 * math.sqrt(p * (1 - p) / (n * size))
    assert abs(changed.sum(1).double().var() / (size * p * (1 - p)) - 1) < 0.5, "each position by itself: counts are binomial"
    columns = changed.double().mean(0)
    assert abs(columns - p).max() < 5 * math.sqrt(p * (1 - p) / n), "every position alike"


def test_random_tokens_are_uniform_over_text_eos_and_pad_and_never_another_id():
    x0 = torch.full((100, 1000), MASK)  # an id that noise cannot draw, so that every replaced token shows
    xt = PROCESS.corrupt(x0, torch.full((100,), 0.7), Noise(0, "train", 0, range(100)))
    counts = np.bincount(xt[xt != MASK], minlength=V)
    n = counts.sum()
    assert abs(n / xt.numel() - 0.7) < 4 * math.sqrt(0.7 * 0.3 / xt.numel())
    assert counts[11:].sum() == 0 and counts[[EOS, PAD]].min() > 0
    statistic = ((counts[:11] - n / 11) ** 2 / (n / 11)).sum()
    assert statistic < 10 + 5 * math.sqrt(20)


def test_noise_of_a_real_tokenizer_never_is_mask_a_sentinel_or_unused():
    tokenizer = load_tokenizer("bytes")
    x0 = torch.zeros(100, 300, dtype=torch.long)
    xt = Uniform(tokenizer.n_noise).corrupt(x0, torch.ones(100), Noise(0, "train", 0, range(100)))
    allowed = {*range(256), tokenizer.eos, tokenizer.pad}
    assert set(xt.unique().tolist()) == allowed and not allowed & {tokenizer.mask, *tokenizer.sentinels}


def test_t_zero_changes_nothing_and_t_one_keeps_nothing():
    x0 = torch.full((4, 5000), MASK)
    t = torch.tensor([0.0, 1.0, 0.0, 1.0])  # every row has its own
    xt = PROCESS.corrupt(x0, t, Noise(0, "train", 0, range(4)))
    assert torch.equal(xt[[0, 2]], x0[[0, 2]]) and (xt[[1, 3]] != MASK).all()
    assert x0.eq(MASK).all(), "x0 itself is left alone"


# ---- loss ----

def formula(model, batch, n_unroll=2):
    """Return (L1 + L2 ..., L1 per sequence): softmax, logarithm and argmax in numpy, one sequence and one pass at a time."""
    noise = train_noise(batch)
    t = noise.uniform()
    xt, total, first = PROCESS.corrupt(batch.targets, t, noise), 0.0, []
    for b in range(len(xt)):
        y = xt[b:b + 1]
        for unroll in range(n_unroll):
            context = model.encode(row(batch, b).inputs, None, "bidirectional")
            logits = model.decode(y, context, "bidirectional")[0].detach().double().numpy()
            p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            loss = -np.log(p[np.arange(T), batch.targets[b]]).mean()
            first += [loss] if unroll == 0 else []
            total += loss / len(xt)
            y = torch.from_numpy(logits.argmax(-1))[None]
    return total, np.array(first), t


@pytest.mark.parametrize("n_unroll", [1, 2])
def test_the_loss_is_the_explicit_formula(n_unroll):
    model, batch = tiny_model(), ragged_batch()
    losses = Uniform(11, n_unroll).loss(model, batch, train_noise(batch))
    total, first, t = formula(model, batch, n_unroll)
    assert abs(float(losses.total.detach()) - total) < 1e-5
    assert abs(losses.per_sequence.numpy() - first).max() < 1e-5
    assert torch.equal(losses.t, t.float()) and not losses.per_sequence.requires_grad


def test_perfect_one_hot_logits_lose_nothing_and_only_when_aligned():
    batch = ragged_batch(lengths=(4,))
    batch.targets[0] = torch.tensor([1, 2, 3, 4, 5, EOS])
    assert PROCESS.loss(oracle(batch.targets), batch, train_noise(batch)).total < 1e-6
    for shift in (-1, 1):
        assert PROCESS.loss(oracle(batch.targets.roll(shift, dims=1)), batch, train_noise(batch)).total > 50


def test_the_second_pass_reads_the_detached_argmax_of_the_first_and_the_inputs_are_encoded_once():
    spy, batch = Spy(tiny_model()), ragged_batch()
    before = [x.clone() for x in batch]
    PROCESS.loss(spy, batch, train_noise(batch)).total.backward()
    noise = train_noise(batch)
    assert torch.equal(spy.fed[0], PROCESS.corrupt(batch.targets, noise.uniform(), noise)), "the model reads xt"
    assert not torch.equal(spy.fed[0], batch.targets)
    assert torch.equal(spy.fed[1], spy.given[0].argmax(-1))
    assert len(spy.fed) == 2 and len(spy.encoded) == 1
    assert torch.equal(spy.encoded[0][0], batch.inputs) and torch.equal(spy.encoded[0][1], batch.pad_mask)
    assert all(torch.equal(x, y) for x, y in zip(batch, before)), "nothing of the batch is written to"


def test_no_gradient_flows_from_the_second_pass_into_the_first():
    """The gradient of L1 + L2 is that of two separate passes, the second of which is fed plain constants."""
    model, batch = tiny_model(), ragged_batch()
    spy = Spy(model)
    PROCESS.loss(spy, batch, train_noise(batch)).total.backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for y in spy.fed:
        logits = model.decode(y, model.encode(batch.inputs, batch.pad_mask, "bidirectional"), "bidirectional")
        F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
    assert max((p.grad - g).abs().max() for p, g in zip(model.parameters(), together)) < 1e-5


def test_unrolling_at_temperature_one_feeds_samples_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0] + [-torch.inf] * (V - 3))
    model, n = Scripted(lambda y: logits.expand(*y.shape, V)), 2000
    batch = Batch(torch.zeros(n, 0, dtype=torch.long), None, torch.zeros(n, T, dtype=torch.long))
    Uniform(11, unroll_temperature=1.0).loss(model, batch, train_noise(batch))
    share = np.bincount(model.fed[1].flatten(), minlength=V)[:3] / (n * T)
    p = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    assert (abs(share - p) < 4 * np.sqrt(p * (1 - p) / (n * T))).all()


def test_an_empty_target_and_inputs_that_are_all_padding_give_finite_gradients():
    model, batch = tiny_model(), ragged_batch(lengths=(0, 0))
    batch.targets[:] = PAD
    batch.targets[:, 0] = EOS
    losses = PROCESS.loss(model, batch, train_noise(batch))
    losses.total.backward()
    assert torch.isfinite(losses.total) and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_padding_carries_loss():
    batch = ragged_batch(lengths=(4,))
    batch.targets[0] = torch.tensor([1, EOS, PAD, PAD, PAD, PAD])
    wrong_about_pad = batch.targets.masked_fill(batch.targets == PAD, 3)
    loss = Uniform(11, n_unroll=1).loss(oracle(wrong_about_pad), batch, train_noise(batch)).total
    assert abs(loss - 100 * 4 / 6) < 1e-3


def test_noise_levels_are_uniform_and_new_at_every_step():
    batch, model = ragged_batch(lengths=(1,) * 16), oracle(torch.zeros(1, T, dtype=torch.long))
    t = np.stack([PROCESS.loss(model, batch, train_noise(batch, step)).t for step in range(300)])
    counts = np.histogram(t, 10, (0, 1))[0]
    assert ((counts - t.size / 10) ** 2 / (t.size / 10)).sum() < 9 + 5 * math.sqrt(18)
    assert len(np.unique(t)) > 0.99 * t.size  # float32: a few may coincide


# ---- decoding ----

@pytest.mark.parametrize("n_steps", range(1, 2 * T + 1))
def test_an_oracle_is_decoded_exactly_with_any_number_of_steps(n_steps):
    x0 = torch.tensor([[3, 1, 4, EOS, PAD, PAD]])
    model, batch = oracle(x0), ragged_batch()
    drafts = drafts_of(model, batch, n_steps=n_steps, n_samples=2)
    assert len(drafts) == 1 + len(model.fed) == 1 + n_steps
    assert all(torch.equal(draft, x0.expand(4, T)) for draft in drafts[1:])


def test_every_step_reads_the_draft_before_it_and_the_first_draft_is_noise():
    spy, batch = Spy(tiny_model()), ragged_batch()
    drafts = drafts_of(spy, batch, n_steps=5, n_samples=1)
    assert all(torch.equal(y, draft) for y, draft in zip(spy.fed, drafts))
    assert len(drafts) == 1 + 5 == 1 + len(spy.fed) and len(spy.encoded) == 1
    assert torch.equal(spy.encoded[0][0], batch.inputs) and torch.equal(spy.encoded[0][1], batch.pad_mask)
    many = oracle(batch.targets[:1])
    drafts_of(many, ragged_batch(lengths=(1,) * 50), n_steps=1, n_samples=40)
    counts = np.bincount(many.fed[0].flatten(), minlength=V)
    n = 50 * 40 * T
    assert counts.sum() == n and counts[11:].sum() == 0
    assert ((counts[:11] - n / 11) ** 2 / (n / 11)).sum() < 10 + 5 * math.sqrt(20)


def test_targets_are_not_read_and_inputs_stay_as_they_are():
    model, batch = tiny_model(), ragged_batch()
    before = [x.clone() for x in batch]
    first = drafts_of(model, batch, temperature=1.0, n_samples=3)
    other = drafts_of(model, batch._replace(targets=torch.zeros_like(batch.targets)), temperature=1.0, n_samples=3)
    assert all(torch.equal(x, y) for x, y in zip(first, other))
    assert all(torch.equal(x, y) for x, y in zip(batch, before))


def test_temperature_zero_takes_every_argmax_and_is_the_same_twice():
    model, batch = tiny_model(), ragged_batch()
    with torch.no_grad():
        model.embedding.weight *= 0.01  # logits so close to each other that a draw at any temperature would show
    spy = Spy(model)
    drafts = drafts_of(spy, batch, n_steps=4, temperature=0.0, n_samples=1)
    assert all(torch.equal(draft, logits.argmax(-1)) for draft, logits in zip(drafts[1:], spy.given, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(drafts, drafts_of(spy, batch, n_steps=4, temperature=0.0, n_samples=1)))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_temperature_divides_the_logits_of_the_network(temperature):
    logits = torch.tensor([0.0, 0.1, 0.3] + [-torch.inf] * (V - 3))
    model, batch = Scripted(lambda y: logits.expand(*y.shape, V)), ragged_batch(lengths=(1,) * 2000)
    share = np.bincount(drafts_of(model, batch, n_steps=2, temperature=temperature, n_samples=1)[-1].flatten(), minlength=V)[:3]
    p = np.exp(np.array([0, 0.1, 0.3]) / temperature)
    p /= p.sum()
    assert (abs(share / (2000 * T) - p) < 4 * np.sqrt(p * (1 - p) / (2000 * T))).all()


def test_the_kept_sample_has_the_lowest_cross_entropy_between_the_last_input_and_its_logits():
    """The script's argmax walks on by one token a step, with a confidence that grows with the sample's first token while the
    score of the input falls: rules that score the output, an earlier step or the most likely loser choose another sample."""
    def script(y):
        n = len(model.fed)  # 1, 2, 3: at the last step the order of the samples is turned around
        strength = y[:, :1, None].double() if n < 3 else 20.0 - y[:, :1, None].double()
        return 5.0 * F.one_hot(y, V) + (6.0 + strength) * F.one_hot((y + 1) % V, V)

    model, batch = Scripted(script), ragged_batch(lengths=(4, 2, 0))
    kept = drafts_of(model, batch, n_steps=3, temperature=0.0, n_samples=8)

    def rank(logits, tokens):
        p = torch.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0]
        return (-p.mean(-1)).view(3, 8).argmin(-1)

    pick = lambda samples, best: samples.view(3, 8, T)[torch.arange(3), best]
    output = model.given[-1].argmax(-1)
    expected = rank(model.given[-1], model.fed[-1])
    assert torch.equal(kept[-1], pick(output, expected))
    assert torch.equal(kept[1], pick(model.fed[1], expected)), "every draft shown is one of the sample that is kept"
    assert torch.equal(kept[0], pick(model.fed[0], expected)), "the noise it began with, too"
    others = [rank(model.given[-1], output), rank(model.given[0], model.fed[0]), rank(-model.given[-1], model.fed[-1])]
    assert not any(torch.equal(pick(output, other), kept[-1]) for other in others)


def all_samples(monkeypatch, *args, **options):
    """Return (the last drafts (B, n, T) of all samples, the answer)."""
    seen = []
    with monkeypatch.context() as patch:
        watch_samples(patch, lambda drafts, score, n_samples: seen.append(drafts[-1].view(-1, n_samples, T)))
        answer = drafts_of(*args, **options)[-1]
    return seen[0], answer


@pytest.mark.parametrize("inputs_attention", ["causal", "bidirectional", "full"])
def test_a_sample_depends_neither_on_how_many_there_are_nor_on_the_batch(monkeypatch, inputs_attention):
    process, model, batch = Uniform(11, inputs_attention=inputs_attention), tiny_model(), ragged_batch()
    options = dict(process=process, temperature=0.5, n_steps=4)
    few, _ = all_samples(monkeypatch, model, batch, n_samples=2, **options)
    many, best = all_samples(monkeypatch, model, batch, n_samples=5, **options)
    assert torch.equal(few, many[:, :2])
    assert len({tuple(sample) for sample in many[0].tolist()}) > 1, "samples differ"
    one_by_one = [drafts_of(model, row(batch, b), [b], n_samples=5, **options)[-1] for b in range(4)]
    assert torch.equal(torch.cat(one_by_one), best)
    halves = [drafts_of(model, Batch(*(x[h:h + 2] for x in batch)), [h, h + 1], n_samples=5, **options)[-1] for h in (0, 2)]
    assert torch.equal(torch.cat(halves), best)


def test_the_seed_and_the_index_of_a_row_choose_its_noise():
    model, batch = tiny_model(), ragged_batch()
    first = drafts_of(model, batch, temperature=1.0)[-1]
    assert torch.equal(drafts_of(model, batch, temperature=1.0)[-1], first)
    assert not torch.equal(drafts_of(model, batch, temperature=1.0, seed=1)[-1], first)
    assert not torch.equal(drafts_of(model, batch, [4, 5, 6, 7], temperature=1.0)[-1], first)

# ---- decoding: every way there is ----

@pytest.mark.parametrize("process, decoder", [(PROCESS, "resample"), (PROCESS, "ancestral"), (GAUSSIAN, "euler")])
def test_where_nothing_ends_early_every_step_that_is_asked_for_is_made(process, decoder):
    batch = six_rows()
    for frozen in (patterns(), torch.ones(6, T, dtype=torch.bool), None):
        for n_steps in (1, 2, 3, T, 2 * T):
            model = oracle(batch.targets)
            drafts = drafts_of(model, batch, process=process, decoder=decoder, n_steps=n_steps, frozen=frozen)
            assert len(drafts) - 1 == len(model.fed) == n_steps


def test_the_noise_levels_run_from_one_down_to_zero_in_equal_steps(monkeypatch):
    """Those that an evaluation is told, or a step goes between; the rates of masked diffusion are in test_absorbing.py."""
    seen, predict, reverse = [], Gaussian.predict, decoders.reverse
    monkeypatch.setattr(Gaussian, "predict", lambda *args: (seen.append(args[3]), predict(*args))[1])
    monkeypatch.setattr(decoders, "reverse", lambda *args: (seen.append(args[3:5]), reverse(*args))[1])
    levels = torch.tensor([k / 4 for k in (4, 3, 2, 1, 0)], dtype=torch.float64)
    options = dict(n_steps=4, n_samples=2, temperature=1.0)
    drafts_of(model_for(GAUSSIAN), six_rows(), process=GAUSSIAN, **options)
    assert (torch.stack(seen) - levels[:-1, None]).abs().max() < 1e-6 and seen[0].shape == (12,)
    seen.clear()
    drafts_of(tiny_model(), six_rows(), decoder="ancestral", **options)
    assert (torch.tensor(seen) - torch.stack((levels[:-1], levels[1:]), dim=1)).abs().max() < 1e-6


@pytest.mark.parametrize("decoder, options", [way[1:] for way in WAYS.values() if way[0] is ABSORBING])
def test_what_a_masked_model_is_fed_is_less_and_less_noisy(decoder, options):
    spy = Spy(tiny_model())
    drafts_of(spy, six_rows(), process=ABSORBING, decoder=decoder, n_steps=4, n_samples=2, temperature=1.0, **options)
    n_masked = torch.stack([(y == MASK).sum() for y in spy.fed])
    assert 1 < len(n_masked) <= 4 and (n_masked.diff() <= 0).all() and n_masked[-1] > 0


@every_way
def test_every_decoder_starts_from_pure_noise_in_which_nothing_of_the_targets_is_left(process, decoder, options):
    x0 = torch.randint(9, (400, 20), generator=torch.Generator().manual_seed(0))
    model = oracle(x0)
    first, *_ = drafts_of(model, targets_only(x0), process=process, decoder=decoder, n_steps=1, n_samples=1, **options)
    if process is GAUSSIAN:
        noise = model.fed[0] * math.sqrt(1 / V + 20 ** 2) / 20
        assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 and abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
        assert torch.equal(first, model.fed[0].argmax(-1)), "shown as the tokens whose vectors are nearest"
    else:
        p, changed = 1 if process is ABSORBING else 1 - 1 / 11, model.fed[0] != x0
        assert abs(changed.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / x0.numel())
        assert process is not ABSORBING or (model.fed[0] == MASK).all()
        assert torch.equal(first, model.fed[0])


@every_way
def test_at_temperature_zero_the_argmax_of_the_logits_is_what_a_draft_shows(process, decoder, options):
    model, batch = model_for(process, seed=1), six_rows()  # argmax: not one word everywhere
    with torch.no_grad():
        model.embedding.weight *= 0.01  # logits so close to each other that a draw at any temperature would show
    spy = Spy(model)
    more = dict(options, n_steps=1, n_samples=1, temperature=0.0)
    _, first, *_ = drafts_of(spy, batch, process=process, decoder=decoder, **more)
    logits = spy.given[0][..., :11] if (process, decoder) == (PROCESS, "ancestral") else spy.given[0]
    assert torch.equal(first, logits.argmax(-1)) and len(first.unique()) > 1


@every_way
def test_the_kept_sample_has_the_lowest_score_and_it_is_that_of_the_documentation(process, decoder, options, monkeypatch):
    """Worked out anew from what the model was given and what it gave, for all of 7 samples of 6 inputs."""
    seen, n = {}, 7
    watch_samples(monkeypatch, lambda drafts, score, _: seen.update(drafts=torch.stack(drafts), score=score))
    spy, batch, frozen = Spy(model_for(process)), six_rows(), patterns()
    answer = drafts_of(spy, batch, process=process, decoder=decoder, n_steps=4, n_samples=n, temperature=1.0, frozen=frozen,
                       **options)
    drafts, given = seen["drafts"], torch.stack(spy.given).double()  # (1 + steps, B * n, T), (steps, B * n, T, V)
    nats = lambda logits, tokens: -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    if process is GAUSSIAN:
        score = nats(given[-1], drafts[-1]).mean(1)
    elif process is ABSORBING:
        assert torch.equal(drafts[0], torch.where(frozen, batch.targets, MASK).repeat_interleave(n, dim=0))
        score = torch.zeros(drafts[0].shape, dtype=torch.float64)  # of all tokens that are not frozen, when they were revealed
        for before, after, logits in zip(drafts, drafts[1:], given, strict=False):
            score = torch.where((before == MASK) & (after != MASK), nats(logits, after), score)
        score = score.sum(1) / (~frozen).sum(1).repeat_interleave(n)
        score[n:2 * n] = seen["score"][n:2 * n]  # nothing to reveal in row 1, where all is frozen
    else:
        score = nats(given[-1], spy.fed[-1]).mean(1)
    assert (seen["score"] - score)[score.isfinite()].abs().max() < 1e-5
    best = [int(row.argmin()) for row in score.view(6, n)]
    chosen = drafts.view(len(drafts), 6, n, T)[:, range(6), best]
    assert torch.equal(torch.stack(answer), chosen) and len(set(best)) > 1
    assert not torch.equal(chosen[-1], drafts.view(len(drafts), 6, n, T)[-1, :, 0])


@pytest.mark.parametrize("attention", ["causal", "bidirectional", "full"])
@pytest.mark.parametrize("process", [PROCESS, ABSORBING, GAUSSIAN], ids=["uniform", "absorbing", "gaussian"])
def test_the_inputs_are_encoded_once_with_the_attention_of_the_process(process, attention):
    batch, process = ragged_batch(), replace(process, inputs_attention=attention)
    model = oracle(batch.targets[:1])
    process.loss(model, batch, train_noise(batch))
    for decoder in DECODERS[process.name]:
        drafts_of(model, batch, process=process, decoder=decoder)
    bound_of(process)(process, model, batch, train_noise(batch), 3)
    assert [call[2] for call in model.encoded] == [attention] * (2 + len(DECODERS[process.name]))
    assert all(torch.equal(call[0], batch.inputs) and call[1] is batch.pad_mask for call in model.encoded)


# ---- learning ----

def train(model, process, batches, lr=1e-2):
    """Return the Losses of every step."""
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0), []
    for step, batch in enumerate(batches):
        losses = process.loss(model, batch, train_noise(batch, step))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append(losses)
    return history


@pytest.mark.slow
def test_on_random_text_the_loss_of_every_noise_level_is_that_of_the_ideal_denoiser():
    """Random text tells nothing of itself or of t, so the best guess is the token that is seen, with probability 1 - E[t] 7/8.
    Hence a closed form at every t: below log V where little is replaced, far above it where all is."""
    torch.manual_seed(0)
    model, rng = Transformer(8, n_layer=2, width=32, n_head=2), torch.Generator().manual_seed(0)
    fresh = lambda: torch.randint(8, (64, T), generator=rng)
    nothing = torch.zeros(64, 0, dtype=torch.long)
    history = train(model, Uniform(8), (Batch(nothing, None, fresh()) for _ in range(150)))[-75:]
    t, loss = torch.cat([h.t for h in history]), torch.cat([h.per_sequence for h in history])
    kept, other = 1 - 0.5 * 7 / 8, 0.5 / 8
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        changed = 7 / 8 * (low + 0.1)  # expected share, in the middle of the level
        ideal = -(1 - changed) * math.log(kept) - changed * math.log(other)
        assert abs(loss[(t >= low) & (t < low + 0.2)].mean() - ideal) < 0.12


@pytest.mark.slow
@pytest.mark.parametrize("process, n_steps", [(PROCESS, 180), (ABSORBING, 90), (GAUSSIAN, 90)],
                         ids=["uniform", "absorbing", "gaussian"])
def test_one_batch_is_memorised_to_a_loss_near_zero_and_decoded_exactly(process, n_steps):
    torch.manual_seed(1)
    batch = ragged_batch(lengths=(4, 2, 1, 3))
    model = Transformer(V, n_layer=2, width=32, n_head=2, vector_width=getattr(process, "vector_width", 0))
    batch.targets[0, 3:] = torch.tensor([EOS, PAD, PAD])
    batch.targets[1, 5] = EOS
    many = Batch(*(x.repeat(16, 1) for x in batch))  # each row at sixteen noise levels a step
    history = train(model, process, [many] * n_steps, lr=5e-3)
    losses = [float(h.total.detach()) for h in history]
    assert sum(losses[-10:]) / 10 < 0.1 < 2 < losses[0]
    for decoder in DECODERS[process.name]:
        assert torch.equal(drafts_of(model.eval(), batch, process=process, decoder=decoder)[-1], batch.targets)
