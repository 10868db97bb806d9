"""AR2Diff in one file: pretrain a Transformer left to right, keep its weights, turn it into text diffusion.

After "Transfer Learning for Text Diffusion Models" (Han et al. 2024, arXiv 2401.17181), its Figure 2:
                 fed at the targets' places       who sees whom                             loss
    AR           the targets, one place late      each place itself and its left            cross-entropy
    diffusion    the targets, some made random    all each other, but inputs no targets     L1 + L2
In both, logits[:, i] predicts target i, and no weight is added or removed. (Whether inputs see targets the
paper does not say.) The task: read numbers aloud, 42017 -> forty two thousand seventeen, one token a word.

    python nano.py        # 75 seconds on two CPU cores

B texts, S inputs, T targets, L = S + T, C width, H heads, D = C / H, V tokens.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

ONES = ("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
TOKENS = [*"0123456789", *ONES, *TENS, "hundred", "thousand", "<eos>", "<pad>", "<start>"]
S, T, V = 5, 8, len(TOKENS)  # five digits; seven words at most, and <eos>
START = N_NOISE = V - 1  # noise draws from all ids below <start>, which AR alone is fed

def words(n):  # none for 0
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if n >= size:
            return words(n // size) + [name] + words(n % size)
    return [TENS[n // 10 - 2]] + words(n % 10) if n >= 20 else ONES[n - 1:n]

def pairs(n_pairs):
    """Return the digits (n_pairs, S) and the words (n_pairs, T) of so many different numbers."""
    numbers = (1 + torch.randperm(99_999)[:n_pairs]).tolist()
    rows = [[*f"{n:05}", *words(n), "<eos>"] + T * ["<pad>"] for n in numbers]
    ids = torch.tensor([[TOKENS.index(token) for token in row[:S + T]] for row in rows])
    return ids[:, :S], ids[:, S:]

def rms_norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-12)

def waves(places, dim):
    """Return (cos, sin), each (L, dim / 2), of places (L,), wavelengths 2 pi to 2 pi 10,000^(1 - 2/dim)."""
    angles = places[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return angles.cos(), angles.sin()

def rotate(x, rotary):
    """Turn each pair (2i, 2i + 1) of x (B, H, L, D) by its place's angle: scores then depend on distances."""
    a, b, (cos, sin) = x[..., 0::2], x[..., 1::2], rotary
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

class Block(nn.Module):
    def __init__(self, width, n_head, n_layer):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        for name, weight in self.named_parameters():
            n_sums = 2 * n_layer if "out" in name else 1  # so many outputs add up in the residual stream
            nn.init.normal_(weight, std=(n_sums * weight.size(1)) ** -0.5)

    def forward(self, x, rotary, sees):
        qkv = self.qkv(rms_norm(x)).unflatten(-1, (3, self.n_head, -1))            # (B, L, 3, H, D)
        q, k, v = qkv.transpose(1, 3).unbind(2)                                    # 3 x (B, H, L, D)
        q, k = rotate(rms_norm(q), rotary), rotate(rms_norm(k), rotary)  # QK-norm
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)                # (B, H, L, D)
        x = x + self.attention_out(a.transpose(1, 2).flatten(2))                   # (B, L, C)
        return x + self.mlp_out(F.relu(self.mlp_in(rms_norm(x))).square())

