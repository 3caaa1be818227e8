"""DPO, PPO, SFT and best-of-N on one base, one known reward and one sampling budget (docs/study.md)."""
