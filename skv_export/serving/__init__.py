"""An exported model behind the HTTP endpoints that OpenAI's clients know."""
