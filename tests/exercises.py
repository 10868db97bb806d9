"""What exercises.py checks: task_N() of docs/exercises.md raises AssertionError with what is wrong, in words for a student.

    PYTHONPATH=. python tests/exercises.py 3     # in the folder of the exercise, as `exercises.py check 3` does

The last line tells; exit code 0: right, 1: not yet, 2: the student's file does not parse or lacks the function.
The models here are stand-ins without weights that keep what they are fed. A check takes any right answer: of random draws it
looks at limits (t = 0, temperature 0) and at shares with wide margins, and at no stream of numbers.
The project is imported inside the checks, so that a file of a student's that cannot be imported is told like any other mistake.
"""
import ast
import re
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

V, EOS, PAD, MASK = 16, 9, 10, 11  # text is 0-8; uniform noise draws from 0-10; ids 11-15 are never noise
HELD = []  # what was found to hold


def holds(condition, otherwise):
    """Raise AssertionError(otherwise) unless the condition holds."""
    if not condition:
        raise AssertionError(otherwise)
    HELD.append(otherwise)


def tensor(x, shape, what):
    """Check that x is a tensor of this shape, and return it."""
    holds(x is not None, f"{what}: it is None; does the function end with return?")
    holds(isinstance(x, torch.Tensor), f"{what} is a {type(x).__name__}, not a tensor")
    holds(tuple(x.shape) == tuple(shape), f"{what} has the shape {tuple(x.shape)}, it should be {tuple(shape)}")
    return x


def is_close(a, b, tolerance=1e-4):
    """Return whether tensors or numbers are equal to rounding; nan is equal to nothing."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (a, b))
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())


def number(x, expected, what, *mistakes):
    """Check a number (or tensor). mistakes: (value, message), what it would be after a mistake, tried in this order."""
    x = torch.as_tensor(x).detach()
    holds(not x.isnan().any(), f"{what} is nan")
    for value, message in mistakes:
        holds(not is_close(x, value) or is_close(value, expected), message)
    told = lambda v: ", ".join(f"{float(part):.4g}" for part in torch.as_tensor(v).detach().flatten()[:4])
    holds(is_close(x, expected), f"{what} is {told(x)}, it should be {told(expected)}")


def noise(n, step=0):
    from engine.noise import Noise
    return Noise(0, "train", step, range(n))


class Batch(NamedTuple):
    inputs: torch.Tensor
    pad_mask: torch.Tensor | None
    targets: torch.Tensor


def batch_of(targets, S=3):
    """Return a batch with these targets (B, T) and inputs (B, S), whose first one begins with two columns of padding."""
    inputs, pad_mask = torch.arange(len(targets) * S).view(-1, S) % 9, torch.zeros(len(targets), S, dtype=torch.bool)
    pad_mask[0, :2] = True
    return Batch(inputs.masked_fill(pad_mask, PAD), pad_mask, targets)


def nats(logits, x0):
    """Return -log p(x0), (B, T), written another way than in the project."""
    return -logits.double().log_softmax(-1).gather(-1, x0[..., None]).squeeze(-1)


class Context:
    """What Model.encode() gives: a mark that decode() was handed it, and for how many samples of each row."""
    n = 1

    def repeat(self, n):
        other = Context()
        other.n = self.n * n
        return other


class Model:
    """A stand-in for the Transformer: logits = script(y), by default from a table of random rows. It keeps what it is given."""

    def __init__(self, script=None, seed=0, limit=200):
        rng = torch.Generator().manual_seed(seed)
        self.table = (2 * torch.randn(V, V, generator=rng)).requires_grad_()  # row: the token that is read
        self.script, self.limit, self.noisy = script or (lambda y: self.table[y]), limit, None
        self.encoded, self.fed, self.given, self.attention, self.believed = [], [], [], [], []
        self.embedding = lambda tokens: F.one_hot(tokens, 4).float()

    def encode(self, inputs, pad_mask=None, attention="causal"):
        self.encoded.append((inputs, pad_mask, attention))
        return Context()

    def decode(self, y, context, attention, extend=False, belief=None):
        holds(isinstance(context, Context), "decode(y, context, attention) wants as its context what encode() returned")
        holds(len(self.fed) < self.limit, f"it does not end: the network was called {self.limit} times")
        self.fed.append(y.detach().clone())
        self.attention.append(attention)
        self.believed.append(belief)
        self.given.append(self.script(y))
        return self.given[-1]

    def saw(self, batch, attention):
        """Check that the inputs were encoded once, with their padding and under this pattern."""
        holds(self.encoded, "the inputs are not read: model.encode() was never called")
        holds(len(self.encoded) == 1, f"the inputs were encoded {len(self.encoded)} times; once is enough, as they do not see "
                                      f"the targets: keep the context")
        inputs, pad_mask, pattern = self.encoded[0]
        holds(inputs.shape == batch.inputs.shape and torch.equal(inputs, batch.inputs), "encode() must read batch.inputs")
        holds(pad_mask is not None, "encode() was not given batch.pad_mask: the padding of the inputs would be read")
        holds(pattern == attention, f"inputs were encoded with attention={pattern!r}, the process says {attention!r}: use "
                                    f"self.inputs_attention")


def parts_of(losses, B):
    """Return (total, per_sequence, t) of a Losses, checked for its form."""
    holds(losses is not None, "the loss returns nothing; does the function end with return?")
    holds(isinstance(losses, tuple) and len(losses) == 3, "return Losses(total, per_sequence, t)")
    total, per_sequence, t = losses
    tensor(total, (), "total")
    tensor(per_sequence, (B,), "per_sequence")
    holds(total.requires_grad, "no gradient flows from total: was the model called without, or total detached?")
    holds(not per_sequence.requires_grad, "per_sequence is for the log: detach it, or a whole graph is kept alive")
    return total, per_sequence, t


def level(t, B):
    """Check noise levels t (B,) of a batch."""
    t = tensor(t, (B,), "t")
    holds(t.min() >= 0 and t.max() <= 1, "t must lie between 0 and 1")
    holds(t.unique().numel() > B // 2, "all sequences got the same t: draw one for each")
    holds(t.min() < 0.1 and t.max() > 0.9 and 0.4 < t.mean() < 0.6,
          f"t should be uniform in [0, 1]; here it lies in [{t.min():.2f}, {t.max():.2f}] with a mean of {t.mean():.2f}")
    return t.double()


def drafts_of(generator, shape, n_steps):
    """Return the drafts of a decoder, checked for their number and their shape."""
    holds(hasattr(generator, "__next__"), "generate() must yield its drafts: use yield")
    drafts = list(generator)
    for draft in drafts:
        tensor(draft, shape, "a draft (of the n_samples of an input the best is yielded)")
    if n_steps is not None:
        holds(len(drafts) == n_steps + 1, f"{n_steps} steps must yield {n_steps + 1} drafts, the noise first; it yields "
                                          f"{len(drafts)}")
    return drafts


# ---- Sitting 1 ----

def returned(generator):
    """Return what a generator returns at its end."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def task_1():
    from diffusion import Uniform
    B, T, n = 64, 64, 11
    process, x0 = Uniform(n), torch.full((B, T), 15)  # noise never draws 15: what is replaced can be told
    before = x0.clone()
    corrupt = lambda x0, t, seed=0: tensor(process.corrupt(x0, t, noise(len(x0), seed)), x0.shape, "xt")
    share = (corrupt(x0, torch.zeros(B)) != x0).double().mean()
    holds(torch.equal(x0, before), "x0 itself was changed: return a new tensor")
    holds(share < 0.5, "at t = 0 nearly everything is replaced: t is the probability of being replaced, not of being kept")
    holds(share == 0, f"at t = 0 nothing may change, but a share of {share:.2f} did")
    changed = (corrupt(x0, torch.full((B,), 0.5)) != x0).double()
    rows, columns = changed.mean(dim=1), changed.mean(dim=0)
    holds(torch.equal(x0, before), "x0 itself was changed: return a new tensor")
    holds(changed.any(), "at t = 0.5 nothing is replaced")
    holds(not set(rows.tolist()) <= {0.0, 1.0}, "whole rows are replaced: draw one number for each token, not for each row")
    holds(not set(columns.tolist()) <= {0.0, 1.0}, "the same places are replaced in every row: draw numbers for each row, "
          "and compare them with its own t, t[:, None]")
    holds(0.45 < changed.mean() < 0.55, f"at t = 0.5 a share of {changed.mean():.2f} is replaced, it should be 0.5")
    t = torch.linspace(0, 1, B)
    shares = (corrupt(x0, t) != x0).double().mean(dim=1)
    holds((shares - t).abs().max() < 0.3, "each row has its own level: row b is replaced with probability t[b]")
    xt = corrupt(x0, torch.ones(B))
    holds((xt != x0).all(), "at t = 1 every token is replaced; some were left")
    holds(xt.min() >= 0 and xt.max() < n, f"id {int(xt.max())} was drawn: noise draws from [0, n_noise) = [0, {n}), never MASK "
                                          f"or a sentinel")
    holds(all(len(row.unique()) > 1 for row in xt), "all replaced tokens of a row are the same: draw one for each token")
    holds(not torch.equal(xt[0], xt[1]), "all rows got the same random tokens")
    counts = xt.flatten().bincount(minlength=n)
    holds(counts[n - 1] > 0, f"id {n - 1} is never drawn: [0, n_noise) includes n_noise - 1; EOS and PAD are noise, too")
    holds(counts.min() > 270 and counts.max() < 480, "the random tokens are not uniform over [0, n_noise)")
    x0 = torch.arange(B * T).view(B, T) % n
    same = (corrupt(x0, torch.ones(B)) == x0).double().mean()
    holds(same > 0, "at t = 1 no token is as it was: a random token may also be the old one, with probability 1 / n_noise")
    holds(same < 0.15, f"at t = 1 a share of {same:.2f} is as it was, it should be near 1 / n_noise = {1 / n:.2f}")
    half = torch.full((B,), 0.5)
    holds(torch.equal(corrupt(x0, half), corrupt(x0, half)), "the same rng gives another xt: draw from rng, not from torch")
    holds(not torch.equal(corrupt(x0, half), corrupt(x0, half, 1)), "another rng gives the same xt: draw from rng")


