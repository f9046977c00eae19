"""The pocket data set: distinct chats, disjoint splits, exact composed answers, word limits."""

import re
from functools import cache
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caliport.core.errors import InputError
from caliport.data import pocket, pocket_phrases
from caliport.data.pocket import CHAT_COUNT, COMPOSITIONS, PROMPTS, TASKS, Chat, chat, examples

INDEXES = st.integers(0, CHAT_COUNT - 1)
FORMS = ("en", *pocket.LANGUAGES, *pocket.TONES)
TABLES = (
    pocket_phrases.OUTDOOR_ACTIVITIES,
    pocket_phrases.OUTDOOR_PLACES,
    pocket_phrases.HOME_ACTIVITIES,
    pocket_phrases.HOME_PLACES,
    pocket_phrases.TOWN_ACTIVITIES,
    pocket_phrases.TOWN_PLACES,
    pocket_phrases.TIMES,
    pocket_phrases.REASONS,
    pocket_phrases.ITEMS,
)


@cache
def sample() -> list[Chat]:
    """20,000 chats: the first 10,000 and 10,000 spread over the whole range."""
    step = CHAT_COUNT // 10_000
    return [chat(index) for index in chain(range(10_000), range(step, CHAT_COUNT, step))][:20_000]


def word_count(text: str) -> int:
    return len(text.split())


def test_there_are_the_nine_tasks_and_fourteen_compositions() -> None:
    assert TASKS == (
        "summarize",
        "reply",
        "translate_es",
        "translate_fr",
        "translate_de",
        "tone_professional",
        "tone_casual",
        "tone_witty",
        "tone_paraphrase",
    )
    assert len(COMPOSITIONS) == 15
    assert COMPOSITIONS["summarize_casual_es"] == ("summarize", "tone_casual", "translate_es")
    assert COMPOSITIONS["summarize_es"] == ("summarize", "translate_es")
    assert COMPOSITIONS["reply_paraphrase"] == ("reply", "tone_paraphrase")


def test_every_task_has_a_prompt_of_its_own() -> None:
    assert set(PROMPTS) == {*TASKS, *COMPOSITIONS}
    assert len(set(PROMPTS.values())) == len(PROMPTS)
    assert all(prompt.endswith(":\n{input}") for prompt in PROMPTS.values())
    assert PROMPTS["tone_witty"] == "Change the tone of the following text to witty:\n{input}"
    assert PROMPTS["reply_de"] == (
        "Suggest a reply for the following text and translate it from English to German:\n{input}"
    )


@settings(deadline=None)
@given(one=INDEXES, other=INDEXES)
def test_distinct_indexes_give_distinct_chats(one: int, other: int) -> None:
    assert (chat(one).text == chat(other).text) == (one == other)


def test_no_duplicate_among_20_000_chats() -> None:
    assert len({one.text for one in sample()}) == 20_000


def test_the_scatter_is_a_permutation_in_reach_of_its_24_bits() -> None:
    assert pocket._FACTS <= 4096**2
    assert pocket._FACTS % pocket._VALIDATION_STEP == 0
    image = {pocket._scatter(facts) for facts in range(50_000)}
    assert len(image) == 50_000
    assert max(image) < pocket._FACTS


def test_variants_of_the_same_facts_differ() -> None:
    texts = {chat(block * pocket._FACTS + 7).text for block in range(pocket._VARIANTS)}
    assert len(texts) == pocket._VARIANTS
    summaries = {chat(block * pocket._FACTS + 7).summary() for block in range(pocket._VARIANTS)}
    assert len(summaries) == 1


@settings(deadline=None)
@given(index=INDEXES)
def test_the_chat_states_every_fact_of_its_answers(index: int) -> None:
    one = chat(index)
    text = one.text.lower()
    for phrase in (one.activity, one.place, one.time):
        assert phrase.en.lower() in text
    assert re.sub("^(because|to) ", "", one.reason.en).lower() in text
    assert {line.split(":")[0] for line in one.text.split("\n")} == {one.first, one.second}
    assert one.text.split("\n")[-1].startswith(f"{one.reply_to}: ")
    if one.item:
        assert one.item.en in text


@settings(deadline=None)
@given(index=INDEXES)
def test_word_limits_and_clean_text(index: int) -> None:
    one = chat(index)
    assert word_count(one.text) <= 55
    assert 4 <= len(one.text.split("\n")) <= 6
    assert word_count(one.summary()) <= 18
    assert word_count(one.reply()) <= 14
    for form in FORMS:
        for sentence in (one.summary(form), one.reply(form)):
            assert word_count(sentence) <= 26
            assert not re.search(r"[{}]|  | [.,!?]|\.\.", sentence)
            assert sentence[0].isupper()
            assert sentence[-1] in ".!"


@pytest.mark.parametrize("name", [n for n, tasks in COMPOSITIONS.items() if len(tasks) == 2])
def test_a_composition_is_the_auxiliary_task_of_the_main_task(name: str) -> None:
    main, auxiliary = COMPOSITIONS[name]
    composed = examples(name, "train", 400, seed=3)
    singles = examples(main, "train", 400, seed=3)
    # The auxiliary task takes summaries and, of every second chat, replies that are not held out.
    parity = 0 if main == "summarize" else 1
    helped = examples(auxiliary, "train", 400, seed=3)[parity::2]
    same = 0
    for whole, first, second in zip(composed[parity::2], singles[parity::2], helped, strict=True):
        assert whole.input == first.input
        if second.input == first.output:
            assert whole.output == second.output
            same += 1
    assert same == 200 if main == "summarize" else 60 < same < 140


