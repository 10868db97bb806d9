r"""Write text with a trained model, AR or diffusion, and watch it being written.

    python sample.py out/ar2diff_code --prompt="multiply each even number by 2 and return the sum" --show_steps
    python sample.py out/ar2diff_code --beside=out/ar_code --prompt="sort the numbers" --trace=trace.html
    python sample.py out/ar2diff_code --infill="def f(data):\n    return___(data,___)"
    python sample.py out/long --prompt="def main(" --n_tokens=512 --decoder=entropy
    echo "ROMEO:" | python sample.py out/shakespeare --temperature=0.8 --top_k=40

\n in --infill is a line end, \\n a backslash and an n; a gap is three underscores or more.
"""
import inspect
import math
import sys
from dataclasses import dataclass, fields, replace

import torch

from beyond.canvases import check_canvases, write
from beyond.decoders import DECODERS
from beyond.infill import infill
from beyond.likelihood import bound_of
from beyond.speculative import Speculative, new_speculative
from beyond.trace import check_trace, trace, write_trace
from data.dataset import Batch, pad_rows
from diffusion import PROCESSES
from engine.cli import check, one_of, parse, run
from engine.devices import choose_compile, choose_dtype, out_of_memory, pick_device
from engine.files import as_text
from engine.noise import Noise
from engine.parallel import compile_model
from pretrained.loading import build_model, load_checkpoint, process_of, tokenizer_of


@dataclass
class GenerateConfig:
    n_samples: int | None = None  # drawn in parallel, the best by model score is kept; default: diffusion 8, entropy and AR 1
    temperature: float | None = None  # 0 = argmax; default: AR 0, uniform and absorbing 0.2, gaussian 1
    top_k: int | None = None  # AR: draw from the k likeliest tokens only; default: from all
    n_steps: int | None = None  # diffusion: decoding steps; default uniform 10, absorbing 32 at most, gaussian 50, entropy 48
    decoder: str | None = None  # diffusion: beyond/decoders.py has them; default: resample (the paper), threshold, euler
    # Options of one decoder; diffusion.py and beyond/decoders.py explain them
    budget: float | None = None  # entropy: nats that tokens settled together may know of each other, at most; default 0.1
    last_temperature: float | None = None  # entropy: temperature falls from --temperature, 0.8, to this; default 0.4
    threshold: float | None = None  # threshold: probability from which a token is revealed; default 0.9
    block_len: int | None = None  # confidence: finish blocks of so many positions from left to right; default: all at once
    drafter: str | None = None  # AR: diffusion checkpoint that drafts what greedy AR verifies: AR's text, in fewer passes
    seed: int = 0  # of the random draws
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "float32"  # of the matrix products: float32, or bfloat16, which speeds up diffusion by wide models
    compile: str = "no"  # torch.compile: no, yes or auto (yes on CUDA); pays for many texts, as the first wait for it


@dataclass(kw_only=True)
class Config(GenerateConfig):
    checkpoint: str  # positional: a .pt file, the out_dir of a run, or a published model (smollm2, a folder, a .gguf file)
    prompt: str | None = None  # the input text; default: standard input
    infill: str | None = None  # diffusion: a text with gaps, "def ___(xs):", that are filled; the rest stays as it is
    gap_len: int = 4  # infill: most tokens of a gap that text follows; each length is tried, the likeliest kept
    target_len: int | None = None  # tokens to write at most; default: as trained
    n_tokens: int | None = None  # tokens to write canvas by canvas, a multiple of the canvas; default: one canvas
    show_steps: bool = False  # print every draft (∎ end, · padding, ▒ masked), the noise first; on a terminal changes are bold
    trace: str | None = None  # file to see it being written: .html (a page), .svg (a picture that moves) or .json (the data)
    beside: str | None = None  # another model that answers the same prompt in the trace, with its default options


SPECULATIVE = {Speculative.name: {Speculative.name: Speculative.generate}}  # beside DECODERS
NOT_OPTIONS = ("decoder", "drafter", "seed", "device", "dtype", "compile")  # of a decoder
# Option -> (lowest, highest) allowed value; where the lowest makes no sense, the smallest number above it.
RANGES = {"n_steps": (1, math.inf), "n_samples": (1, math.inf), "temperature": (0, 1000), "top_k": (0, math.inf),
          "block_len": (0, math.inf), "threshold": (1e-9, 1), "budget": (0, math.inf), "last_temperature": (0, 1000)}


