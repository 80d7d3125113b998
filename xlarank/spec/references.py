"""From ``"my_file:function"`` in a config or on the command line to the function: `resolve`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from xlarank.errors import ConfigError

__all__ = ["resolve"]


def resolve(reference: str, *, folders: Sequence[Path | str] = ()) -> Callable[..., Any]:
    """Finds the function that a config names.

    Args:
      reference: ``module:function``. The module is a dotted name that Python can import, or ``my_file`` or
        ``my_file.py`` for a file in one of the folders.
      folders: searched for the file first, in order; the working directory is searched last.

    Returns:
      The function.

    Raises:
      ConfigError: when the form is wrong, or module or function don't exist. What the module itself raises
        while it is imported passes through.
    """
    name, colon, attribute = reference.partition(":")
    if not (name and colon and attribute):
        raise ConfigError(f"expected a reference of the form 'module:function', got {reference!r}")
    module = _load(name, reference, [Path(folder) for folder in folders] + [Path.cwd()])
    function = getattr(module, attribute, None)
    if not callable(function):
        what = (
            "has no function" if function is None else f"holds a {type(function).__name__}, no function, as"
        )
        raise ConfigError(f"{reference!r}: module {name!r} ({module.__file__}) {what} {attribute!r}")
    return function


def _load(name: str, reference: str, folders: Sequence[Path]) -> ModuleType:
    stem = name.removesuffix(".py")
    if "." not in stem:
        for folder in folders:
            path = folder / f"{stem}.py"
            if path.is_file():
                return _load_file(path.resolve())
    try:
        return importlib.import_module(stem)
    except ModuleNotFoundError as error:
        # A module that exists but imports one that doesn't is its author's to see.
        if error.name is None or not (stem == error.name or stem.startswith(f"{error.name}.")):
            raise
        searched = ", ".join(str(folder) for folder in dict.fromkeys(folders))
        raise ConfigError(
            f"{reference!r}: no file {stem}.py in {searched}, and no module {stem!r} to import"
        ) from None


def _load_file(path: Path) -> ModuleType:
    """Imports a file once a process; its module name can't clash with an installed one."""
    module_name = f"xlarank_file_{path.stem}_{abs(hash(str(path))):x}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # Registered before it runs: dataclasses look their own module up.
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
