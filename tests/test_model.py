"""The Transformer against a second one, written in numpy from its state dict with one explicit mask over [inputs; targets]."""
import dataclasses
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from autoregressive import Autoregressive, cross_entropy
from conftest import needs_gpu, width_of
from data.dataset import Batch
from diffusion import Absorbing, Gaussian, Uniform
from engine.cli import UserError
from engine.noise import Noise
from engine.parallel import compile_model
from engine.run_log import Tally
from experiments.cells import flops
from model import ARCHITECTURES, Transformer, attention_mask, rms_norm, rotate
from start import SIZES, shape_of

V, S, T = 40, 5, 6
PATTERNS = [("causal", "causal"), ("causal", "bidirectional"), ("bidirectional", "causal"), ("bidirectional", "bidirectional"),
            ("full", "bidirectional")]
each_pattern = pytest.mark.parametrize("inputs_attention, targets_attention", PATTERNS)
EACH = [("decoder-only", *pattern) for pattern in PATTERNS] + [("encoder-decoder", *pattern) for pattern in PATTERNS[:4]]
each_architecture_and_pattern = pytest.mark.parametrize("architecture, inputs_attention, targets_attention", EACH)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def tiny_model(architecture="decoder-only", seed=0, dropout=0.0, vector_width=0):
    torch.manual_seed(seed)
    model = Transformer(V, 2, 16, 2, architecture, vector_width=vector_width, dropout=dropout).eval()
    torch.nn.init.normal_(model.embedding.weight, std=0.05)  # logits far from zero: a wrong one shows
    return model


def tokens(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(lengths, width):
    """Return (B, width) bool, True = padding, for inputs of these lengths."""
    return torch.arange(width)[None, :] < width - torch.tensor(lengths)[:, None]


def forward(model, inputs, y, inputs_attention, targets_attention, pad_mask=None):
    return model.decode(y, model.encode(inputs, pad_mask, inputs_attention), targets_attention)


def may_see(inputs_attention, targets_attention, n_inputs, n_targets):
    """Return (L, L) bool: column i of [inputs; targets] may see column j. Rule by rule, without a triangle function."""
    n = n_inputs + n_targets
    seen = np.zeros((n, n), dtype=bool)
    for i in range(n):
        for j in range(n):
            if i < n_inputs and j < n_inputs:
                seen[i, j] = j <= i or inputs_attention != "causal"
            elif i < n_inputs:
                seen[i, j] = inputs_attention == "full"
            elif j < n_inputs:
                seen[i, j] = True
            else:
                seen[i, j] = j <= i or targets_attention == "bidirectional"
    return seen


def rms_normed(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True))


def waves(positions, n):
    """Return exp(i angle), (len(positions), n)."""
    return np.exp(1j * positions[:, None] * 10000.0 ** (-np.arange(n) / n))


