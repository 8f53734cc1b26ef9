"""One file of prompts and conversations serves both packages of language models."""

import json

import pytest

from llm_kd.data import read_rows
from spec_decode.data.prompts import read_asked

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
KINDS = {
    "messages": {"messages": CHAT},
    "messages and output": {"messages": CHAT[:1], "output": "a"},
    "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "turns": {"turns": ["q", "later"], "answer": "a"},
    "data": {"data": ["q", "a"]},
    "list as prompt": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "prompt": {"prompt": "q", "completion": "a"},
    "question": {"question": "q", "answer": "a"},
    "instruction": {"instruction": "q", "response": "a"},
    "instances": {"instruction": "q", "instances": [{"output": "a"}]},
    "system": {"question": "q", "answer": "a", "system_prompt": "s"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answered", [True, False])
def test_every_kind_of_record_is_read_alike_by_both(kind, answered, tmp_path):
    record = KINDS[kind]
    if not answered:
        if kind in ("messages", "conversations", "data"):
            record = {kind: record[kind][:1]}
        elif kind == "instances":
            record = {"instruction": "q", "instances": [{"input": ""}]}
        else:
            record = {name: value for name, value in record.items() if value not in ("a", CHAT[1:])}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n")
    [row], [asked] = read_rows(path), read_asked(path)
    system = [("system", "s")] if kind == "system" else []
    assert [(m.role, m.content) for m in asked.prompt.messages] == [*system, ("user", "q")]
    assert row.answered == answered == (asked.answer is not None)
    assert row.messages == (*asked.prompt.messages, *([asked.answer.message] if answered else []))
