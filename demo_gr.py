"""The studio, a web page: generate, edit and look inside.

    python demo_gr.py [--name flux-nano] [--models NAME,NAME] [--device auto] [--offload] [--share]
        [--host 0.0.0.0] [--port 7860] [--auth user:password] [--ssl_certfile FILE --ssl_keyfile FILE]
        [--root_path /studio] [--allowed_hosts NAME,NAME] [--publish_scans] [--track_usage]
        [--content_filter auto|off|NAME] [--output_dir output/studio]

Any other field of a demo's model (--weights, --dtype, ...) may be given too. The page writes its images to
output_dir, into a folder for each session. `flux.studio` describes how programs use it over HTTP.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flux.errors import InputError, exit_on_input_error
from flux.settings.command_line import run
from flux.settings.demos import ModelSettings
from flux.settings.files import check_settings


@exit_on_input_error()
def main(
    name: str = "flux-nano",
    models: str | None = None,
    device: str = "auto",
    offload: bool | str = False,
    share: bool = False,
    host: str | None = None,
    port: int | None = None,
    auth: str | None = None,
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
    root_path: str | None = None,
    allowed_hosts: str = "",
    publish_scans: bool = False,
    track_usage: bool = False,
    content_filter: str = "auto",
    output_dir: str = "output/studio",
    **model: Any,
) -> None:
    """Serve the studio until it is stopped.

    Args:
        name: the first model, one of flux.specs.configs
        models: further models that visitors can choose, with commas between; if not set, those that share
            the first one's files, unless others than this machine's user can open the page
        device: where to run: "auto", "cpu", "cuda", "cuda:1", "mps"
        offload: keep each model in main memory until it is used; or "blocks", "auto", as in the demos
        share: make a public link through gradio's servers
        host: address to listen at; if not set, only this machine can open the page
        port: port to listen at; if not set, a free one from 7860 on
        auth: "user:password" that the page asks for
        ssl_certfile: file of a TLS certificate, to serve by HTTPS
        ssl_keyfile: file of the certificate's key
        root_path: path, or whole address, under which a proxy serves the studio
        allowed_hosts: further names that the studio is reached under, with commas between
        publish_scans: make the layers that a visitor's scan finds the default of everybody, also of demo 4
        track_usage: report each image to BFL, for licensed users (key in BFL_API_KEY)
        content_filter: image classifier that refuses images: "auto", "off", a hub id or a folder
        output_dir: folder to write to
        model: more fields of a model's settings
    """
    if not find_spec("gradio"):
        raise InputError('The studio needs gradio, which is not installed: pip install -e ".[gradio]"')
    settings = check_settings(ModelSettings, {"model": name, "device": device, "offload": offload, **model})

    from flux.files import check_folder
    from flux.studio.app import Address, open_studio, serve
    from flux.studio.models import models_beside

    hosts = _names(allowed_hosts)
    address = Address(host, port, share, auth, ssl_certfile, ssl_keyfile, root_path, hosts)
    address.check()
    folder = Path(output_dir).expanduser()
    check_folder(folder)
    others = models_beside(settings, None if models is None else _names(models), address.is_public)
    studio = open_studio(settings, folder, content_filter, track_usage, publish_scans, others)
    serve(studio, address)


def _names(text: str) -> tuple[str, ...]:
    """Split names at their commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    # `name` and `output_dir` stand for the fields "model" and "output_dir".
    run(main, __doc__, {name: field for name, field in ModelSettings.model_fields.items() if name != "model"})
