"""The benchmark of "Efficient Compositional Multi-tasking for On-device Large Language Models".

The paper (arXiv 2507.16083) composes two main tasks with seven auxiliary ones, each from a public
data set that is read here from a local copy (docs/paper_benchmark.md says what to fetch):

- `summarize`: DialogSum, a dialogue and its summary;
- `reply`: Synthetic Persona Chat, two consecutive utterances of different speakers;
- `translate_*`: TED Talks, an English sentence and its translation;
- `tone_*`: Sound Natural, a message and its version in another tone.

A composition has the main task's inputs; its target is the main task's target, translated or
rewritten by a model (`caliport.data.rewriting`), as in the paper.
"""

from __future__ import annotations

import html
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from caliport.core.errors import InputError
from caliport.core.progress import console
from caliport.data.examples import Example
from caliport.data.published import Row, find, read_lines, read_rows

Rewrite = Callable[[str, Sequence[str]], list[str]]
"""Rewrites English texts in a form: a code of LANGUAGES or a tone of TONES."""

LANGUAGES = {"es": "Spanish", "fr": "French", "de": "German"}
TONES = ("professional", "casual", "witty", "paraphrase")
MAIN_TASKS = ("summarize", "reply")
AUXILIARY_TASKS = tuple(f"translate_{code}" for code in LANGUAGES) + tuple(
    f"tone_{tone}" for tone in TONES
)
TASKS = MAIN_TASKS + AUXILIARY_TASKS
# An auxiliary task's name ends in the form that it asks for.
COMPOSITIONS: dict[str, tuple[str, str]] = {
    f"{main}_{auxiliary.partition('_')[2]}": (main, auxiliary)
    for main in MAIN_TASKS
    for auxiliary in AUXILIARY_TASKS
}
SPLITS = ("train", "validation", "test")
SIZES: dict[str, tuple[int, int, int]] = {
    "dialogsum": (12_460, 500, 1_500),
    "persona_chat": (225_061, 1_000, 1_000),
    "ted": (196_026, 4_231, 5_571),
    "sound_natural": (2_245, 321, 642),
}
"""Number of examples of each set in the paper's table, in the order of SPLITS."""

# Names of each split's published files.
_STEMS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
# Markers of a missing translation; the second is the first one as tokenized in the release.
_MISSING = ("__NULL__", "_ _ NULL _ _")
_REFERENCES = ("summary", "summary1", "summary2", "summary3")


def _prompts() -> dict[str, str]:
    mains = {
        "summarize": "Summarize the following text",
        "reply": "Suggest a reply for the following text",
    }
    prompts = dict(mains)
    for code, language in LANGUAGES.items():
        prompts[f"translate_{code}"] = f"Translate the following text from English to {language}"
        added = f"translate it from English to {language}"
        # Only the first prompt ends with a full stop, as in the paper.
        prompts[f"summarize_{code}"] = f"{mains['summarize']} and {added}."
        prompts[f"reply_{code}"] = f"{mains['reply']} and {added}"
    for tone in TONES:
        prompts[f"tone_{tone}"] = f"Change the tone of the following text to {tone}"
        for main, text in mains.items():
            prompts[f"{main}_{tone}"] = f"{text} and change its tone to {tone}"
    return {name: prompts[name] + "\n{input}" for name in (*TASKS, *COMPOSITIONS)}


PROMPTS: dict[str, str] = _prompts()
"""The prompt of each task and composition, with "{input}" in place of its text.

The instructions of the compositions are the paper's; it does not print those of the single tasks,
nor what separates an instruction from its text.
"""


def set_of(task: str) -> str:
    """The key in SIZES of the set that a task or composition reads.

    Raises:
        InputError: The task is unknown.
    """
    if task not in PROMPTS:
        raise InputError(f"found the task {task!r}; use one of: {', '.join(PROMPTS)}")
    main = COMPOSITIONS.get(task, (task,))[0]
    kinds = {"summarize": "dialogsum", "reply": "persona_chat", "translate": "ted"}
    return kinds.get(main.partition("_")[0], "sound_natural")


