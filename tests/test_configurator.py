"""The command line, as a user types it."""

import contextlib
import io
import sys

import pytest

from configurator import configure

LIMITS = {"count rate": (0, 10), "mode": ["fast", "slow"], "how": ["auto", True, False]}


@pytest.fixture
def script(tmp_path):
    """A script's globals, the file they stand in included."""
    file = tmp_path / "script.py"
    file.write_text(f'"""What it does."""\n# {"-" * 40}\ncount = 3  # how many\n# {"-" * 40}\nHIDDEN = 1\n')
    return {
        "__file__": str(file),
        "__doc__": "What it does.",
        "count": 3,
        "rate": 0.5,
        "flag": False,
        "on": True,
        "name": "x",
        "sizes": (1, 2),
        "none": (),
        "mode": "fast",
        "how": "auto",
        "where": "auto",
        "HIDDEN": 1,
        "_private": 1,
    }


@pytest.mark.parametrize(
    "args, key, value",
    [
        (["--count=7"], "count", 7),
        (["--count", "7"], "count", 7),
        (["--count=1e1"], "count", 10),
        (["--rate=2"], "rate", 2.0),
        (["--rate", "1e-3"], "rate", 1e-3),
        (["--rate=.5"], "rate", 0.5),
        (["--flag"], "flag", True),
        (["--flag=true"], "flag", True),
        (["--flag=1"], "flag", True),
        (["--flag", "True"], "flag", True),
        (["--on=false"], "on", False),
        (["--on", "0"], "on", False),
        (["--on=FALSE"], "on", False),
        (["--flag", "--count=4"], "flag", True),
        (["--name=a=b=c"], "name", "a=b=c"),
        (["--name", "a=b"], "name", "a=b"),
        (["--name="], "name", ""),
        (["--name=3"], "name", "3"),
        (["--name=True"], "name", "True"),
        (["--name=-x"], "name", "-x"),
        (["--sizes=4,5,6"], "sizes", (4, 5, 6)),
        (["--sizes=(4, 5)"], "sizes", (4, 5)),
        (["--sizes=4"], "sizes", (4,)),
        (["--sizes=[4,5]"], "sizes", (4, 5)),
        (["--sizes=()"], "sizes", ()),
        (["--none=3,4"], "none", (3, 4)),
        (["--how"], "how", True),
        (["--how=true"], "how", True),
        (["--how=0"], "how", False),
        (["--how", "auto"], "how", "auto"),
        (["--how", "--count=1"], "how", True),
        (["--where=0"], "where", "0"),
        (["--where", "there"], "where", "there"),
        (["--count=1", "--count=2"], "count", 2),
        (["--mode=slow"], "mode", "slow"),
    ],
)
def test_right(script, args, key, value):
    config = configure(script, LIMITS, args)
    assert script[key] == config[key] == value and type(script[key]) is type(value)
    assert set(config) == set(script) - {"__file__", "__doc__", "HIDDEN", "_private"}


def test_dashes_are_underscores(script):
    script["two_words"] = 1
    assert configure(script, {}, ["--two-words=2"])["two_words"] == 2


@pytest.mark.parametrize(
    "args, message",
    [
        (["--cuont=7"], "did you mean count?"),
        (["--zzzzzz=7"], "--help lists them"),
        (["--HIDDEN=2"], "--HIDDEN: there is no such option"),
        (["--_private=2"], "--_private: there is"),
        (["--__file__=2"], "--__file__: there is"),
        (["--=3"], "--: there is"),
        (["--count=1.5"], "--count: expected int such as 3, not '1.5'"),
        (["--count=x"], "not 'x'"),
        (["--count="], "not ''"),
        (["--count=True"], "not 'True'"),
        (["--count=1,2"], "not '1,2'"),
        (["--count=1e999"], "not '1e999'"),
        (["--count"], "expected int such as 3"),
        (["--count", "--flag"], "expected int such as"),
        (["--name"], "expected str such as"),
        (["--rate=fast"], "expected float such as"),
        (["--rate=nan"], "expected float such as"),
        (["--rate=1e999"], "expected float such as"),
        (["--rate=__import__('os')"], "expected float such as"),
        (["--flag=maybe"], "expected bool such as"),
        (["--flag=2"], "expected bool such as"),
        (["--sizes=a,b"], "expected tuple such as"),
        (["--sizes=1.5,2"], "expected tuple such as"),
        (["--sizes=" + "(" * 500], "expected tuple such as"),
        (["--count=11"], "--count: 11 is not between 0 and 10"),
        (["--rate=-1"], "is not between"),
        (["--rate", "-1"], "not between"),
        (["--where"], "expected str such as 'auto', not None"),
        (["--how=other"], "expected auto, True, False, not 'other'"),
        (["--mode=medium"], "expected fast, slow, not 'medium'"),
        (["count=3"], "cannot read the config file count=3"),
        (["-count=3"], "options are written --key=value"),
        ([""], "cannot read the config file"),
        (["nowhere.py"], "nowhere.py"),
    ],
)
def test_wrong(script, capsys, args, message):
    with pytest.raises(SystemExit) as stop:
        configure(script, LIMITS, args)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and message in err


def test_config_file_and_later_arguments(script, tmp_path, monkeypatch):
    (tmp_path / "preset.py").write_text(
        '"""Why."""\n# a comment\ncount = 5\nrate = 1  # an int for a float\nsizes = (7, 8)\n'
    )
    monkeypatch.chdir(tmp_path.parent)  # found beside the script from elsewhere too
    config = configure(script, LIMITS, ["--rate=2", "preset.py", "--count=6"])
    assert (config["count"], config["rate"], config["sizes"]) == (6, 1.0, (7, 8))


