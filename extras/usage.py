"""What you are told where an option cannot be: its flag, and the file that it needs.

Five files of extras/ are leaves: many, tree, paper, plan and report. You may delete them. Nothing
imports a leaf at its top; whoever wants one asks `leaf` for it, and lives with its absence.
"""

from importlib import import_module
from types import ModuleType


MEMORY_OPTIONS = "--rollout-batch, --eval-batch or --micro-batch-tokens, or use --lora-rank 16"


class UsageError(ValueError):
    """An option that cannot be; the message says which and what would do."""


def flag_of(name: str) -> str:
    """The option's name on the command line."""
    return "--" + name.replace("_", "-")


def leaf(name: str, option: str | None = None) -> ModuleType | None:
    """The module extras/NAME.py. Where you deleted it: None, or a UsageError that names `option`.

    A leaf that is there and lacks a package of its own raises ModuleNotFoundError.
    """
    try:
        return import_module(f"extras.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"extras.{name}":
            raise
        if option is None:
            return None
        raise UsageError(f"{option} needs extras/{name}.py, which is missing here. Bring the file "
                         "back, or leave the option out") from None
