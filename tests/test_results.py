"""reproduce.py, compare.py and plot.py on tiny runs: cells run once, tables say what the numbers are, mistakes are one line."""
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

import demo
import reproduce
from autoregressive import Autoregressive, cross_entropy
from beyond.guide import Guide, GuideConfig
from conftest import CHECKPOINT, train_noise
from data import dataset
from data.dataset import Batch
from data.tasks import read_jsonl
from data.tokenizer import load_tokenizer
from diffusion import Uniform
from engine import cli
from engine.checkpoint import save_checkpoint
from engine.cli import UserError
from experiments import bench, cells, compare, plot, real, recipes, report, tables
from model import Transformer

TINY = tables.Scale(2, ("1x8x2", "1x16x2"), 4, 2, 2, dict.fromkeys(("translate", "qa", "code", "plan"), (8, 2)), (8, 8))
ROOT = Path(reproduce.__file__).parent


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Let scale demo be tiny, with a text that is made at once."""
    monkeypatch.setitem(tables.SCALES, "demo", TINY)
    monkeypatch.setattr(tables, "unpaired", partial(tables.unpaired, n=20))
    (tmp_path / "some.txt").write_text("a few words of text. " * 200, encoding="utf-8")
    whole = tables.prepare.main
    monkeypatch.setattr(tables.prepare, "main", lambda words: whole(
        [w for w in words if not w.startswith("--sources")] + [f"--sources={tmp_path}/some.txt"] * (words[0] == "text")))
    return [f"--out={tmp_path}/r", "--allow_code_execution"]


def calls_of(monkeypatch):
    """Let scripts run in this process, one after the other; return the list of those that ran."""
    calls, call = [], cells.call
    monkeypatch.setattr(cells, "n_cores", lambda: 1)
    monkeypatch.setattr(cells, "apart", lambda function, *args: function(*args))
    monkeypatch.setattr(cells, "call", lambda script, *words: calls.append(script) or call(script, *words))
    return calls


@pytest.mark.slow
def test_a_table_is_filled_once_its_stages_are_shared_and_it_can_be_drawn_again(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tables, "SHARES", {"50 %": 0.5})
    monkeypatch.setattr(tables, "PAPER_TASKS", 1)
    monkeypatch.setitem(tables.SCALES, "demo", TINY._replace(sizes=("1x8x2",)))
    calls = calls_of(monkeypatch)
    found = reproduce.main(["--what=table2", *tiny])["table2"]["entries"]
    rows = list(dict.fromkeys(e["row"] for e in found))
    assert len(rows) == 6 and {e["column"] for e in found} == {"translate 1x8x2"}
    assert all(len(e["seeds"]) == 2 for e in found)
    # On text AR, two kinds of diffusion, stage 2 with and without shift; 6 fine-tunings and evaluations
    assert calls.count("eval.py") == 2 * 6 and len(calls) == 2 * (5 + 6 + 6), "each stage once"
    table = (tmp_path / "r/demo/table2.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out and "standard error over them" in table
    del calls[:]
    assert reproduce.main(["--what=table2", *tiny])["table2"]["entries"] == found and not calls
    (tmp_path / "r/demo/table2.md").unlink()
    reproduce.main(["--what=table2", *tiny, "--draw"])
    assert (tmp_path / "r/demo/table2.md").read_text(encoding="utf-8") == table and not calls
    (tmp_path / "copy/demo").mkdir(parents=True)
    (tmp_path / "copy/demo/table2.json").write_bytes((tmp_path / "r/demo/table2.json").read_bytes())
    reproduce.main(["--what=table2", f"--out={tmp_path}/copy", "--draw"])  # of its own file alone
    assert (tmp_path / "copy/demo/table2.md").read_text(encoding="utf-8") == table
    known = sorted((tmp_path / "r/demo/cells").glob("*.json"))
    known[0].unlink()
    reproduce.main(["--what=table2", *tiny])
    assert calls == ["eval.py"], "what is missing, and nothing else"
    monkeypatch.setattr(cells, "code_version", lambda: "another")
    with pytest.raises(UserError, match="of another version of the code.*this is another.*--refresh"):
        reproduce.main(["--what=table2", *tiny])
    reproduce.main(["--what=table2", *tiny, "--draw", "--refresh"])
    assert len(list((tmp_path / "r/demo/cells").glob("*.json"))) == 12, "--draw deletes nothing"
    del calls[:]
    reproduce.main(["--what=table2", *tiny, "--refresh"])
    assert calls.count("eval.py") == 12 and len(calls) == 2 * (5 + 6 + 6), "all of it again, stages too"


@pytest.mark.slow
def test_every_table_can_be_run(tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(tables.SCALES, "demo", TINY._replace(seeds=1))
    monkeypatch.setattr(tables, "KNOBS", {"plain": {}, "AR loss": {"ar_weight": 0.5}})
    done = []

    def call(script, *words):  # what a script would give, without the minutes
        done.append(script)
        bits = "--metric=bits" in words
        if script.startswith("train"):
            save_checkpoint(Path(words[-1].removeprefix("--out_dir="), "ckpt.pt"), CHECKPOINT | {"step": 1})
        return [{"per_byte": [2, 0.1]} if bits else {"scores": {"x": [50, 1]}, "seconds": 1, "evaluations": 1}]
    monkeypatch.setattr(cells, "apart", lambda function, *args: function(*args))
    monkeypatch.setattr(cells, "call", call)
    monkeypatch.setattr(dataset, "PREPARED", tmp_path / "prepared")
    for folder, words in real.SOURCES.items():
        for name in ("real", "recipes_real"):
            with pytest.raises(UserError, match=f"no data/prepared/{folder}; python data/prepare.py {words} makes it"):
                reproduce.main([f"--what={name}", *tiny])
        (tmp_path / "prepared" / folder).mkdir(parents=True)
    monkeypatch.setattr(real, "write_data", lambda lab: None)  # that needs a tokenizer of 93 MB
    monkeypatch.setattr(cells.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 50))  # for weights that are not made
    found = reproduce.main([f"--what={','.join(tables.TABLES)}", *tiny])
    assert set(found) == set(tables.TABLES) and all(table["entries"] for table in found.values())
    pictures = {path.name for path in (tmp_path / "r/demo").glob("*.png")}
    assert {"curves_translate.png", "curves_code.png", "decoders_code.png", "real_squad_short.png",
            "real_seconds_squad_short.png", "real_code_line_middle.png", "recipes_seconds_code.png",
            "recipes_evaluations_qa.png", "recipes_real_seconds_captions.png", "recipes_real_seconds_squad_short_smollm2.png",
            } <= pictures
    assert {name.split("_")[1] for name in pictures if name.startswith("recipes_")} == {"evaluations", "seconds", "real"}
    for name, (function, reference) in tables.TABLES.items():
        assert function.__doc__ and reference in {e["row"] for e in found[name]["entries"]}, name


def test_of_a_real_task_those_examples_are_written_again_that_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "PREPARED", tmp_path)
    monkeypatch.setattr(real, "load_tokenizer", lambda name: load_tokenizer("bytes"))
    monkeypatch.setattr(real, "TASKS", {"short": ("squad", (80, 12), 1, 1)})
    for made in ("code", real.TEXT):
        (tmp_path / made).mkdir()
    fits, long_input, long_target = ({"input": "i" * i, "target": "t" * t, "references": ["t"]} for i, t in (
        (80, 11), (81, 1), (1, 12)))  # a target is closed by EOS
    (tmp_path / "squad").mkdir()
    for split, rows in {"train": [long_input, fits, long_target], "valid": [long_input], "test": [fits]}.items():
        (tmp_path / f"squad/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "squad/meta.json").write_text('{"kind": "task", "metric": "qa", "input_len": 640, "target_len": 48}')
    real.write_data(SimpleNamespace(folder=tmp_path))
    assert {path.name: read_jsonl(path) for path in (tmp_path / "short").glob("*.jsonl")} == {
        "train.jsonl": [fits], "test.jsonl": [fits]}
    meta = json.loads((tmp_path / "short/meta.json").read_text())
    assert meta == {"kind": "task", "name": "short", "metric": "qa", "input_len": 80, "target_len": 12}


def test_a_stage_is_known_by_all_that_it_is_made_of(tiny, tmp_path):
    lab = tables.Lab(TINY, tmp_path / "r")
    lab.prepare()
    ar = lab.pretrain("train_ar.py", 0, size="1x8x2")
    stages = [ar, lab.pretrain("train_ar.py", 1, size="1x8x2"), lab.pretrain("train_diff.py", 0, size="1x8x2"),
              lab.tune("translate", 0, ar), lab.tune("translate", 0, ar, shift="true"), lab.tune("qa", 0, ar),
              lab.tune("translate", 0, size="1x8x2"), lab.tune("translate", 0, lab.adapt(ar, 0, 0.5))]
    assert len({stage.key for stage in stages}) == len(stages)
    assert lab.pretrain("train_ar.py", 0, size="1x8x2").key == ar.key and stages[-1].lineage[0] == ar
    assert lab.tune("translate", 0, ar, process="uniform", shift="false") == stages[3], "a default, named, is no other run"
    before = stages[3].key
    path = lab.folder / "translate/train.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("the", "a"), encoding="utf-8")
    cells.content.cache_clear()
    assert stages[3].key != before and ar.key == lab.pretrain("train_ar.py", 0, size="1x8x2").key, "of its own data alone"
    assert stages[2].work / ar.work == pytest.approx(1 / lab.equal_flops("1x8x2"))


def test_a_folder_with_a_name_holds_the_run_that_was_asked_for_last(tiny, monkeypatch, tmp_path):
    calls, lab = calls_of(monkeypatch), tables.Lab(TINY, tmp_path / "r")
    lab.prepare()
    first, second = (lab.pretrain("train_ar.py", seed, size="1x8x2") for seed in (0, 1))
    store = cells.Store(tmp_path / "r", {first.key: "ar", second.key: "ar"})
    store.stages.mkdir()
    for stage, trained in ((first, 1), (first, 1), (second, 2), (first, 3)):
        store.do(stage)
        assert len(calls) == trained and store.done(stage)
        assert cells.read_checkpoint(tmp_path / "r/stages/ar/ckpt.pt")["config"]["seed"] == stage.flag("seed")
    assert not store.done(second)


def test_the_scale_of_the_paper_has_its_numbers():
    """Section 4.2 of arXiv 2401.17181: steps, batch, sequence length, fine-tuning steps of each task and their rate."""
    paper = tables.SCALES["paper"]
    assert (paper.pretrain, paper.batch, sum(paper.canvas), paper.lrs[2]) == (1_000_000, 128, 1024, 1e-3)
    assert {task: steps for task, (_, steps) in paper.tasks.items()} == {"wmt14": 500_000, "squad": 250_000, "mbpp": 5_000}


@pytest.mark.parametrize("what, tables_of_it", [("all", {"table1", "figure3"}), ("all,real", {"real"}), ("real,all", {"real"}),
                                                  ("all,recipes_real", {"recipes_real"})])
def test_all_is_all_but_what_wants_a_download_which_may_be_said_too(what, tables_of_it):
    names = reproduce.chosen(reproduce.Config(scale="cpu", what=what))
    assert tables_of_it <= set(names) and len(names) == len(set(names))
    assert {name for name in names if "real" in name} == {name for name in what.split(",") if "real" in name}


def test_a_recipe_costs_what_its_row_says_and_starts_where_ar_does(tmp_path):
    """Every recipe at the steps, and at the FLOPs, of the paper's; all from one AR model; one answer at a time."""
    lab = tables.Lab(tables.SCALES["cpu"], tmp_path)
    for make in (recipes.cells, recipes.real_cells):
        found = list(make(lab, 0))
        assert all(dict(cell.flags)["batch_size"] == 1 for cell in found)
        for task in {cell.column.split(",")[0] for cell in found}:
            stages = {cell.row: cell.stage for cell in found if cell.column.split(",")[0] == task}
            usual, alone = stages["the paper's"], {row for row in stages if row in recipes.RECIPES}
            assert alone == set(recipes.RECIPES) and len({stages[row].key for row in alone}) == len(alone)
            assert {stages[row].flag("steps") for row in alone} == {usual.flag("steps")}
            equal = {row for row in stages if "equal FLOPs" in row}
            for stage in (stages[row] for row in equal):  # as near as whole steps can be
                assert abs(stage.work - usual.work) <= stage.work / stage.flag("steps") / 2
            assert {row.removesuffix(", equal FLOPs") for row in equal} == {
                row for row in alone if not 0.95 < usual.work / stages[row].work < 1.05}
            origins = {(stages[row].origin and stages[row].origin.key, stages[row].flag("init_from")) for row in alone}
            ar = stages["AR"]
            assert origins == {(ar.key, None) if task == "plan" else (ar.origin and ar.origin.key, ar.flag("init_from"))}


