"""Randomness: pure in (seed, stream, step, index), and without a bias, down to the tail of a categorical distribution."""
import itertools
import math

import numpy as np
import pytest
import torch

from engine.noise import STREAMS, Noise, invert


def chi_square_fits(counts, expected):
    """Pearson's test: the statistic is within 5 standard deviations (of its normal approximation) of what chance gives."""
    counts, expected = np.asarray(counts, dtype=float), np.asarray(expected, dtype=float)
    assert expected.min() >= 5, "too few draws for the test to hold"
    freedom = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


class Fixed:
    """Stands in for a numpy generator and hands out chosen uniform numbers."""

    def __init__(self, numbers):
        self.numbers = numbers

    def random(self, shape):
        return np.broadcast_to(np.asarray(self.numbers, dtype=np.float64), shape)


def noise_with(*rows):
    noise = Noise(0, "train", 0, range(len(rows)))
    noise.rows = [Fixed(row) for row in rows]
    return noise


def all_draws(noise):
    logits = torch.zeros(len(noise.rows), 5, 64)
    return (noise.uniform(3), noise.integers(1000, 4), noise.uniform(), noise.categorical(logits, 1.0), noise.normal(2, 3),
            noise.stratified())


@pytest.mark.parametrize("parts", [(4, 4), (1, 7), (2, 2, 2, 2), (1,) * 8, (3, 5)])
def test_any_split_of_the_batch_sees_the_same_numbers(parts):
    whole, first, pieces = all_draws(Noise(3, "train", 17, range(8))), 0, []
    for n in parts:
        pieces.append(all_draws(Noise(3, "train", 17, range(first, first + n))))
        first += n
    for i, numbers in enumerate(whole):
        assert torch.equal(numbers, torch.cat([piece[i] for piece in pieces]))


def test_the_order_of_the_rows_only_orders_the_numbers():
    order = [5, 0, 3]
    for sorted_rows, rows in zip(all_draws(Noise(1, "generate", 2, range(6))), all_draws(Noise(1, "generate", 2, order))):
        assert torch.equal(sorted_rows[order], rows)


def test_it_neither_reads_nor_moves_the_global_generators():
    state, before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = all_draws(Noise(0, "valid", 0, range(3)))
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == before).all()
    torch.manual_seed(99)
    np.random.seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, all_draws(Noise(0, "valid", 0, range(3)))))


def test_no_two_streams_share_a_number():
    """Every (seed, stream, step, index, sample), 40 numbers of each: a stream that ran into its neighbour would repeat some."""
    rows = []
    for seed, stream, step in itertools.product(range(4), STREAMS, range(5)):
        noise = Noise(seed, stream, step, range(5))
        rows += [noise.uniform(40), noise.split(3).uniform(40)]
    rows = torch.cat(rows)
    assert len(rows) == 4 * len(STREAMS) * 5 * (5 + 15)
    assert len(rows.unique()) == rows.numel()


def test_sample_j_of_a_row_is_the_same_however_many_samples_there_are():
    few, many = Noise(0, "generate", 0, [4, 9]).split(2).uniform(6), Noise(0, "generate", 0, [4, 9]).split(5).uniform(6)
    assert torch.equal(few.view(2, 2, 6), many.view(2, 5, 6)[:, :2])  # rows in the order of Context.repeat
    alone = Noise(0, "generate", 0, [9]).split(5).uniform(6)
    assert torch.equal(alone, many[5:])


def test_a_draw_from_more_logits_than_a_chunk_holds_is_that_of_each_row_alone():
    logits = torch.randn(6, 50, 4096, generator=torch.Generator().manual_seed(0))  # 1.2 million, in chunks of 2^20
    whole = Noise(0, "generate", 0, range(6)).categorical(logits, 1.0)
    assert torch.equal(whole, torch.cat([Noise(0, "generate", 0, [i]).categorical(logits[i:i + 1], 1.0) for i in range(6)]))
    assert len(whole.unique()) > 250


