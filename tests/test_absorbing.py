"""Absorbing diffusion: the loss against its formula, and every way to reveal tokens against scripted certainties."""
import math

import numpy as np
import pytest
import torch

import diffusion
from beyond import decoders
from beyond.decoders import DECODERS
from conftest import EOS, MASK, PAD, Scripted, Spy, T, V, oracle, ragged_batch, targets_only, tiny_model, train_noise
from data.tokenizer import load_tokenizer
from diffusion import Absorbing
from engine.noise import Noise
from pretrained.loading import new_process

PROCESS = Absorbing(MASK)


def drafts_of(model, batch, decoder="threshold", **options):
    noise = Noise(0, "generate", 0, range(len(batch.targets)))
    return list(DECODERS["absorbing"][decoder](PROCESS, model, batch, noise, **{"n_samples": 1, **options}))


def patch_best_of(monkeypatch, best_of):
    for module in (diffusion, decoders):
        monkeypatch.setattr(module, "best_of", best_of)


def levels_at(monkeypatch, t):
    """Let Noise.stratified() give the number from which the loss makes noise level t."""
    monkeypatch.setattr(Noise, "stratified", lambda self: torch.full((len(self.rows),), (t - 1e-3) / (1 - 1e-3)).double())


def constant(logits):
    """A model that gives the same logits (T, V) whatever it is fed, each time as a tensor of its own."""
    return Scripted(lambda y: logits.expand(len(y), -1, -1) + 0.0)


def certain(p):
    """Return logits (T, V) that give token i of the text probability p[i] at position i, and let the others share the rest."""
    p = torch.tensor(p)
    logits = ((1 - p) / (V - 2)).log()[:, None].repeat(1, V)
    return logits.scatter(1, torch.arange(len(p))[:, None], p.log()[:, None])


# ---- corruption and loss ----

@pytest.mark.parametrize("t", [0.1, 0.5, 1.0])
def test_each_token_is_masked_with_probability_t_and_no_other_is_touched(t):
    n, size = 200, 500
    x0 = torch.randint(11, (n, size), generator=torch.Generator().manual_seed(0))
    xt = PROCESS.corrupt(x0, torch.full((n,), t), Noise(0, "train", 0, range(n)))
    masked = xt == MASK
    assert torch.equal(xt[~masked], x0[~masked]) and x0.max() < MASK
    assert abs(masked.double().mean() - t) <= 4 * math.sqrt(t * (1 - t) / (n * size))
    assert (abs(masked.double().mean(0) - t) <= 5 * math.sqrt(t * (1 - t) / n)).all(), "every position alike"
    assert abs(masked.sum(1).double().var() - size * t * (1 - t)) <= 0.5 * size * t * (1 - t), "each by itself: binomial"
    assert torch.equal(PROCESS.corrupt(x0, torch.zeros(n), Noise(0, "train", 0, range(n))), x0)


def test_the_mask_is_the_tokenizers():
    tokenizer = load_tokenizer("bytes")
    assert new_process("absorbing", tokenizer) == Absorbing(tokenizer.mask) != Absorbing(tokenizer.pad)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_loss_is_the_explicit_formula(weighted):
    """Softmax without MASK in numpy, position by position: masked ones only, over t, and over the fixed B * T."""
    model, batch = Spy(tiny_model()), ragged_batch()
    before = [x.clone() for x in batch]
    losses = Absorbing(MASK, weighted).loss(model, batch, train_noise(batch))
    t = 0.001 + 0.999 * train_noise(batch).stratified().numpy()
    noise, total, per_sequence = train_noise(batch), 0.0, np.zeros(4)
    xt = torch.where(noise.uniform(T) < torch.from_numpy(t)[:, None], MASK, batch.targets)
    assert torch.equal(model.fed[0], xt) and len(model.fed) == 1
    raw = model.model.decode(xt, model.model.encode(batch.inputs, batch.pad_mask, "bidirectional"), "bidirectional")
    for b in range(4):
        for i in range(T):
            if xt[b, i] == MASK:
                logits = np.delete(raw[b, i].detach().double().numpy(), MASK)
                nats = np.log(np.exp(logits).sum()) - logits[batch.targets[b, i]]  # ids below MASK keep their place
                total += nats / (t[b] if weighted else 1) / (4 * T)
                per_sequence[b] += nats / t[b] / T
    assert abs(float(losses.total.detach()) - total) < 1e-5
    assert abs(losses.per_sequence.numpy() - per_sequence).max() < 1e-4 and not losses.per_sequence.requires_grad
    assert abs(losses.t.numpy() - t).max() < 1e-6
    assert all(torch.equal(x, y) for x, y in zip(batch, before)), "nothing of the batch is written to"


