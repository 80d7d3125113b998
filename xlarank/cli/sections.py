"""Command line flags, TOML tables and a config example out of one definition: the sections of a dataclass.

A *section* is a frozen dataclass with a string under each field. The config is a dataclass whose fields are
sections. What a field becomes:

    [section] in TOML     name = value; a Path is relative to the file; an enum by its value
    flag                  --name with dashes, or metadata {"flag": ...}; {"flag": None}: none of its own
    help and comment      the string under the field, with the default
    None                  the key or flag left out, or the word in metadata {"none": ...}

A field may also be a tuple of dataclasses: in TOML [[section.name]], a table each; it has no flag.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import enum
import functools
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from xlarank.errors import ConfigError
from xlarank.spec.fields import check_keys, from_mapping
from xlarank.spec.files import parse_toml

__all__ = ["Option", "add_flags", "config_text", "options_of", "read_sections"]

_Config = TypeVar("_Config")

_WIDTH = 108

_KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", Path: "a path"}

_STANDARD_STREAM = "-"
"""In place of a file, wherever the config file lies."""

_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One field of a section."""

    section: str
    name: str

    kind: type
    """int, float, str, bool, Path, an enum of strings or a dataclass; of each element of a list."""

    is_list: bool
    default: Any

    doc: str
    """The string under the field."""

    flag: str | None
    """With its dashes; None for an option without."""

    none: str | None
    """The word for None, where None has one."""

    @property
    def dest(self) -> str:
        """Where the parser keeps what the flag was given."""
        return f"{self.section}.{self.name}"

    @property
    def expected(self) -> str:
        """What a value is, in words."""
        if dataclasses.is_dataclass(self.kind):
            kind = f"a table of {[field.name for field in dataclasses.fields(self.kind)]}"
        else:
            kind = _KINDS.get(self.kind) or f"one of {[member.value for member in self.kind]}"  # type: ignore[attr-defined]
        if self.is_list:
            kind = f"a list, each {kind}"
        return kind if self.none is None else f"{kind} or {self.none!r}"

    def from_toml(self, value: Any, folder: Path) -> Any:
        """The field's value from that of a TOML file in `folder`; ConfigError for another type."""
        if self.none is not None and value == self.none:
            return None
        items = value if self.is_list and isinstance(value, list) else [value]
        if self.is_list is isinstance(value, list) and all(self._is_of_kind(item) for item in items):
            for item in items:
                if (bound := self._bound(item)) is not None:
                    raise ConfigError(f"[{self.section}] {self.name} must be {bound}; was {item!r}")
            made = [self._made(item, folder) for item in items]
            return tuple(made) if self.is_list else made[0]
        raise ConfigError(f"[{self.section}] {self.name} must be {self.expected}; was {value!r}")

    def to_toml(self, value: Any) -> str:
        """A line of TOML; a comment for None without a word."""
        if value is None and self.none is None:
            return f"# {self.name} = ({self.expected}; none by default)"
        return f"{self.name} = {_toml(self.none if value is None else value)}"

    def from_flag(self, text: str) -> Any:
        """The field's value (of a list, one element) from a word of the command line."""
        if self.none is not None and text == self.none:
            return None
        try:
            value = self.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {self.expected}, got {text!r}") from None
        if (bound := self._bound(value)) is not None:
            raise argparse.ArgumentTypeError(f"expected {bound}, got {text!r}")
        return value

    def _is_of_kind(self, value: Any) -> bool:
        if dataclasses.is_dataclass(self.kind):
            return isinstance(value, Mapping)
        if issubclass(self.kind, enum.StrEnum):
            return value in [member.value for member in self.kind]
        if isinstance(value, bool) or self.kind is bool:
            return isinstance(value, bool) and self.kind is bool
        if self.kind is float:
            return isinstance(value, (int, float))
        return isinstance(value, str if self.kind is Path else self.kind)

    def _bound(self, value: Any) -> str | None:
        """What a value of the right kind must be besides, in words; None if it is."""
        if isinstance(value, str) and "\0" in value:
            return "without NUL"  # which the system takes for the end of a name
        if self.kind is float:
            return "a finite number" if isinstance(value, int) and abs(value) >= 2**1023 else None
        # What libraries keep such numbers in.
        bits = 63 if self.name.endswith("_bytes") else 31
        return f"at most 2**{bits} - 1" if isinstance(value, int) and abs(value) >= 2**bits else None

    def _made(self, value: Any, folder: Path) -> Any:
        if dataclasses.is_dataclass(self.kind):
            return from_mapping(self.kind, value, f"[[{self.section}.{self.name}]]")
        if self.kind is Path and value != _STANDARD_STREAM:
            return folder / value
        return self.kind(value)


