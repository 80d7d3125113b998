"""Config files: what a TOML file says, and what it may not."""

from pathlib import Path

import pytest

from xlarank.errors import ConfigError
from xlarank.spec.buckets import DEFAULT_ROWS
from xlarank.spec.config import DataConfig, TrainingConfig, load_config, parse_config

FEATURES = """
[[features]]
name = "price"
kind = "dense"
scope = "candidate"

[[tasks]]
name = "like"
"""
HEAD = 'name = "m"\nmodel = "ranker:build"\n'
PATH = Path("configs") / "m.toml"
MODELS = [
    file for file in sorted((Path(__file__).parents[2] / "configs").glob("*.toml")) if file.stem != "server"
]


def parse(head=HEAD, tail=""):
    return parse_config(head + FEATURES + tail, PATH)


def test_the_shortest_config_has_the_defaults():
    config = parse()
    assert config.spec.name == "m"
    assert (config.model, config.options, config.folder) == ("ranker:build", {}, Path("configs"))
    assert config.training == TrainingConfig()
    assert config.bucket_rows == DEFAULT_ROWS
    with pytest.raises(ConfigError, match=r"m\.toml: the config has no \[data\] table"):
        config.data_or_raise()


def test_every_table_is_read():
    config = parse(
        tail='[data]\nreader = "movielens"\ntest_share = 0.1\n[training]\nepochs = 3\n'
        "[model_options]\nwidths = [8, 4]\n[buckets]\nrows = [1, 8]\n"
    )
    assert config.data_or_raise() == DataConfig(reader="movielens", options={"test_share": 0.1})
    assert config.training == TrainingConfig(epochs=3)
    assert config.options == {"widths": [8, 4]}
    assert config.bucket_rows == (1, 8)


@pytest.mark.parametrize(
    ("head", "tail", "message"),
    [
        ('name = "m"\n', "", "missing key 'model'"),
        ('model = "a:b"\n', "", "missing key 'name'"),
        (HEAD + "colour = 1\n", "", r"unknown keys \['colour'\]"),
        ('name = "m"\nmodel = "ranker"\n', "", "model must be of the form 'module:build'; was 'ranker'"),
        ('name = "m"\nmodel = 3\n', "", "model must be of the form 'module:build'; was 3"),
        ("name = 3\n" + HEAD[11:], "", r"model: expected a name of .*, got 3"),
        (HEAD + "tables = 3\n", "", r"tables must be a list of tables, \[\[tables\]\]; was 3"),
        (HEAD + "data = 3\n", "", "data must be a table; was 3"),
        (HEAD + "not toml", "", "expected a TOML file"),
        (f"a = {'[' * 5000}", "", "expected a TOML file: values are nested too deeply"),
        (f"a = {'9' * 5000}", "", "expected a TOML file"),
        (HEAD, "[buckets]\nrow = [1]\n", r"\[buckets\]: unknown keys \['row'\]; expected of \['rows'\]"),
        (HEAD, "[buckets]\nrows = []\n", r"buckets.rows must be ascending integers >= 1; was \[\]"),
        (HEAD, "[buckets]\nrows = [8, 8]\n", r"ascending integers >= 1; was \[8, 8\]"),
        (HEAD, "[buckets]\nrows = [1.0]\n", r"ascending integers >= 1; was \[1.0\]"),
        (HEAD, "[buckets]\nrows = 8\n", "ascending integers >= 1; was 8"),
        (HEAD, "[data]\ntest_share = 0.1\n", "data: missing key 'reader'"),
        (HEAD, "[data]\nreader = 7\n", "data: reader must be a name or 'module:function'; was 7"),
        (HEAD, "[training]\nepoch = 1\n", r"\[training\]: unknown keys \['epoch'\]"),
        (HEAD, "[training]\nepochs = 1.5\n", "training: epochs must be an integer >= 1; was 1.5"),
        (HEAD, "[training]\nepochs = true\n", "training: epochs must be an integer >= 1; was True"),
        (HEAD, "[training]\nlearning_rate = 0\n", "training: learning_rate must be > 0; was 0"),
        (HEAD, "[training]\nlearning_rate = nan\n", "training: learning_rate must be a number >= 0; was nan"),
        (HEAD, "[training]\nmax_seconds = inf\n", "training: max_seconds must be a number >= 0; was inf"),
        (HEAD, "[training]\nrefit = 1\n", "training: refit must be true or false; was 1"),
        (HEAD, "[[features]]\nname = 3\n", r"feature 3: missing keys \['kind', 'scope'\]"),
        (HEAD, '[[features]]\nname = "x"\nkind = "dense"\n', r"feature 'x': missing keys \['scope'\]"),
        (HEAD, '[[tasks]]\nname = "x"\nweight = 2\n', r"task 'x': unknown keys \['weight'\]"),
    ],
)
def test_a_config_that_is_wrong_is_refused_by_file_and_key(head, tail, message):
    with pytest.raises(ConfigError, match=rf"^configs.m\.toml: .*{message}"):
        parse(head, tail)


def test_a_file_that_is_missing_or_no_text_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: no such config file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="expected a TOML file"):
        load_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigError, match=r"latin\.toml: expected a TOML file"):
        load_config(tmp_path / "latin.toml")


@pytest.mark.parametrize("file", MODELS, ids=str)
def test_the_configs_of_the_project_are_read(file):
    config = load_config(file)
    assert config.path == file
    assert config.spec.tasks
