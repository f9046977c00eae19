"""Examples from a Multi30k directory: captions of images and their translations.

Multi30k (Elliott et al. 2016, "Multi30K: Multilingual English-German Image Descriptions", with
French and Czech added by the WMT multimodal shared tasks) has two parts that describe the same
images in the same order. Part 1 gives one English sentence per image with its translations, part 2
five English captions per image. Part 1's sentence is one of part 2's five captions: in the released
training and validation files it is so, character for character, for every image.

The tasks follow from that: `describe` gives the other four captions and asks for part 1's sentence,
`translate_*` gives that sentence and asks for its translation, and the composition `describe_*`
gives the four captions and asks for the translation. So the answer of a composition is exactly the
translation of the answer of `describe`.
"""

from __future__ import annotations

import gzip
import random
import unicodedata
import zlib
from pathlib import Path

from caliport.core.errors import InputError
from caliport.data.examples import Example

LANGUAGES = {"de": "German", "fr": "French", "cs": "Czech"}
TASKS = ("describe", *(f"translate_{code}" for code in LANGUAGES))
COMPOSITIONS: dict[str, tuple[str, str]] = {
    f"describe_{code}": ("describe", f"translate_{code}") for code in LANGUAGES
}
SPLITS = {"train": "train", "validation": "val"}
CAPTIONS = 5

_DESCRIBE = "Describe the picture in one sentence from these captions"
PROMPTS: dict[str, str] = {
    "describe": f"{_DESCRIBE}:\n{{input}}",
    **{
        f"translate_{code}": f"Translate the following text from English to {name}:\n{{input}}"
        for code, name in LANGUAGES.items()
    },
    **{
        f"describe_{code}": f"{_DESCRIBE} and translate it from English to {name}:\n{{input}}"
        for code, name in LANGUAGES.items()
    },
}
"""The prompt of each task and composition, with "{input}" in place of its text."""


def examples(
    directory: str | Path, task: str, split: str, count: int | None, seed: int
) -> list[Example]:
    """`count` examples (None: all) of a task or composition in an order that the seed determines.

    With the same split and seed, the examples of two tasks come from the same images in the same
    order, as long as both tasks can use them. `describe` and its compositions skip an image whose
    English sentence is none of its five captions, since no caption could be held out for it, and
    one where a second caption equals the sentence, since the input would contain the answer (15 of
    the 29,000 training images). Captions are compared by their letters and digits only.

    Raises:
        InputError: The task or the split is unknown, the count is negative or more than there are,
            or a file of the directory is missing, damaged, not UTF-8 or not aligned with the
            others. The message is one line that names the file.
    """
    if task not in PROMPTS:
        raise InputError(f"found the task {task!r}; use one of: {', '.join(PROMPTS)}")
    if split not in SPLITS:
        raise InputError(f"found the split {split!r}; use one of: {', '.join(SPLITS)}")
    if count is not None and count < 0:
        raise InputError(f"found the count {count}; use 0 or more, or None for all")
    root = Path(directory)
    if not root.is_dir():
        raise InputError(f"{root}: not a directory; give the one that holds task1 and task2")
    part = SPLITS[split]
    raw = root / "task1" / "raw"
    english = _read_lines(raw / f"{part}.en.gz")
    answers = english
    if task != "describe":
        answers = _read_aligned(raw / f"{part}.{task.rpartition('_')[2]}.gz", len(english))
    captions = None
    if task not in TASKS or task == "describe":
        captions = _read_captions(root, part, len(english))

    order = list(range(len(english)))
    random.Random(f"{split} {seed}").shuffle(order)
    found: list[Example] = []
    for image in order:
        if count is not None and len(found) >= count:
            break
        text: str | None = english[image]
        if captions is not None:
            others = _others(english[image], captions[image], random.Random(f"{seed} {image}"))
            text = "\n".join(others) if others else None
        if text is not None:
            found.append(Example(text, answers[image]))
    if count is not None and len(found) != count:
        raise InputError(
            f"{root}: found {len(found)} {split} examples of {task}, not {count}; "
            f"use a count from 0 to {len(found)}, or None for all"
        )
    return found


def _others(sentence: str, captions: tuple[str, ...], rng: random.Random) -> list[str]:
    """The four captions other than the sentence, shuffled; none unless exactly one equals it."""
    key = _letters(sentence)
    others = [caption for caption in captions if _letters(caption) != key]
    if len(others) != CAPTIONS - 1:
        return []
    rng.shuffle(others)
    return others


def _letters(text: str) -> str:
    """The text's letters and digits, so that differently tokenized releases still match."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if character.isalnum())


def _read_captions(root: Path, part: str, images: int) -> list[tuple[str, ...]]:
    """The five English captions of each image of part 2, whose images must be those of part 1."""
    first = root / "task1" / "image_splits" / f"{part}.txt"
    second = root / "task2" / "image_splits" / f"{part}_images.txt"
    pairs = zip(_read_aligned(first, images), _read_aligned(second, images), strict=True)
    for number, (one, other) in enumerate(pairs, start=1):
        if one != other:
            raise InputError(
                f"{second}, line {number}: found image {other!r}, but {first} has {one!r} there; "
                "use files of one release, which list the same images in the same order"
            )
    raw = root / "task2" / "raw"
    columns = [
        _read_aligned(raw / f"{part}.{number}.en.gz", images) for number in range(1, CAPTIONS + 1)
    ]
    return list(zip(*columns, strict=True))


def _read_aligned(path: Path, expected: int) -> list[str]:
    """The lines of a file that must have as many as part 1's English file."""
    lines = _read_lines(path)
    if len(lines) != expected:
        raise InputError(
            f"{path}: found {len(lines)} lines, but part 1's English file has {expected}; "
            "use files of one release, which are aligned line by line"
        )
    return lines


def _read_lines(path: Path) -> list[str]:
    """The stripped lines of a text file, decompressed if its name ends in .gz."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        text = data.decode("utf-8")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: found a damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a complete Multi30k directory"
        ) from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: found text that is not UTF-8; fetch it again"
        ) from None
    # Only the newline ends a line: str.splitlines would also cut at other separators.
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if "" in lines:
        raise InputError(
            f"{path}, line {lines.index('') + 1}: found a blank line; every line needs a text"
        )
    return lines
