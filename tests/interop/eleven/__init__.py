"""The ways in which QEMU with dbus-vmstate alone loses or freezes a guest, run again: QEMU alone first, then the same under ferry.

    rows.py      what is wrong in each row
    helper.py    the process that is wrong
    alone.py     QEMU to QEMU, as management would do it
    ferried.py   the same helpers in a machine of ours
    table.py     both as the table of docs/qemu.md

`python -m tests.interop.eleven` prints that table from what it has just seen.
"""
