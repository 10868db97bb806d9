"""What a run settles before its first step: flags, canvas, origin, tokenizer, model, out_dir.

Whatever is wrong is one UserError that names the flag, raised before anything is trained or overwritten.
"""
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ar2diff import additions, usual
from autoregressive import Autoregressive
from data.dataset import data_hash, find_folder, read_meta
from data.tokenizer import load_tokenizer
from diffusion import PROCESSES
from engine.checkpoint import describe
from engine.cli import UserError, check, one_of
from model import ARCHITECTURES, INPUTS_ATTENTION, Transformer
from pretrained.loading import build_model, load_checkpoint, new_process, process_of, tokenizer_of
from pretrained.published import start_of

# Name -> (layers, width, heads). base, large and xl are the T5.1.1 shapes, which fit the sizes the paper prints.
SIZES = {
    "tiny": (4, 128, 4),      # 0.8M backbone, minutes on a laptop CPU
    "mini": (6, 384, 6),      # 11M, nanoGPT's Shakespeare model
    "base": (12, 768, 12),    # 85M, GPT-2 small
    "large": (24, 1024, 16),  # 302M
    "xl": (24, 2048, 32),     # 1.2B
}


@dataclass
class LoopConfig:
    data: str = "text"  # a folder made by data/prepare.py, by path or by its name in data/prepared
    out_dir: str = "out/run"  # where ckpt.pt, best.pt and metrics.jsonl go
    init_from: str | None = None  # start from: .pt file, out_dir, smollm2, a published folder or .gguf; optimizer fresh
    resume: bool = False  # continue the run in out_dir exactly where its ckpt.pt left it
    tokenizer: str | None = None  # bpe, bytes, gpt2, smollm2, a file or folder; default: the checkpoint's, the data's, or bpe
    input_len: int | None = None  # input columns S, 0 = language model; default: as init_from on its text, the data's, or 64
    target_len: int | None = None  # target columns T, EOS included; default: likewise, 64
    n_canvases: int = 1  # canvases of target_len in each example; one, drawn at random, is learned behind the text before it
    objective: str | None = None  # on text: prefix, span or causal; default: init_from's, else prefix or causal
    too_long: str = "error"  # training examples that do not fit the canvas: error or drop
    steps: int = 1000  # optimizer steps
    batch_size: int = 64  # sequences per optimizer step, over all ranks
    micro_batch_size: int = 64  # sequences per forward pass of one rank; lower it if memory runs out
    lr: float | None = None  # peak learning rate of AdamW; default: 1e-3, from published weights 3e-4
    schedule: str = "cosine"  # cosine (to a tenth of lr) or constant, after the warm-up
    warmup: int = 50  # steps of linear warm-up
    weight_decay: float = 0.1  # on matrices only
    beta2: float = 0.99  # AdamW's second moment decay
    grad_clip: float = 1.0  # largest gradient norm
    log_every: int = 10  # steps between log lines
    eval_every: int = 250  # steps between checkpoints, each followed by a validation
    eval_sequences: int = 256  # validation sequences, always the same ones with the same noise
    seed: int = 0  # of weights, data order and noise
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto (bfloat16 where it is faster, on most GPUs and some CPUs), float32 or bfloat16
    compile: str = "auto"  # auto (on CUDA), yes or no
    fsdp: bool = False  # under torchrun: each rank holds a shard of weights, gradients and moments, not a copy


@dataclass
class ModelConfig:
    size: str | None = None  # tiny, mini, base, large, xl or LAYERSxWIDTHxHEADS (4x128x4); default: the checkpoint's, or tiny
    architecture: str | None = None  # decoder-only or encoder-decoder; default: the checkpoint's, or decoder-only
    dropout: float = 0.0  # share of activations dropped on each residual branch, while training


