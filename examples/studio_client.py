"""The studio from another program: an image, an edit of the same scene, and a scan of three layers.

python demo_gr.py --port 7860 &
python examples/studio_client.py [http://127.0.0.1:7860] [--num_steps 20]
"""

from argparse import ArgumentParser

from gradio_client import Client


def main(url: str = "http://127.0.0.1:7860", num_steps: int = 20, size: int = 256) -> None:
    """Make an image, edit it, and scan three layers.

    Args:
        url: The address of the studio.
        num_steps: Denoising steps of each image.
        size: Width and height of the images in pixels.
    """
    studio = Client(url, verbose=False)
    sampling = {"num_steps": num_steps, "width": size, "height": size}

    images, run, warnings = studio.predict("a dog on the grass", seed=7, **sampling, api_name="/generate")
    print("image:", images[0], "\nrun.json:", run, *warnings, sep="\n")

    images, *_ = studio.predict(
        "a dog on the grass", ["a cat on the grass"], seed=7, **sampling, api_name="/edit"
    )
    print("reference and edit:", *images)

    found, plot, _ = studio.predict(["a dog on the grass"], layers=[0, 3, 9], **sampling, api_name="/scan")
    print("vital layers:", found["vital_layers"], "\nvitality:", plot)


if __name__ == "__main__":
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:7860", help="address of the studio")
    parser.add_argument("--num_steps", type=int, default=20, help="denoising steps of each image")
    parser.add_argument("--size", type=int, default=256, help="width and height of the images in pixels")
    main(**vars(parser.parse_args()))
