"""Random numbers that are a pure function of (seed, stream, step, index of the sequence in the global batch).

They do not depend on rank, world size, batch split or device, so 1 x 8, 2 x 4 and accumulated runs see the same data and the
same noise, resuming is exact, and a sample does not change with the batch it is drawn in. numpy's counter-based Philox
(Salmon et al. 2011) gives every sequence a generator of its own at no cost in state.
"""
import numpy as np
import torch

STREAMS = {"train": 0, "valid": 1, "generate": 2, "order": 3}


class Noise:
    """Random numbers for a batch of B sequences; row b is a stream of its own. Results are CPU tensors with B rows."""
    n = 1  # rows that split() made of each

    def __init__(self, seed, stream, step, indices):
        self.key = (seed, STREAMS[stream])
        self.counters = [(0, 0, int(index), step) for index in indices]  # Philox counts up in the first word only
        self.rows = [np.random.Generator(np.random.Philox(key=self.key, counter=c)) for c in self.counters]

    def split(self, n):
        """Return noise for n samples of each row, B * n rows in the order of Context.repeat()."""
        child = Noise.__new__(Noise)
        child.key, child.n = self.key, n
        child.counters = [(0, sample + 1 + (old << 20), i, step) for _, old, i, step in self.counters for sample in range(n)]
        child.rows = [np.random.Generator(np.random.Philox(key=child.key, counter=c)) for c in child.counters]
        return child

    def uniform(self, *shape):
        """Return float64 numbers in [0, 1), (B, *shape)."""
        return torch.from_numpy(np.stack([row.random(shape) for row in self.rows]))

    def shared(self, number=0):
        """Return a number in [0, 1) that all sequences of a step share on every rank; each `number` names another one."""
        step = self.counters[0][3]
        return float(np.random.Generator(np.random.Philox(key=self.key, counter=(0, 1 << 62, number, step))).random())

    def stratified(self):
        """Return float64 numbers in [0, 1), (B,): each uniform, together evenly spread over every batch, however it is split.

        One shared draw, shifted by the golden ratio times the index (mod 1): a low-discrepancy sequence, as the usual shift by
        i / B is (arXiv 2107.00630), but a sequence's noise does not come to depend on the size of its batch. The n rows that
        split() makes of a sequence are 1 / n apart.
        """
        first = self.shared()
        return torch.tensor([(first + 0.6180339887498949 * index + row % self.n / self.n) % 1.0
                             for row, (_, _, index, _) in enumerate(self.counters)], dtype=torch.float64)

    def normal(self, *shape):
        """Return standard normal float32 numbers, (B, *shape)."""
        return torch.from_numpy(np.stack([row.standard_normal(shape, dtype=np.float32) for row in self.rows]))

    def integers(self, high, *shape):
        """Return int64 numbers in [0, high), (B, *shape)."""
        return torch.from_numpy(np.stack([row.integers(0, high, shape) for row in self.rows]))

    def categorical(self, logits, temperature):
        """Draw one token per position from softmax(logits / temperature); temperature 0 is the argmax.

        logits (B, T, V) -> (B, T) int64 on their device. By inverting the cumulative distribution in float64, over blocks of 64
        tokens, then within one: the tail is kept, which Gumbel noise in float32 loses (arXiv 2409.02908).
        """
        if temperature < 1e-6:
            return logits.argmax(-1)
        device = logits.device
        logits = logits.cpu() if device.type == "mps" else logits  # MPS has no float64
        u = send(self.uniform(2, logits.size(1)), logits.device)                         # (B, 2, T)
        rows = max(1, (1 << (26 if logits.is_cuda else 20)) // logits.size(-1))  # on a CPU a chunk stays in its cache
        parts = zip(logits.flatten(0, 1).split(rows), u.transpose(1, 2).flatten(0, 1).split(rows))
        return torch.cat([draw(*part, temperature) for part in parts]).view(logits.shape[:2]).to(device)


def draw(logits, u, temperature):
    """Return the tokens (N,) that uniform numbers u (N, 2) choose from softmax(logits (N, V) / temperature)."""
    K = 64 if logits.size(-1) % 64 == 0 else logits.size(-1)
    blocks = torch.softmax(logits.float() / temperature, dim=-1).unflatten(-1, (-1, K))  # (N, V / K, K)
    block = invert(blocks.sum(-1), u[:, 0])                                              # (N,)
    within = blocks[torch.arange(len(block), device=block.device), block]                # (N, K)
    return K * block + invert(within, u[:, 1])


def send(x, device):
    """Return a CPU tensor on the device. A copy to a GPU is queued there, from pinned memory, and the CPU goes on."""
    queued = x.device.type == "cpu" and torch.device(device).type == "cuda"
    return x.pin_memory().to(device, non_blocking=True) if queued else x.to(device)


def invert(weights, u):
    """Return the index (N,) at which the cumulated weights (N, K) pass the share u (N,) of their sum."""
    cumulative = weights.double().cumsum(-1)
    passed = torch.searchsorted(cumulative, u[..., None] * cumulative[..., -1:], right=True)
    return passed.squeeze(-1).clamp(max=weights.size(-1) - 1)  # rounding must not step past the end
