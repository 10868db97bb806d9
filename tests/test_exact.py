"""Bounds and samplers against enumeration: a random joint distribution over all V^L texts, and the ideal denoiser of it.

The ideal denoiser knows p(x0_l | xt) exactly. Given that, a bound must equal -log p(x0) for every single x0, and a sampler that
simulates the reverse process must draw from the joint. What a bound averages over is enumerated wherever that is possible:
`Cases` is a noise whose rows run through all cases, to be weighted with their probabilities afterwards.
"""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autoregressive import Autoregressive
from beyond import likelihood
from beyond.decoders import DECODERS
from data.dataset import Batch
from diffusion import Absorbing, Gaussian, Uniform
from engine.noise import Noise

STEPS = (1, 2, 4, 8, 16, 32)


# ---- the toy ----

class Toy:
    """A random joint over the N = V^L texts S. MASK is V. Tokens have vectors on the unit circle; two tokens, 1 and -1."""

    def __init__(self, V=4, L=2, seed=1):
        self.V, self.L = V, L
        self.S = torch.tensor(list(itertools.product(range(V), repeat=L)))               # (N, L)
        self.masked = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))      # ((V + 1)^L, L), with MASK too
        self.p = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(V ** L)))  # (N,)
        self.nll, self.entropy = -self.p.log(), float(-(self.p * self.p.log()).sum())
        angle = torch.arange(V) * 2 * math.pi / V
        self.E = torch.stack([angle.cos(), angle.sin()], dim=-1)[:, :V - 1]                # (V, D_e), D_e = 2, or 1 for V = 2

    def log_likelihood(self, name, xt, t):
        """Return log q(xt | x0), (B, N), of all texts up to a constant of the row; t (B,), or sigma_t of normal noise."""
        if name == "uniform":
            t = t[:, None, None]
            return ((1 - t) * (xt[:, None] == self.S) + t / self.V).log().sum(-1)
        if name == "absorbing":
            return ((xt[:, None] == self.S) | (xt[:, None] == self.V)).all(-1).double().log()
        distance = (xt.double()[:, None] - self.E[self.S]).square().sum((-1, -2))
        return -distance / (2 * t[:, None] ** 2)

    def posterior(self, log_likelihood):
        """Return log p(x0_l = v | xt), (B, L, V)."""
        p = (log_likelihood + self.p.log()).softmax(-1)                                  # (B, N)
        return (p @ F.one_hot(self.S, self.V).double().flatten(1)).view(-1, self.L, self.V).log()


class Model:
    """No weights: encode() yields itself, decode() is a function of y; the vectors of the tokens are three times too long."""

    def __init__(self, toy, decode=None):
        self.noisy = SimpleNamespace(table=torch.nn.Embedding.from_pretrained(3 * toy.E))
        self.decode = lambda y, context, attention, belief=None: decode(y)

    def encode(self, inputs, pad_mask, attention):
        return self

    def repeat(self, n):
        return self


class Ideal(Model):
    """The ideal denoiser of a toy for a process. No process tells a network that reads tokens how noisy they are. So unless
    `blind`, this one is told in two ways: times, the level of each of its coming evaluations, and a tell() for the bound."""

    def __init__(self, process, toy, change=lambda logits: logits, blind=False):
        super().__init__(toy)
        self.name, self.toy, self.change, self.blind, self.times = process.name, toy, change, blind, []
        self.tell = likelihood.tell if blind else lambda V, logits, xt, t: self.predict(xt, t)
        self.decode = lambda y, context, attention, belief=None: self.predict(y, self.times.pop(0) if self.times else None)
        if process.name == "gaussian":
            process.predict = lambda model, z, t, context, x_hat: self.predict(z, process.sigma(t).flatten())

    def predict(self, xt, t=None):
        """Return logits (B, L, V) for levels t (B,), for one of all rows, or for None, unknown and uniform in [0, 1]."""
        toy, base = self.toy, self.toy.V + (self.name == "absorbing")
        t = None if self.blind else t
        if torch.is_tensor(t):
            return self.change(toy.posterior(toy.log_likelihood(self.name, xt, t)))
        states = toy.S if base == toy.V else toy.masked  # look each one up
        nodes, weights = legendre(0.0) if t is None else (torch.tensor([t], dtype=torch.float64), torch.ones(1))
        averaged = torch.stack([toy.log_likelihood(self.name, states, node.expand(len(states))) for node in nodes])
        logits = self.change(toy.posterior((averaged + weights.log()[:, None, None]).logsumexp(0)))
        return F.pad(logits, (0, base - toy.V))[(xt * base ** torch.arange(toy.L - 1, -1, -1)).sum(1)]


