"""
The command line and config files override a script's globals: nanoGPT's configurator, but checked.

    if __name__ == "__main__":
        config = configure(globals(), {"batch_size": (1, math.inf), "path": ["straight", "curved"]})

    python cfm.py preset.py --batch_size=64 --learning-rate 1e-3 --compile

The options are the script's lower-case globals that hold a bool, int, float, str or tuple. An
option keeps the type of its default. If it is given twice, the last value wins. A config file
holds lines of `key = literal`, and is read, never executed. Any error ends in one line on stderr
and exit code 2.
"""
import ast
import codecs
import contextlib
import difflib
import math
import operator
import os
import re
import sys
from pathlib import Path

KINDS = (bool, int, float, str, tuple)
WORDS = {"true": True, "1": True, "false": False, "0": False}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub,
              ast.Mult: operator.mul, ast.Div: operator.truediv}
NOT_A_LITERAL = (ValueError, SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError)


# Options of older versions: the value at which they did nothing, and the page that replaces them.
RETIRED = {
    "spans": (0.0, "examples/meanflow.py"),
    "pairs": (False, "examples/one_step.py"),
    "keep_noise": (False, "examples/one_step.py"),
    "task": ("draw", "examples/likelihood.py or examples/latent.py"),
    "exact": (False, "examples/likelihood.py"),
    "atol": (1e-4, "examples/likelihood.py"),
    "rtol": (1e-4, "examples/likelihood.py"),
}


# ---- what a program says ----

def say(text, file=None):
    """
    print() and flush. A full disk, a closed pipe or an odd character never ends a run.

    Of several processes that torchrun started, only the first prints to stdout.
    """
    if file is None and os.environ.get("RANK", "0") != "0":
        return
    with contextlib.suppress(OSError):
        try:
            print(text, file=file, flush=True)
        except UnicodeEncodeError:
            print(text.encode("ascii", "backslashreplace").decode(), file=file, flush=True)


def fail(message):
    """Say in one line what was wrong and what to do about it, and exit with code 2."""
    say(f"{Path(sys.argv[0]).name}: {' '.join(message.splitlines())}", file=sys.stderr)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(2)              # one of several: shutting down gloo's threads may abort this one
    sys.exit(2)


@contextlib.contextmanager
def explained(where="", kind=Exception):
    """An exception inside ends the program by fail(): one line says where and why."""
    try:
        yield
    except kind as e:
        fail(where + (" ".join(str(e).split()) or type(e).__name__))


# ---- what an option may be ----

def parse(value, default):
    """The value, a literal or its text, as the default's type; else raises one of NOT_A_LITERAL."""
    kind = type(default)
    if kind is bool and str(value).lower() in WORDS:
        return WORDS[str(value).lower()]
    if isinstance(value, str) and kind is not str:
        value = ast.literal_eval(value.strip())
    if kind is tuple:
        values = value if type(value) in (tuple, list) else [value]
        return tuple(parse(v, default[0] if default else 0) for v in values)
    if {kind, type(value)} == {int, float} and kind(value) == value:    # 1e4 is an int, 3 a float
        value = kind(value)
    if type(value) is not kind or kind is float and not math.isfinite(value):
        raise ValueError
    if kind is str and (value == "~" or value.startswith("~/")):
        value = os.path.expanduser(value)                               # after =, shells do not
    return value


