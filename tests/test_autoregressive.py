"""The AR loss against the chain rule, and the cached decoder against brute force without a cache."""
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import autoregressive
import conftest
from autoregressive import Autoregressive, best_of, cross_entropy
from data.dataset import Batch
from engine.noise import Noise
from model import ARCHITECTURES, Transformer

V, S, T = 12, 4, 6
START, EOS, PAD = 9, 10, 11
PROCESS = Autoregressive(START, EOS, PAD)
tiny_model = partial(conftest.tiny_model, vocab_size=V)


def ragged_batch(seed=0, lengths=(4, 2, 0, 3)):
    rng = torch.Generator().manual_seed(seed)
    pad_mask = torch.arange(S)[None] < S - torch.tensor(lengths)[:, None]
    inputs, targets = (torch.randint(9, (len(lengths), n), generator=rng) for n in (S, T))
    return Batch(inputs.masked_fill(pad_mask, PAD), pad_mask, targets)


def row(batch, b):
    """Return row b alone, and without its padding."""
    n_pad = int(batch.pad_mask[b].sum())
    return Batch(batch.inputs[b:b + 1, n_pad:], None, batch.targets[b:b + 1])


def answer(model, batch, indices=None, process=PROCESS, seed=0, **options):
    return list(process.generate(model, batch, Noise(seed, "generate", 0, indices or range(len(batch.targets))), **options))[-1]


@torch.no_grad()
def next_logits(model, batch, prefix):
    """Return the logits (V,) of the token after `prefix`, a list, for a batch of one: one pass over everything, no cache."""
    y = torch.tensor([[START, *prefix]])
    return model.decode(y, model.encode(batch.inputs, batch.pad_mask, "causal"), "causal")[0, -1]


def brute_force_nll(model, batch, tokens):
    """Return -log p of tokens up to the first EOS, one whole pass a token."""
    end = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
    return sum(-float(F.log_softmax(next_logits(model, batch, tokens[:i]), -1)[tokens[i]]) for i in range(end))


class Scripted:
    """A model without weights: logits(y, position) -> (B, T, V). It counts its calls and keeps what it was given."""

    def __init__(self, logits):
        self.script, self.encoded, self.fed, self.position = logits, [], [], 0

    def encode(self, inputs, pad_mask=None, attention="causal"):
        self.encoded.append((inputs.clone(), pad_mask, attention))
        return self

    def repeat(self, n):
        self.n = n
        return self

    def decode(self, y, context, attention, extend=False, belief=None):
        assert context is self and attention == "causal"
        self.fed.append(y.clone())
        self.position += extend
        return self.script(y, self.position - 1)


# ---- loss ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, vocab, tolerance", [(7, 50, 1e-5), (300, 4096, 1e-5), (3, 300_000, 1e-4)])
def test_cross_entropy_and_its_gradient_are_those_of_float64_but_for_rounding(dtype, rows, vocab, tolerance):
    rng = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(1, rows, vocab, generator=rng)).to(dtype)
    x0, weights = torch.randint(1, vocab, (1, rows), generator=rng), torch.rand(1, rows, generator=rng)
    logits[..., 0] = -torch.inf  # as MASK, which is never predicted
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    nats, plain = cross_entropy(found, x0), F.cross_entropy(expected.double()[0], x0[0], reduction="none")[None]
    (nats * weights).sum().backward()
    (plain * weights).sum().backward()
    assert nats.dtype == torch.float32 and (nats - plain).abs().max() < tolerance
    assert found.grad.dtype == dtype and (found.grad - expected.grad).abs().max() < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cross_entropy_of_a_compiled_run_is_the_same(dtype):
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    logits, x0 = 3 * torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).to(dtype), torch.arange(1, 7).view(2, 3)
    logits[..., 0] = -torch.inf
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    nats, plain = compiled(found, x0), cross_entropy(expected, x0)
    nats.sum().backward()
    plain.sum().backward()
    assert nats.dtype == torch.float32 and (nats - plain).abs().max() < 1e-5
    assert found.grad.dtype == dtype and (found.grad - expected.grad).abs().max() < (1e-6 if dtype == torch.float32 else 4e-3)


def test_cross_entropy_of_a_token_far_below_the_smallest_probability():
    logits = torch.tensor([[[0.0, 500.0, -500.0]]])
    assert cross_entropy(logits, torch.tensor([[2]])).item() == 1000.0  # its probability is 0 in fp32
    assert cross_entropy(logits, torch.tensor([[1]])).item() == 0.0


