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
    """Return the type of a field's values: int for `int` and for `int | None`."""
    return (typing.get_args(field.type) or [field.type])[0]


def _help_texts(cls):
    """Return {field name: trailing comment} from the source of a dataclass and its parents."""
    texts = {}
    for parent in reversed(cls.__mro__[:-1]):
        for name, text in re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(parent), re.MULTILINE):
            texts[name] = text.replace("%", "%%")
    return texts


def parse(cls, argv=None):
    """Build a `cls` from command-line words (default: those of this process).

    Raises UserError for an unknown flag (naming the nearest), a missing argument or a value of the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for word in argv:
        check(not re.search("[\ud800-\udfff]", word), f"the argument {word!r} is not UTF-8")  # how Python hands over such bytes
    module = sys.modules[cls.__module__]
    parser = _Parser(prog=f"python {os.path.basename(inspect.getfile(cls))}", allow_abbrev=False,
                     description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    texts = _help_texts(cls)
    for field in dataclasses.fields(cls):
        positional = field.default is dataclasses.MISSING
        kind = _bool if _kind(field) is bool else _kind(field)
        default = "" if positional or field.default is None else f" (default: {field.default!r})"
        help_text = texts.get(field.name, "") + default
        if positional:
            parser.add_argument(field.name, type=kind, help=help_text)
        else:
            parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=help_text,
                                nargs="?" if kind is _bool else None, metavar="true" if kind is _bool else None)
    parts = [(word[:2] + word[2:].partition("=")[0].replace("-", "_"), word) for word in argv]  # --out-dir is --out_dir,
    words = [flag + word[len(flag):] if flag[2:] in texts else word for flag, word in parts]  # and values stay as they are
    _check_flags(parser, cls, words)
    bools = {f"--{field.name}" for field in dataclasses.fields(cls) if _kind(field) is bool}
    for i, (word, after) in enumerate(zip(words, [*words[1:], ""])):
        if word in bools and after.lower() not in BOOLS:
            words[i] = f"{word}=true"  # --show_steps out/run: the next word is not its value
    check("--" not in [word.partition("=")[2] for word in words], "argparse cannot read -- as a value; put a space behind it")
    namespace, unknown = parser.parse_known_args(words)
    check(not unknown, f"unknown argument {' '.join(unknown)!r} ({parser.prog} -h lists the flags)")
    for name, value in vars(namespace).items():
        empty = value == "" and cls.__dataclass_fields__[name].default != "" and name not in FREE_TEXT
        check(not empty, f"{name} is empty; give a value, or leave the flag out")  # --init_from=$UNSET is not "from scratch"
        check(type(value) is not int or abs(value) < 1 << 53, f"--{name}={value} is beyond what can be counted")
    return cls(**vars(namespace))


def _check_flags(parser, cls, words):
    """Raise UserError for the first unknown flag. argparse would first miss the positional that the flag was meant to be."""
    flags = [f"--{field.name}" for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING]
    for before, word in zip(["", *words], words):
        flag = word.split("=")[0]
        if re.fullmatch(r"--?[a-z][\w-]+", flag) and flag not in (*flags, "--help"):
            nearest = difflib.get_close_matches(flag, flags, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
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
    nearest = difflib.get_close_matches(str(value), list(choices), n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}{hint}")


def say(text, write=print):
    """Write a line of what a run tells. Where nobody reads any more, or the disk is full, the run goes on and tells no more."""
    try:
        write(text)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main):
    """Call a script's main(); a UserError, or one of the system, becomes one line on stderr and exit code 2.

    SIGTERM ends the script as Ctrl-C does: temporary files go. A pipe that nobody reads any more ends it without a word, as it
    does other tools.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe on Windows is not UTF-8 otherwise
            stream.reconfigure(encoding="utf-8", errors="strict" if stream is sys.stdin else "replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would be written at exit, to nobody
        sys.exit(141)  # 128 + SIGPIPE
    except (UserError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
