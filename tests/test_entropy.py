"""The decoder `entropy`: what it settles, how warm it draws and when it stops, against DiffusionGemma's own classes.

Logits are scripted, and give all probability to ids that noise never draws: what a draft holds tells what was settled.
"""
import math

import pytest
import torch

import eval as evaluation
import sample
from beyond.decoders import DECODERS, SURE, within
from conftest import MASK, Scripted, Spy, V, ragged_batch, targets_only, tiny_model
from diffusion import Absorbing, Uniform
from engine.cli import UserError
from engine.noise import Noise
from test_diffusion import watch_samples
from test_every_process import patterns, six_rows

N_NOISE = 8  # noise is one of 0-7, text one of 8-10, and 11 is MASK
UNIFORM, ABSORBING = Uniform(N_NOISE), Absorbing(MASK)
BOTH = pytest.mark.parametrize("process", [UNIFORM, ABSORBING], ids=["uniform", "absorbing"])


@pytest.fixture(scope="module")
def gemma():
    return pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")


def drafts_of(process, model, batch, seed=0, **options):
    noise = Noise(seed, "generate", 0, range(len(batch.targets)))
    return list(DECODERS[process.name]["entropy"](process, model, batch, noise, **options))


def canvas(n, size):
    """Return a batch of n rows without inputs."""
    return targets_only(torch.zeros(n, size, dtype=torch.long))


def scripted(logits):
    """A model that gives logits[k] (B, T, V) at its k-th call, and the last ones ever after, each time as a new tensor."""
    model = Scripted(lambda y: logits[min(len(model.fed), len(logits)) - 1] + 0.0)
    return model


def of_text(logits):
    """Return logits (..., V) of the three tokens of text from logits (..., 3): no other is possible."""
    return torch.nn.functional.pad(logits, (N_NOISE, V - N_NOISE - 3), value=-math.inf)


def random_script(seed, n_steps, n, size):
    """Return logits (n_steps, n, size, V): the rows become sure of a text at different steps, some change it once more after
    that, some never become sure."""
    rng = torch.Generator().manual_seed(seed)
    logits, step = torch.randn(n_steps, n, size, 3, generator=rng), torch.arange(n_steps)[:, None]
    sure = step >= torch.randint(1, n_steps + 4, (n,), generator=rng)                    # (n_steps, n)
    other = step >= torch.randint(1, n_steps + 4, (n,), generator=rng)
    text = torch.where(other[..., None, None], logits[1], logits[0])
    strength = 10 ** (1.5 + 0.5 * torch.rand(n_steps, n, 1, 1, generator=rng))  # entropies to either side of SURE
    return of_text(torch.where(sure[..., None, None], text * strength, logits * 3))


def entropies(logits):
    p = logits.double().softmax(-1)
    return -torch.special.xlogy(p, p).sum(-1)


def numbers(nats, budget):
    """Return which positions of a row (T,) to settle: one by one, as long as all before the last add up to the budget."""
    settled, spent = torch.zeros(len(nats), dtype=torch.bool), 0.0
    for i in nats.argsort(stable=True):
        if spent > budget:
            break
        settled[i] = True
        spent += float(nats[i])
    return settled


# ---- which tokens are settled ----

def test_within_accepts_what_the_sampler_of_diffusion_gemma_accepts(gemma):
    rng, mixed = torch.Generator().manual_seed(0), 0
    for _ in range(1000):
        B, T, n_tokens = (int(torch.randint(low, high, (), generator=rng)) for low, high in ((1, 5), (1, 17), (2, 40)))
        spread, temperature, budget = 10 ** (torch.rand(3, generator=rng).double() * torch.tensor([2, 1, 3]) - 1).numpy()
        budget = float(budget / 10)                                                      # 0.01 to 10
        logits = torch.randn(B, T, n_tokens, generator=rng) * float(spread) / float(temperature)
        never = torch.rand(logits.shape, generator=rng) < 0.3
        logits = logits.masked_fill(never & ~never.all(-1, keepdim=True), -math.inf)
        sampler = gemma.EntropyBoundSampler(gemma.EntropyBoundSamplerConfig(budget), T, n_tokens, 48)
        old, new = torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.long)
        accepted = sampler.accept_canvas(old, new, logits, 1).bool()
        assert torch.equal(within(entropies(logits).float(), budget), accepted), (logits, budget)
        mixed += bool(accepted.any() and not accepted.all())
    assert mixed > 500


