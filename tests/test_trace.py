"""beyond/trace.py: what is traced is what would have been written anyway, with the probabilities and times that it had."""
import json
import random
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

import sample
from autoregressive import best_of
from beyond import trace as module
from beyond.decoders import DECODERS
from beyond.trace import trace, write_trace
from conftest import traced
from data.tokenizer import load_tokenizer
from diffusion import PROCESSES, begin, pure_noise
from engine import cli
from engine.checkpoint import save_checkpoint
from engine.noise import Noise
from pretrained.loading import build_model
from sample import GenerateConfig, load_writer, prompt_batch

BYTES = load_tokenizer("bytes")
WAYS = [(name, decoder) for name, decoders in DECODERS.items() for decoder in decoders]
HOSTILE = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!--<script>", "&lt;b&gt;&amp;", "\"'`${1}\\",
           "a\n    b\tc", "\u2028\u2029", "]]>", "\x00\x07\x1b[31m\ufffe", "TRACE", "é漢😀", "\r\n", "")


@pytest.fixture(scope="module")
def runs(train, text, tmp_path_factory):
    """runs(process, *flags): a folder, its model sure of some tokens and unsure of others. 'lm' is AR without inputs."""
    made, folder = {}, tmp_path_factory.mktemp("traced")

    def runs(name, *flags):
        if (name, *flags) not in made:
            more = {"ar": [], "lm": [f"--data={text}", "--input_len=0", "--target_len=12"]}.get(name, [f"--process={name}"])
            run = train("ar" if name in ("ar", "lm") else "diff", folder / str(len(made)), "--steps=1", *more, *flags)
            c = run.checkpoint()
            c["model"]["embedding.weight"] *= 3
            save_checkpoint(run.path, c)
            made[(name, *flags)] = run
        return made[(name, *flags)].folder
    return runs


def traced_run(folder, prompt="ab", target_len=None, **options):
    """Return (writer, batch, drafts, facts)."""
    writer, batch = prompt_batch(load_writer(folder, GenerateConfig(device="cpu", **options), target_len), prompt)
    return writer, batch, *trace(writer, batch, Noise(0, "generate", 0, [0]), "it")


def say(capsys, *words):
    capsys.readouterr()
    sample.main([str(word) for word in words])
    return capsys.readouterr().out


def strict(text):
    """Return what JSON holds; inf and nan are not JSON."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


class Page(HTMLParser):
    """The tags of a page and the data that it holds."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self.inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, attrs))
        self.inside = ("id", "trace") in attrs

    def handle_data(self, data):
        self.data += data if self.inside else ""

    def handle_endtag(self, tag):
        self.inside = False


# ---- the same text ----

@pytest.mark.parametrize("name, decoder", [*WAYS, ("lm", "left to right")])
@pytest.mark.parametrize("n_samples", [1, 3])
def test_the_text_and_every_draft_are_those_without_a_trace(runs, tmp_path, capsys, name, decoder, n_samples):
    flags = [f"--decoder={decoder}", "--n_steps=5"] if name in PROCESSES else []
    words = [runs(name), "--prompt=abc", "--show_steps", "--temperature=0.8", f"--n_samples={n_samples}", *flags]
    assert say(capsys, *words, f"--trace={tmp_path / 'x.json'}") == say(capsys, *words)
    facts, = strict((tmp_path / "x.json").read_text(encoding="utf-8"))["models"]
    options = dict(temperature=0.8, n_samples=n_samples, **(dict(decoder=decoder, n_steps=5) if name in PROCESSES else {}))
    writer, batch, drafts, again = traced_run(runs(name), "abc", **options)
    plain = writer.drafts(batch, Noise(0, "generate", 0, [0]))
    assert len(plain) == len(drafts) and all(torch.equal(a, b) for a, b in zip(plain, drafts))
    assert [step["tokens"] for step in facts["steps"]] == [draft[0].tolist() for draft in plain]
    untimed = lambda m: [{k: v for k, v in step.items() if k != "seconds"} for step in m["steps"]]
    assert untimed(again) == untimed(facts) and again["samples"] == facts["samples"]