def seen_by(answer, T, L):
    """Return who sees whom, (B or 1, T, L) bool, of (mask, is_causal), as attention takes it."""
    holds(isinstance(answer, tuple) and len(answer) == 2, "return two things: (mask, is_causal)")
    mask, is_causal = answer
    holds(mask is None or not is_causal, "a mask and is_causal=True together: PyTorch refuses them; give one")
    holds(not is_causal or T == L, f"is_causal with {T} queries and {L} columns: PyTorch lets the first query see the first "
                                   f"column only; it is right only where n_query == n_key, else return a mask")
    if mask is None:
        every = torch.ones(1, T, L, dtype=torch.bool)
        return every.tril() if is_causal else every
    holds(isinstance(mask, torch.Tensor) and mask.dtype == torch.bool, "the mask must be bool, True = may be seen")
    holds(mask.dim() != 3, "a mask for padding is (B, 1, T, L): without the 1 for the heads B would meet them")
    holds(tuple(mask.shape[-2:]) == (T, L),
          f"the mask has the shape {tuple(mask.shape)}, it should end with {(T, L)}: queries, then columns")
    return mask.reshape(-1, T, L)


def task_2():
    from model import attention_mask
    cpu, triangle = torch.device("cpu"), torch.ones(1, 4, 4, dtype=torch.bool).tril()
    found = seen_by(attention_mask(2, 5, False, None, cpu), 2, 5)
    holds(found.all(), "causal=False: every query sees every column")
    found = seen_by(attention_mask(4, 4, True, None, cpu), 4, 4)
    holds(not torch.equal(found, triangle.mT), "causal runs the wrong way: a query sees itself and what is left of it")
    holds(not found.all(), "causal=True: a query must not see what is right of it")
    holds(found.diagonal(dim1=1, dim2=2).all(), "a query does not see itself: <=, not <")
    holds(torch.equal(found, triangle), "causal=True: query i sees columns 0 ... i")
    found = seen_by(attention_mask(2, 5, True, None, cpu), 2, 5)
    holds(found[0, 0].sum() != 1,
          "the first of 2 queries sees one column of 5: the queries are the LAST n_query columns, so it stands at column "
          "3")
    holds(found[0].tolist() == [[True] * 4 + [False], [True] * 5],
          "2 queries, 5 columns: they stand at columns 3 and 4 and see 4 and 5 columns")
    holds(seen_by(attention_mask(1, 5, True, None, cpu), 1, 5).all(), "one query, the last column, sees all: no mask hides any")
    pads = torch.tensor([[True, True, False], [False, False, False]])  # 3 inputs, then 2 targets
    found = seen_by(attention_mask(2, 5, False, pads, cpu), 2, 5)
    holds(len(found) == 2, "with padding each sequence has a mask of its own: (B, 1, T, L)")
    holds(found[0, :, 3:].all(), "targets are hidden: pad_mask tells of the first S columns, those behind them are real")
    holds(not (found[0, :, 0].any() and not found[0, :, 2].any()), "only padding is seen: in pad_mask True means padding")
    holds(not found[0, :, :2].any(), "padding is seen: where pad_mask is True nobody may look")
    holds(found[1].all() and found[0, :, 2].all(), "what is no padding is hidden")
    found = seen_by(attention_mask(2, 5, True, pads, cpu), 2, 5)
    holds(found[0].tolist() == [[False, False, True, True, False], [False, False, True, True, True]],
          "causal and padding together: a column is seen if it is left of the query AND no padding")
    found = seen_by(attention_mask(3, 3, False, torch.ones(1, 3, dtype=torch.bool), cpu), 3, 3)
    holds(found.any(dim=-1).all(), "a row of padding alone sees nothing: softmax over nothing is nan; let a query see itself")
    holds(found[0].tolist() == torch.eye(3).bool().tolist(), "a row of padding alone: each query sees itself, nothing else")


def task_3():
    from autoregressive import Autoregressive
    ar, x0 = Autoregressive(MASK, EOS, PAD), torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = ar.feed(x0)
    holds(x0.tolist() == [[1, 2, 3], [4, 5, 6]], "x0 itself was changed: it is also what is to be predicted")
    holds(found is None or found.shape != (2, 4), "T + 1 columns: the last target is predicted, but never read; leave it out")
    found = tensor(found, (2, 3), "what is fed")
    holds(not torch.equal(found, x0), "each slot reads the very token that it is to predict: shift by one")
    holds(found[:, 1:].tolist() != [[3, MASK], [6, MASK]] and found[:, 0].tolist() != [2, 5],
          "it is shifted the wrong way: a slot reads the token BEFORE the one that it predicts")
    holds(found[:, 0].tolist() != [3, 6], "the first slot reads the last target (a roll): nothing comes before the first, feed "
                                          "self.start there")
    holds((found[:, 0] == MASK).all(), f"the first slot must read self.start, here {MASK}")
    holds(found.tolist() == [[MASK, 1, 2], [MASK, 4, 5]], f"fed is {found.tolist()}, it should be [start, x0[:-1]] in each row")
    holds(found.dtype == torch.int64, "ids must stay int64")
    holds(ar.feed(x0[:, :1]).tolist() == [[MASK], [MASK]], "with one target only start is fed")


def task_4():
    from autoregressive import Autoregressive
    x0 = torch.tensor([[1, 2, 3, EOS], [4, EOS, PAD, PAD]])
    ar, batch, model = Autoregressive(MASK, EOS, PAD, inputs_attention="bidirectional"), batch_of(x0), Model()
    total, per_sequence, t = parts_of(ar.loss(model, batch, None), 2)
    model.saw(batch, "bidirectional")
    holds(len(model.fed) == 1, f"the network was called {len(model.fed)} times, one call predicts all targets")
    holds(model.fed[0].shape != x0.shape or not torch.equal(model.fed[0], x0),
          "the model reads the targets themselves: what it is to predict stands before it; feed self.feed(...)")
    holds(torch.equal(model.fed[0], ar.feed(x0)), "decode() must be fed self.feed(batch.targets)")
    holds(model.attention[0] == "causal", "targets look to the right: an AR model decodes with attention 'causal'")
    each, real = nats(model.given[0], x0), x0 != PAD
    number(total, each.mean(), "total",
           (each.sum(), "total is a sum: divide by all B * T targets, so that micro-batches average"),
           (each.sum() / 2, "the targets of a sequence are summed: take their mean, over T"),
           (each[real].mean(), "PAD is left out: it is predicted like any token, so that the length is learned"),
           ((each * real).sum() / 8, "PAD carries no loss: it is predicted like any token, so that the length is learned"),
           ((each * real).sum(1).div(real.sum(1)).mean(), "PAD is left out of the mean of each sequence: it is predicted, too"))
    number(per_sequence, each.mean(dim=1), "per_sequence")
    holds(t is None, "an AR model has no noise level: t is None")
    total, *_ = ar.loss(Model(), batch, None, lambda logits, x0: 7 + 0 * logits.sum(-1))
    number(total, 7, "total with another token_loss", (each.mean(), "token_loss is not used: it stands in for cross_entropy()"))


def task_5():
    from diffusion import Uniform, denoise
    slot = lambda y: torch.arange(y.size(1)).float()[None, :, None].expand(len(y), -1, V)  # logits that tell their slot
    y, context, model = torch.tensor([[1, 2, 3], [4, 5, 6]]), Context(), Model(slot)
    found = tensor(denoise(Uniform(11, targets_attention="causal"), model, y, context), (2, 3, V), "logits, not shifted")
    holds(torch.equal(model.fed[0], y), "shift is None: the model reads y as it is")
    holds(model.attention == ["causal"], "targets attend as the process says: use process.targets_attention")
    holds(found[0, :, 0].tolist() == [0, 1, 2], "shift is None: logits[:, i] are those of slot i")
    model = Model(slot)
    found = denoise(Uniform(11, shift=MASK), model, y, context)
    fed = model.fed[0]
    holds(fed.tolist() != [[MASK, 1, 2], [MASK, 4, 5]],
          "the last token of y is not read: diffusion sees them all; put start in front and drop nothing, T + 1 columns")
    holds(fed.shape == (2, 4), f"{fed.size(1)} columns are fed, it should be T + 1 = 4: start, then all of y")
    holds((fed[:, 0] == MASK).all(), f"process.shift, here {MASK}, is the start token that stands in front")
    holds(torch.equal(fed[:, 1:], y), "behind start comes y, unchanged")
    holds(found is not None and found.shape[1] != 4,
          "T + 1 logits for T targets: the last slot predicts what comes behind them")
    found = tensor(found, (2, 3, V), "logits, shifted")
    holds(found[0, :, 0].tolist() != [1, 2, 3],
          "each position is read from its own slot: with start in front, AR predicted target i at slot i of T + 1; drop "
          "the last logits, not the first")
    holds(found[0, :, 0].tolist() == [0, 1, 2], "logits[:, i] must come from slot i of the T + 1")
    holds(model.attention == ["bidirectional"], "targets attend as the process says, shifted or not: process.targets_attention")
    model = Model(slot)
    denoise(Uniform(11, shift=0), model, y, context)
    holds(model.fed[0].shape == (2, 4), "a start token of id 0 is one, too: ask whether process.shift is None")
    model = Model(slot)
    vectors = torch.ones(2, 3, 4)
    denoise(Uniform(11, shift=1), model, vectors, context)
    holds(model.fed[0].shape == (2, 4, 4) and model.fed[0][:, 0].tolist() == [[0, 1, 0, 0]] * 2,
          "y may be vectors (embedding diffusion): then model.embedding(start) stands in front")


