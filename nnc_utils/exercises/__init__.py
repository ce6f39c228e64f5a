"""The exercises of the course: `check` says whether an answer is right, or in words what is wrong with it.

Each notebook has a module of checkers here. Wrong answers that each has to notice are in ``tests/exercises``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

MODULES = {  # first number of an exercise -> the module of its notebook's checkers
    **{"1": "baseline", "2": "quantization", "3": "pruning", "4": "distillation"},
    **{"5": "search", "6": "pipeline", "7": "deployment"},
    "8": "federated",
    "9": "transfer",
}
CHECKERS: dict[str, Callable[..., None]] = {}


class Wrong(AssertionError):
    """What is wrong with an answer, in the learner's words; a notebook shows that line alone."""

    def _render_traceback_(self) -> list[str]:
        return [f"Not yet. {self}"]


def exercise(number: str) -> Callable:
    """Make a function the checker of an exercise: it gets the answers, and raises `Wrong`."""

    def keep(checker: Callable[..., None]) -> Callable[..., None]:
        CHECKERS[number] = checker
        return checker

    return keep


def check(number: str, *answers: Any) -> None:
    """Check the answers to an exercise, such as "2.1": print that they are right, or raise `Wrong`.

    What a learner's own function raises comes through without the checker's lines, which tell the answer.
    """
    importlib.import_module(f"{__name__}.{MODULES[number.partition('.')[0]]}")
    try:
        CHECKERS[number](*answers)
    except Wrong:
        raise
    except NotImplementedError:
        raise Wrong(f"Exercise {number} is still empty: write its lines, then run both cells.") from None
    except Exception as error:
        lines = error.__traceback__
        while lines and Path(lines.tb_frame.f_code.co_filename).parent == Path(__file__).parent:
            lines = lines.tb_next
        raise error.with_traceback(lines or error.__traceback__) from error.__cause__
    print(f"Exercise {number}: right.")


def expect(holds: bool, otherwise: str) -> None:
    """Raise `Wrong` with a sentence for the learner unless something holds."""
    if not holds:
        raise Wrong(otherwise)


def near(given: Any, wrong: Any) -> bool:
    """Whether an answer is this known wrong one; what is no number of its shape is not."""
    try:
        given, wrong = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (given, wrong))
    except (TypeError, ValueError, RuntimeError):
        return False
    return given.shape == wrong.shape and torch.allclose(given, wrong, rtol=1e-4, atol=1e-7)


def same(given: Any, wanted: Any, otherwise: str, *, tolerance: float = 1e-4) -> None:
    """Raise `Wrong` unless numbers are equal: `otherwise`, or what is wrong with their type or shape.

    `tolerance` is relative to the largest wanted number.
    """
    expect(given is not None, "Your function returns nothing: does it end in `return`?")
    try:
        given = torch.as_tensor(given, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"Your answer is a {type(given).__name__}: a number or a tensor is asked for.") from None
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    shapes = [tuple(tensor.shape) for tensor in (given, wanted)]
    expect(shapes[0] == shapes[1], f"The shape is {shapes[0]}: {shapes[1]} is asked for. {otherwise}")
    expect(bool(torch.isfinite(given).all()), f"{otherwise} It holds numbers that are not finite.")
    largest = max(float(wanted.abs().max()) if wanted.numel() else 0.0, 1e-12)
    expect(bool(((given - wanted).abs() <= tolerance * largest).all()), otherwise)


def tell(given: Any, known: Iterable[tuple[Any, str]]) -> None:
    """Raise `Wrong` with the sentence of the known wrong answer that an answer is."""
    for wrong, said in known:
        expect(not near(given, wrong), said)


def judge(given: Any, wanted: Any, otherwise: str, known: Iterable[tuple[Any, str]], **how: float) -> None:
    """As `same`, but known wrong answers have sentences of their own, unless one is right here."""
    tell(given, [(wrong, said) for wrong, said in known if not near(wrong, wanted)])
    same(given, wanted, otherwise, **how)


def parts(given: Any, names: str) -> tuple[Any, ...]:
    """An answer of several parts, or `Wrong` where it has another number of them than there are names."""
    expect(given is not None, "Your function returns nothing: does it end in `return`?")
    right = isinstance(given, tuple | list) and len(given) == len(names.split(", "))
    expect(right, f"In this order, please: {names}.")
    return tuple(given)
