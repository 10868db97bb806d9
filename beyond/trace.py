"""See it being written: every draft, how sure the model was of each token, and the other samples that it might have kept.

    python sample.py out/ar2diff_code --prompt="add 9 to each number and sort the result" --trace=trace.html
    python sample.py out/ar2diff_code --beside=out/ar_code --prompt="..." --trace=trace.svg      # two models, one clock

.html: one page, which asks no network (template: trace.html). .svg: a picture that moves, for an image tag. .json: the data.
"""
import html
import itertools
import json
import math
import re
import textwrap
import time
from pathlib import Path

from beyond.decoders import DECODERS
from engine.cli import check
from engine.files import check_new, write_new

ENDINGS, MAX_TOKENS = (".html", ".svg", ".json"), 50_000  # of all drafts and samples; more would be a page of megabytes


class Recorder:
    """A model that notes, whenever it is asked again, what became of its last logits: when, and with which probability."""

    def __init__(self, model, shifted):
        self.model, self.shifted, self.logits, self.sure, self.seconds = model, shifted, None, [], []
        self.start = time.perf_counter()  # moved on while something is noted: what that takes is nobody's work

    def __getattr__(self, name):
        return getattr(self.model, name)

    def decode(self, y, *args, **options):
        if self.logits is not None:
            self.lap(y[:, 1:] if self.shifted else y)  # fed again: so this is what was chosen
        self.logits = self.model.decode(y, *args, **options)
        return self.logits

    def lap(self, chosen):
        """Note the seconds, and the probabilities (B, T) of tokens (B, T); vectors (B, T, C) stand for the likeliest tokens."""
        chosen, now = chosen.cpu(), time.perf_counter()  # in this order: a GPU is waited for
        p = (self.logits[:, :-1] if self.shifted else self.logits).float().cpu().softmax(-1)
        self.sure.append(p.amax(-1) if chosen.is_floating_point() else p.take_along_dim(chosen[..., None], -1)[..., 0])
        self.seconds.append(now - self.start)
        self.start += time.perf_counter() - now


def trace(writer, batch, noise, name):
    """Write one text, as writer.drafts() does; return (drafts, facts), plain data: of each step the seconds since the start,
    tokens, their texts, how `sure` of each the model was when it wrote it (temperature 1); all samples, scores in nats."""
    process, tokenizer, found = writer.process, writer.tokenizer, None
    writer.drafts(batch, noise)  # uncounted: the first time takes longer
    model = Recorder(writer.model, getattr(process, "shift", None) is not None)

    def drafts_of(generate):
        nonlocal found
        found = yield from generate(process, model, batch.to(writer.device), noise, **writer.options)
    with writer.autocast():
        drafts = list(drafts_of(DECODERS[process.name][writer.decoder]))
    check(found, f"--trace: the decoder {writer.decoder!r} must end in: return (yield from best_of(...))")
    rows, score, ids, n = found[0][-1], found[1], [draft[0].tolist() for draft in drafts], len(drafts) - 1
    model.lap(rows[:, n - 1:n] if process.name == "ar" else rows)
    best, number = int(score.argmin()), lambda x, digits: round(x, digits) if math.isfinite(x) else None  # JSON has no inf
    sure = [[None] * len(ids[0])]
    for k, p in enumerate(model.sure[-n:]):  # a prompt that AR continues was read before
        changed = [i for i, (a, b) in enumerate(zip(ids[k], ids[k + 1])) if a != b]
        wrote = {"ar": [] if tokenizer.eos in ids[k] else [k], "absorbing": changed}.get(process.name, range(len(ids[k])))
        p = p[best].expand(len(ids[k])).tolist()  # of a token that stays: how sure was it when it wrote it?
        sure.append([number(p[i], 2) if i in wrote else before for i, before in enumerate(sure[-1])])
    steps = [dict(seconds=round(s, 6), tokens=row, texts=tokenizer.pieces(row), sure=p)
             for s, row, p in zip([0.0, *model.seconds[-n:]], ids, sure)]
    score = [number(s, 4) for s in score.tolist()] if len(rows) > 1 else [None]  # AR gives one alone no score
    samples = [dict(text=tokenizer.decode(row), score=s) for row, s in zip(rows.tolist(), score)]
    return drafts, dict(name=name, process=process.name, decoder=writer.decoder, n_text=tokenizer.n_text, pad=tokenizer.pad,
                        options={key: value for key, value in writer.options.items() if key != "prefix"},
                        steps=steps, samples=samples, best=best)


