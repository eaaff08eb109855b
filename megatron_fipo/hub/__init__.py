"""Models and data sets by their names on the Hugging Face hub, and finished models to it.

Everything goes through huggingface_hub: its cache, its token, its environment variables (HF_HOME, HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE). What is fetched is files of data, never code.
"""
