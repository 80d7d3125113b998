"""Which room may import which, read from the source, imports inside functions included."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Package -> packages of ours that it may import, beside itself and errors.
ARROWS = {
    "xlarank.spec": set(),
    "xlarank.host": {"xlarank.spec"},
    "xlarank.bundle": {"xlarank.spec"},
    "xlarank.models": {"xlarank.spec"},
    "xlarank.device": {"xlarank.bundle", "xlarank.host", "xlarank.spec"},
    "xlarank.compiler": {
        "xlarank.device",
        "xlarank.models",
        "xlarank.bundle",
        "xlarank.host",
        "xlarank.spec",
    },
    # device for its compiler options: a model trains under those that it serves with.
    "xlarank.training": {
        "xlarank.device",
        "xlarank.models",
        "xlarank.bundle",
        "xlarank.host",
        "xlarank.spec",
    },
    "xlarank.runtime": {"xlarank.device", "xlarank.bundle", "xlarank.host", "xlarank.spec"},
    "xlarank_serving": {"xlarank.runtime", "xlarank.bundle", "xlarank.host", "xlarank.spec"},
}
ANYWHERE = {"xlarank", "xlarank.cli"}  # xlarank/__init__.py and the command line

# Libraries that only some packages may import, at any depth of a function.
LIBRARIES = {
    "grpc": {"xlarank_serving"},
    "grpc_health": {"xlarank_serving"},
    "grpc_reflection": {"xlarank_serving"},
    "google": {"xlarank_serving"},
    "opentelemetry": {"xlarank_serving"},
    "starlette": {"xlarank_serving"},
    "uvicorn": {"xlarank_serving"},
    "jax": {"xlarank.models", "xlarank.compiler", "xlarank.training", "xlarank.device"},
    "jaxlib": {"xlarank.models", "xlarank.compiler", "xlarank.training", "xlarank.device"},
    "flax": {"xlarank.models", "xlarank.compiler", "xlarank.training"},
    "optax": {"xlarank.training"},
    "orbax": {"xlarank.training"},
}
# What spec may be made of: numpy and the standard library.
SPEC_LIBRARIES = {"numpy"}

# Where an import for the type checker alone is fine: it names a class and loads nothing.
TYPE_ONLY = {"jax": {"xlarank.runtime"}, "jaxlib": {"xlarank.runtime"}}

BAD_NAMES = {"utils.py", "util.py", "common.py", "helpers.py", "helper.py", "misc.py"}
MAX_LINES = 600
GENERATED = ("_pb2.py", "_pb2_grpc.py")


def source_files(root):
    folders = [root / "xlarank", root / "serving" / "xlarank_serving"]
    return sorted(file for folder in folders for file in folder.rglob("*.py"))


def module_of(file, root):
    base = root / "serving" if (root / "serving") in file.parents else root
    parts = file.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module):
    """`xlarank.spec` of `xlarank.spec.request`; `xlarank_serving` of all of that."""
    parts = module.split(".")
    return parts[0] if parts[0] != "xlarank" else ".".join(parts[:2])


def imports_of(file, module):
    """(imported module, line, whether only the type checker sees it), those inside functions included."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    type_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = file.name == "__init__.py"
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            # `from xlarank import device` imports xlarank.device as much as xlarank.
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                names = [argument.value]
        for name in names:
            yield name, getattr(node, "lineno", 0), node in type_only


def violations(root):
    """Every broken rule as text, with file and line."""
    files = source_files(root)
    modules = {module_of(file, root) for file in files}
    found = []
    for file in files:
        module, where = module_of(file, root), file.relative_to(root)
        package = package_of(module)
        num_lines = len(file.read_text(encoding="utf-8").splitlines())
        if file.name in BAD_NAMES:
            found.append(f"{where}: a file is named for what it holds")
        if num_lines > MAX_LINES and not file.name.endswith(GENERATED):
            found.append(f"{where}: {num_lines} lines, more than {MAX_LINES}")
        if package not in {*ARROWS, *ANYWHERE, "xlarank.errors"}:
            found.append(f"{where}: package {package} has no place in the table of arrows")
        if package not in ANYWHERE:
            found += [
                f"{where}:{line}: {package} may not import {name}"
                for name, line, type_only in imports_of(file, module)
                if not may_import(package, name, modules, type_only)
            ]
    return found + cycles(files, modules, root)


def may_import(package, name, modules, type_only):
    top = name.split(".")[0]
    if top in LIBRARIES:
        return package in LIBRARIES[top] or (type_only and package in TYPE_ONLY.get(top, ()))
    if package == "xlarank.spec" and top not in ("xlarank", "xlarank_serving"):
        return top in SPEC_LIBRARIES or top in sys.stdlib_module_names
    if name == "xlarank" or top not in ("xlarank", "xlarank_serving"):
        return True
    if name not in modules and name.rpartition(".")[0] in modules - {"xlarank"}:
        return True  # a name of a module, which is looked at by itself
    # What is left of `xlarank.Name` is a lazy name of the root: it could be of any package.
    return package_of(name) in {package, "xlarank.errors", *ARROWS.get(package, ())}


