"""The schemas as they were released: in a revision of git, or in a directory. The only place that asks git."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from migrate.errors import UsageError
from migrate.state import Schema
from migrate.state.parse import parse

#: git answers at once, or something is wrong, s.
_PATIENCE: Final = 20.0
_MOST: Final = 1 << 20


def load(against: str, path: str) -> Mapping[str, Schema]:
    """:raise UsageError: there is no such directory or revision. SchemaError: what is there is no schema."""
    texts = _of_directory(Path(against)) if Path(against).is_dir() else _of_git(against, path)
    if not texts:
        raise UsageError(
            f"there is no schema file in {against}", remedy="name a directory that has *.toml, or give --path"
        )
    found = [parse(text, f"{against}: {name}") for name, text in texts.items()]
    return {schema.type: schema for schema in found}


def _of_directory(directory: Path) -> dict[str, str]:
    try:
        return {
            path.name: path.read_text()
            for path in sorted(directory.glob("*.toml"))
            if path.stat().st_size <= _MOST
        }
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{directory} cannot be read: {error}", remedy="name another directory") from None


def _of_git(revision: str, path: str) -> dict[str, str]:
    if revision.startswith("-"):
        raise UsageError(f"{revision} is no revision", remedy="name a tag, a branch or a commit")
    names = _git("ls-tree", "--name-only", "--full-name", revision, "--", path.rstrip("/") + "/").splitlines()
    return {name: _git("show", f"{revision}:{name}") for name in names if name.endswith(".toml")}


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, check=False, timeout=_PATIENCE, stdin=subprocess.DEVNULL,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"},
        )  # fmt: skip
    except FileNotFoundError:
        raise UsageError(
            "git is not installed here", remedy="install it, or give a directory to --against"
        ) from None
    except (subprocess.TimeoutExpired, UnicodeDecodeError) as error:
        raise UsageError(f"git did not answer: {error}", remedy="give a directory to --against") from None
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UsageError(
            f"git says: {why[0][:200]}",
            remedy="run it in a checkout, and name a directory or a revision that is there",
        )
    return done.stdout
