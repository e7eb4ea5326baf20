"""The form of calls that a template writes, where no named format knows it: what stands around a probe call."""

from __future__ import annotations

import json
import re

from penstock.frontend.chat_template import ChatTemplate
from penstock.frontend.parsers.generic import PROBE_KEY, PROBE_NAME, PROBE_VALUE, written_call
from penstock.messages import CallForm


def learn_call_form(template: ChatTemplate) -> CallForm | None:
    """None where the arguments are no JSON object behind the name."""
    written = written_call(template)
    if written is None:
        return None
    written = written.lstrip()
    name = written.find(PROBE_NAME)
    arguments = written.find("{", name)
    if min(name, arguments) < 0:
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(written, arguments)
    except ValueError:
        return None
    if value != {PROBE_KEY: PROBE_VALUE}:
        return None
    before, between, tail = written[:name], written[name + len(PROBE_NAME) : arguments], written[end:].rstrip()
    marker = re.split(r"[\[{]", before, maxsplit=1)[0].rstrip()
    starts = "" if marker else "[{"
    return CallForm(
        name="generic", trigger=marker, starts=starts, before_name=before, after_name=between, tail=tail,
        is_single=not marker,
    )  # fmt: skip
