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