def test_numbers_continue_from_call_to_call():
    noise = Noise(0, "train", 0, range(2))
    assert not torch.equal(noise.uniform(4), noise.uniform(4))


def test_uniform_numbers_are_uniform_and_rows_uncorrelated():
    u = Noise(0, "train", 0, range(200)).uniform(5000)
    assert u.min() >= 0 and u.max() < 1
    assert chi_square_fits(torch.histc(u.float(), 50, 0, 1).numpy(), np.full(50, u.numel() / 50))
    correlation = np.corrcoef(u.numpy()) - np.eye(200)
    assert abs(correlation).max() < 5.5 / math.sqrt(5000)  # 20,000 pairs
    per_step = np.stack([Noise(0, "train", step, [0]).uniform().item() for step in range(4000)])  # the t of one sequence
    assert abs(np.corrcoef(per_step[:-1], per_step[1:])[0, 1]) < 4.5 / math.sqrt(4000)
    assert chi_square_fits(np.histogram(per_step, 20, (0, 1))[0], np.full(20, 200.0))


def test_integers_are_uniform_over_all_of_the_range():
    drawn = Noise(0, "train", 0, range(100)).integers(257, 10_000)
    assert drawn.min() == 0 and drawn.max() == 256
    assert chi_square_fits(np.bincount(drawn.flatten(), minlength=257), np.full(257, drawn.numel() / 257))


def test_normal_numbers_are_standard_normal_and_rows_uncorrelated():
    drawn = Noise(0, "train", 0, range(100)).normal(40, 50)
    assert drawn.shape == (100, 40, 50) and drawn.dtype == torch.float32
    share = 0.5 * (1 + torch.erf(drawn.double() / math.sqrt(2)))  # uniform if the numbers are standard normal
    assert chi_square_fits(torch.histc(share.float(), 100, 0, 1).numpy(), np.full(100, drawn.numel() / 100))
    assert abs(np.corrcoef(drawn.flatten(1).numpy()) - np.eye(100)).max() < 5.5 / math.sqrt(2000)


def test_shared_numbers_are_the_same_for_all_rows_of_a_step_whatever_was_drawn_and_new_at_every_step():
    whole, rank = Noise(3, "train", 17, range(8)), Noise(3, "train", 17, range(4, 8))
    rank.uniform(5)
    assert whole.shared(1) == rank.shared(1) == rank.split(3).shared(1) == whole.shared(1)
    keys = list(itertools.product((0, 3), STREAMS, range(40), (0, 1, 2)))
    numbers = [Noise(seed, stream, step, [5]).shared(number) for seed, stream, step, number in keys]
    numbers += Noise(3, "train", 17, range(8)).uniform(40).flatten().tolist() + whole.split(4).uniform(40).flatten().tolist()
    assert len(set(numbers)) == len(numbers), "and they are nobody else's"
    drawn = [Noise(0, "train", step, [0]).shared() for step in range(2000)]
    assert chi_square_fits(np.histogram(drawn, 20, (0, 1))[0], np.full(20, 100.0))


def test_a_stratified_number_is_uniform_and_new_at_every_step():
    drawn = np.stack([Noise(0, "train", step, [0, 1, 77]).stratified() for step in range(3000)])
    assert drawn.min() >= 0 and drawn.max() < 1
    for column in drawn.T:
        assert chi_square_fits(np.histogram(column, 20, (0, 1))[0], np.full(20, 150.0))
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < 4.5 / math.sqrt(3000)


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_stratified_numbers_of_the_rows_of_a_sequence_lie_evenly_around_its_own(n):
    whole = Noise(1, "train", 5, range(3, 9))
    t = whole.split(n).stratified().view(6, n)  # were equal: n canvases of a target, all at one noise level
    assert torch.equal(t[:, 0], whole.stratified())
    assert torch.allclose(((t - t[:, :1]) % 1 * n).sort(dim=1).values, torch.arange(n).double().expand(6, n), atol=1e-9)


