"""Schema files: what they mean, how versions and digests come out of them, and how a wrong one is reported."""

from __future__ import annotations

import hashlib

import pytest

from migrate.errors import SchemaError
from migrate.state.parse import parse

HEAD = 'type = "demo"\nversion = 3\n'


def field(name: str, rest: str) -> str:
    return f'[[field]]\nname = "{name}"\n{rest}\n'


A = field("a", 'type = "u8"')


def test_versions_have_the_fields_between_since_and_until() -> None:
    schema = parse(
        HEAD
        + A
        + field("b", 'type = "u8"\nuntil = 1')
        + field("c", 'type = "u16"\nuntil = 2')
        + field("c", 'type = "u32"\nsince = 3')
        + field("d", 'type = "bytes<=4"\nsince = 2\ndefault = "0aff"')
        + '[[subsection]]\nname = "s"\nsince = 3\n[[subsection.field]]\nname = "x"\ntype = "bool"\n',
        "demo.toml",
    )
    names = {
        number: [f"{entry.name}:{entry.kind.text()}" for entry in schema.at(number).fields]
        for number in (1, 2, 3)
    }
    assert names == {
        1: ["a:u8 0..255", "b:u8 0..255", "c:u16 0..65535"],
        2: ["a:u8 0..255", "c:u16 0..65535", "d:bytes 0..4"],
        3: ["a:u8 0..255", "c:u32 0..4294967295", "d:bytes 0..4", "s:struct { field x bool; }"],
    }
    assert schema.versions == (1, 2, 3)
    assert schema.version == 3
    assert schema.at(3).defaults() == {"a": 0, "c": 0, "d": b"\x0a\xff"}


def test_fields_of_structs_have_versions_too() -> None:
    fields = '{ name = "x", type = "u8" }, { name = "y", type = "i8", since = 2, default = -1 }'
    schema = parse(
        HEAD + field("q", f'type = "list<=4"\nitem = {{ type = "struct", fields = [{fields}] }}'), "demo.toml"
    )
    assert schema.at(1).encode({"q": [{"x": 1}]})
    assert schema.at(2).encode({"q": [{"x": 1, "y": -1}]})


def test_a_version_that_is_forgotten_is_no_longer_known() -> None:
    schema = parse(HEAD + "oldest = 2\n" + A + field("old", 'type = "u8"\nuntil = 1'), "demo.toml")
    assert schema.versions == (2, 3)
    with pytest.raises(SchemaError, match="demo has no schema version 1; known here: 2, 3"):
        schema.at(1)


def test_a_later_version_does_not_change_the_digest_of_an_earlier_one() -> None:
    before = parse('type = "demo"\nversion = 1\n' + A, "demo.toml").at(1)
    after = parse(HEAD + A + field("b", 'type = "u8"\nsince = 2\ndefault = 7'), "demo.toml").at(1)
    assert before.digest == after.digest


def test_the_digest_is_over_the_words_that_the_documentation_gives() -> None:
    version = parse(
        HEAD + field("a", 'type = "u64"\nunit = "ns"') + field("e", 'type = "enum"\nvalues = ["on", "off"]'),
        "demo.toml",
    ).at(1)
    words = "vmferry schema demo version 1\nfield a u64 0..18446744073709551615 in ns\nfield e enum on off\n"
    assert version.definition == words
    assert version.digest == hashlib.sha256(words.encode()).digest()


@pytest.mark.parametrize("change", ['doc = "words"', "default = 3", "min = 0", "max = 255"])
def test_docs_defaults_and_bounds_that_were_meant_anyway_do_not_change_the_digest(change: str) -> None:
    assert parse(HEAD + A + change, "d").at(1).digest == parse(HEAD + A, "d").at(1).digest


@pytest.mark.parametrize(
    "changed",
    [
        field("b", 'type = "u8"'),
        field("a", 'type = "u16"'),
        field("a", 'type = "u8"\nmax = 254'),
        field("a", 'type = "u8"\nunit = "ns"'),
        A + field("b", 'type = "bool"'),
    ],
)
def test_whatever_changes_a_version_changes_its_digest(changed: str) -> None:
    assert parse(HEAD + changed, "d").at(1).digest != parse(HEAD + A, "d").at(1).digest


def test_the_order_of_fields_is_part_of_a_definition() -> None:
    b = field("b", 'type = "bool"')
    assert parse(HEAD + A + b, "d").at(1).digest != parse(HEAD + b + A, "d").at(1).digest


def test_versions_and_types_with_the_same_fields_have_digests_of_their_own() -> None:
    schema = parse(HEAD + A, "d")
    other = parse(HEAD.replace("demo", "other") + A, "d")
    assert len({schema.at(1).digest, schema.at(2).digest, other.at(1).digest}) == 3


