"""A model's config file."""

import pathlib

import pytest

from xlarank.errors import ConfigError
from xlarank.spec import DEFAULT_ROWS
from xlarank.spec.config import Metric, load_config, parse_config

HEAD = """
name = "m"
model = "my_file:build"
features = [{ name = "x", kind = "dense", scope = "candidate" }]
tasks = [{ name = "t" }]
"""


def load(tmp_path, text):
    path = tmp_path / "model.toml"
    path.write_text(text)
    return load_config(path)


def test_a_short_file_gets_the_defaults(tmp_path):
    config = load(tmp_path, HEAD)
    assert config.spec.name == "m"
    assert (config.model, dict(config.options), config.data) == ("my_file:build", {}, None)
    assert config.bucket_rows == DEFAULT_ROWS
    assert config.training.metric is Metric.LOSS
    assert config.folder == tmp_path


def test_every_table_reaches_its_place(tmp_path):
    config = load(
        tmp_path,
        HEAD
        + '[model_options]\nwidth = 3\n[buckets]\nrows = [4, 16]\n[data]\nreader = "r:read"\nshare = 0.5\n'
        + '[training]\nepochs = 7\nmetric = "auc"\nrefit = true\n',
    )
    assert config.options == {"width": 3}
    assert config.bucket_rows == (4, 16)
    assert (config.data_or_raise().reader, config.data_or_raise().options) == ("r:read", {"share": 0.5})
    assert (config.training.epochs, config.training.metric, config.training.refit) == (7, Metric.AUC, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "colour = 1", r"model.toml: unknown keys \['colour'\]"),
        (HEAD + "[training]\nepoch = 1", r"model.toml: \[training\]: unknown keys \['epoch'\]"),
        (HEAD + "[buckets]\nsizes = [1]", r"model.toml: \[buckets\]: unknown keys \['sizes'\]"),
        (HEAD + "[buckets]\nrows = [8, 4]", r"buckets.rows must be ascending integers >= 1; was \[8, 4\]"),
        (HEAD + "[buckets]\nrows = []", "buckets.rows must be ascending"),
        (HEAD + "[data]\npath = 1", "model.toml: data: missing key 'reader'"),
        (HEAD + "[training]\nepochs = 0", "model.toml: training: epochs must be an integer >= 1; was 0"),
        (HEAD + "[training]\nepochs = true", "epochs must be an integer >= 1; was True"),
        (HEAD + "[training]\nlearning_rate = 0", "learning_rate must be > 0; was 0"),
        (HEAD + "[training]\nlearning_rate = nan", "learning_rate must be a number >= 0; was nan"),
        (HEAD + "[training]\nrefit = 1", "refit must be true or false; was 1"),
        (HEAD + '[training]\nmetric = "f1"', r"metric must be one of \['loss', 'auc'\]; was 'f1'"),
        (HEAD.replace("my_file:build", "my_file"), "model must be of the form 'module:build'; was 'my_file'"),
        (HEAD.replace("tasks", "#"), "model.toml: missing key 'tasks'"),
        (
            HEAD.replace('tasks = [{ name = "t" }]', "tasks = 3"),
            r"tasks must be a list of tables, \[\[tasks\]\]",
        ),
        (HEAD.replace("dense", "dens"), "model.toml: feature 'x': kind must be one of"),
        (HEAD + "model_options = 3", "model_options must be a table; was 3"),
        ("name = ", "model.toml: expected a TOML file: "),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_missing_file_or_data_table_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.toml: no such config file"):
        load_config(tmp_path / "gone.toml")
    with pytest.raises(ConfigError, match=r"has no \[data\] table"):
        load(tmp_path, HEAD).data_or_raise()


def test_a_config_kept_in_a_bundle_may_not_name_code_as_its_reader():
    text = HEAD + '[data]\nreader = "subprocess:run"\n'
    with pytest.raises(ConfigError, match=r"'subprocess:run', which a bundle may not choose; .*--config"):
        parse_config(text, pathlib.Path("config.toml"))
    assert parse_config(text.replace("subprocess:run", "movielens"), pathlib.Path("config.toml")).data


@pytest.mark.parametrize("name", ["dcn_v2", "dlrm", "feed", "movielens"])
def test_every_config_that_comes_with_xlarank_loads(name):
    config = load_config(pathlib.Path(__file__).parents[2] / "configs" / f"{name}.toml")
    assert config.spec.name == name
    assert config.data is not None
