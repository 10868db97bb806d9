"""Uniform diffusion: the noise against its closed form, the loss against its formula, the decoder against oracles and spies."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import diffusion
from data.dataset import Batch
from data.tokenizer import load_tokenizer
from diffusion import Uniform, best_of
from model import Transformer
from noise import Noise

V, S, T = 16, 4, 6
EOS, PAD, MASK = 9, 10, 11  # text is 0-8, noise draws from 0-10, ids 11-15 stand for MASK, sentinels and unused ones
PROCESS = Uniform(n_noise=11)


def tiny_model(seed=0):
    torch.manual_seed(seed)
    model = Transformer(V, n_layer=2, width=16, n_head=2).eval()
    torch.nn.init.normal_(model.embedding.weight, std=0.05)  # logits far from zero: likely and unlikely tokens
    with torch.no_grad():
        for block in model.blocks:  # and more than an echo of the token that is fed
            block.attention_out.weight *= 20
            block.mlp_out.weight *= 10
    return model


def ragged_batch(lengths=(4, 2, 0, 3), seed=0):
    rng = torch.Generator().manual_seed(seed)
    pad_mask = torch.arange(S)[None] < S - torch.tensor(lengths)[:, None]
    inputs, targets = (torch.randint(9, (len(lengths), n), generator=rng) for n in (S, T))
    return Batch(inputs.masked_fill(pad_mask, PAD), pad_mask, targets)


def row(batch, b):
    """Return row b alone, and without its padding."""
    n_pad = int(batch.pad_mask[b].sum())
    return Batch(batch.inputs[b:b + 1, n_pad:], None, batch.targets[b:b + 1])


def train_noise(batch, step=0):
    return Noise(0, "train", step, range(len(batch.targets)))


def drafts_of(model, batch, indices=None, process=PROCESS, seed=0, **options):
    return list(process.decode(model, batch, Noise(seed, "decode", 0, indices or range(len(batch.targets))), **options))


class Scripted:
    """A model without weights: logits(y) -> (B, T, V). It keeps what it was given and what it gave."""

    def __init__(self, logits):
        self.script, self.encoded, self.fed, self.given = logits, [], [], []

    def encode(self, inputs, pad_mask=None, attention="causal"):
        self.encoded.append((inputs.clone(), pad_mask, attention))
        return self

    def repeat(self, n):
        return self

    def decode(self, y, context, attention, extend=False):
        assert context is self and attention == "bidirectional" and not extend
        assert not y.requires_grad and y.dtype == torch.int64
        self.fed.append(y.clone())
        self.given.append(self.script(y))
        return self.given[-1]


class Spy(Scripted):
    """A real model, watched."""

    def __init__(self, model):
        super().__init__(None)
        self.model = model

    def encode(self, inputs, pad_mask=None, attention="causal"):
        super().encode(inputs, pad_mask, attention)
        return self.model.encode(inputs, pad_mask, attention)

    def decode(self, y, context, attention, extend=False):
        self.script = lambda y: self.model.decode(y, context, attention)
        return super().decode(y, self, attention, extend)


def oracle(x0):
    """A model that knows the answer: one-hot logits on x0 (1, T), whatever it is fed."""
    return Scripted(lambda y: 100.0 * F.one_hot(x0.expand(len(y), -1), V))


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


@pytest.mark.parametrize("n_unroll", [1, 2, 3])
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
    Uniform(11, n_unroll=3).loss(spy, batch, train_noise(batch)).total.backward()
    noise = train_noise(batch)
    assert torch.equal(spy.fed[0], PROCESS.corrupt(batch.targets, noise.uniform(), noise)), "the model reads xt"
    assert not torch.equal(spy.fed[0], batch.targets)
    assert torch.equal(spy.fed[1], spy.given[0].argmax(-1)) and torch.equal(spy.fed[2], spy.given[1].argmax(-1))
    assert len(spy.fed) == 3 and len(spy.encoded) == 1
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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_micro_batches_see_the_same_noise_and_average_to_the_gradient_of_the_batch(temperature):
    """1 x 8 and 2 x 4, ragged inputs and the draws of the unroll included."""
    process, model, batch = Uniform(11, unroll_temperature=temperature), tiny_model(), ragged_batch((4, 2, 0, 3, 1, 4, 4, 2))
    whole = process.loss(model, batch, Noise(0, "train", 5, range(8)))
    whole.total.backward()
    gradient = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    halves = [process.loss(model, Batch(*(x[h:h + 4] for x in batch)), Noise(0, "train", 5, range(h, h + 4))) for h in (0, 4)]
    (sum(half.total for half in halves) / 2).backward()
    assert torch.equal(torch.cat([half.t for half in halves]), whole.t)
    assert (torch.cat([half.per_sequence for half in halves]) - whole.per_sequence).abs().max() < 1e-5
    assert max((p.grad - g).abs().max() for p, g in zip(model.parameters(), gradient)) < 1e-6


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
    assert len(drafts) == len(model.fed) == n_steps
    assert all(torch.equal(draft, x0.expand(4, T)) for draft in drafts)


def test_every_step_reads_the_draft_of_the_step_before_and_the_first_reads_noise():
    spy, batch = Spy(tiny_model()), ragged_batch()
    drafts = drafts_of(spy, batch, n_steps=5, n_samples=1)
    assert all(torch.equal(y, draft) for y, draft in zip(spy.fed[1:], drafts))
    assert len(drafts) == 5 and len(spy.encoded) == 1
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
    assert all(torch.equal(draft, logits.argmax(-1)) for draft, logits in zip(drafts, spy.given))
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
    assert torch.equal(kept[0], pick(model.fed[1], expected)), "every draft shown is one of the sample that is kept"
    others = [rank(model.given[-1], output), rank(model.given[0], model.fed[0]), rank(-model.given[-1], model.fed[-1])]
    assert not any(torch.equal(pick(output, other), kept[-1]) for other in others)


def all_samples(monkeypatch, *args, **options):
    """Return (the last drafts (B, n, T) of all samples, the answer)."""
    seen = []

    def spy(drafts, score, n_samples):
        seen.append(drafts[-1].view(-1, n_samples, T))
        yield from best_of(drafts, score, n_samples)

    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "best_of", spy)
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


def test_the_inputs_attention_of_the_process_reaches_the_model():
    batch = ragged_batch()
    for attention in ("causal", "bidirectional", "full"):
        process, model = Uniform(11, inputs_attention=attention), oracle(batch.targets[:1])
        process.loss(model, batch, train_noise(batch))
        drafts_of(model, batch, process=process)
        assert [call[2] for call in model.encoded] == [attention] * 2
        assert all(call[1] is batch.pad_mask for call in model.encoded)


def test_loss_and_decoding_leave_the_global_generator_alone():
    model, batch = tiny_model(), ragged_batch()
    state = torch.get_rng_state()
    Uniform(11, unroll_temperature=1.0).loss(model, batch, train_noise(batch))
    drafts_of(model, batch, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)


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
def test_one_batch_is_memorised_to_a_loss_near_zero_and_decoded_exactly():
    torch.manual_seed(0)
    model, batch = Transformer(V, n_layer=2, width=32, n_head=2), ragged_batch(lengths=(4, 2, 1, 3))
    batch.targets[0, 3:] = torch.tensor([EOS, PAD, PAD])
    batch.targets[1, 5] = EOS
    many = Batch(*(x.repeat(16, 1) for x in batch))  # each row at sixteen noise levels a step
    history = train(model, PROCESS, [many] * 180, lr=5e-3)
    assert sum(h.total.detach() for h in history[-20:]) / 20 < 0.1 < 2 < history[0].total
    assert torch.equal(drafts_of(model.eval(), batch)[-1], batch.targets)
