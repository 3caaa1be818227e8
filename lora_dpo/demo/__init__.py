"""The demo: chat, vote, data, train and adapters in one window. Needs Gradio (`pip install 'lora-dpo[demo]'`)."""