NESTED = 'type = "u8"'
for _ in range(9):
    NESTED = f'type = "list[1]"\nitem = {{ {NESTED.replace(chr(10), ", ")} }}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("type = ", ["is not TOML"]),
        ("[" * 100_000, ["is not TOML"]),
        ("version = 1\n" + A, ["`type` is not there"]),
        ('type = "../x"\nversion = 1\n' + A, ["`type` is '../x'"]),
        ('type = "demo"\n' + A, ["`version` is not there"]),
        ('type = "demo"\nversion = true\n' + A, ["`version` is true"]),
        ('type = "demo"\nversion = 0\n' + A, ["`version` is 0", "from 1"]),
        ('type = "demo"\nversion = 1000000000\n' + A, ["`version` is 1000000000"]),
        (HEAD + "oldest = 4\n" + A, ["`oldest` is 4", "1 to 3"]),
        (HEAD, ["version 1", "no field"]),
        (HEAD + "fields = 1\n" + A, ["unknown key 'fields'", "`field`"]),
        (HEAD + "field = 1", ["`field` has to be a list of tables"]),
        (HEAD + A + "sincee = 2", ["field 1 (a)", "'sincee'", "`since`"]),
        (HEAD + field("a b", 'type = "u8"'), ["field 1", "`name` is 'a b'"]),
        (HEAD + A + A, ["version 1", "a is there twice"]),
        (HEAD + A + "since = 4", ["`since` is 4", "1 to 3"]),
        (HEAD + A + "since = 3\nuntil = 2", ["`until` is 2", "3 to 3"]),
        (HEAD + A + field("b", 'type = "u8"\nsince = 2'), ["field 2 (b)", "new in version 2", "`default`"]),
        (HEAD + A + "max = 256", ["field 1 (a)", "`max` is 256", "0 to 255"]),
        (HEAD + A + "min = 9\nmax = 8", ["`max` is 8", "9 to 255"]),
        (HEAD + A + "default = 256", ["`default` is 256", "0..255"]),
        (HEAD + A + "default = true", ["`default` is true"]),
        (HEAD + A + 'values = ["x"]', ["`values` means nothing for u8"]),
        (HEAD + A + 'unit = "n;s"', ["`unit` is 'n;s'"]),
        (HEAD + A + "doc = 1", ["`doc` has to be a string"]),
        (HEAD + field("a", 'type = "u128"'), ["no type 'u128'", "u64", "bytes<=N"]),
        (HEAD + field("a", "type = 8"), ["`type` is 8"]),
        (HEAD + field("a", 'type = "bytes"'), ["no type 'bytes'"]),
        (HEAD + field("a", 'type = "str[4]"'), ["no type 'str[4]'", "str<=N"]),
        (HEAD + field("a", 'type = "bytes[2]"\ndefault = "xy"'), ["`default`", "hexadecimal"]),
        (HEAD + field("a", 'type = "bytes[2]"\ndefault = "00"'), ["`default` has 1 bytes", "not 2"]),
        (HEAD + field("a", 'type = "enum"'), ["`values`"]),
        (HEAD + field("a", 'type = "enum"\nvalues = ["x", "x"]'), ["twice"]),
        (HEAD + field("a", 'type = "enum"\nvalues = ["x y"]'), ["'x y'"]),
        (HEAD + field("a", 'type = "list<=4"'), ["`item`"]),
        (HEAD + field("a", 'type = "list<=16385"\nitem = { type = "u8" }'), ["16384"]),
        (HEAD + field("a", 'type = "list<=4"\nitem = { type = "u8", name = "x" }'), ["unknown key 'name'"]),
        (
            HEAD + field("a", 'type = "list[2]"\nitem = { type = "u8" }\ndefault = [1, 300]'),
            ["`default`[1] is 300"],
        ),
        (HEAD + field("a", 'type = "struct"'), ["no field"]),
        (
            HEAD + field("a", 'type = "struct"\nfields = [{ name = "b", type = "u9" }]'),
            ["field 1 (a)", "(b)", "'u9'"],
        ),
        (HEAD + field("a", NESTED), ["deeper than 8"]),
        (HEAD + field("a", 'type = "bytes<=16777216"'), ["16777216 is the limit"]),
        (
            HEAD
            + field("a", 'type = "list<=16384"\nitem = { type = "list<=16384", item = { type = "u64" } }'),
            ["is the limit"],
        ),
        (HEAD + A + '[[subsection]]\nname = "s"', ["subsection 1 (s)", "no field"]),
        (
            HEAD + A + '[[subsection]]\nname = "a"\n[[subsection.field]]\nname = "x"\ntype = "u8"',
            ["a is there twice"],
        ),
    ],
)
def test_a_wrong_file_is_reported_by_file_place_and_what_would_be_right(text: str, words: list[str]) -> None:
    with pytest.raises(SchemaError) as caught:
        parse(text, "/there/demo.toml")
    for word in ("/there/demo.toml", *words):
        assert word in caught.value.reason
    assert caught.value.remedy
