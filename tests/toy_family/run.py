"""Runs a service that knows the toy family besides the product's own ones.

python -m tests.toy_family.run ROLE --controller ADDRESS ...
"""

import runpy
import sys

from common.families import FAMILIES
from tests.toy_family.description import MODEL_TYPE, Toy


def register(role: str) -> None:
    """Put the toy family into the tables that a service of this role uses."""
    FAMILIES[MODEL_TYPE] = Toy()
    if role == "llm":
        from services.llm import families as language_families
        from tests.toy_family import language

        language_families.FAMILIES[MODEL_TYPE] = language.load
    elif role == "vision":
        from services.vision import families as vision_families
        from tests.toy_family import tower

        vision_families.FAMILIES[MODEL_TYPE] = tower.load
    elif role.startswith("preprocess"):
        from services.preprocess import families as preprocess_families
        from services.preprocess.sandbox import pool
        from tests.toy_family import preprocessing

        preprocess_families.FAMILIES[MODEL_TYPE] = preprocessing.load
        pool.PROGRAM = ["tests.toy_family.run", "preprocess.sandbox.child"]


if __name__ == "__main__":
    role = sys.argv.pop(1)
    register(role)
    runpy.run_module(f"services.{role}", run_name="__main__")
