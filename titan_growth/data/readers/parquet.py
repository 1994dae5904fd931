"""Parquet: one document a row, from columns of strings, dictionaries of strings or UTF-8 bytes, nested ones too."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from itertools import islice
from typing import Any, BinaryIO

from titan_growth.data.readers.place import BadRowError, Place, UnusableError
from titan_growth.data.readers.rows import Pass, Row
from titan_growth.data.readers.text_rule import KEY, missing
from titan_growth.tools.text import one_line

_BATCH_ROWS = 256
_NUM_NAMES = 50


def read_parquet(stream: BinaryIO, this: Pass, place: Place) -> Iterator[Row]:
    """The rows, row group by row group; groups without a wanted row are not read. Raises UnusableError."""
    pa = import_module("pyarrow")  # by name: it ships no types
    try:
        yield from _rows(stream, this, place)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or place.is_remote):
            raise  # of the disk or storage; pyarrow has its own messages in an OSError without a number
        reason = f"truncated or not a parquet file ({one_line(str(error), 200)})"
        raise UnusableError(reason, "Copy or write it again") from error


def _rows(stream: BinaryIO, this: Pass, place: Place) -> Iterator[Row]:
    """`read_parquet`, with what the library raises."""
    with import_module("pyarrow.parquet").ParquetFile(stream) as table:
        columns = [_Column(table.schema_arrow, name) for name in this.rules.text.fields]
        row = 0
        for group in range(table.num_row_groups):
            place.row = f"row group {group}"
            num_rows = table.metadata.row_group(group).num_rows
            skipped = this.skip.take(num_rows) if this.skips_unread else 0
            if skipped < num_rows:
                names = list(dict.fromkeys(column.path[0] for column in columns))
                batches = table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=names)
                for number, values in islice(enumerate(_values(batches, columns), start=row), skipped, None):
                    place.row = f"row {number}"
                    yield Row(partial(_record, columns, values))
            row += num_rows


def _values(batches: Any, columns: list[_Column]) -> Iterator[tuple[bytes | None, ...]]:
    """The values of the columns, row by row."""
    for batch in batches:
        yield from zip(*(column.values(batch) for column in columns), strict=True)


class _Column:
    """A column that holds text, perhaps inside of structs."""

    def __init__(self, schema: Any, name: str) -> None:
        self.name = name
        self.path = [name] if name in schema.names else name.split(".")
        pa = import_module("pyarrow")
        if schema.names.count(self.path[0]) > 1:
            reason = f"it has {schema.names.count(self.path[0])} columns {self.path[0]!r}"
            raise UnusableError(reason, "Give each column its own name")
        try:
            kind = schema.field(self.path[0]).type
            for part in self.path[1:]:
                kind = kind.field(part).type
        except (KeyError, AttributeError, TypeError) as error:  # no such field, or no struct that has fields
            raise missing(name, _names(schema)) from error
        shown = str(kind)
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if str(kind) not in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view"):
            raise UnusableError(f"the column {name!r} holds {shown}, not strings", f"Name another one as {KEY}")

    def values(self, batch: Any) -> list[bytes | None]:
        """The column's values as bytes: of strings, too, so that a row that is no UTF-8 can be named."""
        pa = import_module("pyarrow")
        values = batch.column(self.path[0])
        if len(self.path) > 1:
            values = import_module("pyarrow.compute").struct_field(values, self.path[1:])
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        found: list[bytes | None] = values.cast(pa.large_binary()).to_pylist()
        return found


def _names(fields: Any, prefix: str = "") -> list[str]:
    """The columns, those inside of structs by their path."""
    names: list[str] = []
    for field in islice(fields, _NUM_NAMES):
        inner = [field.type.field(number) for number in range(getattr(field.type, "num_fields", 0))]
        is_struct = str(field.type).startswith("struct<")
        names += _names(inner, f"{prefix}{field.name}.") if is_struct else [f"{prefix}{field.name}"]
    return names


def _record(columns: list[_Column], values: tuple[bytes | None, ...]) -> dict[str, str]:
    """A row's texts. Raises BadRowError for one that is null, or no UTF-8."""
    record = {}
    for column, value in zip(columns, values, strict=True):
        if value is None:
            raise BadRowError(f"the column {column.name!r} is null, not a string", "Remove the row")
        try:
            record[column.name] = value.decode("utf-8")
        except UnicodeDecodeError as error:
            reason = f"the column {column.name!r} is not valid UTF-8"
            raise BadRowError(reason, "Convert it, or remove the row") from error
    return record
