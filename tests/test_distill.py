"""distill.py: the answers of a model become the training targets of a task that the training scripts take."""
import json

import pytest

import eval as evaluation
import sample
from data.tasks import read_jsonl
from engine.cli import UserError


@pytest.fixture(scope="module")
def writer(train, tmp_path_factory):
    """An AR model that learned its task a little: it ends most answers, and gets some wrong."""
    return train("ar", tmp_path_factory.mktemp("distill") / "ar", "--steps=60", "--lr=1e-2")


def test_the_targets_are_the_models_answers_and_the_rest_is_the_old_task(writer, task, tmp_path, train, capsys):
    out = tmp_path / "by_ar"
    sample.main([str(writer.folder), f"--task={task}", f"--out={out}"])
    evaluation.main([str(writer.folder), "--split=train", f"--out={tmp_path}/answers.jsonl"])
    old, new = read_jsonl(task / "train.jsonl"), read_jsonl(out / "train.jsonl")
    answers = {row["input"]: row["predictions"][0] for row in read_jsonl_of(tmp_path / "answers.jsonl")}
    assert 0 < len(new) <= len(old) and all(row["target"] == answers[row["input"]] for row in new)
    assert {row["target"] for row in new} != {row["target"] for row in old}
    assert f"{len(new)} of {len(old)} training inputs answered" in capsys.readouterr().out
    for name in ("valid.jsonl", "test.jsonl"):
        assert (out / name).read_bytes() == (task / name).read_bytes()
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    assert meta.pop("targets_by") == str(writer.folder) and meta == json.loads((task / "meta.json").read_text(encoding="utf-8"))
    assert train("diff", tmp_path / "run", f"--data={out}", "--steps=1").checkpoint()["step"] == 1


def read_jsonl_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_that_do_not_end_are_empty_or_do_not_fit_are_left_out(writer, task, tmp_path, monkeypatch):
    eos, pad = 256, 257
    canned = {0: [*b"ok", eos], 1: list(b"endless"), 2: [eos], 3: [*b" \n", eos], 4: [*b"sixsix", eos],
              5: [255, 255, 255, eos]}  # no UTF-8: decoded to three characters of three bytes each
    rows = [json.loads(line) for line in (task / "train.jsonl").read_text(encoding="utf-8").splitlines()][:6]

    def drafts(self, batch, noise, **more):
        canvas = [canned[c[2]] for c in noise.counters]
        return [batch.targets.new_tensor([(ids + [pad] * 7)[:7] for ids in canvas])]

    monkeypatch.setattr(sample.Writer, "drafts", drafts)
    sample.main([str(writer.folder), f"--task={task}", f"--out={tmp_path}/x", "--n_examples=6"])
    assert read_jsonl(tmp_path / "x" / "train.jsonl") == [{"input": rows[0]["input"], "target": "ok"},
                                                         {"input": rows[4]["input"], "target": "sixsix"}]
    canned.update({0: [eos], 4: [eos]})
    with pytest.raises(UserError, match="not one of 6 answers ends within the canvas; nothing was written"):
        sample.main([str(writer.folder), f"--task={task}", f"--out={tmp_path}/y", "--n_examples=6"])
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_inputs_that_do_not_fit_the_canvas_are_left_out(writer, task, tmp_path):
    folder = tmp_path / "longer"
    folder.mkdir()
    rows = '{"input": "abcdefghi", "target": "a"}\n{"input": "abc", "target": "cba"}\n'
    (folder / "train.jsonl").write_text(rows, encoding="utf-8")
    sample.main([str(writer.folder), f"--task={folder}", f"--out={tmp_path}/x"])
    assert [row["input"] for row in read_jsonl(tmp_path / "x" / "train.jsonl")] == ["abc"]


@pytest.mark.parametrize("flags, message", [
    (["--out={tmp}/x"], "--task and --out go together"), (["--task={task}"], "--task and --out go together"),
    (["--task={task}", "--out={tmp}/x", "--prompt=a"], "--task answers all inputs; it does not go with --prompt"),
    (["--task={task}", "--out={tmp}/x", "--show_steps"], "does not go with --show_steps"),
    (["--n_examples=3", "--prompt=a"], "--n_examples goes with --task"),
    (["--task={task}", "--out={tmp}/x", "--n_examples=0"], "--n_examples=0 must be at least 1"),
    (["--task={text}", "--out={tmp}/x"], "holds text, not a task"),
    (["--task=nowhere", "--out={tmp}/x"], "no data folder 'nowhere'"),
    (["--task={task}", "--out={task}"], "exists; it is not overwritten")])
def test_a_wrong_flag_is_refused_in_one_line_and_nothing_is_written(writer, task, text, tmp_path, flags, message):
    before = sorted(path.name for path in task.iterdir())
    with pytest.raises(UserError, match=message):
        sample.main([str(writer.folder), *(flag.format(tmp=tmp_path, task=task, text=text) for flag in flags)])
    assert not list(tmp_path.iterdir()) and sorted(path.name for path in task.iterdir()) == before
