"""The results of a job as a file, in the order of its items, written while they are read.

A table has a column for each top-level property of the documents; where these are not objects, or
have more than MAX_NAMES properties that the schema does not name, one column `data`. A property
that is called like one of the table's own columns is found under `data.<name>`. Values stand in
CSV as they are, also where a spreadsheet would take them for a formula.
"""

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from importlib import import_module
from typing import Any, cast

from app.core.json import dump_exact, load_exact
from app.schemas.extraction import ExtractionSpec, Usage
from app.services.extractor import target_of
from app.services.jobs import Result

Pages = Callable[[], AsyncIterator[Sequence[Result]]]

OWN = ("custom_id", "status")
WHOLE = "data"  # the column of documents that have no columns of their own
MAX_NAMES = 200
GROUP = 5000  # rows, or
GROUP_BYTES = 16 * 2**20  # of what they are made of, in a row group of Parquet
STOPPED = {"code": "run_cancelled", "message": "The job was cancelled before this item ended."}
INT64 = range(-(2**63), 2**63)


async def jsonl(pages: Pages, spec: ExtractionSpec) -> AsyncIterator[bytes]:
    """Where evidence was asked for, each line has it, and the `id` to view the extraction by."""
    grounded = spec.options.evidence != "none"
    async for page in pages():
        yield "".join(f"{dump_exact(_line(result, grounded))}\n" for result in page).encode()


def _line(result: Result, grounded: bool) -> dict[str, Any]:
    line: dict[str, Any] = {"custom_id": result.custom_id, "status": result.shown_status}
    if grounded:
        line["id"] = result.id
    if result.status == "completed":
        found = _found(result)
        line["data"] = found["data"]
        if found["failed_ranges"]:
            line["failed_ranges"] = found["failed_ranges"]
        if grounded:
            line |= {name: found[name] for name in ("evidence", "field_status")}
    else:
        line["error"] = load_exact(result.error) if result.error else STOPPED
    return {**line, "usage": Usage.of(json.loads(result.usage or "{}")).model_dump()}


def _found(result: Result) -> dict[str, Any]:
    return load_exact(json.loads(result.output or ""))


async def as_csv(pages: Pages, spec: ExtractionSpec) -> AsyncIterator[bytes]:
    """With a header, as RFC 4180 has it. What is no text stands there as JSON."""
    table = await _survey(pages, spec)
    buffer = io.StringIO()
    write = csv.writer(buffer).writerow
    write([*OWN, *table.titles(OWN)])
    async for page in table.pages(pages):
        for result in page:
            values = table.values(result)
            write([result.custom_id, result.shown_status, *(_cell(value) for value in values)])
        yield _taken(buffer)
    yield _taken(buffer)


def _taken(buffer: io.StringIO) -> bytes:
    text = buffer.getvalue()
    buffer.seek(0)
    buffer.truncate()
    return text.encode()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else dump_exact(value)


async def as_parquet(pages: Pages, spec: ExtractionSpec) -> AsyncIterator[bytes]:
    """Columns have the type of their values: int64, float64 where that keeps each number exactly,
    bool, or string; what has no such type stands there as JSON."""
    table = await _survey(pages, spec)
    sheet = await asyncio.to_thread(_Sheet, table)
    rows: list[Result] = []
    size = 0
    async for page in table.pages(pages):
        for result in page:
            rows.append(result)
            size += len(result.output or "")
            if len(rows) == GROUP or size >= GROUP_BYTES:
                yield await asyncio.to_thread(sheet.write, rows)
                rows, size = [], 0
    yield await asyncio.to_thread(sheet.close, rows)


@dataclass(slots=True)
class _Column:
    """Of a table, and what its values are."""

    name: str
    kinds: set[str] = field(default_factory=set[str])
    fits_int: bool = True
    fits_float: bool = True

    def look(self, value: Any) -> None:
        match value:
            case None:
                return
            case bool():
                self.kinds.add("bool")
            case int():
                self.kinds.add("int")
                self.fits_int = self.fits_int and value in INT64
                self.fits_float = self.fits_float and _is_float(value)
            case Decimal():
                self.kinds.add("float")
                self.fits_float = self.fits_float and _is_float(value)
            case str():
                self.kinds.add("string")
            case _:
                self.kinds.add("json")

    @property
    def type(self) -> str:
        """The name of Arrow's type, or "json"."""
        if self.kinds == {"int"} and self.fits_int:
            return "int64"
        if self.kinds and self.kinds <= {"int", "float"}:
            return "float64" if self.fits_float else "json"
        if len(self.kinds) == 1:
            return next(iter(self.kinds))
        return "json" if self.kinds else "string"


