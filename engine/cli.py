"""A dataclass becomes a command line: typed, with -h, and with one clear line for every mistake.

    @dataclass
    class Config:
        steps: int = 1000  # optimizer steps        <- the comment is the text that -h shows
    config = parse(Config)

Flags are written --steps=10 or --steps 10, with underscores or dashes. A field without a default is a positional argument.
"""
import argparse
import dataclasses
import difflib
import inspect
import io
import os
import re
import signal
import sys
import typing


class UserError(Exception):
    """A mistake of the user's. The message says what is wrong, where, and what to do; scripts print it and exit with 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        hint = "; a value that begins with - goes behind an equals sign, --flag=VALUE" * ("expected one argument" in message)
        raise UserError(f"{message}{hint} ({self.prog} -h lists the flags)")


FREE_TEXT = ("prompt", "infill")  # flags that may be empty
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _bool(text):
    if text.lower() not in BOOLS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return BOOLS[text.lower()]


def _kind(field):
    """Return what makes a value of a word: int for `int` and for `int | None`."""
    kind = (typing.get_args(field.type) or [field.type])[0]
    return _bool if kind is bool else kind


def _help_texts(cls):
    """Return {field name: trailing comment} from the source of a dataclass and its parents."""
    return {name: text.replace("%", "%%") for c in reversed(cls.__mro__[:-1])  # a class alone would ast.parse: bad on Ctrl-C
            for block in re.findall(rf"(?ms)^class {c.__name__}\b.*?(?=^\S|\Z)", inspect.getsource(inspect.getmodule(c)))
            for name, text in re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", block, re.MULTILINE)}


def parse(cls, argv=None):
    """Return a `cls` made of command-line words (default: those of this process). Raises UserError for the first mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for word in argv:
        check(not re.search("[\ud800-\udfff]", word), f"the argument {word!r} is not UTF-8")  # how Python hands over such bytes
    parser = _Parser(prog=f"python {os.path.basename(inspect.getfile(cls))}", allow_abbrev=False,
                     description=sys.modules[cls.__module__].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    texts, bools = _help_texts(cls), []
    for field in dataclasses.fields(cls):
        positional, default = (True, None) if field.default is dataclasses.MISSING else (False, field.default)
        more = {"nargs": "?", "metavar": "true"} if _kind(field) is _bool else {}
        bools += [f"--{field.name}"] * bool(more)
        parser.add_argument(field.name if positional else f"--{field.name}", type=_kind(field), default=default, **more,
                            help=texts.get(field.name, "") + ("" if default is None else f" (default: {default!r})"))
    parts = [(word[:2] + word[2:].partition("=")[0].replace("-", "_"), word) for word in argv]  # --out-dir is --out_dir,
    words = [flag + word[len(flag):] if flag[2:] in texts else word for flag, word in parts]  # and values stay as they are
    _check_flags(parser, cls, words)
    words = [word + "=true" * (word in bools and after.lower() not in BOOLS)  # --show_steps out/run: that is not its value
             for word, after in zip(words, [*words[1:], ""])]
    check("--" not in [word.partition("=")[2] for word in words], "argparse cannot read -- as a value; put a space behind it")
    values = vars(parser.parse_args(words))
    for name, value in values.items():
        empty = value == "" and cls.__dataclass_fields__[name].default != "" and name not in FREE_TEXT
        check(not empty, f"{name} is empty; give a value, or leave the flag out")  # --init_from=$UNSET is not "from scratch"
        check(type(value) is not int or abs(value) < 1 << 53, f"--{name}={value} is beyond what can be counted")
    return cls(**values)


def _check_flags(parser, cls, words):
    """Raise UserError for the first unknown flag. argparse would first miss the positional that the flag was meant to be."""
    flags = [f"--{field.name}" for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING]
    for before, word in zip(["", *words], words):
        flag = word.split("=")[0]
        if re.fullmatch(r"--?[a-z][\w-]+", flag) and flag not in (*flags, "--help"):
            hint = "".join(f"; did you mean {nearest}?" for nearest in difflib.get_close_matches(flag, flags, n=1, cutoff=0.5))
            hint = "; give its value alone, without a flag" if flag[2:] in cls.__dataclass_fields__ else hint
            hint += f"; if it is the value of {before}, write {before}={word}" * (before in flags)
            raise UserError(f"unknown argument {flag!r}{hint} ({parser.prog} -h lists the flags)")


def check(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def one_of(name, value, choices):
    """Return `value` if it is among the choices, else raise a UserError that lists them and names the nearest."""
    if value in choices:
        return value
    hint = "".join(f"; did you mean {nearest!r}?" for nearest in difflib.get_close_matches(str(value), list(choices), n=1))
    raise UserError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}{hint}")


def say(text, write=print):
    """Write a line of what a run tells. Where nobody reads any more, or the disk is full, the run goes on and tells no more."""
    try:
        write(text)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main):
    """Call a script's main(); a UserError, or one of the system, becomes one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # temporary files go, as they do on Ctrl-C
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe on Windows is not UTF-8 otherwise
            stream.reconfigure(encoding="utf-8", errors="strict" if stream is sys.stdin else "replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any more: end without a word, as other tools do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would be written at exit, to nobody
        sys.exit(141)  # 128 + SIGPIPE
    except (UserError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
