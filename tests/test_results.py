"""The scripts of results/ on tiny runs: they end, their tables have the rows that were asked for, and mistakes are one line."""
import itertools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
import decoders
import figure3
import knobs
import markov
import orders
import table1
import tradeoff

from checkpoint import save_checkpoint
from config import UserError
from data.dataset import read_meta
from sample import DecodeConfig, load_writer


def rows_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_knobs_measures_every_knob_at_every_n(task, text, tmp_path, capsys):
    flags = ["--steps=40", "--pretrain_steps=20", "--n_examples=2", "--seeds=1", "--size=1x16x2", "--percents=0,10",
             "--knobs=from scratch,diffusion,shift,distilled,teacher"]
    knobs.main([f"--task={task}", f"--text={text}", f"--out={tmp_path}/knobs", *flags])
    rows = [line[:20].rsplit(maxsplit=1) for line in rows_of(tmp_path / "knobs" / "table.txt")[3:]]
    assert rows[:2] == [["from scratch", "0"], ["diffusion", rows[1][1]]] and 2 < int(rows[1][1]) < 22
    assert rows[2:] == [[name, n] for name in ("shift", "distilled", "teacher") for n in ("0", "2")]


def test_table1_fills_the_four_cells(task, text, tmp_path, monkeypatch):
    monkeypatch.setattr(table1, "prepared_text", lambda *args: text)
    few = ["--pretrain_steps=2", "--steps=2", "--n_examples=2", "--size=1x16x2"]
    table1.main([f"--tasks={task}", f"--out={tmp_path}/t", *few])
    rows = [line.split()[:2] for line in rows_of(tmp_path / "t" / "table.txt")[2:]]
    assert rows == [[a, o] for a in ("decoder-only", "encoder-decoder") for o in ("prefix", "span")]


def test_decoders_measures_every_decoder_at_every_number_of_steps(train, diff_run, tmp_path, monkeypatch):
    monkeypatch.setattr(decoders, "STEPS", (1, 2))
    absorbing = train("diff", tmp_path / "absorbing", "--process=absorbing")
    decoders.main([f"--models={diff_run.folder},{absorbing.folder}", "--n_examples=2", f"--out={tmp_path}/x"])
    rows = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    found = [(row["process"], row["decoder"], row["n_steps"]) for row in rows]
    assert len(found) == len(set(found)) == 2 * (4 + 6) and ("absorbing", "ancestral remask=1", 2) in found
    assert len(rows_of(tmp_path / "x.txt")) == 2 + len(found)
    with pytest.raises(UserError, match="are both uniform models of"):
        decoders.main([f"--models={diff_run.folder},{diff_run.folder}/ckpt.pt", f"--out={tmp_path}/y"])


def test_tradeoff_asks_every_way_for_every_example_and_scores_the_answers(ar_run, diff_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tradeoff.evaluation, "score", lambda metric, predictions, *args: {metric: (len(predictions), 0.0)})
    tradeoff.main([str(ar_run.folder), str(diff_run.folder), "--n_examples=3", f"--drafter={diff_run.folder}"])
    title, heading, *rows = capsys.readouterr().out.splitlines()
    names = ["AR", *tradeoff.WAYS, "AR, diffusion drafts", "AR, uniform drafts"]
    assert "3 test examples of backwards, one at a time; 0 left out" in title and [row[:24].strip() for row in rows] == names
    cells = {name: row[24:].split() for name, row in zip(names, rows)}
    assert all(c[:2] == ["exact", "3.0"] and float(c[4]) > 0 for c in cells.values())
    assert cells["AR"][5] == "1.00" and cells["5 steps"][3] == "5.0"
    with pytest.raises(UserError, match="is a model of the process 'uniform', not 'ar'"):
        tradeoff.main([str(diff_run.folder), str(ar_run.folder)])
    c = ar_run.checkpoint()
    save_checkpoint(tmp_path / "x.pt", c | {"config": c["config"] | {"data": None}})
    with pytest.raises(UserError, match="x.pt was trained elsewhere, on no task"):
        tradeoff.main([f"{tmp_path}/x.pt", str(diff_run.folder)])


def test_tradeoff_leaves_out_what_does_not_fit_the_canvas(ar_run, diff_run, capsys, monkeypatch):
    examples = [{"input": text, "target": text} for text in ("much too long", "ab", "abc")]
    monkeypatch.setattr(tradeoff.evaluation, "scored_examples", lambda *args: ("exact", examples))
    tradeoff.main([str(ar_run.folder), str(diff_run.folder)])
    assert "2 test examples of backwards, one at a time; 1 left out, too long" in capsys.readouterr().out
    del examples[1:]
    with pytest.raises(UserError, match="every input is longer than the models' 8 tokens"):
        tradeoff.main([str(ar_run.folder), str(diff_run.folder)])


