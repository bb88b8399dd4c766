"""OpenAI's Responses API, answered by the same core as chat completions. Nothing is stored."""
