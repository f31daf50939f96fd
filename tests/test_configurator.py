"""The command line, as a user types it."""

import contextlib
import io
import sys

import pytest

from configurator import configure

LIMITS = {
    "count": (0, 10),
    "rate": (0, 10),
    "mode": ["fast", "slow"],
    "how": ["auto", True, False],
}


@pytest.fixture
def script(tmp_path):
    """A script's globals, including the file that sets them."""
    file = tmp_path / "script.py"
    line = f"# {'-' * 40}\n"
    options = f"{line}count = 3  # how many\n{line}"
    file.write_text(f'"""What it does."""\n{options}HIDDEN = 1\n')
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
        (["--cuont=7"], "--cuont: unknown option, did you mean count?"),
        (["--zzzzzz=7"], "--zzzzzz: unknown option, --help lists them"),
        (["--HIDDEN=2"], "--HIDDEN: unknown option"),
        (["--_private=2"], "--_private: unknown option"),
        (["--__file__=2"], "--__file__: unknown option"),
        (["--=3"], "--: unknown option"),
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
    monkeypatch.chdir(tmp_path.parent)  # also found beside the script
    config = configure(script, LIMITS, ["--rate=2", "preset.py", "--count=6"])
    assert (config["count"], config["rate"], config["sizes"]) == (6, 1.0, (7, 8))


