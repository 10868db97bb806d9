"""Texts longer than a canvas: what was read is as encoded, canvases in a row are single ones, and training shows the same."""
import itertools
import shutil
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample
from ar2diff import additions
from autoregressive import Autoregressive
from beyond.canvases import reader, write
from beyond.decoders import DECODERS
from conftest import EOS, MASK, PAD, Run, S, T, V, Vectors, ragged_batch, row, targets_only
from data.dataset import Batch, TaskData, TextData, open_data
from data.tokenizer import load_tokenizer
from diffusion import PROCESSES
from engine import cli
from engine.checkpoint import describe, save_checkpoint
from engine.noise import Noise
from model import Transformer
from pretrained.gpt2 import GPT2
from pretrained.llama import Llama
from pretrained.loading import new_process, process_of
from sample import GenerateConfig, Writer, load_writer, prompt_batch, show
from test_dataset import same, write_task, write_text
from test_model import left_padded, may_see, reference_logits

BYTES = load_tokenizer("bytes")
each_padding = pytest.mark.parametrize("lengths", [None, [S, 2, 0], "no inputs"])


# ---- reading ----

FLAVOURS = {"ours": (Transformer, V, 2, 16, 2), "gpt2": (partial(GPT2, n_positions=40), V, 2, 16, 2), "llama": (
    partial(Llama, n_kv_head=2, head_width=6, mlp_width=24, bias=True, qk_norm=True, tied=False), V, 2, 16, 4)}


def random_model(flavour="ours", **shape):
    """Return a model that does more than echo what it is fed, of which no two positions or gains are alike."""
    torch.manual_seed(0)
    make, *sizes = FLAVOURS[flavour]
    model = make(*sizes, **shape).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = {"embedding.weight": 0.1 if flavour == "ours" else 1.0, "positions.weight": 1.0}
            torch.nn.init.normal_(p, std=std.get(name, 2 * p.size(-1) ** -0.5))
            p += p.dim() == 1  # gains are about 1, and biases may be
    return model


def tokens(*shape, seed=0):
    return torch.randint(9, shape, generator=torch.Generator().manual_seed(seed))


def padded(lengths):
    """Return (inputs, pad_mask) of 3 rows of these lengths."""
    if lengths == "no inputs":
        return tokens(3, 0), None
    return tokens(3, S), None if lengths is None else left_padded(lengths, S)


def longer(inputs, pad_mask, text):
    """Return what encode() takes for inputs that the text follows."""
    return torch.cat((inputs, text), dim=1), None if pad_mask is None else F.pad(pad_mask, (0, text.size(1)))


def read(model, inputs, pad_mask, pieces, attention="causal"):
    context = model.encode(inputs, pad_mask, attention)
    for piece in pieces:
        model.read(piece, context)
    return context


@each_padding
@pytest.mark.parametrize("sizes", [(7,), (1, 6), (2, 2, 2, 1)], ids=str)
@pytest.mark.parametrize("flavour", FLAVOURS)
@torch.no_grad()
def test_a_text_read_in_pieces_is_a_text_that_was_among_the_inputs(flavour, sizes, lengths):
    model, text, y, (inputs, pad_mask) = random_model(flavour), tokens(3, 7, seed=1), tokens(3, T, seed=2), padded(lengths)
    context = read(model, inputs, pad_mask, text.split(sizes, dim=1))
    whole = model.encode(*longer(inputs, pad_mask, text))
    for attention in ("causal", "bidirectional"):
        expected, found = model.decode(y, whole, attention), model.decode(y, context, attention)
        assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
        elsewhere = replace(context, border=context.border + 1)  # a hole between text and targets would show
        assert flavour == "gpt2" or (model.decode(y, elsewhere, attention) - expected).abs().max() > 1e-3


@each_padding
@pytest.mark.parametrize("inputs_attention", ["causal", "bidirectional"])
@torch.no_grad()
def test_read_text_sees_what_stands_before_it_as_a_second_model_in_numpy_has_it(inputs_attention, lengths):
    model, text, y, (inputs, pad_mask) = random_model("ours"), tokens(3, 7, seed=1), tokens(3, T, seed=2), padded(lengths)
    n, context = inputs.size(1), read(model, inputs, pad_mask, text.split((3, 4), dim=1), inputs_attention)
    for attention in ("causal", "bidirectional"):
        seen = may_see("causal", attention, n + 7, T)
        seen[:n, :n] = may_see(inputs_attention, attention, n, 0)
        expected = reference_logits(model, *(x.numpy() for x in (longer(inputs, None, text)[0], y)), seen,
                                    longer(inputs, pad_mask, text)[1])
        assert abs(model.decode(y, context, attention).numpy() - expected).max() < 2e-5 * max(1, abs(expected).max())


