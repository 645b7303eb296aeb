"""An environment to learn from and to copy: a pocket calculator.

The policy writes an expression in tags and ends its turn; the calculator answers with the value, and the policy goes
on. A turn without tags is the final answer.

    policy       <calc>12*34</calc>
    calculator   = 408
    policy       408

configs/grpo_calculator.yaml trains with it.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from trainers.conversation import Episode

MAX_CHARACTERS = 100
MAX_DIGITS = 50
"""Of a value on the way: what a response can ask for is bounded."""

_CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
_OPERATIONS: dict[type[ast.AST], Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculator(episode: Episode) -> str | None:
    """The value of the turn's last expression; None if it has none.

    >>> calculator(Episode("12*34?", "408", ("Let me see: <calc>12*34</calc>",)))
    '= 408'
    >>> calculator(Episode("?", "", ("<calc>1/0</calc>",))), calculator(Episode("?", "", ("<calc>two</calc>",)))
    ('= error: division by zero', '= error: not an expression of numbers with + - * / and brackets')
    >>> calculator(Episode("12*34?", "408", ("408",)))
    """
    calls = _CALL.findall(episode.turns[-1])
    if not calls:
        return None
    try:
        return f"= {_shown(_value(calls[-1]))}"
    except ZeroDivisionError:
        return "= error: division by zero"
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return "= error: not an expression of numbers with + - * / and brackets"


def _value(expression: str) -> Fraction:
    if len(expression) > MAX_CHARACTERS:
        raise ValueError("too long")
    return _evaluate(ast.parse(expression.strip(), mode="eval").body)


def _evaluate(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = Fraction(str(node.value))
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        value = _OPERATIONS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        value = _OPERATIONS[type(node.op)](_evaluate(node.operand))
    else:
        raise ValueError("no arithmetic")
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise ValueError("too large")
    return value


def _shown(value: Fraction) -> str:
    """A whole number as such, any other to six digits."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
