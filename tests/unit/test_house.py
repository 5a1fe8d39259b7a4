"""The house stands as docs/architecture.md draws it: imports run one way, one file knows the D-Bus library, the pure stays pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Each layer may import itself and every layer to its right; packages within one layer do not know each other.
LAYERS = (
    ("cli",),
    ("host", "client"),
    ("coordinator",),
    ("qemu",),
    ("machine", "transport", "testing"),
    ("bus", "protocol", "state", "memory"),
    ("errors",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
#: Packages that stand on less than their layer allows.
STANDS_ON = {
    "testing": {"testing", "bus", "state", "memory", "errors"},
    "client": {"client", "bus", "errors"},
}
DEVICES_STAND_ON = {"memory", "state", "bus", "errors"}
PURE = ("migrate/protocol", "migrate/state")
IMPURE_MODULES = {
    "asyncio",
    "socket",
    "time",
    "datetime",
    "random",
    "secrets",
    "threading",
    "subprocess",
    "select",
}


def modules() -> list[Path]:
    return sorted(p for top in ("migrate", "devices") for p in (ROOT / top).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def package_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "migrate" and len(parts) > 1 else None


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", modules(), ids=name)
def test_imports_run_one_way(path: Path) -> None:
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    for dotted in imports(path):
        target = package_of(dotted)
        if top == "devices":
            assert target is None or target in DEVICES_STAND_ON, f"{name(path)} imports {dotted}"
        else:
            assert not dotted.startswith("devices"), f"{name(path)} imports {dotted}"
            here = rest[0]
            if target in (None, here, "__version__") or here == "__init__":
                continue
            if here in STANDS_ON:
                assert target in STANDS_ON[here], f"{name(path)} imports {dotted}"
            else:
                assert RANK[here] < RANK[target], (
                    f"{name(path)} imports {dotted}: that arrow points the wrong way"
                )


def test_one_file_imports_the_dbus_library() -> None:
    found = {
        name(path)
        for path in modules()
        for dotted in imports(path)
        if dotted.split(".")[0] in ("dbus_next", "dbus_fast")
    }
    assert found == {"migrate/bus/library.py"}


def test_unicorn_stays_in_the_vcpus_own_process() -> None:
    found = {
        name(path) for path in modules() for dotted in imports(path) if dotted.split(".")[0] == "unicorn"
    }
    assert found
    assert all(path.startswith("devices/vcpu/") for path in found), found


@pytest.mark.parametrize("path", [p for p in modules() if name(p).startswith(PURE)], ids=name)
def test_protocol_and_state_know_no_clock_no_socket_no_loop(path: Path) -> None:
    assert not {dotted.split(".")[0] for dotted in imports(path)} & IMPURE_MODULES


@pytest.mark.parametrize("path", modules(), ids=name)
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    assert not {dotted.split(".")[0] for dotted in imports(path)} & {"pickle", "marshal", "shelve"}
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"eval", "exec"}


@pytest.mark.parametrize("path", modules(), ids=name)
def test_a_module_is_read_in_one_sitting_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500
    assert path.stem not in ("util", "utils", "helpers", "common", "misc")
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{name(path)} does not say what it is for"