@each_padding
@pytest.mark.parametrize("flavour", FLAVOURS)
@torch.no_grad()
def test_reading_appends_and_leaves_what_was_there_as_it_was(flavour, lengths):
    model, (inputs, pad_mask), text = random_model(flavour), padded(lengths), tokens(3, 5, seed=1)
    context = read(model, inputs, pad_mask, [text[:, :2]])
    copied, held, masks = context.repeat(1), context.keys + context.values, (context.pad_mask, pad_mask)
    seen, n = [x.clone() for x in held], inputs.size(1) + 2
    model.read(text[:, 2:], context)
    assert all(x.size(2) == n + 3 and torch.equal(x[:, :, :n], old) for x, old in zip(context.keys + context.values, seen))
    assert all(torch.equal(x, old) for x, old in zip(held, seen)), "who else holds these tensors finds them as they were"
    assert all(torch.equal(x, old) for x, old in zip(copied.keys + copied.values, seen)) and copied.border == 2
    assert (context.border, context.n_targets) == (5, 0) and masks[0] is masks[1] is context.pad_mask
    y = tokens(3, T, seed=2)
    ones = [model.decode(y.repeat_interleave(2, dim=0), context.repeat(2), "bidirectional")[::2] for _ in range(2)]
    assert torch.equal(*ones) and (ones[0] - model.decode(y, context, "bidirectional")).abs().max() < 1e-5


@each_padding
@pytest.mark.parametrize("flavour", FLAVOURS)
@torch.no_grad()
def test_ar_decoding_behind_a_text_that_was_read_equals_teacher_forcing(flavour, lengths):
    model, text, y, (inputs, pad_mask) = random_model(flavour), tokens(3, 7, seed=1), tokens(3, T, seed=2), padded(lengths)
    once = model.decode(y, model.encode(*longer(inputs, pad_mask, text)), "causal")
    context = read(model, inputs, pad_mask, text.split((4, 3), dim=1))
    steps = torch.cat([model.decode(part, context, "causal", extend=True) for part in y.split((1, 1, 3, 1), dim=1)], dim=1)
    assert (steps - once).abs().max() < 1e-5 * max(1, once.abs().max()) and (context.border, context.n_targets) == (7, T)


@torch.no_grad()
def test_a_reader_answers_with_what_was_read_and_keeps_it_though_an_answer_grows():
    model, y = random_model(), tokens(3, T, seed=2)
    context = read(model, *padded([S, 2, 0]), [tokens(3, 7, seed=1)])
    has_read, expected = reader(model, context), model.decode(y, context, "causal")
    for asked in ((tokens(3, S, seed=3), None, "bidirectional"), (tokens(3, 0), None, "causal")):
        answer = has_read.encode(*asked)
        assert torch.equal(has_read.decode(y, answer, "causal", extend=True), expected) and answer.n_targets == T
    assert context.n_targets == 0 and context.keys[0].size(2) == S + 7 and has_read.embedding is model.embedding


# ---- writing, with models ----

SELF = {"uniform": {"n_unroll": 2, "self_condition": 0.5}}
WAYS = [(name, decoder, {}) for name, decoders in DECODERS.items() for decoder in decoders]
WAYS += [("uniform", decoder, SELF["uniform"]) for decoder in DECODERS["uniform"]]
every_way = pytest.mark.parametrize("name, decoder, options", WAYS, ids=lambda x: "+".join(x) if isinstance(x, dict) else x)
NONE = -1  # an EOS that nobody writes


def new(name, inputs_attention="causal", eos=EOS, **options):
    if name == "ar":
        return Autoregressive(MASK, eos, PAD, inputs_attention)
    return new_process(name, SimpleNamespace(n_noise=11, mask=MASK), inputs_attention=inputs_attention, **options)


def writer_of(process, decoder, model=None, eos=EOS, temperature=0.7, n_steps=3):
    """Return a Writer of the ids of conftest.py."""
    if model is None:
        model = random_model(**additions(process))
    diffusion = {"n_steps": n_steps, "n_samples": 2} if process.name in PROCESSES else {}
    return Writer(model, process, SimpleNamespace(eos=eos, pad=PAD), S, T, torch.device("cpu"), decoder,
                  {"temperature": temperature} | diffusion)


def noise_of(rows, seed=0):
    return lambda canvas: Noise(seed, "generate", canvas, rows)


def no_inputs(n):
    return targets_only(torch.zeros(n, T, dtype=torch.long))