@pytest.mark.parametrize("flags", [*recipes.RECIPES.values(), {"n_draws": 3, "ar_weight": 1.0},
                                   {"n_draws": 2, "self_condition": 0.5, "n_unroll": 1}], ids=str)
def test_the_flops_of_a_recipe_are_those_that_pytorch_counts_in_its_matrix_products(flags):
    """Of a text without inputs all that a step multiplies; and inputs as often as they are read (behind the last layer no
    gradient reaches them, which is left out)."""
    help = {name: flags[name] for name in flags if name in ("n_draws", "ar_weight")}
    process = Uniform(4000, **{name: flags[name] for name in flags if name not in help})
    guide = Guide(process, Autoregressive(4001, 1, 0), GuideConfig(**help))
    model = Transformer(4096, 2, 16, 2, self_condition="self_condition" in flags)

    def counted(S, backward=True):
        batch = Batch(torch.zeros(4, S, dtype=torch.long), None, torch.zeros(4, 6, dtype=torch.long))
        with FlopCounterMode(display=False) as counter:
            total = guide.loss(model, batch, train_noise(batch), cross_entropy).total
            if backward:
                total.backward()
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))

    def planned(S):
        step = {"size": "2x16x2", "batch_size": 4, "steps": 1, "input_len": S, "target_len": 6}
        return cells.Stage("train_diff.py", "x", (*step.items(), *flags.items())).work

    assert planned(0) == pytest.approx(counted(0), rel=1e-9)
    assert planned(8) - planned(0) == pytest.approx(3 * (counted(8, False) - counted(0, False)), rel=1e-9)


