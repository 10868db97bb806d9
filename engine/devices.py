"""Which device, which ranks, which dtype, whether to compile: what the flags say, checked against what the machine has."""
import ctypes
import math
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from engine.cli import UserError, check, one_of

MEMINFO = Path("/proc/meminfo")


def n_cores(root="/"):
    """Return how many cores this process may use at once: those it is bound to, less if its control group has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    with suppress(OSError, ValueError):  # version 1
        quotas.append([float(Path(root, f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")])
    with suppress(OSError, IndexError):  # version 2: a group is bound by those above it, too
        own = Path(root, "sys/fs/cgroup") / Path(root, "proc/self/cgroup").read_text().strip().split("::")[1].lstrip("/")
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):  # ValueError: "max", no quota
                quotas.append([float(word) for word in (folder / "cpu.max").read_text().split()])
    return max(1, min([cores, *(int(quota / period) for quota, period in quotas if quota > 0)]))


def pick_device(name):
    """Return the torch.device for auto, cpu, cuda or mps; on a CPU keep freed memory. Raises UserError where it is missing."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    one_of("device", name, ["auto", *available])
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    check(available[name], f"--device={name}: this machine has none, or this torch was built without it; --device=auto chooses")
    if name == "cpu":  # keep what tensors free: glibc gives large pieces back, and faults their pages in anew
        with suppress(OSError, AttributeError):  # another system
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-4, 0), mallopt(-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    return torch.device(name)


def start_ranks(device, batch_size, micro_batch_size, fsdp):
    """Return (rank, world, device), joining the process group when started by torchrun. Raises UserError."""
    said, device = os.environ.get("WORLD_SIZE", "1"), pick_device(device)
    torchrun = said.isdigit() and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    check(said == "1" or torchrun, f"WORLD_SIZE={said!r} is set, but not by torchrun; unset it, or start with torchrun")
    world = int(said)
    micro = max(1, min(micro_batch_size, batch_size // world))
    check(batch_size % (world * micro) == 0, f"--batch_size={batch_size} is not divisible by {world} rank(s) x "
                                             f"--micro_batch_size={micro}")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        local_rank, n_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        check(local_rank < n_gpus, f"rank {local_rank} has no GPU of its own: torchrun --nproc_per_node={n_gpus} at most")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world == 1:
        check(not fsdp, "--fsdp shares a model among several ranks; start them with torchrun --nproc_per_node=N")
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), world, device


def choose_dtype(name, device, width):
    """Return the dtype of the matrix products: the one named; for auto bfloat16 where it is faster, else float32."""
    one_of("dtype", name, ("auto", "float32", "bfloat16"))
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    check(name != "bfloat16" or has_bf16, "--dtype=bfloat16: this GPU has none; --dtype=float32, or auto")
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of PyTorch do not tell
    # On CPUs with such products it is faster from width 192 on: by a fifth to a third there, by a third to a half at 384.
    faster = {"cuda": has_bf16, "cpu": width >= 192 and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))}
    bf16 = name == "bfloat16" or (name == "auto" and faster.get(device.type))
    return torch.bfloat16 if bf16 else torch.float32


def choose_compile(choice, device):
    """Return whether to use torch.compile: for auto on CUDA where its compiler works. Raises UserError."""
    one_of("compile", choice, ("auto", "yes", "no"))
    if choice == "no" or (choice == "auto" and device.type != "cuda"):
        return False
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
        return True
    except Exception as error:  # no C++ compiler, no Triton, a GPU too old for it, ...: every one of its own type
        fault = str(error).strip().partition("\n")[0] or type(error).__name__
    check(choice == "auto", f"--compile=yes does not work here ({fault}); --compile=no, or auto")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"torch.compile does not work here ({fault}): going on without", file=sys.stderr)
    return False


def check_memory(file, n):
    """Raise UserError if n weights as float32 and a model made of them do not fit. Only Linux says what is free."""
    said = re.search(r"MemAvailable: +(\d+)", MEMINFO.read_text() if MEMINFO.exists() else "")
    free = 1024 * int(said[1]) if said else math.inf
    check(8 * n <= free, f"{file}: {n:,} weights need {8e-9 * n:.3g} GB of memory to load, and {1e-9 * free:.3g} GB are free")


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
