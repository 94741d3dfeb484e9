"""Filters by column: an expression such as ``width >= 512 and split == "train"`` as a filter of pyarrow.

The grammar is the part of Python's that needs no explanation: comparisons (also chained, ``in`` and ``is None``),
``and``, ``or``, ``not``, arithmetic, and the functions below. A name with other characters than letters, digits and
``_`` stands in backticks. A row whose value is missing (null) fulfils no comparison.
"""

import ast
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError

compute: Any = pc  # its functions are made when it is imported, and have no types

_QUOTED = re.compile(r"`([^`]+)`")
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_HINTS = (
    (re.compile(r"(?<![<>=!])=(?!=)"), "two values are compared with =="),
    (re.compile(r"\b(AND|OR|NOT|IN|IS|NULL)\b"), "write and, or, not, in, is None in small letters"),
    (re.compile(r"<>"), "write != for unequal"),
)
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: lambda left, right: left == right,
    ast.NotEq: lambda left, right: left != right,
    ast.Lt: lambda left, right: left < right,
    ast.LtE: lambda left, right: left <= right,
    ast.Gt: lambda left, right: left > right,
    ast.GtE: lambda left, right: left >= right,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda left, right: left + right,
    ast.Sub: lambda left, right: left - right,
    ast.Mult: lambda left, right: left * right,
    ast.Div: lambda left, right: left / compute.if_else(right == 0, pa.scalar(None, pa.float64()), right),
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "contains": lambda column, text: compute.match_substring(column, text, ignore_case=True),
    "startswith": compute.starts_with,
    "endswith": compute.ends_with,
    "matches": compute.match_substring_regex,
    "lower": compute.utf8_lower,
    "length": compute.utf8_length,
    "number": lambda column: compute.if_else(
        compute.match_substring_regex(column, _NUMBER),
        compute.utf8_trim_whitespace(column),
        pa.scalar(None, pa.string()),
    ).cast(pa.float64()),
}
"""``contains`` ignores case; ``matches`` takes a regular expression (RE2); ``number`` reads a text as a number,
and gives null where it is none."""


@dataclass(frozen=True)
class RowFilter:
    """A parsed filter."""

    text: str
    """As the user wrote it."""
    columns: tuple[str, ...]
    """The columns that it reads."""
    expression: Any
    """A pyarrow.compute.Expression."""

    def keep(self, rows: pa.Table) -> list[bool]:
        """For each row of a table with the filter's columns, whether it passes.

        Raises:
            ConfigError: If a value is too large for what it is compared with.
        """
        numbered = rows.select(self.columns).append_column("", pa.array(range(rows.num_rows)))
        try:
            matches = numbered.filter(self.expression)
        except pa.ArrowInvalid as error:
            raise ConfigError(f"--where {self.text!r}: cannot be computed: {error}") from None
        passes = [False] * rows.num_rows
        for place in matches.column("").to_pylist():
            passes[place] = True
        return passes


def parse_filter(text: str, fields: Mapping[str, pa.DataType]) -> RowFilter:
    """Parse a filter.

    Args:
        text: The expression.
        fields: Type of each column that it may name.

    Raises:
        ConfigError: If it is no such expression, names another column, or compares what cannot be compared.
    """
    names: dict[str, str] = {}

    def replace(match: re.Match[str]) -> str:
        names[f"_quoted{len(names)}"] = match[1]
        return f"_quoted{len(names) - 1}"

    try:
        body = ast.parse(_QUOTED.sub(replace, text).strip(), mode="eval").body
        parser = _Parser(text, fields, names)
        expression = parser.condition(body)
        if not parser.columns:
            raise ConfigError(f"--where {text!r}: reads no column; there are {', '.join(fields)}")
    except SyntaxError as error:
        hint = next((hint for pattern, hint in _HINTS if pattern.search(_without_strings(text))), error.msg)
        raise ConfigError(
            f"--where {text!r}: {hint}; for example: --where \"width >= 512 and split == 'train'\""
        ) from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise ConfigError(f"--where: cannot be read: {type(error).__name__}: {error}") from None
    return RowFilter(text, tuple(parser.columns), expression)


