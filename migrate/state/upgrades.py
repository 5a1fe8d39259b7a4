"""A state in another version of its schema: from version n to n±1, step by step, by a function where one is needed.

The rule without a function: a field that is new comes in at its default, a subsection that is new is not needed, and what stays
must fit the other version's bounds. What the other version does not have is left out, but going down only where nothing is lost
by it: a field that has its default, a subsection that is not needed. A function is needed where a field has another name,
follows from others, or means another thing; they stand in steps.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from migrate.errors import BlobError, Phase
from migrate.state.kinds import Wrong
from migrate.state.schema import Schema, SchemaVersion
from migrate.state.steps import STEPS, Lost


def convert(
    schema: Schema,
    values: Mapping[str, object],
    from_version: int,
    to_version: int,
    *,
    never_had: bool = False,
) -> dict[str, object]:
    """The state in that version; a state of this one where both are the same.

    :param values: a state that fits `from_version`.
    :param never_had: whoever writes it plays the release of that version, which never had what came later: going down, that is
        left out whatever it says.
    :raise BlobError: it would lose something that is needed, or a value does not fit; names what.
    :raise SchemaError: there is no such version.
    """
    state = dict(values)
    version = schema.at(from_version)
    schema.at(to_version)
    step = 1 if to_version > from_version else -1
    while version.version != to_version:
        target = schema.at(version.version + step)
        state, version = _one_step(schema, state, version, target, never_had), target
    return state


def _one_step(
    schema: Schema, state: dict[str, object], version: SchemaVersion, target: SchemaVersion, never_had: bool
) -> dict[str, object]:
    known = {field.name: field for field in target.fields}
    before = {field.name: field for field in version.fields}
    function = STEPS.get((schema.type, version.version, target.version))
    try:
        given = function(state) if function is not None else state
        made = {name: value for name, value in given.items() if name in known and value is not None}
        for name, field in known.items():
            if name not in made and not field.optional:
                made[name] = field.kind.canonical(field.fallback)
        if target.version < version.version and not never_had:
            for name, value in given.items():
                if (
                    name in before
                    and name not in known
                    and value is not None
                    and value != before[name].fallback
                ):
                    raise Lost(name, "is needed, and that version does not have it")
        return target.struct.canonical(made)
    except Lost as lost_one:
        raise _refused(schema, version, target, f".{lost_one.name} {lost_one.why}") from None
    except Wrong as wrong:
        raise _refused(schema, version, target, f"{wrong.path} {wrong.text}") from None


def _refused(schema: Schema, version: SchemaVersion, target: SchemaVersion, why: str) -> BlobError:
    return BlobError(
        f"this state of a {schema.type} cannot be written in version {target.version} (it is in {version.version}): {why}",
        remedy=f"have it read by a program that knows version {version.version}, or let the device come to a plainer state",
        phase=Phase.SAVE,
    )
