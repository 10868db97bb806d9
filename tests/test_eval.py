"""eval.py: gold answers score 100, what it counts is counted right, no code runs unasked. Then the chain of all scripts."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ar2diff
import eval as evaluation
import sample
import train_ar
import train_diff
from data import prepare
from data.tokenizer import load_tokenizer
from engine.cli import UserError
from pretrained.loading import load_checkpoint
from scoring import judge
from scoring.sandbox import Result

BYTES = load_tokenizer("bytes")
CODE = [{"input": f"add {n}", "target": f"def f(x): return x + {n}", "tests": [f"assert f(1) == {n + 1}", "assert f(1.5) > 1"]}
        for n in range(3)]


def write_task(folder, rows, metric, **more):
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps({"kind": "task", "metric": metric, **more}), encoding="utf-8")
    return folder


def answer_with(monkeypatch, texts, n_evaluations=3):
    """Let every model answer an input with texts[input]; None is an answer without EOS, ids are given as they are."""
    def drafts(self, batch, noise):
        rows = []
        for ids in batch.inputs.tolist():
            text = texts[BYTES.decode([i for i in ids if i != BYTES.pad])]
            ids = [BYTES.pad] if text is None else [*text.encode(), BYTES.eos]
            rows.append(ids + [BYTES.pad] * (40 - len(ids)))
        return [torch.tensor(rows)] * (1 + n_evaluations)  # the first is what they start from
    monkeypatch.setattr(sample.Writer, "drafts", drafts)


def score(*words):
    result, = evaluation.main([str(word) for word in words])
    return result


def test_gold_answers_score_100_and_empty_ones_0(ar_run, task, monkeypatch):
    rows = [json.loads(line) for line in (task / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    answer_with(monkeypatch, {row["input"]: row["target"] for row in rows})
    result = score(ar_run.folder)  # the data it was trained on, and its test part, are the default
    assert result["scores"]["exact_match"] == (100, 0)
    assert (result["n"], result["split"], result["data"]) == (5, "test", str(task))
    assert (result["empty"], result["unfinished"], result["too_long"]) == (0, 0, 0)
    answer_with(monkeypatch, {row["input"]: "" for row in rows})
    result = score(ar_run.folder, f"--data={task}")
    assert (result["scores"]["exact_match"][0], result["empty"], result["unfinished"]) == (0, 100, 0)


@pytest.mark.parametrize("metric, name", [("bleu", "bleu"), ("qa", "f1")])
def test_each_metric_scores_its_gold_100_and_counts_what_went_wrong(ar_run, tmp_path, monkeypatch, capsys, metric, name):
    texts = [f"the cat number {n} sat down" for n in range(4)]
    rows = [{"input": str(n), "target": text, "references": [text, "x"]} for n, text in enumerate(texts)]
    answers = {row["input"]: row["target"] for row in rows}
    answer_with(monkeypatch, answers)
    folder = write_task(tmp_path / "t", rows, metric)
    result = score(ar_run.folder, f"--data={folder}")
    assert abs(result["scores"][name][0] - 100) < 1e-9 and result["scores"]["exact_match"][0] == 100
    shown = capsys.readouterr().out
    assert ("version:" in shown) == (metric == "bleu")  # the signature of sacreBLEU
    for part in (f"{name} ", "100.00 % +- 0.00", "seed 0", "torch ", "cpu", "temperature 0.0", "4 test examples"):
        assert part in shown, part
    answer_with(monkeypatch, {**answers, "0": "", "1": None, "2": "x"})  # None: nothing but PAD, so empty and unfinished
    result = score(ar_run.folder, f"--data={folder}")
    assert (result["empty"], result["unfinished"], result["scores"]["exact_match"][0]) == (50, 25, 50)


def test_an_input_that_does_not_fit_is_counted_and_scores_nothing(ar_run, tmp_path, monkeypatch):
    rows = [{"input": "123456789", "target": "x"}, {"input": "ab", "target": "ba"}]
    answer_with(monkeypatch, {"ab": "ba", "123456789": "x"})
    result = score(ar_run.folder, f"--data={write_task(tmp_path / 't', rows, 'exact')}")
    assert (result["too_long"], result["scores"]["exact_match"][0], result["empty"], result["evaluations"]) == (1, 50, 50, 3)


def test_what_does_not_fit_can_be_left_out_and_a_score_of_nothing_else_is_refused(ar_run, tmp_path, monkeypatch, capsys):
    rows = [{"input": "123456789", "target": "x"}] * 2 + [{"input": "ab", "target": "ba"}, {"input": "b", "target": "c"}]
    answer_with(monkeypatch, {"ab": "ba", "b": "a"})
    folder = write_task(tmp_path / "t", rows, "exact")
    result = score(ar_run.folder, f"--data={folder}", "--too_long=drop")
    assert (result["n"], result["too_long"], result["n_left_out"], result["scores"]["exact_match"][0]) == (2, 0, 2, 50)
    assert "left out, too long: 2" in capsys.readouterr().out
    result = score(ar_run.folder, f"--data={folder}", "--too_long=drop", "--n_examples=1")
    assert (result["n"], result["scores"]["exact_match"][0]) == (1, 100), "the first of those that fit"
    with pytest.raises(UserError, match="not one of 2 inputs fits the 8 tokens of .*--too_long=drop"):
        score(ar_run.folder, f"--data={folder}", "--n_examples=2")  # was: F1 0.0, and "input too long 2" below it
    folder = write_task(tmp_path / "long", rows[:2], "exact")
    with pytest.raises(UserError, match="not one of 2 inputs fits the 8 tokens of .*/ar$"):
        score(ar_run.folder, f"--data={folder}", "--too_long=drop")


def test_the_size_of_a_batch_changes_no_answer(ar_run, diff_run, tmp_path):
    for run in (ar_run, diff_run):
        files = []
        for size in (1, 2, 16):
            out = tmp_path / f"{run.folder.name}{size}.jsonl"
            score(run.folder, f"--batch_size={size}", "--temperature=1", "--n_samples=2", "--n_programs=2", f"--out={out}")
            files.append(out.read_text(encoding="utf-8"))
        assert files[0] == files[1] == files[2]
        rows = [json.loads(line) for line in files[0].splitlines()]
        assert [list(row) for row in rows] == [["input", "target", "predictions"]] * 5
        assert any(a != b for a, b in (row["predictions"] for row in rows))  # two programs are two draws


def test_network_evaluations_are_the_steps_of_diffusion_and_the_tokens_of_ar(ar_run, diff_run, monkeypatch):
    assert score(diff_run.folder, "--n_steps=4")["evaluations"] == 4
    assert score(diff_run.folder, "--n_steps=4", "--n_programs=2", "--n_samples=3")["evaluations"] == 4
    calls = []
    real = type(sample.load_writer(ar_run.folder, sample.GenerateConfig()).model).decode
    monkeypatch.setattr("model.Transformer.decode", lambda self, y, *a, **k: calls.append(len(y)) or real(self, y, *a, **k))
    result = score(ar_run.folder, "--batch_size=1")
    assert result["evaluations"] == len(calls) / 5


def test_the_decoder_and_its_options_are_told_with_the_score(ar_run, diff_run, capsys):
    for run, flags, decoder, options in (
            (ar_run, [], "left to right", {"temperature": 0.0, "top_k": 0, "n_samples": 1}),
            (diff_run, ["--decoder=ancestral", "--n_steps=4"], "ancestral",
             {"n_steps": 4, "temperature": 0.2, "n_samples": 8})):
        result = score(run.folder, *flags)
        assert (result["decoder"], result["options"]) == (decoder, options)
        shown = ", ".join([decoder, *(f"{name} {value}" for name, value in result["options"].items())])
        assert f"({result['process']}; {shown}; seed 0)" in capsys.readouterr().out
    assert result["evaluations"] == 4


def test_two_evaluations_agree_and_another_seed_does_not(diff_run, tmp_path):
    def predictions(seed, name):
        score(diff_run.folder, "--temperature=1", f"--seed={seed}", f"--out={tmp_path / name}")
        return (tmp_path / name).read_text(encoding="utf-8")
    assert predictions(0, "a") == predictions(0, "b") != predictions(1, "c")


def test_a_score_tells_which_runs_trained_the_model_and_in_what_precision_it_was_taken(train, ar_run, task, tmp_path, capsys):
    one = train("diff", tmp_path / "one", f"--init_from={ar_run.folder}", "--steps=2")
    train("diff", one.folder, "--steps=3", "--resume")  # still one run
    two = train("diff", tmp_path / "two", f"--init_from={one.folder}", "--steps=1")
    result = score(two.folder)
    data = f"backwards ({ar_run.checkpoint()['data'][:8]})"  # the folder, wherever it lay, and a hash of what it held
    assert result["lineage"] == [f"ar, 4 steps on {data}", f"uniform, 3 steps on {data}", f"uniform, 1 steps on {data}"]
    shown = capsys.readouterr().out
    assert f"\n  trained: {' -> '.join(result['lineage'])}\n" in shown
    assert f"torch {torch.__version__}, cpu, float32\n" in shown and result["dtype"] == "float32"
    assert score(two.folder, "--dtype=bfloat16")["dtype"] == "bfloat16"
    ar2diff.main([str(ar_run.folder), str(tmp_path / "as_it_is")])  # AR2Diff_0: converted, not trained
    assert score(tmp_path / "as_it_is")["lineage"] == [f"ar, 4 steps on {data}"]


def test_n_examples_takes_the_first(ar_run, task, tmp_path):
    score(ar_run.folder, "--n_examples=2", "--split=valid", f"--out={tmp_path / 'x'}")
    rows = [json.loads(line)["input"] for line in (tmp_path / "x").read_text(encoding="utf-8").splitlines()]
    assert rows == [json.loads(line)["input"] for line in (task / "valid.jsonl").read_text(encoding="utf-8").splitlines()][:2]


def test_no_code_runs_without_the_flag(ar_run, tmp_path, monkeypatch):
    def forbidden(*_):
        raise AssertionError("something ran")
    monkeypatch.setattr(judge, "run_many", forbidden)
    monkeypatch.setattr(evaluation, "check_canaries", forbidden)
    monkeypatch.setattr(sample.Writer, "drafts", forbidden)  # refused at once, not after an hour of decoding
    folder = write_task(tmp_path / "t", CODE, "code")
    with pytest.raises(UserError, match="sandbox.py.*--allow_code_execution"):
        score(ar_run.folder, f"--data={folder}")
    with pytest.raises(UserError, match="--allow_code_execution"):
        score(ar_run.folder, f"--data={folder}", "--allow_code_execution=false")


def test_programs_run_behind_the_canaries_with_the_tests_of_their_own_problem(ar_run, tmp_path, monkeypatch):
    calls = []

    def run_many(jobs, timeout):
        calls.extend(jobs)
        return [Result("+ 1" in program, "") for program, *_ in jobs]
    monkeypatch.setattr(evaluation, "check_canaries", lambda: calls.append("canaries"))
    monkeypatch.setattr(judge, "run_many", run_many)
    answer_with(monkeypatch, {row["input"]: row["target"] for row in CODE})
    rows = [{**row, "setup": "import math"} for row in CODE]
    folder = write_task(tmp_path / "t", rows, "code")
    result = score(ar_run.folder, f"--data={folder}", "--allow_code_execution", "--n_programs=2", "--k=2", "--temperature=1")
    assert calls[0] == "canaries"
    jobs = [(row["target"], "\n".join(row["tests"]), "import math") for row in CODE]
    assert calls[1:] == jobs + [job for job in jobs for _ in range(2)], "the gold ones first, then those of the model"
    assert abs(result["scores"]["pass@2"][0] - 100 / 3) < 1e-9 and result["scores"]["exact_match"][0] == 100


@pytest.mark.parametrize("flags, message", [
    (["--middle", "--n_programs=2"], "--middle goes with none"), (["--middle", "--metric=bits"], "--middle goes with none"),
    (["--n_programs=2", "--k=3"], "pass@3 needs .*--n_programs=2"), (["--k=0"], "--k=0 must be at least 1"),
    (["--n_programs=0"], "--n_programs=0 must be at least 1"), (["--batch_size=0"], "--batch_size=0 must be at least 1"),
    (["--n_examples=0"], "--n_examples=0 must be at least 1"), (["--split=tset"], "did you mean 'test'"),
    (["--n_steps=0"], "--n_steps=0 must be at least 1"), (["--n_samples=0"], "--n_samples=0 must be at least 1"),
    (["--timeout=0"], "--timeout=0.0 must be above 0"), (["--metric=blue"], "did you mean 'bleu'"),
    (["--seed=-1"], "--seed=-1 must be at least 0"), (["--data=nowhere"], "no data folder 'nowhere'"),
    (["--allow_code"], "unknown argument")])
def test_a_wrong_flag_is_refused_in_one_line(diff_run, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        score(diff_run.folder, *flags)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_scored_is_refused(train, ar_run, text, tmp_path):
    lm = train("ar", tmp_path / "lm", f"--data={text}", "--input_len=0", "--steps=1")
    with pytest.raises(UserError, match="holds text, not a task"):
        score(lm.folder)
    with pytest.raises(UserError, match="a plain language model"):
        score(lm.folder, f"--data={write_task(tmp_path / 'a', CODE, 'exact')}")
    with pytest.raises(UserError, match="did you mean 'bleu'"):
        score(ar_run.folder, f"--data={write_task(tmp_path / 'b', CODE, 'blue')}")
    without = [{k: v for k, v in row.items() if k != "tests"} for row in CODE]
    with pytest.raises(UserError, match="needs \"tests\" in every example"):
        score(ar_run.folder, f"--data={write_task(tmp_path / 'c', without, 'code')}", "--allow_code_execution")
    broken = write_task(tmp_path / "d", CODE, "exact")
    (broken / "test.jsonl").write_bytes(b'{"input": "a", "target": "b"}\n{"input": \n')
    with pytest.raises(UserError, match="test.jsonl, line 2"):
        score(ar_run.folder, f"--data={broken}")
    with pytest.raises(UserError, match="cannot write --out="):
        score(ar_run.folder, f"--out={tmp_path / 'nowhere' / 'x'}")


@pytest.mark.slow
def test_the_whole_chain_of_scripts_on_the_code_task(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--data=task", "--batch_size=8", "--steps=3", "--warmup=1", "--log_every=1", "--eval_sequences=8"]
    prepare.main(["code", "--n_train=32", "--out=task"])
    train_ar.main([*small, "--out_dir=ar", "--size=1x16x2"])
    ar2diff.main(["ar", "ar2diff0"])
    train_diff.main([*small, "--init_from=ar2diff0", "--out_dir=diff"])
    assert load_checkpoint("diff")["history"] == load_checkpoint("ar2diff0")["history"] != []
    with pytest.raises(UserError, match="--allow_code_execution"):
        score("diff")
    for folder in ("ar", "diff"):
        result = score(folder, "--allow_code_execution", "--n_examples=2", "--n_samples=2", f"--out={folder}.jsonl")
        assert result["n"] == 2 and result["metric"] == "code" and set(result["scores"]) == {"pass@1", "exact_match"}
        assert len((tmp_path / f"{folder}.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    capsys.readouterr()
    sample.main(["diff", "--prompt=add one to x", "--show_steps", "--n_steps=4"])
    lines = capsys.readouterr().out.split("\n")
    assert [line.split()[0] for line in lines[:5]] == ["0", "1", "2", "3", "4"] and lines[5] == ""


def test_several_greedy_programs_of_an_ar_model_are_refused_because_they_are_one(ar_run, tmp_path):
    folder = write_task(tmp_path / "t", CODE, "code")
    with pytest.raises(UserError, match="2 greedy programs would all be the same"):
        score(ar_run.folder, f"--data={folder}", "--allow_code_execution", "--n_programs=2")


def test_greedy_masked_diffusion_is_refused_where_it_would_write_one_program_five_times(train, task, tmp_path):
    run = train("diff", tmp_path / "run", f"--data={task}", "--process=absorbing", "--steps=1")
    five = ["--temperature=0", "--n_programs=5", "--k=5", f"--data={task}"]
    for decoder in ("threshold", "confidence"):
        with pytest.raises(UserError, match="5 greedy programs would all be the same"):
            score(run.folder, *five, f"--decoder={decoder}")
    assert score(run.folder, *five, "--decoder=ancestral")["n"] == 5, "it reveals at random"


def test_a_wrong_task_is_told_before_and_beside_the_score_and_strict_stops(ar_run, tmp_path, monkeypatch, capsys):
    rows = [CODE[0], {**CODE[1], "tests": ["assert g(3) = 2"]}]
    answer_with(monkeypatch, {row["input"]: row["target"] for row in CODE})
    words = (ar_run.folder, f"--data={write_task(tmp_path / 't', rows, 'code')}", "--allow_code_execution")
    result = score(*words)
    shown = capsys.readouterr()
    for text in (shown.err, shown.out):
        assert "the gold answers score pass@1 50.00" in text and "SyntaxError (1)" in text
    assert result["scores"]["pass@1"][0] == 50 and result["failures"] == {"SyntaxError": 1} and "SyntaxError" in result["gold"]
    assert "\n  failed: SyntaxError (1)\n" in shown.out
    monkeypatch.setattr(sample.Writer, "drafts", None)  # refused at once, not after an hour of decoding
    with pytest.raises(UserError, match="--strict: .*test: the gold answers score pass@1 50.00"):
        score(*words, "--strict", f"--out={tmp_path / 'x'}")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("named", [True, False])
def test_a_perfect_chinese_answer_scores_100_with_the_tokenizer_in_the_signature(ar_run, tmp_path, monkeypatch, capsys, named):
    rows = [{"input": "lamp", "target": "一盏绿灯在窗上"}, {"input": "birds", "target": "鸟在唱歌跳舞"}]
    answer_with(monkeypatch, {row["input"]: row["target"] for row in rows})
    folder = write_task(tmp_path / "t", rows, "bleu", **{"language": "zh"} if named else {})
    assert abs(score(ar_run.folder, f"--data={folder}")["scores"]["bleu"][0] - 100) < 1e-9
    shown = capsys.readouterr()
    assert "tok:zh" in shown.out and not shown.err


def test_another_metric_than_the_tasks_can_be_named(ar_run, task):
    assert list(score(ar_run.folder, "--metric=qa")["scores"]) == ["f1", "squad_em", "exact_match"]
    assert list(score(ar_run.folder, "--metric=exact")["scores"]) == ["exact_match"]


def test_several_models_in_one_call_and_all_that_is_known_of_them_in_one_file(ar_run, diff_run, tmp_path):
    file = tmp_path / "r.json"
    results = evaluation.main([f"{ar_run.folder},{diff_run.folder}", f"--json={file}"])
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert [r["checkpoint"] for r in saved] == [str(ar_run.folder), str(diff_run.folder)] == [r["checkpoint"] for r in results]
    assert [r["process"] for r in saved] == ["ar", "uniform"] and saved[0]["training_seed"] == 0
    assert load_checkpoint(ar_run.folder)["commit"] == saved[0]["commit"]
    with pytest.raises(UserError, match="exists; it is not overwritten"):
        score(ar_run.folder, f"--json={file}")
    with pytest.raises(UserError, match="--out is for the answers of one model"):
        score(f"{ar_run.folder},{diff_run.folder}", f"--out={tmp_path / 'x'}")


def test_the_file_is_json_for_other_readers_too(ar_run, tmp_path):
    score(ar_run.folder, "--n_examples=1", f"--json={tmp_path / 'x'}")  # the error of a single example is not known
    saved, = json.loads((tmp_path / "x").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert saved["scores"]["exact_match"][1] is None


def test_an_evaluation_that_is_stopped_leaves_no_file_that_blocks_the_next(ar_run, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(sample.Writer, "drafts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(ar_run.folder, f"--out={tmp_path / 'x'}", f"--json={tmp_path / 'y'}")
    assert not list(tmp_path.iterdir())
    score(ar_run.folder, f"--out={tmp_path / 'x'}", f"--json={tmp_path / 'y'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_a_reader_that_leaves_ends_an_evaluation_without_a_word(ar_run):
    root = Path(evaluation.__file__).parent
    process = subprocess.Popen([sys.executable, "eval.py", str(ar_run.folder)], cwd=root, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_a_canvas_longer_than_trained_is_refused_with_both_numbers(diff_run):
    with pytest.raises(UserError, match="--target_len=500 is longer than .* trained on, 7 tokens"):
        sample.main([str(diff_run.folder), "--prompt=abc", "--target_len=500"])
