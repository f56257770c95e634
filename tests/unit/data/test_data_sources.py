"""Sources: every kind of row is read, and the error of an invalid one names file, row and field."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from paths import SHARED

from clipo_megatron.config.schema import SourceConfig
from clipo_megatron.data.sources import DataError, read, rows_of_all

DATA = SHARED / "data"


def record(question="1 + 1?", answer="2", **changes):
    row = {
        "data_source": "demo/sums",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": 3},
    }
    return {**row, **changes}


def write_jsonl(path, records):
    path.write_text("".join(f"{json.dumps(row)}\n\n" for row in records))  # blank lines are no rows
    return SourceConfig(path=str(path))


def write_parquet(path, records):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)
    return SourceConfig(path=str(path))


WRITERS = pytest.mark.parametrize("write, name", [(write_jsonl, "sums.jsonl"), (write_parquet, "sums.parquet")])


@WRITERS
def test_rows(tmp_path, write, name):
    source = write(tmp_path / name, [record(f"{n} + 1?", str(n + 1)) for n in range(5)])
    source.suffix = " Think."
    rows = read(source)
    assert [row.id for row in rows] == [f"sums/{n}" for n in range(5)]
    assert rows[4].messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "4 + 1? Think."},
    )
    assert (rows[4].data_source, rows[4].ground_truth, rows[4].extra) == ("demo/sums", "5", {"index": 3})


@WRITERS
def test_size_takes_the_first_rows_and_never_fewer(tmp_path, write, name):
    source = write(tmp_path / name, [record(str(n)) for n in range(5)])
    source.size = 3
    assert [row.messages[-1]["content"] for row in read(source)] == ["0", "1", "2"]
    source.size = 6
    with pytest.raises(DataError, match="5 rows, and size = 6"):
        read(source)


@WRITERS
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data_source": None}, "data_source"),
        ({"data_source": ""}, "data_source"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [{"role": "user", "content": None}]}, "prompt[0].content"),
        ({"prompt": [{"role": "user", "content": " "}]}, "prompt[0].content"),
        ({"prompt": [{"role": "human", "content": "x"}]}, "prompt[0].role"),
        ({"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "prompt"),
        ({"reward_model": None}, "reward_model"),
        ({"reward_model": {"ground_truth": None, "style": "rule"}}, "reward_model.ground_truth"),
        ({"reward_model": {"ground_truth": "", "style": "rule"}}, "reward_model.ground_truth"),
    ],
)
def test_an_invalid_row_is_located(tmp_path, write, name, changes, field):
    source = write(tmp_path / name, [record(), record(), record(**changes), record()])
    with pytest.raises(DataError) as caught:
        read(source)
    message = str(caught.value)
    assert name in message and "row 2" in message and f"field {field}:" in message


@pytest.mark.parametrize(
    ("line", "part"),
    [("{", "not valid JSON"), ("3", "mapping of fields"), ('{"prompt": "x"}', "data_source")],
)
def test_an_invalid_line_is_located(tmp_path, line, part):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(record())}\n\n{line}\n")
    with pytest.raises(DataError, match="row 1 \\(line 3\\)") as caught:
        read(SourceConfig(path=str(path)))
    assert part in str(caught.value)


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "x.parquet").write_text("no parquet")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "other.jsonl").write_text('{"question": "6 x 7?", "answer": "42"}')
    write_parquet(tmp_path / "short.parquet", [{"data_source": "x", "question": "y"}])
    for name, part in [
        ("x.parquet", "cannot be read as parquet"),
        (
            "short.parquet",
            "has no prompt, reward_model; it has data_source, question. Write rows such as {.data_source",
        ),
        (
            "other.jsonl",
            r"row 0 \(line 1\) has no data_source, prompt, reward_model; it has question, answer. Write rows",
        ),
        ("empty.jsonl", "no rows"),
        ("absent.jsonl", "no file"),
    ]:
        with pytest.raises(DataError, match=part):
            read(SourceConfig(path=str(tmp_path / name)))


def test_numbers_can_be_ground_truths(tmp_path):
    source = write_jsonl(tmp_path / "n.jsonl", [record(answer=18), record(answer=0.5)])
    assert [row.ground_truth for row in read(source)] == ["18", "0.5"]


def test_generator():
    source = SourceConfig(
        generator="basic_arithmetic", size=6, seed=4, options={"min_terms": 2, "max_terms": 2}, suffix=" Now."
    )
    rows = read(source)
    assert [row.id for row in rows] == [f"basic_arithmetic/{n}" for n in range(6)]
    assert all(row.data_source == "reasoning_gym/basic_arithmetic" for row in rows)
    assert all(row.messages[0]["content"] == row.extra["question"] + " Now." for row in rows)
    assert all(row.ground_truth == row.extra["answer"] for row in rows)
    json.dumps([row.extra for row in rows])
    assert rows == read(source)
    source.seed = 5
    assert rows != read(source)


def test_generator_without_a_single_answer():
    (row,) = read(SourceConfig(generator="rubiks_cube", size=1))
    assert row.ground_truth == "" and row.extra["metadata"]


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"generator": "basic_arithmetics"}, "Did you mean basic_arithmetic"),
        ({"generator": "gcd", "options": {"max_values": 3}}, "no option 'max_values'. It has .*max_value"),
        ({"generator": "basic_arithmetic", "options": {"min_terms": -1}}, "min_terms must be positive"),
    ],
)
def test_wrong_generator_settings_are_refused(settings, part):
    with pytest.raises(DataError, match=part):
        read(SourceConfig(size=2, **settings))


def test_names_are_unique(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [record()])
    with pytest.raises(DataError, match="2 sources are called a"):
        rows_of_all([source, source])
    other = SourceConfig(path=source.path, name="b")
    assert [row.id for row in rows_of_all([source, other])] == ["a/0", "b/0"]


@pytest.mark.skipif(not DATA.is_dir(), reason="the paper's sets are not beside the repository")
@pytest.mark.parametrize(
    ("name", "count"), [("train_math75", 7500), ("train_gsm8k", 7473), ("test_truthfulqa", 1634), ("test_aime", 30)]
)
def test_the_papers_sets(name, count):
    rows = read(SourceConfig(path=str(DATA / f"{name}.parquet")))
    assert len(rows) == count and len({row.id for row in rows}) == count
    assert all(row.messages[0]["role"] == "user" and row.data_source.startswith("conrl/") for row in rows)


def test_a_file_that_is_one_endless_line_is_refused_at_once(tmp_path):
    file = tmp_path / "set.jsonl"
    file.touch()
    os.truncate(file, 1 << 33)
    with pytest.raises(DataError, match=r"row 0 \(line 1\): the line has more than 64 MiB"):
        read(SourceConfig(path=str(file)))


def test_columns_of_one_name_are_named(tmp_path):
    column = pyarrow.array(["x"])
    table = pyarrow.table([column] * 4, names=["data_source", "prompt", "reward_model", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "set.parquet")
    with pytest.raises(DataError, match="several columns called prompt"):
        read(SourceConfig(path=str(tmp_path / "set.parquet")))
