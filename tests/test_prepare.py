"""data/prepare.py and data/text.py: token files against tokens computed from the whole text, and every kind of bad input."""
import base64
import gzip
import inspect
import itertools
import json
import lzma
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from data import prepare, text
from data.tokenizer import load_tokenizer
from engine.cli import UserError

BPE = load_tokenizer("bpe")
PROSE = "The café is open.\n\n\nIt's   late…   \n  and 1984 was «long» ago.  \n\n" * 8
CODE = "def f(x):\n    if x:\n\n        return {'select': x_y}\n\n\n" * 8


def read(path):
    return "".join(text.read_pieces(path))


def run(*flags):
    prepare.main(["text", *map(str, flags)])


def streams(out, name):
    """Return (train ids, valid ids) of a source, and check them against meta.json."""
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    row = next(row for row in meta["sources"] if row["name"] == name)
    train, valid = (np.fromfile(out / f"{split}.{name}.bin", dtype=meta["dtype"]).tolist() for split in ("train", "valid"))
    assert (row["train_tokens"], row["valid_tokens"]) == (len(train), len(valid))
    return train, valid


def corpus(folder):
    """Write one document of each kind; return their texts in the order of their paths."""
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("hidden", encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\xff\xfe")
    (folder / "A.md").write_bytes(PROSE.encode())
    (folder / "b" / "code.py").write_bytes(CODE.encode())
    (folder / "c.txt.gz").write_bytes(gzip.compress(("gz " + PROSE).encode()))
    (folder / "d.py.xz").write_bytes(lzma.compress(("# xz\n" + CODE).encode()))
    (folder / "e.txt").write_bytes(b"")
    (folder / "f.txt").write_bytes(b"last")
    return [PROSE, CODE, "gz " + PROSE, "# xz\n" + CODE, "last"]


def expected(texts, tokenizer=BPE):
    ids = []
    for n, document in enumerate(texts):
        ids += [tokenizer.eos] * (n > 0) + tokenizer.encode(document)
    return ids


@pytest.mark.parametrize("piece", [120, 1 << 18])
def test_token_files_equal_the_tokens_of_the_whole_text(tmp_path, monkeypatch, piece):
    """However small the pieces are that a corpus is read in."""
    monkeypatch.setattr(text, "PIECE", piece)
    texts = corpus(tmp_path / "in")
    run(f"--sources={tmp_path / 'in'}", f"--out={tmp_path / 'out'}")
    train, valid = streams(tmp_path / "out", "in")
    ids = expected(texts)
    assert train + valid == ids
    assert len(train) == int(0.9 * len(ids))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["meta.json", "train.in.bin", "valid.in.bin"]


def test_meta_tells_tokenizer_weights_and_dtype(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "My Book.txt").write_text(folder + PROSE, encoding="utf-8")
    a, b = (tmp_path / folder / "My Book.txt" for folder in ("one", "two"))
    run(f"--sources={a}:3,{b}", f"--out={tmp_path / 'out'}", "--tokenizer=bytes", "--valid_share=0.25")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))
    assert (meta["kind"], meta["tokenizer"], meta["dtype"]) == ("text", "bytes", "uint16")
    assert meta["tokenizer_hash"] == load_tokenizer("bytes").hash
    assert [(row["name"], row["weight"]) for row in meta["sources"]] == [("my_book", 0.75), ("my_book2", 0.25)]
    for name, folder in (("my_book", "one"), ("my_book2", "two")):
        train, valid = streams(tmp_path / "out", name)
        assert bytes(train + valid) == (folder + PROSE).encode()
        assert len(train) == int(0.75 * len(train + valid))


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path, monkeypatch):
    tokens = [bytes([b]) for b in range(256)] + [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    ranks = tmp_path / "large.tiktoken"
    ranks.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % n for n, token in enumerate(tokens)))
    (tmp_path / "high.txt").write_bytes("\U000f0000".encode() * 40)  # begins with byte 0xf3: a pair of very high rank
    run(f"--sources={tmp_path / 'high.txt'}", f"--out={tmp_path / 'out'}", f"--tokenizer={ranks}")
    train, valid = streams(tmp_path / "out", "high")
    assert json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))["dtype"] == "uint32"
    assert train + valid == load_tokenizer(str(ranks)).encode("\U000f0000" * 40) and max(train) > 60_000


@pytest.mark.parametrize("piece", [3, 4, 5, 7, 1 << 18])
def test_reading_keeps_every_character_and_only_unifies_line_ends(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(text, "PIECE", piece)
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "a\r\n\r\n é\ufeff\U0001f600 \n \rb\t\n\n".encode())
    assert read(path) == "a\n\n é\ufeff\U0001f600 \n \nb\t\n\n"
    for name, pack in (("x.gz", gzip.compress), ("x.txt.xz", lzma.compress)):
        (tmp_path / name).write_bytes(pack(path.read_bytes()))
        assert read(tmp_path / name) == read(path)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 18])
