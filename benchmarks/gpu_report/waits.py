"""Five training steps of a recipe or backbone in which a wait for the GPU raises an error."""

from pathlib import Path

import torch
from jsonargparse import auto_cli

from benchmarks.timing.step_work import wait_for_device
from benchmarks.timing.steps import ProductSteps, Variant
from recsys.distributed.ranks import joined_ranks

RECIPES = Path(__file__).parents[2] / "recsys" / "recipes"
WARM_UP, STEPS = 4, 5


def waits(name: str, out: Path, device: str = "cuda", quick: bool = False) -> None:
    """Train on the MovieLens sample; a wait ends the command with the line that it is in.

    Args:
        name: a recipe, or a backbone with the content of the recipe `tiny`.
        out: folder with the dataset.
        device: cuda or cpu.
        quick: few rows.
    """
    recipe = RECIPES / f"{name}.yaml"
    overrides: tuple[str, ...] = ("--device", device, "--cache", str(out / "cache"))
    if not recipe.is_file():
        recipe, overrides = RECIPES / "tiny.yaml", (*overrides, "--ranking", f"{{name: {name}}}")
    if quick:
        overrides += ("--batch_size", "16")
    variant = Variant(name, str(recipe), str(out / "data" / "movielens"), overrides)
    with joined_ranks(device) as ranks:  # type: ignore[arg-type]
        steps = ProductSteps(variant, ranks)
        for _ in range(WARM_UP):
            steps.step()
        wait_for_device()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        for _ in range(STEPS):
            steps.step()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    print(f"{name}: {STEPS} steps without a wait")


if __name__ == "__main__":
    auto_cli(waits, as_positional=False)
