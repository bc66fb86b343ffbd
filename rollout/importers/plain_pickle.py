"""Pickles that may hold nothing but numbers, text, lists, tuples, sets and dictionaries, so that reading one runs no code."""

from __future__ import annotations

import pickle
from pathlib import Path

from rollout.importers.item import SourceError


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain types are read")


def read_plain_pickle(file: Path) -> object:
    """The contents; text of Python 2 is read as Latin-1. Raises SourceError."""
    try:
        with file.open("rb") as handle:
            return _PlainUnpickler(handle, encoding="latin1").load()
    except OSError as error:
        raise SourceError(f"{file} cannot be read ({error.strerror}); download the data set in full, and give the folder that holds it") from error
    except Exception as error:  # a broken pickle can raise almost anything
        raise SourceError(f"{file} is not a pickle of plain types ({error}); download it again from its authors") from error