@pytest.mark.parametrize("content, offset", [
    ("é\n€".encode() + b"\xff.", 6), (b"abc\r\ndef\xe2\x82", 8), (b"\xef\xbb\xbf\n\x80", 4),
    ("\r\n€".encode() * 9_000 + b"\x80", 45_000), (b"\xef\xbb\xbf" + "€\n".encode() * 9_000 + b"\xe2\x82\n", 36_003)])
def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path, monkeypatch, piece, content, offset):
    monkeypatch.setattr(text, "PIECE", piece)
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.txt is not UTF-8: byte {offset} is 0x{content[offset]:02x}"):
        read(tmp_path / "x.txt")
    for encoding in ("utf-16", "utf-32"):
        (tmp_path / "y.txt").write_text(PROSE, encoding=encoding)
        with pytest.raises(UserError, match=rf"y\.txt is {encoding.upper()}, not UTF-8"):
            read(tmp_path / "y.txt")


@pytest.mark.parametrize("pack, suffix", [(gzip.compress, ".gz"), (lzma.compress, ".xz")])
def test_a_damaged_archive_is_named(tmp_path, pack, suffix):
    packed, path = pack(PROSE.encode()), tmp_path / f"x{suffix}"
    for content in (packed[:-10], b"plain text", packed[:10] + b"\xff" * 50):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"x{suffix} is damaged"):
            read(path)


def test_the_last_colon_starts_a_weight_only_before_a_number(monkeypatch):
    monkeypatch.setattr(text, "text_files", lambda place: [place])
    cases = {r"C:\x": (r"C:\x", 1), r"C:\x\books.txt:0.5": (r"C:\x\books.txt", 0.5), "a:.25": ("a", 0.25),
             "a:2e-3": ("a", 0.002), "a:b": ("a:b", 1), "dir/": ("dir/", 1)}
    for item, (place, weight) in cases.items():
        source, = text.parse_sources(item)
        assert (source.files, source.weight) == ([place], weight)


def test_docstrings_are_those_that_python_shows():
    docs = "".join(text.read_docs(Path(textwrap.__file__)))
    places = [docs.index(inspect.getdoc(thing)) for thing in (textwrap.TextWrapper, textwrap.TextWrapper.wrap, textwrap.dedent)]
    assert places == sorted(places) and docs.startswith(inspect.getdoc(textwrap))
    assert "import" not in docs and "".join(text.read_code(Path(textwrap.__file__))) == inspect.getsource(textwrap)


def test_the_default_mixes_docs_and_code_of_the_standard_library(tmp_path, monkeypatch):
    files = text.stdlib_files()
    names = [path.as_posix() for path in files]
    assert names == sorted(names) and any(name.endswith("/argparse.py") for name in names)
    assert not any("site-packages" in name or "/test/" in name or "_sysconfigdata" in name for name in names)
    topics = [path for path in files if path.name == "topics.py"]
    few = [path for path in files if path.name in ("textwrap.py", "cp1252.py", "this.py")] + topics
    monkeypatch.setattr(text, "stdlib_files", lambda: few)
    run(f"--out={tmp_path / 'out'}")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))
    assert [(row["name"], row["weight"]) for row in meta["sources"]] == [("docs", 0.8), ("code", 0.2)]
    docs, code = (BPE.decode([i for part in streams(tmp_path / "out", name) for i in part if i != BPE.eos])
                  for name in ("docs", "code"))
    assert inspect.getdoc(textwrap.wrap) in docs and "def wrap(" in code and "def wrap(" not in docs
    assert not topics or ('The "if" statement' in docs and 'The "if" statement' not in code)
    assert "decoding_table" not in code


def test_tiny_shakespeare_splits_as_in_nanogpt(tmp_path):
    """nanoGPT's data/shakespeare_char/prepare.py: 1,003,854 characters to train on, 111,540 to validate on."""
    if not os.environ.get("AR2DIFF_DATA"):
        pytest.skip("real text is needed: set AR2DIFF_DATA to a folder with tinyshakespeare.txt")
    path = Path(os.environ["AR2DIFF_DATA"]) / "tinyshakespeare.txt"
    run(f"--sources={path}", "--tokenizer=bytes", f"--out={tmp_path / 'out'}")
    train, valid = streams(tmp_path / "out", "tinyshakespeare")
    assert (len(train), len(valid)) == (1003854, 111540)
    assert bytes(train + valid) == path.read_bytes()


