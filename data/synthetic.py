"""Synthetic tasks that need no download: `translate`, `qa`, `code`, `plan`. Each example is a function of its address alone.

They are made so that models differ. `code` (and only `code`) has many right answers to one input: a model that denoises all
positions in parallel must settle on one of them everywhere, an autoregressive one just goes on with what it has begun.
`translate` needs reordering and agreement, `qa` needs reading, `plan` needs to know the end first. The splits never share a
problem: a checksum of a problem, or of each pair of words it combines, says which split owns it; validation and test hold only
combinations that training never shows.
"""
import collections
import functools
import itertools
import json
import random
import zlib
from pathlib import Path

META = {  # input_len, target_len: the canvas in tokens of `bpe` that holds every example and its EOS
    "translate": {"metric": "bleu", "input_len": 20, "target_len": 20},
    "qa": {"metric": "qa", "input_len": 80, "target_len": 8},
    "code": {"metric": "code", "input_len": 24, "target_len": 32},
    "plan": {"metric": "exact", "input_len": 28, "target_len": 6},
}


def example(task, seed, split, index):
    """Return example number `index`: {"input", "target"} and, for qa, "references", for code, "tests".

    The split decides which problems may occur; the seed only their order and wording, so no seed leaks test problems.
    """
    # A string seeds the generator through SHA-512. hash() would differ from one Python process to the next.
    return TASKS[task](seed, split, index, random.Random(f"{task}/{seed}/{split}/{index}"))


def _split_of(*words):
    """Name the split that owns this combination of words: 65 % train, 15 % valid, 20 % test."""
    bucket = zlib.crc32(" ".join(words).encode()) % 20
    return "test" if bucket < 4 else "valid" if bucket < 7 else "train"


def _pick(rng, items):
    """Return a random item. Of random.Random only random() is promised to be the same in every Python version."""
    return items[int(rng.random() * len(items))]


def _shuffled(rng, items):
    return sorted(items, key=lambda _: rng.random())


# --- translate: English into a language that puts the adjective after the noun, the verb last and a marker on everything ---
WORDS = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))  # English: the other language
PEOPLE, THINGS = ({(one, many): (word, kind) for one, many, word, kind in WORDS[name]} for name in ("people", "things"))
ADJECTIVES, WHERE, VERBS = dict(WORDS["adjectives"]), dict(WORDS["where"]), {(now, past): w for now, past, w in WORDS["verbs"]}
MARKERS = {"the": (("le", "les"), ("la", "lo")), "a": (("un", "des"), ("une", "do"))}  # article, class, number
PRONOUNS = (("lui", "mo"), ("el", "ti"))                                               # class, number
# Every grammatical choice but the words. Dealt like cards, they keep the first 1,536 sentences of a split distinct.
FORMS = tuple(itertools.product(MARKERS, MARKERS, *[(0, 1)] * 5, WHERE))


@functools.cache
def _dealt(seed, split):
    """List FORMS in the order of a seed; and the subjects with adjective and verb, the objects with adjective of a split."""
    subjects = [(adjective, noun, verb) for adjective, noun, verb in itertools.product(ADJECTIVES, PEOPLE, VERBS)
                if _split_of(adjective, noun[0]) == split == _split_of(noun[0], verb[0])]
    objects = [pair for pair in itertools.product(ADJECTIVES, THINGS) if _split_of(pair[0], pair[1][0]) == split]
    return _shuffled(random.Random(f"forms/{seed}/{split}"), FORMS), subjects, objects


def _noun_phrase(article, adjective, noun, plural):
    """Return the English words, the foreign ones, and the class of the noun."""
    word, kind = {**PEOPLE, **THINGS}[noun]
    marker = MARKERS[article][kind][plural]
    english = ["some" if article == "a" and plural else article, adjective, noun[plural]]
    foreign = [word, marker] + ([ADJECTIVES[adjective], marker] if adjective else [])
    return " ".join(filter(None, english)), " ".join(foreign), kind