def test_perfect_one_hot_logits_lose_nothing_and_only_when_aligned():
    counting = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8]])
    batch = Batch(torch.zeros(2, 0, dtype=torch.long), None, counting)
    plus = lambda n: Scripted(lambda y, _: 100.0 * F.one_hot((y + n) % V, V))  # predicts the token fed to the slot, plus n
    per_slot = autoregressive.cross_entropy(plus(1).script(PROCESS.feed(counting), 0), counting)
    assert (per_slot[:, 0] > 50).all() and (per_slot[:, 1:] < 1e-6).all()  # slot 0 is fed START = 9, not the token before 1
    assert torch.equal(PROCESS.feed(counting), torch.tensor([[START, 1, 2, 3, 4, 5], [START, 3, 4, 5, 6, 7]]))
    from_zero = Autoregressive(start=0, eos=EOS, pad=PAD)
    batch = Batch(batch.inputs, None, torch.tensor([[1, 2, 3, 4, 5, 6]] * 2))
    assert from_zero.loss(plus(1), batch, None).total < 1e-6
    assert from_zero.loss(plus(0), batch, None).total > 50  # what a model would get that was fed its own answer
    assert from_zero.loss(plus(2), batch, None).total > 50


def test_the_loss_is_the_chain_rule_of_prefixes():
    model, batch = tiny_model(), ragged_batch()
    expected = []
    for b in range(4):
        target = batch.targets[b].tolist()
        steps = [-float(F.log_softmax(next_logits(model, row(batch, b), target[:i]), -1)[target[i]]) for i in range(T)]
        expected.append(sum(steps) / T)
    losses = PROCESS.loss(model, batch, None)
    assert abs(losses.per_sequence.numpy() - expected).max() < 1e-5
    assert abs(float(losses.total.detach()) - np.mean(expected)) < 1e-5 and losses.t is None


def test_probabilities_of_all_texts_sum_to_one():
    """Over all V^3 targets of length 3: only a model that is fed neither the present nor the future is a distribution."""
    model = tiny_model(vocab_size=6)
    process = Autoregressive(start=3, eos=4, pad=5)
    texts = torch.tensor(list(itertools.product(range(6), repeat=3)))
    with torch.no_grad():
        losses = process.loss(model, Batch(torch.tensor([[1, 2]]).expand(216, 2), None, texts), None)
    assert abs(float((-3 * losses.per_sequence.double()).exp().sum()) - 1) < 1e-5


def test_padding_carries_loss_and_an_empty_target_is_finite():
    model, batch = tiny_model(), ragged_batch()
    empty = torch.full((4, T), PAD)
    empty[:, 0] = EOS
    losses = PROCESS.loss(model, batch._replace(targets=empty), None)
    losses.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    perfect = Scripted(lambda y, _: 100.0 * F.one_hot(empty, V))
    assert PROCESS.loss(perfect, batch._replace(targets=empty), None).total < 1e-6
    silent = Scripted(lambda y, _: 100.0 * F.one_hot(torch.full_like(y, EOS), V))  # right about EOS, wrong about every PAD
    assert abs(PROCESS.loss(silent, batch._replace(targets=empty), None).total - 100 * (T - 1) / T) < 1e-3


def test_one_target_column_is_enough():
    model = tiny_model()
    batch = Batch(torch.tensor([[1, 2]]), None, torch.tensor([[5]]))
    expected = brute_force_nll(model, batch, [5])
    assert abs(float(PROCESS.loss(model, batch, None).total.detach()) - expected) < 1e-5


def test_micro_batches_average_to_the_loss_and_gradient_of_the_batch():
    model, batch = tiny_model(), ragged_batch()
    PROCESS.loss(model, batch, None).total.backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (PROCESS.loss(model, Batch(*(x[half] for x in batch)), None).total / 2).backward()
    largest = max(g.abs().max() for g in whole)
    assert max((p.grad - g).abs().max() for p, g in zip(model.parameters(), whole)) < 1e-6 * largest


# ---- decoding ----

def test_greedy_decoding_is_brute_force_without_a_cache():
    answers = []
    for seed in range(6):
        model, batch = tiny_model(seed), ragged_batch(seed)
        for b in range(4):
            tokens = []
            while len(tokens) < T and EOS not in tokens:
                tokens.append(int(next_logits(model, row(batch, b), tokens).argmax()))
            answers.append(tokens + [PAD] * (T - len(tokens)))
        assert answer(model, batch).tolist() == answers[-4:]
    assert sum(len(set(tokens)) > 1 for tokens in answers) >= 8, "answers of one and the same token would prove little"


