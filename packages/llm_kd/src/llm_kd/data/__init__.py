"""Conversations from files to batches of tokens."""

from llm_kd.data.batch import TokenBatch
from llm_kd.data.encode import Encoder
from llm_kd.data.example import Example
from llm_kd.data.loader import TextLoader
from llm_kd.data.module import SPLITS, TextDataModule
from llm_kd.data.rows import Message, Row, RowsError, read_rows

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