@every_way
@pytest.mark.parametrize("inputs_attention", ["causal", "bidirectional"])
def test_one_canvas_of_many_is_the_single_canvas_bit_for_bit(name, decoder, options, inputs_attention):
    for batch in (ragged_batch(), no_inputs(4)):
        writer, rows = writer_of(new(name, inputs_attention, **options), decoder), range(4)
        one, single = write(writer, batch, noise_of(rows), T), writer.drafts(batch, Noise(0, "generate", 0, rows))
        assert len(one) == len(single) and all(torch.equal(a, b) for a, b in zip(one, single))


@every_way
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_each_canvas_is_what_the_decoder_gives_behind_inputs_longer_by_what_was_written(name, decoder, options, temperature):
    process = new(name, eos=NONE, **options)
    writer, rows = writer_of(process, decoder, eos=NONE, temperature=temperature), range(4)
    for batch in (ragged_batch(), no_inputs(4)):
        written, expected = batch.targets[:, :0], []
        for k in range(4):
            whole = Batch(*longer(*batch[:2], written), batch.targets)  # encoded anew, no cache
            noise = Noise(0, "generate", k, rows)
            canvas = [*DECODERS[name][decoder](process, writer.model, whole, noise, **writer.options)]
            expected += [torch.cat((written, draft), dim=1) for draft in (canvas if k == 0 else canvas[1:])]
            written = expected[-1]
        found = write(writer, batch, noise_of(rows), 4 * T)
        assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))
        canvases = {tuple(x.flatten().tolist()) for x in written.split(T, dim=1)}
        assert len(canvases) > 1, "the canvases before it matter to a canvas"


