"""The command line, as a user types it."""

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