def attended(q, k, v, seen, n_head, first_query, first_key):
    """Return (B, T, C): what each query takes from the values it may see, nothing where it sees none. Seen: (B, T, L)."""
    def placed(x, first):
        x = rms_normed(x)
        z = (x[..., ::2] + 1j * x[..., 1::2]) * waves(first + np.arange(x.shape[1]), D // 2)
        return np.concatenate((z.real, z.imag), axis=-1)

    D, heads = q.shape[-1] // n_head, []
    for h in range(n_head):
        part = slice(h * D, (h + 1) * D)
        scores = placed(q[..., part], first_query) @ placed(k[..., part], first_key).swapaxes(1, 2) / math.sqrt(D)
        e = np.exp(scores) * seen
        heads.append(e / np.maximum(e.sum(-1, keepdims=True), 1e-300) @ v[..., part])
    return np.concatenate(heads, axis=-1)


def reference_logits(model, inputs, y, seen, pad_mask=None):
    """Return the targets' logits in float64 numpy: one joint pass, or encoder and decoder. Rotary positions are complex."""
    weights = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}
    n_head, S = model.shape["n_head"], inputs.shape[1]

    def block(name, x, seen, first, encoded=None):
        weight = lambda part: weights[f"{name}.{part}.weight"].T
        x = x + attended(*np.split(rms_normed(x) @ weight("qkv"), 3, -1), seen, n_head, first, first) @ weight("attention_out")
        if encoded is not None:
            q, keys_values = rms_normed(x) @ weight("cross.q"), np.split(encoded @ weight("cross.kv"), 2, -1)
            x = x + attended(q, *keys_values, ~padded[:, None, :S], n_head, 0, -S) @ weight("cross.out")
        return x + np.maximum(rms_normed(x) @ weight("mlp_in"), 0) ** 2 @ weight("mlp_out")

    x = rms_normed(weights["embedding.weight"][np.concatenate((inputs, y), axis=1)])
    B, L, C = x.shape
    z = waves(np.arange(L - S), C // 2)
    x[:, S:] += np.concatenate((z.real, z.imag), axis=1)
    padded = np.zeros((B, L), dtype=bool)
    padded[:, :S] = pad_mask is not None and pad_mask.numpy()
    seen = seen & ~padded[:, None, :] | np.eye(L, dtype=bool)
    layers = range(model.shape["n_layer"])
    if model.shape["architecture"] == "decoder-only":
        for n in layers:
            x = block(f"blocks.{n}", x, seen, -S)
        x = x[:, S:]
    else:
        encoded, x = x[:, :S], x[:, S:]
        for n in layers:
            encoded = block(f"encoder.{n}", encoded, seen[:, :S, :S], -S)
        for n in layers:
            x = block(f"blocks.{n}", x, seen[:, S:, S:], 0, rms_normed(encoded))
    return rms_normed(x) * 128 / C @ weights["embedding.weight"].T


# ---- what sees what ----

@each_architecture_and_pattern
@pytest.mark.parametrize("lengths", [None, [5, 2, 0]], ids=["unpadded", "padded"])
def test_encode_then_decode_is_the_reference_under_an_explicit_mask(architecture, inputs_attention, targets_attention, lengths):
    model, inputs, y = tiny_model(architecture), tokens(3, S), tokens(3, T, seed=1)
    pad_mask = None if lengths is None else left_padded(lengths, S)
    expected = reference_logits(model, inputs, y, may_see(inputs_attention, targets_attention, S, T), pad_mask)
    found = forward(model, inputs, y, inputs_attention, targets_attention, pad_mask)
    assert abs(found.detach().numpy() - expected).max() < 2e-5


@each_architecture_and_pattern
def test_a_changed_token_moves_exactly_the_columns_that_may_see_it(architecture, inputs_attention, targets_attention):
    model, columns, hidden = tiny_model(architecture), tokens(2, S + T), []
    for stack in filter(None, (model.encoder, model.blocks)):
        stack[-1].register_forward_hook(lambda module, args, result: hidden.append(result[0]))

    def states(columns):
        hidden.clear()
        logits = forward(model, columns[:, :S], columns[:, S:], inputs_attention, targets_attention)
        return torch.cat(hidden, dim=1), logits  # (B, L, C), in one pass (full) or from encode and decode

    before, logits_before = states(columns)
    assert before.shape[1] == S + T
    moved, logits_moved = np.zeros((S + T, S + T), dtype=bool), np.zeros((T, S + T), dtype=bool)
    for j in range(S + T):
        changed = columns.clone()
        changed[0, j] = (changed[0, j] + 1) % V
        after, logits_after = states(changed)
        moved[:, j] = (after - before)[0].abs().amax(-1) > 1e-6
        logits_moved[:, j] = (logits_after - logits_before)[0].abs().amax(-1) > 1e-6
        assert torch.equal(after[1], before[1]), "rows of a batch do not see each other"
    expected = may_see(inputs_attention, targets_attention, S, T)
    assert (moved == expected).all()
    assert (logits_moved == expected[S:]).all()


def test_causal_targets_under_full_inputs_are_refused_because_the_inputs_would_leak_them():
    model = tiny_model()
    with pytest.raises(UserError, match="leak"):
        forward(model, tokens(1, S), tokens(1, T), "full", "causal")


def test_unknown_attention_patterns_are_named_with_the_nearest():
    model = tiny_model()
    with pytest.raises(UserError, match="did you mean 'causal'"):
        model.encode(tokens(1, S), attention="casual")
    with pytest.raises(UserError, match="did you mean 'bidirectional'"):
        model.decode(tokens(1, T), model.encode(tokens(1, S)), "bidirectionl")


@pytest.mark.parametrize("targets_attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("inputs_attention", ["causal", "full"])
def test_without_inputs_it_is_a_plain_language_model(inputs_attention, targets_attention):
    model, y, none = tiny_model(), tokens(2, T), tokens(2, 0)
    expected = reference_logits(model, none, y, may_see("causal", targets_attention, 0, T))
    assert abs(forward(model, none, y, inputs_attention, targets_attention).detach().numpy() - expected).max() < 2e-5


def test_nothing_padded_means_no_mask_which_keeps_the_fast_kernels(monkeypatch):
    model, calls, kernel = tiny_model(), [], F.scaled_dot_product_attention
    spy = lambda *args, **kw: calls.append(kw.get("attn_mask")) or kernel(*args, **kw)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    forward(model, tokens(1, S), tokens(1, T), "causal", "bidirectional")
    forward(model, tokens(1, S), tokens(1, T), "full", "bidirectional")
    forward(model, tokens(1, 0), tokens(1, T), "causal", "causal")
    forward(tiny_model("encoder-decoder"), tokens(1, S), tokens(1, T), "causal", "bidirectional")
    assert len(calls) == 8 + 2 + 2 * 2 and all(mask is None for mask in calls)


# ---- padding ----

@each_architecture_and_pattern
def test_padding_changes_nothing_whatever_its_amount_and_content(architecture, inputs_attention, targets_attention):
    model, y = tiny_model(architecture), tokens(3, T, seed=1)
    lengths, inputs = [4, 2, 1], tokens(3, 4)
    alone = [forward(model, inputs[b:b + 1, 4 - n:], y[b:b + 1], inputs_attention, targets_attention)
             for b, n in enumerate(lengths)]
    for width in (4, 9):  # the whole ragged batch, padded to the longest and further
        canvas = [tokens(3, width, seed=seed) for seed in (2, 3)]  # two different contents of the padding
        for rows in canvas:
            for b, n in enumerate(lengths):
                rows[b, width - n:] = inputs[b, 4 - n:]
        found = [forward(model, rows, y, inputs_attention, targets_attention, left_padded(lengths, width)) for rows in canvas]
        assert torch.equal(*found), "not even the last bit depends on what stands in the padding"
        assert (found[0] - torch.cat(alone)).abs().max() < 2e-5


@each_pattern
def test_inputs_that_are_all_padding_are_no_inputs_and_give_finite_gradients(inputs_attention, targets_attention):
    model, y = tiny_model(), tokens(2, T)
    logits = forward(model, tokens(2, S), y, inputs_attention, targets_attention, torch.ones(2, S, dtype=torch.bool))
    assert (logits - forward(model, tokens(2, 0), y, "causal", targets_attention)).abs().max() < 2e-5
    logits.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("causal", [True, False])
def test_no_row_of_a_mask_is_empty_which_some_kernels_turn_into_nan(causal):
    for n_query in (1, T, S + T):
        mask, _ = attention_mask(n_query, S + T, causal, torch.ones(2, S, dtype=torch.bool), "cpu")
        assert mask.any(-1).all()


@each_architecture
def test_large_activations_do_not_beat_the_mask(architecture):
    model, y = tiny_model(architecture), tokens(1, T)
    with torch.no_grad():
        for linear in (model.blocks[0].qkv,) if model.encoder is None else (model.encoder[0].qkv, model.blocks[0].cross.kv):
            linear.weight[-16:] *= 1e6  # values so large that any finite mask value leaks
    one, other = tokens(1, S), tokens(1, S)
    other[:, :2] = (one[:, :2] + 1) % V
    pad_mask = left_padded([3], S)
    assert torch.equal(*(forward(model, x, y, "bidirectional", "bidirectional", pad_mask) for x in (one, other)))


# ---- the cache ----

@pytest.mark.parametrize("chunk", [1, 2, 4, 6])
@pytest.mark.parametrize("architecture, lengths", [(name, lengths) for name in ARCHITECTURES for lengths in (None, [5, 2, 0])] +
                         [("decoder-only", "no inputs")])
@pytest.mark.parametrize("inputs_attention", ["causal", "bidirectional"])
def test_decoding_with_the_cache_equals_one_pass(architecture, inputs_attention, lengths, chunk):
    model, y = tiny_model(architecture), tokens(3, T, seed=1)
    inputs = tokens(3, 0 if lengths == "no inputs" else S)
    pad_mask = left_padded(lengths, S) if isinstance(lengths, list) else None
    once = forward(model, inputs, y, inputs_attention, "causal", pad_mask)
    context = model.encode(inputs, pad_mask, inputs_attention)
    pieces = [model.decode(part, context, "causal", extend=True) for part in y.split(chunk, dim=1)]
    assert (torch.cat(pieces, dim=1) - once).abs().max() < 2e-5
    assert context.n_targets == T


@each_architecture
@pytest.mark.parametrize("n_inputs", [0, S, 70])
def test_the_cache_of_a_long_text_grows_by_a_column_a_token_and_changes_nothing(architecture, n_inputs):
    if architecture == "encoder-decoder" and n_inputs == 0:
        pytest.skip("an encoder-decoder needs inputs")
    model, inputs, y = tiny_model(architecture), tokens(3, n_inputs), tokens(3, 150, seed=1)
    pad_mask = left_padded([n_inputs, 2, 0], n_inputs) if n_inputs else None
    context, pieces, sizes = model.encode(inputs, pad_mask), [], []
    for token in y.split(1, dim=1):
        pieces.append(model.decode(token, context, "causal", extend=True))
        sizes.append(context.keys[0].size(2))
    assert (torch.cat(pieces, dim=1) - forward(model, inputs, y, "causal", "causal", pad_mask)).abs().max() < 2e-5
    assert sizes == [(n_inputs if architecture == "decoder-only" else 0) + n for n in range(1, 151)]


def test_steps_with_a_cache_are_compiled_a_few_times_and_no_step_is_compiled_of_its_own(monkeypatch):
    model, counter, graphs = tiny_model(), CompileCounter(), []
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    compile_model(model)
    with torch.no_grad():
        context = model.encode(tokens(3, S))
        for token in tokens(3, 100, seed=1).split(1, dim=1):
            model.decode(token, context, "causal", extend=True)
            graphs.append(counter.frame_count)
    assert graphs[4] == graphs[-1] and context.keys[0].size(2) == S + 100


def test_full_inputs_have_no_cache_and_say_so_before_anything_changes():
    model = tiny_model()
    context = model.encode(tokens(3, S), None, "full")
    with pytest.raises(UserError, match="all at once"):
        model.decode(tokens(3, 2), context, "bidirectional", extend=True)
    assert context.n_targets == 0 and not any(torch.is_tensor(x) for x in context.keys + context.values)


@each_architecture
def test_decoding_leaves_the_context_as_it_was_unless_told_to_extend_it(architecture):
    model, y = tiny_model(architecture), tokens(3, T, seed=1)
    context = model.encode(tokens(3, S), left_padded([5, 2, 0], S))
    first = model.decode(y, context, "bidirectional")
    model.decode(tokens(3, T, seed=2), context, "causal")
    copy = context.repeat(1)
    model.decode(y, copy, "causal", extend=True)
    assert context.n_targets == 0 and copy.n_targets == T
    assert torch.equal(model.decode(y, context, "bidirectional"), first)
    once, twice = (model.decode(y[:, :2], copy, "bidirectional") for _ in range(2))  # behind cached targets, too
    assert torch.equal(once, twice) and copy.n_targets == T


@each_architecture_and_pattern
def test_a_repeated_context_is_the_context_of_repeated_inputs(architecture, inputs_attention, targets_attention):
    model, inputs, pad_mask, y = tiny_model(architecture), tokens(2, S), left_padded([5, 2], S), tokens(6, T, seed=1)
    shared = model.decode(y, model.encode(inputs, pad_mask, inputs_attention).repeat(3), targets_attention)
    for row in range(6):  # rows 0-2 belong to the first input, 3-5 to the second
        b = slice(row // 3, row // 3 + 1)
        alone = forward(model, inputs[b], y[row:row + 1], inputs_attention, targets_attention, pad_mask[b])
        assert (shared[row] - alone[0]).abs().max() < 2e-5
    if architecture == "decoder-only":
        nothing = model.encode(tokens(2, 0)).repeat(3)
        assert model.decode(y, nothing, "causal").shape == (6, T, V)


# ---- the parts ----

@pytest.mark.parametrize("architecture, S_now", [("decoder-only", 0), ("decoder-only", S), ("encoder-decoder", S)])
def test_slots_that_are_fed_the_same_token_can_tell_where_they_stand(architecture, S_now):
    """Rotary angles alone cannot do this: over equal values attention gives the same at every position.

    The code task from scratch, 1,200 steps: without it 4 to 8 % of masked diffusion's programs were right, with it 84 %.
    """
    model, y = tiny_model(architecture), torch.full((1, T), 3)
    logits = forward(model, torch.full((1, S_now), 3), y, "bidirectional", "bidirectional")[0]
    assert min((logits[i] - logits[j]).abs().max() for i in range(T) for j in range(i)) > 0.01


@each_architecture
def test_targets_stand_at_the_same_positions_however_wide_the_inputs_are_padded(architecture):
    model, y = tiny_model(architecture), tokens(2, T, seed=1)
    narrow = forward(model, tokens(2, S), y, "causal", "bidirectional")
    wide = F.pad(tokens(2, S), (40, 0), value=5)
    assert (forward(model, wide, y, "causal", "bidirectional", left_padded([S, S], S + 40)) - narrow).abs().max() < 2e-5


def test_rotary_scores_depend_on_the_distance_only():
    D, rotary = 8, Transformer(V, n_layer=1, width=16, n_head=2).rotary
    q, k = torch.randn(2, D, generator=torch.Generator().manual_seed(0)).double()
    at = lambda x, position: rotate(x[None, None, None], [part.double() for part in rotary(position, 1)])
    score = lambda m, n: float((at(q, m) * at(k, n)).sum())
    for distance in (-7, -1, 0, 1, 7):
        frequencies = 10000.0 ** (-np.arange(0, D, 2) / D)
        pairs = lambda x: x[::2].numpy() + 1j * x[1::2].numpy()
        closed_form = (pairs(q) * pairs(k).conj() * np.exp(1j * distance * frequencies)).real.sum()
        for n in (7, 50, 1000):
            assert abs(score(n + distance, n) - closed_form) < 1e-3  # float32 angles of position 1000
    assert abs(score(3, 0) - score(0, 0)) > 0.01
    for first, second, both in zip(rotary(0, 4), rotary(4, 3), rotary(0, 7)):
        assert torch.equal(torch.cat((first, second)), both)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2 ** -5)])