class _Parser:
    """Turns a tree of Python's grammar into an expression of pyarrow; each comparison is tried on a row of nulls."""

    def __init__(self, text: str, fields: Mapping[str, pa.DataType], names: Mapping[str, str]) -> None:
        self._text = text
        self._fields = fields
        self._names = names
        self.columns: dict[str, None] = {}

    def condition(self, node: ast.expr) -> Any:
        """An expression that is true or false."""
        if isinstance(node, ast.BoolOp):
            parts = [self.condition(value) for value in node.values]
            joined = parts[0]
            for part in parts[1:]:
                joined = joined & part if isinstance(node.op, ast.And) else joined | part
            return joined
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.condition(node.operand)
        if isinstance(node, ast.Compare):
            return self._comparison(node)
        if isinstance(node, ast.Name | ast.Call):
            return self._tried(self._value(node), node)
        raise self._refusal(node, "is no comparison")

    def _comparison(self, node: ast.Compare) -> Any:
        joined, left = None, node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            part = self._tried(self._compare(left, operator, right, node), node)
            joined, left = part if joined is None else joined & part, right
        return joined

    def _compare(self, left: ast.expr, operator: ast.cmpop, right: ast.expr, whole: ast.Compare) -> Any:
        if isinstance(operator, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self._refusal(whole, "can only ask `is None` or `is not None`")
            missing = self._value(left).is_null()
            return missing if isinstance(operator, ast.Is) else ~missing
        if isinstance(operator, ast.In | ast.NotIn):
            if not isinstance(right, ast.Tuple | ast.List | ast.Set):
                raise self._refusal(
                    whole, "needs a list after `in`, such as (1, 2); for a part of a text: contains(caption, 'cat')"
                )
            value = self._as_float(left) if any(map(self._is_float, right.elts)) else self._value(left)
            inside = value.isin([self._constant(item) for item in right.elts])
            return inside if isinstance(operator, ast.In) else ~inside & value.is_valid()
        values = [
            self._as_float(one) if self._is_float(other) else self._value(one)
            for one, other in ((left, right), (right, left))
        ]
        return _COMPARISONS[type(operator)](*values)

    def _is_float(self, node: ast.expr) -> bool:
        """Whether the values of an expression are floats."""
        if isinstance(node, ast.Name):
            return cast("Any", pa.types).is_floating(self._type_of(node))
        if isinstance(node, ast.Call):
            return isinstance(node.func, ast.Name) and node.func.id == "number"
        return isinstance(node, ast.BinOp) or any(
            isinstance(one, ast.Constant) and isinstance(one.value, float) for one in ast.walk(node)
        )

    def _as_float(self, node: ast.expr) -> Any:
        """A value that is compared with a float: Arrow refuses integers that the smallest float type does not hold."""
        value = self._value(node)
        is_integer = isinstance(node, ast.Name) and cast("Any", pa.types).is_integer(self._type_of(node))
        return value.cast(pa.float64(), safe=False) if is_integer else value

    def _type_of(self, node: ast.Name) -> pa.DataType:
        return self._fields.get(self._names.get(node.id, node.id), pa.null())

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return self._column(self._names.get(node.id, node.id))
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            operate, left, right = _ARITHMETIC[type(node.op)], self._value(node.left), self._value(node.right)
            self._tried(operate(left, right) == 0, node)  # before the cast, which takes texts too
            # int32 would overflow without a word; int64 is rounded.
            return operate(left.cast(pa.float64(), safe=False), right.cast(pa.float64(), safe=False))
        if isinstance(node, ast.Call):
            return self._call(node)
        return pc.scalar(self._constant(node))

    def _call(self, node: ast.Call) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if name not in _FUNCTIONS:
            raise self._refusal(node, f"is no function of a filter; there are {', '.join(_FUNCTIONS)}")
        if not node.args or node.keywords:
            raise self._refusal(node, "needs a column")
        column, *constants = node.args
        try:
            return _FUNCTIONS[name](self._value(column), *(self._constant(one) for one in constants))
        except TypeError:
            raise self._refusal(node, "has the wrong number of arguments, or one of the wrong type") from None

    def _column(self, name: str) -> Any:
        if name not in self._fields:
            near = difflib.get_close_matches(name, self._fields, 1)
            hint = f"do you mean {near[0]}? " if near else ""
            raise ConfigError(f"--where: no column {name!r}; {hint}there are {', '.join(self._fields)}")
        self.columns[name] = None
        return pc.field(name)

    def _constant(self, node: ast.expr) -> Any:
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            sign, node = -1, node.operand
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, str | bool) and sign == 1:
            return value
        if isinstance(value, float) or (isinstance(value, int) and value < 2**63):
            return sign * value
        raise self._refusal(node, "is neither a column, a number nor a text in quotes")

    def _tried(self, expression: Any, node: ast.expr) -> Any:
        """The expression, if it can be computed from these columns."""
        row = pa.table({"": pa.nulls(1)} | {name: pa.nulls(1, self._fields[name]) for name in self.columns})
        try:
            row.filter(expression)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, TypeError) as error:
            read = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
            names = dict.fromkeys(self._names.get(part.id, part.id) for part in read if part.id not in _FUNCTIONS)
            types = ", ".join(f"{name} is {_in_words(self._fields[name])}" for name in names)
            hint = "; number(NAME) reads a text as a number" if "text" in types else ""
            reason = f"; {error}" if isinstance(error, pa.ArrowInvalid) else hint
            raise self._refusal(node, f"cannot be computed: {types}{reason}") from None
        return expression

    def _refusal(self, node: ast.expr, why: str) -> ConfigError:
        part = re.sub(r"_quoted\d+", lambda match: f"`{self._names.get(match[0], match[0])}`", ast.unparse(node))
        return ConfigError(f"--where {self._text!r}: {part!r} {why}")


def _in_words(kind: pa.DataType) -> str:
    types = cast("Any", pa.types)
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    return f"a number ({kind})" if types.is_integer(kind) or types.is_floating(kind) else str(kind)


def _without_strings(text: str) -> str:
    return re.sub(r"'[^']*'|\"[^\"]*\"", "''", text)
