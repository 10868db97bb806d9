"""speculative.py: the text of greedy AR decoding to the token, whatever the drafter says; fewer evaluations when it agrees."""
import pytest
import torch

import eval as evaluation
import sample
from autoregressive import Autoregressive
from beyond.speculative import Speculative
from conftest import EOS, MASK, PAD, T, ragged_batch, tiny_model
from diffusion import Absorbing, Gaussian, Uniform
from engine.cli import UserError
from engine.noise import Noise
from model import Transformer

AR = Autoregressive(MASK, EOS, PAD)
PROCESSES = {"uniform": Uniform(11), "absorbing": Absorbing(MASK), "gaussian": Gaussian(4)}


def noise(n=4):
    return Noise(0, "generate", 0, range(n))


def writer(seed=0):
    """A model that writes EOS now and then."""
    model = tiny_model(seed)
    with torch.no_grad():
        model.embedding.weight[EOS] *= 2
    return model


def greedy(model, batch):
    *_, answer = AR.generate(model, batch, noise())
    return answer


class Oracle:
    """A drafter's process that drafts given tokens, frozen ones left alone, in as many drafts as it is told steps."""
    inputs_attention = "causal"

    def __init__(self, tokens):
        self.tokens = tokens

    def generate(self, drafter, batch, noise, n_steps, n_samples, temperature, frozen):
        assert temperature == 0
        yield torch.where(frozen, batch.targets, 0)  # for noise
        for _ in range(n_steps):
            yield torch.where(frozen, batch.targets, self.tokens)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", PROCESSES)
def test_the_answer_is_that_of_greedy_decoding_whatever_the_drafter(name, seed):
    process, batch = PROCESSES[name], ragged_batch(seed=seed)
    model, drafter = writer(seed), tiny_model(seed + 100, vector_width=getattr(process, "vector_width", 0))
    expected = greedy(model, batch)
    for options in ({}, {"n_steps": 3}, {"n_steps": 2, "n_samples": 2}):
        *_, answer = Speculative(AR, drafter, process).generate(model, batch, noise(), **options)
        assert torch.equal(answer, expected)


def test_the_models_of_these_tests_write_texts_that_end_and_texts_that_do_not():
    answers = torch.cat([greedy(writer(seed), ragged_batch(seed=seed)) for seed in range(4)])
    ended = (answers == EOS).any(dim=1)
    assert ended.any() and not ended.all() and len(answers.unique(dim=0)) > 8


@pytest.mark.parametrize("n_steps", [1, 3])
def test_a_drafter_that_agrees_needs_one_round(n_steps):
    model, batch = writer(), ragged_batch()
    drafts = list(Speculative(AR, tiny_model(), Oracle(greedy(model, batch))).generate(model, batch, noise(), n_steps=n_steps))
    assert len(drafts) == 1 + n_steps + 1 and torch.equal(drafts[-1], greedy(model, batch))
    assert (drafts[0] == PAD).all(), "it starts from an empty canvas"


@pytest.mark.parametrize("wrong", range(T))
def test_one_wrong_token_costs_one_round_more_and_the_right_ones_before_it_are_settled(wrong):
    model, batch = writer(), ragged_batch()
    expected = greedy(model, batch)
    tokens = expected.clone()
    tokens[:, wrong] = (tokens[:, wrong] + 1) % 9
    drafts = list(Speculative(AR, tiny_model(), Oracle(tokens)).generate(model, batch, noise()))
    assert torch.equal(drafts[-1], expected)
    before_the_end = ~(expected[:, :wrong] == EOS).any(dim=1)
    assert torch.equal(drafts[2][before_the_end, :wrong + 1], expected[before_the_end, :wrong + 1])
    if wrong == T - 1:
        assert len(drafts) == 1 + 2, "AR's own token behind the agreeing ones is the last"
    else:
        assert (drafts[2][before_the_end, wrong + 1:] == PAD).all(), "nothing behind it is"
        assert len(drafts) == 1 + (4 if (before_the_end & (expected[:, wrong] != EOS)).any() else 2)


def test_the_drafter_encodes_the_inputs_once(monkeypatch):
    model, batch, calls = writer(), ragged_batch(), []
    encode = Transformer.encode
    monkeypatch.setattr(Transformer, "encode", lambda *args: (calls.append(args[0]), encode(*args))[1])
    drafts = list(Speculative(AR, tiny_model(100), Uniform(11)).generate(model, batch, noise(), n_samples=2))
    assert len(drafts) > 1 + 2 and len(calls) == 2 and calls[0] is model


