"""data/dataset.py: which rows a step sees, how they lie on the canvas, and what is refused."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.dataset import PREPARED, open_data, pad_rows, read_meta
from data.tokenizer import load_tokenizer
from engine.cli import UserError
from engine.noise import Noise

BYTES = load_tokenizer("bytes")


def write_task(folder, pairs, valid=(("a", "b"),)):
    folder.mkdir(exist_ok=True)
    for split, rows in (("train", pairs), ("valid", valid)):
        text = "".join(json.dumps({"input": i, "target": t}) + "\n" for i, t in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def write_text(folder, train, valid, weights=(1,)):
    """Write token streams as they are: one array per source and split, of ids that tell where a window was cut."""
    folder.mkdir(exist_ok=True)
    sources = [{"name": f"s{i}", "weight": weight} for i, weight in enumerate(weights)]
    for split, streams in (("train", train), ("valid", valid)):
        for source, stream in zip(sources, streams):
            np.array(stream, dtype=np.uint16).tofile(folder / f"{split}.{source['name']}.bin")
    meta = {"kind": "text", "tokenizer": "bytes", "tokenizer_hash": BYTES.hash, "dtype": "uint16", "sources": sources}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def same(a, b):
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a, b))


def widened(batch, input_len):
    """Return the batch with the columns of padding that a task's batch leaves out."""
    more = input_len - batch.inputs.size(1)
    mask = None if batch.pad_mask is None else F.pad(batch.pad_mask, (more, 0), value=True)
    return batch._replace(inputs=F.pad(batch.inputs, (more, 0), value=BYTES.pad), pad_mask=mask)


def words(batch):
    return [BYTES.decode([i for i in row if i != BYTES.pad]) for row in batch.inputs.tolist()]


@pytest.mark.parametrize("kind", ["task", "text"])
def test_a_row_depends_on_seed_step_and_index_alone(task, text, kind):
    folder = {"task": task, "text": text}[kind]
    data = open_data(folder, BYTES, 8, 7)
    whole = data.train_batch(3, 11, range(8), 8)
    assert same(whole, data.train_batch(3, 11, range(8), 8))
    data.train_batch(0, 500, range(8), 8)  # whatever was asked before
    for split in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0], [1, 2, 3, 4, 5], [6, 7]]):
        parts = [widened(open_data(folder, BYTES, 8, 7).train_batch(3, 11, rows, 8), 8) for rows in reversed(split)][::-1]
        assert same(widened(whole, 8), [None if x[0] is None else torch.cat(x) for x in zip(*parts)])
    for other in (data.train_batch(4, 11, range(8), 8), data.train_batch(3, 12, range(8), 8)):
        assert not torch.equal(whole.inputs, other.inputs)
    assert len({tuple(row) for row in whole.targets.tolist()}) > 4  # rows of a batch differ


