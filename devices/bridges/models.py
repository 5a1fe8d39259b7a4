"""What stands behind a bridge: its command by model, filled in with the machine's options.

Which models a host has, and how each is started, is said by whoever keeps that host (`--serve MODEL=COMMAND`, in host.toml); a
machine that arrives names a model, and its options fill the command's braces, one word at most each.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Final

from migrate.errors import Phase, UsageError

_BRACES: Final = re.compile(r"\{([A-Za-z0-9_.-]*)\}")


def parse(parser: argparse.ArgumentParser, *, serve: str, option: str) -> argparse.Namespace:
    """The arguments of a bridge's process, beside those of every participant's. :param serve, option: what --help says of them."""
    parser.add_argument(
        "--socket", metavar="PATH", required=True, help="serve vfio-user to the VMM on this Unix socket"
    )
    parser.add_argument("--serve", action="append", default=[], metavar="MODEL=COMMAND", help=serve)
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help=option)
    return parser.parse_args()


def parse_models(pairs: Sequence[str]) -> dict[str, list[str]]:
    """`MODEL=COMMAND`, the command in words as a shell parts them. :raise UsageError: it is no such thing, or twice there."""
    models: dict[str, list[str]] = {}
    for pair in pairs:
        model, equals, command = pair.partition("=")
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"--serve {pair}: {error}", remedy="mend its quotes") from None
        if not model or not equals or not words or model in models:
            raise UsageError(
                f"--serve {pair}: {'a model twice' if model in models else 'no MODEL=COMMAND'}",
                remedy="write --serve 'MODEL=program word {socket}', once for each model",
            )
        models[model] = words
    return models


def command_of(
    models: Mapping[str, Sequence[str]], options: Mapping[str, str], ours: Mapping[str, str], kind: str
) -> list[str]:
    """The command of the model that the options name, filled in.

    :param ours: what a command may have besides the options, such as {id}.
    :param kind: the type of the bridge's devices.
    :raise UsageError: this host has no such model, or the command and the options do not fit together.
    """
    model = options.get("model", "")
    if model not in models:
        near = difflib.get_close_matches(model, models, 1, 0.5)
        raise UsageError(
            f"this host has no {kind} server for model {model!r}"
            + (f" (did you mean {near[0]!r}?)" if near else f": it has {', '.join(models) or 'none'}"),
            remedy=f"add --serve MODEL=COMMAND to command under [device.{kind}] in its host.toml"
            + (", or name `server`" if kind == "vfio-user" else ""),
            phase=Phase.SETUP,
        )
    known = {**options, **ours}
    used = {name for word in models[model] for name in _BRACES.findall(word)}
    wrong = sorted(used - known.keys()) or sorted(options.keys() - used - {"model"})
    if wrong:
        raise UsageError(
            f"the command of model {model!r} {'has' if wrong[0] in used else 'does not have'} {{{wrong[0]}}}, "
            f"and the machine gives {', '.join(sorted(options))}",
            remedy=f"besides options a command may have {', '.join(f'{{{name}}}' for name in ours)}",
            phase=Phase.SETUP,
        )
    return [_BRACES.sub(lambda found: known[found[1]], word) for word in models[model]]


def parse_options(pairs: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE`. :raise UsageError: it is no such thing, or twice there."""
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or key in options:
            raise UsageError(
                f"--option {pair}: {'given twice' if key in options else 'no KEY=VALUE'}",
                remedy="write --option KEY=VALUE, each key once",
            )
        options[key] = value
    return options
