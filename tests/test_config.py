"""engine/cli.py: words of a command line become typed fields, and every mistake becomes one line that helps."""
import ast
import dataclasses
import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import ar2diff
import eval as evaluation
import sample
import train_ar
import train_diff
from data import prepare
from engine import cli
from engine.cli import UserError, one_of, parse

ROOT = Path(train_ar.__file__).parent
SCRIPTS = [train_ar, train_diff, ar2diff, sample, evaluation, prepare]


@dataclass
class Base:
    steps: int = 10  # optimizer steps, 100 % of them
    lr: float = 1e-3  # learning rate


@dataclass(kw_only=True)
class Example(Base):
    source: str  # what to read
    out_dir: str = "out/x"  # where to write
    k: int | None = None  # how many, default: all
    show_steps: bool = False  # show them
    check: bool = True  # check them
    mean: bool | None = None  # default: the checkpoint's


def error_of(*words):
    with pytest.raises(UserError) as caught:
        parse(Example, words)
    return str(caught.value)


def test_words_become_typed_fields_and_the_rest_keeps_its_default():
    assert parse(Example, ["in.txt"]) == Example(source="in.txt")
    given = parse(Example, ["--steps=3", "--lr", "2e-4", "in.txt", "--out-dir=a-b--c", "--k=7", "--show_steps", "--check=no"])
    assert given == Example(source="in.txt", steps=3, lr=2e-4, out_dir="a-b--c", k=7, show_steps=True, check=False)
    assert [type(v) for v in (given.steps, given.lr, given.k, given.show_steps)] == [int, float, int, bool]


@pytest.mark.parametrize("value", ["-- non-null e-mail", "--a b", "- x", "a--b-c", "-", "–-– ", "--x=y-z q", "é-- -"])
def test_a_value_is_never_rewritten(value):
    assert parse(Example, ["a", "--out_dir", value]).out_dir == value
    assert parse(Example, ["a", f"--out-dir={value}"]).out_dir == value
    assert parse(Example, [f"{value} a"]).source == f"{value} a"


@pytest.mark.parametrize("words, expected", [(["--out_dir", "--non-null"], "--out_dir=--non-null"),
                                             (["--out_dir", "-x"], "--flag=VALUE"), (["--out_dir", "--steps"], "--flag=VALUE")])
def test_a_value_that_looks_like_a_flag_is_told_how_to_be_written(words, expected):
    assert expected in error_of("in.txt", *words)


@pytest.mark.parametrize("word", ["--steps=--", "--out_dir=--", "--k=99999999999999999999", "--steps=-99999999999999999999"])
def test_what_argparse_or_a_tensor_would_stumble_over_is_one_line(word):
    assert error_of("in.txt", word)


def test_dashes_in_a_flag_count_as_underscores_but_values_are_left_alone():
    assert parse(Example, ["--show-steps", "--out-dir", "my-out_dir", "a"]).out_dir == "my-out_dir"
    assert parse(Example, ["a", "--out_dir=--x-y=z"]).out_dir == "--x-y=z"
    assert parse(Example, ["a", "--steps", "-10"]).steps == -10


@pytest.mark.parametrize("words", [["--show_steps", "in.txt"], ["in.txt", "--show_steps"], ["--show_steps", "true", "in.txt"],
                                   ["--show_steps=1", "in.txt"], ["--show_steps", "--steps=10", "in.txt"]])
def test_a_bare_bool_flag_does_not_swallow_the_word_behind_it(words):
    assert parse(Example, words) == Example(source="in.txt", show_steps=True)


@pytest.mark.parametrize("words, value", [([], None), (["--mean"], True), (["--mean=true"], True), (["--mean", "no"], False),
                                          (["--mean=0"], False), (["--mean", "--steps=10"], True)])
def test_a_bool_that_may_be_left_open_is_a_flag_like_any_other(words, value):
    assert parse(Example, [*words, "in.txt"]).mean is value
    assert parse(Example, ["in.txt", *words]) == Example(source="in.txt", mean=value)


