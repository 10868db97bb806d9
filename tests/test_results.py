"""The scripts of results/ on tiny runs: they end, their tables have the rows that were asked for, and mistakes are one line."""
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
import decoders
import knobs
import orders
import table1

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


@pytest.mark.parametrize("script, flags, message", [
    (knobs, ["--task=code"], "code: scoring it means running programs"), (knobs, ["--knobs=shfit"], "did you mean 'shift'"),
    (knobs, ["--process=unifrom"], "did you mean 'uniform'"), (knobs, ["--percents=1,x"], "must be whole numbers"),
    (knobs, ["--percents=1", "--pretrain_steps=50"], "less than one of --pretrain_steps=50"),
    (knobs, ["--task=nowhere"], "no data folder 'nowhere'"), (knobs, ["--out=README.md"], "README.md exists"),
    (table1, ["--tasks=qa,nowhere"], "no data folder 'nowhere'"), (table1, ["--steps=0"], "--steps=0 must be at least 1"),
    (decoders, ["--models=nowhere"], "nowhere"), (orders, ["nowhere"], "nowhere")])
def test_a_wrong_flag_is_refused_in_one_line(script, flags, message, monkeypatch, task):
    prepared = {"code": (task, {"kind": "task", "metric": "code"}), "qa": (task, {"kind": "task", "metric": "qa"})}
    monkeypatch.setattr("common.find_folder", lambda name: task)  # nothing has to be prepared
    monkeypatch.setattr("common.read_meta", lambda name: prepared.get(name) or read_meta(name))
    with pytest.raises(UserError, match=message):
        script.main(flags)
