"""DPO, PPO, SFT and best-of-N on one base, one known reward and one sampling budget (docs/study.md)."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a kernel that is not used here
