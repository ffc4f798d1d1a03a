"""The fault matrix: a sweep is disturbed in every way that we know, and must not be any different.

`python -m faults --help`, run in `tests` (or `make faults`), says how; `docs/reliability.md` holds
the table.
"""
