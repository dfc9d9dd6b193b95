"""A model that answers many at once: a server with OpenAI's interface, and a chat in the terminal."""