def test_the_answer_does_not_depend_on_the_content_of_targets_and_inputs_stay_as_they_are():
    model, batch = tiny_model(), ragged_batch()
    before = [x.clone() for x in batch]
    first = answer(model, batch, temperature=1.0, n_samples=3)
    other = batch._replace(targets=torch.zeros_like(batch.targets))
    assert torch.equal(answer(model, other, temperature=1.0, n_samples=3), first)
    assert all(torch.equal(x, y) for x, y in zip(batch, before))


def test_top_1_is_greedy_at_any_temperature():
    model, batch = tiny_model(), ragged_batch()
    assert torch.equal(answer(model, batch, temperature=3.0, top_k=1), answer(model, batch))


def test_more_than_the_vocabulary_in_top_k_keeps_the_whole_vocabulary():
    model, batch = tiny_model(), ragged_batch()
    assert torch.equal(answer(model, batch, temperature=1.0, top_k=1000), answer(model, batch, temperature=1.0))


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.6, 0), (1.5, 3)])
def test_two_sampled_tokens_have_their_joint_distribution(temperature, top_k):
    """Against enumeration: 6,000 rows, each pair of tokens expected p(first) p(second | first) times."""
    model, n = tiny_model(seed=1, vocab_size=7), 6000
    process = Autoregressive(start=4, eos=5, pad=6)
    batch = Batch(torch.tensor([[1, 2]]).expand(n, 2), None, torch.zeros(n, 2, dtype=torch.long))
    drawn = answer(model, batch, process=process, temperature=temperature, top_k=top_k)

    def distribution(prefix):
        context = model.encode(batch.inputs[:1], None, "causal")
        logits = model.decode(torch.tensor([[4, *prefix]]), context, "causal")[0, -1].detach().double().numpy()
        e = np.exp(logits / temperature)
        kept = np.argsort(-logits)[:top_k or 7]
        p = np.zeros(7)
        p[kept] = e[kept] / e[kept].sum()
        return p

    expected = np.zeros((7, 7))
    for first, p in enumerate(distribution([])):
        expected[first] = p * (np.eye(7)[6] if first == 5 else distribution([first]))  # nothing but PAD follows EOS
    counts = np.zeros((7, 7))
    np.add.at(counts, tuple(drawn.T.numpy()), 1)
    assert counts[expected == 0].sum() == 0, "tokens outside of the top k, or text after EOS"
    common = expected * n >= 5  # the rest are counted together
    assert common.sum() >= 6
    pooled = lambda x: np.append(x[common], x[~common].sum())
    counts, expected = pooled(counts), pooled(expected * n)
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert statistic < len(counts) + 5 * math.sqrt(2 * len(counts))


def all_samples(monkeypatch, *args, **options):
    """Return (the drafts (B, n, T) and scores (B, n) of all samples, as best_of() is given them; the answer)."""
    seen = {}

    def spy(drafts, score, n_samples):
        seen.update(drafts=drafts[-1].view(-1, n_samples, T), score=score.view(-1, n_samples))
        yield from best_of(drafts, score, n_samples)

    with monkeypatch.context() as patch:
        patch.setattr(autoregressive, "best_of", spy)
        return seen, answer(*args, **options)


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.5, 4)])
def test_the_likeliest_of_n_samples_is_kept(monkeypatch, temperature, top_k):
    """Likeliest by the model itself: neither temperature nor top_k, which only say how samples are drawn, enters the score."""
    model, batch = tiny_model(seed=1), ragged_batch()
    seen, kept = all_samples(monkeypatch, model, batch, temperature=temperature, top_k=top_k, n_samples=5)
    for b in range(4):
        samples = seen["drafts"][b].tolist()
        nll = [brute_force_nll(model, row(batch, b), sample) for sample in samples]
        assert abs(seen["score"][b].numpy() - nll).max() < 1e-4
        assert kept[b].tolist() == samples[int(np.argmin(nll))]
    assert len({tuple(sample) for sample in seen["drafts"].flatten(0, 1).tolist()}) > 4, "samples must differ to be chosen from"
    assert any(EOS in sample[:-1] for sample in seen["drafts"].flatten(0, 1).tolist()), "some end early, for the score's sake"


