"""run_log.py: what a reader of the terminal or of metrics.jsonl needs is there, and is strict JSON."""
import json


def test_metrics_are_strict_json_and_the_log_names_all_that_a_reader_needs(train, tmp_path, capsys):
    run = train("diff", tmp_path / "x", "--batch_size=2", "--micro_batch_size=1")  # two sequences leave noise levels empty
    said = capsys.readouterr().out

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")
    text = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert any(None in line["by_level"] for line in lines)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4] and lines[-1]["split"] == "valid"
    for part in ("12,288 parameters", "canvas 8 + 7", "20 tokens per step", "cpu, float32", "log V = 5.55",
                 "step      4/4 | loss", "tokens/s", "valid     4/4 | loss", "by noise level"):
        assert part in said, part
    for line in lines:  # beside the loss, L1 + L2, stands what compares with log V
        assert f"/4 | loss {line['loss']:.4f} | first pass {line['first_pass']:.4f} | " in said
        assert line["first_pass"] < 0.6 * line["loss"]
    assert "\x1b" not in said and "\r" not in said  # no progress bar outside of a terminal


def test_autoregressive_runs_have_one_pass_and_do_not_speak_of_a_first(train, tmp_path, capsys):
    run = train("ar", tmp_path / "x")
    assert not {"first_pass", "by_level"} & {key for line in run.log() for key in line}
    assert "first pass" not in capsys.readouterr().out
