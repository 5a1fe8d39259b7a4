"""What each word of `ferry schema` does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from migrate.cli.output import Output
from migrate.cli.schema import pages, released
from migrate.errors import SchemaError
from migrate.state import Schema, SchemaVersion, catalog, rules


def act(args: argparse.Namespace) -> int:
    output = Output(sys.stdout, sys.stderr, json=args.json)
    return _ACTIONS[args.action](args, output)


def _list(args: argparse.Namespace, output: Output) -> int:
    for schema in _schemas([]):
        newest = schema.at(schema.version)
        numbers = ", ".join(map(str, schema.versions))
        output.event(
            {
                "event": "schema",
                "type": schema.type,
                "versions": list(schema.versions),
                "max_bytes": newest.max_size,
                "doc": schema.doc,
            }
        )
        output.data(
            f"{schema.type:16} versions {numbers:10} at most {newest.max_size} bytes  {_first_line(schema.doc)}"
        )
    return _done(output)


def _show(args: argparse.Namespace, output: Output) -> int:
    schema, version = _version(args)
    output.event(pages.as_object(version))
    output.data(
        f"{schema.type} version {version.version} of {schema.version}; at most {version.max_size} bytes"
    )
    output.data(f"digest {version.digest.hex()}")
    for line in pages.fields(version):
        output.data(line)
    return _done(output)


def _check(args: argparse.Namespace, output: Output) -> int:
    if args.rules:
        for rule, text in rules.RULES.items():
            output.event({"event": "rule", "rule": rule, "text": text})
            output.data(f"{rule:28} {text}")
        return _done(output)
    broken = list(_broken(args))
    for found in broken:
        output.event(
            {
                "event": "broken",
                "rule": found.rule,
                "type": found.type,
                "version": found.version,
                "path": found.path,
                "text": found.text,
            }
        )
        output.data(str(found))
    against = f" against {args.against}" if args.against else ""
    if broken:
        output.complain(
            f"{len(broken)} rules are broken{against} (mend the schema files; `ferry schema check --rules` explains)"
        )
    else:
        output.say(f"the schemas stand{against}; neighbouring versions meet ({args.mode})")
    code = int(bool(broken))
    output.event(
        {
            "event": "outcome",
            "outcome": "broken" if broken else "done",
            "broken": len(broken),
            "exit_code": code,
        }
    )
    return code


def _broken(args: argparse.Namespace) -> Iterator[rules.Broken]:
    here: dict[str, Schema] = {}
    for name in args.types or catalog.types():
        try:
            here[name] = catalog.load(name)
        except SchemaError as error:
            yield rules.of_file(name, error)
    if args.against:
        before = released.load(args.against, args.path)
        wanted = {name: schema for name, schema in before.items() if not args.types or name in args.types}
        failed = set(args.types or catalog.types()) - here.keys()
        yield from rules.released(
            {name: schema for name, schema in wanted.items() if name not in failed}, here
        )
    for schema in here.values():
        yield from rules.steps(schema, args.mode)


def _matrix(args: argparse.Namespace, output: Output) -> int:
    for schema in _schemas(args.types):
        reads = rules.reads(schema)
        output.event(
            {
                "event": "matrix",
                "type": schema.type,
                "reads": {str(newest): list(numbers) for newest, numbers in reads.items()},
            }
        )
        output.data(
            f"{schema.type}: written in version →  " + "  ".join(f"{number:>3}" for number in schema.versions)
        )
        for newest, numbers in reads.items():
            cells = "  ".join("yes" if number in numbers else " no" for number in schema.versions)
            output.data(f"  read where {newest} is the newest  " + " " * (len(schema.type) - 3) + cells)
    return _done(output)


def _export(args: argparse.Namespace, output: Output) -> int:
    _, version = _version(args)
    made = pages.json_schema(version)
    output.event(made)
    output.data(json.dumps(made, indent=2))
    return 0


def _doc(args: argparse.Namespace, output: Output) -> int:
    schema = catalog.load(args.type)
    output.event({"event": "page", "type": schema.type, "markdown": "\n".join(pages.markdown(schema))})
    output.bulk(pages.markdown(schema))
    return 0


def _schemas(names: list[str]) -> Iterator[Schema]:
    for name in names or catalog.types():
        yield catalog.load(name)


def _version(args: argparse.Namespace) -> tuple[Schema, SchemaVersion]:
    schema = catalog.load(args.type)
    return schema, schema.at(args.version or schema.version)


def _first_line(text: str) -> str:
    return " ".join(text.split())[:60]


def _done(output: Output) -> int:
    output.event({"event": "outcome", "outcome": "done", "exit_code": 0})
    return 0


_ACTIONS: Final[Mapping[str, Callable[[argparse.Namespace, Output], int]]] = {
    "list": _list, "show": _show, "check": _check, "matrix": _matrix, "export": _export, "doc": _doc,
}  # fmt: skip
