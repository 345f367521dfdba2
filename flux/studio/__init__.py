"""The studio: a web page to generate, edit and look inside, and the same over HTTP (`python demo_gr.py`).

Rooms: `app` loads the model and serves; `engine` runs one thing at a time; `limits` says what a visitor may
ask for; `safety` keeps gradio from fetching or serving anything else; `visits` keeps what was made;
`generate`, `edit` and `look` hold settings and work, `page` the tabs that show them (`generate`, `edit_tab`,
`look_tab`, of `tabs` and `widgets`); `endpoints` is for programs.

Programs call three named endpoints, with gradio_client or plain HTTP (`docs/studio_client.py` is an example).
What is left out is as the page has it; layers are numbered over the whole model, from 0.

/generate   prompt, seed, count, width, height, num_steps, guidance, true_cfg, negative_prompt, image,
            strength
            -> the pictures (PNG with the settings in it), run.json, which demo 0 takes, and warnings.
            image: start from this upload; strength, above 0, at most 1: how much of the schedule then runs.
/edit       prompt, edits, seed, layers, photo, mask, dose, weight, inject_from, inject_until, parts,
            inversion, paste_back, width, height, num_steps, guidance, true_cfg, negative_prompt
            -> the reference and its edits, run.json, which demo 4 takes, and warnings.
            edits: what each edited picture shows; one that begins with ">" is a further turn of the one
            before it. photo: edit this upload, which the prompt describes; mask: an upload of any size, white
            where it may change; none: the dose auto finds it out, with the others all may. layers: none:
            those the model is known for. What the others mean stands in `flux.settings.demos.EditSettings`.
/scan       prompts, seed, layers, top, width, height, num_steps, guidance, true_cfg
            -> what vital_layers.json holds, vitality.png, and warnings. top: how many are vital; none: those
            above the largest gap.

warnings is a list of lines: words of the prompts that the model does not know, a size that was rounded.
Calls wait for their turn. One that asks for too much, or for what is not there, ends with a line of why.

What was made in a visit is deleted a day after its last use; scans are kept. Saved settings name no folder
of the server. Own weights and LoRAs, if the studio was started with any, stand there by their bare names: a
demo looks for them beside the run.json, then where it runs, if it is not told (`--weights`, `--lora`, ...).
"""
