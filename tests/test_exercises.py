"""exercises.py and its checks: right answers pass, wrong ones are told what is wrong, and every bad input is one clear line."""
import ast
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from engine.cli import UserError

ROOT = Path(__file__).resolve().parent.parent


def load(name, path):
    """Import a file under another name: exercises.py at the top and the one in tests/ share theirs."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMMAND = load("exercises_command", ROOT / "exercises.py")
CHECKS = load("exercises_checks", ROOT / "tests" / "exercises.py")
TASKS = COMMAND.tasks()
FUNCTIONS = [number for number, task in TASKS.items() if task["file"]]
MEAN = "token_loss(logits, batch.targets).mean(dim=1)"
WITHOUT_PAD = "(token_loss(logits, batch.targets) * (r := batch.targets != self.pad)).sum(1) / r.sum(1)"
FEED, LEVELS = "F.pad(x0[:, :-1], (1, 0), value=self.start)", "self.sigma_min * (self.sigma_max / self.sigma_min) ** t"

# Task -> wrong answers: what is replaced in the original function, by what, and words of the message that this must give.
WRONG = {
    "1": [("return torch.where(send(replaced, x0.device), send(random, x0.device), x0)",
           "x0[replaced] = random[replaced]\n        return x0", "x0 itself was changed"),
          ("rng.uniform(x0.size(1))", "rng.uniform(1)", "whole rows are replaced: draw one number for each token"),
          (" < t[:, None]", " > t[:, None]", "t is the probability of being replaced, not of being kept"),
          (" < t[:, None]", " < t.mean()", "each row has its own level"),
          ("rng.integers(self.n_noise, ", "rng.integers(self.n_noise - 1, ", "id 10 is never drawn"),
          ("rng.integers(self.n_noise, ", "rng.integers(self.n_noise + 1, ", "never MASK or a sentinel"),
          ("rng.integers(self.n_noise, x0.size(1))", "rng.integers(self.n_noise, 1)", "draw one for each token"),
          ("rng.uniform(x0.size(1))", "torch.rand(x0.shape)", "draw from rng, not from torch")],
    "2": [("column[n_key - n_query:, None]", "column[:n_query, None]", "the queries are the LAST n_query columns"),
          ("pad_mask is None and n_query == n_key", "pad_mask is None", "right only where n_query == n_key"),
          ("column <= own", "column < own", "they stand at columns 3 and 4"),
          ("F.pad(~pad_mask", "F.pad(pad_mask", "in pad_mask True means padding"),
          ("value=True", "value=False", "targets are hidden"),
          (" | (column == own)", "", "softmax over nothing is nan"),
          ("[:, None, None, :]", "[:, None, :]", "a mask for padding is (B, 1, T, L)")],
    "3": [(FEED, "x0", "reads the very token that it is to predict"),
          (FEED, "F.pad(x0[:, 1:], (0, 1), value=self.start)", "shifted the wrong way"),
          (FEED, "x0.roll(1, dims=1)", "the first slot reads the last target (a roll)"),
          ("x0[:, :-1], (1, 0)", "x0, (1, 0)", "T + 1 columns"), ("self.start", "self.eos", "must read self.start")],
    "4": [("self.feed(batch.targets)", "batch.targets", "the model reads the targets themselves"),
          ('"causal"', '"bidirectional"', "targets look to the right"),
          (".mean(dim=1)", ".sum(dim=1)", "the targets of a sequence are summed"),
          (MEAN, WITHOUT_PAD, "PAD is left out of the mean"),
          ("batch.pad_mask", "None", "was not given batch.pad_mask"), ("per_sequence.detach()", "per_sequence", "detach it"),
          ("token_loss(logits", "cross_entropy(logits", "token_loss is not used"),
          ("self.inputs_attention", '"causal"', "use self.inputs_attention"), ("return Losses", "Losses", "return")],
    "5": [("[:, :-1]", "[:, 1:]", "drop the last logits, not the first"), ("[:, :-1]", "", "T + 1 logits for T targets"),
          ("(start, y)", "(start, y[:, :-1])", "the last token of y is not read"),
          ("(start, y)", "(y, start)", "is the start token that stands in front"),
          ("process.targets_attention", '"bidirectional"', "use process.targets_attention"),
          ("context, process.targets_attention, belief=belief)[", 'context, "causal")[', "shifted or not"),
          ("process.shift is None", "not process.shift", "a start token of id 0 is one, too"),
          ("start = model.embedding(start) if y.is_floating_point() else start",
           "start = start if y.dim() == 2 else start[..., None].expand(-1, -1, y.size(2))",
           "then model.embedding(start) stands in front")],
    "6": [('("optimizer", "best")', "()", "the optimizer's moments are kept"),
          ('source == "ar"', "source", "was converted again"),
          ('("optimizer", "best")', '("optimizer",)', "the best validation loss is kept"),
          ('"process": describe(process), ', "", "it is still an AR checkpoint"), ('"step": 0, ', "", "is at step 0"),
          ("{key: value for key, value in checkpoint.items() if key not in dropped}", "checkpoint",
           "was changed: make a new dict"),
          ("new_tensors(shape, seed) | ", "", "the tensors of new_tensors() are added"),
          ('"copied" if name in checkpoint["model"] else "new"', '"copied"', 'reported as "new"'),
          ("lineage(checkpoint)", 'checkpoint["history"]', "history must be lineage(checkpoint)"),
          ("torch.equal(causal_logits(checkpoint), causal_logits(converted))", "True", "lacks a tensor was converted")],
    "7": [("t = rng.uniform()", "t = torch.rand(len(batch.targets), dtype=torch.float64)", "draw from rng, not from torch"),
          ("denoise(self, model, x0_hat", "denoise(self, model, xt", "the second pass reads xt again"),
          ("denoise(self, model, x0_hat", "denoise(self, model, batch.targets", "the second pass reads the targets"),
          ("denoise(self, model, xt", "denoise(self, model, batch.targets", "the first pass reads the targets themselves"),
          ("L1.mean() + L2.mean()", "(L1.mean() + L2.mean()) / 2", "the mean of L1 and L2: the paper adds them"),
          ("L1.mean() + L2.mean()", "L2.mean()", "total is L2 alone"),
          ("self.unroll_temperature", "0.0", "unroll_temperature is not"),
          ("t = rng.uniform()", "t = rng.uniform()[:1].expand(len(batch.targets))", "the same t: draw one for each"),
          ("if self.n_unroll == 1:", "if False:", "n_unroll=1 is plain denoising"),
          ("denoise(self, model, x0_hat, context,", "denoise(self, model, x0_hat, model.encode(batch.inputs, batch.pad_mask, "
           "self.inputs_attention),", "once is enough"),
          (MEAN, MEAN.replace(").mean", ").masked_fill(xt == batch.targets, 0.0).mean"), "only replaced tokens carry loss")],
    "8": [("return (yield from best_of(drafts, score, n_samples))", "yield from best_of(drafts, score, n_samples)",
           "must return what best_of() returns"),
          ("drafts[-1], context", "drafts[0], context", "reads the noise again"),
          ("cross_entropy(logits, drafts[-2])", "cross_entropy(logits, drafts[-1])", "the last step's INPUT"),
          ("score = cross", "score = -cross", "the WORST sample was kept"),
          ("torch.where(frozen, x0, rng.categorical(logits, temperature))", "rng.categorical(logits, temperature)",
           "a frozen token"),
          ("rng.categorical(logits, temperature)", "logits.argmax(-1)", "tokens are not drawn"),
          ("rng.categorical(logits, temperature)", "rng.categorical(logits, temperature ** 2)",
           "temperature 0.2 is not what tokens"),
          ("[pure_noise(self, x0, frozen, rng)]", "[x0]", "the first draft is batch.targets"),
          ("range(n_steps)", "range(n_steps - 1)", "3 steps must yield 4 drafts"),
          ("        score =", "        logits = denoise(self, model, drafts[-1], context)\n        score =",
           "none for the score")],
    "9": [("argmin", "argmax", "the sample with the HIGHEST score was kept"), ("in drafts:", "in drafts[-1:]:", "yield each"),
          ("score.view(-1, n_samples).argmin(dim=1)", "score.view(n_samples, -1).argmin(dim=0)",
           "samples of one input are neighbours"),
          ("return drafts, score", "return", "it must return (drafts, score)")],
    "10": [("inputs[b, input_len - len(i):]", "inputs[b, :len(i)]", "pad them on the LEFT"),
           ("targets[b, len(t)] =", "targets[b, len(t):] =", "EOS stands once"),
           ("targets[b, len(t)] = tokenizer.eos", "pass", "an empty target is EOS, then PAD"),
           ("pad_mask[b, input_len - len(i):]", "pad_mask[b, :input_len - len(i)]", "pad_mask is the wrong way round"),
           ("targets[b, :len(t)]", "targets[b, -len(t):]", "targets are padded on the left"),
           ("inputs[b, input_len - len(i):]", "inputs[b, -len(i):]", "an empty input or target fails")],
    "11": [("rng.stratified()", "torch.rand(len(batch.targets), dtype=torch.float64)", "draw from rng, not from torch"),
          ("masked_nats / t", "masked_nats * t", "it is multiplied by t"),
           (".masked_fill(xt != self.mask, 0.0)", "", "they are known"),
           ("(per_sequence if self.weighted else masked_nats)", "masked_nats", "the weight 1/t is missing"),
           ("(per_sequence if self.weighted else masked_nats)", "per_sequence", "must train without 1/t"),
           ("self.predict(", "denoise(self, ", "MASK is predicted"), ("1e-3 + (1 - 1e-3) * ", "", "keep t above 1e-3"),
           (".mean(dim=1)", ".sum(dim=1)", "the tokens of a sequence are summed"),
           ("per_sequence.detach()", "masked_nats.detach()", "per_sequence")],
    "12": [("* L / n[:, 0]", "/ n[:, 0]", "the weight is L / n, not 1 / n"), ("1 + (u * L)", "(u * L)", "n runs from 1 to L"),
           ("u * L)", "u * (L - 1))", "never all L are masked"), (".masked_fill(~masked, 0.0)", "", "are counted, too"),
           ("total / n_draws", "total", "the draws are summed"), ("process.predict(", "denoise(process, ", "MASK is predicted"),
           ("levels(n_draws, rng)", "[rng.uniform() for _ in range(n_draws)]", "spread over the levels"),
           ("rank(rng.uniform(L)) < n", "torch.arange(L) < n", "which places are masked is not random")],
    "13": [("range(1, gap_len + 1)", "range(gap_len + 1)", "a gap of no tokens"),
           ("range(1, gap_len + 1)", "range(1, gap_len)", "both"),
           ("[*end, tokenizer.eos] if end else []", "end", "followed by EOS"), ('.removesuffix(" ")', "", "belongs to the gap"),
           ('.removesuffix(" ")', ".strip()", "a space behind a gap"),
           ("len(starts) if end else len(starts) - 1", "len(starts)", "it is open up to the end"),
           ('{"n": "\\n"}', "{}", "is a line end"), ('"_{3,}"', '"___"', "are one gap"),
           ("sum(lengths) < target_len", "sum(lengths) <= target_len", "lengths that do not fit the canvas with EOS"),
           ("check(gap_len >= 1,", "check(True,", "gap_len=0 must be refused")],
    "14": [("T, agreed + 1)", "T, agreed)", "a round settled nothing"),
           ("torch.where(is_eos.any(dim=1, keepdim=True), T, agreed + 1)", "agreed + 1", "a row that holds EOS is done"),
           ("agreed + 1)", "agreed.amin() + 1)", "a round settled nothing"),
           ("self.ar.feed(draft)", "draft", "fed the draft itself"),
           ("text.masked_fill(is_eos.cumsum(1) > is_eos, self.ar.pad)", "text", "behind EOS stands PAD"),
           ("drafter.encode = lambda *args: encoded", "pass", "once is enough for all rounds"),
           ("temperature=0.0", "temperature=0.2", "drafts are drawn at temperature 0"),
           ("frozen=place < settled", "frozen=None", "what is settled must be frozen"),
           ("_, *drafts =", "*drafts, =", "noise is left out"),
           ("place <= agreed", "place < agreed", "what is settled is not greedy AR's text")],
    "15": [("return (yield from best_of(", "yield from (best_of(", "must return what best_of() returns"),
          ("nats.double()", "-nats.double()", "the LEAST certain tokens come first"),
           ("1e6 * block", "0 * block", "block_len is not"),
           ("process.predict(", "denoise(process, ", "MASK itself is never predicted"),
           ("drafts.append(torch.where(reveal, guess, drafts[-1]))", "drafts.append(guess)", "here all is revealed after 1"),
           ("torch.where(reveal, nats, score)", "nats", "another sample than the best was kept"),
           ("min(n_steps, max(1, int(n_masked.max())))", "n_steps", "32 steps for 6 tokens")],
    "16": [("[:, None, None]", "", "it should be (B, 1, 1)"), ("** t)", "** (1 - t))", "sigma runs the wrong way"),
           (LEVELS, "self.sigma_min + (self.sigma_max - self.sigma_min) * t", "its LOGARITHM should be")],
    "17": [("torch.no_grad()", "torch.enable_grad()", "under torch.no_grad()"), ("rng.shared(1) <", "0 <", "half of the STEPS"),
           ("rng.shared(1)", "rng.shared(0)", "must be told by rng.shared(1)"),
           ("logits = self.predict(model, z, t, context, x_hat)",
            "logits = self.predict(model, z, t, context, torch.zeros_like(z))",
            "the second pass still reads x_hat = 0"),
           ("self.corrupt(self.vectors(model, batch.targets), t, rng)", "self.vectors(model, batch.targets)", "are not noised"),
           (MEAN, f"{MEAN} / t", "it is weighted by 1 / t")],
    "23": [("* (1 - i / n_steps)", "* 1", "the temperature of the draws does not fall"),
           ("(1 - i / n_steps)", "(i / n_steps)", "the temperature rises"),
           ("last_temperature + (temperature - last_temperature)", "temperature", "the temperature of step"),
           ("i / n_steps)", "i / max(1, n_steps - 1))", "the temperature of step"),
           ("entr(logits.", "entr((logits * heat).", "of the logits before they were divided by the temperature"),
           ("within(nats, budget)", "(nats <= budget)", "each entropy by itself is held against the budget"),
           ("guess, pure_noise(process, x0, frozen, rng))", "guess, xt)", "keeps the noise of the step before"),
           ("guess, pure_noise(process, x0, frozen, rng))", "guess, guess)", "stays as the model drew it"),
           ("= frozen | (xt != process.mask) if absorbs else frozen ",
            "= frozen | (xt != process.mask) if absorbs else frozen | (xt == guess) if i else frozen ",
            "with uniform noise it is judged again"),
           ("frozen | (xt != process.mask) if absorbs else frozen", "frozen", "with absorbing noise it stays"),
           (".masked_fill(fixed, 0.0)", "", "use up the budget"),
           ("rng.categorical(logits, 1.0)", "logits.argmax(-1)", "tokens are not drawn"),
           ("rng.categorical(logits, 1.0)", "rng.categorical(logits * heat, 1.0)", "of the draws does not fall"),
           ("[:, None], answer, draft)", "[:, None], draft, draft)", "the last draft holds noise"),
           ("[:, None], answer, draft)", "[:, None], guess, draft)", "must be the argmax, not what was drawn"),
           ("(ends | (i + 1 == n_steps) & ~full)", "((i + 1 == n_steps) & ~full)", "a sample that ends holds the draft"),
           (" & (answer == before).all(dim=1)", "", "a sample ended while its argmax still changed"),
           ("(answer == before)", "(answer == xt)", "the argmax of the step before (not the draft)"),
           ("sure & ", "", "its mean entropy must be below SURE, too"),
           ("nats.sum(dim=1) <= SURE * (~fixed).sum(dim=1)", "nats.amax(dim=1) < SURE", "whose MEAN entropy"),
           ("torch.where(done[:, None], xt, draft)", "draft", "goes on changing while others are not done"),
           ("if done.all():", "if done.any():", "of 5 samples some end early and one not at all"),
           (".all(dim=1) if absorbs else ends", ".all(dim=1) & ends if absorbs else ends",
            "where nothing is masked a sample ends"),
           ("process.predict(", "denoise(process, ", "MASK is predicted"),
           ("n_samples, frozen)", "n_samples, None)", "a frozen token changed"),
           ("believe(process, model, logits)", "None", "no belief is handed on"),
           ("believe(process, model, logits)", "believe(process, model, logits * heat)", "the belief is of the logits before"),
           ("done[:, None] | fixed, score", "fixed, score", "a sample that has ended no longer changes"),
           ("done[:, None] | fixed, score", "done[:, None], score", "in the step that settled it"),
           ("score.mean(dim=1), n_", "-score.mean(dim=1), n_", "the lowest is the best"),
           ("max(heat, 1e-6)", "heat", "divide by 1e-6, not by 0"),
           ("return (yield from best_of(", "yield from (best_of(", "must return what best_of() returns")],
}
# Task -> other right answers.
RIGHT = {
    "1": [("rng.uniform(x0.size(1)) < t[:, None]", "rng.uniform(x0.size(1)) >= 1 - t[:, None]")],
    "2": [("if pad_mask is None and (not causal or n_query == 1):", "if False:"),
          ("pad_mask is None and n_query == n_key", "False")],
    "3": [(FEED, "torch.cat((torch.full_like(x0[:, :1], self.start), x0[:, :-1]), 1)")],
    "4": [("per_sequence.mean(), per_sequence.detach()", "token_loss(logits, batch.targets).mean(), per_sequence.detach()")],
    "5": [("[:, :-1]", "[:, :y.size(1)]")],
    "6": [('new_tensors(shape, seed) | checkpoint["model"]', 'checkpoint["model"] | new_tensors(shape, seed)')],
    "7": [(MEAN, "token_loss(logits, batch.targets).sum(dim=1) / batch.targets.size(1)"),
          ("rng.uniform()", "rng.stratified()")],
    "8": [("drafts.append(torch.where(frozen, x0, rng.categorical(logits, temperature)))",
           "xt = rng.categorical(logits, temperature)\n            xt[frozen] = x0[frozen]\n            drafts.append(xt)")],
    "9": [("score.view(-1, n_samples).argmin(dim=1)", "score.unflatten(0, (-1, n_samples)).sort(dim=1).indices[:, 0]")],
    "10": [("targets[b, :len(t)] = torch.as_tensor(t)", "targets[b, :len(t)] = torch.tensor([int(x) for x in t])")],
    "11": [("rng.stratified()", "rng.uniform()")],
    "12": [("rank(rng.uniform(L)) < n", "rank(-rng.uniform(L)) < n")],
    "13": [("range(1, gap_len + 1)", "range(gap_len, 0, -1)")],
    "14": [("(draft == greedy).cumprod(1).sum(1, keepdim=True)", "(draft != greedy).cumsum(1).eq(0).sum(1, keepdim=True)")],
    "15": [("(n_masked * (n_steps - i - 1)) // n_steps", "-(-(n_masked * (n_steps - i - 1)) // n_steps)")],
    "16": [("(self.sigma_min * (self.sigma_max / self.sigma_min) ** t)",
            "((1 - t) * torch.tensor(self.sigma_min).log() + t * torch.tensor(self.sigma_max).log()).exp()")],
    "17": [("rng.stratified()", "rng.uniform()")],
    "23": [("torch.special.entr(logits.softmax(-1)).sum(-1)", "torch.distributions.Categorical(logits=logits).entropy()"),
           ("guess = torch.where(fixed, xt, rng.categorical(logits, 1.0))",
            "rng.uniform(7)  # another order of the draws\n        heat = max(heat, 1e-6)\n"
            "        guess = torch.where(fixed, xt, rng.categorical(logits * heat, heat))")],
}


def original(number):
    return (ROOT / TASKS[number]["file"]).read_text(encoding="utf-8")


def function_in(text, number):
    """Return the ast node of the task's function in a text of its file."""
    node = ast.parse(text)
    for part in TASKS[number]["name"].split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    return node