# ---- Sitting 2 ----

def task_6():
    from ar2diff import transfer
    from autoregressive import Autoregressive
    from diffusion import Gaussian, Uniform
    from engine.checkpoint import describe, lineage
    from engine.cli import UserError
    from model import Transformer
    torch.manual_seed(0)
    model, config = Transformer(16, n_layer=1, width=8, n_head=2), {"data": "text"}
    c = dict(model=model.state_dict(), shape=model.shape, process=describe(Autoregressive(MASK, EOS, PAD)), step=30,
             config=config, history=[], optimizer={"state": 1}, best=2.5, input_len=4, data="5e")
    names, weights = list(c["model"]), {name: x.clone() for name, x in c["model"].items()}

    def refused(checkpoint, process=None):
        try:
            transfer(checkpoint, process or Uniform(11))
        except UserError:
            return True
        except (AssertionError, KeyError, RuntimeError):
            return False
        return False
    answer = transfer(c, Uniform(11))
    holds(isinstance(answer, tuple) and len(answer) == 2, "return two things: (converted checkpoint, report)")
    converted, report = answer
    holds(c["process"]["name"] == "ar" and c["step"] == 30 and "optimizer" in c,
          "the AR checkpoint itself was changed: make a new dict")
    holds(list(converted["model"]) == names,
          "tensors are missing, new or in another order: a uniform process keeps exactly those of the AR model")
    holds(all(torch.equal(converted["model"][name], weights[name]) for name in names), "weights were changed: keep every value")
    holds(converted["process"] != c["process"], "it is still an AR checkpoint: its process must become the new one, described")
    holds(converted["process"] == describe(Uniform(11)), "process must be describe(process)")
    holds("optimizer" not in converted, "the optimizer's moments are kept: they are of another loss")
    holds("best" not in converted, "the best validation loss is kept: it is of another process, and would never be beaten")
    holds(converted["step"] == 0, "the new run is at step 0")
    holds(converted["history"] == lineage(c), "history must be lineage(checkpoint): where the weights come from")
    holds(converted["input_len"] == 4 and converted["config"] == config,
          "all else of the checkpoint is kept, such as input_len")
    holds([tuple(row) for row in report] == [(n, tuple(weights[n].shape), weights[n].numel(), "copied") for n in names],
          "report: (name, shape, number of values, \"copied\") for each tensor")
    holds(refused(converted, Uniform(11)), "a diffusion checkpoint was converted again: only AR ones may be (UserError)")
    short = dict(list(c["model"].items())[1:])
    holds(refused(c | {"model": short}), "a checkpoint that lacks a tensor was converted; building the model from it, as "
                                         "causal_logits() does, would have told (UserError)")
    try:
        converted, report = transfer(c, Gaussian(4))
    except UserError as error:
        raise AssertionError("for Gaussian the tensors of new_tensors() are added, and shape tells vector_width "
                             f"({error})") from error
    new = [name for name, *_, fate in report if fate == "new"]
    holds(converted["shape"]["vector_width"] == 4, "shape must tell vector_width, which a Gaussian process has")
    holds(sorted(set(converted["model"]) - set(names)) == sorted(new) and new,
          "for Gaussian the tensors of new_tensors() are added, and reported as \"new\"")
    holds(c["shape"]["vector_width"] == 0, "the AR checkpoint's shape was changed: make a new dict")


def task_7():
    from diffusion import Uniform
    B, T = 200, 50
    x0 = torch.full((B, T), 15)  # noise never draws 15: what is replaced can be told
    x0[:, -9:] = PAD
    batch, model, process = batch_of(x0), Model(), Uniform(11, inputs_attention="causal")
    total, per_sequence, t = parts_of(process.loss(model, batch, noise(B)), B)
    model.saw(batch, "causal")
    t = level(t, B)
    holds(len(model.fed) == 2, f"the network was called {len(model.fed)} times, L1 + L2 are two calls")
    xt, second = model.fed
    replaced = (xt[:, :-9] != 15).double().mean(dim=1)
    holds(replaced.max() > 0, "the first pass reads the targets themselves: corrupt them")
    holds((replaced - t).abs().mean() < 0.1,
          "the share of replaced tokens does not follow t: corrupt(targets, t, rng) with the t that is returned")
    holds(not torch.equal(second, xt), "the second pass reads xt again: it must read the model's own guess of x0")
    holds(not torch.equal(second, x0),
          "the second pass reads the targets: it must read the model's own guess, as decoding does")
    holds(torch.equal(second, model.given[0].argmax(-1)), "the second pass must read the argmax of the first pass's logits")
    again = process.loss(Model(), batch, noise(B))
    same = is_close(again[2], t) and is_close(again[0], total)
    holds(same, "the same rng gives another t or xt: draw from rng, not from torch")
    L1, L2 = (nats(logits, x0).mean() for logits in model.given)
    moved = [nats(logits, x0)[xt != x0].mean() for logits in model.given]
    zeroed = [(nats(logits, x0) * (xt != x0)).mean() for logits in model.given]
    only = "only replaced tokens carry loss: all B * T do, a model must also learn what to leave as it is"
    number(total, L1 + L2, "total",
           ((L1 + L2) / 2, "total is the mean of L1 and L2: the paper adds them"),
           (L1, "total is L1 alone: the second pass is not added"),
           (L2, "total is L2 alone: L1 belongs to it"),
           (2 * L1, "L1 is added twice"),
           ((L1 + L2) * B * T, "total is a sum: divide by B * T"),
           ((L1 + L2) * T, "the targets of a sequence are summed: take their mean"),
           (nats(model.given[0], xt).mean() + L2, "L1 is taken against xt: both passes predict the clean targets"),
           (L1 + nats(model.given[1], second).mean(), "L2 is taken against the guess: both passes predict the clean targets"),
           (sum(moved), only), (moved[0] + L2, only), (sum(zeroed), only), (zeroed[0] + L2, only))
    number(per_sequence, nats(model.given[0], x0).mean(dim=1), "per_sequence (L1 of each sequence)")
    expected, = torch.autograd.grad(sum(nats(logits, x0).mean() for logits in model.given), model.table, retain_graph=True)
    found, = torch.autograd.grad(total, model.table)
    number(found, expected, "the gradient")
    model = Model()
    process.n_unroll = 1
    total, *_ = process.loss(model, batch, noise(B))
    holds(len(model.fed) == 1, "n_unroll=1 is plain denoising: one pass")
    number(total, nats(model.given[0], x0).mean(), "total with n_unroll=1")
    model, process = Model(), Uniform(11, unroll_temperature=1.0, shift=MASK)
    process.loss(model, batch, noise(B))
    holds([y.size(1) for y in model.fed] == [T + 1, T + 1],
          "a shifted process must feed start, too: call denoise() in both passes")
    guess = model.given[0][:, :-1].argmax(-1)
    holds(not torch.equal(model.fed[1][:, 1:], guess),
          "unroll_temperature is not used: rng.categorical(logits, temperature) draws the second input; 0 is the argmax")
    total, *_ = Uniform(11).loss(Model(), batch, noise(B), lambda logits, x0: 7 + 0 * logits.sum(-1))
    number(total, 14, "total with another token_loss", (L1 + L2, "token_loss is not used: it stands in for cross_entropy()"))