def test_a_dry_run_tells_the_work_and_does_none(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cells, "call", None)
    for scale in tables.SCALES:
        reproduce.main([f"--scale={scale}", "--what=all,table1", "--dry_run", *tiny])
        shown = capsys.readouterr().out
        assert "table2       0 of " in shown and "TFLOP" in shown and "minutes" in shown
        needed = {line.split()[0]: float(line.split(" TFLOP")[0].split()[-1]) for line in shown.splitlines() if "TFLOP" in line}
        assert needed["table2"] < needed.pop("together") < sum(needed.values()) or scale == "demo", "shared stages once"
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX")
def test_killed_at_any_time_and_started_again_it_gives_the_same_table(tiny, monkeypatch, tmp_path):
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}]
import reproduce
from experiments import tables
tables.SCALES["demo"] = tables.Scale(1, ("1x8x2",), 40, 2, 2, {{"translate": (8, 40)}}, (8, 8))
def few(lab, seed):
    "Two rows."
    ar = lab.pretrain("train_ar.py", seed)
    yield lab.cell("AR", "translate", lab.tune("translate", seed, ar, "train_ar.py"))
    yield lab.cell("AR2Diff_0", "translate", lab.tune("translate", seed, ar))
tables.TABLES["table2"] = few, "AR"
real = tables.prepare.main
tables.prepare.main = lambda words: real([w for w in words if not w.startswith("--sources")]
                                         + ["--sources={tmp_path}/some.txt"] * (words[0] == "text"))
