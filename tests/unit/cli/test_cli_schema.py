"""`ferry schema`: what is there, what may not change, and pages that are made from it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from migrate.cli.main import main
from migrate.cli.schema import pages
from migrate.state import catalog, rules
from migrate.state.parse import parse

ROOT = Path(__file__).parents[3]
OLD = """
type = "made"
version = 2
[[field]]
name = "count"
type = "u8"
max = 100
[[field]]
name = "level"
type = "u16"
unit = "mV"
[[field]]
name = "mode"
type = "enum"
values = ["slow", "fast"]
since = 2
default = "slow"
[[subsection]]
name = "pending"
since = 2
[[subsection.field]]
name = "bytes"
type = "bytes<=8"
"""


def ferry(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["schema", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Where it was released, and where it is now."""
    old, new = tmp_path / "old", tmp_path / "new"
    for place in (old, new):
        place.mkdir()
        (place / "made.toml").write_text(OLD)
    monkeypatch.setenv("FERRY_SCHEMAS", str(new))
    return old, new


@pytest.mark.parametrize(
    ("was", "becomes", "found"),
    [
        ("max = 100\n", "", {"RELEASED_VERSION_IMMUTABLE", "FIELD_SAME_TYPE"}),
        ('unit = "mV"\n', 'unit = "V"\n', {"RELEASED_VERSION_IMMUTABLE", "FIELD_SAME_UNIT"}),
        (
            'name = "level"\ntype = "u16"\nunit = "mV"\n[[field]]\n',
            "",
            {"RELEASED_VERSION_IMMUTABLE", "FIELD_NO_DELETE"},
        ),
        (
            'name = "level"\n',
            'name = "height"\n',
            {"RELEASED_VERSION_IMMUTABLE", "FIELD_NO_DELETE", "FIELD_NO_ADD"},
        ),
        ('since = 2\ndefault = "slow"\n', "", {"RELEASED_VERSION_IMMUTABLE", "FIELD_NO_ADD"}),
        ("version = 2\n", "version = 2\noldest = 2\n", {"VERSION_NO_DELETE"}),
        ("bytes<=8", "bytes<=9", {"RELEASED_VERSION_IMMUTABLE", "FIELD_SAME_TYPE"}),
        (OLD[OLD.index("[[subsection]]") :], "", {"RELEASED_VERSION_IMMUTABLE", "SUBSECTION_NO_DELETE"}),
        ('default = "slow"\n', "", {"FIELD_NEEDS_DEFAULT"}),
        ('type = "u16"', 'type = "u17"', {"FILE_IS_A_SCHEMA"}),
    ],
)
def test_what_was_released_does_not_change(
    was: str, becomes: str, found: set[str], places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = places
    assert ferry(capsys, "check", "made", "--against", old)[0] == 0
    assert was in OLD
    (new / "made.toml").write_text(OLD.replace(was, becomes, 1))
    code, out, err = ferry(capsys, "check", "made", "--against", old, "--json")
    assert code == 1
    *broken, outcome = [json.loads(line) for line in out.splitlines()]
    assert {item["rule"] for item in broken} == found
    assert found <= rules.RULES.keys()
    assert outcome["exit_code"] == 1
    assert "are broken" in err


def test_a_type_that_is_gone_is_missed(places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    old, new = places
    (new / "made.toml").unlink()
    code, out, _ = ferry(capsys, "check", "--against", old)
    assert code == 1
    assert out.startswith("TYPE_NO_DELETE: made: it is gone")


@pytest.mark.parametrize(
    ("third", "backward", "forward"),
    [
        ("", set(), set()),
        ('[[field]]\nname = "count"\ntype = "u32"\nsince = 3\ndefault = 0\n', set(), {"BOUNDS_NO_WIDEN"}),
        (
            '[[field]]\nname = "count"\ntype = "u8"\nmax = 50\nsince = 3\ndefault = 0\n',
            {"BOUNDS_NO_NARROW"},
            set(),
        ),
        (
            '[[field]]\nname = "count"\ntype = "bool"\nsince = 3\ndefault = false\n',
            {"FIELD_SAME_TYPE"},
            {"FIELD_SAME_TYPE"},
        ),
    ],
)
def test_neighbouring_versions_meet_or_the_rule_says_why_not(
    third: str, backward: set[str], forward: set[str]
) -> None:
    text = OLD.replace("version = 2", "version = 3")
    if third:
        text = text.replace("max = 100\n", "max = 100\nuntil = 2\n") + third
        # Subsections come last in a file.
        section = text[text.index("[[subsection]]") : text.index(third)]
        text = text.replace(section, "") + section
    schema = parse(text, "made")
    assert {found.rule for found in rules.steps(schema, "backward")} == backward
    assert {found.rule for found in rules.steps(schema, "forward")} == forward
    assert {found.rule for found in rules.steps(schema, "full")} == backward | forward


def test_words_of_an_enum_stay() -> None:
    text = OLD.replace("version = 2", "version = 3").replace(
        'default = "slow"', 'default = "slow"\nuntil = 2'
    )
    more = '[[field]]\nname = "mode"\ntype = "enum"\nvalues = ["slow", "warp"]\nsince = 3\ndefault = "slow"\n'
    schema = parse(text.replace("[[subsection]]", more + "[[subsection]]", 1), "made")
    assert [(found.rule, found.path) for found in rules.steps(schema, "full")] == [
        ("ENUM_VALUE_NO_DELETE", ".mode"),
        ("ENUM_VALUE_NO_ADD", ".mode"),
    ]


def test_against_a_revision_of_git(
    places: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = places
    monkeypatch.chdir(old)
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one"],
    ):
        subprocess.run(["git", *words], check=True)
    assert ferry(capsys, "check", "made", "--against", "HEAD", "--path", ".")[0] == 0
    (new / "made.toml").write_text(OLD.replace("max = 100", "max = 99"))
    code, out, _ = ferry(capsys, "check", "made", "--against", "HEAD", "--path", ".")
    assert code == 1
    assert "FIELD_SAME_TYPE: made version 1.count: it was u8 0..100 and is u8 0..99" in out
    code, _, err = ferry(capsys, "check", "--against", "nowhere")
    assert code == 2
    assert "git says: " in err
    assert ferry(capsys, "check", "--against", "--output=x")[0] == 2


def test_what_comes_with_vmferry_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert ferry(capsys, "check")[:2] == (0, "")


def test_list_show_and_matrix_have_every_type_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    listed = ferry(capsys, "list")[1]
    assert [line.split()[0] for line in listed.splitlines()] == catalog.types()
    for name in catalog.types():
        for number in catalog.load(name).versions:
            shown = ferry(capsys, "show", name, "--version", number)[1]
            assert all(field.name in shown for field in catalog.load(name).at(number).fields)
    matrix = ferry(capsys, "matrix", "uart16550")[1].splitlines()
    assert [line.split()[-3:] for line in matrix[1:]] == [
        ["yes", "no", "no"],
        ["yes", "yes", "no"],
        ["yes", "yes", "yes"],
    ]
    code, _, err = ferry(capsys, "show", "uart16551")
    assert code == 1
    assert "the nearest is uart16550" in err


def test_every_rule_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert [line.split()[0] for line in ferry(capsys, "check", "--rules")[1].splitlines()] == [*rules.RULES]


@pytest.mark.parametrize("name", catalog.types())
def test_the_page_of_a_type_is_current(name: str) -> None:
    page = "\n".join(pages.markdown(catalog.load(name))) + "\n"
    assert (ROOT / "docs" / "schemas" / f"{name}.md").read_text() == page, (
        f"ferry schema doc {name} > docs/schemas/{name}.md"
    )


@pytest.mark.parametrize("name", catalog.types())
def test_a_json_schema_has_every_field_with_its_bounds(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(ferry(capsys, "export", name)[1])
    version = catalog.load(name).at(catalog.load(name).version)
    assert [*made["properties"]] == [field.name for field in version.fields]
    assert made["required"] == [field.name for field in version.fields if not field.optional]
    assert made["additionalProperties"] is False
