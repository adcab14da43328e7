"""Replies as text for the shell, and as HTML for notebooks."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from vilam3_jax.data.experts.overlays import slice_legend
from vilam3_jax.data.images import encode_png
from vilam3_jax.inference.agent import Transcript

if TYPE_CHECKING:
    from vilam3_jax.inference.assistant import Reply

# Colours are those of the notebook, light or dark; nothing is loaded, and no style sheet outlives its cell.
_REPLY = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""\
<div style="display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start;margin:.5em 0;text-align:left">
{%- for picture in pictures %}
<figure style="margin:0;width:18em;max-width:100%">
<img src="data:image/png;base64,{{ picture.png }}" alt="{{ picture.caption }}" style="width:100%">
<figcaption style="font-size:smaller">{{ picture.caption }}
{%- for colour, label in picture.legend %}
<span style="white-space:nowrap"><span style="display:inline-block;width:.8em;height:.8em;\
background:{{ colour }};border:1px solid gray"></span> {{ label }}</span>
{%- endfor %}</figcaption>
</figure>
{%- endfor %}
<div style="flex:1;min-width:18em">
{%- for speaker, text in turns %}
<p style="margin:0 0 .5em;white-space:pre-wrap"><b>{{ speaker }}</b>: {{ text }}</p>
{%- endfor %}
{%- if cards %}
<details style="font-size:smaller"><summary>Cards of the experts</summary>\
<div style="white-space:pre-wrap">{{ cards }}</div></details>
{%- endif %}
{%- if notes %}
<ul style="font-size:smaller;margin:.5em 0;padding-left:1.5em">
{%- for note in notes %}<li>{{ note }}</li>{% endfor -%}
</ul>
{%- endif %}
</div>
</div>
""")


def reply_text(reply: Reply, *, cards: bool = False) -> str:
    """The turns since the last question, then the notes; `cards` shows those of the experts, too."""
    lines = [f"[image] {reply.description}"] if reply.description else []
    lines += [f"{speaker}: {text}" for speaker, text in _spoken(reply.transcript, cards)]
    return "\n".join([*lines, "", *(f"Note: {note}" for note in reply.notes)])


def reply_html(reply: Reply) -> str:
    """A reply as HTML: image, overlay with legend, dialogue and notes. All text is escaped."""
    return _REPLY.render(
        pictures=_pictures(reply),
        turns=_spoken(reply.transcript, cards=False),
        cards=reply.transcript.cards,
        notes=reply.notes,
    )


def chat_html(replies: Sequence[Reply]) -> str:
    """The replies of a conversation, each with the pictures that the one before does not show."""
    parts, shown = [], None
    for reply in replies:
        pictures = _pictures(reply)
        turns = _spoken(reply.transcript, cards=False)
        new = [] if pictures == shown else pictures
        # What every reply notes is said once, at the end.
        notes = reply.notes if reply is replies[-1] else ()
        parts.append(_REPLY.render(pictures=new, turns=turns, cards="", notes=notes))
        shown = pictures
    return "".join(parts)


def _spoken(transcript: Transcript, cards: bool) -> list[tuple[str, str]]:
    """(speaker, text) of the turns since the last question."""
    experts = " and ".join(dict.fromkeys(a.expert for a in transcript.annotations))
    names = {"user": "You", "assistant": "Model", "system": "System", "expert": f"Expert {experts}"}
    return [
        (names[turn.role], turn.text if cards else turn.text.removeprefix(transcript.cards))
        for turn in transcript.turns[transcript.first_turn :]
    ]


def _pictures(reply: Reply) -> list[dict[str, Any]]:
    found = []
    if reply.image is not None:
        found.append({"png": _png(reply.image), "caption": reply.description, "legend": ()})
    if reply.overlay is not None:
        result = reply.transcript.overlay_result
        assert result is not None and result.plane.axis is not None and result.plane.index is not None
        legend = slice_legend(result.annotation, axis=result.plane.axis, index=result.plane.index)
        caption = f"Labels of {result.annotation.expert}"
        found.append({"png": _png(reply.overlay), "caption": caption, "legend": tuple(legend.items())})
    return found


def _png(image: np.ndarray) -> str:
    return base64.b64encode(encode_png(image)).decode()
