"""The scripts of experiments/ on tiny runs: they end, their tables have the rows they should, and mistakes are one line."""
import json

import pytest
from matplotlib.axes import Axes

from data.dataset import read_meta
from engine.cli import UserError
from experiments import decoders, figure3, knobs, table1

MEASURED = {"decoding": [  # as bench.py --out writes it
    {"what": what, "dtype": dtype, "compiled": False, "batch": batch, "length": length, "seconds": batch * length / scale}
    for dtype, scale in (("float32", 100), ("bfloat16", 200)) for batch in (1, 4) for length in (128, 1024)
    for what in ("AR", "AR, no cache", "10 steps x 8 samples") if (what, length) != ("AR, no cache", 1024)]}


def rows_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_knobs_measures_every_knob_at_every_n(task, text, tmp_path, capsys):
    flags = ["--steps=40", "--pretrain_steps=20", "--n_examples=2", "--seeds=1", "--size=1x16x2", "--percents=0,10",
             "--knobs=from scratch,diffusion,shift,teacher"]
    knobs.main([f"--task={task}", f"--text={text}", f"--out={tmp_path}/knobs", *flags])
    rows = [line[:20].rsplit(maxsplit=1) for line in rows_of(tmp_path / "knobs" / "table.txt")[3:]]
    assert rows[:2] == [["from scratch", "0"], ["diffusion", rows[1][1]]] and 2 < int(rows[1][1]) < 22
    assert rows[2:] == [[name, n] for name in ("shift", "teacher") for n in ("0", "2")]


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
    assert len(rows_of(tmp_path / "x.txt")) == 2 + len(found) and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="are both uniform models of"):
        decoders.main([f"--models={diff_run.folder},{diff_run.folder}/ckpt.pt", f"--out={tmp_path}/y"])


def test_figure3_tells_the_seconds_per_example_of_one_batch_and_dtype(tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps(MEASURED), encoding="utf-8")
    for flags, seconds in (([], ["1.2800", "10.2400"]), (["--dtype=bfloat16", "--batch=4"], ["0.6400", "5.1200"])):
        figure3.main([f"{tmp_path}/x.json", f"--out={tmp_path}/{len(flags)}.png", *flags])
        assert [line[24:].split() for line in capsys.readouterr().out.splitlines()[1:]] == [
            ["128", "1024"], seconds, [seconds[0], "-"], seconds]


def test_figure3_draws_a_line_for_every_way_of_decoding(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(MEASURED), encoding="utf-8")
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "plot", lambda self, x, y, plot=Axes.plot, **rest: (drawn.append((x, y, rest["label"])),
                                                                               plot(self, x, y, **rest)))
        figure3.main([f"{tmp_path}/x.json", f"--out={tmp_path}/x.png"])
    assert drawn == [((128, 1024), (1.28, 10.24), "AR"), ((128,), (1.28,), "AR, no cache"),
                     ((128, 1024), (1.28, 10.24), "10 steps x 8 samples")]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    for out in ("x.nonsense", "nowhere/x.png"):
        with pytest.raises(UserError, match="cannot write --out="):
            figure3.main([f"{tmp_path}/x.json", f"--out={tmp_path}/{out}"])


@pytest.mark.parametrize("text, flags, message", [
    ("no JSON", [], "not what experiments/bench.py --out=FILE.json writes"), ("[1, 2]", [], "not what experiments/bench.py"),
    ('{"growth": []}', [], "or has no decoding in it"), ('{"decoding": [{"what": "AR"}]}', [], "not what experiments/bench.py"),
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
    (decoders, ["--models=nowhere"], "nowhere")])
def test_a_wrong_flag_is_refused_in_one_line(script, flags, message, monkeypatch, task):
    prepared = {"code": (task, {"kind": "task", "metric": "code"}), "qa": (task, {"kind": "task", "metric": "qa"})}
    monkeypatch.setattr("experiments.common.find_folder", lambda name: task)  # nothing has to be prepared
    monkeypatch.setattr("experiments.common.read_meta", lambda name: prepared.get(name) or read_meta(name))
    with pytest.raises(UserError, match=message):
        script.main(flags)