def task_8():
    from diffusion import Uniform
    x0 = torch.full((4, 6), 15)  # noise never draws 15
    batch, process = batch_of(x0), Uniform(11, inputs_attention="causal")
    generate = lambda model, x0=x0, **options: process.generate(model, batch._replace(targets=x0), noise(len(x0)), **options)
    model = Model()
    drafts = drafts_of(generate(model, n_steps=3, temperature=0, n_samples=1), (4, 6), 3)
    model.saw(batch, "causal")
    holds((drafts[0] != 15).any(), "the first draft is batch.targets: it starts from pure noise, targets give only the width")
    holds(drafts[0].max() < 11, "the first draft must be pure noise, t = 1: every token replaced")
    holds(len(model.fed) == 3, f"3 steps called the network {len(model.fed)} times: one call a step, none for the score")
    for i in range(3):
        holds(not i or not torch.equal(model.fed[i], drafts[0]) or torch.equal(drafts[i], drafts[0]),
              "every step reads the noise again: it must read the draft before")
        holds(torch.equal(model.fed[i], drafts[i]), "each step must read the draft that was yielded before it")
        holds(torch.equal(drafts[i + 1], model.given[i].argmax(-1)),
              "at temperature 0 a draft is the argmax of the logits, at all places")
    frozen = torch.zeros(4, 6, dtype=torch.bool)
    frozen[:, ::2] = True
    fixed = generate(Model(), n_steps=2, temperature=0, n_samples=2, frozen=frozen)
    for draft in drafts_of(fixed, (4, 6), 2):
        holds((draft[frozen] == 15).all(), "a frozen token changed: it stays in every draft, the first one included")
        holds((draft[~frozen] != 15).any(), "what is not frozen must be written")
    wide, two = torch.full((4, 400), 15), torch.full((V,), -40.0)
    two[:2] = torch.tensor([0.5, 0.0])  # token 0 has odds of exp(0.5 / temperature)
    coin = lambda y: two.expand(*y.shape, V)
    for temperature, low, high in ((1.0, 0.57, 0.68), (0.2, 0.88, 0.96)):
        *_, last = generate(Model(coin), wide, n_steps=1, temperature=temperature, n_samples=1)
        share = (last == 0).double().mean()
        holds(share < 1 or temperature < 1,
              "tokens are not drawn: at a temperature above 0 use rng.categorical(logits, temperature)")
        holds(low < share < high, f"temperature {temperature} is not what tokens are drawn at: a token of odds exp(0.5 / "
                                  f"{temperature}) came {share:.2f} of the time")
    holds(len(list(generate(Model()))) == 11, "by default 10 steps are made")
    holds(isinstance(returned(generate(Model())), tuple), "it must return what best_of() returns: end with return (yield from "
          "best_of(drafts, score, n_samples))")
    model = Model(lambda y: model.table[y] + 0.5 * model.table[y.roll(1, dims=1)], seed=3)
    drafts = drafts_of(generate(model, n_steps=3, temperature=0.2, n_samples=5), (4, 6), 3)
    holds(all(len(y) == 20 for y in model.fed), "with n_samples=5 all 5 samples of an input are decoded in one call: 5 B rows")
    holds(len(model.fed) == 3, f"3 steps called the network {len(model.fed)} times: the last draft itself is not scored")
    score = nats(model.given[-1], model.fed[-1]).mean(dim=1).view(4, 5)
    of = lambda chosen: model.fed[-1].view(4, 5, 6)[torch.arange(4), chosen]
    holds(not torch.equal(drafts[-2], of(score.argmax(1))), "the WORST sample was kept: a low cross-entropy is good")
    holds(not torch.equal(drafts[-2], of(torch.zeros(4).long())) or score.argmin(1).sum() == 0,
          "always the first sample is kept: choose by the score")
    holds(torch.equal(drafts[-2], of(score.argmin(1))), "another sample than the best was kept: the score is the cross-entropy "
                                                        "between the last step's INPUT and its logits")


def task_9():
    from autoregressive import best_of
    drafts = [torch.arange(6)[:, None] + 10 * i + torch.zeros(1, 2).long() for i in range(3)]  # row r of draft i: r + 10 i
    generator = best_of(drafts, torch.tensor([3.0, 1.0, 2.0, 5.0, 6.0, 4.0]), 3)
    holds(hasattr(generator, "__next__"), "best_of() must yield: it is a generator")
    found = []
    try:
        while True:
            found.append(next(generator))
    except StopIteration as stop:
        returned = stop.value
    holds(len(found) == 3, f"3 drafts came in, {len(found)} came out: yield each, also those before the last")
    first = tensor(found[0], (2, 2), "a draft")[:, 0].tolist()
    holds(first != [0, 4], "the sample with the HIGHEST score was kept; the score is a cross-entropy, low is good")
    holds(first not in ([1, 3], [2, 1]),
          "the samples of one input are neighbours: rows 0, 1, 2 are of input 0, rows 3, 4, 5 of input 1")
    holds(first == [1, 5], f"rows {first} were kept, it should be rows 1 and 5: the lowest of each three")
    holds([draft[:, 0].tolist() for draft in found] == [[1, 5], [11, 15], [21, 25]], "every draft must show the same samples")
    holds(returned is not None, "at its end it must return (drafts, score), from which beyond/trace.py shows the others")
    alone = list(best_of(drafts, torch.zeros(6), 1))
    holds(torch.equal(alone[-1], drafts[-1]), "with n_samples=1 nothing is chosen: all rows stay")


def task_10():
    import numpy as np

    from data.dataset import pad_rows

    class Tokenizer:
        pad, eos = PAD, EOS
    rows = [(np.array([1, 2], dtype=np.int32), np.array([3, 4], dtype=np.int32)), ([], []), ([5, 6, 7], [8, 8, 8])]
    batch = pad_rows(rows[:1], Tokenizer, 3, 4)
    holds(isinstance(batch, tuple) and len(batch) == 3, "return Batch(inputs, pad_mask, targets)")
    holds(tensor(batch[2], (1, 4), "targets")[0, 0] != PAD,
          "targets are padded on the left: they start at column 0, EOS and PAD come behind")
    try:
        batch = pad_rows(rows, Tokenizer, 3, 4)
    except RuntimeError as error:
        raise AssertionError("an empty input or target fails: a slice [-0:] is the whole row, count from the other "
                             f"end ({error})") from error
    inputs, pad_mask, targets = batch
    inputs, targets = tensor(inputs, (3, 3), "inputs"), tensor(targets, (3, 4), "targets")
    holds(inputs.dtype == targets.dtype == torch.int64, "ids must be int64")
    holds(inputs[0].tolist() != [1, 2, PAD],
          "inputs are padded on the right: pad them on the LEFT, then column S is the border")
    holds(inputs.tolist() == [[PAD, 1, 2], [PAD] * 3, [5, 6, 7]], f"inputs are {inputs.tolist()}")
    pad_mask = tensor(pad_mask, (3, 3), "pad_mask")
    holds(pad_mask.dtype == torch.bool, "pad_mask must be bool")
    holds(pad_mask[0].tolist() != [False, True, True], "pad_mask is the wrong way round: True = padding")
    holds(pad_mask.tolist() == [[True, False, False], [True] * 3, [False] * 3],
          "pad_mask must be True exactly where an input is padding")
    holds(targets[1, 0] == EOS, "an empty target is EOS, then PAD")
    holds((targets == EOS).any(dim=1).all(), "a target lacks its EOS: the end would never be learned")
    holds(((targets == EOS).sum(dim=1) == 1).all(), "EOS stands once; behind it comes PAD, an id of its own")
    holds(targets.tolist() == [[3, 4, EOS, PAD], [EOS, PAD, PAD, PAD], [8, 8, 8, EOS]], f"targets are {targets.tolist()}")


# ---- Sitting 3 ----

def task_11():
    from diffusion import Absorbing
    B, T = 4000, 12
    x0 = torch.arange(B * T).view(B, T) % 9
    x0[:, -4:] = PAD
    batch = batch_of(x0)

    def script(y):
        logits = model.table[y] + torch.arange(T)[:, None] * torch.linspace(0, 0.2, V)  # places differ, too
        return logits + 9.0 * (torch.arange(V) == MASK)  # MASK seems likely
    model, process = Model(script), Absorbing(MASK, inputs_attention="causal")
    total, per_sequence, t = parts_of(process.loss(model, batch, noise(B)), B)
    model.saw(batch, "causal")
    t = level(t, B)
    again = process.loss(Model(script), batch, noise(B))
    holds(is_close(again[2], t), "the same rng gives another t: draw from rng, not from torch")
    holds(t.min() > 9e-4, f"t comes as low as {t.min():.1e}, and 1 / t as high as {1 / t.min():.0e}: keep t above 1e-3")
    holds(len(model.fed) == 1, f"the network was called {len(model.fed)} times, one pass is enough")
    masked = model.fed[0] == MASK
    holds(masked.any(), "nothing is masked: the model reads the targets themselves")
    holds((masked.double().mean(dim=1) - t).abs().mean() < 0.2,
          "the share of masked tokens does not follow t: corrupt with the t that is returned")
    logits = script(model.fed[0]).detach()
    with_mask = nats(logits, x0)
    logits[..., MASK] = -torch.inf
    each = nats(logits, x0)
    open_ = (each * masked).mean(dim=1)
    holds(not total.isnan(), "total is nan: does a row without a masked token divide by 0? Divide by the fixed T")
    number(total, (open_ / t).mean(), "total",
           ((with_mask * masked).mean(dim=1).div(t).mean(), "MASK is predicted: it is never x0; call self.predict()"),
           (each.mean(), "tokens that are not masked carry loss: they are known"),
           ((each.mean(dim=1) / t).mean(), "tokens that are not masked carry loss: they are known"),
           (open_.mean(), "the weight 1/t is missing: at level t only a share t of the tokens carries loss"),
           ((open_ * t).mean(), "it is multiplied by t: divide by it"),
           (((each * masked).sum(1) / masked.sum(1).clamp(min=1)).mean(),
            "divide by the fixed T and by t, not by the number of tokens that happen to be masked"),
           ((open_ * T / t).mean(), "the tokens of a sequence are summed: divide by T"))
    number(per_sequence, open_ / t, "per_sequence")
    model, process = Model(script), Absorbing(MASK, weighted=False)
    total, per_sequence, t = parts_of(process.loss(model, batch, noise(B)), B)
    number(total, open_.mean(), "total with weighted=False", ((open_ / t).mean(), "weighted=False must train without 1/t"),
           ((each * masked).sum() / masked.sum(), "weighted=False divides by B * T too, not by the number of masked tokens"))
    number(per_sequence, open_ / t.double(), "per_sequence with weighted=False",
           (open_, "per_sequence loses its 1/t with weighted=False: the log keeps it, so that runs can be compared"))
    total, *_ = process.loss(Model(script), batch, noise(B), lambda logits, x0: 0 * logits[..., 0] + 7)
    number(total, 7 * masked.double().mean(), "total with another token_loss")


