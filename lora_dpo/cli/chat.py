"""`lora-dpo chat`: parse, open, let `chat_loop` talk."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from lora_dpo.cli.options import AdapterName, BaseElsewhere, HeldAsTrained, MaxNewTokens, Seed, Strict, TemplateOption

out = Console()
err = Console(stderr=True)


def chat(
    adapter: AdapterName,
    prompt: Annotated[str | None, typer.Option(help="Answer this one message and exit (for scripts).")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show both answers, the base's and the adapter's.")
    ] = False,
    model: BaseElsewhere = None,
    system: Annotated[str | None, typer.Option(help="A system turn before the conversation.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy; 0.7 is lively.")] = 0.0,
    max_new_tokens: MaxNewTokens = 256,
    seed: Seed = 0,
    quantize: HeldAsTrained = None,
    template: TemplateOption = None,
    strict: Strict = False,
) -> None:
    """Chat with an adapter, and with its base, on one loaded model.

    Commands while chatting: /base /adapter /compare TEXT /reset /save FILE /help /quit. Ctrl-C stops an answer.
    What a model thinks before it answers is dim; with --prompt it is left out, and its length is told.

    Examples:

        lora-dpo chat quickstart

        lora-dpo chat adapters/quickstart --prompt "Why is the sky blue?" --compare
    """
    from lora_dpo.adapters.folder import strictness
    from lora_dpo.adapters.store import find_adapter
    from lora_dpo.cli.chat_loop import compare_once, converse, say_once
    from lora_dpo.cli.ready import have_base_of, warn_of_keywords
    from lora_dpo.config.reading import one_of
    from lora_dpo.model.decoding import Sampling
    from lora_dpo.serving.chat import open_chat

    if quantize is not None:
        one_of("--quantize", quantize, ("auto", "nf4", "none"))
    folder = find_adapter(adapter)
    have_base_of(folder, model)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=0.95, seed=seed)
    with strictness(strict), err.status("loading the model"):
        opened = open_chat(
            folder,
            model=model,
            quantize=quantize,  # type: ignore[arg-type]
            sampling=sampling,
            system=system,
            chat_template_kwargs=template,
        )
    warn_of_keywords(opened.base.tokenizer, opened.chat_template_kwargs)
    if prompt is None:
        converse(opened, out, compare=compare)
    elif compare:
        compare_once(opened, prompt, out)
    else:
        thought = say_once(opened, prompt, sys.stdout)
        if thought:
            err.print(f"[dim]{thought}[/]", highlight=False)
