"""The decoder: layers, attention, loss, cache, and what it costs."""
