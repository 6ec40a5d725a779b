"""Evaluation items are found in training rows by the stated rule, and only there."""

from __future__ import annotations

from addlang.data.contamination import ItemIndex, ItemText, words

QUESTION = (
    "Natalia sold clips to forty eight of her friends in April and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
SHORT = "Which river flows through the capital of Hungary?"  # 8 words


def index(*texts: str, task: str = "maths") -> ItemIndex:
    return ItemIndex(ItemText(task, str(i), "question", text) for i, text in enumerate(texts))


def shares(found: ItemIndex, row: str) -> list[tuple[str, float]]:
    return [(o.item, round(o.share, 2)) for o in found.search(row, "train.jsonl", 7)]


def test_a_row_that_quotes_an_item_is_found_whatever_its_case_and_punctuation() -> None:
    row = "Solve this.\n\n" + QUESTION.upper().replace(".", " --") + "\nShe sold 72."
    (overlap,) = index(QUESTION).search(row, "train.jsonl", 7)
    assert (overlap.file, overlap.row, overlap.task, overlap.item, overlap.field) == (
        "train.jsonl", 7, "maths", "0", "question",
    )  # fmt: skip
    assert overlap.share == 1
    assert 'train.jsonl, row 7: task maths, item 0, question: "Natalia sold clips' in overlap.describe()


def test_half_of_a_text_is_contained_and_less_is_not() -> None:
    sequence = words(QUESTION)
    runs = len(sequence) - 12
    assert shares(index(QUESTION), " ".join(sequence[: 12 + runs // 2])) == [("0", 0.5)]
    assert shares(index(QUESTION), " ".join(sequence[: 12 + runs // 2 - 1])) == []


def test_a_short_text_must_stand_alone() -> None:
    found = index(SHORT)
    assert shares(found, f'Answer me: "{SHORT}" Budapest lies on the Danube.') == [("0", 1.0)]
    assert shares(found, "I wonder: which river flows through the capital of Hungary") == [("0", 1.0)]
    assert shares(found, "Which river flows through the capital of Hungary and Austria?") == []
    assert shares(found, "Tell me which river flows through the capital of Hungary?") == []


def test_texts_below_eight_words_are_counted_and_not_looked_for() -> None:
    found = index("What is it?", "Paris")
    assert (len(found), found.short) == (0, 2)
    assert shares(found, "What is it? Paris") == []


def test_the_template_of_a_task_is_not_the_text_of_its_items() -> None:
    frame = "Read the following passage with care and choose the one answer among those given that fits it best of all."
    found = index(*(f"{frame} {QUESTION} {i}" if i == 3 else f"{frame} Number {i}." for i in range(40)))
    assert shares(found, f"{frame} Here is mine.") == []
    assert [item for item, _ in shares(found, f"Well. {QUESTION}")] == ["3"]


def test_scripts_without_spaces_are_compared_by_characters() -> None:
    japanese = (
        "ナタリアは四月に四十八人の友だちにクリップを売り、五月にはその半分を売りました。全部でいくつ売りましたか。"
    )
    thai = "นับตั้งแต่ย้ายมาที่เมืองหลวงของกาตาลุญญาวิดัลได้ลงเล่นให้กับสโมสรไปทั้งสิ้นสี่สิบเก้าเกม"
    found = index(japanese, thai)
    assert shares(found, "質問です。" + japanese.replace("、", " ")) == [("0", 1.0)]
    assert shares(found, "ข่าว " + thai) == [("1", 1.0)]
    assert shares(found, japanese[:20]) == []


def test_a_passage_that_stands_with_several_questions_is_reported_once() -> None:
    found = ItemIndex(ItemText("reading", str(i), "passage", QUESTION) for i in range(5))
    assert shares(found, QUESTION) == [("0", 1.0)]


def test_nothing_to_look_for_finds_nothing() -> None:
    assert shares(index(), QUESTION) == []