@pytest.mark.parametrize(
    "text, message",
    [
        ("cuont = 5", "preset.py:1: cuont: there is no such option, did you mean count?"),
        ("\ncount = 'x'", "preset.py:2: count: expected int"),
        ("count = 11", "is not between"),
        ("count += 1", "must be `key = literal`"),
        ("import os", "must be `key = literal`"),
        ("print('run')", "must be `key = literal`"),
        ("count = open('ran', 'w')", "must be `key = literal`"),
        ("count = ", "must be"),
        ("count = rate = 1", "must be"),
        ("def f(): pass", "must be"),
        ("\0", "must be"),
        ("count: int = 3", "must be"),
    ],
)
def test_config_file_is_checked_and_never_executed(script, tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "preset.py").write_text(text)
    with pytest.raises(SystemExit) as stop:
        configure(script, LIMITS, ["preset.py"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "ran").exists()


def test_help_is_the_scripts_own_text(script, capsys):
    with pytest.raises(SystemExit) as stop:
        configure(script, {}, ["--help"])
    assert not stop.value.code
    assert capsys.readouterr().out == "What it does.\ncount = 3  # how many\n"


KEYS = ["count", "rate", "flag", "on", "name", "sizes", "none", "mode", "how", "where"]
EVENTS = {"exec", "import", "os.system", "os.mkdir", "os.remove", "subprocess.Popen", "socket.connect"}
seen, watching = [], []  # what was executed or opened for writing, while anything is in watching


def hook(event, args):  # there is no taking it back
    if watching and (event in EVENTS or event == "open" and isinstance(args[1], str)
                     and set(args[1]) & set("wax+")):
        seen.append((event, args))


sys.addaudithook(hook)


def configured(script, args):
    """(options, exit code, what was printed) of a command line; what it executes or writes is in seen."""
    out, err, config, code = io.StringIO(), io.StringIO(), None, None
    seen.clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        watching.append(True)
        try:
            config = configure(script, LIMITS, args)
        except SystemExit as e:
            code = e.code
        finally:
            watching.clear()
    return config, code, out.getvalue(), err.getvalue()


def assert_safe(script, args):
    before = dict(script)
    config, code, out, err = configured(script, args)
    assert not seen
    if config is None:
        assert code is None or code == 2 and out == "" and err.count("\n") == 1 and len(err.strip()) > 20
        assert code == 2 or "What it does." in out
        return
    for key, value in config.items():
        kinds = (str, bool) if key == "how" else type(before[key])
        assert isinstance(value, kinds) and isinstance(value, bool) >= isinstance(before[key], bool)
        assert all(type(v) is int for v in value) if type(value) is tuple else True
    assert 0 <= config["count"] <= 10 and 0 <= config["rate"] <= 10 and config["mode"] in ("fast", "slow")
    assert set(script) == set(before)


def test_whatever_is_typed_it_is_an_option_or_one_line_and_never_executed(script, tmp_path, monkeypatch):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    monkeypatch.chdir(tmp_path)
    code = ["__import__('os').mkdir('x')", "open('x', 'w')", "(lambda: 1)()", "[i for i in ()]", "1+1"]
    odd = ["9" * 5000, "1e999", "-0", "(" * 200, "nan", "\0"]
    nested = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
        max_leaves=5,
    )
    value = st.text() | nested.map(repr) | st.sampled_from(code) | st.sampled_from(odd)
    name = st.sampled_from([*KEYS, "HIDDEN", "_private", "__file__", "help", "h"]) | st.text()
    arg = st.builds("--{}={}".format, name, value) | st.builds("--{}".format, name) | value

    @hypothesis.settings(max_examples=1500, deadline=None, database=None, derandomize=True)
    @hypothesis.given(st.lists(arg, max_size=4))
    def typed(args):
        assert_safe(dict(script), args)

    typed()
    assert list(tmp_path.iterdir()) == [tmp_path / "script.py"]


def test_whatever_a_config_file_holds_is_an_option_or_one_line_and_never_run(script, tmp_path, monkeypatch):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    monkeypatch.chdir(tmp_path)
    code = ["__import__('os').mkdir('x')", "open('x', 'w')",
            "f'{1}'", "1 if 1 else 2", "-1", "1, 2", "'x' 'y'", "1j"]
    name, sign = st.sampled_from([*KEYS, "count, rate", "x.y"]), st.sampled_from(["=", "+=", ":"])
    value = (st.sampled_from(code) | st.integers().map(repr) | st.text().map(repr)
             | st.lists(st.integers()).map(repr))
    line = st.builds("{} {} {}".format, name, sign, value)
    other = st.sampled_from(["import os", "def f(): pass", "class A: pass",
                             "exec('1')", "if 1: count = 2", "del on"])
    lines = st.lists(line | other | st.text())
    file = st.binary() | lines.map(lambda lines: "\n".join(lines).encode(errors="replace"))

    @hypothesis.settings(max_examples=1500, deadline=None, database=None, derandomize=True)
    @hypothesis.given(file)
    def read(content):
        (tmp_path / "preset.py").write_bytes(content)
        assert_safe(dict(script), ["preset.py"])

    read()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["preset.py", "script.py"]