def processes(toy):
    return Uniform(toy.V), Absorbing(toy.V), Gaussian()


def perturbed(toy, seed):
    """Return a change of the logits: another temperature, and something added to the logit of each token at each place."""
    rng = torch.Generator().manual_seed(seed)
    scale, shift = torch.randn(1, generator=rng).mul(0.3).exp(), torch.randn(toy.L, toy.V, generator=rng).mul(0.5)
    return lambda logits: scale * logits + shift


def bound(process, model, x0, noise, n_draws=1):
    """Return the bound of texts x0 by beyond/likelihood.py, (B,) nats, with the model's own tell()."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "tell", getattr(model, "tell", likelihood.tell))
        return likelihood.bound_of(process)(process, model, batch_of(x0), noise, n_draws)


class Cases:
    """A noise that is given: level (B,), then the numbers of each place (B, L), tokens (B, L), normal numbers (B, L, D_e)."""

    def __init__(self, level, places=None, tokens=None, normals=()):
        self.level, self.places, self.tokens, self.normals = level, places, tokens, list(normals)

    def uniform(self, *shape):
        return self.places if shape else self.level

    def stratified(self):
        return self.level

    def integers(self, high, *shape):
        assert high == self.tokens.max() + 1, "noise draws from all tokens"
        return self.tokens

    def normal(self, *shape):
        return self.normals.pop(0)


class Quick(Noise):
    """Noise of n rows by one generator, for many rows."""

    def __init__(self, n, seed=0):
        self.n, self.rng = n, np.random.default_rng(seed)

    def split(self, n):
        assert n == 1
        return self

    def uniform(self, *shape):
        return torch.from_numpy(self.rng.random((self.n, *shape)))

    def normal(self, *shape):
        return torch.from_numpy(self.rng.standard_normal((self.n, *shape), dtype=np.float32))

    def integers(self, high, *shape):
        return torch.from_numpy(self.rng.integers(0, high, (self.n, *shape)))


def batch_of(x0):
    return Batch(x0[:, :0], None, x0)


def product(*sizes):
    """Return index tensors that run through all combinations, the last fastest."""
    return (i.flatten() for i in torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij"))


def legendre(low, n=40):
    """Return nodes and weights of the integral over [low, 1], in log t where low > 0: the integrands there are like log t."""
    y, w = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(n))
    if low == 0:
        return (y + 1) / 2, w / 2
    t = (-math.log(low) * (y - 1) / 2).exp()
    return t, w * t * -math.log(low) / 2


# ---- exact expectations of the bounds, by x0: (N,) ----

def uniform_cases(toy):
    """Return (x0, xt, t, probability) of all pairs at every quadrature node of t; the probabilities of an x0 add up to 1."""
    nodes, weights = legendre(likelihood.T_MIN)
    i, j, k = product(len(toy.S), len(toy.S), len(nodes))
    x0, xt, t = toy.S[i], toy.S[j], nodes[k]
    chance = ((1 - t[:, None]) * (x0 == xt) + t[:, None] / toy.V).prod(-1)               # q(xt | x0)
    return x0, xt, t, chance * weights[k]


def uniform_bound(process, toy, model):
    x0, xt, t, chance = uniform_cases(toy)
    low = likelihood.T_MIN
    noise = Cases((t - low) / (1 - low), torch.zeros(xt.shape, dtype=torch.float64), xt)  # all replaced, by xt
    nats = bound(process, model, x0, noise) * chance / (1 - low)                         # the bound has a factor 1 - low
    return nats.view(len(toy.S), -1).sum(1)


def absorbing_bound(process, toy, model):
    orders = torch.tensor(list(itertools.permutations(range(toy.L))), dtype=torch.float64)
    i, j, k = product(len(toy.S), len(orders), toy.L)
    return bound(process, model, toy.S[i], Cases((k + 0.5) / toy.L, orders[j])).view(len(toy.S), -1).mean(1)


def gaussian_bound(process, toy, model):
    """Trapezoids of width 0.3 in the L * D_e normal numbers, here two: converged, for the integrand is smooth and decays."""
    grid = torch.arange(-6, 6.01, 0.3, dtype=torch.float64)
    (nodes, weights), density = legendre(0.0), (-grid ** 2 / 2).exp() / (-grid ** 2 / 2).exp().sum()
    i, j, k, m = product(len(toy.S), len(nodes), len(grid), len(grid))
    normals = torch.stack([grid[k], grid[m]], dim=-1).view(len(k), toy.L, -1)            # (B, L, D_e)
    nats = bound(process, model, toy.S[i], Cases(nodes[j], normals=[normals, normals]))
    return (nats * weights[j] * density[k] * density[m]).view(len(toy.S), -1).sum(1)


EXPECTED = {"uniform": uniform_bound, "absorbing": absorbing_bound, "gaussian": gaussian_bound}


def expected_bound(process, toy, *options, **more):
    """Return the exact expectation of the bound of the ideal denoiser, (N,)."""
    return EXPECTED[process.name](process, toy, Ideal(process, toy, *options, **more))


# ---- the law of a sampler: kernels of the textbook, one state at a time ----

def law(process, toy, model, times):
    """Return the distribution (N,) of what the ancestral sampler draws, from its transition matrices between noise levels."""
    V, uniform = toy.V, process.name == "uniform"
    states = toy.S if uniform else toy.masked                                            # (M, L)
    p = torch.full((len(states),), 1.0, dtype=torch.float64) / len(states) if uniform else (states == V).all(1).double()
    eye = torch.eye(V, dtype=torch.float64)
    for t, s in itertools.pairwise(times):
        d = model.predict(states, t)[..., :V].exp()                                      # (M, L, V): p(x0 = y)
        d = d / d.sum(-1, keepdim=True)
        if uniform:
            jump = lambda a: a * eye + (1 - a) / V                                       # [from, to], keeping share a
            bayes = jump(1 - s)[:, :, None] * jump((1 - t) / (1 - s))[None] / jump(1 - t)[:, None]  # [x0, xs, xt]
            kernel = torch.einsum("mly,ysml->mls", d, bayes[:, :, states])
        else:
            reveal, shown = (t - s) / t, F.one_hot(states, V + 1).double()
            kernel = torch.where(states[..., None] == V, F.pad(reveal * d, (0, 1), value=1 - reveal), shown)
        matrix = torch.ones(len(states), len(states), dtype=torch.float64)
        for place in range(toy.L):
            matrix = matrix * kernel[:, place][:, states[:, place]]
        p = p @ matrix
    return p if uniform else p[(states < V).all(1)]


def even(n_steps):
    return [1 - i / n_steps for i in range(n_steps + 1)]


def own_nll(process, toy, model, n=60):
    """Return -log p of each text under the reverse process itself, in continuous time: extrapolated from n and 2n steps."""
    times = lambda n: [10 ** (-5 * i / n) for i in range(n + 1)] + [0.0]                 # finer and finer: rates are like 1/t
    return -(2 * law(process, toy, model, times(2 * n)) - law(process, toy, model, times(n))).log()


def drafts_of(process, model, L, n_steps, n, decoder=None, **options):
    """Yield the drafts (n, L) of a decoder at temperature 1, told the level of each step."""
    model.times = [t for t in even(n_steps)[:-1]]
    batch, options = batch_of(torch.zeros(n, L, dtype=torch.long)), dict(temperature=1.0, n_samples=1) | options
    return DECODERS[process.name][decoder or process.decoder](process, model, batch, Quick(n), n_steps=n_steps, **options)


def sample(process, toy, model, n_steps, n=80_000, **options):
    """Return the frequencies (N,) of the texts that a decoder draws at temperature 1."""
    *_, drawn = drafts_of(process, model, toy.L, n_steps, n, **options)
    code = (drawn * toy.V ** torch.arange(toy.L - 1, -1, -1)).sum(1)
    return torch.bincount(code, minlength=len(toy.S)) / n


def distance(p, q):
    return float((p - q).abs().sum() / 2)


def noise_of(p, n=80_000):
    """Return the distance that n draws from p itself have on average: E|x| of a normal number is sqrt(2 / pi)."""
    return float((2 / math.pi * p * (1 - p) / n).sqrt().sum() / 2)


# ---- bounds ----

@pytest.mark.parametrize("V, L", [(4, 2), (3, 3)])
def test_the_uniform_bound_of_the_ideal_denoiser_is_the_negative_log_likelihood_of_each_text(monkeypatch, V, L):
    """Relative to the entropy: -0.07 % at T_MIN = 1e-4, and -1e-7 at 1e-8, so that all of the gap is T_MIN's."""
    toy = Toy(V, L)
    nats = expected_bound(Uniform(V), toy)
    assert abs((nats * toy.p).sum() / toy.entropy - 1) < 1e-3
    assert (nats / toy.nll - 1).abs().max() < 3e-3
    monkeypatch.setattr(likelihood, "T_MIN", 1e-8)
    assert (expected_bound(Uniform(V), toy) / toy.nll - 1).abs().max() < 1e-5


