"""Documents: which field is the text, which the prompt, and why some are none."""

import pytest

from jaxscale.config import ConfigError
from jaxscale.data.documents import Document, Skipped, document_of, split_fields


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("a/*.jsonl", ("a/*.jsonl", ())),
        ("a/*.jsonl#body", ("a/*.jsonl", ("body",))),
        ("set/config:1.0.0#question, answer", ("set/config:1.0.0", ("question", "answer"))),
        ("#a/c#/*.txt", ("#a/c#/*.txt", ())),
        ("c#/*.jsonl#body", ("c#/*.jsonl", ("body",))),
    ],
)
def test_fields_stand_after_the_last_mark(
    argument: str, expected: tuple[str, tuple[str, ...]]
) -> None:
    assert split_fields("", argument) == expected


@pytest.mark.parametrize("fields", ["", "a,b,c", "a,"])
def test_other_numbers_of_fields_are_refused(fields: str) -> None:
    spec = f"files:x.jsonl#{fields}"
    with pytest.raises(ConfigError, match=r"ends with #.*; write #FIELD, or #PROMPT,ANSWER"):
        split_fields(spec, spec)


def test_a_newline_ends_the_prompt() -> None:
    record = {"q": "Why?", "long": "Why?\n", "none": "", "a": b"So.\n"}
    assert document_of("1", record, ("a",)) == Document("1", "So.\n")
    assert document_of("1", record, ("q", "a")) == Document("1", "So.\n", "Why?\n")
    assert document_of("1", record, ("long", "a")) == Document("1", "So.\n", "Why?\n")
    assert document_of("1", record, ("none", "a")) == Document("1", "So.\n", "\n")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "field 'a' is not a string"),
        (None, "field 'a' is not a string"),
        (b"\xe9", "not UTF-8"),
        ("\ud800", "not UTF-8"),
    ],
)
def test_what_is_no_text_is_skipped(value: object, reason: str) -> None:
    assert document_of("1", {"q": "", "a": value}, ("q", "a")) == Skipped("1", reason)
    assert document_of("1", {"a": value}, ("a",)) == Skipped("1", reason)
    assert document_of("1", {"a": value}, ("b",)) == Skipped("1", "no field 'b'")


def test_the_hash_is_of_prompt_and_text() -> None:
    hashes = {Document(key, "b", "a\n").content_hash() for key in "xy"}
    hashes.add(Document("", "a\nb").content_hash())
    assert len(hashes) == 1
    assert Document("", "b").content_hash() not in hashes