def task_12():
    from beyond.likelihood import absorbing
    from diffusion import Absorbing
    B, L = 300, 3
    x0, process = torch.tensor([[1, 2, 3]]).repeat(B, 1), Absorbing(MASK, inputs_attention="causal")
    batch = batch_of(x0)
    flat = lambda y: torch.zeros(*y.shape, V)  # every token of the 15 that are not MASK costs log 15
    for n_draws in (1, 4):
        model = Model(flat)
        found = tensor(absorbing(process, model, batch, noise(B), n_draws), (B,), "the bound")
        model.saw(batch, "causal")
        holds(len(model.fed) == n_draws, f"n_draws={n_draws} called the network {len(model.fed)} times")
        masked = torch.stack(model.fed) == MASK                                          # (draws, B, L)
        holds(masked.any(), "nothing is masked")
        count = masked.sum(dim=2)
        holds(count.min() > 0, "sometimes nothing is masked: n runs from 1 to L")
        holds(count.max() == L, "never all L are masked: n runs from 1 to L, L included")
        holds(n_draws == 1 or ((count.amin(dim=0) == 1) & (count.amax(dim=0) == L)).all(),
              "the draws of a sequence must be spread over the levels: go through levels(n_draws, rng)")
        shares = count.flatten().bincount(minlength=L + 1) / count.numel()
        holds((shares[1:] - 1 / L).abs().max() < 0.12, f"n should be 1 ... L alike; it came with shares {shares[1:].tolist()}")
        one = masked[count == 1].double().mean(dim=0)
        holds((one - 1 / L).abs().max() < 0.15, "which places are masked is not random: n of L, each set alike")
        holds((torch.stack(model.fed)[~masked] == x0.expand(n_draws, B, L)[~masked]).all(), "what is not masked must be x0")
        cost = torch.tensor(15.0).log().double()
        every = torch.full((B,), float(cost * L))
        whole = L * cost * (L / count).mean(dim=0)
        number(found, every, "the bound where each token costs log 15, L = 3",
               (whole, "tokens that are not masked are counted, too"),
               (every * n_draws, "the draws are summed: take their mean"),
               (every / L, "the weight is L / n, not 1 / n: the bound is of all L tokens"),
               (every * torch.tensor(16.0).log() / cost, "MASK is predicted: call process.predict()"))
    table = 2 * torch.randn(2, 2, 2, L, V, generator=torch.Generator().manual_seed(1))  # logits by what is masked

    def script(y):
        a, b, c = (y == MASK).long().unbind(1)
        return table[a, b, c].clone()
    found = absorbing(process, Model(script), batch, noise(B), 20).mean()
    exact = 0.0
    for code in range(1, 8):
        bits = torch.tensor([[code >> k & 1 for k in range(L)]])
        logits, n = script(bits * MASK), int(bits.sum())
        logits[..., MASK] = -torch.inf
        exact += float((nats(logits, x0[:1]) * bits).sum()) * L / n / L / (3 if n < 3 else 1)
    holds(abs(found / exact - 1) < 0.05, f"the mean bound is {found:.2f} nats, counting all 7 sets of masked places gives "
                                         f"{exact:.2f}: each n alike, weighted by L / n")


def task_13():
    from beyond.infill import canvases
    from engine.cli import UserError

    class Tokenizer:
        eos, pad = 301, 302
        encode = staticmethod(lambda text: [ord(c) for c in text])

    def rows(template, target_len, gap_len):
        try:
            answer = canvases(template, Tokenizer, target_len, gap_len)
        except ValueError as error:
            raise AssertionError("the rows cannot be made one tensor: lengths that do not fit the canvas with EOS must be left "
                                 f"out ({error})") from error
        holds(isinstance(answer, tuple) and len(answer) == 2, "return two tensors: (targets, frozen)")
        targets, frozen = answer
        holds(targets.shape == frozen.shape and targets.size(1) == target_len, f"targets {tuple(targets.shape)}, frozen "
              f"{tuple(frozen.shape)}: both must be (R, target_len)")
        holds(targets.dtype == torch.int64 and frozen.dtype == torch.bool, "targets must be int64, frozen bool")
        name = {301: "E", 302: "P"}
        return sorted("".join((name.get(i) or chr(i)) if f else "_" for i, f in zip(*row))
                      for row in zip(targets.tolist(), frozen.tolist()))

    def refused(template, target_len, gap_len):
        try:
            canvases(template, Tokenizer, target_len, gap_len)
        except UserError:
            return True
        return False
    found = rows("a___b", 7, 3)
    holds(not any(row.startswith("ab") for row in found), "a gap of no tokens: a gap that text follows has 1 to gap_len")
    holds(all("E" in row for row in found), "text that ends the template is followed by EOS, frozen")
    holds("a___bEP" in found, "a gap of gap_len tokens is not tried: 1 to gap_len, both included")
    holds(all("b" in row for row in found), "the text behind the gap is not frozen, or not there")
    holds(found == sorted(["a_bEPPP", "a__bEPP", "a___bEP"]), f"'a___b' on 7 columns: {found}; _ is a gap, E EOS, P PAD")
    found = rows("a___", 4, 3)
    holds("E" not in "".join(found), "a gap at the end is open: no EOS behind it, the model decides where it ends")
    holds(len(found) == 1, "a gap at the end has no length to try: it is open up to the end of the canvas")
    holds(found == ["a___"], f"'a___' on 4 columns: {found}")
    found = rows("___b___", 6, 2)
    holds(found == ["__b___", "_b____"], f"'___b___' with gaps of up to 2: {found}; the last gap is open")
    found = rows("a___b___c", 8, 2)
    holds(len(found) == 4, f"two gaps of up to 2 tokens are 4 choices of lengths, here {len(found)}")
    holds(rows("abc___d", 7, 4) == ["abc__dE", "abc_dEP"], "lengths that do not fit the canvas with EOS must be left out")
    holds(rows("a ___b", 6, 1) == ["a_bEPP"], "a space before a gap belongs to the gap: remove it from the text")
    holds((rows("a___ b", 6, 1), rows("a___ b___", 5, 1)) == (["a_ bEP"], ["a_ b_"]),
          "a space behind a gap belongs to the text that follows: leave it there")
    holds(rows("a\\n___", 4, 1) == ["a\n__"], "\\n as it is typed on a command line is a line end")
    holds(rows("a\\\\n___", 6, 1) == ["a\\n___"],
          "two backslashes and an n, as typed, are a backslash and an n")
    holds(rows("a_____b", 8, 1) == rows("a___b", 8, 1), "five underscores are one gap, not a gap and two underscores of text")
    for template, target_len, gap_len, why in (
            ("no gap", 9, 2, "a template without a gap"), ("a___", 9, 0, "gap_len=0"),
            ("abcd___e", 6, 2, "a template that does not fit the canvas"),
            ("a___b___c___d___e", 60, 4, "more than MAX_ROWS choices")):
        holds(refused(template, target_len, gap_len), f"{why} must be refused by a UserError (check())")


class Drafter:
    """A diffusion process that drafts given tokens. It checks what it is told, and keeps it; greedy: what AR would write."""
    inputs_attention = "bidirectional"

    def __init__(self, tokens, greedy):
        self.tokens, self.greedy, self.told = tokens, greedy, []

    def generate(self, model, batch, rng, n_steps=10, temperature=0.2, n_samples=8, frozen=None):
        if frozen is not None:
            holds(torch.equal(batch.targets[frozen], self.greedy[frozen]),
                  f"what is settled is not greedy AR's text: {batch.targets[frozen].tolist()} for "
                  f"{self.greedy[frozen].tolist()}; it is the agreed prefix and AR's own token behind it")
            before = self.told[-1][3] if self.told else None
            holds(before is None or (frozen.sum(dim=1) > before.sum(dim=1)).any(),
                  "it does not end: a round settled nothing; AR's own token behind the agreed prefix is settled, too, and a "
                  "row that holds EOS is done")
        self.told.append((n_steps, temperature, n_samples, frozen, batch.targets.clone()))
        model.encode(batch.inputs, batch.pad_mask, self.inputs_attention)
        frozen = torch.zeros_like(batch.targets, dtype=torch.bool) if frozen is None else frozen
        for tokens in (torch.full_like(self.tokens, 8), *[self.tokens] * n_steps):  # the noise first
            yield torch.where(frozen, batch.targets, tokens)


