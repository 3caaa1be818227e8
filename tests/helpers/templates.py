"""Chat templates of ours in the manner of those that people meet, and a byte tokenizer with the tokens they write.

Each does what is special about its family: turns that it refuses, thoughts, keywords, calls, the end of a turn.
"""

import copy

THINKING = (
    "{%- set at = namespace(asked=-1) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set at.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set thought = m.reasoning_content or '' %}{% set said = m.content %}"
    "{%- if not thought and '</think>' in said %}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1] %}{% set said = said.split('</think>')[-1] %}"
    "{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > at.asked %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{- said.lstrip('\\n') + '<|im_end|>\\n' }}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{%- endif %}"
)
"""Qwen 3: thoughts after the last question alone, an empty one where there is none, off by a keyword."""

ALWAYS_THINKS = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1] + '<|im_end|>\\n' }}"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
"""R1's distillates: the prompt opens the thought, and past ones are left out."""

HEADERS = (
    "{{- bos_token }}{% if not date_string is defined %}{% set date_string = '1 Jan 2026' %}{% endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '\\n' }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
    "{{- '<|eot_id|>' }}"
    "{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
"""Llama 3: headers, a system turn always, a date by keyword, an end of turn that is not the end of text."""

NO_SYSTEM = (
    "{{- bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{%- for m in messages %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim }}"
    "{{- '<end_of_turn>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
"""Gemma: refuses a system turn, wants user and model in turn."""

INSTRUCT = (
    "{{- bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}"
    "{%- set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{%- for m in messages %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{%- if m.role == 'user' %}{{ '[INST] ' + (system if loop.last or loop.index0 == messages | length - 2 else '') }}"
    "{{- m.content + ' [/INST]' }}"
    "{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
"""Mistral: no header for the answer, the system text in the last question, the end of text as the end of a turn."""

BARS = (
    "{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""Phi 3: the end of text after the whole conversation, behind the end of the turn."""

CHANNELS = (
    "{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort if reasoning_effort is defined else 'medium') }}"
    "{{- '<|end|>' }}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- if m.thinking and loop.last %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{%- else %}{{ '<|start|>' + ('developer' if m.role == 'system' else m.role) + '<|message|>' }}"
    "{{- m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
"""gpt-oss: channels, thoughts under the key `thinking`, the effort by keyword."""


def with_template(tokenizer, template, *, eos=None, pad="same", bos=None, tokens=()):
    """A copy of a tokenizer with another template, some added special tokens, and other ends and padding."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": list(tokens)})
    changed.chat_template = template
    ends = {"bos_token": bos or changed.bos_token, "eos_token": eos or changed.eos_token}
    changed.add_special_tokens({name: token for name, token in ends.items() if token is not None})
    changed.pad_token = changed.eos_token if pad == "eos" else None if pad is None else changed.pad_token
    return changed
