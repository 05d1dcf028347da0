"""Using what was trained: merging into a plain `.pth`, and generating text."""
