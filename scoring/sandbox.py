"""Runs generated programs against their tests. Nothing else in this project runs generated code.

A seat belt against accidents, not a wall against malice: models write endless loops, fork bombs and `os.remove` unasked. But a
program that means harm gets around a guard in its own interpreter: run untrusted models in a container or a virtual machine.
Each program gets:
- an interpreter of its own, in its own session, without environment, site-packages or stdin, and a new folder, deleted after;
- limits of the kernel: processor time, memory, file size (its output is a file too), no core dump, no further process or
  thread. The last does not bind root: as root, the program runs as nobody (who may not write elsewhere either);
- a guard (sys.addaudithook) that ends it at the first attempt to start a process, send a signal, use the network or ctypes, or
  change a file outside its folder. Reading is not limited;
- SIGKILL for its whole process group in the end, pass or not. What got past both limit and guard could leave the group.
Windows has no such limits: the interpreter, the guard and the wall time remain. macOS does not limit memory.

Processor time judges; wall time, ten times as long, ends what only waits. What ran out of time is run once more, alone. A pass
is proven: only the harness knows a random word, and writes it after the last test returned. No print, exit or patched assert
does that. Deceit can: an object that equals everything, or a search through the frames of the harness.
"""
import concurrent.futures
import inspect
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple

from engine.cli import UserError, check
from engine.devices import n_cores

TIMEOUT = 5.0  # seconds of processor time; the slowest of MBPP's own programs takes about two
WALL = 10  # wall time, in timeouts


class Result(NamedTuple):
    passed: bool
    reason: str  # "passed", or what went wrong


# The next three functions run in the other interpreter, where their source is sent: so each imports what it uses.
def _limit(seconds, wall, memory_mb):  # pragma: no cover
    """Set the limits of the kernel, as far as this system has them."""
    import encodings
    import math
    import os
    import sys
    root = sys.platform == "linux" and os.geteuid() == 0
    if root:  # its Python is often under /root, where nobody may not go, except through folders that are open already
        sys.path = [f"/proc/self/fd/{os.open(path, os.O_RDONLY)}" for path in sys.path if os.path.isdir(path)]
        encodings.__path__ = [f"{path}/encodings" for path in sys.path]  # the only package that is imported by now
    try:
        import resource
        import signal
    except ImportError:  # Windows has no resource
        return
    signal.alarm(math.ceil(wall) + 1)  # should the parent die, a sleeper still ends (and a busy loop does by RLIMIT_CPU)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # processor time to the millisecond; RLIMIT_CPU counts whole seconds
    if root:
        nobody = 65534
        try:
            os.chown(".", nobody, nobody)
            os.setgroups([])
            os.setgid(nobody)
            os.setuid(nobody)
        except OSError:  # root, but without the right to (some containers): the guard remains
            pass
    for name, value in {"CPU": math.ceil(seconds) + 1, "AS": memory_mb << 20, "FSIZE": 10 << 20, "CORE": 0, "NPROC": 0}.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (ValueError, OSError):  # macOS refuses some
            pass


def _guard(stop):  # pragma: no cover
    """Call stop(reason) at the first event that a program under test has no business with."""
    import os
    import sys
    realpath, folder, null = os.path.realpath, os.path.realpath("."), os.path.realpath(os.devnull)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    # Beginnings of events: os.ch is chmod, chown, chdir.
    refused = ("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile", "os.kill", "os.ch", "os.mkdir",
               "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime", "os.setxattr", "os.removexattr",
               "signal.pthread_kill", "subprocess.", "socket.", "ctypes.", "_winapi.", "winreg.")

    def outside(path):
        path = realpath(os.fsdecode(path))
        return path != null and os.path.dirname(path) != folder

    def hook(event, args):
        if event == "open":
            bad = not isinstance(args[0], int) and args[2] & writing and outside(args[0])
        elif event in ("os.remove", "os.rename"):  # trailing arguments are directory descriptors, -1 for none
            bad = any(arg != -1 if isinstance(arg, int) else outside(arg) for arg in args)
        else:
            bad = event.startswith(refused)
        if bad:
            stop(f"refused: {event}{args}")
    sys.addaudithook(hook)


def _child(secret, setup, program, tests, *limits):  # pragma: no cover
    """Run the program, then setup and tests in its namespace; report the secret if all of it returned, else the reason."""
    import builtins
    import os
    import sys
    # Local names for what is used after the program ran, for it may have put something else in their place.
    write, leave, settrace, names, originals = os.write, os._exit, sys.settrace, vars(builtins), dict(vars(builtins))
    report = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd in (1, 2):
        os.dup2(os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)

    def stop(verdict):
        try:
            write(report, verdict.encode("utf-8", "replace")[:500])
        finally:
            leave(0)  # at once: no atexit, no waiting for threads

    _limit(*limits)
    module = type(sys)("program")  # a real module, not a bare dict: dataclasses and pickle look it up
    sys.modules["program"] = module
    try:
        # Three sources, compiled apart, so that an open quote cannot swallow the tests; optimize=0 keeps every assert.
        sources = {"program": program, "setup": setup, "tests": tests}
        codes = {name: compile(text, name, "exec", dont_inherit=True, optimize=0) for name, text in sources.items()}
        _guard(stop)
        exec(codes["program"], vars(module))
        settrace(None)  # a trace function could jump over the asserts
        names.update(originals)
        exec(codes["setup"], vars(module))  # MBPP's builds trees of the program's own class
        exec(codes["tests"], vars(module))
    except BaseException as error:  # SystemExit and KeyboardInterrupt are no pass either
        stop(f"{type(error).__name__}: {error}".rstrip(": "))
    stop(secret)


