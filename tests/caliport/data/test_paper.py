"""The paper's benchmark: DialogSum's own files, and small ones of the other sets' forms."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from caliport.core.errors import InputError
from caliport.data import paper, published
from caliport.data.examples import Example
from caliport.data.paper import COMPOSITIONS, PROMPTS, SIZES, TASKS, examples, set_of

ROOT = Path(__file__).parents[3]
REAL = Path(os.environ.get("CALIPORT_DIALOGSUM", ROOT.parent / "shared" / "data" / "dialogsum"))


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as stream:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            table = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """All four sets, small, as they are published."""
    for part, split in (("train", "train"), ("dev", "validation"), ("test", "test")):
        dialogues: list[dict[str, str]] = []
        for n in range(6):
            row = {"fname": f"{part}_{n}", "dialogue": f"#Person1#: {split} {n}\n#Person2#: ok"}
            names = ["summary1", "summary2", "summary3"] if part == "test" else ["summary"]
            dialogues.append(row | {name: f"{name} of {split} {n}." for name in names})
        write_rows(tmp_path / "dialogsum" / f"dialogsum.{part}.jsonl", dialogues)
        name = {"dev": "valid"}.get(part, part)
        write_rows(
            tmp_path / "persona_chat" / f"Synthetic-Persona-Chat_{name}.csv",
            [
                {
                    "user 1 personas": "I ski.\nI cook.",
                    "user 2 personas": 'I say "hi".',
                    "Best Generated Conversation": f"User 1: Hi {split} {n}!\n\n"
                    'User 2: "Hello": yes?\nUser 1: Fine, thanks.\n(a pause)\nUser 2: Bye.',
                }
                for n in range(4)
            ],
        )
        table = [
            {
                "talk_name": f"{part}_{n}",
                "de": f"Es {n} .",
                "en": f"It &apos;s {n} .",
                "es": "Es .",
                "fr": "",
            }
            for n in range(5)
        ]
        table[1]["de"], table[2]["de"] = "__NULL__", "_ _ NULL _ _"
        ted = tmp_path / "ted" / f"all_talks_{part}.tsv"
        ted.parent.mkdir(exist_ok=True)
        lines = [list(table[0]), *(list(row.values()) for row in table)]
        ted.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
        name = {"dev": "val"}.get(part, part)
        write_rows(
            tmp_path / "sound_natural" / f"{name}.tsv",
            [
                {"Query": f"tell Ann {n}", "Rephrased Content": f'are you "there" {n}?'}
                for n in range(3)
            ],
        )
    return tmp_path


def marked(form: str, texts: Sequence[str]) -> list[str]:
    return [f"{form}: {text}" for text in texts]


def folder(root: Path, task: str) -> Path:
    return root / set_of(task)


def test_tasks_and_compositions() -> None:
    assert len(TASKS) == 9
    assert len(COMPOSITIONS) == 14
    assert set(PROMPTS) == {*TASKS, *COMPOSITIONS}
    assert COMPOSITIONS["reply_paraphrase"] == ("reply", "tone_paraphrase")
    assert COMPOSITIONS["summarize_es"] == ("summarize", "translate_es")
    assert {set_of(task) for task in PROMPTS} == set(SIZES)
    assert set_of("reply_es") == "persona_chat"


def test_the_papers_prompts() -> None:
    assert PROMPTS["summarize_fr"] == (
        "Summarize the following text and translate it from English to French.\n{input}"
    )
    assert PROMPTS["summarize_witty"] == (
        "Summarize the following text and change its tone to witty\n{input}"
    )
    assert PROMPTS["reply_de"] == (
        "Suggest a reply for the following text and translate it from English to German\n{input}"
    )
    assert PROMPTS["reply_paraphrase"] == (
        "Suggest a reply for the following text and change its tone to paraphrase\n{input}"
    )


@pytest.fixture
def dialogsum(root: Path) -> tuple[Path, dict[str, int]]:
    """DialogSum itself with the paper's sizes where it is there, else the small one."""
    if REAL.is_dir():
        return REAL, {"validation": 500, "test": 1500}
    return root / "dialogsum", {"validation": 6, "test": 18}


def test_dialogsum(dialogsum: tuple[Path, dict[str, int]]) -> None:
    directory, sizes = dialogsum
    found = {name: examples(directory, "summarize", name, None, 0) for name in sizes}
    assert {name: len(one) for name, one in found.items()} == sizes
    inputs = [{one.input for one in examples} for examples in found.values()]
    assert not inputs[0] & inputs[1]
    assert len(inputs[1]) * 3 == sizes["test"]
    for one in (*found["validation"], *found["test"]):
        assert one.input.startswith("#Person1#: ")
        assert "\n#Person2#: " in one.input
        assert one.output == one.output.strip() != ""