@pytest.mark.parametrize("V, L", [(4, 2), (3, 3)])
def test_the_absorbing_bound_of_the_ideal_denoiser_is_the_negative_log_likelihood_of_each_text(V, L):
    toy = Toy(V, L)
    assert (expected_bound(Absorbing(V), toy) - toy.nll).abs().max() < 1e-6


@pytest.mark.parametrize("V, L", [(2, 2), (4, 1)])
def test_the_gaussian_bound_of_the_ideal_denoiser_is_the_negative_log_likelihood_of_each_text(V, L):
    """But for what z_1 still knows of x0, at most L / (2 sigma_max^2) on average: 0.16 % and 0.06 % of the entropy."""
    toy = Toy(V, L)
    nats = expected_bound(Gaussian(), toy)
    assert -1e-4 < (nats * toy.p).sum() - toy.entropy < L / (2 * 20 ** 2) < 0.01 * toy.entropy
    assert (nats - toy.nll).abs().max() < 2 * L / 20 ** 2
    further = expected_bound(Gaussian(sigma_max=200.0), toy)
    assert (further - toy.nll).abs().max() < 2 * L / 200 ** 2 + 1e-4


def test_the_gaussian_bound_counts_what_the_least_noise_already_hides():
    """At sigma_min = 0.7 z_0 does not show the token for sure: the second of the three terms, next to nothing at 0.1."""
    toy = Toy(4, 1)
    assert (expected_bound(Gaussian(sigma_min=0.7), toy) - toy.nll).abs().max() < 2 / 20 ** 2


