"""Conversations: read from files, written as tokens by a model's chat template, answered once.

Needs the extra `kd-common[text]`.
"""

from kd_common.text.answers import AnswerCache
from kd_common.text.encode import ChatEncoder
from kd_common.text.records import EncodingError, RowsError, encode_each
from kd_common.text.rows import Message, Row, read_rows

__all__ = ["AnswerCache", "ChatEncoder", "EncodingError", "Message", "Row", "RowsError", "encode_each", "read_rows"]