def task_14():
    from autoregressive import Autoregressive
    from beyond.speculative import Speculative
    ar, x0 = Autoregressive(MASK, EOS, PAD), torch.full((2, 6), PAD)
    batch = batch_of(x0)

    def script(y):  # greedy: 0 1 2 3 ... behind start in the first row, 7 8 EOS in the second
        holds((y[:, 0] == MASK).all(), "the AR model is fed the draft itself: feed it self.ar.feed(draft)")
        after = torch.where(y == MASK, torch.tensor([[0], [7]]), (y + 1).clamp(max=EOS))
        return 9.0 * F.one_hot(after, V)
    text = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 8, EOS, PAD, PAD, PAD]])

    def written(tokens, **options):
        model, process, drafter = Model(script, limit=20), Drafter(tokens, text), Model()
        drafts = drafts_of(Speculative(ar, drafter, process).generate(model, batch, noise(2), **options), (2, 6), None)
        return drafts, model, process, drafter
    drafts, model, process, drafter = written(text)
    holds((drafts[0] == PAD).all(), "the first draft is the empty canvas, PAD everywhere")
    model.saw(batch, "causal")
    holds(all(a == "causal" for a in model.attention), "the AR model verifies causally")
    holds(process.told[0][1] == 0, "drafts are drawn at temperature 0: AR's text is greedy")
    last = drafts[-1]
    holds(not (last[1, 3] != PAD and torch.equal(last[0], text[0])), "behind EOS stands PAD, whatever AR would say there")
    holds(torch.equal(last, text), f"a drafter that is right: the text is {last.tolist()}, greedy AR writes {text.tolist()}")
    holds(len(model.fed) == 1, f"a drafter that is right needs one round, here are {len(model.fed)}")
    holds(len(drafter.encoded) == 1,
          f"the drafter encoded the inputs {len(drafter.encoded)} times; once is enough for all rounds")
    wrong = text.clone()
    wrong[0, 2] = wrong[1, 1] = 0
    drafts, model, process, drafter = written(wrong)
    last = drafts[-1]
    holds(not torch.equal(last, wrong), "the drafter's text is kept where AR disagrees")
    holds(torch.equal(last, text), f"a drafter with a wrong token: the text is {last.tolist()}, greedy AR writes "
                                   f"{text.tolist()}")
    holds(len(model.fed) < 4,
          f"one wrong token of the draft costs {len(model.fed)} rounds: the agreed prefix is settled, and AR's own token "
          "behind it")
    holds(len(model.fed) == 2, f"one wrong token of the draft takes two rounds, here are {len(model.fed)}")
    holds(len(process.told) == 2, "each round begins with a new draft")
    frozen, canvas = process.told[1][3:]
    holds(frozen is not None and frozen[0].any(), "in the second round what is settled must be frozen for the drafter")
    holds(frozen[0].tolist() == [True] * 3 + [False] * 3,
          "after a round that agreed on 2 tokens, 3 are settled: AR's own behind them, too")
    holds(frozen[1].tolist() == [True] * 2 + [False] * 4, "each row settles by itself: one that agrees on less settles less")
    holds(canvas[0, :3].tolist() == [0, 1, 2], "the drafter must be given the settled text as batch.targets")
    holds(len(drafter.encoded) == 1,
          f"the drafter encoded the inputs {len(drafter.encoded)} times; once is enough for all rounds")
    drafts, model, *_ = written(torch.full((2, 6), 3))
    holds(torch.equal(drafts[-1], text), "a drafter that knows nothing must not change the text")
    holds(len(model.fed) <= 6, f"6 tokens took {len(model.fed)} rounds: each round settles one at least")
    drafts, model, process, _ = written(text, n_steps=3, n_samples=2)
    holds(process.told[0][0] == 3 and process.told[0][2] == 2, "n_steps and n_samples are the drafter's: hand them on")
    holds(len(drafts) == 1 + 3 + 1,
          "a round of 3 drafting steps yields 3 drafts and the verified text, behind the empty canvas; it yields "
          f"{len(drafts)} in all, not 5: the drafter's noise is left out")


def task_15():
    from beyond.decoders import confidence
    from diffusion import Absorbing
    certain = torch.tensor([3.0, 6.0, 1.0, 5.0, 2.0, 4.0])  # of the six places, the most certain one is 1
    B, T, process = 2, 6, Absorbing(MASK, inputs_attention="causal")
    batch = batch_of(torch.full((B, T), 15))

    def script(y):  # token i at place i, surer the larger `certain`; MASK seems surest
        logits = certain[:T, None] * torch.eye(V)[:T]
        logits[:, MASK] = 20.0
        return logits.expand(len(y), -1, -1).clone()

    def order(n_steps, **options):
        """Return (which places each step reveals, the model)."""
        model = Model(script)
        drafts = drafts_of(confidence(process, model, batch, noise(B), n_steps=n_steps, temperature=0, n_samples=1, **options),
                           (B, T), None)
        holds((drafts[0] == MASK).all() or "frozen" in options, "the first draft is all MASK")
        steps = []
        for before, after in zip(drafts, drafts[1:]):
            known = before != MASK
            holds((after[known] == before[known]).all(), "a token that was revealed changed: it stays")
            steps.append(((after[0] != MASK) & ~known[0]).nonzero()[:, 0].tolist())
        model.saw(batch, "causal")
        holds(not (drafts[-1] == MASK).any(),
              "MASK is left in the last draft: the last step reveals all that is left, and MASK itself is never "
              "predicted (process.predict)")
        holds(len(model.fed) == len(steps), "each draft but the first is one call of the network")
        return steps, drafts, model
    steps, drafts, _ = order(6)
    holds(len(steps) == 6, f"6 steps for 6 tokens: one each; here all is revealed after {len(steps)}")
    holds(steps != [[2], [4], [0], [5], [3], [1]],
          "the LEAST certain tokens come first: reveal those of the highest probability")
    holds(steps == [[1], [3], [5], [0], [4], [2]],
          f"places were revealed in the order {steps}, by certainty it is 1, 3, 5, 0, 4, 2")
    holds(drafts[-1][0].tolist() == list(range(6)), "at temperature 0 what is revealed is the argmax")
    steps, *_ = order(3)
    holds(steps == [[1, 3], [0, 5], [2, 4]], f"6 tokens in 3 steps are two each, the most certain first; here {steps}")
    sizes = sorted(len(s) for s in order(4)[0])
    holds(sizes == [1, 1, 2, 2], f"6 tokens in 4 steps are 1 or 2 a step, equally many but for rounding; here {sizes}")
    steps, *_ = order(32)
    holds(len(steps) == 6, f"32 steps for 6 tokens: there are no more than 6 to make, here are {len(steps)}")
    steps, *_ = order(6, block_len=2)
    holds(steps != [[1], [3], [5], [0], [4], [2]], "block_len is not used: blocks are finished from left to right")
    holds(steps == [[1], [0], [3], [2], [5], [4]],
          f"block_len=2: the surer of places 0 and 1, the other, then 2 and 3; here {steps}")
    frozen = torch.zeros(B, T, dtype=torch.bool)
    frozen[:, :3] = True
    steps, drafts, _ = order(3, frozen=frozen)
    holds(all((draft[:, :3] == 15).all() for draft in drafts), "frozen tokens stay in every draft")
    holds(steps == [[3], [5], [4]], f"3 gaps beside frozen text in 3 steps are one each; here {steps}")
    B, seen = 3, []
    batch = batch_of(torch.full((B, T), 15))

    def doubt(y):  # of two samples of an input one is sure in its first two steps, the other in its last
        sure = torch.tensor([4.0, 1.0, 1.0, 4.0, 4.0, 1.0])[:len(y), None, None]
        sure = torch.where((y == MASK).sum(dim=1)[:, None, None] > 2, sure, 5 - sure)
        logits = torch.eye(V)[torch.arange(len(y)) + 1][:, None] * sure * certain[:, None] / 3
        seen.append(len(y))
        return torch.where((y == MASK)[..., None], logits, 20 * torch.eye(V)[0])
    *_, last = confidence(process, Model(doubt), batch, noise(B), n_steps=3, temperature=0, n_samples=2)
    end = returned(confidence(process, Model(script), batch, noise(B), n_steps=3, temperature=0, n_samples=2))
    holds(isinstance(end, tuple), "it must return what best_of() returns: end with return (yield from best_of(...))")
    holds(seen[0] == 2 * B, "with n_samples=2 both samples of an input are decoded in one call: 2 B rows")
    holds(last[:, 0].tolist() == [1, 4, 5],
          "another sample than the best was kept: the lowest score is, the mean cross-entropy of the tokens that were "
          "revealed, each in the step that revealed it")


# ---- Sitting 4 ----

def task_16():
    from diffusion import Gaussian
    process, t = Gaussian(sigma_min=0.5, sigma_max=8.0), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    found = process.sigma(t)
    holds(found is None or found.shape != (3,),
          "sigma has the shape (B,), it should be (B, 1, 1), to be multiplied with (B, T, D)")
    found = tensor(found, (3, 1, 1), "sigma").flatten().double()
    holds(not is_close(found[0], 8.0), "sigma runs the wrong way: t = 0 is clean, sigma_min")
    holds(is_close(found[0], 0.5), f"sigma(0) is {found[0]:.3g}, it should be sigma_min = 0.5")
    holds(is_close(found[2], 8.0), f"sigma(1) is {found[2]:.3g}, it should be sigma_max = 8")
    holds(not is_close(found[1], 4.25),
          "sigma itself is linear in t; its LOGARITHM should be: sigma(0.5) is the geometric mean, 2")
    holds(is_close(found[1], 2.0), f"sigma(0.5) is {found[1]:.3g}, it should be sqrt(sigma_min sigma_max) = 2")


class Noisy:
    """Stands in for model.NoisyVectors: the vector of token i is unit vector i. It keeps what it is given."""

    def __init__(self):
        self.table = torch.nn.Embedding.from_pretrained(torch.eye(V))
        self.z, self.x_hat, self.level = [], [], []

    def __call__(self, z, x_hat, level):
        self.z.append(z.detach().clone())
        self.x_hat.append(x_hat)
        self.level.append(level)
        return z