class Transformer(nn.Module):
    def __init__(self, n_layer=3, width=96, n_head=4):
        super().__init__()
        self.embedding = nn.Embedding(V, width)  # also the output layer
        nn.init.normal_(self.embedding.weight, std=0.09)
        self.blocks = nn.ModuleList(Block(width, n_head, n_layer) for _ in range(n_layer))

    def forward(self, inputs, y, causal):
        """Return logits (B, T, V) for inputs (B, S) and what is fed at the targets' places, y (B, T)."""
        S, T, C = inputs.size(1), y.size(1), self.embedding.embedding_dim
        row, column = torch.arange(-S, T)[:, None], torch.arange(-S, T)  # inputs ..., -1, targets 0, 1, ...
        sees = column <= row if causal else (column < 0) | (row >= 0)              # (L, L)
        x = rms_norm(self.embedding(torch.cat((inputs, y), dim=1)))                # (B, L, C)
        x[:, S:] += torch.cat(waves(column[S:], C), dim=-1)  # in pure noise, distances would not tell places
        for block in self.blocks:
            x = block(x, waves(column, C // block.n_head), sees)
        return rms_norm(x[:, S:]) @ self.embedding.weight.T * (128 / C)            # (B, T, V), 1 / C as muP

def ar_loss(model, inputs, x0):
    y = F.pad(x0[:, :-1], (1, 0), value=START)                                     # <start>, x0[:, :-1]
    return F.cross_entropy(model(inputs, y, causal=True).mT, x0)                   # of (B, V, T), (B, T)

@torch.no_grad()
def ar_generate(model, inputs):
    y = torch.full((len(inputs), T + 1), START)
    for i in range(T):  # one token after the other, the likeliest (a cache would spare most of the work)
        y[:, i + 1] = model(inputs, y[:, :T], causal=True)[:, i].argmax(-1)
    return y[:, 1:]

def corrupt(x0, t):
    """Replace each token, with probability t (B,), by one drawn uniformly (4.1)."""
    return torch.where(torch.rand(x0.shape) < t[:, None], torch.randint(N_NOISE, x0.shape), x0)

def diffusion_loss(model, inputs, x0):
    """Learn x0 from noised text, and from the model's own guess, since generate() will feed such (4.1)."""
    t = torch.rand(len(x0))  # noise levels, 0 = clean, 1 = pure noise; the model is not told
    logits = model(inputs, corrupt(x0, t), causal=False)
    L1 = F.cross_entropy(logits.mT, x0)  # over all targets, replaced or not; <pad> too: so length is learned
    L2 = F.cross_entropy(model(inputs, logits.argmax(-1), causal=False).mT, x0)  # argmax stops the gradient
    return L1 + L2

@torch.no_grad()
def generate(model, inputs, n_steps=10, temperature=0.2, n_samples=8):
    """Return drafts (B, T), from pure noise to text: each step draws all tokens anew, in parallel (4.1)."""
    inputs = inputs.repeat_interleave(n_samples, dim=0)
    drafts = [torch.randint(N_NOISE, (len(inputs), T))]
    for _ in range(n_steps):
        logits = model(inputs, drafts[-1], causal=False)
        p = (logits / temperature).softmax(-1).flatten(0, 1)                       # (B * n_samples * T, V)
        drafts.append(torch.multinomial(p, 1).view(-1, T))
    score = F.cross_entropy(logits.mT, drafts[-2], reduction="none").mean(1)  # of what the last step read
    best = score.view(-1, n_samples).argmin(1) + torch.arange(0, len(score), n_samples)  # (B,)
    return [draft[best] for draft in drafts]

def train(models, loss_of, write, inputs, targets, n_steps, batch_size=32, lr=3e-3):
    """Train models on the same batches; print how they do on the first 200 pairs, which are held out."""
    optimizer = torch.optim.Adam([p for model in models for p in model.parameters()])
    for step in range(n_steps + 1):
        if step in (0, n_steps // 8, n_steps // 4, n_steps // 2, n_steps):
            losses = [loss_of(model, inputs[:200], targets[:200]) for model in models]
            exact = [(write(model, inputs[:200]) == targets[:200]).all(1).float().mean() for model in models]
            print(f"{step:5}", *(f"{loss:14.3f}{hits:7.0%}" for loss, hits in zip(losses, exact)), flush=True)
        rows = torch.randint(200, len(inputs), (batch_size,))
        optimizer.zero_grad()
        sum(loss_of(model, inputs[rows], targets[rows]) for model in models).backward()
        optimizer.param_groups[0]["lr"] = lr * (1 - step / n_steps)
        optimizer.step()

if __name__ == "__main__":
    torch.manual_seed(0)
    inputs, targets = pairs(10_200)
    ar, scratch, ar2diff = Transformer(), Transformer(), Transformer()
    print(f"steps        AR loss  exact (log V = {torch.tensor(V).log():.2f}; more at first: tied rows echo)")
    train([ar], ar_loss, ar_generate, inputs, targets, n_steps=320)
    ar2diff.load_state_dict(ar.state_dict())  # the transfer: at step 0 worse than a blind guess
    print("steps  scratch L1+L2  exact  AR2Diff L1+L2  exact   (2 log V = 7.48; one sample each; one seed)")
    train([scratch, ar2diff], diffusion_loss, lambda *a: generate(*a, n_samples=1)[-1], inputs, targets, 320)
    print("AR2Diff reads", *(TOKENS[digit] for digit in inputs[0]), "as the best of 8 samples")
    for i, draft in enumerate(generate(ar2diff, inputs[:1])):
        print(f"{i or 'noise':5}", *(f"{TOKENS[token]:9}" for token in draft[0]))
