"""experiments/bench.py: what it times is what it says, and the table has a row for everything."""
import json
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_model
from engine.cli import UserError
from experiments import bench

TINY = ["--size=1x16x2", "--vocab_size=64", "--input_len=4", "--lengths=3,5", "--rounds=2", "--n_steps=1,2", "--device=cpu"]
CPU = torch.device("cpu")


@pytest.mark.slow
def test_one_run_times_every_way_of_decoding_in_every_dtype(tmp_path, capsys):
    bench.main([*TINY, "--dtypes=float32,bfloat16", "--decode_batch=1,2", f"--out={tmp_path}/x.json"])
    facts = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert facts["n_params"] == 64 * 16 + 12 * 16 ** 2
    ways = ["AR", "1 steps", "2 steps", "10 steps x 8 samples"]
    assert [(r["dtype"], r["batch"], r["length"], r["what"]) for r in facts["decoding"]] == [
        (d, b, n, w) for d in ("float32", "bfloat16") for b in (1, 2) for n in (3, 5) for w in ways]
    assert all(r["seconds"] > 0 and r["low"] <= r["high"] for r in facts["decoding"])
    assert all(r["AR takes x"] == 1 for r in facts["decoding"] if r["what"] == "AR"), "the yardstick of its own dtype"
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n{way} ") == 8 for way in ways)


def test_ratios_are_those_of_the_same_round():
    assert bench.ratio([2, 8, 3], [1, 2, 3])[0] == 2, "2, 4, 1; that of the medians would be 1.5"
    assert bench.ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)


def test_functions_take_turns_and_two_rounds_do_not_count():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = bench.take_turns(functions, 3, CPU)
    assert calls == list("ab" * 5) and {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_the_flops_of_decoding_are_those_that_pytorch_counts_in_the_matrix_products():
    def counted(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))

    config = bench.Config(size="2x16x2", vocab_size=64, input_len=6)
    model, several = tiny_model(vocab_size=64), [(2, 1), (2, 3)]
    for name, (function, work) in bench.decoders(config, model, 2, 5, several).items():
        assert counted(function) == work > 0, name


def test_peak_memory_counts_what_is_kept_and_the_most_that_is_there_at_once():
    def function():
        for _ in range(2):
            a = torch.ones(1 << 18)  # 1 MB
            b = a + 1
            del a, b
    assert bench.peak_memory(function, 1000, CPU) - 1000 == pytest.approx(2 << 20, abs=1 << 12)


@pytest.mark.parametrize("flags, message", [
    (["--lengths=1,x"], "--lengths=1,x must be whole numbers above 0"), (["--n_steps=0"], "--n_steps=0 must be"),
    (["--dtypes=float16"], "dtypes='float16' is not one of float32, bfloat16"), (["--size=huge"], "huge"),
    (["--rounds=0"], "--rounds=0 must be at least 1"), (["--input_len=0"], "--input_len=0 must be at least 1"),
    (["--out=nowhere/x.json"], "cannot write --out=nowhere/x.json: No such file or directory"),
    (["--vocab_size=1"], "--vocab_size=1 must be at least 4"),
    (["--device=gpu"], "device='gpu' is not one of"), (["--out=README.md"], "--out=README.md exists; it is not overwritten")])
def test_a_wrong_flag_is_refused_in_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        bench.main(flags)


def test_a_compiler_that_does_not_work_is_one_line_and_leaves_no_file(tmp_path, monkeypatch):
    def compile_nothing(function):
        raise RuntimeError("no working C++ compiler found\nand a long story")
    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(UserError, match=r"--compiled: torch.compile does not work here \(no working C\+\+ compiler found\)$"):
        bench.main([*TINY, "--compiled", f"--out={tmp_path}/x.json"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_compiled_decoding_writes_the_same_tokens(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")  # traces, and needs no C++ compiler
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    config, model = bench.Config(vocab_size=64, input_len=4), tiny_model(vocab_size=64)
    several, drafts = [(2, 1)], []
    for compiled in (False, True):
        torch.manual_seed(0)  # of the inputs
        ways = bench.decoders(config, model, 2, 20, several, compiled)
        drafts.append([ways[name][0]()[-1] for name in ("AR", "2 steps")])
    assert all(map(torch.equal, *drafts))
    assert 3 <= counter.frame_count < 10, "compiled, and not for every token anew"
    assert not any(hasattr(getattr(model, name), "_torchdynamo_orig_callable") for name in ("encode", "states", "logits"))
