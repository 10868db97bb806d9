"""data/objectives.py: nothing of a row is lost, lengths and randomness are T5's, and every script knows the objective."""
import collections
import itertools
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import sample
from autoregressive import Autoregressive
from beyond.likelihood import bits
from conftest import FLAGS, SCRIPTS, Run, Scripted
from data.dataset import Batch, open_data
from data.objectives import OBJECTIVES, choose, row_length, segments, span, span_lengths
from data.tokenizer import load_tokenizer
from diffusion import PROCESSES
from engine.checkpoint import save_checkpoint
from engine.cli import UserError
from engine.noise import Noise
from pretrained.loading import new_process
from sample import GenerateConfig, load_writer
from test_dataset import same, write_text

BYTES = load_tokenizer("bytes")
FIRST, EOS, PAD = BYTES.sentinels[0], BYTES.eos, BYTES.pad
SPAN = ["--objective=span", "--input_len=32", "--target_len=11", "--steps=2"]  # rows of 36: 5 noised tokens in 2 spans


def order_noise(n, step=0):
    return Noise(0, "order", step, range(n))


def spans_of(L, n, step=0):
    """Return (inputs, targets) of n rows whose tokens are their own positions, L at most 256."""
    _, _, n_inputs, n_targets = span_lengths(L)
    inputs, pad_mask, targets = span(torch.arange(L).repeat(n, 1), order_noise(n, step), BYTES, n_inputs, n_targets)
    assert pad_mask is None
    return inputs.tolist(), targets.tolist()


def rebuild(inputs, targets):
    """Undo span corruption, token by token: put each span where its sentinel stands."""
    targets = targets[:targets.index(PAD)] if PAD in targets else targets
    assert targets[-1] == EOS and PAD not in inputs
    spans = {}
    for token in targets[:-1]:
        if token >= FIRST:
            assert token not in spans
            current = spans[token] = []
        else:
            current.append(token)
    row = [spans.pop(token) if token >= FIRST else [token] for token in inputs]
    assert not spans  # each sentinel was there, once
    return list(itertools.chain(*row))


def test_inputs_and_targets_of_spans_rebuild_every_row():
    rng = torch.Generator().manual_seed(0)
    for S in [*range(4, 70), 128, 511, 1024, 1808]:
        L = row_length("span", S, 999)
        rows, T = torch.randint(EOS + 1, (5, L), generator=rng), span_lengths(L).n_targets + S % 3  # EOS parts documents
        inputs, pad_mask, targets = span(rows, order_noise(5, S), BYTES, S, T)
        assert (inputs.shape, pad_mask, targets.shape) == ((5, S), None, (5, T))
        assert inputs.dtype == targets.dtype == torch.int64
        for row, i, t in zip(rows.tolist(), inputs.tolist(), targets.tolist()):
            assert rebuild(i, t) == row and t[T - S % 3:] == [PAD] * (S % 3)


def test_sentinels_come_in_order_and_once_on_either_side_and_text_comes_first():
    for L in (36, 71, 142, 250):
        n_spans = span_lengths(L).n_spans
        sentinels = [*range(FIRST, FIRST + n_spans)]
        for inputs, targets in zip(*spans_of(L, 50)):
            for side in (inputs, targets):
                assert [token for token in side if token >= FIRST] == sentinels
            assert inputs[0] == 0 and inputs[-1] == sentinels[-1]  # the first span is kept, the last noised
            assert targets[0] == FIRST and targets[-1] == EOS
            for side in (inputs, targets[:-1]):  # no span is empty: no sentinel next to a sentinel
                assert not any(a >= FIRST and b >= FIRST for a, b in zip(side, side[1:]))
            assert targets[-2] < FIRST


# ---- T5's arithmetic -----------------------------------------------------------------------------------------------------

def t5_lengths(inputs_length, density=0.15, mean=3.0):
    """Return T5's (raw tokens, inputs, targets), written after the description of its random_spans_helper."""
    def lengths(tokens):
        noised = int(round(tokens * density))
        n_spans = int(round(noised / mean))
        return tokens - noised + n_spans + 1, noised + n_spans + 1  # one EOS on each side
    tokens = inputs_length
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    return tokens, *lengths(tokens)


def test_lengths_are_those_of_t5_but_for_the_eos_that_its_inputs_have():
    assert t5_lengths(512) == (568, 512, 114)  # the published numbers; hence 511 columns of ours, which hold no EOS
    assert row_length("span", 511, 114) == 568 and span_lengths(568)[2:] == (511, 114)
    assert row_length("span", 512, 114) == 569 and span_lengths(569)[2:] == (512, 114)
    for S in range(9, 1809):  # below, T5 counts no span where one token is noised, and its mask makes one after all
        L = row_length("span", S, 1000)
        assert (L, S + 1, span_lengths(L).n_targets) == t5_lengths(S + 1)