def test_every_draft_but_the_first_is_an_evaluation_of_one_of_the_two_networks(monkeypatch):
    model, drafter, batch, calls = writer(), tiny_model(100), ragged_batch(), []
    decode = Transformer.decode
    monkeypatch.setattr(Transformer, "decode", lambda self, *args, **more: (
        calls.append(self is model), decode(self, *args, **more))[1])
    drafts = list(Speculative(AR, drafter, Uniform(11)).generate(model, batch, noise(), n_steps=2))
    assert len(drafts) - 1 == len(calls) == 3 * sum(calls) and calls[:3] == [False, False, True]


def test_a_drafter_that_is_always_wrong_costs_a_round_a_token():
    model, batch = writer(), ragged_batch()
    expected = greedy(model, batch)
    drafts = list(Speculative(AR, tiny_model(), Oracle((expected + 1) % 9 * (expected < 9))).generate(model, batch, noise()))
    assert torch.equal(drafts[-1], expected) and len(drafts) == 1 + 2 * T


@pytest.fixture(scope="module")
def pair(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speculative")
    return train("ar", folder / "ar", "--steps=30", "--lr=1e-2"), train("diff", folder / "diff", "--steps=30", "--lr=1e-2")


def test_eval_gives_the_same_scores_with_a_drafter(pair):
    ar, drafter = pair
    (alone,), (helped,) = (evaluation.main([str(ar.folder), *more]) for more in ([], [f"--drafter={drafter.folder}"]))
    assert alone["scores"] == helped["scores"] and alone["unfinished"] == helped["unfinished"]
    assert helped["process"] == "speculative" and helped["evaluations"] != alone["evaluations"]


def test_sample_writes_the_same_text_with_a_drafter(pair, capsys):
    ar, drafter = pair
    texts = []
    for flags in ([], [f"--drafter={drafter.folder}"], [f"--drafter={drafter.folder}", "--n_steps=4"]):
        sample.main([str(ar.folder), "--prompt=abc", *flags])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("checkpoint, drafter, flags, message", [
    ("diff", "diff", [], "only an autoregressive model verifies drafts, this one is a uniform model"),
    ("ar", "ar", [], "is autoregressive; a diffusion model drafts"),
    ("ar", "nowhere", [], "nowhere"),
    ("ar", "diff", ["--temperature=0.5"], "--temperature is not for speculative models; they take --n_steps, --n_samples"),
    ("ar", "diff", ["--n_steps=0"], "--n_steps=0 must be at least 1"),
    ("ar", "diff", ["--infill=a___"], "--infill needs a diffusion model")])
def test_what_does_not_fit_is_refused_in_one_line(pair, tmp_path, checkpoint, drafter, flags, message):
    folders = {"ar": pair[0].folder, "diff": pair[1].folder, "nowhere": tmp_path / "nowhere"}
    with pytest.raises(UserError, match=message):
        sample.main([str(folders[checkpoint]), f"--drafter={folders[drafter]}", "--prompt=a", *flags])


@pytest.mark.parametrize("flags, message", [
    (["--target_len=9"], r"has a canvas of 8 \+ 9 tokens, this model one of 8 \+ 7"),
    (["--input_len=9"], r"has a canvas of 9 \+ 7 tokens, this model one of 8 \+ 7"),
    (["--tokenizer=bpe"], "has the tokenizer 'bpe', this model has 'bytes'")])
def test_a_drafter_of_another_canvas_or_tokenizer_is_refused(pair, train, tmp_path, flags, message):
    other = train("diff", tmp_path / "other", "--steps=1", *flags)
    with pytest.raises(UserError, match=message):
        sample.main([str(pair[0].folder), f"--drafter={other.folder}", "--prompt=a"])


def test_bits_and_several_greedy_programs_make_no_sense_with_a_drafter(pair):
    words = [str(pair[0].folder), f"--drafter={pair[1].folder}"]
    for flags in ([*words], [str(pair[1].folder), "--decoder=ancestral"]):
        with pytest.raises(UserError, match="--drafter and --decoder are for answers"):
            evaluation.main([*flags, "--metric=bits"])
    with pytest.raises(UserError, match="greedy programs would all be the same"):
        evaluation.main([*words, "--n_programs=2"])