def put(monkeypatch, number, text):
    """Let the task's function be what it is in this text of its file, wherever it is known."""
    task = TASKS[number]
    module = importlib.import_module(task["file"].removesuffix(".py").replace("/", "."))
    node, made, (*owner, name) = function_in(text, number), {}, task["name"].split(".")
    exec(compile(ast.Module([node], []), task["file"], "exec"), vars(module), made)
    if owner:
        return monkeypatch.setattr(getattr(module, *owner), name, made[name])
    before = getattr(module, name)
    for other in [other for other in sys.modules.values() if getattr(other, "__dict__", {}).get(name) is before]:
        monkeypatch.setattr(other, name, made[name])


def changed(number, old, new):
    """Return the text of the task's file with `old` replaced in its function, all of it."""
    text = original(number)
    source = ast.get_source_segment(text, function_in(text, number))
    assert old in source, f"task {number} has no {old!r}"
    return text.replace(source, source.replace(old, new))


def test_there_are_tasks_with_their_checks_and_questions_with_an_answer():
    assert list(TASKS) == [str(1 + i) for i in range(len(TASKS))] and FUNCTIONS == list(CHECKS.CHECKS) == list(WRONG)
    assert len(FUNCTIONS) >= 16 and len(TASKS) - len(FUNCTIONS) == 5
    assert all(len(wrong) >= 2 for wrong in WRONG.values()) and all(task["hint"] and task["title"] for task in TASKS.values())
    page = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^## Sitting \d: ", page, re.MULTILINE)) == 5
    assert all("```sh" in task["text"] for task in TASKS.values() if not task["file"])