def test_rotation_is_that_of_complex_numbers_and_so_is_its_gradient(dtype, tolerance):
    cos, sin = turn = Transformer(V, n_layer=1, width=48, n_head=2).rotary(-3, 7)
    x, found = torch.randn(2, 2, 7, 24, generator=torch.Generator().manual_seed(0)).to(dtype), []

    def by_complex(x):
        z = torch.view_as_complex(x.float().unflatten(-1, (12, 2))) * (cos + 1j * sin)
        return torch.view_as_real(z).flatten(-2)
    for function in (lambda x: rotate(x, turn), by_complex):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        (y ** 3).sum().backward()
        found.append(torch.stack((y.detach(), leaf.grad)).float())
        assert y.dtype == dtype or function is by_complex
    assert all((a - b).abs().max() < tolerance * b.abs().max() for a, b in zip(*found))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2 ** -5)])
def test_rms_norm_has_the_values_and_the_gradient_of_its_formula(dtype, tolerance):
    x, upstream = (torch.randn(50, 3, 32, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    x[1] = 1e-2 * x[1]  # where an epsilon of the usual size, 1e-6, would count
    found = []
    for function in (rms_norm, lambda x: (x.double() / x.double().square().mean(-1, keepdim=True).sqrt()).to(dtype)):
        leaf = x.clone().requires_grad_()
        y = torch.stack([function(part.squeeze(1)) for part in leaf.split(1, dim=1)], dim=1)  # rows with gaps between them
        y.backward(upstream)
        found.append(torch.stack((y.detach(), leaf.grad * x.float().square().mean(-1, keepdim=True).sqrt())).float())
    assert (found[0] - found[1]).abs().max() < tolerance
    assert torch.autograd.gradcheck(rms_norm, torch.tensor([[-1.0, 0.5, 2.0]], dtype=torch.float64, requires_grad=True))


def test_rms_norm_of_nothing_is_nothing_without_a_gradient_and_its_neighbours_notice_nothing():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    holes = x.clone().index_fill_(0, torch.tensor([1, 3]), 0.0).requires_grad_()
    whole = x.clone().requires_grad_()
    y, expected = rms_norm(holes), rms_norm(whole)
    (y ** 3).sum().backward()
    (expected ** 3)[::2].sum().backward()
    assert torch.equal(y[::2], expected[::2]) and torch.equal(holes.grad[::2], whole.grad[::2])
    assert not y[1::2].any() and not holes.grad[1::2].any()
    broken = rms_norm(holes.detach().index_fill(0, torch.tensor([0]), math.nan))
    assert broken[0].isnan().all() and not broken[1].any(), "a run that diverges must be seen to"
    assert rms_norm(x[:0]).shape == (0, 8)


@pytest.mark.parametrize("size, n_layer, width, n_head", [("base", 12, 768, 12), ("large", 24, 1024, 16), ("xl", 24, 2048, 32),
                                                          ("3x96x4", 3, 96, 4), ("4X128X4", 4, 128, 4)])
def test_sizes_by_name_and_by_shape(size, n_layer, width, n_head):
    assert shape_of(size) == (n_layer, width, n_head)


def test_parameter_counts_are_those_of_the_paper():
    counted = Transformer(V, 3, 32, 4).n_params()
    assert counted == V * 32 + 3 * 12 * 32 * 32  # tied embedding; 4 C^2 of attention and 8 C^2 of MLP a layer
    assert Transformer(V, 3, 32, 4, "encoder-decoder").n_params() == counted + 3 * (12 + 4) * 32 * 32  # and 4 C^2 across
    backbones = {name: n_layer * 12 * width * width for name, (n_layer, width, _) in SIZES.items()}
    assert round(backbones["base"] / 1e6) == 85
    assert round((backbones["base"] + 256_000 * 768) / 1e6, -1) == 280  # with the PaLM vocabulary, section 4.2
    assert round((backbones["xl"] + 256_000 * 2048) / 1e9, 1) == 1.7


@each_architecture
def test_flops_are_what_pytorch_counts_in_the_matrix_products(architecture):
    def counted(run, *args):
        with FlopCounterMode(display=False) as counter:
            result = run(*args)
        return result, sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))

    model, inputs, y = tiny_model(architecture), tokens(3, S), tokens(3, T)
    context, n = counted(model.encode, inputs)
    assert n == flops(model.shape, inputs.numel(), 0) > 0
    assert counted(model.decode, y, context, "bidirectional")[1] == flops(model.shape, 0, y.numel())


