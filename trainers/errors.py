"""The error that a user can mend, and the two range checks that raise it."""

from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A mistake that the user can mend; trainers.cli shows its message without a traceback and exits with code 1."""


def check_least(section: str, owner: Any, least: Mapping[str, float]) -> None:
    """See that no number of `owner` lies below its least value; None passes, NaN does not.

    Raises:
        ConfigError: naming the first that does.
    """
    for name, bound in least.items():
        value = getattr(owner, name)
        if value is not None and not value >= bound:
            raise ConfigError(f"{section}.{name} is {value}; it must be at least {bound}")


def check_above_zero(section: str, owner: Any, *names: str) -> None:
    """See that these numbers of `owner` are above 0; None passes, NaN does not.

    Raises:
        ConfigError: naming the first that is not.
    """
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{section}.{name} is {value}; it must be above 0")