def options_of(config: type) -> Iterator[Option]:
    """Every option of a config class, section by section."""
    for section, cls in typing.get_type_hints(config).items():
        hints, docs = typing.get_type_hints(cls), field_docs(cls)
        for field in dataclasses.fields(cls):
            kind, is_list = _kind_of(hints[field.name])
            flag = field.metadata.get("flag", field.name.replace("_", "-"))
            yield Option(
                section=section,
                name=field.name,
                kind=kind,
                is_list=is_list,
                default=field.default,
                doc=docs[field.name],
                flag=None if flag is None or dataclasses.is_dataclass(kind) else f"--{flag}",
                none=field.metadata.get("none"),
            )


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Adds the flag of every option, grouped by section; not given, it leaves no trace in the namespace."""
    groups = {
        section: parser.add_argument_group(f"[{section}]", _summary(cls))
        for section, cls in typing.get_type_hints(config).items()
    }
    for option in options_of(config):
        if option.flag is None:
            continue
        shared: dict[str, Any] = {"dest": option.dest, "default": argparse.SUPPRESS, "help": _help(option)}
        if option.kind is bool:
            shared["action"] = argparse.BooleanOptionalAction
        elif issubclass(option.kind, enum.StrEnum):
            words = [*([option.none] if option.none else []), *(member.value for member in option.kind)]
            shared["type"] = option.from_flag
            shared["metavar"] = f"{{{','.join(words)}}}"
        else:
            shared["type"] = option.from_flag
            shared["metavar"] = _METAVARS[option.kind] + (f"|{option.none}" if option.none else "")
        if option.is_list:
            shared["action"] = "append"
        groups[option.section].add_argument(option.flag, **shared)


def read_sections(
    config: type[_Config], args: argparse.Namespace, file: Path | None, *, expects_section: bool = False
) -> tuple[_Config | None, list[str]]:
    """Makes a config of what the command line says, what the file says and the defaults, in this order.

    Args:
      config: a dataclass of sections.
      args: of a parser with the flags.
      file: TOML; None for none.
      expects_section: whether a file without a key (empty, blank, all comments) is a problem.

    Returns:
      The config, None if there is a problem; and every problem, in a line of words each.
    """
    document, problems = _document(file)
    hints = typing.get_type_hints(config)
    where = "" if file is None else f"{file}: "
    if expects_section and file is not None and not (document or problems):
        problems = [f"{where}says nothing: expected a section, perhaps empty"]
    problems += _said(lambda: check_keys(document, hints, f"{where}sections"))[1]
    given = vars(args)
    sections: dict[str, Any] = {}
    for section, cls in hints.items():
        options = [option for option in options_of(config) if option.section == section]
        table = document.get(section, {})
        values, wrong = _table_values(options, table, section, Path() if file is None else file.parent)
        problems += [where + problem for problem in wrong]
        for option in options:
            if option.dest in given:
                value = given[option.dest]
                values[option.name] = tuple(value) if option.is_list else value
        sections[section], unmade = _said(functools.partial(cls, **values))
        told = dict.fromkeys(_problems_of_values(cls, section, values) + ([] if wrong else unmade))
        problems += [(where if table else "") + problem for problem in told]
    return (None, problems) if problems else (config(**sections), [])


def config_text(config: Any) -> str:
    """A TOML file that says all that a config says, every option with its comment, wherever it is put."""
    parts = []
    for section, cls in typing.get_type_hints(type(config)).items():
        lines = [_comment(_summary(cls)), f"[{section}]"]
        for option in options_of(type(config)):
            if option.section == section:
                value = getattr(getattr(config, section), option.name)
                lines += ["", _comment(option.doc), option.to_toml(value)]
        parts.append("\n".join(lines))
    return "\n\n\n".join(parts) + "\n"


@functools.cache
def field_docs(cls: type) -> Mapping[str, str]:
    """The string under each field of a dataclass, on one line.

    Raises:
      TypeError: for a field without one.
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            text = ast.literal_eval(below.value)
            docs[ast.unparse(field.target)] = " ".join(text.split())
    if missing := [field.name for field in dataclasses.fields(cls) if field.name not in docs]:
        raise TypeError(f"{cls.__name__}: expected a string under each field, got none under {missing}")
    return docs


