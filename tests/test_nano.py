"""nano.py is a second version of the whole method: on the same weights and the same random numbers both must agree."""
import pytest
import torch

import nano
from autoregressive import Autoregressive
from data.dataset import Batch
from diffusion import Uniform
from model import Transformer

EOS, PAD = nano.TOKENS.index("<eos>"), nano.TOKENS.index("<pad>")
AR = Autoregressive(nano.START, EOS, PAD)


class TorchNoise:
    """The random numbers that nano.py draws, behind the methods of engine/noise.py."""

    def __init__(self, n_rows, always_replace=False):
        self.n_rows, self.always_replace = n_rows, always_replace

    def split(self, n):
        return TorchNoise(self.n_rows * n, self.always_replace)

    def uniform(self, *shape):
        return torch.zeros(self.n_rows, *shape) if self.always_replace else torch.rand(self.n_rows, *shape)

    def integers(self, high, *shape):
        return torch.randint(high, (self.n_rows, *shape))

    def categorical(self, logits, temperature):
        if temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial((logits / temperature).softmax(-1).flatten(0, 1), 1).view(logits.shape[:2])


def two_models(seed=0):
    """Return one set of weights twice: in nano.py's model and in model.py's."""
    torch.manual_seed(seed)
    small = nano.Transformer(n_layer=2, width=32, n_head=2)
    large = Transformer(len(nano.TOKENS), 2, 32, 2)
    large.load_state_dict(small.state_dict(), strict=True)
    return small, large


def some(n=6):
    """Return inputs (n, S) and targets (n, T) of nano.py's task, and them as a batch."""
    torch.manual_seed(7)
    inputs, targets = nano.pairs(n)
    return inputs, targets, Batch(inputs, None, targets)


@pytest.mark.parametrize("causal, inputs_attention, attention", [(True, "causal", "causal"),
                                                                 (False, "bidirectional", "bidirectional")])
def test_one_joint_pass_gives_the_logits_of_encode_and_decode(causal, inputs_attention, attention):
    small, large = two_models()
    inputs, y, _ = some()
    logits = large.decode(y, large.encode(inputs, attention=inputs_attention), attention)
    assert torch.allclose(small(inputs, y, causal), logits, atol=1e-5) and logits.std() > 0.1


def test_fresh_weights_are_drawn_at_the_same_scales():
    torch.manual_seed(0)
    small = nano.Transformer().state_dict()
    n_layer, width = sum("qkv" in name for name in small), small["embedding.weight"].size(1)
    large = Transformer(len(nano.TOKENS), n_layer, width, 4).state_dict()
    assert small.keys() == large.keys()
    assert all(abs(small[name].std() / large[name].std() - 1) < 0.05 for name in small)


def test_the_ar_loss_is_the_same():
    small, large = two_models()
    inputs, x0, batch = some()
    assert torch.allclose(nano.ar_loss(small, inputs, x0), AR.loss(large, batch, None).total, atol=1e-5)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_same_tokens_are_corrupted(t):
    _, x0, _ = some()
    levels = torch.full((len(x0),), t)
    torch.manual_seed(1)
    xt = nano.corrupt(x0, levels)
    torch.manual_seed(1)
    assert torch.equal(xt, Uniform(nano.N_NOISE).corrupt(x0, levels, TorchNoise(len(x0))))
    assert xt.max() < nano.N_NOISE and (t == 0) == torch.equal(xt, x0)


def test_the_diffusion_loss_and_its_gradient_are_the_same():
    small, large = two_models()
    inputs, x0, batch = some()
    torch.manual_seed(2)
    loss = nano.diffusion_loss(small, inputs, x0)
    torch.manual_seed(2)
    other = Uniform(nano.N_NOISE).loss(large, batch, TorchNoise(len(x0))).total
    assert torch.allclose(loss, other, atol=1e-5)
    loss.backward()
    other.backward()
    for (name, p), q in zip(small.named_parameters(), large.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-5), name


@pytest.mark.parametrize("options", [{}, {"n_steps": 4, "temperature": 1.0, "n_samples": 3}])
def test_every_draft_of_the_decoder_is_the_same(options):
    small, large = two_models()
    inputs, x0, batch = some()
    torch.manual_seed(3)
    drafts = nano.generate(small, inputs, **options)
    torch.manual_seed(3)
    others = list(Uniform(nano.N_NOISE).generate(large, batch, TorchNoise(len(x0), always_replace=True), **options))
    assert len(drafts) == len(others) == options.get("n_steps", 10) + 1 and all(map(torch.equal, drafts, others))
    assert len({tuple(draft.flatten().tolist()) for draft in drafts}) > 1


def test_ar_writes_the_same():
    small, large = two_models()
    inputs, _, batch = some()
    *_, text = AR.generate(large, batch, TorchNoise(len(inputs)))
    other = nano.ar_generate(small, inputs)
    ends = [row.index(EOS) + 1 if EOS in row else nano.T for row in text.tolist()]  # nano.py goes on after <eos>
    assert all(torch.equal(a[:end], b[:end]) for a, b, end in zip(text, other, ends))


def test_the_task_reads_every_number_and_fits_its_canvas():
    assert " ".join(nano.words(342_017)) == "three hundred forty two thousand seventeen"
    assert nano.words(0) == [] and nano.words(910) == ["nine", "hundred", "ten"] and nano.words(20) == ["twenty"]
    assert max(len(nano.words(n)) for n in range(1, 10 ** nano.S)) == nano.T - 1
    inputs, targets = nano.pairs(500)
    assert inputs.shape == (500, nano.S) and targets.shape == (500, nano.T) and targets.max() < nano.N_NOISE
    assert len(targets.unique(dim=0)) == 500 and ((targets == EOS).sum(dim=1) == 1).all()


@pytest.mark.slow
def test_both_kinds_of_training_learn_and_the_transfer_is_a_gain_from_the_first_steps(capsys):
    torch.manual_seed(0)
    inputs, targets = nano.pairs(1200)
    ar, scratch, ar2diff = (nano.Transformer(n_layer=2, width=64, n_head=2) for _ in range(3))
    nano.train([ar], nano.ar_loss, nano.ar_generate, inputs, targets, n_steps=120)
    ar2diff.load_state_dict(ar.state_dict())
    write = lambda *args: nano.generate(*args, n_samples=1)[-1]
    nano.train([scratch, ar2diff], nano.diffusion_loss, write, inputs, targets, n_steps=64)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    of_ar, of_diffusion = rows[:5], rows[5:]
    assert float(of_ar[0][1]) > 3 and float(of_ar[-1][1]) < 1.5, "blind guesses cost log 40 = 3.7"
    first_pass_and_second = [(float(row[1]), float(row[3])) for row in of_diffusion]
    assert first_pass_and_second[-1][0] < first_pass_and_second[0][0] and first_pass_and_second[-1][1] < 4
    assert all(with_ar < without for without, with_ar in first_pass_and_second[2:])
