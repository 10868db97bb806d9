"""experiments/bench.py: what it times is what it says, and the table has a row for everything."""
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_model
from engine.cli import UserError
from experiments import bench

TINY = ["--size=1x16x2", "--vocab_size=64", "--input_len=4", "--lengths=3,5", "--rounds=2", "--n_steps=1,2", "--device=cpu"]
CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_run_times_every_way_of_decoding_at_every_length(dtype, tmp_path, capsys):
    bench.main([*TINY, f"--dtype={dtype}", f"--out={tmp_path}/x.json"])
    facts = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert facts["config"]["dtype"] == dtype and facts["device"].startswith("CPU")
    ways = ["AR", "1 steps", "2 steps", "10 steps x 8 samples"]
    assert [(r["length"], r["what"]) for r in facts["decoding"]] == [(n, w) for n in (3, 5) for w in ways]
    assert all(r["seconds"] > 0 and r["low"] <= r["high"] for r in facts["decoding"])
    assert all(r["AR takes x"] == 1 for r in facts["decoding"] if r["what"] == "AR"), "the yardstick"
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n{way} ") == 2 for way in ways)


def test_ratios_are_those_of_the_same_round(monkeypatch):
    def ratio(ar, other):
        monkeypatch.setattr(bench, "take_turns", lambda *_: {"AR": ar, "10 steps x 8 samples": other})
        _, row = bench.bench_decoding(bench.Config(size="1x16x2", vocab_size=64), CPU, [3], [])
        return row["low"], row["AR takes x"], row["high"]
    assert ratio([2, 8, 3], [1, 2, 3])[1] == 2, "2, 4, 1; that of the medians would be 1.5"
    assert ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)


def test_functions_take_turns_and_two_rounds_do_not_count():
    calls = []
    functions = {name: lambda name=name: [calls.append(name)] for name in "ab"}
    times = bench.take_turns(functions, 3, CPU)
    assert calls == list("ab" * 5) and {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_the_flops_of_decoding_are_those_that_pytorch_counts_in_the_matrix_products():
    def counted(function):
        with FlopCounterMode(display=False) as counter:
            list(function())
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))

    config = bench.Config(size="2x16x2", vocab_size=64, input_len=6)
    for name, (function, work) in bench.decoders(config, tiny_model(vocab_size=64), 5, [2, 3]).items():
        assert counted(function) == work > 0, name


@pytest.mark.parametrize("flags, message", [
    (["--lengths=1,x"], "--lengths=1,x must be whole numbers above 0"), (["--n_steps=0"], "--n_steps=0 must be"),
    (["--dtype=float16"], "dtype='float16' is not one of float32, bfloat16"), (["--size=huge"], "huge"),
    (["--rounds=0"], "--rounds=0 must be at least 1"), (["--input_len=0"], "--input_len=0 must be at least 1"),
    (["--out=nowhere/x.json"], "cannot write --out=nowhere/x.json: No such file or directory"),
    (["--vocab_size=1"], "--vocab_size=1 must be at least 4"),
    (["--device=gpu"], "device='gpu' is not one of"), (["--out=README.md"], "--out=README.md exists; it is not overwritten")])
def test_a_wrong_flag_is_refused_in_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        bench.main(flags)