def test_the_first_test_dialogue(dialogsum: tuple[Path, dict[str, int]]) -> None:
    directory, _ = dialogsum
    row = json.loads((directory / "dialogsum.test.jsonl").read_text("utf-8").split("\n", 1)[0])
    found = examples(directory, "summarize", "test", None, 0)
    outputs = {one.output for one in found if one.input == row["dialogue"].strip()}
    assert outputs == {row[f"summary{number}"].strip() for number in (1, 2, 3)}


def test_a_composition_rewrites_the_main_tasks_target(
    dialogsum: tuple[Path, dict[str, int]],
) -> None:
    directory, _ = dialogsum
    single = examples(directory, "summarize", "test", 5, 3)
    for form in ("es", "witty"):
        composed = examples(directory, f"summarize_{form}", "test", 5, 3, marked)
        assert composed == [Example(one.input, f"{form}: {one.output}") for one in single]


def test_replies_are_consecutive_utterances(root: Path) -> None:
    found = examples(folder(root, "reply"), "reply", "validation", None, 0)
    assert len(found) == 8
    assert Example("Hi validation 2!", '"Hello": yes?') in found
    assert found.count(Example('"Hello": yes?', "Fine, thanks.")) == 4
    composed = examples(folder(root, "reply"), "reply_fr", "validation", None, 0, marked)
    assert composed == [Example(one.input, f"fr: {one.output}") for one in found]


def test_ted_as_one_table(root: Path) -> None:
    found = examples(folder(root, "translate_de"), "translate_de", "test", None, 0)
    assert sorted(found, key=str) == [Example(f"It 's {n} .", f"Es {n} .") for n in (0, 3, 4)]
    assert len(examples(root / "ted", "translate_es", "validation", None, 0)) == 5
    with pytest.raises(InputError, match="found no train example of translate_fr; give the compl"):
        examples(root / "ted", "translate_fr", "train", None, 0)


@pytest.mark.parametrize("place", [".", "en-fr"])
def test_ted_as_aligned_files(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "train.en").write_text("One.\u2028x\n \nThree.\n", encoding="utf-8")
    (tmp_path / place / "train.fr").write_text("Un.\nDeux.\nTrois.\n", encoding="utf-8")
    found = examples(tmp_path, "translate_fr", "train", None, 0)
    assert sorted(found, key=str) == [Example("One.\u2028x", "Un."), Example("Three.", "Trois.")]
    with pytest.raises(InputError, match="found no train sentences in German; expected all_talks_"):
        examples(tmp_path, "translate_de", "train", None, 0)
    (tmp_path / place / "train.fr").write_text("Un.\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"train.fr: found 1 lines, but train.en has 3; use files"):
        examples(tmp_path, "translate_fr", "train", None, 0)


def test_tones_are_written_by_the_model(root: Path) -> None:
    directory = folder(root, "tone_casual")
    found = examples(directory, "tone_casual", "validation", None, 0, marked)
    assert sorted(found, key=str) == [
        Example(f'Are you "there" {n}?', f'casual: Are you "there" {n}?') for n in range(3)
    ]
    with pytest.raises(InputError, match="tone_casual: a model must make its targets, but none"):
        examples(directory, "tone_casual", "validation", None, 0)


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "tsv"])
def test_tones_that_the_file_has(tmp_path: Path, suffix: str) -> None:
    rows = [{"original": f"we, {n}", "casual": f"us {n}", "witty": f"ha {n}"} for n in range(3)]
    write_rows(tmp_path / f"train.{suffix}", rows)
    found = examples(tmp_path, "tone_witty", "train", 2, 0)
    assert len(found) == 2
    assert all(one.output.split()[1] == one.input.split()[1] for one in found)
    assert found[0].input.startswith("We, ")
    with pytest.raises(InputError, match=r"name one in data\.paper\.tone"):
        examples(tmp_path, "tone_professional", "train", None, 0)


def test_sizes_and_seeds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = folder(root, "summarize")
    everything = examples(directory, "summarize", "test", None, 0)
    assert examples(directory, "summarize", "test", 4, 0) == everything[:4]
    orders = {str(examples(directory, "summarize", "test", None, seed)) for seed in range(5)}
    assert len(orders) == 5
    monkeypatch.setitem(paper.SIZES, "dialogsum", (1, 2, 3))
    assert examples(directory, "summarize", "test", None, 0) == everything[:3]
    assert len(examples(directory, "summarize", "validation", None, 0)) == 2


def test_what_the_model_leaves_empty_is_left_out(root: Path) -> None:
    def silent(form: str, texts: Sequence[str]) -> list[str]:
        return [" " if "1" in text else f" {text} " for text in texts]

    found = examples(folder(root, "summarize"), "summarize_es", "train", 6, 0, silent)
    assert len(found) == 5
    assert all("1" not in one.output and one.output == one.output.strip() for one in found)


