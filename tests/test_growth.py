"""results/growth.py: each axis grows alone, and the exponents beside the measured ones are those of the arithmetic."""
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
import growth

import bench
from config import parse

TINY = ["--size=1x16x2", "--vocab_size=64", "--input_len=4", "--target_len=4", "--batch_size=2", "--rounds=1", "--device=cpu"]
SIZES = {"batch": [2, 4, 8, 16], "length": [4, 8, 16, 32], "n_samples": [1, 2, 4, 8], "width": [16, 32, 64, 128]}  # from TINY
CPU = torch.device("cpu")


def test_growth_measures_alone_each_axis_at_1_2_4_and_8_times_its_size(tmp_path, capsys):
    growth.main([*TINY, f"--out={tmp_path}/x.json"])
    facts = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert [(r["axis"], r["size"]) for r in facts["growth"]] == [(axis, n) for axis, sizes in SIZES.items() for n in sizes]
    assert all(r["seconds"] > 0 and r["dtype"] == "float32" for r in facts["growth"])
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n{axis} ") == 4 for axis in SIZES)


def test_the_fitted_exponent_is_that_of_the_power_law():
    assert growth.slope([dict(size=n, x=3 * n ** 1.7) for n in (2, 4, 8, 16)], "x") == pytest.approx(1.7, abs=1e-12)
    assert growth.slope([dict(size=n, x=5.0) for n in (1, 2, 4)], "x") == pytest.approx(0, abs=1e-12)
    uneven = [dict(size=n, x=x) for n, x in ((1, 1), (2, 2), (4, 16))]  # log2: points (0, 0), (1, 1), (2, 4)
    assert growth.slope(uneven, "x") == pytest.approx(2, abs=1e-12)


def test_the_flops_of_growth_are_those_that_pytorch_counts(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # which costs twice what is counted here
    config = parse(growth.Config, [*TINY, "--input_len=6"])
    for axis, configs in growth.axes(config).items():
        for size, larger in configs.items():
            function, work, _ = growth.grown(axis, size, larger, "float32", CPU)
            with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
                function()
            assert counted.get_total_flops() * (1 if axis == "n_samples" else 3) == work, (axis, size)


def growth_rows(monkeypatch, seconds, *flags):
    """Return {axis: (exponent, expected)} where a step of size n takes seconds(n)."""
    monkeypatch.setattr(bench, "take_turns", lambda functions, *args: {size: [seconds(size)] for size in functions})
    monkeypatch.setattr(bench, "peak_memory", lambda function, kept, device: kept + 1)
    rows = growth.measure(parse(growth.Config, [*TINY, *flags]), CPU)
    return {r["axis"]: (r["exponent"], r["expected"]) for r in rows}


def test_expected_exponents_are_those_of_the_arithmetic(monkeypatch):
    found = growth_rows(monkeypatch, lambda size: 1e-3 * size ** 1.5)
    assert all(exponent == pytest.approx(1.5) for exponent, _ in found.values())
    assert found["batch"][1] == pytest.approx(1) and 0.9 < found["n_samples"][1] < 1
    assert 1 < found["length"][1] < 1.5 and 1.5 < found["width"][1] < 2
    many_words = growth_rows(monkeypatch, float, "--vocab_size=4096")
    assert 1 < many_words["width"][1] < 1.4, "logits grow as the width, weights as its square"
    few_words = growth_rows(monkeypatch, float, "--vocab_size=4", "--input_len=1", "--target_len=1")
    assert 1.95 < few_words["width"][1] < 2
    long_texts = growth_rows(monkeypatch, float, "--vocab_size=4", "--input_len=4096", "--target_len=4096")
    assert 1.9 < long_texts["length"][1] < 2, "attention grows as the square of the length"


def test_memory_of_a_training_step_is_expected_to_grow_with_the_batch_beside_what_is_kept(monkeypatch):
    monkeypatch.setattr(bench, "take_turns", lambda functions, *args: {size: [1.0] for size in functions})
    config = parse(growth.Config, [*TINY, "--batch_size=64"])
    rows = {(r["axis"], r["size"]): r for r in growth.measure(config, CPU)}
    step, kept = rows["batch", 64], rows["batch", 64]["kept"]
    assert kept == 3 * 4 * (64 * 16 + 12 * 16 * 16), "float32 weights and two moments"
    assert step["proportional"] == step["memory"] > kept
    assert rows["batch", 512]["proportional"] == kept + 8 * (step["memory"] - kept)
    assert step["memory_exponent"] == pytest.approx(step["memory_expected"], abs=0.1)