@pytest.mark.parametrize("V, L", [(4, 2), (3, 3)])
def test_the_autoregressive_bound_is_the_negative_log_likelihood_exactly(V, L):
    toy = Toy(V, L)

    def decode(y):
        """Return log p(x0_i | x0_<i), each read off the joint; y is [start, x0_<L]."""
        agrees = (y[:, None, 1:] == toy.S[:, :-1]).cumprod(-1)                           # (B, N, L - 1)
        agrees = F.pad(agrees, (1, 0), value=1).double() * toy.p[:, None]                # (B, N, L): p(x0) where x0_<i agrees
        p = torch.einsum("bnl,nlv->blv", agrees, F.one_hot(toy.S, V).double())
        return (p / p.sum(-1, keepdim=True)).log()

    nats = bound(Autoregressive(start=V, eos=V + 1, pad=V + 1), Model(toy, decode), toy.S, None)
    assert (nats - toy.nll).abs().max() < 1e-6


def test_with_the_noise_of_training_the_bounds_of_the_ideal_denoiser_are_the_entropy_too():
    """The weights of the enumeration above are the tests' own; here the processes draw their noise themselves."""
    toy = Toy()
    for process, n, largest in zip(processes(toy), (500, 200, 500), (0.02, 0.001, 0.02)):
        x0 = toy.S.repeat_interleave(n, dim=0)
        nats = bound(process, Ideal(process, toy), x0, Quick(len(x0)), 32).view(-1, n)
        error = float(((toy.p ** 2 * nats.var(1) / n).sum()).sqrt())
        assert error < largest * toy.entropy, process.name
        assert abs((toy.p * nats.mean(1)).sum() - toy.entropy) < 4 * error + 0.002 * toy.entropy, process.name


def test_a_real_noise_gives_the_uniform_bound_as_the_quick_one_does():
    toy = Toy()
    x0 = toy.S.repeat_interleave(50, dim=0)
    process, noise = Uniform(4), Noise(0, "valid", 0, range(len(x0)))
    nats = bound(process, Ideal(process, toy), x0, noise, 32).view(-1, 50)
    error = float(((toy.p ** 2 * nats.var(1) / 50).sum()).sqrt())
    assert abs((toy.p * nats.mean(1)).sum() - toy.entropy) < 4 * error < 0.3 * toy.entropy


@pytest.mark.parametrize("seed", range(5))
def test_the_bounds_of_other_denoisers_lie_above_the_entropy(seed):
    """0.01 to 0.8 nats above it, of 2.17 (0.79 for Gaussian). They also add up to no more than one as probabilities: sum of
    exp(-bound) <= 1, which is so of bounds of the log likelihood of any model, and sharper than the entropy."""
    for process in processes(toy := Toy()):
        toy = Toy(2, 2) if process.name == "gaussian" else toy
        nats = expected_bound(process, toy, perturbed(toy, seed))
        assert (nats * toy.p).sum() > toy.entropy + 0.005, process.name
        assert (-nats).exp().sum() < 1.0, process.name


@pytest.mark.parametrize("seed", range(5))
def test_the_bounds_of_other_denoisers_lie_above_their_own_negative_log_likelihood_of_each_text(seed):
    toy = Toy()
    for process in processes(toy)[:2]:
        model = Ideal(process, toy, perturbed(toy, seed))
        assert (EXPECTED[process.name](process, toy, model) - own_nll(process, toy, model)).min() > -2e-3, process.name