def cycles(files, modules, root):
    """The first cycle of imports, those for the type checker and in functions included."""
    graph = {}
    for file in files:
        module = module_of(file, root)
        imported = {name for name, _, _ in imports_of(file, module) if name in modules - {module, "xlarank"}}
        # A package's __init__ imports its modules; they may import each other for all that.
        graph[module] = {name for name in imported if not module.startswith(f"{name}.")}
    graph.pop("xlarank", None)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [f"import cycle: {' <- '.join(error.args[1])}"]
    return []


def test_every_import_follows_the_arrows():
    assert violations(ROOT) == []


def test_jax_s_private_modules_are_imported_in_one_place():
    private = {
        file.relative_to(ROOT).as_posix()
        for file in source_files(ROOT)
        for name, _, _ in imports_of(file, module_of(file, ROOT))
        if name.startswith(("jax._src", "jaxlib._src"))
    }
    assert private == {"xlarank/compiler/tracing.py"}


def test_the_table_of_arrows_is_of_the_packages_that_there_are():
    packages = {package_of(module_of(file, ROOT)) for file in source_files(ROOT)}
    assert packages == {*ARROWS, *ANYWHERE, "xlarank.errors"}


PLANTED = [
    ("xlarank/spec/a.py", "from xlarank.host import b", "a.py:1: xlarank.spec may not import xlarank.host"),
    ("xlarank/spec/a.py", "import scipy", "a.py:1: xlarank.spec may not import scipy"),
    ("xlarank/runtime/a.py", "def f():\n    import jax", "a.py:2: xlarank.runtime may not import jax"),
    ("xlarank/runtime/a.py", "from xlarank import models", "xlarank.runtime may not import xlarank.models"),
    ("xlarank/runtime/a.py", "from ..models import b", "xlarank.runtime may not import xlarank.models"),
    ("xlarank/runtime/a.py", "from .. import models", "xlarank.runtime may not import xlarank.models"),
    ("xlarank/runtime/a.py", "from xlarank import build_bundle", "may not import xlarank.build_bundle"),
    (
        "xlarank/runtime/a.py",
        "import importlib\nimportlib.import_module('xlarank.compiler')",
        "a.py:2: xlarank.runtime may not import xlarank.compiler",
    ),
    ("xlarank/host/a.py", "from jax import numpy", "xlarank.host may not import jax"),
    ("xlarank/device/a.py", "import grpc", "xlarank.device may not import grpc"),
    ("xlarank/device/a.py", "from flax import nnx", "xlarank.device may not import flax"),
    ("xlarank/bundle/a.py", "import xlarank.host.b", "xlarank.bundle may not import xlarank.host.b"),
    ("xlarank/models/a.py", "import xlarank_serving", "xlarank.models may not import xlarank_serving"),
    ("serving/xlarank_serving/a.py", "import jax", "xlarank_serving may not import jax"),
    ("serving/xlarank_serving/a.py", "import xlarank.device", "may not import xlarank.device"),
    ("xlarank/host/utils.py", "", "utils.py: a file is named for what it holds"),
    ("xlarank/host/a.py", "x = 1\n" * 601, "a.py: 601 lines, more than 600"),
    ("xlarank/extra/a.py", "", "package xlarank.extra has no place in the table"),
    ("xlarank/host/c.py", "import xlarank.host.d", "import cycle: "),
    ("xlarank/host/c.py", "def f():\n    from xlarank.host import d", "import cycle: "),
]


@pytest.fixture
def tree(tmp_path):
    """A source tree of one empty module `b` a package, in which nothing is wrong."""
    for package in ARROWS:
        folder = tmp_path / ("serving" if package == "xlarank_serving" else "") / package.replace(".", "/")
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "b.py").write_text("")
    (tmp_path / "xlarank" / "__init__.py").write_text("")
    (tmp_path / "xlarank" / "errors.py").write_text("")
    (tmp_path / "xlarank" / "host" / "d.py").write_text("from xlarank.host import c")
    return tmp_path


@pytest.mark.parametrize(("file", "text", "expected"), PLANTED)
def test_a_planted_violation_is_found(tree, file, text, expected):
    (tree / file).parent.mkdir(exist_ok=True)
    (tree / file).write_text(text)
    assert [violation for violation in violations(tree) if expected in violation], violations(tree)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("xlarank/runtime/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax"),
        ("xlarank/runtime/a.py", "from xlarank import device, errors\nfrom xlarank.spec import ModelSpec"),
        ("xlarank/spec/a.py", "import numpy as np\nimport enum\nfrom xlarank.spec import b"),
        ("xlarank/cli/a.py", "import jax, grpc, xlarank.compiler, xlarank_serving"),
        ("xlarank/host/generated_pb2.py", "x = 1\n" * 601),
    ],
)
def test_what_the_arrows_allow_is_let_pass(tree, file, text):
    (tree / file).parent.mkdir(exist_ok=True)
    (tree / file).write_text(text)
    assert violations(tree) == []
