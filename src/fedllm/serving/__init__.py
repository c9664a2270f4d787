"""Trained models talk: in the terminal, and through an OpenAI-compatible server."""
