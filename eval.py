"""Score a trained model on a task: how good, how sure, how slow.

    python eval.py out/ar2diff_code --data=code --allow_code_execution
    python eval.py out/ar_multi30k --data=multi30k --n_examples=200
    python eval.py out/ar2diff --metric=bits                   # likelihood, on text too: its validation part
    python eval.py out/ar2diff_code --middle --allow_code_execution    # a gap in each target, both sides given

The gold answers are scored first: where they do not get 100, no model's score means what it says. What is needed to read a
score, and to get it again, is printed with it. Generated programs are executed only with --allow_code_execution, and only by
scoring/sandbox.py.
"""
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from beyond.infill import middle
from beyond.likelihood import bits, bound_of, task_batches
from data.dataset import data_hash, open_data, pad_rows, read_meta
from data.tasks import read_jsonl
from engine.checkpoint import commit, lineage
from engine.cli import check, one_of, parse, run
from engine.devices import out_of_memory
from engine.files import check_new, write_json, write_new
from engine.noise import Noise
from pretrained.loading import load_checkpoint
from sample import GenerateConfig, load_writer
from scoring import judge, metrics
from scoring.sandbox import TIMEOUT, check_canaries


@dataclass(kw_only=True)
class Config(GenerateConfig):
    checkpoint: str  # positional: a .pt file, the out_dir of a run or a published model; several with commas between them
    data: str | None = None  # task folder, by path or by its name in data/prepared; default: the one the model was trained on
    split: str = "test"  # train, valid or test
    n_examples: int | None = None  # score the first n only
    too_long: str = "fail"  # inputs that do not fit the canvas: fail (they score nothing) or drop (of the rest the first n)
    batch_size: int = 16  # examples decoded together; changes speed and rounding only
    n_programs: int = 1  # code: programs per problem, for pass@k
    k: int = 1  # code: the k of pass@k
    metric: str | None = None  # bleu, qa, exact, code, or bits: per token and byte of the targets; default: as the task says
    middle: bool = False  # fill the middle third of each target, given the rest (AR: its left side); exact_match: gold gaps
    n_draws: int = 64  # bits: noise levels per sequence (AR is exact without)
    allow_code_execution: bool = False  # run the programs that the model writes: see the warning in scoring/sandbox.py
    timeout: float = TIMEOUT  # code: seconds of processor time for each program
    strict: bool = False  # stop where not even the gold answers score 100
    out: str | None = None  # JSONL file for inputs, targets and predictions
    json: str | None = None  # file for all that is known of every result


def answer(writer, examples, config):
    """Return (predictions, facts): n_programs answers per example, and counts of what it took; an input longer than the model's
    canvas gets an empty answer: it is counted, and it scores nothing."""
    tokenizer, predictions = writer.tokenizer, [[] for _ in examples]
    inputs = tokenizer.encode_batch([e["input"] for e in examples])
    fitting = [i for i, ids in enumerate(inputs) if len(ids) <= writer.input_len]
    facts = dict(too_long=len(examples) - len(fitting), unfinished=0, early=0, tokens=0, evaluations=0, seconds=0.0)
    for sample in range(config.n_programs):
        for first in range(0, len(fitting), config.batch_size):
            rows = fitting[first:first + config.batch_size]
            batch = pad_rows([(inputs[i], []) for i in rows], tokenizer, writer.input_len, writer.target_len)
            start = time.perf_counter()
            drafts = writer.drafts(batch, Noise(config.seed, "generate", sample, rows))
            answers = drafts[-1].tolist()  # waits for the device
            facts["seconds"] += time.perf_counter() - start
            facts["evaluations"] += (len(drafts) - 1) * len(rows)
            facts["early"] += (len(drafts) <= writer.options.get("n_steps", 0)) * len(rows)
            facts["tokens"] += sum((ids + [tokenizer.eos]).index(tokenizer.eos) + (tokenizer.eos in ids) for ids in answers)
            facts["unfinished"] += sum(tokenizer.eos not in ids for ids in answers)
            for i, ids in zip(rows, answers):
                predictions[i].append(tokenizer.decode(ids))
    return [p or [""] * config.n_programs for p in predictions], facts


def fitting_examples(config, writer, path):
    """Return (examples, n_left_out) of a task's split, all or those whose input fits. Raises UserError where none does."""
    examples = read_jsonl(path / f"{config.split}.jsonl")
    looked_at = examples if config.too_long == "drop" else examples[:config.n_examples]
    inputs = writer.tokenizer.encode_batch([e["input"] for e in looked_at])
    fits = [e for e, ids in zip(looked_at, inputs) if len(ids) <= writer.input_len]
    check(fits, f"{path}, {config.split}: not one of {len(looked_at)} inputs fits the {writer.input_len} tokens of "
                f"{config.checkpoint}" + "; --too_long=drop looks further" * (len(looked_at) < len(examples)))
    return (fits[:config.n_examples], len(examples) - len(fits)) if config.too_long == "drop" else (looked_at, 0)


