"""The tasks: made-up originals give exactly the records we expect, real ones the published counts, bad ones a clear line."""
import ast
import email.message
import gzip
import hashlib
import io
import json
import lzma
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from data import originals, synthetic, tasks
from data.folder import draft_of
from data.tasks import read_jsonl
from engine.cli import UserError
from scoring.judge import gold_fault


def real_data():
    folder = os.environ.get("AR2DIFF_DATA")
    if not folder:
        pytest.skip("AR2DIFF_DATA does not name a folder with the original data sets")
    return folder


def write_task(name, out, from_dir="", overwrite=False, **options):
    """As data/prepare.py does."""
    with draft_of(out, overwrite) as draft:
        return tasks.write_task(name, draft, from_dir, **options)


def records(folder):
    """Read a task folder with the json module alone: {split: examples}."""
    texts = {split: (Path(folder) / f"{split}.jsonl").read_text(encoding="utf-8") for split in ("train", "valid", "test")}
    return {split: [json.loads(line) for line in text.split("\n") if line] for split, text in texts.items()}


def write_captions(folder, sentences=("one", "two", "three")):
    folder.mkdir(parents=True)
    for stem in ("train", "val", "test_2016_flickr"):
        for lang in ("en", "de"):
            text = "".join(f"{lang} {stem} {sentence}\n" for sentence in sentences)
            (folder / f"{stem}.{lang}.gz").write_bytes(gzip.compress(text.encode("utf-8")))


def squad_json(*articles):
    """Build SQuAD's layout from (passage, [(question, answers), ...]) articles."""
    return json.dumps({"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": passage, "qas": [
        {"id": "x", "question": question, "answers": [{"text": a, "answer_start": 0} for a in answers]}
        for question, answers in questions]}]} for passage, questions in articles]})


MBPP = [
    {"task_id": 10, "text": "P.", "code": "x = 0", "test_list": ["assert x == 0"]},
    {"task_id": 11, "text": "Add.", "code": "def f(a):\r\n\tif a: \r\n\t  return '\t'\r\n \r\n  \treturn a\t\r",
     "test_list": ["assert f(1)", "assert f(2)"], "test_setup_code": "y = 1\r\nz = 2"},
    {"task_id": 511, "text": "Keep.", "code": 'def g():\r\n\treturn """a \r\n\tb"""\r\n', "test_list": ["assert g()"]},
    {"task_id": 601, "text": "One.", "code": "def h(): return 1", "test_list": ["assert h() == 1"]},
]


def write_mbpp(folder):
    rows = [{"test_setup_code": "", "challenge_test_list": ["assert False"], **row} for row in MBPP]
    (folder / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- formats -----------------------------------------------------------------------------------------------------------

def test_captions_become_prompted_pairs_in_either_direction(tmp_path):
    # U+2028 and U+0085 are line ends for str.splitlines, but stand inside sentences here.
    write_captions(tmp_path / "in" / "multi30k", ("a\u2028b", "c\u0085d", "\u00e9"))
    counts = write_task("multi30k", tmp_path / "out", from_dir=tmp_path / "in", langs="de-en")
    assert counts == {"train": 3, "valid": 3, "test": 3}
    expected = {split: [{"input": f"translate German to English: de {stem} {s}", "target": f"en {stem} {s}"}
                        for s in ("a\u2028b", "c\u0085d", "\u00e9")]
                for split, stem in {"train": "train", "valid": "val", "test": "test_2016_flickr"}.items()}
    assert records(tmp_path / "out") == expected
    assert read_jsonl(tmp_path / "out" / "train.jsonl") == expected["train"]
    write_task("multi30k", tmp_path / "out2", from_dir=tmp_path / "in" / "multi30k", langs="en-de")
    assert records(tmp_path / "out2")["test"][0] == {"input": "translate English to German: en test_2016_flickr a\u2028b",
                                                     "target": "de test_2016_flickr a\u2028b"}
    meta = json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))
    assert (meta["kind"], meta["name"], meta["metric"], meta["counts"]) == ("task", "multi30k", "bleu", counts)


