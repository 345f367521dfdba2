"""The studio, a web page: generate, edit and look inside.

    python demo_gr.py [--name flux-nano] [--device auto] [--offload] [--share] [--host 0.0.0.0] [--port 7860]
        [--auth user:password] [--track_usage] [--content_filter auto|off|NAME] [--output_dir output/studio]

Any other field of a demo's model (--weights, --dtype, ...) may be given too. What the page makes is written
to output_dir, a folder for each visit. `flux.studio` says how programs use it over HTTP.
"""

import fire

from flux.errors import exit_on_input_error
from flux.settings.demos import ModelSettings
from flux.settings.files import check_settings


@exit_on_input_error()
def main(
    name: str = "flux-nano",
    device: str = "auto",
    offload: bool = False,
    share: bool = False,
    host: str | None = None,
    port: int | None = None,
    auth: str | None = None,
    track_usage: bool = False,
    content_filter: str = "auto",
    output_dir: str = "output/studio",
    **model,
) -> None:
    settings = check_settings(ModelSettings, {"model": name, "device": device, "offload": offload, **model})

    from flux.studio.app import check_address, open_studio, serve

    check_address(host, port, auth)
    studio = open_studio(settings, output_dir, content_filter, track_usage)
    serve(studio, host, port, share, auth)


if __name__ == "__main__":
    fire.Fire(main)
