"""Runs each program of a JSON list [[file or module, arguments], ...] on stdin up to the end of its argparse, and prints those that refuse theirs."""

import argparse
import contextlib
import io
import json
import runpy
import sys
from pathlib import Path


class Parsed(Exception):
    pass


def parse_and_stop(self, args=None, namespace=None, parse=argparse.ArgumentParser.parse_args):
    parse(self, args, namespace)
    raise Parsed


def refusal(program, arguments):
    """What the program says against its arguments; empty if they are good."""
    sys.argv, said = [program, *arguments], io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            if program.endswith(".py"):
                sys.path.insert(0, str(Path(program).parent))
                runpy.run_path(program, run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__")
    except Parsed:
        return ""
    except SystemExit as ended:
        return said.getvalue() if ended.code else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it has no argparse"


if __name__ == "__main__":
    argparse.ArgumentParser.parse_args = parse_and_stop
    print(json.dumps([[program, arguments, text] for program, arguments in json.load(sys.stdin) if (text := refusal(program, arguments))]))
