"""The synthetic tasks, read back by independent readers that share no table with the generator."""
import collections
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data import synthetic
from data.synthetic import META, TASKS, example
from data.tasks import SPLITS
from data.tokenizer import load_tokenizer

N = {"train": 5000, "valid": 1000, "test": 2000}


def examples(task, split, n=None, seed=0):
    return [example(task, seed, split, index) for index in range(n or N[split])]


# ---- the independent readers ----

MARKER = {"le": (0, 0, "the"), "les": (0, 1, "the"), "la": (1, 0, "the"), "lo": (1, 1, "the"),  # class, plural, article
          "un": (0, 0, "a"), "des": (0, 1, "a"), "une": (1, 0, "a"), "do": (1, 1, "a")}


def read_english(sentence):
    """Parse a source sentence into (subject adjective, noun, verb, object adjective or '', noun, rest)."""
    form = re.fullmatch(r"(the|a|some) (\w+) (\w+) (?:will not|will|did not|(?=\w+ (?:the|a|some) )) ?(\w+) (the|a|some) "
                        r"(.+?)((?: (?:in|near|on) the \w+| today| at night)?)", sentence)
    described, thing = form[6].split() if " " in form[6] else ("", form[6])
    return form[2], form[3], form[4], described, thing, form[7].strip()


def stem(word):
    """Bring plurals and past tenses to one form."""
    irregular = {"men": "man", "women": "woman", "children": "child", "ladies": "lady", "mice": "mouse", "boxes": "box",
                 "dress": "dress", "dresses": "dress", "horses": "horse", "pass": "pass", "found": "find", "saw": "see",
                 "took": "take", "sold": "sell", "broke": "break", "held": "hold", "carried": "carry", "made": "make",
                 "kept": "keep"}
    return irregular.get(word, re.sub(r"(ed|s)$", "", word))


def translate_back(target, nouns, adjectives, verbs, places, forms):
    """Undo the grammar: [place] noun marker [adj marker] noun marker [adj marker] pronoun tense verb [ne]."""
    words = target.split()
    negative = words[-1] == "ne"
    words = words[:-1] if negative else words
    pronoun, tense, verb = words[-3:]
    rest, phrases, start = words[:-3], [], 0
    place = " ".join(itertools.takewhile(lambda word: word not in nouns, rest))
    rest = rest[len(place.split()):]
    while start < len(rest):
        kind, plural, article = MARKER[rest[start + 1]]
        described = start + 3 < len(rest) and rest[start + 3] in MARKER and rest[start + 2] in adjectives
        assert not described or rest[start + 3] == rest[start + 1], "the adjective agrees with its noun"
        noun = nouns[rest[start]]
        phrases.append([("some" if article == "a" and plural else article), adjectives[rest[start + 2]] if described else "",
                        forms[noun][plural]])
        if not start:
            assert pronoun == [["lui", "mo"], ["el", "ti"]][kind][plural], "the pronoun agrees with the subject"
        start += 4 if described else 2
    base, past = verbs[verb]
    action = {("a", False): past, ("a", True): f"did not {base}",
              ("au", False): f"will {base}", ("au", True): f"will not {base}"}
    subject, thing = (" ".join(filter(None, phrase)) for phrase in phrases)
    return " ".join(filter(None, [subject, action[tense, negative], thing, places[place]]))


def read_passage(text):
    """Answer a question by reading its passage, last sentence first. Return (answer, facts of the passage)."""
    question, context = re.fullmatch(r"question: (.*\?) context: (.*)\.", text).groups()
    facts = []
    for sentence in context.split(". "):
        put = re.fullmatch(r"\w+ (?:put|left) the (\w+ \w+) (.+)", sentence)
        has = re.fullmatch(r"(\w+) (?:has|holds) the (\w+ \w+)", sentence)
        came = re.fullmatch(r"(\w+) (?:came|arrived) (.+)", sentence)
        facts.append(("put", *put.groups()) if put else ("has", *has.groups()) if has else ("came", *came.groups()))
    patterns = {r"where is the (\w+ \w+)\?": ("put", 1, "{}"), r"who has the (\w+ \w+)\?": ("has", 2, "{}"),
                r"what does (\w+) have\?": ("has", 1, "the {}"), r"when did (\w+) come\?": ("came", 1, "{}")}
    for pattern, (relation, column, form) in patterns.items():
        asked = re.fullmatch(pattern, question)
        if asked:
            found = [fact for fact in facts if fact[0] == relation and fact[column] == asked[1]]
            return form.format(found[-1][3 - column]), facts, len(found)