def test_a_denoiser_that_is_not_told_t_is_told_by_the_bound(monkeypatch):
    """This is what our network can learn. Entropy 2.17. As it is, its own likelihood is 2.4, its bound 3.3, 5.8, 8.2 at T_MIN
    1e-2, 1e-4, 1e-6: where t is tiny it still expects some replaced token, so its process would jump there at a rate like 1/t.
    Told t by tell(): 2.39, 2.49, 2.49.
    """
    toy, process = Toy(), Uniform(4)
    untold, told = Ideal(process, toy, blind=True), Ideal(process, toy, blind=True)
    untold.tell = lambda V, logits, xt, t: logits
    assert (uniform_bound(process, toy, untold) > own_nll(process, toy, untold)).all()
    at, told_at = [], []
    for low in (1e-2, 1e-4, 1e-6):
        monkeypatch.setattr(likelihood, "T_MIN", low)
        at.append(float((uniform_bound(process, toy, untold) * toy.p).sum()))
        nats = uniform_bound(process, toy, told)
        told_at.append(float((nats * toy.p).sum()))
    assert (-nats).exp().sum() <= 1
    assert toy.entropy < at[0] < 4 < at[1] < 7 < at[2]
    assert toy.entropy < told_at[0] < told_at[2] < 2.55 and told_at[2] - told_at[1] < 0.02


def test_to_plug_the_denoiser_into_the_usual_integrand_of_uniform_diffusion_is_wrong():
    """UDLM (arXiv 2412.10193) in the form of DUO (2506.10892), where the model predicts x0_l from all of xt but xt_l. With that
    prediction it is the entropy, 2.170. With p(x0_l | xt), which cross-entropy trains, it is 3.421.
    """
    toy = Toy()
    x0, xt, t, weight = uniform_cases(toy)
    a, V = 1 - t[:, None, None], toy.V
    d = toy.posterior(toy.log_likelihood("uniform", xt, t)).exp()
    without = d / (a * F.one_hot(xt, V) + (1 - a) / V)  # as if xt_l had not been seen, up to a factor

    def entropy(prediction):
        here, model = (V * a * p + 1 - a for p in (F.one_hot(x0, V), prediction))
        ratio, model_ratio = (q / q.gather(-1, xt[..., None]) for q in (here, model))
        nats = (ratio * (ratio / model_ratio).log() - ratio + model_ratio).sum((1, 2)) / (V * a[:, 0, 0])
        return float((nats * weight).view(len(toy.S), -1).sum(1) @ toy.p)

    assert abs(entropy(without / without.sum(-1, keepdim=True)) / toy.entropy - 1) < 1e-3
    assert entropy(d) > 1.3 * toy.entropy


def test_a_higher_t_min_makes_the_uniform_bound_visibly_too_small(monkeypatch):
    """-3.9 %, -0.55 %, -0.07 % at 1e-2, 1e-3, 1e-4."""
    toy, gap = Toy(), {}
    assert likelihood.T_MIN <= 1e-4
    for low in (1e-2, 1e-3, 1e-4):
        monkeypatch.setattr(likelihood, "T_MIN", low)
        gap[low] = float((expected_bound(Uniform(4), toy) * toy.p).sum() / toy.entropy - 1)
    assert -0.06 < gap[1e-2] < -0.02 < -0.01 < gap[1e-3] < -0.002 < -0.001 < gap[1e-4] < 0


def test_each_draw_of_a_bound_has_its_own_stratum_of_noise_levels():
    low, t = 0.1, torch.stack(list(likelihood.levels(9, Quick(1000), 0.1)))
    edges = low + (1 - low) * torch.arange(10, dtype=torch.float64)[:, None] / 9
    assert ((edges[:-1] <= t) & (t < edges[1:])).all()
    assert (t.mean(1, keepdim=True) - (edges[:-1] + edges[1:]) / 2).abs().max() < 4 * 0.1 / math.sqrt(12 * 1000)


def test_a_model_that_predicts_uniformly_scores_log_v():
    toy = Toy(3, 3)
    zeros = Model(toy, lambda y: torch.zeros(*y.shape, 3))
    with_mask = Model(toy, lambda y: torch.zeros(*y.shape, 4))
    ar, batch = Autoregressive(start=3, eos=4, pad=4), batch_of(toy.S)
    log_v = lambda x, times=1: (x - times * math.log(3)).abs().max() < 1e-5
    assert log_v(bound(ar, zeros, toy.S, None), 3) and log_v(ar.loss(zeros, batch, None).per_sequence)
    assert log_v(bound(Absorbing(3), with_mask, toy.S, Quick(27)), 3), "whatever the number of masked tokens"
    noise = Quick(27)
    assert log_v(Uniform(3, n_unroll=1).loss(zeros, batch, noise).per_sequence), "at all 27 levels"
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)  # 0 = masked
    t = (masks == 0).double().mean(1)
    losses = Absorbing(3).loss(with_mask, batch_of(toy.S[:8]), Cases((t - 1e-3) / (1 - 1e-3), masks))
    assert log_v(losses.per_sequence[1:-1]), "where a share t is masked"


