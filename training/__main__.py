"""Trains flux-nano: one stage, or all in order, resuming where the last call stopped.

python -m training all --minutes 9
torchrun --standalone --nproc-per-node 4 -m training all --minutes 9
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flux.files import claim_folder
from training.arguments import Parser, above_zero, start
from training.loop.plan import ADAPTERS, STAGES

if TYPE_CHECKING:
    from training.loop.plan import Work

NEEDS = {
    "autoencoder": ("tokenizers",),
    "text": ("tokenizers",),
    "flow128": ("tokenizers", "autoencoder", "text"),
    "flow256": ("tokenizers", "autoencoder", "flow128"),
    "guidance": ("tokenizers", "autoencoder", "flow256"),
    "schnell": ("tokenizers", "autoencoder", "guidance"),
    **dict.fromkeys(ADAPTERS, ("tokenizers", "autoencoder", "guidance")),
    "export": ("tokenizers", "autoencoder", "guidance", "schnell"),
    "dinov2": ("tokenizers",),
    "measuring": ("tokenizers",),
}
"""The stages whose results a stage reads."""


def parse() -> Namespace:
    """Read the command line."""
    parser = Parser(prog="python -m training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "stage", choices=("all", *STAGES), nargs="+", help="what to train; complete stages are skipped"
    )
    parser.add_argument("--folder", type=Path, default=Path("output/training"), help="states, results, logs")
    parser.add_argument(
        "--minutes", type=above_zero, default=1e6, help="stop and save after so many; call again to resume"
    )
    parser.add_argument(
        "--stretch", type=above_zero, default=1.0, help="multiply the training time of every stage"
    )
    parser.add_argument(
        "--profile", action="store_true", help="write what ten iterations of each stage spend time on"
    )
    parser.add_argument(
        "--begin", type=Path, metavar="FOLDER", help="train exported files further: their tokenizers and "
        "autoencoder are kept, flow256 begins with their transformer",
    )  # fmt: skip
    parser.add_argument(
        "--toy", action="store_true", help="tiny models, seconds a stage: does everything run?"
    )
    arguments = parser.parse_args()
    if arguments.begin and arguments.toy:
        parser.error("--begin trains exported files further, which --toy is too small for: give one of them")
    if arguments.begin and not (arguments.begin / "transformer.safetensors").is_file():
        parser.error(f"no exported files in {arguments.begin}: flux/assets/nano has those that ship")
    if missing := missing_stages(arguments.stage, arguments.folder, bool(arguments.begin)):
        parser.error(
            f"{arguments.folder} lacks the results of {', '.join(missing)}: name these stages too, or all"
        )
    return arguments


def missing_stages(wanted: Sequence[str], folder: Path, begins: bool) -> list[str]:
    """List the stages that those wanted need, but that are neither wanted nor complete.

    Args:
        wanted: names of stages, or "all".
        folder: the folder of the training.
        begins: whether exported files are trained further, which replace the first stages.
    """
    given = set(STAGES if "all" in wanted else wanted)
    given |= {stage for stage in STAGES if (folder / f"{stage}.done").exists()}
    if begins:
        given |= {"tokenizers", "autoencoder", "flow128"}
    needed = {need for stage in wanted for need in NEEDS.get(stage, ())}
    if begins and not {"schnell", "export"} & set(wanted):
        needed.discard("guidance")  # adapters begin with the exported model
    if begins and "flow256" in wanted:
        needed.add("text")
    return [stage for stage in STAGES if stage in needed - given]


def stage_functions() -> "dict[str, Callable[[Work], bool]]":
    """Name the function of each stage. It returns False if the call's budget ran out first."""
    from training.stages.adapters import train_adapter
    from training.stages.autoencoder import train_autoencoder
    from training.stages.export import export
    from training.stages.flow import train_flow, train_guidance
    from training.stages.schnell import train_schnell
    from training.stages.text import train_text
    from training.stages.tokenizers import write_tokenizers
    from training.stages.vision import train_dinov2, train_measuring

    def tokenizers(work: "Work") -> bool:
        if work.cluster.first:
            write_tokenizers(work.tokenizers)
        return True

    return {
        "tokenizers": tokenizers,
        "autoencoder": train_autoencoder,
        "text": train_text,
        "flow128": lambda work: train_flow(work, "flow128"),
        "flow256": lambda work: train_flow(work, "flow256"),
        "guidance": train_guidance,
        "schnell": train_schnell,
        **{kind: partial(train_adapter, kind=kind) for kind in ADAPTERS},
        "dinov2": train_dinov2,
        "measuring": train_measuring,
        "export": export,
    }


def main() -> None:
    """Run the command."""
    begin = time.time()
    arguments = parse()
    claim_folder(arguments.folder)

    import torch

    from flux.modules.ops import without_kernels
    from training.loop.cluster import Cluster
    from training.loop.plan import Work
    from training.loop.trainer import Budget
    from training.stages.export import take_over

    torch.set_float32_matmul_precision("high")
    cluster = Cluster.join()
    budget = Budget(arguments.minutes, begin, arguments.profile)
    work = (Work.toy if arguments.toy else Work)(cluster, arguments.folder, budget).stretched(
        arguments.stretch
    )
    if arguments.begin:
        work = replace(work, begin=arguments.begin)
        take_over(work)
    stages = STAGES if "all" in arguments.stage else [stage for stage in STAGES if stage in arguments.stage]
    # The shipped files were trained without kernels, also where a teacher's pass needs no gradients.
    with without_kernels():
        run_stages(work, stages)
    cluster.leave()


def run_stages(work: "Work", stages: "list[str] | tuple[str, ...]") -> None:
    """Run the stages that are not complete, until the call's budget is used up."""
    import torch

    functions, cluster, budget = stage_functions(), work.cluster, work.budget
    for stage in stages:
        finished = work.folder / f"{stage}.done"
        cluster.barrier()
        if finished.exists():
            continue
        since = time.time()
        if cluster.broadcast_number(budget.left) < 30 or not functions[stage](work):
            if cluster.first:
                print(f"{stage}: stopped after {budget.minutes:g} minutes; call again to go on", flush=True)
            break
        if cluster.first:
            finished.touch()
            print(f"{stage}: done, {time.time() - since:.0f} s", flush=True)
        if cluster.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    start(main)
