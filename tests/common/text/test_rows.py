"""Reading chat and instruction files: what becomes a row, and what is refused with file and line."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from kd_common.text import Message, RowsError, read_rows

CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}


@pytest.fixture
def write(tmp_path):
    def write(*records, name="data.jsonl"):
        path = tmp_path / name
        lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


def turns(rows):
    return [[(m.role, m.content, m.input) for m in row.messages] for row in rows]


def test_chat_rows(write):
    answered = {"messages": [*CHAT["messages"], {"role": "assistant", "content": "\n Hello.", "name": "ignored"}]}
    rows = read_rows(path := write(CHAT, answered))
    assert turns(rows) == [
        [("system", "Be brief.", ""), ("user", "Hi", "")],
        [("system", "Be brief.", ""), ("user", "Hi", ""), ("assistant", "\n Hello.", "")],
    ]
    assert [row.answered for row in rows] == [False, True]
    assert [row.source for row in rows] == [f"{path}, line 1", f"{path}, line 2"]


@pytest.mark.parametrize("output", [None, "", "  \n"])
def test_instruction_rows_without_an_answer_are_prompts(write, output):
    rows = read_rows(write({"instruction": "Add", "input": "1 2", "output": output}, {"instruction": "Say hi"}))
    assert turns(rows) == [[("user", "Add", "1 2")], [("user", "Say hi", "")]]
    assert not any(row.answered for row in rows)


def test_instruction_rows_with_an_answer(write):
    (row,) = read_rows(write({"instruction": "Add", "input": "", "output": "3", "id": 5}))
    assert row.messages == (Message("user", "Add"), Message("assistant", "3"))


def test_of_several_answers_the_first_is_learnt_and_all_are_references(write):
    several, one = read_rows(
        write({"instruction": "Add", "output": ["3", "three"]}, {"instruction": "Add", "output": ["3"]})
    )
    assert several.messages == one.messages == (Message("user", "Add"), Message("assistant", "3"))
    assert (several.alternatives, one.alternatives) == (("three",), ())


def test_a_files_own_field_names(write):
    path = write({"question": "1 + 1?", "answer": "2"})
    rows = read_rows(path, {"instruction": "question", "output": "answer"})
    assert turns(rows) == [[("user", "1 + 1?", ""), ("assistant", "2", "")]]


def test_every_instance_is_a_row_of_its_line(write):
    path = write({"instruction": "Sort", "instances": [{"input": "b a", "output": "a b"}, {"input": "d c"}]})
    rows = read_rows(path)
    assert turns(rows) == [[("user", "Sort", "b a"), ("assistant", "a b", "")], [("user", "Sort", "d c")]]
    assert {row.source for row in rows} == {f"{path}, line 1"}


def test_blank_lines_hold_no_row_but_are_counted(write):
    path = write(b"", {"instruction": "Hi"}, b"  \t", {"instruction": "Ho"}, b"")
    assert [row.source for row in read_rows(path)] == [f"{path}, line 2", f"{path}, line 4"]


def test_parquet_equals_jsonl(write, tmp_path):
    records = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"messages": [{"role": "user", "content": "Ünïcode\n"}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "data.parquet")
    rows = read_rows(tmp_path / "data.parquet")
    assert turns(rows) == turns(read_rows(write(*records)))
    assert rows[1].source == f"{tmp_path / 'data.parquet'}, row 2"


def test_parquet_gives_no_call_the_arguments_of_others(tmp_path):
    path = tmp_path / "data.parquet"
    records = [
        {
            "messages": [
                {"role": "user", "content": "Go"},
                {"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": arguments}]},
            ],
            "tools": [{"name": name, "parameters": arguments}],
        }
        for name, arguments in {"weather": {"city": "Rome"}, "add": {"first": 1, "second": 2}}.items()
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    for row, record in zip(read_rows(path), records, strict=True):
        assert row.messages[1].more["tool_calls"] == record["messages"][1]["tool_calls"]
        assert row.more["tools"] == record["tools"]


def test_system_turns_beside_an_instruction(write):
    record = {"question": "1 + 1?", "answer": "2", "persona": "Be odd."}
    names = {"instruction": "question", "output": "answer"}
    for key in ("system", "system_prompt", "system_message"):
        [found] = turns(read_rows(write(record | {key: "Be brief."}), names))
        assert found == [("system", "Be brief.", ""), ("user", "1 + 1?", ""), ("assistant", "2", "")]
    [found] = turns(read_rows(write(record), names | {"system": "persona"}))
    assert found[0] == ("system", "Be odd.", "")
    with pytest.raises(RowsError, match="line 1: has 'system' and 'system_prompt', which differ"):
        read_rows(write({"instruction": "Hi", "system": "a", "system_prompt": "b"}))


@pytest.mark.parametrize("output", ["2", [{"role": "assistant", "content": "2"}]])
def test_an_answer_beside_messages_answers_them(write, output):
    asked = [{"role": "user", "content": "1 + 1?"}]
    rows = read_rows(write({"prompt": asked, "completion": output}), {"messages": "prompt", "output": "completion"})
    assert turns(rows) == [[("user", "1 + 1?", ""), ("assistant", "2", "")]]
    answered = [*asked, {"role": "assistant", "content": "two"}]
    assert turns(read_rows(write({"messages": answered, "output": output})))[0][1:] == [("assistant", "two", "")]
    with pytest.raises(RowsError, match="line 1: output must be text, is a list"):
        read_rows(write({"messages": asked, "output": ["2", "two"]}))


def test_arguments_as_text_with_a_key_twice_are_refused(write):
    call = {"name": "add", "arguments": '{"first": 1, "first": 2}'}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(RowsError, match=r"line 1: the arguments of a call in turn 2: .* 'first' twice"):
        read_rows(write({"messages": turns}))


def test_answers_that_are_rated_bad_are_refused(write):
    with pytest.raises(RowsError, match="line 2: has 'label' false"):
        read_rows(write({"instruction": "Hi", "label": True}, {"instruction": "Hi", "output": "Go!", "label": False}))


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b[:40] + bytes(60) + b[100:]])
def test_a_damaged_parquet_file_is_refused(tmp_path, damage):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"instruction": f"Say {n}"} for n in range(200)]), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RowsError, match=rf"{path}: not a readable Parquet file"):
        read_rows(path)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (b'{"instruction": "cut', "is not JSON"),
        (b'{"instruction": "\xff"}', "is not JSON"),
        ([1], "must be a JSON object, is a list"),
        ({}, "has nothing"),
        ({"query": "1?", "reply": "2"}, "has query, reply; .*data.fields"),
        ({"instruction": " "}, "instruction is empty"),
        ({"instruction": ["a"]}, "instruction must be text, is a list"),
        ({"instruction": "Add", "output": 3}, "output must be text, is a number"),
        ({"instruction": "Add", "output": []}, "a list of outputs must hold at least one answer"),
        (
            {"instruction": "Add", "output": ["3", " "]},
            "a list of outputs must hold at least one answer, and no empty one",
        ),
        ({"instruction": "Add", "output": ["3", 3]}, "output 2 must be text, is a number"),
        ({"instruction": "Add", "input": True}, "input must be text, is a boolean"),
        ({"instruction": "Add", "instances": []}, "instances must be a list of objects"),
        ({"instruction": "Add", "instances": ["x"]}, "instances must be a list of objects"),
        ({"messages": []}, "messages must be a list of turns"),
        ({"messages": "Hi"}, "messages must be a list of turns"),
        ({"messages": ["Hi"]}, "turn 1 must have a role of system, user, assistant, got 'Hi'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 1 must have a role .* got 'tool'"),
        ({"messages": [{"role": "user", "content": "\n"}]}, "turn 1 is empty"),
        ({"messages": [{"role": "user"}]}, "turn 1 is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content of turn 1 must be text, is a list"),
        ({"messages": [{"role": "system", "content": "x"}]}, "must start with a user's turn"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "must start with a user's turn"),
        ({"messages": [*CHAT["messages"], CHAT["messages"][0]]}, "turn 3: a system turn can only come first"),
    ],
)
def test_malformed_rows_are_named_by_line(write, record, problem):
    path = write({"instruction": "Fine"}, record)
    with pytest.raises(RowsError, match=rf"(?s){path}: 1 of 2 rows are malformed.*  line 2: .*{problem}"):
        read_rows(path)


def test_all_problems_are_counted_and_the_first_shown(write):
    path = write(*[{"instruction": ""}] * 8, {"instruction": "Fine"})
    with pytest.raises(RowsError) as error:
        read_rows(path)
    shown = [f"  line {n}: instruction is empty" for n in range(1, 6)]
    assert str(error.value).splitlines()[1:] == [*shown, "  and 3 more"]
    assert "8 of 9 rows" in str(error.value)


def test_a_named_field_must_be_there(write):
    path = write({"question": "1?", "anwser": "2"})
    with pytest.raises(RowsError, match="line 1: has no 'answer', which `fields` gives for output"):
        read_rows(path, {"instruction": "question", "output": "answer"})


def test_unknown_field_names(write):
    with pytest.raises(ValueError, match=r"fields may name messages, .*, system; got prompt"):
        read_rows(write(CHAT), {"prompt": "question"})


def test_files_that_hold_nothing_readable(tmp_path, write):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such data file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(RowsError, match=r"data\.csv: data files end in"):
        read_rows(write(CHAT, name="data.csv"))
    with pytest.raises(RowsError, match="not a readable Parquet file"):
        read_rows(write(CHAT, name="data.parquet"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RowsError, match="holds no rows"):
        read_rows(tmp_path / "empty.jsonl")
