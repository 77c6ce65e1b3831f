"""Rewrite + seed -> picture: `local` draws with a diffusers pipeline in this process. See `interfaces.Renderer`."""