@dataclass
class Writer:
    """A model ready to write: what sample.py and eval.py need of a checkpoint."""
    model: torch.nn.Module
    process: object
    tokenizer: object
    input_len: int
    target_len: int
    device: torch.device
    decoder: str  # its name
    options: dict  # of the decoder
    dtype: torch.dtype = torch.float32  # of the matrix products
    compiled: bool = False
    learned_len: int = 1 << 53  # longest window of text that it was trained on

    def autocast(self):
        """Return the context in which the model computes, as in training."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def drafts(self, batch, noise, **more):
        """Return the drafts (B, T): what it starts from, one of every evaluation of the network, the last is the answer."""
        with self.autocast():
            generate = (DECODERS | SPECULATIVE)[self.process.name][self.decoder]
            return list(generate(self.process, self.model, batch.to(self.device), noise, **self.options, **more))

    def bound(self, batch, noise, n_draws):
        """Return an upper bound of -log p(x0 | inputs), (B,) nats, by n_draws noise levels; exact for AR."""
        with self.autocast():
            return bound_of(self.process)(self.process, self.model, batch.to(self.device), noise, n_draws)


def choose_decoder(config, process):
    """Return (name, options) of the decoder: the flags that were given, else its defaults. Raises UserError."""
    decoders = (DECODERS | SPECULATIVE)[process.name]
    names = [f.name for f in fields(GenerateConfig) if f.name not in NOT_OPTIONS]
    takes = {name: {option: p.default for option, p in inspect.signature(decoder).parameters.items() if option in names}
             for name, decoder in decoders.items()}
    check(config.decoder is None or process.name in PROCESSES, f"--decoder is not for {process.name} models")
    decoder = one_of("decoder", config.decoder or next(iter(decoders)), decoders)
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    for name, value in given.items():
        owners = [other for other, options in takes.items() if name in options]
        check(owners, f"--{name} is not for {process.name} models; they take --{', --'.join(takes[decoder])}")
        check(decoder in owners, f"--{name} goes with --decoder={' or '.join(owners)}, not with {decoder}")
        if name in RANGES:
            low, high = RANGES[name]
            allowed = f"at least {low}" if high == math.inf else f"{'above' if low else 'at least'} 0 and at most {high}"
            check(low <= value <= high, f"--{name}={value} must be {allowed}")
    return decoder, takes[decoder] | given


def load_writer(path, config, target_len=None):
    """Load a checkpoint and check the decoding flags against its process. Raises UserError."""
    one_of("dtype", config.dtype, ("float32", "bfloat16"))
    checkpoint = load_checkpoint(path)
    process, tokenizer, device = process_of(checkpoint), tokenizer_of(checkpoint), pick_device(config.device)
    device = torch.device("cpu") if device.type == "mps" else device  # samplers and bounds compute in float64, MPS has none
    if config.drafter:
        process = new_speculative(config.drafter, checkpoint, device)
    decoder, options = choose_decoder(config, process)
    dtype = choose_dtype(config.dtype, device, checkpoint["shape"]["width"])
    check(dtype == torch.float32 or not config.drafter, "--drafter writes what AR alone would, but for rounding, and bfloat16 "
                                                        "rounds too much: leave out --dtype")
    check(0 <= config.seed < 1 << 32, f"--seed={config.seed} must be at least 0 and below 2^32")
    check(target_len is None or target_len >= 1, f"--target_len={target_len} must be at least 1")
    longest = checkpoint["target_len"]
    check(target_len is None or target_len <= longest or (process.name == "ar" and checkpoint["input_len"] == 0),
          f"--target_len={target_len} is longer than the canvas the model was trained on, {longest} tokens")
    model, compiled = build_model(checkpoint, device).eval(), choose_compile(config.compile, device)
    if compiled:
        compile_model(model)
        if config.drafter:
            compile_model(process.drafter)
    n_canvases = checkpoint["config"].get("n_canvases", 1)
    learned = checkpoint["input_len"] + checkpoint["shape"].get("n_positions", n_canvases * longest)
    return Writer(model, process, tokenizer, checkpoint["input_len"], target_len or longest, device, decoder, options, dtype,
                  compiled, learned)


def prompt_batch(writer, prompt, n_tokens=None):
    """Return (writer, batch of one row) for a prompt. Raises UserError when it does not fit the model's input columns."""
    ids, n_new = writer.tokenizer.encode(prompt), n_tokens or writer.target_len
    check(len(ids) <= (writer.input_len or math.inf), f"the prompt has {len(ids)} tokens, the model's canvas holds "
                                                      f"{writer.input_len}; shorten it, or train with a larger --input_len")
    n_columns, n_positions = writer.input_len or len(ids), writer.model.shape.get("n_positions", math.inf)
    check(n_columns + n_new <= n_positions, f"{n_columns} columns of prompt and {n_new} to write are more than this model's "
                                            f"{n_positions} positions")
    if writer.input_len:
        return writer, pad_rows([(ids, [])], writer.tokenizer, writer.input_len, writer.target_len)
    empty, given = torch.zeros(1, writer.target_len, dtype=torch.long), torch.tensor([ids], dtype=torch.long)
    if ids and writer.process.name == "ar":  # a plain AR language model continues a text itself; the others read it
        options = writer.options | {"prefix": given.to(writer.device)}
        return replace(writer, options=options), Batch(empty[:, :0], None, empty)
    return writer, Batch(given, None, empty)