_SOURCE = "".join(inspect.getsource(function) for function in (_limit, _guard, _child))


def _kill(process):
    """Kill the process and all of its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
    except OSError:  # nobody left
        pass


def _wait(process):
    """Wait for a process to end; return the seconds of processor time that it took, 0 where the system does not tell."""
    if not hasattr(os, "wait4"):
        process.wait()
        return 0.0
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def run_program(program, tests, setup="", timeout=TIMEOUT, memory_mb=512):
    """Run program, setup and tests (Python source) in a new interpreter -> Result. Raises UserError if there are no tests.

    timeout: seconds of processor time.
    """
    check(tests.strip(), "a program without tests would always pass; give the example its `tests`")
    secret = secrets.token_hex(16)
    # The interpreter gets only what it needs to start, and a fixed order of sets and dicts: the same program, the same result.
    env = {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    with (tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as report,
          tempfile.TemporaryDirectory(prefix="ar2diff_", ignore_cleanup_errors=True) as folder):
        arguments = (secret, setup, program, tests, timeout, WALL * timeout, memory_mb)
        source.write(f"{_SOURCE}\n_child(*{arguments!a})\n".encode())
        source.seek(0)
        start = time.monotonic()
        try:
            process = subprocess.Popen([sys.executable, "-s", "-S", "-B", "-X", "utf8", "-"], stdin=source, stdout=report,
                                       stderr=report, cwd=folder, env={**env, "TMPDIR": folder, "PYTHONHASHSEED": "0"},
                                       start_new_session=True)
        except OSError as error:
            raise UserError(f"no program can be started here ({error.strerror}), so nothing was scored") from error
        timer = threading.Timer(WALL * timeout, _kill, [process])
        timer.start()
        try:
            seconds = _wait(process)
        finally:
            timer.cancel()
            _kill(process)
        alarmed = hasattr(signal, "SIGPROF") and process.returncode == -signal.SIGPROF  # a few ms before `seconds` says so
        late = alarmed or seconds >= timeout or time.monotonic() - start >= WALL * timeout
        report.seek(0)
        verdict = report.read(1000).decode("utf-8", "replace")  # never more: the program may have found the descriptor
    if late:
        return Result(False, "timeout")
    if verdict == secret:
        return Result(True, "passed")
    return Result(False, " ".join(verdict.split()) or f"ended before its tests did (exit code {process.returncode})")


def run_many(jobs, n_workers=None, timeout=TIMEOUT, memory_mb=512):
    """Run (program, tests, setup) triples, n_workers at a time (default: one per core) -> list of Results, in order.

    What ran out of time is run again when the others are done, alone: the second result counts.
    """
    once = lambda job: run_program(*job, timeout=timeout, memory_mb=memory_mb)
    pool = concurrent.futures.ThreadPoolExecutor(n_workers or n_cores())
    try:
        results = list(pool.map(once, jobs))
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C, do not run the rest first
    return [once(job) if result.reason == "timeout" else result for job, result in zip(jobs, results)]


GOOD = {
    "a right function": "def f(x): return x + 1",
    "imports": "import collections, itertools, math, random, re\ndef f(x): return math.floor(x + 1.5)",
    "prints and a class": "class A:\n    y = 1\nprint('é')\ndef f(x): return x + A.y",
}
BAD = {
    "nothing": "",
    "a wrong result": "def f(x): return x",
    "a syntax error": "def f(x) return x + 1",
    "an endless loop": "def f(x):\n    while True: pass",
    "os._exit(0)": "import os\ndef f(x): os._exit(0)",
    "sys.exit(0)": "import sys\ndef f(x): sys.exit(0)",
    "an exit in a thread": "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\ndef f(x): return x",
    "a printed pass": "print('passed', 'True', 0, flush=True)\ndef f(x): return x",
    "a patched assert": "import builtins\nbuiltins.AssertionError = AssertionError = KeyError\ndef f(x): return x",
    "patched builtins": "import builtins\nbuiltins.exec = builtins.abs = lambda *a: 0\ndef f(x): return x",
    "a new process": "import os\nos.fork()\ndef f(x): return x + 1",
    "a file elsewhere": "open('../canary', 'w')\ndef f(x): return x + 1",
}


def check_canaries(n_workers=None, timeout=1.0, memory_mb=512):
    """Raise UserError unless known-good programs pass and known-bad ones fail, lest a broken sandbox scores all 0 or 100 %."""
    programs = {**GOOD, **BAD}
    jobs = [(program, "assert f(1) == 2 and abs(f(-9)) == 8", "") for program in programs.values()]
    for name, result in zip(programs, run_many(jobs, n_workers, timeout, memory_mb)):
        check(result.passed == (name in GOOD), f"the sandbox does not work on this machine, so no code was scored: the canary "
              f"{name!r} must {'pass' if name in GOOD else 'fail'}, but: {result.reason}")
