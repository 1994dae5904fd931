"""Reading documents out of files: one module for each kind, and what they share.

`place` says where reading is and turns whatever a file can raise into one message; `rows` makes texts of records;
`documents` is what callers use.
"""

from titan_growth.data.readers.place import reading

__all__ = ["reading"]
