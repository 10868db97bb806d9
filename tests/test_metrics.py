"""metrics.py against the reference library, closed forms, enumeration, and results worked out by hand."""
import itertools
import math
import random
import re

import numpy as np
import pytest

from engine.cli import UserError
from scoring import judge, metrics
from scoring.sandbox import Result

sacrebleu = pytest.importorskip("sacrebleu", reason="BLEU is compared with sacrebleu")

GOLD = ["Two young men are outside near many bushes.", "Several men in hard hats operate a giant pulley system.",
        "A little girl climbs into a wooden playhouse.", "A man in a blue shirt is standing on a ladder, cleaning a window."]


def corpus(n, seed=0):
    """n pairs of a hypothesis and its one or two references: sentences with some of their words lost, swapped or changed."""
    rng = random.Random(seed)
    hypotheses, references = [], []
    for _ in range(n):
        words = [f"w{min(int(rng.expovariate(0.1)), 60)}" for _ in range(rng.randint(4, 20))]
        noisy = [[word if rng.random() < 0.85 else "other" for word in words if rng.random() < 0.95] for _ in range(2)]
        hypotheses.append(" ".join(noisy[0]))
        references.append([" ".join(words), " ".join(noisy[1])][:rng.randint(1, 2)])
    return hypotheses, references


def test_gold_scores_100_and_empty_0_in_every_metric():
    examples = [{"target": text} for text in GOLD]
    for score in metrics.METRICS.values():
        for name, (value, error) in score([[text] for text in GOLD], examples).scores.items():
            assert value == pytest.approx(100, abs=1e-9), name
            assert error == pytest.approx(0, abs=1e-9), name
        for name, (value, error) in score([[""]] * len(GOLD), examples).scores.items():
            assert value == 0 and error == 0, name
    for k in (1, 2):
        assert [metrics.pass_at_k(2, n_passed, k) for n_passed in (2, 0)] == [100, 0]


def test_bleu_of_a_tiny_corpus_is_the_one_worked_out_by_hand():
    """5 words, of which 4 are right; the 3-gram "a b c" and the 4-gram "a b c d" once each.

    hypothesis a b c d x, reference a b c d e f: precisions 4/5, 3/4, 2/3, 1/2, brevity penalty exp(1 - 6/5).
    """
    score, error, *_ = metrics.bleu(["a b c d x"], [["a b c d e f"]])
    assert score == pytest.approx(100 * math.exp(1 - 6 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, abs=1e-9)
    assert math.isnan(error)


@pytest.mark.parametrize("seed", range(3))
def test_bleu_is_what_sacrebleu_says_with_one_or_more_references(seed):
    hypotheses, references = corpus(60, seed)
    streams = [[refs[0] for refs in references], [refs[1] if len(refs) > 1 else None for refs in references]]
    metric = sacrebleu.BLEU()
    expected = metric.corpus_score(hypotheses, streams)
    score, _, signature, _ = metrics.bleu(hypotheses, references)
    assert 20 < score < 90 and score == expected.score
    assert signature == str(metric.get_signature()) and "nrefs:var" in signature
    single = metrics.bleu(hypotheses, [refs[:1] for refs in references])
    assert single[0] == sacrebleu.corpus_bleu(hypotheses, [streams[0]]).score and "nrefs:1" in single[2]


def test_the_error_of_bleu_is_the_jackknife_by_definition():
    hypotheses, references = corpus(40)
    n = len(hypotheses)
    streams = [[refs[0] for refs in references], [refs[1] if len(refs) > 1 else None for refs in references]]
    without = [sacrebleu.corpus_bleu(hypotheses[:i] + hypotheses[i + 1:], [refs[:i] + refs[i + 1:] for refs in streams]).score
               for i in range(n)]
    expected = math.sqrt((n - 1) / n * np.sum((without - np.mean(without)) ** 2))
    assert metrics.bleu(hypotheses, references)[1] == pytest.approx(expected, rel=1e-9)


def test_the_error_of_bleu_agrees_with_the_bootstrap_of_sacrebleu():
    hypotheses, references = corpus(300)
    report = sacrebleu.BLEU().corpus_score(hypotheses, [[refs[0] for refs in references]], n_bootstrap=1000).format(width=4)
    half_of_95_percent = float(re.search(r"± ([\d.]+)", report)[1])
    error = metrics.bleu(hypotheses, [refs[:1] for refs in references])[1]
    assert error == pytest.approx(half_of_95_percent / 1.96, rel=0.15)


@pytest.mark.parametrize("prediction, references, exact, f1", [
    ("Denver Broncos", ["Denver Broncos"], 100, 100),
    ("the Denver  Broncos!", ["denver broncos"], 100, 100),                             # article, space, punctuation, case
    ("Broncos", ["Denver Broncos", "The Broncos"], 100, 100),                           # the best of several references
    ("Broncos team", ["Denver Broncos", "Carolina Panthers"], 0, 50),                   # P 1/2, R 1/2
    ("in Santa Clara, California", ["Santa Clara", "Levi's Stadium in Santa Clara"], 0, 200 / 3),   # 2/4 and 2/2; 3/4 and 3/5
    ("big big cat", ["big big big"], 0, 100 * 2 / 3),                                   # a word counts as often as in both
    ("a an the", ["The"], 100, 0),                                                      # nothing left: EM 1, yet F1 0 in v1.1
    ("...", ["!"], 100, 0),
    ("", ["Denver"], 0, 0),
    ("theatre", ["atre"], 0, 0),                                                        # articles are whole words
    ("a.b", ["ab"], 100, 100),                                                          # punctuation goes without a space
    ("the-end", ["theend"], 100, 100),                                                  # and before the articles
    ("ÉCOLE  normale", ["école normale"], 100, 100),                                    # unicode case
    ("«école»", ["école"], 0, 0),                                                       # unicode punctuation stays
    ("10 000", ["10,000", "10000"], 0, 0),
    ("\tan\u00a0apple\n", ["apple"], 100, 100),                                         # any white space
])
def test_exact_match_and_f1_are_those_of_squad(prediction, references, exact, f1):
    assert metrics.exact_match_and_f1(prediction, references) == pytest.approx((exact, f1), abs=1e-9)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_program():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert metrics.pass_at_k(n, c, k) == pytest.approx(100 * sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_exact_for_many_samples():
    assert metrics.pass_at_k(1_000_000, 1, 1) == 100 / 1_000_000
    for n, c, k in [(10_000, 1, 80), (10_000, 37, 100), (5_000, 4_000, 2_500)]:
        miss = sum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)) if c <= n - k else -math.inf  # the paper's product
        assert metrics.pass_at_k(n, c, k) == pytest.approx(-100 * math.expm1(miss), rel=1e-9)


