"""What a notebook's cell tagged `parameters` declares, and whether given values agree with it.

A declaration is one statement: ``epochs: int = 8  # [1, 500] passes over the training images``. The
comment may begin with a range ``[low, high]`` (round brackets leave the end out; ``0 or [2, 8]`` allows one
number beside it) or with the choices ``{digits, fashion_mnist, imagefolder:PATH}``; for a list they hold for
its elements. A list without the type of its elements takes what its default has, or anything: mappings, too.
"""

from __future__ import annotations

import ast
import difflib
import io
import math
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, Strict, TypeAdapter, ValidationError

from nnc_utils.provenance import code_cells

SCALARS = {"int": int, "float": float, "str": str, "bool": bool}
WORDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "True or False"}
RANGE = re.compile(r"^(?:(\d+) or )?([\[(])\s*([^,\s]+)\s*,\s*([^,\s]+)\s*([\])])\s*(.*)$")
CHOICES = re.compile(r"^\{([^}]*)\}\s*(.*)$")


class ParameterError(ValueError):
    """A parameter that is not declared, or a value that its declaration excludes."""


@dataclass(frozen=True)
class Parameter:
    """One declared parameter: `type` for pydantic, and in words what `allowed` values are."""

    name: str
    default: Any
    type: Any
    allowed: str
    help: str

    def check(self, value: Any) -> Any:
        """The value, a whole number made a float where a float is declared; else a ParameterError."""
        try:
            return TypeAdapter(self.type).validate_python(value)
        except ValidationError:
            needed = f"{self.allowed} is needed{self._spelling(value)}"
            raise ParameterError(f"{self.name} is {value!r}: {needed}") from None

    def _spelling(self, value: Any) -> str:
        """How to write what YAML or papermill's -p read as another type; empty where that is not why."""
        if self.allowed.startswith("a list") and not isinstance(value, list):
            return f" (with papermill: -y '{self.name}: [{value}]')"
        if self.allowed.startswith("a text") and isinstance(value, int | float):
            return f" (with papermill: -r {self.name} {value})"
        try:
            number = float(value) if "a number" in self.allowed and isinstance(value, str) else math.nan
        except ValueError:
            return ""
        if not math.isfinite(number):
            return ""
        digits, _, exponent = repr(number).partition("e")  # YAML wants a point before the exponent
        written = f"{digits}{'' if '.' in digits else '.0'}e{exponent}" if exponent else digits
        return f" (YAML reads that as text: write {written})"


def declared(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook by name, in their order; a ParameterError gives a line that is none."""
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
    parameters = {}
    for statement in statements:
        try:
            lines = range(statement.lineno, statement.end_lineno + 1)
            text = next((comments[line] for line in lines if line in comments), "")
            name, kind = statement.target.id, ast.unparse(statement.annotation)
            parameters[name] = _parameter(name, kind, ast.literal_eval(statement.value), text)
            parameters[name].check(parameters[name].default)
        except ParameterError as error:
            raise ParameterError(f"{where}: a default contradicts its declaration: {error}") from None
        except (AttributeError, ValueError, TypeError, KeyError) as error:
            line = source.splitlines()[statement.lineno - 1]
            raise ParameterError(
                f"{where}: no declaration: {line!r} ({error}). Write `name: type = default  # help`, "
                f"the type one of {', '.join(SCALARS)}, list, list[...], the default a literal"
            ) from None
    return parameters


def _parameter(name: str, annotation: str, default: Any, text: str) -> Parameter:
    outer, _, element = annotation.rstrip("]").partition("[")
    kind = (element or _common(default)) if outer == "list" else annotation
    if kind not in SCALARS and (outer, kind) != ("list", "Any"):
        raise ValueError(f"unknown type {annotation}")
    scalar = Annotated[SCALARS[kind], Strict()] if kind in SCALARS else Any
    if kind == "float":
        scalar = Annotated[scalar, Field(allow_inf_nan=False)]
    words = WORDS.get(kind, "a value")
    words = f"a list ({words} each)" if outer == "list" else words
    if match := RANGE.match(text):
        beside, opening, low, high, closing, text = match.groups()
        low, high = float(low), float(high)
        ends = {"ge" if opening == "[" else "gt": low, "le" if closing == "]" else "lt": high}
        words = (f"{beside} or " if beside else "") + words + f" in {opening}{low:g}, {high:g}{closing}"
        within = Annotated[scalar, Field(**ends)]
        scalar = Annotated[scalar, Field(ge=int(beside), le=int(beside))] | within if beside else within
    elif match := CHOICES.match(text):
        listed, text = match.groups()
        choices = [word.strip().strip("'\"") for word in listed.split(",")]
        if "..." not in choices:  # {digits, ...} names examples only
            scalar = Annotated[scalar, AfterValidator(lambda value: _chosen(value, choices))]
            words += f", one of {', '.join(choices)}"
    kind = Annotated[list[scalar], Strict()] if outer == "list" else scalar
    return Parameter(name, default, kind, words, text.strip())


def _common(values: list) -> str:
    """The type of all elements; "Any" where they have several, or none that is a scalar."""
    kinds = {type(value).__name__ for value in values}
    kind = "float" if kinds == {"int", "float"} else next(iter(kinds)) if len(kinds) == 1 else ""
    return kind if kind in SCALARS else "Any"


def _chosen(value: Any, choices: list[str]) -> Any:
    prefixes = [choice.partition(":")[0] + ":" for choice in choices if choice.partition(":")[2].isupper()]
    if str(value) in choices or any(str(value).startswith(p) and str(value) != p for p in prefixes):
        return value  # imagefolder:PATH stands for any path
    raise ValueError


def check(parameters: dict[str, Parameter], given: dict[str, Any], *, notebook: str) -> dict[str, Any]:
    """The given values, checked; all that is wrong with them is told in one ParameterError."""
    checked, problems = {}, []
    for name, value in given.items():
        if name in parameters:
            try:
                checked[name] = parameters[name].check(value)
            except ParameterError as error:
                problems.append(str(error))
        else:
            close = difflib.get_close_matches(name, parameters, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            problems.append(f"there is no parameter {name!r}.{hint} It has: {', '.join(parameters)}")
    if problems:
        raise ParameterError(f"{notebook}: " + "\n  ".join(problems))
    return checked
