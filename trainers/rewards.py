"""The built-in rewards: 1 for a right response, 0 for a wrong one.

Both compare the response's text with the answer's. exact_number is for tasks whose answer is one number (arithmetic,
GSM8K); math_verify is for mathematics (MATH), where 1/2, 0.5 and \\frac{1}{2} are the same answer.
"""

import functools
import logging
import re
import threading
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from trainers.config import RewardConfig
from trainers.errors import ConfigError

MATH_TIMEOUT_S = 5  # whole seconds (signal.alarm) of wall-clock time; MATH-500's own solutions take 3 ms on average

# A minus after a digit, a letter or a closing bracket subtracts: "10-3" ends in 3, "3-4=-1" in -1.
# A comma belongs to a number where exactly three digits follow it: "1,234" is one number, "1,2" are two.
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w)\]}])[-\u2212])?(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def exact_number(response: str, answer: str) -> float:
    """1 if the last number of the response equals the answer, else 0.

    A number is an integer or a decimal, with a minus and with commas between thousands if need be; values are
    compared, so 7, 07 and 7.0 agree, and exactly, without floating point. Not read: exponents (1e3 ends in 3),
    fractions (1/2 ends in 2), numbers in words. Units and signs such as $ and % are ignored.

    Raises:
        ConfigError: if the answer is not one number.

    >>> exact_number("3-4=-1", "-1"), exact_number("It costs $1,234.50.", "1234.5"), exact_number("10-3", "-3")
    (1.0, 1.0, 0.0)
    """
    wanted = _as_number(answer)
    if wanted is None:
        raise ConfigError(
            f"the answer {answer!r} is not a number, so reward.name=exact_number can never give 1; "
            "set reward.name=math_verify"
        )
    last = None
    for last in _NUMBER.finditer(response):  # noqa: B007 (the last match is what is wanted)
        pass
    return float(last is not None and _value(last) == wanted)


def math_verify(response: str, answer: str) -> float:
    r"""1 if the final mathematical expression of the response equals the answer, by the math-verify library, else 0.

    The final expression is the last \boxed{...}, else the last formula or number. Odd input gives 0, never an error.

    Its time limit (5 s for reading and for each comparison) rests on signal.alarm, which works in the main thread
    only: it cancels an alarm of the caller's, and in any other thread there is no limit, so score in the main thread,
    of the rank or of a worker (reward.workers).

    >>> math_verify(r"so it is $\frac{1}{2}$", "0.5"), math_verify("2", "0.5"), math_verify("}{", "0.5")
    (1.0, 0.0, 0.0)
    """
    load_math_verify()
    try:
        return float(_agree(_parse_answer(answer), _parse(response, _math_timeout_s()), _math_timeout_s()))
    except Exception:  # none is known to come through the library, but a response must not end a run
        return 0.0


def check_answers(answers: Sequence[str], config: RewardConfig) -> None:
    """Refuse answers that the reward cannot compare with, before a run scores 0 for them for ever.

    Raises:
        ConfigError: if exact_number is one of the rewards and an answer is not one number.

    >>> check_answers(["7", "x^2"], RewardConfig("exact_number"))
    Traceback (most recent call last):
    ...
    trainers.errors.ConfigError: reward.name is exact_number, but 1 of 2 answers are not numbers, first that of row 1: \
'x^2'; set reward.name=math_verify
    """
    if "exact_number" not in config.paths:
        return
    odd = [row for row, answer in enumerate(answers) if _as_number(answer) is None]
    if odd:
        raise ConfigError(
            f"reward.name is exact_number, but {len(odd)} of {len(answers)} answers are not numbers, first that of row "
            f"{odd[0]}: {answers[odd[0]]!r}; set reward.name=math_verify"
        )


def _as_number(answer: str) -> Decimal | None:
    match = _NUMBER.fullmatch(answer.strip().strip("$%").strip())
    return None if match is None else _value(match)


def _value(match: re.Match[str]) -> Decimal:
    value = Decimal(match["digits"].replace(",", ""))
    return -value if match["minus"] else value


def _math_timeout_s() -> int | None:
    return MATH_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None


@functools.cache
def load_math_verify() -> None:
    """Compare once without a limit: sympy imports itself piece by piece, 2 s on a busy machine, and a right response
    must not lose its reward to that.
    """
    # At each time-out the library would log the whole response.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    assert _agree(_parse(r"$(x+1)^2$", None), _parse(r"$x^2+2x+1$", None), None)


def _agree(answer: list[Any], response: list[Any], timeout_s: int | None) -> bool:
    from math_verify import verify

    return verify(answer, response, timeout_seconds=timeout_s)


def _parse(text: str, timeout_s: int | None) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=timeout_s)  # None: no limit


@functools.lru_cache(maxsize=4096)
def _parse_answer(answer: str) -> list[Any]:
    # Boxed, since bare LaTeX is not recognised: of MATH-500's own answers 51 would be read as nothing.
    return _parse(f"\\boxed{{{answer}}}", _math_timeout_s())
