"""From pictures and text to model inputs, and back."""
