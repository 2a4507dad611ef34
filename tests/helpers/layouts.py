"""How a compiled library lays out the structs of its interface."""

import ctypes


class Field(ctypes.Structure):
    """A row of what `bcl_*_layout_<struct>` returns; the last has no name, and the size of the struct as its offset."""

    _fields_ = [("name", ctypes.c_char_p), ("offset", ctypes.c_int64), ("size", ctypes.c_int64)]


def compiled_layout(function) -> tuple[list[tuple[str, int, int]], int]:
    """(name, offset, size) of every field, and the size of the struct."""
    function.restype = ctypes.POINTER(Field)
    rows, fields = function(), []
    while (row := rows[len(fields)]).name is not None:
        fields.append((row.name.decode(), row.offset, row.size))
    return fields, row.offset


def check_layout(struct, function) -> None:
    """The mirrored struct has the library's fields, in its order, at its offsets and of its sizes, and no other."""
    fields, size = compiled_layout(function)
    mirrored = [(name, getattr(struct, name)) for name, _ in struct._fields_]
    assert fields == [(name, field.offset, field.size) for name, field in mirrored] and size == ctypes.sizeof(struct)
    ends = [offset + field_size for _, offset, field_size in fields]
    starts = [*(offset for _, offset, _ in fields[1:]), size]
    assert ends[:-1] == starts[:-1] and starts[-1] - ends[-1] < 8  # a field that both lists forget would leave a hole