def shape_of(size):
    """Return (n_layer, width, n_head) for a preset name or a LAYERSxWIDTHxHEADS string. Raises UserError."""
    if size in SIZES:
        return SIZES[size]
    parts = size.lower().split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"size={size!r} is neither one of {', '.join(SIZES)} nor LAYERSxWIDTHxHEADS such as 4x128x4")
    n_layer, width, n_head = map(int, parts)
    if width % n_head or (width // n_head) % 2:
        raise UserError(f"size={size!r}: width {width} must be a multiple of twice the number of heads, {2 * n_head}")
    return n_layer, width, n_head


def check_config(config):
    """Raise UserError for the first flag that makes no sense."""
    for name in ("steps", "batch_size", "micro_batch_size", "log_every", "eval_every", "target_len", "n_canvases"):
        value = getattr(config, name)
        check(value is None or value >= 1, f"--{name}={value} must be at least 1")
    for name in ("warmup", "eval_sequences", "weight_decay", "input_len"):
        value = getattr(config, name)
        check(value is None or value >= 0, f"--{name}={value} must not be negative")
    check(0 <= config.seed < 1 << 32, f"--seed={config.seed} must be at least 0 and below 2^32")
    check(config.lr is None or 0 < config.lr < math.inf, f"--lr={config.lr} must be above 0")
    check(0 <= config.beta2 < 1, f"--beta2={config.beta2} must be in [0, 1)")
    check(config.grad_clip > 0, f"--grad_clip={config.grad_clip} must be above 0")
    check(0 <= config.dropout < 1, f"--dropout={config.dropout} must be in [0, 1)")
    one_of("schedule", config.schedule, ("cosine", "constant"))
    one_of("too_long", config.too_long, ("error", "drop"))


def peak_rate(config, origin):
    """Return the flag, else 1e-3, or 3e-4 for the flavour of published weights: 1e-3 costs SmolLM2 19 of 50 F1 (one run)."""
    return config.lr or (3e-4 if origin and "flavour" in origin["shape"] else 1e-3)


def canvas(config):
    """Return (input_len, target_len): the flags, else what the data folder recommends, else 64 + 64."""
    _, meta = read_meta(config.data)
    input_len = meta.get("input_len", 64) if config.input_len is None else config.input_len
    return input_len, meta.get("target_len", 64) if config.target_len is None else config.target_len


def origin_of(config):
    """Return the checkpoint that a run goes on from: its own on --resume, else --init_from's, else None; on the text that it
    was trained on, what no flag says of the canvas and the objective is set in config as then."""
    if not (config.resume or config.init_from):
        return None
    path = Path(config.out_dir) / "ckpt.pt" if config.resume else config.init_from
    origin = load_checkpoint(path, tokenizer=None if config.resume else config.tokenizer)
    then, now = origin["config"], find_folder(config.data)
    meta = read_meta(now)[1] if now else {}
    if meta.get("kind") == "text" and origin["data"] == data_hash(now, meta):
        config.input_len = then["input_len"] if config.input_len is None else config.input_len
        config.target_len = then["target_len"] if config.target_len is None else config.target_len
        if config.objective is None and (config.input_len == 0) == (then["input_len"] == 0):
            config.objective = then["objective"]
    return origin


def choose_tokenizer(config, origin):
    """Return the tokenizer: that of the checkpoint, the one named, that of the text folder, or bpe, in this order."""
    if origin:
        tokenizer = tokenizer_of(origin)
        check(config.tokenizer in (None, tokenizer.name),
              f"tokenizer mismatch: --tokenizer={config.tokenizer}, but the checkpoint was trained with {tokenizer.name!r}")
        return tokenizer
    _, meta = read_meta(config.data)
    return load_tokenizer(config.tokenizer or meta.get("tokenizer", "bpe"))


def architecture_of(config, origin):
    """Return the architecture: the flag, which must be that of the checkpoint, if there is one; else decoder-only."""
    own = origin["shape"]["architecture"] if origin else "decoder-only"
    architecture = one_of("architecture", config.architecture or own, ARCHITECTURES)
    check(origin is None or architecture == own, f"--architecture={architecture} differs from the checkpoint's, {own}")
    return architecture


def ar_of(config, tokenizer, origin):
    """Return the AR process of the weights: of fresh ones, or of a checkpoint, as its own or as what it was before diffusion.

    An encoder's inputs see both ways. Published weights start as they did (start_of), but behind inputs from a line end: there
    EOS would say that the text is over (of an answer SmolLM2 expects the first token 2.2 nats less).
    """
    is_ar, inputs = origin and origin["process"]["name"] == "ar", {"decoder-only": "causal", "encoder-decoder": "bidirectional"}
    ar = process_of(origin) if is_ar else Autoregressive(tokenizer.mask, tokenizer.eos, tokenizer.pad,
                                                         inputs[architecture_of(config, origin)])
    if origin and "flavour" in origin["shape"]:
        ar.start = tokenizer.encode("\n")[0] if canvas(config)[0] else start_of(tokenizer)
    return ar


# Options of one process, with the range of each that is a number.
RANGES = {"n_unroll": (1, 2), "unroll_temperature": (0, 1000), "vector_width": (2, 1 << 20), "self_condition": (0, 1)}
OPTIONS = (*RANGES, "weighted")


def choose_process(config, tokenizer, origin):
    """Return (process, ar): the diffusion process by the flags, else that of a diffusion checkpoint, else the paper's; and
    the AR process of its weights, whose start token --shift and --ar_weight need. Raises UserError."""
    given = {option: value for option in OPTIONS if (value := getattr(config, option)) is not None}
    is_ar = origin is not None and origin["process"]["name"] == "ar"
    inherited = origin["process"] if origin and not is_ar else {"name": "uniform", **usual(origin)}
    name = one_of("process", config.process or inherited["name"], PROCESSES)
    check(origin is None or is_ar or name == inherited["name"],
          f"{config.init_from or config.out_dir} is a checkpoint of the process {inherited['name']!r}, not {name!r}; "
          f"start from an autoregressive one, or leave --process out")
    inputs_attention = one_of("inputs_attention", config.inputs_attention or inherited["inputs_attention"], INPUTS_ATTENTION)
    options = {option: inherited[option] for option in OPTIONS if option in inherited} | given
    ar = ar_of(config, tokenizer, origin)
    shifted = config.shift if config.shift is not None else inherited.get("shift") is not None
    check(not shifted or architecture_of(config, origin) == "decoder-only",
          "--shift: the targets of an encoder-decoder do not follow its inputs")
    options["shift"] = ar.start if shifted else None
    process = new_process(name, tokenizer, inputs_attention=inputs_attention, **options)
    for option, (low, high) in RANGES.items():
        value = given.get(option, low)
        check(low <= value <= high, f"--{option}={value} must lie between {low} and {high}")
    new, old = options.get("vector_width"), inherited.get("vector_width")
    check(old is None or new == old, f"--vector_width={new} differs from the checkpoint's, {old}")
    needs, has = additions(process)["self_condition"], origin is not None and origin["shape"]["self_condition"]
    check(is_ar or origin is None or needs == has, f"--self_condition={options.get('self_condition')}, but the checkpoint "
          f"{'has' if has else 'lacks'} the tensors of self-conditioning; start from an autoregressive one")
    return process, ar


def start_model(config, process, tokenizer, origin, device):
    """Return the model of the checkpoint `origin`, or without one a fresh model of --size (default: tiny)."""
    architecture = architecture_of(config, origin)
    if architecture == "encoder-decoder":
        check(canvas(config)[0] > 0, "an encoder-decoder needs inputs: set --input_len above 0")
        check(process.inputs_attention != "full", "--inputs_attention=full: in an encoder-decoder inputs never see targets")
    causal = process.inputs_attention == "causal" and describe(process).get("shift") is None and config.objective != "span"
    check(config.n_canvases == 1 or (causal and architecture == "decoder-only"), "--n_canvases wants a decoder-only model, "
          "--inputs_attention=causal, no --shift and no --objective=span: what was written is read causally, as inputs")
    if origin is None:
        return Transformer(tokenizer.vocab_size, *shape_of(config.size or "tiny"), architecture,
                           dropout=config.dropout, **additions(process)).to(device)
    shape = tuple(origin["shape"][key] for key in ("n_layer", "width", "n_head"))
    check(config.size is None or shape_of(config.size) == shape,
          f"--size={config.size} differs from the checkpoint's {'x'.join(map(str, shape))}; leave --size out")
    input_len, target_len = canvas(config)
    shifted = describe(process).get("shift") is not None  # one slot more is fed
    length = input_len + config.n_canvases * target_len + shifted
    n_positions = origin["shape"].get("n_positions", math.inf)
    check(length <= n_positions, f"--input_len and --target_len make {length} columns, this model has {n_positions} positions")
    return build_model(origin, device, config.dropout)


# Flags that may differ between a run and its resumption. All but one leave the computation as it was, to rounding: more --steps
# prolong a run, but also stretch the cosine, so the learning rate rises again.
FREE_ON_RESUME = {"resume", "out_dir", "data", "init_from", "steps", "log_every", "eval_every", "device", "dtype", "compile",
                  "micro_batch_size", "fsdp"}


def open_out_dir(config, process, origin, data):
    """Return out_dir as a Path: it can be written, nothing in it will be lost, and --resume goes on with the same run."""
    out_dir, path = Path(config.out_dir), Path(config.out_dir) / "ckpt.pt"
    check(config.resume or not (path.exists() or (out_dir / "best.pt").exists()),
          f"{out_dir} already holds a run; continue it with --resume, or choose another --out_dir")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "metrics.jsonl").open("a", encoding="utf-8").close()
    except OSError as error:
        raise UserError(f"cannot write to --out_dir={config.out_dir}: {error.strerror}") from error
    if not config.resume:
        return out_dir
    check(origin.get("optimizer"), f"{path} holds no optimizer state; start from it with --init_from={path} instead")
    name = origin["process"]["name"]
    check(name == process.name, f"{path} is a run of the process {name!r}, not {process.name!r}")
    check(origin["data"] == data.hash, f"{path} is a run on data of hash {origin['data']}, {data.path} is of {data.hash} now; "
                                       f"prepare it as it was, or start another run with --init_from={path}")
    now, then = asdict(config), origin["config"]
    changes = [f"--{k} was {then.get(k)}, is {now[k]}" for k in now if k not in FREE_ON_RESUME and now[k] != then.get(k)]
    check(not changes, f"resuming would not be the same run: {', '.join(changes)}")
    check(origin["process"] == describe(process), f"{path} is a run of {origin['process']}, not of {describe(process)}")
    check(config.steps >= origin["step"], f"{path} is at step {origin['step']} already; to go on, raise --steps")
    return out_dir