def check_trace(config):
    """Raise UserError for flags of sample.py that ask for a trace and cannot have one."""
    check(config.trace or not config.beside, "--beside is for --trace: the two are shown side by side")
    if config.trace:
        check(config.trace.endswith(ENDINGS), f"--trace={config.trace} must end in {', '.join(ENDINGS)}")
        check(config.infill is None and not config.drafter, "--trace goes with neither --infill nor --drafter")
        check_new(config.trace, "trace")


def write_trace(path, prompt, models):
    """Write what trace() found of one or several models that answered a prompt. Raises UserError."""
    size = sum((len(m["steps"]) + len(m["samples"])) * len(m["steps"][0]["tokens"]) for m in models)
    check(size <= MAX_TOKENS, f"--trace: {size:,} tokens in all drafts and samples are more than {MAX_TOKENS:,}; lower "
                              f"--target_len, --n_steps or --n_samples")
    facts = json.dumps({"prompt": prompt, "models": models}, ensure_ascii=False, allow_nan=False)
    facts = facts.replace("<", "\\u003c")  # so no text can end the script of the page
    if path.endswith(".html"):
        facts = Path(__file__).with_name("trace.html").read_text(encoding="utf-8").replace("TRACE", facts)
    write_new(path, svg(prompt, models) if path.endswith(".svg") else facts + "\n", "trace")


COLUMNS, LINE, PERIOD = 80, 18, 9  # characters of a line (in 700 pixels), pixels from line to line, seconds of one round
STYLE = ("rect{fill:#fff}text{font:14px monospace;white-space:pre;fill:#222}.soft{fill:#666}.new{fill:#b3261e}.low{fill:#777}"
         "@media(prefers-color-scheme:dark){rect{fill:#141414}text{fill:#ddd}.soft{fill:#aaa}.new{fill:#ff8a80}.low{fill:#999}}"
         "@media(prefers-reduced-motion:reduce){g{visibility:hidden!important}.last{visibility:visible!important}}")


def svg(prompt, models):
    """Return an SVG in which drafts follow each other by the models' own clocks; a fifth of each round shows the answers."""
    head, y = textwrap.shorten(prompt, COLUMNS - 25, placeholder=" …") or "(no prompt)", 2.5 * LINE
    body = [text_at(LINE, [("soft", head), ("new", "   just changed"), ("low", " unsure")])]
    total = max(m["steps"][-1]["seconds"] for m in models)
    for m in models:
        n, frames = len(m["steps"]) - 1, [lines_of(m, k) for k in range(len(m["steps"]))]
        name = "/".join(Path(m["name"]).parts[-2:])[-40:]
        body.append(text_at(y, [("soft", f"{name}: {n} evaluations x {len(m['samples'])}, {m['steps'][-1]['seconds']:.3f} s")]))
        times = [*(0.8 * step["seconds"] / total for step in m["steps"]), 1]
        for k, lines in enumerate(frames):
            kind = 'class="last"' if k == n else 'visibility="hidden"'  # what cannot move shows the last
            body.append(f'<g {kind}><animate attributeName="visibility" dur="{PERIOD}s" repeatCount="indefinite" '
                        f'values="hidden;visible;hidden" keyTimes="0;{times[k]:.4f};{times[k + 1]:.4f}" calcMode="discrete"/>')
            body += [*(text_at(y + (i + 1) * LINE, spans) for i, spans in enumerate(lines)), "</g>"]
        y += (max(map(len, frames)) + 2) * LINE
    return (f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 700 {y - LINE:.0f}" xml:space="preserve"><title>'
            f'{escape(head)}</title><style>{STYLE}</style><rect width="100%" height="100%"/>{"".join(body)}</svg>\n')


def escape(text):
    """Return a text for XML, which has no control characters, not even escaped ones."""
    return html.escape(re.sub("[^\t\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def text_at(y, spans):
    return f'<text x="9" y="{y:.0f}">' + "".join(f'<tspan class="{k}">{escape(t)}</tspan>' for k, t in spans) + "</text>"


def lines_of(m, k):
    """Return the lines of draft k, each a list of spans (kind, text): new, low (less sure than one in two) or neither."""
    step, before, lines = m["steps"][k], m["steps"][max(k - 1, 0)]["texts"], [[]]
    n_shown = max((i + 1 for i, token in enumerate(step["tokens"]) if token != m["pad"]), default=1)  # not the PAD at the end
    for text, p, old in zip(step["texts"][:n_shown], step["sure"], before):
        kind = "new" if text != old else "low" if p is not None and p < 0.5 else "text"
        for character in text.expandtabs(4):
            if character == "\n" or len(lines[-1]) == COLUMNS:
                lines.append([])
            if character not in "\r\n":
                lines[-1].append((kind, character))
    return [[(kind, "".join(c for _, c in run)) for kind, run in itertools.groupby(line, lambda x: x[0])] for line in lines]
