"""The page's settings, its presets, and the prompts that are ready beside a picture, as components."""

import json
from types import SimpleNamespace

import gradio as gr

# Label -> question about pictures; a click puts it into the text box
PROMPTS = {
    "Read the text": "Write out all of the text in this picture, line by line, exactly as it is written.",
    "Describe": "Describe this picture in detail.",
    "Table as CSV": "Write the table in this picture as CSV with a header row, and nothing else.",
    "Alt text": "Write alt text for this picture: one sentence of at most 125 characters that says what matters in it.",
}
SCHEMA_HINT = "title, year: integer, tags: list"


def settings_panel(part: SimpleNamespace) -> None:
    """Create the settings, in the order of `GenerationSettings` without its detail: `part.settings`, those beside the
    detail `part.advanced`, and the presets."""
    with gr.Accordion("Settings", open=False):
        part.settings = [
            gr.Textbox("", label="System prompt", lines=2, interactive=True),
            gr.Slider(1, 2048, 512, step=1, label="Max new tokens", interactive=True),
            gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)", interactive=True),
            gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p (if temperature > 0)", interactive=True),
        ]
        with gr.Accordion("More", open=False):
            part.advanced = [
                gr.Number(None, label="Top-k (empty: the model's)", precision=0, interactive=True),
                gr.Number(None, label="Repetition penalty (empty: the model's)", step=0.05, interactive=True),
                gr.Number(None, label="Seed (empty: any)", precision=0, interactive=True),
                gr.Textbox(
                    "",
                    label="Answer as JSON: fields, or a JSON schema",
                    placeholder=SCHEMA_HINT,
                    lines=2,
                    max_lines=8,
                    interactive=True,
                ),
            ]
            part.preset = gr.Dropdown(
                [], value=None, label="Preset (type a name to save one)", allow_custom_value=True, interactive=True
            )
            with gr.Row():
                part.save_preset = gr.Button("Save preset", size="sm", min_width=0, elem_classes="quiet")
                part.delete_preset = gr.Button("Delete preset", size="sm", min_width=0, elem_classes="quiet")


def ready_prompts(part: SimpleNamespace) -> None:
    """Create the ready prompts, which page.css shows while there is a picture in the box."""
    with gr.Row(elem_classes="prompts", scale=0):
        part.prompts = [gr.Button(label, size="sm", scale=0, min_width=0) for label in PROMPTS]


def connect_prompts(part: SimpleNamespace) -> None:
    """Make each ready prompt's button put it into the text box, behind what is typed there."""
    for button, prompt in zip(part.prompts, PROMPTS.values(), strict=True):
        added = f"""(box) => {{
            document.querySelector(".multimodal-textbox textarea").focus();
            const typed = (box?.text ?? "").trimEnd(), prompt = {json.dumps(prompt)};
            return {{ ...box, text: typed ? `${{typed}}\\n${{prompt}}` : prompt }};
        }}"""
        button.click(None, [part.box], [part.box], js=added, api_visibility="private")
