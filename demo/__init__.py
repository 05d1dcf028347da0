"""The main job end to end on real text, and a small chat."""
