"""The studio on a Space: FLUX.1 [schnell], with upstream's content filter."""

import os

from flux.settings.demos import ModelSettings
from flux.studio.app import Address, open_studio, serve

studio = open_studio(ModelSettings(model=os.environ.get("STUDIO_MODEL", "flux-schnell"), offload=False))
serve(studio, Address(host="0.0.0.0", auth=os.environ.get("STUDIO_AUTH")))