@pytest.mark.parametrize("size", ["bas", "", "4x128", "4x128x4x1", "0x128x4", "4x-128x4", "4x128x0", "axbxc", "4x130x4",
                                  "4x12x4", "4.5x128x4"])
def test_impossible_sizes_are_user_errors(size):
    with pytest.raises(UserError, match="size="):
        shape_of(size)


@pytest.mark.parametrize("architecture, size", [(name, size) for name in ARCHITECTURES for size in ("4x96x3", "tiny", "mini")] +
                         [("decoder-only", "base")])
def test_an_untrained_model_of_any_width_starts_near_log_v(architecture, size):
    """Without the factor 1/C in logits() base starts at 14.6 nats, 6.3 above: every slot echoes the token that it was fed."""
    n_layer, width, n_head = shape_of(size)
    torch.manual_seed(0)
    model = Transformer(4096, n_layer, width, n_head, architecture)
    with torch.no_grad():
        logits = model.decode(torch.randint(4096, (4, 16)), model.encode(torch.randint(4096, (4, 16))), "bidirectional")
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(4096, (4 * 16,)))
    assert -0.5 < loss - math.log(4096) < 1.5


@each_architecture
def test_the_residual_stream_of_an_untrained_model_does_not_grow_with_depth(architecture):
    power = {2: [], 12: []}  # layers -> mean square of what encode and decode end with
    for n_layer, found in power.items():
        torch.manual_seed(0)
        model = Transformer(V, n_layer, 64, 4, architecture)
        for stack in filter(None, (model.encoder, model.blocks)):
            stack[-1].register_forward_hook(lambda module, args, result, found=found: found.append(result[0].square().mean()))
        forward(model, tokens(16, 1), tokens(16, 1, seed=1), "causal", "causal")  # one column: attention averages nothing away
    assert all(0.8 < deep / flat < 1.25 and deep < 3.1 for flat, deep in zip(*power.values()))