def show(tokenizer, ids, before=None):
    """Return a draft on one line, a line end as an arrow; what differs from the draft `before`, if given, is bold."""
    texts = tokenizer.pieces(ids)
    old = texts if before is None else tokenizer.pieces(before)
    shown = "".join(text if text == was else f"\033[1m{text}\033[0m" for text, was in zip(texts, [*old, *[None] * len(texts)]))
    return shown.replace("\r", "").replace("\n", "↵")


@out_of_memory("--n_samples", "--target_len")
def main(argv=None):
    config = parse(Config, argv)
    check_trace(config)
    writer = load_writer(config.checkpoint, config, config.target_len)
    own = GenerateConfig(seed=config.seed, device=config.device, dtype=config.dtype, compile=config.compile)
    beside = load_writer(config.beside, own, config.target_len) if config.beside else None
    check(writer.process.name not in ("ar", "speculative") or config.infill is None,
          "--infill needs a diffusion model: an autoregressive one cannot look to the right")
    prompt = config.prompt or ""
    if config.prompt is None and config.infill is None:
        prompt = as_text(sys.stdin.buffer.read(), "the prompt on standard input").replace("\r\n", "\n").rstrip("\n")
    if config.n_tokens is not None:
        check(config.infill is None and not config.trace, "--n_tokens goes with neither --infill nor --trace")
        check_canvases(writer, config.n_tokens)
    writer, batch = prompt_batch(writer, prompt, config.n_tokens)
    other = [prompt_batch(beside, prompt)] if beside else []
    noise_of, text = (lambda canvas: Noise(config.seed, "generate", canvas, [0])), writer.tokenizer.decode
    noise = noise_of(0)
    if config.infill is not None:
        drafts, text = infill(writer, batch, noise, config.infill, config.gap_len)
    elif config.trace:
        drafts, facts = trace(writer, batch, noise, config.checkpoint)
        write_trace(config.trace, prompt, [facts, *(trace(*pair, noise, config.beside)[1] for pair in other)])
    else:
        drafts = write(writer, batch, noise_of, config.n_tokens) if config.n_tokens else writer.drafts(batch, noise)
    for each in [writer, *[pair[0] for pair in other]]:  # last, so that nothing precedes an error
        n_prompt, n_new = len(each.tokenizer.encode(prompt)), config.n_tokens or each.target_len
        if n_prompt + n_new > each.learned_len:
            print(f"note: {n_prompt} tokens of prompt and {n_new} to write are more than the {each.learned_len} in a row that "
                  f"this model learned; it gets worse behind them", file=sys.stderr)
    if config.show_steps:
        for number, (draft, before) in enumerate(zip(drafts, [drafts[0], *drafts])):  # 0: what it starts from
            print(f"{number:4d}  {show(writer.tokenizer, draft[0], before[0] if sys.stdout.isatty() else None)}")
        print()
    print(("" if writer.input_len else prompt) + text(drafts[-1][0]))


if __name__ == "__main__":
    run(main)