def test_at_budget_zero_one_token_is_settled_and_what_is_certain_and_at_a_huge_one_all_are():
    nats = torch.tensor([[0.7, 0.2, 0.9], [0.0, 0.5, 0.0], [1.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    assert within(nats, 0.0).tolist() == [[False, True, False], [True, True, True], [True, True, False], [True, True, True]]
    assert within(nats, 1e9).all() and within(nats, math.inf).all()
    assert within(nats, 0.25).tolist()[0] == [True, True, False], "the last one may cost what it will"
    assert within(nats, 0.85).tolist()[0] == [True, True, False] and within(nats, 0.95)[0].all()


@BOTH
def test_the_decoder_settles_one_token_and_the_certain_ones_at_budget_zero_and_all_at_once_at_a_huge_one(process):
    certain = torch.tensor([[False, True, False, True, False, False], [False] * 6, [True] * 6])
    weak = torch.tensor([[0.3, 0.0, 0.5, 0.0, 0.9, 0.4], [0.1, 0.2, 0.3, 0.4, 0.8, 0.6], [0.0] * 6])  # the largest: surest
    logits = torch.stack((weak, torch.zeros_like(weak), torch.full_like(weak, -math.inf)), dim=-1)
    logits[..., 1].masked_fill_(certain, -math.inf)
    logits, surest = of_text(logits), torch.eye(6, dtype=torch.bool)[4]
    settled = lambda draft: (draft >= N_NOISE) & (draft != MASK)
    options = dict(n_steps=4, temperature=1.0, last_temperature=1.0)
    drafts = drafts_of(process, scripted(logits[None]), canvas(3, 6), budget=0.0, **options)
    assert settled(drafts[1]).tolist() == [(certain[0] | surest).tolist(), surest.tolist(), [True] * 6]
    drafts = drafts_of(process, scripted(logits[None]), canvas(3, 6), budget=1e9, **options)
    assert settled(drafts[1]).all() and len(drafts) == (2 if process is ABSORBING else 5)


# ---- uniform noise, step by step ----

@pytest.mark.parametrize("temperature, last_temperature, budget", [(0.8, 0.4, 0.1), (1.5, 0.3, 1.0), (0.5, 0.5, 0.5)])
def test_uniform_settles_renoises_cools_and_stops_as_diffusion_gemma_does(gemma, temperature, last_temperature, budget):
    n_steps, n, size, ends, partly = 10, 12, 6, [], 0
    for seed in range(10):
        script = random_script(seed, n_steps, n, size)
        cooler = gemma.LinearTemperatureScheduleLogitsProcessor(last_temperature, temperature, n_steps)
        sampler = gemma.EntropyBoundSampler(gemma.EntropyBoundSamplerConfig(budget), size, V, n_steps)
        stopper = gemma.StableAndConfidentStoppingCriteria(1, 0.005)
        model = scripted(script)
        drafts = drafts_of(UNIFORM, model, canvas(n, size), seed, n_steps=n_steps, temperature=temperature,
                           last_temperature=last_temperature, budget=budget)
        assert (drafts[0] < N_NOISE).all()
        finished, answer = torch.zeros(n, dtype=torch.bool), drafts[0]
        for k, (before, draft) in enumerate(zip(drafts, drafts[1:])):
            logits = cooler(None, script[k], cur_step=n_steps - k)  # it counts the steps that are left
            sampler.accept_canvas(before, draft, logits, n_steps - k)
            answer = torch.where(finished[:, None], answer, logits.argmax(-1))
            now = ~finished & stopper(logits.argmax(-1), logits)
            ends += [k] * int(now.sum())
            finished |= now
            writes = finished | (k + 1 == n_steps)
            assert torch.equal(draft[writes], answer[writes]), "the answer is the argmax; a finished sample stays"
            accepted = sampler.accepted_token_mask[~writes].bool()
            assert torch.equal(draft[~writes] >= N_NOISE, accepted), "what is settled is text, all else noise"
            partly += int((accepted.any(1) & ~accepted.all(1)).sum())
            assert len(model.fed) == len(drafts) - 1 and torch.equal(model.fed[k], before), "and is what is read next"
            assert finished.all() == (k + 2 == len(drafts)) or k + 1 == n_steps
    assert {*ends} >= {2, 3, 4, 5, 6, 7, 8} and len(ends) < 0.8 * 10 * n, "many steps at which a sample ends, and some go on"
    assert partly > 100


def test_what_is_not_settled_is_fresh_noise_in_every_step_and_uniform():
    script = of_text(torch.zeros(1, 400, 20, 3))  # log 3 nats everywhere: one position a step
    drafts = drafts_of(UNIFORM, scripted(script), canvas(400, 20), n_steps=4)
    noise = [draft[draft < N_NOISE] for draft in drafts[:-1]]
    assert [len(x) for x in noise] == [8000, 7600, 7600, 7600]
    for x in noise:
        share, p = torch.bincount(x, minlength=N_NOISE) / len(x), 1 / N_NOISE
        assert (share - p).abs().max() < 4 * math.sqrt(p * (1 - p) / len(x))
    for before, draft in zip(drafts[:-1], drafts[1:-1]):
        both = (before < N_NOISE) & (draft < N_NOISE)
        assert abs((before == draft)[both].double().mean() - 1 / N_NOISE) < 0.02, "drawn anew"


@BOTH
def test_tokens_are_drawn_at_the_temperature_of_the_step_and_the_last_draft_is_the_argmax(process):
    """The share of each token at every step, at temperatures 2, 1.5, 1, 0.5: a wrong start, end or direction would show."""
    n, size, n_steps, logits = 1000, 8, 4, torch.tensor([0.0, 1.0, -0.5])
    script = of_text(logits.repeat(1, n, size, 1))
    budget = 1e9 if process is UNIFORM else 0.0  # absorbing: one position a step, so that each step draws
    drafts = drafts_of(process, scripted(script), canvas(n, size), n_steps=n_steps, temperature=2.0, last_temperature=0.0,
                       budget=budget)
    assert len(drafts) == 5
    for k, (before, draft) in enumerate(zip(drafts, drafts[1:-1])):
        new = draft[before != draft] if process is ABSORBING else draft
        assert process is UNIFORM or len(new) == n
        share, p = torch.bincount(new.flatten() - N_NOISE, minlength=3) / new.numel(), (logits / (2.0 - 0.5 * k)).softmax(0)
        assert ((share - p).abs() < 4 * (p * (1 - p) / new.numel()).sqrt()).all(), k
    written = drafts[-1] if process is UNIFORM else drafts[-1][drafts[-2] == MASK]
    assert (written == N_NOISE + 1).all()


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_the_kept_sample_has_the_lowest_cross_entropy_of_its_answer_each_token_when_it_was_written(process, seed, monkeypatch):
    """Worked out anew from what the model gave, for all of 5 samples of 6 inputs of which a part is frozen. The logits are
    sharper than usual, so that samples end at different steps."""
    seen, n, n_steps, model, frozen = {}, 5, 12, tiny_model(seed), patterns()
    watch_samples(monkeypatch, lambda drafts, score, _: seen.update(drafts=torch.stack(drafts), score=score))
    monkeypatch.setattr(model, "logits", lambda x, real=model.logits: (6 if process is UNIFORM else 2) * real(x))
    spy = Spy(model)
    answer = drafts_of(process, spy, six_rows(), n_steps=n_steps, n_samples=n, frozen=frozen, temperature=1.0,
                       last_temperature=0.2)
    drafts, frozen, ends = seen["drafts"], frozen.repeat_interleave(n, dim=0), []
    score, done, before = torch.zeros(drafts[0].shape, dtype=torch.float64), torch.zeros(6 * n, dtype=torch.bool), None
    for k, logits in enumerate(spy.given):
        logits = logits.double() / (0.2 + 0.8 * (1 - k / n_steps))
        same = (logits.argmax(-1) == before).logical_or(frozen).all(1) if k else done
        sure = entropies(logits).masked_fill(frozen, 0.0).sum(1) <= SURE * (~frozen).sum(1)
        now = ~done & same & sure | (k + 1 == n_steps) & ~done
        done, before, ends = done | now, logits.argmax(-1), ends + [k] * int(now.sum())
        written = drafts[k] != drafts[k + 1] if process is ABSORBING else now[:, None] & ~frozen
        score = torch.where(written, -logits.log_softmax(-1).gather(-1, drafts[k + 1][..., None])[..., 0], score)
    assert (seen["score"] - score.mean(1)).abs().max() < 1e-5 and (process is ABSORBING or len({*ends}) > 3)
    best = seen["score"].view(6, n).argmin(1)
    chosen = drafts.view(len(drafts), 6, n, -1)[:, range(6), best]
    assert torch.equal(torch.stack(answer), chosen) and best.any()


# ---- absorbing ----

@pytest.mark.parametrize("budget", [0.0, 0.3, 1.5])
def test_absorbing_keeps_what_is_settled_masks_the_rest_and_counts_only_what_is_masked(budget):
    """Another set of certainties at every step, against an explicit sum over the masked positions, one row at a time."""
    n_steps, n, size = 8, 20, 7
    script = of_text(3 * torch.randn(n_steps, n, size, 3, generator=torch.Generator().manual_seed(0)))
    model = scripted(script)
    drafts = drafts_of(ABSORBING, model, canvas(n, size), n_steps=n_steps, temperature=1.0, last_temperature=1.0, budget=budget)
    assert (drafts[0] == MASK).all() and not (drafts[-1] == MASK).any() and len(model.fed) == len(drafts) - 1
    several = 0
    for k, (before, draft) in enumerate(zip(drafts, drafts[1:])):
        assert torch.equal(model.fed[k], before) and torch.equal(draft[before != MASK], before[before != MASK])
        nats, masked = entropies(script[k]), before == MASK
        for b in range(n if k + 1 < n_steps else 0):
            settled = numbers(nats[b, masked[b]], budget)
            assert torch.equal(draft[b, masked[b]] != MASK, settled), "as if what is settled were not there"
            several += int(settled.sum()) > 1
    assert (several > 0) == (budget > 0)


@pytest.mark.parametrize("n_steps, n_evaluations", [(1, 1), (3, 3), (5, 5), (6, 6), (7, 6), (40, 6)])
def test_absorbing_ends_when_nothing_is_masked_and_n_steps_is_a_limit(n_steps, n_evaluations):
    logits = of_text(torch.stack((torch.zeros(6), 0.1 + 0.1 * torch.arange(6), torch.zeros(6)), dim=-1).expand(1, 2, 6, 3))
    model = scripted(logits)
    drafts = drafts_of(ABSORBING, model, canvas(2, 6), n_steps=n_steps, budget=0.0)
    assert len(model.fed) == len(drafts) - 1 == n_evaluations
    left = [max(6 - k, 0) for k in range(n_evaluations)] + [0]
    assert [int((draft == MASK).sum(1).unique()) for draft in drafts] == left
    if n_steps < 6:  # cut short: all at once, the likeliest
        assert (drafts[-1][drafts[-2] == MASK] == N_NOISE + 1).all()


def test_absorbing_ends_when_the_rest_is_sure_and_stable_and_a_finished_sample_stays():
    """Row 0 is sure of its text from the first step, but its budget lets one token a step; row 1 is sure, and changes its mind
    at every step; row 2 never is sure."""
    def certain(token, rest):
        return of_text(torch.nn.functional.one_hot(torch.full((6,), token), 3) * rest)
    strong, weak = 9.0, 1.0  # of the strong ones each has more than 0, and six together less than 6 * SURE nats
    assert 0 < float(entropies(certain(0, strong)).mean()) < SURE < float(entropies(certain(0, weak)).mean())
    rows = lambda k: torch.stack((certain(0, strong), certain(k % 2, strong), certain(0, weak)))
    model = scripted(torch.stack([rows(k) for k in range(9)]))
    drafts = drafts_of(ABSORBING, model, canvas(3, 6), n_steps=9, temperature=1.0, last_temperature=1.0, budget=0.0)
    n_masked = torch.stack([(draft == MASK).sum(1) for draft in drafts])
    assert n_masked[:, 0].tolist() == [6, 5, 0, 0, 0, 0, 0], "one settled, then the same argmax: the rest is written"
    assert n_masked[:, 2].tolist() == n_masked[:, 1].tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert all(torch.equal(draft[0], drafts[2][0]) for draft in drafts[2:])


# ---- what is typed ----

@pytest.mark.parametrize("flags, message", [
    (["--budget=-1"], "--budget=-1.0 must be at least 0"), (["--budget=nan"], "--budget=nan must be at least 0"),
    (["--last_temperature=-0.1"], "--last_temperature=-0.1 must be at least 0 and at most 1000"),
    (["--temperature=-1"], "--temperature=-1.0 must be at least 0 and at most 1000"), (["--n_steps=0"], "must be at least 1")])
def test_a_wrong_option_of_this_decoder_is_refused_in_one_line_by_both_scripts(diff_run, flags, message):
    for main, more in ((sample.main, ["--prompt=ab"]), (evaluation.main, [])):
        with pytest.raises(UserError, match=message) as caught:
            main([str(diff_run.folder), "--decoder=entropy", *flags, *more])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind, flags, message", [
    ("uniform", ["--budget=1"], "--budget goes with --decoder=entropy, not with resample"),
    ("uniform", ["--decoder=ancestral", "--last_temperature=1"], "--last_temperature goes with --decoder=entropy, not with an"),
    ("absorbing", ["--decoder=confidence", "--budget=1"], "--budget goes with --decoder=entropy, not with confidence"),
    ("gaussian", ["--decoder=entropy"], "decoder='entropy' is not one of euler"),
    ("gaussian", ["--budget=1"], "--budget is not for gaussian models"),
    ("ar", ["--budget=1"], "--budget is not for ar models")])
def test_where_this_decoder_does_not_fit_its_flags_are_refused_in_one_line(train, ar_run, tmp_path, kind, flags, message):
    run = ar_run if kind == "ar" else train("diff", tmp_path / "x", f"--process={kind}", "--steps=1", "--eval_sequences=0")
    for main, more in ((sample.main, ["--prompt=ab"]), (evaluation.main, [])):
        with pytest.raises(UserError, match=message) as caught:
            main([str(run.folder), *flags, *more])
        assert "\n" not in str(caught.value)


def test_the_defaults_are_those_of_diffusion_gemma_and_reach_the_decoder(gemma, diff_run, capsys):
    published = gemma.DiffusionGemmaGenerationConfig._get_default_generation_params()
    options = dict(n_steps=published["max_denoising_steps"], temperature=published["t_max"], n_samples=1,
                   last_temperature=published["t_min"], budget=published["sampler_config"].entropy_bound)
    assert SURE == published["confidence_threshold"] and published["stability_threshold"] == 1
    result, = evaluation.main([str(diff_run.folder), "--decoder=entropy"])
    assert (result["decoder"], result["options"]) == ("entropy", options) and 1 <= result["evaluations"] <= 48
    result, = evaluation.main([str(diff_run.folder), "--decoder=entropy", "--budget=3", "--last_temperature=0", "--n_steps=2"])
    assert result["options"] == options | dict(budget=3.0, last_temperature=0.0, n_steps=2) and result["evaluations"] == 2


def test_what_is_written_depends_on_the_inputs():
    """Of a real model, where all noise is the same."""
    model, batch = tiny_model(), ragged_batch(lengths=(4, 4))
    other = batch._replace(inputs=(batch.inputs + 1) % 9)
    for process in (UNIFORM, ABSORBING):
        drafts = [drafts_of(process, model, x, n_steps=3, temperature=1.0)[-1] for x in (batch, batch, other)]
        assert torch.equal(*drafts[:2]) and not torch.equal(*drafts[1:])
