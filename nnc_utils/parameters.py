"""What a notebook's cell tagged `parameters` declares, and whether given values agree with it.

A declaration is one line: ``epochs: int = 8  # [1, 500] passes over the training images``. The
comment may begin with a range ``[low, high]`` (round brackets leave the end out) or with the
choices ``{digits, fashion_mnist, imagefolder:PATH}``; for a list they hold for its elements.
"""

from __future__ import annotations

import ast
import difflib
import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, Strict, TypeAdapter, ValidationError

from nnc_utils.provenance import code_cells

SCALARS = {"int": int, "float": float, "str": str, "bool": bool}
WORDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "True or False"}
RANGE = re.compile(r"^([\[(])\s*([^,\s]+)\s*,\s*([^,\s]+)\s*([\])])\s*(.*)$")
CHOICES = re.compile(r"^\{([^}]*)\}\s*(.*)$")


class ParameterError(ValueError):
    """A parameter that is not declared, or a value that its declaration excludes."""


@dataclass(frozen=True)
class Parameter:
    """One declared parameter.

    `kind` is the type as written (`element` that of a list's elements, "" for any); `limits` the
    range as (opening bracket, low, high, closing bracket); `choices` the allowed values.
    """

    name: str
    kind: str
    element: str
    default: Any
    limits: tuple[str, float, float, str] | None
    choices: tuple[Any, ...]
    help: str

    @property
    def allowed(self) -> str:
        """What a value must be, in words."""
        kind = self.element or self.kind
        words = WORDS.get(kind, "a value")
        if self.kind == "list":
            words = f"a list ({words} each)"
        if self.limits:
            words += " in {}{:g}, {:g}{}".format(*self.limits)
        if self.choices:
            words += f", one of {', '.join(map(str, self.choices))}"
        return words

    def check(self, value: Any) -> Any:
        """The value, a whole number made a float where a float is declared; else a ParameterError."""
        try:
            checked = TypeAdapter(self._type()).validate_python(value)
        except ValidationError:
            checked = None
        single = [checked] if self.kind != "list" else checked or []
        if checked is None or not all(self._within(element) for element in single):
            raise ParameterError(f"{self.name} is {value!r}: {self.allowed} is needed")
        return checked

    def _type(self) -> Any:
        scalar = SCALARS.get(self.element or self.kind, Any)
        strict = Annotated[scalar, Strict()] if scalar is not Any else Any
        finite = Annotated[strict, Field(allow_inf_nan=False)] if scalar is float else strict
        return Annotated[list[finite], Strict()] if self.kind == "list" else finite

    def _within(self, value: Any) -> bool:
        if self.limits:
            opening, low, high, closing = self.limits
            return (value > low or (opening == "[" and value == low)) and (
                value < high or (closing == "]" and value == high)
            )
        return not self.choices or any(_chosen(value, choice) for choice in self.choices)


def _chosen(value: Any, choice: Any) -> bool:
    prefix, colon, rest = str(choice).partition(":")
    if colon and rest.isupper():  # imagefolder:PATH stands for any path
        return isinstance(value, str) and value.startswith(prefix + ":") and len(value) > len(prefix) + 1
    return value == choice


def declared(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook by name, in their order.

    Raises
    ------
    ParameterError
        When the cell is missing or a line of it is no declaration; the message gives the line.
    """
    tagged = [source for source, tags in code_cells(notebook) if "parameters" in tags]
    if len(tagged) != 1:
        raise ParameterError(f"{notebook} has {len(tagged)} cells tagged 'parameters': one is needed")
    return parse(tagged[0], where=str(notebook))


def parse(source: str, *, where: str = "the parameters cell") -> dict[str, Parameter]:
    """The declarations in the text of a parameters cell; `where` it is from goes into errors."""
    try:
        statements = ast.parse(source).body
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError) as error:
        raise ParameterError(f"{where}: the parameters cell is no Python: {error}") from None
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for statement in statements:
        try:
            name, annotation = statement.target.id, ast.unparse(statement.annotation)
            default = ast.literal_eval(statement.value)
            kind, element = _kind(annotation, default)
            lines = range(statement.lineno, statement.end_lineno + 1)
            text = next((comments[line] for line in lines if line in comments), "")
            found[name] = _parameter(name, kind, element, default, text)
            found[name].check(default)
        except ParameterError as error:
            raise ParameterError(f"{where}: a default contradicts its declaration: {error}") from None
        except (AttributeError, ValueError, TypeError, KeyError) as error:
            line = source.splitlines()[statement.lineno - 1]
            raise ParameterError(
                f"{where}: no declaration: {line!r} ({error}). Write `name: type = default  # help`, "
                f"the type one of {', '.join(SCALARS)}, list, list[...], the default a literal"
            ) from None
    return found


def _kind(annotation: str, default: Any) -> tuple[str, str]:
    outer, _, inner = annotation.rstrip("]").partition("[")
    if outer == "list":
        kinds = {type(value).__name__ for value in default}
        guess = "float" if kinds == {"int", "float"} else next(iter(kinds)) if len(kinds) == 1 else ""
        element = inner or (guess if guess in SCALARS else "")
        if element and element not in SCALARS:
            raise ValueError(f"unknown type {element}")
        return "list", element
    if outer not in SCALARS or inner:
        raise ValueError(f"unknown type {annotation}")
    return outer, ""


def _parameter(name: str, kind: str, element: str, default: Any, text: str) -> Parameter:
    limits, choices = None, ()
    if match := RANGE.match(text):
        opening, low, high, closing, text = match.groups()
        limits = (opening, float(low), float(high), closing)
    elif match := CHOICES.match(text):
        listed, text = match.groups()
        words = [word.strip().strip("'\"") for word in listed.split(",")]
        if "..." not in words:  # {digits, ...} names examples only
            choices = tuple(SCALARS.get(element or kind, str)(word) for word in words)
    return Parameter(name, kind, element, default, limits, choices, text.strip())


def check(parameters: dict[str, Parameter], given: dict[str, Any], *, notebook: str) -> dict[str, Any]:
    """The given values, checked; all that is wrong with them is told in one ParameterError."""
    checked, problems = {}, []
    for name, value in given.items():
        if name not in parameters:
            close = difflib.get_close_matches(name, parameters, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            problems.append(f"there is no parameter {name!r}.{hint} It has: {', '.join(parameters)}")
            continue
        try:
            checked[name] = parameters[name].check(value)
        except ParameterError as error:
            problems.append(str(error))
    if problems:
        raise ParameterError(f"{notebook}: " + "\n  ".join(problems))
    return checked
