from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = (HERE / "flux" / "__init__.py").read_text().split('__version__ = "')[1].split('"')[0]

GRADIO = ["gradio>=6.0"]
# invisible-watermark, which the watermark's tests compare with, is installed beside these without its
# dependencies: it asks for opencv-python, which needs a screen's libraries.
CLUSTER = ["ray>=2.49"]
# Products with epilogues and attention for NVIDIA's Hopper cards.
HOPPER = ["quack-kernels>=0.6.5", "flash-attn-4[cu13]>=4.0.0b36"]
TEST = [
    "pytest>=8.0",
    "diffusers>=0.36",
    "accelerate>=1.0",
    "opencv-python-headless>=4.8",
    "PyWavelets>=1.4",
    "gguf>=0.17",
    "peft>=0.18",
    "playwright>=1.50",
    # Comes with torch's builds for cards; its interpreter runs our kernels on a CPU.
    'triton>=3.6; platform_system == "Linux"',
    *GRADIO,
    *CLUSTER,
]

setup(
    name="flux-stable-flow",
    version=VERSION,
    description="FLUX.1 with its layers open: find the vital ones, edit through them without training",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["flux", "flux.*"]),
    package_data={"flux": ["assets/**/*", "scan/report.html", "studio/studio.css"]},
    install_requires=[
        "torch>=2.11",
        "einops>=0.8",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "transformers>=5.4",
        "sentencepiece>=0.2",
        "pillow>=11.0",
        "fire>=0.7",
        "pydantic>=2.10",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "numpy>=1.26",
    ],
    extras_require={"gradio": GRADIO, "cluster": CLUSTER, "hopper": HOPPER, "test": TEST, "all": TEST},
    entry_points={"console_scripts": ["flux = flux.cli:app"]},
)
