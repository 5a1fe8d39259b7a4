"""Ways to start `ferry demo` with less than this process may: without capabilities, and on a kernel that lacks a call."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
NOBODY: Final = 65534


def unprivileged() -> list[str]:
    """Without any capability and no way to gain one; as another user where that user may read what we run."""
    words = ["setpriv", "--no-new-privs"]
    if os.geteuid() == 0:
        words += ["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
        if all(map(_anybody_reads, (Path(sys.executable), Path(os.__file__), HERE))):
            words += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        else:  # uid 0 owns the files, and has no other power left: execve gives it what the bounding set allows, nothing
            words += ["--reuid=0"]
    return [*words, "--"]


def _anybody_reads(path: Path) -> bool:
    real = path.resolve()
    return all(one.stat().st_mode & 0o005 == 0o005 for one in (real, *real.parents) if one.is_dir()) and bool(
        real.stat().st_mode & 0o004
    )


def refusing(what: str) -> Callable[[], list[str]]:
    return lambda: [sys.executable, str(HERE / "refusing.py"), what, "--"]


LAUNCHERS: Final[Mapping[str, Callable[[], list[str]]]] = {
    "": list,
    "unprivileged": unprivileged,
    "no-pagemap-scan": refusing("pagemap-scan"),
    "no-userfaultfd": refusing("userfaultfd"),
}
