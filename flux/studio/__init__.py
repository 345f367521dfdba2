"""The studio: a web page to generate, edit and look inside, and the same over HTTP (`python demo_gr.py`).

Modules, from top to bottom:

    app         loads the models and serves the page at an `address`
    page        builds the page of each model from a `header` and `tabs`
    endpoints   serve programs
    work        what each tab and endpoint does
    widgets     components of gradio as the page has them; made for this page are `strip` (layers), `viewer`
                (before and after), `painter` (masks) and `sliders` (layers of a LoRA)
    words       explain the page's ideas
    repeat      writes a run as a command and as a program
    forms       turn the values of a form, read by `form_values`, into settings
    state       what all of these share
    engine      runs one thing at a time, and reports it as `progress`; `line` is the queue before it
    models      which models there are; `memory`: which of them are loaded
    sessions    keep what each visitor made; `visits` find it again after a reload
    callers     who is connected; `limits` bound what they ask for
    guard       stands before the whole server; `hardening` keeps gradio from fetching or serving what is
                not the studio's
    studio.js   what the page does by itself; `studio.css` how it looks

Programs call named endpoints, those of what the studio's models can do, with gradio_client or plain HTTP
(see `examples/studio_client.py`). Each takes `model`, the name of one of the studio's models; without it, the
first one that can do what is asked. Other parameters that are left out have the values of that model's page.
Layers are numbered over the whole model, from 0.

/models     -> a list of the models: name, what it does, its endpoints, and whether it is in memory. The first
            one is that of the page at the server's root.
/generate   prompt, seed, count, width, height, num_steps, guidance, true_cfg, negative_prompt, image,
            strength, control, redux, redux_strength
            -> the images (PNG with the settings in it), run.json, which demo 0 takes, and warnings.
            image: start from this upload. strength, above 0, at most 1: how much of the schedule then runs.
            control: for Canny and Depth, the image whose edges or depth the result has. redux: for Redux, the
            image to vary.
/instruct   prompt, context, reference_strength, seed, count, width, height, num_steps, guidance, true_cfg,
            negative_prompt
            -> as /generate. For Kontext. context: a list of uploads. Without a size, the first one gives the
            shape.
/fill       prompt, image, mask, left, right, above, below, overlap, seed, count, num_steps, guidance,
            true_cfg, negative_prompt
            -> as /generate. For Fill. mask: white where the image is painted anew. Without a mask it is
            continued: left to below are borders, as shares of its sides; overlap is how far its own edge is
            painted anew.
/edit       prompt, edits, seed, layers, photo, mask, dose, weight, inject_from, inject_until, parts,
            inversion, paste_back, width, height, num_steps, guidance, true_cfg, negative_prompt, control,
            fill
            -> the reference and its edits, run.json, which demo 4 takes, and warnings.
            edits: what each edited image shows; one that begins with ">" is a further turn of the one before.
            photo: edit this upload, which the prompt describes. mask: an upload of any size, white where the
            image may change; without one, the dose auto finds a mask by itself, and with any other dose the
            whole image may change. layers: without any, those that this caller's own last scan found, then
            the model's known vital layers. control, fill: for models that need such an image; of an image to
            fill, mask is what reference and edits paint anew. All others are fields of
            `flux.settings.edits.EditSettings`.
/scan       prompts, seed, layers, top, width, height, num_steps, guidance, true_cfg, control, fill, mask
            -> the contents of vital_layers.json, vitality.png, and warnings. top: how many layers are vital;
            without it, those above the largest gap. control, fill, mask: as for /edit.

warnings is a list of lines: words of the prompts that the model does not know or does not see, settings
without effect, a size that was rounded or is far from the model's own. Calls wait for their turn; callers
take turns. A call that asks for too much, or for something that does not exist, ends with one line that
says why. So does a call while 8 others of the same caller wait. A run whose caller is gone for 5 seconds
is cancelled.

Some answers come before any endpoint: 403 to a page of another site, 408 or 413 to a body that does not end
or is too large, 421 to an unknown host, 429 to too many callers of one address or too many wrong passwords,
507 to an upload that the disk has no room for.

What a session made is deleted a day after its last use, its oldest runs once they take 500 MB; a scan is
deleted a week after its last use. Saved settings name no folder of the server: they give the weights and
LoRAs that the studio was started with by their bare names. A demo looks for these beside the run.json, then
where it runs, unless it is told (`--weights`, `--lora`, ...).
"""
