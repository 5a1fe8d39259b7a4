"""What `--keep` leaves: each participant's blob as it was saved after the stop, and what it streamed, however the job ended.

A disk that is full is no reason to lose a migration: what cannot be kept is a warning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Literal

from migrate.coordinator.outcome import Emit
from migrate.state import chunks


class Kept:
    def __init__(self, directory: str, emit: Emit) -> None:
        """:param directory: "" where nothing is to be kept."""
        self._directory = Path(directory) if directory else None
        self._emit = emit
        self._begun: set[str] = set()

    def chunk(self, device: str, data: bytes) -> None:
        if self._directory is None:
            return
        try:
            with self._open(device, "chunks", "ab" if device in self._begun else "wb") as file:
                if device not in self._begun:
                    file.write(chunks.KEPT)
                    self._begun.add(device)
                file.write(chunks.keep(data))
        except OSError as error:
            self._give_up(error)

    def blobs(self, found: Mapping[str, bytes]) -> None:
        try:
            for device, blob in found.items() if self._directory is not None else ():
                with self._open(device, "blob", "wb") as file:
                    file.write(blob)
        except OSError as error:
            self._give_up(error)

    def _open(self, device: str, kind: str, mode: Literal["ab", "wb"]) -> BinaryIO:
        assert self._directory is not None
        self._directory.mkdir(parents=True, exist_ok=True)
        return (self._directory / f"{os.path.basename(device)}.{kind}").open(mode)

    def _give_up(self, error: OSError) -> None:
        self._emit(
            {
                "event": "warning",
                "warning": f"the devices' state cannot be kept in {self._directory}: {error.strerror}",
            }
        )
        self._directory = None