def _kind_of(hint: Any) -> tuple[type, bool]:
    """The type of a field's value, and whether it's a tuple of such."""
    if isinstance(hint, types.UnionType):
        (hint,) = (arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _document(file: Path | None) -> tuple[Mapping[str, Any], list[str]]:
    if file is None:
        return {}, []
    try:
        return parse_toml(file.read_text(encoding="utf-8"), file), []
    except FileNotFoundError:
        return {}, [f"{file}: no such config file"]
    except OSError as error:
        return {}, [f"{file}: expected a TOML file: {error.strerror}"]
    except UnicodeDecodeError as error:
        return {}, [f"{file}: expected a TOML file: {error}"]
    except ConfigError as error:
        return {}, [str(error)]


def _table_values(
    options: list[Option], table: Any, section: str, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """Fields by name from a table of the file, and what is wrong with it."""
    by_name = {option.name: option for option in options}
    _, problems = _said(lambda: check_keys(table, by_name, f"[{section}]"))
    values: dict[str, Any] = {}
    for name, value in table.items() if isinstance(table, Mapping) else ():
        if name in by_name:
            made, wrong = _said(functools.partial(by_name[name].from_toml, value, folder))
            problems += wrong
            if not wrong:
                values[name] = made
    return values, problems


def _problems_of_values(cls: type, section: str, values: Mapping[str, Any]) -> list[str]:
    """What is wrong with each value by itself: a section says the first thing alone."""
    return [
        problem
        for name, value in values.items()
        for problem in _said(functools.partial(cls, **{name: value}))[1]
        if problem.startswith(f"{section}: {name} must be ")  # and not that another must stand beside it
    ]


def _said(make: typing.Callable[[], Any]) -> tuple[Any, list[str]]:
    """What is made, or None and what the ConfigError says."""
    try:
        return make(), []
    except ConfigError as error:
        return None, [str(error)]


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")


def _help(option: Option) -> str:
    default = option.none if option.default is None else option.default
    if isinstance(default, bool):
        default = "on" if default else "off"
    shown = "" if default in (None, ()) else f" ({default})"
    return f"{option.doc.removesuffix('.')}{shown}".replace("%", "%%")


def _comment(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="# ", subsequent_indent="# ")


def _toml(value: Any) -> str:
    """A value as TOML writes it, which for these is as JSON does."""
    if dataclasses.is_dataclass(value):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return f"{{ {', '.join(f'{name} = {_toml(item)}' for name, item in pairs if item is not None)} }}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Path):  # a file's paths are from its own folder on
        value = str(value) if str(value) == _STANDARD_STREAM else str(value.absolute())
    return json.dumps(value, ensure_ascii=False)
