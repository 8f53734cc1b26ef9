"""``python -m llm_kd.fit``: distil a language model and report what came of it.

:func:`build` parses and makes everything, :func:`run` trains, :func:`main` does both and prints the table. Notebooks
and tests call ``build([...])`` with the same arguments as the command line.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("llm_kd.fit")  # before the imports below, which take seconds

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lightning.pytorch.cli import ArgsType, LightningArgumentParser
