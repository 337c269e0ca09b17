"""The HTTP edge: OpenAI's shapes outside, tokens and frozen records inside. The only web framework in the project."""