@pytest.mark.parametrize("name, decoder", [*WAYS, ("lm", "left to right")])
def test_the_best_of_the_samples_is_the_answer_and_seconds_rise(runs, name, decoder):
    flags = dict(decoder=decoder) if name in PROCESSES else {}
    writer, _, drafts, facts = traced_run(runs(name), n_samples=5, temperature=1.0, **flags)
    scores = [s["score"] for s in facts["samples"]]
    assert len(scores) == 5 and min(scores) == scores[facts["best"]] and len(set(scores)) > 1
    assert facts["samples"][facts["best"]]["text"] == BYTES.decode(drafts[-1][0])
    seconds = [step["seconds"] for step in facts["steps"]]
    assert seconds[0] == 0 and all(a < b for a, b in zip(seconds, seconds[1:])) and len(seconds) == len(drafts)
    assert (facts["process"], facts["decoder"]) == (writer.process.name, decoder) and facts["options"]["n_samples"] == 5
    assert facts.keys() == traced([["a"]]).keys() and facts["steps"][0].keys() == traced([["a"]])["steps"][0].keys()


def test_in_bfloat16_too(runs):
    for name in ("ar", "absorbing"):
        writer, batch, drafts, facts = traced_run(runs(name), dtype="bfloat16", n_samples=2)
        plain = writer.drafts(batch, Noise(0, "generate", 0, [0]))
        assert len(plain) == len(drafts) and all(torch.equal(a, b) for a, b in zip(plain, drafts))
        assert all(p is None or 0 <= p <= 1 for step in facts["steps"] for p in step["sure"])


# ---- how sure ----

def close(found, expected):
    """Are these the same to two digits, and None where they should be?"""
    return len(found) == len(expected) and all((a is None) == (b is None) and (a is None or abs(a - b) < 0.0051)
                                               for a, b in zip(found, expected))


