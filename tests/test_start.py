"""start.py, devices.py: whatever is wrong is refused in one line before the first step; nothing that was there is lost."""
import errno
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_loop
from engine.checkpoint import save_checkpoint
from engine.cli import UserError
from engine.devices import choose_compile, choose_dtype, out_of_memory


@pytest.mark.parametrize("flags, message", [
    (["--steps=0"], "--steps=0 must be at least 1"), (["--log_every=0"], "--log_every=0 must be at least 1"),
    (["--batch_size=0"], "--batch_size=0 must be at least 1"), (["--eval_every=-1"], "--eval_every=-1 must be at least 1"),
    (["--batch_size=6", "--micro_batch_size=4"], "--batch_size=6 is not divisible by 1 rank.* x --micro_batch_size=4"),
    (["--warmup=-1"], "--warmup=-1 must not be negative"), (["--seed=-1"], "--seed=-1 must be at least 0"),
    (["--seed=20241124123456"], "--seed=20241124123456 must be .* below 2.32"),
    (["--lr=0"], "--lr=0.0 must be above 0"), (["--lr=nan"], "--lr=nan must be above 0"),
    (["--beta2=1"], "--beta2=1.0 must be in"), (["--grad_clip=0"], "--grad_clip=0.0 must be above 0"),
    (["--dropout=1"], "--dropout=1.0 must be in"), (["--schedule=cosin"], "did you mean 'cosine'"),
    (["--dtype=float16"], "float32, bfloat16"), (["--device=tpu"], "auto, cpu, cuda, mps"),
    (["--compile=maybe"], "compile='maybe' is not one of auto, yes, no"), (["--too_long=dorp"], "did you mean 'drop'"),
    (["--inputs_attention=casual"], "did you mean 'causal'"),
    (["--size=huge"], "LAYERSxWIDTHxHEADS"), (["--size=2x16x3"], "multiple of twice the number of heads, 6"),
    (["--tokenizer=byte"], "did you mean 'bytes'"), (["--target_len=0"], "--target_len=0 must be at least 1"),
    (["--input_len=2"], r"train.jsonl: \d+ of 30 examples do not fit .*--input_len=2"),
    (["--target_len=3"], r"train.jsonl: \d+ of 30 examples do not fit .*--target_len=3"),
    (["--data=nowhere"], "no data folder 'nowhere'.*python data/prepare.py -h"),
    (["--init_from=nowhere"], "no checkpoint at nowhere"),
    (["--init_from={ar}", "--tokenizer=bpe"], "tokenizer mismatch: --tokenizer=bpe"),
    (["--init_from={ar}", "--size=1x16x2"], "--size=1x16x2 differs from the checkpoint"),
    (["--stpes=3"], "did you mean --steps")])
def test_a_wrong_flag_is_refused_in_one_line_and_nothing_is_trained(train, ar_run, tmp_path, flags, message):
    for kind in ("ar", "diff"):
        with pytest.raises(UserError, match=message) as caught:
            train(kind, tmp_path / "x", *(flag.format(ar=ar_run.folder) for flag in flags))
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, message", [(["--n_unroll=0"], "--n_unroll=0 must lie between 1 and 2"),
                                            (["--n_unroll=3"], "--n_unroll=3 must lie between 1 and 2"),
                                            (["--unroll_temperature=-1"], "--unroll_temperature=-1.0 must lie between")])
def test_a_wrong_flag_of_diffusion_is_refused(train, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train("diff", tmp_path / "x", *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_refused(train, tmp_path):
    with pytest.raises(UserError, match="--device=cuda: this machine has none"):
        train("ar", tmp_path / "x", "--device=cuda")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so soon")
def test_on_a_cpu_the_memory_of_a_large_tensor_serves_the_next_one():
    code = """import json, resource, torch
from engine.devices import pick_device

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = [faults() for _ in range(5)]
pick_device("cpu")
print(json.dumps([first, [faults() for _ in range(20)]]))"""
    said = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    before, after = json.loads(said.stdout)
    assert min(before) > 20 * after[-1]


def test_a_compiler_that_does_not_work_here_is_refused_unless_auto_chose_it(train, tmp_path, monkeypatch, capsys):
    def compile_nothing(function):
        raise RuntimeError("no working C++ compiler found\nand a long story")
    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(UserError, match=r"--compile=yes does not work here \(no working C\+\+ compiler found\); --compile=no"):
        train("ar", tmp_path / "x", "--compile=yes")
    assert not (tmp_path / "x").exists()
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_compile("auto", cpu) is choose_compile("no", cuda) is False
    assert not capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: function)
        assert choose_compile("yes", cpu) is True
    assert choose_compile("auto", cuda) is False
    assert "torch.compile does not work here" in capsys.readouterr().err


def test_bfloat16_is_chosen_where_it_is_faster_and_refused_where_it_is_missing(monkeypatch):
    def chosen(device, width=16, dtype="auto"):
        return choose_dtype(dtype, torch.device(device), width)
    for has_bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has)
        assert chosen("cuda") == expected
    with pytest.raises(UserError, match="--dtype=bfloat16: this GPU has none"):
        chosen("cuda", dtype="bfloat16")
    for able in ({"avx512_bf16": True}, {"avx512_bf16": False, "amx_bf16": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert chosen("cpu", 192) == torch.bfloat16 and chosen("cpu", 191) == chosen("mps", 192) == torch.float32
        assert chosen("cpu", 192, dtype="float32") == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"neon": True})
    assert chosen("cpu", 192) == torch.float32 and chosen("cpu", 16, dtype="bfloat16") == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert chosen("cpu", 192) == torch.float32