@each_architecture_and_pattern
def test_vectors_take_the_place_of_the_tokens_that_they_are_the_embedding_of(architecture, inputs_attention, targets_attention):
    model, inputs, y, pad_mask = tiny_model(architecture), tokens(3, S), tokens(3, T, seed=1), left_padded([5, 2, 0], S)
    expected = forward(model, inputs, y, inputs_attention, targets_attention, pad_mask)
    found = forward(model, inputs, model.embedding(y), inputs_attention, targets_attention, pad_mask)
    assert torch.equal(found, expected)


def test_only_a_vector_width_adds_tensors_and_they_are_noisy():
    plain, noisy = tiny_model(), tiny_model(vector_width=3)
    assert plain.noisy is None and plain.shape["vector_width"] == 0 and noisy.shape["vector_width"] == 3
    added = noisy.state_dict().keys() - plain.state_dict().keys()
    assert added == {"noisy.table.weight", "noisy.vectors_in.weight", "noisy.level_in.weight"}
    assert noisy.n_params() - plain.n_params() == V * 3 + 2 * 3 * 16 + 16 * 16


def test_noised_vectors_enter_linearly_beside_waves_of_the_level():
    noisy = tiny_model(vector_width=3).noisy
    z, x_hat = torch.randn(2, 4, T, 3, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.0, 0.3, 0.7, 1.0])
    found = noisy(z, x_hat, level).detach().numpy()
    vectors_in, level_in = (layer.weight.detach().double().numpy() for layer in (noisy.vectors_in, noisy.level_in))
    for b in range(4):
        waves = [f(k * math.pi * float(level[b])) for f in (math.cos, math.sin) for k in range(1, 9)]
        expected = np.concatenate((z[b], x_hat[b]), axis=-1) @ vectors_in.T + level_in @ waves
        assert abs(found[b] - expected).max() < 1e-5
    levels = noisy(z[:1].expand(101, -1, -1), x_hat[:1].expand(101, -1, -1), torch.linspace(0, 1, 101))[:, 0]
    assert torch.cdist(levels, levels).add(torch.eye(101)).min() > 1e-3, "no two levels look alike, not even 0 and 1"