def task_17():
    from diffusion import Gaussian
    B, T = 200, 6
    x0 = torch.arange(B * T).view(B, T) % 9
    x0[:, -1] = PAD
    batch = batch_of(x0)

    def run(self_condition, step=0, **options):
        model, process = Model(lambda y: y.float() @ model.table), Gaussian(V, self_condition=self_condition)
        model.noisy = Noisy()
        return process, model, parts_of(process.loss(model, batch, noise(B, step), **options), B)
    process, model, (total, per_sequence, t) = run(0.0)
    model.saw(batch, "bidirectional")
    t = level(t, B)
    holds(len(model.fed) == 1,
          f"self_condition=0 called the network {len(model.fed)} times, there is no first estimate then: one")
    holds((model.noisy.x_hat[0] == 0).all(), "without a first estimate x_hat is zero")
    holds(is_close(model.noisy.level[0], t), "the model must be told the t that is returned")
    e, variance = F.one_hot(x0, V).double(), process.sigma(t).double() ** 2
    z = model.noisy.z[0].double() * (1 / V + variance).sqrt()  # as it was before predict() scaled it
    holds(not is_close(z, e, 1e-3), "the vectors are not noised: corrupt(self.vectors(model, targets), t, rng)")
    ratio = (z - e).square().mean(dim=(1, 2)) / variance.flatten()
    holds(0.9 < ratio.mean() < 1.1 and ratio.max() < 2.5,
          "z - e must be noise of standard deviation sigma(t), by corrupt() at the t that is returned")
    each = nats(model.given[0], x0)
    weights = 1 / variance.flatten()
    number(total, each.mean(), "total", (each.sum(), "total is a sum: divide by B * T"),
           (each.sum() / B, "the positions of a sequence are summed: take their mean"),
           ((each.mean(1) * weights).mean(), "it is weighted by 1 / sigma^2: here every level counts alike"),
           ((each.mean(1) / t).mean(), "it is weighted by 1 / t: here every level counts alike"),
           (each[x0 != PAD].mean(), "PAD is left out: it is predicted like any token"))
    number(per_sequence, each.mean(dim=1), "per_sequence")
    process, model, (total, *_) = run(1.0)
    holds(len(model.fed) == 2, f"self_condition=1 called the network {len(model.fed)} times: a first estimate, then the loss")
    holds(torch.equal(model.noisy.z[0], model.noisy.z[1]), "both passes must read the same z: noise is drawn once")
    holds((model.noisy.x_hat[0] == 0).all(), "the first estimate is made with x_hat zero")
    holds((model.noisy.x_hat[1] != 0).any(), "the second pass still reads x_hat = 0: hand it the first estimate")
    holds(not model.noisy.x_hat[1].requires_grad and not model.given[0].requires_grad,
          "a graph is built for the first estimate: make it under torch.no_grad()")
    estimate = model.given[0].double().softmax(-1) * V ** 0.5  # predict() scales it to unit variance
    holds(is_close(model.noisy.x_hat[1], estimate, 1e-3),
          "x_hat must be self.estimate() of the first logits, the mean vector of what is predicted")
    number(total, nats(model.given[1], x0).mean(), "total with self_condition=1",
           (nats(model.given[0], x0).mean(), "the loss is of the first estimate: take the second logits"),
           (sum(nats(logits, x0).mean() for logits in model.given), "both passes are added; the first only makes an estimate"))
    twice = [len(run(0.5, step)[1].fed) == 2 for step in range(30)]
    holds(0 < sum(twice) < 30, "self_condition=0.5: half of the STEPS make a first estimate, told by rng.shared(1), here "
                               f"{sum(twice)} of 30")
    low = [noise(B, step).shared(1) < 0.5 for step in range(30)]
    holds(twice in (low, [not x for x in low]), "which steps make a first estimate must be told by rng.shared(1): no row's own "
                                                "number, and not the one of the levels, shared(0)")
    _, _, (total, *_) = run(0.0, token_loss=lambda logits, x0: 7 + 0 * logits.sum(-1))
    number(total, 7, "total with another token_loss", (each.mean(), "token_loss is not used: it stands in for cross_entropy()"))


# ---- Sitting 5 ----

def coin(p, token=12, heat=0.5):
    """Return logits by which, at the temperature `heat`, a token has probability 1 - p and the next id p; p holds places."""
    p = torch.as_tensor(p)
    logits = torch.full((*p.shape, V), -40.0)
    logits[..., token + 1] = 0.0
    logits[..., token] = heat * (1 / p - 1).log()
    return logits