def examples(
    directory: str | Path,
    task: str,
    split: str,
    count: int | None,
    seed: int,
    rewrite: Rewrite | None = None,
) -> list[Example]:
    """`count` examples of a task or composition in an order that the seed determines.

    With the same arguments, a main task and its compositions have the same inputs in the same
    order, except that an input is left out if the model that makes its target wrote nothing.

    Args:
        directory: The local copy of the set that `set_of` names.
        task: One of TASKS or COMPOSITIONS.
        split: One of SPLITS.
        count: None for as many as in the paper, or all if there are fewer.
        seed: Random seed of the order.
        rewrite: Makes the targets of compositions, and of tone tasks if the files have none.

    Raises:
        InputError: The task or the split is unknown, the count is negative or more than there
            are, a file is missing, damaged, too large or of another form, or a target must be
            made and `rewrite` is None. The message is one line that names the file.
    """
    kind = set_of(task)
    if split not in SPLITS:
        raise InputError(f"found the split {split!r}; use one of: {', '.join(SPLITS)}")
    if count is not None and count < 0:
        raise InputError(f"found the count {count}; use 0 or more, or None for the paper's")
    root = Path(directory)
    if not root.is_dir():
        raise InputError(f"{root}: not a directory; give the one that holds {kind}'s files")
    main, auxiliary = COMPOSITIONS.get(task, (task, None))
    form = (auxiliary or task).partition("_")[2]
    pairs = _READERS[kind](root, split, form)
    if not pairs:
        raise InputError(f"{root}: found no {split} example of {main}; give the complete set")
    random.Random(f"{split} {seed}").shuffle(pairs)
    wanted = min(SIZES[kind][SPLITS.index(split)], len(pairs)) if count is None else count
    if wanted > len(pairs):
        raise InputError(
            f"{root}: found {len(pairs)} {split} examples of {main}, not {wanted}; "
            f"use a count from 0 to {len(pairs)}, or None for the paper's"
        )
    pairs = pairs[:wanted]
    if auxiliary is None and all(output is not None for _, output in pairs):
        return [Example(text, output) for text, output in pairs if output is not None]
    # A composition rewrites the main task's target, a tone task without targets its input.
    sources = [output or text if auxiliary else text for text, output in pairs]
    return _rewritten([text for text, _ in pairs], sources, task, form, rewrite)


def _rewritten(
    inputs: list[str], sources: list[str], task: str, form: str, rewrite: Rewrite | None
) -> list[Example]:
    """The inputs with their rewritten sources as targets, without those the model left empty."""
    if rewrite is None:
        raise InputError(
            f"{task}: a model must make its targets, but none is given; "
            f"name one in data.paper.{'translation' if form in LANGUAGES else 'tone'}"
        )
    targets = [target.strip() for target in rewrite(form, sources)]
    found = [Example(t, target) for t, target in zip(inputs, targets, strict=True) if target]
    if not found:
        raise InputError(
            f"{task}: the model for {form} wrote nothing for all of its {len(inputs)} texts; "
            "name one that answers"
        )
    if len(found) < len(inputs):
        empty = len(inputs) - len(found)
        console.print(
            f"{task}: {empty} of {len(inputs)} left out, the model wrote nothing for them"
        )
    return found


def _dialogsum(root: Path, split: str, form: str) -> list[tuple[str, str | None]]:
    """Dialogue and summary; a test dialogue has three summaries, each an example."""
    stems = [name for stem in _STEMS[split] for name in (f"dialogsum.{stem}", stem)]
    path = find(root, stems, (".jsonl", ".csv"))
    pairs: list[tuple[str, str | None]] = []
    for row in read_rows(path):
        summaries = [name for name in _REFERENCES if name in row.fields]
        if not summaries:
            raise InputError(f"{row.where}: found no field summary; expected DialogSum's fields")
        pairs += [(row.text("dialogue"), row.text(name)) for name in summaries]
    return pairs