def _is_float(value: int | Decimal) -> bool:
    """Whether nothing is lost in a binary number of 64 bits."""
    try:
        return Decimal(repr(float(value))) == value
    except OverflowError:
        return False


@dataclass(slots=True)
class _Table:
    """What the results look like, after a look at all of them."""

    columns: list[_Column]
    whole: bool
    seen: set[int] = field(default_factory=set[int])  # positions; others end in between

    def titles(self, own: Iterable[str]) -> list[str]:
        taken = {*own, *(column.name for column in self.columns)}
        titles: list[str] = []
        for column in self.columns:
            title = column.name
            while title in own or (title != column.name and title in taken):
                title = f"data.{title}"
            titles.append(title)
        return titles

    async def pages(self, pages: Pages) -> AsyncIterator[list[Result]]:
        async for page in pages():
            yield [result for result in page if result.position in self.seen]

    def values(self, result: Result) -> list[Any]:
        if result.status != "completed":
            return [None] * len(self.columns)
        data = _found(result)["data"]
        if self.whole:
            return [data]
        return [data.get(column.name) for column in self.columns]


async def _survey(pages: Pages, spec: ExtractionSpec) -> _Table:
    schema = target_of(spec).schema
    names = cast(dict[str, Any], schema.get("properties") or {})
    columns = {name: _Column(name) for name in names}
    whole = _Column(WHOLE)
    only_objects, some, seen = True, False, set[int]()
    most = len(columns) + MAX_NAMES
    async for page in pages():
        for result in page:
            seen.add(result.position)
            if result.status != "completed":
                continue
            some = True
            data: Any = _found(result)["data"]
            whole.look(data)
            only_objects = only_objects and isinstance(data, dict)
            if only_objects and len(columns) <= most:
                for name, value in cast(dict[str, Any], data).items():
                    columns.setdefault(name, _Column(name)).look(value)
    if only_objects and len(columns) <= most and (some or columns):
        return _Table(list(columns.values()), False, seen)
    return _Table([whole], True, seen)


class _Sink(io.RawIOBase):
    """Where Parquet is written to, and taken from at once."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        self._size += len(self._pieces[-1])
        return len(self._pieces[-1])

    def tell(self) -> int:
        return self._size

    def take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


class _Sheet:
    """A Parquet file as it is written."""

    def __init__(self, table: _Table) -> None:
        self._arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
        own = (*OWN, "error_code")
        types = ["string" for _ in own] + [
            "string" if column.type == "json" else column.type for column in table.columns
        ]
        names = [*own, *table.titles(own)]
        self._types = [getattr(self._arrow, ALIASES.get(name, name))() for name in types]
        self._schema = self._arrow.schema(list(zip(names, self._types, strict=True)))
        self._table = table
        self._sink = _Sink()
        self._writer = parquet.ParquetWriter(self._sink, self._schema)

    def write(self, rows: Sequence[Result]) -> bytes:
        values = [self._table.values(result) for result in rows]
        columns: list[list[Any]] = [
            [result.custom_id for result in rows],
            [result.shown_status for result in rows],
            [json.loads(result.error)["code"] if result.error else None for result in rows],
        ]
        for place, column in enumerate(self._table.columns):
            fit = FITS.get(column.type)
            cells = [value[place] for value in values]
            if fit:
                cells = [None if cell is None else fit(cell) for cell in cells]
            columns.append(cells)
        arrays = map(self._arrow.array, columns, self._types)
        self._writer.write_batch(self._arrow.record_batch(list(arrays), schema=self._schema))
        return self._sink.take()

    def close(self, rows: Sequence[Result]) -> bytes:
        last = self.write(rows) if rows else b""
        self._writer.close()
        return last + self._sink.take()


ALIASES = {"bool": "bool_"}
FITS: dict[str, Callable[[Any], Any]] = {"float64": float, "json": dump_exact}