def test_every_example_is_seen_once_an_epoch_in_a_new_order(tmp_path):
    names = [f"w{i}" for i in range(10)]
    data = open_data(write_task(tmp_path / "t", [(name, "x") for name in names]), BYTES, 4, 4)
    seen = [word for step in range(14) for word in words(data.train_batch(0, step, range(5), 5))]
    epochs = [seen[i:i + 10] for i in range(0, 70, 10)]
    assert all(sorted(epoch) == sorted(names) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 7
    # A batch that does not divide the epoch runs on into the next one: nothing is left out. One may hold several epochs, too.
    for size in (7, 14, 35):
        seen = [word for step in range(70 // size) for word in words(data.train_batch(0, step, range(size), size))]
        assert all(sorted(seen[i:i + 10]) == sorted(names) for i in range(0, 70, 10))
    assert words(data.train_batch(0, 0, range(10), 10)) != words(data.train_batch(1, 0, range(10), 10))


def of_lengths(folder, lengths):
    return write_task(folder, [("x" * n, "y") for n in lengths], valid=[("abc", "1"), ("a" * 30, "2"), ("", "3")])


def test_the_rows_of_a_step_are_of_similar_length_and_steps_come_in_no_order_of_length(tmp_path):
    lengths = [n for n in range(40) for _ in range(10)]
    data = open_data(of_lengths(tmp_path / "t", lengths), BYTES, 40, 4)
    for epoch in (0, 1):
        of_steps = [[len(word) for word in words(data.train_batch(0, 50 * epoch + step, range(8), 8))] for step in range(50)]
        assert all(max(row) - min(row) <= 2 for row in of_steps)
        assert sorted(sum(of_steps, [])) == lengths
        first = [row[0] for row in of_steps]
        assert abs(np.corrcoef(first, range(50))[0, 1]) < 0.4
    # Steps of 7 straddle epochs; 50 whole ones of the second are as alike, the last 6 had fewer rows to be chosen from.
    of_steps = [[len(word) for word in words(data.train_batch(0, step, range(7), 7))] for step in range(58, 114)]
    assert sum(max(row) - min(row) <= 2 for row in of_steps) >= 50


def test_columns_that_hold_padding_alone_are_left_out_by_eights_(tmp_path):
    data = open_data(of_lengths(tmp_path / "t", [1, 5, 5, 6, 30, 40]), BYTES, 40, 4)
    assert data.valid_batch([0]).inputs.size(1) == 8 and data.valid_batch([0, 1]).inputs.size(1) == 32
    assert data.valid_batch([2]).inputs.size(1) == 8  # never 0 columns: an encoder needs some
    batches = [data.train_batch(3, step, range(2), 2) for step in range(3)]
    assert sorted(batch.inputs.size(1) for batch in batches) == [8, 8, 40]
    rows = sorted(data.rows["train"], key=lambda row: len(row[0]))
    by_length = sorted(batches, key=lambda batch: -int(batch.pad_mask.sum()) / batch.pad_mask.numel())
    assert same(widened(by_length[-1], 40), pad_rows(rows[-2:], BYTES, 40, 4))
    assert data.tokens_per_row == pytest.approx(87 / 6 + 4)


def test_a_file_that_changed_is_read_anew_even_at_the_same_size_and_time(tmp_path):
    folder = write_task(tmp_path / "t", [("abc", "x")])
    os.utime(folder / "train.jsonl", (1, 1))
    first = open_data(folder, BYTES, 8, 4).rows["train"]
    write_task(folder, [("abd", "x")])
    os.utime(folder / "train.jsonl", (1, 1))
    second = open_data(folder, BYTES, 8, 4).rows["train"]
    assert first[0][0].tolist() == list(b"abc") and second[0][0].tolist() == list(b"abd")
    assert sorted(path.name for path in folder.iterdir()) == ["train.jsonl", "valid.jsonl"], "nothing is kept beside it"


def test_inputs_are_padded_on_the_left_and_targets_closed_by_eos_and_padded_on_the_right():
    a, b, c, eos, pad = *b"abc", BYTES.eos, BYTES.pad
    batch = pad_rows([([a, b, c], [c]), ([], [a, b, c]), ([b], [])], BYTES, 3, 4)
    assert batch.inputs.tolist() == [[a, b, c], [pad, pad, pad], [pad, pad, b]]
    assert batch.targets.tolist() == [[c, eos, pad, pad], [a, b, c, eos], [eos, pad, pad, pad]]
    assert batch.pad_mask.tolist() == [[False] * 3, [True] * 3, [True, True, False]]
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64


def test_an_example_that_fills_the_canvas_fits_and_one_token_more_does_not(tmp_path):
    full = write_task(tmp_path / "full", [("abcd", "xyz")])
    batch = open_data(full, BYTES, 4, 4).train_batch(0, 0, [0], 1)
    assert batch.targets.tolist() == [[*b"xyz", BYTES.eos]] and not batch.pad_mask.any()
    for shape in ((3, 4), (4, 3)):
        with pytest.raises(UserError):
            open_data(full, BYTES, *shape)


def test_too_long_examples_are_counted_measured_and_named(tmp_path):
    folder = write_task(tmp_path / "t", [("ab", "x"), ("abc", "y" * 9), ("a" * 12, "z"), ("b", "y")])
    with pytest.raises(UserError) as caught:
        open_data(folder, BYTES, 10, 6)
    for part in ("train.jsonl", "2 of 4", "--input_len=10", "--target_len=6", "line 2", "3 tokens", "9 + EOS",
                 "longest are 12 and 10", "--too_long=drop"):
        assert part in str(caught.value)
    open_data(folder, BYTES, 12, 10)  # and indeed these do


def test_too_long_drop_leaves_out_exactly_what_does_not_fit_and_says_so(tmp_path, capsys):
    folder = write_task(tmp_path / "t", [("ab", "x"), ("abc", "y" * 9), ("a" * 12, "z"), ("b", "y")])
    data = open_data(folder, BYTES, 10, 6, "drop")
    assert "left out 2 of 4 examples" in capsys.readouterr().out
    assert sorted(words(data.train_batch(0, 0, range(2), 2))) == ["ab", "b"]
    with pytest.raises(UserError, match="not one of 4 examples fits --input_len=10 --target_len=1; the longest are .+ and .+"):
        open_data(folder, BYTES, 10, 1, "drop")


def test_validation_rows_are_the_file_in_its_order_without_what_is_too_long(tmp_path, capsys):
    folder = write_task(tmp_path / "t", [("a", "b")], valid=[("one", "1"), ("much too long", "2"), ("two", "3")])
    data = open_data(folder, BYTES, 8, 4)
    assert data.n_valid() == 2 and words(data.valid_batch(range(2))) == ["one", "two"]
    assert open_data(folder, BYTES, 2, 4).n_valid() == 0, "none fits: the run goes on without validation"
    assert "left out 3 of 3 examples" in capsys.readouterr().out
    (folder / "valid.jsonl").unlink()
    assert open_data(folder, BYTES, 8, 4).n_valid() == 0


def test_a_task_needs_input_columns(tmp_path):
    with pytest.raises(UserError, match="--input_len above 0"):
        open_data(write_task(tmp_path / "t", [("a", "b")]), BYTES, 0, 4)


@pytest.mark.parametrize("content, line", [
    (b'{"input": "a", "target": "b"}\n{"input": "a", "target"\n', "line 2"),
    (b'{"input": "a", "target": "b"}\n{"input": "\xff", "target": "b"}\n', "line 2"),
    (b'{"input": "a"}\n', "line 1: 'target' is missing"),
    (b"[1]\n", "line 1"),
    (b"", "is empty"),
])
def test_bad_jsonl_is_refused_by_file_and_line(tmp_path, content, line):
    folder = write_task(tmp_path / "t", [("a", "b")])
    (folder / "train.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"train.jsonl.*{line}"):
        open_data(folder, BYTES, 4, 4)


def test_windows_are_cut_from_one_stream_and_never_cross_from_train_to_valid(tmp_path, monkeypatch):
    monkeypatch.setattr(BYTES, "vocab_size", 4096)  # ids tell where a window was cut
    train, valid = [range(0, 1000), range(2000, 3000)], [range(1000, 1100), range(3000, 3100)]
    data = open_data(write_text(tmp_path / "t", train, valid, (0.5, 0.5)), BYTES, 5, 7)
    starts = {"train": [], "valid": []}
    for split, batch in (("train", data.train_batch(0, 0, range(3000), 3000)), ("valid", data.valid_batch(range(500)))):
        assert batch.inputs.shape[1] == 5 and batch.targets.shape[1] == 7 and batch.pad_mask is None
        for row in torch.cat((batch.inputs, batch.targets), dim=1).tolist():
            assert row == list(range(row[0], row[0] + 12))  # consecutive: no gap at the border of input and target
            assert any(row[0] in r and row[-1] in r for r in {"train": train, "valid": valid}[split])
            starts[split].append(row[0])
    offsets = np.array(starts["train"]) % 1000  # uniform over 988 starts: mean 493.5, sd 285
    assert abs(offsets.mean() - 493.5) < 4 * 285 / 3000 ** 0.5 and offsets.min() < 10 and offsets.max() > 975
    assert len(set(starts["valid"])) > 100


def test_sources_are_drawn_in_proportion_to_their_weights_not_their_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(BYTES, "vocab_size", 4096)  # ids tell where a window was cut
    train = [range(0, 100), range(100, 2100), range(2100, 2600)]
    data = open_data(write_text(tmp_path / "t", train, train, (8, 2, 0)), BYTES, 0, 4)  # weights need not sum to 1
    n = 5000
    for batch in (data.train_batch(0, 0, range(n), n), data.valid_batch(range(n))):
        first = batch.targets[:, 0].numpy()
        assert abs((first < 100).mean() - 0.8) < 4 * (0.8 * 0.2 / n) ** 0.5
        assert not (first >= 2100).any()


def test_the_source_of_a_validation_row_says_nothing_about_its_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(BYTES, "vocab_size", 4096)  # ids tell where a window was cut
    train = [range(0, 1000), range(1000, 2000)]
    data = open_data(write_text(tmp_path / "t", train, train, (0.8, 0.2)), BYTES, 0, 4)
    n = 2000
    second = (data.valid_batch(range(n)).targets[:, 0] >= 1000).double()
    t = Noise(0, "valid", 0, range(n)).uniform()  # what evaluate() gives to the loss, which draws t first
    assert abs(torch.corrcoef(torch.stack((second, t)))[0, 1]) < 4 / n ** 0.5


def test_validation_windows_are_fixed_and_do_not_depend_on_their_batch(text):
    data = open_data(text, BYTES, 8, 7)
    whole = data.valid_batch(range(6))
    data.train_batch(9, 9, range(4), 4)
    parts = [open_data(text, BYTES, 8, 7).valid_batch(rows) for rows in ([0], [1, 2, 3], [4, 5])]
    assert torch.equal(whole.targets, torch.cat([part.targets for part in parts]))


def test_text_made_for_other_ids_is_refused(text):
    with pytest.raises(UserError) as caught:
        open_data(text, load_tokenizer("bpe"), 4, 4)
    assert all(part in str(caught.value) for part in ("'bytes'", BYTES.hash, "'bpe'", "--tokenizer=bpe"))


def test_a_stream_shorter_than_the_canvas_is_refused_with_the_numbers(tmp_path):
    folder = write_text(tmp_path / "t", [range(100)], [range(20)])
    open_data(folder, BYTES, 9, 10)
    with pytest.raises(UserError, match=r"valid part of 's0' has 20 tokens, but --input_len=10 --target_len=10 need 21"):
        open_data(folder, BYTES, 10, 10)


def test_a_folder_is_found_by_path_or_by_its_name_in_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr("data.dataset.PREPARED", tmp_path)
    write_task(tmp_path / "mine", [("a", "b")])
    for name in ("mine", str(tmp_path / "mine")):
        assert read_meta(name) == (tmp_path / "mine", {"kind": "task", "name": "mine", "metric": "exact"})
    assert PREPARED.name == "prepared"


def test_what_is_no_data_folder_is_refused_with_the_command_that_makes_one(tmp_path):
    (tmp_path / "file").touch()
    for wrong in ("text_that_is_not_there", str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="no data folder .*python data/prepare.py -h"):
            read_meta(wrong)
    with pytest.raises(UserError, match="file is a file: name the folder that it is in"):
        read_meta(tmp_path / "file")
    with pytest.raises(UserError, match="holds neither meta.json nor train.jsonl"):
        read_meta(tmp_path)
    for content in ("{", "[]", "{}", '{"kind": "image"}', "\x00"):
        (tmp_path / "meta.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="meta.json"):
            read_meta(tmp_path)
    (tmp_path / "meta.json").write_bytes(b'{"kind": "task\xff"}')
    with pytest.raises(UserError, match="meta.json"):
        read_meta(tmp_path)


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "train.prose.bin").unlink(), "is damaged .*train.prose.bin.*; prepare it again"),
    (lambda f: (f / "valid.code.bin").write_bytes(b""), "is damaged .*empty"),
    (lambda f: (f / "meta.json").write_text('{"kind": "text"}', encoding="utf-8"), "is damaged .*'tokenizer' is missing"),
    (lambda f: (f / "meta.json").write_text('{"kind": "task", "input_len": "8"}', encoding="utf-8"), "'input_len' must")])
def test_a_damaged_folder_is_refused_in_one_line(text, tmp_path, damage, message):
    shutil.copytree(text, tmp_path / "x")
    damage(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        open_data(tmp_path / "x", load_tokenizer("bytes"), 4, 4)
