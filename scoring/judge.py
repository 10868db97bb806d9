"""Scores that can be trusted: the gold answers are scored first, and every failure of a program has a reason that is counted.

    fault = gold_fault(metric, examples, language, timeout)          # None, or why not even the gold answers score 100
    scored = score(metric, predictions, examples, language, k, timeout)              # metrics.Scored
"""
from collections import Counter

from engine.cli import check
from scoring import metrics
from scoring.sandbox import TIMEOUT, run_many

METRICS = (*metrics.METRICS, "code")


def score(metric, predictions, examples, language=None, k=1, timeout=TIMEOUT):
    """Return Scored for predictions[i], a list of answers to examples[i]. Metric `code` runs them: see scoring/sandbox.py."""
    if metric != "code":
        return metrics.METRICS[metric](predictions, examples, language)
    check(all(example.get("tests") for example in examples), "metric 'code' needs \"tests\" in every example")
    jobs = [(program, "\n".join(example["tests"]), example.get("setup", ""))
            for example, programs in zip(examples, predictions) for program in programs]
    results = run_many(jobs, timeout=timeout)
    passed = iter([result.passed for result in results])
    failures = Counter(kind(result.reason) for result in results if not result.passed)
    values = [metrics.pass_at_k(len(programs), sum(next(passed) for _ in programs), k) for programs in predictions]
    scores = metrics.means({f"pass@{k}": values}) | metrics.exact_scores(predictions, examples).scores
    return metrics.Scored(scores, values, failures=dict(failures.most_common()))


def kind(reason):
    """Return what a reason has in common with others like it: the exception, or the module that was missed."""
    return reason.replace("No module named ", "") if reason.startswith("ModuleNotFoundError") else reason.partition(":")[0]


def counted(failures):
    """Return {reason: n} as text."""
    return ", ".join(f"{reason} ({n})" for reason, n in failures.items())


def gold_fault(metric, examples, language=None, timeout=TIMEOUT):
    """Score the gold answers as if they were predictions; return None if they get 100, else why they do not, and what to do."""
    scored = score(metric, [[example["target"]] for example in examples], examples, language, timeout=timeout)
    name, (value, _) = next(iter(scored.scores.items()))
    if value > 100 - 1e-6:
        return None
    fault = f"the gold answers score {name} {value:.2f}, so no model can be expected to score more: "
    if metric == "code":
        outside = any(reason.startswith("ModuleNotFoundError") for reason in scored.failures)
        return fault + counted(scored.failures) + "; programs find the standard library only" * outside
    if metric == "bleu":
        return fault + ("no gold text has four words in a row; where a language puts no spaces between words, meta.json must "
                        "name its \"language\" (zh, say)")
    alone = [example for example in examples if not metrics.exact_match_and_f1(
        example["target"], metrics.gold_answers(example), language)[1]]
    return fault + (f"{len(alone)} of {len(examples)} hold nothing but articles and punctuation, of which F1 sees nothing; the "
                    f"first is {alone[0]['target']!r}")
