"""The pocket data set: chats from a small grammar, with exact answers by construction.

Two people settle on a plan (who, what, where, when, why). Each chat has a one-sentence summary and
the reply of the last listener, both with translations into Spanish, French and German and in four
tones. The tasks mirror in miniature the benchmark of "Efficient Compositional Multi-tasking for
On-device Large Language Models" (arXiv 2507.16083): two main tasks times seven auxiliary tasks give
14 compositions. The grammar, its sentences and its translations were written for this project.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from zlib import crc32

from caliport.core.errors import InputError
from caliport.data.examples import Example
from caliport.data.pocket_phrases import (
    CLOSINGS,
    GREETINGS,
    GROUPS,
    ITEMS,
    NAMES,
    REASONS,
    SENTENCES,
    SHAPES,
    TIMES,
    Phrase,
    Shape,
)

LANGUAGES = {"es": "Spanish", "fr": "French", "de": "German"}
TONES = ("professional", "casual", "witty", "paraphrase")
MAIN_TASKS = ("summarize", "reply")
AUXILIARY_TASKS = tuple(f"translate_{code}" for code in LANGUAGES) + tuple(
    f"tone_{tone}" for tone in TONES
)
TASKS = MAIN_TASKS + AUXILIARY_TASKS
# An auxiliary task's name ends in the form of the answer that it asks for.
COMPOSITIONS: dict[str, tuple[str, ...]] = {
    f"{main}_{auxiliary.partition('_')[2]}": (main, auxiliary)
    for main in MAIN_TASKS
    for auxiliary in AUXILIARY_TASKS
}
# Three tasks at once, as in the paper's analysis: the casual summary, in Spanish.
COMPOSITIONS["summarize_casual_es"] = ("summarize", "tone_casual", "translate_es")
SPLITS = ("train", "validation")


def _prompts() -> dict[str, str]:
    mains = {
        "summarize": "Summarize the following text",
        "reply": "Suggest a reply for the following text",
    }
    single = dict(mains)
    added = {}
    for code, language in LANGUAGES.items():
        task = f"translate_{code}"
        single[task] = f"Translate the following text from English to {language}"
        added[task] = f"translate it from English to {language}"
    for tone in TONES:
        task = f"tone_{tone}"
        single[task] = f"Change the tone of the following text to {tone}"
        added[task] = f"change its tone to {tone}"
    # "Paraphrase" is not an adjective, so the prompt for tones would not be English.
    single["tone_paraphrase"] = "Paraphrase the following text"
    added["tone_paraphrase"] = "paraphrase it"
    composed = {
        name: ", ".join([mains[main], *(added[task] for task in auxiliary[:-1])])
        + f" and {added[auxiliary[-1]]}"
        for name, (main, *auxiliary) in COMPOSITIONS.items()
    }
    return {name: text + ":\n{input}" for name, text in (single | composed).items()}


PROMPTS: dict[str, str] = _prompts()
"""The prompt of each task and composition, with "{input}" in place of its text."""

_PLANS = tuple(
    (activity, place, group)
    for group, (activities, places) in enumerate(GROUPS)
    for activity in activities
    for place in places
)
_ACTIVITIES = tuple(activity for activities, _ in GROUPS for activity in activities)
_FACTS = len(NAMES) * (len(NAMES) - 1) * len(_PLANS) * len(TIMES) * len(REASONS)
_OPTIONS = len(ITEMS)
_VARIANTS = len(SHAPES) * _OPTIONS
# Every tenth set of facts is for validation.
_VALIDATION_STEP = 10
_VALIDATION_FACTS = _FACTS // _VALIDATION_STEP

CHAT_COUNT = _FACTS * _VARIANTS
"""Number of distinct chats."""


@dataclass(frozen=True)
class Chat:
    """One chat: its facts, its text, and what the reply answers.

    `reply_to` is the last speaker; `item` is what that speaker asked for, or None if the chat ends
    with the agreement to meet.
    """

    first: str
    second: str
    activity: Phrase
    place: Phrase
    time: Phrase
    reason: Phrase
    reply_to: str
    item: Phrase | None
    text: str

    def summary(self, form: str = "en") -> str:
        """The summary in a form: "en", a code of LANGUAGES, a tone of TONES, or "casual_es"."""
        return self._sentence("summary", form)

    def reply(self, form: str = "en") -> str:
        """The last listener's reply in a form: "en", a code of LANGUAGES, or a tone of TONES."""
        return self._sentence("bring" if self.item else "meet", form)

    def _sentence(self, kind: str, form: str) -> str:
        end = form.rpartition("_")[2]
        language = end if end in LANGUAGES else "en"

        def words(phrase: Phrase) -> str:
            return str(getattr(phrase, language))

        why = words(self.reason)
        return SENTENCES[kind][form].format(
            a=self.first,
            b=self.second,
            to=self.reply_to,
            act=words(self.activity),
            place=words(self.place),
            time=words(self.time),
            item=words(self.item) if self.item else "",
            why=why,
            Why=_capital(why),
            cause=why.replace("because", "'cause", 1),
        )


def chat(index: int) -> Chat:
    """The chat of an index in range(CHAT_COUNT); distinct indexes give distinct texts.

    Raises:
        InputError: The index is outside that range.
    """
    if not 0 <= index < CHAT_COUNT:
        raise InputError(f"chat {index} does not exist; give an index from 0 to {CHAT_COUNT - 1}")
    block, facts = divmod(index, _FACTS)
    # Adding the facts' number makes neighbouring indexes differ in shape too.
    option, shape = divmod((block + facts) % _VARIANTS, len(SHAPES))
    rest, first = divmod(_scatter(facts), len(NAMES))
    rest, other = divmod(rest, len(NAMES) - 1)
    rest, time = divmod(rest, len(TIMES))
    plan, reason = divmod(rest, len(REASONS))
    people = (NAMES[first], NAMES[(first + 1 + other) % len(NAMES)])
    return _write(SHAPES[shape], option, people, plan=plan, time=time, reason=reason)