def test_inputs_fill_their_columns_at_every_width_so_none_is_padded():
    for S in range(4, 1809):
        L = row_length("span", S, 1000)
        n_noise, n_spans, n_inputs, _ = span_lengths(L)
        assert n_inputs == S < span_lengths(L + 1).n_inputs and 1 <= n_spans <= min(n_noise, 100)


def test_the_share_of_noised_tokens_and_the_mean_length_of_spans_are_those_of_t5():
    noised, tokens, n_spans = 0, 0, 0
    for S in range(60, 220):
        L = row_length("span", S, 1000)
        _, targets = spans_of(L, 4, S)
        noised += sum(token < 256 for row in targets for token in row)
        n_spans += sum(token >= FIRST for row in targets for token in row)
        tokens += 4 * L
    assert abs(noised / tokens - 0.15) < 0.001 and abs(noised / n_spans - 3) < 0.05


def chi_square(counts, expected):
    """Return how far the counts lie from what is expected, in standard deviations of the chi-square distribution."""
    counts, expected = np.asarray(counts, dtype=float), np.asarray(expected, dtype=float)
    assert abs(counts.sum() - expected.sum()) < 1e-6 * expected.sum() and expected.min() > 5
    degrees = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5


def test_all_ways_to_lay_two_spans_into_a_row_are_equally_likely():
    n, (K, N) = 20_000, (26, 5)  # rows of 31: 25 ways to split what is kept, times 4 to split what is noised
    inputs, _ = spans_of(K + N, n)
    where = collections.Counter(row.index(FIRST) for row in inputs)
    ways = collections.Counter(tuple(token for token in row if token < FIRST) for row in inputs)
    assert len(ways) == 100 and abs(chi_square([*ways.values()], [n / 100] * 100)) < 4
    assert sorted(where) == [*range(1, K)] and abs(chi_square([*where.values()], [n / 25] * 25)) < 4


def test_spans_are_spread_evenly_over_the_row():
    n, L = 4000, 71
    N, m = span_lengths(L)[:2]
    K, (_, targets) = L - N, spans_of(L, n)
    starts = np.array([[row[row.index(FIRST + j) + 1] for j in range(m)] for row in targets])  # (n, m): positions in the row
    expected = np.arange(1, m + 1) * K / m + np.arange(m) * N / m
    assert (np.abs(starts.mean(axis=0) - expected) < 4 * starts.std(axis=0) / n ** 0.5).all()
    # The first of m segments of K has length a in C(K - 1 - a, m - 2) of C(K - 1, m - 1) cases.
    ways = np.array([math.comb(K - 1 - a, m - 2) for a in range(1, K - m + 2)]) / math.comb(K - 1, m - 1)
    counts, common = np.bincount(starts[:, 0], minlength=K)[1:K - m + 2], ways * n > 5
    lump = lambda x: [*x[common], x[~common].sum()]
    assert abs(chi_square(lump(counts), lump(ways * n))) < 4


@pytest.mark.parametrize("n, n_segments", [(1, 1), (7, 1), (5, 5), (9, 4)])
def test_segments_are_never_empty_and_add_up(n, n_segments):
    lengths = segments(n, n_segments, order_noise(1000))
    assert lengths.shape == (1000, n_segments) and (lengths >= 1).all() and (lengths.sum(dim=1) == n).all()
    assert len(lengths.unique(dim=0)) == math.comb(n - 1, n_segments - 1)


# ---- prefixes ------------------------------------------------------------------------------------------------------------