@pytest.mark.parametrize("number", FUNCTIONS)
def test_the_repositorys_own_function_is_right(number, capsys):
    assert CHECKS.main([number]) == 0 and re.fullmatch(r"all \d+ checks hold\n", capsys.readouterr().out)


@pytest.mark.parametrize("number", FUNCTIONS)
def test_a_function_that_was_taken_out_is_not_written_yet(number, capsys, monkeypatch):
    text = COMMAND.blanked(original(number), TASKS[number])
    assert len(text) < len(original(number)) and text.endswith("\n") and not text.endswith("\n\n")
    put(monkeypatch, number, text)
    assert CHECKS.main([number]) == 1
    assert capsys.readouterr().out == f"nothing is written yet (task {number}: write me)\n"


@pytest.mark.parametrize("number, old, new, words", [(number, *wrong) for number in WRONG for wrong in WRONG[number]])
def test_a_wrong_answer_is_told_what_is_wrong(number, old, new, words, capsys, monkeypatch):
    put(monkeypatch, number, changed(number, old, new))
    assert CHECKS.main([number]) == 1
    said = capsys.readouterr().out
    assert words in said and said.count("\n") == 1 and not re.match(r"\w+Error\b", said)


@pytest.mark.parametrize("number, old, new", [(number, *right) for number in RIGHT for right in RIGHT[number]])
def test_another_right_answer_is_right(number, old, new, capsys, monkeypatch):
    put(monkeypatch, number, changed(number, old, new))
    assert CHECKS.main([number]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("body, words", [("return None", "does the function end with return?"), ("return 1", "not a tensor"),
                                         ("return x0[:, :1]", "has the shape (64, 1), it should be (64, 64)"),
                                         ("import sys; sys.exit(0)", "SystemExit"), ("assert 1 == 2", "AssertionError")])
def test_what_is_no_answer_at_all_is_told_in_one_line(body, words, capsys, monkeypatch):
    blank = COMMAND.blanked(original("1"), TASKS["1"])
    put(monkeypatch, "1", blank.replace('raise NotImplementedError("task 1: write me")', body))
    assert CHECKS.main(["1"]) == 1
    said = capsys.readouterr().out
    assert words in said and said.count("\n") == 1


# ---- the command ----

class Folder:
    """A folder that was started, and its student."""

    def __init__(self, path, number):
        COMMAND.main(["start", number, str(path)])
        self.path, self.number, self.file = path, number, path / TASKS[number]["file"]

    def write(self, body, more=""):
        """Write this in place of what was taken out."""
        text = self.file.read_text(encoding="utf-8")
        left = f'raise NotImplementedError("task {self.number}: write me")'
        assert text.count(left) == 1
        self.file.write_text(text.replace(left, body) + more, encoding="utf-8")

    def solve(self):
        self.file.write_text(original(self.number), encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    """The folder of task 16, from within which commands are given."""
    made = Folder(tmp_path / "mine", "16")
    monkeypatch.setattr(COMMAND, "ROOT", made.path)
    capsys.readouterr()
    return made


def one_line(argv):
    with pytest.raises(UserError) as error:
        COMMAND.main(argv)
    return " ".join(str(error.value).split())


def test_list_shows_every_task_and_help_the_usage(capsys):
    COMMAND.main(["list"])
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert listed == [[number, task["title"]] for number, task in TASKS.items()]
    for argv in ([], ["-h"], ["--help"]):
        COMMAND.main(argv)
        said = capsys.readouterr().out
        assert said.startswith("usage: python exercises.py list | start N FOLDER") and COMMAND.__doc__ in said


def test_start_copies_the_project_without_the_function_and_without_what_is_large_or_hidden(tmp_path, capsys):
    path = tmp_path / "deep" / "mine"
    COMMAND.main(["start", "5", str(path)])
    said = capsys.readouterr().out
    assert f"cd {path}; python exercises.py check 5" in said and TASKS["5"]["text"] in said
    assert not {name for name in ("results", ".git", "out", ".gitignore") if (path / name).exists()}
    assert all((path / name).exists() for name in ("exercises.py", "docs/exercises.md", "tests/exercises.py", "engine/cli.py"))
    text = (path / "diffusion.py").read_text(encoding="utf-8")
    assert "def denoise(" in text and 'raise NotImplementedError("task 5: write me")' in text
    assert (path / "model.py").read_bytes() == (ROOT / "model.py").read_bytes()


def test_a_docstring_that_tells_too_much_is_cut_to_its_first_line_where_the_page_says_so():
    assert {number for number in FUNCTIONS if TASKS[number]["short"]} == {"5", "7", "8"}
    for number in FUNCTIONS:
        before, after = (ast.get_docstring(function_in(text, number), clean=False) for text in (
            original(number), COMMAND.blanked(original(number), TASKS[number])))
        assert after == (before.split("\n")[0] if TASKS[number]["short"] else before)


def test_every_other_function_of_the_file_stays_as_it_is():
    for number in FUNCTIONS:
        before, after = (ast.parse(text) for text in (original(number), COMMAND.blanked(original(number), TASKS[number])))
        own = TASKS[number]["name"].split(".")[-1]
        sources = [[ast.dump(n) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name != own]
                   for tree in (before, after)]
        assert sources[0] == sources[1]


@pytest.mark.parametrize("argv, words", [
    (["begin", "1"], "command='begin' is not one of list, start, check, hint, diff, grade"),
    (["chek", "1"], "did you mean 'check'?"), (["check", "160"], "did you mean '16'?"),
    (["hint", "corrupt"], "is not one of 1, 2, 3"),
    (["start", "1"], "say: python exercises.py start N FOLDER"), (["grade"], "say: python exercises.py grade FOLDER..."),
    (["check", "18"], "task 18 is a question, there is nothing to write; python exercises.py hint 18 answers it"),
    (["start", "1", str(ROOT / "mine")], "lies in the project that would be copied"),
    (["start", "1", str(ROOT / "docs")], "is a file or not empty; choose another folder"),
    (["start", "1", str(ROOT / "LICENSE")], "is a file or not empty"),
    (["start", "1", str(ROOT / "LICENSE" / "mine")], "lies in the project"),
    (["check", "1"], "exercise.json; python exercises.py start N FOLDER makes a folder to work in"),
    (["diff", "1"], "exercise.json")])
def test_a_bad_command_is_one_clear_line(argv, words):
    assert words in one_line(argv)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "cannot write" in one_line(["start", "1", str(tmp_path / "file" / "mine")])


def test_hint_tells_and_diff_shows_the_original_beside_ones_own(folder, capsys):
    COMMAND.main(["hint", "16"])
    assert "geometric mean" in capsys.readouterr().out
    folder.write("return t")
    COMMAND.main(["diff", "16"])
    said = capsys.readouterr().out
    assert "-        return t\n" in said and "+        return (self.sigma_min * (" in said and said.startswith("--- yours")
    folder.solve()
    COMMAND.main(["diff", "16"])
    assert capsys.readouterr().out == "no difference\n"


def test_a_folder_is_for_its_own_task_and_no_place_to_start_another_from(folder, tmp_path):
    assert "was started for task 16, not 1" in one_line(["check", "1"])
    assert "start the next one from the project itself" in one_line(["start", "1", str(tmp_path / "other")])


@pytest.mark.parametrize("spoil, words", [
    (lambda f: f.file.unlink(), "diffusion.py; python exercises.py"),
    (lambda f: f.file.write_bytes(b"\xff\xfe"), "the exercise cannot be read"),
    (lambda f: (f.path / "exercise.json").write_text("{}"), "the exercise cannot be read"),
    (lambda f: (f.path / "exercise.json").write_text('["16", null]'), "the exercise cannot be read"),
    (lambda f: (f.path / "exercise.json").write_text('["99", "x"]'), "the exercise cannot be read"),
    (lambda f: (f.path / "exercise.json").write_text("no"), "the exercise cannot be read")])
def test_a_spoiled_folder_is_one_clear_line(spoil, words, folder):
    spoil(folder)
    for command in ("check", "diff"):
        assert words in one_line([command, "16"])


def test_a_file_that_does_not_parse_or_lacks_the_function_is_one_clear_line_and_diff_shows_it(folder, capsys, monkeypatch):
    folder.write("return (")
    line = 1 + folder.file.read_text(encoding="utf-8").split("\n").index("        return (")
    assert re.fullmatch(rf"diffusion.py does not parse: .+\(diffusion.py, line {line}\)", one_line(["check", "16"]))
    COMMAND.main(["diff", "16"])
    assert "-        return (\n" in capsys.readouterr().out
    folder.solve()
    folder.file.write_text(original("16").replace("def sigma(", "def sigmas("), encoding="utf-8")
    monkeypatch.chdir(folder.path)
    assert CHECKS.spoiled("16") == "diffusion.py has no Gaussian.sigma any more: put its def back"
    COMMAND.main(["diff", "16"])
    assert "-    def sigmas(self, t):\n" in capsys.readouterr().out


def test_a_check_says_what_is_wrong_with_the_line_and_in_the_end_that_it_is_solved(folder, capsys):
    assert verdict(capsys) == (1, "task 16: not yet. nothing is written yet (task 16: write me)\n")
    folder.write("print('here')\n        return t[:, None, None] * unknown")
    text = folder.file.read_text(encoding="utf-8").split("\n")
    line = 1 + text.index("        return t[:, None, None] * unknown")
    with pytest.raises(SystemExit):
        COMMAND.main(["check", "16"])
    said = capsys.readouterr()
    assert said.err == "here\n" and said.out.count("\n") == 1  # what a student prints is shown, and is not what is said
    assert f"NameError, line {line} of diffusion.py: return t[:, None, None] * unknown (name 'unknown' is" in said.out
    folder.solve()
    folder.file.write_bytes(b"\xef\xbb\xbf" + folder.file.read_bytes())  # an editor's byte order mark
    code, said = verdict(capsys)
    assert code == 0 and re.fullmatch(r"task 16: solved. all \d+ checks hold\n", said)


def verdict(capsys):
    """Return (exit code, what is said) of check 16."""
    code = 0
    try:
        COMMAND.main(["check", "16"])
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


def test_a_function_that_does_not_end_is_stopped(folder, capsys, monkeypatch):
    monkeypatch.setattr(COMMAND, "SECONDS", 4)
    folder.write("while True: pass")
    assert one_line(["check", "16"]).endswith("mine: it does not end, and was stopped after 4 seconds")


def test_a_file_that_cannot_be_imported_is_told_with_its_line(folder, capsys):
    folder.write("return t", more="\nimport nothing_of_that_name\n")
    code, said = verdict(capsys)
    assert code == 1 and "ModuleNotFoundError, line " in said and "import nothing_of_that_name" in said


def test_grade_prints_a_line_of_json_for_solved_unsolved_and_broken_folders(tmp_path, capsys):
    folders = {name: Folder(tmp_path / name, number) for name, number in (("right", "3"), ("wrong", "16"), ("broken", "9"))}
    folders["right"].solve()
    folders["wrong"].write("return t")
    folders["broken"].write("return (")
    capsys.readouterr()
    names = [str(tmp_path / name) for name in (*folders, "absent")]
    COMMAND.main(["grade", *names])
    right, wrong, broken, absent = found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["folder"] for one in found] == names
    assert (right["task"], right["solved"]) == ("3", True) and "checks hold" in right["said"]
    assert (wrong["task"], wrong["solved"]) == ("16", False) and "it should be (B, 1, 1)" in wrong["said"]
    assert (broken["task"], broken["solved"]) == ("9", None) and "autoregressive.py does not parse" in broken["said"]
    assert not absent["solved"] and "exercise.json" in absent["said"]


def test_the_checks_need_no_random_state_and_leave_it_alone_enough_to_run_in_any_order(capsys):
    for seed in (1, 2):
        torch.manual_seed(seed)
        for number in reversed(FUNCTIONS):
            assert CHECKS.main([number]) == 0, capsys.readouterr().out
