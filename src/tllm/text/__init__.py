"""Strings and ids: tokenizers, chat templates, text from streams of tokens. Knows no model and no network."""
