"""Runs generated programs against their tests. Nothing else in this project runs generated code.

Each program gets an interpreter of its own, without environment, site-packages or stdin, and limits of the kernel: processor
time, memory, sizes and number of files, no further process or thread (as root, the program runs as nobody, for root has no such
limit). On Linux it also gets a world of its own, by bubblewrap where that is installed, else by the kernel's namespaces: all
files are read-only but those of a new, small /tmp, there is no network and no other process, and all of it ends with it.

Elsewhere limits are all there is: damage control for what models write unasked, no wall. Run untrusted models in a container
there. Which of both it is, eval.py says: "isolated by namespaces" or "limits only". Reading files is limited by neither.

Processor time judges; wall time, ten times as long, ends what only waits. What ran out of time, or was killed from outside, is
run once more, alone. A pass is proven: only the harness knows a random word, and writes it after the last test returned. No
print, exit or patched assert does that; an object that equals everything can, or a search through the harness's frames.
"""
import builtins
import concurrent.futures
import contextlib
import functools
import inspect
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from engine.cli import UserError, check
from engine.devices import n_cores

TIMEOUT = 5.0  # seconds of processor time; the slowest of MBPP's own programs takes about two
WALL = 10  # wall time, in timeouts
MEMORY = 512 << 20  # bytes of address space


class Result(NamedTuple):
    passed: bool
    reason: str  # "passed", or what went wrong


# The next four functions run in the other interpreter: _SOURCE is what is sent there.
def _hold_path():  # pragma: no cover
    """Reach the standard library through open folders: by its path it is hidden by a new /tmp, or is under /root."""
    sys.path = [f"/proc/self/fd/{os.open(path, os.O_RDONLY)}" for path in sys.path if os.path.isdir(path)]
    for name, module in sys.modules.items():
        if hasattr(module, "__path__"):  # a package that is imported already
            module.__path__ = [f"{path}/{name.replace('.', '/')}" for path in sys.path]