def test_dropout_acts_in_training_only():
    model, inputs, y = tiny_model(dropout=0.5), tokens(2, S), tokens(2, T)
    once, again = (forward(model, inputs, y, "causal", "causal") for _ in range(2))
    assert torch.equal(once, again)
    assert torch.equal(once, forward(tiny_model(), inputs, y, "causal", "causal"))
    model.train()
    once, again = (forward(model, inputs, y, "causal", "causal") for _ in range(2))
    assert (once - again).abs().max() > 0.1


# ---- speed must not change the numbers ----

def batch_with_padding(device="cpu"):
    return Batch(tokens(4, S), left_padded([5, 3, 2, 0], S), tokens(4, T, seed=1) % (V - 1)).to(device)  # V - 1 is MASK


def loss_and_gradients(model, process, batch, nats=cross_entropy):
    model.zero_grad()
    loss = process.loss(model, batch, Noise(0, "train", 0, range(4)), nats).total
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


@each_architecture_and_pattern
def test_bfloat16_autocast_is_finite_and_near_float32(architecture, inputs_attention, targets_attention):
    model, batch = tiny_model(architecture), batch_with_padding()
    exact = forward(model, batch.inputs, batch.targets, inputs_attention, targets_attention, batch.pad_mask)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = forward(model, batch.inputs, batch.targets, inputs_attention, targets_attention, batch.pad_mask)
    assert rounded.dtype == torch.bfloat16 and 0 < (rounded - exact).abs().max() < 0.15