def test_the_uniform_bound_of_a_model_that_knows_nothing_of_the_text_is_log_v():
    """Equal logits whatever is fed: two tokens cost 2 log 4. Not told t they would cost 13.9 nats."""
    toy, process = Toy(), Uniform(4)
    blank = Model(toy, lambda y: torch.zeros(*y.shape, 4))
    assert (uniform_bound(process, toy, blank) / (2 * math.log(4)) - 1).abs().max() < 1e-3
    blank.tell = lambda V, logits, xt, t: logits
    assert (uniform_bound(process, toy, blank) > 4 * 2 * math.log(4)).all()


def test_the_absorbing_bound_by_counts_is_the_one_with_1_over_t_and_varies_less():
    """By counts k: weight L/k, masks of k alike. By t: integral of t^(k-1) (1-t)^(L-k), a beta function. Standard deviation of
    one draw, rms over x0: 1.5 by counts, 5.8 by t in [1e-3, 1], as the training loss draws it; without that cut infinite."""
    toy = Toy(3, 3)
    L, process = toy.L, Absorbing(3)
    model = Ideal(process, toy, perturbed(toy, 0))                                       # nothing is a constant here
    patterns = torch.tensor(list(itertools.product((False, True), repeat=L)))
    i, j = product(len(toy.S), len(patterns))
    x0, masked, k = toy.S[i], patterns[j], patterns[j].sum(1).double()
    log_d = model.predict(torch.where(masked, 3, x0))[..., :3].log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    nats = -log_d.masked_fill(~masked, 0.0).sum(1)
    beta = torch.where(k > 0, (k.clamp(min=1).lgamma() + (L - k + 1).lgamma() - torch.tensor(L + 1.0).lgamma()).exp(), 0.0)
    assert ((nats * beta).view(len(toy.S), -1).sum(1) - absorbing_bound(process, toy, model)).abs().max() < 1e-5

    nodes, weights = legendre(1e-3)
    i, j, m = product(len(toy.S), len(patterns), len(nodes))
    t, k = nodes[m], patterns[j].sum(1)
    chance = t ** k * (1 - t) ** (L - k) * weights[m] / (1 - 1e-3)
    noise = Cases((t - 1e-3) / (1 - 1e-3), (~patterns[j]).double())
    by_t = L * process.loss(model, batch_of(toy.S[i]), noise).per_sequence
    moment = lambda n: (by_t ** n * chance).view(len(toy.S), -1).sum(1)
    assert (moment(1) / absorbing_bound(process, toy, model) - 1).abs().max() < 2e-3, "0.1 % is lost below 1e-3"
    orders = torch.tensor(list(itertools.permutations(range(L))), dtype=torch.float64)
    i, j, n = product(len(toy.S), len(orders), L)
    by_count = bound(process, model, toy.S[i], Cases((n + 0.5) / L, orders[j])).view(len(toy.S), -1)
    deviation = [float((variance @ toy.p).sqrt()) for variance in (by_count.var(1, correction=0), moment(2) - moment(1) ** 2)]
    assert deviation[0] < 0.5 * deviation[1], deviation


# ---- samplers ----

@pytest.mark.parametrize("process", [Uniform(4), Absorbing(4)])
def test_the_ancestral_samplers_draw_from_the_joint_in_the_limit_of_many_steps(process):
    """Total variation to the joint, exact; drawn texts agree with each of these laws within the noise of 80,000 draws (0.005).

    steps                 1      2      4      8     16     32    512
    uniform           0.316  0.203  0.109  0.055  0.027  0.013  0.001   like 1/n
    absorbing         0.316  0.158  0.079  0.039  0.020  0.010  0.001   TV(1)/n: two tokens share a step with probability 1/n
    """
    toy, curve = Toy(), []
    model = Ideal(process, toy)
    for n_steps in STEPS:
        p = law(process, toy, model, even(n_steps))
        drawn = sample(process, toy, model, n_steps, decoder="ancestral")
        assert distance(drawn, p) < 1.6 * noise_of(p), n_steps
        curve.append(distance(p, toy.p))
        if process.name == "absorbing":
            assert abs(curve[-1] - curve[0] / n_steps) < 1e-6
    assert all(b < 0.8 * a for a, b in zip(curve[:-1], curve[1:])), curve
    assert distance(drawn, toy.p) < curve[-1] + 1.6 * noise_of(toy.p)
    assert distance(law(process, toy, model, even(512)), toy.p) < 0.001


