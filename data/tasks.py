"""The end tasks of AR2Diff (arXiv 2401.17181, section 3): translation, question answering and code, all in one format.

A task is a folder of JSONL files, one example a line: {"input": str, "target": str} and, where the metric uses them,
"references" (all gold answers), "tests" and "setup" (Python that runs after the program: setup first, then the tests).
train.jsonl must be there, valid.jsonl and test.jsonl may; meta.json names the metric, and the language of the targets (zh, say)
where it has no spaces between words. Your own data is just such a folder.
"""
import itertools
import json
import random
from functools import partial
from pathlib import Path

from data import synthetic
from data.originals import ADDRESS, find, lines
from engine.cli import UserError, check, one_of
from engine.files import LIST, TEXT, TEXTS, fitting, integer, parse_json, write_json

TASKS = {  # -> meta.json; input_len, target_len: canvas in tokens of `bpe`, EOS included, that holds about 98 % or more
    "multi30k": {"metric": "bleu", "input_len": 48, "target_len": 48},  # 29,000 captions, --langs=en-fr (or de), test 2016
    "wmt14": {"metric": "bleu", "input_len": 128, "target_len": 128},  # an estimate: nobody measured this one
    "squad": {"metric": "qa", "input_len": 640, "target_len": 48},  # SQuAD 1.1, tested on its dev set
    "mbpp": {"metric": "code", "input_len": 384, "target_len": 256},  # targets: median 58, 90 % 145 (the paper's: 59, 150)
    **synthetic.META,
}
SPLITS = ("train", "valid", "test")
LANGUAGES = {"en": "English", "fr": "French", "de": "German"}
EXAMPLE = {"input": TEXT, "target": TEXT, "setup?": TEXT, "references?": TEXTS, "tests?": TEXTS}
ARTICLE, PASSAGE = {"paragraphs": LIST}, {"context": TEXT, "qas": LIST}  # these four: of original files
QUESTION, ANSWER = {"question": TEXT, "answers": LIST}, {"text": TEXT}
RECORD = {"task_id": integer(), "text": TEXT, "code": TEXT, "test_list": TEXTS, "test_setup_code": TEXT}


def read_jsonl(path):
    """Read a file of examples as list[dict]: line n is example n. Every mistake is a UserError that names file and line."""
    path, examples = Path(path), []
    how = f"make it with `python data/prepare.py {path.parent.name} --out={path.parent}`"
    check(path.is_file(), f"{path} does not exist; {how if path.parent.name in TASKS else 'write it, one example a line'}")
    for number, line in lines(path):
        try:
            examples.append(parse_json(line, EXAMPLE))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; write one object a line") from error
    check(examples, f"{path} is empty; write one object a line, with \"input\" and \"target\"")
    return examples


def write_task(name, folder, from_dir="", n_train=0, seed=0, langs="en-fr"):
    """Fill an empty folder with a task; return {split: number of examples}. n_train > 0 limits the first, at random."""
    check(n_train >= 0, f"n_train={n_train} must be 0 (all) or more")
    if name in synthetic.TASKS:
        sizes = {"train": n_train or 20_000, "valid": 500, "test": 1_000}
        splits = {split: map(partial(synthetic.example, name, seed, split), range(size)) for split, size in sizes.items()}
    else:
        splits = _LOADERS[name](from_dir, langs)
        splits["train"] = _sample(splits["train"], n_train, seed) if n_train else splits["train"]
    counts = {split: write_jsonl(folder / f"{split}.jsonl", examples) for split, examples in splits.items()}
    check(all(counts.values()), f"{name}: an original file has no example: {counts}")
    language = {"multi30k": langs[-2:], "wmt14": langs[-2:], "squad": "en"}.get(name)  # of the targets
    meta = {"kind": "task", "name": name, **({"language": language} if language else {}), **TASKS[name], "counts": counts}
    write_json(folder / "meta.json", meta, "out")
    return counts


