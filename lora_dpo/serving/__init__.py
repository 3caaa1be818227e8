"""One base for many who ask at once, and a training beside them.

fair_queue      whose request is next
request         one request on its way, and its answer on the way back
adapter_pool    adapters that fit the base, and those that are in memory
training_job    a run in a thread of its own beside the answers
host            the base, the pool and the queue
chat            one conversation in a terminal or a script
openai_schema   the words of OpenAI's chat API
address         where a server may listen
connections     clients that open connections and send nothing
http            `lora-dpo serve`
"""

from __future__ import annotations

from lora_dpo.serving.chat import Chat, open_chat
from lora_dpo.serving.host import Host, open_host

__all__ = ["Chat", "Host", "open_chat", "open_host"]