def _translate(seed, split, index, rng):
    forms, subjects, objects = _dealt(seed, split)
    article1, article2, plural1, plural2, described, past, negative, where = forms[index % len(forms)]
    (adjective1, noun1, (verb, verb_past)), (adjective2, noun2) = _pick(rng, subjects), _pick(rng, objects)
    subject, foreign_subject, kind = _noun_phrase(article1, adjective1, noun1, plural1)
    thing, foreign_thing, _ = _noun_phrase(article2, adjective2 if described else "", noun2, plural2)
    action = {(0, 0): f"will {verb}", (0, 1): f"will not {verb}", (1, 0): verb_past, (1, 1): f"did not {verb}"}[past, negative]
    foreign = [WHERE[where], foreign_subject, foreign_thing, PRONOUNS[kind][plural1], "a" if past else "au",
               VERBS[verb, verb_past], "ne" if negative else ""]
    return {"input": " ".join(filter(None, [subject, action, thing, where])), "target": " ".join(filter(None, foreign))}


# --- qa: who has what, where things are, when people came; several sentences look alike, one holds the answer ---
NAMES, COLOURS, OBJECTS, PLACES, TIMES = (WORDS[name] for name in ("names", "colours", "objects", "places", "times"))
KINDS = {"place": ("put", "left"), "has": ("has", "holds"), "time": ("came", "arrived")}  # kind of fact -> its verbs


def _fact(rng, split, kind, used, like=None):
    """Draw a (key, value) that the split owns, neither of them in `used`; `like` is a thing that it should look like."""
    while True:
        name, colour, thing = _pick(rng, NAMES), _pick(rng, COLOURS), _pick(rng, OBJECTS)
        if like:
            roll = rng.random()  # 10 % share nothing, so that no loop can run out of facts
            colour, thing = (like.split()[0] if roll < 0.45 else colour), (like.split()[1] if 0.45 <= roll < 0.9 else thing)
        item = f"{colour} {thing}"
        fact = {"place": (item, _pick(rng, PLACES)), "has": (name, item), "time": (name, _pick(rng, TIMES))}[kind]
        if not used.intersection(fact) and _split_of(*fact) == split:
            used.update(fact)
            return fact


def _sentence(rng, kind, key, value, used):
    # Of a place: somebody who is in no other sentence, so it says nothing about who has it, or came when.
    name = _pick(rng, [name for name in NAMES if name not in used]) if kind == "place" else key
    used.add(name)
    rest = {"place": f"the {key} {value}", "has": f"the {value}", "time": value}[kind]
    return f"{name} {_pick(rng, KINDS[kind])} {rest}."


def _qa(_seed, split, _index, rng):
    kind, used = _pick(rng, [*KINDS]), set()
    key, value = _fact(rng, split, kind, used)
    item = {"place": key, "has": value, "time": None}[kind]
    places = [place for place in PLACES if place != value and _split_of(key, place) == split] if kind == "place" else []
    moved = bool(places) and rng.random() < 0.5  # the thing was elsewhere before; the last sentence about it holds
    before = _pick(rng, places) if moved else ""
    used.add(before)
    others = [kind] + [_pick(rng, [*KINDS]) for _ in range(1 + int(rng.random() * 3) - moved)]  # 3 to 5 sentences in all
    facts = [(kind, key, value)] + [(k, *_fact(rng, split, k, used, item if k == kind else None)) for k in others]
    facts = _shuffled(rng, facts)
    if moved:
        facts.insert(int(rng.random() * (facts.index((kind, key, value)) + 1)), (kind, key, before))
    what = kind == "has" and rng.random() < 0.5
    question = {"place": f"where is the {key}?", "time": f"when did {key} come?",
                "has": f"what does {key} have?" if what else f"who has the {value}?"}[kind]
    words = (f"the {value}" if what else key if kind == "has" else value).split()
    context = " ".join(_sentence(rng, *fact, used) for fact in facts)
    # Shorter forms are right as well: "the garden" and "garden" for "in the garden", but not "ball" for "the red ball".
    return {"input": f"question: {question} context: {context}", "target": " ".join(words),
            "references": [" ".join(words[i:]) for i in range(len(words) - what)]}


# --- code: filter, then map, then reduce a list; every problem has 6 or 12 equally likely programs ---
FILTERS, MAPS, REDUCTIONS, LISTS = (WORDS[name] for name in ("filters", "maps", "reductions", "lists"))
VARIABLES = ("n", "x", "i")


