"""Kinds of things that went wrong for users, each by examples; docs/reliability.md has the promises. More: tests/stress.py."""
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ar2diff
import eval as evaluation
import sample
import train_ar
import train_diff
import train_loop
from conftest import FLAGS
from data import dataset, prepare
from data.dataset import data_hash, open_data, read_meta
from data.text import parse_sources, pieces, split
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizer_files import DIGITS_PATTERN, GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN
from engine import checkpoint, cli, run_log
from engine.checkpoint import read_plain, save_checkpoint
from engine.cli import UserError
from engine.files import as_text
from experiments import plot
from pretrained.loading import load_checkpoint
from stress import child, ended, left_by

ROOT = Path(train_ar.__file__).parent
BYTES = load_tokenizer("bytes")
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
OFTEN = ["--eval_every=2", "--steps=6"]


def script(module, data, out, *more):
    return lambda: module.main([f"--data={data}", f"--out_dir={out}", *FLAGS, *OFTEN, *more])


# ---- runs ----

@posix
@pytest.mark.parametrize("validation", [1, 2, 3])
def test_a_validation_that_a_killed_run_missed_is_made_first_when_it_is_resumed(task, tmp_path, monkeypatch, validation):
    """The last one, too (mmengine issue 1394): else best.pt is the best of what was validated, and nobody knows."""
    script(train_diff, task, tmp_path / "whole")()
    calls, real = [], train_loop.evaluate

    def killed(*args, **more):
        calls.append(1)
        if len(calls) == validation:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)
    monkeypatch.setattr(train_loop, "evaluate", killed)
    assert ended(child(script(train_diff, task, tmp_path / "killed"))) == -9
    monkeypatch.undo()
    assert read_plain(tmp_path / "killed/ckpt.pt")["step"] == 2 * validation
    script(train_diff, task, tmp_path / "killed", "--resume")()
    assert left_by(tmp_path / "killed") == left_by(tmp_path / "whole")
    with pytest.raises(UserError, match="at step 6 already"):  # nothing is missing any more
        script(train_diff, task, tmp_path / "killed", "--resume")()


@posix
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("where", ["step", "validation", "start"])
def test_a_signal_ends_a_run_behind_its_step_and_says_how_it_goes_on(task, tmp_path, monkeypatch, number, code, where):
    script(train_diff, task, tmp_path / "whole")()
    module, name, nth = {"step": (train_loop, "learning_rate", 3), "validation": (dataset.TaskData, "valid_batch", 1),
                         "start": (train_loop, "start_model", 1)}[where]
    calls, real = [], getattr(module, name)

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), number)
        return real(*args, **more)
    monkeypatch.setattr(module, name, interrupted)
    monkeypatch.setattr(sys, "argv", ["train_diff.py", "--data=a b", "--steps=6"])
    assert ended(child(script(train_diff, task, tmp_path / "x"), tmp_path / "log"), 10) == code
    monkeypatch.undo()
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert "Traceback" not in said
    if where == "start":
        assert not (tmp_path / "x/ckpt.pt").exists() and "--resume" not in said
        return
    assert said.strip().endswith("go on with: python train_diff.py '--data=a b' --steps=6 --resume")
    assert read_plain(tmp_path / "x/ckpt.pt")["step"] == (3 if where == "step" else 2)
    script(train_diff, task, tmp_path / "x", "--resume")()
    assert left_by(tmp_path / "x") == left_by(tmp_path / "whole")