@every_way
def test_a_text_does_not_depend_on_the_batch_it_is_written_in(name, decoder, options):
    batch, noise = Batch(*(torch.cat((x, x)) for x in ragged_batch())), lambda *rows: noise_of(rows, seed=1)
    written_with = lambda eos: writer_of(new(name, eos=eos, **options), decoder, eos=eos, temperature=1.0)
    free = write(written_with(NONE), batch, noise(*range(8)), 4 * T)[-1]
    ends = lambda token: {(text == token).tolist().index(True) // T for text in free if token in text}
    writer, widths = written_with(max(range(V), key=lambda token: len(ends(token)))), set()  # a token that ends some early
    whole = write(writer, batch, noise(*range(8)), 4 * T)[-1]
    for b in range(8):
        alone = write(writer, row(batch, b), noise(b), 4 * T)[-1]
        widths.add(alone.size(1))
        assert torch.equal(F.pad(alone, (0, whole.size(1) - alone.size(1)), value=PAD), whole[b:b + 1])
    assert len(widths) > 1 and whole.size(1) == max(widths), "some end, while others go on"


def test_writing_computes_in_the_dtype_of_the_writer_and_without_gradients():
    writer = replace(writer_of(new("uniform", eos=NONE), "resample", eos=NONE), dtype=torch.bfloat16)
    found, n = set(), []
    writer.model.blocks[0].mlp_out.register_forward_hook(lambda module, args, x: found.add((x.dtype, x.requires_grad)))
    writer.model.blocks[0].register_forward_pre_hook(lambda module, args: n.append(args[0].size(1)))
    write(writer, ragged_batch(), noise_of(range(4)), 3 * T)
    assert found == {(torch.bfloat16, False)} and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert n == [S, *[T] * (3 * 3 + 2)], "the inputs are encoded once, and what nothing follows is not read"


# ---- writing, with an author who knows what he wants to say ----

@dataclass
class Place:
    """An author's context: where he is in his texts."""
    n_read: int = 0
    n_fed: int = 0

    def repeat(self, n):
        return replace(self)


@dataclass
class Author:
    """A model that writes texts (B, n T) canvas by canvas, whatever it is fed."""
    texts: torch.Tensor
    encoder = None
    noisy: Vectors = field(default_factory=Vectors)
    heard: list = field(default_factory=list)  # what read() was given
    first: list = field(default_factory=list)  # canvas -> what was fed first
    passes: list = field(default_factory=list)  # a list, as all above: a shallow copy that reads and writes is the same author
    n_encoded: int = 0

    def encode(self, *_):
        self.n_encoded += 1
        return Place()

    def read(self, text, context):
        self.heard.append(text)
        context.n_read += text.size(1)

    def decode(self, y, context, attention, extend=False, belief=None):
        self.passes.append(attention)
        if context.n_read == T * len(self.first):
            self.first.append(y.clone())
        wanted = self.texts[:, context.n_read:][:, :T][:, context.n_fed:][:, :y.size(1)]
        context.n_fed += y.size(1) if extend else 0
        return 100.0 * F.one_hot(wanted.repeat_interleave(len(y) // len(wanted), dim=0), V)


def story(*lengths, n=4):
    """Return texts (B, n T) of so many tokens and EOS; behind the canvas of EOS stands what nobody may come to read."""
    texts = torch.arange(n * T).remainder(9).repeat(len(lengths), 1)
    for text, length in zip(texts, lengths):
        end = -(-(length + 1) // T) * T
        text[length:length + 1], text[length + 1:end] = EOS, PAD
    return texts


AUTHORED = [(name, decoder) for name, decoder, options in WAYS if not options]
LENGTHS = [0, 3, T - 1, T, T + 1, 2 * T - 1, 3 * T - 2]  # EOS also as the last of a canvas, and as the first


@pytest.mark.parametrize("name, decoder", AUTHORED)
def test_behind_eos_is_padding_while_others_go_on_and_writing_stops_when_all_have_ended(name, decoder):
    for lengths, n in ((LENGTHS, 3), ([*LENGTHS, 99], 4), ([0], 1), ([T - 1, 2], 1), ([T, 1], 2)):
        texts, B = story(*lengths), len(lengths)
        author = Author(texts)
        writer = writer_of(new(name), decoder, author, temperature=0.0)
        drafts = write(writer, no_inputs(B), noise_of(range(B)), 4 * T)
        expected = torch.stack([torch.tensor([*text[:end], *[PAD] * (n * T - end)]) for text, length in zip(texts, lengths)
                                for end in [min(n, length // T + 1) * T]])
        assert torch.equal(drafts[-1], expected)
        assert (author.n_encoded, len(author.first)) == (1, n) and len(drafts) - 1 == len(author.passes)
        widths = [draft.size(1) for draft in drafts]
        assert widths == sorted(widths) and sorted({*widths}) == [T * k for k in range(1, n + 1)], "drafts grow"
        for draft in drafts:
            k = draft.size(1) // T - 1
            assert torch.equal(draft[:, :k * T], expected[:, :k * T]), "finished canvases stay as they are"
            over = torch.tensor([length < k * T for length in lengths])
            assert (draft[over, k * T:] == PAD).all()
        assert len(author.heard) == n - 1
        going_on = [torch.tensor([length >= k * T for length in lengths]) for k in range(4)]
        for k, heard in enumerate(author.heard):
            assert torch.equal(heard[going_on[k]], texts[going_on[k], k * T:(k + 1) * T]), "what is read is what was written"


@pytest.mark.parametrize("name, decoder", [way for way in AUTHORED if way[0] != "ar"])
def test_every_canvas_begins_with_noise_of_its_own(name, decoder):
    author = Author(story(99, 99))
    asked = []
    write(writer_of(new(name), decoder, author), no_inputs(2), lambda k: asked.append(k) or noise_of(range(2))(k), 4 * T)
    assert asked == [0, 1, 2, 3] and len(author.first) == 4
    for a, b in itertools.combinations(author.first, 2):
        assert name == "absorbing" or not torch.equal(a, b)  # whose noise is MASK alone


# ---- what is learned ----


def canvas_of(long, batch, T):
    """Return (which canvas of each long row the targets are, B int), having checked inputs and mask; in numpy."""
    inputs, hidden, targets = (x.numpy() for x in batch)
    chosen = []
    for b in range(len(targets)):
        n = 0 if long.pad_mask is None else int(long.pad_mask[b].sum())
        before, after = long.inputs[b, n:].numpy(), long.targets[b].numpy()
        found = [k for k in range(len(after) // T) if (after[k * T:k * T + T] == targets[b]).all()]
        assert len(found) == 1, "the targets are one canvas of the row"
        given = np.concatenate((before, after[:found[0] * T]))
        assert hidden[b].tolist() == [True] * (len(hidden[b]) - len(given)) + [False] * len(given), "padded on the left"
        assert (inputs[b][~hidden[b]] == given).all(), "the inputs are what precedes it, to its border"
        chosen += found
    return np.array(chosen)


def uniformly(chosen, n):
    """Assert that choices among n are equally likely."""
    counts, wanted = np.bincount(chosen, minlength=n), len(chosen) / n
    assert len(counts) == n and ((counts - wanted) ** 2 / wanted).sum() < n - 1 + 5 * (2 * n) ** 0.5, counts


@pytest.fixture
def stream(tmp_path, monkeypatch):
    monkeypatch.setattr(BYTES, "vocab_size", 65536)
    return write_text(tmp_path / "stream", [range(20000), range(20000, 60000)], [range(5000), range(20000, 30000)], (1, 1))


@pytest.mark.parametrize("input_len, n", [(0, 3), (5, 2), (5, 4)])
def test_of_a_text_one_canvas_is_learned_behind_all_that_precedes_it(stream, input_len, n):
    long, data = open_data(stream, BYTES, input_len, n * 7), open_data(stream, BYTES, input_len, 7, n_canvases=n)
    rows = range(2000)
    for train, key in ((True, (3, "train", 5)), (False, (0, "valid", 0))):  # key: of the noise that the loss is given
        wanted, found = (x.train_batch(3, 5, rows, 2000) if train else x.valid_batch(rows) for x in (long, data))
        assert found.inputs.shape == found.pad_mask.shape == (2000, input_len + (n - 1) * 7)
        chosen = canvas_of(wanted, found, 7)
        uniformly(chosen, n)
        places = torch.cat((wanted.inputs, wanted.targets), dim=1)[:, 0].double()
        for x in (places % 20000, (places >= 20000).double(), Noise(*key, rows).uniform(), Noise(*key, rows).stratified()):
            assert abs(np.corrcoef(chosen, x)[0, 1]) < 4 / 2000 ** 0.5, "neither noise level nor window tells the canvas"
    assert (data.tokens_per_row, data.objective, data.hash) == (input_len + n * 7, long.objective, long.hash)


def pairs_of(lengths):
    """Return examples of inputs and targets of these lengths, no two canvases of a target alike."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [("x" * (i % 9), letters[:length]) for i, length in enumerate(lengths)]


def test_of_a_task_one_canvas_that_holds_text_is_learned_behind_input_and_the_canvases_before(tmp_path):
    lengths = [0, 3, 4, 5, 9, 10, 14]  # and EOS: the last of its canvas (4, 9, 14) or the first (5, 10)
    folder = write_task(tmp_path / "t", pairs_of(lengths * 9), pairs_of(lengths * 9))
    long, data, by_n = open_data(folder, BYTES, 9, 15), open_data(folder, BYTES, 9, 5, n_canvases=3), {1: [], 2: [], 3: []}
    for step in range(60):
        wanted, found = long.train_batch(1, step, range(21), 21), data.train_batch(1, step, range(21), 21)
        assert found.inputs.shape == (21, wanted.inputs.size(1) + 10)
        chosen = canvas_of(wanted, found, 5)
        for k, n_text in zip(chosen, (wanted.targets != BYTES.pad).sum(dim=1).tolist()):
            by_n[-(-n_text // 5)].append(k)
            assert k * 5 < n_text, "a canvas of padding alone teaches nothing"
    for n, chosen in by_n.items():
        uniformly(chosen, n)
    canvas_of(long.valid_batch(range(63)), data.valid_batch(range(63)), 5)
    assert data.n_valid() == 63 and data.n_tokens == long.n_tokens


@pytest.mark.parametrize("kind", ["task", "text"])
def test_the_canvas_of_a_row_depends_on_seed_step_and_index_alone(task, text, kind):
    opened = lambda: open_data({"task": task, "text": text}[kind], BYTES, 8, 2, n_canvases=4)

    def plain(batches):
        """Return each row without its padding, whose width is that of the batch."""
        return [(i[~m].tolist(), y.tolist()) for batch in batches for i, m, y in zip(*batch)]
    whole = plain([opened().train_batch(3, 11, range(8), 8)])
    for split in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0], [1, 2, 3, 4, 5], [6, 7]]):
        data = opened()
        assert plain([data.train_batch(3, 11, rows, 8) for rows in reversed(split)][::-1]) == whole
        valid = plain([data.valid_batch(rows) for rows in ([0], [1, 2, 3], [4, 5, 6])])
        assert valid == plain([opened().valid_batch(range(7))])
    assert whole not in (plain([opened().train_batch(*key, range(8), 8)]) for key in ((4, 11), (3, 12)))
    assert kind == "task" or len({len(inputs) for inputs, _ in whole}) > 2, "rows of a batch learn different canvases"


def test_one_canvas_is_the_data_as_it_was(task, text):
    for folder, cls in ((task, TaskData), (text, TextData)):
        plain, one = open_data(folder, BYTES, 8, 7), open_data(folder, BYTES, 8, 7, n_canvases=1)
        assert type(one) is cls and same(one.train_batch(3, 11, range(8), 8), plain.train_batch(3, 11, range(8), 8))
        assert same(one.valid_batch(range(7)), plain.valid_batch(range(7)))


# ---- the scripts ----

LONG_RUN = ["--input_len=0", "--target_len=6", "--n_canvases=3", "--schedule=constant"]
KINDS = {"ar": ["ar", "--input_len=8"], "uniform": ["diff"], "absorbing": ["diff", "--process=absorbing"],
         "self": ["diff", "--self_condition=0.5", "--n_unroll=1"], "gaussian": ["diff", "--process=gaussian"]}


@pytest.fixture(scope="module")
def long_runs(train, text, tmp_path_factory):
    """Runs on text in canvases: by inputs of 8 tokens AR, without inputs diffusion."""
    folder = tmp_path_factory.mktemp("long")

    def started(name, *flags, out=None):
        kind, *own = KINDS[name]
        causal = ["--inputs_attention=causal"] * (kind == "diff")
        return train(kind, folder / (out or name), f"--data={text}", *LONG_RUN, *causal, *own, *flags)
    return SimpleNamespace(start=started, **{name: started(name) for name in KINDS})


def equal(a, b):
    """Compare nested dicts of tensors to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("name", KINDS)
def test_a_run_on_canvases_resumes_bit_identically_and_not_with_another_number(long_runs, name):
    whole = getattr(long_runs, name)
    part = long_runs.start(name, "--steps=2", out=f"{name}_part")
    with pytest.raises(cli.UserError, match="--n_canvases was 3, is 2"):
        long_runs.start(name, "--n_canvases=2", "--resume", out=f"{name}_part")
    long_runs.start(name, "--resume", out=f"{name}_part")
    a, b = whole.checkpoint(), part.checkpoint()
    assert a["step"] == b["step"] == 4 and a["config"]["n_canvases"] == 3 and (a["target_len"], b["target_len"]) == (6, 6)
    assert equal(a["model"], b["model"]) and equal(a["optimizer"]["state"], b["optimizer"]["state"])
    train_lines = [[line for line in run.log() if "norm" in line] for run in (whole, part)]
    assert len(train_lines[0]) == 4 and train_lines[0] == train_lines[1]


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_of_a_run_is_that_of_the_canvases(long_runs, text, name):
    run, c = getattr(long_runs, name), getattr(long_runs, name).checkpoint()
    torch.manual_seed(0)
    model, losses = Transformer(**c["shape"]), []
    for n in (3, 1):
        batch = open_data(text, BYTES, c["input_len"], 6, n_canvases=n).train_batch(0, 0, range(8), 8)
        with torch.no_grad():
            losses.append(float(process_of(c).loss(model, batch, Noise(0, "train", 0, range(8))).total))
    assert abs(losses[0] - run.log()[0]["loss"]) < 1e-5 < abs(losses[0] - losses[1])


@pytest.mark.parametrize("name", KINDS)
def test_a_run_on_canvases_writes_as_many_as_it_is_told_behind_its_prompt(long_runs, capsys, name):
    run = getattr(long_runs, name)
    c = run.checkpoint()
    for key, tensor in c["model"].items():
        tensor *= 5 if "out" in key else 1  # now what was read matters
    path = run.folder / "loud.pt"
    save_checkpoint(path, c)
    words = ["--temperature=1", "--n_samples=1"] + ["--n_steps=3"] * (name != "ar")
    capsys.readouterr()
    sample.main([str(path), "--prompt=ab", "--n_tokens=18", "--show_steps", *words])
    said, steps = capsys.readouterr(), []
    config = GenerateConfig(temperature=1.0, n_samples=1, n_steps=None if name == "ar" else 3)
    writer = load_writer(path, config)
    writer, batch = prompt_batch(writer, "ab", 18)
    assert batch.inputs[:, -2:].tolist() == [[*b"ab"]] and batch.inputs.size(1) == (8 if name == "ar" else 2)
    drafts = write(writer, batch, lambda k: Noise(0, "generate", k, [0]), 18)
    assert drafts[-1].size(1) > 6, "a seed by which it ends at once shows nothing"
    steps = [f"{n:4d}  {show(BYTES, draft[0])}" for n, draft in enumerate(drafts)]
    assert said.out == "\n".join([*steps, "", "ab" * (name != "ar") + BYTES.decode(drafts[-1][0])]) + "\n"
    texts = []
    for flags in (["--seed=0"], ["--seed=1"], ["--prompt=ba"]):
        sample.main([str(path), "--prompt=ab", "--n_tokens=18", *words, *flags])
        texts.append(capsys.readouterr().out)
    assert len({*texts}) == 3, "another seed or prompt is another text"


def test_on_a_terminal_what_a_new_canvas_adds_is_shown_whole_and_bold(long_runs, monkeypatch, capsys):
    capsys.readouterr()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sample.main([str(long_runs.uniform.folder), "--prompt=ab", "--n_tokens=18", "--n_steps=2", "--show_steps"])
    bold = capsys.readouterr().out.replace("\033[1m", "").replace("\033[0m", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    sample.main([str(long_runs.uniform.folder), "--prompt=ab", "--n_tokens=18", "--n_steps=2", "--show_steps"])
    assert bold == capsys.readouterr().out
    assert show(BYTES, b"abcd", b"ac") == "a\033[1mb\033[0m\033[1mc\033[0m\033[1md\033[0m"


def test_the_noise_of_the_command_line_is_another_for_every_canvas(long_runs, monkeypatch):
    given = []
    monkeypatch.setattr(sample, "write", lambda writer, batch, noise_of, n: given.append(noise_of) or [batch.targets])
    sample.main([str(long_runs.uniform.folder), "--prompt=ab", "--n_tokens=18", "--seed=3"])
    for k in range(3):
        assert torch.equal(given[0](k).uniform(5), Noise(3, "generate", k, [0]).uniform(5))
    assert not torch.equal(given[0](0).uniform(5), given[0](1).uniform(5))


# ---- what is refused, and what is told ----

def refused(main, capsys):
    """Return the one line that main() ends with, having checked that it is all that was said."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out, said
    return said.err


@pytest.fixture(scope="module")
def writers(long_runs, ar_run, diff_run, encoder_decoder_run, train, text, tmp_path_factory):
    """Checkpoints of all kinds."""
    folder, c = tmp_path_factory.mktemp("writers"), diff_run.checkpoint()
    for name, change in (("full", {"inputs_attention": "full"}), ("shifted", {"shift": 10, "inputs_attention": "causal"})):
        save_checkpoint(folder / f"{name}.pt", c | {"process": c["process"] | change})
    lm = train("ar", folder / "lm", f"--data={text}", "--input_len=0", "--target_len=6", "--steps=1")
    return dict(text=long_runs.uniform.folder, ar=ar_run.folder, diff=diff_run.folder, both=encoder_decoder_run.folder,
                lm=lm.folder, full=folder / "full.pt", shifted=folder / "shifted.pt")


@pytest.mark.parametrize("which, flags, message", [
    ("text", ["--n_tokens=13"], "--n_tokens=13 must be a multiple of the canvas, 6 tokens"),
    ("text", ["--n_tokens=5"], "--n_tokens=5 must be a multiple of the canvas, 6 tokens"),
    ("text", ["--n_tokens=0"], "--n_tokens=0 must be a multiple"),
    ("text", ["--n_tokens=-6"], "--n_tokens=-6 must be a multiple"),
    ("text", ["--n_tokens=12", "--target_len=5"], "--n_tokens=12 must be a multiple of the canvas, 5 tokens"),
    ("text", ["--n_tokens=many"], "--n_tokens: invalid int value: 'many'"),
    ("text", ["--n_tokens=600", "--infill=a___"], "--n_tokens goes with neither --infill nor --trace"),
    ("text", ["--n_tokens=600", "--trace={new}.html"], "--n_tokens goes with neither --infill nor --trace"),
    ("text", ["--n_tokens=600", "--trace={new}.html", "--beside={ar}"], "--n_tokens goes with neither --infill nor --trace"),
    ("ar", ["--n_tokens=14", "--drafter={diff}"], "--n_tokens and --drafter do not go together"),
    ("shifted", ["--n_tokens=14"], "--n_tokens: a shifted model begins where AR does"),
    ("both", ["--n_tokens=14"], "--n_tokens: behind inputs that see the targets, or that an encoder read"),
    ("full", ["--n_tokens=14"], "--n_tokens: behind inputs that see the targets"),
    ("lm", ["--n_tokens=12"], "a plain AR language model has no canvas; say --target_len"),
    ("diff", ["--n_tokens=700", "--prompt=more than it has columns"], "the prompt has 24 tokens"),
    ("text", ["--prompt=long enough for a note", "--infill=no gap"], "the template has no gap"),
    ("text", ["--prompt=long enough for a note", "--trace={new}.html", "--beside={ar}"], "the prompt has 22 tokens")])
def test_what_cannot_be_written_is_refused_in_one_line_and_nothing_is_written(writers, tmp_path, capsys, which, flags, message):
    words = [str(word).format(new=tmp_path / "new", **writers) for word in (writers[which], "--prompt=ab", *flags)]
    assert message in refused(lambda: sample.main(words), capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, flags, message", [
    ("ar", ["--n_canvases=0"], "--n_canvases=0 must be at least 1"), ("diff", ["--n_canvases=-1"], "--n_canvases=-1 must be"),
    ("diff", ["--n_canvases=2"], "--n_canvases wants a decoder-only model, --inputs_attention=causal, no --shift"),
    ("diff", ["--n_canvases=2", "--inputs_attention=full"], "--n_canvases wants"),
    ("diff", ["--n_canvases=2", "--inputs_attention=causal", "--shift"], "--n_canvases wants"),
    ("ar", ["--n_canvases=2", "--inputs_attention=bidirectional"], "--n_canvases wants"),
    ("ar", ["--n_canvases=2", "--architecture=encoder-decoder", "--inputs_attention=causal"], "--n_canvases wants"),
    ("diff", ["--n_canvases=2", "--architecture=encoder-decoder", "--inputs_attention=causal"], "--n_canvases wants"),
    ("ar", ["--n_canvases=2", "--data={text}", "--objective=span", "--input_len=32", "--target_len=16"], "--n_canvases wants"),
    ("ar", ["--n_canvases=1000", "--data={text}", "--input_len=4", "--target_len=7"],
     "tokens, but --input_len=4 --target_len=7000 need 7005"),
    ("ar", ["--n_canvases=2", "--target_len=1", "--too_long=error"], "examples do not fit --input_len=8 --target_len=2")])
def test_what_cannot_be_learned_is_refused_in_one_line_and_nothing_is_written(train, text, tmp_path, capsys, kind, flags,
                                                                                message):
    flags = [flag.format(text=text) for flag in flags]
    assert message in refused(lambda: train(kind, tmp_path / "x", *flags), capsys)
    assert not list(tmp_path.iterdir())


def test_published_weights_learn_canvases_to_their_last_position_and_none_behind_it(train, text, tmp_path, capsys):
    model = GPT2(BYTES.vocab_size, 1, 16, 2, n_positions=48)
    process = Autoregressive(10, BYTES.eos, BYTES.pad)
    save_checkpoint(tmp_path / "gpt2.pt", dict(
        model=model.state_dict(), shape=model.shape, process=describe(process), tokenizer={"name": "bytes", "hash": BYTES.hash},
        config={"data": "none"}, data="none", input_len=0, target_len=48, step=0, history=[], optimizer=None))
    flags = ["--size=1x16x2", f"--init_from={tmp_path / 'gpt2.pt'}", f"--data={text}", "--input_len=8", "--target_len=10",
             "--steps=1", "--eval_sequences=0"]
    for kind, more in (("ar", []), ("diff", ["--shift=no"])):
        run = train(kind, tmp_path / kind, *flags, *more, "--n_canvases=4")
        assert run.checkpoint()["step"] == 1
        capsys.readouterr()
        with pytest.raises(cli.UserError, match="make 58 columns, this model has 48 positions"):
            train(kind, tmp_path / "new", *flags, *more, "--n_canvases=5")
        sample.main([str(run.folder), "--prompt=abcdefgh", "--n_tokens=40"])
        assert not capsys.readouterr().err
        assert "8 columns of prompt and 45 to write are more than" in refused(  # before any of them is written
            lambda run=run: sample.main([str(run.folder), "--prompt=ab", "--target_len=5", "--n_tokens=45"]), capsys)
        assert "8 columns of prompt and 50 to write are more than this model's 48 positions" in refused(
            lambda run=run: sample.main([str(run.folder), "--prompt=abcdefgh", "--n_tokens=50"]), capsys)
    with pytest.raises(cli.UserError, match="--n_canvases wants"):
        train("diff", tmp_path / "new", *flags, "--n_canvases=2")  # shifted, as published weights are unless told
    assert not (tmp_path / "new").exists()


def test_a_note_tells_when_more_is_written_than_was_learned_in_a_row(long_runs, diff_run, capsys):
    plain = Run(long_runs.uniform.folder.parent / "plain")
    shutil.copytree(long_runs.uniform.folder, plain.folder)
    c = plain.checkpoint()
    save_checkpoint(plain.path, c | {"config": {key: value for key, value in c["config"].items() if key != "n_canvases"}})
    for run, prompt, n, learned in ((long_runs.uniform, "", 18, None), (long_runs.uniform, "a", 18, 18),
                                    (long_runs.uniform, "abcdef", 12, None), (long_runs.uniform, "abcdefg", 12, 18),
                                    (long_runs.uniform, "", 24, 18), (long_runs.ar, "abcdefgh", 18, None),
                                    (long_runs.ar, "ab", 24, None), (long_runs.ar, "abc", 24, 26),
                                    (plain, "", 6, None), (plain, "", 12, 6),
                                    (diff_run, "ab", 7, None), (diff_run, "a", 14, None), (diff_run, "ab", 14, 15)):
        capsys.readouterr()
        sample.main([str(run.folder), f"--prompt={prompt}", f"--n_tokens={n}"])
        note = f"note: {len(prompt)} tokens of prompt and {n} to write are more than the {learned} in a row that this model " \
               f"learned; it gets worse behind them\n"
        assert capsys.readouterr().err == (note if learned else "")
    sample.main([str(long_runs.uniform.folder), "--prompt=" + "a" * 13])  # one canvas, too
    assert "13 tokens of prompt and 6 to write are more than the 18" in capsys.readouterr().err