def test_three_tasks_at_once() -> None:
    """The Spanish summary's words in a casual sentence, asked for in one prompt."""
    assert PROMPTS["summarize_casual_es"] == (
        "Summarize the following text, change its tone to casual and translate it from English "
        "to Spanish:\n{input}"
    )
    spanish = examples("summarize_es", "validation", 50, seed=3)
    for plain, casual in zip(
        spanish, examples("summarize_casual_es", "validation", 50, seed=3), strict=True
    ):
        assert casual.input == plain.input
        what = plain.output.partition(" van a ")[2].removesuffix(".")
        assert casual.output.startswith("¡Oye, ")
        assert casual.output.endswith(f" se apuntan a {what}!")


def test_an_english_sentence_has_one_answer_in_each_form() -> None:
    for form in FORMS[1:]:
        answers: dict[str, str] = {}
        for one in sample()[::4]:
            for sentence, changed in (
                (one.summary(), one.summary(form)),
                (one.reply(), one.reply(form)),
            ):
                assert answers.setdefault(sentence, changed) == changed
        assert len(set(answers.values())) == len(answers)


@pytest.mark.parametrize("task", ["summarize", "translate_fr", "reply_witty"])
def test_examples_depend_on_split_and_seed_alone(task: str) -> None:
    once = examples(task, "train", 50, seed=1)
    assert examples(task, "train", 50, seed=1) == once
    assert examples(task, "train", 50, seed=2) != once
    assert examples(task, "validation", 50, seed=1) != once
    assert len(once) == 50


def test_splits_share_neither_chats_nor_summaries() -> None:
    train = examples("summarize", "train", 5000, seed=0)
    validation = examples("summarize", "validation", 5000, seed=0)
    for field in ("input", "output"):
        found = [{getattr(one, field) for one in split} for split in (train, validation)]
        assert not found[0] & found[1]


@settings(deadline=None)
@given(index=INDEXES)
def test_each_split_reaches_exactly_its_own_indexes(index: int) -> None:
    split = pocket.split_of(index)
    train = CHAT_COUNT - CHAT_COUNT // 10
    draws = train if split == "train" else CHAT_COUNT // 10
    draw = index % draws
    assert pocket.split_of(pocket._index(split, draw)) == split
    assert 0 <= pocket._index(split, draw) < CHAT_COUNT
    assert pocket._index(split, draws - 1) == CHAT_COUNT - (1 if split == "train" else 10)


def test_every_phrase_shape_and_sentence_is_reached_in_both_splits() -> None:
    for split in pocket.SPLITS:
        text = "\n".join(one.input for one in examples("reply", split, 3000, seed=5)).lower()
        for words in (
            "sure! where",
            "yes, i am.",
            "i am busy",
            "what for",
            "nothing yet",
            "not re",
        ):
            assert words in text
        for words in (*pocket_phrases.GREETINGS, *pocket_phrases.CLOSINGS):
            assert words.lower() in text
        for language in ("en", *pocket.LANGUAGES):
            ending = "" if language == "en" else f"_{language}"
            tasks = (f"summarize{ending}", f"reply{ending}")
            answers = "\n".join(
                one.output for task in tasks for one in examples(task, split, 3000, seed=5)
            )
            for phrase in chain(*TABLES):
                assert getattr(phrase, language) in answers


def test_every_sentence_template_is_used() -> None:
    kinds = {"summary", "meet", "bring"}
    assert set(pocket_phrases.SENTENCES) == kinds
    for kind, forms in pocket_phrases.SENTENCES.items():
        assert tuple(forms) == (*FORMS, *(["casual_es"] if kind == "summary" else []))
    meet = next(one for one in sample() if not one.item)
    bring = next(one for one in sample() if one.item)
    for form in FORMS:
        assert len({meet.summary(form), meet.reply(form), bring.reply(form)}) == 3


def test_phrases_are_distinct_in_every_language() -> None:
    for language in ("en", *pocket.LANGUAGES):
        phrases = [getattr(phrase, language) for phrase in chain(*TABLES)]
        assert len(set(phrases)) == len(phrases)
        assert all(phrase == " ".join(phrase.split()) for phrase in phrases)


def test_the_reply_goes_to_the_last_speaker_and_turned_down_facts_stay_out() -> None:
    seen = set()
    for one in sample()[:500]:
        assert f", {one.reply_to}," in one.reply()
        if "I am busy then" in one.text:
            proposed = one.text.split("\n")[0]
            assert one.time.en not in proposed
            seen.add("time")
        if "too noisy" in one.text:
            assert one.place.en not in one.text.split("\n")[3].lower()
            seen.add("place")
        if "Not really" in one.text:
            assert one.activity.en not in one.text.split("\n")[0]
            seen.add("activity")
    assert seen == {"time", "place", "activity"}


@pytest.mark.parametrize(
    ("task", "split", "count", "expected"),
    [
        ("sing", "train", 1, "found the task 'sing'; use one of: summarize, reply, translate_es"),
        ("reply", "test", 1, "found the split 'test'; use one of: train, validation"),
        ("reply", "train", -1, "found the count -1; the train split has 0 to "),
        ("reply", "validation", CHAT_COUNT, f"the validation split has 0 to {CHAT_COUNT // 10} "),
    ],
)
def test_wrong_arguments_are_named(task: str, split: str, count: int, expected: str) -> None:
    with pytest.raises(InputError, match=re.escape(expected)) as caught:
        examples(task, split, count, seed=0)
    assert "\n" not in str(caught.value)


def test_wrong_chats_are_named() -> None:
    with pytest.raises(InputError, match=f"chat -1 does not exist; .* to {CHAT_COUNT - 1}"):
        chat(-1)
    with pytest.raises(InputError, match="found the task 'tone_witty' for a chat; use one of"):
        pocket.answer(chat(0), "tone_witty")
