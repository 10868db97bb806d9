"""Gaussian diffusion: noise and loss against their formulas, the Euler sampler worked out by hand beside it."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import Scripted, Spy, T, V, oracle, ragged_batch, targets_only, tiny_model, train_noise
from data.tokenizer import load_tokenizer
from diffusion import Gaussian
from engine.noise import Noise
from pretrained.loading import new_process

PROCESS = Gaussian(vector_width=V)
sigma_at = lambda t: 0.1 * 200 ** t


def drafts_of(model, batch, **options):
    noise = Noise(0, "generate", 0, range(len(batch.targets)))
    return list(PROCESS.generate(model, batch, noise, **{"n_samples": 1, **options}))


def unscaled(model):
    """Return the z (steps, B, T, D_e) that a scripted model was fed, before they were scaled to unit variance."""
    return torch.stack([z * math.sqrt(1 / V + sigma_at(float(t[0])) ** 2) for z, t in zip(model.fed, model.noisy.level)])


def logits_of(seed=0):
    return 3 * torch.randn(T, V, generator=torch.Generator().manual_seed(seed))


# ---- noise ----

def test_the_logarithm_of_sigma_is_linear_in_t_between_its_ends():
    sigma = PROCESS.sigma(torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)).flatten()
    assert abs(sigma.numpy() - [0.1, 0.1 * 200 ** 0.25, math.sqrt(0.1 * 20), 20.0]).max() < 1e-9


def test_the_vectors_of_tokens_have_length_one_whatever_the_table():
    model = tiny_model(vector_width=8)
    with torch.no_grad():
        model.noisy.table.weight *= torch.linspace(0.01, 100, V)[:, None]
    tokens = torch.arange(V)[None]
    vectors = PROCESS.vectors(model, tokens)
    assert (vectors.norm(dim=-1) - 1).abs().max() < 1e-5
    assert (F.cosine_similarity(vectors, model.noisy.table(tokens), dim=-1) - 1).abs().max() < 1e-5


def test_the_noise_is_normal_of_width_sigma_of_each_rows_own_level():
    e = F.one_hot(torch.arange(8).repeat(100), 8).float().expand(3, -1, -1)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    noise = PROCESS.corrupt(e, t, Noise(0, "train", 0, range(3))) - e
    for row, sigma in zip(noise, (0.1, math.sqrt(2), 20)):
        assert abs(row.mean()) < 4 * sigma / row.numel() ** 0.5
        assert abs(row.std() / sigma - 1) < 4 / (2 * row.numel()) ** 0.5
    assert abs(np.corrcoef(noise.flatten(1).numpy()) - np.eye(3)).max() < 4 / noise[0].numel() ** 0.5


def test_what_the_model_reads_has_unit_variance_at_every_level_and_it_is_told_the_level():
    model, n = Scripted(lambda z: z), 300
    x0 = torch.randint(V, (n, 20), generator=torch.Generator().manual_seed(0))
    e = PROCESS.vectors(model, x0)
    for level in (0.0, 0.2, 0.5, 1.0):
        t = torch.full((n,), level, dtype=torch.float64)
        PROCESS.predict(model, PROCESS.corrupt(e, t, Noise(0, "train", 0, range(n))), t, model, e)
        assert abs(model.fed[-1].square().mean() - 1) < 0.02
        assert torch.equal(model.noisy.level[-1], t.float())
        assert abs(model.noisy.x_hat[-1].square().mean() - 1) < 1e-5


# ---- loss ----

@pytest.mark.parametrize("self_condition", [0.0, 1.0])
def test_the_loss_is_the_explicit_formula(self_condition):
    """Cross-entropy at every level alike, over all B * T positions; with self-conditioning from a first estimate."""
    model, batch = tiny_model(vector_width=8), ragged_batch()
    process = Gaussian(8, self_condition=self_condition)
    losses = process.loss(model, batch, train_noise(batch))
    t, eps = train_noise(batch).stratified(), train_noise(batch).normal(T, 8)
    with torch.no_grad():
        unit = model.noisy.table.weight / model.noisy.table.weight.norm(dim=1, keepdim=True)
        sigma = sigma_at(t)[:, None, None].float()
        z = (unit[batch.targets] + sigma * eps) / (1 / 8 + sigma ** 2).sqrt()
        context = model.encode(batch.inputs, batch.pad_mask, "bidirectional")
        logits = model.decode(model.noisy(z, torch.zeros_like(z), t.float()), context, "bidirectional")
        if self_condition:
            x_hat = torch.einsum("btv,vd->btd", logits.exp() / logits.exp().sum(-1, keepdim=True), unit) * math.sqrt(8)
            logits = model.decode(model.noisy(z, x_hat, t.float()), context, "bidirectional")
        p = (logits.exp() / logits.exp().sum(-1, keepdim=True)).gather(-1, batch.targets[..., None])[..., 0].double()
    assert abs(losses.total.detach() + p.log().mean()) < 1e-5
    assert (losses.per_sequence + p.log().mean(dim=1)).abs().max() < 1e-4 and not losses.per_sequence.requires_grad
    assert torch.equal(losses.t, t.float())


def test_an_oracle_loses_nothing_and_only_when_aligned():
    batch = ragged_batch(lengths=(4,))
    batch.targets[0] = torch.tensor([1, 2, 3, 4, 5, 6])
    assert PROCESS.loss(oracle(batch.targets), batch, train_noise(batch)).total < 1e-6
    for shift in (-1, 1):
        assert PROCESS.loss(oracle(batch.targets.roll(shift, dims=1)), batch, train_noise(batch)).total > 50


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_steps_sees_a_first_estimate_in_all_rows_and_the_others_see_zeros(share):
    """All rows of a step, and so all ranks and micro-batches, do the same: otherwise some would wait for a pass of others."""
    process, batch, n, seen = Gaussian(V, self_condition=share), ragged_batch(), 400, 0
    model = Scripted(lambda z: logits_of().expand(len(z), -1, -1))
    estimate = logits_of().softmax(-1) * math.sqrt(V)  # the vectors are unit vectors
    for step in range(n):
        model.fed.clear()
        model.noisy.x_hat.clear()
        process.loss(model, batch, train_noise(batch, step))
        *first, last = model.noisy.x_hat
        assert len(first) == len(model.fed) - 1 <= 1 and not any(x.any() for x in first)
        assert not last.any() or (last - estimate).abs().max() < 1e-5
        assert last.any() == bool(first)
        seen += len(first)
    assert abs(seen / n - share) <= 4 * math.sqrt(share * (1 - share) / n)


@pytest.mark.parametrize("self_condition", [0.0, 1.0])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_every_tensor_learns_the_table_of_vectors_too_and_none_through_the_first_estimate(self_condition, half):
    """Under autocast too: weights that it has cast to bfloat16 without a gradient must not be used again with one."""
    model, batch = tiny_model(vector_width=8), ragged_batch()
    spy = Spy(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        losses = Gaussian(8, self_condition=self_condition).loss(spy, batch, train_noise(batch))
    losses.total.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(torch.isfinite(g).all() and g.abs().max() > 1e-4 for g in gradient.values()), gradient
    assert [logits.requires_grad for logits in spy.given] == [False] * (len(spy.given) - 1) + [True]
    assert len(spy.given) == 1 + self_condition


def test_loss_and_gradients_are_finite_at_both_ends_of_the_schedule(monkeypatch):
    for t in (0.0, 1 - 2.0 ** -53):
        monkeypatch.setattr(Noise, "stratified", lambda self, t=t: torch.full((len(self.rows),), t, dtype=torch.float64))
        model, batch = tiny_model(vector_width=8), ragged_batch(lengths=(0, 0, 4, 2))
        losses = Gaussian(8).loss(model, batch, train_noise(batch))
        losses.total.backward()
        assert torch.isfinite(losses.total) and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_vector_width_is_that_of_the_table_of_the_noise_and_of_the_process():
    tokenizer = load_tokenizer("bytes")
    assert new_process("gaussian", tokenizer, vector_width=5) == Gaussian(5) != new_process("gaussian", tokenizer)
    model, batch, widths = tiny_model(vector_width=5), ragged_batch(), []
    model.noisy.register_forward_pre_hook(lambda _, args: widths.append([x.size(-1) for x in args[:2]]))
    Gaussian(5).loss(model, batch, train_noise(batch))
    list(Gaussian(5).generate(model, batch, train_noise(batch), n_steps=1))
    assert model.noisy.table.weight.shape == (V, 5) and all(pair == [5, 5] for pair in widths)


# ---- decoding ----

@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_the_steps_are_those_of_euler_and_the_model_sees_its_last_estimate(temperature):
    """z_s = z_t + (sigma_s - sigma_t) (z_t - x_hat) / sigma_t, x_hat the mean vector of softmax(logits / temperature)."""
    model, batch = Scripted(lambda z: logits_of(len(model.fed)).expand(len(z), -1, -1)), ragged_batch()
    drafts = drafts_of(model, batch, n_steps=5, temperature=temperature)
    levels = [sigma_at(1 - i / 5) for i in range(5)]
    noise = Noise(0, "generate", 0, range(4)).split(1)
    z, x_hat = levels[0] * noise.normal(T, V).double(), torch.zeros(4, T, V, dtype=torch.float64)
    for i, found in enumerate(unscaled(model)):
        assert (found - z).abs().max() < 1e-4 * max(levels[i], 1)
        assert (model.noisy.x_hat[i] - x_hat * math.sqrt(V)).abs().max() < 1e-5
        logits = logits_of(i + 1).double()
        assert torch.equal(drafts[1 + i], logits.argmax(-1).expand(4, -1)), "a draft is the likeliest tokens at any temperature"
        p = (logits / temperature).softmax(-1) if temperature else F.one_hot(logits.argmax(-1), V).double()
        x_hat = p.expand(4, -1, -1)
        if i < 4:
            z = z + (levels[i + 1] - levels[i]) * (z - x_hat) / levels[i]


def test_frozen_positions_are_their_vectors_with_the_noise_of_every_level():
    """The same noise throughout, shrunk as that of the other positions is; so at the end the model sees them almost clean."""
    frozen = torch.zeros(4, T, dtype=torch.bool)
    frozen[:, [1, 4]] = True
    batch = ragged_batch()
    model = oracle((batch.targets + 1) % 9)
    drafts_of(model, batch, n_steps=6, frozen=frozen)
    e = F.one_hot(batch.targets, V)
    eps = [((z - e) / sigma_at(float(t[0])))[frozen] for z, t in zip(unscaled(model), model.noisy.level)]
    assert abs(eps[0].mean()) < 4 / eps[0].numel() ** 0.5 and abs(eps[0].std() - 1) < 0.3
    assert all((later - eps[0]).abs().max() < 1e-3 for later in eps[1:])


def test_with_pure_noise_to_start_from_no_trace_of_the_targets_is_left_where_nothing_is_frozen():
    x0 = torch.randint(9, (500, T), generator=torch.Generator().manual_seed(0))
    model = oracle(x0)
    drafts_of(model, targets_only(x0), n_steps=1)
    eps = unscaled(model)[0] / 20
    assert abs(float((eps * F.one_hot(x0, V)).sum(-1).mean())) < 4 / x0.numel() ** 0.5
    assert (eps - Noise(0, "generate", 0, range(500)).split(1).normal(T, V)).abs().max() < 1e-5


def test_an_ideal_denoiser_of_two_texts_is_sampled_from_in_their_proportions():
    """Its logits are the exact posterior, log p(text) - |z - e(text)|^2 / (2 sigma^2): the flow from noise splits 1 : 3."""
    texts, prior = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 1, 2, 3]]), torch.tensor([0.25, 0.75])

    def posterior(z):
        t = float(model.noisy.level[-1][0])
        z = z * math.sqrt(1 / V + sigma_at(t) ** 2)
        distance = ((z[:, None] - F.one_hot(texts, V)) ** 2).sum((-1, -2))               # (B, 2)
        p = (prior.log() - distance / (2 * sigma_at(t) ** 2)).softmax(-1)
        return torch.einsum("bk,ktv->btv", p, F.one_hot(texts, V).float()).clamp(min=1e-30).log()
    model, n = Scripted(posterior), 2000
    drawn = drafts_of(model, targets_only(torch.zeros(n, T, dtype=torch.long)), n_steps=60)[-1]
    is_text = (drawn[:, None] == texts).all(-1)                                          # (n, 2)
    assert is_text.any(1).all() and abs(is_text[:, 0].double().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n) + 0.01
