"""Flags, TOML tables and the example text that are made of one dataclass."""

import argparse
import dataclasses
import enum
import tomllib
from pathlib import Path

import pytest

from xlarank.cli.sections import add_flags, config_text, field_docs, options_of, read_sections
from xlarank.errors import ConfigError


class Colour(enum.StrEnum):
    """For an enum field."""

    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paint:
    """How things look.

    Not shown.
    """

    colour: Colour = Colour.RED
    """The colour,
    over two lines."""

    coats: int = 2
    """Coats; 100% cover."""

    thickness: float = dataclasses.field(default=0.5, metadata={"flag": "thick"})
    """Millimetres."""

    shiny: bool = True
    """Whether it shines."""

    def __post_init__(self):
        object.__setattr__(self, "colour", Colour(self.colour))
        if self.coats < 0:
            raise ConfigError(f"paint: coats must be >= 0; was {self.coats}")
        if self.thickness < 0:
            raise ConfigError(f"paint: thickness must be >= 0; was {self.thickness}")
        if self.coats > 9 and not self.shiny:
            raise ConfigError(f"paint: expected shiny beside coats {self.coats}, got none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knot:
    """A place."""

    board: str
    places: tuple[int, ...] = ()
    kind: Colour = Colour.RED

    def __post_init__(self):
        object.__setattr__(self, "places", tuple(self.places))
        if self.board == "none":
            raise ConfigError("knot: no board")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wood:
    """What it is made of."""

    source: Path | None = None
    """Where it comes from."""

    boards: tuple[Path, ...] = ()
    """The boards."""

    saws: int | None = dataclasses.field(default=None, metadata={"none": "all"})
    """Saws to use."""

    label: str = 'a "b" \\ ü'
    """Its label."""

    knots: tuple["Knot", ...] = ()
    """Where they are."""

    secret: int = dataclasses.field(default=1, metadata={"flag": None})
    """Has no flag."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shop:
    """Sections."""

    paint: Paint = dataclasses.field(default_factory=Paint)
    wood: Wood = dataclasses.field(default_factory=Wood)


@pytest.fixture
def read(tmp_path):
    """Reads a config from words of the command line and the text of a file, None for no file."""

    def read(*words, file=None):
        parser = argparse.ArgumentParser(exit_on_error=False)
        add_flags(parser, Shop)
        path = None
        if file is not None:
            path = tmp_path / "shop.toml"
            path.write_text(file)
        return read_sections(Shop, parser.parse_args(words), path)

    return read


def test_nothing_said_gives_the_defaults(read):
    assert read() == (Shop(), [])
    assert read(file="") == (Shop(), [])


def test_every_kind_of_flag_and_key_says_the_same(read, tmp_path):
    expected = Shop(
        paint=Paint(colour=Colour.BLUE, coats=3, thickness=2.0, shiny=False),
        wood=Wood(source=tmp_path / "s", boards=(tmp_path / "a", Path("/b")), saws=4, label="x"),
    )
    words = "--colour blue --coats 3 --thick 2 --no-shiny --boards /b --saws 4 --label x"
    flags = [*words.split(), "--source", str(tmp_path / "s")]
    at = flags.index("--boards")
    flags[at:at] = ["--boards", str(tmp_path / "a")]
    file = """
        [paint]
        colour = "blue"
        coats = 3
        thickness = 2
        shiny = false
        [wood]
        source = "s"
        boards = ["a", "/b"]
        saws = 4
        label = "x"
    """
    assert read(*flags) == (expected, [])
    assert read(file=file) == (expected, [])


def test_a_flag_goes_before_the_file_and_the_file_before_the_default(read):
    file = "[paint]\ncoats = 5\nshiny = false\n[wood]\nsaws = 3\nboards = ['a']\n"
    config, problems = read("--coats", "7", "--shiny", "--saws", "all", "--boards", "z", file=file)
    assert problems == []
    assert (config.paint.coats, config.paint.shiny, config.wood.saws) == (7, True, None)
    assert config.wood.boards == (Path("z"),)
    config, _ = read("--colour", "blue", file=file)
    assert (config.paint.coats, config.paint.shiny, config.wood.saws) == (5, False, 3)


@pytest.mark.parametrize(
    ("file", "told"),
    {
        "[pain]": "shop.toml: sections: unknown keys ['pain']; expected of ['paint', 'wood']",
        "[paint]\ncoat = 1": (
            "shop.toml: [paint]: unknown keys ['coat']; expected of ['colour', 'coats', 'thickness', 'shiny']"
        ),
        "paint = 3": "shop.toml: [paint]: expected a table of keys and values, got 3",
        "[paint]\ncoats = '1'": "shop.toml: [paint] coats must be an integer; was '1'",
        "[paint]\ncoats = true": "shop.toml: [paint] coats must be an integer; was True",
        "[paint]\ncoats = 1.0": "shop.toml: [paint] coats must be an integer; was 1.0",
        "[paint]\ncoats = -1": "shop.toml: paint: coats must be >= 0; was -1",
        "[paint]\nshiny = 1": "shop.toml: [paint] shiny must be true or false; was 1",
        "[paint]\nthickness = 'x'": "shop.toml: [paint] thickness must be a number; was 'x'",
        "[paint]\ncolour = 'green'": (
            "shop.toml: [paint] colour must be one of ['red', 'blue']; was 'green'"
        ),
        "[wood]\nsaws = 'some'": "shop.toml: [wood] saws must be an integer or 'all'; was 'some'",
        "[wood]\nboards = 'a'": "shop.toml: [wood] boards must be a list, each a path; was 'a'",
        "[wood]\nboards = [1]": "shop.toml: [wood] boards must be a list, each a path; was [1]",
        "[wood]\nsource = ['a']": "shop.toml: [wood] source must be a path; was ['a']",
        "[wood]\nknots = 3": "shop.toml: [wood] knots must be a list, each a table of ['board', ",
        "[[wood.knots]]\nboards = 1": "shop.toml: [[wood.knots]]: unknown keys ['boards']; expected of [",
        "[[wood.knots]]": "shop.toml: [[wood.knots]]: missing keys ['board']",
        "[[wood.knots]]\nboard = 'none'": "shop.toml: knot: no board",
        "[wood": "shop.toml: expected a TOML file: ",
        f"a = {'[' * 5000}": "shop.toml: expected a TOML file: values are nested too deeply",
    }.items(),
)
def test_what_is_wrong_in_a_file_is_named(read, tmp_path, file, told):
    config, (problem,) = read(file=file)
    assert config is None
    assert problem.startswith(f"{tmp_path}/{told}")


def test_every_problem_is_told(read):
    config, problems = read("--coats", "-2", file="spam = 1\n[wood]\nsaws = 1.5\nlabel = 2\n")
    assert config is None
    assert [problem.rpartition("/")[2] for problem in problems] == [
        "shop.toml: sections: unknown keys ['spam']; expected of ['paint', 'wood']",
        "paint: coats must be >= 0; was -2",
        "shop.toml: [wood] saws must be an integer or 'all'; was 1.5",
        "shop.toml: [wood] label must be a string; was 2",
    ]


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("coats = -1\nthickness = -2.0", ["coats must be >= 0; was -1", "thickness must be >= 0; was -2.0"]),
        (
            "thickness = -2.0\nshiny = 3",
            ["shiny must be true or false; was 3", "thickness must be >= 0; was -2.0"],
        ),
        ("coats = 10\nshiny = false", ["expected shiny beside coats 10, got none"]),
        ("thickness = -2.0\ncoats = 10\nshiny = false", ["thickness must be >= 0; was -2.0"]),
        ("coats = 10\nshiny = 3", ["shiny must be true or false; was 3"]),
    ],
)
def test_every_wrong_value_of_a_section_is_told(read, table, told):
    _, problems = read(file=f"[paint]\n{table}\n")
    assert len(problems) == len(told)
    for problem, ending in zip(problems, told, strict=True):
        assert problem.endswith(ending)


def test_a_file_that_can_t_be_read_is_a_problem(read, tmp_path):
    assert read_sections(Shop, argparse.Namespace(), tmp_path / "none.toml")[1] == [
        f"{tmp_path}/none.toml: no such config file"
    ]
    assert "expected a TOML file" in read_sections(Shop, argparse.Namespace(), tmp_path)[1][0]
    (tmp_path / "latin").write_bytes(b"\xff")
    assert "expected a TOML file" in read_sections(Shop, argparse.Namespace(), tmp_path / "latin")[1][0]


@pytest.mark.parametrize(
    "config",
    [
        Shop(),
        Shop(
            paint=Paint(colour=Colour.BLUE, coats=0, thickness=1e-9, shiny=False),
            wood=Wood(
                source=Path("/s"),
                boards=(Path("/a b"), Path("/ü")),
                saws=1,
                label='"\n\\',
                knots=(Knot(board="a", places=(1, 2)),),
            ),
        ),
    ],
)
def test_the_text_of_a_config_reads_back_as_it(read, config):
    assert read(file=config_text(config)) == (config, [])


def test_the_text_says_every_option_what_it_means_and_none_twice():
    text = config_text(Shop())
    lines = text.splitlines()
    assert lines[:5] == [
        "# How things look.",
        "[paint]",
        "",
        "# The colour, over two lines.",
        'colour = "red"',
    ]
    assert "# source = (a path; none by default)" in lines
    for option in options_of(Shop):
        assert sum(line.removeprefix("# ").startswith(f"{option.name} = ") for line in lines) == 1
    assert tomllib.loads(text)["wood"]["saws"] == "all"


def test_help_shows_docs_and_defaults():
    parser = argparse.ArgumentParser(prog="shop")
    add_flags(parser, Shop)
    text = " ".join(parser.format_help().split())
    assert "[paint]: How things look. --colour {red,blue}" in text
    assert "--coats N Coats; 100% cover (2)" in text
    assert "Whether it shines (on)" in text
    assert "--saws N|all Saws to use (all)" in text
    assert "--secret" not in text
    assert "--thickness" not in text


def test_two_sections_can_t_have_the_same_flag():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Twice:
        paint: Paint
        again: Paint

    with pytest.raises(argparse.ArgumentError, match="conflicting option string"):
        add_flags(argparse.ArgumentParser(), Twice)


def test_a_field_without_a_string_is_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Bare:
        told: int = 1
        """Something."""

        untold: int = 2

    with pytest.raises(
        TypeError, match=r"Bare: expected a string under each field, got none under \['untold'\]"
    ):
        field_docs(Bare)