def scored_examples(config, writer, path, meta):
    """Return (metric, examples, language, n_left_out) of a task's split. Raises UserError where they cannot be scored so."""
    check(meta["kind"] == "task", f"{path} holds text, not a task: there is nothing to answer; --metric=bits measures it")
    name = "metric" if config.metric else "metric (in meta.json)"
    metric = one_of(name, config.metric or meta.get("metric", "exact"), judge.METRICS)
    check(metric != "code" or config.allow_code_execution,
          "scoring code means running programs that a model wrote; read the top of scoring/sandbox.py, then say "
          "--allow_code_execution")
    check(writer.input_len > 0, f"{config.checkpoint} is a plain language model (input_len 0): fine-tune it on a task first")
    examples, n_left_out = fitting_examples(config, writer, path)
    language = meta.get("language") or metrics.language_of(text for e in examples for text in metrics.gold_answers(e))
    if metric == "code":
        print(f"programs are run {check_canaries()}", file=sys.stderr)
    return metric, examples, language, n_left_out


def provenance(config, checkpoint, writer, path, split):
    """Return what it takes to get a result again."""
    return dict(checkpoint=config.checkpoint, lineage=lineage(checkpoint), process=writer.process.name, data=str(path),
                split=split, seed=config.seed, training_seed=checkpoint["config"].get("seed"), commit=commit(),
                tokenizer=writer.tokenizer.name, torch=torch.__version__, device=str(writer.device),
                dtype=str(writer.dtype).removeprefix("torch."), compiled=writer.compiled)


def evaluate_bits(config, checkpoint, path, meta):
    """Return a dict of bits per target token and per byte of config.checkpoint on a task's split, or on validation text."""
    check(config.out is None, "--out is for answers; --metric=bits gives none")
    check(not (config.drafter or config.decoder), "--drafter and --decoder are for answers; --metric=bits needs none")
    check(meta["kind"] == "task" or config.split in ("test", "valid"), f"--split={config.split}: text is measured on its "
                                                                       f"validation part")
    writer, split, n_left_out, objective = load_writer(config.checkpoint, config), "valid", 0, None
    bound_of(writer.process)  # refused at once where there is none
    if meta["kind"] == "text":
        trained = checkpoint["config"].get("objective")  # GPT-2's weights have none
        data = open_data(path, writer.tokenizer, writer.input_len, writer.target_len, objective=trained)
        objective = data.objective  # printed: bits of what another objective leaves open are another number
        check((writer.process.name, objective) != ("uniform", "span"),
              "the targets of --objective=span hold sentinels, which uniform noise never draws, so a uniform model has no "
              "finite bound on them; AR, absorbing and gaussian models do")
        n = config.n_examples or 256
        batches = [data.valid_batch(range(k, min(k + config.batch_size, n))) for k in range(0, n, config.batch_size)]
    else:
        split, examples = config.split, read_jsonl(path / f"{config.split}.jsonl")[:config.n_examples]
        batches, n_left_out = task_batches(examples, writer, config.batch_size)
    found = bits(writer, batches, config.n_draws, config.seed)
    return (found | dict(n_left_out=n_left_out, n_draws=config.n_draws, objective=objective)
            | provenance(config, checkpoint, writer, path, split))


def check_flags(config):
    """Raise UserError for the first flag that makes no sense, before anything is loaded."""
    for name in ("n_programs", "k", "batch_size", "n_draws", "n_examples"):
        value = getattr(config, name)
        check(value is None or value >= 1, f"--{name}={value} must be at least 1")
    check(config.k <= config.n_programs, f"pass@{config.k} needs at least as many programs: --n_programs={config.n_programs}")
    check(0 < config.timeout < 1e6, f"--timeout={config.timeout} must be above 0 and below a million seconds")
    one_of("split", config.split, ("train", "valid", "test"))
    one_of("too_long", config.too_long, ("fail", "drop"))
    check(not config.middle or (config.n_programs == 1 and not config.drafter and config.metric != "bits"),
          "--middle goes with none of --n_programs, --drafter, --metric=bits")
    check(config.out is None or config.out != config.json, "--out and --json must be two files")
    check_new(config.out, "out")
    check_new(config.json, "json")


def is_greedy(writer):
    """Return whether every program of a problem would be the same, whatever the seed."""
    name, certain = writer.process.name, writer.options.get("temperature", 0) == 0
    return name == "speculative" or (certain and (name == "ar" or (name == "absorbing" and writer.decoder != "ancestral")))


