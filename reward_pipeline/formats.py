"""The bytes of a data file become rows: compression, encoding, separators and the forms of JSON, as streams.

Every reader yields (number of the row, its values, what is wrong with it or None), and what is certain decides: the
first bytes, the first line, the columns of its names. The name of a file says only how it is packed.
"""

import bz2
import codecs
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import lzma
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ijson
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from reward_pipeline.files import InputError, first_line

ROWS = 1000  # rows per step
PACKED = (".gz", ".bz2", ".xz", ".zst")
FILE_TYPES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".zip")
TABLES = (".parquet", ".arrow")  # binary ones
# Data that is not read: it is named where a directory has it.
OTHER_TYPES = (".xlsx", ".xls", ".ods", ".feather", ".orc", ".avro", ".tar", ".tgz", ".7z", ".rar", ".db", ".sqlite")
KNOWN = f"{', '.join(FILE_TYPES)} (also packed: {', '.join(PACKED)})"
BROKEN_FILE = (
    *(OSError, EOFError, zlib.error, lzma.LZMAError),
    *(zipfile.BadZipFile, RuntimeError, NotImplementedError),  # the second one: an archive with a password
    *(ijson.JSONError, pyarrow.ArrowException, UnicodeDecodeError, csv.Error),
)
MAX_DEPTH = 100  # lists and objects in each other; what comes after the parser goes through them by recursion
MAX_WHOLE = 2**28  # bytes of a JSON file that has to be in memory as a whole
WRAPPINGS = ("data", "rows", "train", "test", "validation", "examples", "items", "records", "samples", "pairs")
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # as what bytes are decoded that are no UTF-8
BYTE_ORDER_MARKS = {  # the longer ones first, since one begins with another
    codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be", codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
UNPACK: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SEPARATORS = ",;\t|"

Numbered = Iterator[tuple[int, Any, str | None]]


class FileRow(NamedTuple):
    """One row of a file: the file (and the one in an archive), its number there, and what is wrong with it."""

    file: str
    number: int
    values: dict[str, Any]
    problem: str | None


def file_type(path: Path) -> str:
    """Suffix without packing, in lower case: `.jsonl` for `pairs.JSONL.gz`."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in PACKED else suffix


def rows_of_file(path: Path) -> Iterator[FileRow]:
    """Rows of one data file.

    Raises:
        InputError: unknown type, or broken beyond single rows (damaged packing, Parquet or JSON array).
    """
    number, name = 0, str(path)
    try:
        for name, open_again in _members(path):
            number = 0
            for number, values, problem in _rows(Path(name), open_again):
                if problem is None and not isinstance(values, dict):
                    values, problem = {}, "not an object with named columns"
                yield FileRow(name, number, values, problem)
    except BROKEN_FILE as error:
        raise InputError(
            f"{name}: can not be read to its end (after row {number}: {first_line(error)}); mend or restore the file"
        ) from error


# --- packing and encoding --------------------------------------------------------------------------------------------


def _members(path: Path) -> Iterator[tuple[str, Any]]:
    """The file, or the data files of an archive: their names, and how to open them (more than once)."""
    if file_type(path) != ".zip":
        yield str(path), functools.partial(_unpacked, path)
        return
    with zipfile.ZipFile(path) as archive:
        inside = [name for name in sorted(archive.namelist()) if file_type(Path(name)) in FILE_TYPES]
        members = [name for name in inside if not name.startswith("__MACOSX/") and file_type(Path(name)) != ".zip"]
        if not members:
            raise InputError(f"{path}: no data files in it; known types are {KNOWN}")
        for name in members:
            yield f"{path}/{name}", functools.partial(_unpacked, Path(name), functools.partial(archive.open, name))


def _unpacked(path: Path, open_file: Any = None) -> BinaryIO:
    packed, suffix = open_file() if open_file else path, path.suffix.lower()
    if suffix in UNPACK:
        file = UNPACK[suffix](packed)
    else:
        file = packed if open_file else path.open("rb")
        file = pyarrow.CompressedInputStream(file, "zstd") if suffix == ".zst" else file
    return io.BufferedReader(file, 2**16)  # of which the first bytes can be looked at


class _Recoded(io.RawIOBase):
    """Bytes in UTF-8 of a file in another encoding."""

    def __init__(self, file: BinaryIO, encoding: str):
        self.text = io.TextIOWrapper(file, encoding, newline="")
        self.rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.rest = self.rest or self.text.read(len(buffer)).encode()
        part, self.rest = self.rest[: len(buffer)], self.rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def _in_utf8(file: Any) -> Any:
    """The file without a byte order mark, in UTF-8; two zero-padded bytes a letter are UTF-16 also without a mark."""
    start = file.peek(4)[:4]
    mark, encoding = next((each for each in BYTE_ORDER_MARKS.items() if start.startswith(each[0])), (b"", "utf-8"))
    file.read(len(mark))
    if not mark and len(start) >= 2 and (start[0] == 0) != (start[1] == 0):  # JSON and names of columns begin in ASCII
        encoding = "utf-16-be" if start[0] == 0 else "utf-16-le"
    return file if encoding == "utf-8" else io.BufferedReader(_Recoded(file, encoding))


def not_utf8(text: bytes) -> str:
    """Reason to drop a text that is not UTF-8, with what it probably is."""
    letters = [byte for byte in text if byte >= 0x80]
    as_russian = bytes(letters).decode("cp1251", "replace")
    russian = [letter for letter in as_russian if "а" <= letter.lower() <= "я"]
    if len(russian) < 0.8 * len(letters) or len(letters) < 4:
        return "not valid UTF-8 (Windows-1252, perhaps; iconv -f WINDOWS-1252 -t UTF-8 would convert it)"
    # What is small in one of the two encodings is a capital in the other, and text is mostly small.
    small = sum(letter.islower() for letter in russian) * 2 >= len(russian)
    name = "WINDOWS-1251" if small else "KOI8-R"
    return f"not valid UTF-8 ({name.title() if small else name}, perhaps; iconv -f {name} -t UTF-8 would convert it)"


def _rows(path: Path, open_again: Any) -> Numbered:
    kind = file_type(path)
    with contextlib.closing(open_again()) as file:
        if kind == ".parquet":
            if not file.seekable():  # in an archive or packed: its index is at the end
                file = io.BytesIO(file.read())
            yield from read_batches(pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=ROWS))
        elif kind == ".arrow":
            is_file = file.peek(6)[:6] == b"ARROW1"
            reader = pyarrow.ipc.open_file(io.BytesIO(file.read())) if is_file else pyarrow.ipc.open_stream(file)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
            yield from read_batches(batches)
        elif kind in (".csv", ".tsv"):
            yield from read_csv(_in_utf8(file), str(path))
        elif kind in (".json", ".jsonl", ".ndjson"):
            yield from read_json(lambda: _in_utf8(open_again()), str(path))
        else:  # such as a table that was saved as text
            text = _in_utf8(file)
            start = text.peek(2**10).lstrip()[:1]
            if start and start in b"[{":
                yield from read_json(lambda: _in_utf8(open_again()), str(path))
            elif separator_of(text.peek(2**16).decode("utf-8", "replace").partition("\n")[0]):
                yield from read_csv(text, str(path))
            else:
                raise InputError(f"{path}: unknown file type; known are {KNOWN}")


# --- tables ----------------------------------------------------------------------------------------------------------


def read_batches(batches: Iterable[Any]) -> Numbered:
    """Rows of Arrow batches or tables, with what `datasets` keeps as JSON decoded, and nothing else: see `decoded`."""
    number = 0
    for batch in batches:
        kinds = {field.name: field.type for field in batch.schema if _has_json(field.type)}
        for row in batch.to_pylist():
            number += 1
            yield (
                number,
                {name: decoded(value, kinds[name]) if name in kinds else value for name, value in row.items()},
                None,
            )


def _has_json(kind: pyarrow.DataType) -> bool:
    nested = [kind.field(index).type for index in range(kind.num_fields)]
    return isinstance(kind, pyarrow.JsonType) or any(map(_has_json, nested))


def decoded(value: Any, kind: pyarrow.DataType) -> Any:
    """A value with the JSON texts in it parsed: what `datasets` makes of columns with mixed types or optional keys.

    A picture or a sound stays what is stored: it may name any file to be opened.
    """
    if value is None:
        return None
    if isinstance(kind, pyarrow.JsonType):
        return json.loads(value)
    if pyarrow.types.is_struct(kind):
        return {name: decoded(each, kind.field(name).type) for name, each in value.items()}
    if isinstance(value, list):
        return [decoded(each, kind.value_type) for each in value]
    return value


def separator_of(header: str) -> str | None:
    """What separates the names of columns: the sign that gives most of them; None where there is but one."""
    columns = {sign: len(next(csv.reader([header], delimiter=sign), [])) for sign in SEPARATORS}
    best = max(SEPARATORS, key=lambda sign: columns[sign])  # of equals the first
    return best if columns[best] > 1 else None


def read_csv(file: BinaryIO, name: str) -> Numbered:
    """Rows of a table as text, whose first row that is not blank names the columns; all rows count, blank ones too.

    Cells are separated by commas, semicolons, tabs or bars, which the names tell, or a line `sep=;` above them.
    """
    csv.field_size_limit(2**31 - 1)  # by default 131,072 characters, and dialogues are longer
    # Bytes that are no UTF-8 are let through as surrogates here, so that they cost their row and not the file. Lines
    # may end as on any system, also by a carriage return alone.
    lines = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
    skipped, separator, header_line = 0, None, ""
    for header_line in lines:
        if stated := re.fullmatch(r"sep=(.)", header_line.strip("\r\n")):
            separator = stated[1]
        elif header_line.strip():
            break
        skipped += 1
    separator = separator or separator_of(header_line) or ","
    reader = csv.reader(itertools.chain([header_line], lines), delimiter=separator)
    header = next(reader, [])
    first = skipped + reader.line_num
    if any(map(NOT_UTF8.search, header)):
        raise InputError(f"{name} row {first}: {_reason(header)}; convert the file")
    if len(header) == 1:
        raise InputError(f"{name} row {first}: has one column, {header[0]!r}; cells must be separated by commas")
    if twice := [column for column, count in Counter(header).items() if column and count > 1]:
        raise InputError(f"{name} row {first}: has two columns {twice[0]!r}; rename one of them")
    # Not `DictReader`, which passes over blank lines without counting them, and of two columns with one name keeps the
    # last one. `strict`, since a quote that is never closed would make one cell of the rest of the file, in silence.
    for number, cells in enumerate(csv.reader(lines, delimiter=separator, strict=True), start=first + 1):
        if not cells:
            continue
        if any(cells[len(header) :]):
            yield number, {}, "more cells than columns; text with commas needs quotes"
        elif any(map(NOT_UTF8.search, cells)):
            yield number, {}, _reason(cells)
        else:
            yield number, dict(itertools.zip_longest(header, cells[: len(header)])), None


def _reason(cells: list[str]) -> str:
    return not_utf8(" ".join(cells).encode("utf-8", "surrogateescape"))


# --- JSON ------------------------------------------------------------------------------------------------------------


def read_json(open_again: Any, name: str) -> Numbered:
    """JSON lines, an array of objects, objects over several lines each, or one object that holds all (`table_of`)."""
    with contextlib.closing(open_again()) as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
    with contextlib.closing(open_again()) as file:
        if first == b"[":
            yield from read_json_array(file)
            return
        lines = read_json_lines(file)
        begin = list(itertools.islice(lines, 2))
        if len(begin) > 1 and begin[0][2] is None:
            yield from itertools.chain(begin, lines)
            return
    if len(begin) == 1 and begin[0][2] is None:
        found = table_of(begin[0][1], name)
        yield from begin if found is None else ((number, row, None) for number, row in enumerate(found, start=1))
        return
    with contextlib.closing(open_again()) as file:
        alone = _objects(file)
    with contextlib.closing(open_again()) as file:
        if alone == 1:
            whole = file.read(MAX_WHOLE + 1)
            if len(whole) > MAX_WHOLE:
                raise InputError(f"{name}: one object of more than {MAX_WHOLE >> 20} MiB; write JSON lines instead")
            found = table_of(value := json.loads(whole), name)
            yield from ((number, row, None) for number, row in enumerate([value] if found is None else found, start=1))
        elif alone:
            yield from read_json_values(file, depth=0)
        else:
            yield from read_json_lines(file)


def _objects(file: BinaryIO) -> int:
    """How many JSON objects follow each other in a file, whatever the line breaks; 0 where it is anything else."""
    depth = count = 0
    try:
        for event, _ in ijson.basic_parse(file, multiple_values=True):
            if depth == 0 and event != "start_map":
                return 0
            depth += event.startswith("start_") - event.startswith("end_")
            count += depth == 0
    except ijson.JSONError:
        return 0
    return count


def read_json_lines(file: BinaryIO) -> Numbered:
    """One value a line; a carriage return ends a line too, since no JSON text contains one."""
    for number, line in enumerate(itertools.chain.from_iterable(each.split(b"\r") for each in file), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8")), None
        except UnicodeDecodeError:
            yield number, {}, not_utf8(line)
        except (ValueError, RecursionError):  # the second one: a line of a hundred thousand brackets
            comma = line.strip().endswith(b"},") and "; a comma ends the line: only an array in brackets has them"
            yield number, {}, f"not valid JSON{comma or ''}"


def read_json_array(file: BinaryIO) -> Numbered:
    """Items of one array, of any length: `json.load` would hold all of them in memory."""
    return read_json_values(file, depth=1)


def read_json_values(file: BinaryIO, depth: int) -> Numbered:
    """The values below `depth` brackets.

    Not `ijson.items`, which needs memory quadratic in the depth of nesting: a megabyte of brackets asks for all there
    is. Here what is deeper than `MAX_DEPTH` is walked through and not built; `deepest` remembers to refuse that item.
    """
    number, outside, depth = 0, depth, 0
    for event, value in ijson.basic_parse(file, use_float=True, multiple_values=outside == 0):
        opens, closes = event.startswith("start_"), event.startswith("end_")
        if depth < outside or (depth == outside and closes):  # the brackets of the array itself
            depth += opens - closes
            continue
        if depth == outside:
            item, deepest = ijson.ObjectBuilder(), outside
        depth += opens
        deepest = max(deepest, depth)
        if depth <= MAX_DEPTH:
            item.event(event, value)
        depth -= closes
        if depth == outside:
            number += 1
            yield (number, item.value, None) if deepest <= MAX_DEPTH else (number, {}, "nested too deeply")


def table_of(value: Any, name: str) -> list[Any] | None:
    """The rows in one JSON object that holds a whole table, in a form of pandas or of others; None: it is a row itself.

    Columns as lists or by index (`orient="list"`, `"columns"`, `"index"`, `"split"`, `"table"` of pandas), or the list
    of rows below one of `WRAPPINGS` or the only key, each perhaps below `row`, as the viewer of the hub gives them.
    """
    if not isinstance(value, dict) or not value:
        return None
    names, data = value.get("columns"), value.get("data")
    if isinstance(names, list) and all(isinstance(each, str) for each in names) and isinstance(data, list):
        return [dict(zip(names, cells, strict=False)) if isinstance(cells, list) else cells for cells in data]
    cells = list(value.values())
    lists = [key for key, each in value.items() if each and isinstance(each, list) and all(map(_is_row, each))]
    wrapping = [key for key in lists if key in WRAPPINGS or len(value) == 1]
    if len(wrapping) > 1 and "train" in wrapping:
        others = ", ".join(each for each in wrapping if each != "train")
        print(f"{name}: the rows of 'train' are read; it also has {others}")
        wrapping = ["train"]
    if len(wrapping) == 1:
        rows = value[wrapping[0]]
        return [row["row"] if isinstance(row.get("row"), dict) else row for row in rows]
    if len(value) > 1 and all(isinstance(each, list) for each in cells) and len(set(map(len, cells))) == 1:
        if any(isinstance(each, dict) for each in itertools.chain(*cells)):
            return None  # message lists, of one row
        return [dict(zip(value, row, strict=True)) for row in zip(*cells, strict=True)]
    if all(isinstance(each, dict) and each for each in cells):
        if all(key.isdigit() for key in value):
            return cells
        indices = list(cells[0])
        if all(index.isdigit() for index in indices) and all(list(each) == indices for each in cells):
            return [{name: column[index] for name, column in value.items()} for index in indices]
    return None


def _is_row(value: Any) -> bool:
    """Whether an item of a list is a row, and no message of a conversation."""
    return isinstance(value, dict) and not {"role", "from"} & value.keys()
