"""A LoRA file with some of its layers only. What stays is copied bit for bit, in the file's own form."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flux.errors import InputError, warn
from flux.files import write_bytes
from flux.intervention import check_layers
from flux.lora.contents import OpenLora, open_lora
from flux.lora.pairs import OF_PEFT, check_output
from flux.weights.lora_patches import Patch
from flux.weights.save import safetensors_bytes


def prune(
    file: str | Path,
    output: str | Path,
    layers: Collection[int],
    *,
    outside: bool = True,
    force: bool = False,
) -> list[int]:
    """Write a LoRA file with some of its layers only.

    Args:
        file: The LoRA file.
        output: The file to write.
        layers: The layers to keep.
        outside: Whether to keep changes outside the layers.
        force: Whether `output` may be replaced.

    Returns:
        The layers that were kept.

    Raises:
        InputError: The file is no LoRA, a layer is not one of the model's, none of the layers is in the file,
            or the output exists or cannot be written.
    """
    path, lora = check_output(output, force), open_lora(file)
    check_layers(layers, lora.num_layers)
    kept = sorted(set(layers) & set(lora.layers))
    if not kept:
        raise InputError(
            f"Got layers {sorted(layers)}, in which {file} changes nothing: it changes {lora.layers}"
        )
    staying, leaving = list[Patch](), list[Patch]()
    for patch in lora.patches:
        layer = lora.layer_of(patch)
        stays = outside if layer is None else layer in kept
        (staying if stays else leaving).append(patch)
    checkpoint, dropped = lora.file.checkpoint, _stored_names(lora, leaving)
    stored = [item for header in checkpoint.headers for item in header.tensors.items()]
    tensors = {name: tensor.read() for name, tensor in stored if name not in dropped}
    metadata = dict(checkpoint.metadata) | {"layers": json.dumps(kept)}
    if lora.file.peft_config:
        config = _of_modules(lora.file.peft_config, [patch.name for patch in staying])
        metadata[OF_PEFT] = json.dumps(config, sort_keys=True)
    write_bytes(path, safetensors_bytes(tensors, metadata))
    return kept


def _stored_names(lora: OpenLora, patches: Collection[Patch]) -> set[str]:
    """The names of the file's tensors that changes are read from, scales of packed ones included."""
    tensors = [tensor for patch in patches for tensor in lora.file.modules[patch.name].values()]
    return {stored.name for tensor in tensors for stored in (tensor.stored, tensor.scale) if stored}


def _of_modules(config: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    """PEFT's configuration for these modules alone."""
    key = "transformer.target_modules"
    names = sorted(module.removeprefix("transformer.") for module in modules)
    return {**config, key: names} if key in config else dict(config)


def choose_layers(
    scores: Mapping[int, float], top: int | None = None, share: float | None = None
) -> list[int]:
    """Choose the layers with the largest scores.

    Args:
        scores: The score of each layer.
        top: How many.
        share: Instead of `top`: as few as have this share of the sum of all scores, 0..1. Scores below 0
            count as 0.

    Returns:
        The layers, sorted. Of equal scores, lower layers come first.
    """
    ranked = sorted(scores, key=lambda layer: (-scores[layer], layer))
    if share is None:
        return sorted(ranked[:top])
    wanted, chosen, so_far = share * sum(max(score, 0.0) for score in scores.values()), [], 0.0
    for layer in ranked:
        # A sum of parts may miss the sum of all by a rounding.
        if chosen and so_far >= wanted * (1 - 1e-9):
            break
        chosen.append(layer)
        so_far += max(scores[layer], 0.0)
    return sorted(chosen)


def read_scores(path: str | Path, lora: OpenLora) -> dict[int, float]:
    """Read the scores of a LoRA's layers: effects of an ablation.json, or sizes of a report.json.

    Args:
        path: The file.
        lora: The LoRA. A report may have several, which are told by their files.

    Raises:
        InputError: The file cannot be read, is of another kind, or has no scores of this LoRA, or several.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        of_layers = _reported(data["loras"], lora, path) if "loras" in data else data["layers"]
        scores = {
            int(name): float(
                next(each[key] for key in ("effect", "relative", "norm") if each.get(key) is not None)
            )
            for name, each in of_layers.items()
            if name.isdecimal()
        }
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"Got scores {path}, which cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(
            f"Got scores {path}, which is no ablation.json and no report.json with a number for each layer"
        ) from error
    if not scores:
        raise InputError(f"Got scores {path}, which has none for a layer of {lora.path.name}")
    own = lora.file.fingerprint()
    if data.get("lora_fingerprint", own) != own:
        warn(f"{path} has the effects of another file than {lora.path}: {data.get('lora')}")
    return scores


def _reported(loras: Collection[Mapping[str, Any]], lora: OpenLora, path: Path) -> Mapping[str, Any]:
    """The layers of a LoRA in a report: of its file, or else of the one file of its name."""
    named = {each["file"]: each["layers"] for each in loras if Path(each["file"]).name == lora.path.name}
    same = [layers for file, layers in named.items() if Path(file).resolve() == lora.path.resolve()]
    found = same or list(named.values())
    if len(found) > 1:
        raise InputError(f"Got scores {path}, of several files named {lora.path.name}: report this one alone")
    return found[0] if found else {}
