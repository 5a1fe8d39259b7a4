"""The demo's devices as servers that speak vfio-user and nothing else, each behind a bridge: `ferry demo --devices vfio-user`.

Both hosts know how each model is started; the machine names models.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Final

#: Of each device: its model, and what its command and its table in machine.toml have besides.
_DEVICES: Final = {
    "uart0": ("uart16550", "--option output={directory}/{id}.out", ""),
    "rtc0": ("rtc", "", ""),
    "display0": ("display", "", ""),
    "disk0": ("virtio-blk", "--option image={image}", "vectors = 3\n"),
}


def machine_toml(name: str, memory: str, cmdline: str, tracker: str, image: Path) -> str:
    wanted = f'tracker = "{tracker}"\n' if tracker else ""
    return (
        f'[machine]\nname = "{name}"\nmemory = "{memory}"\n\n[vcpu]\ncmdline = "{cmdline}"\n{wanted}'
        + "".join(
            f'\n[[device]]\nid = "{device}"\ntype = "vfio-user"\noptions = {{ model = "{model}" }}\n{more}{wanted}'
            + (f'image = "{image}"\n' if "{image}" in command else "")
            for device, (model, command, more) in _DEVICES.items()
        )
    )


def host_toml() -> str:
    """How bridges, and the servers behind them, are started."""
    python = shlex.quote(sys.executable)
    words = [sys.executable, "-m", "devices.bridges.vfio_user"]
    for model, more, _ in _DEVICES.values():
        module = f"devices.{model.replace('-', '_')}"
        serve = (
            f"{python} -m {module} --id {{id}} --socket {{socket}} --{{start}} --migration vfio-user {more}"
        )
        words += ["--serve", f"{model}={serve}"]
    return f"\n[device.vfio-user]\ncommand = {json.dumps(words)}\n"
