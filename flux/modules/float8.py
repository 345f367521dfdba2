"""The 8-bit float formats."""

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
EIGHT_BIT_FLOATS = {"F8_E4M3": E4M3, "F8_E5M2": torch.float8_e5m2}
"""The formats by the names that safetensors files use."""
