"""Who says which answer is better, and preference pairs made from that.

judge              what a judge is: one score an answer
rules              judges that need no model
implicit_reward    the margin of an adapter over its reference
reward_model       a sequence classifier as the judge
endpoint           an OpenAI-compatible server, asked with patience
llm                a chat model behind it as the judge, in both orders
specs              judges as a user writes them
policy_and_judge   the model that answers and the judge, both in memory
samples            answers to every prompt, kept in a journal
pair_making        pairs out of judged answers
"""

from __future__ import annotations

from lora_dpo.judging.judge import Judge, ScoreFunction, Scores
from lora_dpo.judging.pair_making import make_pairs
from lora_dpo.judging.specs import Means, open_judge

__all__ = ["Judge", "Means", "ScoreFunction", "Scores", "make_pairs", "open_judge"]
