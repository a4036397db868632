"""A page to watch lanes on: ``addiff web``. Only `addiff_env.serving.page` and what starts it need Gradio."""
