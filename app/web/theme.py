"""How the page looks: one calm theme whose colours are variables, light and dark, and a little CSS."""

from __future__ import annotations

import gradio as gr

_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """Grey paper, one green for what is to be pressed; fonts of the system: nothing is loaded from elsewhere."""
    made = gr.themes.Base(
        primary_hue=gr.themes.colors.teal, secondary_hue=gr.themes.colors.teal, neutral_hue=gr.themes.colors.slate,
        font=_FONT, font_mono=_MONO, radius_size=gr.themes.sizes.radius_md, text_size=gr.themes.sizes.text_md,
    )  # fmt: skip
    return made.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_label_text_weight="500",
        block_title_text_weight="600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_border_width="1px",
        input_border_width="1px",
        input_background_fill="*neutral_50",
        input_background_fill_dark="*neutral_800",
        input_border_color="*neutral_400",
        input_border_color_dark="*neutral_600",
    )


CSS = """
.gradio-container { max-width: 1180px !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container > main { width: 100% !important; }
.intro h1 { font-size: 1.5rem; margin: 0.4rem 0 0; }
.intro p { margin: 0.2rem 0 0.4rem; color: var(--body-text-color-subdued); }
.card table { width: 100%; border-collapse: collapse; }
.card td { padding: 0.35rem 0.5rem; border: none; border-bottom: 1px solid var(--border-color-primary);
  vertical-align: top; overflow-wrap: anywhere; }
.card td:first-child { color: var(--body-text-color-subdued); white-space: nowrap; width: 11rem; }
.card thead { display: none; }
.card table, .card tr, .card tbody { border: none !important; }
#previews .grid-wrap, #run-samples .grid-wrap, #pictures .grid-wrap, #earlier .grid-wrap { min-height: 0; height: auto;
  max-height: none; padding-top: 1.8rem; }
#grid .image-container { padding-top: 1.8rem; }
.cards article { border: 1px solid var(--border-color-primary); border-radius: var(--radius-md); padding: 0.7rem;
  background: var(--block-background-fill); min-width: 0; overflow-wrap: anywhere; }
.shelf { max-height: 75vh; overflow-y: auto; display: grid; gap: 0.8rem;
  grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); }
.cards img, .cards .blank { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: var(--radius-sm);
  background: var(--background-fill-secondary); display: grid; place-items: center;
  color: var(--body-text-color-subdued); }
.cards .blank { aspect-ratio: 3; }
.cards h3 { margin: 0.5rem 0 0.3rem; font-size: 1rem; }
.cards dl { margin: 0; display: grid; grid-template-columns: auto 1fr; gap: 0.1rem 0.6rem; font-size: 0.85rem; }
.cards dt { color: var(--body-text-color-subdued); }
.cards dd { margin: 0; }
.card, .note { padding: 0.2rem 0.4rem; }
.note p { overflow-wrap: anywhere; }
.status h3 { margin: 0 0 0.2rem; }
.status progress { width: 100%; height: 0.8rem; accent-color: var(--color-accent); }
.log textarea { font-family: var(--font-mono); font-size: 0.8rem; }
.status progress { appearance: none; border: none; border-radius: 99px; background: var(--background-fill-secondary); }
.status progress::-webkit-progress-bar { border-radius: 99px; background: var(--border-color-primary); }
.status progress::-webkit-progress-value { border-radius: 99px; background: var(--color-accent); }
.status progress::-moz-progress-bar { border-radius: 99px; background: var(--color-accent); }
.fields > * { flex: 1 1 240px; }
.buttons > * { flex: 1 1 150px !important; min-width: 150px !important; }
:focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 2px; }
@media (max-width: 640px) {
  .gradio-container { padding: 0.5rem !important; }
  .card td { display: block; width: auto !important; border-bottom: none; padding: 0.1rem 0.3rem; }
  .card td + td { border-bottom: 1px solid var(--border-color-primary); padding-bottom: 0.4rem; }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""
