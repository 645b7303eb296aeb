"""Which responses count as right, and which never do."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers import rewards
from trainers.config import RewardConfig
from trainers.errors import ConfigError
from trainers.rewards import check_answers, exact_number, math_verify

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("7", "7", True),
        ("The answer is 7.", "7", True),
        ("3+4=7", "7", True),
        ("7 is 3+4", "7", False),  # the last number is 4
        ("8", "7", False),
        ("17", "7", False),
        ("", "7", False),
        ("seven", "7", False),
        ("07", "7", True),
        ("7.0", "7", True),
        ("7.5", "7", False),
        ("0.5", ".5", True),
        # minus
        ("-7", "-7", True),
        ("-7", "7", False),
        ("3-4=-1", "-1", True),
        ("3 - 4 = \u22121", "-1", True),
        ("10-3", "3", True),
        ("10-3", "-3", False),
        ("(2)-3", "3", True),
        ("-0", "0", True),
        # thousands
        ("$1,234.50!", "1234.5", True),
        ("1234", "1,234", True),
        ("12,345,678", "12345678", True),
        ("1,2", "2", True),
        ("1,2345", "2345", True),
        ("1,2345", "12345", False),
        ("it was 5,", "5", True),
        # exact, not by floating point
        ("9007199254740993", "9007199254740992", False),
        ("0.1", "0.1000000000000000000001", False),
        # as documented: not read
        ("1e3", "3", True),
        ("1/2", "2", True),
        ("\u0667", "7", False),  # an Arabic-Indic digit
        # decorations of the answer
        ("5", "$5", True),
        ("5", "5%", True),
    ],
)
def test_exact_number(response, answer, right):
    assert exact_number(response, answer) == float(right)


@pytest.mark.parametrize("answer", ["", "x", "1/2", "1 2", r"\frac{1}{2}", "1e3", "7 apples"])
def test_an_answer_that_is_not_one_number_is_refused(answer):
    with pytest.raises(ConfigError, match="set reward.name=math_verify"):
        exact_number("7", answer)
    with pytest.raises(ConfigError, match=r"1 of 3 answers are not numbers, first that of row 1"):
        check_answers(["7", answer, "-1,000.5"], RewardConfig("exact_number"))
    check_answers([answer], RewardConfig("math_verify"))


@given(st.integers(-(10**12), 10**12), st.text("abc .,()=+$", max_size=10))
def test_a_number_written_either_way_is_found_at_the_end(number, before):
    # A comma or a digit group right before it would belong to it: end the text with a space.
    assert exact_number(f"{before} {number}", f"{number:,}") == 1.0
    assert exact_number(f"{before} {number:,}.", str(number)) == 1.0
    assert exact_number(f"{before} {number}", str(number + 1)) == 0.0


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"so it is \boxed{\frac{1}{2}}", "0.5", True),
        (r"so it is \boxed{\frac{1}{3}}", "0.5", False),
        (r"The answer is $\left( 3, \frac{\pi}{2} \right)$.", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", True),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        ("He sold 24 clips.\n#### 72", "72", True),
        ("It is 1,234 dollars.", "1234", True),
        ("It is 73.", "72", False),
        ("", "72", False),
        ("no idea", "72", False),
        (r"\boxed{" * 50, "72", False),
        ("{{{{\\frac{", "72", False),
        ("\x00\ud83d\ufffd$", "72", False),
        ("72", "", False),
        ("72", r"\frac{", False),
    ],
)
def test_math_verify(response, answer, right):
    assert math_verify(response, answer) == float(right)


@settings(deadline=None, max_examples=50)
@given(st.text(r"\{}$^_()[]frac12.,=+-*/x", max_size=30))
def test_math_verify_never_raises(response):
    assert math_verify(response, "72") in (0.0, 1.0)


def test_an_error_inside_the_library_scores_0(monkeypatch):
    def fail(*_):
        raise RecursionError

    monkeypatch.setattr(rewards, "_parse", fail)
    assert math_verify("72", "72 (an answer not seen before)") == 0.0


def test_an_endless_expression_ends_in_time_and_leaves_no_alarm(monkeypatch):
    monkeypatch.setattr(rewards, "MATH_TIMEOUT_S", 1)
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    assert math_verify(r"\boxed{9^{9^{9^{9}}}}", "72") == 0.0
    assert time.monotonic() - start < 15  # at most 1 s to read and 1 s for each comparison
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.alarm(0) == 0


def test_the_library_is_imported_whole_before_the_clock_runs():
    # Else a right response scores 0 on a busy machine, where sympy takes seconds to import its parts.
    script = r"""
import sys
from trainers import rewards
unchanged, loaded = rewards._math_timeout_s, []
def spy():
    loaded.append(set(sys.modules))
    return unchanged()
rewards._math_timeout_s = spy
assert rewards.math_verify(r"\boxed{x^2-4x+4}", "(x-2)^2") == 1.0
late = sorted(set(sys.modules) - loaded[0])
assert not late, late
"""
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True, timeout=60)


def test_math_verify_works_in_a_thread_without_a_time_limit():
    scores = []
    thread = threading.Thread(target=lambda: scores.append(math_verify(r"\boxed{\frac{3}{4}}", "0.75")))
    thread.start()
    thread.join(30)
    assert scores == [1.0]