@pytest.mark.parametrize(
    "text, message",
    [
        ("cuont = 5", "preset.py:1: cuont: unknown option, did you mean count?"),
        ("\ncount = 'x'", "preset.py:2: count: expected int"),
        ("count = 11", "is not between"),
        ("count += 1", "preset.py is not a config file: line 1 must be `key = literal` (on"),
        ("import os", "line 1 must be `key = literal`"),
        ("print('run')", "line 1 must be `key = literal`"),
        ("\ncount = 4\nprint('run')", "line 3 must be `key = literal`"),
        ("count = open('ran', 'w')", "line 1 must be `key = literal`"),
        ("count = 4\ncount = open('ran', 'w')", "line 2 must be `key = literal`"),
        ("count = ", "line 1 must be"),
        ("count = 1\nrate = (1,\n2", "line 2 must be"),
        ("count = rate = 1", "line 1 must be"),
        ("def f(): pass", "line 1 must be"),
        ("\0", "line 1 must be"),
        ("count: int = 3", "line 1 must be"),
        ("count = rate + 1", "line 1 must be"),
        ("count = 2 ** 3", "line 1 must be"),
        ("count = 2**99999999", "line 1 must be"),
        ("count = 7 // 2", "line 1 must be"),
        ("count = 1 / 0", "line 1 must be"),
        ("rate = 1e308 * 10 / 3", "rate: expected float"),
        ("count = 3 / 2", "count: expected int"),
        ("count = 5 * 8", "count: 40 is not between 0 and 10"),
        ("count = True + True", "line 1 must be"),
        ("name = 'a' * 3", "line 1 must be"),
        ("name = 'a' + 'b'", "line 1 must be"),
        ("sizes = (1,) * 3", "line 1 must be"),
        ("sizes = (1,) + (2,)", "line 1 must be"),
        ("count = (lambda: 1)() + 1", "line 1 must be"),
        ("count = open('ran', 'w') * 2", "line 1 must be"),
    ],
)
def test_config_file_is_checked_and_never_executed(
    script, tmp_path, monkeypatch, capsys, text, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "preset.py").write_text(text)
    with pytest.raises(SystemExit) as stop:
        configure(script, LIMITS, ["preset.py"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text, value",
    [
        ("count = 5 + 4", ("count", 9)),
        ("count = 2 * (3 - 1) + 4", ("count", 8)),
        ("count = 8 / 4", ("count", 2)),
        ("count = 3 - -4", ("count", 7)),
        ("count = 10 * 0.5", ("count", 5)),
        ("rate = 1 / 4", ("rate", 0.25)),
        ("rate = 2e-3 * 1000", ("rate", 2.0)),
        ("rate = 2 * 3", ("rate", 6.0)),
    ],
)
def test_config_file_may_hold_arithmetic_of_numbers(script, tmp_path, text, value):
    (tmp_path / "preset.py").write_text(text)
    name, expected = value
    found = configure(script, LIMITS, [str(tmp_path / "preset.py")])[name]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_config_file_as_editors_and_shells_write_it(script, tmp_path, encoding, end):
    """With or without a byte order mark; PowerShell's echo writes one."""
    text = f'"""Why."""{end}name = "Schrödinger"  # é{end}count = 5{end}'
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    (tmp_path / "preset.py").write_bytes(mark + text.encode(encoding))
    config = configure(script, LIMITS, [str(tmp_path / "preset.py")])
    assert (config["name"], config["count"]) == ("Schrödinger", 5)


def test_a_wrong_line_of_a_config_file_in_utf16_is_told_by_its_number(script, tmp_path, capsys):
    (tmp_path / "preset.py").write_bytes("count = 5\r\nimport os\r\n".encode("utf-16"))
    with pytest.raises(SystemExit):
        configure(script, LIMITS, [str(tmp_path / "preset.py")])
    _, err = capsys.readouterr()
    path = tmp_path / "preset.py"
    assert f"{path} is not a config file: line 2 must be `key = literal` (on" in err


@pytest.mark.parametrize("how", ["equals", "space", "config file"])
def test_a_tilde_is_the_home_folder(script, tmp_path, monkeypatch, how):
    """A shell does not expand it after an equals sign. Elsewhere in a name it is plain text."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value, expected in (
        ("~/pictures", str(tmp_path / "home" / "pictures")),
        ("~", str(tmp_path / "home")),
        ("~x", "~x"),
        ("a/~/b", "a/~/b"),
        ("data~", "data~"),
    ):
        (tmp_path / "preset.py").write_text(f"where = {value!r}\n")
        args = {
            "equals": [f"--where={value}"],
            "space": ["--where", value],
            "config file": [str(tmp_path / "preset.py")],
        }[how]
        assert configure(dict(script), LIMITS, args)["where"] == expected


def test_help_is_the_scripts_own_text(script, capsys):
    with pytest.raises(SystemExit) as stop:
        configure(script, {}, ["--help"])
    assert not stop.value.code
    assert capsys.readouterr().out == "What it does.\ncount = 3  # how many\n"


KEYS = ["count", "rate", "flag", "on", "name", "sizes", "none", "mode", "how", "where"]
EVENTS = {"exec", "import", "os.system", "os.mkdir", "os.remove"}
EVENTS |= {"subprocess.Popen", "socket.connect"}
seen, watching = [], []  # seen: what is executed or opened for writing while watching is not empty


def hook(event, args):  # audit hooks cannot be removed
    if watching and (event in EVENTS or event == "open" and isinstance(args[1], str)
                     and set(args[1]) & set("wax+")):
        seen.append((event, args))


sys.addaudithook(hook)


def configured(script, args):
    """(options, exit code, stdout, stderr) of a command line; what it executes is in seen."""
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
        if code is not None:
            assert code == 2 and out == "" and err.count("\n") == 1 and len(err.strip()) > 20
        assert code == 2 or "What it does." in out
        return
    for key, value in config.items():
        kinds = (str, bool) if key == "how" else type(before[key])
        assert isinstance(value, kinds)
        assert isinstance(value, bool) >= isinstance(before[key], bool)
        assert all(type(v) is int for v in value) if type(value) is tuple else True
    assert 0 <= config["count"] <= 10 and 0 <= config["rate"] <= 10
    assert config["mode"] in ("fast", "slow")
    assert set(script) == set(before)


EXAMPLES = pytest.mark.parametrize("examples", [150, pytest.param(1500, marks=pytest.mark.slow)])


@EXAMPLES
def test_whatever_is_typed_it_is_an_option_or_one_line_and_never_executed(
    script, tmp_path, monkeypatch, examples
):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    monkeypatch.chdir(tmp_path)
    code = ["__import__('os').mkdir('x')", "open('x', 'w')", "(lambda: 1)()", "[i for i in ()]"]
    code += ["1+1"]
    odd = ["9" * 5000, "1e999", "-0", "(" * 200, "nan", "\0"]
    nested = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
        max_leaves=5,
    )
    value = st.text() | nested.map(repr) | st.sampled_from(code) | st.sampled_from(odd)
    name = st.sampled_from([*KEYS, "HIDDEN", "_private", "__file__", "help", "h"]) | st.text()
    arg = st.builds("--{}={}".format, name, value) | st.builds("--{}".format, name) | value

    @hypothesis.settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @hypothesis.given(st.lists(arg, max_size=4))
    def typed(args):
        assert_safe(dict(script), args)

    typed()
    assert list(tmp_path.iterdir()) == [tmp_path / "script.py"]


@EXAMPLES
def test_whatever_a_config_file_holds_is_an_option_or_one_line_and_never_run(
    script, tmp_path, monkeypatch, examples
):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    monkeypatch.chdir(tmp_path)
    code = ["__import__('os').mkdir('x')", "open('x', 'w')",
            "f'{1}'", "1 if 1 else 2", "-1", "1, 2", "'x' 'y'", "1j",
            "5 * 8", "1 / 0", "1e308 * 10", "9 ** 9 ** 9", "'x' * 9**9", "1 + 1j", "2 - True"]
    name = st.sampled_from([*KEYS, "count, rate", "x.y"])
    sign = st.sampled_from(["=", "+=", ":"])
    value = (st.sampled_from(code) | st.integers().map(repr) | st.text().map(repr)
             | st.lists(st.integers()).map(repr))
    line = st.builds("{} {} {}".format, name, sign, value)
    other = st.sampled_from(["import os", "def f(): pass", "class A: pass",
                             "exec('1')", "if 1: count = 2", "del on"])
    lines = st.lists(line | other | st.text())
    file = st.binary() | lines.map(lambda lines: "\n".join(lines).encode(errors="replace"))

    @hypothesis.settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @hypothesis.given(file)
    def read(content):
        (tmp_path / "preset.py").write_bytes(content)
        assert_safe(dict(script), ["preset.py"])

    read()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["preset.py", "script.py"]