def test_wmt14_reads_ones_own_parallel_files_and_drops_pairs_with_nothing(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.en").write_bytes(b"one\r\n\r\nthree\r\n")
        (tmp_path / f"{split}.fr.xz").write_bytes(lzma.compress(b"un\ndeux\ntrois"))
    write_task("wmt14", tmp_path / "out", from_dir=tmp_path)
    assert records(tmp_path / "out")["train"] == [{"input": "translate English to French: one", "target": "un"},
                                                  {"input": "translate English to French: three", "target": "trois"}]
    with pytest.raises(UserError, match=r"statmt\.org.*train\.en and train\.fr.*newstest2014.*--from_dir"):
        write_task("wmt14", tmp_path / "out2")


@pytest.mark.parametrize("name", ["{}-v1.1.json", "{}-v1.1.json.gz", "{}-v1.1.reconstructed.json.xz"])
def test_squad_questions_keep_all_distinct_answers_in_order(tmp_path, name):
    pack = {".json": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[Path(name).suffix]
    train = squad_json(("P1.", [(" Who? ", ["A"]), ("What?", ["B"])]), ("P2.", [("Why?", ["C"]), ("How?", ["D"])]))
    dev = squad_json(("P3.", [("When?", ["Z", "Y", "Z", "X"])]))
    (tmp_path / name.format("train")).write_bytes(pack(train.encode("utf-8")))
    (tmp_path / name.format("dev")).write_bytes(pack(dev.encode("utf-8")))
    write_task("squad", tmp_path / "out", from_dir=tmp_path)
    assert records(tmp_path / "out") == {
        "train": [{"input": "question: Who? context: P1.", "target": "A", "references": ["A"]},
                  {"input": "question: What? context: P1.", "target": "B", "references": ["B"]}],
        "valid": [{"input": "question: Why? context: P2.", "target": "C", "references": ["C"]},
                  {"input": "question: How? context: P2.", "target": "D", "references": ["D"]}],
        "test": [{"input": "question: When? context: P3.", "target": "Z", "references": ["Z", "Y", "X"]}]}


def test_mbpp_is_split_by_its_ids_and_shows_the_tests(tmp_path):
    write_mbpp(tmp_path)
    write_task("mbpp", tmp_path / "out", from_dir=tmp_path)
    assert records(tmp_path / "out") == {
        "train": [{"input": "One.\nassert h() == 1", "target": "def h(): return 1", "setup": "", "tests": ["assert h() == 1"]}],
        "valid": [{"input": "Keep.\nassert g()", "target": 'def g():\n\treturn """a \n\tb"""', "setup": "",
                   "tests": ["assert g()"]}],
        "test": [{"input": "Add.\nassert f(1)\nassert f(2)",
                  "target": "def f(a):\n\tif a: \n\t  return '\t'\n \n  \treturn a", "setup": "y = 1\nz = 2",
                  "tests": ["assert f(1)", "assert f(2)"]}]}


def test_synthetic_tasks_are_written_as_generated(tmp_path):
    for task in synthetic.TASKS:
        counts = write_task(task, tmp_path / task, n_train=7, seed=3)
        assert counts == {"train": 7, "valid": 500, "test": 1000}
        for split, examples in records(tmp_path / task).items():
            assert examples == [synthetic.example(task, 3, split, i) for i in range(counts[split])]
        meta = json.loads((tmp_path / task / "meta.json").read_text(encoding="utf-8"))
        assert meta == {"kind": "task", "name": task, **synthetic.META[task], "counts": counts} and task in tasks.TASKS
        assert len(read_jsonl(tmp_path / task / "test.jsonl")) == 1000


# ---- the real originals --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("langs", ["en-fr", "de-en"])
def test_real_multi30k_has_the_published_counts(tmp_path, langs):
    assert write_task("multi30k", tmp_path / "out", real_data(), langs=langs) == {"train": 29000, "valid": 1014, "test": 1000}
    first = read_jsonl(tmp_path / "out" / "train.jsonl")[0]
    assert "Two young, White males are outside near many bushes." in first["input"] + first["target"]


@pytest.mark.slow
def test_real_squad_has_the_published_counts_and_no_shared_passage(tmp_path):
    counts = write_task("squad", tmp_path / "out", real_data())
    assert counts["train"] + counts["valid"] == 87599 and counts["test"] == 10570
    assert 0.01 < counts["valid"] / 87599 < 0.03
    splits = records(tmp_path / "out")
    passages = {split: {example["input"].split(" context: ", 1)[1] for example in splits[split]} for split in splits}
    assert not passages["train"] & passages["valid"] and not passages["train"] & passages["test"]
    assert all(e["target"] in e["input"] and e["target"] == e["references"][0] for e in splits["test"])


@pytest.mark.filterwarnings("ignore:.*invalid escape sequence")
def test_real_mbpp_programs_are_unchanged_but_for_line_ends(tmp_path):
    folder = real_data()
    assert write_task("mbpp", tmp_path / "out", folder) == {"train": 374, "valid": 90, "test": 500}
    ours = [example for examples in records(tmp_path / "out").values() for example in examples]
    raw = {row["text"] + "\n" + "\n".join(row["test_list"]): row for row in
           map(json.loads, (Path(folder) / "mbpp.jsonl").read_text(encoding="utf-8").splitlines())}
    for example in ours:
        assert ast.dump(ast.parse(example["target"])) == ast.dump(ast.parse(raw[example["input"]]["code"]))
        assert "\r" not in example["target"] + example["setup"]


def test_real_mbpp_programs_pass_their_tests(tmp_path):
    write_task("mbpp", tmp_path / "out", real_data())
    examples = [example for examples in records(tmp_path / "out").values() for example in examples]
    chosen = examples[::60] + [example for example in examples if example["setup"]] + [
        example for example in examples if '"""' in example["target"] or "'''" in example["target"]]
    assert len(chosen) >= 20 and gold_fault("code", chosen) is None


# ---- size, and what is left behind -----------------------------------------------------------------------------------------

def test_n_train_takes_a_seeded_random_subset_in_order(tmp_path):
    write_captions(tmp_path / "in", [str(i) for i in range(1000)])

    def chosen(name, **options):
        assert write_task("multi30k", tmp_path / name, tmp_path / "in", langs="en-de", **options)["valid"] == 1000
        return [int(example["target"].split()[-1]) for example in records(tmp_path / name)["train"]]
    first = chosen("a", n_train=100)
    assert len(set(first)) == 100 and first == sorted(first) and first != list(range(100))
    assert abs(sum(first) / 100 - 499.5) < 4 * 288.7 / 10 and min(first) < 100 and max(first) >= 900  # 4 sigma: uniform
    assert first == chosen("b", n_train=100) != chosen("c", n_train=100, seed=1)
    assert chosen("d", n_train=5000) == chosen("e") == list(range(1000))


def test_an_existing_folder_is_replaced_only_on_request_and_only_if_it_is_a_task(tmp_path):
    write_mbpp(tmp_path)
    out = tmp_path / "out"
    write_task("mbpp", out, tmp_path)
    (out / "train.jsonl").write_text("old", encoding="utf-8")
    with pytest.raises(UserError, match="not empty.*--overwrite"):
        write_task("mbpp", out, tmp_path)
    assert (out / "train.jsonl").read_text(encoding="utf-8") == "old"
    write_task("mbpp", out, tmp_path, overwrite=True)
    assert len(records(out)["train"]) == 1
    (out / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="thesis.tex"):
        write_task("mbpp", out, tmp_path, overwrite=True)
    assert (out / "thesis.tex").exists()
    with pytest.raises(UserError, match="is a file"):
        write_task("mbpp", tmp_path / "mbpp.jsonl", tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch, overwrite):
    write_mbpp(tmp_path)
    if overwrite:
        write_task("mbpp", tmp_path / "out", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for error in (KeyboardInterrupt, OSError("no space left on device")):
        def dumps(example, error=error, **options):
            if "h()" in json.JSONEncoder().encode(example):
                return "half"
            raise error
        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, UserError)):
            patch.setattr(tasks.json, "dumps", dumps)
            write_task("mbpp", tmp_path / "out", tmp_path, overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (tmp_path / "out").exists() == overwrite and len(list(tmp_path.iterdir())) == 1 + overwrite


def test_bad_originals_are_named_and_nothing_is_written(tmp_path):
    write_captions(tmp_path / "in")
    cases = [
        ("train.de.gz", gzip.compress(b"a\nb\n"), "train.en.gz and .*train.de.gz are not parallel"),
        ("train.de.gz", gzip.compress(b"a\n\xff\nc\n"), "train.de.gz, line 2 is not UTF-8: byte 0 is 0xff"),
        ("train.de.gz", gzip.compress(b"a\nb\nc\n")[:-4], "cannot read .*train.de.gz"),
        ("train.de.gz", b"no gzip", "cannot read .*train.de.gz"),
        ("val.de.gz", gzip.compress(b"\n\n\n"), "no example: .*'valid': 0"),
    ]
    for name, content, message in cases:
        good = (tmp_path / "in" / name).read_bytes()
        (tmp_path / "in" / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            write_task("multi30k", tmp_path / "out", tmp_path / "in", langs="en-de")
        (tmp_path / "in" / name).write_bytes(good)
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
    (tmp_path / "in" / "mbpp.jsonl").write_text('{"text": "no code"}', encoding="utf-8")
    for stem in ("train", "dev"):  # SQuAD 2.0 has questions without an answer
        (tmp_path / "in" / f"{stem}-v1.1.json").write_text(squad_json(("P.", [("Q?", [])])), encoding="utf-8")
    for task, message in {"mbpp": "not mbpp.jsonl.*task_id", "squad": "not a SQuAD 1.1 file",
                          "multi30k": "holds train.fr"}.items():
        with pytest.raises(UserError, match=message):
            write_task(task, tmp_path / "out", tmp_path / "in")
    for langs, message in {"en": "two languages", "en-en": "two languages", "en-xx": "not one of en, fr, de"}.items():
        with pytest.raises(UserError, match=message):
            write_task("multi30k", tmp_path / "out", tmp_path / "in", langs=langs)
    with pytest.raises(UserError, match="n_train=-1"):
        write_task("multi30k", tmp_path / "out", tmp_path / "in", n_train=-1)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ---- fetching, with a fake internet ------------------------------------------------------------------------------------------

def serve(monkeypatch, tmp_path, content, sha256=None):
    """Let urlopen answer every address with `content` (or raise it), cache in tmp_path; return the log of addresses."""
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        if isinstance(content, Exception):
            raise content
        reply = io.BytesIO(content)
        reply.headers = email.message.Message()
        reply.headers["Content-Length"] = str(len(content))
        return reply
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(originals, "DOWNLOADS", tmp_path / "cache")
    if sha256:
        monkeypatch.setitem(originals.SHA256, "mbpp.jsonl", sha256)
    return asked


def test_a_fetched_file_is_checked_kept_and_not_fetched_again(tmp_path, monkeypatch):
    write_mbpp(tmp_path)
    content = (tmp_path / "mbpp.jsonl").read_bytes()
    asked = serve(monkeypatch, tmp_path, content, hashlib.sha256(content).hexdigest())
    assert write_task("mbpp", tmp_path / "a") == {"train": 1, "valid": 1, "test": 1}
    write_task("mbpp", tmp_path / "b")
    assert len(asked) == 1 and asked[0].startswith("https://raw.githubusercontent.com/google-research/google-research/")
    assert [path.name for path in (tmp_path / "cache" / "mbpp").iterdir()] == ["mbpp.jsonl"]
    (tmp_path / "cache" / "mbpp" / "mbpp.jsonl").write_bytes(content[:50])  # a damaged cache is not trusted
    write_task("mbpp", tmp_path / "c")
    assert len(asked) == 2 and (tmp_path / "cache" / "mbpp" / "mbpp.jsonl").read_bytes() == content


def test_a_wrong_checksum_leaves_no_file_in_the_cache(tmp_path, monkeypatch):
    serve(monkeypatch, tmp_path, b"<html>please log in to this network</html>")
    for task in ("mbpp", "squad", "multi30k"):
        with pytest.raises(UserError, match="SHA-256"):
            write_task(task, tmp_path / "out")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), TimeoutError("timed out"), ConnectionResetError("reset")])
