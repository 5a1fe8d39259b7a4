"""`ferry`: one module a command, each with `arguments(parser)` and `run(args) -> int`; main.py finds and runs them.

Nothing heavy is imported before a command runs, so that `--help` answers at once. What is printed goes through output.py.
"""
