"""What differs between two states, field by field. Between versions, too: what one of them does not have is missing there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final


class Missing:
    """Stands where one side has no such value."""

    def __repr__(self) -> str:
        return "(not there)"


MISSING: Final = Missing()


@dataclass(frozen=True, slots=True)
class Difference:
    path: str
    left: object
    right: object


def differences(left: object, right: object, path: str = "") -> Iterator[Difference]:
    """In the left one's order, then what only the right one has. Nothing where both are the same."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for name in [*left, *(name for name in right if name not in left)]:
            yield from differences(left.get(name, MISSING), right.get(name, MISSING), f"{path}.{name}")
    elif _is_list(left) and _is_list(right):
        assert isinstance(left, Sequence)
        assert isinstance(right, Sequence)
        for at in range(max(len(left), len(right))):
            yield from differences(
                left[at] if at < len(left) else MISSING,
                right[at] if at < len(right) else MISSING,
                f"{path}[{at}]",
            )
    elif type(left) is not type(right) or left != right:
        yield Difference(path or ".", left, right)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