def test_after_every_step_of_the_absorbing_sampler_a_share_s_of_the_tokens_is_masked():
    toy, process, n, n_steps = Toy(), Absorbing(4), 20_000, 10
    drafts = list(drafts_of(process, Ideal(process, toy), toy.L, n_steps, n, decoder="ancestral"))
    assert len(drafts) == 1 + n_steps
    for draft, s in zip(drafts, even(n_steps)):
        assert abs((draft == 4).double().mean() - s) <= 4 * math.sqrt(s * (1 - s) / (toy.L * n)), s
    assert not any(((later == 4) & (draft < 4)).any() for draft, later in itertools.pairwise(drafts)), "what is decided stays"


@pytest.mark.slow
def test_the_gaussian_sampler_draws_from_the_joint_in_the_limit_of_many_steps():
    """Total variation, steps 1 to 32: 0.64, 0.23, 0.07, 0.04, 0.02, 0.014, where 80,000 draws from the joint have 0.005.

    It starts from normal noise without the mean m of the vectors; that alone is at most |m| / (2 sigma_max) (Pinsker): 0.016.
    """
    toy, gaussian = Toy(), Gaussian()
    model = Ideal(gaussian, toy)
    curve = [distance(sample(gaussian, toy, model, n_steps), toy.p) for n_steps in STEPS]
    mean = torch.einsum("n,nld->ld", toy.p, toy.E.double()[toy.S]).norm()
    assert all(b < 0.8 * a for a, b in zip(curve[:4], curve[1:5])), curve
    assert curve[-1] < 1.6 * noise_of(toy.p) + mean / (2 * gaussian.sigma_max)


def test_the_other_decoders_do_not_draw_from_the_joint_however_many_steps_they_take():
    """Total variation at temperature 1. More steps do not help; resample even moves away from the joint.

    steps            1      2      4      8     16     32
    resample     0.314  0.192  0.202  0.252  0.322  0.369   draws x0 anew from each draft, and forgets what it started from
    confidence   0.317  0.194  0.195  0.195  0.194  0.195   one of two tokens a step from 2 on, but the surer draw first
    threshold    0.317  0.194  0.194  0.194  0.194  0.194   the same
    """
    toy = Toy()
    uniform, absorbing, _ = processes(toy)
    for process, decoder in ((uniform, "resample"), (absorbing, "confidence"), (absorbing, "threshold")):
        for n_steps in (2, 8, 32):
            drawn = sample(process, toy, Ideal(process, toy), n_steps, 5_000, decoder=decoder)
            assert distance(drawn, toy.p) > 0.15, (decoder, n_steps)


def settling_law(process, toy, model, budget):
    """Return the distribution (N,) of what `entropy` draws from masked noise, state by state: within a step the tokens that it
    settles are independent. Samples that end because they are sure are not covered; no state of the toys is so certain."""
    masked, weights = tuple([toy.V] * toy.L), toy.V ** torch.arange(toy.L - 1, -1, -1)
    p, law = {masked: 1.0}, torch.zeros(len(toy.S), dtype=torch.float64)
    for n_masked in range(toy.L, 0, -1):  # a step leads to a state with fewer masks
        for state in [state for state in p if state.count(toy.V) == n_masked]:
            d = model.predict(torch.tensor([state]))[0, :, :toy.V].exp()                 # (L, V)
            nats, settled, spent = -(d * d.log()).nan_to_num().sum(-1), [], 0.0
            for i in sorted((i for i in range(toy.L) if state[i] == toy.V), key=lambda i: nats[i]):
                settled += [i] if spent <= budget else []
                spent += nats[i]
            for tokens in itertools.product(range(toy.V), repeat=len(settled)):
                after, chance = list(state), p[state]
                for i, token in zip(settled, tokens):
                    after[i], chance = token, chance * float(d[i, token])
                p[tuple(after)] = p.get(tuple(after), 0.0) + chance
    for state in (state for state in p if toy.V not in state):
        law[(torch.tensor(state) * weights).sum()] = p[state]
    return law