def bad_inputs(folder):
    """Return {flags: what the message must say}."""
    (folder / "good.txt").write_text(PROSE, encoding="utf-8")
    (folder / "bad.txt").write_bytes(b"abc\xff")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "one.txt").write_bytes(b"a")
    (folder / "folder").mkdir()
    good = folder / "good.txt"
    return {
        f"--sources={good},{folder / 'bad.txt'}": r"bad\.txt is not UTF-8: byte 3 is 0xff",
        f"--sources={good},{folder / 'none.txt'}:1": "none.txt' does not exist",
        f"--sources={folder / 'folder'}": "no .txt, .py or .md",
        f"--sources={folder / 'empty.txt'}": "too short: 0 tokens",
        f"--sources={folder / 'one.txt'}": "too short: 0 tokens to train on, 1 ",
        f"--sources={good},": "empty source",
        f"--sources={good}:0": "weight 0 must be above 0",
        f"--sources={good}:-1": "weight -1 must be above 0",
        f"--sources={good}:1e999": "must be above 0",
        f"--sources={good} --tokenizer=bpf": "did you mean 'bpe'",
        f"--sources={good} --valid_share=0": "valid_share=0.0",
        f"--sources={good} --valid_share=1": "valid_share=1.0",
        f"--sources={good} --from_dir={folder}": "--from_dir has no meaning for 'text'",
        f"--source={good}": "did you mean --sources",
    }


def test_every_bad_input_is_one_clear_error_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "in").mkdir()
    for flags, complaint in bad_inputs(tmp_path / "in").items():
        with pytest.raises(UserError, match=complaint) as error:
            run(*flags.split(), f"--out={tmp_path / 'out'}")
        assert "\n" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["in"], flags


def test_a_home_that_nobody_has_is_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="source '~nobody_has_it/x' does not exist"):
        run("--sources=~nobody_has_it/x", f"--out={tmp_path / 'out'}")


def test_an_unknown_name_and_a_flag_of_the_other_kind_are_refused(tmp_path):
    for name, meant in (("sqad", "squad"), ("txt", "text")):
        with pytest.raises(UserError, match=f"did you mean '{meant}'"):
            prepare.main([name, f"--out={tmp_path / 'out'}"])
    with pytest.raises(UserError, match="--tokenizer has no meaning for 'squad'"):
        prepare.main(["squad", "--tokenizer=bytes", f"--out={tmp_path / 'out'}"])
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_kept_unless_told_otherwise(tmp_path):
    good, other, out = tmp_path / "good.txt", tmp_path / "other.txt", tmp_path / "out"
    good.write_text(PROSE, encoding="utf-8")
    other.write_text(CODE, encoding="utf-8")
    out.mkdir()  # an empty one is no obstacle
    run(f"--sources={good}", f"--out={out}")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="--overwrite"):
        run(f"--sources={other}", f"--out={out}")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="UTF-8"):
        run(f"--sources={other},{tmp_path / 'bad.txt'}", f"--out={out}", "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run(f"--sources={other}", f"--out={out}", "--overwrite")
    assert sorted(path.name for path in out.iterdir()) == ["meta.json", "train.other.bin", "valid.other.bin"]
    (out / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="thesis.tex"):
        run(f"--sources={other}", f"--out={out}", "--overwrite")
    assert (out / "thesis.tex").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "good.txt", "other.txt", "out"]


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    good = tmp_path / "good.txt"
    good.write_text(PROSE, encoding="utf-8")
    for out in (good, good / "below"):
        with pytest.raises(UserError, match="cannot prepare"):
            run(f"--sources={good}", f"--out={out}")
    assert good.read_text(encoding="utf-8") == PROSE and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_an_error_and_leaves_nothing_behind(tmp_path):
    resource = pytest.importorskip("resource")  # Unix: a limit on file size fails like a full disk
    good = tmp_path / "good.txt"
    good.write_text(PROSE * 200, encoding="utf-8")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(UserError, match="cannot prepare .*nothing was left"):
            run(f"--sources={good}", f"--out={tmp_path / 'out'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["good.txt"]


def test_a_task_is_handed_on_with_its_flags(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(prepare, "write_task", lambda name, folder, *more: calls.append((name, *more)) or {"train": 2000})
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "prepare.py"))
    prepare.main(["squad", f"--out={tmp_path / 'out'}", "--from-dir=there", "--n_train=2000", "--seed=7", "--langs=en-de"])
    prepare.main(["mbpp"])
    assert calls == [("squad", "there", 2000, 7, "en-de"), ("mbpp", "", 0, 0, "en-fr")]
    said = [f"2,000 train examples in {folder}" for folder in (tmp_path / "out", tmp_path / "prepared" / "mbpp")]
    assert capsys.readouterr().out.splitlines() == said and (tmp_path / "prepared" / "mbpp").is_dir()


def test_the_script_starts_from_anywhere_and_a_mistake_exits_with_2(tmp_path):
    done = subprocess.run([sys.executable, prepare.__file__, "text", "--sources=none.txt", "--out=new"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "none.txt" in done.stderr