def task_23():
    from beyond.decoders import entropy
    from diffusion import Absorbing, Uniform
    uniform, absorbing = Uniform(11, inputs_attention="causal"), Absorbing(MASK, inputs_attention="causal")
    sure, half = 1e-9, dict(temperature=0.5, last_temperature=0.5)  # coin() gives entropies at this temperature

    def run(process, shape, script, **options):
        """Return the drafts of a model whose logits are script(step, y), and the model. It says 12-15, which are no noise."""
        model = Model(lambda y: script(len(model.fed) - 1, y).expand(*y.shape, V).clone())
        batch = batch_of(torch.full(shape, 15))
        drafts = drafts_of(entropy(process, model, batch, noise(len(batch.targets)), **half | options), shape, None)
        model.saw(batch, "causal")
        holds(len(drafts) == len(model.fed) + 1, f"each draft but the first is one call of the network, here are {len(drafts)} "
                                                 f"drafts and {len(model.fed)} calls")
        holds(options.get("n_samples", 1) > 1 or all(torch.equal(*pair) for pair in zip(model.fed, drafts)),
              "each step must read the draft that was yielded before it")
        return drafts, model

    def settled(draft, process=uniform):
        """Return which sets of places are settled in the rows of a draft: there is what the model predicts."""
        found = draft > 11 if process is uniform else draft != MASK
        return sorted({tuple(row.nonzero()[:, 0].tolist()) for row in found})

    # The temperature, from 2 towards 0.2 in 10 steps: a token of odds exp(1 / temperature). All are settled, none is certain.
    drafts, _ = run(uniform, (4, 1000), lambda i, y: coin(torch.tensor(-1.0).sigmoid(), heat=1.0), n_steps=10,
                    temperature=2.0, last_temperature=0.2, budget=1e9)
    holds(drafts[0].max() < 11, "the first draft must be pure noise, t = 1: every token replaced")
    holds(len(drafts) > 2, "it ended after one step: no step before it has told an argmax")
    holds((drafts[1] != 12).any(), "tokens are not drawn: use rng.categorical() of the tempered logits")
    holds(not torch.equal(drafts[1], drafts[2]), "a settled token stays: with uniform noise it is judged again in each step")
    holds(len(drafts) == 11, f"10 steps of a model that is never sure ended after {len(drafts) - 1}: that its argmax stays is "
                             "not enough, its mean entropy must be below SURE, too")
    shares = [float((draft == 12).double().mean()) for draft in drafts[1:]]
    holds(shares[0] < shares[8] + 0.05, "the temperature rises: it falls from `temperature`, in the first step, towards "
                                        "last_temperature")
    holds(shares[0] < shares[8] - 0.05, "the temperature of the draws does not fall from step to step")
    for i, share in enumerate(shares[:9]):
        heat = 0.2 + 1.8 * (1 - i / 10)
        right = float(torch.tensor(1 / heat).sigmoid())
        holds(abs(share - right) < 0.03, f"from 2 to 0.2 in 10 steps the temperature of step {i}, the first being 0, is "
              f"{heat:.3g}: a token of odds exp(1 / {heat:.3g}) comes {right:.2f} of the time, here {share:.2f}")

    # Uniform noise: what is settled, and what becomes of the rest. The entropies are 0.031, 0.037, 0.042, 0.047, 0.61 ...
    odds = torch.tensor([0.005, 0.006, 0.007, 0.008, 0.3, 0.35, 0.4, 0.45])
    turning = lambda i, y: coin(odds.flip(0) if i % 2 else odds)  # which places are certain changes from step to step
    drafts, _ = run(uniform, (40, 8), turning, n_steps=5)
    noised, first = drafts[:2]
    holds(not torch.equal(first[:, 4:], noised[:, 4:]),
          "what is not settled keeps the noise of the step before: uniform noise is drawn anew")
    holds((first[:, 4:] < 11).any(), "what is not settled stays as the model drew it: make it noise again")
    holds(settled(first) != [(0, 1, 2, 3)], "each entropy by itself is held against the budget: within() adds them up, and "
                                            "leaves the rest")
    holds(settled(first) != [(0,)], "the entropies are of the logits before they were divided by the temperature")
    holds(settled(first) == [(0, 1, 2)], f"the first step settled the places {settled(first)[0]}, by within() of the entropies "
                                         "of the tempered logits they are 0, 1, 2 in every row")
    holds(len(drafts) == 6, f"5 steps of a model that is never sure ended after {len(drafts) - 1}")
    holds(not (drafts[2][:, :3] > 11).all(), "a settled token stays: with uniform noise it is judged again in each step")
    holds(settled(drafts[2]) == [(5, 6, 7)], f"the second step settled the places {settled(drafts[2])[0]}, it should be "
                                             "5, 6, 7")
    holds((drafts[-1] > 11).all(), "the last draft holds noise: the answer of the last step is the argmax, at all places")
    holds((drafts[-1] == 12).all(), "the answer of the last step must be the argmax, not what was drawn")
    again, _ = run(uniform, (40, 8), turning, n_steps=5)
    holds(all(torch.equal(*pair) for pair in zip(drafts, again)), "the same rng gives other drafts: draw from rng, not torch")
    drafts, _ = run(uniform, (2, 6), lambda i, y: coin(torch.full((6,), 0.3)), n_steps=4, temperature=0, last_temperature=0)
    holds(all((draft == 12).all() for draft in drafts[1:]), "at temperature 0 all is the argmax: divide by 1e-6, not by 0")

    # How a sample ends. On 400 places the entropies, 0.0035 each, are below SURE, and all together far above the budget.
    for process in (uniform, absorbing):
        drafts, _ = run(process, (2, 400), lambda i, y: coin(torch.full((400,), 4e-4)), n_steps=6)
        holds(len(drafts) == 3, f"{process.name}: a model that is sure and always says the same took {len(drafts) - 1} steps, "
              "it should be 2: a sample ends when its argmax is the argmax of the step before (not the draft) and its mean "
              "entropy is below SURE, and all is done when all samples have ended")
        holds((drafts[-1] == 12).all(), f"{process.name}: a sample that ends holds the draft: its answer is the argmax, at all "
                                        "places")
    one = torch.tensor([0.0025] + 5 * [sure])  # entropies: 0.017, then 0; their mean is 0.003

    def rows(i, y):  # those that should have ended say 14 from then on
        doubt, certain = torch.full((6,), 0.3), torch.full((6,), sure)
        return torch.stack((coin(certain, 14 if i > 1 else 12), coin(certain, 14 if i % 2 else 12), coin(doubt),
                            coin(certain if i > 2 else doubt, 14 if i > 3 else 12), coin(one, 14 if i > 1 else 12)))
    drafts, _ = run(uniform, (5, 6), rows, n_steps=7)
    holds(len(drafts) == 8, f"of 5 samples some end early and one not at all: 7 steps, here are {len(drafts) - 1}")
    holds([int(draft[1, 0]) for draft in drafts[1:]] == [12, 14, 12, 14, 12, 14, 12],
          "a sample ended while its argmax still changed: to be sure is not enough, it must be that of the step before")
    holds((drafts[-2][2] < 11).any(), "a sample ended that was not sure: other samples must not end it")
    last = drafts[-1]
    holds((last[0] == 12).all(), "a sample that has ended goes on changing while others are not done: it keeps its answer")
    holds((last[3] == 12).all(), "a sample that became sure in its fourth step should have ended there: its argmax was that of "
                                 "the step before, whatever its draft held")
    holds((last[4] == 12).all(), "a sample did not end whose MEAN entropy, by the tempered logits, was below SURE")

    # Absorbing noise: what is settled stays, and is no longer counted. The model says 14 from its second step on.
    def unmask(i, y):
        odds = ([0.005, 0.006, 0.007, 0.008, 0.3, 0.35], [0.012] * 3 + [0.015, 0.018, 0.35], [0.35] * 6)[min(i, 2)]
        logits = coin(torch.tensor(odds), 14 if i else 12)
        logits[:, MASK] = 20.0
        return logits
    drafts, _ = run(absorbing, (4, 6), unmask, n_steps=8)
    revealed = [settled(draft, absorbing) for draft in drafts]
    holds(revealed[0] == [()], "the first draft is all MASK")
    holds((drafts[1] != MASK).any(), "MASK is predicted: it is never x0; call process.predict()")
    holds(revealed[1] == [(0, 1, 2)], f"the first step revealed the places {revealed[1][0]}, it should be 0, 1, 2; the rest "
                                      "is MASK again")
    holds(torch.equal(drafts[2][:, :3], drafts[1][:, :3]), "a settled token changed: with absorbing noise it stays")
    holds(revealed[2] != [(0, 1, 2)], "settled tokens use up the budget of the next step: their entropy is 0")
    holds(revealed[2] == [(0, 1, 2, 3, 4)], f"after the second step the places {revealed[2][0]} are revealed, it should be "
                                            "0, 1, 2, 3, 4")
    holds(len(drafts) == 4, f"all was revealed in 3 steps, and {len(drafts) - 1} were made: where nothing is masked a "
                            "sample ends")
    drafts, _ = run(absorbing, (4, 6), lambda i, y: coin(torch.full((6,), 0.4)), n_steps=2)
    holds((drafts[-1] != MASK).all(), "MASK is left in the last draft: the answer of the last step is the argmax")
    holds((drafts[-1][drafts[1] == MASK] == 12).all(), "the answer of the last step must be the argmax, not what was drawn")

    frozen = torch.arange(6).expand(3, 6) < 3
    for process in (uniform, absorbing):
        drafts, _ = run(process, (3, 6), lambda i, y: coin([0.012] * 3 + [0.015, 0.018, 0.35]), n_steps=3, frozen=frozen)
        holds(all((draft[frozen] == 15).all() for draft in drafts),
              "a frozen token changed: it stays in every draft, the first one included")
        holds((drafts[-1][~frozen] != 15).all(), "what is not frozen must be written")
        holds(settled(drafts[1][:, 3:], process) == [(0, 1)], "frozen tokens use up the budget: their entropy is 0")

    # Self-conditioning: a belief is the softmax here, so that it tells of which logits it was made.
    model, batch = Model(lambda y: model.table.detach()[y].clone()), batch_of(torch.full((2, 4), 15))
    model.believe = lambda logits: logits.softmax(-1)
    list(entropy(Uniform(11, self_condition=0.5), model, batch, noise(2), n_steps=3, temperature=2.0, last_temperature=0.5))
    told = model.believed
    holds(told[0] is None or not told[0].any(), "in the first step there is no belief yet")
    for i, belief in enumerate(told[1:]):
        logits = model.table.detach()[model.fed[i]]
        holds(belief is not None, "no belief is handed on: give what believe() returns to the next step's denoise()")
        holds(not is_close(belief, logits.softmax(-1)), "the belief is of the logits before they were divided by the "
                                                        "temperature")
        holds(is_close(belief, (logits / (0.5 + 1.5 * (1 - i / 3))).softmax(-1)),
              "the belief must be what believe() makes of the tempered logits of the step before")

    # The best of two samples: rows 0, 3 and 5.
    good, word = torch.tensor([1, 0, 0, 1, 0, 1]).bool()[:, None, None], F.one_hot(torch.arange(6) + 1, V).float()[:, None]
    late = lambda i, y: word * torch.where(good, 1.0 + 3 * (i == 2), 4.0 - 3 * (i == 2))  # which is surer in the last step
    early = lambda i, y: torch.where(good, 20.0 * word * (i < 2), 4 * word)  # which is sure at first and ends

    def hidden(i, y):  # which is sure while the first two places are revealed; it echoes what it reads
        masked = 12 * F.one_hot(torch.tensor(5 + i % 2), V) * (good == (i < 2))
        return torch.where((y == MASK)[..., None], masked, 12 * F.one_hot(y, V)).float()
    for process, width, script, n_steps, why in (
            (uniform, 4, late, 3, "with uniform noise the score is the cross-entropy of the answer in the step that wrote it"),
            (uniform, 4, early, 4, "the score of a sample that has ended no longer changes"),
            (absorbing, 3, hidden, 6, "with absorbing noise each token is scored in the step that settled it")):
        drafts, model = run(process, (3, width), script, n_steps=n_steps, n_samples=2, budget=0.0)
        holds(len(model.fed[0]) == 6, "with n_samples=2 both samples of an input are decoded in one call: 2 B rows")
        holds(all(torch.equal(draft, fed[[0, 3, 5]]) for draft, fed in zip(drafts, model.fed)),
              f"another sample than the best was kept: {why}, and the lowest is the best")
    end = returned(entropy(uniform, Model(), batch, noise(2), n_steps=2))
    holds(isinstance(end, tuple), "it must return what best_of() returns: end with return (yield from best_of(...))")


CHECKS = {name.removeprefix("task_"): check for name, check in list(globals().items()) if name.startswith("task_")}


def told(error):
    """Return an exception in one line for a student: an AssertionError's own words, of others type, words and place."""
    if isinstance(error, AssertionError) and error.args:
        return " ".join(str(error).split())
    if isinstance(error, NotImplementedError):
        return f"nothing is written yet ({error})"
    here, frames = Path.cwd(), traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if here in (folders := Path(f.filename).parents) and here / "tests" not in folders
           and "site-packages" not in f.filename]
    where = f", line {own[0].lineno} of {Path(own[0].filename).relative_to(here).as_posix()}: {own[0].line}" if own else ""
    return " ".join(f"{type(error).__name__}{where} ({error})".split())


def spoiled(task):
    """Return, in one line, why the task's file in this folder cannot be checked at all; None where it can."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "exercises.md").read_text(encoding="utf-8")
    file, name = re.search(rf"^### {task}\. .+\n`([\w/]+\.py): ([\w.]+)`", page, re.MULTILINE).groups()
    if not Path(file).is_file():
        return None
    try:
        node = ast.parse(Path(file).read_text(encoding="utf-8-sig"), file)
    except (SyntaxError, ValueError, RecursionError) as error:
        return f"{file} does not parse: {error}"
    for part in name.split("."):
        node = next((n for n in getattr(node, "body", ()) if getattr(n, "name", None) == part), None)
    return None if node else f"{file} has no {name} any more: put its def back"


def main(argv):
    """Check the task whose number is argv[0]; return the exit code."""
    if len(argv) != 1 or argv[0] not in CHECKS:
        print(f"say: python tests/exercises.py N, N from {', '.join(CHECKS)}")
        return 2
    HELD.clear()
    try:
        CHECKS[argv[0]]()
    except (Exception, SystemExit) as error:
        unreadable = spoiled(argv[0])
        print(unreadable or told(error))
        return 2 if unreadable else 1
    print(f"all {len(HELD)} checks hold")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
