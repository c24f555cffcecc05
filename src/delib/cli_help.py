"""How `delib --help` reads: the panels that its commands stand in, in their order, and examples where they teach."""

from typing import Any

from typer.core import TyperGroup

PANELS = {
    "Run": ("run", "check", "recipe", "doctor", "ablate", "plan", "launch"),
    "One stage of a run": ("generate", "filter", "distill", "sft", "rl", "cold_start", "rl_only", "evaluate", "report"),
    "Policy": ("spec", "coverage", "diff"),
    "Data": ("prompts", "label"),
    "Judge": ("judge-check",),
    "Models": ("models", "chat", "serve", "eval", "export"),
    "Look": ("show", "view", "compare", "tables"),
}
PANEL_OF = {command: panel for panel, commands in PANELS.items() for command in commands}
EXAMPLES = {
    "run": (
        "delib run",
        "delib run small",
        "delib run my.yaml --out runs/mine --set sft.epochs=1",
        "delib run my.yaml --to filter",
    ),
    "check": (
        "delib check my.yaml",
        "delib check gpu-24gb --set sft.lora.rank=8",
        "delib check my.yaml --run runs/mine",
    ),
    "recipe": ("delib recipe", "delib recipe sft", "delib recipe rl.cut_off"),
    "plan": (
        "delib plan my.yaml --cluster cluster.yaml",
        "delib plan my.yaml --cluster cluster.yaml --prompts 1000000 --set limits.concurrency=512",
    ),
    "launch": (
        "delib launch gpu-8x80gb --on slurm --nodes 2 --run /shared/mine --out train.sh",
        "delib launch my.yaml --on kuberay --run /shared/mine",
    ),
    "ablate": ("delib ablate small --seeds 3 --out runs/ablate",),
    "coverage": ("delib coverage runs/quickstart --arm sft",),
    "diff": ("delib diff runs/before runs/after --changed 5",),
    "view": ("delib view runs/quickstart",),
    "doctor": ("delib doctor", "delib doctor my.yaml"),
    "chat": ("delib chat runs/quickstart/rl/checkpoint", "delib chat smollm2 --system 'You are brief.'"),
    "serve": ("delib serve runs/quickstart/rl/checkpoint --port 8081",),
    "eval": (
        "delib eval --model runs/quickstart/sft/checkpoint --prompts mine.jsonl --json out.json",
        "delib eval --model runs/quickstart/sft/checkpoint --suite xstest --limit 50",
        "delib eval --model runs/quickstart/sft/checkpoint --suite policy -T prompts=mine.jsonl -T spec=policy.md",
    ),
    "compare": (
        "delib compare runs/quickstart:sft runs/quickstart:rl",
        "delib compare base.eval sft.eval rl.eval --changed 5 --plot pareto.svg",
    ),
    "tables": ("delib tables runs/small sft=sft-xs.eval rl=rl-xs.eval --out tables.md",),
    "show": ("delib show runs/quickstart heldout-harassment-04",),
    "label": ("delib label runs/quickstart --prompts 36",),
    "export": (
        "delib export runs/quickstart --to examples",
        "delib export runs/quickstart --what rl --form gguf --to model",
    ),
    "judge-check": ("delib judge-check --judge compact --data labelled.jsonl",),
}


class Panels(TyperGroup):
    """The commands, each in its panel and with its examples."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*(name for name in PANEL_OF if name in self.commands), *(n for n in self.commands if n not in PANEL_OF)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command: Any = super().get_command(ctx, cmd_name)
        if command is not None:
            command.rich_help_panel = PANEL_OF.get(cmd_name)
            if cmd_name in EXAMPLES:
                command.epilog = "\n".join(["Examples:", *(f"$ {line}" for line in EXAMPLES[cmd_name])])
        return command
