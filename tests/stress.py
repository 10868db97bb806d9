"""Attacks on the software, by kind, each with a number of rounds: what docs/reliability.md promises is what holds here.

    make stress                          # all of it, at most 20 minutes; prints the figures of docs/reliability.md
    python tests/stress.py --short       # a minute; tests/test_stress.py runs this much

Every attack is a function of (n, folder), which returns {what was counted: number} and raises AssertionError where a promise
is broken. Runs are killed, and signals sent, in children that fork() made of this process: it has imported everything.
"""
import contextlib
import faulthandler
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

import ar2diff
import eval as evaluation
import sample
import train_ar
import train_diff
import train_loop
from beyond.infill import canvases
from data import originals, prepare, tasks, text
from data.dataset import open_data, read_meta
from data.tokenizer import load_tokenizer, read_ranks
from data.tokenizer_files import read_tokenizer_files
from engine import cli, files, run_log
from engine.checkpoint import read_plain, save_checkpoint
from engine.cli import UserError
from experiments import compare, plot
from pretrained.loading import build_model, load_checkpoint, process_of, tokenizer_of
from scoring import judge, metrics, sandbox

SECONDS = 20  # what takes longer hangs
FLAGS = ["--tokenizer=bytes", "--size=1x16x2", "--batch_size=4", "--steps=12", "--warmup=2", "--log_every=2", "--eval_every=4",
         "--eval_sequences=6", "--device=cpu", "--input_len=8", "--target_len=8"]


# ---- runs that are killed or stopped, and go on ----

def make_task(folder):
    """Write a small task: words, and the same backwards; train on it once, so that children find all modules imported."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        words = ["".join(rng.choices("abcd", k=rng.randint(1, 6))) for _ in range(12)]
        rows = [json.dumps({"input": word, "target": word[::-1]}) + "\n" for word in words]
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        training(train_diff, folder, folder.with_name("once"))()
    return folder


def child(main, output=os.devnull):
    """Run main() as a script in a forked child; return its pid."""
    if pid := os.fork():
        return pid
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which what runs in the background is born to ignore
        for fd in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), fd)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(fd, "wb", closefd=False)) for fd in (1, 2))
        tqdm.set_lock(threading.RLock())  # its own is shared by processes that fork, and a killed one may hold it
        faulthandler.dump_traceback_later(SECONDS - 2, file=2)  # where it hangs, if it does
        cli.run(main)
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def ended(pid, seconds=SECONDS, log=None):
    """Wait for a child; return its exit code, -n if signal n ended it. One that hangs is killed, and an AssertionError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"still running after {seconds} seconds: {log.read_text(encoding='utf-8')[-3000:] if log else ''}")


def left_by(folder):
    """Return all that a run left, without what a clock measured: tensors and numbers, bit by bit."""
    def plain(x):
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return x.numpy().tobytes() if isinstance(x, torch.Tensor) else [*map(plain, x)] if isinstance(x, (list, tuple)) else x
    found = {path.name: plain(read_plain(path)) for path in folder.glob("*.pt")}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for each in found.values():
        each["config"] = {k: v for k, v in each["config"].items() if k not in ("out_dir", "resume")}
    return found, [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in rows if row.get("split") == "valid"]


def training(script, data, out, *more):
    resume = ["--resume"] * (out / "ckpt.pt").exists()
    return lambda: script.main([f"--data={data}", f"--out_dir={out}", *FLAGS, *more, *resume])


def over(code, log):
    """Return the exit code, 0 for a run that was stopped behind its end: there is nothing to resume."""
    said = log.read_text(encoding="utf-8")
    return 0 if code == 2 and said.endswith("is at step 12 already; to go on, raise --steps\n") else code


def deadly(main, rng):
    """Return main() in a process that SIGKILL meets inside a write: before or behind one of its fsyncs, renames or saves."""
    def run():
        module, name = rng.choice([(os, "fsync"), (os, "replace"), (torch, "save"), (train_loop, "evaluate")])
        real, left, late = getattr(module, name), [rng.randrange(4)], rng.random() < 0.5

        def deadly_call(*args, **more):
            left[0] -= 1
            if left[0] < 0 and not late:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **more)
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        setattr(module, name, deadly_call)
        main()
    return run