def _sensible(kind, mapping, reduction):
    """Leave out problems that ask for nothing, mean the same as another one, or show too little of what was computed."""
    return not (kind == "all" and mapping == "same"
                or kind in ("positive", "negative", "above") and mapping == "size"
                or kind == "multiple" and mapping == "modulo"
                or reduction == "count" and mapping != "same"
                or reduction in ("first", "last", "max", "min") and mapping in ("over", "modulo")
                or reduction in ("max", "min") and mapping in ("size", "square")
                or reduction in ("max", "min") and kind in ("positive", "negative", "above", "below"))


@functools.cache
def _problems():
    """List all problems. Two of them never agree on LISTS, so no program passes the tests of another problem."""
    filters, maps = ([(name, k) for name, row in table.items() for k in range(*row[2])] for table in (FILTERS, MAPS))
    problems = [p for p in itertools.product(filters, maps, REDUCTIONS) if _sensible(p[0][0], p[1][0], p[2])]
    answers = [str(_answers(problem)) for problem in problems]
    count = collections.Counter(answers)
    return [problem for problem, answer in zip(problems, answers) if count[answer] == 1]


@functools.cache
def _deck(seed, split):
    return _shuffled(random.Random(f"problems/{seed}/{split}"), [p for p in _problems() if _split_of(str(p)) == split])


def _answers(problem):
    """Run a problem's program, any spelling, on LISTS: it is our own (a model's runs in scoring/sandbox.py alone)."""
    scope = {}
    exec(_program(random.Random(0), problem), scope)
    return [scope["f"](xs) for xs in LISTS]


def _program(rng, problem):
    """Return one of the 6 (12 where the map has two spellings) programs that solve a problem."""
    (kind, k), (mapping, j), reduction = problem
    v = _pick(rng, VARIABLES)
    condition, value = FILTERS[kind][1].format(v=v, k=k), _pick(rng, MAPS[mapping][1]).format(v=v, k=j)
    _, plain, second, with_call = REDUCTIONS[reduction]
    call = (f"filter(lambda {v}: {condition}, data)" if mapping == "same" else
            f"map(lambda {v}: {value}, data)" if not condition else "")
    gen, back = (f"{value} for {v} in {source}" + (f" if {condition}" if condition else "")
                 for source in ("data", "reversed(data)"))
    spelling = _pick(rng, (plain, with_call if call else second))
    return "def f(data):\n    return " + spelling.format(gen=gen, back=back, call=call)


def _code(seed, split, index, rng):
    deck = _deck(seed, split)
    problem = deck[index % len(deck)]
    (kind, k), (mapping, j), reduction = problem
    np = _pick(rng, FILTERS[kind][0]).format(k=k)
    text = f"{_pick(rng, MAPS[mapping][0]).format(np=np, k=j)} and {_pick(rng, REDUCTIONS[reduction][0])}"
    return {"input": text, "target": _program(rng, problem),
            "tests": [f"assert f({list(xs)}) == {answer}" for xs, answer in zip(LISTS, _answers(problem))]}


# --- plan: the way through a path-star graph (arXiv 2403.06963). From a start two arms lead to two ends; all edges are given in
# random order, then the start and one end; the answer is the arm that leads there: "k w, a d, d t, g a, ... from g to p" ->
# "g a d t p". Who writes from left to right must choose the arm with the first node, all others are but steps along an edge ---

NODES = "abcdefghijklmnoprstvwxyz"  # a letter behind a space is one token of `bpe`: all but q and u
ARM = 4  # nodes behind the start


def _plan(_seed, split, _index, rng):
    while True:
        start, *rest = _shuffled(rng, NODES)
        arms = rest[:ARM], rest[ARM:2 * ARM]
        if _split_of("".join([start, *sorted("".join(arm) for arm in arms)])) == split:
            break
    way = [start, *_pick(rng, arms)]
    edges = _shuffled(rng, [f"{a} {b}" for arm in arms for a, b in zip([start, *arm], arm)])
    return {"input": f"{', '.join(edges)} from {start} to {way[-1]}", "target": " ".join(way)}


TASKS = {"translate": _translate, "qa": _qa, "code": _code, "plan": _plan}
