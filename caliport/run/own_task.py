"""Score adapters on their own tasks, with and without them: does a merge have anything to merge?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError
from caliport.core.progress import progress
from caliport.core.prompts import PLAIN, put_in, recorded_prompt
from caliport.data.examples import Example, read_jsonl
from caliport.recipe.schema import Evaluation, prompts_of
from caliport.run.resolve import examples_of
from caliport.run.workspace import Workspace
from caliport.stages.stage import stage

if TYPE_CHECKING:
    from caliport.validation.evaluation.quality import Score
    from caliport.validation.records.own_task import OwnTask

_MOST = 64  # examples of a task
_FILE = "own.json"


def own_task_of(space: Workspace, task: str) -> OwnTask:
    """What a run's adapter does for its own task, on the first held-out examples."""
    from caliport.validation.records.own_task import OwnTask
    from caliport.validation.records.record import read_record

    how, prompt = space.recipe.evaluation, prompts_of(space.recipe)[task]
    adapter, out = space.adapter(task), space.kept("own", task)
    most = min(how.examples or _MOST, _MOST)

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        examples = examples_of(space, task, "validation", most)
        found = own_task(space.base, adapter, prompt, examples, how)
        (partial / _FILE).write_text(found.model_dump_json(), encoding="utf-8")

    inputs: dict[str, Path | str] = {"base": space.base, "adapter": adapter}
    inputs["examples"] = space.data / f"{task}.validation.jsonl"
    key = {
        "prompt": prompt,
        "examples": most,
        "metric": how.metric,
        "max_new_tokens": how.max_new_tokens,
        "batch_size": how.batch_size,
    }
    stage(out, "own-task", f"adapter {task}: its own task", inputs, key, build)
    return read_record(OwnTask, out / _FILE)


def own_tasks_from(
    base: str | Path, adapters: Sequence[Path], files: Sequence[Path]
) -> list[OwnTask]:
    """What adapters do for their own tasks, on the first examples of one file each.

    The prompt is the one that an adapter's manifest records, or none.

    Raises:
        InputError: Not one file for each adapter, or a base, adapter or file that cannot be used.
    """
    if len(files) != len(adapters):
        raise InputError(
            f"found {len(files)} --data for {len(adapters)} adapters; expected one each, in the "
            "same order"
        )
    found = []
    for adapter, file in zip(adapters, files, strict=True):
        prompt = recorded_prompt(adapter) or PLAIN
        examples = read_jsonl(file)[:_MOST]
        found.append(own_task(base, adapter, prompt, examples, Evaluation()))
    return found


def own_task(
    base: str | Path, adapter: Path, prompt: str, examples: Sequence[Example], how: Evaluation
) -> OwnTask:
    """Score a base on examples, without an adapter and with it.

    Raises:
        InputError: A base, adapter or examples that cannot be used.
    """
    from caliport.calibrate.peft_files import read_update
    from caliport.core.checkpoints import encode_prompt, load_base, load_tokenizer
    from caliport.export.decoder.fold import fold
    from caliport.validation.evaluation.quality import score
    from caliport.validation.records.own_task import OwnTask

    model = load_base(base)
    tokenizer = load_tokenizer(base, model)
    update = read_update(adapter, model)
    prompts = [encode_prompt(tokenizer, put_in(prompt, e.input)) for e in examples]
    scores = []
    for shown in ("without", "with"):
        title = f"{adapter.name}: its own task {shown} it"
        with progress(title, len(prompts)) as advance:
            scores.append(
                score(
                    model,
                    tokenizer,
                    prompts,
                    [e.output for e in examples],
                    max_new_tokens=how.max_new_tokens,
                    batch_size=how.batch_size,
                    progress=advance,
                )
            )
        if shown == "without":
            model = fold(model, update, adapter)
    before, after = scores
    assert before.loss is not None
    assert after.loss is not None
    return OwnTask(
        examples=len(examples),
        loss=(before.loss, after.loss),
        metric=how.metric,
        score=(_metric(before, how.metric), _metric(after, how.metric)),
    )


def _metric(found: Score, name: str) -> float:
    values = found.examples[name]
    return found.chrf if name == "chrf" else sum(values) / len(values)