def kills(n, folder):
    """SIGKILL at random moments, and inside writes: a run that goes on afterwards ends bit-identical to one never stopped."""
    rng, data, killed, inside, runs = random.Random(0), make_task(folder / "task"), 0, 0, 0
    whole = {}
    for script in (train_ar, train_diff):
        out = folder / f"whole_{script.__name__}"
        assert ended(child(training(script, data, out))) == 0
        whole[script] = left_by(out)
    start = time.monotonic()
    assert ended(child(training(train_ar, data, folder / "timed"))) == 0
    usual = time.monotonic() - start
    while killed < n:
        script, out = rng.choice(list(whole)), folder / f"run{runs}"
        runs += 1
        for _ in range(6):
            at_write = rng.random() < 0.5
            main = training(script, data, out)
            pid = child(deadly(main, random.Random(rng.random())) if at_write else main, folder / "killed.log")
            if not at_write:
                time.sleep(rng.uniform(0, usual))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            code = over(ended(pid, log=folder / "killed.log"), folder / "killed.log")
            assert code in (0, -9), (folder / "killed.log").read_text(encoding="utf-8")[-2000:]
            killed, inside = killed + (code == -9), inside + (code == -9 and at_write)
            if code == 0:
                break
        else:
            assert over(ended(child(training(script, data, out), folder / "killed.log")), folder / "killed.log") == 0
        assert left_by(out) == whole[script], f"{out} differs from a run that was never stopped"
        assert not list(out.glob("*.partial")) or code != 0
    return {"kills": killed, "of them inside a write": inside, "runs that ended bit-identical": runs}


def stops(n, folder):
    """SIGINT and SIGTERM at random moments: exit code 130 or 143 within 5 seconds, and the run goes on bit-identical."""
    rng, data, slowest, stopped, saved = random.Random(1), make_task(folder / "task"), 0, 0, 0
    start = time.monotonic()
    assert ended(child(training(train_diff, data, folder / "whole"))) == 0
    usual = time.monotonic() - start
    whole = left_by(folder / "whole")
    for i in range(n):
        number, out, log = rng.choice((signal.SIGINT, signal.SIGTERM)), folder / f"stop{i}", folder / f"stop{i}.log"
        pid = child(training(train_diff, data, out), log)
        time.sleep(rng.uniform(0.02, 1.2 * usual))
        start = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        code = ended(pid, log=log)
        slowest = max(slowest, time.monotonic() - start)
        said = log.read_text(encoding="utf-8")
        assert code in (0, 128 + number) and "Traceback" not in said, said
        if code:
            stopped, saved = stopped + 1, saved + ("stopped and saved" in said)
            whole_run = "valid    12/12" in said  # stopped behind its end
            assert whole_run or ("--resume" in said) == (out / "ckpt.pt").exists(), said
        assert over(ended(child(training(train_diff, data, out), log)), log) == 0, log.read_text(encoding="utf-8")
        assert left_by(out) == whole
    assert slowest < 5
    return {"signals that stopped a run": stopped, "of them between two steps": saved,
            "runs that were over before": n - stopped, "slowest end, s": round(slowest, 2)}


# ---- damaged files ----

def damaged(data, rng):
    """Return bytes with one damage of a random kind: bits, a cut, a hole of zeros, bytes more, a piece twice."""
    data, kind = bytearray(data), rng.randrange(5)
    at = rng.randrange(len(data) or 1)
    if kind == 0 and data:
        for _ in range(rng.choice((1, 1, 2, 8, 34))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at + 64] = bytes(len(data[at:at + 64]))
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.choice((1, 2, 16)))
    else:
        data[at:at] = data[at:at + 32]
    return bytes(data)


