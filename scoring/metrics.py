"""Scores for eval.py: BLEU, the SQuAD exact match and F1, pass@k, plain exact match, each with its standard error.

Every score is in percent, 0 to 100, and so is its standard error: one unit of luck of the test set, nan for one example.

    scored = METRICS[metric](predictions, examples, language)     # Scored

predictions[i] lists the answers to examples[i], which has a `target` and perhaps `references`. language (zh, say, or None) says
how words are told apart. Code is scored by judge.py, from what sandbox.py reports.
"""
import collections
import itertools
import math
import re
import statistics
import string
import unicodedata
from typing import NamedTuple

from engine.cli import UserError, check

# How sacreBLEU splits languages that put no spaces between words; for all others its default, 13a.
UNSPACED = {"zh": "zh", "ja": "ja-mecab", "th": "char", "lo": "char", "km": "char", "my": "char"}
UNSPACED_LETTER = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")


def language_of(texts):
    """Return the language of texts that no meta.json names, as far as splitting needs it: zh, th (by characters) or None."""
    letters = "".join(c for c in "".join(texts) if c.isalpha())
    if 2 * len(UNSPACED_LETTER.findall(letters)) <= len(letters):
        return None
    han, kana = (re.search(some, letters) for some in ("[\u3400-\u4dbf\u4e00-\u9fff]", "[\u3040-\u30ff]"))
    return "zh" if han and not kana else "th"