@pytest.mark.parametrize("name", ["uniform", "absorbing", "gaussian"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("n_samples", [1, 3])
def test_diffusion_is_as_sure_of_a_token_as_the_logits_were_that_it_was_drawn_from(runs, name, shifted, n_samples):
    folder = runs(name, f"--shift={shifted}")
    writer, batch, drafts, facts = traced_run(folder, n_samples=n_samples, temperature=1.0, n_steps=4)
    model, process, steps = build_model(sample.load_checkpoint(folder)).eval(), writer.process, facts["steps"]
    assert (process.shift is not None) == shifted and steps[0]["sure"] == [None] * 7
    assert len({p for step in steps[1:] for p in step["sure"]}) > 5
    if name == "gaussian":  # it reads vectors, which no draft holds: the likeliest token is the draft, so it beats all others
        assert all(p is not None and 1 / 359 < p <= 1 for step in steps[1:] for p in step["sure"])
        return
    context = model.encode(batch.inputs, batch.pad_mask, process.inputs_attention)
    expected = [None] * 7
    for before, after, step in zip(drafts, drafts[1:], steps[1:]):
        fed = torch.cat((torch.full((1, 1), process.shift), before), dim=1) if shifted else before
        logits = model.decode(fed, context, "bidirectional")[0, :7].detach()
        if name == "absorbing":
            logits[:, BYTES.mask] = -torch.inf
        p = logits.softmax(-1)[torch.arange(7), after[0]].tolist()
        stays = (before == after)[0] if name == "absorbing" else torch.zeros(7, dtype=torch.bool)
        expected = [old if stay else new for stay, old, new in zip(stays, expected, p)]
        assert close(step["sure"], expected)
        assert name == "uniform" or [p is None for p in step["sure"]] == [i == BYTES.mask for i in step["tokens"]]


@pytest.mark.parametrize("prompt, n_samples, name", [("abc", 1, "ar"), ("abc", 4, "ar"), ("", 2, "ar"), ("", 1, "lm"),
                                                     ("", 3, "lm"), ("x", 1, "lm"), ("x", 3, "lm"), ("abcd", 3, "lm")])
def test_ar_is_as_sure_as_a_joint_pass_and_did_not_write_what_follows_eos(runs, monkeypatch, prompt, n_samples, name):
    folder = runs(name)
    rng = random.Random(0)
    real = Noise.categorical

    def ends_at_random(self, logits, temperature):  # this model hardly ever ends by itself
        ends = torch.tensor([rng.random() < 0.3 for _ in logits])[:, None]
        return torch.where(ends, BYTES.eos, real(self, logits, temperature))
    for _ in range(3):
        with monkeypatch.context() as patched:
            patched.setattr(Noise, "categorical", ends_at_random)
            writer, batch, drafts, facts = traced_run(folder, prompt, n_samples=n_samples, temperature=1.0)
        model, answer, T = build_model(sample.load_checkpoint(folder)).eval(), drafts[-1][0].tolist(), len(drafts[-1][0])
        context = model.encode(batch.inputs, batch.pad_mask, writer.process.inputs_attention)
        prefix = list(prompt.encode()) if name == "lm" else []
        fed = torch.tensor([[writer.process.start, *prefix, *answer[:-1]]])
        p = model.decode(fed, context, "causal")[0, len(prefix):].detach().softmax(-1)[torch.arange(T), answer].tolist()
        n = answer.index(BYTES.eos) + 1 if BYTES.eos in answer else T
        for k, step in enumerate(facts["steps"]):
            assert close(step["sure"], [p[i] if i < min(k, n) else None for i in range(T)])


# ---- time ----

@pytest.mark.parametrize("name", ["ar", "lm", *PROCESSES])
def test_the_clock_stands_while_something_is_noted(runs, monkeypatch, name):
    now, init = [0.0], module.Recorder.__init__
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    writer, batch = prompt_batch(load_writer(runs(name), GenerateConfig(device="cpu")), "abc")

    class Slow(list):
        def append(self, x):
            now[0] += 100
            super().append(x)

    def slow(self, *args):
        init(self, *args)
        self.sure = Slow()

    def decode(*args, decode=writer.model.decode, **options):
        now[0] += 1
        return decode(*args, **options)
    monkeypatch.setattr(module.Recorder, "__init__", slow)
    monkeypatch.setattr(writer.model, "decode", decode, raising=False)
    drafts, facts = trace(writer, batch, Noise(0, "generate", 0, [0]), "it")
    read = 1 if name == "lm" else 0  # the prompt that is continued is read first, and that is work
    assert [step["seconds"] for step in facts["steps"]] == [0, *(float(k + read) for k in range(1, len(drafts)))]


# ---- the files ----

def test_two_models_side_by_side_are_each_what_they_are_alone(runs, tmp_path, capsys):
    a, b = runs("uniform"), runs("ar")
    out = say(capsys, a, f"--beside={b}", "--prompt=abc", f"--trace={tmp_path / 'two.json'}", "--n_samples=2")
    assert out == say(capsys, a, "--prompt=abc", "--n_samples=2")  # the answer is that of the first
    two = strict((tmp_path / "two.json").read_text(encoding="utf-8"))
    alone = [traced_run(a, "abc", n_samples=2)[3], traced_run(b, "abc")[3]]
    assert two["prompt"] == "abc" and [m["name"] for m in two["models"]] == [str(a), str(b)]
    assert [m["options"] for m in two["models"]] == [m["options"] for m in alone]  # --n_samples is for the first
    for m, other in zip(two["models"], alone):
        assert [step["tokens"] for step in m["steps"]] == [step["tokens"] for step in other["steps"]]


def test_the_page_and_the_picture_stay_small_where_every_token_changes_at_every_step(train, tmp_path, capsys):
    run = train("diff", tmp_path / "x", "--tokenizer=bpe", "--target_len=64", "--steps=1")
    for ending, limit in ((".html", 300_000), (".svg", 200_000)):
        path = tmp_path / f"x{ending}"
        say(capsys, run.folder, "--prompt=ab", "--temperature=1", "--n_steps=20", "--n_samples=8", f"--trace={path}")
        assert 20_000 < path.stat().st_size < limit


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_markup_or_breaks_a_file(tmp_path, text):
    write = lambda text, kind: write_trace(str(tmp_path / f"{len(list(tmp_path.iterdir()))}{kind}"), text, [
        traced([["x"] * 3, [text, "y", None]], samples=(text, "b"), name=text.replace("/", ""))])
    for content in (text, "harmless"):
        write(content, ".json"), write(content, ".html"), write(content, ".svg")
    data, page, picture, _, plain, plain_picture = (path.read_bytes().decode() for path in sorted(tmp_path.iterdir()))
    facts = strict(data)
    assert facts["prompt"] == facts["models"][0]["steps"][1]["texts"][0] == facts["models"][0]["samples"][0]["text"] == text
    assert strict(Page(page).data) == facts and Page(page).tags == Page(plain).tags
    tags = lambda root: [element.tag for element in root.iter()]
    found, usual = ET.fromstring(picture), ET.fromstring(plain_picture)
    assert set(tags(found)) == set(tags(usual)) and len([t for t in tags(found) if t.endswith("}g")]) == 2
    shown = ["".join(line.itertext()) for line in found.iter("{http://www.w3.org/2000/svg}text")]
    assert [c for c in "".join(shown) if c in "<&]😀漢"] == [c for c in 3 * text if c in "<&]😀漢"]  # prompt, name, draft


@pytest.mark.parametrize("prompt", HOSTILE)
def test_any_prompt_can_be_traced(runs, tmp_path, capsys, prompt):
    folder, words = runs("uniform", "--input_len=64"), [f"--prompt={prompt}", "--temperature=1", "--n_samples=2", "--n_steps=2"]
    for ending in module.ENDINGS:
        say(capsys, folder, *words, f"--trace={tmp_path}/x{ending}")
    assert strict((tmp_path / "x.json").read_text(encoding="utf-8"))["prompt"] == prompt
    assert strict(Page((tmp_path / "x.html").read_text(encoding="utf-8")).data)["prompt"] == prompt
    ET.fromstring((tmp_path / "x.svg").read_text(encoding="utf-8"))


def test_text_that_looks_like_padding_is_shown_and_padding_at_the_end_is_not():
    lines = module.lines_of(traced([["·", "∎", "·", None, None]]), 0)
    assert lines == [[("text", "·∎·")]]
    assert module.lines_of(traced([[None, "a", None]]), 0) == [[("text", "·a")]]
    assert module.lines_of(traced([[None, None]]), 0) == [[("text", "·")]]


def test_a_picture_keeps_lines_and_indentation_and_marks_what_is_new_or_doubtful():
    m = traced([["x", "y", "z"], ["x", "\n    ", "z" * 100], ["x", "\n    ", "\tq"]], sure=0.49)
    assert module.lines_of(m, 1) == [[("low", "x")], [("new", "    " + "z" * 76)], [("new", "z" * 24)]]
    assert module.lines_of(m, 2) == [[("low", "x"), ], [("low", "    "), ("new", "    q")]]
    assert module.lines_of(traced([["x"], ["x"]], sure=0.5), 1) == [[("text", "x")]]


def odd(score):
    @torch.no_grad()
    def odd(process, model, batch, noise, n_samples=2, frozen=None):
        context, noise, x0, frozen = begin(process, model, batch, noise, n_samples, frozen)
        xt = pure_noise(process, x0, frozen, noise)
        drafts = [xt, model.decode(xt, context, "bidirectional").fill_(torch.nan).argmax(-1).zero_()]
        return (yield from best_of(drafts, torch.tensor(score), n_samples))
    return odd


def test_numbers_that_json_has_not_are_null(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(DECODERS["uniform"], "odd", odd([torch.inf, 1.5]))
    say(capsys, runs("uniform"), "--prompt=a", "--decoder=odd", f"--trace={tmp_path / 'x.json'}")
    facts, = strict((tmp_path / "x.json").read_text(encoding="utf-8"))["models"]
    assert [s["score"] for s in facts["samples"]] == [None, 1.5] and facts["best"] == 1
    assert facts["steps"][1]["sure"] == [None] * 7


def test_a_decoder_that_does_not_return_its_samples_is_named(runs, tmp_path, monkeypatch):
    def plain(process, model, batch, noise, n_samples=1, frozen=None):
        yield from DECODERS["uniform"]["resample"](process, model, batch, noise, n_samples=n_samples)
    monkeypatch.setitem(DECODERS["uniform"], "plain", plain)
    with pytest.raises(cli.UserError, match=r"'plain' must end in: return \(yield from best_of"):
        sample.main([str(runs("uniform")), "--prompt=a", "--decoder=plain", f"--trace={tmp_path / 'x.json'}"])


# ---- mistakes ----

@pytest.mark.parametrize("flags, message", [
    (["--trace=x.gif"], "--trace=x.gif must end in .html, .svg, .json"), (["--trace=x"], "must end in"),
    (["--trace=none/x.html"], "cannot write --trace=none/x.html: No such file"), (["--trace=old.json"], "old.json exists"),
    (["--trace=dir.html"], "dir.html exists"), (["--trace="], "trace is empty"),
    (["--beside=AR"], "--beside is for --trace"), (["--trace=x.html", "--infill=a___"], "goes with neither --infill nor"),
    (["--trace=x.html", "--beside=none"], "no checkpoint at none"),
    (["--trace=x.svg", "--n_steps=70", "--n_samples=1"], "504 tokens in all drafts and samples are more than 500; lower"),
    (["--trace=x.svg", "--n_steps=1", "--n_samples=70"], "504 tokens in all drafts and samples are more than 500; lower"),
    (["--trace=x.html", "--beside=SHORT"], "the prompt has 5 tokens, the model's canvas holds 4")])
def test_what_cannot_be_traced_is_refused_in_one_line_and_nothing_is_written(runs, tmp_path, monkeypatch, capsys, flags,
                                                                            message):
    others = {"--beside=AR": ("ar",), "--beside=SHORT": ("ar", "--input_len=4", "--too_long=drop")}
    flags = [f"--beside={runs(*others[flag])}" if flag in others else flag for flag in flags]
    words = [str(runs("uniform")), "--prompt=abcde", *flags]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "MAX_TOKENS", 500)
    (tmp_path / "old.json").write_text("mine", encoding="utf-8")
    (tmp_path / "dir.html").mkdir()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: sample.main(words))
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1 and not out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir.html", "old.json"]
    assert (tmp_path / "old.json").read_text(encoding="utf-8") == "mine"


def test_it_goes_with_neither_a_drafter_nor_a_new_flag_that_is_misspelt(runs, tmp_path):
    with pytest.raises(cli.UserError, match="neither --infill nor --drafter"):
        sample.main([str(runs("ar")), "--prompt=a", f"--drafter={runs('uniform')}", f"--trace={tmp_path}/x.html"])
    with pytest.raises(cli.UserError, match="did you mean --trace"):
        sample.main([str(runs("ar")), "--prompt=a", f"--trase={tmp_path}/x.html"])


# ---- the terminal ----

def marked(line):
    """Return [(character, is it bold)] of a line for a terminal."""
    found, bold = [], False
    for part in re.split("(\033\\[1m|\033\\[0m)", line):
        bold = {"\033[1m": True, "\033[0m": False}.get(part, bold)
        found += [] if part.startswith("\033") else [(c, bold) for c in part]
    return found


@pytest.mark.parametrize("name", ["ar", *PROCESSES])
def test_on_a_terminal_what_a_step_changed_is_bold_and_elsewhere_nothing_is(runs, monkeypatch, capsys, name):
    words = [runs(name, "--tokenizer=bpe"), "--prompt=abc", "--show_steps", "--temperature=1", "--n_samples=1"]
    plain = say(capsys, *words)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = say(capsys, *words).splitlines()
    _, _, drafts, facts = traced_run(words[0], "abc", temperature=1.0, n_samples=1)
    assert "\033" not in plain and "\033" in "".join(lines)
    assert ["".join(c for c, _ in marked(line)) for line in lines] == plain.splitlines()
    texts = [step["texts"] for step in facts["steps"]]
    for k, (before, now) in enumerate(zip([texts[0], *texts], texts)):
        expected = [(c, new != old) for new, old in zip(now, before) for c in new.replace("\r", "").replace("\n", "↵")]
        assert marked(lines[k][6:]) == expected
    assert not any(bold for _, bold in marked(lines[0])) and "\033" not in "".join(lines[len(texts):])


def test_draft_zero_is_the_noise(runs, capsys):
    folder = runs("absorbing")
    first = say(capsys, folder, "--prompt=abc", "--show_steps").splitlines()[0]
    assert first == "   0  " + "▒" * 7
    _, batch, drafts, _ = traced_run(runs("uniform"), "abc", n_samples=3)
    rows = Noise(0, "generate", 0, [0]).split(3)
    noise = rows.uniform(7), rows.integers(BYTES.n_noise, 7)  # at level 1 all of it
    assert drafts[0][0].tolist() in noise[1].tolist()
    assert say(capsys, runs("ar"), "--prompt=abc", "--show_steps").splitlines()[0] == "   0  " + "·" * 7