def write_jsonl(path, examples):
    """Write a file of examples; return their number."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        return sum(file.write(json.dumps(example, ensure_ascii=False) + "\n") > 0 for example in examples)


def _sample(examples, n, seed):
    """Keep n random examples in their order, in one pass (reservoir sampling: WMT14 does not fit in memory)."""
    rng, kept = random.Random(seed), []
    for index, example in enumerate(examples):
        slot = index if index < n else rng.randrange(index + 1)
        if slot < n:
            kept[slot:slot + 1] = [(index, example)]
    return [example for _, example in sorted(kept, key=lambda pair: pair[0])]


# ---- one function per task: original files -> {split: examples} ----
def _parallel(task, names, from_dir, langs):
    pair = langs.split("-")
    check(len(pair) == len(set(pair)) == 2, f"langs={langs!r} must name two languages, as in en-fr")
    prefix = "translate {} to {}: ".format(*(LANGUAGES[one_of("langs", lang, LANGUAGES)] for lang in pair))
    check(from_dir or task != "wmt14", f"wmt14 is not fetched (archives of several GB, {ADDRESS['wmt14']}): join its training "
          f"corpora into train.{pair[0]} and train.{pair[1]}, write newstest2013 to valid.* and newstest2014 to test.* "
          f"(`sacrebleu -t wmt13 -l {langs} --echo src`, and ref; -t wmt14/full), and pass --from_dir=FOLDER")
    paths = find(task, [name.format(lang) for name in names for lang in pair], from_dir)
    return {split: _translations(prefix, paths[2 * i:2 * i + 2]) for i, split in enumerate(SPLITS)}


def _translations(prefix, paths):
    """Yield examples from two parallel files, worded as in T5 (the paper builds on T5X)."""
    for source, target in itertools.zip_longest(*map(lines, paths)):
        check(source and target, f"{paths[0]} and {paths[1]} are not parallel: one has more lines than the other")
        source, target = source[1].strip(), target[1].strip()
        if source and target:  # crawled corpora pair sentences with nothing
            yield {"input": prefix + source, "target": target}


def _squad(from_dir, langs):
    train, dev = (_articles(path) for path in find("squad", ["train-v1.1.json", "dev-v1.1.json"], from_dir))
    # Validation holds out whole articles: questions share passages, so a split by question would leak the answers' text.
    border = len(train) - max(1, round(0.02 * len(train)))
    parts = {"train": train[:border], "valid": train[border:], "test": dev}
    return {split: itertools.chain.from_iterable(articles) for split, articles in parts.items()}


def _articles(path):
    """Return the questions of a SQuAD 1.1 file as examples, one list per article."""
    try:
        articles = parse_json("\n".join(line for _, line in lines(path)), {"data": LIST})["data"]
        return [list(_questions(article)) for article in articles]
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is not a SQuAD 1.1 file ({error})") from error


def _questions(article):
    for passage in fitting(article, ARTICLE)["paragraphs"]:
        for question in fitting(passage, PASSAGE)["qas"]:
            answers = [fitting(answer, ANSWER)["text"] for answer in fitting(question, QUESTION)["answers"]]
            yield {"input": f"question: {question['question'].strip()} context: {passage['context']}", "target": answers[0],
                   "references": list(dict.fromkeys(answers))}


def _mbpp(from_dir, langs):
    path, = find("mbpp", ["mbpp.jsonl"], from_dir)
    ids = {"train": range(601, 975), "valid": range(511, 601), "test": range(11, 511)}  # 1-10: few-shot prompts, unused
    try:
        records = [parse_json(line, RECORD) for _, line in lines(path)]
        return {split: [_program(record) for record in records if record["task_id"] in ids[split]] for split in SPLITS}
    except ValueError as error:
        raise UserError(f"{path} is not mbpp.jsonl ({error})") from error


def _program(record):
    """Return an MBPP record as an example; what runs, in this order, is the program, the setup, the tests."""
    # NOTE: the paper does not give its MBPP input; here it is the description and all three tests, which MBPP's own prompt
    # shows too (without its fixed words, no use to a fine-tuned model): nothing else tells what the function is called.
    code, setup = (record[key].replace("\r\n", "\n") for key in ("code", "test_setup_code"))
    return {"input": "\n".join([record["text"], *record["test_list"]]), "target": code.rstrip(), "setup": setup,
            "tests": record["test_list"]}


_LOADERS = {"multi30k": partial(_parallel, "multi30k", ["train.{}.gz", "val.{}.gz", "test_2016_flickr.{}.gz"]),
            "wmt14": partial(_parallel, "wmt14", ["train.{}", "valid.{}", "test.{}"]), "squad": _squad, "mbpp": _mbpp}