def evaluate(config):
    """Return a dict of scores and costs of config.checkpoint on config.data. Raises UserError."""
    checkpoint = load_checkpoint(config.checkpoint)
    data = config.data or checkpoint["config"]["data"]
    check(data, f"{config.checkpoint} was trained elsewhere; name the data to score it on by --data")
    path, meta = read_meta(data)
    if config.data is None and data_hash(path, meta) != checkpoint["data"]:
        print(f"warning: {path} does not hold what {config.checkpoint} was trained on any more", file=sys.stderr)
    one_of("metric", config.metric or "bits", (*judge.METRICS, "bits"))
    if config.metric == "bits":
        return evaluate_bits(config, checkpoint, path, meta)
    writer = load_writer(config.checkpoint, config)
    check(config.n_programs == 1 or not is_greedy(writer),
          f"--n_programs={config.n_programs} greedy programs would all be the same; set --temperature above 0")
    metric, examples, language, n_left_out = scored_examples(config, writer, path, meta)
    fault = judge.gold_fault(metric, examples, language, config.timeout)
    check(not (fault and config.strict), f"--strict: {path}, {config.split}: {fault}")
    if fault:
        print(f"warning: {path}, {config.split}: {fault}", file=sys.stderr)
    predictions, facts = (middle if config.middle else answer)(writer, examples, config)
    if config.out:  # before they are scored: what took an hour is not lost if that fails
        rows = [{"input": e["input"], "target": e["target"], "predictions": p} for e, p in zip(examples, predictions)]
        write_new(config.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "out")
    n, n_answers = len(examples), len(examples) * config.n_programs
    scored = judge.score(metric, predictions, examples, language, config.k, config.timeout)
    return dict(**scored._asdict(), gold=fault, n=n, metric=metric,
                empty=100 * sum(not p.strip() for ps in predictions for p in ps) / n_answers,
                unfinished=100 * facts["unfinished"] / n_answers, too_long=facts["too_long"], n_left_out=n_left_out,
                early=100 * facts["early"] / n_answers, tokens_each=facts["tokens"] / max(facts["evaluations"], 1),
                evaluations=facts["evaluations"] / max(n_answers - facts["too_long"] * config.n_programs, 1),
                seconds=facts["seconds"] / n_answers, decoder=writer.decoder, options=writer.options, drafter=config.drafter,
                **provenance(config, checkpoint, writer, path, config.split))


def report(r):
    """Return the lines that describe a result of evaluate() or evaluate_bits()."""
    facts = f"on {r['n']} {r['split']} examples of {r['data']}, torch {r['torch']}, {r['device']}, {r['dtype']}"
    trained = f"  trained: {' -> '.join(r['lineage'])}"
    if "per_token" in r:
        kind = "exact" if r["process"] == "ar" else f"upper bound, {r['n_draws']} noise levels each"
        kind += f"; objective {r['objective']}" if r["objective"] else ""
        (per_token, error), (per_byte, byte_error) = r["per_token"], r["per_byte"]
        return [f"{r['checkpoint']} ({r['process']}; seed {r['seed']}) {facts}", trained,
                f"  {per_token:.4f} +- {error:.4f} bits per target token, {per_byte:.4f} +- {byte_error:.4f} per byte ({kind})",
                f"  left out, too long: {r['n_left_out']}"]
    options = ", ".join((r["decoder"], *(f"{k} {v}" for k, v in r["options"].items())))
    lines = [f"{r['checkpoint']} ({r['process']}; {options}; seed {r['seed']}) {facts}", trained]
    lines += [f"  {name:14s} {value:6.2f} % +- {error:.2f}" for name, (value, error) in r["scores"].items()]
    lines += [f"  warning: {r['gold']}"] if r["gold"] else []
    lines += [f"  left out, too long: {r['n_left_out']}"] if r["n_left_out"] else []
    lines += [f"  failed: {judge.counted(r['failures'])}"] if r["failures"] else []
    lines += [f"  empty {r['empty']:.1f} %, unfinished {r['unfinished']:.1f} %, input too long {r['too_long']}",
              f"  {r['evaluations']:.1f} network evaluations x {r['options']['n_samples']} samples, {r['tokens_each']:.1f} "
              f"tokens each, {r['early']:.0f} % ended early, "
              f"{r['seconds']:.4f} s per answer (decoding only, in batches{'; the compiler included' * r['compiled']})"]
    lines += [f"  drafter {r['drafter']}"] if r["drafter"] else []
    return lines + ([f"  {r['signature']}"] if r["signature"] else [])


@out_of_memory("--batch_size", "--n_samples")
def main(argv=None):
    config = parse(Config, argv)
    check_flags(config)
    several = [config.checkpoint] if Path(config.checkpoint).exists() else config.checkpoint.split(",")
    check(len(several) == 1 or not config.out, "--out is for the answers of one model")
    results = []
    for checkpoint in several:
        load_checkpoint(checkpoint)  # a path that is wrong is found out now, not after the others are scored
    for checkpoint in several:
        one = replace(config, checkpoint=checkpoint)
        results.append(evaluate(one) | {"config": asdict(one)})
        print("\n".join(report(results[-1])), flush=True)
    if config.json:
        write_json(config.json, results, "json")
    return results


if __name__ == "__main__":
    run(main)