def answer(one: Chat, task: str) -> Example:
    """The example that a chat gives for a main task or a composition.

    Raises:
        InputError: The task is neither.
    """
    main, form = task, "en"
    if task in COMPOSITIONS:
        main, form = COMPOSITIONS[task][0], task.partition("_")[2]
    elif task not in MAIN_TASKS:
        valid = ", ".join((*MAIN_TASKS, *COMPOSITIONS))
        raise InputError(f"found the task {task!r} for a chat; use one of: {valid}")
    return Example(one.text, one.summary(form) if main == "summarize" else one.reply(form))


def examples(task: str, split: str, count: int, seed: int) -> list[Example]:
    """`count` examples of a single task or composition, determined by split, count and seed.

    All tasks draw the same chats for the same arguments. Training and validation never share an
    input, nor a summary; a reply has fewer facts, so the same reply can be an output in both. The
    translation and tone tasks rewrite a summary, of every second chat the reply, unless that reply
    is an input of the other split.

    Raises:
        InputError: The task or the split is unknown, or the count is negative or too large.
    """
    if task not in PROMPTS:
        raise InputError(f"found the task {task!r}; use one of: {', '.join(PROMPTS)}")
    if split not in SPLITS:
        raise InputError(f"found the split {split!r}; use one of: {', '.join(SPLITS)}")
    available = CHAT_COUNT // _VALIDATION_STEP
    if split == "train":
        available = CHAT_COUNT - available
    if not 0 <= count <= available:
        raise InputError(f"found the count {count}; the {split} split has 0 to {available} chats")
    draws = random.Random(f"{split} {seed}").sample(range(available), count)
    chats = [chat(_index(split, draw)) for draw in draws]
    if task not in AUXILIARY_TASKS:
        return [answer(one, task) for one in chats]
    form = task.partition("_")[2]
    return [
        Example(one.reply(), one.reply(form))
        if number % 2 and _split_of_reply(one.reply()) == split
        else Example(one.summary(), one.summary(form))
        for number, one in enumerate(chats)
    ]


def split_of(index: int) -> str:
    """The split of the chat with this index; it depends only on the chat's facts."""
    return "train" if index % _FACTS % _VALIDATION_STEP else "validation"


def _split_of_reply(reply: str) -> str:
    """The split in which a reply is rewritten: half of all replies each, by their text."""
    return SPLITS[crc32(reply.encode()) % 2]


def _index(split: str, draw: int) -> int:
    """The index of the split's chat number `draw`."""
    if split == "validation":
        block, number = divmod(draw, _VALIDATION_FACTS)
        return block * _FACTS + number * _VALIDATION_STEP
    block, number = divmod(draw, _FACTS - _VALIDATION_FACTS)
    tens, offset = divmod(number, _VALIDATION_STEP - 1)
    return block * _FACTS + tens * _VALIDATION_STEP + 1 + offset


def _scatter(facts: int) -> int:
    """A fixed permutation of range(_FACTS), so that neighbours have different facts.

    A Feistel network permutes 24-bit numbers; following its cycle until a number is in range
    permutes the range.
    """
    while True:
        left, right = divmod(facts, 4096)
        for key in (0x3C5, 0xA17, 0x6D9, 0xF22):
            mixed = (right ^ key) * 0x9E3779B1 % 2**32 >> 20
            left, right = right, left ^ mixed
        facts = left * 4096 + right
        if facts < _FACTS:
            return facts


def _write(
    shape: Shape, option: int, people: tuple[str, str], *, plan: int, time: int, reason: int
) -> Chat:
    """Fill a shape: the option chooses its wording and the rejected proposal."""
    activity, place, group = _PLANS[plan]
    others = [each for each in GROUPS[group][1] if each != place]
    other_activities = [each for each in _ACTIVITIES if each != activity]
    # The chosen time is never the rejected one: they differ by 1, 5, 9 or 13 of 16.
    no_time = TIMES[(time + 1 + option // 2 * 4) % len(TIMES)]
    why = REASONS[reason].en
    lines = []
    for number, turn in enumerate(shape.turns):
        words = turn.format(
            a=people[0],
            b=people[1],
            act=activity.en,
            place=place.en,
            Place=_capital(place.en),
            time=TIMES[time].en,
            say=_say(why),
            no_time=no_time.en,
            no_place=others[option % len(others)].en,
            no_act=other_activities[(plan + option) % len(other_activities)].en,
            item=ITEMS[option].en,
            greeting=GREETINGS[option % len(GREETINGS)],
            closing=CLOSINGS[option // len(GREETINGS)],
        )
        lines.append(f"{people[number % 2]}: {words}")
    return Chat(
        first=people[0],
        second=people[1],
        activity=activity,
        place=place,
        time=TIMES[time],
        reason=REASONS[reason],
        reply_to=people[(len(lines) - 1) % 2],
        item=ITEMS[option] if shape.asks_item else None,
        text="\n".join(lines),
    )


def _say(why: str) -> str:
    """The reason as a complete sentence of the chat."""
    clause = why.removeprefix("because ")
    return f"We should {why.removeprefix('to ')}." if clause == why else _capital(clause) + "."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
