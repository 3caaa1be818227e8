"""Who says which answer is better, and preference pairs made from that.

judge              the protocol of a judge: a prompt and answers in, scores out
rules              judges that need no model
implicit_reward    the margin of an adapter over its reference
reward_model       a sequence classifier as the judge
endpoint           an OpenAI-compatible server, asked with patience
llm                a chat model behind it as the judge, in both orders
specs              `rules:…`, `llm:…` and so on to a judge: the table of kinds, where a new one is added
policy_and_judge   the model that answers and the judge, both in memory
samples            answers to every prompt, kept in a journal
pair_making        preference pairs out of judged answers
"""

from __future__ import annotations

from lora_dpo.judging.judge import Judge, ScoreFunction, Scores
from lora_dpo.judging.pair_making import make_pairs
from lora_dpo.judging.specs import Means, open_judge

__all__ = ["Judge", "Means", "ScoreFunction", "Scores", "make_pairs", "open_judge"]