@posix
def test_a_second_signal_acts_at_once(task, tmp_path, monkeypatch):
    def slow(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    monkeypatch.setattr(train_loop, "learning_rate", slow)
    assert ended(child(script(train_ar, task, tmp_path / "x"), tmp_path / "log"), 10) == 130
    assert (tmp_path / "log").read_text(encoding="utf-8").endswith("interrupted\n")


@posix
def test_signals_mean_again_what_they_meant_when_a_run_is_over(task, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    script(train_ar, task, tmp_path / "x")()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@posix
def test_a_run_that_is_to_ignore_ctrl_c_ignores_it(task, tmp_path, monkeypatch):
    """As one that a script started in the background."""
    def main():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        script(train_ar, task, tmp_path / "x")()
    monkeypatch.setattr(train_loop, "learning_rate", lambda *_: os.kill(os.getpid(), signal.SIGINT) or 1e-3)
    assert ended(child(main)) == 0


@posix
def test_a_second_run_in_the_same_folder_is_refused_and_a_killed_one_leaves_no_lock(task, tmp_path, monkeypatch):
    real = train_loop.learning_rate

    def wait(config, step):
        if step == 3:
            (tmp_path / "waits").touch()
            time.sleep(60)
        return real(config, step)
    monkeypatch.setattr(train_loop, "learning_rate", wait)
    pid = child(script(train_ar, task, tmp_path / "x"))
    monkeypatch.undo()
    while not (tmp_path / "waits").exists():
        time.sleep(0.01)
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    for more in ([], ["--resume"]):
        with pytest.raises(UserError, match="another run is writing to|already holds a run"):
            script(train_ar, task, tmp_path / "x", *more)()
    with pytest.raises(UserError, match="another run is writing to .*--out_dir"):
        script(train_ar, task, tmp_path / "x", "--resume")()
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    script(train_ar, task, tmp_path / "x", "--resume")()
    assert read_plain(tmp_path / "x/ckpt.pt")["step"] == 6


@posix
@pytest.mark.parametrize("break_it", ["pipe", "disk"])
def test_a_run_outlives_whoever_reads_what_it_says(task, tmp_path, monkeypatch, break_it):
    """train_ar.py ... | head -1; train_ar.py ... > a disk that fills up."""
    read, write = os.pipe()
    os.close(read)
    full = ["/dev/full"] if os.path.exists("/dev/full") else pytest.skip("no /dev/full")

    def main():
        os.dup2(write if break_it == "pipe" else os.open(full[0], os.O_WRONLY), 1)
        script(train_diff, task, tmp_path / "x")()
    assert ended(child(main, tmp_path / "log")) == 0
    script(train_diff, task, tmp_path / "whole")()
    assert left_by(tmp_path / "x") == left_by(tmp_path / "whole")


@posix
def test_a_reader_who_leaves_early_ends_a_script_in_silence(ar_run, tmp_path):
    read, write = os.pipe()
    os.close(read)

    def main():
        os.dup2(write, 1)
        evaluation.main([str(ar_run.folder), "--n_examples=2"])
    assert ended(child(main, tmp_path / "log")) == 141
    assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_script_stopped_while_it_starts_ends_within_seconds(number, tmp_path):
    for delay in (0.15, 0.3, 0.8, 1.5):  # before that Python itself starts, and may exit with 1 (init_import_site)
        process = subprocess.Popen([sys.executable, str(ROOT / "data/prepare.py"), "text", f"--out={tmp_path / 'out'}"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        time.sleep(delay)
        start = time.monotonic()
        process.send_signal(number)
        told, code = process.communicate(timeout=5)[1], process.returncode
        # While PyTorch loads, its C++ may abort on a KeyboardInterrupt (1 of 150 tries); main() has not begun then.
        aborted = code == -signal.SIGABRT and b"'pybind11::error_already_set'\n  what():  KeyboardInterrupt" in told
        assert code in (-number, 128 + number) or aborted, (code, told)
        assert time.monotonic() - start < 5
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", [b"5", b"{}", b"\xff", b'{"step": "x"}', b'{"step": 2}', b"[1]", b"",
                                  b'{"step": 1, "loss": NaN}'])
def test_a_damaged_line_of_metrics_is_left_out_and_nothing_else(train, task, tmp_path, line):
    run = train("diff", tmp_path / "x", "--schedule=constant", "--steps=2")
    rows = run.log()
    path = run.folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n" + line)
    assert [row["step"] for row in run_log.read_log(path)] == [row["step"] for row in rows]
    assert plot.curve(run.folder) == [(2, rows[-1]["first_pass"])]
    train("diff", run.folder, "--schedule=constant", "--steps=3", "--resume")
    assert run.log()[:len(rows)] == rows and run.log()[-1]["step"] == 3


# ---- data ----

def test_data_is_known_by_what_it_holds_not_by_path_size_or_time(text, task, tmp_path):
    for folder, name in ((text, "train.prose.bin"), (task, "train.jsonl")):
        copy = shutil.copytree(folder, tmp_path / folder.name / "copy")
        digest = lambda path: data_hash(*read_meta(path))
        assert digest(copy) == digest(folder)
        stat, content = (copy / name).stat(), (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        os.utime(copy / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert digest(copy) != digest(folder)


def test_a_run_is_not_resumed_on_other_data_and_is_on_the_same_elsewhere(task, tmp_path):
    data = shutil.copytree(task, tmp_path / "data")
    script(train_ar, data, tmp_path / "x", "--steps=2", "--schedule=constant")()
    rows = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(rows[::-1]), encoding="utf-8")
    then, before = load_checkpoint(tmp_path / "x")["data"], (tmp_path / "x/ckpt.pt").read_bytes()
    with pytest.raises(UserError, match=f"data of hash {then}, .* is of (?!{then})"):
        script(train_ar, data, tmp_path / "x", "--schedule=constant", "--resume")()
    assert (tmp_path / "x/ckpt.pt").read_bytes() == before
    script(train_ar, task, tmp_path / "x", "--schedule=constant", "--resume")()
    assert load_checkpoint(tmp_path / "x")["step"] == 6


def test_a_model_scored_on_what_became_of_its_data_is_said_to_be(task, tmp_path, capsys):
    data = shutil.copytree(task, tmp_path / "data")
    script(train_ar, data, tmp_path / "x", "--steps=1")()
    for changed in (False, True):
        capsys.readouterr()
        evaluation.main([str(tmp_path / "x"), "--n_examples=2"])
        assert (f"{data} does not hold what" in capsys.readouterr().err) == changed
        rows = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (data / "train.jsonl").write_text("".join(rows[1:]), encoding="utf-8")
    evaluation.main([str(tmp_path / "x"), f"--data={data}", "--n_examples=2"])
    assert "does not hold" not in capsys.readouterr().err, "named by the user"


def test_the_folder_that_holds_data_is_meant_not_one_that_is_called_so(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "PREPARED", tmp_path / "prepared")
    shutil.copytree(task, tmp_path / "prepared/code")
    (tmp_path / "code").mkdir()
    assert read_meta("code")[0] == tmp_path / "prepared/code"
    shutil.copytree(task, tmp_path / "code", dirs_exist_ok=True)
    assert read_meta("code")[0] == Path("code")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds neither meta.json nor"):
        read_meta("empty")


def test_paths_in_a_checkpoint_are_absolute(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(task.parent)
    script(train_ar, task.name, tmp_path / "x", "--steps=1")()
    monkeypatch.chdir(tmp_path)
    evaluation.main([str(tmp_path / "x"), "--n_examples=2"])
    assert load_checkpoint(tmp_path / "x")["config"]["data"] == str(task.resolve())


def test_token_files_with_ids_that_no_token_has_are_refused(text, tmp_path):
    copy = shutil.copytree(text, tmp_path / "text")
    (copy / "valid.code.bin").write_bytes(b"\xff\xff" + (copy / "valid.code.bin").read_bytes()[2:])
    with pytest.raises(UserError, match="valid part of 'code' holds token 65535, of 384"):
        open_data(copy, BYTES, 8, 7)


@pytest.mark.parametrize("key, value, message", [
    ("kind", "x", "'kind' must be task or text"), ("input_len", -1, "'input_len' must be a whole number"),
    ("input_len", True, "whole number"), ("target_len", 1e9, "whole number"), ("metric", 3, "'metric' must be a string"),
    ("dtype", "float32", "uint16 or uint32"), ("sources", {}, "'sources' must be a list"), ("sources", [3], "object"),
    ("sources", [{"name": "prose", "weight": float("nan")}], "'weight'"), ("sources", [{"weight": 1}], "'name' is missing"),
    ("sources", [], "names no source"), ("sources", [{"name": "prose", "weight": 0}], "no source of a weight above 0")])
def test_meta_of_another_kind_is_one_line(text, tmp_path, key, value, message):
    copy = shutil.copytree(text, tmp_path / "text")
    meta = json.loads((copy / "meta.json").read_text(encoding="utf-8"))
    (copy / "meta.json").write_text(json.dumps(meta | {key: value}), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        open_data(copy, BYTES, 8, 7)


# ---- text ----

MARK = b"\xef\xbb\xbf"


@pytest.mark.slow
def test_a_byte_order_mark_is_dropped_wherever_a_user_gives_text(ar_run, task, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(task, tmp_path / "task")
    for name in ("meta.json", "train.jsonl", "test.jsonl"):
        (copy / name).write_bytes(MARK + (copy / name).read_bytes())
    first = lambda folder: open_data(folder, BYTES, 8, 7).rows["train"][0][0].tolist()
    assert first(copy) == first(task)
    assert evaluation.main([str(ar_run.folder), f"--data={copy}"])[0]["n"] == 5
    prompts, real = [], sample.prompt_batch
    monkeypatch.setattr(sample, "prompt_batch", lambda writer, prompt: prompts.append(prompt) or real(writer, prompt))
    process = subprocess.run([sys.executable, str(ROOT / "sample.py"), str(ar_run.folder)], input=MARK + "aé\r\n".encode(),
                             capture_output=True)
    plain = subprocess.run([sys.executable, str(ROOT / "sample.py"), str(ar_run.folder), "--prompt=aé"], capture_output=True)
    assert process.stdout == plain.stdout and process.returncode == 0


@pytest.mark.parametrize("codec, name", [("utf-16", "UTF-16"), ("utf-32", "UTF-32")])
def test_other_unicode_is_named(tmp_path, task, codec, name):
    (tmp_path / "a.txt").write_bytes("some text\n".encode(codec))
    with pytest.raises(UserError, match=f"a.txt is {name}, not UTF-8"):
        prepare.main(["text", f"--sources={tmp_path}/a.txt", "--tokenizer=bytes", f"--out={tmp_path}/out"])
    copy = shutil.copytree(task, tmp_path / "task")
    for file in ("meta.json", "train.jsonl"):
        (copy / file).write_bytes("{}".encode(codec))
        with pytest.raises(UserError, match=f"{file}.* is {name}, not UTF-8"):
            open_data(copy, BYTES, 8, 7)
        shutil.copy(task / file, copy / file)


def prepared(folder, *flags):
    prepare.main(["text", f"--sources={folder}/a.txt", "--tokenizer=bytes", f"--out={folder}/out", "--overwrite", *flags])
    return [i for split in ("train", "valid") for i in (folder / "out" / f"{split}.a.bin").read_bytes()[::2]]


def test_documents_end_where_a_separator_stands_and_a_known_one_is_pointed_out(tmp_path, capsys, monkeypatch):
    mark = "<|endoftext|>"
    (tmp_path / "a.txt").write_text(f"one\n{mark}\ntwo {mark}{mark}three", encoding="utf-8")
    whole = (tmp_path / "a.txt").read_bytes()
    assert prepared(tmp_path) == list(whole)
    assert (f"a holds '{mark}' 3 times, as plain text; if documents end there, say --separator='{mark}'"
            in capsys.readouterr().err)
    expected = [*b"one\n", 0, *b"\ntwo ", 0, *b"three"]
    for piece in (3, 1 << 18):  # a separator may lie across two pieces of a file
        monkeypatch.setattr("data.text.PIECE", piece)
        found = (tmp_path / "out"), prepared(tmp_path, f"--separator={mark}")
        assert [0 if i == BYTES.eos % 256 else i for i in found[1]] == expected
    assert "warning" not in capsys.readouterr().err


def test_one_eos_stands_between_two_documents_that_hold_text(tmp_path, capsys):
    for name, content in (("a", "one<e>two<e>"), ("b", "three<e>"), ("c", ""), ("d", "<e><e>four")):
        (tmp_path / f"{name}.txt").write_text(content, encoding="utf-8")
    source, = parse_sources(f"{tmp_path}/")
    assert [*pieces(source, "<e>")] == ["one", None, "two", None, "three", None, "four"]
    assert [*pieces(source)] == ["one<e>two<e>", None, "three<e>", None, "<e><e>four"]


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_separator_is_found_wherever_a_piece_ends(cut):
    text = "a<ee<e>b<<e>c<e"
    parts = [text[i:i + cut] for i in range(0, len(text), cut)]
    found = "".join("|" if piece is None else piece for piece in split(parts, "<e>"))
    assert found == "a<ee|b<|c<e"


def test_a_separator_that_parts_nothing_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words\n" * 9, encoding="utf-8")
    prepared(tmp_path, "--separator=\\n\\n")
    assert "parts nothing in a" in capsys.readouterr().err


def test_files_that_nobody_reads_do_not_change_what_data_is(task, tmp_path):
    data = shutil.copytree(task, tmp_path / "data")
    before = data_hash(*read_meta(data))
    shutil.copy(data / "train.jsonl", data / "train.jsonl.bak")
    (data / "train.d").mkdir()
    (data / "test.jsonl").unlink()
    assert data_hash(*read_meta(data)) == before


@pytest.mark.parametrize("data, at, byte", [(b"abc\xff", 3, "ff"), (MARK + b"abc\xff", 6, "ff"), (b"\xff", 0, "ff")])
def test_the_byte_that_is_not_utf8_is_named(data, at, byte):
    with pytest.raises(UserError, match=f"x is not UTF-8: byte {at} is 0x{byte}"):
        as_text(data, "x")


# ---- checkpoints ----

def test_a_temperature_above_the_number_of_tokens_can_be_read_again(train, tmp_path):
    run = train("diff", tmp_path / "x", "--unroll_temperature=900", "--steps=1", "--schedule=constant")
    train("diff", run.folder, "--unroll_temperature=900", "--steps=2", "--schedule=constant", "--resume")


def test_a_best_pt_that_is_a_copy_of_another_checkpoint_is_no_traceback(train, tmp_path):
    run = train("diff", tmp_path / "x", "--schedule=constant")
    shutil.copy(run.path, run.folder / "best.pt")
    train("diff", run.folder, "--steps=6", "--schedule=constant", "--resume")
    assert "best" in read_plain(run.folder / "best.pt")


def test_one_flipped_bit_anywhere_in_the_tensors_is_refused(ar_run, tmp_path):
    whole = ar_run.path.read_bytes()
    taken, saved = 0, str(ar_run.checkpoint())
    for at in range(0, len(whole), len(whole) // 150):
        (tmp_path / "x.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        try:
            assert str(load_checkpoint(tmp_path / "x.pt")) == saved, "padding between tensors may change, nothing else"
            taken += 1
        except UserError as error:
            assert "x.pt" in str(error)
    assert taken < 50


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_neither_sampled_from_nor_scored_nor_turned(ar_run, tmp_path, value):
    c = ar_run.checkpoint()
    c["model"]["embedding.weight"][3, 3] = value
    save_checkpoint(tmp_path / "x.pt", {k: v for k, v in c.items() if k != "format"})
    for main in (lambda: sample.main([str(tmp_path / "x.pt"), "--prompt=a"]), lambda: evaluation.main([str(tmp_path / "x.pt")]),
                 lambda: ar2diff.main([str(tmp_path / "x.pt"), str(tmp_path / "y.pt")])):
        with pytest.raises(UserError, match="'model' must be tensors of finite numbers"):
            main()


@pytest.mark.parametrize("change", [
    lambda m: m.update(exp_avg=m["exp_avg"][:-1]), lambda m: m.update(exp_avg_sq=torch.ones(1)), lambda m: m.pop("exp_avg"),
    lambda m: m["exp_avg"].fill_(math.nan), lambda m: m.update(exp_avg=m["exp_avg"].long()), lambda m: m.update(step=7)])
def test_moments_that_do_not_fit_are_refused_before_they_crash_the_optimizer(train, tmp_path, change):
    run = train("ar", tmp_path / "x", "--schedule=constant")
    c = run.checkpoint()
    change(c["optimizer"]["state"][1])
    save_checkpoint(run.path, {k: v for k, v in c.items() if k != "format"})
    with pytest.raises(UserError, match="moments in ckpt.pt do not fit"):
        train("ar", run.folder, "--schedule=constant", "--steps=6", "--resume")


# ---- the command line and the machine ----

def test_an_error_of_the_system_is_one_line(capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "some/file")
    with pytest.raises(SystemExit) as caught:
        cli.run(full)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'some/file'\n"


def test_a_plain_language_model_says_where_its_training_ends(text, tmp_path, capsys):
    train_ar.main([f"--data={text}", f"--out_dir={tmp_path / 'lm'}", *FLAGS, "--input_len=0", "--target_len=12", "--steps=1"])
    capsys.readouterr()
    for words, told in (([], False), (["--prompt=abc"], True), (["--prompt=", "--target_len=13"], True),
                        (["--prompt=abc", "--target_len=9"], False)):
        sample.main([str(tmp_path / "lm"), *(words or ["--prompt="])])
        assert ("more than the 12 in a row that this model learned" in capsys.readouterr().err) == told




@pytest.mark.parametrize("value", ["", "2", "x", "-1", "²"])
def test_a_world_size_that_torchrun_did_not_set_is_one_line(task, tmp_path, monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(UserError, match="WORLD_SIZE=.* not by torchrun; unset it"):
        script(train_ar, task, tmp_path / "x")()
    assert not (tmp_path / "x").exists()


def test_a_million_spaces_are_one_line_or_tokens():
    spaces = " " * 1_000_001
    assert len(BYTES.encode(spaces)) == len(spaces)
    for pattern in (GPT2_PATTERN, DIGITS_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN):
        tokenizer = Tokenizer("x", {bytes([b]): b for b in range(256)}, pattern)
        for text in (spaces, f"a{spaces}b", "\n".join([spaces] * 2)):
            for encode in (tokenizer.encode, lambda text, t=tokenizer: t.encode_batch([text])):
                with pytest.raises(UserError, match="more than 900,000 spaces in a row"):
                    encode(text)
        assert len(tokenizer.encode(" " * 899_999 + "\n" + "a" * 1_000_000)) == 1_900_000


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_asking_git_for_the_commit_takes_no_lock(monkeypatch, tmp_path):
    """Else a user's own `git commit` fails while a training run starts."""
    git = lambda *words: subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    git("init")
    (tmp_path / "a.py").write_text("x = 1\n", encoding="utf-8")
    git("add", "a.py")
    git("-c", "user.name=x", "-c", "user.email=x", "commit", "-m", "x")
    os.utime(tmp_path / "a.py", ns=(1, 1))  # a status would refresh the index now
    index = (tmp_path / ".git/index").read_bytes()
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "a.py"))
    assert len(checkpoint.commit()) == 12 and (tmp_path / ".git/index").read_bytes() == index
