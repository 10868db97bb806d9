"""sandbox.py: right programs pass, wrong and harmful ones neither pass nor survive; on Linux each layer alone, too."""
import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from engine.cli import UserError
from engine.devices import n_cores
from scoring import sandbox

TESTS = "assert f(1) == 2\nassert f(2) == 3\ndone = True\n"  # the last line is where a trace function could jump to
RIGHT = "\ndef f(x): return x + 1\n"
WRONG = "\ndef f(x): return x\n"
PYTHON = sys.executable
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks for survivors in /proc and relies on Linux limits")


def survivors(folder):
    """Return the pids of sandboxed processes of the test that has this folder, by the Python that they were started with."""
    pids = []
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if f"{folder}/python".encode() in file.read():
                    pids.append(int(pid))
        except OSError:
            pass
    return pids


@pytest.fixture(autouse=True)
def folder(tmp_path_factory, monkeypatch):
    """A place of its own for the working folders of one test, after which it must be empty and nobody left."""
    path = tmp_path_factory.mktemp("sandbox")
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    if sys.platform == "linux":
        (path / "python").symlink_to(os.path.realpath(sys.executable))
        monkeypatch.setattr(sys, "executable", str(path / "python"))
    yield path
    deadline = time.monotonic() + 2  # what SIGKILL has met may take a moment to be gone
    while (left := survivors(path)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "a process outlived the run that started it"
    assert not list(path.glob("ar2diff_*")), "a working folder was left behind"


def without(monkeypatch, *layers):
    """Take layers of the sandbox away, so that the others have to hold alone."""
    for layer in layers:
        monkeypatch.setattr(sandbox, "_SOURCE", sandbox._SOURCE + f"\ndef {layer}(*arguments): pass\n")


def run(program, tests=TESTS, timeout=5.0, **kwargs):
    return sandbox.run_program(program, tests, timeout=timeout, **kwargs)


MODES = ["limits", *{sandbox.mode_here(), *["namespaces"] * (sandbox.mode_here() != "limits")} - {"limits"}]
each_mode = pytest.mark.parametrize("mode", MODES)
apart = pytest.mark.skipif(MODES == ["limits"], reason="this kernel allows no namespaces")


@each_mode
@pytest.mark.parametrize("program", [
    RIGHT,
    "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int'\ndef f(x): return dataclasses.replace(A(x), x=x+1).x",
    "import codecs, decimal, json, statistics, string, typing\nassert codecs.encode('a', 'rot13') == 'n'" + RIGHT,
    "with open('notes', 'w') as file: print('é', file=file)\nimport os\nos.remove('notes')" + RIGHT,
    "import tempfile\nprint('a lot ' * 10000)\nopen('/dev/null', 'w')" + RIGHT,
    "if __name__ == '__main__': input()" + RIGHT,
    "def f(x):\n    try:\n        raise SystemExit\n    except BaseException:\n        return x + 1",
    "def g(n): return n and 1 + g(n - 1)\ndef f(x): return x + (g(900) == 900)",
    "from __future__ import annotations\nsorted = max = None" + RIGHT,
])
def test_a_right_program_passes(program, mode):
    assert run(program, mode=mode) == sandbox.Result(True, "passed")


@each_mode
@pytest.mark.parametrize("program", [
    "import tempfile\nwith tempfile.TemporaryFile() as file: file.write(b'x')" + RIGHT,
    "import os, tempfile\nwith tempfile.TemporaryDirectory() as folder: open(os.path.join(folder, 'a'), 'w').close()" + RIGHT,
    "import os\nos.makedirs('a/b')\nos.rename('a/b', 'a/c')\nos.chmod('a', 0o700)\nos.rmdir('a/c')" + RIGHT,
    "import asyncio\nasync def g(x): return x + 1\ndef f(x): return asyncio.run(g(x))",
])
def test_a_program_that_keeps_to_its_own_folder_is_not_refused(program, mode):
    """As tempfile and asyncio once were (evaluate issue 523)."""
    assert run(program, mode=mode) == sandbox.Result(True, "passed")


def test_setup_runs_between_the_program_and_its_tests_and_in_the_same_names():
    assert run("def f(x): return x + one", setup="one = 1").passed
    assert run("class A:\n    one = 1\ndef f(x): return x + a.one", setup="a = A()").passed, "two of MBPP are like this"


# Every open descriptor, so the one for the verdict too.
EVERYWHERE = "import os, contextlib\nfor fd in range(50):\n  with contextlib.suppress(OSError): os.write(fd, "
BAD = {
    "wrong": (WRONG, "AssertionError"),
    "empty": ("", "NameError"),
    "syntax error": ("def f(x) return x", "SyntaxError"),
    "null byte": ("x = '\0'" + RIGHT, "null byte"),
    "lone surrogate": ("x = '\ud800'" + RIGHT, "UnicodeEncodeError"),
    "swallows the tests": (RIGHT + 'x = """', "SyntaxError"),
    "endless recursion": ("def f(x): return f(x) + 1", "RecursionError"),
    "recursion without limit": ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return sorted([x], key=f)", ""),
    "os._exit": ("import os\nos._exit(0)", "exit code 0"),
    "os._exit in the tested function": ("import os\ndef f(x): os._exit(0)", "exit code 0"),
    "sys.exit": ("import sys\nsys.exit(0)", "SystemExit"),
    "SystemExit in the tested function": ("def f(x): raise SystemExit", "SystemExit"),
    "KeyboardInterrupt": ("def f(x): raise KeyboardInterrupt", "KeyboardInterrupt"),
    "atexit": ("import atexit, os\natexit.register(os._exit, 0)" + WRONG, "AssertionError"),
    "thread that exits": ("import threading\nthreading.Thread(target=exit).start()" + WRONG, ""),
    "prints a pass": ("print('passed', True, 'OK', 0, flush=True)" + WRONG, "AssertionError"),
    "writes a pass everywhere": (EVERYWHERE + "b'passed')" + WRONG, "passedAssertionError"),
    "writes what stdin was": ("import os, re\nos.lseek(0, 0, 0)\nx = re.search(rb\"_child.*?'(.*?)'\", os.read(0, 99999))\n" +
                              EVERYWHERE + "x[1])\nos._exit(0)", "TypeError"),
    "AssertionError": ("import builtins\nbuiltins.AssertionError = AssertionError = KeyError" + WRONG, "AssertionError"),
    "exceptions are not caught": ("import builtins\nbuiltins.BaseException = ()" + WRONG, "AssertionError"),
    "excepthook": ("import sys\nsys.excepthook = sys.unraisablehook = lambda *a: None" + WRONG, "AssertionError"),
    "__debug__": ("__debug__ = False" + WRONG, "SyntaxError"),
    "builtins.__debug__": ("import builtins\nvars(builtins)['__debug__'] = False" + WRONG, "AssertionError"),
    "exec does nothing": ("import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None" + WRONG, "AssertionError"),
    "os.write is patched": ("import os\nos.write = os._exit = lambda *a: None" + WRONG, "AssertionError"),
    "trace jumps": ("import sys\ndef trace(frame, event, arg):\n"
                    "    if frame.f_code.co_filename == 'tests' and event == 'line':\n"
                    "        frame.f_lineno = 3\n    return trace\nsys.settrace(trace)" + WRONG, "AssertionError"),
    "stdin": ("input()" + RIGHT, "EOFError"),
    "memory bomb": ("x = bytearray(1 << 36)" + RIGHT, "MemoryError"),
    "slow memory bomb": ("x = []\nwhile True: x.append(bytearray(1 << 20))" + RIGHT, "MemoryError"),
    "giant output": ("while True: print('x' * (1 << 20))" + RIGHT, "File too large"),
    "giant output everywhere": (EVERYWHERE + "b'x' * (1 << 25))" + WRONG, "xxx"),
}


@each_mode
@pytest.mark.parametrize("name", BAD)
def test_a_bad_program_fails_quickly_and_for_its_own_reason(name, mode):
    program, reason = BAD[name]
    result = run(program, timeout=10.0, mode=mode)
    assert not result.passed and result.reason != "timeout" and len(result.reason) <= 1000
    if sys.platform == "linux":
        assert reason in result.reason


@each_mode
@pytest.mark.parametrize("program", [
    "while True: pass",
    "import time\ntime.sleep(60)",
    "def f(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
    "import signal\nfor s in (1, 2, 3, 10, 14, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
])
def test_an_endless_program_is_ended_in_time(program, mode):
    start = time.monotonic()
    assert run(program, timeout=0.3, mode=mode) == sandbox.Result(False, "timeout")
    assert time.monotonic() - start < 0.3 * sandbox.WALL + 1


@linux_only
def test_files_elsewhere_are_safe_from_root_where_only_limits_hold(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("an ordinary user's programs run as that user")
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf-8")
    assert "PermissionError" in run(f"open({str(victim)!r}, 'w')" + RIGHT, mode="limits").reason
    assert victim.read_text(encoding="utf-8") == "precious"


# Each starts few processes that end by themselves, so that a broken sandbox fails the test without harming the machine.
STARTERS = {
    "fork": "import os, time\nif os.fork() == 0: time.sleep(20)",
    "bomb": "import os, time\nfor i in range(5): os.fork()\ntime.sleep(20)",
    "daemon": "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(20)\n os._exit(0)\nos.wait()",
    "subprocess": "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'])",
    "spawn": "import os\nos.posix_spawn('/bin/sleep', ['sleep', '20'], {'TMPDIR': os.environ['TMPDIR']})",
    "system": "import os\nif os.system('sleep 20 &') != 0: raise OSError",
}


@linux_only
@each_mode
@pytest.mark.parametrize("name", STARTERS)
def test_limits_stop_new_processes(name, mode):
    result = run(STARTERS[name] + RIGHT, mode=mode)
    assert not result.passed and result.reason.startswith(("BlockingIOError", "OSError"))


@linux_only
@each_mode
def test_a_background_child_is_killed_when_its_parent_passes(monkeypatch, folder, mode):
    without(monkeypatch, "_limit")
    assert run(STARTERS["fork"] + RIGHT, mode=mode).passed  # and the fixture looks for it
    time.sleep(0.05)
    assert not survivors(folder)


@pytest.mark.slow
@linux_only
@each_mode
def test_programs_end_even_when_the_process_that_ran_them_is_killed(folder, mode):
    """A sleeper by the alarm, a busy loop without alarm or timer by its processor time."""
    deaf = "signal.signal(14, signal.SIG_IGN)\n" * (mode != "limits")  # there the alarm is not the program's
    loop = "import signal\nsignal.alarm(0)\nsignal.setitimer(2, 0)\nwhile True: pass"
    programs = (f"import signal, time\n{deaf}time.sleep(60)", loop)
    code = (f"import sys\nfrom scoring import sandbox\nsys.executable = {sys.executable!r}\n"
            f"sandbox.run_many([(program, '1', '') for program in {programs!r}], 2, 0.3, mode={mode!r})")
    process = subprocess.Popen([PYTHON, "-c", code], cwd=os.path.dirname(os.path.dirname(sandbox.__file__)),
                               env={**os.environ, "TMPDIR": str(folder)})
    wanted, deadline = 2 if mode == "limits" else 6, time.monotonic() + 20  # kept apart by three processes each
    while len(survivors(folder)) < wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # both past their start
    process.kill()
    process.wait()
    left, deadline = survivors(folder), time.monotonic() + 8  # their own limits are 3 s
    assert len(left) >= 2
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = survivors(folder)
    assert not left
    for path in folder.glob("ar2diff_*"):
        path.joinpath("output").unlink()
        path.rmdir()


def test_the_program_sees_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert run("import os\nassert 'SECRET_TOKEN' not in os.environ and len(os.environ) < 6" + RIGHT).passed
    assert not run("import iniconfig" + RIGHT).passed  # nor installed packages, such as this one of pytest's


def test_two_runs_see_the_same_order_of_a_set():
    program = "raise Exception(str({str(i) for i in range(20)}))"
    assert run(program) == run(program)


def test_many_results_come_in_order_and_side_by_side():
    jobs = [(f"def f(x): return x + {i % 2}", "assert f(1) == 2", "") for i in range(12)]
    assert [result.passed for result in sandbox.run_many(jobs, 4, timeout=5.0)] == [i % 2 == 1 for i in range(12)]
    start = time.monotonic()
    sandbox.run_many([("import time\ntime.sleep(0.5)" + RIGHT, TESTS, "")] * 4, 4, timeout=5.0)
    assert time.monotonic() - start < 1.5


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="this system does not tell processor time")
def test_processor_time_judges_not_the_time_on_the_clock():
    spin = "import time\nstart = time.process_time()\nwhile time.process_time() < start + {0}: pass" + RIGHT
    assert run("import time\ntime.sleep(1.2)" + RIGHT, timeout=1.0).passed, "it only waited"
    assert run(spin.format(0.2), timeout=1.0).passed
    assert run(spin.format(1.1), timeout=0.5) == sandbox.Result(False, "timeout")
    unbound = "import signal\nsignal.setitimer(2, 0)\n" + spin.format(0.8)
    assert run(unbound, timeout=0.5) == sandbox.Result(False, "timeout"), "it passed, but took too long"


def test_what_runs_out_of_time_is_run_again_alone_when_the_others_are_done(monkeypatch):
    calls, running = [], []

    def run_program(program, *_, **__):
        running.append(program)
        calls.append((program, len(running)))
        time.sleep(0.05)
        running.remove(program)
        late = program == "late" and len([name for name, _ in calls if name == "late"]) == 1
        return sandbox.Result(not late and program != "loop", "timeout" if late or program == "loop" else "passed")
    monkeypatch.setattr(sandbox, "run_program", run_program)
    results = sandbox.run_many([("late", "1", ""), ("good", "1", ""), ("loop", "1", "")], 3)
    assert [result.passed for result in results] == [True, True, False] and results[2].reason == "timeout"
    assert calls[3:] == [("late", 1), ("loop", 1)]


def test_a_machine_that_cannot_start_programs_is_an_error_not_a_score(monkeypatch):
    def full(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    monkeypatch.setattr(sandbox.subprocess, "Popen", full)
    with pytest.raises(UserError, match="no program can be started here .Resource temporarily unavailable"):
        sandbox.run_many([(RIGHT, TESTS, "")], 1)


def group(root, own, **files):
    """Write a control group and what /proc says of this process under a root of our own."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"0::{own}\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_max", ".max").replace("cfs.max", "cfs_max")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cores_are_those_of_the_affinity_and_of_the_quota_not_of_the_host(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert n_cores(tmp_path / "no_such_folder") == 8
    assert n_cores(group(tmp_path / "a", "/", cpu_max="200000 100000")) == 2
    assert n_cores(group(tmp_path / "b", "/", cpu_max="max 100000")) == 8
    assert n_cores(group(tmp_path / "c", "/pod/one", pod__cpu_max="350000 100000", pod__one__cpu_max="max 100000")) == 3
    assert n_cores(group(tmp_path / "d", "/", cpu_max="50000 100000")) == 1
    old = tmp_path / "e/sys/fs/cgroup/cpu"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("400000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert n_cores(tmp_path / "e") == 4
    (old / "cpu.cfs_quota_us").write_text("-1\n")  # no quota
    assert n_cores(tmp_path / "e") == 8


def test_many_programs_take_no_more_workers_than_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(sandbox, "n_cores", lambda: 2)
    pools = []
    real = sandbox.concurrent.futures.ThreadPoolExecutor
    monkeypatch.setattr(sandbox.concurrent.futures, "ThreadPoolExecutor", lambda n: pools.append(n) or real(n))
    sandbox.run_many([(RIGHT, TESTS, "")])
    assert pools == [2]


def test_no_tests_are_an_error_not_a_pass():
    with pytest.raises(UserError, match="without tests"):
        run(RIGHT, tests=" \n")


def test_a_syntax_error_in_the_tests_says_so():
    assert "(tests, line 1)" in run(RIGHT, tests="assert f(1 == 2").reason


def test_the_canaries_live_here():
    sandbox.check_canaries(n_workers=2, timeout=2.0)


def test_the_canaries_notice_that_nothing_passes(monkeypatch):
    monkeypatch.setattr(sandbox, "_SOURCE", "raise SystemError('broken Python')\n")
    with pytest.raises(UserError, match="'a right function' must pass.*broken Python"):
        sandbox.check_canaries(n_workers=2)


def test_the_canaries_notice_that_everything_passes(monkeypatch):
    monkeypatch.setattr(sandbox, "run_program", lambda *args, **kwargs: sandbox.Result(True, "passed"))
    with pytest.raises(UserError, match="must fail"):
        sandbox.check_canaries(n_workers=2)


# ---- kept apart: what one program does reaches no other, not the parent, no file outside ----

VICTIM = "import time\nstart = time.monotonic()\nwhile time.monotonic() < start + 1.5: time.sleep(0.01)" + RIGHT
ATTACKS = {  # those of case 27 among them; each loops, as it does not know when its victim lives
    "pidfd_send_signal": "import os, signal\nfor p in range(2, 100000):\n"
                         "    try: signal.pidfd_send_signal(os.pidfd_open(p), 9)\n    except OSError: pass",
    "kill all": "import os, signal\nfor p in (-1, *range(2, 100000)):\n    try: p != os.getpid() and os.kill(p, 9)\n"
                "    except OSError: pass",
    "ptrace": "import ctypes\nlibc = ctypes.CDLL(None)\nfor p in range(1, 100000): libc.ptrace(16, p, 0, 0)",
    "memfd": "import os\nx = []\nwhile True:\n    x.append(os.memfd_create('a'))\n    os.write(x[-1], b'x' * (9 << 20))",
    "fill /tmp": "for i in range(200): open(f'/tmp/{i}', 'wb').write(b'x' * (9 << 20))",
    "sqlite": "import sqlite3\nsqlite3.connect(PLACE + '/a.db').execute('create table t(x)')",
    "dir_fd": "import os\nos.open('a', os.O_CREAT | os.O_WRONLY, dir_fd=os.open(PLACE, os.O_RDONLY))",
    "mkfifo": "import os\nos.mkfifo(PLACE + '/fifo')",
    "proc fd": "import os\nfor fd in os.listdir('/proc/self/fd'):\n"
               "    try: open(f'/proc/self/fd/{fd}/../..' + PLACE + '/a', 'w')\n    except OSError: pass",
    "remount": "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.unshare(0x10020000)\nfor flags in (32, 4128, 4096):\n"
               "    libc.mount(None, b'/', None, flags, None)\nopen(PLACE + '/a', 'w')",
    "umount": "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.unshare(0x10020000)\nlibc.umount2(b'/tmp', 2)\n"
              "open(PLACE + '/a', 'w')",
    "setns": "import ctypes, os\nlibc = ctypes.CDLL(None)\nfor p in range(1, 1000):\n    for ns in ('mnt', 'pid', 'net'):\n"
             "        try: libc.setns(os.open(f'/proc/{p}/ns/{ns}', 0), 0)\n        except OSError: pass\n"
             "open(PLACE + '/a', 'w')",
    "parent's memory": "import os\nfor p in range(1, 5):\n    try: open(f'/proc/{p}/mem', 'r+b').write(b'x')\n"
                       "    except OSError: pass",
    "abstract socket": "import socket\nsocket.socket(socket.AF_UNIX).connect(f'\\0{PLACE}')",
    "port": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)",
    "setprofile": "import sys\nsys.setprofile(lambda *a: None)\nimport threading\nthreading.setprofile(print)",
    "builtins": "import builtins\n__builtins__ = {}\nbuiltins.__import__ = None",
    "setsid": "import os\nos.setsid() if os.getpid() != os.getsid(0) else None\nimport time\ntime.sleep(30)",
}


@apart
@pytest.mark.parametrize("name", ATTACKS)
def test_what_a_program_does_reaches_nothing_outside(name, folder):
    import socket
    place = folder / "place"
    place.mkdir()
    place.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{place}")
        abstract.listen()
        before = f"PLACE, PORT = {str(place)!r}, {server.getsockname()[1]}\n"
        results = sandbox.run_many([(VICTIM, TESTS, ""), (before + ATTACKS[name] + WRONG, TESTS, "")], 2, timeout=0.5)
        for listening in (server, abstract):
            listening.settimeout(0.05)
            with pytest.raises(TimeoutError):
                listening.accept()
    assert results[0].passed and not results[1].passed and list(place.iterdir()) == []


def test_what_was_killed_from_outside_is_run_again_alone(monkeypatch):
    """By the kernel where memory ran out, say: a right program must not be scored as wrong."""
    calls, real = [], sandbox.run_program

    def run_program(*job, **options):
        calls.append(job)
        return sandbox.Result(False, "killed by signal 9") if len(calls) == 1 else real(*job, **options)
    monkeypatch.setattr(sandbox, "run_program", run_program)
    assert sandbox.run_many([(RIGHT, TESTS, "")], 1)[0].passed and len(calls) == 2


@each_mode
def test_a_killed_program_says_so(mode):
    reason = run("import os\nos.abort()" + RIGHT, mode=mode).reason
    assert reason.endswith("killed by signal 6")


@linux_only
@each_mode
def test_ctrl_c_does_not_wait_for_programs_that_sleep(mode, folder):
    code = (f"import sys\nfrom engine.cli import run\nfrom scoring import sandbox\nsys.executable = {sys.executable!r}\n"
            f"run(lambda: sandbox.run_many([('import time\\ntime.sleep(100)', '1', '')] * 3, 2, 30, mode={mode!r}))")
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen([PYTHON, "-c", code], cwd=os.path.dirname(os.path.dirname(sandbox.__file__)),
                                   env={**os.environ, "TMPDIR": str(folder)}, stderr=subprocess.PIPE,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while len(survivors(folder)) < 2:
            time.sleep(0.01)
        start = time.monotonic()
        process.send_signal(number)
        process.communicate(timeout=20)
        assert time.monotonic() - start < 5 and process.returncode == 128 + number


def test_where_nothing_keeps_programs_apart_limits_remain(monkeypatch):
    monkeypatch.setattr(sandbox, "run_many", lambda *args, **more: [sandbox.Result(False, "")])
    assert sandbox.mode_here.__wrapped__() == "limits"
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "mode_here", lambda: "limits")
    assert sandbox.check_canaries(n_workers=2, timeout=2.0) == "limits only"


@apart
def test_what_keeps_programs_apart_and_then_fails_is_an_error_not_a_score(monkeypatch):
    broken = sandbox._SOURCE + "\ndef _isolate(*arguments): raise OSError(28, 'No space left on device')\n"
    monkeypatch.setattr(sandbox, "_SOURCE", broken)
    with pytest.raises(UserError, match="could not be kept apart .*No space left"):
        run(RIGHT, mode="namespaces")