def test_orders_of_a_model_that_knows_the_frequencies_alone_cost_the_same_bits(train, text, tmp_path, capsys):
    flags = ["--process=absorbing", "--input_len=0", "--target_len=8", "--steps=2"]
    run = train("diff", tmp_path / "lm", f"--data={text}", *flags)
    orders.main([str(run.folder), "--n_examples=4"])
    printed = capsys.readouterr().out.splitlines()[-3:]
    assert [line[:14].strip() for line in printed] == ["left to right", "right to left", "random"]
    assert all(0 < float(line[14:].split()[0]) < 100 for line in printed)
    writer = load_writer(str(run.folder), DecodeConfig(device="cpu"))
    writer.process.predict = lambda model, xt, t, context: torch.zeros(*xt.shape, 4)
    batch = type("Batch", (), dict(inputs=torch.zeros(3, 0, dtype=torch.long), pad_mask=None, targets=torch.zeros(3, 8).long()))
    assert torch.allclose(orders.bits(writer, batch, torch.arange(8).expand(3, -1)), torch.full((3,), 2.0))


MEASURED = {"decoding": [  # as bench.py --out writes it
    {"what": what, "dtype": dtype, "compiled": False, "batch": batch, "length": length, "seconds": batch * length / scale}
    for dtype, scale in (("float32", 100), ("bfloat16", 200)) for batch in (1, 4) for length in (128, 1024)
    for what in ("AR", "AR, no cache", "10 steps x 8 samples") if (what, length) != ("AR, no cache", 1024)]}