@pytest.mark.parametrize("V, L, curve", [(4, 2, (0.316, 0.000, 0.000, 0.000)), (3, 3, (0.291, 0.137, 0.000, 0.000))])
def test_entropy_draws_from_the_joint_from_masked_noise_when_its_budget_is_small_and_not_when_it_is_large(V, L, curve):
    """Total variation at budgets 10, 1, 0.5, 0, exact; what is drawn has this law within the noise of 40,000 draws (0.009).
    At 10 nats all is settled at once, as by one step of the ancestral sampler; at 0 one token a step, the surest first."""
    toy, process = Toy(V, L), Absorbing(V)
    model = Ideal(process, toy)
    for budget, expected in zip((10.0, 1.0, 0.5, 0.0), curve):
        p = settling_law(process, toy, model, budget)
        assert abs(distance(p, toy.p) - expected) < 0.001
        for n_steps in (L, 8):  # just enough, so that what the last one settles is drawn too; and more
            drawn = sample(process, toy, model, n_steps, 40_000, decoder="entropy", last_temperature=1.0, budget=budget)
            assert distance(drawn, p) < 1.6 * noise_of(p, 40_000), (budget, n_steps)
    assert abs(curve[0] - distance(law(process, toy, model, even(1)), toy.p)) < 0.001


@pytest.mark.parametrize("V, L", [(4, 2), (3, 3)])
def test_from_uniform_noise_entropy_draws_from_the_joint_at_no_budget(V, L):
    """Total variation at budgets 10, 1, 0.1, 0; 10,000 draws from the joint have 0.02. A limit of the decoder, not a fault of
    this code: what is not settled is noise again, what is settled is judged again, so nothing that was decided is kept.

                 8 steps, untold t             48 steps                  8 steps, told t (which no network is)
    V=4, L=2     0.34  0.34  0.30  0.30        0.35  0.35  0.31  0.31    0.24  0.22  0.40  0.40
    V=3, L=3     0.20  0.25  0.25  0.25        0.21  0.27  0.24  0.24    0.16  0.16  0.31  0.31
    """
    toy, process = Toy(V, L), Uniform(V)
    for blind, n_steps in ((True, 8), (True, 24), (False, 8)):
        for budget in (10.0, 1.0, 0.1, 0.0):
            model = Ideal(process, toy, blind=blind)
            drawn = sample(process, toy, model, n_steps, 4_000, decoder="entropy", last_temperature=1.0, budget=budget)
            assert distance(drawn, toy.p) > 0.13 > 4 * noise_of(toy.p, 4_000), (blind, n_steps, budget)


# ---- longer texts ----

class Chain:
    """A Markov chain of L tokens, and its posterior given independent evidence on each token, by forward-backward."""

    def __init__(self, V=3, L=8, seed=0):
        rng = np.random.default_rng(seed)
        self.V, self.L = V, L
        self.start, self.next = (torch.from_numpy(rng.dirichlet(np.full(V, 0.5), n)) for n in (None, V))
        self.E = torch.eye(V)[:, :2]

    def bigrams(self):
        """Return p(x_l, x_l+1), (L - 1, V, V)."""
        p, pairs = self.start, []
        for _ in range(self.L - 1):
            pairs.append(p[:, None] * self.next)
            p = pairs[-1].sum(0)
        return torch.stack(pairs)

    def posterior(self, evidence):
        """Return log p(x_l | evidence), (B, L, V), for evidence (B, L, V) = p(what is seen at l | x_l)."""
        normal = lambda x: x / x.sum(-1, keepdim=True)
        forward, backward = [normal(self.start * evidence[:, 0])], [torch.ones_like(evidence[:, 0])]
        for i in range(1, self.L):
            forward.append(normal(forward[-1] @ self.next * evidence[:, i]))
            backward.append(normal((backward[-1] * evidence[:, -i]) @ self.next.T))
        return normal(torch.stack(forward, dim=1) * torch.stack(backward[::-1], dim=1)).log()


@pytest.mark.parametrize("process", [Uniform(3), Absorbing(3)])
def test_with_the_posterior_of_a_markov_chain_the_samplers_have_the_bigrams_of_the_chain(process):
    """All 63 of 8 tokens, within 4.5 standard errors of 4,000 draws; independent tokens are off by more than 20."""
    chain, n, absorbing = Chain(), 4_000, process.name == "absorbing"

    def decode(xt):
        t = model.times.pop(0)
        same = F.one_hot(xt, 3 + absorbing)[..., :3].double()
        evidence = same + (xt == 3)[..., None] if absorbing else (1 - t) * same + t / 3
        return F.pad(chain.posterior(evidence), (0, int(absorbing)))

    model = Model(chain, decode)
    *_, x = drafts_of(process, model, 8, 100, n, decoder="ancestral")
    one_hot = F.one_hot(x, 3).double()
    expected, found = chain.bigrams(), torch.einsum("nlv,nlw->lvw", one_hot[:, :-1], one_hot[:, 1:]) / n
    error = (expected * (1 - expected) / n).sqrt()
    assert ((found - expected).abs() / error).max() < 4.5
    independent = expected.sum(2, keepdim=True) * expected.sum(1, keepdim=True)
    assert ((independent - expected).abs() / error).max() > 20