def test_prefix_windows_are_those_of_the_first_version(tmp_path, monkeypatch):
    monkeypatch.setattr(BYTES, "vocab_size", 8192)  # ids tell where a window was cut
    train, valid = [range(1000), range(1000, 3000)], [range(3000, 4000), range(4000, 5000)]
    folder = write_text(tmp_path / "t", train, valid, (3, 1))
    for objective in (None, "prefix"):
        data = open_data(folder, BYTES, 5, 7, objective=objective)
        for batch, first in ((data.train_batch(3, 11, range(6), 6), [813, 52, 618, 1845, 161, 889]),  # as it gave them
                             (data.valid_batch(range(6)), [3482, 4533, 3286, 3958, 3160, 3028])):
            rows = torch.tensor(first)[:, None] + torch.arange(12)
            assert same(batch, Batch(rows[:, :5], None, rows[:, 5:]))
    for objective in (None, "causal"):
        batch = open_data(folder, BYTES, 0, 7, objective=objective).train_batch(0, 0, range(6), 6)
        rows = torch.tensor([484, 2075, 288, 963, 161, 28])[:, None] + torch.arange(7)
        assert same(batch, Batch(rows[:, :0], None, rows))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_row_of_any_objective_depends_on_seed_step_and_index_alone(text, objective):
    S, T = (0, 12) if objective == "causal" else (32, 12)
    whole = open_data(text, BYTES, S, T, objective=objective).train_batch(3, 11, range(8), 8)
    for split in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0], [1, 2, 3, 4, 5], [6, 7]]):
        data = open_data(text, BYTES, S, T, objective=objective)
        parts = [data.train_batch(3, 11, rows, 8) for rows in reversed(split)][::-1]
        assert same(whole, [None if x[0] is None else torch.cat(x) for x in zip(*parts)])
    a, b = (data.valid_batch(range(3)) for _ in range(2))
    assert same(a, b)
    assert not torch.equal(whole.targets, data.train_batch(3, 12, range(8), 8).targets)


def test_spans_differ_between_rows_and_steps():
    masks = {tuple(row) for step in range(3) for row in spans_of(71, 8, step)[0]}
    assert len(masks) == 24


# ---- training, scoring, sampling -----------------------------------------------------------------------------------------

class Oracle(Scripted):
    """Knows the targets by having read rows and inputs, one after the other; takes either attention."""

    def __init__(self, targets):
        super().__init__(lambda y: 100.0 * F.one_hot(targets, BYTES.vocab_size))
        self.noisy.table = torch.nn.Embedding.from_pretrained(torch.eye(BYTES.vocab_size))

    def decode(self, y, context, attention, extend=False, belief=None):
        return super().decode(y, context, "bidirectional", extend)


@pytest.mark.parametrize("name", ["ar", *PROCESSES])
def test_an_oracle_that_reads_the_gaps_of_the_row_has_loss_0(name):
    L, T = 71, 18
    rows = torch.arange(L) + torch.arange(6)[:, None]  # a row's tokens differ, so a gap shows what it lacks
    batch = Batch(*span(rows, order_noise(6), BYTES, 64, T))
    answers = []
    for row, inputs in zip(rows.tolist(), batch.inputs.tolist()):
        answer, position = [], 0
        for token, after in zip(inputs, [*inputs[1:], None]):
            if token < FIRST:
                position += 1
                continue
            end = L if after is None else row.index(after)
            answer += [token, *row[position:end]]
            position = end
        answers.append(answer + [EOS] + [PAD] * (T - len(answer) - 1))
    process = Autoregressive(BYTES.mask, EOS, PAD) if name == "ar" else new_process(name, BYTES)
    loss = lambda answers: process.loss(Oracle(answers), batch, Noise(0, "train", 0, range(6))).total.item()
    assert loss(torch.tensor(answers)) < 1e-6
    assert loss(torch.tensor(answers).roll(1, dims=1)) > 10  # one slot off


@pytest.fixture(scope="module", params=["ar", *PROCESSES])
def span_run(request, text, tmp_path_factory):
    """Return (process, a run of 2 steps on spans)."""
    kind, folder = "ar" if request.param == "ar" else "diff", tmp_path_factory.mktemp("runs") / request.param
    process = [] if kind == "ar" else [f"--process={request.param}"]
    SCRIPTS[kind].main([f"--data={text}", f"--out_dir={folder}", *FLAGS, *SPAN, *process])
    return request.param, Run(folder)


def test_every_process_trains_on_spans_and_is_scored_on_them_if_it_can_be(span_run, text, capsys):
    name, run = span_run
    assert all(math.isfinite(line["loss"]) for line in run.log()) and len(run.log()) == 3
    assert run.checkpoint()["config"]["objective"] == "span" and run.checkpoint()["step"] == 2
    score = lambda: evaluation.main([str(run.folder), "--metric=bits", "--n_examples=5", "--n_draws=2"])[0]
    if name == "uniform":
        with pytest.raises(UserError, match="--objective=span hold sentinels.* uniform model has no finite bound") as caught:
            score()
        assert "\n" not in str(caught.value)
        return
    result, writer = score(), load_writer(run.folder, GenerateConfig())
    assert "; objective span)" in capsys.readouterr().out
    batch = open_data(text, BYTES, 32, 11, objective="span").valid_batch(range(5))
    assert (batch.targets[:, 0] == FIRST).all()
    assert result["per_token"][0] == pytest.approx(bits(writer, [batch], 2, 0)["per_token"][0], rel=1e-6)
    assert math.isfinite(result["per_byte"][0])


