"""LoRA files: looked into, ablated, pruned, converted, extracted, merged and trained."""