reproduce.main(["--what=table2", "--allow_code_execution", "--out=" + sys.argv[1]])"""
    run = lambda name: subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)], stdout=subprocess.DEVNULL)
    assert run("whole").wait() == 0
    for n in (1, 3):  # somewhere in stage 1, in stage 3
        process = run("killed")
        while len(list(tmp_path.glob("killed/demo/stages/*/started.json"))) < n and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.3)
        process.kill()  # its cell goes on, apart; the next run waits for that
        process.wait()
    assert run("killed").wait() == 0
    tables_of = [json.loads((tmp_path / name / "demo/table2.json").read_text(encoding="utf-8")) for name in ("whole", "killed")]
    for table in tables_of:
        for e in table["entries"]:
            del e["seconds"], e["training_seconds"]
    assert tables_of[0] == tables_of[1]


def result(score, work=1e12, **more):
    return {"work": work, "commit": "abc", "result": {"scores": {"bleu": [score, 2.0]}, "seconds": 1, "evaluations": 1, **more}}


def test_the_program_marks_what_lies_within_two_standard_errors_of_the_reference():
    lab = [("a", 50), ("a", 52), ("b", 52), ("b", 54), ("c", 60), ("c", 62), ("d", 51), ("e", 80)]
    known = [tables.Cell(row, "x", i, None) for i, (row, _) in enumerate(lab)]
    entries = report.collect(known, [result(score) for _, score in lab])
    at = {e["row"]: e for e in entries}
    assert (at["a"]["mean"], at["a"]["se"]) == (51, 2 / 2 ** 0.5), "not below the luck of the examples"
    assert at["d"]["se"] == 2 and at["c"]["mean"] == 61, "a single seed has the error of its examples"
    lines = {line.split(" |")[0].strip("| "): line for line in report.markdown(entries, "a")}
    assert [row for row in "abcde" if " = |" in lines[row]] == ["b", "d"]
    assert "| 51.0 +- 1.4 |" in lines["a"] and "seeds: 1 to 2" in report.markdown(entries, "a")[-1]
    one = lambda mean, se: {"mean": mean, "se": se, "seeds": {0: mean}}
    assert not report.differs(one(1, math.nan), one(9, 0)), "an unknown error decides nothing"


def test_seeds_that_both_rows_have_are_compared_one_by_one():
    rows = {"a": (10, 50, 90), "b": (15, 56, 94), "c": (15, 40, 99), "d": (11, 51, 91)}
    known = [tables.Cell(row, "x", seed, None) for row, scores in rows.items() for seed in range(len(scores))]
    entries = report.collect(known, [result(score) for scores in rows.values() for score in scores])
    at = {e["row"]: e for e in entries}
    assert report.differs(at["b"], at["a"]), "+5 +- 0.6, though the seeds of either differ by 80"
    assert not report.differs(at["c"], at["a"]), "+1.3 +- 5.8"
    assert not report.differs(at["d"], at["a"]), "+1 +- 0, but the examples alone leave 1.2"


@pytest.mark.parametrize("text", ["[1]", "{}", "5", "", "{", '{"code": 1}', '{"code": "x", "work": "much"}'])
def test_damaged_results_are_one_line(text, tiny, monkeypatch, tmp_path):
    lab = tables.Lab(TINY, tmp_path / "r/demo")
    lab.prepare()
    cell = next(tables.bits(lab, 0))
    for path in (f"cells/{cell.key}.json", f"stages/{cell.stage.key}/done.json"):
        file = tmp_path / "r/demo" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="json: .*; delete it, and it is made again"):
            reproduce.main(["--what=bits", "--dry_run", *tiny])
        file.unlink()


def test_a_single_task_has_all_tables_too(tiny, monkeypatch):
    monkeypatch.setitem(tables.SCALES, "demo", TINY._replace(tasks={"translate": (8, 2)}))
    reproduce.main(["--what=all", "--dry_run", *tiny])


def test_the_code_version_sees_the_code_that_numbers_depend_on(monkeypatch, tmp_path):
    for name in ("model.py", "demo.py"):
        (tmp_path / name).write_text("x = 1  # a\n", encoding="utf-8")
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    first = cells.code_version()
    (tmp_path / "demo.py").write_text("x = 2\n", encoding="utf-8")
    assert cells.code_version() == first
    (tmp_path / "model.py").write_text("x = 2\n", encoding="utf-8")
    assert cells.code_version() != first


def test_what_a_run_of_other_code_left_is_not_finished_as_if_it_were_of_this(tiny, monkeypatch, tmp_path):
    calls = calls_of(monkeypatch)
    with monkeypatch.context() as patch:  # the code is edited while the first stage runs: trained whole, but not done
        versions = itertools.chain([cells.code_version()], itertools.repeat("edited"))
        patch.setattr(cells, "code_version", lambda: next(versions))
        with pytest.raises(UserError, match="the code was edited"):
            reproduce.main(["--what=bits", *tiny])
    assert calls[0] == "train_ar.py" and list((tmp_path / "r/demo/stages").glob("*/ckpt.pt"))
    del calls[:]
    monkeypatch.setattr(cells, "code_version", lambda: "another")
    reproduce.main(["--what=bits", *tiny])
    assert calls.count("train_ar.py") == 2, "of both seeds, that of the first again"


@pytest.mark.parametrize("flags, message", [
    (["--scale=laptop"], "scale='laptop' is not one of demo, cpu"), (["--what=table9"], "did you mean 'table"),
    (["--scale=gpu", "--what=plan"], "scale 'gpu' has no such task"),
    (["--what=table3", "--draw"], "table3.json: No such file or directory; --what=table3, without --draw, makes it"),
    (["--what=bits", "--out=README.md"], "Not a directory: 'README.md"),
    (["--scale=gpu", "--what=table3"], "no data/prepared/.*prepare.py .* --from_dir=FOLDER makes it")])
def test_reproduce_refuses_what_it_cannot_do(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "find_folder", lambda name: None)
    with pytest.raises((UserError, OSError), match=message):
        reproduce.main([f"--out={tmp_path}/r", *flags])


def test_reproduce_runs_no_code_unasked_and_wants_room_on_the_disk(tiny, monkeypatch):
    with pytest.raises(UserError, match="--allow_code_execution"):
        reproduce.main(["--what=table3", tiny[0]])
    monkeypatch.setattr(cells.shutil, "disk_usage", lambda _: type("", (), {"free": 10}))
    with pytest.raises(UserError, match="needs about .* GB more, its disk has 0.0 GB free"):
        reproduce.main(["--what=bits", *tiny])


def leave(code):
    os._exit(code)


def refuse():
    raise UserError("one line")


def test_what_fails_in_a_process_of_its_own_is_told_here(monkeypatch):
    assert cells.apart(str.upper, "a") == "A"
    for function, args, kind, message in ((refuse, (), UserError, "^one line$"), (int, ("x",), ValueError, "invalid literal"),
                                          (leave, (3,), UserError, "ended without a word")):
        with pytest.raises(kind, match=message):
            cells.apart(function, *args)
    with pytest.raises(UserError, match="python train_ar.py --data=nowhere: no data folder 'nowhere'"):
        cells.call("train_ar.py", "--data=nowhere")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX")
def test_what_runs_in_a_process_of_its_own_ends_when_it_is_done_though_nobody_waits_any_more(tmp_path):
    (tmp_path / "nap.py").write_text("import os, sys, time\nfrom pathlib import Path\ndef nap(path):\n"
                                     "    Path(path).write_text(str(os.getpid()))\n    time.sleep(1)\n"
                                     "    Path(path + '.done').touch()\n", encoding="utf-8")
    code = "import sys, nap\nfrom experiments.cells import apart\napart(nap.nap, sys.argv[1])"
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")], stderr=subprocess.DEVNULL,
                              env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])})

    def wait_for(condition):
        end = time.time() + 120
        while not condition():
            assert time.time() < end
            time.sleep(0.05)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    wait_for((tmp_path / "pid.done").exists)

    def gone():
        try:
            os.kill(int((tmp_path / "pid").read_text()), 0)
        except ProcessLookupError:
            return True
    wait_for(gone)


# ---- compare.py ----

def test_models_are_compared_pair_by_pair_with_their_seeds(ar_run, diff_run, tmp_path, capsys):
    out = tmp_path / "c"
    entries = compare.main([f"AR={ar_run.folder},{ar_run.folder}/best.pt; diffusion={diff_run.folder}", f"--out={out}"])
    lines = Path(f"{out}.md").read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[3].strip() != "" for line in lines[2:4]] == [True, False], "one seed has no error over seeds"
    assert [(e["name"], e["n_seeds"]) for e in entries] == [("AR", 2), ("diffusion", 1)]
    saved = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
    assert len(saved["results"]) == 3 and saved["results"][0]["training_seed"] == 0 and "commit" in saved["results"][0]
    assert Path(f"{out}.md").read_text(encoding="utf-8") in capsys.readouterr().out + "\n"
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="exists; it is not overwritten"):
        compare.main([f"AR={ar_run.folder}", f"--out={out}"])


def test_a_paired_difference_is_surer_than_the_scores_themselves():
    rest = {"seconds": 1, "evaluations": 1, "checkpoint": "", "training_seed": 0, "commit": ""}
    row = lambda shift: [{"scores": {"f1": [0, 0]}, "values": [10 * i + shift for i in range(10)], **rest}]
    e = compare.entry("b", row(3), row(0))
    assert (e["difference"], e["difference_error"]) == (3, 0) and e["over_examples"] > 9
    assert compare.markdown([compare.entry("a", row(0), row(0)), e], "f1")[3].count("=") == 0


@pytest.mark.parametrize("runs, message", [
    ("out/a", "is not NAME=CHECKPOINT"), (";", "no runs"), ("A=--help", "is not NAME=CHECKPOINT"),
    ("A=,x", "is not NAME=CHECKPOINT"), ("=x", "is not NAME=CHECKPOINT"), ("A=x,./x", "names a checkpoint twice"),
    ("A=x; A=y", "'A' is named twice"), ("A=nowhere", "nowhere")])
def test_compare_refuses_what_names_no_runs(runs, message, tmp_path):
    with pytest.raises(UserError, match=message):
        compare.main([runs, f"--out={tmp_path}/c"])


def test_models_of_different_tasks_are_not_compared(train, ar_run, task, tmp_path):
    (tmp_path / "other").mkdir()
    for path in task.iterdir():
        if path.suffix in (".json", ".jsonl"):
            (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    other = train("ar", tmp_path / "run", f"--data={tmp_path / 'other'}", "--steps=1")
    with pytest.raises(UserError, match="trained on different data"):
        compare.main([f"A={ar_run.folder}; B={other.folder}", f"--out={tmp_path}/c"])
    assert not list(tmp_path.glob("c.*"))


# ---- plot.py ----

def test_a_plot_shows_the_curves_of_runs_on_the_terminal_and_as_a_picture(ar_run, diff_run, tmp_path, capsys):
    plot.main([f"{ar_run.folder},{diff_run.folder}", f"--out={tmp_path}/x.svg"])
    shown = capsys.readouterr().out
    assert f"o {ar_run.folder}   x {diff_run.folder}" in shown and "<svg" in (tmp_path / "x.svg").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (diff_run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = [(row["step"], row["first_pass"]) for row in rows if row.get("split") == "valid"]
    assert plot.curve(diff_run.folder) == expected


def test_the_terminal_plot_puts_every_point_where_it_belongs():
    lines = plot.terminal({"a": [(0, 1.0), (10, 3.0)], "b": [(5, 2.0)]}, width=11, height=3)
    assert [line[10:] for line in lines[:3]] == ["          o", "     x", "o"] and lines[0].strip().startswith("3 |")
    assert lines[-1] == "o a   x b" and plot.terminal({"flat": [(1, 5.0)]}, 5, 2)


@pytest.mark.parametrize("xs", [(20, 60, 180), (8.83, 10, 19.07, 19.67, 19.72), (0.31, 0.52, 1.04)])
def test_ticks_stand_at_few_whole_numbers_alone_so_that_no_two_overlap(xs, tmp_path, monkeypatch):
    def look(figure, *_, **__):
        figure.canvas.draw()
        axis = figure.axes[0].xaxis
        boxes = [t.get_window_extent() for t in [*axis.get_ticklabels(), *axis.get_minorticklabels()] if t.get_text()]
        left, right = figure.axes[0].bbox.intervalx
        boxes = sorted((box.x0, box.x1) for box in boxes if box.width and left <= (box.x0 + box.x1) / 2 <= right)
        assert len(boxes) > 1 and all(end <= start for (_, end), (start, _) in zip(boxes, boxes[1:])), boxes
        assert xs != (20, 60, 180) or [*axis.get_majorticklocs()] == [*xs]
        tmp_path.joinpath("seen").touch()
    monkeypatch.setattr(Figure, "savefig", look)
    plot.picture({"a": [(x, 1.0, 0.1) for x in xs]}, tmp_path / "x.png", xscale="log")
    assert (tmp_path / "seen").exists()


@pytest.mark.parametrize("flags, message", [
    (["nowhere"], "cannot read nowhere.metrics.jsonl; name the out_dir"), (["{run},{run}"], "each once"),
    (["{run}", "--out=nowhere/x.png"], "cannot write --out="), (["{run}", "--out=x"], "must end in .png")])
def test_plot_refuses_what_it_cannot_draw(flags, message, ar_run):
    with pytest.raises(UserError, match=message):
        plot.main([flag.format(run=ar_run.folder) for flag in flags])


@pytest.mark.parametrize("line", ["5", "{}", "nonsense", *(
    '{"split": "valid", "step": 1, "loss": ' + x for x in ("null}", "NaN}", '"x"}'))])
def test_a_plot_of_a_damaged_log_is_one_line(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="metrics.jsonl holds no validation loss"):
        plot.curve(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"split": "valid", "step": 5, "loss": 2.5}\n{"split": "valid", "step": 6, "lo')
    assert plot.curve(tmp_path) == [(5, 2.5)], "what is sound is drawn"


def test_seconds_of_training_count_a_resumed_run_whole(tmp_path, monkeypatch):
    lab = tables.Lab(tables.SCALES["demo"], tmp_path / "r")
    cell = lab.cell("x", "translate", lab.tune("translate", 0, size="1x8x2"))
    monkeypatch.setattr(cells, "call", lambda *words: [{}])
    for share, seconds in ((1, 10), (0.25, 40), (0, math.nan)):  # of its steps, those behind the last stop
        monkeypatch.setattr(cells.Store, "done", lambda self, stage, share=share: {"work": share * stage.work, "seconds": 10.0})
        store = cells.Store(tmp_path / str(share))
        store.cells.mkdir(parents=True)
        store.measure(cell)
        assert cells.known(store.place(cell), {})["training_seconds"] == pytest.approx(seconds, nan_ok=True)


def test_where_there_are_lines_no_row_is_a_single_point(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(reproduce, "picture", lambda lines, path, *labels, **more: drawn.update({path.name: lines}))
    reproduce.draw(tmp_path, "real", [dict(row=row, column=column, mean=mean, se=1.0, metric="f1") for row, column, mean in (
        ("AR", "squad 8", 10), ("AR", "squad 16", 20), ("uniform", "squad 16", 5), ("AR", "en_fr 8", 1), ("AR", "bits", 2))])
    assert drawn == {"real_squad.png": {"AR": [(8, 10, 1.0), (16, 20, 1.0)]}, "real_en_fr.png": {"AR": [(8, 1, 1.0)]}}


# ---- figure 3 ----

def test_figure3_measures_once_and_shows_seconds(tmp_path, monkeypatch, capsys):
    measured, drawn = [], []

    def bench_decoding(config, device, lengths, n_steps):
        measured.append((config.input_len, *lengths))
        for what in ("AR", "5 steps") if len(measured) < 3 else ("AR",):
            yield dict(what=what, seconds=measured[-1][1] / 100)
    monkeypatch.setattr(bench, "bench_decoding", bench_decoding)
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: drawn.append((path, [*self.axes[0].get_xticks()])))
    monkeypatch.setattr(bench, "LENGTHS", (16, 32))
    lab = tables.Lab(tables.SCALES["cpu"]._replace(sizes=("1x8x2",)), tmp_path)
    for draw in (False, False, True):
        bench.figure3(tmp_path, lab, draw)
    assert measured == [(128, 16), (128, 32), (20, 20), (80, 8), (24, 32), (28, 6)], "lengths, then the canvases of tasks"
    assert drawn == 3 * [(tmp_path / "figure3.png", [16, 32])], "ticks stand at the lengths"
    assert (tmp_path / "figure3.md").read_text(encoding="utf-8").splitlines() == [
        "| seconds | 16 | 32 | translate | qa | code | plan |", "|---|---|---|---|---|---|---|",
        "| AR | 0.160 | 0.320 | 0.200 | 0.080 | 0.320 | 0.060 |",
        "| 5 steps | 0.160 | 0.320 |  |  |  |  |"]


@pytest.mark.parametrize("name", ["figure3", "knobs", "real", "recipes", "recipes_real", "table2"])
def test_the_tables_in_results_can_be_drawn_again_from_their_own_files(name, tmp_path):
    shutil.copytree(ROOT / "results/cpu", tmp_path / "cpu")
    (tmp_path / f"cpu/{name}.md").unlink()
    reproduce.main(["--scale=cpu", f"--what={name}", "--draw", f"--out={tmp_path}"])
    drawn, kept = (Path(folder, f"cpu/{name}.md").read_text(encoding="utf-8") for folder in (tmp_path, ROOT / "results"))
    assert drawn == kept


@pytest.mark.parametrize("text", ["no JSON", "[1, 2]", '{"ways": [1]}', '{"ways": {"AR": {"16": 2}}}',
                                  '{"ways": {"AR": {"16": []}}}'])
def test_figure3_refuses_what_is_no_such_measurement(text, tmp_path):
    lab = tables.Lab(tables.SCALES["cpu"], tmp_path)
    with pytest.raises(UserError, match="figure3.json: No such file.*; --what=figure3 --refresh, without --draw, makes it"):
        bench.figure3(tmp_path, lab, draw=True)
    (tmp_path / "figure3.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="figure3.json.*; --what=figure3 --refresh, without --draw, makes it"):
        bench.figure3(tmp_path, lab, draw=True)
    assert [path.name for path in tmp_path.iterdir()] == ["figure3.json"]


def test_the_scripts_end_with_code_2_and_one_line(capsys, monkeypatch, tmp_path):
    for main, words in ((reproduce.main, ["--scale=x"]), (compare.main, ["x"]), (plot.main, ["x"])):
        with pytest.raises(SystemExit) as end:
            cli.run(lambda: main(words))  # noqa: B023
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_demo_runs_and_says_what_was_seen(tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    demo.main(["--size=1x16x2", "--n_pairs=20", "--pretrain_steps=10", "--finetune_steps=8", "--n_examples=4", "--task=plan",
               f"--out_dir={out}"])
    shown = capsys.readouterr().out
    for part in ("$ python train_ar.py", "AR2Diff_0", "AR2Diff_2 ", "One denoising", "o Diffusion, no text", "From 20 pairs",
                 "seconds in all"):
        assert part in shown, part
    facts = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    assert list(facts["rows"]) == ["Diffusion, no text", "Diffusion, text", "AR2Diff_0", "AR2Diff_2", "AR"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is not a demo's"):
        demo.main([f"--out_dir={tmp_path}/mine"])
    with pytest.raises(UserError, match="did you mean 'translate'"):
        demo.main(["--task=translat"])