@pytest.mark.parametrize("architecture, inputs_attention", [("decoder-only", "causal"), ("decoder-only", "bidirectional"),
                                                            ("decoder-only", "full"), ("encoder-decoder", "bidirectional")])
@pytest.mark.parametrize("process", [Uniform(V - 2), Absorbing(V - 1), Gaussian(8, self_condition=1.0)],
                         ids=["uniform", "absorbing", "gaussian"])
def test_losses_and_gradients_in_bfloat16_are_near_those_in_float32(architecture, process, inputs_attention):
    process = dataclasses.replace(process, inputs_attention=inputs_attention)
    model, batch = tiny_model(architecture, vector_width=width_of(process)), batch_with_padding()
    exact_loss, exact = loss_and_gradients(model, process, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, process, batch)
    assert abs(loss - exact_loss) < 0.02 * exact_loss
    for name, g in gradients.items():
        assert (g - exact[name]).norm() < 0.1 * exact[name].norm(), name


def compiled(model, **options):
    """Compile the parts of the model, as compile_model() but with more options; return the cross-entropy, likewise."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, **options))
        compile_model(model)
        return torch.compile(cross_entropy)


def compiled_equals_eager(process, batch, tolerance, backend="inductor", architecture="decoder-only"):
    model = tiny_model(architecture, vector_width=width_of(process)).to(batch.inputs.device)
    loss, gradients = loss_and_gradients(model, process, batch)
    names = list(model.state_dict())
    nats = compiled(model, backend=backend)
    fast_loss, fast_gradients = loss_and_gradients(model, process, batch, nats)
    assert list(model.state_dict()) == names, "compiling must not rename tensors"
    assert abs(loss - fast_loss) < tolerance
    for name in gradients:
        assert (gradients[name] - fast_gradients[name]).abs().max() < tolerance, name


@pytest.mark.slow
@each_architecture
def test_the_compiler_traces_the_same_loss_and_gradients(architecture):
    """Graph capture and its derivative, without code generation: fast, and needs no C++ compiler."""
    compiled_equals_eager(Uniform(V - 2), batch_with_padding(), 1e-5, "aot_eager", architecture)


@pytest.mark.slow
def test_compiled_equals_eager_on_one_batch():
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("torch.compile on a CPU needs a C++ compiler (g++ or clang++)")
    torch.manual_seed(0)
    model, batch = Transformer(V, n_layer=1, width=16, n_head=2), batch_with_padding()
    torch._dynamo.reset()
    with torch.no_grad():  # the backward pass would double the 15 s that the compiler takes
        context = model.encode(batch.inputs, batch.pad_mask, "bidirectional")
        fast_context = torch.compile(model.encode)(batch.inputs, batch.pad_mask, "bidirectional")
        logits = model.decode(batch.targets, context, "bidirectional")
        fast_logits = torch.compile(model.decode)(batch.targets, fast_context, "bidirectional")
    assert (logits - fast_logits).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("process", [Autoregressive(V - 1, V - 3, V - 2), Uniform(V - 2), Absorbing(V - 1),
                                     Uniform(V - 2, inputs_attention="full")])
def test_every_part_is_one_graph_and_is_not_compiled_again_after_the_first_step(process):
    model, counter, graphs = tiny_model(), CompileCounter(), []
    nats = compiled(model, backend=counter, fullgraph=True)
    for step in range(4):
        batch = batch_with_padding()._replace(pad_mask=None)
        model.train()
        process.loss(model, batch, Noise(0, "train", step, range(len(batch.inputs))), nats).total.backward()
        model.eval()
        with torch.no_grad():
            process.loss(model, batch, Noise(0, "valid", 0, range(len(batch.inputs))), nats)
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[-1]


@pytest.mark.slow
@pytest.mark.parametrize("process", [Autoregressive(V - 1, V - 3, V - 2), Uniform(V - 2)])
def test_inputs_of_many_lengths_take_two_compilations(process):
    model, counter, graphs = tiny_model().train(), CompileCounter(), []
    nats = compiled(model, backend=counter, fullgraph=True)
    for n in (8, 16, 24, 32, 40):
        batch = Batch(tokens(4, n), left_padded([n, 3, 2, 0], n), tokens(4, T, seed=1) % (V - 1))
        process.loss(model, batch, Noise(0, "train", 0, range(4)), nats).total.backward()
        graphs.append(counter.frame_count)
    assert graphs[0] < graphs[1] == graphs[-1]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("process", [Autoregressive(V - 1, V - 3, V - 2), Uniform(V - 2), Absorbing(V - 1), Gaussian(8),
                                     Uniform(V - 2, unroll_temperature=1.0)])
def test_a_training_step_never_waits_for_the_gpu(process):
    model, cuda = tiny_model(vector_width=width_of(process)).cuda(), torch.device("cuda")
    optimizer, tally = torch.optim.AdamW(model.parameters(), fused=True), Tally(cuda)
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first one allocates
        try:
            batch = batch_with_padding().to(cuda)
            with torch.autocast("cuda", torch.bfloat16):
                losses = process.loss(model, batch, Noise(0, "train", step, range(len(batch.inputs))))
            losses.total.backward()
            assert all(p.grad is not None for p in model.parameters())
            tally.add(losses)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("process", [Autoregressive(V - 1, V - 3, V - 2), Uniform(V - 2), Absorbing(V - 1), Gaussian(8),
                                     Uniform(V - 2, inputs_attention="full")])
def test_compiled_equals_eager_on_a_gpu(process):
    compiled_equals_eager(process, batch_with_padding("cuda"), 1e-3)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_cache_is_exact_and_bfloat16_with_a_fused_step_follows_float32():
    model, batch = tiny_model(), batch_with_padding()
    on_cpu = forward(model, batch.inputs, batch.targets, "causal", "causal", batch.pad_mask)
    model, batch = model.cuda(), batch.to("cuda")
    context = model.encode(batch.inputs, batch.pad_mask)
    cached = torch.cat([model.decode(y, context, "causal", extend=True) for y in batch.targets.split(1, dim=1)], dim=1)
    assert (cached.cpu() - on_cpu).abs().max() < 1e-3
    process, losses = Uniform(V - 2), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(2):
        exact, _ = loss_and_gradients(model, process, batch)
        with torch.autocast("cuda", torch.bfloat16):
            loss, gradients = loss_and_gradients(model, process, batch)
        assert abs(loss - exact) < 0.05 * exact and all(torch.isfinite(g).all() for g in gradients.values())
        optimizer.step()
        losses.append(exact)
    assert losses[1] < losses[0]