def test_offline_the_message_names_files_address_and_flag(tmp_path, monkeypatch, error):
    serve(monkeypatch, tmp_path, error)
    message = r"train-v1\.1\.json.*dev-v1\.1\.json.*https://rajpurkar\.github\.io.*--from_dir"
    with pytest.raises(UserError, match=message) as caught:
        write_task("squad", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and not (tmp_path / "out").exists()


def test_the_checksums_are_those_of_the_originals():
    folder, checked = Path(real_data()), 0
    for name, sha256 in originals.SHA256.items():
        for path in (folder / name, folder / "multi30k" / name):
            if path.is_file():
                assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256, name
                checked += 1
    assert checked >= 10


# ---- the one reader of examples ----------------------------------------------------------------------------------------

GOOD = '{"input": "a", "target": "b"}'


@pytest.mark.parametrize("bad, message", [
    ('{"input": "a", "target": "b"', "not JSON"), ("[" * 100_000, "not JSON"), ("", "an empty line"),
    ("null", "not a NoneType"), ('["a", "b"]', "not a list"),
    ('{"input": "a"}', "'target' is missing"), ('{"target": "b"}', "'input' is missing"),
    ('{"input": 1, "target": "b"}', "'input' must be a string, not 1"),
    ('{"input": "a", "target": null}', "'target' must be a string"),
    ('{"input": "a", "target": "b", "references": "b"}', "'references' must be a list"),
    ('{"input": "a", "target": "b", "references": []}', "'references' must be a list"),
    ('{"input": "a", "target": "b", "tests": [1]}', "'tests' must be a list"),
    ('{"input": "a", "target": "b", "setup": ["x = 1"]}', "'setup' must be a string"),
    ('{"input": "a", "target": "\\ud800"}', "surrogate"),
    (b'{"input": "caf\xe9", "target": "b"}', "not UTF-8"),
])
def test_a_malformed_line_is_named(tmp_path, bad, message):
    path = tmp_path / "train.jsonl"
    bad = bad if isinstance(bad, bytes) else bad.encode("utf-8")
    path.write_bytes(b"\n".join([GOOD.encode()] * 2 + [bad, GOOD.encode()]) + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        read_jsonl(path)
    assert f"{path}, line 3" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_empty_files_are_named_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"does not exist; make it with `python data/prepare\.py squad --out="):
        read_jsonl(tmp_path / "squad" / "train.jsonl")
    with pytest.raises(UserError, match=r"mine/test\.jsonl does not exist; write it, one example a line$"):
        read_jsonl(tmp_path / "mine" / "test.jsonl")
    (tmp_path / "train.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.jsonl is empty"):
        read_jsonl(tmp_path / "train.jsonl")


def test_own_files_may_come_from_windows_and_carry_more_keys(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (GOOD + "\r\n" + '{"input": "x\u2028y", "target": "", "id": 7}').encode("utf-8"))
    assert read_jsonl(path) == [{"input": "a", "target": "b"}, {"input": "x\u2028y", "target": "", "id": 7}]
