"""The commands of `python -m flux.lora`, one small file each.

A command's file has a function `main`, whose parameters are its options, and `POSITIONAL`, the name of the
one that an argument without a name is for. A command that reads a JSON file also has `FIELDS`, the fields of
its settings. torch is imported within `main`, so that `--help` is quick.
"""

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
FormName = Literal["kohya", "bfl", "diffusers"]
