"""A search on data of another kind than the quickstart's: advice without the openings that
repeat the question ("The best way to …", "To clean a window, …").

    python benchmarks/another_style.py --place build/style --output benchmarks/results/another-style.json

The packaged model answers prompts several times, a rule says which answers are in the style, and best against worst are
the pairs (`lora-dpo pairs`): once for topics to train on and choose by, once for other topics to report from. A search
(`lora-dpo tune`, judged by the same rule) then says whether its chosen settings beat the recipe that `lora-dpo init`
writes, with the interval of the difference. What is in `--place` already is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
RULE = r"rules:no-regex=(?i)^\W*(to|one|the|when|a|an|in|here|there|it|some|\d+)\b"
ENDS = "rules:finished"
FORMS = (
    "In one sentence, how does one {}?",
    "Give me one short tip to {}.",
    "What is the best way to {}? Answer briefly.",
    "Briefly: what helps to {}?",
)
TRAIN = """
sleep better; save money on food; learn a new language; keep a garden alive; get rid of a headache; remember names;
cook rice; clean a window; start running; make new friends; write a good letter; calm a crying baby; train a young
dog; fix a flat tyre; prepare for an exam; stop biting nails; read more books; keep bread fresh; wake up early; speak
in public; paint a wall; grow tomatoes; store potatoes; sharpen a knife; reduce stress; carry a heavy box; bake a soft
cake; swim faster; choose a laptop; protect skin from the sun; find a job; sell an old car; lower an electricity bill;
write a poem; take better photos; play the guitar; build a fire; cross a river; treat a burn; keep a cat happy; learn
to draw; plan a party; improve handwriting; repair a chair; drink more water; stay warm in winter; keep shoes clean;
pack a suitcase; teach a child to read
"""
REPORT = """
fall asleep on a plane; make coffee without a machine; remove a stain; learn chess; find the way without a map; boil
an egg; cut onions without tears; stay awake at work; care for a bicycle; wash a woollen jumper; keep fruit from
rotting; whistle; write a short story; memorise a speech; sew on a button; cool a room; catch a fish; ride a horse;
feed birds in winter; ski; clean a keyboard; avoid mosquitoes; keep a diary; cure hiccups; make a room brighter; walk
in high heels; hang a picture; sing; learn to juggle; give a good present; plant a tree; drive in snow
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, default=ROOT / "build" / "style")
    parser.add_argument("--minutes", default="25")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--rule", default=RULE)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.place.mkdir(parents=True, exist_ok=True)
    models = args.place / "models"
    if not models.exists():
        models.symlink_to(ROOT / "models")
    for name, topics in (("train", TRAIN), ("report", REPORT)):
        prompts = args.place / f"{name}.txt"
        asked = [form.format(topic) for topic in map(str.strip, topics.replace("\n", " ").split(";")) for form in FORMS]
        prompts.write_text("".join(f"{text}\n" for text in asked), encoding="utf-8")
        if not (args.place / f"{name}.jsonl").exists():
            command = ["pairs", prompts.name, "--model", "smollm2-135m", "--answers", "6", "--max-new-tokens", "80"]
            command += ["--judge", f"2*{args.rule}", "--judge", ENDS, "--min-gap", "1.5", "--output", f"{name}.jsonl"]
            ours(args.place, command)
    if not (args.place / "style.yaml").exists():
        ours(args.place, ["init", "train.jsonl", "--model", "smollm2-135m", "--output", "drawn-up.yaml"])
        recipe = yaml.safe_load((args.place / "drawn-up.yaml").read_text(encoding="utf-8"))
        recipe["data"].pop("hold_out", None)
        recipe["data"]["eval"] = "report.jsonl"
        recipe["evaluation"] = {**recipe.get("evaluation", {}), "answers": 128, "max_new_tokens": 80}
        (args.place / "style.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = ["tune", "style.yaml", "--minutes", args.minutes, "--seed", args.seed, f"output=seed-{args.seed}"]
    ours(args.place, [*command, "--judge", args.rule, "--judge", ENDS])
    search = args.place / f"seed-{args.seed}.search"
    result = json.loads((search / "result.json").read_text(encoding="utf-8"))
    trials = json.loads((search / "trials.json").read_text(encoding="utf-8"))
    found = {
        "rule": args.rule,
        "pairs": {
            name: len((args.place / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
            for name in ("train", "report")
        },
        "seed": int(args.seed),
        "minutes": float(args.minutes),
        "seconds": result["seconds"],
        "verdict": result["verdict"],
        "gain": result["gain"],
        "quality": {name: one["quality"] for name, one in result["reported"].items()},
        "chosen": result["chosen"],
        "candidates": [
            {"values": one["values"], "ended": one["ended"], "score": one["score"], "seconds": round(one["seconds"], 1)}
            for one in trials
        ],
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "optuna")},
    }
    print(json.dumps({key: found[key] for key in ("pairs", "seconds", "verdict", "gain", "quality")}, indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def ours(place: Path, command: list[str]) -> None:
    """Run one of the product's commands there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "lora_dpo", *command], cwd=place, env=environment)
    if done.returncode not in (0, 4):
        raise SystemExit(f"lora-dpo {command[0]} ended with status {done.returncode}.")


if __name__ == "__main__":
    main()
