"""infill.py: the text around the gaps stays, every length is tried."""
import pytest
import torch

import eval as evaluation
import sample
from beyond import infill as gaps
from beyond.infill import MAX_ROWS, canvases, infill
from beyond.likelihood import BOUNDS
from data.dataset import pad_rows
from data.tokenizer import load_tokenizer
from engine.cli import UserError
from engine.noise import Noise
from sample import GenerateConfig, Writer, load_writer, prompt_batch

TOKENIZER = load_tokenizer("bytes")
EOS, PAD = TOKENIZER.eos, TOKENIZER.pad


def ids(text):
    return list(text.encode())


@pytest.fixture(scope="module", params=["uniform", "absorbing", "gaussian"])
def run(request, train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("infill") / request.param
    return train("diff", folder, f"--process={request.param}", "--input_len=8", "--target_len=12", "--steps=2")


def test_a_template_becomes_a_row_for_each_choice_of_gap_lengths():
    targets, frozen = canvases("a___b___", TOKENIZER, 7, gap_len=3)
    assert frozen.tolist() == [[True] + [False] * n + [True] + [False] * (5 - n) for n in (1, 2, 3)]
    assert [row[keep].tolist() for row, keep in zip(targets, frozen)] == [ids("ab")] * 3
    targets, frozen = canvases("___b", TOKENIZER, 5, gap_len=2)  # text at the end: EOS and PAD are given, too
    assert frozen.tolist() == [[False] + [True] * 4, [False] * 2 + [True] * 3]
    assert [row[keep].tolist() for row, keep in zip(targets, frozen)] == [[*ids("b"), EOS, PAD, PAD], [*ids("b"), EOS, PAD]]
    _, frozen = canvases("a___b___c___", TOKENIZER, 12, gap_len=2)
    gaps = {tuple(map(len, "".join(".x"[f] for f in row).strip(".").split("x")[1:-1])) for row in frozen}
    assert gaps == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_lengths_that_do_not_fit_the_canvas_are_not_tried():
    targets, _ = canvases("abc___d", TOKENIZER, 7, gap_len=4)
    assert targets.shape == (2, 7)  # one or two tokens between "abc", "d" and EOS


@pytest.mark.parametrize("typed, text", [("a\\n___", "a\n"), ('"\\\\n"___', '"\\n"'), ("\\\\\\n___", "\\\n"), ("\\t___", "\\t"),
                                         ("a\\___", "a\\"), ("a\n___", "a\n")])
def test_a_line_end_is_typed_as_backslash_n_and_a_backslash_as_two(typed, text):
    targets, frozen = canvases(typed, TOKENIZER, 12, gap_len=1)
    assert targets[frozen].tolist() == ids(text)


@pytest.mark.parametrize("gap", ["___", "____", "_" * 30])
def test_a_longer_blank_is_one_gap(gap):
    one, other = (canvases(f"a{blank}b__c_d", TOKENIZER, 12, gap_len=2) for blank in ("___", gap))
    assert all(torch.equal(x, y) for x, y in zip(one, other))


@pytest.mark.parametrize("template, target_len, gap_len, message", [
    ("no gap", 12, 4, "no gap: write ___"), ("", 12, 4, "no gap"), ("a___", 12, 0, "--gap_len=0 must be at least 1"),
    ("abcdef___g", 8, 4, "has 7 tokens, 9 with its gaps and EOS, but the model's canvas holds 8"),
    ("a___b___c___d___e", 60, 4, f"are 256 choices of lengths, at most {MAX_ROWS}")])
def test_a_template_that_cannot_be_filled_is_refused(template, target_len, gap_len, message):
    with pytest.raises(UserError, match=message):
        canvases(template, TOKENIZER, target_len, gap_len)


def test_the_text_around_the_gaps_stands_in_every_draft_and_in_the_answer(run):
    writer, batch = prompt_batch(load_writer(run.folder, GenerateConfig(n_steps=3, n_samples=2)), "ab")
    drafts, text = infill(writer, batch, Noise(0, "generate", 0, [0]), "x___yz___", 3)
    seen = set()
    for draft in drafts:
        assert draft.shape == (1, 12) and draft[0, 0] == ord("x")
        seen.add(bytes(i for i in draft[0].tolist() if i < 256).index(b"yz"))
    assert len(seen) == 1 or min(seen) >= 1  # one length throughout
    assert text(drafts[-1][0]).startswith("x") and "yz" in text(drafts[-1][0])


def test_the_likeliest_length_is_chosen(run, monkeypatch):
    writer, batch = prompt_batch(load_writer(run.folder, GenerateConfig(n_steps=2, n_samples=1)), "ab")
    for n in (1, 2, 3):
        column = torch.tensor([3.0, 3.0, 3.0])
        column[n - 1] = 1.0
        monkeypatch.setitem(BOUNDS, type(writer.process), lambda *_, nats=column: nats)
        drafts, _ = infill(writer, batch, Noise(0, "generate", 0, [0]), "x___yz", 3)
        assert drafts[-1][0, 1 + n:].tolist() == [*ids("yz"), EOS, *[PAD] * (8 - n)]


def test_one_choice_of_lengths_needs_no_bound_and_several_do(run, monkeypatch):
    writer, batch = prompt_batch(load_writer(run.folder, GenerateConfig(n_steps=2, n_samples=1)), "ab")
    monkeypatch.delitem(BOUNDS, type(writer.process))
    drafts, text = infill(writer, batch, Noise(0, "generate", 0, [0]), "x___", 3)
    assert len(drafts) == 3 and text(drafts[-1][0]).startswith("x")
    with pytest.raises(UserError, match=f"no likelihood bound is known for the process '{writer.process.name}'"):
        infill(writer, batch, Noise(0, "generate", 0, [0]), "x___yz", 3)


def test_eos_and_pad_in_a_gap_that_text_follows_do_not_end_the_text(run, monkeypatch):
    writer, batch = prompt_batch(load_writer(run.folder, GenerateConfig(n_steps=1, n_samples=1)), "ab")
    drafts, text = infill(writer, batch, Noise(0, "generate", 0, [0]), "x___yz", 2)
    row = torch.tensor([*ids("x"), EOS, PAD, *ids("yz"), EOS, *[PAD] * 6])
    monkeypatch.setitem(BOUNDS, type(writer.process), lambda *_: torch.tensor([1.0, 0.0]))
    _, text = infill(writer, batch, Noise(0, "generate", 0, [0]), "x___yz", 2)
    assert text(row) == "xyz"


def test_sample_fills_from_the_command_line(run, capsys):
    capsys.readouterr()
    sample.main([str(run.folder), "--infill=ab___cd", "--n_steps=2", "--n_samples=2", "--gap_len=2", "--show_steps"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[-1].startswith("ab") and lines[-1].endswith("cd")


# ---- eval.py --middle ----

@pytest.mark.parametrize("kind", ["ar", "diff"])
def test_only_the_gap_is_written_and_of_ars_guesses_the_likeliest_whole_is_kept(kind, ar_run, diff_run, monkeypatch):
    run = ar_run if kind == "ar" else diff_run
    writer = load_writer(str(run.folder), GenerateConfig(n_samples=4, temperature=5.0))
    target, wholes = writer.tokenizer.encode("abcdab"), []
    batch = pad_rows([(writer.tokenizer.encode("x"), target)], writer.tokenizer, writer.input_len, writer.target_len)
    bound, seen = Writer.bound, []
    monkeypatch.setattr(Writer, "bound", lambda self, batch, *more: seen.append((batch.targets, bound(self, batch, *more)))
                        or seen[-1][1])
    for index in range(4):
        ids, evaluations = gaps.fill(writer, batch, 2, 4, 0, index)
        assert ids[:2].tolist() == target[:2] and ids[4:].equal(batch.targets[0, 4:]) and evaluations >= 2
        wholes.append(ids)
    assert len({tuple(ids.tolist()) for ids in wholes}) > 1, "the gap is the model's own"
    assert len(seen) == 4 * (kind == "ar")
    for whole, (guesses, nats) in zip(wholes, seen):
        assert whole.equal(guesses[nats.argmin()]) and len(guesses) == 4 and (guesses[:, 4:] == batch.targets[:, 4:]).all()


def test_infilling_is_scored_as_the_task_is(ar_run, diff_run, capsys):
    for run in (ar_run, diff_run):
        result, = evaluation.main([str(run.folder), "--middle", "--n_examples=3"])
        assert "exact_match" in result["scores"] and result["n"] == 3
    assert "network evaluations" in capsys.readouterr().out


def test_an_exact_match_is_a_gap_filled_with_the_gold_tokens(diff_run, monkeypatch):
    def fill(writer, batch, first, last, seed, index):
        filled = batch.targets[0].clone()
        filled[first:last] = filled[first:last] if index < 2 else torch.tensor(writer.tokenizer.encode("#" * (last - first)))
        return filled, 1
    monkeypatch.setattr(gaps, "fill", fill)
    result, = evaluation.main([str(diff_run.folder), "--middle", "--n_examples=3"])
    assert result["scores"]["exact_match"][0] == pytest.approx(200 / 3)
