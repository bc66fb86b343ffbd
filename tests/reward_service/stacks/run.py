"""Calls the `main` of each script here that is named on stdin, as {name: argument}, and prints {name: what it returned, or its traceback} as JSON.

Each in a fork of this process, so that no stack meets what another has loaded or changed; what all of them load is loaded once.
"""

import importlib
import json
import sys
import traceback
from multiprocessing import get_context

import torchvision  # noqa: F401
import transformers.modeling_utils  # noqa: F401


def called(name, argument):
    try:
        return {"returned": importlib.import_module(name).main(argument)}
    except Exception:
        return {"raised": traceback.format_exc()}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    with get_context("fork").Pool(len(asked), maxtasksperchild=1) as pool:
        answers = pool.starmap(called, asked.items(), chunksize=1)
        pool.close()
        pool.join()  # what they print comes before the answers
    print(json.dumps(dict(zip(asked, answers))))