def test_a_model_of_spans_writes_text(span_run, capsys):
    _, run = span_run
    sample.main([str(run.folder), "--prompt=abc", "--show_steps", "--n_samples=2"])
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_an_ar_model_of_spans_becomes_a_diffusion_model_of_spans(train, text, tmp_path):
    train("ar", tmp_path / "ar", f"--data={text}", *SPAN)
    run = train("diff", tmp_path / "diff", f"--data={text}", *SPAN, f"--init_from={tmp_path / 'ar'}", "--process=absorbing")
    assert math.isfinite(run.log()[-1]["loss"])


def test_a_checkpoint_from_before_objectives_is_scored_on_prefixes(train, text, tmp_path):
    score = lambda name: evaluation.main([str(tmp_path / name), "--metric=bits", "--n_examples=5"])[0]
    c = train("ar", tmp_path / "x", f"--data={text}", "--input_len=8", "--target_len=6", "--steps=2").checkpoint()
    for name, config in (("old", {k: v for k, v in c["config"].items() if k != "objective"}),
                         ("new", c["config"] | {"objective": "prefix"})):
        save_checkpoint(tmp_path / name / "ckpt.pt", c | {"config": config})
    assert score("old")["per_token"] == score("new")["per_token"]
    assert score("old")["objective"] == "prefix"


def test_resuming_with_another_objective_is_refused(train, text, tmp_path):
    flags = [f"--data={text}", "--input_len=32", "--target_len=11"]
    run = train("ar", tmp_path / "x", *flags, "--objective=span", "--steps=2", "--schedule=constant")
    before = run.files()
    with pytest.raises(UserError, match="not be the same run: --objective was span, is prefix"):
        train("ar", run.folder, *flags, "--objective=prefix", "--steps=3", "--schedule=constant", "--resume")
    assert run.files() == before
    whole = train("ar", tmp_path / "whole", *flags, "--objective=span", "--steps=3", "--schedule=constant")
    shutil.copytree(run.folder, tmp_path / "y")
    resumed = train("ar", tmp_path / "y", *flags, "--steps=3", "--schedule=constant", "--resume")
    assert resumed.log()[-2]["loss"] == whole.log()[-2]["loss"]


# ---- what is refused -----------------------------------------------------------------------------------------------------

def test_the_default_is_prefix_or_causal_without_inputs():
    assert (choose(None, 5), choose(None, 0)) == ("prefix", "causal")
    assert [choose(name, 0 if name == "causal" else 5) for name in OBJECTIVES] == [*OBJECTIVES]


@pytest.mark.parametrize("flags, message", [
    (["--objective=spam"], "objective='spam' is not one of prefix, .*did you mean 'span'"),
    (["--objective=causal"], "--objective=causal has no inputs: say --input_len=0"),
    (["--objective=prefix", "--input_len=0"], "--objective=prefix has inputs: set --input_len above 0"),
    (["--objective=prefix", "--input_len=0"], "--objective=prefix has inputs: set --input_len above 0"),
    (["--objective=span", "--input_len=0"], "--objective=span has inputs: set --input_len above 0"),
    (["--objective=span", "--input_len=128", "--target_len=28"],
     "--objective=span with --input_len=128 gives rows of 142 tokens and targets of 29: raise --target_len to 29"),
    (["--objective=span", "--input_len=3"], "--input_len=3 gives rows of 3 tokens, too short for a span: raise --input_len"),
    (["--objective=span", "--input_len=1809", "--target_len=999"],
     "--input_len=1809 gives rows of 2010 tokens and 101 spans, but there are 100 sentinels: lower --input_len to 1808"),
    (["--objective=span", "--input_len=1000", "--target_len=300"], "tokens, but --input_len=1000 --target_len=300 need 1112")])
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_trained(train, text, tmp_path, flags, message):
    for kind in ("ar", "diff"):
        with pytest.raises(UserError, match=message) as caught:
            train(kind, tmp_path / "x", f"--data={text}", *flags)
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_the_canvas_that_a_refusal_names_is_the_nearest_that_works():
    assert row_length("span", 128, 29) == 142 and row_length("span", 1808, 999) and row_length("span", 4, 3) == 4
    for S, T in ((128, 28), (1809, 999), (3, 3), (1, 3)):
        with pytest.raises(UserError):
            row_length("span", S, T)


def test_a_task_takes_no_objective(train, tmp_path):
    with pytest.raises(UserError, match="--objective=prefix is for text, but .* is a task, with inputs and targets of its own"):
        train("ar", tmp_path / "x", "--objective=prefix")
