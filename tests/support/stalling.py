"""A command line whose model stops in the middle, for what is sent to a process at a known moment."""

from __future__ import annotations


def stalling(call: int, word: str) -> str:
    """Returns a program, for ``python -c``: skv-export, which at a call of the model says a word and waits a minute.

    Args:
        call: Which of the calls, from 1 on.
        word: Printed on standard output when it has come.
    """
    return f"""
import sys, time
from skv_export.runtime.graph import Graph
from skv_export.cli.main import main
run, calls = Graph.run, []
def slow(*arguments):
    calls.append(1)
    if len(calls) == {call}:
        print({word!r}, flush=True)
        time.sleep(60)
    return run(*arguments)
Graph.run = slow
main(sys.argv[1:])
"""
