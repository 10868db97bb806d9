"""What a run checks and settles before its first step: flags, canvas, device, ranks, origin, tokenizer, model, out_dir.

Whatever is wrong is one UserError that names the flag, raised before anything is trained or overwritten.
"""
import ctypes
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from autoregressive import Autoregressive
from checkpoint import build_model, describe, load_checkpoint, tokenizer_of
from config import UserError, check, one_of
from data.dataset import find_folder, read_meta
from data.tokenizer import load_tokenizer
from model import ARCHITECTURES, Transformer, shape_of


def check_config(config):
    """Raise UserError for the first flag that makes no sense."""
    for name in ("steps", "batch_size", "micro_batch_size", "log_every", "eval_every"):
        check(getattr(config, name) >= 1, f"--{name}={getattr(config, name)} must be at least 1")
    for name in ("warmup", "eval_sequences", "weight_decay"):
        check(getattr(config, name) >= 0, f"--{name}={getattr(config, name)} must not be negative")
    check(0 <= config.seed < 1 << 32, f"--seed={config.seed} must be at least 0 and below 2^32")
    check(0 < config.lr < math.inf, f"--lr={config.lr} must be above 0")
    check(0 <= config.beta2 < 1, f"--beta2={config.beta2} must be in [0, 1)")
    check(config.grad_clip > 0, f"--grad_clip={config.grad_clip} must be above 0")
    check(0 <= config.dropout < 1, f"--dropout={config.dropout} must be in [0, 1)")
    check(config.input_len is None or config.input_len >= 0, f"--input_len={config.input_len} must not be negative")
    check(config.target_len is None or config.target_len >= 1, f"--target_len={config.target_len} must be at least 1")
    one_of("schedule", config.schedule, ("cosine", "constant"))
    one_of("too_long", config.too_long, ("error", "drop"))


def canvas(config):
    """Return (input_len, target_len): the flags, else what the data folder recommends, else 64 + 64."""
    _, meta = read_meta(config.data)
    input_len = meta.get("input_len", 64) if config.input_len is None else config.input_len
    return input_len, meta.get("target_len", 64) if config.target_len is None else config.target_len


def pick_device(name):
    """Return the torch.device for auto, cpu, cuda or mps. Raises UserError for one that this machine lacks."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    one_of("device", name, ["auto", *available])
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    check(available[name], f"--device={name}: this machine has none, or this torch was built without it; --device=auto chooses")
    if name == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    return torch.device(name)


def keep_freed_memory():
    """Let the C library keep what a step frees for the next one, as PyTorch does on a GPU.

    By default glibc returns large tensors to the system, which hands them out again page by page, cleared: an eighth of a small
    training step. The price: the process stays as large as it ever was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: free memory at the end of the heap stays, however much
        mallopt(-4, 0)  # M_MMAP_MAX: tensors come from the heap, in the main thread however large


def choose_dtype(config, device, origin):
    """Return the dtype of the matrix products: the one that --dtype names; with auto bfloat16 where it is faster, else float32.

    Faster: on GPUs that have it; on CPUs with such products from width 192 on (by a fifth to a third there, by a third to a
    half at 384). Raises UserError.
    """
    one_of("dtype", config.dtype, ("auto", "float32", "bfloat16"))
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    check(config.dtype != "bfloat16" or has_bf16, "--dtype=bfloat16: this GPU has none; --dtype=float32, or auto")
    width = origin["shape"]["width"] if origin else shape_of(config.size or "tiny")[1]
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of PyTorch do not tell
    faster = {"cuda": has_bf16, "cpu": width >= 192 and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))}
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and faster.get(device.type))
    return torch.bfloat16 if bf16 else torch.float32


def compiler_fault(device):
    """Return why torch.compile does not work here, None if it does."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a GPU too old for it, ...: every one of its own type
        return str(error).strip().partition("\n")[0] or type(error).__name__


def choose_compile(config, device):
    """Return whether to use torch.compile: as --compile says, with auto on CUDA where its compiler works."""
    one_of("compile", config.compile, ("auto", "yes", "no"))
    if config.compile == "no" or (config.compile == "auto" and device.type != "cuda"):
        return False
    fault = compiler_fault(device)
    check(not fault or config.compile == "auto", f"--compile=yes does not work here ({fault}); --compile=no, or auto")
    if fault and int(os.environ.get("RANK", 0)) == 0:
        print(f"torch.compile does not work here ({fault}): going on without", file=sys.stderr)
    return not fault


@contextmanager
def out_of_memory(*flags):
    """Turn a lack of memory into a UserError that names the flags to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # PyTorch has many ways to say it, most of them RuntimeErrors
        words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(word in str(error) for word in words):
            raise
        raise UserError(f"out of memory; lower {' or '.join(flags)}") from error


