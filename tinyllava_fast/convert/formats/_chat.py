"""Our chat templates as Jinja, for engines that make prompts themselves."""

from __future__ import annotations

import json

from tinyllava_fast.data.templates.base import TEMPLATES, Template
from tinyllava_fast.errors import UserError

_CHAT = """\
{%- if messages %}{{ SYSTEM }}{% endif -%}
{%- set seen = namespace(images=false) -%}
{%- for message in messages -%}
{%- set found = namespace(text='', images='', user=USER) -%}
{%- if message['content'] is string -%}{%- set found.text = message['content'] -%}
{%- else -%}{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{%- set found.images = found.images + IMAGE -%}
{%- elif item['type'] == 'text' -%}{%- set found.text = found.text + item['text'] -%}{%- endif -%}
{%- endfor -%}{%- endif -%}
@PREPARE@
{%- if message['role'] == 'user' -%}
{{ found.user + found.images }}{%- if found.images -%}{{ found.text | trim }}{%- else -%}{{ found.text }}{%- endif -%}
{%- elif message['role'] == 'assistant' -%}{{ SEPARATOR + found.text + EOS }}
{%- else -%}{{ raise_exception('this model was trained with the roles user and assistant only') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ OPEN }}{%- endif -%}"""


def plain_template(name: str) -> Template:
    """Return a template that ``chat_template`` takes. Raises UserError for one with rules of its own."""
    template = TEMPLATES.get(name, "template")
    if type(template) is not Template:
        raise UserError(f"template: {name} has no chat form; import or save the model with another template")
    return template


def chat_template(template: Template, *, image: str, prepare: str = "") -> str:
    """Return the Jinja form of a template.

    image: what stands for a picture that a message lists apart from its text. prepare: a statement that may change
    ``found.text``, the text of one message, first.
    """
    values = {
        "SYSTEM": template.system + " ",
        "USER": "USER: ",
        "IMAGE": image,
        "SEPARATOR": template.separator,
        "EOS": template.eos,
        "OPEN": template.separator.rstrip(),
    }
    heads = [f"{{%- set {name} = {json.dumps(text)} -%}}" for name, text in values.items()]
    return "\n".join([*heads, _CHAT.replace("@PREPARE@\n", prepare)])
