"""From a config's reference to a module."""

import pytest
from flax import nnx

from xlarank.errors import ConfigError
from xlarank.models import build_model
from xlarank.spec.references import resolve

MODEL = """
from flax import nnx

class Mine(nnx.Module):
    def __init__(self, spec, width, rngs):
        self.layer = nnx.Linear(3, width, rngs=rngs)

def build(spec, *, rngs, width=4):
    return Mine(spec, width, rngs)

def wrong(spec, *, rngs):
    return {"not": "a module"}

constant = 5
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_model_file.py").write_text(MODEL)
    return tmp_path


@pytest.mark.parametrize("name", ["my_model_file", "my_model_file.py"])
def test_a_file_in_the_configs_folder_is_found(folder, spec, name):
    module = build_model(f"{name}:build", spec, {"width": 7}, nnx.Rngs(0), folders=[folder])
    assert module.layer.kernel[...].shape == (3, 7)


def test_a_file_in_the_working_directory_is_found(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert resolve("my_model_file:build").__name__ == "build"


def test_the_configs_folder_comes_before_the_working_directory(folder, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "my_model_file.py").write_text("def build(): pass")
    monkeypatch.chdir(folder)
    assert resolve("my_model_file:build", folders=[elsewhere]).__code__.co_filename.startswith(str(elsewhere))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("my_model_file", "expected a reference of the form 'module:function', got 'my_model_file'"),
        (":build", "expected a reference of the form 'module:function'"),
        ("no_such_file:build", r"no file no_such_file.py in .*, and no module 'no_such_file' to import"),
        ("no_such.package:build", "no module 'no_such.package' to import"),
        ("my_model_file:create", "my_model_file.py.* has no function 'create'"),
        ("my_model_file:constant", "holds a int, no function, as 'constant'"),
    ],
)
def test_a_reference_that_leads_nowhere_says_why(folder, reference, message):
    with pytest.raises(ConfigError, match=message):
        resolve(reference, folders=[folder])


def test_an_import_that_fails_inside_the_file_is_shown_as_it_is(tmp_path):
    (tmp_path / "needs_more.py").write_text("import no_such_dependency")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        resolve("needs_more:build", folders=[tmp_path])


def test_options_that_build_does_not_take_are_refused(folder, spec):
    with pytest.raises(
        ConfigError, match=r"called as build\(spec, rngs=rngs, depth=...\): got an unexpected keyword"
    ):
        build_model("my_model_file:build", spec, {"depth": 2}, nnx.Rngs(0), folders=[folder])


def test_a_build_that_returns_no_module_is_refused(folder, spec):
    with pytest.raises(ConfigError, match=r"expected build\(\) to return an nnx.Module, got dict"):
        build_model("my_model_file:wrong", spec, {}, nnx.Rngs(0), folders=[folder])
