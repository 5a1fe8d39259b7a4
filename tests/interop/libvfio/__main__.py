"""`python -m tests.interop.libvfio DIRECTORY`: records what the libvfio-user that is built in DIRECTORY/build answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.interop.libvfio.script import RECORDED, SCENES
from tests.interop.libvfio.talk import Answer, play

_SOURCE: Final = Path(__file__).with_name("theirs.c")


def build(library: Path, directory: Path) -> tuple[Path, dict[str, str]]:
    """The program of theirs.c, and the environment that it runs in. :param library: a checkout, built in build/."""
    program, built = directory / "theirs", library / "build" / "lib"
    words = [
        "-O2",
        "-D_GNU_SOURCE",
        "-I",
        library / "include",
        "-o",
        program,
        _SOURCE,
        "-L",
        built,
        "-lvfio-user",
    ]
    subprocess.run(["cc", *words], check=True)
    return program, {**os.environ, "LD_LIBRARY_PATH": str(built)}


def ask(library: Path) -> dict[str, list[Answer]]:
    """Each scene, to a server of its own."""
    with tempfile.TemporaryDirectory(prefix="vf-") as made:
        server, environment = build(library, Path(made))
        answers = {}
        for number, (name, steps) in enumerate(SCENES.items()):
            path = Path(made) / f"s{number}"
            process = subprocess.Popen([server, path], env=environment)
            try:
                answers[name] = play(str(path), steps)
            finally:
                process.kill()
                process.wait()
        return answers


def main() -> None:
    answers = ask(Path(sys.argv[1]))
    RECORDED.write_text(json.dumps(answers, indent=1) + "\n")
    print(f"{sum(map(len, answers.values()))} answers in {RECORDED}")


if __name__ == "__main__":
    main()