@pytest.mark.parametrize("n, c, k", [(4, 2, 5), (0, 0, 1), (4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_pass_at_k_refuses_what_is_not_defined(n, c, k):
    with pytest.raises(UserError):
        metrics.pass_at_k(n, c, k)


def test_the_standard_error_is_that_of_numpy():
    values = np.random.default_rng(0).normal(size=37)
    assert metrics.standard_error(list(values)) == pytest.approx(values.std(ddof=1) / math.sqrt(37), rel=1e-12)
    assert math.isnan(metrics.standard_error([1.0]))


@pytest.mark.parametrize("k, by_problem", [(1, [25, 0, 100]), (2, [50, 0, 100])])
def test_scores_of_code_are_means_over_problems_with_the_error_over_problems(monkeypatch, k, by_problem):
    passed = [True, False, False, False] + [False] * 4 + [True] * 4
    monkeypatch.setattr(judge, "run_many", lambda jobs, timeout: [Result(p, "") for p in passed])
    scored = judge.score("code", [[""] * 4] * 3, [{"target": "", "tests": ["pass"]}] * 3, k=k)
    assert scored.values == by_problem
    assert scored.scores[f"pass@{k}"] == pytest.approx((np.mean(by_problem), np.std(by_problem, ddof=1) / math.sqrt(3)))


def test_scores_of_a_task_use_all_references_and_name_their_parts():
    examples = [{"target": "blue", "references": ["Blue", "dark blue"]}, {"target": "on the roof"}, {"target": "roof"}]
    scores = metrics.qa_scores([["dark blue\n"], ["on the red roof"], ["The roof"]], examples).scores
    assert {name: value for name, (value, _) in scores.items()} == pytest.approx(
        {"f1": (100 + 80 + 100) / 3, "squad_em": 200 / 3, "exact_match": 100 / 3})
    assert metrics.exact_scores([["x", "blue", "Blue", "y"], [" on the roof"]], examples[:2]).scores["exact_match"][0] == 75
    translated = metrics.translation_scores([["a"], ["b"]], examples[:2])
    assert list(translated.scores) == ["bleu", "exact_match"] and translated.signature.startswith("nrefs:var|")


def test_a_target_is_a_gold_answer_though_its_references_do_not_repeat_it():
    examples = [{"target": "Oslo is there", "references": ["the city of Oslo, Norway"]}] * 2
    assert metrics.gold_answers(examples[0]) == ["Oslo is there", "the city of Oslo, Norway"]
    for texts in (["Oslo is there"], ["the city of Oslo, Norway"]):
        for score in metrics.METRICS.values():
            found = score([texts] * 2, examples).scores
            assert all(value == pytest.approx(100) for name, (value, _) in found.items() if name != "bleu"), (texts, found)
    assert metrics.translation_scores([["the city of Oslo, Norway"]] * 2, examples).scores["bleu"][0] == pytest.approx(100)


def test_bleu_splits_a_language_without_spaces_and_its_signature_says_how():
    from sacrebleu.metrics import BLEU
    gold, other = "一盏绿色的灯放在窗台上", "一盏红色的灯放在窗台上"
    examples = [{"target": gold}, {"target": "三只鸟在屋顶上唱歌跳舞"}]
    answers = [[other], ["三只鸟在屋顶上唱歌跳舞"]]
    assert metrics.translation_scores(answers, examples).scores["bleu"][0] == 0, "sacreBLEU's default finds no 4-gram"
    expected = BLEU(tokenize="zh").corpus_score([a[0] for a in answers], [[e["target"] for e in examples]]).score
    chinese = metrics.translation_scores(answers, examples, "zh")
    assert chinese.scores["bleu"][0] == pytest.approx(expected) and 50 < expected < 100 and "tok:zh" in chinese.signature
    assert "tok:13a" in metrics.translation_scores(answers, examples, "fr").signature


@pytest.mark.parametrize("texts, language", [
    (["the cat", "le chat"], None), (["一盏绿色的灯", "三只鸟 A"], "zh"), (["ネコがいます"], "th"), (["แมวอยู่ที่นี่"], "th"),
    (["123 + 4"], None), (["наша кошка"], None), (["word 灯"], None), ([""], None)])
def test_texts_without_spaces_are_noticed_where_nobody_named_their_language(texts, language):
    assert metrics.language_of(texts) == language


def test_a_language_whose_tokenizer_wants_a_package_says_which(monkeypatch):
    import sacrebleu.metrics
    def missing(**_):
        raise RuntimeError("no MeCab")
    monkeypatch.setattr(sacrebleu.metrics, "BLEU", missing)
    with pytest.raises(UserError, match="language 'ja' needs a package: pip install"):
        metrics.bleu(["a"], [["a"]], "ja")


def test_answers_in_a_language_without_spaces_are_compared_by_characters():
    gold = {"target": "北京大学", "references": ["北京大学。"]}
    assert metrics.qa_scores([["北京大学"]], [gold], "zh").scores["squad_em"][0] == 100
    one_short = metrics.qa_scores([["北京大"]], [gold], "zh").scores
    assert one_short["squad_em"][0] == 0 and one_short["f1"][0] == pytest.approx(200 * 3 / 7)
    by_words = metrics.qa_scores([["北京大"]], [gold])
    assert by_words.scores["f1"][0] == 0 and by_words.signature is None, "as SQuAD does it"
    assert metrics.qa_scores([["北京大"]], [gold], "zh").signature == "F1 over characters (zh)"
    assert metrics.exact_match_and_f1("GPT 4 的", ["gpt 4 的"], "zh") == (100, 100), "what has spaces keeps its words"


@pytest.mark.parametrize("metric", metrics.METRICS)
def test_the_values_of_examples_have_the_score_as_their_mean_and_its_error_as_their_own(metric):
    hypotheses, references = corpus(60, 0)
    predictions, examples = [[h] for h in hypotheses], [{"target": r[0], "references": r} for r in references]
    scores, values, *_ = metrics.METRICS[metric](predictions, examples)
    score, error = next(iter(scores.values()))
    assert len(values) == 60 and metrics.standard_error(values) == pytest.approx(error)
    assert np.mean(values) == pytest.approx(score, abs=0.1 * error if metric == "bleu" else 1e-9)


def test_nothing_to_score_and_uneven_lists_are_errors():
    for score in metrics.METRICS.values():
        with pytest.raises(UserError, match="no predictions"):
            score([], [])
        with pytest.raises(UserError, match="1 predictions for 2 examples"):
            score([["a"]], [{"target": "a"}] * 2)
    with pytest.raises(UserError, match="no predictions"):
        judge.score("code", [], [])