def refused(function, *args, **more):
    """Return whether a function refuses its input, in one line; all else that it raises is a promise broken."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            signal.alarm(SECONDS)
            function(*args, **more)
    except UserError as error:
        assert str(error).strip(), "an empty message"
        return True
    except SystemExit as error:
        assert error.code in (0, 2), error.code
        return error.code == 2
    finally:
        signal.alarm(0)
    return False


def weights_of(checkpoint):
    build_model(checkpoint), process_of(checkpoint), tokenizer_of(checkpoint)
    return {name: x.numpy().tobytes() for name, x in checkpoint["model"].items()}


def flips(n, folder):
    """Checkpoints with damaged bytes: refused, or what is loaded is what was saved, bit by bit."""
    rng, data = random.Random(2), make_task(folder / "task")
    with contextlib.redirect_stdout(io.StringIO()):
        training(train_ar, data, folder / "run")()
    whole, path, no = (folder / "run/ckpt.pt").read_bytes(), folder / "damaged.pt", 0
    saved = read_plain(folder / "run/ckpt.pt")
    for _ in range(n):
        path.write_bytes(damaged(whole, rng))
        if refused(load_checkpoint, path):
            no += 1
        else:
            loaded = load_checkpoint(path)
            assert weights_of(loaded) == weights_of(saved) and str(loaded) == str(saved), "other contents were taken"
    return {"damaged checkpoints": n, "refused": no, "taken with all contents as saved": n - no, "with other contents": 0}


ODD = [None, True, -1, 0, 1 << 60, 1e400, float("nan"), "", "x", [], [1], {}, {"a": 1}, b"x", torch.zeros(2), torch.zeros(0),
       torch.full((3,), float("nan")), torch.ones(2, dtype=torch.int64), "../..", "²x8x1", (1, 2), 1.5]


def mutated(x, rng, depth=0):
    """Return a copy of a checkpoint with one value gone, renamed or of another kind, at any depth."""
    if isinstance(x, dict) and x and (depth == 0 or rng.random() < 0.7):
        x, key = dict(x), rng.choice(list(x))
        action = rng.random()
        if action < 0.15:
            del x[key]
        elif action < 0.2:
            x[f"{key}2"] = x.pop(key)
        else:
            x[key] = mutated(x[key], rng, depth + 1)
        return x
    if isinstance(x, torch.Tensor) and rng.random() < 0.5:
        return rng.choice([lambda: x[:-1], lambda: x.half(), lambda: x.long(), lambda: x * float("inf"), lambda: x[None]])()
    return rng.choice(ODD)


def schemas(n, folder):
    """Checkpoints whose parts are missing or of another kind: loaded, sampled from, scored, converted, resumed."""
    rng, data = random.Random(3), make_task(folder / "task")
    with contextlib.redirect_stdout(io.StringIO()):
        runs = {}
        for name in ("ar", "uniform", "absorbing", "gaussian"):
            script, more = (train_ar, []) if name == "ar" else (train_diff, [f"--process={name}"])
            training(script, data, folder / name, *more)()
            runs[name] = read_plain(folder / name / "ckpt.pt")
    path, no = folder / "odd/ckpt.pt", 0
    for i in range(n):
        name = rng.choice(list(runs))
        shutil.rmtree(path.parent, ignore_errors=True)
        save_checkpoint(path, mutated({k: v for k, v in runs[name].items() if k != "format"}, rng))
        trains = [f"--data={data}", *FLAGS]
        script, *words = rng.choice([
            (sample, str(path), "--prompt=ab"), (evaluation, str(path), "--n_examples=2"),
            (ar2diff, str(path), str(folder / f"odd{i}")),
            (train_ar, *trains, f"--out_dir={path.parent}", "--resume", "--steps=13"),
            (train_diff, *trains, f"--init_from={path}", f"--out_dir={folder}/new{i}", "--steps=1")])
        no += refused(script.main, words)
    return {"checkpoints with an odd part": n, "refused": no, "used, the odd part being of no use to that command": n - no}


def data_files(n, folder):
    """Damaged files of every other kind, read by what reads them: one line, or what is still of that kind."""
    rng, data = random.Random(4), make_task(folder / "task")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        training(train_ar, data, folder / "run")()
        (folder / "a.txt").write_text("some text, and more of it\n" * 60, encoding="utf-8")
        prepare.main(["text", f"--sources={folder}/a.txt", "--tokenizer=bytes", f"--out={folder}/text"])
    squad = {"data": [{"paragraphs": [{"context": "a b c", "qas": [{"question": "q?", "answers": [{"text": "b"}]}]}]}] * 3}
    (folder / "squad.json").write_text(json.dumps(squad), encoding="utf-8")
    record = {"task_id": 11, "text": "t", "code": "x = 1", "test_list": ["assert x"], "test_setup_code": ""}
    (folder / "mbpp.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (folder / "model").mkdir()
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}, "added_tokens": [],
                 "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    (folder / "model/tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    tok = load_tokenizer("bytes")
    readers = {  # file -> what reads it
        "task/train.jsonl": tasks.read_jsonl, "text/meta.json": lambda p: open_data(p.parent, tok, 4, 4),
        "text/train.a.bin": lambda p: open_data(p.parent, tok, 4, 4).train_batch(0, 0, range(4), 4),
        "squad.json": tasks._articles, "mbpp.jsonl": lambda p: tasks.TASKS and tasks._mbpp(str(p.parent), ""),
        "model/tokenizer.json": lambda p: read_tokenizer_files(p.parent), "a.txt": lambda p: "".join(text.read_pieces(p)),
        "run/metrics.jsonl": lambda p: (run_log.read_log(p), plot.curve(p.parent))}
    counts, whole = dict.fromkeys(readers, 0), {name: (folder / name).read_bytes() for name in readers}
    for i in range(n):
        name = list(readers)[i % len(readers)]
        (folder / name).write_bytes(damaged(whole[name], rng))
        counts[name] += refused(readers[name], folder / name)
        (folder / name).write_bytes(whole[name])
    return {"damaged data files": n, "refused": sum(counts.values()), "still of their kind": n - sum(counts.values())}


# ---- fuzz: every parser and every command line ----

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=8)
KEYS = st.sampled_from(["input", "target", "tests", "setup", "references", "kind", "input_len", "sources", "dtype", "tokenizer",
                        "tokenizer_hash", "name", "weight", "data", "paragraphs", "qas", "question", "answers", "text", "loss",
                        "step"])
OBJECTS = st.dictionaries(KEYS, JSON | st.sampled_from(["task", "text", "uint16", "a", ["a"], 1]), max_size=6)
LINES = st.one_of(st.text(max_size=60), OBJECTS.map(json.dumps), JSON.map(json.dumps), st.binary(max_size=60))
SCRIPTS = [train_ar, train_diff, ar2diff, sample, evaluation, prepare, compare, plot]


def words_for(config):
    flags = st.sampled_from([f"--{field}" for field in config.__dataclass_fields__])
    odd = st.sampled_from(["--", "-", "²x8x1", "nan", "9" * 20])
    values = st.one_of(st.text(max_size=8), st.integers().map(str), st.floats().map(str), odd)
    return st.lists(st.one_of(flags, values, st.tuples(flags, values).map("=".join)), max_size=6)


def tried(strategy, attack, n):
    """Attack with n inputs of a strategy, as many as it has; return how many they were."""
    inputs = []

    @settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(x):
        inputs.append(x)
        attack(x)
    run()
    return len(inputs)


def fuzz(n, folder):
    """Random input to every parser and every command line: it is read, or refused in one line."""
    counts, tok, path = {"read": 0, "refused": 0}, load_tokenizer("bytes"), folder / "fuzzed"
    path.mkdir(exist_ok=True)

    def check(function, *args):
        counts["refused" if refused(function, *args) else "read"] += 1

    def written(name, data, reader):
        (path / name).write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
        check(reader, path / name)
    attacks = [(words_for(script.Config), lambda words, config=script.Config: check(cli.parse, config, words))
               for script in SCRIPTS]
    attacks += [
        (LINES, lambda x: written("train.jsonl", x, tasks.read_jsonl)),
        (LINES, lambda x: written("meta.json", x, lambda p: read_meta(p.parent))),
        (LINES, lambda x: written("s.json", x, tasks._articles)),
        (LINES, lambda x: written("metrics.jsonl", x, run_log.read_log)),
        (LINES, lambda x: written("ranks", x, read_ranks)),
        (LINES, lambda x: written("lines.txt", x, lambda p: list(originals.lines(p)))),
        (LINES, lambda x: written("t.txt", x, lambda p: "".join(text.read_pieces(p)))),
        (LINES, lambda x: written("c.json", x, lambda p: files.read_json(p, {"a?": files.TEXT}))),
        (st.text(max_size=80), lambda x: tok.decode(tok.encode(x.encode("utf-8", "replace").decode())) and None),
        (st.text(alphabet="ab_\\n {}", max_size=40), lambda x: check(canvases, x, tok, 48, 3)),
        (st.text(max_size=30), lambda x: check(text.parse_sources, x)),
        (st.text(max_size=12), lambda x: check(cli.one_of, "x", x, ("a", "b"))),
        (st.lists(st.text(max_size=20), min_size=2, max_size=4), lambda x: check(
            judge.gold_fault, "qa", [{"target": y} for y in x], metrics.language_of(x))),
        (st.lists(st.text(max_size=20), min_size=2, max_size=4), lambda x: check(
            judge.score, "bleu", [[y] for y in x], [{"target": y} for y in reversed(x)], metrics.language_of(x)))]
    each = -(-n // len(attacks))
    before, total = signal.signal(signal.SIGALRM, signal.SIG_DFL), 0
    for strategy, attack in attacks:
        total += tried(strategy, attack, each)
    signal.signal(signal.SIGALRM, before)
    return {"fuzzed inputs": total, "refused in one line": counts["refused"], "other exceptions": 0}


# ---- hostile programs ----

def hostile(n, folder):
    """Programs that attack others, the parent, the disk: beside each a right one passes; nothing outlives, nothing is left."""
    from test_sandbox import ATTACKS, BAD, RIGHT, STARTERS, TESTS, VICTIM, WRONG
    place, marker = folder / "place", folder / "python"
    place.mkdir()
    place.chmod(0o777)
    marker.symlink_to(os.path.realpath(sys.executable))
    before, sys.executable = sys.executable, str(marker)
    try:
        programs = [f"PLACE, PORT = {str(place)!r}, 9\n{program}{WRONG}" for program in [*ATTACKS.values(), *STARTERS.values()]]
        programs += [program.replace(RIGHT, WRONG) for program, _ in BAD.values()]
        programs = [programs[i % len(programs)] for i in range(n)]
        jobs = [(program, TESTS, "") for each in programs for program in (each, VICTIM)]
        results = sandbox.run_many(jobs, timeout=1.0)
    finally:
        sys.executable = before
    assert all(result.passed for result in results[1::2]), "a right program did not pass"
    passed = [program for (program, *_), result in zip(jobs[::2], results[::2]) if result.passed]
    time.sleep(0.5)
    alive = [p for p in os.listdir("/proc") if p.isdigit() and str(marker).encode() in _bytes(Path("/proc", p, "cmdline"))]
    assert not alive and not list(place.iterdir()) and not passed
    return {"hostile programs": n, "outlived": 0, "files outside": 0, "right programs beside them that passed": n, "passed": 0}


def _bytes(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


ATTACKS = {kills: (100, 6), stops: (60, 6), flips: (1000, 60), schemas: (400, 40), data_files: (600, 60), fuzz: (20_000, 400),
           hostile: (120, 6)}  # rounds: all, short


def main():
    short = "--short" in sys.argv
    torch.set_num_threads(1)
    for attack, rounds in ATTACKS.items():
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = attack(rounds[short], Path(folder))
        print(f"{attack.__doc__}\n  " + ", ".join(f"{name} {number:,}" for name, number in found.items())
              + f" ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