def test_an_oracle_loses_nothing_and_only_when_aligned():
    batch = ragged_batch(lengths=(4,) * 20)
    batch.targets[:] = torch.tensor([1, 2, 3, 4, 5, EOS])
    assert PROCESS.loss(oracle(batch.targets), batch, train_noise(batch)).total < 1e-6
    for shift in (-1, 1):
        assert PROCESS.loss(oracle(batch.targets.roll(shift, dims=1)), batch, train_noise(batch)).total > 50


def test_what_is_not_masked_and_the_logit_of_mask_get_no_gradient_and_the_rest_does():
    logits = torch.randn(4, T, V, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model, batch = Scripted(lambda y: logits.clone()), ragged_batch()
    PROCESS.loss(model, batch, train_noise(batch)).total.backward()
    masked = model.fed[0] == MASK
    assert 0 < masked.sum() < masked.numel()
    assert not logits.grad[~masked].any() and not logits.grad[..., MASK].any()
    assert (logits.grad[masked].abs().sum(-1) > 1e-3).all()


def test_mask_is_never_predicted_however_much_the_model_wants_it():
    batch, likes_mask = ragged_batch(), torch.zeros(T, V)
    likes_mask[:, MASK] = 1e4
    plain = torch.zeros(T, V)
    losses = [PROCESS.loss(constant(x), batch, train_noise(batch)) for x in (plain, likes_mask)]
    assert torch.equal(losses[0].per_sequence, losses[1].per_sequence)
    for decoder in DECODERS["absorbing"]:
        drafts = [drafts_of(constant(x), batch, decoder, temperature=1.0, n_samples=3)[-1] for x in (plain, likes_mask)]
        assert torch.equal(*drafts) and not (drafts[0] == MASK).any()


def test_a_model_that_knows_nothing_loses_log_v_minus_1_a_token_at_every_level():
    batch = ragged_batch(lengths=(1,) * 4000)
    losses = PROCESS.loss(constant(torch.zeros(T, V)), batch, train_noise(batch))
    assert abs(losses.total - math.log(V - 1)) < 0.05
    for low in (0.2, 0.4, 0.6, 0.8):
        level = (losses.t > low) & (losses.t < low + 0.2)
        assert abs(losses.per_sequence[level].mean() - math.log(V - 1)) < 0.25


@pytest.mark.parametrize("t, masked", [(1e-3, "none"), (1e-3, "one"), (1.0, "all")])
def test_loss_and_gradients_are_finite_at_both_ends_and_where_nothing_is_masked(t, masked, monkeypatch):
    levels_at(monkeypatch, t)
    model, batch, noise = Spy(tiny_model()), ragged_batch(lengths=(0, 3)), train_noise(ragged_batch(lengths=(0, 3)))
    if masked == "one":
        noise.uniform = lambda *shape: (torch.arange(2 * T).view(2, T) > 0).double()
    batch.targets[:] = PAD  # an empty target
    batch.targets[:, 0] = EOS
    losses = PROCESS.loss(model, batch, noise)
    assert (model.fed[0] == MASK).sum() == {"none": 0, "one": 1, "all": 2 * T}[masked]
    losses.total.backward()
    assert torch.isfinite(losses.total) and torch.isfinite(losses.per_sequence).all()
    assert all(torch.isfinite(p.grad).all() for p in model.model.parameters())
    assert (losses.total == 0) == (masked == "none")
    if masked == "one":
        nats = -model.given[0][0, 0].log_softmax(-1)[EOS]
        assert abs(losses.total - nats / 1e-3 / (2 * T)) < 1e-2, "the weight stops at 1000"


# ---- decoding ----

@pytest.mark.parametrize("frozen", [[], [0, 3]])
@pytest.mark.parametrize("n_steps", range(1, 2 * T + 1))
def test_confidence_reveals_equally_many_a_step_and_the_most_certain_first(n_steps, frozen):
    p = torch.tensor([0.9, 0.3, 0.7, 0.99, 0.2, 0.5])
    model, batch = constant(certain(p.tolist())), ragged_batch(lengths=(4, 2))
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[:, frozen] = True
    drafts = drafts_of(model, batch, "confidence", n_steps=n_steps, temperature=0.0, frozen=mask)
    order = [i for i in p.argsort(descending=True).tolist() if i not in frozen]
    noise, *shown = [[i for i in order if draft[1, i] != MASK] for draft in drafts]
    counts = [len(after) - len(before) for before, after in zip([noise, *shown], shown)]
    assert all(revealed == order[:len(revealed)] for revealed in shown)
    assert noise == [] and shown[-1] == order and set(counts) <= {len(order) // n_steps, -(-len(order) // n_steps)}
    assert drafts[-1][1].tolist() == [int(batch.targets[1, i]) if i in frozen else i for i in range(T)]


@pytest.mark.parametrize("threshold, shown", [
    (0.0, [[0, 1, 2, 3, 4, 5]]), (0.2, [[0, 1, 2, 3, 4, 5]]), (0.55, [[0, 1, 2, 4], [5], [3]]),
    (0.9, [[0, 2, 4], [1], [5], [3]]), (1.0, [[4], [0], [2], [1], [5], [3]])])
def test_a_threshold_reveals_all_that_is_as_certain_and_always_the_most_certain(threshold, shown):
    model, batch = constant(certain([0.95, 0.6, 0.92, 0.3, 0.99, 0.5])), ragged_batch(lengths=(4,))
    options = dict(threshold=threshold, temperature=0.0)
    drafts = drafts_of(model, batch, n_steps=10, **options)
    assert all(torch.equal(y, draft) for y, draft in zip(model.fed, drafts))
    found = [((draft != MASK) & (before == MASK))[0].nonzero().flatten().tolist() for before, draft in zip(drafts, drafts[1:])]
    assert found == shown and drafts[-1][0].tolist() == list(range(T))
    short = drafts_of(constant(certain([0.95, 0.6, 0.92, 0.3, 0.99, 0.5])), batch, n_steps=2, **options)
    assert len(short) == 1 + min(2, len(shown)) and short[-1][0].tolist() == list(range(T)), "the last step reveals the rest"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_threshold_is_on_the_probability_of_the_token_that_was_drawn(temperature):
    """At temperature 1 an unlikely token may be drawn; it is not certain, however peaked the distribution is."""
    model, batch = constant(certain([0.95] * T)), ragged_batch(lengths=(1,) * 100)
    first = drafts_of(model, batch, threshold=0.9, temperature=temperature, n_steps=10)[1]
    unlikely = (first != torch.arange(T)) & (first != MASK)
    assert not unlikely.any() and (temperature == 0) == bool((first != MASK).all())


@pytest.mark.parametrize("block_len", [1, 2, 4, 6, 9])
def test_a_block_is_finished_before_the_next_begins_with_any_number_of_steps(block_len):
    model, batch = tiny_model(), ragged_batch()
    frozen = torch.zeros(4, T, dtype=torch.bool)
    frozen[1, [1, 4]], frozen[2, :2] = True, True
    for n_steps in range(1, 2 * T + 1):
        drafts = drafts_of(model, batch, "confidence", n_steps=n_steps, block_len=block_len, temperature=1.0, frozen=frozen)
        for draft in drafts[:-1]:
            for row, fixed in zip(draft, frozen):
                open_blocks = [i // block_len for i in range(T) if row[i] == MASK]
                begun = [i // block_len for i in range(T) if row[i] != MASK and not fixed[i]]
                assert not open_blocks or max(begun, default=0) <= min(open_blocks)
        assert not (drafts[-1] == MASK).any()


def test_without_blocks_tokens_are_revealed_out_of_order_and_with_blocks_of_one_from_left_to_right():
    p = [0.3, 0.9, 0.5, 0.7, 0.4, 0.8]
    for block_len, order in ((0, [1, 5, 3, 2, 4, 0]), (3, [1, 2, 0, 5, 3, 4]), (1, [0, 1, 2, 3, 4, 5])):
        drafts = drafts_of(constant(certain(p)), ragged_batch(lengths=(4,)), "confidence", n_steps=T, block_len=block_len,
                           temperature=0.0)
        revealed = [(a == MASK) & (b != MASK) for a, b in zip(drafts, drafts[1:])]
        assert [int(r[0].nonzero()) for r in revealed] == order


def transitions(**options):
    """Return per step (masked before, masked after), (steps, B, L) bool, of an oracle's ancestral decoding of 300 x 40."""
    x0 = torch.randint(9, (300, 40), generator=torch.Generator().manual_seed(0))
    model = oracle(x0)
    drafts = drafts_of(model, targets_only(x0), "ancestral", **options)
    assert all(((draft == MASK) | (draft == x0)).all() for draft in drafts) and torch.equal(drafts[-1], x0)
    assert torch.equal(torch.stack(model.fed), torch.stack(drafts[:-1]))
    return torch.stack(drafts[:-1]) == MASK, torch.stack(drafts[1:]) == MASK


def is_share(found, of, p):
    n = int(of.sum())
    return abs(int((found & of).sum()) / n - p) <= 4 * math.sqrt(max(p * (1 - p), 0) / n) + 1e-9


def test_ancestral_steps_reveal_at_their_rates_and_keep_what_is_decided():
    """A masked token is revealed with probability (t - s) / t, so a share s is masked afterwards."""
    masked, after = transitions(n_steps=5)
    assert len(after) == 5 and masked[0].all()
    for i in range(5):
        t, s = (5 - i) / 5, (4 - i) / 5
        assert is_share(~after[i], masked[i], (t - s) / t) and is_share(after[i], after[i] | True, s)
        assert not (after[i] & ~masked[i]).any()


def test_decoding_ends_when_no_token_is_masked():
    x0 = torch.randint(9, (2, T), generator=torch.Generator().manual_seed(0))
    count = lambda *decoder, **options: len(drafts_of(oracle(x0), targets_only(x0), *decoder, n_steps=12, **options)) - 1
    assert count("confidence") == T < 12 and count("threshold") == 1  # no evaluation that could reveal nothing
    nothing = torch.ones(2, T, dtype=torch.bool)
    some = nothing.clone()
    some[0, :2] = some[1, 2] = False
    assert count("confidence", frozen=some) == 2 and count("confidence", frozen=nothing) == 1
    assert count(frozen=nothing) == count("ancestral", frozen=nothing) == 1


@pytest.mark.parametrize("decoder", DECODERS["absorbing"])
def test_the_last_step_leaves_no_mask_whatever_is_drawn(decoder):
    """A number just below 1 must not keep a token masked."""
    batch, noise = ragged_batch(lengths=(4,)), Noise(0, "generate", 0, [0])
    noise.split = lambda n: noise
    noise.uniform = lambda *shape: torch.full((1, *shape), 1 - 2.0 ** -53, dtype=torch.float64)
    masked = batch._replace(targets=torch.full_like(batch.targets, MASK))
    for n_steps in (1, 3, 7, 10, 32):
        options = dict(n_samples=1, n_steps=n_steps)
        *_, draft = DECODERS["absorbing"][decoder](PROCESS, oracle(batch.targets), masked, noise, **options)
        assert torch.equal(draft, batch.targets)
