"""
Override a script's globals from the command line and from config files: nanoGPT's idea, checked.

    if __name__ == "__main__":
        config = configure(globals(), {"batch_size": (1, math.inf), "dtype": ["float32", "bfloat16"]})

    python cfm.py preset.py --batch_size=64 --learning-rate 1e-3 --compile

The options are the script's lower-case globals that hold a bool, int, float, str or tuple. An option has the type of
its default; where it is given twice, the last value wins. A config file holds `key = literal` lines and is read, never
executed. Every mistake ends in one line on stderr and exit code 2.
"""
import ast
import difflib
import math
import re
import sys
from pathlib import Path

WORDS = {"true": True, "1": True, "false": False, "0": False}
NOT_A_LITERAL = (ValueError, SyntaxError, OverflowError, RecursionError, MemoryError, AttributeError)


def fail(message):
    """Say in one line what was wrong and what to do about it, and exit with code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def fit(value, default):
    """value, a literal or text that holds one, as the type of default; one of NOT_A_LITERAL if it cannot be that."""
    kind = type(default)
    if kind is bool and str(value).lower() in WORDS:
        return WORDS[str(value).lower()]
    if isinstance(value, str) and kind is not str:
        value = ast.literal_eval(value.strip())
    if kind is tuple:
        return tuple(fit(v, default[0] if default else 0) for v in (value if type(value) in (tuple, list) else [value]))
    if {kind, type(value)} == {int, float} and kind(value) == value:                        # 1e4 is an int, 3 a float
        value = kind(value)
    if type(value) is not kind or kind is float and not math.isfinite(value):
        raise ValueError
    return value


def configure(settings, limits={}, argv=None):
    """
    Override settings, a script's globals(), by argv (by default the command line) and return all options as a dict.
    limits maps options, separated by spaces, to (least, most), or to a list of choices, which may hold True and False.
    """
    kinds, script = (bool, int, float, str, tuple), Path(settings["__file__"])
    defaults = {k: v for k, v in settings.items() if k.islower() and k[0] != "_" and type(v) in kinds}
    ranges = {k: v for ks, v in limits.items() for k in ks.split() if isinstance(v, tuple)}
    choices = {k: v for ks, v in limits.items() for k in ks.split() if isinstance(v, list)}
    flags = {k for k, v in defaults.items() if type(v) is bool or True in choices.get(k, [])}

    def override(where, key, value):
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            fail(f"{where}: there is no such option, " + (f"did you mean {near[0]}?" if near else "--help lists them"))
        try:
            if value not in choices.get(key, []):
                value = fit(value, True if key in flags else defaults[key])
            if value not in choices.get(key, [value]):
                raise ValueError
        except NOT_A_LITERAL:
            like = f"{type(defaults[key]).__name__} such as {defaults[key]!r}"
            fail(f"{where}: expected {', '.join(map(str, choices.get(key, [like])))}, not {value!r}")
        least, most = ranges.get(key, (-math.inf, math.inf))
        if key in ranges and not all(least <= v <= most for v in (value if type(value) is tuple else [value])):
            fail(f"{where}: {value} is not between {least} and {most}")
        settings[key] = value

    args = list(sys.argv[1:] if argv is None else argv)
    while args:
        name, equals, value = args.pop(0).partition("=")
        key = name[2:].replace("-", "_")
        if name in ("-h", "--help"):                            # the docstring, and the options between the rules
            print(settings["__doc__"], *re.split("\n# -{20,}\n", script.read_text())[1:2], sep="\n")
            sys.exit()
        elif name.startswith("--"):
            words = {*WORDS, *map(str, choices.get(key, []))}
            if not equals and args and (args[0].lower() in words if key in flags else args[0][:2] != "--"):
                value = args.pop(0)                             # --key value
            elif not equals:
                value = "true" if key in flags else None        # --flag
            override(name, key, value)
        else:
            path = name + equals + value
            try:
                path = next((p for p in (Path(path), script.parent / path) if p.is_file()), path)
                for node in ast.parse(Path(path).read_text()).body:
                    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):      # a docstring
                        [target] = node.targets
                        override(f"{path}:{node.lineno}: {target.id}", target.id, ast.literal_eval(node.value))
            except OSError as e:
                fail(f"cannot read the config file {path}: {e.strerror} (options are written --key=value)")
            except NOT_A_LITERAL:
                fail(f"{path} is not a config file: every line must be `key = literal`")
    return {key: settings[key] for key in defaults}