def _isolate(wall):  # pragma: no cover
    """Go on in namespaces of one's own: read-only files, a new /tmp, no network, no other process. Raises OSError."""
    import ctypes
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.geteuid(), os.getegid()

    def call(name, *args):
        if getattr(libc, name)(*args):
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    def fork():
        """Return in the child; the parent waits for it, and ends as it does."""
        child = os.fork()
        if child:
            call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: its memory is not to be read
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os._exit(128 - code if code < 0 else code)  # a signal as shells tell it
    call("unshare", 0x68020000 | (0x10000000 if uid else 0))  # CLONE_NEWNET, NEWPID, NEWIPC, NEWNS; NEWUSER unless root
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        if uid:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    fork()  # the first process of a namespace: whatever it leaves ends with it, and no signal from inside reaches it
    signal.signal(signal.SIGALRM, lambda *_: os._exit(142))  # the first process of a namespace heeds no signal by itself
    signal.alarm(math.ceil(wall) + 1)  # should the parent die
    call("mount", None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
    read_only = (ctypes.c_uint64 * 4)(1)  # struct mount_attr: MOUNT_ATTR_RDONLY
    call("syscall", 442, -1, b"/", 0x8000, read_only, 32)  # mount_setattr, AT_RECURSIVE
    _hold_path()
    call("mount", b"proc", b"/proc", b"proc", 14, None)  # MS_NOSUID | MS_NODEV | MS_NOEXEC
    for place in (b"/run", b"/tmp"):  # sockets of other programs lie there
        call("mount", b"tmpfs", place, b"tmpfs", 6, b"size=64m,nr_inodes=4k")
    os.chdir("/tmp")
    fork()
    if uid:  # root loses its rights when it becomes nobody
        call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        call("capset", (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())


def _limit(seconds, wall, memory, mode):  # pragma: no cover
    """Set the limits of the kernel, as far as this system has them."""
    root = sys.platform == "linux" and os.geteuid() == 0
    if root and mode == "limits":
        _hold_path()
    if os.name != "posix":
        return
    import resource
    signal.alarm(math.ceil(wall) + 1)  # should the parent die, a sleeper still ends (and a busy loop does by RLIMIT_CPU)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # processor time to the millisecond; RLIMIT_CPU counts whole seconds
    if root:
        nobody = 65534
        with contextlib.suppress(OSError):  # root, but without the right to (some containers)
            os.chown(".", nobody, nobody)
            os.setgroups([])
            os.setgid(nobody)
            os.setuid(nobody)
    limits = {"CPU": math.ceil(seconds) + 1, "AS": memory, "FSIZE": 10 << 20, "NOFILE": 64, "CORE": 0, "NPROC": 0}
    for name, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _child(secret, setup, program, tests, mode, *limits):  # pragma: no cover
    """Run the program, then setup and tests in its namespace; report the secret if all of it returned, else the reason."""
    # Local names for what is used after the program ran, for it may have put something else in their place.
    write, leave, settrace, names, originals = os.write, os._exit, sys.settrace, vars(builtins), dict(vars(builtins))
    report = os.dup(1)
    if mode == "namespaces":
        try:
            _isolate(limits[1])
        except OSError as error:
            write(report, f"{secret} {error}".encode())
            leave(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd in (1, 2):
        os.dup2(os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)

    def stop(verdict):
        try:
            write(report, verdict.encode("utf-8", "replace")[:500])
        finally:
            leave(0)  # at once: no atexit, no waiting for threads

    _limit(*limits, mode)
    module = type(sys)("program")  # a real module, not a bare dict: dataclasses and pickle look it up
    sys.modules["program"] = module
    try:
        # Three sources, compiled apart, so that an open quote cannot swallow the tests; optimize=0 keeps every assert.
        sources = {"program": program, "setup": setup, "tests": tests}
        codes = {name: compile(text, name, "exec", dont_inherit=True, optimize=0) for name, text in sources.items()}
        exec(codes["program"], vars(module))
        settrace(None)  # a trace function could jump over the asserts
        names.update(originals)
        exec(codes["setup"], vars(module))  # MBPP's builds trees of the program's own class
        exec(codes["tests"], vars(module))
    except BaseException as error:  # SystemExit and KeyboardInterrupt are no pass either
        stop(f"{type(error).__name__}: {error}".rstrip(": "))
    stop(secret)


_SOURCE = "import builtins, contextlib, math, os, signal, sys\n" + "".join(
    inspect.getsource(function) for function in (_hold_path, _isolate, _limit, _child))
BUBBLEWRAP = ["bwrap", *"--ro-bind / / --dev /dev --remount-ro /dev --proc /proc --size 67108864 --tmpfs /run --size 67108864 "
              "--tmpfs /tmp --unshare-all --die-with-parent --chdir /tmp --".split()]


def _kill(process):
    """Kill the process and all of its group."""
    with contextlib.suppress(OSError):  # nobody left
        os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()


def _wait(process):
    """Wait for a process to end; return the seconds of processor time that it took, 0 where the system does not tell."""
    if not hasattr(os, "wait4"):
        process.wait()
        return 0.0
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def _start(source, report, folder, mode):
    """Start an interpreter on what lies in a file, in a folder; it writes to another file. Raises UserError."""
    # It gets only what it needs to start, and a fixed order of sets and dicts: the same program, the same result.
    env = {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    command = [*BUBBLEWRAP * (mode == "bubblewrap"), sys.executable, "-s", "-S", "-B", "-X", "utf8", "-"]
    try:
        return subprocess.Popen(command, stdin=source, stdout=report, stderr=report, cwd=folder, start_new_session=True,
                                env={**env, "TMPDIR": folder, "PYTHONHASHSEED": "0"})
    except OSError as error:
        raise UserError(f"no program can be started here ({error.strerror}), so nothing was scored") from error


def run_program(program, tests, setup="", timeout=TIMEOUT, mode=None, started=None):
    """Run program, setup and tests (Python source) in a new interpreter -> Result. Raises UserError if there are no tests.

    timeout: seconds of processor time. mode: how it is kept apart; default: mode_here(). started: is called with the process.
    """
    check(tests.strip(), "a program without tests would always pass; give the example its `tests`")
    secret, mode = secrets.token_hex(16), mode or mode_here()
    with (tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as report,
          tempfile.TemporaryDirectory(prefix="ar2diff_", ignore_cleanup_errors=True) if mode == "limits" else
          contextlib.nullcontext("/tmp") as folder):
        arguments = (secret, setup, program, tests, mode, timeout, WALL * timeout, MEMORY)
        source.write(f"{_SOURCE}\n_child(*{arguments!a})\n".encode())
        source.seek(0)
        start = time.monotonic()
        process = _start(source, report, folder, mode)
        timer = threading.Timer(WALL * timeout, _kill, [process])
        timer.start()
        try:
            if started:
                started(process)
            seconds = _wait(process)
        finally:
            timer.cancel()
            _kill(process)
        code = process.returncode
        killed = max(-code, code - 128, 0)  # by the signal of this number
        late = killed == getattr(signal, "SIGPROF", -1) or seconds >= timeout or time.monotonic() - start >= WALL * timeout
        report.seek(0)
        verdict = report.read(1000).decode("utf-8", "replace")  # never more: the program may have found the descriptor
    check(not verdict.startswith(f"{secret} "), f"a program could not be kept apart ({verdict[33:]}), so nothing was scored")
    if late:
        return Result(False, "timeout")
    if verdict == secret:
        return Result(True, "passed")
    ended = f"killed by signal {killed}" if killed else f"ended before its tests did (exit code {code})"
    return Result(False, " ".join(verdict.split()) or ended)


def run_many(jobs, n_workers=None, timeout=TIMEOUT, mode=None):
    """Run (program, tests, setup) triples, n_workers at a time (default: one per core) -> list of Results, in order."""
    running, stopping, mode = set(), [], mode or mode_here()

    def started(process):
        running.add(process)
        if stopping:
            _kill(process)
    once = lambda job: run_program(*job, timeout=timeout, mode=mode, started=started)
    with concurrent.futures.ThreadPoolExecutor(n_workers or n_cores()) as pool:
        try:
            waiting = [pool.submit(once, job) for job in jobs]
            while concurrent.futures.wait(waiting, timeout=0.5).not_done:
                pass  # wake up for signals: one that comes just before a thread begins to wait does not end the wait
            results = [future.result() for future in waiting]
        except BaseException:  # Ctrl-C, say: do not wait for programs that sleep
            stopping.append(True)
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*running]:
                if process.returncode is None:  # else its number may be another's by now
                    _kill(process)
            raise
    return [once(job) if result.reason.startswith(("timeout", "killed")) else result for job, result in zip(jobs, results)]


CANARIES = json.loads(Path(__file__).with_name("canaries.json").read_text(encoding="utf-8"))  # {"good", "bad", "kept apart"}
PLAIN_TESTS = "assert f(1) == 2 and abs(f(-9)) == 8"


@functools.cache
def mode_here():
    """Return the best way to keep programs apart that holds on this machine: bubblewrap, namespaces or limits."""
    linux = sys.platform == "linux"
    ways = ["bubblewrap"] * bool(linux and os.geteuid() and shutil.which("bwrap")) + ["namespaces"] * linux
    probes = [(program, PLAIN_TESTS, "") for program in CANARIES["kept apart"].values()]
    for way in ways:
        with contextlib.suppress(UserError):
            if all(result.passed for result in run_many(probes, mode=way)):
                return way
    return "limits"


def check_canaries(n_workers=None, timeout=1.0):
    """Return how programs are kept apart. Raises UserError unless known-good ones pass and known-bad ones fail."""
    good = CANARIES["good"] | (CANARIES["kept apart"] if mode_here() != "limits" else {})
    programs = good | CANARIES["bad"]
    jobs = [(program, PLAIN_TESTS, "") for program in programs.values()]
    for name, result in zip(programs, run_many(jobs, n_workers, timeout)):
        check(result.passed == (name in good), f"the sandbox does not work on this machine, so no code was scored: the canary "
              f"{name!r} must {'pass' if name in good else 'fail'}, but: {result.reason}")
    return "limits only" if mode_here() == "limits" else "isolated by namespaces"