@pytest.mark.parametrize("words, expected", [
    (["in.txt", "--step=5"], ["--step'", "did you mean --steps?"]),  # no abbreviations: a typo is never half understood
    (["in.txt", "--out-dri=x"], ["did you mean --out_dir?"]),
    (["--showsteps"], ["did you mean --show_steps?"]),  # the typo is named, not the positional it makes argparse miss
    (["in.txt", "-steps=5"], ["-steps", "did you mean --steps?"]),
    (["--source=in.txt"], ["--source", "value alone, without a flag"]),
    (["in.txt", "more.txt"], ["more.txt"]),
    (["in.txt", "--qqqqqq"], ["--qqqqqq"]),
    ([], ["source"]),
    (["in.txt", "--lr"], ["--lr", "expected one argument"]),
    (["in.txt", "--steps=many"], ["--steps", "int", "'many'"]),
    (["in.txt", "--steps=1.5"], ["--steps", "int", "'1.5'"]),
    (["in.txt", "--lr=1,5"], ["--lr", "float", "'1,5'"]),
    (["in.txt", "--check=maybe"], ["--check", "'maybe' is neither true nor false"]),
    (["in.txt", "--mean=3"], ["--mean", "'3' is neither true nor false"]),
])
def test_a_mistake_is_named_with_what_to_do(words, expected):
    message = error_of(*words)
    assert all(part in message for part in [*expected, "-h"]), message
    assert "\n" not in message


def test_an_unknown_flag_far_from_all_others_gets_no_guess():
    assert "did you mean" not in error_of("in.txt", "--qqqqqq")


def test_help_shows_every_flag_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Example, ["-h"])
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and "None" not in shown
    for part in ("test_config.py", "every mistake becomes one line", "--steps", "100 % of them (default: 10)", "what to read",
                 "[--check [true]]", "show them (default: False)", "where to write (default: 'out/x')"):
        assert part in shown


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_flag_of_every_script_explains_itself(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) > 10
    texts = cli._help_texts(script.Config)
    assert [field.name for field in dataclasses.fields(script.Config) if not texts.get(field.name)] == []


def test_flags_are_read_without_ast_parse_which_may_answer_ctrl_c_by_a_SystemError(monkeypatch):
    monkeypatch.setattr(ast, "parse", lambda *_, **__: pytest.fail("Python 3.11 loses a KeyboardInterrupt there"))
    for script in SCRIPTS:
        assert cli._help_texts(script.Config)


def test_a_wrong_name_is_answered_by_the_choices_and_the_nearest():
    assert one_of("size", "mini", ["tiny", "mini"]) == "mini"
    with pytest.raises(UserError, match="schedule='cosin' is not one of cosine, constant; did you mean 'cosine'?"):
        one_of("schedule", "cosin", ("cosine", "constant"))


def test_run_prints_one_line_and_exits_with_2_but_hides_no_bug(capsys):
    def fail(error):
        raise error
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: fail(UserError("first\n  second")))
    assert (caught.value.code, capsys.readouterr()) == (2, ("", "error: first second\n"))
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: fail(KeyboardInterrupt()))
    assert (caught.value.code, capsys.readouterr().err) == (130, "interrupted\n")
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)


def test_output_is_utf8_even_where_a_pipe_is_not(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))  # as on Windows
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é↵".encode()), encoding="cp1252"))
    read = []
    cli.run(lambda: print(read.append(sys.stdin.read()) or read[0], end=""))
    sys.stdout.flush()
    assert read == ["é↵"] and sys.stdout.buffer.getvalue().decode("utf-8") == "é↵"


def test_a_script_started_in_another_folder_fails_with_one_line_and_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "train_ar.py"), "--bach_size=3"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == ("error: unknown argument '--bach_size'; did you mean --batch_size? "
                              "(python train_ar.py -h lists the flags)\n")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_value_is_refused_where_it_could_mean_something_else():
    """--init_from=$UNSET must not train from scratch; a prompt may be empty."""
    for word in ("--init_from=", "--size=", "--data="):
        with pytest.raises(UserError, match=f"{word[2:-1]} is empty"):
            parse(train_ar.Config, [word])
    assert parse(sample.Config, ["x", "--prompt="]).prompt == ""


def test_bytes_that_are_not_utf8_are_refused():
    with pytest.raises(UserError, match="not UTF-8"):
        parse(sample.Config, ["x", "--prompt=\udcff"])
