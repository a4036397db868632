"""What can be seen of a half-made picture: previews, encoders, scorers."""
