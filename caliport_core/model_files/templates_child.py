"""The child process of ``chat_templates``: reads jobs, one a line, and answers each with a line.

It uses transformers' own renderer, so its text is what ``apply_chat_template`` gives, except that
nothing random is in reach and that today is always one day. The kernel ends it where a template
takes too long.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

SECONDS = 3
"""Most processor time of one rendering."""
MEMORY = 2**30
"""Most bytes of address space."""
LONGEST = 1_000_000
"""Most characters of a rendered chat."""
TODAY = datetime(2024, 7, 26)
"""What ``strftime_now`` gives: the day that Llama 3.2's template names where it has no clock."""
TOO_LONG = f"renders for more than {SECONDS} seconds"


def rendered(job: dict[str, Any]) -> dict[str, str]:
    """The text of a chat in its template, or why there is none."""
    from transformers.utils.chat_template_utils import (
        _compile_jinja_template,
        render_jinja_template,
    )

    try:
        environment = _compile_jinja_template(job["template"]).environment
        environment.globals.pop("lipsum", None)
        environment.filters.pop("random", None)
        environment.globals["strftime_now"] = TODAY.strftime
        found: Any = render_jinja_template(
            conversations=[job["messages"]],
            chat_template=job["template"],
            add_generation_prompt=job["asks"],
            enable_thinking=False,
            **job["words"],
        )
        text = found[0][0]  # of the first chat; the second of the pair is not asked for
        if len(text) > LONGEST:
            return {"error": f"gives {len(text):,} characters, expected at most {LONGEST:,}"}
        return {"text": text}
    except MemoryError:
        return {"error": f"takes more than {MEMORY // 2**20:,} MB of memory"}
    except Exception as error:  # whatever a stranger's template raises is what is wrong with it
        return {"error": f"{type(error).__name__}: {str(error)[:1000]}"}


def main() -> None:
    """Answer jobs until the input ends, which it does with the parent."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    import transformers.utils.chat_template_utils  # noqa: F401  # before the limits

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        answer = json.dumps(rendered(job))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