def _persona_chat(root: Path, split: str, form: str) -> list[tuple[str, str | None]]:
    """An utterance and the other speaker's answer."""
    stems = [
        name
        for stem in _STEMS[split]
        for name in (f"Synthetic-Persona-Chat_{stem}", f"data/Synthetic-Persona-Chat_{stem}")
    ]
    path = find(root, stems, (".csv",))
    pairs: list[tuple[str, str | None]] = []
    for row in read_rows(path):
        # Some conversations are empty, and some lines have no speaker.
        if not row.fields.get("Best Generated Conversation", "missing"):
            continue
        before: tuple[str, str] | None = None
        lines = row.text("Best Generated Conversation").split("\n")
        for line in filter(None, map(str.strip, lines)):
            speaker, colon, text = line.partition(":")
            now = (speaker, text.strip())
            if not colon or speaker not in ("User 1", "User 2") or not now[1]:
                before = None
                continue
            if before is not None and before[0] != speaker:
                pairs.append((before[1], now[1]))
            before = now
    return pairs


def _ted(root: Path, split: str, code: str) -> list[tuple[str, str | None]]:
    """English and its translation, from the multilingual table or from aligned files."""
    names = _STEMS[split]
    tables = [root / f"all_talks_{name}.tsv" for name in names]
    table = next((path for path in tables if path.is_file()), None)
    if table is not None:
        return _ted_table(table, code)
    folders = (root / f"en-{code}", root)
    aligned = [(folder / f"{n}.en", folder / f"{n}.{code}") for folder in folders for n in names]
    for english, other in aligned:
        if english.is_file() and other.is_file():
            return _ted_aligned(english, other)
    raise InputError(
        f"{root}: found no {split} sentences in {LANGUAGES[code]}; expected {tables[-1].name} or "
        f"the aligned {names[-1]}.en and {names[-1]}.{code}, these also in en-{code}"
    )


def _ted_table(path: Path, code: str) -> list[tuple[str, str | None]]:
    """Two columns of the table, with its tokenization and HTML escapes undone."""
    lines = read_lines(path)
    head = next(lines, "").rstrip("\r\n").split("\t")
    for name in ("en", code):
        if name not in head:
            raise InputError(f"{path}, line 1: found no column {name}; expected TED's languages")
    english, other = head.index("en"), head.index(code)
    pairs: list[tuple[str, str | None]] = []
    for number, line in enumerate(lines, start=2):
        cells = line.rstrip("\r\n").split("\t")
        if cells == [""]:
            continue
        if len(cells) != len(head):
            raise InputError(
                f"{path}, line {number}: found {len(cells)} columns, the first line has {len(head)}"
            )
        texts = [html.unescape(cells[column]).strip() for column in (english, other)]
        if all(texts) and not any(mark in text for text in texts for mark in _MISSING):
            pairs.append((texts[0], texts[1]))
    return pairs


def _ted_aligned(english: Path, other: Path) -> list[tuple[str, str | None]]:
    """Pairs of lines; pairs with a blank side, which such corpora contain, are left out."""
    sides = [[line.strip() for line in read_lines(path)] for path in (english, other)]
    if len(sides[0]) != len(sides[1]):
        raise InputError(
            f"{other}: found {len(sides[1])} lines, but {english.name} has {len(sides[0])}; "
            "use files of one release, which are aligned line by line"
        )
    return [(one, two) for one, two in zip(*sides, strict=True) if one and two]


def _sound_natural(root: Path, split: str, tone: str) -> list[tuple[str, str | None]]:
    """A message, and its target if the file has a column for the tone."""
    path = find(root, _STEMS[split], (".tsv", ".csv", ".json", ".jsonl"))
    return [
        (_message(row), row.text(tone) if tone in row.fields else None) for row in read_rows(path)
    ]


def _message(row: Row) -> str:
    """The message with a capital first letter."""
    text = row.text("original" if "original" in row.fields else "Rephrased Content")
    return text[:1].upper() + text[1:]


_READERS: dict[str, Callable[[Path, str, str], list[tuple[str, str | None]]]] = {
    "dialogsum": _dialogsum,
    "persona_chat": _persona_chat,
    "ted": _ted,
    "sound_natural": _sound_natural,
}