@pytest.mark.parametrize("first", [0, 64, 12_345])
@pytest.mark.parametrize("n", [8, 64, 512])
def test_stratified_numbers_are_spread_evenly_over_every_batch(n, first):
    """Between neighbours lies at most 2.62 / n (the golden ratio's three-gap theorem), where chance leaves about log(n) / n."""
    for step in range(20):
        t = Noise(1, "train", step, range(first, first + n)).stratified().sort().values
        gaps = torch.cat((t.diff(), t[:1] + 1 - t[-1:]))
        assert gaps.max() < 2.62 / n and gaps.min() > 0.38 / n
        assert abs(t.mean() - 0.5) < 2 / n


@pytest.mark.parametrize("size", [60, 128])  # in one block, and in two blocks of 64
def test_a_million_categorical_draws_fit_the_distribution_down_to_its_tail(size):
    rng = np.random.default_rng(0)
    p = np.concatenate((np.full(size // 3, 1e-5), rng.dirichlet(np.ones(size - size // 3))))  # a third has p = 1e-5
    p = rng.permutation(np.maximum(p, 1e-5) / np.maximum(p, 1e-5).sum())
    logits, n = torch.from_numpy(np.log(p)).float().expand(1, 50_000, size), 20 * 50_000
    temperature = 0.5  # divides the logits, which are given twice too small here
    noise, counts = Noise(0, "generate", 0, [0]), np.zeros(size)
    for _ in range(20):
        counts += np.bincount(noise.categorical(logits * temperature, temperature).flatten(), minlength=size)
    assert counts.sum() == n and chi_square_fits(counts, n * p)
    tail = p < 2e-5
    assert abs(counts[tail].sum() - n * p[tail].sum()) < 4 * math.sqrt(n * p[tail].sum())


def test_inverting_a_distribution_finds_every_token_of_a_tail():
    """Probabilities of 1e-9 behind one of almost 1: sums in float32 cannot tell them apart."""
    u = (1 + 1e-9 * (torch.arange(4).double() - 0.5)) / (1 + 3e-9)
    found = invert(torch.tensor([1.0, 1e-9, 1e-9, 1e-9]).expand(1, 4, 4), u[None])
    assert found.tolist() == [[0, 1, 2, 3]]


def test_inverting_a_distribution_is_exact_over_a_large_vocabulary():
    """Of equally likely tokens, a number in the middle of token i's share gives token i."""
    size = 100_003
    tokens = torch.cat((torch.arange(0, size, 997), torch.tensor([size - 1])))
    u = (tokens.double() + 0.5) / size
    assert torch.equal(invert(torch.full((1, 1, size), 0.1).expand(1, len(tokens), size), u[None])[0], tokens)


@pytest.mark.parametrize("size", [50, 128])
@pytest.mark.parametrize("u", [0.0, 1 - 2.0 ** -53])
def test_tokens_of_probability_zero_are_never_drawn_not_even_at_the_ends(size, u):
    logits = torch.full((1, 1, size), -torch.inf)
    logits[..., [3, size - 4]] = 0.0
    drawn = noise_with([[u], [u]]).categorical(logits, 1.0)
    assert drawn.item() == (3 if u == 0 else size - 4)


def test_temperature_zero_is_the_argmax_and_draws_nothing():
    logits = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    noise, untouched = Noise(0, "generate", 0, range(2)), Noise(0, "generate", 0, range(2))
    assert torch.equal(noise.categorical(logits, 0), logits.argmax(-1))
    assert torch.equal(noise.uniform(3), untouched.uniform(3))
    assert torch.equal(noise.categorical(logits, 1e-4), logits.argmax(-1)), "a very low temperature comes to the same"


def test_half_precision_logits_are_drawn_from_as_they_are():
    """A softmax computed in bfloat16, which has 8 bits, would move the borders between tokens."""
    logits = torch.randn(1, 20_000, 60, generator=torch.Generator().manual_seed(0)).bfloat16()
    draw = lambda logits: Noise(0, "generate", 0, [0]).categorical(logits, 1.0)
    assert torch.equal(draw(logits), draw(logits.double()))