def test_a_model_that_writes_nothing_is_an_error(root: Path) -> None:
    def mute(form: str, texts: Sequence[str]) -> list[str]:
        return [""] * len(texts)

    check(
        lambda: examples(folder(root, "reply"), "reply_fr", "train", 2, 0, mute),
        "reply_fr: the model for fr wrote nothing for all of its 2 texts; name one that answers",
    )


def check(action: Callable[[], object], expected: str) -> None:
    with pytest.raises(InputError, match=re.escape(expected)) as caught:
        action()
    assert "\n" not in str(caught.value)


def test_wrong_arguments(root: Path) -> None:
    directory = root / "dialogsum"
    check(lambda: examples(directory, "sing", "test", None, 0), "found the task 'sing'; use one of")
    check(lambda: examples(directory, "reply_es_fr", "test", 1, 0), "found the task 'reply_es_fr'")
    check(lambda: examples(directory, "summarize", "dev", None, 0), "found the split 'dev'; use")
    check(lambda: examples(directory, "summarize", "test", -1, 0), "found the count -1; use 0 or")
    check(
        lambda: examples(directory, "summarize", "test", 19, 0),
        "found 18 test examples of summarize, not 19; use a count from 0 to 18",
    )
    check(
        lambda: examples(root / "none", "reply", "test", 1, 0),
        "none: not a directory; give the one that holds persona_chat's files",
    )
    check(
        lambda: examples(directory, "reply", "test", 1, 0),
        "found none of the files Synthetic-Persona-Chat_test.csv, data/Synthetic-Persona-Chat",
    )


@pytest.mark.parametrize(
    ("name", "task", "content", "expected"),
    [
        ("dialogsum/dialogsum.test.jsonl", "summarize", b"{}\n", "line 1: found no field summary"),
        (
            "dialogsum/dialogsum.test.jsonl",
            "summarize",
            b'\n{"summary": "a", "dialogue": 1}\n',
            'line 2: found no text in field "dialogue"; the fields are: summary, dialogue',
        ),
        ("dialogsum/dialogsum.test.jsonl", "summarize", b"[1]\n", "line 1: found no JSON object"),
        (
            "dialogsum/dialogsum.test.jsonl",
            "summarize",
            b"{\n",
            "line 1: found text that is not JS",
        ),
        (
            "dialogsum/dialogsum.test.jsonl",
            "summarize",
            b"\xff\n",
            "line 1: found text that is not U",
        ),
        ("dialogsum/dialogsum.test.jsonl", "summarize", b"", "found no test example of summarize"),
        (
            "dialogsum/dialogsum.test.jsonl",
            "summarize",
            b"x" * 99,
            "line 1: found more than 64 byte",
        ),
        (
            "persona_chat/Synthetic-Persona-Chat_test.csv",
            "reply",
            b"a,b\n1,2\n",
            'line 2: found no field "Best Generated Conversation"; the fields are: a, b',
        ),
        (
            "persona_chat/Synthetic-Persona-Chat_test.csv",
            "reply",
            b'a,b\n1,"2\n3,4\n',
            "line 3: found no valid CSV (unexpected end of data)",
        ),
        (
            "persona_chat/Synthetic-Persona-Chat_test.csv",
            "reply",
            b"a,b\n1\n",
            "line 2: found 1 col",
        ),
        ("ted/all_talks_test.tsv", "translate_es", b"en\tfr\n", "line 1: found no column es"),
        (
            "ted/all_talks_test.tsv",
            "translate_es",
            b"en\tes\na\n",
            "line 2: found 1 columns, the f",
        ),
        ("sound_natural/test.tsv", "tone_witty", b"a\tb\n1\t2\n", 'found no field "Rephrased Cont'),
        (
            "sound_natural/test.tsv",
            "tone_witty",
            b'a\tb\n1\t"2\n3\t4\n',
            "line 2: found a line break",
        ),
    ],
)
def test_damaged_files(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    task: str,
    content: bytes,
    expected: str,
) -> None:
    monkeypatch.setattr(published, "LARGEST_LINE", 64)
    (root / name).write_bytes(content)
    check(lambda: examples(folder(root, task), task, "test", None, 0, marked), expected)


def test_too_large_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "LARGEST_FILE", 100)
    check(
        lambda: examples(folder(root, "summarize"), "summarize", "test", None, 0),
        "bytes, at most 100 are read",
    )
    monkeypatch.setattr(published, "LARGEST_JSON", 10)
    write_rows(root / "sound_natural" / "train.json", [{"original": "a", "witty": "b"}])
    (root / "sound_natural" / "train.tsv").unlink()
    check(
        lambda: examples(root / "sound_natural", "tone_witty", "train", None, 0),
        "use JSON Lines above 10",
    )
