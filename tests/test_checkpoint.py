"""checkpoint.py, loading.py: what is written is read back bit for bit; a crash leaves the old file; no code in one is run."""
import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_ar
from autoregressive import Autoregressive
from diffusion import Absorbing, Gaussian, Uniform
from engine.checkpoint import FORMAT, describe, read_plain, save_checkpoint
from engine.cli import UserError
from pretrained.loading import build_model, load_checkpoint, process_of, tokenizer_of

ROOT = Path(train_ar.__file__).parent


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def refusal(path):
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.tensor([torch.nan, -0.0]), "c": torch.arange(3), "d": torch.ones(2).half()}
    save_checkpoint(tmp_path / "new" / "x.pt", {"model": tensors, "step": 3, "best": None, "history": ["a", "b"]})
    read = read_plain(tmp_path / "new" / "x.pt")
    assert (read["step"], read["best"], read["history"]) == (3, None, ["a", "b"])
    for name, tensor in tensors.items():
        assert read["model"][name].dtype == tensor.dtype
        assert torch.equal(read["model"][name].view(torch.uint8), tensor.view(torch.uint8))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.pt"]  # no temporary file stays


def test_a_run_can_be_named_by_its_folder(ar_run):
    assert load_checkpoint(ar_run.folder)["step"] == load_checkpoint(str(ar_run.path))["step"] == 4


@pytest.mark.parametrize("disguise", ["pickle", "torch.save", "checkpoint"])
def test_a_pickle_bomb_is_refused_and_does_not_go_off(tmp_path, recwarn, disguise):
    file, mark = tmp_path / "bomb.pt", tmp_path / "mark"
    if disguise == "pickle":
        file.write_bytes(pickle.dumps(Bomb(mark)))
        detonate = lambda: pickle.loads(file.read_bytes())
    else:
        torch.save(Bomb(mark) if disguise == "torch.save" else {"format": FORMAT, "model": Bomb(mark)}, file)
        detonate = lambda: torch.load(file, weights_only=False)
    detonate()
    assert mark.exists()  # a real bomb
    mark.unlink()
    assert "is refused" in refusal(file) and "run code" in refusal(file)
    assert not mark.exists()
    assert not [w for w in recwarn if w.category is UserWarning]  # one clear line, not torch's musings before it