def standard_error(values):
    """Return the standard error of the mean, sqrt(sum (v - mean)^2 / (n - 1) / n); nan for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def bleu(hypotheses, references, language=None):
    """Return (score, standard error, signature, scores without each sentence) of a corpus; references[i] is a list.

    The score is sacreBLEU's with its default settings and its tokenizer for the language, which the signature records: BLEU
    without it cannot be compared. (By its definition a corpus without a single 4-gram scores 0, perfect or not.)
    The standard error is the delete-one jackknife over sentences, sqrt((n - 1) / n * sum (b_i - mean b)^2), with b_i the BLEU
    of the corpus without sentence i. BLEU is no mean of sentence scores, but a smooth function of summed n-gram counts, for
    which the jackknife agrees with the bootstrap; it needs no seed, and n evaluations where the bootstrap takes 1000.
    """
    from sacrebleu.metrics import BLEU  # here: a third of a second that nothing else need wait
    tokenize = UNSPACED.get(language, "13a")
    try:
        metric = BLEU(tokenize=tokenize)
    except RuntimeError as error:  # a tokenizer that wants a package of its own
        raise UserError(f"BLEU of language {language!r} needs a package: pip install 'sacrebleu[ja]' ({error})") from error
    # sacreBLEU wants one stream per reference number; None fills up where a sentence has fewer references than another.
    score = metric.corpus_score(hypotheses, [*itertools.zip_longest(*references)]).score
    per_sentence = BLEU(effective_order=True, tokenize=tokenize)  # for its counts; effective_order only silences a warning
    parts = [per_sentence.sentence_score(hyp, refs) for hyp, refs in zip(hypotheses, references)]
    counts = [(*part.counts, *part.totals, part.sys_len, part.ref_len) for part in parts]
    sums, without = [sum(column) for column in zip(*counts)], []
    for row in counts:
        *ngrams, sys_len, ref_len = [s - r for s, r in zip(sums, row)]
        without.append(BLEU.compute_bleu(ngrams[:4], ngrams[4:], sys_len, ref_len, smooth_method="exp").score)
    n = len(without)
    error = (n - 1) / math.sqrt(n) * statistics.stdev(without) if n > 1 else math.nan  # stdev has the other 1/(n - 1)
    return score, error, str(metric.get_signature()), without


def _normalise(text, language=None):
    """Return the words of an answer as the SQuAD v1.1 evaluation sees them: lower case, no punctuation, no articles."""
    # Only ASCII punctuation goes, and it goes before the articles ("a.b" becomes the word "ab"): that is the official order.
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    if language in UNSPACED:  # each character is a word, as in MLQA (arXiv 1910.07475)
        text = "".join(char for char in text if not unicodedata.category(char).startswith("P"))
        return UNSPACED_LETTER.sub(lambda letter: f" {letter[0]} ", text).split()
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(words, gold):
    """Return the harmonic mean of precision and recall of a bag of words, as a share."""
    n_common = sum((collections.Counter(words) & collections.Counter(gold)).values())
    # Two empty bags (an answer of articles or punctuation) share no word: v1.1 gives F1 0 there, beside an exact match of 1.
    return 2 * n_common / (len(words) + len(gold)) if n_common else 0.0


def exact_match_and_f1(prediction, references, language=None):
    """Return the SQuAD v1.1 (exact match, F1), each the best over the references (Rajpurkar et al. 2016, section 6)."""
    words, golds = _normalise(prediction, language), [_normalise(text, language) for text in references]
    return 100.0 * max(words == gold for gold in golds), 100.0 * max(_f1(words, gold) for gold in golds)


def pass_at_k(n, c, k):
    """Return the chance that k of n samples, drawn without replacement, hold one of the c correct: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1). Whole numbers until the one division, so it is
    exact for any n. 1 - (1 - c/n)^k, the tempting shortcut, is biased.
    """
    check(0 <= c <= n and 1 <= k <= n, f"pass@{k} is not defined for {c} correct of {n} samples")
    return 100 * (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def means(columns):
    """Turn {name: one value per example} into {name: (mean, standard error)}."""
    check(all(len(values) > 0 for values in columns.values()), "no predictions to score")
    return {name: (statistics.fmean(values), standard_error(values)) for name, values in columns.items()}


def gold_answers(example):
    """Return all answers that count as right: the target, and the references, which need not repeat it."""
    return list(dict.fromkeys([example["target"], *example.get("references", [])]))


class Scored(NamedTuple):
    scores: dict  # name -> (percent, standard error), the task's main score first
    values: list  # one for each example: their mean is the main score, their standard error its own
    signature: str | None = None  # what must be printed beside a score, for it to be compared with another
    failures: dict = {}  # of programs that were run: reason -> how many, the most frequent first


def exact_scores(predictions, examples, language=None):
    """Score strings that must equal a gold answer, apart from space at the ends; several samples count by their share."""
    check(len(predictions) == len(examples), f"{len(predictions)} predictions for {len(examples)} examples")
    gold = [{answer.strip() for answer in gold_answers(example)} for example in examples]
    values = [100.0 * statistics.fmean(text.strip() in answers for text in texts) for texts, answers in zip(predictions, gold)]
    return Scored(means({"exact_match": values}), values)


def translation_scores(predictions, examples, language=None):
    """Score the first prediction of each example by BLEU, and all of them by plain exact match.

    BLEU is no mean: its values are those of the jackknife, n * b - (n - 1) * b_i, whose mean is BLEU to order 1/n.
    """
    exact = exact_scores(predictions, examples).scores
    gold = [gold_answers(example) for example in examples]
    score, error, signature, without = bleu([texts[0] for texts in predictions], gold, language)
    n = len(without)
    return Scored({"bleu": (score, error), **exact}, [n * score - (n - 1) * b for b in without], signature)


def qa_scores(predictions, examples, language=None):
    """Score the first prediction of each example as SQuAD does (f1, squad_em), and all of them by plain exact match."""
    exact = exact_scores(predictions, examples).scores
    match, f1 = zip(*(exact_match_and_f1(texts[0], gold_answers(e), language) for texts, e in zip(predictions, examples)))
    return Scored(means({"f1": f1, "squad_em": match}) | exact, list(f1),
                  f"F1 over characters ({language})" if language in UNSPACED else None)


METRICS = {"bleu": translation_scores, "qa": qa_scores, "exact": exact_scores}  # "code" has to be run first: judge.py