def read_task(sentence):
    """Turn the English of a code problem into (key, function): what the sentence says, not what the generator meant."""
    body, _, ending = sentence.rpartition(" and ")
    reductions = [("list|return them all", list), ("sum|add them up", sum), ("largest|maximum", max), ("smallest|minimum", min),
                  ("sort|in order", sorted), ("reverse|backwards", lambda v: v[::-1]), ("first", lambda v: v[0]),
                  ("last", lambda v: v[-1]), ("count|how many", len)]
    name, reduce = next((words, f) for words, f in reductions if re.search(rf"\b({words})\b", ending))
    noun = re.search(r"each (number divisible by \d|multiple of \d|number (?:greater than|less than|above|below) (?:\d|zero)"
                     r"|(?:\w+ )?number)", body)[1]
    digit = int((re.findall(r"\d", noun) or [0])[0])
    verb = body.replace(noun, "")
    number = int((re.findall(r"\d", verb) or [0])[0])
    keeps = [("even", lambda n: n % 2 == 0), ("odd", lambda n: n % 2 != 0), ("above zero|positive", lambda n: n > 0),
             ("below zero|negative", lambda n: n < 0), ("greater|above", lambda n: n > digit),
             ("less|below", lambda n: n < digit),
             ("multiple|divisible", lambda n: n % digit == 0), ("number", lambda n: True)]
    changes = [("square|itself", lambda n: n ** 2), ("negate|flip", lambda n: 0 - n), ("absolute|drop", abs),
               ("add|increase", lambda n: n + number), ("subtract|decrease", lambda n: n - number),
               ("modulo", lambda n: n % number),
               ("multiply|times", lambda n: n * number), ("divide", lambda n: n // number), ("take|keep", lambda n: n)]
    kept, keep = next((words, f) for words, f in keeps if re.search(rf"\b({words})\b", noun))
    changed, change = next((words, f) for words, f in changes if re.search(rf"\b({words})\b", verb))
    return (kept, digit, changed, number, name), lambda xs: reduce([change(n) for n in xs if keep(n)])


def passes(program, tests):
    scope = {}
    try:
        exec("\n".join([program, *tests]), scope)  # our own strings; a model's programs run in sandbox.py only
    except Exception:
        return False
    return True


# ---- all three ----

@pytest.mark.parametrize("task", TASKS)
def test_an_example_depends_on_nothing_but_its_address(task):
    forward = {(split, index): example(task, 3, split, index) for split in SPLITS for index in range(50)}
    for split, index in reversed(list(forward)):
        assert example(task, 3, split, index) == forward[split, index]
    assert forward["train", 0] != example(task, 4, "train", 0)


def test_another_process_with_another_hash_seed_makes_the_same_examples():
    code = ("import hashlib, json; from data.synthetic import *; print(hashlib.sha256(json.dumps([example(task, 0, split, i) "
            f"for task in TASKS for split in {SPLITS} for i in range(100)]).encode()).hexdigest())")
    here = [example(task, 0, split, i) for task in TASKS for split in SPLITS for i in range(100)]
    here = hashlib.sha256(json.dumps(here).encode()).hexdigest()
    for hash_seed in "12":
        there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                               cwd=Path(__file__).parent.parent, env={**os.environ, "PYTHONHASHSEED": hash_seed})
        assert there.stdout.strip() == here


@pytest.mark.parametrize("task", TASKS)
def test_the_test_split_repeats_nothing_and_uses_only_words_of_training(task):
    for seed in (0, 1):
        assert len({e["input"] for e in examples(task, "test", 1000, seed)}) == 1000
    words = {split: {word for e in examples(task, split) for text in (e["input"], e["target"])
                     for word in re.findall(r"\w+|[^\w\s]+", text)} for split in SPLITS}
    assert not words["test"] - words["train"] and not words["valid"] - words["train"]
    assert all(e["input"] == e["input"].lower() for e in examples(task, "train", 500))


@pytest.mark.parametrize("task", TASKS)
def test_every_example_fits_the_recommended_canvas(task):
    encode = load_tokenizer("bpe").encode
    for e in examples(task, "train", 4000):
        assert len(encode(e["input"])) <= META[task]["input_len"], e["input"]
        assert len(encode(e["target"])) + 1 <= META[task]["target_len"], e["target"]  # + 1: EOS


# ---- translate ----

def tables():
    """Hand the inverse translator its dictionaries: words only, all grammar is its own."""
    nouns = {**synthetic.PEOPLE, **synthetic.THINGS}
    return ({word: noun[0] for noun, (word, _) in nouns.items()}, {f: e for e, f in synthetic.ADJECTIVES.items()},
            {f: e for e, f in synthetic.VERBS.items()}, {f: e for e, f in synthetic.WHERE.items()}, {n[0]: n for n in nouns})


def test_an_inverse_translator_recovers_every_sentence():
    dictionaries = tables()
    for split in SPLITS:
        for e in examples("translate", split, 1000):
            assert translate_back(e["target"], *dictionaries) == e["input"]


def test_translation_is_a_function_of_the_input_and_never_word_by_word():
    train = examples("translate", "train")
    by_input = {e["input"]: e["target"] for e in train}
    assert all(by_input[e["input"]] == e["target"] for e in train)
    verb_last = [e["target"].split()[-1] == "ne" or e["target"].split()[-1] in tables()[2] for e in train]
    assert all(verb_last)


def test_held_out_pairs_of_words_never_occur_in_training():
    seen = {split: set() for split in SPLITS}
    for split in SPLITS:
        for e in examples("translate", split):
            adjective1, noun1, verb, adjective2, noun2, _ = map(stem, read_english(e["input"]))
            pairs = {(adjective1, noun1), (noun1, verb)} | ({(adjective2, noun2)} if adjective2 else set())
            seen[split] |= pairs
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["valid"] and not seen["valid"] & seen["test"]
    assert len(seen["test"]) > 100 and len(seen["train"]) > 400


# ---- qa ----

def test_a_reader_finds_the_same_answer_and_it_is_a_span():
    lengths, asked = collections.Counter(), collections.Counter()
    for split in SPLITS:
        for e in examples("qa", split):
            answer, facts, n_found = read_passage(e["input"])
            assert answer == e["target"] == e["references"][0]
            context = e["input"].split("context: ")[1]
            assert all(re.search(rf"\b{reference}\b", context) for reference in e["references"])
            shorter = {"where": 3, "when": len(answer.split()), "who": 1, "what": 2}[e["input"].split()[1]]
            assert len(e["references"]) == shorter, "the garden and garden for in the garden, but not ball for the red ball"
            assert 3 <= len(facts) <= 5 and n_found in (1, 2)
            lengths[len(answer.split())] += 1
            asked[e["input"].split()[1], n_found] += 1
    assert set(lengths) == {1, 2, 3} and min(lengths.values()) > 500
    assert set(asked) == {("where", 1), ("where", 2), ("who", 1), ("what", 1), ("when", 1)} and min(asked.values()) > 500


def test_questions_need_every_word_of_what_they_ask_for():
    """Another sentence of the same kind is always there: neither the kind of question nor one word of it gives the answer."""
    confusable = 0
    for e in examples("qa", "test"):
        _, facts, n_found = read_passage(e["input"])
        relation = {"where": "put", "who": "has", "what": "has", "when": "came"}[e["input"].split()[1]]
        assert len([fact for fact in facts if fact[0] == relation]) > n_found
        asked = re.search(r"the (\w+) (\w+)\?", e["input"])
        if asked:
            things = [fact[1 if fact[0] == "put" else 2].split() for fact in facts if fact[0] == relation]
            confusable += any((colour == asked[1]) != (thing == asked[2]) for colour, thing in things)
    assert confusable > 800  # of the about 1,000 questions with "the red ball" in them: half of "has", all of "place"


def test_no_fact_of_a_test_passage_occurs_in_a_training_passage():
    seen = {split: {fact for e in examples("qa", split) for fact in read_passage(e["input"])[1]} for split in SPLITS}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["valid"] and not seen["valid"] & seen["test"]
    assert len(seen["test"]) > 200


def test_no_split_runs_out_of_distractors():
    """_fact() draws until it finds one, so whatever up to five sentences use, one must be left: by enumeration."""
    owned = {split: {t: {n for n in synthetic.NAMES if synthetic._split_of(n, t) == split} for t in synthetic.TIMES}
             for split in SPLITS}
    for split in SPLITS:
        for used in itertools.combinations(synthetic.TIMES, 4):
            assert len(set().union(*(owned[split][t] for t in synthetic.TIMES if t not in used))) > 4
    items = [f"{colour} {thing}" for colour in synthetic.COLOURS for thing in synthetic.OBJECTS]
    for split, (values, pair) in itertools.product(SPLITS, ((synthetic.PLACES, lambda i, v: (i, v)),
                                                            (synthetic.NAMES, lambda i, v: (v, i)))):
        owned = [sum(1 << n for n, v in enumerate(values) if synthetic._split_of(*pair(i, v)) == split) for i in items]
        for used in itertools.combinations(range(len(values)), 5):
            assert sum(1 for values_of_item in owned if values_of_item & ~sum(1 << n for n in used)) > 4


# ---- code ----

def test_every_program_passes_its_tests_and_does_what_the_sentence_says():
    for split in SPLITS:
        for e in examples("code", split, 1000):
            _, meaning = read_task(e["input"])
            assert passes(e["target"], e["tests"]), e
            scope = {"f": meaning}
            exec("\n".join(e["tests"]), scope)


def test_no_program_passes_the_tests_of_another_problem():
    """Exhaustive: the expected outputs of all problems differ, and a program passes only where its outputs are equal."""
    keys = {}
    for split in SPLITS:
        for index in range(len(synthetic._deck(0, split))):
            e = example("code", 0, split, index)
            keys.setdefault(tuple(e["tests"]), set()).add(read_task(e["input"])[0])
    assert len(keys) == sum(len(synthetic._deck(0, split)) for split in SPLITS) > 7000
    assert all(len(problems) == 1 for problems in keys.values())


def test_a_slip_of_one_token_fails_the_tests():
    """One digit, one comparison, one reduction or one variable: what a parallel decoder gets wrong must not pass."""
    slips = [(r"\b\d\b", lambda m: str((int(m[0]) + 1) % 10)), (r"\b(for) [nxi]\b", lambda m: "for q"), (r"==", lambda m: "!="),
             (r" > ", lambda m: " < "), (r" < ", lambda m: " > "), ("sum|sorted", lambda m: "list"), ("max", lambda m: "min"),
             (r"\[0\]", lambda m: "[-1]"), (r"\[::-1\]", lambda m: ""), (r"reversed\(xs\)", lambda m: "xs")]
    n_tried = n_passed = 0
    for e in examples("code", "test", 600):
        for pattern, replacement in slips:
            wrong = re.sub(pattern, replacement, e["target"], count=1)
            if wrong != e["target"]:
                n_tried += 1
                n_passed += passes(wrong, e["tests"])
    assert n_tried > 1000
    assert n_passed == 0


@pytest.mark.slow
def test_a_problem_has_6_or_12_programs_and_training_shows_several():
    n_problems = len(synthetic._deck(0, "train"))
    spellings, wordings = collections.defaultdict(set), collections.defaultdict(set)
    for problem, copy in itertools.product(range(0, n_problems, 200), range(120)):
        e = example("code", 0, "train", problem + copy * n_problems)
        spellings[problem].add(e["target"])
        wordings[problem].add(e["input"])
    assert {len(programs) for programs in spellings.values()} == {6, 12}
    assert min(map(len, wordings.values())) >= 4
    shown = collections.defaultdict(set)
    for e in examples("code", "train", 20_000):
        shown[read_task(e["input"])[0]].add(e["target"])
    assert sum(map(len, shown.values())) / len(shown) > 2.5


@pytest.mark.slow
def test_no_problem_of_valid_or_test_occurs_in_training():
    seen = {split: {read_task(e["input"])[0] for e in examples("code", split, 20_000 if split == "train" else None)}
            for split in SPLITS}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["valid"] and not seen["valid"] & seen["test"]
