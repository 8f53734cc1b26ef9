"""Conversations from files to batches of tokens."""

from kd_common.text import Message, Row, RowsError, read_rows
from llm_kd.data.batch import TokenBatch
from llm_kd.data.datamodule import SPLITS, TextDataModule
from llm_kd.data.encode import Encoder
from llm_kd.data.example import Example
from llm_kd.data.loader import TextLoader

__all__ = [
    "SPLITS",
    "Encoder",
    "Example",
    "Message",
    "Row",
    "RowsError",
    "TextDataModule",
    "TextLoader",
    "TokenBatch",
    "read_rows",
]
