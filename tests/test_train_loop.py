"""train_loop.py: the same run however it is split, stopped or watched; a run that goes wrong costs nothing that was there."""
import errno
import gc
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.spawn import start_processes

import train_ar
import train_diff
import train_loop
from autoregressive import cross_entropy
from conftest import FLAGS, needs_gpu
from data.dataset import open_data
from engine import run_log
from engine.checkpoint import save_checkpoint
from engine.cli import UserError
from engine.noise import Noise
from engine.parallel import LossModule
from pretrained.loading import build_model, load_checkpoint, process_of, tokenizer_of

ROOT = Path(train_loop.__file__).parent
RESUMABLE = ["--steps=10", "--eval_every=5", "--log_every=4", "--dropout=0.1"]


def same(a, b):
    """Compare nested dicts, lists and tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def stop_at(monkeypatch, last, error=KeyboardInterrupt):
    """Let the loop die at the beginning of step number `last` (counted from 0)."""
    real = train_loop.learning_rate

    def learning_rate(config, step):
        if step == last:
            raise error
        return real(config, step)
    monkeypatch.setattr(train_loop, "learning_rate", learning_rate)


# ---- the same run again --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["ar", "diff"])
def test_the_same_command_twice_is_bit_identical_and_another_seed_is_not(train, tmp_path, kind):
    runs = (("one", 3), ("two", 3), ("other", 4))
    one, two, other = (train(kind, tmp_path / name, "--dropout=0.1", f"--seed={seed}") for name, seed in runs)
    assert one.log() == two.log() and len(one.log()) == 5
    assert same(one.checkpoint()["model"], two.checkpoint()["model"])
    assert one.log()[0]["loss"] != other.log()[0]["loss"]


@pytest.fixture(params=["ar", "diff"])
def stopped(request, train, task, text, tmp_path, monkeypatch):
    """Return (kind, flags, a run of 10 steps, the same run killed in step 10): AR on text, diffusion on a task."""
    kind = request.param
    flags = [*RESUMABLE, f"--data={text if kind == 'ar' else task}", "--unroll_temperature=1"][:None if kind == "diff" else -1]
    whole = train(kind, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 9)
        train(kind, tmp_path / "part", *flags)
    killed = type(whole)(tmp_path / "part")
    assert killed.checkpoint()["step"] == 5 and killed.log()[-1]["step"] == 8  # it had logged past its checkpoint
    return kind, flags, whole, killed


def test_a_resumed_run_is_bit_identical_to_one_never_stopped(stopped, train):
    kind, flags, whole, killed = stopped
    with open(killed.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 9, "los')  # the kill tore a line
    train(kind, killed.folder, *flags, "--resume")
    assert killed.log() == whole.log() and [line["step"] for line in whole.log()] == [1, 4, 5, 5, 8, 10, 10]
    a, b = whole.checkpoint(), killed.checkpoint()
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"]) and a["step"] == b["step"] == 10


@pytest.mark.parametrize("withheld", ["moments", "steps of AdamW", "step"])
def test_withholding_any_state_makes_a_resumed_run_differ(stopped, train, withheld):
    kind, flags, whole, killed = stopped
    c = killed.checkpoint()
    for state in c["optimizer"]["state"].values():
        if withheld == "moments":
            state["exp_avg"].zero_()
        if withheld == "steps of AdamW":
            state["step"].zero_()
    save_checkpoint(killed.path, c | ({"step": 4} if withheld == "step" else {}))
    train(kind, killed.folder, *flags, "--resume")
    assert not same(whole.checkpoint()["model"], killed.checkpoint()["model"])


def test_resuming_needs_no_init_from_and_keeps_its_tokenizer(train, ar_run, task, tmp_path):
    flags = [f"--data={task}", f"--out_dir={tmp_path / 'x'}", "--batch_size=8", "--schedule=constant"]  # no tokenizer, no size
    train_ar.main([*flags, f"--init_from={ar_run.folder}", "--steps=2"])
    train_ar.main([*flags, "--steps=3", "--resume"])
    assert (load_checkpoint(tmp_path / "x")["step"], load_checkpoint(tmp_path / "x")["tokenizer"]["name"]) == (3, "bytes")


def test_resuming_never_replaces_a_better_best(train, tmp_path, monkeypatch):
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(train_loop, "evaluate", lambda *_: {"loss": next(losses)})
    run = train("ar", tmp_path / "x", "--schedule=constant", "--steps=2")
    train("ar", tmp_path / "x", "--schedule=constant", "--steps=4", "--resume")
    best = load_checkpoint(run.folder / "best.pt")
    assert (best["step"], best["best"], run.checkpoint()["step"]) == (2, 1.0, 4)


# ---- the same run in other pieces ------------------------------------------------------------------------------------------

def close(a, b, tolerance=1e-5):
    """Compare two logs, None and nan aside, within a relative tolerance."""
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for key in {"loss", "first_pass", "norm"} & x.keys():
            assert abs(x[key] - y[key]) <= tolerance * abs(y[key]), (key, x, y)
        for p, q in zip(x.get("by_level", []), y.get("by_level", [])):
            assert (p is None) == (q is None) and (p is None or abs(p - q) <= tolerance * q), (x, y)
    return True


@pytest.mark.parametrize("kind", ["ar", "diff"])
def test_accumulated_micro_batches_are_the_same_run_to_rounding(train, tmp_path, kind):
    whole = train(kind, tmp_path / "8")
    for micro in (1, 4):
        parts = train(kind, tmp_path / str(micro), f"--micro_batch_size={micro}")
        assert close(parts.log(), whole.log())
        a, b = whole.checkpoint()["model"], parts.checkpoint()["model"]
        assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5  # steps moved weights by about 3e-3


def two_ranks(*command, timeout=100):
    """Run a script under torchrun with two processes; return what it said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def be_a_rank(rank, port, folder, backend, flags):
    """Train as one of two ranks; leave in the folder what it said, what it compiled, and its copies of the model at the end.

    backend: of a compiler that needs no C++ compiler: eager traces only, aot_eager also derives the backward pass.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    counter, copies, destroy = CompileCounterWithBackend(backend), [], torch.distributed.destroy_process_group
    torch.compile = partial(torch.compile, backend=counter)

    def destroy_and_count():
        copies.append(sum(type(x) is torch.nn.parallel.DistributedDataParallel for x in gc.get_objects()))
        destroy()
    torch.distributed.destroy_process_group = destroy_and_count
    with open(folder / f"rank{rank}.txt", "w") as said, redirect_stdout(said), redirect_stderr(said):
        train_diff.main(flags)
    facts = {"graphs": counter.frame_count, "copies": copies}
    (folder / f"rank{rank}.json").write_text(json.dumps(facts), encoding="utf-8")


def be_a_stopped_rank(rank, port, folder, backend, flags):
    """Train as one of two ranks, of which the second is sent SIGTERM in its third step; leave the exit code."""
    real = train_loop.learning_rate

    def signalled(config, step):
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(config, step)
    train_loop.learning_rate = signalled
    try:
        be_a_rank(rank, port, folder, backend, flags)
    except SystemExit as stopped:
        (folder / f"rank{rank}.json").write_text(json.dumps(stopped.code), encoding="utf-8")


def two_ranks_at_once(folder, *flags, backend="eager", be=be_a_rank):
    """Train in two processes that find torch imported, in half of the time of torchrun; return (text, facts) of each."""
    multiprocessing.set_forkserver_preload(["torch._dynamo.testing", "torch.distributed.fsdp"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = start_processes(be, (port, folder, backend, list(map(str, flags))), nprocs=2, join=False, daemon=True,
                            start_method="forkserver")
    deadline = time.time() + 100
    while not ranks.join(timeout=1):
        if time.time() > deadline:
            for process in ranks.processes:
                process.kill()
            pytest.fail("the ranks wait for each other")
    texts, facts = ([(folder / f"rank{rank}.{kind}").read_text() for rank in (0, 1)] for kind in ("txt", "json"))
    return list(zip(texts, map(json.loads, facts)))


def nearly(a, b, tolerance=1e-5):
    return a.keys() == b.keys() and max((a[k] - b[k]).abs().max() for k in a) < tolerance


@pytest.mark.slow
def test_two_ranks_are_the_same_run_as_one_to_rounding(train, task, tmp_path):
    flags = ["--micro_batch_size=2", "--eval_every=2", "--eval_sequences=7"]  # 7: 3 for one rank, 4 for the other
    one = train("diff", tmp_path / "one", *flags)
    process = two_ranks(ROOT / "train_diff.py", f"--data={task}", f"--out_dir={tmp_path / 'two'}", *FLAGS, *flags)
    assert process.returncode == 0, process.stderr
    two = type(one)(tmp_path / "two")
    assert close(two.log(), one.log()) and len(one.log()) == 6
    assert nearly(two.checkpoint()["model"], one.checkpoint()["model"])
    assert process.stdout.count("step      1/4") == 1 and "2 ranks x 2 x 2 sequences" in process.stdout  # one rank talks


@pytest.mark.slow
@pytest.mark.parametrize("log_every, step", [(1, 3), (2, 4), (5, 5)])  # agreed with the next line of the log
def test_a_signal_to_one_rank_stops_all_behind_the_same_step(train, task, tmp_path, log_every, step):
    flags = ["--micro_batch_size=2", "--eval_every=5", f"--log_every={log_every}", "--steps=6", "--schedule=constant"]
    ranks = two_ranks_at_once(tmp_path, f"--data={task}", f"--out_dir={tmp_path / 'two'}", *FLAGS, *flags, be=be_a_stopped_rank)
    assert [facts for _, facts in ranks] == [143, 143] and load_checkpoint(tmp_path / "two")["step"] == step
    assert "--resume" in ranks[0][0] and "torchrun --nproc_per_node=2" in ranks[0][0] and "--resume" not in ranks[1][0]
    resumed = train("diff", tmp_path / "two", *flags, "--resume")
    whole = train("diff", tmp_path / "whole", *flags)
    assert nearly(resumed.checkpoint()["model"], whole.checkpoint()["model"])


@pytest.mark.slow
@pytest.mark.parametrize("more, compiled", [([], True), (["--architecture=encoder-decoder"], False)],
                         ids=["decoder, compiled", "encoder"])
def test_a_run_goes_on_in_shards_on_two_ranks_and_back_on_one_to_rounding(train, task, tmp_path, more, compiled):
    flags = ["--micro_batch_size=2", "--eval_every=2", "--eval_sequences=7", *more]
    one = train("diff", tmp_path / "one", *flags)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    ranks = two_ranks_at_once(tmp_path, f"--data={task}", f"--out_dir={tmp_path / 'two'}", *FLAGS, *flags, "--steps=6",
                              "--resume", "--fsdp", f"--compile={'yes' if compiled else 'no'}", backend="aot_eager")
    assert all((facts["graphs"] > 1) == compiled and "returned a view" not in text for text, facts in ranks)
    one, two = train("diff", tmp_path / "one", *flags, "--steps=6", "--resume"), type(one)(tmp_path / "two")
    for step in (6, 8):
        a, b = one.checkpoint(), two.checkpoint()
        assert a["step"] == b["step"] == step and nearly(a["model"], b["model"]) and close(two.log(), one.log())
        for i, moments in a["optimizer"]["state"].items():
            assert nearly(moments, b["optimizer"]["state"][i])
        if step == 6:
            one, two = (train("diff", tmp_path / name, *flags, "--steps=8", "--resume") for name in ("one", "two"))


@pytest.mark.slow
def test_a_compiled_run_on_two_ranks_is_the_same_as_one_that_is_not_compiled_and_its_copies_end_before_their_group(
        train, task, tmp_path):
    flags = ["--eval_sequences=0"]  # half as much to compile
    ranks = two_ranks_at_once(tmp_path, f"--data={task}", f"--out_dir={tmp_path / 'two'}", *FLAGS, *flags, "--compile=yes")
    assert all(facts["graphs"] > 1 for _, facts in ranks), "no more than the trial of choose_compile"
    assert all(facts["copies"] == [0] for _, facts in ranks), "a copy that outlives the process group may hang"
    one = train("diff", tmp_path / "one", *flags)
    two = type(one)(tmp_path / "two")
    assert close(two.log(), one.log()) and nearly(two.checkpoint()["model"], one.checkpoint()["model"])


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_ranks_within_seconds(task, tmp_path):
    script, moment = tmp_path / "fails.py", tmp_path / "moment"
    script.write_text("import os, pathlib, sys, time\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\n"
                      "import train_ar, train_loop\n"
                      "from engine.cli import UserError, run\n"
                      "rate = train_loop.learning_rate\n"
                      "def learning_rate(config, step):\n"
                      "    if step == 2 and os.environ['RANK'] == '1':\n"
                      f"        pathlib.Path({str(moment)!r}).write_text(str(time.time()))\n"
                      "        raise UserError('as if its disk were full')\n"
                      "    return rate(config, step)\n"
                      "train_loop.learning_rate = learning_rate\n"
                      "run(train_ar.main)\n", encoding="utf-8")
    process = two_ranks(script, f"--data={task}", f"--out_dir={tmp_path / 'run'}", *FLAGS, "--steps=1000000")
    assert process.returncode != 0 and "error: as if its disk were full" in process.stderr
    assert time.time() - float(moment.read_text()) < 40  # else it waits for ever


def test_shards_need_several_ranks(train, tmp_path):
    with pytest.raises(UserError, match="--fsdp shares a model among several ranks; start them with torchrun"):
        train("ar", tmp_path / "run", "--fsdp")
    assert not (tmp_path / "run").exists()


# ---- compilation ---------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ar", "diff"])
@pytest.mark.parametrize("device, backend", [("cpu", "eager"),
                                             pytest.param("cuda", "inductor", marks=[pytest.mark.gpu, needs_gpu])])
def test_a_run_has_no_graph_breaks_and_compiles_nothing_after_its_first_validation(train, text, tmp_path, monkeypatch, device,
                                                                                  backend, kind):
    counter, graphs, rate = CompileCounterWithBackend(backend), [], train_loop.learning_rate
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    monkeypatch.setattr(train_loop, "learning_rate", lambda *args: (graphs.append(counter.frame_count), rate(*args))[1])
    train(kind, tmp_path / "x", f"--data={text}", "--compile=yes", "--steps=8", "--eval_every=2", "--eval_sequences=8",
          f"--device={device}")
    assert graphs[0] == 1 < graphs[1], "the trial of choose_compile, then the first step"
    assert graphs[2] == graphs[-1] == counter.frame_count


# ---- validation ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["ar", "diff"])
def test_validating_changes_nothing_about_the_training(train, tmp_path, kind):
    often = train(kind, tmp_path / "often", "--eval_every=1", "--dropout=0.1", "--micro_batch_size=4")
    never = train(kind, tmp_path / "never", "--eval_every=100", "--dropout=0.1", "--micro_batch_size=4", "--eval_sequences=0")
    assert same(often.checkpoint()["model"], never.checkpoint()["model"])
    assert [line for line in often.log() if "split" not in line] == never.log()
    assert len(often.log()) == 2 * len(never.log()) == 8


@pytest.mark.parametrize("kind", ["ar", "diff"])
def test_validation_is_a_fixed_mean_over_fixed_rows_without_dropout(train, task, ar_run, diff_run, kind):
    c = {"ar": ar_run, "diff": diff_run}[kind].checkpoint()
    process, data, device = process_of(c), open_data(task, tokenizer_of(c), 8, 7), torch.device("cpu")
    with torch.no_grad():
        losses = process.loss(build_model(c).eval(), data.valid_batch(range(6)), Noise(0, "valid", 0, range(6)))
    for micro in (1, 4, 6, 64):
        model = build_model(c, dropout=0.5).train()
        config = train_diff.Config(eval_sequences=6, micro_batch_size=micro, seed=micro)
        validate = lambda: train_loop.evaluate(loss_of, process, data, config, device, nullcontext())  # noqa: B023
        loss_of, state = LossModule(model, cross_entropy), torch.get_rng_state()
        first, second = validate(), validate()
        assert str(first) == str(second) and torch.equal(torch.get_rng_state(), state)
        assert abs(first["loss"] - losses.total.item()) < 1e-5
        assert first.keys() == ({"loss"} if kind == "ar" else {"loss", "first_pass", "by_level"})
        assert kind == "ar" or abs(first["first_pass"] - losses.per_sequence.mean().item()) < 1e-5
        for level in range(5) if kind == "diff" else []:
            mine, logged = losses.per_sequence[(losses.t * 5).long() == level], first["by_level"][level]
            assert abs(logged - mine.mean().item()) < 1e-5 if len(mine) else logged is None


@pytest.mark.parametrize("world, sizes", [(1, [[4, 3]]), (2, [[3], [4]]), (9, [[], [1], [1], [1], [], [1], [1], [1], [1]])])
def test_ranks_validate_every_sequence_once_in_few_passes_and_average_exactly(task, diff_run, monkeypatch, world, sizes):
    c = diff_run.checkpoint()
    process, data, model = process_of(c), open_data(task, tokenizer_of(c), 8, 7), build_model(c)
    with torch.no_grad():
        losses = process.loss(model.eval(), data.valid_batch(range(7)), Noise(0, "valid", 0, range(7)))
    passes, sums = [[] for _ in range(world)], []

    class Counting:
        def loss(self, model, batch, noise, nats):
            passes[rank].append(len(batch.targets))
            return process.loss(model, batch, noise, nats)

    def all_reduce(mine):
        sums.append(mine.clone())
        mine.copy_(sum(sums))
    monkeypatch.setattr(run_log.dist, "all_reduce", all_reduce)
    config, loss_of = train_diff.Config(eval_sequences=7, micro_batch_size=4), LossModule(model, cross_entropy)
    for rank in reversed(range(world)):  # each adds to those before it, so the last one returns what all ranks would
        mean = train_loop.evaluate(loss_of, Counting(), data, config, torch.device("cpu"), nullcontext(), rank, world)
    assert passes == sizes
    assert abs(mean["loss"] - losses.total.item()) < 1e-5
    assert abs(mean["first_pass"] - losses.per_sequence.mean().item()) < 1e-5


# ---- the parts of a step ---------------------------------------------------------------------------------------------------

def test_the_learning_rate_follows_its_closed_form():
    config = train_ar.Config(lr=2.0, warmup=4, steps=24)
    rates = [train_loop.learning_rate(config, step) for step in range(24)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert abs(rates[14] - 1.1) < 1e-12  # half-way: the mean of 2 and 0.2
    assert abs(rates[9] + rates[19] - 2.2) < 1e-12  # and symmetric about it
    assert all(a > b for a, b in zip(rates[4:], rates[5:])) and 0.2 < rates[-1] < 0.22
    constant = train_ar.Config(lr=2.0, warmup=0, steps=24, schedule="constant")
    assert {train_loop.learning_rate(constant, step) for step in range(24)} == {2.0}
    assert train_loop.learning_rate(train_ar.Config(lr=2.0, warmup=50, steps=10), 9) == 0.4  # all of it warm-up


def test_the_rate_of_the_schedule_is_the_rate_of_the_steps(train, tmp_path):
    run = train("ar", tmp_path / "x", "--lr=0.01", "--warmup=2", "--steps=4")
    assert [line["lr"] for line in run.log()[:4]] == [0.005, 0.01, 0.01, pytest.approx(0.0055)]
    assert {group["lr"] for group in run.checkpoint()["optimizer"]["param_groups"]} == {run.log()[3]["lr"]}


def test_weight_decay_shrinks_matrices_and_nothing_else():
    parts = {"linear": torch.nn.Linear(3, 2), "norm": torch.nn.LayerNorm(3), "embedding": torch.nn.Embedding(4, 3)}
    model = torch.nn.ModuleDict(parts)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = train_loop.make_optimizer(model, train_ar.Config(lr=0.1, weight_decay=0.5, beta2=0.9), torch.device("cpu"))
    assert optimizer.defaults["betas"] == (0.9, 0.9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # all that is left of AdamW is p <- p * (1 - lr * decay)
    optimizer.step()
    for name, value in model.state_dict().items():
        factor = 0.95 if name in ("linear.weight", "embedding.weight") else 1
        assert (value - factor * before[name]).abs().max() < 1e-7, name


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(train, tmp_path, monkeypatch):
    norms, real = [], train_loop.make_optimizer

    def make_optimizer(model, config, device):
        optimizer = real(model, config, device)
        norm = lambda: sum(p.grad.pow(2).sum() for p in model.parameters()).sqrt().item()
        optimizer.register_step_pre_hook(lambda *_: norms.append(norm()))
        return optimizer
    monkeypatch.setattr(train_loop, "make_optimizer", make_optimizer)
    free = train("ar", tmp_path / "free", "--grad_clip=1e9", "--micro_batch_size=4")
    assert norms == pytest.approx([line["norm"] for line in free.log()[:4]], rel=1e-5) and min(norms) > 0.5
    norms.clear()
    train("ar", tmp_path / "clipped", "--grad_clip=0.25")
    assert norms == pytest.approx([0.25] * 4, rel=1e-4)


def test_training_learns(train, tmp_path):
    run = train("ar", tmp_path / "x", "--steps=60", "--lr=2e-2", "--log_every=60", "--schedule=constant")
    assert run.log()[-1]["loss"] < 0.35 * run.log()[0]["loss"]


# ---- what a run writes -----------------------------------------------------------------------------------------------------

def test_a_line_tells_the_time_of_one_step_and_the_days_left(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_loop, "time", SimpleNamespace(perf_counter=itertools.count(0, 100_000).__next__))
    train("ar", tmp_path / "x", "--steps=5", "--log_every=2")
    times = re.findall(r"step +(\d)/5 .* \| (\d+) ms .* \| (.*) left", capsys.readouterr().out)
    assert times == [("1", "100000000", "4 days, 15:06:40"), ("2", "100000000", "3 days, 11:20:00"),
                     ("4", "50000000", "13:53:20"), ("5", "100000000", "0:00:00")]


def test_a_run_that_died_before_its_first_checkpoint_leaves_no_lines_to_the_next(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 2)
        train("ar", tmp_path / "x")
    assert [line["step"] for line in train("ar", tmp_path / "x").log()] == [1, 2, 3, 4, 4]


def test_a_crash_in_the_validation_does_not_cost_the_steps_before_it(train, tmp_path, monkeypatch):
    def crash(*_):
        raise ZeroDivisionError
    monkeypatch.setattr(train_loop, "evaluate", crash)
    with pytest.raises(ZeroDivisionError):
        train("ar", tmp_path / "x")
    assert load_checkpoint(tmp_path / "x")["step"] == 4


# ---- what goes wrong -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, first, log_every, last", [("ar", 5, 1, 7), ("diff", 5, 100, 8), ("diff", 7, 1, 8)])
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_last_good_checkpoint(train, tmp_path, monkeypatch, kind, first,
                                                                                   log_every, last):
    """The learning rate explodes in step `first` (from 0): 7 breaks the weights right before the checkpoint of step 8."""
    real, good = train_loop.learning_rate, {}

    def explode(config, step):
        if step == 4:
            good.update({path.name: path.read_bytes() for path in (tmp_path / "x").glob("*.pt")})
        return real(config, step) if step < first else 3e38
    monkeypatch.setattr(train_loop, "learning_rate", explode)
    with pytest.raises(UserError) as caught:
        train(kind, tmp_path / "x", "--steps=50", "--eval_every=4", f"--log_every={log_every}")
    message = str(caught.value)
    step = int(message.split("before step ")[1].split(",")[0])
    assert step == last and "learning rate 3.00e+38" in message and "ower --lr or raise --warmup" in message, message
    assert good.keys() == {"ckpt.pt", "best.pt"} and str(tmp_path / "x") in message
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").glob("*.pt")} == good
    assert all(t.isfinite().all() for t in load_checkpoint(tmp_path / "x")["model"].values())


@pytest.mark.parametrize("what", ["checkpoint", "metrics"])
def test_a_disk_that_fills_up_is_one_line_and_the_checkpoint_stays(train, tmp_path, monkeypatch, what):
    run, full = train("ar", tmp_path / "x", "--schedule=constant"), []
    old = run.path.read_bytes()

    def no_space(*_, **__):
        full.append(True)
        raise OSError(errno.ENOSPC, "No space left on device")
    if what == "checkpoint":
        monkeypatch.setattr(os, "fsync", no_space)
    else:
        monkeypatch.setattr(run_log, "open", no_space, raising=False)
    with pytest.raises(UserError, match="cannot write .*No space left on device"):
        train("ar", tmp_path / "x", "--schedule=constant", "--steps=9", "--resume")
    assert full and run.path.read_bytes() == old and not list(run.folder.glob("*.partial"))