def test_a_file_truncated_anywhere_is_a_clear_error(ar_run, tmp_path):
    whole = ar_run.path.read_bytes()
    for n in {*range(8), 30, 100, 1000, *range(0, len(whole), len(whole) // 25), len(whole) - 1}:
        (tmp_path / "part.pt").write_bytes(whole[:n])
        assert "truncated" in refusal(tmp_path / "part.pt") or "is refused" in refusal(tmp_path / "part.pt")


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_a_truncated_pickle_is_a_clear_error_too(tmp_path, protocol):
    whole = pickle.dumps({"step": 1, "names": [1.5, "x", None]}, protocol)
    for n in range(len(whole) + 1):
        (tmp_path / "part.pt").write_bytes(whole[:n])
        refusal(tmp_path / "part.pt")


def test_a_checkpoint_of_another_version_is_told_from_a_foreign_file(tmp_path):
    for found, words in (("ar2diff-1", "another version of this project (ar2diff-1"), ("other", "was not written by this")):
        torch.save({"format": found}, tmp_path / "x.pt")
        assert words in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [
    b"", b"hello world\n", b"PK\x03\x04", b"\x00" * 1000, b'{"a": 1}', b"\xff\xfe", b"import os\n"])
def test_a_file_of_another_kind_is_a_clear_error(tmp_path, content):
    (tmp_path / "notes.pt").write_bytes(content)
    refusal(tmp_path / "notes.pt")


def test_a_foreign_checkpoint_and_a_missing_one_are_named_as_such(tmp_path):
    torch.save({"model": {}}, tmp_path / "other.pt")
    assert "not written by this project" in refusal(tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "not written by this project" in refusal(tmp_path / "list.pt")
    assert "no checkpoint at" in refusal(tmp_path / "none.pt")
    assert "no checkpoint at" in refusal(tmp_path)


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_writer_killed_midway_leaves_the_old_file(tmp_path, moment):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, {"step": 1, "model": {"w": torch.ones(1000)}})
    old = path.read_bytes()
    kill = {"write": "def save(obj, file): file.write(b'half of it'); file.flush(); os._exit(9)\ntorch.save = save",
            "rename": "os.replace = lambda *paths: os._exit(9)"}[moment]
    code = f"import os, torch\nfrom engine import checkpoint\n{kill}\ncheckpoint.save_checkpoint({str(path)!r}, {{'step': 2}})"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 9, process.stderr
    assert path.read_bytes() == old and read_plain(path)["step"] == 1
    save_checkpoint(path, {"step": 3})  # what the dead writer left does not get in the way
    assert read_plain(path)["step"] == 3 and [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


def fail(number):
    def raise_it(*_, **__):
        raise OSError(number, os.strerror(number))
    return raise_it


@pytest.mark.parametrize("module, name, number, reason", [
    (os, "fsync", errno.ENOSPC, "No space left"), (os, "replace", errno.EACCES, "Permission denied"),
    (torch, "save", errno.EIO, "error"), (Path, "mkdir", errno.EROFS, "Read-only")])
def test_a_failed_write_is_one_clear_line_and_leaves_the_old_file(tmp_path, monkeypatch, module, name, number, reason):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, {"step": 1})
    old = path.read_bytes()
    monkeypatch.setattr(module, name, fail(number))
    with pytest.raises(UserError, match=f"cannot write .*ckpt.pt .*{reason}"):
        save_checkpoint(path, {"step": 2})
    assert path.read_bytes() == old and [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.skipif(os.name != "posix", reason="only POSIX can limit the size of files")
def test_a_disk_that_is_really_full_leaves_the_old_file(tmp_path):
    import resource
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, {"step": 1})
    old, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # Python ignores the signal, so that write() fails
    try:
        with pytest.raises(UserError, match="cannot write .*free some space"):
            save_checkpoint(path, {"step": 2, "model": {str(i): torch.zeros(10_000) for i in range(10)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old and [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_path_through_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "ckpt.pt", {})
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_loading_is_strict_a_missing_extra_or_misshapen_tensor_is_named(ar_run):
    def refused(change):
        c = ar_run.checkpoint()
        change(c["model"])
        with pytest.raises(UserError) as caught:
            build_model(c)
        assert "\n" not in str(caught.value)
        return str(caught.value)
    assert "blocks.1.mlp_in.weight" in refused(lambda m: m.pop("blocks.1.mlp_in.weight"))
    assert "module.extra" in refused(lambda m: m.update({"module.extra": torch.zeros(1)}))
    assert "embedding.weight" in refused(lambda m: m.update({"embedding.weight": torch.zeros(3, 16)}))


def test_a_tokenizer_with_other_ids_is_refused_by_its_hash(ar_run):
    c = ar_run.checkpoint()
    assert tokenizer_of(c).hash == c["tokenizer"]["hash"]
    own, c["tokenizer"]["hash"] = c["tokenizer"]["hash"], "0123456789abcdef"
    with pytest.raises(UserError, match=f"tokenizer mismatch: .*'bytes' of hash 0123456789abcdef, .* has {own}"):
        tokenizer_of(c)


@pytest.mark.parametrize("process", [Autoregressive(7, 5, 6, "bidirectional"), Uniform(9, 1, 0.5, 0.25, "causal"), Uniform(9),
                                     Absorbing(9, False, "full", "causal", 7), Gaussian(5, 0.2, 9.0, 0.25)])
def test_a_process_survives_a_checkpoint(tmp_path, process):
    shape = {"vocab_size": 16, "vector_width": 5, "self_condition": True}
    save_checkpoint(tmp_path / "x.pt", {"process": describe(process), "shape": shape})
    assert process_of(read_plain(tmp_path / "x.pt")) == process


def test_a_process_that_this_version_lacks_is_named():
    with pytest.raises(UserError, match="a checkpoint of the process 'multinomial', which is not in diffusion.py"):
        process_of({"process": {"name": "multinomial", "n_noise": 9}})
