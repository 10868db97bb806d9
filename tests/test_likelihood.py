"""likelihood.py: bits per token and per byte, against sums by hand."""
import math

import pytest
import torch

import eval as evaluation
from beyond.likelihood import bits, bound_of, ratio, task_batches
from data.dataset import open_data
from data.tasks import read_jsonl
from engine.cli import UserError
from engine.noise import Noise
from sample import GenerateConfig, load_writer


def score(folder, *flags):
    return evaluation.main([str(folder), "--metric=bits", *flags])[0]


def test_a_ratio_and_its_standard_error():
    assert ratio([math.log(2) * x for x in (2, 4, 6)], [1, 2, 3]) == (pytest.approx(2.0), pytest.approx(0.0))
    rng = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 15, (400, 300), generator=rng).double()
    nats = counts * (1 + 0.3 * torch.randn(400, 300, generator=rng, dtype=torch.float64)) * math.log(2)
    values, errors = zip(*[ratio(x.tolist(), c.tolist()) for x, c in zip(nats, counts)])
    spread = torch.tensor(values).std().item()
    assert abs(sum(errors) / 400 / spread - 1) < 0.1  # what it says is how much the value really scatters
    assert math.isnan(ratio([1.0], [2])[1])


def test_ar_bits_are_the_sum_of_log_probabilities_over_tokens_and_over_bytes(ar_run, task):
    writer = load_writer(ar_run.folder, GenerateConfig())
    examples = read_jsonl(task / "test.jsonl")
    nats = 0.0
    for e in examples:  # one by one, without padding of the input, token by token
        inputs = torch.tensor([list(e["input"].encode())])
        target = [*e["target"].encode(), writer.tokenizer.eos]
        target += [writer.tokenizer.pad] * (writer.target_len - len(target))
        fed = [writer.process.start]
        for token in target:
            logits = writer.model.decode(torch.tensor([fed]), writer.model.encode(inputs), "causal")[0, -1]
            nats -= logits.double().log_softmax(-1)[token].item()
            fed.append(token)
    n_bytes = sum(len(e["target"]) for e in examples)
    result = score(ar_run.folder, "--split=test", "--batch_size=2")
    assert result["per_token"][0] == pytest.approx(nats / math.log(2) / (n_bytes + len(examples)), rel=1e-5)
    assert result["per_byte"][0] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert (result["n"], result["n_left_out"], result["per_token"][1] > 0) == (5, 0, True)
    rounded = score(ar_run.folder, "--split=test", "--batch_size=2", "--dtype=bfloat16")
    assert rounded["dtype"] == "bfloat16" and 0 < abs(rounded["per_token"][0] / result["per_token"][0] - 1) < 0.02


@pytest.mark.parametrize("process", ["uniform", "absorbing", "gaussian"])
def test_bits_of_diffusion_do_not_depend_on_the_batch_size_and_say_that_they_are_a_bound(train, tmp_path, capsys, process):
    run = train("diff", tmp_path / "x", f"--process={process}", "--steps=2")
    one, all_ = (score(run.folder, "--n_draws=3", f"--batch_size={n}") for n in (1, 5))
    assert one["per_token"] == pytest.approx(all_["per_token"], rel=1e-5) and one["per_token"][0] > 0
    said = capsys.readouterr().out
    assert "upper bound, 3 noise levels each" in said and f"({process}; seed 0) on 5 test examples" in said
    writer = load_writer(run.folder, GenerateConfig())
    batches, _ = task_batches(read_jsonl(f"{one['data']}/test.jsonl"), writer, 5)
    nats = bound_of(writer.process)(writer.process, writer.model, batches[0], Noise(0, "valid", 0, range(5)), 3)
    by_hand = nats.sum().item() / math.log(2)
    assert one["per_token"][0] == pytest.approx(by_hand / (batches[0].targets != writer.tokenizer.pad).sum().item(), rel=1e-5)


def test_text_is_measured_on_fixed_validation_windows(train, text, tmp_path):
    run = train("ar", tmp_path / "x", f"--data={text}", "--input_len=4", "--target_len=6", "--steps=1")
    result = score(run.folder, "--n_examples=7", "--batch_size=3")
    writer = load_writer(run.folder, GenerateConfig())
    batch = open_data(text, writer.tokenizer, 4, 6).valid_batch(range(7))
    assert (result["n"], result["split"]) == (7, "valid")
    assert result["per_token"][0] == pytest.approx(bits(writer, [batch], 1, 0)["per_token"][0], rel=1e-6)


def test_examples_that_do_not_fit_are_counted_and_left_out(ar_run):
    writer = load_writer(ar_run.folder, GenerateConfig())
    fits, long = {"input": "ab", "target": "ba"}, {"input": "a" * 9, "target": "b"}
    batches, n_left_out = task_batches([fits, long, fits, {"input": "a", "target": "b" * 7}], writer, 1)
    assert (len(batches), n_left_out) == (2, 2)
    with pytest.raises(UserError, match="not one of 1 examples fits the canvas of 8"):
        task_batches([long], writer, 1)


@pytest.mark.parametrize("flags, message", [(["--n_draws=0"], "--n_draws=0 must be at least 1"),
                                            (["--metric=bit"], "did you mean 'bits'")])
def test_a_wrong_flag_is_refused(diff_run, flags, message):
    with pytest.raises(UserError, match=message):
        score(diff_run.folder, *flags)
