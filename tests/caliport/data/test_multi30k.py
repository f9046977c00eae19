"""The Multi30k loader, on small directories of the same form."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from caliport.core.errors import InputError
from caliport.data.examples import Example
from caliport.data.multi30k import COMPOSITIONS, PROMPTS, TASKS, examples

SENTENCES = ["A dog runs.", "Two men sit.", "A girl sings.", "A boat floats."]


def pack(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in lines).encode("utf-8")
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Four images per split; the held-out caption is in another column for each."""
    for part in ("train", "val"):
        first, second = tmp_path / "task1", tmp_path / "task2"
        images = [f"{part}{number}.jpg" for number in range(4)]
        pack(first / "image_splits" / f"{part}.txt", images)
        pack(second / "image_splits" / f"{part}_images.txt", images)
        english = [f"{part.title()}: {sentence}" for sentence in SENTENCES]
        pack(first / "raw" / f"{part}.en.gz", english)
        for code in ("de", "fr", "cs"):
            pack(first / "raw" / f"{part}.{code}.gz", [f"{code} – {line} " for line in english])
        for column in range(5):
            pack(
                second / "raw" / f"{part}.{column + 1}.en.gz",
                [
                    english[row] if column == row else f"{part} caption {column} of {row}"
                    for row in range(4)
                ],
            )
    return tmp_path


def rewrite(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    pack(path, change(gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()))


def test_tasks_and_prompts() -> None:
    assert TASKS == ("describe", "translate_de", "translate_fr", "translate_cs")
    assert COMPOSITIONS["describe_cs"] == ("describe", "translate_cs")
    assert set(PROMPTS) == {*TASKS, *COMPOSITIONS}
    assert PROMPTS["describe_de"] == (
        "Describe the picture in one sentence from these captions "
        "and translate it from English to German:\n{input}"
    )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_describe_holds_out_the_translated_sentence(directory: Path, split: str) -> None:
    found = examples(directory, "describe", split, None, seed=0)
    part = "train" if split == "train" else "val"
    assert {one.output for one in found} == {f"{part.title()}: {text}" for text in SENTENCES}
    for one in found:
        row = [f"{part.title()}: {text}" for text in SENTENCES].index(one.output)
        captions = {f"{part} caption {column} of {row}" for column in range(5) if column != row}
        assert set(one.input.split("\n")) == captions


def test_captions_are_shuffled(directory: Path) -> None:
    orders = {
        tuple(one.input.split("\n"))
        for seed in range(10)
        for one in examples(directory, "describe", "train", None, seed)
    }
    assert len(orders) > 8


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_is_the_translation_of_the_description(directory: Path, name: str) -> None:
    main, auxiliary = COMPOSITIONS[name]
    composed = examples(directory, name, "train", None, seed=4)
    singles = examples(directory, main, "train", None, seed=4)
    translated = examples(directory, auxiliary, "train", None, seed=4)
    for whole, first, second in zip(composed, singles, translated, strict=True):
        assert whole.input == first.input
        assert second == Example(first.output, whole.output)
        assert whole.output == f"{name[-2:]} – {first.output}"


def test_count_and_seed(directory: Path) -> None:
    everything = examples(directory, "translate_fr", "train", None, seed=0)
    assert len(everything) == 4
    assert examples(directory, "translate_fr", "train", 2, seed=0) == everything[:2]
    orders = {
        tuple(one.input for one in examples(directory, "translate_fr", "train", None, seed))
        for seed in range(10)
    }
    assert len(orders) > 3
    with pytest.raises(InputError, match="found 4 train examples of translate_fr, not 5; use a"):
        examples(directory, "translate_fr", "train", 5, seed=0)
    with pytest.raises(InputError, match="found the count -1; use 0 or more, or None for all"):
        examples(directory, "translate_fr", "train", -1, seed=0)


def test_the_match_ignores_case_punctuation_and_spaces(directory: Path) -> None:
    path = directory / "task2" / "raw" / "train.1.en.gz"
    rewrite(path, lambda lines: ["train : a DOG runs .", *lines[1:]])
    found = examples(directory, "describe", "train", None, seed=0)
    assert len(found) == 4
    assert all("DOG" not in one.input for one in found)


@pytest.mark.parametrize("caption", ["Something else.", "Train: Two men sit."])
def test_images_without_exactly_one_match_are_left_out(directory: Path, caption: str) -> None:
    """The first caption replaces image 1's only match, the second doubles it."""
    column = 2 if caption == "Something else." else 1
    rewrite(
        directory / "task2" / "raw" / f"train.{column}.en.gz",
        lambda lines: [lines[0], caption, *lines[2:]],
    )
    for task in ("describe", "describe_de"):
        found = examples(directory, task, "train", None, seed=0)
        assert len(found) == 3
        assert not any("Two men" in one.output for one in found)
    assert len(examples(directory, "translate_de", "train", None, seed=0)) == 4


def check_error(directory: Path, task: str, expected: str) -> None:
    with pytest.raises(InputError, match=re.escape(expected)) as caught:
        examples(directory, task, "train", None, seed=0)
    assert "\n" not in str(caught.value)


def test_wrong_names_and_directories(directory: Path) -> None:
    check_error(directory, "sing", "found the task 'sing'; use one of: describe, translate_de")
    check_error(directory / "none", "describe", "none: not a directory; give the one that holds")
    with pytest.raises(InputError, match="found the split 'val'; use one of: train, validation"):
        examples(directory, "describe", "val", None, seed=0)


def test_missing_file(directory: Path) -> None:
    path = directory / "task1" / "raw" / "train.cs.gz"
    path.unlink()
    check_error(directory, "describe_cs", f"{path}: cannot be read (No such file or directory)")
    assert len(examples(directory, "describe_de", "train", None, seed=0)) == 4


@pytest.mark.parametrize("damage", ["not gzip", "truncated", "garbled", "empty"])
def test_damaged_gzip(directory: Path, damage: str) -> None:
    path = directory / "task1" / "raw" / "train.de.gz"
    data = path.read_bytes()
    path.write_bytes(
        {
            "not gzip": b"plain text\n",
            "truncated": data[:-12],
            "garbled": data[:10] + b"\xff" * 20 + data[30:],
            "empty": b"",
        }[damage]
    )
    check_error(directory, "translate_de", f"{path}")


def test_misaligned_blank_and_undecodable_lines(directory: Path) -> None:
    path = directory / "task1" / "raw" / "train.de.gz"
    rewrite(path, lambda lines: lines[:3])
    check_error(
        directory, "translate_de", f"{path}: found 3 lines, but part 1's English file has 4"
    )
    rewrite(path, lambda lines: [lines[0], "", *lines[1:]])
    check_error(directory, "translate_de", f"{path}, line 2: found a blank line")
    path.write_bytes(gzip.compress(b"eins\nzwei\xff\n"))
    check_error(directory, "translate_de", f"{path}, line 2: found text that is not UTF-8")


def test_image_lists_must_agree(directory: Path) -> None:
    path = directory / "task2" / "image_splits" / "train_images.txt"
    pack(path, ["train0.jpg", "train2.jpg", "train1.jpg", "train3.jpg"])
    check_error(directory, "describe", f"{path}, line 2: found image 'train2.jpg', but ")
    pack(path, ["train0.jpg"])
    check_error(directory, "describe_fr", f"{path}: found 1 lines, but part 1's English file has 4")