class Options:
    """A script's options: their defaults, and limits, (least, most) or a list of choices."""

    def __init__(self, settings, limits):
        self.defaults = {name: value for name, value in settings.items()
                         if name.islower() and name[0] != "_" and type(value) in KINDS}
        self.limits = limits
        self.flags = {name for name, value in self.defaults.items()     # alone they mean true
                      if type(value) is bool or True in self.choices(name)}

    def choices(self, name):
        limit = self.limits.get(name, ())
        return limit if isinstance(limit, list) else []

    def is_value(self, name, arg):
        """Is arg, which follows --name, its value? After a flag, only if it may be one."""
        if name in self.flags:
            return arg.lower() in {*WORDS, *map(str, self.choices(name))}
        return not arg.startswith("--")

    def checked(self, where, name, value):
        """The value, as the option's type; calls fail() if it is not allowed."""
        if name not in self.defaults and name in RETIRED:
            fail(f"{where} is no longer an option: see {RETIRED[name][1]}")
        if name not in self.defaults:
            near = difflib.get_close_matches(str(name), self.defaults, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists them"
            fail(f"{where}: unknown option, {hint}")
        default, choices = self.defaults[name], self.choices(name)
        try:
            if not any(type(c) is type(value) and c == value for c in choices):     # 0 is not False
                value = parse(value, True if name in self.flags else default)
            if choices and value not in choices:
                raise ValueError
        except NOT_A_LITERAL:
            example = f"{type(default).__name__} such as {default!r}"
            fail(f"{where}: expected {', '.join(map(str, choices)) or example}, not {value!r}")
        if isinstance(self.limits.get(name), tuple):
            least, most = self.limits[name]
            if not all(least <= v <= most for v in (value if type(value) is tuple else [value])):
                fail(f"{where}: {value} is not between {least} and {most}")
        return value

    def restored(self, saved):
        """All options: those that a checkpoint saved, and defaults for those it lacks."""
        saved = {k: self.checked(f"the checkpoint's {k}", k, v) for k, v in saved.items()}
        return self.defaults | saved


def drop_retired(where, options):
    """The options without those of RETIRED; calls fail() if one of these had another value."""
    for name in RETIRED.keys() & options.keys():
        neutral, page = RETIRED[name]
        if options[name] != neutral:
            fail(f"{where} has {name}={options[name]}, which is no longer an option: see {page}")
    return {name: value for name, value in options.items() if name not in RETIRED}


# ---- where options come from ----

def literal(node):
    """The value of a literal, or of arithmetic with numbers such as 5 * 8."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = literal(node.operand)
        if type(value) in (int, float):
            return -value
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = literal(node.left), literal(node.right)
        if {type(left), type(right)} <= {int, float}:
            return ARITHMETIC[type(node.op)](left, right)
    return ast.literal_eval(node)


def read_config_file(path, folder):
    """(where, name, value) of each line of a config file, here or in the script's folder."""
    try:
        path = next((p for p in (Path(path), folder / path) if p.is_file()), path)
        content = Path(path).read_bytes()
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        fail(f"cannot read the config file {path}: {reason} (options are written --key=value)")
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))      # by PowerShell
    line = 1
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
        for node in ast.parse(text).body:
            line = node.lineno
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue                                                # a docstring
            if not isinstance(node, ast.Assign) or [type(t) for t in node.targets] != [ast.Name]:
                raise ValueError
            name = node.targets[0].id
            yield f"{path}:{line}: {name}", name, literal(node.value)
    except NOT_A_LITERAL as e:
        line = getattr(e, "lineno", None) or line
        fail(f"{path} is not a config file: line {line} must be `key = literal` "
             "(on the command line, options are written --key=value)")


def read_command_line(args, options, folder):
    """(where, name, value) of each option on the command line, and in config files named there."""
    args = list(args)
    while args:
        arg = args.pop(0)
        if not arg.startswith("--"):
            yield from read_config_file(arg, folder)
            continue
        flag, equals, value = arg.partition("=")
        name = flag[2:].replace("-", "_")
        if not equals:
            value = "true" if name in options.flags else None               # --flag
            if args and options.is_value(name, args[0]):
                value = args.pop(0)                                         # --key value
        yield flag, name, value


def configure(settings, limits={}, argv=None, saved={}):
    """
    Override settings, a script's globals(), and return all options as a dict.

    The saved options of an earlier run come first, then argv, by default the command line. limits
    maps an option to (least, most), or to a list of choices, which may include True and False.
    """
    argv, script = sys.argv[1:] if argv is None else argv, Path(settings["__file__"])
    if {"-h", "--help"} & set(argv):
        parts = re.split("\n# -{20,}\n", script.read_text())
        print(settings["__doc__"], *parts[1::2], sep="\n")
        sys.exit()
    options = Options(settings, limits)
    config = options.restored(saved)
    for where, name, value in read_command_line(argv, options, script.parent):
        config[name] = options.checked(where, name, value)
    settings.update(config)
    return config
