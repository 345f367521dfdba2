"""Stable Flow nodes: vital layers, injected keys and values, skipped layers."""


async def comfy_entrypoint():
    """ComfyUI's entry into a pack of nodes."""
    # Imports ComfyUI, which the other modules do without.
    from .nodes import StableFlowExtension

    return StableFlowExtension()