def test_a_sample_depends_neither_on_how_many_there_are_nor_on_the_batch(monkeypatch):
    model, batch = tiny_model(), ragged_batch()
    few, _ = all_samples(monkeypatch, model, batch, temperature=1.0, n_samples=2)
    many, best = all_samples(monkeypatch, model, batch, temperature=1.0, n_samples=5)
    assert torch.equal(few["drafts"], many["drafts"][:, :2])
    one_by_one = [answer(model, row(batch, b), [b], temperature=1.0, n_samples=5) for b in range(4)]
    assert torch.equal(torch.cat(one_by_one), best)
    halves = [answer(model, Batch(*(x[h:h + 2] for x in batch)), [h, h + 1], temperature=1.0, n_samples=5) for h in (0, 2)]
    assert torch.equal(torch.cat(halves), best)


def test_decoding_stops_when_every_row_has_ended_and_only_pad_follows_eos():
    ends = torch.tensor([2, 0])  # row 0 ends with its third token, row 1 with its first; then the script babbles on

    def script(y, i):
        tokens = torch.where(ends == i, EOS, torch.full_like(ends, i))
        return 100.0 * F.one_hot(tokens, V)[:, None]

    model = Scripted(script)
    batch = Batch(torch.zeros(2, 3, dtype=torch.long), None, torch.zeros(2, T, dtype=torch.long))
    drafts = list(PROCESS.generate(model, batch, Noise(0, "generate", 0, range(2))))
    assert [draft[0].tolist() for draft in drafts] == [[PAD] * 6, [0] + [PAD] * 5, [0, 1] + [PAD] * 4, [0, 1, EOS] + [PAD] * 3]
    assert [draft[1].tolist() for draft in drafts] == [[PAD] * 6] + [[EOS] + [PAD] * 5] * 3
    assert len(model.encoded) == 1 and torch.equal(model.encoded[0][0], batch.inputs)
    assert [y.shape for y in model.fed] == [(2, 1)] * 3, "one token a call: the cache holds the rest"
    assert model.fed[0].eq(START).all() and model.fed[1].tolist()[0] == [0]


def test_an_unfinished_text_fills_the_canvas_and_no_more():
    model = Scripted(lambda y, i: 100.0 * F.one_hot(torch.full_like(y, 1), V))
    batch = Batch(torch.zeros(2, 3, dtype=torch.long), None, torch.zeros(2, T, dtype=torch.long))
    drafts = list(PROCESS.generate(model, batch, Noise(0, "generate", 0, range(2))))
    assert len(drafts) == 1 + T and drafts[0].eq(PAD).all() and drafts[-1].eq(1).all()


def test_the_inputs_attention_of_the_process_reaches_the_model():
    for attention in ("causal", "bidirectional"):
        process, model = Autoregressive(START, EOS, PAD, attention), Scripted(lambda y, i: torch.zeros(*y.shape, V))
        batch = ragged_batch()
        process.loss(model, batch, None)
        answer(model, batch, process=process)
        assert [call[2] for call in model.encoded] == [attention] * 2
        assert all(call[1] is batch.pad_mask for call in model.encoded)


def test_loss_and_decoding_leave_the_global_generator_alone():
    model, batch = tiny_model(), ragged_batch()
    state = torch.get_rng_state()
    PROCESS.loss(model, batch, Noise(0, "valid", 0, range(4)))
    answer(model, batch, temperature=1.0, n_samples=2)
    assert torch.equal(torch.get_rng_state(), state)


# ---- learning ----

def train(model, process, batches, lr=1e-2):
    """Return the loss of every step."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0), []
    for step, batch in enumerate(batches):
        loss = process.loss(model, batch, Noise(0, "train", step, range(len(batch.targets)))).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_tokens_cannot_be_predicted_better_than_log_v(architecture):
    """On fresh random tokens every loss below log V is a token that the model should not have seen."""
    torch.manual_seed(0)
    model, rng = Transformer(8, 2, 32, 2, architecture), torch.Generator().manual_seed(0)
    fresh = lambda: torch.randint(8, (64, 6), generator=rng)
    losses = train(model, Autoregressive(0, 1, 2), (Batch(fresh(), None, fresh()) for _ in range(100)))
    assert min(np.convolve(losses, np.full(10, 0.1), "valid")) > math.log(8) - 0.02
    assert losses[-1] < math.log(8) + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_batch_is_memorised_to_a_loss_near_zero_and_decoded_exactly(architecture):
    torch.manual_seed(0)
    model, batch = Transformer(V, 2, 32, 2, architecture), ragged_batch(lengths=(4, 2, 1, 3))
    batch.targets[0, 3:] = torch.tensor([EOS, PAD, PAD])
    batch.targets[1, 5] = EOS
    losses = train(model, PROCESS, [batch] * 100)
    assert losses[-1] < 0.02 < 1 < losses[0]
    assert torch.equal(answer(model.eval(), batch), batch.targets)
