"""
Override a script's globals from the command line and from config files: nanoGPT's idea, checked.

    if __name__ == "__main__":
        config = configure(globals(), {"batch_size": (1, math.inf), "dtype": ["float32", "bfloat16"]})

    python cfm.py config/preset.py --batch_size=64 --learning-rate 1e-3 --compile

The options are the script's lower-case globals that hold a bool, int, float, str or tuple; the type of the default is
the type of the option, and a default of "auto" takes true and false as well. The last word on an option counts.
A config file holds `key = literal` lines; it is read, never executed. Mistakes end in one line and exit code 2.
"""
import ast
import difflib
import sys
from pathlib import Path

INF = float("inf")
WORDS = {"true": True, "1": True, "false": False, "0": False}
NOT_A_LITERAL = (ValueError, SyntaxError, OverflowError, RecursionError, MemoryError, AttributeError)


def fail(message):
    """Say in one line what was wrong and what to do about it, and exit with code 2."""
    sys.exit(print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr) or 2)


def fit(value, default):
    """value (a literal, or text that holds one) as the type of default; one of NOT_A_LITERAL if it cannot be that."""
    kind = type(default)
    if isinstance(value, str) and value.lower() in WORDS and (kind is bool or default == "auto"):
        return WORDS[value.lower()]
    if isinstance(value, str) and kind is not str:
        value = ast.literal_eval(value.strip())
    if kind is tuple:
        values = value if isinstance(value, (tuple, list)) else [value]
        return tuple(fit(v, default[0] if default else 0) for v in values)
    if {kind, type(value)} == {int, float} and kind(value) == value:                        # 1e4 is an int, 3 a float
        value = kind(value)
    if (type(value) is kind or default == "auto" and type(value) is bool) and value not in (INF, -INF):
        return value
    raise ValueError


def configure(settings, limits={}, argv=None):
    """
    Override settings, a script's globals(), by argv (by default the command line) and return all options as a dict.
    limits maps options, separated by spaces, to a tuple (least, most) or to a list of choices.
    """
    script, kinds = Path(settings["__file__"]), (bool, int, float, str, tuple)
    defaults = {k: v for k, v in settings.items() if k.islower() and k[0] != "_" and type(v) in kinds}

    def override(key, value, where):
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "--help lists them"
            fail(f"{where}: there is no option {key!r}; {hint}")
        try:
            settings[key] = fit(value, defaults[key])
        except NOT_A_LITERAL:
            fail(f"{where}: {key} takes a {type(defaults[key]).__name__} such as {defaults[key]!r}, not {value!r}")

    args = list(sys.argv[1:] if argv is None else argv)
    while args:
        name, equals, value = args.pop(0).partition("=")
        key = name[2:].replace("-", "_")
        if name in ("-h", "--help"):                            # the script's docstring and its block of options
            sys.exit(print(settings["__doc__"], script.read_text().split("# " + "-" * 108)[1], sep="\n"))
        elif name.startswith("--"):
            flag = type(defaults.get(key)) is bool
            if not equals and args and (args[0].lower() in WORDS if flag else args[0][:2] != "--"):
                value = args.pop(0)                                    # --key value
            elif not equals:
                value = "true" if flag or defaults.get(key) == "auto" else None
            override(key, value, name)
        else:
            path = name + equals + value
            try:
                path = next((p for p in (Path(path), script.parent / path) if p.is_file()), path)
                for node in ast.parse(Path(path).read_text()).body:
                    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):       # the docstring
                        [target] = node.targets
                        override(target.id, ast.literal_eval(node.value), f"{path}:{node.lineno}")
            except OSError as e:
                fail(f"cannot read the config file {path}: {e.strerror} (options are written --key=value)")
            except NOT_A_LITERAL:
                fail(f"{path} is not a config file: every line must be `key = literal`")

    for key, allowed in ((key, allowed) for keys, allowed in limits.items() for key in keys.split()):
        for v in settings[key] if isinstance(settings[key], tuple) else [settings[key]]:
            if isinstance(allowed, list) and v not in allowed:
                fail(f"--{key}={v} must be one of {', '.join(map(str, allowed))}")
            if isinstance(allowed, tuple) and not allowed[0] <= v <= allowed[1]:
                fail(f"--{key}={v} must lie between {allowed[0]} and {allowed[1]}")
    return {key: settings[key] for key in defaults}