def start_ranks(config):
    """Return (rank, world, device), joining the process group when started by torchrun."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    check(config.batch_size % world == 0, f"--batch_size={config.batch_size} is not divisible by {world} ranks")
    per_rank = config.batch_size // world
    micro = min(config.micro_batch_size, per_rank)
    check(per_rank % micro == 0, f"--batch_size={config.batch_size} over {world} rank(s) is not divisible by "
                                 f"--micro_batch_size={micro}")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        local_rank, n_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        check(local_rank < n_gpus, f"rank {local_rank} has no GPU of its own: torchrun --nproc_per_node={n_gpus} at most")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world == 1:
        check(not config.fsdp, "--fsdp shares a model among several ranks; start them with torchrun --nproc_per_node=N")
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), world, device


def origin_of(config):
    """Return the checkpoint that a run goes on from: its own on --resume, else --init_from's, else None.

    On the text that the checkpoint was trained on, what no flag says of the canvas and the objective is set in config as then.
    """
    if not (config.resume or config.init_from):
        return None
    path = Path(config.out_dir) / "ckpt.pt" if config.resume else config.init_from
    origin = load_checkpoint(path, tokenizer=None if config.resume else config.tokenizer)
    then, now = origin["config"], find_folder(config.data)
    before = find_folder(then["data"]) if then["data"] else None  # GPT-2 was trained elsewhere
    if now and before and now.samefile(before) and read_meta(now)[1]["kind"] == "text":
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


def new_ar(config, tokenizer, origin):
    """Return the AR process that fits the model: an encoder's inputs see both ways; GPT-2 starts from EOS, not MASK."""
    is_gpt2 = origin is not None and origin["shape"].get("flavour") == "gpt2"
    inputs_attention = "causal" if architecture_of(config, origin) == "decoder-only" else "bidirectional"
    return Autoregressive(tokenizer.eos if is_gpt2 else tokenizer.mask, tokenizer.eos, tokenizer.pad, inputs_attention)


def start_model(config, process, tokenizer, origin, device):
    """Return the model of the checkpoint `origin`, or without one a fresh model of --size (default: tiny)."""
    architecture = architecture_of(config, origin)
    if architecture == "encoder-decoder":
        check(canvas(config)[0] > 0, "an encoder-decoder needs inputs: set --input_len above 0")
        check(process.inputs_attention != "full", "--inputs_attention=full: in an encoder-decoder inputs never see targets")
    if origin is None:
        return Transformer(tokenizer.vocab_size, *shape_of(config.size or "tiny"), architecture, process.vector_width,
                           config.dropout).to(device)
    shape = tuple(origin["shape"][key] for key in ("n_layer", "width", "n_head"))
    check(config.size is None or shape_of(config.size) == shape,
          f"--size={config.size} differs from the checkpoint's {'x'.join(map(str, shape))}; leave --size out")
    length = sum(canvas(config)) + (process.shift is not None)  # shifted: one slot more is fed
    n_positions = origin["shape"].get("n_positions", math.inf)
    check(length <= n_positions, f"--input_len and --target_len make {length} columns, this model has {n_positions} positions")
    return build_model(origin, device, config.dropout)


# Flags that may differ between a run and its resumption. All but one leave the computation as it was, to rounding: more --steps
# prolong a run, but also stretch the cosine (and a teacher's fading), so the learning rate rises again.
FREE_ON_RESUME = {"resume", "out_dir", "init_from", "steps", "log_every", "eval_every", "device", "dtype", "compile",
                  "micro_batch_size", "recompute", "fsdp"}


def open_out_dir(config, process, origin):
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
    check("optimizer" in origin, f"{path} holds no optimizer state; start from it with --init_from={path} instead")
    name = origin["process"]["name"]
    check(name == process.name, f"{path} is a run of the process {name!r}, not {process.name!r}")
    now, then = asdict(config), origin["config"]
    changed = [k for k in now if k not in FREE_ON_RESUME and now[k] != then.get(k)]
    changes = ", ".join(f"--{k} was {then.get(k)}, is {now[k]}" for k in changed)
    check(not changed, f"resuming would not be the same run: {changes}")
    check(origin["process"] == describe(process), f"{path} is a run of {origin['process']}, not of {describe(process)}")
    check(config.steps > origin["step"], f"{path} is at step {origin['step']} already; to go on, raise --steps")
    return out_dir


def best_loss(path):
    """Return the validation loss of best.pt, infinity if there is none yet."""
    return load_checkpoint(path)["best"] if path.exists() else math.inf