def test_figure3_tells_the_seconds_per_example_of_one_batch_and_dtype(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    (tmp_path / "x.json").write_text(json.dumps(MEASURED), encoding="utf-8")
    for flags, seconds in (([], ["1.2800", "10.2400"]), (["--dtype=bfloat16", "--batch=4"], ["0.6400", "5.1200"])):
        with pytest.raises(UserError, match="no plot: pip install matplotlib"):
            figure3.main([f"{tmp_path}/x.json", f"--out={tmp_path}/x.png", *flags])
        assert [line[24:].split() for line in capsys.readouterr().out.splitlines()[1:]] == [
            ["128", "1024"], seconds, [seconds[0], "-"], seconds]
    assert not (tmp_path / "x.png").exists()


def test_figure3_draws_a_line_for_every_way_of_decoding(tmp_path):
    axes = pytest.importorskip("matplotlib.axes")
    (tmp_path / "x.json").write_text(json.dumps(MEASURED), encoding="utf-8")
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(axes.Axes, "plot", lambda self, x, y, plot=axes.Axes.plot, **rest: (drawn.append((x, y, rest["label"])),
                                                                                         plot(self, x, y, **rest)))
        figure3.main([f"{tmp_path}/x.json", f"--out={tmp_path}/x.png"])
    assert drawn == [((128, 1024), (1.28, 10.24), "AR"), ((128,), (1.28,), "AR, no cache"),
                     ((128, 1024), (1.28, 10.24), "10 steps x 8 samples")]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    for out in ("x.nonsense", "nowhere/x.png"):
        with pytest.raises(UserError, match="cannot write --out="):
            figure3.main([f"{tmp_path}/x.json", f"--out={tmp_path}/{out}"])


@pytest.mark.parametrize("text, flags, message", [
    ("no JSON", [], "x.json is not what bench.py --out=FILE.json writes"), ("[1, 2]", [], "x.json is not what bench.py"),
    ('{"growth": []}', [], "or has no decoding in it"), ('{"decoding": [{"what": "AR"}]}', [], "x.json is not what bench.py"),
    ('{"decoding": []}', [], "no decoding of --dtype=None --batch=1, but of nothing"),
    (json.dumps(MEASURED), ["--batch=2"], "no decoding of --dtype=float32 --batch=2, but of float32 1, float32 4, bfloat16 1"),
    (json.dumps(MEASURED), ["--dtype=float16"], "no decoding of --dtype=float16 --batch=1, but of float32 1"),
    (json.dumps(MEASURED), ["--out=README.md"], "README.md exists"), (None, [], "cannot read .*: No such file")])
def test_figure3_refuses_what_is_no_such_measurement(text, flags, message, tmp_path):
    if text is not None:
        (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        figure3.main([f"{tmp_path}/x.json", f"--out={tmp_path}/x.png", *flags])


@pytest.mark.parametrize("script, flags, message", [
    (knobs, ["--task=code"], "code: scoring it means running programs"), (knobs, ["--knobs=shfit"], "did you mean 'shift'"),
    (knobs, ["--process=unifrom"], "did you mean 'uniform'"), (knobs, ["--percents=1,x"], "must be whole numbers"),
    (knobs, ["--percents=1", "--pretrain_steps=50"], "less than one of --pretrain_steps=50"),
    (knobs, ["--task=nowhere"], "no data folder 'nowhere'"), (knobs, ["--out=README.md"], "README.md exists"),
    (table1, ["--tasks=qa,nowhere"], "no data folder 'nowhere'"), (table1, ["--steps=0"], "--steps=0 must be at least 1"),
    (decoders, ["--models=nowhere"], "nowhere"), (orders, ["nowhere"], "nowhere"),
    (tradeoff, ["nowhere", "x"], "no checkpoint at nowhere"), (tradeoff, ["x", "y", "--n_examples=0"], "must be at least 1")])
def test_a_wrong_flag_is_refused_in_one_line(script, flags, message, monkeypatch, task):
    prepared = {"code": (task, {"kind": "task", "metric": "code"}), "qa": (task, {"kind": "task", "metric": "qa"})}
    monkeypatch.setattr("common.find_folder", lambda name: task)  # nothing has to be prepared
    monkeypatch.setattr("common.read_meta", lambda name: prepared.get(name) or read_meta(name))
    with pytest.raises(UserError, match=message):
        script.main(flags)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_the_entropy_that_markov_prints_is_that_of_all_windows(tmp_path, capsys, order):
    text, window = "abacabadcab", 5
    (tmp_path / "in.txt").write_text(text, encoding="utf-8")
    markov.main([f"{tmp_path}/in.txt", f"--order={order}", f"--window={window}", "--length=9", f"--out={tmp_path}/out.txt"])
    around, n, bits = text * 3, len(text), 0.0
    counted = lambda gram: sum(around[i:i + len(gram)] == gram for i in range(n))
    for letters in itertools.product(sorted(set(text)), repeat=window):
        w, p = "".join(letters), 1.0
        for i in range(window):  # the first characters as often as in the text, then each after the `order` before it
            before = w[max(0, i - order):i]
            p *= counted(before + w[i]) / max(1, counted(before)) if before else counted(w[i]) / n
        bits -= p * math.log2(p) if p else 0.0
    printed = capsys.readouterr().out
    assert float(re.search(r"([0-9.]+) in windows of 5", printed)[1]) == pytest.approx(bits / window, abs=1e-4)
    assert len((tmp_path / "out.txt").read_text(encoding="utf-8")) == 9


def test_markov_writes_only_what_may_follow_as_often_as_it_did():
    text = "aab" * 50 + "ab" * 25
    written = "".join(markov.chain(text, 1, 20_000, seed=3))
    pairs, expected = (Counter(zip(t, t[1:])) for t in (written, text + text[0]))
    assert set(pairs) == set(expected)
    share = lambda counts: counts["a", "a"] / (counts["a", "a"] + counts["a", "b"])
    assert abs(share(pairs) - share(expected)) < 0.02 and written != "".join(markov.chain(text, 1, 20_000, seed=4))


@pytest.mark.parametrize("flags, message", [
    (["--order=-1"], "--order=-1 must be at least 0"), (["--order=9"], "too few for --order=9"),
    (["--order=7", "--window=7"], "--window=7 must be longer than --order=7")])
def test_markov_refuses_what_makes_no_chain(tmp_path, flags, message):
    (tmp_path / "in.txt").write_text("abcdefg", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        markov.main([f"{tmp_path}/in.txt", f"--out={tmp_path}/out.txt", *flags])
    assert not (tmp_path / "out.txt").exists()
    with pytest.raises(UserError, match="no file .*nowhere.txt"):
        markov.main([f"{tmp_path}/nowhere.txt", f"--out={tmp_path}/out.txt"])
    (tmp_path / "out.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="out.txt exists; it is not overwritten"):
        markov.main([f"{tmp_path}/in.txt", f"--out={tmp_path}/out.txt"])
    with pytest.raises(UserError, match="cannot write --out="):
        markov.main([f"{tmp_path}/in.txt", f"--out={tmp_path}/in.txt/x.txt"])
