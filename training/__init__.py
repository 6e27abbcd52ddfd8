"""From pictures and captions to trained models."""
