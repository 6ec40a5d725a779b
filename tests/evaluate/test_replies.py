from __future__ import annotations

from typing import Any

import pytest

from addlang.evaluate import replies
from addlang.evaluate.measurement import NotMeasuredError, Outcome
from addlang.evaluate.replies import identify, is_degenerate, is_judged, reply_language, sentences

ENGLISH = "The children walked to school together this morning."
SWAHILI = "Watoto walitembea pamoja kwenda shuleni asubuhi ya leo."


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (ENGLISH, "en"),
        (SWAHILI, "sw"),
        ("Yara sun tafi makaranta tare da safe a yau.", "ha"),
        ("ልጆቹ ዛሬ ጠዋት አብረው ወደ ትምህርት ቤት ሄዱ።", "am"),
        ("बच्चे आज सुबह एक साथ स्कूल गए।", "hi"),
    ],
)
def test_language_of_a_sentence(text: str, language: str) -> None:
    assert identify(text)[0] == language


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("It costs 3.5 dollars. Is that much? Yes!", ["It costs 3.5 dollars.", "Is that much?", "Yes!"]),
        ('He said "no." Then he left.', ['He said "no.', "Then he left."]),
        ("ሰላም ነው።እንዴት ነህ?", ["ሰላም ነው።", "እንዴት ነህ?"]),
        ("यह सच है। वह गया।", ["यह सच है।", "वह गया।"]),
        ("هذا صحيح؟ نعم", ["هذا صحيح؟", "نعم"]),
        ("1. **Bread**\n2. Milk\n\n- Eggs", ["Bread", "Milk", "Eggs"]),
        ("Use this:\n```python\nprint('nicht Englisch')\n```\nDone.", ["Use this:", "Done."]),
        ("", []),
    ],
)
def test_sentences(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts


@pytest.mark.parametrize(
    ("text", "judged"),
    [
        ("Yes, of course.", False),  # 11 letters
        ("Worcestershire sauce", False),  # two words
        ("Mix the flour well.", True),
        ("12 + 30 = 42 - 100 * 7", False),
        ("我喜欢看书", True),  # five letters, no spaces
    ],
)
def test_short_sentences_are_not_judged(text: str, judged: bool) -> None:
    assert is_judged(text) == judged


@pytest.mark.parametrize(
    ("reply", "degenerate"),
    [
        ("", True),
        (" ... !", True),
        ("42", False),
        (ENGLISH, False),
        ("I do not know. " * 12, True),
        ("I do not know. " * 2, False),
        ("我不知道" * 12, True),
    ],
)
def test_degenerate_replies(reply: str, degenerate: bool) -> None:
    assert is_degenerate(reply) == degenerate


def replying(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, texts: list[str]) -> None:
    """Let the model say given texts."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    monkeypatch.setattr(replies, "greedy", lambda *args, **kwargs: ids)


def measure(model: Any, tokenizer: Any, n: int, **changes: Any) -> Outcome:
    prompts = [(f"prompt {i}", "Where did the children go?") for i in range(n)]
    return reply_language(model, tokenizer, prompts, **{"max_new_tokens": 200, "batch_size": 2, **changes})


def test_share_counts_sentences_and_not_replies(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    replying(monkeypatch, tokenizer, [f"{ENGLISH} {SWAHILI} Yes. {ENGLISH}", ENGLISH, "No."])
    language, degenerate = measure(model, tokenizer, 3)
    assert language.value == 3 / 4
    assert [(i.numerator, i.denominator) for i in language.items] == [(2, 3), (1, 1), (0, 0)]
    assert [s[1] for s in language.items[0].detail["sentences"]] == ["en", "sw", "en"]
    assert [i.detail["not_judged"] for i in language.items] == [1, 0, 1]
    assert "py3langid" in language.settings["identifier"]
    assert degenerate.value == 0


def test_nothing_to_judge_is_not_run_and_not_a_share(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    replying(monkeypatch, tokenizer, ["No.", ""])
    outcome = measure(model, tokenizer, 2)
    assert [m.metric for m in outcome] == ["degenerate_replies"]
    assert outcome[0].value == 0.5
    assert "none of the 2 items could be judged" in outcome.not_run[0].reason


def test_replies_of_a_model_are_measured_from_end_to_end(model: Any, tokenizer: Any) -> None:
    outcome = measure(model, tokenizer, 3, max_new_tokens=8)
    again = measure(model, tokenizer, 3, max_new_tokens=8, batch_size=1)
    assert outcome == again
    assert Outcome.from_json(outcome.to_json()) == outcome
    sampled = measure(model, tokenizer, 3, max_new_tokens=8, sampling={"seed": 1})
    assert sampled[-1].settings["decoding"] == {"seed": 1}


def test_without_chat_template_or_known_language_nothing_is_measured(model: Any, new_tokenizer: Any) -> None:
    with pytest.raises(NotMeasuredError, match="no chat template"):
        measure(model, new_tokenizer(None), 1)
    with pytest.raises(NotMeasuredError, match="does not know the language 'tlh'"):
        measure(model, new_tokenizer(), 1, expected="tlh")
