"""scoring/judge.py: gold answers that cannot score 100 are noticed and explained, failures of programs are counted by kind."""
import re

import pytest

from engine.cli import UserError
from scoring import judge

ADD = {"input": "add one", "target": "def f(x): return x + 1", "tests": ["assert f(1) == 2"]}


@pytest.mark.parametrize("metric, examples, language", [
    ("exact", [{"target": "a"}], None), ("bleu", [{"target": "one two three four"}, {"target": "a"}], None),
    ("bleu", [{"target": "一盏绿色的灯"}], "zh"), ("qa", [{"target": "7", "references": ["seven"]}], None),
    ("code", [ADD] * 2, None)])
def test_gold_answers_that_score_100_are_no_fault(metric, examples, language):
    assert judge.gold_fault(metric, examples, language) is None


@pytest.mark.parametrize("metric, examples, fault", [
    ("bleu", [{"target": "一盏绿色的灯"}, {"target": "a b c"}], "score bleu 0.00.*no gold text has four words.*\"language\""),
    ("qa", [{"target": "the"}, {"target": "x"}], "score f1 50.00.*1 of 2 hold nothing but articles.*'the'"),
    ("code", [ADD, {**ADD, "tests": ["assert f(3) = 2"]}], "score pass@1 50.00.*SyntaxError .1.$"),
    ("code", [{**ADD, "tests": ["import numpy"]}] * 2, "pass@1 0.00.*ModuleNotFoundError: 'numpy' .2.; .* library only"),
    ("code", [{**ADD, "target": "while True: pass"}, ADD], "pass@1 50.00.*timeout .1."),
])
def test_gold_answers_that_cannot_score_100_say_why(metric, examples, fault):
    found = judge.gold_fault(metric, examples, timeout=0.5)
    assert re.search(fault, found), found


def test_failures_are_counted_by_kind_the_most_frequent_first():
    programs = ["def f(x): return x", "def f(x): return 0", "def f(x) return", "import os\nos.system('ls')", ADD["target"],
                "import numpy", "def f(x): return y"]
    scores, values, _, failures = judge.score("code", [[p] for p in programs], [ADD] * len(programs))
    assert scores["pass@1"][0] == pytest.approx(100 / 7)
    assert failures == {"AssertionError": 2, "SyntaxError": 1, "ModuleNotFoundError: 'numpy'": 1, "NameError": 2}
    assert list(failures)[0] == "AssertionError" and judge.counted(failures).startswith("AssertionError (2), ")
    assert judge.score("exact", [["a"]], [{"target": "b"}]).failures == {}


def test_code_without_tests_is_refused():
    with pytest.raises(UserError, match="needs \"tests\" in every example"):
        judge.score("code", [["x = 1"]], [{"target": "x = 1"}])