@pytest.mark.parametrize("able, dtype", [(True, "bfloat16"), (False, "float32")])
def test_a_wide_model_is_trained_in_what_is_faster_on_this_cpu(train, tmp_path, monkeypatch, capsys, able, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able}, raising=False)
    run = train("diff", tmp_path / "x", "--size=1x192x2", "--steps=1")
    assert f"cpu, {dtype}, log V" in capsys.readouterr().out
    assert {x.dtype for x in run.checkpoint()["model"].values()} == {torch.float32}
    train("diff", tmp_path / "y", f"--init_from={tmp_path / 'x'}", "--size=1x192x2", "--steps=1")
    assert f"cpu, {dtype}, log V" in capsys.readouterr().out
    train("diff", tmp_path / "x", "--size=1x192x2", "--steps=2", "--resume", "--dtype=float32")
    assert "cpu, float32, log V" in capsys.readouterr().out


@pytest.mark.parametrize("fail", [lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: bytearray(1 << 60)])
def test_lack_of_memory_names_the_flags_to_lower(train, tmp_path, monkeypatch, fail):
    monkeypatch.setattr(train_loop, "learning_rate", lambda config, step: fail())
    with pytest.raises(UserError, match="out of memory; lower --micro_batch_size or --target_len"):
        train("ar", tmp_path / "x")


def test_other_runtime_errors_are_not_taken_for_lack_of_memory():
    with pytest.raises(RuntimeError, match="size mismatch"), out_of_memory("--x"):
        raise RuntimeError("size mismatch")
    with pytest.raises(UserError, match="lower --x"), out_of_memory("--x"):  # a GPU's
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    for said in ("CUDA error: out of memory", "MPS backend out of memory (...)", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"):
        with pytest.raises(UserError, match="lower --x"), out_of_memory("--x"):
            raise RuntimeError(said)


def test_text_tokenized_for_another_model_is_refused(train, text, ar_run, tmp_path):
    with pytest.raises(UserError, match="tokenized with 'bytes'.* model uses 'bpe'"):
        train("ar", tmp_path / "x", f"--data={text}", "--tokenizer=bpe")


def test_an_existing_run_is_neither_overwritten_nor_continued_by_accident(train, ar_run, tmp_path):
    run = type(ar_run)(tmp_path / "copy")
    shutil.copytree(ar_run.folder, run.folder)
    before = run.files()
    for kind in ("ar", "diff"):
        with pytest.raises(UserError, match="already holds a run; continue it with --resume, or choose another --out_dir"):
            train(kind, run.folder)
    assert run.files() == before


def test_an_out_dir_that_cannot_be_written_is_refused_at_the_start(train, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match="cannot write to --out_dir="):
            train("ar", folder)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", denied)  # root may write anywhere, so chmod would prove nothing
    with pytest.raises(UserError, match="cannot write to --out_dir=.*Permission denied"):
        train("ar", tmp_path / "x")


@pytest.mark.parametrize("flags, message", [
    (["--lr=0.5"], "not be the same run: --lr was 0.001, is 0.5"), (["--steps=4"], "at step 4 already.* raise --steps"),
    (["--steps=9", "--batch_size=4"], "--batch_size was 8, is 4"), (["--tokenizer=bpe"], "tokenizer mismatch")])
def test_resuming_something_else_is_refused(train, ar_run, tmp_path, flags, message):
    run = type(ar_run)(tmp_path / "copy")
    shutil.copytree(ar_run.folder, run.folder)
    before = run.files()
    with pytest.raises(UserError, match=message):
        train("ar", run.folder, "--steps=5", "--resume", *flags)
    with pytest.raises(UserError, match="is a run of the process 'ar', not 'uniform'"):
        train("diff", run.folder, "--steps=5", "--resume")
    assert run.files() == before


def test_resuming_without_a_checkpoint_or_without_optimizer_state_is_refused(train, ar_run, tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        train("ar", tmp_path / "none", "--resume")
    save_checkpoint(tmp_path / "x" / "ckpt.pt", {k: v for k, v in ar_run.checkpoint().items() if k != "optimizer"})
    with pytest.raises(UserError, match="no optimizer state; start from it with --init_from"):
        train("ar", tmp_path / "x", "--resume", "--steps=9")
