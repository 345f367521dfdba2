"""The web page: type a prompt, see the picture.

python demo_gr.py [--name flux-nano] [--device auto] [--offload] [--share]
"""

import fire

from flux.errors import exit_on_input_error
from flux.settings import ModelSettings, check_settings


@exit_on_input_error()
def main(name: str = "flux-nano", device: str = "auto", offload: bool = False, share: bool = False) -> None:
    settings = check_settings(ModelSettings, {"model": name, "device": device, "offload": offload})

    import gradio as gr

    from flux.errors import InputError
    from flux.images import fit
    from flux.pipeline import Pipeline
    from flux.specs import complete

    defaults = complete(settings)
    pipe = Pipeline.load(defaults)

    def generate(
        prompt, width, height, num_steps, guidance, true_cfg, negative_prompt, seed, image, strength
    ):
        fields = {
            "width": int(width),
            "height": int(height),
            "num_steps": int(num_steps),
            "guidance": guidance,
        }
        steering = {"true_cfg": true_cfg, "negative_prompt": negative_prompt}
        try:
            wanted = complete(check_settings(ModelSettings, {**settings.model_dump(), **fields, **steering}))
        except InputError as error:
            raise gr.Error(str(error)) from error
        start = fit(image, wanted.width, wanted.height) if image else None
        return pipe.generate([prompt], [int(seed)], image=start, strength=strength, **wanted.sampling())[0]

    with gr.Blocks(title=f"{name}") as page:
        gr.Markdown(f"# {name}")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox("a dog wearing a top hat on the grass", label="Prompt")
                run = gr.Button("Generate", variant="primary")
                with gr.Row():
                    width = gr.Slider(128, 2048, defaults.width, step=16, label="Width")
                    height = gr.Slider(128, 2048, defaults.height, step=16, label="Height")
                with gr.Row():
                    steps = gr.Slider(1, 50, defaults.num_steps, step=1, label="Steps")
                    seed = gr.Number(0, label="Seed", precision=0)
                with gr.Row():
                    guidance = gr.Slider(0, 10, defaults.guidance, step=0.1, label="Guidance")
                    true_cfg = gr.Slider(1, 10, defaults.true_cfg, step=0.1, label="True CFG")
                negative = gr.Textbox("", label="Negative prompt (with true CFG)")
                with gr.Accordion("Start from a picture", open=False):
                    image = gr.Image(type="pil", label="Picture")
                    strength = gr.Slider(0.05, 1.0, 0.8, step=0.05, label="Strength")
            picture = gr.Image(label="Picture", format="png")
        inputs = [prompt, width, height, steps, guidance, true_cfg, negative, seed, image, strength]
        gr.on([run.click, prompt.submit], generate, inputs, picture, api_name="generate")
    page.launch(share=share)


if __name__ == "__main__":
    fire.Fire(main)
